"""What `useChat` posts to /api/chat, what it gets, and how it comes back: byte by byte, without the package."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

import httpx
import pytest

from chatproxy import errors
from tests.conftest import InProcessService, LiveStream, refusal, serving
from tests.readers import DONE, Event, comments, standard
from tests.upstream import CLOSE, HANG, Call, Gate, Step, Steps, Upstream, error, frame, frames, sse, stream
from tests.wire.test_errors import REFUSALS
from tests.wire.test_refusals import ANSWERS

pytestmark = pytest.mark.anyio

NASTY = ["Hel", "lo\r", "\n\r\n", "[DONE]", "\n[DONE]\n", " \u2028\u0085\0", "\U0001f600 ", "data: x\n\n", "\r"]


@pytest.fixture(scope="module")
async def service(grok: Upstream) -> AsyncIterator[InProcessService]:
    async with serving(grok.url, max_body_bytes=60_000, max_messages=5) as service:
        yield service


def message(*texts: str, role: str = "user", **fields: object) -> dict[str, Any]:
    """A message as `useChat` makes it."""
    return {"id": "x", "role": role, "parts": [{"type": "text", "text": text} for text in texts], **fields}


async def ask(service: InProcessService, *messages: dict[str, Any], **fields: Any) -> httpx.Response:
    """What `useChat` posts."""
    headers = fields.pop("headers", {"Accept": "*/*"})
    body = {"id": "chat", "messages": messages or [message("Hi")], "trigger": "submit-message", **fields}
    return await service.client.post("/api/chat", json=body, headers=headers)


def chunks(response: httpx.Response) -> list[Any]:
    """The chunks of a UI message stream; `[DONE]` as it is."""
    assert response.status_code == 200
    return read(standard(response.content))


def read(events: list[Event]) -> list[Any]:
    assert {event.type for event in events} <= {"message"}
    return [event.data if event.data == DONE else json.loads(event.data) for event in events]


def text(chunks: list[Any]) -> str:
    return "".join(chunk["delta"] for chunk in chunks if chunk != DONE and chunk["type"] == "text-delta")


# The wire.


async def test_stream_of_chunks(grok: Upstream, service: InProcessService) -> None:
    """An answer as `useChat` reads it: exactly these bytes, with the headers of every stream and one more."""
    grok.set_scripts(stream("Hel", "lo\r\n", reasoning=["hm"]))
    response = await ask(service)
    [first, rest] = response.text.split("\n\n", 1)
    id = re.fullmatch(r'data: \{"type":"start","messageId":"([A-Za-z0-9_-]{22})"\}', first)
    assert id is not None
    usage = '{"inputTokens":12,"outputTokens":8,"totalTokens":20,"reasoningTokens":5,"cachedInputTokens":4}'
    assert rest == (
        'data: {"type":"start-step"}\n\n'
        'data: {"type":"reasoning-start","id":"1"}\n\n'
        'data: {"type":"reasoning-delta","id":"1","delta":"hm"}\n\n'
        'data: {"type":"reasoning-end","id":"1"}\n\n'
        'data: {"type":"text-start","id":"2"}\n\n'
        'data: {"type":"text-delta","id":"2","delta":"Hel"}\n\n'
        'data: {"type":"text-delta","id":"2","delta":"lo\\r\\n"}\n\n'
        'data: {"type":"text-end","id":"2"}\n\n'
        'data: {"type":"finish-step"}\n\n'
        'data: {"type":"finish","finishReason":"stop","messageMetadata":{"model":"grok-4.3","usage":' + usage + "}}\n\n"
        "data: [DONE]\n\n"
    )
    assert {name: response.headers.get(name) for name in ("Content-Type", "Cache-Control", "X-Accel-Buffering")} == {
        "Content-Type": "text/event-stream; charset=utf-8",
        "Cache-Control": "no-cache, no-transform, no-store",
        "X-Accel-Buffering": "no",
    }
    assert response.headers["X-Vercel-AI-UI-Message-Stream"] == "v1"
    assert not {"Content-Location", "X-Resumable-Stream-Id"} & set(response.headers)
    assert chunks(await ask(service))[0]["messageId"] != id[1]


async def test_text_is_verbatim(grok: Upstream, service: InProcessService) -> None:
    """JSON can carry what an event stream cannot: not a character is changed, and no delta is cut or lost."""
    grok.set_scripts(stream(*NASTY))
    told = chunks(await ask(service))
    assert [chunk["delta"] for chunk in told if "delta" in chunk] == NASTY


async def test_keep_alive_between_chunks() -> None:
    """Silence is filled with comments, before the first chunk, too."""
    async with (
        Upstream([0.3, *stream("a", 0.3, "b")]) as grok,
        serving(grok.url, status_hold=0.05, keep_alive=0.05) as service,
    ):
        response = await ask(service)
    assert text(chunks(response)) == "ab"
    told = response.text
    assert told.startswith(": keep-alive\n\n")
    assert ": keep-alive\n\n" in told[told.index('"delta":"a"') :]
    assert set(comments(response.content)) == {"keep-alive"}


async def test_page_that_stops(grok: Upstream, service: InProcessService) -> None:
    """`stop()` is a closed connection: Grok's is closed at once."""
    grok.set_scripts(stream("a", HANG))
    async with service.caller() as caller:
        await caller.post({"id": "c", "messages": [message("Hi")]})
        await caller.until(b'"delta":"a"}\n\n')
    await grok.calls[0].hung_up(within=1)


