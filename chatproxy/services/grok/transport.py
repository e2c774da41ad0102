"""The way to Grok: HTTP/1.1 for httpx, on asyncio's protocols and the llhttp parser.

Knows sockets, TLS and the framing of HTTP/1.1. Does not know chats, JSON or event streams; redirects, cookies and
content codings stay with httpx. Made for long streams of small pieces: a piece is parsed in the callback that read it,
a waiting reader costs one future and a busy one none, and there are no timers but those that were asked for.

Replies and errors are those of httpx's own transport, except that a reply which two parsers might read differently is
refused (bare LF, folded headers, repeated lengths, a length beside a coding) and that `extensions` stay empty.
"""

import asyncio
import socket
import ssl
from collections import deque
from collections.abc import Mapping
from typing import Any, Self, cast

import httpx
from httptools import HttpParserError, HttpResponseParser

Origin = tuple[str, bytes, int | None]
Timeouts = Mapping[str, float | None]

# What is read ahead of the reader before the socket is left alone. Also the most that a head, or what surrounds the
# pieces of a body, may take. Both are exceeded by what one read brings.
MAX_UNREAD = 65_536

# RFC 8305, section 5: how long an address that does not answer holds up the next one.
NEXT_ADDRESS = 0.25

DELIMITERS = {b"content-length", b"transfer-encoding"}


class Transport(httpx.AsyncBaseTransport):
    """At most `max_connections`, each kept for the next request to its origin for `keepalive_expiry` seconds.

    For one event loop. The context is made to offer HTTP/1.1 by ALPN, as httpx does with one that it is given.
    """

    def __init__(self, *, ssl_context: ssl.SSLContext, max_connections: int, keepalive_expiry: float) -> None:
        ssl_context.set_alpn_protocols(["http/1.1"])
        self._ssl_context = ssl_context
        self._max_connections = max_connections
        self._keepalive_expiry = keepalive_expiry
        self._places = asyncio.Semaphore(max_connections)  # one for each request
        self._connecting = 0
        self.open: set[Connection] = set()
        self.idle: dict[Connection, float] = {}  # open, and kept until then; the last used one is last
        self._sweeper: asyncio.TimerHandle | None = None
        self._closed = False

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        timeouts: Timeouts = request.extensions.get("timeout", {})
        try:
            async with asyncio.timeout(timeouts.get("pool")):
                await self._places.acquire()
        except TimeoutError:
            raise httpx.PoolTimeout("every connection is in use") from None
        try:
            connection = await self._exchange(request, timeouts)
        except BaseException:
            self._places.release()
            raise
        headers, connection.headers = connection.headers, []  # the stream may be long, and nobody needs them
        return httpx.Response(connection.status, headers=headers, stream=Body(connection, timeouts.get("read")))

    async def aclose(self) -> None:
        """Hang up everywhere. Whoever still waits or reads gets a CloseError."""
        self._closed = True
        for connection in list(self.open):
            connection.close(httpx.CloseError("the transport was closed"))
        await asyncio.sleep(0)  # the event loop closes an aborted socket in its next round

    async def _exchange(self, request: httpx.Request, timeouts: Timeouts) -> "Connection":
        origin = (request.url.scheme, request.url.raw_host, request.url.port)
        connection = self._kept(origin) or await self._connect(origin, timeouts.get("connect"))
        try:
            await connection.exchange(request, timeouts)
        except (httpx.ReadError, httpx.RemoteProtocolError):
            # Was it stale, so may be the other idle ones: the next request meets none of them. This one is not made
            # again here: a server that hangs up without a word may have worked for it, so who pays counts the tries.
            for other in [idle for idle in self.idle if idle.origin == origin]:
                other.close(httpx.CloseError("another one broke"))
            raise
        return connection

    def _kept(self, origin: Origin) -> "Connection | None":
        for connection in reversed(self.idle):
            if connection.origin == origin and not connection.transport.is_closing():
                del self.idle[connection]
                connection.begin()
                return connection
        return None

    async def _connect(self, origin: Origin, seconds: float | None) -> "Connection":
        scheme, host, port = origin
        if scheme not in ("http", "https"):
            raise httpx.UnsupportedProtocol(f"neither http:// nor https://, but {scheme}://")
        # What is not idle belongs to another request, and those are fewer than `max_connections`.
        if self.idle and len(self.open) + self._connecting >= self._max_connections:
            next(iter(self.idle)).close(httpx.CloseError("its place was needed"))
        tls = scheme == "https"
        name = host.decode("ascii")
        self._connecting += 1
        try:
            async with asyncio.timeout(seconds):
                _, connection = await asyncio.get_running_loop().create_connection(
                    lambda: Connection(self, origin),
                    sock=await reach(name, port or (443 if tls else 80)),
                    ssl=self._ssl_context if tls else None,
                    server_hostname=name if tls else None,
                )
        except TimeoutError as error:
            raise httpx.ConnectTimeout("not connected in time") from error
        except OSError as error:
            raise httpx.ConnectError(str(error)) from error
        finally:
            self._connecting -= 1
        if self._closed:
            connection.close(httpx.CloseError("the transport was closed"))
        return connection

    def release(self, connection: "Connection") -> None:
        """The request is over: keep the connection if it is fit for another one, or hang up."""
        self._places.release()
        if not (connection.complete and connection.reusable):
            connection.close(httpx.CloseError("hung up"))
        elif connection.failure is None:
            self.idle[connection] = connection.loop.time() + self._keepalive_expiry
            if self._sweeper is None:
                self._sweeper = connection.loop.call_later(self._keepalive_expiry, self._sweep)

    def _sweep(self) -> None:
        # One timer for all connections: it goes off for the one that has been idle longest.
        self._sweeper = None
        for connection, deadline in list(self.idle.items()):
            if deadline > connection.loop.time():
                self._sweeper = connection.loop.call_at(deadline, self._sweep)
                break
            connection.close(httpx.CloseError("idle for too long"))


