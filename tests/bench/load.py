"""The callers: connections that ask for an answer to be played, and keep what comes and when.

As little work per read as Python can do; everything is looked at after the measurement.
"""

import asyncio
import json
import ssl
from collections.abc import Callable, Iterator
from math import ceil
from time import monotonic
from typing import Any, NamedTuple, cast

from tests.bench.processes import Target
from tests.bench.script import (
    BODY_END,
    FRAME_END,
    Reader,
    WrongAnswerError,
    check,
    texts_of_resumable,
    texts_of_service,
    texts_of_ui_messages,
    texts_of_upstream,
    unchunk,
)


class Format(NamedTuple):
    """How an answer of the service is asked for, and read."""

    path: str
    message: Callable[[str], dict[str, Any]]
    fields: dict[str, object]
    read: Reader


FORMATS = {
    "plain": Format("/api/chat", lambda text: {"content": text}, {}, texts_of_service),
    "ui": Format("/api/chat", lambda text: {"parts": [{"type": "text", "text": text}]}, {}, texts_of_ui_messages),
    "openai": Format("/v1/chat/completions", lambda text: {"content": text}, {"stream": True}, texts_of_upstream),
    "resumable": Format("/api/chat", lambda text: {"content": text}, {"resumable": True}, texts_of_resumable),
}


class Caller(asyncio.Protocol):
    """One connection, on which one answer is asked for after the other."""

    def __init__(self, target: Target, format: Format = FORMATS["plain"]) -> None:
        self.target = target
        self.format = format
        self.tokens = 0
        self.rate = self.start = self.asked = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if not self.received and not data.startswith(b"HTTP/1.1 200 ") and not self.end.done():
            self.end.set_exception(WrongAnswerError(f"not an event stream: {data[:200]!r}"))
        self.received += data
        self.arrivals.append((monotonic(), len(self.received)))
        if self.received.endswith(BODY_END) and not self.end.done():
            self.end.set_result(None)

    def connection_lost(self, _: Exception | None) -> None:
        if not self.transport.is_closing() and not self.end.done():
            self.end.set_exception(ConnectionError(f"{self.target.name} hung up: {bytes(self.received[-300:])!r}"))

    def play(self, tokens: int, rate: float = 0, start: float = 0, after: str = "") -> asyncio.Future[None]:
        """Ask for so many tokens; the future is done with the last. They are due as `upstream` describes it."""
        self.tokens, self.rate, self.start = tokens, rate, start
        play = f"play {tokens} tokens, {rate:f} per second, from {start:f}{after}"
        path, message, fields, _ = self.format
        return self.ask(f"POST {path}", json.dumps({"messages": [{"role": "user", **message(play)}], **fields}))

    def ask(self, line: str, body: str = "") -> asyncio.Future[None]:
        """Send a request; the future is done with the end of the answer."""
        self.received = bytearray()
        self.arrivals: list[tuple[float, int]] = []
        self.end: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        head = f"{line} HTTP/1.1\r\nHost: 127.0.0.1:{self.target.port}\r\nContent-Type: application/json\r\n"
        self.asked = monotonic()
        self.transport.write(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        return self.end

    def arrived(self) -> list[float]:
        """When each event came (whole)."""
        times = []
        at = 0
        for time, size in self.arrivals:
            while (found := self.received.find(FRAME_END, at, size)) >= 0:
                times.append(time)
                at = found + len(FRAME_END)
        return times

    def lateness(self, since: float, until: float) -> Iterator[float]:
        """By how many seconds the tokens due in that time were late; what had not come by its end counts so far."""
        arrived = self.arrived()
        number = ceil((since - self.start) * self.rate)
        while (due := self.start + number / self.rate) < until:
            yield (arrived[number] if number < len(arrived) else until) - due
            number += 1

    async def begun(self) -> None:
        """Wait for the first token."""
        while FRAME_END not in self.received:
            if self.end.done():
                self.end.result()
                raise WrongAnswerError("an answer without a token")
            await asyncio.sleep(0.002)

    def body(self) -> bytes:
        """The body of the answer."""
        return unchunk(bytes(self.received.partition(b"\r\n\r\n")[2]))[0]

    def check(self) -> int:
        """The number of tokens received: all that were asked for, if the answer has ended. Raises WrongAnswerError."""
        tokens = self.tokens if self.end.done() else None
        return check(bytes(self.received), raw=self.target.raw, tokens=tokens, read=self.format.read)


async def connect(target: Target, format: str = "plain") -> Caller:
    """A caller with an open connection."""
    loop = asyncio.get_running_loop()
    context = ssl.create_default_context(cafile=target.authority) if target.authority else None
    _, caller = await loop.create_connection(
        lambda: Caller(target, FORMATS[format]), "127.0.0.1", target.port, ssl=context
    )
    return caller


def leave(callers: list[Caller]) -> None:
    """Close all their connections."""
    for caller in callers:
        caller.transport.close()
