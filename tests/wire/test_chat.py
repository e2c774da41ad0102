"""A chat, from the request that Grok gets to the end that the caller sees."""

import asyncio
import json
import re
from collections.abc import Iterable
from typing import Any

import pytest

from tests.conftest import HI, KEY, InProcessService, failure, refusal, serving
from tests.readers import DONE, Event, answer, standard
from tests.upstream import (
    CLOSE,
    HANG,
    RESET,
    USAGE,
    Call,
    Gate,
    Script,
    Step,
    Steps,
    Upstream,
    chunk,
    frame,
    frames,
    head,
    raw,
    sse,
    stream,
)
from tests.upstream import DONE as DONE_FRAME

pytestmark = pytest.mark.anyio

TEXT = frame(chunk({"role": "assistant", "content": "Hello"}))
STOP = frame(chunk({}, finish="stop"))
CANARY = frame(chunk({"content": "canary"}))


# What Grok is asked.


async def test_request_to_grok(grok: Upstream, service: InProcessService) -> None:
    """Grok gets the model and the messages as they are, with our key."""
    messages = [
        {"role": "system", "content": " Be brief.\n"},
        {"role": "user", "content": "Grüße 😀\u2028\0"},
        {"role": "assistant", "content": "Hallo"},
        {"role": "user", "content": "?"},
    ]
    grok.set_scripts()
    assert (await service.ask(messages=messages)).status_code == 200
    [call] = grok.calls
    assert (call.method, call.path) == ("POST", "/v1/chat/completions")
    assert call.body == {
        "model": "grok-4.3",
        "messages": messages,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    expected = {
        "authorization": f"Bearer {KEY}",
        "accept": "text/event-stream",
        "accept-encoding": "identity",
        "content-type": "application/json",
        "host": f"127.0.0.1:{grok.port}",
    }
    assert {name: call.headers[name] for name in expected} == expected


async def test_settings_reach_grok() -> None:
    """The configured model, effort and system prompt are sent; the prompt goes before the caller's own messages."""
    changes = {"grok_model": "grok-4.7", "grok_reasoning_effort": "low", "system_prompt": "Rhyme."}
    async with Upstream() as grok, serving(grok.url, **changes) as service:
        await service.ask(messages=[{"role": "system", "content": "Mine"}, *HI])
        assert grok.calls[0].body == {
            "model": "grok-4.7",
            "messages": [{"role": "system", "content": "Rhyme."}, {"role": "system", "content": "Mine"}, *HI],
            "stream": True,
            "stream_options": {"include_usage": True},
            "reasoning_effort": "low",
        }


async def test_nothing_of_the_caller_leaks(grok: Upstream, service: InProcessService) -> None:
    """Unknown fields and the caller's headers stay here; a valid traceparent alone is passed on."""
    trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    secrets = {
        "Authorization": "Bearer canary",
        "Cookie": "canary=1",
        "User-Agent": "canary",
        "X-Forwarded-For": "192.0.2.77",
        "X-Request-ID": "canary",
        "X-Grok-Conv-ID": "canary",
        "Accept-Language": "canary",
        "Referer": "http://127.0.0.1/canary",
    }
    grok.set_scripts()
    fields: dict[str, Any] = {"temperature": "canary", "model": "canary", "stream": False, "tool_choice": "canary"}
    turn = {"role": "user", "content": "Hi", "name": "canary"}
    response = await service.ask(headers={**secrets, "traceparent": trace}, messages=[turn], **fields)
    assert response.status_code == 200
    await service.ask(headers={"traceparent": "canary"})
    first, second = grok.calls
    assert set(first.body) == {"model", "messages", "stream", "stream_options"}
    assert first.body["messages"] == HI
    assert first.body == second.body
    assert first.headers["traceparent"] == trace
    assert "canary" not in str(first.headers) + str(second.headers)
    assert "192.0.2.77" not in str(first.headers)
    assert set(first.headers) - {"traceparent"} == set(second.headers)


async def test_conversation_id(grok: Upstream, service: InProcessService) -> None:
    """A session has one conversation id, safe in a header and not the session's own; no session, no id."""
    names: list[str | None] = ["s-1", "s-1", "s-2", "Grüße\r\nX-Evil: 1\0", "x" * 5000, "", None]
    grok.set_scripts()
    for name in names:
        assert (await service.ask(sessionId=name)).status_code == 200
    await service.ask()
    first, again, other, *hostile, empty, null, absent = [call.headers.get("x-grok-conv-id") for call in grok.calls]
    assert first == again != other
    for value in (first, other, *hostile):
        assert value is not None
        assert re.fullmatch("[A-Za-z0-9_-]{16,128}", value)
    assert len({first, other, *hostile}) == 4
    assert null is absent is None
    assert empty not in (first, other)
    assert "x-evil" not in grok.calls[3].headers


# What the caller gets.


@pytest.mark.parametrize("accept", ["text/event-stream", "*/*", None, "text/event-stream, application/json", "text/*"])
async def test_answer(grok: Upstream, service: InProcessService, accept: str | None) -> None:
    """The tokens as events, then the end marker, and the headers that keep them moving."""
    grok.set_scripts(stream("Hel", "lo"))
    headers = {"Accept": accept or "", "Accept-Encoding": "gzip, br, zstd"}
    request = service.client.build_request("POST", "/api/chat", json={"messages": HI}, headers=headers)
    if accept is None:
        del request.headers["Accept"]
    response = await service.client.send(request)
    assert response.status_code == 200
    assert response.content == b"data: Hel\n\ndata: lo\n\ndata: [DONE]\n\n"
    expected = {
        "content-type": "text/event-stream; charset=utf-8",
        "cache-control": "no-cache, no-transform, no-store",
        "x-accel-buffering": "no",
    }
    assert {name: response.headers[name] for name in expected} == expected
    assert "content-encoding" not in response.headers
    assert "content-length" not in response.headers
    assert response.headers["x-request-id"]


@pytest.mark.parametrize(
    ("deltas", "body"),
    [
        pytest.param([" a", " ", "  b "], "data:  a\n\ndata:  \n\ndata:   b \n\n", id="spaces"),
        pytest.param(["a\n\nb\n"], "data: a\ndata: \ndata: b\ndata: \n\n", id="lines"),
        pytest.param(["\n", "\n"], "data: \ndata: \n\ndata: \ndata: \n\n", id="line breaks alone"),
        pytest.param(["a\r", "\n", "\rb"], "data: a\ndata: \n\ndata: \ndata: b\n\n", id="CR LF cut in two"),
        pytest.param(["ha", "ha", "ha"], "data: ha\n\ndata: ha\n\ndata: ha\n\n", id="repeated"),
        pytest.param(["a\u2028b\u2029c\u0085d\0e\x0cf"], "data: a\u2028b\u2029c\u0085d\0e\x0cf\n\n", id="no breaks"),
        pytest.param(["[DONE]"], "data: [DO\n\ndata: NE]\n\n", id="the end marker"),
        pytest.param(["x\r", "\n[DONE]\ny"], "data: x\ndata: \n\ndata: [DO\n\ndata: NE]\ndata: y\n\n", id="as a line"),
        pytest.param(["👩‍👩‍👧", "", "é"], "data: 👩‍👩‍👧\n\ndata: é\n\n", id="emoji and an empty delta"),
        pytest.param(["\ufeffa"], "data: \ufeffa\n\n", id="byte order mark"),
        pytest.param(["data: a", ": b", "event: x"], "data: data: a\n\ndata: : b\n\ndata: event: x\n\n", id="fields"),
    ],
)
async def test_framing(grok: Upstream, service: InProcessService, deltas: list[str], body: str) -> None:
    """One event for each delta, exact to the byte."""
    grok.set_scripts(stream(*deltas))
    assert (await service.ask()).text == body + "data: [DONE]\n\n"


def without(*keys: str) -> bytes:
    """A text chunk as lenient as they come."""
    return frame({key: value for key, value in chunk({"content": "Hello"}).items() if key not in keys})


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(stream({"content": ""}, {}, "Hello", {}, {"content": None}), id="empty deltas"),
        pytest.param(sse(TEXT, frame(chunk(None)), STOP, DONE_FRAME), id="empty choices"),
        pytest.param(sse(frame(chunk({"content": "Hello"}, finish="length")), DONE_FRAME), id="finish on the text"),
        pytest.param(sse(without("id", "object", "created", "model"), DONE_FRAME), id="missing keys"),
        pytest.param(
            sse(TEXT, frame({"choices": [{}]}), frame({"choices": [{"delta": None}]}), DONE_FRAME), id="no delta"
        ),
        pytest.param(sse(b": hi\n\n: there\n", TEXT, b": ping\n\n", STOP, DONE_FRAME), id="comments"),
        pytest.param(sse(b"event: message\nid: 7\nretry: 1\n" + TEXT, STOP, DONE_FRAME), id="other fields"),
        pytest.param(sse(b"\xef\xbb\xbf" + TEXT, STOP, DONE_FRAME), id="byte order mark"),
        pytest.param(raw(TEXT, STOP, DONE_FRAME), id="no length and no chunks"),
        pytest.param(
            [
                head(200, {"Content-Type": "Text/Event-Stream; Charset=UTF-8", "Connection": "close"}),
                TEXT,
                DONE_FRAME,
                CLOSE,
            ],
            id="a media type in other letters",
        ),
        pytest.param(stream("Hel", "lo", reasoning=["hm", "so"]), id="reasoning not asked for"),
        pytest.param(
            sse(TEXT, frame(chunk({"refusal": None, "tool_calls": []}, logprobs=None)), DONE_FRAME), id="nulls"
        ),
        pytest.param(sse(frame(chunk({"content": "Hello"}, error=None)), STOP, DONE_FRAME), id="error is null"),
    ],
)
async def test_lenient_reading(grok: Upstream, service: InProcessService, script: Script) -> None:
    """Whatever else Grok puts around a text, the caller gets the text and nothing else."""
    grok.set_scripts(script)
    assert answer((await service.ask()).content) == "Hello"


