"""A connection's own promises: bounds for a head, no other protocol, and a list of what is open.

The application is one that tells what it was sent, so that nothing of the service hides what the parser made of it.
"""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import httpx
import pytest
import uvicorn
from starlette.types import Receive, Scope, Send

from chatproxy.connection import HTTPProtocol
from tests.conftest import TIMEOUT, Caller, Service

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module", params=[False, True], ids=["asyncio", "uvloop"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    """Both event loops: their transports differ in what may be done after closing."""
    return "asyncio", {"use_uvloop": request.param}


class Application:
    """Answers with what it was sent. `/stream` sends `a`, and `b` once `more` is set; `/refused` reads no body."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, str, str]] = []
        self.more = asyncio.Event()
        self.disconnected = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body, more = b"", scope["path"] != "/refused"
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body, more = body + message["body"], message["more_body"]
        request = (scope["method"], scope["path"], body.decode())
        self.requests.append(request)
        start = {"type": "http.response.start", "status": 200}
        if scope["path"] != "/stream":
            answer = json.dumps(request).encode()
            await send({**start, "headers": [(b"content-length", str(len(answer)).encode())]})
            await send({"type": "http.response.body", "body": answer})
            return
        await send({**start, "headers": []})
        await send({"type": "http.response.body", "body": b"a", "more_body": True})

        async def until_disconnect() -> None:
            await receive()
            self.disconnected.set()
            self.more.set()

        listening = asyncio.create_task(until_disconnect())
        await self.more.wait()
        await send({"type": "http.response.body", "body": b"b"})
        await listening


@asynccontextmanager
async def listening(protocol: type[HTTPProtocol] = HTTPProtocol) -> AsyncIterator[tuple[Service, Application]]:
    """The application behind this protocol, in this loop, on a free port."""
    application, sock = Application(), socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(application, http=protocol, ws="none", lifespan="off", log_config=None, access_log=False)
    config.timeout_graceful_shutdown = 1
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve([sock]))
    async with asyncio.timeout(TIMEOUT):
        while not server.started:  # noqa: ASYNC110 -- uvicorn tells nobody
            await asyncio.sleep(0.005)
    try:
        async with httpx.AsyncClient() as client:
            yield Service(sock.getsockname()[1], client), application
    finally:
        server.should_exit = True
        await serving


async def echo(caller: Caller) -> tuple[str, str, str]:
    """Method, path and body of the request that the next answer is about."""
    status, headers = await caller.head()
    assert status == 200
    method, path, body = json.loads(await caller.exactly(int(headers["content-length"])))
    return method, path, body


# Offers of another protocol.

JAVA = b"Connection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAEAAEAAAAIAAAAB\r\nUpgrade: h2c\r\n"
OFFERS = [
    JAVA,
    b"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: eA==\r\nSec-WebSocket-Version: 13\r\n",
    b"uPGRADE: H2C\r\ncONNECTION: uPGRADE\r\n",
    b"Connection: keep-alive\r\nConnection: upgrade\r\nUpgrade: TLS/1.0\r\nUpgrade: h2c, h3\r\n",
    b"Connection:Upgrade\r\nUpgrade:h2c\r\n",
    b"Connection: \t Upgrade \t \r\nUpgrade: \t h2c \t \r\n",
    b"Connection: Upgrade\r\nUpgrade:\r\n",
    b"Connection: Upgrade\r\n" + b"Upgrade: a\r\n" * 90,
]
INNER = "GET /smuggled HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n"
PLAIN = b"GET /plain HTTP/1.1\r\nHost: localhost\r\n\r\n"


def sized(body: bytes, offer: bytes) -> bytes:
    return b"POST /chat HTTP/1.1\r\n%bHost: x\r\nContent-Length: %d\r\n\r\n%b" % (offer, len(body), body)


