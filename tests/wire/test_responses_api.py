"""On the Responses API a caller who asks for nothing new sees what Chat Completions would have shown."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests import responses
from tests.conftest import HI, KEY, TIMEOUT, InProcessService, Service, failure, refusal, serving
from tests.readers import DONE, Event, answer, joined, standard
from tests.responses import CREATED, IN_PROGRESS, SYSTEM_PROMPT, USAGE
from tests.upstream import CLOSE, HANG, RESET, Gate, Script, Step, Upstream, frame, sse, stream
from tests.wire.test_metrics import samples, value

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
async def service(grok: Upstream) -> AsyncIterator[InProcessService]:
    async with serving(grok.url, grok_api="responses", system_prompt=SYSTEM_PROMPT) as service:
        yield service


def code(event: Event) -> Any:
    assert event.type == "error"
    return json.loads(event.data)["error"]["code"]


# What is asked.


async def test_responses_request(grok: Upstream, service: InProcessService) -> None:
    """Grok gets the messages, the system prompt as instructions, nothing that it would keep, and nothing else."""
    grok.set_scripts(responses.answer("ok"))
    messages = [*HI, {"role": "assistant", "content": "Hello\r\n"}, {"role": "user", "content": "\u2028?"}]
    await service.ask(messages=messages, temperature=2, sessionId="a1", tools=None)
    [call] = grok.calls
    assert (call.method, call.path) == ("POST", "/v1/responses")
    assert call.headers["authorization"] == f"Bearer {KEY}"
    assert call.headers["accept"] == "text/event-stream"
    key = call.headers["x-grok-conv-id"]
    assert call.body == {
        "model": "grok-4.3",
        "input": messages,
        "instructions": SYSTEM_PROMPT,
        "stream": True,
        "store": False,
        "prompt_cache_key": key,
    }
    assert "a1" not in key
    assert len(key) == 32


async def test_least_responses_request(grok: Upstream) -> None:
    """What is not configured and not asked for is not sent; the effort is, where it is configured."""
    grok.set_scripts(responses.answer("ok"))
    for changes in ({}, {"grok_reasoning_effort": "low"}):
        async with serving(grok.url, grok_api="responses", **changes) as service:
            await service.ask()
    least = {"model": "grok-4.3", "input": HI, "stream": True, "store": False}
    assert [call.body for call in grok.calls] == [least, {**least, "reasoning": {"effort": "low"}}]
    assert all("x-grok-conv-id" not in call.headers for call in grok.calls)


# What is answered.

TOKENS = [
    "Hel",
    "lo",
    "\n\n",
    "[DONE]",
    "a\r",
    "\nb",
    "\u2028\x85\0 ",
    "\U0001f680",
    " [[1]](https://example.com) ",
    "\r",
]


@pytest.mark.parametrize("resumable", [False, True])
@pytest.mark.parametrize("include", [[], ["reasoning"]])
async def test_the_same_bytes(resumable: bool, include: list[str]) -> None:
    """The same conversation over both APIs gives streams that are the same, byte by byte."""
    scripts = {
        "chat": stream(*TOKENS, reasoning=["h", "m"]),
        "responses": responses.answer(*TOKENS, reasoning=["h", "m"]),
    }
    bodies = []
    for api, script in scripts.items():
        async with Upstream(script) as grok, serving(grok.url, grok_api=api) as service:
            response = await service.ask(include=include, resumable=resumable)
            id = response.headers.get("Content-Location", "/api/chat/-/stream").split("/")[3]
            bodies.append(response.content.replace(id.encode(), b"id"))
            names = {name for name, _ in response.headers.items()}
            assert not [name for name in names if "grok" in name or "responses" in name]
    assert bodies[0] == bodies[1]
    assert joined(standard(bodies[0]))


@pytest.mark.parametrize("end", ["stop", "length"])
async def test_finish_names_its_api(grok: Upstream, service: InProcessService, end: str) -> None:
    """The finish tells reason, model and usage as Grok told them, and which API that was."""
    grok.set_scripts(responses.answer("a", finish=end))
    *_, finish, last = standard((await service.ask(include=["finish"])).content)
    assert last == Event(DONE)
    assert json.loads(finish.data) == {
        "finish_reason": end,
        "model": "grok-4.3",
        "usage": USAGE,
        "api": "responses",
    }


async def test_counts_without_reasoning(caplog: pytest.LogCaptureFixture) -> None:
    """In log and metrics the completion's tokens are those of the text, though this API counts them with the rest."""
    caplog.set_level(logging.INFO)
    async with Upstream(responses.answer("a")) as grok, serving(grok.url, grok_api="responses") as service:
        await service.ask()
        found = await samples(service)
    assert [value(found, "tokens_total", kind=kind) for kind in ("prompt", "completion", "reasoning")] == [12, 3, 5]
    [line] = [vars(record) for record in caplog.records if vars(record).get("route") == "/api/chat"]
    assert (line["prompt_tokens"], line["completion_tokens"], line["reasoning_tokens"]) == (12, 3, 5)
    assert line["model"] == "grok-4.3"


