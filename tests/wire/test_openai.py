"""What OpenAI's SDKs post to /v1, and what they get: byte by byte, without the packages."""

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from chatproxy import errors
from tests.conftest import HI, InProcessService, refusal, serving
from tests.readers import DONE, standard
from tests.upstream import CLOSE, HANG, Call, Gate, Step, Steps, Upstream, frame, stream
from tests.wire.test_errors import REFUSALS
from tests.wire.test_refusals import ANSWERS, Expected

pytestmark = pytest.mark.anyio

NASTY = ["Hel", "lo\r", "\n\r\n", "[DONE]", "\n[DONE]\n", " \u2028\u0085\0", "\U0001f600 ", "data: x\n\n", "\r"]
ORIGIN = "https://front.example"
PATH = "/v1/chat/completions"
WAITS = {"busy", "draining", "rate_limited", "upstream_rate_limited", "upstream_overloaded"}


@pytest.fixture(scope="module")
async def service(grok: Upstream) -> AsyncIterator[InProcessService]:
    async with serving(grok.url, max_body_bytes=60_000, max_messages=5, allowed_origins=ORIGIN) as service:
        yield service


async def ask(service: InProcessService, *messages: object, **fields: Any) -> httpx.Response:
    """What the SDKs post: they accept JSON for streams, too, and send a key even where none is wanted."""
    headers = {"Accept": "application/json", "Authorization": "Bearer any", **fields.pop("headers", {})}
    body = {"model": "grok-4.3", "messages": messages or HI, **fields}
    return await service.client.post(PATH, json=body, headers=headers)


def chunks(response: httpx.Response) -> list[Any]:
    """The chunks of a stream; `[DONE]` as it is. No event is without data, and there is nothing but data."""
    assert response.status_code == 200
    assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
    blocks = response.text.removesuffix("\n\n").split("\n\n")
    assert all(re.fullmatch("data: .+", block) for block in blocks)
    return [data if data == DONE else json.loads(data) for data, *_ in standard(response.content)]


def content(chunks: list[Any], field: str = "content") -> str:
    choices = [chunk["choices"][0] for chunk in chunks if chunk != DONE and chunk.get("choices")]
    return "".join(choice["delta"].get(field, "") for choice in choices)


# The stream.


async def test_stream_as_openai(grok: Upstream, service: InProcessService) -> None:
    """A stream as the SDKs read it: exactly these bytes, and the headers of every stream."""
    grok.set_scripts(stream("Hel", "lo\r\n", reasoning=["hm"]))
    response = await ask(service, stream=True, stream_options={"include_usage": True})
    pattern = r'data: (\{"id":"chatcmpl-[A-Za-z0-9_-]{22}","object":"chat.completion.chunk","created":(\d+))'
    found = re.match(pattern, response.text)
    assert found is not None
    assert abs(int(found[2]) - time.time()) < 60
    head = f'data: {found[1]},"model":"grok-4.3","choices":['
    usage = (
        '{"prompt_tokens":12,"completion_tokens":8,"total_tokens":20,'
        '"prompt_tokens_details":{"cached_tokens":4},"completion_tokens_details":{"reasoning_tokens":5}}'
    )
    assert response.text == (
        head + '{"index":0,"delta":{"role":"assistant","reasoning_content":"hm"},"finish_reason":null}]}\n\n'
        + head + '{"index":0,"delta":{"content":"Hel"},"finish_reason":null}]}\n\n'
        + head + '{"index":0,"delta":{"content":"lo\\r\\n"},"finish_reason":null}]}\n\n'
        + head + '{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'
        + head + f'],"usage":{usage}}}\n\n'
        + "data: [DONE]\n\n"
    )  # fmt: skip
    assert {name: response.headers.get(name) for name in ("Cache-Control", "X-Accel-Buffering")} == {
        "Cache-Control": "no-cache, no-transform, no-store",
        "X-Accel-Buffering": "no",
    }
    again = await ask(service, stream=True)
    assert found[1] not in again.text
    assert "usage" not in again.text


