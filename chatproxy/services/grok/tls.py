"""TLS over the transport of an event loop, with buffers that all connections share.

uvloop's and asyncio's own TLS keep buffers of 64 KiB and more for each connection; here each has OpenSSL's state only.
Knows `ssl`, which verifies as the context says. Does not know HTTP.
"""

import asyncio
import ssl
from typing import Any, Protocol, cast

# Bytes that are given to OpenSSL, or taken from it, at a time: its memory keeps the size that was needed once.
SLICE = 8192


class StreamProtocol(Protocol):
    """What is told of a connection: the methods of `asyncio.Protocol` that are called."""

    def connection_made(self, transport: Any, /) -> None: ...

    def data_received(self, data: memoryview, /) -> None: ...

    def eof_received(self) -> None: ...

    def connection_lost(self, error: Exception | None, /) -> None: ...


class Buffers:
    """What is read is in here until the end of the callback; so one is enough for all connections of a loop."""

    def __init__(self) -> None:
        self.encrypted = memoryview(bytearray(65_536))
        self.decrypted = memoryview(bytearray(16_384))  # the largest record


class TLSTransport(asyncio.BufferedProtocol):
    """The protocol of a TCP transport, and the transport of the protocol that it is given: for one connection.

    That protocol's `connection_made` is called after the handshake. The end of the TCP connection counts as the end of
    the stream, whether or not TLS has announced it: HTTP/1.1 tells what is complete.
    """

    def __init__(self, context: ssl.SSLContext, host: str, protocol: StreamProtocol, buffers: Buffers) -> None:
        self._protocol = protocol
        self._buffers = buffers
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._ssl = context.wrap_bio(self._incoming, self._outgoing, server_hostname=host)
        self._established = False
        self._handshake: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._error: Exception | None = None

    async def wait_for_handshake(self) -> None:
        """Raises OSError, of which ssl.SSLError is one."""
        try:
            await self._handshake
        except BaseException:
            self._tcp.abort()
            raise

    # What the event loop calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._tcp = cast(asyncio.Transport, transport)
        self._shake_hands()

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002
        return self._buffers.encrypted

    def buffer_updated(self, nbytes: int) -> None:
        received = self._buffers.encrypted[:nbytes]
        for start in range(0, nbytes, SLICE):
            self._incoming.write(received[start : start + SLICE])
            if self._established:
                self._decrypt()
            else:
                self._shake_hands()
            if self._tcp.is_closing():
                break

    def eof_received(self) -> None:
        if self._established:
            self._protocol.eof_received()
        else:
            self._fail(ConnectionResetError("the server closed the connection during the TLS handshake"))

    def connection_lost(self, error: Exception | None) -> None:
        if self._established:
            self._protocol.connection_lost(self._error or error)
        else:
            self._fail(error or ConnectionResetError("the connection was lost during the TLS handshake"))
        del self._protocol  # which holds this transport

    # What the protocol calls.

    def write(self, data: bytes) -> None:
        """Encrypt and send. What the socket does not take now, the event loop writes later."""
        view = memoryview(data)
        try:
            for start in range(0, len(view), SLICE):
                self._ssl.write(view[start : start + SLICE])
                self._tcp.write(self._outgoing.read())
        except ssl.SSLError as error:
            self._break(error)

    def abort(self) -> None:
        self._tcp.abort()

    def is_closing(self) -> bool:
        return self._tcp.is_closing()

    def pause_reading(self) -> None:
        self._tcp.pause_reading()

    def resume_reading(self) -> None:
        self._tcp.resume_reading()

    def get_write_buffer_size(self) -> int:
        return self._tcp.get_write_buffer_size()

    def get_extra_info(self, name: str) -> Any:
        return self._tcp.get_extra_info(name)

    # Between the two.

    def _shake_hands(self) -> None:
        try:
            self._ssl.do_handshake()
        except ssl.SSLWantReadError:
            self._flush()
            return
        except ssl.SSLError as error:
            self._flush()  # an alert that says what is wrong
            self._fail(error)
            return
        self._flush()
        if self._handshake.done():  # whoever waited has left
            return
        self._established = True
        self._protocol.connection_made(self)
        self._handshake.set_result(None)
        self._decrypt()

    def _fail(self, error: Exception) -> None:
        if not self._handshake.done():
            self._handshake.set_exception(error)
            self._handshake.exception()  # whoever connects may have left before waiting for it

    def _decrypt(self) -> None:
        decrypted = self._buffers.decrypted
        try:
            while (self._incoming.pending or self._ssl.pending()) and not self._tcp.is_closing():
                size = cast(int, self._ssl.read(len(decrypted), cast(bytearray, decrypted)))
                if size:
                    self._protocol.data_received(decrypted[:size])
                else:  # close_notify
                    self._protocol.eof_received()
                    break
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLError as error:
            self._break(error)
        self._flush()

    def _break(self, error: ssl.SSLError) -> None:
        self._error = error
        self._tcp.abort()

    def _flush(self) -> None:
        if self._outgoing.pending:
            self._tcp.write(self._outgoing.read())