@pytest.mark.parametrize("accept", ["application/json", "application/json, text/plain, */*", "*/*", ""])
async def test_never_an_address(grok: Upstream, service: InProcessService, accept: str) -> None:
    """Whatever it accepts, it gets the stream."""
    grok.set_scripts(stream("ok"))
    response = await ask(service, headers={"Accept": accept})
    assert text(chunks(response)) == "ok"


# The request.


async def test_history_as_asked(grok: Upstream, service: InProcessService) -> None:
    """Grok gets the texts and nothing else: foreign parts are left out, and so are messages without text."""
    grok.set_scripts(stream("ok"))
    foreign = [
        {"type": "step-start"},
        {"type": "reasoning", "text": "canary", "state": "done"},
        {"type": "source-url", "sourceId": "1", "url": "https://canary.example"},
        {"type": "file", "mediaType": "image/png", "url": "data:image/png;base64,canary"},
        {"type": "data-x", "text": 5, "data": {"canary": [1e999]}},
        {"type": "tool-x", "text": ["canary"]},
        {"type": 5, "text": "canary"},
        {"text": "canary"},
        *("canary", 5, None, ["canary"]),
    ]
    body = {
        "id": "chat",
        "messages": [
            message("Be ", "brief.", role="system", metadata={"canary": 1}),
            {"id": "y", "role": "user", "parts": [*foreign, {"type": "text", "text": "Hi", "state": "done"}, *foreign]},
            {"id": "z", "role": "assistant", "parts": foreign},
            {"id": "z", "role": "assistant", "parts": []},
            message("", " And?\r\n", ""),
        ],
        "trigger": "regenerate-message",
        "messageId": "z",
        "tools": {"canary": {"parameters": {}}},
        "system": "canary",
        "canary": [],
    }
    content = json.dumps(body).replace("Infinity", "1e999")
    response = await service.client.post("/api/chat", content=content, headers={"Content-Type": "application/json"})
    assert text(chunks(response)) == "ok"
    assert grok.calls[0].body["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "user", "content": " And?\r\n"},
    ]
    assert b"canary" not in grok.calls[0].content


async def test_chat_id_as_session(grok: Upstream, service: InProcessService) -> None:
    """The chat's id makes Grok's prompt cache hit; a session id of the body goes before it."""
    grok.set_scripts(stream("ok"))
    for fields in ({"id": "a"}, {"id": "a"}, {"id": "b"}, {"id": "b", "sessionId": "a"}):
        await ask(service, **fields)
    first, again, other, named = (call.headers["x-grok-conv-id"] for call in grok.calls)
    assert first == again == named != other
    assert "x-grok-conv-id" not in (await _call(grok, service, id=None)).headers


async def _call(grok: Upstream, service: InProcessService, **fields: object) -> Call:
    await ask(service, **fields)
    return grok.calls[-1]


async def test_half_an_emoji_in_a_part(grok: Upstream, service: InProcessService) -> None:
    """What JavaScript cuts inside an emoji becomes U+FFFD, wherever it is."""
    grok.set_scripts(stream("ok"))
    body = rb'{"messages": [{"role": "user", "parts": [{"type": "text", "text": "\ud83d!"}], "\ud83d": "\ud83d"}]}'
    response = await service.client.post("/api/chat", content=body, headers={"Content-Type": "application/json"})
    assert text(chunks(response)) == "ok"
    assert grok.calls[0].body["messages"] == [{"role": "user", "content": "\ufffd!"}]


