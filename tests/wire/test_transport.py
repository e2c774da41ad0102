"""Our transport against servers that break every rule, and beside httpx's own on the same replies.

Every server here is a bare socket that plays a script: a coroutine that is given the connection as a `Peer`.
"""

import asyncio
import gc
import itertools
import random
import socket
import ssl
import sys
import time
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import trustme

from chatproxy.services.grok.transport import MAX_UNREAD, Transport
from tests.upstream import RESET_ON_CLOSE, refusing, unreachable

pytestmark = pytest.mark.anyio

PATIENCE = 10.0
CONTEXT = httpx.create_ssl_context()
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi"
STREAM = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"

LOOPS = ["asyncio"] if sys.platform == "win32" else ["asyncio", "uvloop"]


@pytest.fixture(params=LOOPS)
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    return "asyncio", {"use_uvloop": request.param == "uvloop"}


class Left(Exception):
    """The client hung up where the script waited for a request."""


class Peer:
    """The server's end of a connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.send = writer.write

    async def request(self) -> bytes:
        """The next request, whole."""
        try:
            head = await self.reader.readuntil(b"\r\n\r\n")
        except (asyncio.IncompleteReadError, ConnectionError):
            raise Left from None
        fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:-2])
        if fields.get(b"transfer-encoding") == b"chunked":
            return head + await self.reader.readuntil(b"0\r\n\r\n")
        return head + await self.reader.readexactly(int(fields.get(b"content-length", b"0")))

    async def send_cut(self, pieces: Iterable[bytes]) -> None:
        """Send each piece by itself, as far as the kernel keeps them apart and somebody listens."""
        for piece in pieces:
            if not self.writer.is_closing():
                self.send(piece)
            await asyncio.sleep(0)

    async def gone(self) -> bytes:
        """What the client sent until it hung up."""
        try:
            return await self.reader.read()
        except ConnectionResetError:
            return b""

    def reset(self) -> None:
        self.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
        self.writer.transport.abort()


Script = Callable[[Peer], Awaitable[None]]


class Server:
    """A listening socket. The first connection gets the first script, and so on; the last script is for all others."""

    def __init__(self, *scripts: Script, tls: ssl.SSLContext | None = None) -> None:
        self.scripts = list(scripts)
        self.tls = tls
        self.connections = 0
        self.playing: set[asyncio.Task[None]] = set()
        self.mistakes: list[BaseException] = []

    async def __aenter__(self) -> "Server":
        self.listener = await asyncio.start_server(self.connected, "127.0.0.1", 0, ssl=self.tls)
        port = self.listener.sockets[0].getsockname()[1]
        self.url = f"{'https' if self.tls else 'http'}://127.0.0.1:{port}/"
        return self

    async def __aexit__(self, *_: object) -> None:
        self.listener.close()
        for task in self.playing:
            task.cancel()
        async with asyncio.timeout(PATIENCE):
            await asyncio.gather(*self.playing, return_exceptions=True)
        for mistake in self.mistakes:
            raise mistake  # pragma: no cover -- a test that fails

    def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        script = self.scripts[min(self.connections, len(self.scripts) - 1)]
        self.connections += 1
        task = asyncio.create_task(self.play(script, Peer(reader, writer)))
        self.playing.add(task)
        task.add_done_callback(self.playing.discard)

    async def play(self, script: Script, peer: Peer) -> None:
        try:
            await script(peer)
        except Left:
            pass
        except Exception as error:  # noqa: BLE001 # pragma: no cover -- a test that fails: raised again at its end
            self.mistakes.append(error)
        finally:
            peer.writer.close()


def answering(*replies: bytes, then: Script | None = None) -> Script:
    """Wait for a request before each of the replies, then go on with another script, or hang up."""

    async def script(peer: Peer) -> None:
        for reply in replies:
            await peer.request()
            peer.send(reply)
        if then is not None:
            await then(peer)

    return script


async def silence(peer: Peer) -> None:
    """Read what comes and say nothing, until the client hangs up."""
    await peer.gone()


def own(**changes: Any) -> Transport:
    return Transport(**{"ssl_context": CONTEXT, "max_connections": 10, "keepalive_expiry": 60.0, **changes})


def stock(**limits: Any) -> httpx.AsyncHTTPTransport:
    return httpx.AsyncHTTPTransport(verify=CONTEXT, limits=httpx.Limits(**limits))


@asynccontextmanager
async def client(transport: httpx.AsyncBaseTransport | None = None, **options: Any) -> AsyncIterator[httpx.AsyncClient]:
    """A client, and the promise that it leaves no task and no socket behind."""
    tasks, files = asyncio.all_tasks(), open_files()
    transport = transport or own()
    async with (
        asyncio.timeout(PATIENCE),
        httpx.AsyncClient(transport=transport, **{"timeout": None, **options}) as http,
    ):
        yield http
    if isinstance(transport, Transport):
        assert (transport.open, transport.idle) == (set(), {})
    await until(lambda: not (asyncio.all_tasks() - tasks) and open_files() <= files)


def open_files() -> int:
    return len(list(Path("/dev/fd").iterdir()))


async def until(condition: Callable[[], bool]) -> None:
    """Let the event loop run until this is so."""
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110 -- it comes true in the kernel, or in the event loop itself
            await asyncio.sleep(0.001)


# The same as httpx's own transport.

Outcome = tuple[int, list[tuple[str, str]], bytes] | str


async def outcome(transport: httpx.AsyncBaseTransport, url: str, **request: Any) -> Outcome:
    """What a caller of httpx sees: status, headers and body; or which exception, and whether the head came first."""
    seen = ""
    try:
        async with (
            client(transport, timeout=request.pop("timeout", None)) as http,
            http.stream(**{"method": "POST", "url": url, **request}) as response,
        ):
            seen = f"{response.status_code}, "
            body = b"".join([piece async for piece in response.aiter_raw()])
            return response.status_code, response.headers.multi_items(), body
    except httpx.HTTPError as error:
        return seen + type(error).__name__


def cuts(raw: bytes) -> Iterator[list[bytes]]:
    """The reply whole, byte by byte, and cut at random."""
    yield [raw]
    yield [raw[at : at + 1] for at in range(len(raw))]
    dice = random.Random(raw)  # noqa: S311 -- the same cuts in every run
    for count in (1, 2, 5):
        places = sorted(dice.randrange(len(raw) + 1) for _ in range(count))
        yield [raw[start:end] for start, end in itertools.pairwise([0, *places, len(raw)])]


async def outcomes(transport: Callable[[], httpx.AsyncBaseTransport], raw: bytes, then: Script) -> list[Outcome]:
    """What comes of a reply, for each way to cut it."""
    seen = []
    for pieces in cuts(raw):

        async def script(peer: Peer, pieces: list[bytes] = pieces) -> None:
            await peer.request()
            await peer.send_cut(pieces)
            await then(peer)

        async with Server(script) as server:
            seen.append(await outcome(transport(), server.url))
    return seen


async def hang_up(peer: Peer) -> None:
    """The server closes the connection."""


COMPLETE = {
    "a length": OK,
    "no body": b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
    "chunks": STREAM + b"2\r\nhi\r\n6\r\n there\r\n0\r\n\r\n",
    "no chunks": STREAM + b"0\r\n\r\n",
    "capitals": b"HTTP/1.1 200 OK\r\nTRANSFER-ENCODING: chunked\r\n\r\nA\r\n0123456789\r\n0\r\n\r\n",
    "chunk extensions": STREAM + b"2;a=b;c\r\nhi\r\n0;d\r\n\r\n",
    "zeros before the chunk size": STREAM + b"0002\r\nhi\r\n000\r\n\r\n",
    "trailers": STREAM + b"2\r\nhi\r\n0\r\nX-Trailer: 1\r\nX-Other: 2\r\n\r\n",
    "repeated, empty and padded headers": b"HTTP/1.1 200 OK\r\nSet-Cookie: a=1\r\nset-cookie: b=2\r\nX-Empty:\r\n"
    b"X-Wide: \t a  b \t \r\nContent-Length: 2\r\n\r\nhi",
    "bytes beyond ASCII in a header": b"HTTP/1.1 200 OK\r\nX: \xc3\xa9\xff\r\nContent-Length: 2\r\n\r\nhi",
    "an empty reason": b"HTTP/1.1 200 \r\nContent-Length: 2\r\n\r\nhi",
    "no reason": b"HTTP/1.1 200\r\nContent-Length: 2\r\n\r\nhi",
    "an unknown status": b"HTTP/1.1 599 What\r\nContent-Length: 2\r\n\r\nhi",
    "100": b"HTTP/1.1 100 Continue\r\nX-Gone: 1\r\n\r\n" + OK,
    "102 and 103": b"HTTP/1.1 102 Processing\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" + OK,
    "204": b"HTTP/1.1 204 No Content\r\n\r\n",
    "204 with a length": b"HTTP/1.1 204 No Content\r\nContent-Length: 2\r\n\r\n",
    "204 with a coding": b"HTTP/1.1 204 No Content\r\nTransfer-Encoding: chunked\r\n\r\n",
    "304 with a length": b"HTTP/1.1 304 Not Modified\r\nContent-Length: 2\r\n\r\n",
    "a redirect": b"HTTP/1.1 307 Temporary Redirect\r\nLocation: /x\r\nContent-Length: 0\r\n\r\n",
    "Connection: close": b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nhi",
    "HTTP/1.0": b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nhi",
    "HTTP/1.0, kept": b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 2\r\n\r\nhi",
    "HTTP/1.0 with chunks": b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n",
    "two replies": OK + OK,
    "bytes after the reply": OK + b"\0\r\n",
}


@pytest.mark.parametrize("raw", COMPLETE.values(), ids=COMPLETE)
async def test_complete_replies(raw: bytes) -> None:
    """A complete reply reads the same as with httpx's own transport, however the network cuts it."""
    ours = await outcomes(own, raw, silence)
    assert ours == await outcomes(stock, raw, silence)
    assert not any(isinstance(each, str) for each in ours)


