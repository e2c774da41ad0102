"""The transport over TLS: the same truth as without, whatever the other side does with the records."""

import asyncio
import datetime
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import httpx
import pytest
import trustme

from tests.conftest import failure, serving
from tests.readers import standard
from tests.upstream import stream
from tests.wire.test_transport import (
    COMPLETE,
    CUT_OFF,
    MALFORMED,
    OK,
    STREAM,
    UNDELIMITED,
    Outcome,
    Peer,
    Script,
    Server,
    client,
    cuts,
    hang_up,
    outcome,
    own,
    silence,
    stock,
    tls,
    trusting,
)

pytestmark = pytest.mark.anyio

AUTHORITY = trustme.CA()
TRUSTING = trusting(AUTHORITY)


@pytest.fixture(autouse=True)
async def quiet_servers() -> None:
    """In debug mode asyncio's servers report handshakes that fail as errors of ours."""
    asyncio.get_running_loop().set_debug(False)


@pytest.fixture(scope="module", params=["TLSv1_2", "TLSv1_3"])
def server_context(request: pytest.FixtureRequest) -> ssl.SSLContext:
    context = tls(AUTHORITY)
    context.minimum_version = context.maximum_version = ssl.TLSVersion[request.param]
    return context


async def outcomes(
    transport: Callable[..., httpx.AsyncBaseTransport], raw: bytes, then: Script, context: ssl.SSLContext
) -> list[Outcome]:
    """What comes of a reply, whole, and for each way to cut it into records."""
    seen = []
    async with Server(tls=context) as server:
        for pieces in cuts(raw):

            async def script(peer: Peer, pieces: list[bytes] = pieces) -> None:
                await peer.request()
                await peer.send_cut(pieces)
                await then(peer)

            server.scripts = [script]
            seen.append(await outcome(transport(server.url, ssl_context=TRUSTING), server.url))
    return seen


ALL = [
    *[pytest.param(raw, silence, id=name) for name, raw in COMPLETE.items()],
    *[pytest.param(raw, hang_up, id=f"undelimited: {name}") for name, raw in UNDELIMITED.items()],
    *[pytest.param(raw, hang_up, id=f"cut off: {name}") for name, raw in CUT_OFF.items()],
    *[pytest.param(raw, hang_up, id=f"malformed: {name}") for name, raw in MALFORMED.items()],
]


@pytest.mark.parametrize(("raw", "then"), ALL)
async def test_replies_over_tls(raw: bytes, then: Script) -> None:
    """Every reply reads the same as with httpx's own transport, whatever records it comes in."""
    context = tls(AUTHORITY)
    ours = await outcomes(own, raw, then, context)
    theirs = await outcomes(stock, raw, then, context)
    assert ours == theirs