def last(*parts: object, **fields: object) -> dict[str, Any]:
    """A body whose last message has these parts."""
    return {"messages": [message("Hi"), {"role": "user", "parts": parts}], **fields}


FILE = {"type": "file", "mediaType": "image/png", "url": "data:,canary"}
TEXT = {"type": "text", "text": "canary"}

BAD: dict[str, tuple[object, int, str, str | None]] = {
    "a last message without parts": (last(), 422, "invalid_request", "messages[1].parts"),
    "a last message without text": (last({"type": "reasoning", "text": "canary"}), 422, "invalid_request",
                                    "messages[1].parts"),
    "an empty text": (last({"type": "text", "text": ""}), 422, "invalid_request", "messages[1].parts"),
    "a file": (last(TEXT, FILE), 422, "invalid_request", "messages[1].parts[1]"),
    "a text that is a number": (last({"type": "text", "text": 5}), 422, "invalid_request", "messages[1].parts[0].text"),
    "a text that is null": (last({"type": "text", "text": None}), 422, "invalid_request", "messages[1].parts[0].text"),
    "a text part without text": (last({"type": "text"}), 422, "invalid_request", "messages[1].parts[0].text"),
    "parts that are null": ({"messages": [{"role": "user", "parts": None}]}, 422, "invalid_request",
                            "messages[0].parts"),
    "parts that are text": ({"messages": [{"role": "user", "parts": "canary"}]}, 422, "invalid_request",
                            "messages[0].parts"),
    "parts beside content": ({"messages": [message("Hi"), {"role": "user", "content": "canary"}]}, 422,
                             "invalid_request", "messages[1].parts"),
    "content beside parts only": ({"messages": [{"role": "boss", "content": "a", "parts": [TEXT]}]}, 422,
                                  "invalid_request", "messages[0].role"),
    "another role": ({"messages": [message("Hi", role="tool")]}, 422, "invalid_request", "messages[0].role"),
    "no role": ({"messages": [{"parts": [TEXT]}]}, 422, "invalid_request", "messages[0].role"),
    "an id that is a number": (last(TEXT, id=5), 422, "invalid_request", "id"),
    "an unknown include": (last(TEXT, include=["canary"]), 422, "invalid_request", "include[0]"),
    "resumable as text": (last(TEXT, resumable="yes"), 422, "invalid_request", "resumable"),
    "an unknown tool": (last(TEXT, tools=["canary"]), 422, "invalid_request", "tools[0]"),
    "tools as text": (last(TEXT, tools="canary"), 422, "invalid_request", "tools"),
    "too many messages": ({"messages": [message("canary")] * 700}, 413, "too_many_messages", "messages"),
    "too large": ({"messages": [message("x" * 60_000)]}, 413, "body_too_large", None),
    "a bad escape in a text": (rb'{"messages": [{"role": "user", "parts": [{"type": "text", "text": "\x41"}]}]}', 400,
                               "invalid_json", None),
    "cut short": (b'{"messages": [{"role": "user", "parts": [', 400, "invalid_json", None),
}  # fmt: skip


@pytest.mark.parametrize(("body", "status", "code", "param"), BAD.values(), ids=BAD.keys())
async def test_bad_chats(
    grok: Upstream, service: InProcessService, body: object, status: int, code: str, param: str
) -> None:
    """What cannot be answered is refused with the field's name and without its value, and Grok is not asked."""
    grok.set_scripts()
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = await service.client.post("/api/chat", content=content, headers={"Content-Type": "application/json"})
    problem = refusal(response)
    assert (response.status_code, problem["code"], problem["param"]) == (status, code, param)
    assert "canary" not in response.text
    assert grok.calls == []


async def test_refused_message_in_the_history(grok: Upstream, service: InProcessService) -> None:
    """A file that was refused stays in the page's history, and does not end the chat."""
    grok.set_scripts(stream("ok"))
    response = await ask(service, {"role": "user", "parts": [FILE, {"type": "text", "text": "Look"}]}, message("Well?"))
    assert text(chunks(response)) == "ok"
    assert [turn["content"] for turn in grok.calls[0].body["messages"]] == ["Look", "Well?"]


