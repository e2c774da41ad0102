"""HTTP/1.1 to one server, as a transport for httpx: asyncio protocols and the llhttp parser.

It stands in for `httpx.AsyncHTTPTransport`, whose cost per chunk and per request is several times as high. A chunk is
parsed in the callback that read it and reaches a waiting reader through one future; there are no timers but for
connecting and for idle connections. It lacks HTTP/2, proxies, streamed request bodies, HEAD, read, write and pool
timeouts, and `Response.extensions`. Setting GROK_TRANSPORT=httpx replaces it.

Responses and errors are those of httpx's own transport, except that a response which two parsers might read
differently is a RemoteProtocolError (bare LF, folded headers, repeated lengths, a length beside a coding).

Knows sockets, TLS and the framing of HTTP/1.1. Does not know chats, JSON, event streams, redirects or cookies.
"""

import asyncio
import socket
import ssl
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Self, cast

import httpx
from httptools import HttpParserError, HttpResponseParser

SocketOption = tuple[int, int, int]

# Bytes. Reading pauses when more than this is buffered. It is also the limit for a response head and for the chunk
# framing between two pieces of the body, above which the response is a RemoteProtocolError. One socket read may
# overshoot both.
MAX_UNREAD = 65_536

# Bytes. A body up to this size is copied behind its head, which makes them one system call; a larger one is not copied.
MAX_COPIED = 16_384

# Seconds. RFC 8305, section 5: how long to wait for one address before the next one is tried beside it.
ATTEMPT_DELAY = 0.25

DELIMITERS = {b"content-length", b"transfer-encoding"}