class Connection(asyncio.Protocol):
    """A socket, the request that is on it and what has come of the reply. Once it has a `failure` it is closed."""

    def __init__(self, pool: Transport, origin: Origin) -> None:
        self.pool = pool
        self.origin = origin
        self.pieces: list[bytes] = []  # of the body, parsed but not taken
        self.on_body = self.pieces.append
        self.parser = HttpResponseParser(self)
        self.feed = self.parser.feed_data
        self.waiter: asyncio.Future[None] | None = None
        self.failure: httpx.TransportError | None = None
        self.reading_paused = self.writing_paused = self.no_body = False
        self.begin()

    def begin(self) -> None:
        """Forget the last reply: the next one may come."""
        self.pieces.clear()
        self.headers: list[tuple[bytes, bytes]] = []
        self.status = 0  # until the head is here
        self.complete = self.reusable = self.endless = False
        self.unread = 0  # bytes from the socket since the reader last took what was here

    async def exchange(self, request: httpx.Request, timeouts: Timeouts) -> None:
        """Send the request and wait for the head of its reply. If that fails, the connection is closed."""
        self.no_body = request.method == "HEAD"
        try:
            await self._send(request, timeouts.get("write"))
            while not self.status:
                if self.failure is not None:
                    raise self.failure
                await self.news(timeouts.get("read"), httpx.ReadTimeout)
        except BaseException:
            self.close(httpx.CloseError("given up"))
            raise

    async def _send(self, request: httpx.Request, seconds: float | None) -> None:
        fields = request.headers.raw
        head = b"%b %b HTTP/1.1\r\n%b\r\n" % (
            request.method.encode("ascii"),
            request.url.raw_path,
            b"".join([b"%b: %b\r\n" % field for field in fields]),
        )
        if not head.count(b"\r") == head.count(b"\n") == len(fields) + 2 or b"\0" in head:
            raise httpx.LocalProtocolError("a line break or NUL in a header")
        stream = request.stream
        if isinstance(stream, httpx.ByteStream):
            await self._write(head + b"".join(stream), seconds)
            return
        chunked = request.headers.get("transfer-encoding") == "chunked"
        wanted = await self._write(head, seconds)
        async for piece in cast(httpx.AsyncByteStream, stream):
            if not wanted:
                return
            if piece:
                wanted = await self._write(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece, seconds)
        if chunked:
            await self._write(b"0\r\n\r\n", seconds)

    async def _write(self, data: bytes, seconds: float | None) -> bool:
        """Hand `data` to the socket. False if the peer hung up or refused the request before it was all sent."""
        while self.failure is None and self.status < 400 and not self.transport.is_closing():
            if data:
                self.transport.write(data)
                data = b""
            if not self.writing_paused:
                return True
            self.hold()
            await self.news(seconds, httpx.WriteTimeout)
        self.reusable = False
        return False

    async def news(self, seconds: float | None, too_late: type[httpx.TimeoutException]) -> None:
        """Wait until something has happened that somebody may wait for."""
        self.waiter = self.loop.create_future()
        if seconds is None:
            await self.waiter
            return
        try:
            async with asyncio.timeout(seconds):
                await self.waiter
        except TimeoutError:
            raise too_late(f"nothing for {seconds} s") from None

    def wake(self) -> None:
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)

    def close(self, why: httpx.TransportError) -> None:
        """Close the socket at once. Later calls change nothing."""
        if self.failure is None:
            self.failure = why
            self.pool.open.discard(self)
            self.pool.idle.pop(self, None)
            self.transport.abort()
            self.wake()

    def hold(self) -> None:
        """Read no further if enough is here that nobody has taken."""
        if self.unread > MAX_UNREAD and not self.complete:
            self.reading_paused = True
            self.transport.pause_reading()

    def take(self) -> bytes:
        """All of the body that is here, and read on."""
        piece = b"".join(self.pieces)
        self.pieces.clear()
        self.unread = 0
        if self.reading_paused:
            self.reading_paused = False
            self.transport.resume_reading()
        return piece

    # What the event loop calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.loop = asyncio.get_running_loop()
        self.pool.open.add(self)

    def data_received(self, data: bytes) -> None:
        self.unread += len(data)
        try:
            self.feed(data)
        except HttpParserError as error:
            self.close(httpx.RemoteProtocolError(str(error.__context__ or error)))
        if self.pieces:
            waiter = self.waiter
            if waiter is not None and not waiter.done():
                waiter.set_result(None)
            else:
                self.hold()
        elif self.unread > MAX_UNREAD:
            self.close(httpx.RemoteProtocolError(f"more than {MAX_UNREAD} bytes around the body"))

    def eof_received(self) -> None:
        self.complete = self.complete or self.endless
        self.close(httpx.RemoteProtocolError("the server hung up before the end of its reply"))

    def connection_lost(self, error: Exception | None) -> None:
        self.close(httpx.ReadError(str(error)) if error else httpx.RemoteProtocolError("the connection was lost"))
        del self.parser, self.feed  # they hold us, and we hold them

    def pause_writing(self) -> None:
        self.writing_paused = True

    def resume_writing(self) -> None:
        self.writing_paused = False
        self.wake()

    # What the parser calls, besides `on_body`.

    def on_message_begin(self) -> None:
        if self.complete:
            raise HttpParserError("bytes after the reply")

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self.status:  # trailers come after it
            self.headers.append((name, value.rstrip(b" \t")))

    def on_headers_complete(self) -> None:
        status = self.parser.get_status_code()
        if status == 101:
            raise HttpParserError("a switch of protocols that nobody asked for")
        if status < 200:
            self.headers.clear()
            return
        self.endless = not any(name.lower() in DELIMITERS for name, _ in self.headers)
        codings = [value.lower() for name, value in self.headers if name.lower() == b"transfer-encoding"]
        if codings not in ([], [b"chunked"]):
            raise HttpParserError("a transfer coding that is not chunked")
        self.status = status
        self.reusable = self.parser.should_keep_alive()
        self.wake()
        if self.no_body:
            self.complete = True
            raise HttpParserError("the parser cannot be told that no body follows")

    def on_message_complete(self) -> None:
        if self.status:
            self.complete = True
            self.wake()