@pytest.mark.parametrize("part", [b"{}", b"[]", b'{"type":"text","text":""}'])
async def test_nothing_but_parts(part: bytes) -> None:
    """A large body that is nothing but structure is more than anybody sends, and holds up nobody."""
    parts = b",".join([part] * (900_000 // (len(part) + 1)))
    body = b'{"messages": [{"role": "user", "parts": [' + parts + b"]}]}"
    loop = asyncio.get_running_loop()
    async with Upstream() as grok, serving(grok.url) as service:
        began = loop.time()
        response = await service.client.post("/api/chat", content=body, headers={"Content-Type": "application/json"})
        assert loop.time() - began < 1
    assert (response.status_code, refusal(response)["code"]) == (413, "too_many_messages")


# Failures.


@pytest.mark.parametrize(
    ("script", "code"),
    [
        (stream("a", CLOSE), errors.UpstreamCutOff),
        (stream("a", frame({"error": "canary"})), errors.UpstreamFailed),
        (stream(""), errors.EmptyAnswer),
    ],
)
async def test_failed_message(
    grok: Upstream, service: InProcessService, script: list[Step], code: type[errors.ChatError]
) -> None:
    """A failure after the status is an `error` chunk with our sentence, and the last one."""
    grok.set_scripts(script)
    *_, end = chunks(await ask(service))
    assert end == {"type": "error", "errorText": code.message}


async def test_failure_after_its_usage(grok: Upstream, service: InProcessService) -> None:
    """What Grok had told of the end becomes metadata of the message that failed."""
    grok.set_scripts([*stream("a", finish=None, done=False), CLOSE])
    *_, metadata, end = chunks(await ask(service))
    assert metadata["type"] == "message-metadata"
    assert metadata["messageMetadata"]["usage"]["outputTokens"] == 8
    assert end["type"] == "error"


async def test_refusals_of_grok_before_the_status() -> None:
    """Before the status the table of Grok's refusals is the same as for everybody."""
    answers = {name: row for name, row in ANSWERS.items() if row[1][0] != 429}

    def script(call: Call) -> Steps:
        answer, _ = answers[call.body["messages"][0]["content"]]
        return answer(call) if callable(answer) else answer

    async with Upstream(script) as grok, serving(grok.url, grok_retries=0) as service:
        async with asyncio.TaskGroup() as group:
            tasks = {name: group.create_task(ask(service, message(name))) for name in answers}
        calls = len(grok.calls)
    told = {
        name: (task.result().status_code, refusal(task.result())["code"], task.result().headers.get("Retry-After"))
        for name, task in tasks.items()
    }
    assert told == {name: expected for name, (_, expected) in answers.items()}
    assert calls == len(answers)


async def test_refusals_of_grok_after_the_hold() -> None:
    """After the hold they are the `error` chunk, alone, with the sentence that belongs to the code."""
    sentences = {
        getattr(kind, "code", None): kind.message
        for base in (errors.RequestError, errors.UpstreamError)
        for kind in base.__subclasses__()
    }
    answers = {name: row for name, row in ANSWERS.items() if row[1][0] != 429}

    def script(call: Call) -> Steps:
        answer, _ = answers[call.body["messages"][0]["content"]]
        return [0.3, *(answer(call) if callable(answer) else answer)]

    async with (
        Upstream(script) as grok,
        serving(grok.url, grok_retries=0, status_hold=0.05) as service,
        asyncio.TaskGroup() as group,
    ):
        tasks = {name: group.create_task(ask(service, message(name))) for name in answers}
    told = {name: chunks(task.result()) for name, task in tasks.items()}
    assert told == {
        name: [{"type": "error", "errorText": sentences[code]}] for name, (_, (_, code, _)) in answers.items()
    }


UI_BODY = json.dumps({"messages": [message("canary")]}).encode()
SHARED = [row for row in REFUSALS if row[3] not in ("invalid_json", "invalid_request", "too_many_messages")]


@pytest.mark.parametrize(
    ("settings", "request_", "status", "code"),
    [row[:4] for row in SHARED],
    ids=[f"{row[3]} {number}" for number, row in enumerate(SHARED)],
)
async def test_own_refusals(
    grok: Upstream, settings: dict[str, Any], request_: dict[str, Any], status: int, code: str
) -> None:
    """What the service itself refuses has the status that everybody gets, and Grok is not asked."""
    grok.set_scripts(stream("a", HANG))
    settings = {**settings, "max_body_bytes": 80} if code == "body_too_large" else settings
    async with serving(grok.url, **settings) as service, service.caller() as caller:
        running = 0
        if "rate_limit" in settings or any(name.startswith("max_streams") for name in settings):
            running = 1
            await caller.post({"messages": [message("Hi")]})
            await caller.until(b'"delta":"a"}\n\n')
        headers = {name: value for name, value in request_["headers"].items() if name != "accept" or status == 406}
        response = await service.client.request(**{**request_, "content": UI_BODY, "headers": headers})
        assert (response.status_code, refusal(response)["code"]) == (status, code)
        assert "canary" not in response.text
        assert len(grok.calls) == running


# Coming back.


def uuid() -> str:
    return str(uuid4())


async def come_back(service: InProcessService, chat: str, **headers: str) -> httpx.Response:
    """What `useChat` sends on a page load."""
    return await service.client.get(f"/api/chat/{chat}/stream", headers=headers)


async def test_reload_of_a_chat(grok: Upstream, service: InProcessService) -> None:
    """A page that is loaded again gets the answer from its start, under the same message id, and Grok is asked once."""
    gate, chat = Gate(), uuid()
    grok.set_scripts(stream("a", gate, "b\r\n"))
    async with service.client.stream("POST", "/api/chat", json=ui_body(chat)) as response:
        live = LiveStream(response)
        start = json.loads((await live.event()).data)
        while '"delta":"a"' not in (await live.event()).data:
            pass
        own = response.headers["X-Resumable-Stream-Id"]
        assert response.headers["Content-Location"] == f"/api/chat/{own}/stream"
    async with service.client.stream("GET", f"/api/chat/{chat.upper()}/stream") as response:
        assert response.status_code == 200
        assert response.headers["X-Vercel-AI-UI-Message-Stream"] == "v1"
        assert response.headers["X-Resumable-Stream-Id"] == own
        gate.open()
        events = await LiveStream(response).rest()
    told = read(events)
    assert told[0] == start == {"type": "start", "messageId": own}
    assert (text(told), told[-1]) == ("ab\r\n", DONE)
    assert [event.id for event in events] == [f"{own}-{number + 1}" for number in range(len(events))]
    assert len(grok.calls) == 1


def ui_body(chat: str | None, **fields: object) -> dict[str, Any]:
    """What a page posts that means to come back."""
    return {"id": chat, "messages": [message("Hi")], "resumable": True, **fields}


async def test_nothing_to_come_back_to(grok: Upstream, service: InProcessService) -> None:
    """On every page load `useChat` asks; where nothing is left to read, the answer is 204. Our own ids get a 404."""
    grok.set_scripts(stream("a"))
    chat = uuid()
    assert (await come_back(service, chat)).status_code == 204
    response = await ask(service, id=chat, resumable=True)
    own = response.headers["X-Resumable-Stream-Id"]
    assert (await come_back(service, chat)).status_code == 204  # read to its end
    assert read(standard((await come_back(service, own)).content)) == chunks(response)
    head = await service.client.head(f"/api/chat/{own}/stream")
    assert (head.status_code, head.headers["X-Vercel-AI-UI-Message-Stream"]) == (200, "v1")
    assert (await service.client.head(f"/api/chat/{chat}/stream")).status_code == 204
    unknown = await come_back(service, "0" * 22)
    assert (unknown.status_code, refusal(unknown)["code"]) == (404, "stream_not_found")
    assert len(grok.calls) == 1


@pytest.mark.parametrize("chat", ["chat", "aBcDeFgHiJkLmNoP", "0" * 22, "{}", None])
async def test_ids_that_can_be_guessed(grok: Upstream, service: InProcessService, chat: str | None) -> None:
    """A chat id that is no UUID opens nothing: the answer can be read by its own id only."""
    grok.set_scripts(stream("a", HANG))
    async with service.client.stream("POST", "/api/chat", json=ui_body(chat)) as response:
        live = LiveStream(response)
        await live.event()
        assert (await come_back(service, str(chat))).status_code == (404 if chat == "0" * 22 else 204)
        await service.client.delete(f"/api/chat/{chat}")
        assert grok.playing == 1
        stopped = await service.client.post(response.headers["Content-Location"].replace("/stream", "/stop"))
        assert stopped.status_code == 204
        *_, end = read(await live.rest())
    assert end == {"type": "error", "errorText": errors.Stopped.message}


async def test_not_resumable_by_chat_id(grok: Upstream, service: InProcessService) -> None:
    """Where the page did not ask for it, a chat id opens nothing, and a closed connection is the end."""
    grok.set_scripts(stream("a", HANG))
    chat, key = uuid(), {"Idempotency-Key": uuid()}
    body = ui_body(chat, resumable=False)
    async with service.client.stream("POST", "/api/chat", json=body, headers=key) as response:
        await LiveStream(response).event()
        assert (await come_back(service, chat)).status_code == 204
        await service.client.delete(f"/api/chat/{response.headers['X-Resumable-Stream-Id']}")
    grok.set_scripts(stream("a", HANG))
    async with service.client.stream("POST", "/api/chat", json=ui_body(chat, resumable=False)) as response:
        await LiveStream(response).event()
        assert (await come_back(service, chat)).status_code == 204
    await grok.calls[0].hung_up()


@pytest.mark.parametrize("method", ["POST", "DELETE"])
async def test_stop_by_chat_id(grok: Upstream, service: InProcessService, method: str) -> None:
    """The chat's id stops the answer, whoever reads it, and is idempotent."""
    grok.set_scripts(stream("a", HANG))
    chat = uuid()
    path = f"/api/chat/{chat}/stop" if method == "POST" else f"/api/chat/{chat}"
    assert (await service.client.request(method, path)).status_code == 204
    async with service.client.stream("POST", "/api/chat", json=ui_body(chat)) as response:
        live = LiveStream(response)
        await live.event()
        assert (await service.client.request(method, path)).status_code == 204
        *_, end = read(await live.rest())
    assert end == {"type": "error", "errorText": errors.Stopped.message}
    await grok.calls[0].hung_up()
    assert (await service.client.request(method, path)).status_code == 204


async def test_next_answer_of_a_chat(grok: Upstream, service: InProcessService) -> None:
    """The next answer takes the chat's id over; the one before keeps its own."""
    chat, gate = uuid(), Gate()
    grok.set_scripts(stream("first", HANG), stream("second", gate))
    async with service.client.stream("POST", "/api/chat", json=ui_body(chat)) as response:
        await LiveStream(response).event()
        first = response.headers["X-Resumable-Stream-Id"]
        async with service.client.stream("POST", "/api/chat", json=ui_body(chat)) as second:
            await LiveStream(second).event()
        async with service.client.stream("GET", f"/api/chat/{chat}/stream") as again:
            gate.open()
            assert text(read(await LiveStream(again).rest())) == "second"
        await service.client.delete(f"/api/chat/{chat}")
        assert grok.playing == 1
        await service.client.delete(f"/api/chat/{first}")
        assert text(read(standard((await come_back(service, first)).content))) == "first"
    assert len(grok.calls) == 2


async def test_reload_before_the_status(grok: Upstream, service: InProcessService) -> None:
    """A page may be loaded again while Grok thinks: the answer goes on, and a refusal has a true status."""
    for script, expected in ((stream("a"), 200), (error(401, {"error": "x"}), 502)):
        gate, chat = Gate(), uuid()
        grok.set_scripts([gate, *script])
        async with service.caller() as caller:
            await caller.post(ui_body(chat))
            await asyncio.wait_for(gate.reached.wait(), 10)
        coming = asyncio.create_task(come_back(service, chat))
        await asyncio.sleep(0.1)  # the connection is there, and nothing is told yet
        assert not coming.done()
        gate.open()
        response = await coming
        assert response.status_code == expected
        assert len(grok.calls) == 1
        if expected == 200:
            assert text(read(standard(response.content))) == "a"
        else:
            assert refusal(response)["code"] == "upstream_auth"
            assert (await come_back(service, chat)).status_code == 204


async def test_refused_answers_take_no_name(grok: Upstream) -> None:
    """An answer that was not started leaves the chat's id to the one before."""
    grok.set_scripts(stream("a", HANG))
    chat = uuid()
    async with (
        serving(grok.url, rate_limit="1/hour") as service,
        service.client.stream("POST", "/api/chat", json=ui_body(chat)) as response,
    ):
        live = LiveStream(response)
        await live.event()
        assert (await ask(service, id=chat, resumable=True)).status_code == 429
        assert (await service.client.delete(f"/api/chat/{chat}")).status_code == 204
        *_, end = read(await live.rest())
        assert end["type"] == "error"


async def test_forgotten_chats(grok: Upstream) -> None:
    """A chat's id is forgotten with its answer."""
    gate, chat = Gate(), uuid()
    grok.set_scripts(stream("a", gate))
    async with serving(grok.url, replay_ttl=0.3) as service:
        async with service.caller() as caller:
            await caller.post(ui_body(chat))
            await caller.head()
        assert (await service.client.head(f"/api/chat/{chat}/stream")).status_code == 200
        gate.open()
        status, statuses = 200, set[int]()
        async with asyncio.timeout(10):
            while status == 200:
                status = (await service.client.head(f"/api/chat/{chat}/stream")).status_code
                statuses.add(status)
    assert statuses == {200, 204}
    assert len(grok.calls) == 1


async def test_last_event_id_of_a_message(grok: Upstream, service: InProcessService) -> None:
    """Who knows the id of the last event, gets what lies after it: by GET with either name, and by POST."""
    grok.set_scripts(stream("a", "b"))
    gate, chat = Gate(), uuid()
    grok.set_scripts(stream("a", "b", gate))
    async with service.client.stream("POST", "/api/chat", json=ui_body(chat)) as response:
        live = LiveStream(response)
        while '"delta":"a"' not in (event := await live.event()).data:
            pass
        own = response.headers["X-Resumable-Stream-Id"]
        gate.open()
        rest = await live.rest()
    for name in (own, chat):
        # A page that has read to the end by its chat's id would get nothing; the id of an event says otherwise.
        response = await come_back(service, name, **{"Last-Event-ID": event.id})
        assert (response.status_code, standard(response.content)) == (200, rest) if name == own else (204, [])
    response = await ask(service, headers={"Last-Event-ID": event.id})
    assert standard(response.content) == rest
    assert len(grok.calls) == 1


async def test_same_key_same_message(grok: Upstream, service: InProcessService) -> None:
    """An idempotency key makes the POST safe to repeat here, too; with another body it is refused."""
    grok.set_scripts(stream("a"))
    headers = {"Idempotency-Key": uuid()}
    first, again = [await ask(service, headers=headers) for _ in range(2)]
    assert first.content == again.content
    assert len(grok.calls) == 1
    other = await ask(service, message("Another"), headers=headers)
    assert (other.status_code, refusal(other)["param"]) == (422, "Idempotency-Key")
    native = await service.ask(headers=headers)  # an answer is never read in another format than it began in
    assert (native.status_code, refusal(native)["param"]) == (422, "Idempotency-Key")


@pytest.mark.slow
async def test_cut_anywhere(grok: Upstream) -> None:
    """Wherever the connection is cut, the page that comes back gets the exact text; Grok is asked once for each."""
    deltas = ["a\r", "\n[DONE]", " \u2028", "\r"]
    answer = frames(*deltas)
    end = len(answer) - 3
    whole = "".join(deltas)

    async def cut(service: InProcessService, gates: dict[str, Gate], position: int) -> bool:
        chat, gate = uuid(), Gate()
        gates[str(position)] = gate
        async with service.caller() as caller:
            await caller.post(ui_body(chat, messages=[message(str(position))]))
            await caller.head()
            received = b""
            while len(received) < position:
                await asyncio.wait_for(gate.reached.wait(), 10)
                piece = await caller.some(position - len(received))
                received += piece
                if b'"delta":"\\r"}\n' in received and len(received) < position:
                    return False  # there is nothing more before the gate
        async with service.client.stream("GET", f"/api/chat/{chat}/stream") as response:
            assert response.status_code == 200
            gate.open()
            told = read(await LiveStream(response).rest())
        assert (text(told), told[-1]) == (whole, DONE)
        return True

    gates: dict[str, Gate] = {}

    def script(call: Call) -> Steps:
        return sse(*answer[:end], gates[call.body["messages"][0]["content"]], *answer[end:])

    async with Upstream(script) as grok, serving(grok.url) as service:
        positions = iter(range(1, 10_000))
        cuts = 0
        while True:
            async with asyncio.TaskGroup() as group:
                batch = [group.create_task(cut(service, gates, next(positions))) for _ in range(40)]
            cuts += sum(task.result() for task in batch)
            if not all(task.result() for task in batch):
                break
        assert cuts > 500
        assert len(grok.calls) == len(gates)