async def test_content_is_verbatim(grok: Upstream, service: InProcessService) -> None:
    """Streamed or whole, not a character is changed."""
    grok.set_scripts(stream(*NASTY, reasoning=["\r", "\nhm"]))
    streamed = chunks(await ask(service, stream=True))
    assert [content([chunk]) for chunk in streamed if content([chunk])] == NASTY
    assert content(streamed, "reasoning_content") == "\r\nhm"
    message = (await ask(service)).json()["choices"][0]["message"]
    assert (message["content"], message["reasoning_content"]) == ("".join(NASTY), "\r\nhm")


async def test_silence_as_empty_chunks() -> None:
    """Silence is filled with chunks in which nothing is; with comments some SDKs would break."""
    async with (
        Upstream([0.3, *stream("a", 0.3, "b")]) as grok,
        serving(grok.url, status_hold=0.05, keep_alive=0.05, grok_model="configured") as service,
    ):
        *told, done = chunks(await ask(service, stream=True, model=None))
    assert done == DONE
    assert content(told) == "ab"
    empty = [chunk for chunk in told[:-1] if chunk["choices"][0] == {"index": 0, "delta": {}, "finish_reason": None}]
    assert len({(chunk["id"], chunk["created"]) for chunk in told}) == 1
    assert {chunk["model"] for chunk in empty} == {"configured", "grok-4.3"}  # as long as Grok has not said its name
    assert empty[0] == told[0]


@pytest.mark.parametrize("streamed", [True, False])
async def test_program_that_stops(grok: Upstream, service: InProcessService, streamed: bool) -> None:
    """Who leaves, hangs up Grok at once."""
    gate = Gate()
    grok.set_scripts(stream("a", gate, HANG))
    async with service.caller() as caller:
        await caller.post({"messages": HI, "stream": streamed}, path=PATH)
        await asyncio.wait_for(gate.reached.wait(), 10)
        gate.open()
    await grok.calls[0].hung_up(within=1)


async def test_not_resumable_for_openai(grok: Upstream, service: InProcessService) -> None:
    """Nothing is kept here: what would make an answer resumable elsewhere means nothing."""
    grok.set_scripts(stream("a"))
    key = {"Idempotency-Key": "k"}
    for _ in range(2):
        response = await ask(service, stream=True, resumable=True, headers={**key, "Last-Event-ID": "canary"})
        assert content(chunks(response)) == "a"
        assert not {"Content-Location", "X-Resumable-Stream-Id"} & set(response.headers)
    assert len(grok.calls) == 2


async def test_answers_of_other_formats(grok: Upstream, service: InProcessService) -> None:
    """Who has seen an event of an answer in another format is told where it is, and pays no second one."""
    grok.set_scripts(stream("a"))
    native = await service.ask(resumable=True)
    event = standard(native.content)[0]
    response = await ask(service, stream=True, headers={"Last-Event-ID": event.id})
    problem = refusal(response)
    assert (response.status_code, problem["code"]) == (400, "invalid_last_event_id")
    assert "/api/chat/" in problem["message"]
    assert len(grok.calls) == 1


# One JSON.


async def test_whole_answer(grok: Upstream, service: InProcessService) -> None:
    """Without `stream` the answer is one JSON; Grok is asked for a stream all the same."""
    grok.set_scripts(stream("Hel", "lo", finish="length"))
    response = await ask(service)
    answer = response.json()
    assert re.fullmatch("chatcmpl-[A-Za-z0-9_-]{22}", answer.pop("id"))
    assert answer.pop("created") > 1_700_000_000
    assert answer == {
        "object": "chat.completion",
        "model": "grok-4.3",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hello", "refusal": None},
                "logprobs": None,
                "finish_reason": "length",
            }
        ],
        "usage": {
            "prompt_tokens": 12,
            "completion_tokens": 8,
            "total_tokens": 20,
            "prompt_tokens_details": {"cached_tokens": 4},
            "completion_tokens_details": {"reasoning_tokens": 5},
        },
    }
    assert grok.calls[0].body["stream"] is True
    names = ("Content-Type", "Cache-Control", "X-Accel-Buffering")
    assert [response.headers[name] for name in names] == [
        "application/json",
        "no-cache, no-transform, no-store",
        "no",
    ]


