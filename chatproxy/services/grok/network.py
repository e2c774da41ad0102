"""The way out of this machine: which certificates are trusted, proxies, and why a connection failed.

Knows httpx and TLS. Does not know chats, retries or the environment.
"""

import asyncio
import contextlib
import re
import ssl
from collections import deque
from collections.abc import AsyncIterator
from typing import Any, cast

import anyio
import httpx
import socksio

from chatproxy.config import Settings
from chatproxy.services.grok.connecting import SocketOption

# How much of an upstream error is read, in bytes.
MAX_ERROR_BYTES = 65_536


def ssl_context(settings: Settings) -> ssl.SSLContext:
    """Trusts what SSL_CERT_FILE and SSL_CERT_DIR hold, and where neither is set, what httpx brings along.

    From the settings and not by OpenSSL itself, which would not see what is set in `.env`.
    """
    if settings.ssl_cert_file or settings.ssl_cert_dir:
        return ssl.create_default_context(cafile=settings.ssl_cert_file, capath=settings.ssl_cert_dir)
    return httpx.create_ssl_context(trust_env=False)


def cause(error: BaseException) -> str:
    """Why there is no connection, for the log: not a word that a proxy or server has chosen."""
    if isinstance(error, httpx.ProxyError):
        return str(error)
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__  # type: ignore[assignment] # one of them is set
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"{type(error).__name__}: {error.verify_message}; SSL_CERT_FILE names the certificates to trust"
    if isinstance(error, ssl.SSLError):
        return f"{type(error).__name__}: {error.reason}"
    return type(error).__name__


async def read_beginning(body: AsyncIterator[bytes], seconds: float) -> bytes:
    """A short body: up to MAX_ERROR_BYTES, `seconds`, or its breaking off."""
    content = b""
    with contextlib.suppress(httpx.TransportError):
        with anyio.move_on_after(seconds):
            async for piece in body:
                content += piece[:MAX_ERROR_BYTES]
                if len(content) >= MAX_ERROR_BYTES:
                    break
    return content


class ProxyTransport(httpx.AsyncBaseTransport):
    """httpx's transport through a proxy: `http`, `https`, `socks5` or `socks5h`.

    The timeout `connect` covers the way through the proxy up to the TLS handshake with the server, where httpx waits
    for the proxy as long as for the server's reply, or for ever. What goes wrong until then is a ProxyError, unless it
    is the ConnectError of a socket or of TLS; its text names a status at most.

    Each connection is a transport of its own, because httpcore's pool never gives up the place of one that failed
    during the TLS or SOCKS handshake (encode/httpcore#1023), until there is none left. For one event loop.
    """

    def __init__(
        self, proxy: str, context: ssl.SSLContext, keepalive_expiry: float, options: list[SocketOption]
    ) -> None:
        # httpcore refuses a context for proxies that are not reached over TLS.
        self._proxy = httpx.Proxy(proxy, ssl_context=context if proxy.startswith("https:") else None)
        self._context = context
        self._keepalive_expiry = keepalive_expiry
        self._socket_options = options
        self._open: set[httpx.AsyncHTTPTransport] = set()
        self._idle: deque[tuple[float, httpx.AsyncHTTPTransport]] = deque()  # since when; the last used one is last

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        await self._expire()
        inner = self._idle.pop()[1] if self._idle else self._connection()
        try:
            response = await self._send(request, inner)
            if response.status_code == 407:  # to a request that is not tunnelled
                raise httpx.ProxyError("the proxy answered 407")
        except BaseException:
            await self._discard(inner)
            raise
        response.stream = _Body(cast(httpx.AsyncByteStream, response.stream), self, inner)
        return response

    async def _send(self, request: httpx.Request, inner: httpx.AsyncHTTPTransport) -> httpx.Response:
        stream: Any = None  # httpcore's, to the proxy
        connected = False

        async def trace(event: str, info: dict[str, Any]) -> None:
            nonlocal stream, connected
            if event in ("connection.connect_tcp.complete", "socks.connect_tcp.complete"):
                stream = info["return_value"]
            elif event == "http11.send_request_headers.started" and info["request"].method != b"CONNECT":
                connected = True
                clock.reschedule(None)

        request.extensions = {**request.extensions, "trace": trace}
        try:
            async with asyncio.timeout(request.extensions.get("timeout", {}).get("connect")) as clock:
                return await inner.handle_async_request(request)
        except TimeoutError:
            raise httpx.ConnectTimeout("the proxy made no connection in time") from None
        except httpx.ProxyError as error:
            raise httpx.ProxyError(_refusal(str(error))) from None
        except (httpx.ReadError, httpx.WriteError, httpx.RemoteProtocolError) as error:
            if connected:
                raise
            raise httpx.ProxyError(f"the proxy closed the connection ({type(error).__name__})") from None
        except socksio.ProtocolError:  # or it has closed the connection
            raise httpx.ProxyError("the proxy does not answer as a SOCKS5 proxy") from None
        finally:
            if not connected and stream is not None:
                await stream.aclose()  # during a SOCKS handshake httpcore does not know it yet

    def _connection(self) -> httpx.AsyncHTTPTransport:
        limits = httpx.Limits(max_connections=1, keepalive_expiry=self._keepalive_expiry)
        inner = httpx.AsyncHTTPTransport(
            verify=self._context, limits=limits, proxy=self._proxy, socket_options=self._socket_options
        )
        self._open.add(inner)
        return inner

    async def _expire(self) -> None:
        now = asyncio.get_running_loop().time()
        while self._idle and self._idle[0][0] + self._keepalive_expiry < now:
            await self._discard(self._idle.popleft()[1])

    async def _discard(self, inner: httpx.AsyncHTTPTransport) -> None:
        self._open.discard(inner)
        await inner.aclose()

    def keep(self, inner: httpx.AsyncHTTPTransport) -> None:
        """Its response is read, or closed: the next request may have it."""
        self._idle.append((asyncio.get_running_loop().time(), inner))

    async def aclose(self) -> None:
        self._idle.clear()
        for inner in list(self._open):
            await self._discard(inner)


class _Body(httpx.AsyncByteStream):
    """A response's body, which gives its connection back when it is closed."""

    def __init__(self, stream: httpx.AsyncByteStream, pool: ProxyTransport, inner: httpx.AsyncHTTPTransport) -> None:
        self._stream = stream
        self._pool: ProxyTransport | None = pool
        self._inner = inner

    def __aiter__(self) -> AsyncIterator[bytes]:
        return aiter(self._stream)

    async def aclose(self) -> None:
        pool, self._pool = self._pool, None
        if pool is not None:
            await self._stream.aclose()  # if this is cancelled, nobody knows what state the connection is in
            pool.keep(self._inner)


def _refusal(text: str) -> str:
    """What a ProxyError of httpx says: a status and a reason, or a sentence of httpcore's on SOCKS."""
    status = re.match(r"\d{3}\b", text)
    return f"the proxy answered {status[0]}" if status else f"the SOCKS proxy refused: {text.rstrip('.')}"
