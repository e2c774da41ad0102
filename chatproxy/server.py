"""The process side: the listening socket, uvicorn, and an end without broken promises.

Does not know the environment, nor what is served.
"""

import asyncio
import contextlib
import logging
import os
import secrets
import signal
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

import uvicorn
from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from chatproxy.app import create_app
from chatproxy.config import Settings
from chatproxy.errors import ChatError, Draining, HeadersTooLarge, InvalidHTTP
from chatproxy.middleware import MAX_HEAD_BYTES
from chatproxy.schemas import encode_error

log = logging.getLogger(__name__)

# What is written but not yet taken by a slow reader, in the kernel. Small, so that a slow reader
# slows Grok's stream, and is noticed, while little is on its way.
SEND_BUFFER = 65_536

# nginx keeps connections to us for 60 s; ours must not close first, under a request on its way.
KEEP_CONNECTION = 75

# A request's head is a few hundred bytes. (Browsers open connections in advance, and don't mind when they are closed.)
HEAD_TIMEOUT = 20.0

# For the last events to be written, once the time to drain is over.
LAST_WORDS = 1.0


def listen(settings: Settings) -> socket.socket:
    """The listening socket; the connections it accepts inherit its options. Raises OSError."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    sock = socket.create_server((settings.host, settings.port), family=family, backlog=2048)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
    # asyncio forgets this for such a socket (uvloop does not), and tokens would wait for acknowledgements.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        # An ASGI application cannot abort its socket, but Linux does: when what was sent is not
        # acknowledged, or the reader's window stays shut, for so long. The reader's connection is
        # then lost like any other.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(settings.write_timeout * 1000))
    return sock


class Connection(HttpToolsProtocol):
    """uvicorn's, but the answer that is running is told at once that its caller has left, and requests have bounds.

    uvicorn tells the request that arrived last, which may be one that still waits for its turn; and where the caller
    has only closed its side, not before all that was written is taken. And it would read a request's head without end,
    and wait for it for ever.
    """

    _running: RequestResponseCycle | None = None
    _spare = MAX_HEAD_BYTES  # so many bytes may still come that are no body

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def eof_received(self) -> None:
        if self._running is not None and not self._running.response_complete:
            self._running.disconnected = True
            self._running.message_event.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self.eof_received()
        self._clock.cancel()
        super().connection_lost(exc)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as in uvicorn
        super().connection_made(transport)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        self._spare -= len(data)
        super().data_received(data)
        if self._spare < 0 and not self.transport.is_closing():
            self._refuse(HeadersTooLarge())
        elif self._clock.cancelled() and (self._running is None or self._running.response_complete):
            self._await_head()  # this was a part of one, or of a body that was refused

    def on_message_begin(self) -> None:
        self._spare = MAX_HEAD_BYTES
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._clock.cancel()
        self._spare = MAX_HEAD_BYTES  # for chunk sizes and trailers
        if not self.url.startswith(b"/"):
            # RFC 9112, 3.2.2: the host that counts is the one in the target, whatever the Host header says.
            target = urlsplit(self.url)
            self.headers[:] = [(b"host", target.netloc), *(field for field in self.headers if field[0] != b"host")]
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._spare += 8 * len(body)  # a chunk of one byte takes six
        super().on_body(body)

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 -- uvicorn's text is not ours
        self._refuse(InvalidHTTP())

    def _refuse(self, error: ChatError) -> None:
        """Answer what will never be a request, unless an answer is on its way, and hang up."""
        if self._running is None or self._running.response_complete or not self._running.response_started:
            request_id = secrets.token_hex(16)
            body = encode_error(error, request_id)
            head = (
                f"HTTP/1.1 {error.status} Refused\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
                f"Connection: close\r\nX-Request-ID: {request_id}\r\n\r\n"
            )
            self.transport.write(head.encode() + body)
        self.transport.close()

    def _await_head(self) -> None:
        self._clock = self.loop.call_later(HEAD_TIMEOUT, self.transport.close)


class Server(uvicorn.Server):
    """The service on a socket. `running` is all there is to it: signals are the caller's business."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        super().__init__(
            uvicorn.Config(
                create_app(settings),
                http=Connection,
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                ws="none",
                root_path=settings.root_path,
                forwarded_allow_ips=settings.forwarded_allow_ips,
                timeout_keep_alive=KEEP_CONNECTION,
                timeout_graceful_shutdown=1,
            )
        )

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take none: uvicorn would close the listeners, and nobody would be told about the draining."""
        yield

    @asynccontextmanager
    async def running(self, sock: socket.socket | None = None) -> AsyncIterator[int]:
        """Serve inside of it, in this event loop; gives the port. Leaving it drains (contract C7)."""
        sock = sock or listen(self.settings)
        serving = asyncio.create_task(self.serve([sock]))
        while not self.started:
            if serving.done():
                await serving
            await asyncio.sleep(0.005)
        try:
            yield sock.getsockname()[1]
        finally:
            await self._drain()
            self.should_exit = True
            await serving

    async def _drain(self) -> None:
        """No new chats; the running ones go on for DRAIN_TIMEOUT, and are then told the truth."""
        state = self.lifespan.state
        state["draining"].set()
        grok = state["grok"]
        if not await self._idle(self.settings.drain_timeout):
            for completion in list(grok.running):
                completion.interrupt(Draining())
            if not await self._idle(LAST_WORDS):
                # Readers who take nothing cannot be told; uvicorn would wait for them.
                for connection in list(self.server_state.connections):
                    connection.transport.abort()

    async def _idle(self, seconds: float) -> bool:
        """Wait until nothing runs any more, neither for a reader nor to be resumed; whether that came in time."""
        deadline = asyncio.get_running_loop().time() + seconds
        while self.server_state.tasks or self.lifespan.state["grok"].running:
            if asyncio.get_running_loop().time() >= deadline:
                return False
            await asyncio.sleep(0.02)
        return True


async def serve(settings: Settings, sock: socket.socket, *, reloading: bool = False) -> None:
    """Serve until SIGTERM or SIGINT, then drain. Another signal ends the process at once, with exit code 1.

    `reloading`: under a reloader that turns Ctrl-C, which reaches both of us, into a SIGTERM. So
    there only the second signal of one kind is another one.
    """
    loop = asyncio.get_running_loop()
    signals: list[int] = []
    stop = asyncio.Event()

    def on_signal(number: int) -> None:
        if number in signals or (signals and not reloading):
            log.warning("second signal: stopping at once")
            os._exit(1)
        signals.append(number)
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal, number)
    async with Server(settings).running(sock) as port:
        log.info("listening on http://%s:%d", settings.host, port)
        if settings.grok_api_key is None:
            log.warning("GROK_API_KEY is not set: answers come from the built-in demo, not from Grok")
        if "*" in settings.allowed_origins:
            log.warning("ALLOWED_ORIGINS is *: any web page may spend this key's credits")
        await stop.wait()
        log.info("draining: no new chats; running ones have %g s", settings.drain_timeout)