UNDELIMITED = {
    "HTTP/1.1": b"HTTP/1.1 200 OK\r\n\r\nhi there",
    "HTTP/1.0": b"HTTP/1.0 200 OK\r\n\r\nhi there",
    "an error page": b"HTTP/1.1 502 Bad Gateway\r\nContent-Type: text/html\r\n\r\n<html>",
    "nothing": b"HTTP/1.1 200 OK\r\n\r\n",
}


@pytest.mark.parametrize("raw", UNDELIMITED.values(), ids=UNDELIMITED)
async def test_undelimited_replies(raw: bytes) -> None:
    """A body without a length ends with the connection."""
    ours = await outcomes(own, raw, hang_up)
    assert ours == await outcomes(stock, raw, hang_up)
    assert {each[2] for each in ours} == {raw.partition(b"\r\n\r\n")[2]}


CUT_OFF = {
    "nothing": b"",
    "half a head": b"HTTP/1.1 200 OK\r\nX: 1\r\n",
    "100 only": b"HTTP/1.1 100 Continue\r\n\r\n",
    "half a length": b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhi",
    "half a chunk": STREAM + b"5\r\nhi",
    "no last chunk": STREAM + b"2\r\nhi\r\n",
    "half a last chunk": STREAM + b"2\r\nhi\r\n0\r\n",
    "half a trailer": STREAM + b"2\r\nhi\r\n0\r\nX: 1",
}


