"""The process side: the listening socket, uvicorn, and an end without broken promises.

Does not know the environment, routes or events; of what is served only that it runs, and how to end it.
"""

import asyncio
import contextlib
import gc
import logging
import math
import os
import signal
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import uvicorn

from chatproxy.app import create_app
from chatproxy.config import Settings
from chatproxy.connection import HTTPProtocol
from chatproxy.errors import Draining

log = logging.getLogger(__name__)

# What is written but not yet taken by a slow reader, in the kernel. Small, so that a slow reader
# slows Grok's stream, and is noticed, while little is on its way.
SEND_BUFFER = 65_536

# Seconds that an idle connection of a client is kept. The side that closes first loses a request that is just on its
# way, and a proxy answers 502 for it. So longer than proxies keep theirs: nginx 60 s, Traefik 90 s, Caddy 120 s.
KEEPALIVE_TIMEOUT = 150

# For the last events to be written, once the time to drain is over.
LAST_WORDS = 1.0


def listen(settings: Settings) -> socket.socket:
    """The listening socket; the connections it accepts inherit its options. Raises OSError."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    sock = socket.create_server((settings.host, settings.port), family=family, backlog=2048)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
    # asyncio forgets this for such a socket (uvloop does not), and tokens would wait for acknowledgements.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # pragma: no branch -- tested on Linux
        # An ASGI application cannot abort its socket, but Linux does: when what was sent is not
        # acknowledged, or the reader's window stays shut, for so long. The reader's connection is
        # then lost like any other. (Milliseconds in a C int; 0 would be no limit of ours.)
        milliseconds = min(math.ceil(settings.write_timeout * 1000), 2**31 - 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
    return sock


class Server(uvicorn.Server):
    """The service on a socket. `running` is all there is to it: signals are the caller's business."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.transports: set[asyncio.Transport] = set()

        class Protocol(HTTPProtocol):
            transports = self.transports

        super().__init__(
            uvicorn.Config(
                create_app(settings),
                http=Protocol,
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                ws="none",
                root_path=settings.root_path,
                forwarded_allow_ips=settings.forwarded_allow_ips,
                timeout_keep_alive=KEEPALIVE_TIMEOUT,
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
                for transport in list(self.transports):
                    transport.abort()

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

    `reloading`: under a reloader, which passes on what reaches both of us from a terminal. So there what
    comes within half a second is the first signal still.
    """
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    impatient_from = 0.0

    def on_signal() -> None:
        nonlocal impatient_from
        if not stop.is_set():
            impatient_from = loop.time() + (0.5 if reloading else 0)
            stop.set()
        elif loop.time() >= impatient_from:
            log.warning("second signal: stopping at once")
            os._exit(1)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal)
    async with Server(settings).running(sock) as port:
        # What is here now stays: no need to look through it again with each collection of garbage.
        gc.collect()
        gc.freeze()
        log.info("listening on http://%s:%d", settings.host, port)
        if settings.grok_api_key is None:
            log.warning("GROK_API_KEY is not set: answers come from the built-in demo, not from Grok")
        if "*" in settings.allowed_origins:
            log.warning("ALLOWED_ORIGINS is *: any web page may spend this key's credits")
        await stop.wait()
        log.info("draining: no new chats; running ones have %g s", settings.drain_timeout)
