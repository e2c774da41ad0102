"""What Grok refuses, or cannot do, is told with a true status, in our own words."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
from _pytest.mark import ParameterSet

from chatproxy.config.timing import Timing
from tests.conftest import KEY, TIMEOUT, InProcessService, from_recordings, refusal, serving
from tests.readers import answer
from tests.upstream import (
    CLOSE,
    EVENT_STREAM,
    HANG,
    RESET,
    Gate,
    Script,
    Step,
    Upstream,
    chunk,
    error,
    frame,
    head,
    raw,
    refusing,
    sse,
    stream,
    unreachable,
)
from tests.upstream import DONE as DONE_FRAME

pytestmark = pytest.mark.anyio

TEAM = "3f2504e0-4f89-11d3-9a0c-0305e82c3301"
HTML = f"<!DOCTYPE html><html><title>canary {TEAM}</title></html>"
TAIL = f" canary, team {TEAM}, key xai-canary"
"""What Grok's messages may hold and no caller may see."""


def xai_error(status: int, message: str, code: str | None = "invalid-argument", **headers: str) -> list[Step]:
    """An error as Grok words it, with a code or without."""
    body = {"error": message + TAIL} if code is None else {"code": code, "error": message + TAIL}
    return error(status, body, {name.replace("_", "-"): text for name, text in headers.items()})


DENIED = "permission-denied"
OLD_INVALID = "Client specified an invalid argument"
OLD_DENIED = "The caller does not have permission to execute the specified operation"
EXHAUSTED = "resource-exhausted"
UNAVAILABLE = "The service is currently unavailable"
CREDITS = "Your team has either used all available credits or reached its monthly spending limit."

Expected = tuple[int, str, str | None]
"""Our status, code and Retry-After."""

AUTH: Expected = (502, "upstream_auth", None)
POLICY = (400, "content_policy", None)
TOO_LONG = (400, "context_length_exceeded", None)
REJECTED = (502, "upstream_rejected", None)
FAILED = (502, "upstream_error", None)
UNREACHABLE = (502, "upstream_unreachable", None)


def limited(seconds: int) -> Expected:
    return 429, "upstream_rate_limited", str(seconds)


def overloaded(seconds: int) -> Expected:
    return 503, "upstream_overloaded", str(seconds)


OTHER_TYPE = {"Content-Type": "text/plain", "Connection": "close"}