@pytest.mark.parametrize("raw", CUT_OFF.values(), ids=CUT_OFF)
async def test_hang_ups(raw: bytes) -> None:
    """A connection that ends within a reply cuts it off, as with httpx's own transport."""
    ours = await outcomes(own, raw, hang_up)
    assert ours == await outcomes(stock, raw, hang_up)
    assert {str(each).removeprefix("200, ") for each in ours} == {"RemoteProtocolError"}


MALFORMED = {
    "not HTTP": b"SSH-2.0-OpenSSH_9.2 is what listens here\r\n\r\n",
    "a short status": b"HTTP/1.1 20 OK\r\n\r\n",
    "a long status": b"HTTP/1.1 2000 OK\r\n\r\n",
    "101": b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n" + OK,
    "101 without an upgrade": b"HTTP/1.1 101 Switching Protocols\r\n\r\n" + OK,
    "a space before the colon": b"HTTP/1.1 200 OK\r\nX : 1\r\nContent-Length: 2\r\n\r\nhi",
    "no colon": b"HTTP/1.1 200 OK\r\nabc\r\nContent-Length: 2\r\n\r\nhi",
    "no header name": b"HTTP/1.1 200 OK\r\n: abc\r\nContent-Length: 2\r\n\r\nhi",
    "NUL in a header": b"HTTP/1.1 200 OK\r\nX: a\0b\r\nContent-Length: 2\r\n\r\nhi",
    "CR in a header": b"HTTP/1.1 200 OK\r\nX: a\rb\r\nContent-Length: 2\r\n\r\nhi",
    "VT in a header": b"HTTP/1.1 200 OK\r\nX: a\x0bb\r\nContent-Length: 2\r\n\r\nhi",
    "a negative length": b"HTTP/1.1 200 OK\r\nContent-Length: -2\r\n\r\nhi",
    "a length in words": b"HTTP/1.1 200 OK\r\nContent-Length: two\r\n\r\nhi",
    "two lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nhi",
    "an immense length": b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999999\r\n\r\nhi",
    "another coding": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n",
    "another last coding": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\nhi",
    "two codings": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "a chunk size that is none": STREAM + b"zz\r\nhi\r\n0\r\n\r\n",
    "a negative chunk size": STREAM + b"-2\r\nhi\r\n0\r\n\r\n",
    "no chunk size": STREAM + b"\r\nhi\r\n0\r\n\r\n",
    "an immense chunk size": STREAM + b"f" * 21 + b"\r\nhi\r\n0\r\n\r\n",
    "a chunk longer than its size": STREAM + b"2\r\nhi!!\r\n0\r\n\r\n",
}


@pytest.mark.parametrize("raw", MALFORMED.values(), ids=MALFORMED)
async def test_malformed_replies(raw: bytes) -> None:
    """A malformed reply is refused, before or after its head as with httpx's own transport."""
    ours = await outcomes(own, raw, hang_up)
    assert ours == await outcomes(stock, raw, hang_up)
    assert {str(each).removeprefix("200, ") for each in ours} == {"RemoteProtocolError"}


STRICTER = {
    "lines that end in LF": OK.replace(b"\r\n", b"\n"),
    "a folded header": b"HTTP/1.1 200 OK\r\nX: a\r\n b\r\nContent-Length: 2\r\n\r\nhi",
    "DEL in a header": b"HTTP/1.1 200 OK\r\nX: a\x7f\r\nContent-Length: 2\r\n\r\nhi",
    "the same length twice": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 2\r\n\r\nhi",
    "a list of lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 2, 2\r\n\r\nhi",
    "a length and chunks": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"2\r\nhi\r\n0\r\n\r\n",
    "a space after the chunk size": STREAM + b"2 \r\nhi\r\n0\r\n\r\n",
    "HTTP/3.7": OK.replace(b"1.1", b"3.7"),
}


@pytest.mark.parametrize("raw", STRICTER.values(), ids=STRICTER)
async def test_doubtful_replies(raw: bytes) -> None:
    """Refused by us and read by httpx's own transport: what another parser on the way might read differently."""
    assert {str(each).removeprefix("200, ") for each in await outcomes(own, raw, hang_up)} == {"RemoteProtocolError"}
    assert all(each[2] == b"hi" for each in await outcomes(stock, raw, hang_up))


@pytest.mark.parametrize("transport", [own, stock])
@pytest.mark.parametrize("raw", [b"", b"HTTP/1.1 200 OK\r\nX:", STREAM + b"2\r\nhi\r\n", b"HTTP/1.1 200 OK\r\n\r\nhi"])
async def test_resets(transport: Callable[[], httpx.AsyncBaseTransport], raw: bytes) -> None:
    """A connection that breaks is a ReadError: before a reply, within one, and where only its end would be the end."""
    read = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.request()
        peer.send(raw)
        if b"hi" in raw:
            await read.wait()
        peer.reset()

    async def body() -> None:
        async with http.stream("POST", server.url) as response:
            async for piece in response.aiter_raw():
                assert piece == b"hi"
                read.set()

    async with Server(script) as server, client(transport()) as http:
        with pytest.raises(httpx.ReadError):
            await body()