class Transport(httpx.AsyncBaseTransport):
    """At most `max_connections` to the server that `url` names; requests beyond that wait for one that ends.

    A connection whose response was read to its end is kept for `keepalive_expiry` seconds. One that leaves what we
    sent unacknowledged for `unacknowledged_timeout` seconds, idle ones included, is lost: httpx.ReadError.
    For one event loop. The SSL context is changed to offer HTTP/1.1 only by ALPN, as httpx does with one that it is
    given.
    """

    def __init__(
        self,
        url: httpx.URL,
        *,
        ssl_context: ssl.SSLContext,
        max_connections: int,
        keepalive_expiry: float,
        unacknowledged_timeout: float,
        attempt_delay: float = ATTEMPT_DELAY,
    ) -> None:
        ssl_context.set_alpn_protocols(["http/1.1"])
        self._origin = _origin(url)
        self._host = url.raw_host.decode("ascii")
        self._port = url.port or (443 if url.scheme == "https" else 80)
        self._ssl_context = ssl_context if url.scheme == "https" else None
        self._keepalive_expiry = keepalive_expiry
        self._socket_options = socket_options(unacknowledged_timeout)
        self._attempt_delay = attempt_delay
        self._slots = asyncio.Semaphore(max_connections)  # one for each request
        self.open: set[ClientConnection] = set()
        self.idle: dict[ClientConnection, float] = {}  # to the loop time when each expires; the last used one is last
        self._expiry_timer: asyncio.TimerHandle | None = None
        self._closed = False

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request, whose body is bytes, and wait for the head of its response.

        Of the timeouts in `request.extensions` only "connect" counts. Raises httpx.TransportError.
        """
        if _origin(request.url) != self._origin:
            raise httpx.UnsupportedProtocol(f"this transport is for {self._host}:{self._port} only")
        timeouts: Mapping[str, float | None] = request.extensions.get("timeout", {})
        await self._slots.acquire()
        try:
            connection = self._pop_idle() or await self._connect(timeouts.get("connect"))
            try:
                connection.send(request)
                del request  # its body may be large, and the wait long
                while not connection.status:
                    if connection.failure is not None:
                        raise connection.error()
                    await connection.wait_for_activity()
            except (httpx.ReadError, httpx.RemoteProtocolError):
                # A kept connection that fails is probably stale, and so are the other idle ones. Do not retry here:
                # the server may have processed (and billed) the request. The caller retries, see GROK_RETRIES.
                self.close_idle()
                raise
            except BaseException:
                connection.close(httpx.CloseError, "the request was cancelled")
                raise
        except BaseException:
            self._slots.release()
            raise
        headers, connection.headers = connection.headers, []  # nobody needs them while the body is read
        return httpx.Response(connection.status, headers=headers, stream=Body(connection))

    async def aclose(self) -> None:
        """Close all connections. Whoever still waits or reads gets a CloseError."""
        self._closed = True
        for connection in list(self.open):
            connection.close(httpx.CloseError, "the transport was closed")
        await asyncio.sleep(0)  # the event loop closes an aborted socket in its next iteration

    def _pop_idle(self) -> "ClientConnection | None":
        for connection in reversed(self.idle):
            if not connection.transport.is_closing():
                del self.idle[connection]
                connection.reset()
                return connection
        return None

    async def look_up(self, host: str, port: int) -> list[tuple[Any, ...]]:
        """The addresses of a host, as `socket.getaddrinfo` gives them. Raises OSError."""
        return await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)

    async def _connect(self, seconds: float | None) -> "ClientConnection":
        try:
            async with asyncio.timeout(seconds):
                _, connection = await asyncio.get_running_loop().create_connection(
                    lambda: ClientConnection(self),
                    sock=await connect_happy_eyeballs(
                        await self.look_up(self._host, self._port), self._socket_options, self._attempt_delay
                    ),
                    ssl=self._ssl_context,
                    server_hostname=None if self._ssl_context is None else self._host,
                )
        except TimeoutError as error:
            raise httpx.ConnectTimeout("not connected in time") from error
        except OSError as error:
            raise httpx.ConnectError(str(error)) from error
        if self._closed:
            connection.close(httpx.CloseError, "the transport was closed")
        return connection

    def release(self, connection: "ClientConnection") -> None:
        """End a request: keep its connection if it is fit for another one, or close it."""
        self._slots.release()
        if not connection.reusable():
            connection.close(httpx.CloseError, "closed before the end of the response")
        elif connection.failure is None:
            self.idle[connection] = connection.loop.time() + self._keepalive_expiry
            if self._expiry_timer is None:
                self._expiry_timer = connection.loop.call_later(self._keepalive_expiry, self._close_expired)

    def close_idle(self) -> None:
        """Close the connections that no request uses."""
        for connection in list(self.idle):
            connection.close(httpx.CloseError, "another connection to this server broke")

    def _close_expired(self) -> None:
        # One timer for all connections: it fires for the one that has been idle longest.
        self._expiry_timer = None
        for connection, deadline in list(self.idle.items()):
            if deadline > connection.loop.time():
                self._expiry_timer = connection.loop.call_at(deadline, self._close_expired)
                break
            connection.close(httpx.CloseError, "idle for too long")


class ClientConnection(asyncio.Protocol):
    """A connection, the request that was sent on it last, and what has come of its response."""

    def __init__(self, pool: Transport) -> None:
        self.pool = pool
        self.pieces: list[bytes] = []  # of the body, parsed but not taken
        self.on_body = self.pieces.append
        self.parser = HttpResponseParser(self)
        self.feed = self.parser.feed_data
        self.waiter: asyncio.Future[None] | None = None
        # Why the connection is closed, once it is. Not an exception: its traceback would hold frames that hold this
        # connection and the request, and such a cycle is freed only by the garbage collector's rarest run.
        self.failure: tuple[type[httpx.TransportError], str] | None = None
        self.reading_paused = False
        self.reset()

    def reset(self) -> None:
        """Forget the last response, so that the next one may come."""
        self.pieces.clear()
        self.headers: list[tuple[bytes, bytes]] = []
        self.status = 0  # until the head is here
        self.complete = False  # the whole response is here
        self.keep_alive = False  # the server allows another request after it
        self.ends_with_connection = False  # the body has neither a length nor chunks
        self.unread = 0  # bytes from the socket since the reader last took what was here

    def send(self, request: httpx.Request) -> None:
        """Write the request. What the socket does not take now, the event loop writes later."""
        fields = request.headers.raw
        head = b"%b %b HTTP/1.1\r\n%b\r\n" % (
            request.method.encode("ascii"),
            request.url.raw_path,
            b"".join([b"%b: %b\r\n" % field for field in fields]),
        )
        if not head.count(b"\r") == head.count(b"\n") == len(fields) + 2 or b"\0" in head:
            self.close(httpx.LocalProtocolError, "a line break or NUL in a header")
            return
        body = b"".join(cast(httpx.ByteStream, request.stream))
        if len(body) <= MAX_COPIED:
            self.transport.write(head + body)
        else:
            self.transport.write(head)
            self.transport.write(body)

    async def wait_for_activity(self) -> None:
        """Wait for a piece of the body, the head, the end of the response, or that of the connection."""
        self.waiter = self.loop.create_future()
        await self.waiter

    def notify(self) -> None:
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)

    def close(self, kind: type[httpx.TransportError], message: str) -> None:
        """Close the socket at once. Only the first call counts, and says what `error` is."""
        if self.failure is None:
            self.failure = kind, message
            self.pool.open.discard(self)
            self.pool.idle.pop(self, None)
            self.transport.abort()
            self.notify()

    def error(self) -> httpx.TransportError:
        """Why the connection is closed: a new exception each time."""
        assert self.failure is not None
        kind, message = self.failure
        return kind(message)

    def reusable(self) -> bool:
        """Whether another request may be sent: the response is complete, and so is what we had to send."""
        return self.complete and self.keep_alive and not self.transport.get_write_buffer_size()

    def pause_reading_if_full(self) -> None:
        if self.unread > MAX_UNREAD and not self.complete:
            self.reading_paused = True
            self.transport.pause_reading()

    def read_buffered(self) -> bytes:
        """All of the body that is here. Reading goes on if it was paused."""
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
            self.close(httpx.RemoteProtocolError, str(error.__context__ or error))
        if self.pieces:
            waiter = self.waiter
            if waiter is not None and not waiter.done():
                waiter.set_result(None)
            else:
                self.pause_reading_if_full()
        elif self.unread > MAX_UNREAD:
            self.close(httpx.RemoteProtocolError, f"more than {MAX_UNREAD} bytes around the body")

    def eof_received(self) -> None:
        self.complete = self.complete or self.ends_with_connection
        self.close(httpx.RemoteProtocolError, "the server closed the connection before the end of its response")

    def connection_lost(self, error: Exception | None) -> None:
        if error is None:
            self.close(httpx.RemoteProtocolError, "the connection was lost")
        else:
            self.close(httpx.ReadError, str(error))
        if isinstance(error, TimeoutError):
            self.pool.close_idle()  # what we sent was not acknowledged; the other connections take the same way
        del self.parser, self.feed  # they hold this connection, and it holds them

    # What the parser calls, besides `on_body`.

    def on_message_begin(self) -> None:
        if self.complete:
            raise HttpParserError("bytes after the response")

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
        self.ends_with_connection = not any(name.lower() in DELIMITERS for name, _ in self.headers)
        codings = [value.lower() for name, value in self.headers if name.lower() == b"transfer-encoding"]
        if codings not in ([], [b"chunked"]):
            raise HttpParserError("a transfer coding that is not chunked")
        self.status = status
        self.keep_alive = self.parser.should_keep_alive()
        self.notify()

    def on_message_complete(self) -> None:
        if self.status:
            self.complete = True
            self.notify()


class Body(httpx.AsyncByteStream):
    """The body of a response, in the pieces it came in. For one reader at a time; `aclose` never waits."""

    def __init__(self, connection: ClientConnection) -> None:
        self._connection: ClientConnection | None = connection
        self._complete = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        while True:
            connection = self._connection
            if connection is None:
                raise StopAsyncIteration if self._complete else httpx.StreamClosed
            if connection.pieces:
                return connection.read_buffered()
            if connection.complete:
                self._complete = True
                self._release()
            elif connection.failure is not None:
                self._release()
                raise connection.error()
            else:
                await connection.wait_for_activity()

    async def aclose(self) -> None:
        """Close the connection, unless the whole body has come."""
        self._release()

    def _release(self) -> None:
        if self._connection is not None:
            connection, self._connection = self._connection, None
            connection.pool.release(connection)


def _origin(url: httpx.URL) -> tuple[str, bytes, int | None]:
    return url.scheme, url.raw_host, url.port


def socket_options(seconds: float) -> list[SocketOption]:
    """Options for a TCP socket that fails with ETIMEDOUT when nothing it sent was acknowledged for so long.

    An idle connection is probed, so that its loss is found as well, after a third of that time and then each third of
    it, in whole seconds and at least 1. Where the system lacks one of the options it is left out.
    """
    interval = min(max(1, round(seconds / 3)), 32_767)  # the most that Linux takes
    options = {
        "TCP_USER_TIMEOUT": min(max(1, round(seconds * 1000)), 2**31 - 1),  # milliseconds; Linux
        "TCP_KEEPIDLE": interval,  # Linux, Windows
        "TCP_KEEPALIVE": interval,  # the same on macOS
        "TCP_KEEPINTVL": interval,
        "TCP_KEEPCNT": 2,  # without TCP_USER_TIMEOUT, which replaces it
    }
    return [
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        *((socket.IPPROTO_TCP, getattr(socket, name), n) for name, n in options.items() if hasattr(socket, name)),
    ]


async def connect_happy_eyeballs(
    found: list[tuple[Any, ...]], options: Sequence[SocketOption], attempt_delay: float
) -> socket.socket:
    """A connection to whichever of the addresses answers first, after RFC 8305.

    The next address is tried when one fails, or beside it after `attempt_delay` seconds. Raises the last attempt's
    OSError.
    """
    loop = asyncio.get_running_loop()
    addresses = deque(found)
    attempts: set[asyncio.Task[socket.socket | OSError]] = set()
    try:
        while True:
            if addresses:
                attempts.add(loop.create_task(_attempt(options, *addresses.popleft())))
            timeout = attempt_delay if addresses else None
            done, _ = await asyncio.wait(attempts, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            for attempt in done:
                attempts.remove(attempt)
                result = attempt.result()
                if not isinstance(result, OSError):
                    return result
                if not (attempts or addresses):
                    # A new exception, since this frame holds the other one. The number decides on the class.
                    raise OSError(*result.args)
    finally:
        for attempt in attempts:
            attempt.cancel()
            attempt.add_done_callback(_close_late)


async def _attempt(
    options: Sequence[SocketOption], family: int, kind: int, protocol: int, _name: str, address: Any
) -> socket.socket | OSError:
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setblocking(False)
        for option in options:
            sock.setsockopt(*option)
        await asyncio.get_running_loop().sock_connect(sock, address)
    except OSError as error:
        sock.close()
        return error
    except BaseException:
        sock.close()
        raise
    return sock


def _close_late(attempt: "asyncio.Task[socket.socket | OSError]") -> None:
    if not attempt.cancelled() and isinstance(sock := attempt.result(), socket.socket):
        sock.close()