def chunked(body: bytes, offer: bytes) -> bytes:
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in body)
    return b"POST /chat HTTP/1.1\r\nTransfer-Encoding: chunked\r\nHost: x\r\n%b\r\n%b0\r\n\r\n" % (offer, chunks)


def trailed(body: bytes, offer: bytes) -> bytes:
    """With the offer in the trailers as well."""
    return chunked(b"", offer).replace(b"\r\n0\r\n", b"\r\n%x\r\n%b\r\n0\r\n%b" % (len(body), body, offer))


class ByteByByte(HTTPProtocol):
    def data_received(self, data: bytes) -> None:
        for byte in data:
            super().data_received(bytes([byte]))


framings = pytest.mark.parametrize("framed", [sized, chunked, trailed])
cuts = pytest.mark.parametrize("protocol", [HTTPProtocol, ByteByByte])


@cuts
@framings
async def test_offer(framed: Callable[[bytes, bytes], bytes], protocol: type[HTTPProtocol]) -> None:
    """The offer of another protocol is ignored: the body is read whole, and the connection is kept."""
    async with listening(protocol) as (service, application), service.caller() as caller:
        for offer in OFFERS:
            await caller.send(framed(INNER.encode(), offer))
            assert await echo(caller) == ("POST", "/chat", INNER)
            await caller.send(PLAIN)
            assert await echo(caller) == ("GET", "/plain", "")
        assert [path for _, path, _ in application.requests] == ["/chat", "/plain"] * len(OFFERS)


@cuts
async def test_offer_without_a_body(protocol: type[HTTPProtocol]) -> None:
    """So it is where there is no body, or an empty one."""
    async with listening(protocol) as (service, _), service.caller() as caller:
        for offer in OFFERS:
            for start in (b"GET /x HTTP/1.1\r\n", b"POST /x HTTP/1.1\r\nContent-Length: 0\r\n"):
                await caller.send(start + offer + b"\r\n")
                assert (await echo(caller))[1:] == ("/x", "")


@cuts
@framings
async def test_offers_in_a_row(framed: Callable[[bytes, bytes], bytes], protocol: type[HTTPProtocol]) -> None:
    """Requests that are sent ahead of the answers are answered in turn, each with its own body."""
    async with listening(protocol) as (service, application), service.caller() as caller:
        await caller.send(b"".join((framed(INNER.encode(), JAVA), PLAIN, framed(b"two", JAVA), framed(b"3", JAVA))))
        bodies = [(await echo(caller))[1:] for _ in range(4)]
        assert bodies == [("/chat", INNER), ("/plain", ""), ("/chat", "two"), ("/chat", "3")]
        assert len(application.requests) == 4


MALFORMED = [
    b"Connection: Upgrade\r\nUpgrade:\r\n h2c\r\n",
    b"Connection: Upgrade\r\nUpgrade : h2c\r\n",
    b"Connection: Upgrade\r\n Upgrade: h2c\r\n",
    b"Connection: Upgrade\r\nX: y\rUpgrade: h2c\r\n",
    b"Connection: Upgrade\nUpgrade: h2c\r\n",
    b"Connection: Upgrade\r\nUpgr\0ade: h2c\r\n",
]


@cuts
async def test_malformed_offer(protocol: type[HTTPProtocol], caplog: pytest.LogCaptureFixture) -> None:
    """A folded or otherwise malformed field is a 400, and the connection is closed: nothing after it is a request."""
    async with listening(protocol) as (service, application):
        for offer in MALFORMED:
            async with service.caller() as caller:
                with suppress(ConnectionError):  # the body is still unread then
                    await caller.send(sized(INNER.encode(), offer + b"Upgrade: h2c\r\n" * 5))
                    assert (await caller.rest()).count(b"HTTP/1.1 400 ") == 1
        assert application.requests == []
    if protocol is HTTPProtocol:  # asyncio calls no protocol after it has closed; the other one does
        assert caplog.messages == ["Invalid HTTP request received."] * len(MALFORMED)