@pytest.mark.parametrize("raw", [OK.removesuffix(b"hi"), OK, STREAM])
async def test_head(raw: bytes) -> None:
    """The reply to HEAD has no body, whatever its headers say and whatever follows them."""
    async with Server(answering(raw, then=silence)) as server, client() as http:
        for _ in range(2):
            response = await http.head(server.url)
            assert (response.status_code, response.content) == (200, b"")
        assert await outcome(own(), server.url, method="HEAD") == await outcome(stock(), server.url, method="HEAD")


@pytest.mark.parametrize("transport", [own, stock])
async def test_bad_requests(transport: Callable[[], httpx.AsyncBaseTransport]) -> None:
    """A header that would be two is not sent, and nothing goes to an address that is not HTTP."""
    async with Server(silence) as server, client(transport()) as http:
        for value in ("a\r\nX: b", "a\nb", "a\rb", "a\0b"):
            with pytest.raises(httpx.LocalProtocolError):
                await http.post(server.url, headers={"X-Test": value})
        with pytest.raises(httpx.UnsupportedProtocol):
            await http.get("ftp://127.0.0.1/")


# Getting there.


@pytest.mark.parametrize("transport", [own, stock])
async def test_no_connection(transport: Callable[[], httpx.AsyncBaseTransport]) -> None:
    """Refused is a ConnectError; not made in time, TLS included, a ConnectTimeout."""
    short = httpx.Timeout(None, connect=0.1)
    with refusing() as url:
        assert await outcome(transport(), url) == "ConnectError"
    with unreachable() as url:
        assert await outcome(transport(), url, timeout=short) == "ConnectTimeout"
    async with Server(silence) as server:
        assert await outcome(transport(), server.url.replace("http", "https"), timeout=short) == "ConnectTimeout"
    async with Server(hang_up) as server:
        assert await outcome(transport(), server.url.replace("http", "https"), timeout=short) == "ConnectError"


def address(url: str) -> tuple[Any, ...]:
    """What a name look-up gives for it."""
    return socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", httpx.URL(url).port)


@pytest.fixture
def resolve(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """Lets the name grok.test have the addresses of these URLs, in this order; gives the ports that were asked for."""

    def resolve(*urls: str) -> list[int]:
        ports = []
        loop = type(asyncio.get_running_loop())
        look_up = loop.getaddrinfo

        async def getaddrinfo(self: Any, host: str, port: int, **options: Any) -> list[tuple[Any, ...]]:
            named = host == "grok.test"
            ports.extend([port] * named)
            return [address(url) for url in urls] if named else list(await look_up(self, host, port, **options))

        monkeypatch.setattr(loop, "getaddrinfo", getaddrinfo)
        return ports

    return resolve


async def test_default_ports(resolve: Callable[..., list[int]]) -> None:
    """Without a port in the URL it is the one of its scheme."""
    with refusing() as refused:
        ports = resolve(refused)
        for scheme in ("http", "https"):
            assert await outcome(own(), f"{scheme}://grok.test/") == "ConnectError"
    assert ports == [80, 443]


async def test_silent_address(resolve: Callable[..., object], monkeypatch: pytest.MonkeyPatch) -> None:
    """An address that does not answer holds up the next one for a moment only, as do all that refuse."""
    async with Server(answering(OK, then=silence)) as server:
        with unreachable() as silent, refusing() as refused:
            resolve(silent, refused, refused, silent, server.url)
            async with client() as http:
                started = time.monotonic()
                assert (await http.get("http://grok.test/")).text == "hi"
                assert time.monotonic() - started < 5
            resolve(refused, refused)
            assert await outcome(own(), "http://grok.test/") == "ConnectError"
            monkeypatch.setattr("chatproxy.services.grok.transport.NEXT_ADDRESS", 0.01)
            resolve(silent, refused)
            assert await outcome(own(), "http://grok.test/", timeout=0.1) == "ConnectTimeout"


async def test_two_addresses_at_once(resolve: Callable[..., object], monkeypatch: pytest.MonkeyPatch) -> None:
    """If two addresses answer at the same time, one of the connections is used and the other is closed."""
    monkeypatch.setattr("chatproxy.services.grok.transport.NEXT_ADDRESS", 0)
    async with Server(answering(OK, then=silence)) as server, Server(answering(OK, then=silence)) as other:
        resolve(*[server.url, other.url] * 5)
        async with client() as http:
            assert (await http.get("http://grok.test/")).text == "hi"
            await until(lambda: len(server.playing) + len(other.playing) == 1)


# TLS.


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


def tls(authority: trustme.CA, name: str = "127.0.0.1") -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(name).configure_cert(context)
    context.set_alpn_protocols(["h2", "http/1.1"])
    return context


def trusting(authority: trustme.CA) -> ssl.SSLContext:
    context = httpx.create_ssl_context()
    authority.configure_trust(context)
    return context


async def test_tls(authority: trustme.CA) -> None:
    """Over TLS HTTP/1.1 is agreed on, a connection serves many requests, and its end ends a body without a length."""
    undelimited = b"HTTP/1.1 200 OK\r\n\r\n" + b"hi" * 50_000

    async def script(peer: Peer) -> None:
        assert peer.writer.get_extra_info("ssl_object").selected_alpn_protocol() == "http/1.1"
        await answering(OK, OK, undelimited)(peer)

    async with Server(script, tls=tls(authority)) as server, client(own(ssl_context=trusting(authority))) as http:
        for body in ("hi", "hi", "hi" * 50_000, "hi"):
            assert (await http.post(server.url, content=b"x" * 100_000)).text == body
        assert server.connections == 2


async def test_tls_is_verified(authority: trustme.CA) -> None:
    """A server that we have no reason to trust, or whose name is another, gets no request."""
    asyncio.get_running_loop().set_debug(False)  # or asyncio's servers report handshakes that fail as errors of ours
    async with (
        Server(hang_up, tls=tls(authority)) as unknown,
        Server(hang_up, tls=tls(authority, "grok.test")) as other,
    ):
        for server, context in ((unknown, CONTEXT), (other, trusting(authority))):
            assert await outcome(own(ssl_context=context), server.url) == "ConnectError"
            assert await outcome(httpx.AsyncHTTPTransport(verify=context), server.url) == "ConnectError"
            assert server.connections == 0


async def test_tls_cut_off(authority: trustme.CA) -> None:
    """Over TLS too a large body comes as fast as it is read, and is cut off if the connection ends within it."""
    flood = b"x" * 5_000_000
    sizes: list[int] = []

    async def script(peer: Peer) -> None:
        await peer.request()
        peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (len(flood) + 1) + flood)
        await peer.writer.drain()

    async def read() -> None:
        async with http.stream("POST", server.url) as response:
            await asyncio.sleep(0.1)
            async for piece in response.aiter_raw():
                sizes.append(len(piece))  # noqa: PERF401 -- it does not get to the end

    async with Server(script, tls=tls(authority)) as server, client(own(ssl_context=trusting(authority))) as http:
        with pytest.raises(httpx.RemoteProtocolError):
            await read()
    assert sum(sizes) == len(flood)
    assert max(sizes) < 1_000_000