async def test_status_waits_for_the_end(grok: Upstream, service: InProcessService) -> None:
    """What fails before the hold is over has a true status, though there was text."""
    for script, kind in FAILURES:
        grok.set_scripts(script)
        response = await ask(service)
        assert (response.status_code, refusal(response)["code"]) == (kind.status, kind.code)
        assert response.headers["X-Should-Retry"] == "false"


FAILURES: list[tuple[list[Step], type[errors.ChatError]]] = [
    (stream("a", CLOSE), errors.UpstreamCutOff),
    (stream("a", frame({"error": "canary"})), errors.UpstreamFailed),
    (stream(""), errors.EmptyAnswer),
]


async def test_long_whole_answer() -> None:
    """After the hold the status goes out, then a space at a time, so that no proxy takes the silence for the end."""
    gate = Gate()
    async with (
        Upstream(stream("a", gate, "b")) as grok,
        serving(grok.url, status_hold=0.05, keep_alive=0.05) as service,
        service.caller() as caller,
    ):
        await caller.post({"messages": HI}, path=PATH)
        status, headers = await caller.head()
        assert (status, headers["content-type"]) == (200, "application/json")
        assert [await caller.piece() for _ in range(3)] == [b" "] * 3
        gate.open()
        body = b""
        while not body.strip():
            body += await caller.piece()
        assert json.loads(b"   " + body)["choices"][0]["message"]["content"] == "ab"
        assert await caller.piece() == b""


@pytest.mark.parametrize(("script", "kind"), FAILURES)
async def test_failure_of_a_long_whole_answer(script: list[Step], kind: type[errors.ChatError]) -> None:
    """A failure after the status ends the JSON well: a body that breaks off would be asked for, and paid, again."""
    gate = Gate()
    cut = next(
        number for number, step in enumerate(script) if b'"content"' in (step if isinstance(step, bytes) else b"")
    )
    played = [*script[: cut + 1], gate, *script[cut + 1 :]]
    async with (
        Upstream(played) as grok,
        serving(grok.url, status_hold=0.05, keep_alive=0.05) as service,
        service.client.stream("POST", PATH, json={"messages": HI}) as response,
    ):
        assert response.status_code == 200
        gate.open()
        problem = refusal(await _read(response))
    assert (problem["code"], problem["message"]) == (kind.code, kind.message)


async def _read(response: httpx.Response) -> httpx.Response:
    await response.aread()
    return response


@pytest.mark.parametrize("hold", [10, 0.05])
async def test_whole_answer_is_bounded(hold: float, caplog: pytest.LogCaptureFixture) -> None:
    """What would need more memory than a resumable answer may is a failure, and Grok is hung up on."""
    caplog.set_level("INFO", "chatproxy")
    async with (
        Upstream(stream("x" * 500, 0.2, "y" * 501, HANG)) as grok,
        serving(grok.url, replay_bytes=1000, status_hold=hold) as service,
    ):
        response = await ask(service)
        assert (response.status_code, refusal(response)["code"]) == (502 if hold == 10 else 200, "upstream_error")
        await grok.calls[0].hung_up()
    [line] = [record for record in caplog.records if record.getMessage() == "request"]
    assert (vars(line)["end"], vars(line)["code"]) == ("failed", "upstream_error")


# The request.