# What Grok does; our status, code and Retry-After.
ANSWERS: dict[str, tuple[Script, Expected]] = {
    "400 wrong key": (xai_error(400, "Incorrect API key provided."), AUTH),
    "400 wrong key, old": (xai_error(400, "Incorrect API key provided: in***ey.", OLD_INVALID), AUTH),
    "401": (xai_error(401, "No authorization header or an invalid authorization token", None), AUTH),
    "401 nested": (error(401, {"error": {"message": TAIL, "type": "auth", "code": 401}}), AUTH),
    "401 without a body": (error(401, b""), AUTH),
    "401 cut off in its body": ([head(401, {"Content-Length": "100"}) + b'{"error": ', CLOSE], AUTH),
    "403 no credits": (xai_error(403, "Your newly created team doesn't have any credits yet.", OLD_DENIED), AUTH),
    "403 credits used up": (xai_error(403, CREDITS, DENIED), AUTH),
    "403 key rights": (xai_error(403, "Access to the chat endpoint is denied.", DENIED), AUTH),
    "403 blocked": (xai_error(403, "This key is blocked.", DENIED), AUTH),
    "429 credits used up": (xai_error(429, CREDITS, EXHAUSTED, Retry_After="30"), AUTH),
    "403 block page": (error(403, HTML), FAILED),
    "403 without a body": (error(403, ""), FAILED),
    "403 moderation": (xai_error(403, "Content violates usage guidelines.", DENIED), POLICY),
    "403 moderation, old": (
        xai_error(403, "Content violates usage guidelines. Failed check: SAFETY", OLD_DENIED),
        POLICY,
    ),
    "400 too long": (xai_error(400, "This model's maximum prompt length is 10 but the request contains 20"), TOO_LONG),
    "400 too long, new": (xai_error(400, "Current message (20 tokens) exceeds budget (10 tokens)"), TOO_LONG),
    "400 unknown model": (xai_error(400, "Model not found: canary"), REJECTED),
    "404 retired model": (xai_error(404, "The model canary was deprecated on 2025-09-15", "not-found"), REJECTED),
    "410 gone": (xai_error(410, "LiveStream search is deprecated.", None), REJECTED),
    "400 parameter": (xai_error(400, "Model canary does not support parameter reasoningEffort."), REJECTED),
    "400 a bare string": (error(400, "canary"), REJECTED),
    "400 a JSON string": (error(400, b'"canary"'), REJECTED),
    "422": (xai_error(422, "Failed to deserialize the JSON body into the target type", None), REJECTED),
    "422 about a key": (xai_error(422, "Incorrect API key provided."), REJECTED),
    "422 about a length": (xai_error(422, "This model's maximum prompt length is 10"), REJECTED),
    "400 a deep nest": (error(400, b'{"x": ' + b"[" * 10_000 + b"]" * 10_000 + b"}"), REJECTED),
    "405": (error(405, b""), REJECTED),
    "415": (error(415, b"canary"), REJECTED),
    "418": (error(418, HTML), REJECTED),
    "429": (xai_error(429, "Too many requests.", EXHAUSTED), limited(1)),
    "429 with a time": (xai_error(429, "Too many tokens.", EXHAUSTED, Retry_After="7"), limited(7)),
    "429 with a long time": (xai_error(429, "Too many tokens.", EXHAUSTED, Retry_After="9999"), limited(120)),
    "429 with a date": (xai_error(429, "", None, Retry_After="Wed, 21 Oct 2026 07:28:00 GMT"), limited(1)),
    "429 with nonsense": (xai_error(429, "", None, Retry_After="-\u00b2"), limited(1)),
    "429 nested": (error(429, {"error": {"message": TAIL, "type": "x", "code": "canary"}}), limited(1)),
    "429 HTML": (error(429, HTML), limited(1)),
    "503 at capacity": (xai_error(503, "The model is at capacity.", UNAVAILABLE), overloaded(1)),
    "503 with a time": (xai_error(503, "The model is at capacity.", UNAVAILABLE, Retry_After="9"), overloaded(9)),
    "503 HTML": (error(503, HTML), overloaded(1)),
    "503 as an event stream": ([head(503) + frame(chunk({"content": "canary"})), CLOSE], overloaded(1)),
    "529": (error(529, HTML, {"Retry-After": "60"}), overloaded(60)),
    "500": (xai_error(500, "", "internal"), FAILED),
    "502": (error(502, HTML), FAILED),
    "504": (error(504, HTML), FAILED),
    "524": (error(524, HTML, {"Retry-After": "60"}), FAILED),
    "525": (error(525, HTML), FAILED),
    "200 with JSON": (error(200, {"code": UNAVAILABLE, "error": TAIL}), FAILED),
    "200 with a whole answer": (error(200, {"choices": [{"message": {"content": "canary"}}]}), FAILED),
    "200 with HTML": (error(200, HTML), FAILED),
    "200 without a type": ([head(200, {"Content-Length": "6"}), b"canary"], FAILED),
    "204": ([head(204, {})], FAILED),
    "a stream under another type": ([head(200, OTHER_TYPE), frame(chunk({"content": "canary"})), CLOSE], FAILED),
    "an error frame": (sse(frame({"code": UNAVAILABLE, "error": TAIL}), DONE_FRAME), FAILED),
    "a nested error frame": (sse(frame({"error": {"message": TAIL, "type": "x", "code": 503}}), HANG), FAILED),
    "an error frame with choices": (sse(frame({"error": TAIL, "choices": []}), HANG), FAILED),
    "the end marker": (sse(DONE_FRAME), FAILED),
    "the end": (sse(), FAILED),
    "the end after a comment": (raw(b": canary\n\n"), FAILED),
    "malformed JSON": (sse(b"data: {canary\n\n", HANG), FAILED),
    "JSON of another kind": (sse(b'data: "canary"\n\n', HANG), FAILED),
    "a line over a megabyte": (sse(b"data: " + b"x" * 1_100_000, HANG), FAILED),
    "closed after the head": ([head(), CLOSE], FAILED),
    "reset after the head": ([head(), RESET], FAILED),
}  # fmt: skip