async def test_system_prompt_stays(service: InProcessService, grok: Upstream, caplog: pytest.LogCaptureFixture) -> None:
    """Grok repeats the system prompt in its first events and in its last: nobody sees it, whatever fails."""
    caplog.set_level(logging.DEBUG)
    scripts: list[Script] = [
        responses.answer("a"),
        responses.answer("a", CLOSE),
        sse(CREATED, IN_PROGRESS),
        sse(CREATED, responses.failed("server_error", SYSTEM_PROMPT)),
        sse(CREATED, CREATED.replace(b'"in_progress"', b"{")),
        sse(responses.ended()),
    ]
    grok.set_scripts(*scripts)
    for _ in scripts:
        response = await service.ask(include=["reasoning", "finish", "tools", "citations"])
        assert "canary" not in response.text
        assert "canary" not in str(response.headers)
    assert len(grok.calls) == len(scripts)
    assert "canary" not in caplog.text
    assert "canary" not in str([vars(record) for record in caplog.records])


# Status, clocks, retries.


async def test_the_response_object_decides_nothing(grok: Upstream, service: InProcessService) -> None:
    """Neither the first events nor comments decide the status: what fails after them still has its own."""
    gate = Gate()
    refused = responses.event("error", code="invalid-argument", message="maximum prompt length is 5")
    grok.set_scripts(sse(CREATED, IN_PROGRESS, b": keepalive\n\n", responses.event("response.queued"), gate, refused))
    asked = asyncio.create_task(service.ask())
    await gate.reached.wait()
    await asyncio.wait([asked], timeout=0.2)
    assert not asked.done()
    gate.open()
    response = await asked
    assert (response.status_code, refusal(response)["code"]) == (400, "context_length_exceeded")


@pytest.mark.parametrize(
    "first",
    [
        responses.added(0, responses.reasoning_item()),
        responses.added(0, responses.web_search(0)),
        responses.thought(0, "hm"),
        responses.delta(0, "a"),
    ],
)
async def test_the_first_item_decides_the_status(grok: Upstream, service: InProcessService, first: bytes) -> None:
    """The first event of an item is the beginning of the answer, whatever comes after it."""
    grok.set_scripts(sse(CREATED, first, HANG))
    async with service.asking() as live:
        assert live.response.status_code == 200
        await grok.until(lambda: grok.playing == 1)
    await grok.calls[0].hung_up()


async def test_comments_are_no_progress() -> None:
    """Comments and the response object satisfy neither the first-token timeout nor the idle timeout."""
    comments: list[Step] = [b": keepalive\n\n", 0.05]
    changes = {"grok_api": "responses", "first_token_timeout": 0.4, "idle_timeout": 0.4, "grok_retries": 0}
    async with Upstream() as grok, serving(grok.url, **changes) as service, asyncio.timeout(TIMEOUT):
        grok.set_scripts(sse(CREATED, IN_PROGRESS, *comments * 200))
        response = await service.ask()
        assert (response.status_code, refusal(response)["code"]) == (504, "first_token_timeout")
        grok.set_scripts(sse(CREATED, responses.delta(0, "a"), *comments * 200))
        response = await service.ask()
        text, last = standard(response.content)
        assert text == Event("a")
        assert failure(last, response)["code"] == "idle_timeout"