async def test_include(grok: Upstream, service: InProcessService) -> None:
    """Reasoning and the finish are events of their own, in Grok's order, when asked for; usage is verbatim."""
    usage = {**USAGE, "cost_in_usd_ticks": 2**64 - 1, "unheard_of": [1.50, {"x": None}]}
    last: list[Step] = [frame(chunk({"content": "c"}, finish="length")), frame(chunk(None, usage=usage)), DONE_FRAME]
    reasoning = ["r\r", "\n[DONE]", ""]
    script = sse(*frames("a", "b", reasoning=reasoning, finish=None, usage=False, done=False), *last)
    grok.set_scripts(script)
    response = await service.ask(include=["reasoning", "finish"])
    only_finish = await service.ask(include=["finish"])
    nothing = await service.ask(include=[])
    *events, finish, done = standard(response.content)
    assert events == [
        *(Event(text, "reasoning") for text in ("r\n", "[DO", "NE]")),
        *(Event(text) for text in "abc"),
    ]
    assert finish.type == "finish"
    assert json.loads(finish.data) == {"finish_reason": "length", "model": "grok-4.3", "usage": usage, "api": "chat"}
    assert done == Event(DONE)
    assert standard(only_finish.content) == [*(Event(text) for text in "abc"), finish, done]
    assert answer(nothing.content) == "abc"


