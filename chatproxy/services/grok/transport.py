"""HTTP/1.1 to one server, as a transport for httpx: a pool of connections, some of them made before they are needed.

It stands in for `httpx.AsyncHTTPTransport`, whose cost per chunk and per request is several times as high. A chunk is
parsed in the callback that read it and reaches a waiting reader through one future; there are no timers but for
connecting, and for idle and spare connections. It lacks HTTP/2, proxies, streamed request bodies, HEAD, read, write and
pool timeouts, and `Response.extensions`. Setting GROK_TRANSPORT=httpx replaces it.

Responses and errors are those of httpx's own transport, except that a response which two parsers might read
differently is a RemoteProtocolError (bare LF, folded headers, repeated lengths, a length beside a coding).

Does not know chats, JSON, event streams, redirects or cookies.
"""

import asyncio
import socket
import ssl
from collections.abc import Callable, Mapping
from typing import Any, Self

import httpx

from chatproxy.services.grok.client_connection import ClientConnection
from chatproxy.services.grok.connecting import ATTEMPT_DELAY, connect_happy_eyeballs, socket_options
from chatproxy.services.grok.spares import Spares
from chatproxy.services.grok.tls import Buffers, TLSTransport


class Transport(httpx.AsyncBaseTransport):
    """At most `max_connections` to the server that `url` names; requests beyond that wait for one that ends.

    A connection whose response was read to its end is kept for `keepalive_expiry` seconds. One that leaves what we
    sent unacknowledged for `unacknowledged_timeout` seconds, idle ones included, is lost: httpx.ReadError. Once
    `keep_spare` was called, `spare` idle connections are kept ready; `on_wait` is called for each request that has to
    wait for its connection. For one event loop. The SSL context is changed: it offers HTTP/1.1 only by ALPN, as httpx
    does with one that it is given, and refuses to renegotiate.
    """

    def __init__(
        self,
        url: httpx.URL,
        *,
        ssl_context: ssl.SSLContext,
        max_connections: int,
        connect_timeout: float = 5.0,
        keepalive_expiry: float,
        unacknowledged_timeout: float,
        spare: int = 0,
        on_wait: Callable[[], None] = lambda: None,
        attempt_delay: float = ATTEMPT_DELAY,
    ) -> None:
        ssl_context.set_alpn_protocols(["http/1.1"])
        ssl_context.options |= ssl.OP_NO_RENEGOTIATION  # a write in the middle of one would have to be done again
        self._origin = _origin(url)
        self._host = url.raw_host.decode("ascii")
        self._port = url.port or (443 if url.scheme == "https" else 80)
        self._ssl_context = ssl_context if url.scheme == "https" else None
        self._keepalive_expiry = keepalive_expiry
        self._socket_options = socket_options(unacknowledged_timeout)
        self._attempt_delay = attempt_delay
        self._connect_timeout = connect_timeout
        self._slots = asyncio.Semaphore(max_connections)  # one for each request
        self.open: set[ClientConnection] = set()
        self.idle: dict[ClientConnection, float] = {}  # to the loop time when each expires; the last used one is last
        self._expiry_timer: asyncio.TimerHandle | None = None
        self._closed = False
        self._buffers = Buffers() if self._ssl_context is not None else None
        self._on_wait = on_wait
        self.spares = Spares(spare, self._make_spare, lambda: len(self.idle))

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request, whose body is bytes, and wait for the head of its response.

        Of the timeouts in `request.extensions` only "connect" counts. Raises httpx.TransportError.
        """
        if _origin(request.url) != self._origin:
            raise httpx.UnsupportedProtocol(f"this transport is for {self._host}:{self._port} only")
        timeouts: Mapping[str, float | None] = request.extensions.get("timeout", {})
        await self._slots.acquire()
        try:
            connection = self._pop_idle()
            if connection is None:
                self._on_wait()
                connection = await self._connect(timeouts.get("connect"))
            try:
                connection.send(request)
                del request  # its body may be large, and the wait long
                while not connection.status:
                    if connection.failure is not None:
                        raise connection.error()
                    await connection.activity()
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
        self.spares.close()
        for connection in list(self.open):
            connection.close(httpx.CloseError, "the transport was closed")
        await asyncio.sleep(0)  # the event loop closes an aborted socket in its next iteration

    def _pop_idle(self) -> ClientConnection | None:
        for connection in reversed(self.idle):
            if not connection.transport.is_closing():
                del self.idle[connection]
                connection.reset()
                self.spares.fill()
                return connection
        return None

    async def look_up(self, host: str, port: int) -> list[tuple[Any, ...]]:
        """The addresses of a host, as `socket.getaddrinfo` gives them. Raises OSError."""
        return await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)

    async def _connect(self, seconds: float | None) -> ClientConnection:
        connection = ClientConnection(self)
        try:
            async with asyncio.timeout(seconds):
                found = await self.look_up(self._host, self._port)
                sock = await connect_happy_eyeballs(found, self._socket_options, self._attempt_delay)
                loop = asyncio.get_running_loop()
                if self._ssl_context is None or self._buffers is None:
                    await loop.create_connection(lambda: connection, sock=sock)
                else:
                    tls = TLSTransport(self._ssl_context, self._host, connection, self._buffers)
                    await loop.create_connection(lambda: tls, sock=sock)
                    await tls.wait_for_handshake()
        except TimeoutError as error:
            raise httpx.ConnectTimeout("not connected in time") from error
        except OSError as error:
            raise httpx.ConnectError(str(error)) from error
        if connection.failure is None:  # it may have been closed in the same moment
            self.open.add(connection)
        if self._closed:
            connection.close(httpx.CloseError, "the transport was closed")
        return connection

    async def _make_spare(self) -> None:
        """Raises httpx.TransportError."""
        connection = await self._connect(self._connect_timeout)
        if connection.failure is None:
            self._keep(connection)

    def keep_spare(self) -> None:
        """The server is there, and more requests may come: keep connections ready for them."""
        self.spares.want()

    def counts(self) -> dict[str, int]:
        """How many connections are busy, idle, and spare: ready, and not used before."""
        spare = sum(not connection.used for connection in self.idle)
        return {"busy": len(self.open) - len(self.idle), "idle": len(self.idle) - spare, "spare": spare}

    def release(self, connection: ClientConnection) -> None:
        """End a request: keep its connection if it is fit for another one, or close it."""
        self._slots.release()
        if not connection.reusable():
            connection.close(httpx.CloseError, "closed before the end of the response")
        elif connection.failure is None:
            self._keep(connection)

    def _keep(self, connection: ClientConnection) -> None:
        self.idle[connection] = connection.loop.time() + self._keepalive_expiry
        if self._expiry_timer is None:
            self._expiry_timer = connection.loop.call_later(self._keepalive_expiry, self._close_expired)

    def forget(self, connection: ClientConnection) -> None:
        """It is closed."""
        self.open.discard(connection)
        if self.idle.pop(connection, None) is not None:
            by_server = connection.failure is not None and connection.failure[0] is not httpx.CloseError
            self.spares.lost(connection.loop.time() - connection.made_at if by_server else None)

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
                await connection.activity()

    async def aclose(self) -> None:
        """Close the connection, unless the whole body has come."""
        self._release()

    def _release(self) -> None:
        if self._connection is not None:
            connection, self._connection = self._connection, None
            connection.pool.release(connection)


def _origin(url: httpx.URL) -> tuple[str, bytes, int | None]:
    return url.scheme, url.raw_host, url.port
