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
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Protocol, cast

import httpx
import pytest
import trustme

from chatproxy.services.grok.client_connection import MAX_UNREAD, ClientConnection
from chatproxy.services.grok.connecting import ATTEMPT_DELAY
from chatproxy.services.grok.transport import Transport
from tests.upstream import RESET_ON_CLOSE, drop_received, refusing, unreachable

pytestmark = pytest.mark.anyio

TIMEOUT = 10.0
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
            fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:-2])
            return head + await self.reader.readexactly(int(fields.get(b"content-length", b"0")))
        except (asyncio.IncompleteReadError, ConnectionError):
            raise Left from None

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
        self.stop()
        async with asyncio.timeout(TIMEOUT):
            await asyncio.gather(*self.playing, return_exceptions=True)
        for mistake in self.mistakes:
            raise mistake  # pragma: no cover -- a test that fails

    def stop(self) -> None:
        """Break off all scripts, which closes their connections."""
        for task in self.playing:
            task.cancel()

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


class Maker(Protocol):
    """Makes a transport to a server."""

    def __call__(self, url: str, /, *, max_connections: int = ...) -> httpx.AsyncBaseTransport: ...


OPTIONS: dict[str, Any] = {
    "ssl_context": CONTEXT,
    "max_connections": 10,
    "keepalive_expiry": 60.0,
    "unacknowledged_timeout": 60.0,
}


def own(url: str, /, **changes: Any) -> Transport:
    return Transport(httpx.URL(url), **{**OPTIONS, **changes})


def stock(_: str, /, *, ssl_context: ssl.SSLContext = CONTEXT, max_connections: int = 10) -> httpx.AsyncHTTPTransport:
    return httpx.AsyncHTTPTransport(verify=ssl_context, limits=httpx.Limits(max_connections=max_connections))


@asynccontextmanager
async def client(transport: httpx.AsyncBaseTransport, **options: Any) -> AsyncIterator[httpx.AsyncClient]:
    """A client, and the promise that it leaves no task and no socket behind."""
    tasks, files = asyncio.all_tasks(), open_files()
    options = {"timeout": None, **options}
    async with asyncio.timeout(TIMEOUT), httpx.AsyncClient(transport=transport, **options) as http:
        yield http
    if isinstance(transport, Transport):
        assert (transport.open, transport.idle) == (set(), {})
    await until(lambda: not (asyncio.all_tasks() - tasks) and open_files() <= files)


def open_files() -> int:
    return len(list(Path("/dev/fd").iterdir()))


async def until(condition: Callable[[], bool]) -> None:
    """Let the event loop run until this is so."""
    async with asyncio.timeout(TIMEOUT):
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


async def outcomes(transport: Maker, raw: bytes, then: Script) -> list[Outcome]:
    """What comes of a reply, for each way to cut it."""
    seen = []
    for pieces in cuts(raw):

        async def script(peer: Peer, pieces: list[bytes] = pieces) -> None:
            await peer.request()
            await peer.send_cut(pieces)
            await then(peer)

        async with Server(script) as server:
            seen.append(await outcome(transport(server.url), server.url))
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
async def test_resets(transport: Maker, raw: bytes) -> None:
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

    async with Server(script) as server, client(transport(server.url)) as http:
        with pytest.raises(httpx.ReadError):
            await body()


@pytest.mark.parametrize("transport", [own, stock])
async def test_bad_requests(transport: Maker) -> None:
    """A header that would be two is not sent."""
    async with Server(silence) as server, client(transport(server.url)) as http:
        for value in ("a\r\nX: b", "a\nb", "a\rb", "a\0b"):
            with pytest.raises(httpx.LocalProtocolError):
                await http.post(server.url, headers={"X-Test": value})


async def test_one_server() -> None:
    """A request to another server than the transport's is not sent, for it may hold what is meant for this one only."""
    async with Server(silence) as server, client(own(server.url)) as http:
        for url in (
            "http://127.0.0.1:1/",
            server.url.replace("http", "https"),
            server.url.replace("127.0.0.1", "localhost"),
        ):
            with pytest.raises(httpx.UnsupportedProtocol):
                await http.get(url)
        assert server.connections == 0