async def test_request_id(grok: Upstream, service: InProcessService) -> None:
    """A sane id of the caller's is kept, any other is replaced by a new one; errors carry it too."""
    grok.set_scripts()
    assert (await service.ask(headers={"X-Request-ID": "a.B_9-"})).headers["X-Request-ID"] == "a.B_9-"
    made = set()
    for insane in ("", "x" * 129, "a b", "é".encode().decode("latin-1"), '"', "a/b"):
        response = await service.client.get("/healthz", headers=[(b"X-Request-ID", insane.encode("latin-1"))])
        made.add(response.headers["X-Request-ID"])
    assert len(made) == 6
    assert all(re.fullmatch("[A-Za-z0-9._-]{8,128}", new) for new in made)
    missing = await service.client.get("/nowhere", headers={"X-Request-ID": "mine"})
    assert refusal(missing)["request_id"] == "mine"


@pytest.mark.parametrize(
    ("request_line", "status", "body"),
    [
        ("GET /healthz", 200, b'{"status":"ok"}'),
        ("HEAD /healthz", 200, b""),
        ("DELETE /api/chat/x", 204, b""),
    ],
)
async def test_http_1_0(service: InProcessService, request_line: str, status: int, body: bytes) -> None:
    """A health check that speaks HTTP/1.0 gets its answer as it is, up to the end of the connection."""
    content = json.dumps({"messages": HI})
    async with service.caller() as caller:
        await caller.send(
            f"{request_line} HTTP/1.0\r\nHost: localhost\r\nConnection: keep-alive\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n{content}".encode()
        )
        answered, headers = await caller.head()
        assert (answered, headers["connection"], "transfer-encoding" in headers) == (status, "close", False)
        assert await caller.rest() == body