@pytest.mark.parametrize(
    "sent",
    [
        pytest.param(sized(INNER.encode(), b"Upgrade: a\r\n" * 100 + JAVA), id="more offers than are looked for"),
        pytest.param(b"CONNECT smuggled:80 HTTP/1.1\r\nHost: smuggled\r\n\r\n" + INNER.encode(), id="CONNECT"),
    ],
)
async def test_overlooked_offer(sent: bytes) -> None:
    """Where the parser would take a body for a request, the connection is closed instead."""
    async with listening() as (service, application), service.caller() as caller:
        await caller.send(PLAIN)
        await echo(caller)
        with suppress(ConnectionError):
            await caller.send(sent)
            assert (await caller.rest()).startswith(b"HTTP/1.1 400 ")
        assert application.requests == [("GET", "/plain", "")]


# The time and the size of a head.

HEADS = [b"GET /healthz HTTP/1.1\r\nHo", sized(b"", JAVA)[:60]]


class Hasty(HTTPProtocol):
    head_timeout = 0.2


@pytest.mark.parametrize("sent", [b"", b"\r\n", *HEADS])
async def test_slow_first_head(sent: bytes) -> None:
    """A connection on which no request comes is closed."""
    async with listening(Hasty) as (service, _), service.caller() as caller:
        await caller.send(sent)
        assert await caller.rest() == b""


@pytest.mark.parametrize("sent", HEADS)
async def test_slow_later_head(sent: bytes) -> None:
    """So it is where a later request is begun and does not come."""
    async with listening(Hasty) as (service, _), service.caller() as caller:
        await caller.send(PLAIN)
        await echo(caller)
        await caller.send(sent)
        assert await caller.rest() == b""


async def test_slow_head_in_drops() -> None:
    """A head that comes a byte at a time has no longer than any other."""
    async with listening(Hasty) as (service, _), service.caller() as caller:
        with suppress(ConnectionError):
            async with asyncio.timeout(TIMEOUT):
                while not caller.at_eof():
                    await caller.send(b"\n")
                    await asyncio.sleep(0.01)  # so slowly is what it sends


async def test_head_in_time() -> None:
    """Neither a long answer nor the silence between two requests is cut off, whatever is begun meanwhile."""
    hasty = type("HastyByteByByte", (ByteByByte, Hasty), {})
    async with listening(hasty) as (service, application), service.caller() as caller:
        for _ in range(2):
            application.more.clear()
            await caller.send(PLAIN.replace(b"/plain", b"/stream") + PLAIN[:20])
            await caller.until(b"1\r\na\r\n")
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.4):
                    await caller.some()
            application.more.set()
            await caller.until(b"1\r\nb\r\n0\r\n\r\n")
            await caller.send(PLAIN[20:])
            assert (await echo(caller))[1] == "/plain"
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.4):
                    await caller.some()


async def test_body_of_a_refused_request() -> None:
    """The rest of a body whose request was answered already is no head, and the connection is kept after it."""
    refused = sized(b"x" * 1000, JAVA).replace(b"/chat", b"/refused")
    async with listening(Hasty) as (service, _), service.caller() as caller:
        for part in (refused[:-500], refused[-500:-1], refused[-1:]):
            await caller.send(part)
            if part == refused[:-500]:
                await echo(caller)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.4):
                    await caller.some()
        await caller.send(PLAIN)
        assert (await echo(caller))[1] == "/plain"


class Small(HTTPProtocol):
    max_head_bytes = 1000


ENDLESS = [
    pytest.param(b"GET /", b"a" * 100, id="target"),
    pytest.param(b"GET / HTTP/1.1\r\nX: ", b"a" * 100, id="value"),
    pytest.param(b"GET / HTTP/1.1\r\n", b"a" * 100, id="name"),
    pytest.param(b"GET / HTTP/1.1\r\n", b"X: a\r\n" * 20, id="fields"),
    pytest.param(b"", b"\r\n" * 50, id="blank lines"),
]