class Records:
    """The server's end of TLS, record by record, on a socket that is only TCP."""

    def __init__(self, context: ssl.SSLContext, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._ssl = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self.reader, self.writer = reader, writer
        self.left: int | None = None  # bytes that are still sent; then the connection ends

    async def _do(self, step: Callable[[], object]) -> object:
        while True:
            try:
                result = step()
            except ssl.SSLWantReadError:
                await self.flush()
                received = await self.reader.read(65536)
                if not received:
                    raise ConnectionResetError from None
                self._incoming.write(received)
            else:
                await self.flush()
                return result

    async def flush(self) -> None:
        """Send what there is, as far as it is sent at all."""
        data = self._outgoing.read()
        if self.left is not None:
            data = data[: self.left]
            self.left -= len(data)
        self.writer.write(data)
        await self.writer.drain()
        if self.left == 0:
            raise ConnectionAbortedError

    async def shake_hands(self) -> None:
        await self._do(self._ssl.do_handshake)

    async def request(self) -> None:
        await self._do(lambda: self._ssl.read(65536))

    def encrypt(self, data: bytes) -> bytes:
        """One record or more, not sent."""
        self._ssl.write(data)
        return self._outgoing.read()

    async def close_notify(self) -> None:
        with suppress(ssl.SSLError):
            self._ssl.unwrap()
        await self.flush()


@asynccontextmanager
async def speaking(script: Callable[[Records], Awaitable[None]], context: ssl.SSLContext) -> AsyncIterator[str]:
    """A server whose script has the records in its hands; gives its address."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            await script(Records(context, reader, writer))
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
    finally:
        server.close()


async def both(script: Callable[[Records], Awaitable[None]], context: ssl.SSLContext) -> Outcome:
    """What comes of it with our transport; checked to be the same with httpx's own."""
    async with speaking(script, context) as url:
        ours = await outcome(own(url, ssl_context=TRUSTING), url, timeout=5)
        assert ours == await outcome(stock(url, ssl_context=TRUSTING), url, timeout=5)
    return ours


@pytest.mark.parametrize(
    "garbage", [b"HTTP/1.1 200 OK\r\n\r\n", b"\x00" * 100, b"\x16\x03\x01\xff\xff" + b"x" * 70_000]
)
async def test_garbage_instead_of_tls(garbage: bytes) -> None:
    """What does not speak TLS is no connection."""

    async def script(records: Records) -> None:
        records.writer.write(garbage)
        await records.reader.read()

    assert await both(script, tls(AUTHORITY)) == "ConnectError"


async def test_cut_in_the_handshake(server_context: ssl.SSLContext) -> None:
    """Wherever the server leaves during the handshake, there is no connection, and nobody waits for it."""
    asked: list[int] = []

    for left in (1, 3, 5, 6, 60, 200, 400, 600, 700):

        async def script(records: Records, left: int = left) -> None:
            records.left = left
            await records.shake_hands()
            await records.request()
            asked.append(left)

        assert await both(script, server_context) == "ConnectError"
    assert asked == []


async def test_alert(server_context: ssl.SSLContext) -> None:
    """A server that wants a certificate of ours says so in an alert, which comes after the handshake in TLS 1.3."""
    context = tls(AUTHORITY)
    context.minimum_version = context.maximum_version = server_context.minimum_version
    context.verify_mode = ssl.CERT_REQUIRED

    async def script(records: Records) -> None:
        try:
            await records.shake_hands()
            await records.request()
        except ssl.SSLError:
            await records.flush()

    async with speaking(script, context) as url:
        assert await outcome(own(url, ssl_context=TRUSTING), url) in ("ConnectError", "ReadError")


@pytest.mark.parametrize("notify", [False, True])
@pytest.mark.parametrize("raw", [OK, STREAM + b"2\r\nhi\r\n", b"HTTP/1.1 200 OK\r\n\r\nhi", b""])
async def test_end_without_a_word(server_context: ssl.SSLContext, raw: bytes, notify: bool) -> None:
    """The end of the connection is one, announced or not; what is cut off by it is told by HTTP."""

    async def script(records: Records) -> None:
        await records.shake_hands()
        await records.request()
        records.writer.write(records.encrypt(raw) if raw else b"")
        if notify:
            await records.close_notify()

    await both(script, server_context)


async def test_damaged_record(server_context: ssl.SSLContext) -> None:
    """A record that was changed on its way ends the answer with an error, and what came before it is given."""

    async def script(records: Records) -> None:
        await records.shake_hands()
        await records.request()
        records.writer.write(records.encrypt(STREAM + b"2\r\nhi\r\n"))
        damaged = bytearray(records.encrypt(b"2\r\nho\r\n0\r\n\r\n"))
        damaged[-1] ^= 1
        records.writer.write(damaged)
        await records.reader.read()

    async with speaking(script, server_context) as url:
        assert await outcome(own(url, ssl_context=TRUSTING), url) == "200, ReadError"


async def test_damaged_answer(server_context: ssl.SSLContext, tmp_path: Path) -> None:
    """To the client of the service it is an answer that was cut off, with either transport."""

    async def script(records: Records) -> None:
        await records.shake_hands()
        await records.request()
        parts = [step for step in stream("a") if isinstance(step, bytes)]
        records.writer.write(records.encrypt(b"".join(parts[:2])))
        damaged = bytearray(records.encrypt(b"0\r\n\r\n"))
        damaged[-1] ^= 1
        records.writer.write(damaged)
        await records.reader.read()

    AUTHORITY.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    async with (
        speaking(script, server_context) as url,
        serving(f"{url}v1", ssl_cert_file=tmp_path / "ca.pem", grok_retries=0) as service,
    ):
        response = await service.ask()
        events = standard(response.content)
        assert failure(events[-1], response)["code"] == "upstream_cut_off"
        assert events[0].data == "a"


async def test_byte_by_byte(server_context: ssl.SSLContext) -> None:
    """The largest records, several of them, may come a byte at a time."""
    body = bytes(range(256)) * 100

    async def script(records: Records) -> None:
        await records.shake_hands()
        await records.request()
        reply = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        raw = records.encrypt(reply[:16_384]) + records.encrypt(reply[16_384:])
        for at in range(len(raw)):
            records.writer.write(raw[at : at + 1])
            await asyncio.sleep(0)
        await records.reader.read()

    async with speaking(script, server_context) as url:
        found = await outcome(own(url, ssl_context=TRUSTING), url)
        assert not isinstance(found, str)
        assert (found[0], found[2]) == (200, body)


async def test_many_records_at_once(server_context: ssl.SSLContext) -> None:
    """Hundreds of small records in one read, with empty ones among them, are one body, in order."""
    pieces = [b"%x\r\n%b\r\n" % (len(text), text) for text in (str(number).encode() for number in range(500))]

    async def script(records: Records) -> None:
        await records.shake_hands()
        await records.request()
        raw = [records.encrypt(piece) for piece in [STREAM, *pieces, b"0\r\n\r\n"]]
        records.writer.write(b"".join(raw))
        await records.reader.read()

    async with speaking(script, server_context) as url:
        found = await outcome(own(url, ssl_context=TRUSTING), url)
        assert found[2] == b"".join(str(number).encode() for number in range(500))


async def test_large_request_over_tls() -> None:
    """A body of a megabyte arrives as it is, and the answer to it, too."""
    received: list[bytes] = []
    content = bytes(range(250)) * 4000

    async def reply(peer) -> None:  # type: ignore[no-untyped-def]
        await peer.reader.readuntil(b"\r\n\r\n")
        received.append(await peer.reader.readexactly(len(content)))
        peer.send(OK)
        await silence(peer)

    async with (
        Server(reply, tls=tls(AUTHORITY)) as server,
        client(own(server.url, ssl_context=TRUSTING)) as http,
    ):
        assert (await http.post(server.url, content=content)).text == "hi"
    assert received == [content]


async def test_slow_reader_over_tls() -> None:
    """Who does not read holds the server back; what is on its way is bounded."""
    sent = 0
    total = 50_000_000

    async def script(peer) -> None:  # type: ignore[no-untyped-def]
        nonlocal sent
        await peer.request()
        peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % total)
        while sent < total:
            peer.send(bytes(50_000))
            sent += 50_000
            await peer.writer.drain()

    async with (
        Server(script, tls=tls(AUTHORITY)) as server,
        client(transport := own(server.url, ssl_context=TRUSTING)) as http,
        http.stream("POST", server.url) as response,
    ):
        before = -1
        while before != sent:  # until the server is held back
            before = sent
            await asyncio.sleep(0.2)
        (connection,) = transport.open
        assert connection.unread < 200_000
        assert sent < 15_000_000  # the kernel's buffers, and the server's own
        size = 0
        async for piece in response.aiter_raw():
            size += len(piece)
        assert size == total


async def test_untrusted() -> None:
    """A certificate that has expired, is another's, or is signed by somebody else, is none; no request is sent."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)

    yesterday = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)
    AUTHORITY.issue_cert("127.0.0.1", not_after=yesterday).configure_cert(context)
    async with Server(hang_up, tls=context) as server:
        assert await outcome(own(server.url, ssl_context=TRUSTING), server.url) == "ConnectError"
        assert server.connections == 0


async def test_nothing_is_left_of_a_handshake() -> None:
    """A handshake that failed, or was given up, leaves no connection behind."""

    async def script(records: Records) -> None:
        await records.reader.read()

    async with speaking(script, tls(AUTHORITY)) as url, client(transport := own(url, ssl_context=TRUSTING)) as http:
        with pytest.raises(httpx.ConnectTimeout):
            await http.post(url, timeout=httpx.Timeout(5, connect=0.1))
        assert transport.open == set()