async def test_one_connection(grok: Upstream, service: InProcessService) -> None:
    """Grok's answers are read to their end, so that one connection serves one chat after the other."""
    grok.set_scripts()
    for _ in range(5):
        assert answer((await service.ask()).content) == "Hello, world"
    assert {call.connection for call in grok.calls} == {grok.calls[0].connection}


async def test_many_at_once(grok: Upstream, service: InProcessService) -> None:
    """A hundred and fifty chats run side by side, each with its own answer."""
    gate = Gate()

    def script(call: Call) -> Steps:
        return stream("to ", gate, call.body["messages"][0]["content"])

    grok.set_scripts(script)
    async with asyncio.TaskGroup() as group:
        asked = [group.create_task(service.ask(str(n))) for n in range(150)]
        await grok.until(lambda: grok.playing == 150)
        gate.open()
        assert [answer((await response).content) for response in asked] == [f"to {n}" for n in range(150)]


# How it ends.

DONE_ENDS = {
    "finish reason, then its end marker": [STOP, DONE_FRAME],
    "finish reason alone": [STOP],
    "end marker alone": [DONE_FRAME],
    "cut after the finish reason": [STOP, CLOSE],
    "reset after the finish reason": [STOP, RESET],
    "silent after the finish reason": [STOP, HANG],
    "silent after the end marker": [STOP, DONE_FRAME, HANG],
    "cut after the end marker": [DONE_FRAME, CLOSE],
    "an error frame after the finish reason": [STOP, frame({"error": "canary"})],
    "garbage after the finish reason": [STOP, b"data: {canary\n\n"],
    "garbage after the end marker": [DONE_FRAME, b"data: {canary\n\n", HANG],
    "text after the end marker": [DONE_FRAME, CANARY],
    "an unheard-of finish reason": [frame(chunk({}, finish="end_turn"))],
}


@pytest.mark.parametrize("end", DONE_ENDS.values(), ids=DONE_ENDS.keys())
async def test_done(grok: Upstream, service: InProcessService, end: Iterable[Step]) -> None:
    """Once Grok has finished, the answer soon ends in the end marker, whatever Grok does then."""
    grok.set_scripts(sse(TEXT, *end))
    async with asyncio.timeout(3):
        response = await service.ask()
    assert response.content == b"data: Hello\n\ndata: [DONE]\n\n"