async def test_messages_as_asked(grok: Upstream, service: InProcessService) -> None:
    """Grok gets the texts of the messages that have some, under the roles that it knows, and nothing else."""
    grok.set_scripts(stream("ok"))
    image = {"type": "image_url", "image_url": {"url": "data:,canary"}}
    response = await ask(
        service,
        {"role": "developer", "content": "Be brief.", "name": "canary"},
        {"role": "user", "content": [{"type": "text", "text": "Look"}, image, 5, {"type": "text", "text": "!"}]},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "canary"}], "refusal": None},
        {"role": "assistant"},
        {"role": "assistant", "content": []},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": [{"type": "text", "text": "Well?\r\n"}]},
        **IGNORED,
    )
    assert response.status_code == 200
    sent = grok.calls[0].body
    assert sent["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Look!"},
        {"role": "user", "content": "Well?\r\n"},
    ]
    assert set(sent) == {"model", "messages", "stream", "stream_options"}
    assert b"canary" not in grok.calls[0].content


IGNORED: dict[str, Any] = {
    "temperature": 0.5,
    "top_p": 1,
    "max_tokens": 5,
    "max_completion_tokens": 5,
    "stop": ["canary"],
    "seed": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "logit_bias": {"1": 1},
    "logprobs": True,
    "top_logprobs": 2,
    "user": "canary",
    "metadata": {"canary": "canary"},
    "store": True,
    "service_tier": "auto",
    "reasoning_effort": "low",
    "verbosity": "low",
    "parallel_tool_calls": False,
    "canary": {"canary": []},
    # Present, but nothing is asked for.
    "tools": [],
    "functions": [],
    "tool_choice": "auto",
    "response_format": {"type": "text"},
    "n": 1,
    "modalities": ["text"],
    "audio": None,
    "stream": None,
    "stream_options": None,
    "web_search_options": None,
}


async def test_cache_key_as_session(grok: Upstream, service: InProcessService) -> None:
    """`prompt_cache_key` is what `sessionId` is elsewhere."""
    grok.set_scripts(stream("ok"))
    await ask(service, prompt_cache_key="a")
    await service.ask(sessionId="a")
    await ask(service)
    keyed, native, none = (call.headers.get("x-grok-conv-id") for call in grok.calls)
    assert keyed == native is not None
    assert none is None


def turn(content: object = "canary", role: str = "user") -> dict[str, object]:
    return {"role": role, "content": content}


IMAGE = {"type": "image_url", "image_url": {"url": "canary"}}
TEXT = {"type": "text", "text": "canary"}

BAD: dict[str, tuple[object, str | None]] = {
    "no messages": ({}, "messages"),
    "an empty list": ({"messages": []}, "messages"),
    "messages as text": ({"messages": "canary"}, "messages"),
    "a message as text": ({"messages": ["canary"]}, "messages[0]"),
    "no role": ({"messages": [{"content": "canary"}]}, "messages[0].role"),
    "a tool's role": ({"messages": [turn(), turn(role="tool")]}, "messages[1].role"),
    "a function's role": ({"messages": [turn(role="function"), turn()]}, "messages[0].role"),
    "a number as content": ({"messages": [turn(5)]}, "messages[0].content"),
    "no text at the end": ({"messages": [turn(), turn("")]}, "messages[1].content"),
    "null at the end": ({"messages": [turn(), turn(None)]}, "messages[1].content"),
    "no parts at the end": ({"messages": [turn(), turn([])]}, "messages[1].content"),
    "an image": ({"messages": [turn([TEXT, IMAGE])]}, "messages[0].content[1]"),
    "audio in the message": ({"messages": [turn([{"type": "input_audio"}])]}, "messages[0].content[0]"),
    "a part as text": ({"messages": [turn(["canary"])]}, "messages[0].content[0]"),
    "a text that is a list": ({"messages": [turn([{"type": "text", "text": []}])]}, "messages[0].content[0].text"),
    "stream as text": ({"stream": "yes"}, "stream"),
    "options as text": ({"stream_options": "canary"}, "stream_options"),
    "usage as text": ({"stream_options": {"include_usage": "canary"}}, "stream_options.include_usage"),
    "a model that is a number": ({"model": 5}, "model"),
    "tools of one's own": ({"tools": [{"type": "function", "function": {"name": "canary"}}]}, "tools"),
    "an unknown tool": ({"tools": [{"type": "canary"}]}, "tools"),
    "a tool without a type": ({"tools": [{}]}, "tools[0].type"),
    "functions": ({"functions": [{"name": "canary"}]}, "functions"),
    "a tool that is forced": ({"tool_choice": "required"}, "tool_choice"),
    "a function that is forced": ({"tool_choice": {"type": "function"}}, "tool_choice"),
    "JSON wanted": ({"response_format": {"type": "json_object"}}, "response_format"),
    "a schema": ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format"),
    "two choices": ({"n": 2}, "n"),
    "no choice": ({"n": 0}, "n"),
    "choices as text": ({"n": "2"}, "n"),
    "speech": ({"modalities": ["text", "audio"]}, "modalities"),
    "a voice": ({"audio": {"voice": "canary"}}, "audio"),
    "search options as text": ({"web_search_options": "canary"}, "web_search_options"),
}