# Getting there.


@pytest.mark.parametrize("transport", [own, stock])
async def test_no_connection(transport: Maker) -> None:
    """Refused is a ConnectError; not made in time, TLS included, a ConnectTimeout."""
    short = httpx.Timeout(None, connect=0.1)
    with refusing() as url:
        assert await outcome(transport(url), url) == "ConnectError"
    with unreachable() as url:
        assert await outcome(transport(url), url, timeout=short) == "ConnectTimeout"
    for script, expected in ((silence, "ConnectTimeout"), (hang_up, "ConnectError")):
        async with Server(script) as server:
            url = server.url.replace("http", "https")
            assert await outcome(transport(url), url, timeout=short) == expected


def address(url: str) -> tuple[Any, ...]:
    """What a name look-up gives for it."""
    return socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", httpx.URL(url).port)


class Resolving(Transport):
    """Our transport, and a name that has the addresses of the URLs in `urls`, in this order."""

    urls: Sequence[str] = ()
    asked: Sequence[tuple[str, int]] = ()
    """The names and ports that were looked up."""

    async def look_up(self, host: str, port: int) -> list[tuple[Any, ...]]:
        self.asked = [*self.asked, (host, port)]
        return [address(url) for url in self.urls]


NAMED = "http://grok.test/"


def resolving(*urls: str, named: str = NAMED, attempt_delay: float = ATTEMPT_DELAY) -> Resolving:
    transport = Resolving(httpx.URL(named), **OPTIONS, attempt_delay=attempt_delay)
    transport.urls = urls
    return transport


async def test_default_ports() -> None:
    """Without a port in the URL it is the one of its scheme."""
    with refusing() as refused:
        for url, port in (("http://grok.test/", 80), ("https://grok.test/", 443)):
            transport = resolving(refused, named=url)
            assert await outcome(transport, url) == "ConnectError"
            assert transport.asked == [("grok.test", port)]


async def test_silent_address() -> None:
    """An address that does not answer holds up the next one for a moment only, as do all that refuse."""
    async with Server(answering(OK, then=silence)) as server:
        with unreachable() as silent, refusing() as refused:
            async with client(resolving(silent, refused, refused, silent, server.url)) as http:
                started = time.monotonic()
                assert (await http.get(NAMED)).text == "hi"
                assert time.monotonic() - started < 5
            assert await outcome(resolving(refused, refused), NAMED) == "ConnectError"
            hopeless = resolving(silent, refused, attempt_delay=0.01)
            assert await outcome(hopeless, NAMED, timeout=0.1) == "ConnectTimeout"


async def test_two_addresses_at_once() -> None:
    """If two addresses answer at the same time, one of the connections is used and the other is closed."""
    async with (
        Server(answering(OK, then=silence)) as server,
        Server(answering(OK, then=silence)) as other,
        client(resolving(*[server.url, other.url] * 5, attempt_delay=0)) as http,
    ):
        assert (await http.get(NAMED)).text == "hi"
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

    async with (
        Server(script, tls=tls(authority)) as server,
        client(own(server.url, ssl_context=trusting(authority))) as http,
    ):
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
            assert await outcome(own(server.url, ssl_context=context), server.url) == "ConnectError"
            assert await outcome(stock(server.url, ssl_context=context), server.url) == "ConnectError"
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

    async with (
        Server(script, tls=tls(authority)) as server,
        client(own(server.url, ssl_context=trusting(authority))) as http,
    ):
        with pytest.raises(httpx.RemoteProtocolError):
            await read()
    assert sum(sizes) == len(flood)
    assert max(sizes) < 1_000_000


# Keeping connections.