async def test_done_after_a_long_wait(grok: Upstream, service: InProcessService) -> None:
    """A finish that comes late is as good as any, in the first chunk as in the last."""
    late = 1.3  # longer than what a Grok that has finished is waited for
    grok.set_scripts(
        sse(TEXT, late, STOP, 0.1, DONE_FRAME),
        sse(late, frame(chunk({"content": "Hello"}, finish="stop")), DONE_FRAME),
        sse(TEXT, late, STOP),
    )
    for response in await asyncio.gather(*(service.ask() for _ in grok.scripts)):
        assert answer(response.content) == "Hello"


def delta(json_text: bytes) -> bytes:
    """A frame with this delta, whose JSON is written as it stands."""
    return b'data: {"choices":[{"index":0,"delta":' + json_text + b"}]}\n\n"


HARMLESS = {
    "data without anything": b"data:\n\n",
    "data that is blank": b"data:   \n\n",
    "null": b"data: null\n\n",
    "a keep-alive of another kind": frame({"type": "keepalive"}),
    "an event of another type": b"event: ping\n\n",
    "an event of another type with data": b'event: ping\ndata: {"type": "ping"}\n\n',
    "no choices": frame({"id": "x", "object": "chat.completion.chunk"}),
    "null choices": frame({"choices": None, "usage": None}),
    "empty choices": frame({"choices": []}),
    "a choice that is null": frame({"choices": [None]}),
    "an empty error": frame({"choices": [{"delta": {}}], "error": ""}),
    "an error that is null": frame({"error": None}),
    "half an emoji where nobody looks": b'data: {"choices":[{"delta":{}}],"x":"\\ud83d"}\n\n',
}


@pytest.mark.parametrize("said", HARMLESS.values(), ids=HARMLESS.keys())
@pytest.mark.parametrize("first", [False, True], ids=["after text", "first of all"])
async def test_harmless_frames(grok: Upstream, service: InProcessService, said: bytes, first: bool) -> None:
    """What some gateways send beside the answer, and is neither text nor an error, is nothing."""
    grok.set_scripts(sse(said, TEXT, STOP, DONE_FRAME) if first else sse(TEXT, said, TEXT, STOP, DONE_FRAME))
    response = await service.ask()
    assert answer(response.content) == ("Hello" if first else "HelloHello")


CUT_EMOJI = {
    "whole": ([rb'{"content":"a\ud83d\ude00b"}'], "a\U0001f600b"),
    "cut in two": ([rb'{"content":"a\ud83d"}', rb'{"content":"\ude00b"}'], "a\U0001f600b"),
    "a first half alone": ([rb'{"content":"a\ud83d"}', b'{"content":"b"}'], "a\ufffdb"),
    "a second half alone": ([rb'{"content":"a\ude00"}', b'{"content":"b"}'], "a\ufffdb"),
    "a half at the end": ([b'{"content":"a"}', rb'{"content":"\ud83d"}'], "a\ufffd"),
    "two first halves": ([rb'{"content":"\ud83d"}', rb'{"content":"\ud83d\ude00"}'], "\ufffd\U0001f600"),
    "nothing between": ([rb'{"content":"\ud83d"}', b'{"content":""}', rb'{"content":"\ude00"}'], "\U0001f600"),
}


@pytest.mark.parametrize(("deltas", "text"), CUT_EMOJI.values(), ids=CUT_EMOJI.keys())
@pytest.mark.parametrize("finish", [STOP, b""], ids=["finish reason", "end marker only"])
async def test_cut_emoji(
    grok: Upstream, service: InProcessService, deltas: list[bytes], text: str, finish: bytes
) -> None:
    """An emoji that Grok cuts into two deltas arrives whole, and a lone half as U+FFFD."""
    grok.set_scripts(sse(*map(delta, deltas), finish, DONE_FRAME))
    assert answer((await service.ask()).content) == text