@pytest.mark.parametrize(("fields", "param"), BAD.values(), ids=BAD.keys())
@pytest.mark.parametrize("streamed", [True, False])
async def test_bad_completions(
    grok: Upstream, service: InProcessService, fields: dict[str, object], param: str, streamed: bool
) -> None:
    """What asks for another answer than there is, is a 400 that names the field; Grok is not asked, nor we again."""
    grok.set_scripts()
    body = {**({} if "messages" in fields or not fields else {"messages": HI}), "stream": streamed, **fields}
    response = await service.client.post(PATH, json=body)
    problem = refusal(response)
    assert (response.status_code, problem["code"], problem["param"]) == (400, "invalid_request", param)
    assert response.headers["X-Should-Retry"] == "false"
    assert "canary" not in response.text
    assert grok.calls == []


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b'{"messages": [', 400, "invalid_json"),
        (b'{"messages": [{"role": "user", "content": [{"type": "text", "text": "\\x41"}]}]}', 400, "invalid_json"),
        (json.dumps({"messages": [turn()] * 1000}).encode(), 413, "too_many_messages"),
        (json.dumps({"messages": [turn("x" * 60_000)]}).encode(), 413, "body_too_large"),
        (
            b'{"messages": [%b, %b]}' % ((b'{"role": "user", "content": [0%b]}' % (b",0" * 12_000),) * 2),
            413,
            "too_many_messages",
        ),
    ],
)
async def test_bad_bodies(grok: Upstream, service: InProcessService, body: bytes, status: int, code: str) -> None:
    """Malformed and oversized bodies are refused here as elsewhere."""
    grok.set_scripts()
    response = await service.client.post(PATH, content=body, headers={"Content-Type": "application/json"})
    assert (response.status_code, refusal(response)["code"]) == (status, code)
    assert response.headers["X-Should-Retry"] == "false"
    assert "canary" not in response.text
    assert grok.calls == []


@pytest.mark.parametrize("model", ["gpt-4o", "", "Grok-4.3"])
async def test_other_models(grok: Upstream, service: InProcessService, model: str) -> None:
    """Another model is not silently replaced."""
    grok.set_scripts()
    response = await ask(service, model=model)
    problem = refusal(response)
    assert (response.status_code, problem["code"], problem["param"]) == (404, "model_not_found", "model")
    assert "/v1/models" in problem["message"]
    assert response.headers["X-Should-Retry"] == "false"
    assert grok.calls == []


# Failures.


@pytest.mark.parametrize(("script", "kind"), FAILURES)
async def test_failure_in_the_stream(
    grok: Upstream, service: InProcessService, script: list[Step], kind: type[errors.ChatError]
) -> None:
    """After the status the error stands in a chunk's place; no `[DONE]` follows, without which SDKs see no error."""
    grok.set_scripts(script)
    response = await ask(service, stream=True)
    *_, end = chunks(response)
    assert end == {
        "error": {
            "type": "upstream_error",
            "code": kind.code,
            "message": kind.message,
            "param": None,
            "request_id": response.headers["X-Request-ID"],
        }
    }