async def test_kept_connection() -> None:
    """One connection serves any number of requests, one after the other, if each body is read to its end."""
    replies = [OK, STREAM + b"2\r\nhi\r\n0\r\n\r\n", OK.replace(b"1.1 200 OK", b"1.0 200 OK\r\nConnection: keep-alive")]
    async with Server(answering(*replies * 10, then=silence)) as server, client(transport := own(server.url)) as http:
        for _ in range(30):
            assert (await http.post(server.url, content=b"{}")).text == "hi"
        assert server.connections == 1
        (connection,) = transport.open
        tcp = cast(asyncio.Transport, connection.transport)
        assert tcp.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@pytest.mark.parametrize("raw", [COMPLETE["Connection: close"], COMPLETE["HTTP/1.0"], COMPLETE["two replies"]])
async def test_unfit_connection(raw: bytes) -> None:
    """A connection whose server wants it closed, or has sent too much, is not used again: we hang up."""
    async with Server(answering(raw, then=silence)) as server, client(own(server.url)) as http:
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

    async with (
        Server(answering(OK[:-1], then=silence), script) as server,
        client(transport := own(server.url)) as http,
    ):
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
    gc.disable()
    try:
        async with Server(answering(OK, then=silence)) as server, client(transport := own(server.url)) as http:
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
        async with (
            Server(answering(OK, then=then), answering(OK, then=silence)) as server,
            client(transport := own(server.url)) as http,
        ):
            await http.post(server.url)
            (connection,) = transport.open
            speak.set()
            await until(lambda: not server.playing)
            await until(connection.transport.is_closing)
            assert gone.is_set() == (then is speaks)
            assert (await http.post(server.url)).text == "hi"
            assert server.connections == 2


@pytest.mark.skipif(sys.platform != "linux", reason="needs a socket filter")
async def test_lost_connection_of_the_transport() -> None:
    """A connection on which nothing is acknowledged is lost after a time: one that is used, and all that are idle."""

    async def script(peer: Peer) -> None:
        await peer.request()
        peer.send(OK)
        await peer.request()
        drop_received(peer.writer.get_extra_info("socket"))
        dropped.set()
        await silence(peer)

    async with Server(script) as server, client(transport := own(server.url, unacknowledged_timeout=0.5)) as http:
        async with http.stream("POST", server.url) as first, http.stream("POST", server.url) as second:
            await first.aread()
            await second.aread()
        (idle, used) = transport.idle
        dropped = asyncio.Event()
        with pytest.raises(httpx.ReadError, match="timed out"):
            await http.post(server.url)
        assert dropped.is_set()
        assert not transport.open
        assert isinstance(idle.error(), httpx.CloseError)
        assert isinstance(used.error(), httpx.ReadError)
        server.stop()


@pytest.mark.skipif(sys.platform != "linux", reason="needs a socket filter")
async def test_lost_idle_connection() -> None:
    """An idle connection whose server is gone without a word is found and closed, with all others, before its use."""

    async def script(peer: Peer) -> None:
        await answering(OK)(peer)
        await lose.wait()
        drop_received(peer.writer.get_extra_info("socket"))
        await silence(peer)

    async with Server(script) as server, client(transport := own(server.url, unacknowledged_timeout=0.5)) as http:
        lose = asyncio.Event()
        await http.post(server.url)
        (connection,) = transport.idle
        lose.set()
        await until(lambda: not transport.open)
        assert isinstance(connection.error(), httpx.ReadError)
        server.stop()


@pytest.mark.parametrize("seconds", [0.0001, 15, 100_000_000])
async def test_timeout_of_any_length(seconds: float) -> None:
    """Any time that can be configured for a lost connection is one that the system takes."""
    async with (
        Server(answering(OK, then=silence)) as server,
        client(own(server.url, unacknowledged_timeout=seconds)) as http,
    ):
        assert (await http.post(server.url)).text == "hi"


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

    async with Server(stale, stale, answering(OK)) as server, client(own(server.url)) as http:
        await asyncio.gather(http.post(server.url), http.post(server.url))
        with pytest.raises(httpx.ReadError if reset else httpx.RemoteProtocolError):
            await http.post(server.url, content=b"Hi")
        assert (await http.post(server.url, content=b"Hi")).text == "hi"
        assert server.connections == 3