# Keeping connections.


async def test_kept_connection() -> None:
    """One connection serves any number of requests, one after the other, if each body is read to its end."""
    replies = [OK, STREAM + b"2\r\nhi\r\n0\r\n\r\n", OK.replace(b"1.1 200 OK", b"1.0 200 OK\r\nConnection: keep-alive")]
    transport = own()
    async with Server(answering(*replies * 10, then=silence)) as server, client(transport) as http:
        for _ in range(30):
            assert (await http.post(server.url, content=b"{}")).text == "hi"
        assert server.connections == 1
        (connection,) = transport.open
        assert connection.transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@pytest.mark.parametrize("raw", [COMPLETE["Connection: close"], COMPLETE["HTTP/1.0"], COMPLETE["two replies"]])
async def test_unfit_connection(raw: bytes) -> None:
    """A connection whose server wants it closed, or has sent too much, is not used again: we hang up."""
    async with Server(answering(raw, then=silence)) as server, client() as http:
        for count in (1, 2, 3):
            assert (await http.post(server.url)).text == "hi"
            assert server.connections == count
            await until(lambda: not server.playing)


async def test_unread_body() -> None:
    """Closing a reply whose body is not all here hangs up; one that is all here leaves a connection to use again."""
    more = asyncio.Event()

    async def script(peer: Peer) -> None:
        await answering(OK, b"HTTP/1.1 200 OK\r\nContent-Length: 70000\r\n\r\n" + b"x" * 60_000, then=finish)(peer)

    async def finish(peer: Peer) -> None:
        await more.wait()
        peer.send(b"x" * 10_000)
        await answering(OK, then=silence)(peer)

    transport = own()
    async with Server(answering(OK[:-1], then=silence), script) as server, client(transport) as http:
        async with http.stream("POST", server.url):
            pass
        await until(lambda: not server.playing)
        async with http.stream("POST", server.url):
            pass
        async with http.stream("POST", server.url):
            (connection,) = transport.open
            await until(lambda: connection.unread > 60_000)
            more.set()
            await until(lambda: connection.complete)
        assert (await http.post(server.url)).text == "hi"
        assert server.connections == 2


async def test_freed() -> None:
    """A closed connection is freed at once, without the garbage collector."""
    transport = own()
    gc.disable()
    try:
        async with Server(answering(OK, then=silence)) as server, client(transport) as http:
            await http.post(server.url)
            (connection,) = map(weakref.ref, transport.open)
        assert connection() is None
    finally:
        gc.enable()


async def test_dropped_connection() -> None:
    """A kept connection is dropped as soon as the server hangs up or speaks unasked; the next request gets another."""

    async def speaks(peer: Peer) -> None:
        await speak.wait()
        peer.send(OK)
        assert await peer.gone() == b""
        gone.set()

    for then in (hang_up, speaks):
        speak, gone = asyncio.Event(), asyncio.Event()
        transport = own()
        async with Server(answering(OK, then=then), answering(OK, then=silence)) as server, client(transport) as http:
            await http.post(server.url)
            (connection,) = transport.open
            speak.set()
            await until(lambda: not server.playing)
            await until(connection.transport.is_closing)
            assert gone.is_set() == (then is speaks)
            assert (await http.post(server.url)).text == "hi"
            assert server.connections == 2


