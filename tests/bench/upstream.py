"""The scripted upstream, a process of its own: `python -m tests.bench.upstream`, which prints its port.

It plays what the last message of the chat asks for, "play 500 tokens, 50 per second, from 1234.5": seconds of the
machine's monotonic clock, so that who asked knows when each token was due. What was due before it was asked for is
begun at once, and a rate of 0 is as fast as it is taken. With ", and close" after it, the connection is closed a while
after the answer, as servers do with those that are idle. `GET /hang-up` is answered when a stream is next hung up on,
with the time of that.
"""

import asyncio
import heapq
import re
from time import monotonic, sleep
from typing import cast

import httptools
import uvloop

from tests.bench.script import CHAT, HEAD, RESPONSES, frames, piece

PLAY = re.compile(rb"play (\d+) tokens, ([\d.]+) per second, from ([\d.]+)(, and close)?")

# How many tokens of a stream without a rate are written at once.
BURST = 100

# Seconds after an answer until a connection is closed, where that is asked for.
IDLE = 0.3


def respond(body: bytes) -> bytes:
    """A whole answer of JSON."""
    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
    return head + piece(body) + b"0\r\n\r\n"


class Upstream(asyncio.Protocol):
    """One connection of a proxy (or of the load, when it looks at the upstream directly)."""

    def __init__(self, clock: "Clock", watchers: list[asyncio.Transport]) -> None:
        self.clock = clock
        self.watchers = watchers
        self.parser = httptools.HttpRequestParser(self)
        self.path = self.body = b""
        self.wire = CHAT
        self.played = self.tokens = 0
        self.interval = 0.0
        self.start = 0.0
        self.paused = False
        self.closes = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)

    def on_message_begin(self) -> None:
        self.path = self.body = b""

    def on_url(self, url: bytes) -> None:
        self.path += url

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        if self.path == b"/hang-up":
            self.watchers.append(self.transport)
        elif asked := PLAY.search(self.body):
            self.wire = RESPONSES if self.path == b"/v1/responses" else CHAT
            rate = float(asked[2])
            self.played, self.tokens = 0, int(asked[1])
            self.interval, self.start = 1 / rate if rate else 0.0, float(asked[3])
            self.closes = asked[4] is not None
            if not self.interval:
                self.pour()
            else:
                if self.start <= monotonic():
                    self.play(1)
                self.clock.add(self)
        else:  # /v1/api-key
            self.transport.write(respond(b'{"team_blocked":false,"api_key_blocked":false,"api_key_disabled":false}'))

    def due(self) -> float:
        """When the next token is to be written."""
        return self.start + self.played * self.interval

    def play(self, count: int) -> None:
        """Write so many tokens, with what comes before the first and after the last, in one go."""
        head = b"" if self.played else HEAD
        data = frames(self.played, count, self.wire)
        self.played += count
        self.transport.write(head + data + (self.wire.tail(self.tokens) if self.played == self.tokens else b""))
        if self.closes and self.played == self.tokens:
            asyncio.get_running_loop().call_later(IDLE, self.transport.close)

    def pour(self) -> None:
        """Write tokens until there are no more, or the reader has enough."""
        while self.played < self.tokens and not self.paused and not self.transport.is_closing():
            self.play(min(BURST, self.tokens - self.played))

    def pause_writing(self) -> None:
        self.paused = True

    def resume_writing(self) -> None:
        self.paused = False
        if not self.interval:
            self.pour()

    def connection_lost(self, _: Exception | None) -> None:
        """Tell who waits for it that a stream was hung up on."""
        if self.played < self.tokens:
            self.tokens = self.played
            for watcher in self.watchers:
                watcher.write(respond(b"%.6f" % monotonic()))
            self.watchers.clear()


class Clock:
    """Writes the tokens of all streams that have a rate, each at its own time.

    An event loop's timers are rounded to milliseconds. Tokens of many streams would come in lumps, and lumps are
    cheaper to relay than what a network delivers.
    """

    def __init__(self) -> None:
        self.streams: list[tuple[float, int, Upstream]] = []
        self.added = 0

    def add(self, stream: Upstream) -> None:
        self.added += 1
        heapq.heappush(self.streams, (stream.due(), self.added, stream))

    async def run(self) -> None:
        while True:
            while self.streams and self.streams[0][0] <= monotonic():
                _, number, stream = self.streams[0]
                if stream.played < stream.tokens:
                    stream.play(1)
                if stream.played < stream.tokens:
                    heapq.heapreplace(self.streams, (stream.due(), number, stream))
                else:
                    heapq.heappop(self.streams)
            await asyncio.sleep(0)  # what was written leaves the process
            wait = self.streams[0][0] - monotonic() if self.streams else 1
            if wait > 0.001:
                await asyncio.sleep(0.001)
            elif wait > 0:
                sleep(wait)  # noqa: ASYNC251 -- reads may wait that long, tokens may not


async def serve() -> None:
    """Serve until the process is ended."""
    clock = Clock()
    watchers: list[asyncio.Transport] = []
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Upstream(clock, watchers), "127.0.0.1", 0, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)  # noqa: T201 -- for who started it
    await clock.run()


if __name__ == "__main__":
    uvloop.run(serve())