@pytest.fixture(scope="module")
async def service(grok: Upstream) -> AsyncIterator[InProcessService]:
    async with serving(grok.url, grok_retries=0) as service:
        yield service


@pytest.fixture(scope="module", params=["chat", "responses"])
async def either(grok: Upstream, request: pytest.FixtureRequest) -> AsyncIterator[InProcessService]:
    """A service for each of xAI's APIs."""
    async with serving(grok.url, grok_retries=0, grok_api=request.param) as service:
        yield service


# Where the Responses API sends its headers early, an error within the stream stands for a status: by its code.
IN_STREAM: dict[str, Expected] = {
    "an error frame": overloaded(1),
    "a nested error frame": overloaded(1),
    "instream-error-frame": overloaded(1),
    "instream-error-frame-nested": overloaded(1),
}


def on(service: InProcessService, name: str, expected: Expected) -> Expected:
    return IN_STREAM.get(name, expected) if service.settings.grok_api == "responses" else expected


@asynccontextmanager
async def unlimited(service: InProcessService, grok: Upstream, expected: Expected) -> AsyncIterator[InProcessService]:
    """The service, but a fresh one where Grok will ask to be left alone for a while: that would last."""
    if expected[0] == 429:
        async with serving(grok.url, grok_retries=0, grok_api=service.settings.grok_api) as fresh:
            yield fresh
    else:
        yield service


@pytest.mark.parametrize("name", ANSWERS)
async def test_answers(grok: Upstream, either: InProcessService, name: str) -> None:
    """Each answer of Grok's before the first chunk has its status and code here, and none of its words."""
    script, expected = ANSWERS[name]
    expected = on(either, name, expected)
    grok.set_scripts(script)
    async with unlimited(either, grok, expected) as asked:
        assert told(await asked.ask()) == expected
        assert len(grok.calls) == 1
        await grok.until(lambda: grok.playing == 0)


def told(response: httpx.Response) -> Expected:
    """Our status, code and Retry-After, in an answer that gives nothing of Grok's away."""
    for hidden in ("canary", TEAM, KEY):
        assert hidden not in response.text
        assert hidden not in str(response.headers)
    return response.status_code, refusal(response)["code"], response.headers.get("Retry-After")


async def test_left_alone(grok: Upstream) -> None:
    """While Grok wants to be left alone, callers are told for how long, without a call; then it is asked again."""
    grok.set_scripts(xai_error(429, "Too many requests.", EXHAUSTED, Retry_After="2"), stream("ok"))
    async with serving(grok.url, grok_retries=0) as service, asyncio.timeout(TIMEOUT):
        assert told(await service.ask()) == limited(2)
        assert told(await service.ask()) == limited(2)
        while (response := await service.ask()).status_code == 429:
            assert told(response)[2] in ("1", "2")
            assert len(grok.calls) == 1
            await asyncio.sleep(0.2)  # nothing but time will change this
    assert answer(response.content) == "ok"
    assert grok.calls[1].arrived_at - grok.calls[0].arrived_at > 1.9


@pytest.mark.parametrize("status", [301, 302, 307, 308])
async def test_redirects(grok: Upstream, service: InProcessService, status: int) -> None:
    """A redirect is an error: the conversation and the key go nowhere else."""
    grok.set_scripts(error(status, HTML, {"Location": f"{grok.url}/elsewhere"}))
    assert told(await service.ask()) == FAILED
    assert (len(grok.calls), grok.strays) == (1, [])