async def test_expiry_of_the_transport() -> None:
    """A connection that is idle for its time is closed without another request; one that is used is not."""
    async with (
        Server(answering(OK, then=silence), answering(*[OK] * 20, then=silence)) as server,
        client(own(server.url, keepalive_expiry=0.2)) as http,
    ):
        async with http.stream("POST", server.url) as first, http.stream("POST", server.url) as second:
            await first.aread()
            await second.aread()
        for _ in range(10):
            await http.post(server.url)
            await asyncio.sleep(0.04)
        assert (server.connections, len(server.playing)) == (2, 1)
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

    async with Server(script) as server, client(own(server.url)) as http:
        async with http.stream("POST", server.url) as first:
            await http.post(server.url)
            await first.aread()
        for _ in range(3):
            await http.post(server.url)
    assert served == [1, 2, 1, 1, 1]


@pytest.mark.parametrize("transport", [own, stock])
async def test_max_connections(transport: Maker) -> None:
    """Beyond `max_connections` requests wait for one that ends."""
    async with (
        Server(answering(OK, OK, OK, then=silence)) as server,
        client(transport(server.url, max_connections=1)) as http,
    ):
        async with http.stream("POST", server.url) as first:
            second, third = (asyncio.create_task(http.post(server.url)) for _ in range(2))
            await asyncio.sleep(0.05)
            second.cancel()
            await first.aread()
        assert (await third).text == "hi"
        assert second.cancelled()
        assert server.connections == 1


# Sending.


LARGE = b"0123456789abcdef" * 1_000_000


async def test_large_request() -> None:
    """A body larger than the socket takes at once arrives whole, however slowly it is read."""
    arrived: list[bytes] = []

    async def script(peer: Peer) -> None:
        arrived.append(await peer.request())
        peer.send(OK)
        await silence(peer)

    async with Server(script) as server, client(own(server.url)) as http:
        assert (await http.post(server.url, content=LARGE)).text == "hi"
    assert arrived[0].endswith(b"\r\n\r\n" + LARGE)


@pytest.mark.parametrize("then", [hang_up, silence])
async def test_refused_upload(then: Script) -> None:
    """An error that arrives while the request is being sent can be read, and ends the connection."""
    reply = b"HTTP/1.1 413 Content Too Large\r\nContent-Length: 9\r\n\r\ntoo large"
    left = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.reader.readuntil(b"\r\n\r\n")
        peer.send(reply)
        if then is silence:
            await left.wait()

    async with Server(script) as server, client(own(server.url)) as http:
        for count in (1, 2):
            response = await http.post(server.url, content=LARGE)
            assert (response.status_code, response.text) == (413, "too large")
            assert server.connections == count
        left.set()


async def test_early_reply() -> None:
    """A reply that begins while the request is being sent does not end the sending if it is no error."""
    arrived: list[bytes] = []
    flood = b"x" * 2_000_000

    async def script(peer: Peer) -> None:
        head = await peer.reader.readuntil(b"\r\n\r\n")
        peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (len(flood) + 2) + flood)
        arrived.append(head + await peer.reader.readexactly(len(LARGE)))
        peer.send(b"hi")
        await answering(OK, then=silence)(peer)

    async with Server(script) as server, client(own(server.url)) as http:
        assert (await http.post(server.url, content=LARGE)).content == flood + b"hi"
        assert (await http.post(server.url)).text == "hi"
        assert server.connections == 1
    assert arrived[0].endswith(b"\r\n\r\n" + LARGE)


async def test_hang_up_while_sending() -> None:
    """A server that goes away while the request is being sent is an error as with httpx's own transport."""

    async def script(peer: Peer) -> None:
        await peer.reader.readuntil(b"\r\n\r\n")
        peer.reset()

    async with Server(script) as server:
        assert await outcome(own(server.url), server.url, content=LARGE) == "ReadError"
        assert await outcome(stock(server.url), server.url, content=LARGE) == "ReadError"


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
        seen = await outcome(own(server.url), server.url)
        assert str(seen).removeprefix("200, ") == "RemoteProtocolError"
    assert MAX_UNREAD <= sum(sent) < 20 * MAX_UNREAD