def may_retry(response: httpx.Response) -> bool:
    """Whether the SDKs may ask again; they obey this header, and wait for the other one."""
    wait = int(response.headers.get("Retry-After", "999"))
    assert response.headers.get("X-Should-Retry") == (None if wait <= 60 else "false")
    return wait <= 60


@pytest.mark.parametrize("streamed", [True, False])
async def test_table_of_grok_for_sdks(streamed: bool) -> None:
    """The table of Grok's refusals holds, each with what keeps an SDK from asking, and paying, again."""
    answers = {name: row for name, row in ANSWERS.items() if row[1][0] != 429}

    def script(call: Call) -> Steps:
        answer, _ = answers[call.body["messages"][0]["content"]]
        return answer(call) if callable(answer) else answer

    async with Upstream(script) as grok, serving(grok.url, grok_retries=0) as service:
        async with asyncio.TaskGroup() as group:
            tasks = {name: group.create_task(ask(service, turn(name), stream=streamed)) for name in answers}
        assert len(grok.calls) == len(answers)
    told: dict[str, Expected] = {}
    for name, task in tasks.items():
        response = task.result()
        told[name] = response.status_code, refusal(response)["code"], response.headers.get("Retry-After")
        assert may_retry(response) == (told[name][1] in WAITS)
    assert told == {name: expected for name, (_, expected) in answers.items()}


@pytest.mark.parametrize("name", [name for name, (_, expected) in ANSWERS.items() if expected[0] == 429])
async def test_limits_of_grok_for_sdks(name: str) -> None:
    """A Grok that is asked too often: a wait that the SDKs would not keep is none to them."""
    script, expected = ANSWERS[name]
    async with Upstream(script) as grok, serving(grok.url, grok_retries=0) as service:
        response = await ask(service)
    assert (response.status_code, refusal(response)["code"], response.headers.get("Retry-After")) == expected
    assert may_retry(response) == (expected[2] != "120")


V1_BODY = json.dumps({"messages": [turn()]}).encode()
SHARED = [row for row in REFUSALS if row[3] not in ("invalid_json", "invalid_request", "too_many_messages")]
SHARED = [row for row in SHARED if row[3] not in ("not_acceptable", "stream_not_found")]


@pytest.mark.parametrize(
    ("settings", "request_", "status", "code"),
    [row[:4] for row in SHARED],
    ids=[f"{row[3]} {number}" for number, row in enumerate(SHARED)],
)
async def test_own_refusals_for_sdks(
    grok: Upstream, settings: dict[str, Any], request_: dict[str, Any], status: int, code: str
) -> None:
    """What the service itself refuses has the status that everybody gets, and says whether to ask again."""
    grok.set_scripts(stream("a", HANG))
    settings = {**settings, "max_body_bytes": 50} if code == "body_too_large" else settings
    path = request_["url"].replace("/api/chat", PATH)
    async with serving(grok.url, **settings) as service, service.caller() as caller:
        running = 0
        if "rate_limit" in settings or any(name.startswith("max_streams") for name in settings):
            running = 1
            await caller.post({"messages": HI, "stream": True}, path=PATH)
            await caller.until(b'"content":"a"')
        response = await service.client.request(**{**request_, "url": path, "content": V1_BODY})
        assert (response.status_code, refusal(response)["code"]) == (status, code)
        assert may_retry(response) == (code in WAITS)
        assert "canary" not in response.text
        assert len(grok.calls) == running


async def test_long_wait_for_sdks(grok: Upstream) -> None:
    """A wait of more than a minute is one that the SDKs do not keep: they are told not to ask again."""
    grok.set_scripts(stream("a"))
    async with serving(grok.url, rate_limit="1/hour") as service:
        assert (await ask(service)).headers["RateLimit"].startswith('"chats";r=0')
        response = await ask(service)
    assert (response.status_code, response.headers["X-Should-Retry"]) == (429, "false")
    assert int(response.headers["Retry-After"]) > 60


