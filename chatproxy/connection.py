"""A client's connection: uvicorn's, with bounds for the head of a request, and without other protocols.

Knows HTTP/1.1 as uvicorn and llhttp do. Does not know routes, events or Grok. A reverse proxy does the same; this is
for a service without one. Only callbacks of asyncio and httptools are overridden.
"""

import asyncio
import re
from itertools import islice

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_UPGRADE = re.compile(rb"(?i)\nupgrade(?=:)")


class HTTPProtocol(HttpToolsProtocol):
    """For `uvicorn.Config(http=...)`, which takes a class: a subclass sets other bounds and the registry."""

    max_head_bytes: int = 65_536
    """Bytes of a head, with the trailers of the body before it; what has more closes the connection."""
    head_timeout: float = 20.0
    """Seconds to the end of a head: of the first from the start of the connection, of a later one from its start."""
    transports: set[asyncio.Transport] = set()  # noqa: RUF012 -- of the class, not of a connection
    """The open connections."""

    # Not in the instance's dictionary: with more than 30 names in it, each connection would have a table of its own.
    __slots__ = ("head_timer", "in_head", "recent", "spare_bytes")

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as in uvicorn
        super().connection_made(transport)
        if self.client is not None:  # on HOST=:: an IPv4 client has an address that rules for IPv4 do not know
            self.client = self.client[0].removeprefix("::ffff:"), self.client[1]
        self.transports.add(transport)
        self.in_head, self.recent, self.spare_bytes = False, b"", self.max_head_bytes
        self.head_timer = self.loop.call_later(self.head_timeout, transport.close)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        self.transports.discard(self.transport)
        self.head_timer.cancel()
        # If it is given an error, uvicorn does not cancel its keep-alive timer, which refers to the last request.
        super().connection_lost(None)

    def data_received(self, data: bytes) -> None:
        """Rename each Upgrade field before the parser sees it.

        A server may ignore the offer of another protocol (RFC 9110, 7.8), which Java's HttpClient makes in every
        request. But the parser would stop at the end of the head, and take the body for the next request.
        """
        self.spare_bytes -= len(data)
        text, start = self.recent + data, len(self.recent)  # the name may arrive in two parts
        self.recent = text[-len(b"\nupgrade") :]
        # The next request may begin anywhere in what is read, so bodies are searched, too. The limit is for bodies full
        # of such lines, each of which costs a call of the parser; a field beyond it is refused in on_headers_complete.
        for match in islice(_UPGRADE.finditer(text), 100):
            super().data_received(text[start : match.end()])
            start = match.end()
            if self.transport.is_closing():
                return
            if self.in_head:
                super().data_received(b"-ignored")
        super().data_received(text[start:])
        if self.spare_bytes < 0:
            self.transport.close()
        elif self.in_head and self.head_timer.cancelled() and getattr(self.cycle, "response_complete", True):
            self.head_timer = self.loop.call_later(self.head_timeout, self.transport.close)

    def on_message_begin(self) -> None:
        self.in_head = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade():
            raise ValueError("CONNECT, or an Upgrade field that was not renamed")  # uvicorn answers 400 and closes
        self.in_head, self.spare_bytes = False, self.max_head_bytes
        self.head_timer.cancel()
        super().on_headers_complete()
        self.headers = []  # for trailers, which must not become fields of the request (RFC 9110, 6.5.1)

    def on_body(self, body: bytes) -> None:
        self.spare_bytes = self.max_head_bytes
        super().on_body(body)