@pytest.mark.parametrize("reset", [False, True])
async def test_stale_connection(reset: bool) -> None:
    """If a kept connection breaks as it is used, that is told, and the next request meets none of the other ones."""
    both = asyncio.Barrier(2)

    async def stale(peer: Peer) -> None:
        await peer.request()
        await both.wait()
        peer.send(OK)
        await peer.request()
        if reset:
            peer.reset()

    async with Server(stale, stale, answering(OK)) as server, client() as http:
        await asyncio.gather(http.post(server.url), http.post(server.url))
        with pytest.raises(httpx.ReadError if reset else httpx.RemoteProtocolError):
            await http.post(server.url, content=b"Hi")
        assert (await http.post(server.url, content=b"Hi")).text == "hi"
        assert server.connections == 3


async def test_expiry() -> None:
    """A connection that is idle for its time is closed without another request; one that is used is not."""
    async with (
        Server(answering(*[OK] * 20, then=silence)) as server,
        Server(answering(OK, then=silence)) as other,
        client(own(keepalive_expiry=0.2)) as http,
    ):
        await http.post(other.url)
        for _ in range(10):
            await http.post(server.url)
            await asyncio.sleep(0.04)
        assert (server.connections, len(server.playing), len(other.playing)) == (1, 1, 0)
        await until(lambda: not server.playing)


async def test_most_recently_used() -> None:
    """Of several kept connections the one used last is used again, so that the others may expire."""
    served: list[int] = []

    async def script(peer: Peer) -> None:
        name = server.connections
        while True:
            await peer.request()
            served.append(name)
            peer.send(OK)

    async with Server(script) as server, client() as http:
        async with http.stream("POST", server.url) as first:
            await http.post(server.url)
            await first.aread()
        for _ in range(3):
            await http.post(server.url)
    assert served == [1, 2, 1, 1, 1]


@pytest.mark.parametrize("transport", [own, stock])
async def test_max_connections(transport: Callable[..., httpx.AsyncBaseTransport]) -> None:
    """Beyond `max_connections` requests wait for one that ends, as long as their pool timeout allows."""
    async with Server(answering(OK, OK, OK, then=silence)) as server, client(transport(max_connections=1)) as http:
        async with http.stream("POST", server.url) as first:
            with pytest.raises(httpx.PoolTimeout):
                await http.post(server.url, timeout=httpx.Timeout(None, pool=0.05))
            second, third = (asyncio.create_task(http.post(server.url)) for _ in range(2))
            await asyncio.sleep(0)
            second.cancel()
            await first.aread()
        assert (await third).text == "hi"
        assert second.cancelled()
        assert server.connections == 1


async def test_room_for_another_origin() -> None:
    """With every place taken by idle connections, the one idle longest gives way to a new origin."""
    async with (
        Server(answering(OK, OK, then=silence)) as first,
        Server(answering(OK, OK, then=silence)) as second,
        Server(answering(OK, OK, then=silence)) as third,
        client(own(max_connections=2)) as http,
    ):
        for server in (first, second, third):
            assert (await http.post(server.url)).text == "hi"
        await until(lambda: not first.playing)
        assert (len(second.playing), len(third.playing)) == (1, 1)


# Sending.


async def test_streamed_request() -> None:
    """A request body that is an iterator is sent in chunks, or as it is if its length is given."""

    async def body() -> AsyncIterator[bytes]:
        for piece in (b"Hi", b"", b" there"):
            yield piece

    sent: list[bytes] = []

    async def script(peer: Peer) -> None:
        while True:
            sent.append(await peer.request())
            peer.send(OK)

    async with Server(script) as server:
        for transport in (own, stock):
            async with client(transport()) as http:
                await http.post(server.url, content=body())
                await http.post(server.url, content=body(), headers={"Content-Length": "8"})
    assert sent[:2] == sent[2:]
    assert sent[0].endswith(b"\r\n\r\n2\r\nHi\r\n6\r\n there\r\n0\r\n\r\n")
    assert sent[1].endswith(b"\r\n\r\nHi there")


LARGE = b"0123456789abcdef" * 1_000_000


async def large() -> AsyncIterator[bytes]:
    for at in range(0, len(LARGE), 1_000_000):
        yield LARGE[at : at + 1_000_000]


@pytest.mark.parametrize("content", [lambda: LARGE, large], ids=["bytes", "iterator"])
async def test_large_request(content: Callable[[], Any]) -> None:
    """A body larger than the socket takes at once arrives whole, however slowly it is read."""
    arrived: list[bytes] = []

    async def script(peer: Peer) -> None:
        arrived.append(await peer.request())
        peer.send(OK)
        await silence(peer)

    async with Server(script) as server, client() as http:
        response = await http.post(server.url, content=content(), headers={"Content-Length": str(len(LARGE))})
        assert response.text == "hi"
    assert arrived[0].endswith(b"\r\n\r\n" + LARGE)


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("then", [hang_up, silence])
async def test_refused_upload(streamed: bool, then: Script) -> None:
    """An error that arrives while the request is being sent ends the sending, and can be read."""
    reply = b"HTTP/1.1 413 Content Too Large\r\nContent-Length: 9\r\n\r\ntoo large"
    left = asyncio.Event()
    asked_for = 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal asked_for
        async for piece in large():  # pragma: no branch -- unless the test fails
            asked_for += 1
            yield piece

    async def script(peer: Peer) -> None:
        await peer.reader.readuntil(b"\r\n\r\n")
        peer.send(reply)
        if then is silence:
            await left.wait()

    async with Server(script) as server, client() as http:
        for count in (1, 2):
            response = await http.post(server.url, content=body() if streamed else LARGE)
            assert (response.status_code, response.text) == (413, "too large")
            assert server.connections == count
        left.set()
    assert asked_for < 2 * 16