@pytest.mark.parametrize("end", [b"", CLOSE, RESET])
async def test_cut_off_before_the_last_event(grok: Upstream, service: InProcessService, end: Step) -> None:
    """Only the last event ends an answer, though its message may look complete long before."""
    grok.set_scripts(sse(CREATED, *responses.message(0, "a", "b"), end))
    response = await service.ask(include=["finish"])
    *events, last = standard(response.content)
    assert joined(events) == "ab"
    assert {event.type for event in events} == {"message"}
    assert failure(last, response)["code"] == "upstream_cut_off"


async def test_an_answer_without_text(grok: Upstream, service: InProcessService) -> None:
    """An answer whose items hold no text is empty, and says so after its finish."""
    items = [*responses.reasoned(0, "hm"), *responses.message(1)]
    for output in ([], [responses.reasoning_item("hm"), {"type": "function_call", "name": "x", "arguments": "{}"}]):
        grok.set_scripts(sse(CREATED, *items, responses.ended(None, output)))
        response = await service.ask(include=["finish"])
        finish, last = standard(response.content)
        assert finish.type == "finish"
        assert failure(last, response)["code"] == "empty_answer"


async def test_a_large_last_event(grok: Upstream, service: InProcessService) -> None:
    """The last event may repeat megabytes, and the connection is used again afterwards."""
    large = [responses.message_item("a"), {"type": "reasoning", "encrypted_content": "x" * 5_000_000}]
    grok.set_scripts(sse(CREATED, *responses.message(0, "a"), responses.ended(None, large)))
    connections = [(await answered(service, grok)).connection for _ in range(3)]
    assert connections == connections[:1] * 3


async def answered(service: InProcessService, grok: Upstream) -> Any:
    before = len(grok.calls)
    assert answer((await service.ask()).content) == "a"
    return grok.calls[before]


async def test_retries_of_early_errors() -> None:
    """An error event that stands for a 429 or a 503 is tried again, as those are; others, and later ones, are not."""
    limited = sse(CREATED, responses.event("error", code="rate_limit_exceeded", message="x"))
    overloaded = sse(CREATED, responses.failed("unavailable", "x"))
    broken = sse(CREATED, responses.failed("server_error", "x"))
    late = sse(CREATED, responses.added(0, responses.web_search(0)), responses.failed("unavailable", "x"))
    async with Upstream() as grok, serving(grok.url, grok_api="responses", grok_retries=1) as service:
        grok.set_scripts(limited, responses.answer("a"))
        assert answer((await service.ask()).content) == "a"
        grok.set_scripts(overloaded, responses.answer("a"))
        assert answer((await service.ask()).content) == "a"
        grok.set_scripts(limited)
        response = await service.ask()
        assert (response.status_code, refusal(response)["code"]) == (429, "upstream_rate_limited")
        assert response.headers["Retry-After"] == "1"
        assert len(grok.calls) == 2
        grok.set_scripts(broken)
        assert (await service.ask()).status_code == 502
        assert len(grok.calls) == 1
        grok.set_scripts(late)
        assert code(standard((await service.ask()).content)[-1]) == "upstream_error"
        assert len(grok.calls) == 1


async def test_lost_before_the_first_item() -> None:
    """A connection that breaks after the response object and before anything was made is tried again."""
    scripts = [sse(CREATED, RESET), responses.answer("a")]
    async with Upstream(*scripts) as grok, serving(grok.url, grok_api="responses", grok_retries=1) as service:
        assert answer((await service.ask()).content) == "a"
        assert len(grok.calls) == 2


async def test_other_api_by_mistake(service: Service, grok: Upstream) -> None:
    """What speaks Chat Completions where the other API is expected is an upstream failure."""
    for script in (stream("a"), sse(frame({"choices": []}))):
        grok.set_scripts(script)
        response = await service.ask()
        assert (response.status_code, refusal(response)["code"]) == (502, "upstream_error")
