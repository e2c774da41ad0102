"""One connection to the server: a request is written, and the llhttp parser takes its response apart.

Knows the framing of HTTP/1.1. Does not know sockets, TLS, chats or event streams.
"""

import asyncio
from typing import Protocol, cast

import httpx
from httptools import HttpParserError, HttpResponseParser

# Bytes. Reading pauses when more than this is buffered. It is also the limit for a response head and for the chunk
# framing between two pieces of the body, above which the response is a RemoteProtocolError. One socket read may
# overshoot both.
MAX_UNREAD = 65_536

# Bytes. A body up to this size is copied behind its head, which makes them one system call; a larger one is not copied.
MAX_COPIED = 16_384

DELIMITERS = {b"content-length", b"transfer-encoding"}


class ByteTransport(Protocol):
    """What a connection needs of the transport of an event loop, or of TLS over one."""

    def write(self, data: bytes) -> None: ...

    def abort(self) -> None: ...

    def is_closing(self) -> bool: ...

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...

    def get_write_buffer_size(self) -> int: ...


class Pool(Protocol):
    """Where a connection belongs. See `Transport`."""

    def release(self, connection: "ClientConnection") -> None:
        """Its request has ended."""

    def forget(self, connection: "ClientConnection") -> None:
        """It is closed."""

    def close_idle(self) -> None:
        """The way to the server is lost."""


class ClientConnection(asyncio.Protocol):
    """A connection, the request that was sent on it last, and what has come of its response."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.used = False  # a request was sent on it
        self.pieces: list[bytes] = []  # of the body, parsed but not taken
        self.on_body = self.pieces.append
        self.waiter: asyncio.Future[None] | None = None
        # Why the connection is closed, once it is. Not an exception: its traceback would hold frames that hold this
        # connection and the request, and such a cycle is freed only by the garbage collector's rarest run.
        self.failure: tuple[type[httpx.TransportError], str] | None = None
        self.reading_paused = False
        self.reset()

    def reset(self) -> None:
        """Forget the last response, so that the next one may come."""
        self.pieces.clear()
        self.headers: list[tuple[bytes, bytes]] = []
        self.status = 0  # until the head is here
        self.complete = False  # the whole response is here
        self.keep_alive = False  # the server allows another request after it
        self.ends_with_connection = False  # the body has neither a length nor chunks
        self.unread = 0  # bytes from the socket since the reader last took what was here

    def send(self, request: httpx.Request) -> None:
        """Write the request. What the socket does not take now, the event loop writes later."""
        self.used = True
        fields = request.headers.raw
        head = b"%b %b HTTP/1.1\r\n%b\r\n" % (
            request.method.encode("ascii"),
            request.url.raw_path,
            b"".join([b"%b: %b\r\n" % field for field in fields]),
        )
        if not head.count(b"\r") == head.count(b"\n") == len(fields) + 2 or b"\0" in head:
            self.close(httpx.LocalProtocolError, "a line break or NUL in a header")
            return
        body = b"".join(cast(httpx.ByteStream, request.stream))
        if len(body) <= MAX_COPIED:
            self.transport.write(head + body)
        else:
            self.transport.write(head)
            self.transport.write(body)

    def activity(self) -> asyncio.Future[None]:
        """Done with the next piece of the body, the head, the end of the response, or that of the connection."""
        self.waiter = self.loop.create_future()
        return self.waiter

    def notify(self) -> None:
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)

    def close(self, kind: type[httpx.TransportError], message: str) -> None:
        """Close the socket at once. Only the first call counts, and says what `error` is."""
        if self.failure is None:
            self.failure = kind, message
            self.pool.forget(self)
            self.transport.abort()
            self.notify()

    def error(self) -> httpx.TransportError:
        """Why the connection is closed: a new exception each time."""
        assert self.failure is not None
        kind, message = self.failure
        return kind(message)

    def reusable(self) -> bool:
        """Whether another request may be sent: the response is complete, and so is what we had to send."""
        return self.complete and self.keep_alive and not self.transport.get_write_buffer_size()

    def pause_reading_if_full(self) -> None:
        if self.unread > MAX_UNREAD and not self.complete:
            self.reading_paused = True
            self.transport.pause_reading()

    def read_buffered(self) -> bytes:
        """All of the body that is here. Reading goes on if it was paused."""
        piece = b"".join(self.pieces)
        self.pieces.clear()
        self.unread = 0
        if self.reading_paused:
            self.reading_paused = False
            self.transport.resume_reading()
        return piece

    # What the event loop calls.

    def connection_made(self, transport: asyncio.BaseTransport | ByteTransport) -> None:
        self.transport = cast(ByteTransport, transport)
        self.loop = asyncio.get_running_loop()
        self.made_at = self.loop.time()
        self.parser = HttpResponseParser(self)
        self.feed = self.parser.feed_data

    def data_received(self, data: bytes | memoryview) -> None:
        self.unread += len(data)
        try:
            self.feed(data)
        except HttpParserError as error:
            self.close(httpx.RemoteProtocolError, str(error.__context__ or error))
        if self.pieces:
            waiter = self.waiter
            if waiter is not None and not waiter.done():
                waiter.set_result(None)
            else:
                self.pause_reading_if_full()
        elif self.unread > MAX_UNREAD:
            self.close(httpx.RemoteProtocolError, f"more than {MAX_UNREAD} bytes around the body")

    def eof_received(self) -> None:
        self.complete = self.complete or self.ends_with_connection
        self.close(httpx.RemoteProtocolError, "the server closed the connection before the end of its response")

    def connection_lost(self, error: Exception | None) -> None:
        if error is None:
            self.close(httpx.RemoteProtocolError, "the connection was lost")
        else:
            self.close(httpx.ReadError, str(error))
        if isinstance(error, TimeoutError):
            self.pool.close_idle()  # what we sent was not acknowledged; the other connections take the same way
        del self.parser, self.feed  # they hold this connection, and it holds them

    # What the parser calls, besides `on_body`.

    def on_message_begin(self) -> None:
        if self.complete:
            raise HttpParserError("bytes after the response")

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self.status:  # trailers come after it
            self.headers.append((name, value.rstrip(b" \t")))

    def on_headers_complete(self) -> None:
        status = self.parser.get_status_code()
        if status == 101:
            raise HttpParserError("a switch of protocols that nobody asked for")
        if status < 200:
            self.headers.clear()
            return
        self.ends_with_connection = not any(name.lower() in DELIMITERS for name, _ in self.headers)
        codings = [value.lower() for name, value in self.headers if name.lower() == b"transfer-encoding"]
        if codings not in ([], [b"chunked"]):
            raise HttpParserError("a transfer coding that is not chunked")
        self.status = status
        self.keep_alive = self.parser.should_keep_alive()
        self.notify()

    def on_message_complete(self) -> None:
        if self.status:
            self.complete = True
            self.notify()
