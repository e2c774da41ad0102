"""A caller's connection: uvicorn's, with what it leaves open closed.

Knows HTTP/1.1 as uvicorn and llhttp do. Does not know routes, events or Grok.
"""

import asyncio
import logging
import secrets
from collections.abc import Callable
from typing import Any, cast
from urllib.parse import urlsplit

from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from chatproxy.errors import ChatError, HeadersTooLarge, InvalidHTTP
from chatproxy.middleware import MAX_HEAD_BYTES
from chatproxy.schemas import encode_error

log = logging.getLogger(__name__)

# A request's head is a few hundred bytes. (Browsers open connections in advance, and don't mind when they are closed.)
HEAD_TIMEOUT = 20.0

# Requests that wait for the one before them. Browsers and proxies send none; each is 20 bytes for them and 2 KB for us.
MAX_WAITING = 16

DELIMITERS = (b"content-length", b"transfer-encoding")


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
        cycle.transport = cast(asyncio.Transport, HeadJoiner(self.transport))
        if cycle.scope["http_version"] == "1.0":
            # RFC 9112, 6.1: such a caller reads no transfer chunks, which uvicorn sends where there is no length.
            cycle.chunked_encoding, cycle.expected_content_length = False, UntilClosed()
        super()._start_asgi_task(cycle, app)

    def eof_received(self) -> None:
        if self._running is not None and not self._running.response_complete:
            self._running.disconnected = True
            self._running.message_event.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self.eof_received()
        self._clock.cancel()
        super().connection_lost(exc)
        self._unset_keepalive_if_required()  # uvicorn forgets it, and with it keeps all of a connection that was reset

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as in uvicorn
        super().connection_made(transport)
        if self.client is not None:  # on HOST=:: an IPv4 caller has an address that IPv4 rules do not know
            self.client = self.client[0].removeprefix("::ffff:"), self.client[1]
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
        """Whatever is raised here makes it an `invalid_http`."""
        if self.parser.should_upgrade() and any(name in DELIMITERS for name, _ in self.headers):
            # llhttp reads no body then: it would be the next request, and its answer that of somebody behind a proxy.
            raise ValueError("a body with an upgrade")
        if len(self.pipeline) == MAX_WAITING:
            raise ValueError("too many wait")
        self._clock.cancel()
        self._spare = MAX_HEAD_BYTES  # for chunk sizes and trailers
        if not self.url.startswith(b"/"):
            # RFC 9112, 3.2.2: the host that counts is the one in the target, whatever the Host header says.
            target = urlsplit(self.url)
            self.headers[:] = [(b"host", target.netloc), *(field for field in self.headers if field[0] != b"host")]
        super().on_headers_complete()
        self.headers = []  # for trailers, which uvicorn would add to the headers (RFC 9110, 6.5.1)

    def on_body(self, body: bytes) -> None:
        self._spare += 8 * len(body)  # a chunk of one byte takes six
        super().on_body(body)

    def _unsupported_upgrade_warning(self) -> None:
        """Nothing: an upgrade is an offer, which may be ignored. (uvicorn would advise to install WebSockets.)"""

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
            client = self.client[0] if self.client else None
            fields = {"request_id": request_id, "client": client, "status": error.status, "code": error.code}
            log.info("request", extra=fields)
        self.transport.close()

    def _await_head(self) -> None:
        self._clock = self.loop.call_later(HEAD_TIMEOUT, self.transport.close)


class UntilClosed(int):
    """The length of a body that ends with its connection, as uvicorn counts it down: never too short, nor too long."""

    def __lt__(self, _: int) -> bool:
        return False

    def __sub__(self, _: int) -> "UntilClosed":
        return self

    def __ne__(self, _: object) -> bool:
        return False


class HeadJoiner:
    """The transport of one answer: its head goes out with what is written right after it, in one system call.

    uvicorn writes them one by one, and for a short answer each call costs as much as all of its Python.
    """

    __slots__ = ("_head", "_transport", "write")

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._head = b""
        self.write: Callable[[bytes], None] = self._hold

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def close(self) -> None:
        self._flush()
        self._transport.close()

    def _hold(self, head: bytes) -> None:
        self._head = head
        self.write = self._join
        asyncio.get_running_loop().call_soon(self._flush)

    def _join(self, data: bytes) -> None:
        self.write = self._transport.write
        self._transport.write(self._head + data)
        self._head = b""

    def _flush(self) -> None:
        if self._head and not self._transport.is_closing():
            self._join(b"")