async def test_early_reply() -> None:
    """A reply that begins while the request is being sent does not end the sending if it is no error."""
    arrived: list[bytes] = []
    flood = b"x" * 2_000_000

    async def script(peer: Peer) -> None:
        head = await peer.reader.readuntil(b"\r\n\r\n")
        peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(flood) + flood)
        arrived.append(head + await peer.reader.readexactly(len(LARGE)))
        await silence(peer)

    async with Server(script) as server, client() as http:
        assert (await http.post(server.url, content=LARGE)).content == flood
    assert arrived[0].endswith(b"\r\n\r\n" + LARGE)


async def test_hang_up_while_sending() -> None:
    """A server that goes away while the request is being sent is an error as with httpx's own transport."""

    async def script(peer: Peer) -> None:
        await peer.reader.readuntil(b"\r\n\r\n")
        peer.reset()

    async with Server(script) as server:
        for content in (lambda: LARGE, large):
            assert await outcome(own(), server.url, content=content()) == "ReadError"
            assert await outcome(stock(), server.url, content=content()) == "ReadError"


# Time.


@pytest.mark.parametrize("transport", [own, stock])
async def test_timeouts(transport: Callable[[], httpx.AsyncBaseTransport]) -> None:
    """Read and write timeouts are those of httpx, for each read and write; a piece in time starts the next one anew."""

    async def slow(peer: Peer) -> None:
        await peer.request()
        peer.send(STREAM)
        for _ in range(5):
            peer.send(b"2\r\nhi\r\n")
            await asyncio.sleep(0.1)
        peer.send(b"0\r\n\r\n")
        await silence(peer)

    async def unread(_: Peer) -> None:
        await left.wait()

    left = asyncio.Event()
    short = httpx.Timeout(None, read=0.1, write=0.1)
    async with Server(silence) as server:
        assert await outcome(transport(), server.url, timeout=short) == "ReadTimeout"
    async with Server(answering(STREAM + b"2\r\nhi\r\n", then=silence)) as server:
        assert await outcome(transport(), server.url, timeout=short) == "200, ReadTimeout"
    async with Server(unread) as server:
        assert await outcome(transport(), server.url, timeout=short, content=LARGE) == "WriteTimeout"
        left.set()
    async with Server(slow) as server:
        assert (await outcome(transport(), server.url, timeout=0.4))[2] == b"hi" * 5


# Bounds.


@pytest.mark.parametrize(
    ("start", "more"),
    [
        (b"HTTP/1.1 200 OK\r\nX: ", b"x" * 1000),
        (b"HTTP/1.1 200 OK\r\n", b"X: %s\r\n" % (b"x" * 1000)),
        (b"HTTP/1.1 200 ", b"x" * 1000),
        (STREAM + b"2\r\nhi\r\n0\r\nX: ", b"x" * 1000),
        (STREAM + b"2\r\nhi\r\n0\r\n", b"X: %s\r\n" % (b"x" * 1000)),
        (STREAM + b"2;", b"x" * 1000),
        (b"", b"HTTP/1.1 103 Early Hints\r\nX: %s\r\n\r\n" % (b"x" * 1000)),
    ],
    ids=["a header", "headers", "a reason", "a trailer", "trailers", "a chunk extension", "early hints"],
)
async def test_endless_overhead(start: bytes, more: bytes) -> None:
    """What is not body may take so much only, and never an end: then we hang up."""

    async def script(peer: Peer) -> None:
        await peer.request()
        peer.send(start)
        while not peer.writer.is_closing():  # pragma: no branch -- the test may be over before this is seen
            peer.send(more)
            with suppress(ConnectionError):
                await peer.writer.drain()
            await asyncio.sleep(0)
            sent.append(len(more))

    sent: list[int] = []
    async with Server(script) as server:
        seen = await outcome(own(), server.url)
        assert str(seen).removeprefix("200, ") == "RemoteProtocolError"
    assert MAX_UNREAD <= sum(sent) < 20 * MAX_UNREAD


async def test_large_head() -> None:
    """A head that is large but within bounds is read, and does not count against the body."""
    head = b"HTTP/1.1 200 OK\r\nX: %s\r\nContent-Length: 50000\r\n\r\n" % (b"x" * 50_000)
    async with Server(answering(head + b"y" * 50_000, then=silence)) as server:
        seen = await outcome(own(), server.url)
        assert seen == await outcome(stock(), server.url)
        assert seen[2] == b"y" * 50_000


async def test_long_body() -> None:
    """What was read does not count any more: a body may be as long as it likes, in bits as small as it likes."""

    async def script(peer: Peer) -> None:
        await peer.request()
        peer.send(STREAM)
        for _ in range(300):
            await peer.send_cut([b"3e8\r\n", b"x" * 1000, b"\r", b"\n"])
        peer.send(b"0\r\n\r\n")
        await silence(peer)

    async with Server(script) as server:
        assert (await outcome(own(), server.url))[2] == b"x" * 300_000


class Flood:
    """A body without an end, and how much of it the client's kernel and ours have taken."""

    def __init__(self) -> None:
        self.taken = 0

    async def send(self, peer: Peer) -> None:
        pattern = bytes(range(256)) * 400
        while not peer.writer.is_closing():
            with suppress(ConnectionError):
                peer.send(pattern)
                await peer.writer.drain()
            self.taken += len(pattern)

    async def stuck(self) -> None:
        """Wait until nothing more is taken."""
        before = -1
        while self.taken > before:
            before = self.taken
            await asyncio.sleep(0.05)


