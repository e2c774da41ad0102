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
from ipaddress import ip_address

import anyio
import uvicorn

from chatproxy.app import create_app
from chatproxy.config import Settings
from chatproxy.config.timing import DEFAULT_TIMING, Timing
from chatproxy.connection import HTTPProtocol
from chatproxy.lifecycle import Lifecycle

log = logging.getLogger(__name__)

# What is written but not yet taken by a slow reader, in the kernel. Small, so that a slow reader
# slows Grok's stream, and is noticed, while little is on its way.
SEND_BUFFER = 65_536

# Seconds that an idle connection of a client is kept. The side that closes first loses a request that is just on its
# way, and a proxy answers 502 for it. So longer than proxies keep theirs: nginx 60 s, Traefik 90 s, Caddy 120 s.
KEEPALIVE_TIMEOUT = 150

# Seconds for the last events to be written, once the time to drain is over.
FINAL_WRITE_TIMEOUT = 1.0


def listen(settings: Settings) -> socket.socket:
    """The listening socket; the connections it accepts inherit its options. Raises OSError.

    `::` means all addresses, those of IPv4 too, whatever the system's default is.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    both = family == socket.AF_INET6 and ip_address(settings.host).is_unspecified and socket.has_dualstack_ipv6()
    address = (settings.host, settings.port)
    sock = socket.create_server(address, family=family, backlog=2048, dualstack_ipv6=both)
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


def _browsable(host: str) -> str:
    """What a browser on this machine may call this address, as it is written in a URL."""
    ip = ip_address(host.strip("[]"))
    return "localhost" if ip.is_unspecified or ip.is_loopback else host


class Server(uvicorn.Server):
    """The service on a socket. `running` is all there is to it: signals are the caller's business."""

    def __init__(self, settings: Settings, timing: Timing = DEFAULT_TIMING) -> None:
        self.settings = settings
        app = create_app(settings, timing)
        self.lifecycle: Lifecycle = app.state.lifecycle
        self.transports: set[asyncio.Transport] = set()

        class Protocol(HTTPProtocol):
            transports = self.transports

        super().__init__(
            uvicorn.Config(
                app,
                http=Protocol,
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                ws="none",
                root_path=settings.root_path,
                proxy_headers=False,  # the application does that itself
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
        """Serve inside of it, in this event loop; gives the port. Leaving it drains."""
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
        """No new chats; the running ones go on for DRAIN_TIMEOUT, and are then told that the service stops."""
        self.lifecycle.draining = True
        if not await self.lifecycle.idle(self.settings.drain_timeout):
            self.lifecycle.end_streams()
            if not await self.lifecycle.idle(FINAL_WRITE_TIMEOUT):
                # Readers who take nothing cannot be told; uvicorn would wait for them.
                for transport in list(self.transports):
                    transport.abort()


async def serve(settings: Settings, sock: socket.socket, *, reloading: bool = False) -> None:
    """Serve until SIGTERM or SIGINT, then drain. Another signal ends the process at once, with exit code 1.

    `reloading`: under a reloader, which passes on what reaches both of us from a terminal. So there what
    comes within half a second is the first signal still.
    """
    with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with anyio.create_task_group() as tasks:
            async with Server(settings).running(sock) as port:
                # What is here now stays: no need to look through it again with each collection of garbage.
                gc.collect()
                gc.freeze()
                host = sock.getsockname()[0]
                host = f"[{host}]" if ":" in host else host
                log.info("listening on %s:%d: open http://%s:%d", host, port, _browsable(host), port)
                await anext(signals)
                log.info("draining: no new chats; running ones have %g s", settings.drain_timeout)
                tasks.start_soon(_exit_at_next, signals, 0.5 if reloading else 0.0)
            tasks.cancel_scope.cancel()


async def _exit_at_next(signals: AsyncIterator[signal.Signals], after: float) -> None:
    """End the process at the next signal that comes more than `after` seconds from now."""
    with anyio.move_on_after(after):
        while True:
            await anext(signals)
    await anext(signals)
    log.warning("second signal: stopping at once")
    os._exit(1)