class Body(httpx.AsyncByteStream):
    """The body of a reply, in the pieces it came in. For one reader at a time; `aclose` never waits."""

    def __init__(self, connection: Connection, seconds: float | None) -> None:
        self._connection: Connection | None = connection
        self._seconds = seconds
        self._complete = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        while True:
            connection = self._connection
            if connection is None:
                raise StopAsyncIteration if self._complete else httpx.StreamClosed
            if connection.pieces:
                return connection.take()
            if connection.complete:
                self._complete = True
                self._release()
            elif connection.failure is not None:
                self._release()
                raise connection.failure
            else:
                await connection.news(self._seconds, httpx.ReadTimeout)

    async def aclose(self) -> None:
        """Hang up, unless the whole body has come."""
        self._release()

    def _release(self) -> None:
        if self._connection is not None:
            connection, self._connection = self._connection, None
            connection.pool.release(connection)


async def reach(host: str, port: int) -> socket.socket:
    """A connection to whichever of the host's addresses answers first: a silent one does not hold up the others.

    Raises OSError: the last attempt's, or that of the look-up.
    """
    loop = asyncio.get_running_loop()
    addresses = deque(await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM))
    attempts: set[asyncio.Task[socket.socket]] = set()
    try:
        while True:
            if addresses:
                attempts.add(loop.create_task(_attempt(*addresses.popleft())))
            head_start = NEXT_ADDRESS if addresses else None
            done, _ = await asyncio.wait(attempts, timeout=head_start, return_when=asyncio.FIRST_COMPLETED)
            for attempt in done:
                attempts.remove(attempt)
                if attempt.exception() is None or not (attempts or addresses):
                    return attempt.result()
    finally:
        for attempt in attempts:
            attempt.cancel()
            attempt.add_done_callback(_close_late)


async def _attempt(family: int, kind: int, protocol: int, _name: str, address: Any) -> socket.socket:
    reached = socket.socket(family, kind, protocol)
    try:
        reached.setblocking(False)
        await asyncio.get_running_loop().sock_connect(reached, address)
    except BaseException:
        reached.close()
        raise
    return reached


def _close_late(attempt: "asyncio.Task[socket.socket]") -> None:
    if not attempt.cancelled() and attempt.exception() is None:
        attempt.result().close()