async def test_slow_reader() -> None:
    """A body that nobody reads is left with the server; when it is read, nothing of it is missing."""
    flood = Flood()

    async def script(peer: Peer) -> None:
        await peer.request()
        peer.send(b"HTTP/1.1 200 OK\r\n\r\n")
        await flood.send(peer)

    async with Server(script) as server, client() as http, http.stream("POST", server.url) as response:
        await flood.stuck()
        assert flood.taken < 20_000_000  # what the kernels hold, mostly
        pieces = response.aiter_raw()
        body = bytearray(await anext(pieces))
        assert MAX_UNREAD < len(body) < 10 * MAX_UNREAD
        while len(body) < 50_000_000:
            body += await anext(pieces)
        assert body == (bytes(range(256)) * (len(body) // 256 + 1))[: len(body)]


async def test_slow_reader_that_sends() -> None:
    """A body is left with the server also while the request is still being sent."""
    flood = Flood()

    async def script(peer: Peer) -> None:
        await peer.reader.readuntil(b"\r\n\r\n")
        await peer.send_cut([b"HTTP/1.1 200 OK\r\n\r\n", b"a", b"b", b"c"])
        await flood.send(peer)

    async with Server(script) as server, client() as http:
        sending = asyncio.create_task(http.post(server.url, content=LARGE))
        await flood.stuck()
        assert flood.taken < 20_000_000
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending


# Leaving.


async def test_cancelled() -> None:
    """Cancelled at any point, a request leaves no connection, no task and no place taken."""

    async def half(peer: Peer) -> None:
        await peer.request()
        peer.send(STREAM + b"2\r\nhi\r\n")
        await silence(peer)

    async def deaf(_: Peer) -> None:
        await left.wait()

    async def read(http: httpx.AsyncClient, url: str, seconds: float | None, content: Any) -> None:
        async with http.stream("POST", url, timeout=seconds, content=content()) as response:
            async for _ in response.aiter_raw():
                pass

    left = asyncio.Event()
    async with (
        Server(silence) as silent,
        Server(half) as reading,
        Server(deaf) as writing,
        Server(answering(OK, then=silence)) as fine,
    ):
        with unreachable() as nowhere:
            files = open_files()
            for url, seconds, content in (
                (nowhere, None, bytes),
                (nowhere, 9, bytes),
                (silent.url.replace("http", "https"), None, bytes),
                (silent.url, None, bytes),
                (silent.url, 9, bytes),
                (reading.url, None, bytes),
                (reading.url, 9, bytes),
                (writing.url, None, lambda: LARGE),
                (writing.url, 9, large),
            ):
                left.clear()
                async with client(own(max_connections=1)) as http:
                    for rounds in (*range(12), 100):
                        task = asyncio.create_task(read(http, url, seconds, content))
                        for _ in range(rounds):
                            await asyncio.sleep(0)
                        task.cancel()
                        with pytest.raises(asyncio.CancelledError):
                            await task
                    left.set()
                    await until(lambda: open_files() == files)
                    assert (await http.post(fine.url)).text == "hi"


async def test_failed_body() -> None:
    """A body that fails gives its place to another request, closed or not."""
    async with (
        Server(answering(OK[:-1]), answering(OK, then=silence)) as server,
        client(own(max_connections=1)) as http,
    ):
        response = await http.send(http.build_request("POST", server.url), stream=True)
        with pytest.raises(httpx.RemoteProtocolError):
            await response.aread()
        assert (await http.post(server.url)).text == "hi"
        await response.aclose()


async def test_closed_transport() -> None:
    """Closing the transport hangs up for all: who reads, who waits for a reply, and who is still being connected."""
    async with Server(answering(OK, STREAM, then=silence), silence) as server, client(own(max_connections=3)) as http:
        await http.post(server.url)
        async with http.stream("POST", server.url) as response:
            reading = asyncio.ensure_future(anext(response.aiter_raw()))
            waiting, connecting, queuing = (asyncio.create_task(http.post(server.url)) for _ in range(3))
            await until(lambda: server.connections > 1)
            await http.aclose()
            for task in (reading, waiting, connecting, queuing):
                with pytest.raises(httpx.CloseError):
                    await task
        await until(lambda: not server.playing)


async def test_closed_body() -> None:
    """A closed body is not read, not even by who waits for it, and closing it again does nothing to anybody else."""
    async with Server(answering(OK, STREAM + b"2\r\nhi\r\n", then=silence)) as server, client(transport := own()):
        request = httpx.Request("POST", server.url)
        first = (await transport.handle_async_request(request)).stream
        assert isinstance(first, httpx.AsyncByteStream)
        assert [piece async for piece in first] == [b"hi"]
        second = (await transport.handle_async_request(request)).stream
        assert isinstance(second, httpx.AsyncByteStream)
        await first.aclose()
        assert [piece async for piece in first] == []
        pieces = aiter(second)
        assert await anext(pieces) == b"hi"
        waiting = asyncio.ensure_future(anext(pieces))
        await asyncio.sleep(0)
        await second.aclose()
        for read in (waiting, anext(pieces)):
            with pytest.raises(httpx.StreamClosed):
                await read
        assert server.connections == 1
