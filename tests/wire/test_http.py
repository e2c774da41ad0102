"""The edge of HTTP: what is no request, or never becomes a whole one, costs nothing and breaks nothing."""

import socket
from contextlib import suppress

import httpx
import pytest

from chatproxy.config import load
from chatproxy.config.timing import Timing
from chatproxy.server import listen
from tests.conftest import HI, InProcessService, environment, refusal, serving
from tests.upstream import HANG, Upstream, stream
from tests.wire.raw_requests import CHAT, chunked, read_response, request

pytestmark = pytest.mark.anyio


NOT_HTTP = {
    "a length beyond all numbers": request(length="9" * 30),
    "a negative length": request(length="-1"),
    "two lengths": request("/api/chat", ("Content-Length", "0")),
    "length and chunks": chunked(b"0\r\n\r\n", ("Content-Length", "5")),
    "a chunk without a size": chunked(b"canary\r\n"),
    "a folded header": request("/api/chat", ("X-Request-ID", "a\r\n b")),
    "a header without a name": request("/api/chat", ("", "y")),
    "another protocol": b"\x16\x03\x01\x02\x00\x01\x00",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "a tunnel": request("evil.example:443", method="CONNECT"),
    "not ASCII": request("/api/ch\u00e4t"),
}  # fmt: skip


@pytest.mark.parametrize("sent", NOT_HTTP.values(), ids=NOT_HTTP.keys())
async def test_not_http(grok: Upstream, service: InProcessService, sent: bytes) -> None:
    """What is no HTTP/1.1 is a 400 that quotes nothing, and ends the connection; Grok is not called."""
    grok.set_scripts()
    async with service.caller() as caller:
        await caller.send(sent)
        answered = await caller.rest()
    assert answered.startswith(b"HTTP/1.1 400 ")
    assert answered.endswith(b"\r\n\r\nInvalid HTTP request received.")
    assert grok.calls == []


@pytest.mark.parametrize("end", ["\r", "\n", "\0", "\x7f", "\r\n\t"])
@pytest.mark.parametrize(
    "name", ["X-Request-ID", "Origin", "Idempotency-Key", "Last-Event-ID", "traceparent", "Accept"]
)
async def test_line_breaks_in_headers(grok: Upstream, service: InProcessService, name: str, end: str) -> None:
    """A header with a control character is no HTTP, and its value is not repeated."""
    grok.set_scripts()
    async with service.caller() as caller:
        await caller.send(request("/api/chat", (name, f"a{end}b"), content_type="text/plain"))
        response = await read_response(caller)
    assert response.status_code == 400
    assert end not in "".join(response.headers.values())
    assert grok.calls == []


async def test_slow_body(grok: Upstream) -> None:
    """A body that does not come is not waited for; what came of it is not used."""
    grok.set_scripts()
    async with serving(grok.url, Timing(body_timeout=0.2)) as service:
        for sent in (request(length=str(len(CHAT) + 1)), chunked(b"%x\r\n%b\r\n" % (len(CHAT), CHAT))):
            async with service.caller() as caller:
                await caller.send(sent)
                response = await read_response(caller)
            assert (response.status_code, refusal(response)["code"]) == (408, "body_timeout")
    assert grok.calls == []


@pytest.mark.parametrize(
    ("begin", "more"),
    [
        pytest.param(b"GET /", b"a" * 10_000, id="target"),
        pytest.param(b"GET /healthz HTTP/1.1\r\nX: ", b"a" * 10_000, id="header"),
        pytest.param(b"GET /healthz HTTP/1.1\r\n", b"X: a\r\n" * 1_000, id="headers"),
        pytest.param(chunked(b"2\r\n{}\r\n0\r\nX: "), b"a" * 10_000, id="trailer"),
        pytest.param(chunked(b"2;"), b"a" * 10_000, id="chunk extension"),
    ],
)
async def test_endless_head(grok: Upstream, service: InProcessService, begin: bytes, more: bytes) -> None:
    """What is no body is read up to a bound, and then no further."""
    grok.set_scripts()
    sent = 0
    async with service.caller() as caller:
        with pytest.raises(ConnectionError):  # noqa: PT012 -- at any of these
            await caller.send(begin)
            while sent < 50_000_000:  # pragma: no branch -- unless the test fails
                await caller.send(more)
                sent += len(more)
    assert sent < 10_000_000
    assert grok.calls == []


@pytest.mark.parametrize("protocol", ["h2c", "websocket"])
async def test_upgrade(
    grok: Upstream, service: InProcessService, protocol: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A chat that offers another protocol, as Java's HttpClient does, is answered like any other, without a warning."""
    grok.set_scripts(stream("a"), stream("b"))
    async with service.caller() as caller:
        for text in (b"a", b"b"):
            await caller.post({"messages": HI}, Connection="Upgrade, HTTP2-Settings", Upgrade=protocol)
            assert (await caller.head())[0] == 200
            assert text in await caller.until(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    assert len(grok.calls) == 2
    assert [record for record in caplog.records if record.levelname != "INFO"] == []


@pytest.mark.parametrize("garbage", [b"canary\r\n\r\n", b"GET / HTTP/1.1\r\nX: " + b"y" * 300_000])
async def test_garbage_after_a_request(grok: Upstream, service: InProcessService, garbage: bytes) -> None:
    """What is no request, sent while an answer is on its way, ends the connection, and Grok is hung up on."""
    grok.set_scripts(stream("a", HANG))
    async with service.caller() as caller:
        await caller.post({"messages": HI})
        await caller.until(b"data: a\n\n\r\n")
        await caller.send(garbage)
        with suppress(ConnectionError):
            assert b"[DONE]" not in await caller.rest()
    await grok.calls[0].hung_up()


async def test_garbage_after_an_answer(grok: Upstream, service: InProcessService) -> None:
    """What is no request, sent after a whole answer, is told so like any other."""
    grok.set_scripts()
    async with service.caller() as caller:
        await caller.post({"messages": HI})
        await caller.until(b"\r\n0\r\n\r\n")
        await caller.send(b"canary\r\n\r\n")
        assert (await caller.head())[0] == 400
        assert b"canary" not in await caller.rest()


async def test_mistake_within_a_mistake(
    grok: Upstream, service: InProcessService, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where even the failure cannot be told, the answer is cut off, and both mistakes are logged."""
    monkeypatch.setattr("chatproxy.formats.plain.encode_json", lambda _: int("x"))
    monkeypatch.setattr("chatproxy.formats.plain.encode_error", lambda *_: int("y"))
    grok.set_scripts(stream("a"))
    with pytest.raises(httpx.RemoteProtocolError):
        await service.ask(include=["finish"])
    assert [record.name for record in caplog.records if record.exc_info] == [
        "chatproxy.routes.responses",
        "chatproxy.middleware",
    ]
    caplog.clear()


def test_tokens_do_not_wait_for_acknowledgements() -> None:
    """Every connection sends what is written at once, whatever the event loop makes of it."""
    with listen(load(environment("http://localhost/v1"))) as sock, socket.create_connection(sock.getsockname()):
        accepted, _ = sock.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