async def test_headers_stay(grok: Upstream, service: InProcessService) -> None:
    """Grok's headers are not passed on, neither with an error nor with an answer."""
    headers = {
        "Access-Control-Allow-Origin": "*",
        "Set-Cookie": "__cf_bm=canary",
        "X-Request-ID": "canary",
        "X-RateLimit-Limit-Requests": "18446744073709551615",
        "Content-Security-Policy-Report-Only": "canary",
        "CF-Ray": "canary",
        "Server": "cloudflare",
        "Strict-Transport-Security": "max-age=1",
    }
    ok: list[Step] = [head(200, {**EVENT_STREAM, **headers}), frame(chunk({"content": "a"})), DONE_FRAME, CLOSE]
    grok.set_scripts(error(503, HTML, headers), ok)
    refused, answered = await service.ask(), await service.ask()
    assert (refused.status_code, answered.status_code) == (503, 200)
    for response in (refused, answered):
        sent = {name: response.headers.get(name) for name in headers}
        assert sent.pop("X-Request-ID") not in (None, "canary")
        assert sent.pop("Server") != "cloudflare"
        assert set(sent.values()) == {None}


@pytest.mark.parametrize("end", [CLOSE, RESET, b"canary\r\n\r\n"])
async def test_no_http(grok: Upstream, service: InProcessService, end: Step) -> None:
    """A connection that breaks, or speaks no HTTP, before there is an answer is an upstream failure."""
    grok.set_scripts([end, CLOSE])
    assert told(await service.ask()) == FAILED


@pytest.mark.parametrize(
    ("where", "expected"),
    [(refusing, UNREACHABLE), (unreachable, (504, "connect_timeout", None))],
)
async def test_unreachable(where: Callable[[], AbstractContextManager[str]], expected: Expected) -> None:
    """Where nobody answers, the caller is told which way."""
    with where() as url:
        async with serving(url, grok_retries=0, connect_timeout=0.3) as service:
            assert told(await service.ask()) == expected


async def test_no_such_host() -> None:
    """A name that does not resolve is unreachable."""
    async with serving("http://grok.invalid/v1", grok_retries=0) as service:
        assert told(await service.ask()) == UNREACHABLE


