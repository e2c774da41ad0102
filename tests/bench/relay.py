"""A relay in front of the scripted upstream, a process of its own, which prints its port.

`python -m tests.bench.relay PORT --certificate FILE` ends TLS, and passes what is in it on to PORT of this machine.
`python -m tests.bench.relay PORT --delay 0.04` is 40 ms away in each direction. It looks at no byte.
"""

import argparse
import asyncio
import ssl
from collections import deque
from time import monotonic
from typing import cast

import uvloop


class Leg(asyncio.Protocol):
    """One of a pair of connections: what it receives is sent on the other, `delay` seconds later."""

    def __init__(self, delay: float) -> None:
        self.delay = delay
        self.transport: asyncio.Transport | None = None
        self.other: Leg | None = None
        self.lost = False
        self.earliest = 0.0
        self.waiting: deque[tuple[float, bytes | None]] = deque()  # when it is due, and None for the end
        self.timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self.pass_on(data)

    def connection_lost(self, _: Exception | None) -> None:
        self.lost = True
        self.pass_on(None)

    def pass_on(self, data: bytes | None) -> None:
        """Send it at its time, after all that came before it."""
        if not self.delay:
            self.deliver(data)
            return
        self.waiting.append((max(monotonic(), self.earliest) + self.delay, data))
        if self.timer is None:
            self.wait()

    def wait(self) -> None:
        """Wait for what is due next."""
        wait = self.waiting[0][0] - monotonic()
        self.timer = asyncio.get_running_loop().call_later(max(wait, 0), self.send_due)

    def send_due(self) -> None:
        """Send all that is due. The loop's timers are rounded to milliseconds: what is due within half of one is."""
        self.timer = None
        while self.waiting and self.waiting[0][0] <= monotonic() + 0.0005:
            self.deliver(self.waiting.popleft()[1])
        if self.waiting:
            self.wait()

    def deliver(self, data: bytes | None) -> None:
        """Send it on the other connection, or close that."""
        if self.other is None or self.other.transport is None or self.other.lost:
            return
        if data is None:
            self.other.transport.close()
        else:
            self.other.transport.write(data)

    def pause_writing(self) -> None:
        if self.other and self.other.transport and not self.other.lost:
            self.other.transport.pause_reading()

    def resume_writing(self) -> None:
        if self.other and self.other.transport and not self.other.lost:
            self.other.transport.resume_reading()


class Accepted(Leg):
    """The connection of who came; the one to the upstream is made for it."""

    def __init__(self, delay: float, upstream: int, tasks: set[asyncio.Task[None]]) -> None:
        super().__init__(delay)
        self.upstream = upstream
        self.tasks = tasks

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        # On this machine connecting takes no time. So far away it takes a round trip, and until then nothing is sent.
        self.earliest = monotonic() + 2 * self.delay
        assert self.transport
        self.transport.pause_reading()
        task = asyncio.create_task(self.connect())
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def connect(self) -> None:
        """Connect to the upstream, and begin to read."""
        loop = asyncio.get_running_loop()
        made = Leg(self.delay)
        made.other = self
        await loop.create_connection(lambda: made, "127.0.0.1", self.upstream)
        self.other = made
        assert self.transport
        assert made.transport
        if self.lost:
            made.transport.close()
        else:
            self.transport.resume_reading()


async def serve(upstream: int, delay: float, certificate: str | None) -> None:
    """Serve until the process is ended."""
    context = None
    if certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.load_cert_chain(certificate)
    tasks: set[asyncio.Task[None]] = set()
    server = await asyncio.get_running_loop().create_server(
        lambda: Accepted(delay, upstream, tasks), "127.0.0.1", 0, backlog=4096, ssl=context
    )
    print(server.sockets[0].getsockname()[1], flush=True)  # noqa: T201 -- for who started it
    await server.serve_forever()


def main() -> None:
    """Parse the arguments and serve."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.relay")
    parser.add_argument("upstream", type=int, metavar="PORT")
    parser.add_argument("--delay", type=float, default=0.0, metavar="SECONDS", help="in each direction")
    parser.add_argument("--certificate", metavar="FILE", help="of the TLS that ends here: its key and chain, PEM")
    arguments = parser.parse_args()
    uvloop.run(serve(arguments.upstream, arguments.delay, arguments.certificate))


if __name__ == "__main__":
    main()
