"""The way to Grok through a proxy, over TLS or not: its timeout is the connection's, and its refusal is told."""

import asyncio
import logging
import ssl
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import httpx
import pytest
import trustme

from chatproxy.services.grok.network import ProxyTransport
from tests.conftest import HI, TIMEOUT, refusal, serving
from tests.readers import answer
from tests.upstream import CLOSE, HANG, Gate, Step, Upstream, error, stream

pytestmark = pytest.mark.anyio

SHORT = 0.3
CANARY = "canary"

Handler = Callable[["Proxy", asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Proxy:
    """A proxy on a free port, whose connections are served by a handler that a test may change."""

    def __init__(self, handler: Handler, *, scheme: str = "http", tls: ssl.SSLContext | None = None) -> None:
        self.handler = handler
        self.heads: list[str] = []
        self.targets: list[bytes] = []
        self.connections = 0
        self._scheme, self._tls = scheme, tls
        self._tasks: set[asyncio.Task[None]] = set()
        self._change = asyncio.Event()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0, ssl=self._tls)
        self.port = self._server.sockets[0].getsockname()[1]
        self.url = f"{self._scheme}://user:{CANARY}@127.0.0.1:{self.port}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def open(self) -> int:
        return len(self._tasks)

    async def closed(self) -> None:
        """Wait until it has no connection any more."""
        await self.until(lambda: not self._tasks)

    async def until(self, true: Callable[[], bool], within: float = TIMEOUT) -> None:
        """Wait until something about its connections has become true."""
        async with asyncio.timeout(within):
            while not true():
                self._change.clear()
                await self._change.wait()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.ensure_future(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        self._change.set()

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._change.set()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with suppress(ConnectionError, asyncio.IncompleteReadError):
                await self.handler(self, reader, writer)
        finally:
            writer.close()


async def head(proxy: Proxy, reader: asyncio.StreamReader) -> str:
    proxy.heads.append((await reader.readuntil(b"\r\n\r\n")).decode())
    return proxy.heads[-1]


async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, port: int) -> None:
    """Pass on what comes, in both directions, until one side ends."""
    there, back = await asyncio.open_connection("127.0.0.1", port)

    async def copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while data := await source.read(65536):
                sink.write(data)
                await sink.drain()

    tasks = [asyncio.ensure_future(copy(reader, back)), asyncio.ensure_future(copy(there, writer))]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        back.close()


async def tunnel(proxy: Proxy, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """CONNECT, granted."""
    port = int((await head(proxy, reader)).split()[1].split(":")[1])
    writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
    await relay(reader, writer, port)


async def silent(proxy: Proxy, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:  # noqa: ARG001
    """Take everything and answer nothing."""
    while await reader.read(65536):
        pass


def saying(text: bytes, length: int = 3) -> Handler:
    """Say this once so many bytes have come, and hang up."""

    async def handler(proxy: Proxy, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:  # noqa: ARG001
        await reader.readexactly(length)
        writer.write(text)
        await writer.drain()
        writer.write_eof()
        await reader.read()

    return handler


def status(code: int) -> Handler:
    body = f"<p>{CANARY}</p>"
    return saying(f"HTTP/1.1 {code} {CANARY}\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode(), length=100)


def socks(reply: int = 0) -> Handler:
    """SOCKS5 with a name and a password (RFC 1928, RFC 1929)."""

    async def handler(proxy: Proxy, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert await reader.readexactly(3) == b"\x05\x01\x02"
        writer.write(b"\x05\x02")
        login = b"\x01\x04user\x06" + CANARY.encode()
        assert await reader.readexactly(len(login)) == login
        writer.write(b"\x01\x00")
        kind = (await reader.readexactly(4))[3]
        size = 4 if kind == 1 else (await reader.readexactly(1))[0]  # an IPv4 address, or a name with its length
        proxy.targets.append(await reader.readexactly(size))
        port = int.from_bytes(await reader.readexactly(2), "big")
        writer.write(bytes([5, reply, 0, 1, 0, 0, 0, 0, 0, 0]))
        await relay(reader, writer, port)

    return handler


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def tls(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    return context


@pytest.fixture
def trusted(authority: trustme.CA, tmp_path: Path) -> str:
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    return str(tmp_path / "ca.pem")


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    """The log's warnings about Grok so far; none says what is private, or what the proxy said."""
    caplog.set_level(logging.DEBUG, logger="chatproxy")
    yield lambda: [
        record.getMessage()
        for record in caplog.records
        if record.levelno == logging.WARNING and record.name.startswith("chatproxy.services.")
    ]
    assert CANARY not in caplog.text


async def test_tunnel(tls: ssl.SSLContext, trusted: str) -> None:
    """Grok over TLS is reached by CONNECT, with the proxy's login; and the connection is kept for the next chat."""
    async with Upstream(tls=tls) as grok, Proxy(tunnel) as proxy:
        async with serving(grok.url, https_proxy=proxy.url, ssl_cert_file=trusted) as service:
            await grok.until(lambda: len(grok.probes) == 1)
            for _ in range(3):
                assert answer((await service.ask()).content) == "Hello, world"
        assert proxy.connections <= 2  # the key check may have had another
        assert {line.split("\r\n")[0] for line in proxy.heads} == {f"CONNECT 127.0.0.1:{grok.port} HTTP/1.1"}
        assert all("\r\nProxy-Authorization: Basic dXNlcjpjYW5hcnk=\r\n" in text for text in proxy.heads)
        assert "proxy-authorization" not in grok.calls[0].headers
        await proxy.closed()


async def test_tls_to_the_proxy(tls: ssl.SSLContext, trusted: str) -> None:
    """The proxy itself may be reached over TLS; the same certificates are trusted for it."""
    async with (
        Upstream(tls=tls) as grok,
        Proxy(tunnel, scheme="https", tls=tls) as proxy,
        serving(grok.url, https_proxy=proxy.url, ssl_cert_file=trusted) as service,
    ):
        assert answer((await service.ask()).content) == "Hello, world"


@pytest.mark.parametrize("scheme", ["socks5", "socks5h"])
async def test_socks(scheme: str, tls: ssl.SSLContext, trusted: str) -> None:
    """SOCKS5 leads to Grok, with TLS and without, and looks its name up."""
    async with Proxy(socks(), scheme=scheme) as proxy:
        for context in (None, tls):
            async with Upstream(tls=context) as grok:
                url = grok.url if context else grok.url.replace("127.0.0.1", "localhost")
                async with serving(url, all_proxy=proxy.url, ssl_cert_file=trusted) as service:
                    assert answer((await service.ask()).content) == "Hello, world"
        assert b"localhost" in proxy.targets
        await proxy.closed()


@pytest.mark.parametrize(("scheme", "https"), [("http", True), ("socks5", True), ("socks5", False)])
async def test_silent_proxy(scheme: str, https: bool, logged: Callable[[], list[str]]) -> None:
    """A proxy that never lets us through is a connection that takes too long, and is left."""
    url = "https://grok.invalid/v1" if https else "http://grok.invalid/v1"
    async with Proxy(silent, scheme=scheme) as proxy:
        async with serving(url, all_proxy=proxy.url, connect_timeout=SHORT, grok_retries=0) as service:
            loop = asyncio.get_running_loop()
            started = loop.time()
            response = await service.ask()
            assert (response.status_code, refusal(response)["code"]) == (504, "connect_timeout")
            assert SHORT * 0.9 < loop.time() - started < TIMEOUT
        await proxy.closed()
    assert logged() == ["connect_timeout: no connection in time"]


async def test_silent_grok_behind_a_proxy(tls: ssl.SSLContext, trusted: str) -> None:
    """The connection's timeout ends with the connection: Grok may take longer to answer."""
    timeout = 1.0  # long enough for a handshake on a busy machine
    script: list[Step] = [timeout * 1.5, *stream("a")]
    for context, handler, scheme in [(tls, tunnel, "http"), (None, socks(), "socks5")]:
        async with (
            Upstream(script, tls=context) as grok,
            Proxy(handler, scheme=scheme) as proxy,
            serving(grok.url, all_proxy=proxy.url, ssl_cert_file=trusted, connect_timeout=timeout) as service,
        ):
            assert answer((await service.ask()).content) == "a"


REFUSING = {
    "407": ("http", status(407), "the proxy answered 407"),
    "403": ("http", status(403), "the proxy answered 403"),
    "502": ("http", status(502), "the proxy answered 502"),
    "hung up": ("http", saying(b""), "the proxy closed the connection (RemoteProtocolError)"),
    "no HTTP": (
        "http",
        saying(CANARY.encode() * 2 + b"\r\n\r\n"),
        "the proxy closed the connection (RemoteProtocolError)",
    ),
    "SOCKS refused": (
        "socks5",
        socks(reply=2),
        "the SOCKS proxy refused: Proxy Server could not connect: Connection not allowed by ruleset",
    ),
    "SOCKS login": (
        "socks5",
        saying(b"\x05\xff"),
        "the SOCKS proxy refused: Requested USERNAME/PASSWORD from proxy server, but got NO ACCEPTABLE METHODS",
    ),
    "SOCKS hung up": ("socks5", saying(b""), "the proxy does not answer as a SOCKS5 proxy"),
    "no SOCKS": ("socks5", saying(b"HTTP/1.1 400 canary\r\n\r\n"), "the proxy does not answer as a SOCKS5 proxy"),
}


@pytest.mark.parametrize("how", REFUSING)
async def test_refusing_proxy(how: str, logged: Callable[[], list[str]]) -> None:
    """A proxy that refuses makes Grok unreachable; the log has its status, and nothing else that it said."""
    scheme, handler, reason = REFUSING[how]
    async with Proxy(handler, scheme=scheme) as proxy:
        async with serving("https://grok.invalid/v1", https_proxy=proxy.url, grok_retries=0) as service:
            response = await service.ask()
            assert (response.status_code, refusal(response)["code"]) == (502, "upstream_unreachable")
        await proxy.closed()
    assert logged() == [f"upstream_unreachable: {reason}"]


async def test_refusing_proxy_without_a_tunnel(logged: Callable[[], list[str]]) -> None:
    """So does a 407 to an http:// address, which is the proxy's; Grok's own errors stay what they are."""
    async with Upstream(error(407, {"error": CANARY}), error(503, {}), stream("a")) as proxy:
        way = proxy.url.removesuffix("/v1")
        async with serving("http://grok.invalid/v1", http_proxy=way, grok_retries=0) as service:
            for code in ("upstream_unreachable", "upstream_overloaded"):
                assert refusal(await service.ask())["code"] == code
            assert answer((await service.ask()).content) == "a"
    assert logged()[0] == "upstream_unreachable: the proxy answered 407"


async def test_grok_hangs_up_behind_a_proxy(tls: ssl.SSLContext, trusted: str, logged: Callable[[], list[str]]) -> None:
    """Once the request is on its way, a connection that ends is Grok's failure, and not the proxy's."""
    async with (
        Upstream([CLOSE], tls=tls) as grok,
        Proxy(tunnel) as proxy,
        serving(grok.url, https_proxy=proxy.url, ssl_cert_file=trusted, grok_retries=0) as service,
    ):
        response = await service.ask()
        assert (response.status_code, refusal(response)["code"]) == (502, "upstream_error")
    assert logged() == ["upstream_error: RemoteProtocolError"]


async def test_failed_handshakes_take_no_place(
    tls: ssl.SSLContext, trusted: str, logged: Callable[[], list[str]]
) -> None:
    """However many connections have failed behind the proxy, the next one is tried."""

    async def no_tls(proxy: Proxy, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await head(proxy, reader)
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        await saying(b"this is no TLS")(proxy, reader, writer)

    changes: dict[str, Any] = {"max_streams": 1, "grok_retries": 0, "connect_timeout": 2}
    async with (
        Upstream(tls=tls) as grok,
        Proxy(no_tls) as proxy,
        serving(grok.url, https_proxy=proxy.url, ssl_cert_file=trusted, **changes) as service,
    ):
        for _ in range(5):
            assert refusal(await service.ask())["code"] == "upstream_unreachable"
        proxy.handler = tunnel
        assert answer((await service.ask()).content) == "Hello, world"
    assert set(logged()) == {"upstream_unreachable: SSLError: WRONG_VERSION_NUMBER"}


@pytest.mark.parametrize("scheme", ["http", "socks5"])
async def test_leaving_while_the_proxy_is_silent(scheme: str) -> None:
    """A caller who leaves meanwhile takes the connection to the proxy along."""
    async with (
        Proxy(silent, scheme=scheme) as proxy,
        serving("https://grok.invalid/v1", https_proxy=proxy.url, connect_timeout=600) as service,
        service.caller() as caller,
    ):
        await proxy.until(lambda: proxy.connections == 1)  # the key check's, which goes on
        await caller.post({"messages": HI})
        await proxy.until(lambda: proxy.open == 2)
        caller.reset()
        await proxy.until(lambda: proxy.open == 1, within=1)


async def test_closing_an_answer_early(tls: ssl.SSLContext, trusted: str) -> None:
    """A caller who leaves in the middle hangs Grok up, and the next chat is answered."""
    async with (
        Upstream(stream("a", HANG), stream("b"), tls=tls) as grok,
        Proxy(tunnel) as proxy,
        serving(grok.url, https_proxy=proxy.url, ssl_cert_file=trusted) as service,
    ):
        async with service.asking() as live:
            assert (await live.event()).data == "a"
        await grok.calls[0].hung_up()
        assert answer((await service.ask()).content) == "b"


def request(url: str) -> httpx.Request:
    return httpx.Request("GET", f"{url}/api-key", headers={"Host": "localhost"})


async def test_idle_connections_expire() -> None:
    """Connections that were idle for too long are all closed at the next request, which has a new one."""
    async with Upstream() as grok:
        way = grok.url.removesuffix("/v1")
        transport = ProxyTransport(way, ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), keepalive_expiry=0.05, options=[])
        responses = [await transport.handle_async_request(request("http://grok.invalid/v1")) for _ in range(2)]
        for response in responses:
            assert (await response.aread()).startswith(b"{")
            await response.aclose()
            await response.stream.aclose()  # type: ignore[union-attr] # closing again changes nothing
        await asyncio.sleep(0.1)  # the time that is the subject
        response = await transport.handle_async_request(request("http://grok.invalid/v1"))
        await grok.until(lambda: (grok.connections, grok.open) == (3, 1))
        await response.aclose()
        await transport.aclose()
        await grok.until(lambda: grok.open == 0)


async def test_refused_connection_is_closed() -> None:
    """A connection on which the proxy has refused is not kept."""
    async with Upstream(key=error(407, {})) as proxy:
        way = proxy.url.removesuffix("/v1")
        transport = ProxyTransport(way, ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), keepalive_expiry=60.0, options=[])
        with pytest.raises(httpx.ProxyError, match=r"^the proxy answered 407$"):
            await transport.handle_async_request(request("http://grok.invalid/v1"))
        await proxy.until(lambda: proxy.open == 0)
        await transport.aclose()


async def test_closed_while_in_use() -> None:
    """What is still being read when the transport closes is closed, and not kept."""
    gate = Gate()
    async with Upstream(key=[b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\na", gate, b"b"]) as grok:
        way = grok.url.removesuffix("/v1")
        transport = ProxyTransport(way, ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), keepalive_expiry=60.0, options=[])
        response = await transport.handle_async_request(request("http://grok.invalid/v1"))
        await gate.reached.wait()
        await transport.aclose()
        await grok.until(lambda: grok.open == 0)
        with suppress(httpx.TransportError):
            await response.aclose()