async def test_no_tls() -> None:
    """A server that speaks no TLS is unreachable, and hears nothing of the chat."""
    heard = b""

    async def plain(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal heard
        heard += await reader.read(65_536)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(plain, "127.0.0.1") as server:
        url = f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        async with serving(url, grok_retries=0) as service:
            assert told(await service.ask("canary-prompt")) == UNREACHABLE
    assert heard
    assert b"canary-prompt" not in heard


async def test_error_body_without_end(grok: Upstream) -> None:
    """An error is told even if its body never ends."""
    body: list[Step] = [head(503, {"Content-Type": "application/json", "Content-Length": "10"}), b'{"code', HANG]
    grok.set_scripts(body)
    async with serving(grok.url, Timing(error_timeout=0.5), grok_retries=0) as service:
        assert told(await service.ask()) == overloaded(1)
        await grok.calls[0].hung_up()


async def test_large_error_body(grok: Upstream, service: InProcessService) -> None:
    """Of a large error body only the beginning is read."""
    huge: list[Step] = [head(500, {"Content-Type": "text/html", "Connection": "close"}), *[b"x" * 65_536] * 1000, CLOSE]
    grok.set_scripts(huge)
    assert told(await service.ask()) == FAILED
    await grok.calls[0].hung_up()
    assert grok.calls[0].sent < 20_000_000


async def test_operator_is_told(grok: Upstream, service: InProcessService, caplog: pytest.LogCaptureFixture) -> None:
    """Credentials that do not work are logged as an error that names the variable, without secrets."""
    grok.set_scripts(xai_error(400, "Incorrect API key provided."))
    await service.ask("canary-prompt")
    errors = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    assert [line for line in errors if "GROK_API_KEY" in line]
    assert [line for line in errors if "sentence 'wrong API key'" in line]
    assert "Incorrect" not in caplog.text
    for hidden in (KEY, TEAM, "xai-canary", "canary-prompt"):
        assert hidden not in caplog.text


# After the hold.


async def test_failure_after_the_hold() -> None:
    """What fails once the hold is over is told in the stream."""
    gate = Gate()
    script = [gate, *xai_error(400, "Model not found: x")]
    changes = {"status_hold": 0.1, "grok_retries": 0}
    async with Upstream(script) as grok, serving(grok.url, **changes) as service, service.asking() as live:
        assert live.response.status_code == 200
        gate.open()
        [event] = await live.rest()
    assert event.type == "error"
    assert json.loads(event.data)["error"]["code"] == "upstream_rejected"
    assert "canary" not in live.raw.decode()


async def test_failure_within_the_hold(grok: Upstream, service: InProcessService) -> None:
    """What fails before the hold is over is told by the status, however long that took."""
    gate = Gate()
    script = [gate, *xai_error(400, "Model not found: x")]
    grok.set_scripts(script)
    asked = asyncio.create_task(service.ask())
    await gate.reached.wait()
    await asyncio.wait([asked], timeout=0.2)
    assert not asked.done()
    gate.open()
    assert told(await asked) == REJECTED


# The bodies that were recorded or quoted elsewhere.

RECORDED: dict[str, Expected] = {
    "error-400-bad-key": AUTH,
    "error-400-bad-key-slug": AUTH,
    "error-400-model-not-found-slug": REJECTED,
    "error-404-model-retired": REJECTED,
    "error-503-at-capacity": overloaded(1),
    "nonstream-200-grok-4.3": FAILED,
    "429-rate-limit-slug": limited(1),
    "429-tokens-per-minute": limited(1),
    "429-out-of-credits": AUTH,
    "403-no-credits": AUTH,
    "403-safety-legacy": POLICY,
    "403-safety-slug": POLICY,
    "403-key-not-allowed": AUTH,
    "404-unknown-model-legacy": REJECTED,
    "404-unknown-route": REJECTED,
    "410-search-parameters": REJECTED,
    "400-empty-message": REJECTED,
    "400-parameter-slug": REJECTED,
    "422-wrong-type": REJECTED,
    "200-json-error": FAILED,
    "instream-error-frame": FAILED,
    "instream-error-frame-nested": FAILED,
    "400-bare-json-string": REJECTED,
    "524-cloudflare-html": FAILED,
}


class Recorded(NamedTuple):
    name: str
    script: Script
    text: str
    """Grok's own words, which nobody may see."""


def recorded(directory: Path) -> Iterator[ParameterSet]:
    for path in sorted(directory.glob("*.meta.json")):
        meta = json.loads(path.read_text())
        if meta["file"].endswith(".json"):
            body = json.loads((directory / meta["file"]).read_text())
            given = Recorded(meta["name"], error(meta["response"]["status"], body), message(body))
            yield pytest.param(given, id=given.name)
    for quoted in json.loads((directory / "quoted-errors.json").read_text())["errors"]:
        name, status = quoted["name"], quoted["status"]
        if "frame" in quoted:
            given = Recorded(name, sse(quoted["frame"].encode()), message(json.loads(quoted["frame"][6:])))
        elif "body_text" in quoted:
            given = Recorded(name, error(status, quoted["body_text"]), "A timeout occurred")
        else:
            body = quoted.get("body", {"error": quoted.get("message")})
            given = Recorded(name, error(status, json.dumps(body).encode()), message(body))
        yield pytest.param(given, id=name)


def message(body: Any) -> str:
    """The sentence in an error of any of Grok's envelopes; of an answer, its reasoning."""
    match body:
        case {"error": {"message": text}} | {"error": text} | {"choices": [{"message": {"reasoning_content": text}}]}:
            return str(text)
        case text:
            return str(text)


@pytest.mark.parametrize("given", from_recordings(recorded))
async def test_recorded(grok: Upstream, either: InProcessService, given: Recorded) -> None:
    """Every error that Grok is known to give has the status and code of the table."""
    grok.set_scripts(given.script)
    expected = on(either, given.name, RECORDED[given.name])
    async with unlimited(either, grok, expected) as asked:
        response = await asked.ask()
    assert told(response) == expected
    assert given.text not in response.text