async def test_large_head_of_the_transport() -> None:
    """A head that is large but within bounds is read, and does not count against the body."""
    head = b"HTTP/1.1 200 OK\r\nX: %s\r\nContent-Length: 50000\r\n\r\n" % (b"x" * 50_000)
    async with Server(answering(head + b"y" * 50_000, then=silence)) as server:
        seen = await outcome(own(server.url), server.url)
        assert seen == await outcome(stock(server.url), server.url)
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
        assert (await outcome(own(server.url), server.url))[2] == b"x" * 300_000


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

    async with Server(script) as server, client(own(server.url)) as http, http.stream("POST", server.url) as response:
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

    async with (
        Server(script) as server,
        client(own(server.url)) as http,
        http.stream("POST", server.url, content=LARGE),
    ):
        await flood.stuck()
        assert flood.taken < 20_000_000


# Leaving.


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("content", [b"", LARGE], ids=["small", "large"])
async def test_cancelled_of_the_transport(scheme: str, content: bytes) -> None:
    """Cancelled at any point, a request leaves no connection, no task and no place taken."""

    async def deaf(_: Peer) -> None:
        await left.wait()

    async def half(peer: Peer) -> None:
        await peer.request()
        peer.send(STREAM + b"2\r\nhi\r\n")
        await silence(peer)

    async def read(http: httpx.AsyncClient, url: str, seconds: float | None) -> None:
        async with http.stream("POST", url, timeout=seconds, content=content) as response:
            async for _ in response.aiter_raw():
                pass

    async def cancel(server: Server | None, url: str, seconds: float | None) -> None:
        left.clear()
        async with client(own(url, max_connections=1)) as http:
            for rounds in (*range(12), 100):
                task = asyncio.create_task(read(http, url, seconds))
                for _ in range(rounds):
                    await asyncio.sleep(0)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            left.set()
            await until(lambda: open_files() == files)
            if server is None or scheme == "https":
                with pytest.raises((httpx.ConnectTimeout, httpx.ConnectError)):
                    await http.post(url, timeout=0.1)
            else:
                scripts, server.scripts = server.scripts, [answering(OK, then=silence)]
                assert (await http.post(url)).text == "hi"
                server.scripts = scripts

    left = asyncio.Event()
    async with Server(silence) as silent, Server(half) as reading, Server(deaf) as writing:
        with unreachable() as nowhere:
            files = open_files()
            for server, url in ((None, nowhere), *((server, server.url) for server in (silent, reading, writing))):
                for seconds in (None, 9):
                    await cancel(server, url.replace("http", scheme), seconds)


Ending = Callable[["asyncio.Task[None]", Transport], Awaitable[None]]


async def wait(task: "asyncio.Task[None]", _: Transport) -> None:
    """The exchange ends by itself."""
    await asyncio.wait([task])


async def cancel(task: "asyncio.Task[None]", _: Transport) -> None:
    """The exchange is cancelled while it waits."""
    await asyncio.sleep(0.05)
    task.cancel()
    await asyncio.wait([task])


async def close(task: "asyncio.Task[None]", transport: Transport) -> None:
    """The transport is closed while the exchange waits."""
    await asyncio.sleep(0.05)
    await transport.aclose()
    await asyncio.wait([task])


async def deaf(_: Peer) -> None:
    """The server reads nothing, until the test is over."""
    await asyncio.get_running_loop().create_future()