async def test_usage_that_cannot_be_sent(grok: Upstream, service: InProcessService) -> None:
    """A byte in the usage that is no UTF-8 costs the usage, and not the answer."""
    usage = frame(chunk(None, usage={"prompt_tokens": 1, "x": "canary"})).replace(b"canary", b"\xff")
    grok.set_scripts(sse(TEXT, STOP, usage, DONE_FRAME))
    token, finish, end = standard((await service.ask(include=["finish"])).content)
    assert (token.data, end.data) == ("Hello", DONE)
    assert json.loads(finish.data)["usage"] is None


CHUNKS_OF_NO_TEXT = sse(frame(chunk({"role": "assistant", "reasoning_content": "hm"})), STOP, DONE_FRAME)
FAILED_ENDS = {
    "closed in the middle": ([TEXT, CLOSE], "upstream_cut_off"),
    "reset in the middle": ([TEXT, RESET], "upstream_cut_off"),
    "closed inside a frame": ([TEXT, b'data: {"choices": [{"de', CLOSE], "upstream_cut_off"),
    "a tidy end without a finish": ([TEXT], "upstream_cut_off"),
    "a tidy end inside a frame": ([TEXT, STOP.rstrip()], "upstream_cut_off"),
    "an error frame": ([TEXT, frame({"code": "x", "error": "canary"}), DONE_FRAME], "upstream_error"),
    "a nested error frame": ([TEXT, frame({"error": {"message": "canary", "code": 503}}), HANG], "upstream_error"),
    "malformed JSON": ([TEXT, b"data: {canary\n\n", DONE_FRAME], "upstream_error"),
    "not UTF-8": (
        [TEXT, frame(chunk({"content": "canary"})).replace(b"canary", b"\xff\xfe"), DONE_FRAME],
        "upstream_error",
    ),
    "JSON of another kind": ([TEXT, b"data: [1]\n\n", DONE_FRAME], "upstream_error"),
    "a deep nest": ([TEXT, b'data: {"x": ' + b"[" * 10_000 + b"]" * 10_000 + b"}\n\n", DONE_FRAME], "upstream_error"),
    "a wrong type": ([TEXT, frame(chunk({"content": 5})), DONE_FRAME], "upstream_error"),
    "a frame over a megabyte": ([TEXT, b"data: " + b"x" * 1_100_000, HANG], "upstream_error"),
}


@pytest.mark.parametrize(("end", "code"), FAILED_ENDS.values(), ids=FAILED_ENDS.keys())
async def test_failed(grok: Upstream, service: InProcessService, end: Iterable[Step], code: str) -> None:
    """What goes wrong after the first token is told in one last event, without the end marker and in our own words."""
    grok.set_scripts(sse(*end))
    response = await service.ask(include=["finish"])
    await grok.until(lambda: grok.playing == 0)
    token, error = standard(response.content)
    assert response.status_code == 200
    assert token == Event("Hello")
    assert failure(error, response)["code"] == code
    assert "canary" not in response.text
    assert DONE not in response.text


@pytest.mark.parametrize(
    ("script", "finish_reason"),
    [
        pytest.param(CHUNKS_OF_NO_TEXT, "stop", id="reasoning alone"),
        pytest.param(stream({}, finish="length"), "length", id="nothing"),
        pytest.param(stream("", "", finish="content_filter"), "content_filter", id="empty text"),
        pytest.param(sse(frame(chunk({"role": "assistant"})), DONE_FRAME), None, id="no finish reason"),
    ],
)
async def test_empty_answer(
    grok: Upstream, service: InProcessService, script: Script, finish_reason: str | None
) -> None:
    """An answer without any text is a failure, and the finish that Grok told comes before it."""
    grok.set_scripts(script)
    response = await service.ask()
    with_finish = await service.ask(include=["finish"])
    [error] = standard(response.content)
    assert failure(error, response)["code"] == "empty_answer"
    *told, error = standard(with_finish.content)
    assert failure(error, with_finish)["code"] == "empty_answer"
    assert [json.loads(event.data)["finish_reason"] for event in told] == ([finish_reason] if finish_reason else [])