@pytest.mark.parametrize(("begin", "more"), ENDLESS)
@pytest.mark.parametrize("before", [PLAIN, sized(b"x" * 5000, JAVA)], ids=["head", "body"])
async def test_large_head(before: bytes, begin: bytes, more: bytes) -> None:
    """A head is read up to a bound, the first of a connection and a later one; then the connection is closed."""
    async with listening(Small) as (service, application), service.caller() as first:
        await first.send(begin)
        with pytest.raises(ConnectionError):
            await send_much(first, more)
    assert application.requests == []
    async with listening(Small) as (service, application), service.caller() as later:
        await later.send(before)
        await echo(later)
        await later.send(begin)
        with pytest.raises(ConnectionError):
            await send_much(later, more)
    assert len(application.requests) == 1


async def send_much(caller: Caller, more: bytes) -> None:
    for _ in range(5_000_000 // len(more)):  # pragma: no branch -- unless the test fails
        await caller.send(more)


async def test_as_large_as_allowed() -> None:
    """A head up to the bound is read, however it is cut; so is a body of any size, in chunks of any size."""
    end_of_body = len(b"\r\n0\r\n\r\n")
    long = PLAIN.replace(b"\r\n\r\n", b"\r\nX: %b\r\n\r\n" % (b"y" * (1000 - end_of_body - len(PLAIN) - 5)))
    assert len(long) == 1000 - end_of_body
    async with listening(type("SmallByteByByte", (ByteByByte, Small), {})) as (service, _), service.caller() as caller:
        for _ in range(3):
            await caller.send(long)
            assert (await echo(caller))[1] == "/plain"
            for framed in (sized, chunked):
                await caller.send(framed(b"x" * 3000, JAVA))
                assert await echo(caller) == ("POST", "/chat", "x" * 3000)


@pytest.mark.parametrize("more", [b"X: y\r\n" * 20, b"X" * 100], ids=["fields", "name"])
async def test_large_trailers(more: bytes) -> None:
    """Trailers have the same bound; an answer that has begun is broken off, and gets no other in its midst."""
    async with listening(Small) as (service, _), service.caller() as caller:
        await caller.send(chunked(b"x", b"").removesuffix(b"\r\n"))
        with pytest.raises(ConnectionError):
            await send_much(caller, more)
    async with listening(Small) as (service, application), service.caller() as caller:
        await caller.send(PLAIN.replace(b"/plain", b"/stream"))
        await caller.until(b"1\r\na\r\n")
        await caller.send(b"GET /next HTTP/1.1\r\n" + more * 20)
        with suppress(ConnectionError):
            assert await caller.rest() == b""
        async with asyncio.timeout(TIMEOUT):
            await application.disconnected.wait()


# What is open.


async def test_registry() -> None:
    """The registry holds the transports of open connections, and no others; aborting one breaks its answer off."""

    class Registered(HTTPProtocol):
        transports: set[asyncio.Transport] = set()  # noqa: RUF012 -- of the class

    async with listening(Registered) as (service, application):
        for leave in (Caller.close, Caller.reset):
            async with service.caller() as caller:
                await caller.send(PLAIN)
                await echo(caller)
                assert len(Registered.transports) == 1
                leave(caller)
            await none_of(Registered.transports)
        async with service.caller() as caller:
            await caller.send(PLAIN.replace(b"/plain", b"/stream"))
            await caller.until(b"1\r\na\r\n")
            [transport] = Registered.transports
            transport.abort()
            async with asyncio.timeout(TIMEOUT):
                await application.disconnected.wait()
        await none_of(Registered.transports)


async def none_of(transports: set[asyncio.Transport]) -> None:
    async with asyncio.timeout(TIMEOUT):
        while transports:  # noqa: ASYNC110 -- what is closed tells nobody
            await asyncio.sleep(0.01)