ENDINGS: dict[str, tuple[Script, Ending]] = {
    "complete": (answering(OK, then=silence), wait),
    "refused": (answering(b"HTTP/1.1 413 Content Too Large\r\nContent-Length: 0\r\n\r\n"), wait),
    "cut off in the head": (answering(b"HTTP/1.1 200"), wait),
    "cut off in the body": (answering(STREAM + b"2\r\nhi\r\n"), wait),
    "malformed head": (answering(b"What?\r\n\r\n", then=silence), wait),
    "malformed body": (answering(STREAM + b"what?\r\n", then=silence), wait),
    "cancelled before the head": (answering(b"", then=silence), cancel),
    "cancelled in the body": (answering(STREAM + b"2\r\nhi\r\n", then=silence), cancel),
    "cancelled while sending": (deaf, cancel),
    "closed before the head": (answering(b"", then=silence), close),
    "closed in the body": (answering(STREAM, then=silence), close),
}


@pytest.mark.parametrize(("script", "end"), ENDINGS.values(), ids=ENDINGS)
async def test_nothing_is_kept(script: Script, end: Ending) -> None:
    """However an exchange ends, its request is freed at once and leaves nothing to the garbage collector."""
    content = bytes(8_000_000)
    async with Server(script) as server, asyncio.timeout(TIMEOUT):
        await kept_nothing(server.url, content, end)
        server.stop()


async def test_nothing_is_kept_without_a_connection() -> None:
    """A request that could not be connected is freed at once as well."""
    content = bytes(100_000)
    with refusing() as refused, unreachable() as nowhere:
        for url in (refused, nowhere):
            await kept_nothing(url, content, wait)


async def kept_nothing(url: str, content: bytes, end: Ending) -> None:
    async def exchange() -> None:
        with suppress(httpx.TransportError):
            stream = (await transport.handle_async_request(requests.pop())).stream
            assert isinstance(stream, httpx.AsyncByteStream)
            async for _ in stream:
                pass

    transport = own(url)
    before = sys.getrefcount(content)
    requests = [httpx.Request("POST", url, content=content, extensions={"timeout": {"connect": 0.1}})]
    request = weakref.ref(requests[0])
    gc.collect()
    gc.disable()
    try:
        await end(asyncio.create_task(exchange()), transport)
        await asyncio.sleep(0.01)
        assert (sys.getrefcount(content), request()) == (before, None)
        await transport.aclose()
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        assert [kept for kept in gc.garbage if isinstance(kept, BaseException | ClientConnection)] == []
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


@pytest.mark.parametrize("content", [b"x" * 1000, LARGE], ids=["small", "large"])
async def test_sent_body_is_not_held(content: bytes) -> None:
    """While an answer is awaited and read, what was sent is not held, for it may be large and the answer long."""

    async def script(peer: Peer) -> None:
        assert (await peer.request()).endswith(content)
        arrived.set()
        await silence(peer)

    arrived = asyncio.Event()
    content = bytes(bytearray(content))
    async with Server(script) as server, asyncio.timeout(TIMEOUT):
        transport = own(server.url)
        before = sys.getrefcount(content)
        waiting = asyncio.create_task(
            transport.handle_async_request(httpx.Request("POST", server.url, content=content))
        )
        await arrived.wait()
        assert sys.getrefcount(content) == before
        waiting.cancel()
        await asyncio.wait([waiting])
        await transport.aclose()


async def test_failed_body() -> None:
    """A body that fails gives its place to another request, closed or not."""
    async with (
        Server(answering(OK[:-1]), answering(OK, then=silence)) as server,
        client(own(server.url, max_connections=1)) as http,
    ):
        response = await http.send(http.build_request("POST", server.url), stream=True)
        with pytest.raises(httpx.RemoteProtocolError):
            await response.aread()
        assert (await http.post(server.url)).text == "hi"
        await response.aclose()


async def test_closed_transport() -> None:
    """Closing the transport hangs up for all: who reads, who waits for a reply, and who is still being connected."""
    async with (
        Server(answering(OK, STREAM, then=silence), silence) as server,
        client(own(server.url, max_connections=3)) as http,
    ):
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
    async with (
        Server(answering(OK, STREAM + b"2\r\nhi\r\n", then=silence)) as server,
        client(transport := own(server.url)),
    ):
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