async def test_internal_error_for_sdks(
    service: InProcessService, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A mistake of ours is a 500 that says not to ask again."""

    def broken(*_: object) -> None:
        raise ZeroDivisionError("canary")

    monkeypatch.setattr("chatproxy.formats.openai.decode_body", broken)
    response = await ask(service)
    assert (response.status_code, refusal(response)["code"]) == (500, "internal_error")
    assert response.headers["X-Should-Retry"] == "false"
    caplog.clear()


# Pages of other origins.


async def test_preflight_of_sdks(service: InProcessService) -> None:
    """The SDKs' own headers are allowed, those of versions to come, too, and a page can read what it must obey."""
    asked = "authorization, content-type, x-stainless-lang, x-stainless-new-one, openai-project, user-agent, x-evil"
    headers = {
        "Origin": ORIGIN,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": asked,
    }
    response = await service.client.options(PATH, headers=headers)
    allowed = response.headers["Access-Control-Allow-Headers"].lower().split(", ")
    assert set(asked.split(", ")) - set(allowed) == {"x-evil"}
    refused = await ask(service, n=2, headers={"Origin": ORIGIN})
    exposed = refused.headers["Access-Control-Expose-Headers"].split(", ")
    assert {"X-Should-Retry", "X-Resumable-Stream-Id", "Retry-After", "X-Request-ID"} <= set(exposed)


# The models.


async def test_models(grok: Upstream) -> None:
    """There is one model. Asking for it is no chat, and asks Grok nothing."""
    grok.set_scripts()
    async with serving(grok.url, grok_model="grok-x", rate_limit="1/hour") as service:
        entry = {"id": "grok-x", "object": "model", "created": 0, "owned_by": "xai"}
        for _ in range(3):
            assert (await service.client.get("/v1/models")).json() == {"object": "list", "data": [entry]}
        assert (await service.client.get("/v1/models/grok-x")).json() == entry
        assert (await service.client.head("/v1/models")).status_code == 200
        other = await service.client.get("/v1/models/gpt-4o")
        assert (other.status_code, refusal(other)["code"]) == (404, "model_not_found")
        slash = await service.client.get("/v1/models/")
        assert (slash.status_code, refusal(slash)["code"]) == (404, "not_found")
    assert grok.calls == []


async def test_model_with_a_slash(grok: Upstream) -> None:
    """Models of other providers have such names; some SDKs encode the slash, others do not."""
    async with serving(grok.url, grok_model="x-ai/grok-4") as service:
        for path in ("/v1/models/x-ai/grok-4", "/v1/models/x-ai%2Fgrok-4"):
            assert (await service.client.get(path)).json()["id"] == "x-ai/grok-4"
        other = await service.client.get("/v1/models/x-ai/grok-3")
        assert (other.status_code, refusal(other)["code"]) == (404, "model_not_found")
        metrics = (await service.client.get("/metrics")).text
        assert 'chatproxy_requests_total{route="/v1/models/{id}",status="200"} 2.0' in metrics


async def test_models_want_the_token(grok: Upstream) -> None:
    """Where tokens are set, the list wants one: that is how some programs test what they were given."""
    async with serving(grok.url, access_tokens="t" * 16) as service:
        for path in ("/v1/models", "/v1/models/grok-4.3"):
            response = await service.client.get(path)
            assert (response.status_code, refusal(response)["code"]) == (401, "unauthorized")
            assert response.headers["WWW-Authenticate"] == "Bearer"
            assert response.headers["X-Should-Retry"] == "false"
            allowed = await service.client.get(path, headers={"Authorization": f"Bearer {'t' * 16}"})
            assert allowed.status_code == 200


@pytest.mark.parametrize("path", ["/v1", "/v1/", "/v1/responses", "/v1/completions", "/v1/embeddings", PATH + "/"])
async def test_nothing_else_of_openai(grok: Upstream, service: InProcessService, path: str) -> None:
    """What else OpenAI has is a 404 in the one form that errors have."""
    grok.set_scripts()
    response = await service.client.post(path, json={"messages": HI})
    assert (response.status_code, refusal(response)["code"]) == (404, "not_found")
    assert grok.calls == []
