"""What stands around the browser: a page at another origin, and a wire that can be cut.

`Site` serves a blank page and the node packages of this folder. It listens on 127.0.0.1 and calls itself localhost, so
that to a service at 127.0.0.1 it is another site. `Relay` passes bytes on as they are, remembers the requests that went
through, and drops connections when it is told to.
"""

import asyncio
import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Self

HEAD = re.compile(rb"([A-Z]+) (\S+) HTTP/1\.1\r\n(.*?)\r\n\r\n", re.DOTALL)
MODULES = Path(__file__).parent / "node_modules"
FETCH_EVENT_SOURCE = MODULES / "@microsoft" / "fetch-event-source"

BLANK = b"""<!doctype html><meta charset="utf-8"><title>Another site</title><link rel="icon" href="data:,">
<script type="importmap">
{"imports": {"@microsoft/fetch-event-source": "/node_modules/@microsoft/fetch-event-source/lib/esm/index.js"}}
</script>
"""


class _Listener(ABC):
    """A listening socket, for as long as its context is open."""

    def __init__(self) -> None:
        self._writers: set[asyncio.StreamWriter] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._joined, "127.0.0.1", 0)
        self.port: int = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        self.cut()
        await self._server.wait_closed()

    def cut(self) -> None:
        """Drop every connection."""
        for writer in self._writers:
            writer.transport.abort()

    async def _joined(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            await self._serve(reader, writer)
        except (OSError, asyncio.IncompleteReadError):
            pass  # the other side left, or was cut off
        finally:
            self._writers.discard(writer)
            writer.close()

    @abstractmethod
    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None: ...


class Site(_Listener):
    """A page at another origin."""

    @property
    def origin(self) -> str:
        return f"http://localhost:{self.port}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            request = await reader.readuntil(b"\r\n\r\n")
            path = request.split(b" ", 2)[1].decode()
            if path == "/":
                kind, body = "text/html", BLANK
            else:  # the package imports its own modules without their ending
                kind, body = "text/javascript", (MODULES.parent / path[1:]).with_suffix(".js").read_bytes()
            writer.write(
                b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\nContent-Length: %d\r\n\r\n" % (kind.encode(), len(body))
            )
            writer.write(body)


class Request(NamedTuple):
    """One request that went through a relay."""

    method: str
    path: str
    headers: dict[str, str]
    """Names in lower case."""


class Relay(_Listener):
    """A wire to a service. What is to `strip` is taken off the paths, as a reverse proxy with a prefix does."""

    def __init__(self, port: int, *, strip: str = "") -> None:
        super().__init__()
        self.port_beyond = port
        self._strip = strip.encode()
        self.requests: list[Request] = []
        self.statuses: list[int] = []
        self.cuts: list[int] = []
        """The next event streams are dropped after so many bytes each."""
        self.down = False
        """Nobody gets through."""
        self._change = asyncio.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def until(self, true: Callable[[], bool], within: float = 10.0) -> None:
        """Wait until something about requests or statuses has become true."""
        async with asyncio.timeout(within):
            while not true():
                await self._change.wait()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.down:
            return
        onward_reader, onward_writer = await asyncio.open_connection("127.0.0.1", self.port_beyond)
        upwards = asyncio.create_task(self._upwards(reader, onward_writer))
        try:
            await self._downwards(onward_reader, writer)
        finally:
            upwards.cancel()
            onward_writer.transport.abort()
            writer.transport.abort()

    async def _upwards(self, reader: asyncio.StreamReader, onward: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            for match in HEAD.finditer(data):
                method, path, lines = (group.decode("latin-1") for group in match.groups())
                fields = (line.partition(": ") for line in lines.split("\r\n"))
                self.requests.append(Request(method, path, {name.lower(): text for name, _, text in fields}))
                self._changed()
                data = data.replace(b" " + self._strip, b" ", 1)
            onward.write(data)
        onward.transport.abort()

    async def _downwards(self, onward: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        left: int | None = None  # bytes until the cut
        while data := await onward.read(65536):
            if match := re.match(rb"HTTP/1\.1 (\d+)", data):
                self.statuses.append(int(match[1]))
                self._changed()
                if self.cuts and b"content-type: text/event-stream" in data.lower():
                    left = self.cuts.pop(0)
            if left is not None:
                data, left = data[:left], left - len(data)
            writer.write(data)
            await writer.drain()
            if left is not None and left <= 0:
                return

    def _changed(self) -> None:
        self._change.set()
        self._change = asyncio.Event()
