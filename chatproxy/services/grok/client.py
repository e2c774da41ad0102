"""The way to xAI: one HTTP transport, the requests that are sent over it, and what is known of the key.

Does not know ASGI, browsers, or what an answer looks like to them.
"""

import asyncio
import contextlib
import hashlib
import logging
import ssl
from collections.abc import Callable
from functools import partial
from typing import cast

import anyio
import httpx
import msgspec
from msgspec import Struct

from chatproxy.config import Settings
from chatproxy.config.timing import DEFAULT_TIMING, Timing
from chatproxy.errors import ChatError, UpstreamAuth
from chatproxy.events import Chat
from chatproxy.metrics import Metrics
from chatproxy.services.grok import chat_completions, responses
from chatproxy.services.grok.completion import Completion
from chatproxy.services.grok.connecting import socket_options
from chatproxy.services.grok.network import ProxyTransport, cause, read_beginning, ssl_context
from chatproxy.services.grok.protocol import Decoder
from chatproxy.services.grok.transport import Transport

log = logging.getLogger(__name__)

# Seconds. A new TLS connection costs the next chat two round trips, so idle ones are kept for minutes.
UPSTREAM_KEEPALIVE_EXPIRY = 300.0


class KeyState(Struct):
    """Upstream's `GET /api-key`."""

    team_blocked: bool = False
    api_key_blocked: bool = False
    api_key_disabled: bool = False


_decode_key_state = msgspec.json.Decoder(KeyState).decode


class Grok:
    """What all answers share: connections, the running completions, what is known of the key and of xAI's rate limit.

    One for each event loop. `base_url` is xAI's API, or what speaks like it.
    """

    def __init__(self, settings: Settings, base_url: str, metrics: Metrics, timing: Timing = DEFAULT_TIMING) -> None:
        self.settings = settings
        self.timing = timing
        self.metrics = metrics
        self.running: set[Completion] = set()
        self.key_usable = True
        self.rate_limited_until = 0.0  # on the loop's clock
        self.on_rate_limited: Callable[[float], None] = lambda _: None  # told for how many seconds
        path = responses.PATH if settings.grok_api == "responses" else chat_completions.PATH
        self._url = httpx.URL(base_url + path)
        self._key_url = httpx.URL(f"{base_url}/api-key")
        self._transport = _transport(settings, self._key_url, metrics)
        self._headers = httpx.Headers(
            {
                "Host": self._key_url.netloc.decode(),
                "Authorization": f"Bearer {settings.grok_api_key or 'demo'}",
                "Accept": "text/event-stream",
                "Accept-Encoding": "identity",
                "Content-Type": "application/json",
            }
        )
        # Keyed, so that a digest of a session's id tells nothing to those who do not know the API key.
        self._digest_key = hashlib.sha256((settings.grok_api_key or "").encode()).digest()

    def stream(self, chat: Chat, traceparent: str | None = None) -> Completion:
        """Grok's answer to `chat`: enter it, then iterate. Of `chat` only the encoded request is kept."""
        headers = self._headers.copy()
        cache_key: str | None = None
        if chat.session_id is not None:
            # A digest, so that any id fits into a header.
            digest = hashlib.blake2b(chat.session_id.encode(), digest_size=16, key=self._digest_key)
            headers["x-grok-conv-id"] = cache_key = digest.hexdigest()
        if traceparent is not None:
            headers["traceparent"] = traceparent
        make_decoder: Callable[[], Decoder]
        if self.settings.grok_api == "responses":
            content = responses.encode_request(self.settings, chat, cache_key)
            make_decoder = partial(responses.Decoder, self.settings.max_tool_calls)
        else:
            content = chat_completions.encode_request(self.settings, chat)
            make_decoder = chat_completions.Decoder
        headers["Content-Length"] = str(len(content))
        return Completion(self, content, headers, make_decoder)

    def remember_rate_limit(self, seconds: float) -> None:
        """Grok has told to wait for so long: nobody asks until then."""
        self.rate_limited_until = asyncio.get_running_loop().time() + seconds
        self.on_rate_limited(seconds)

    def wait_until_over(self, seconds: float) -> None:
        """Another replica was told so."""
        self.rate_limited_until = max(self.rate_limited_until, asyncio.get_running_loop().time() + seconds)

    async def send(self, content: bytes, headers: httpx.Headers) -> httpx.Response:
        """Ask once. The body of the response is still to be read. Raises httpx.TransportError."""
        response = await self._send("POST", self._url, headers, content)
        if isinstance(self._transport, Transport) and response.status_code == 200:
            self._transport.keep_spare()
        return response

    async def _send(self, method: str, url: httpx.URL, headers: httpx.Headers, body: bytes = b"") -> httpx.Response:
        # A client around the transport would merge URLs, headers and cookies for each request: a third of the cost
        # of a short stream, and nothing here has any use for it.
        request = httpx.Request(
            method,
            url,
            headers=headers,
            stream=httpx.ByteStream(body),
            extensions={"timeout": {"connect": self.settings.connect_timeout}},
        )
        return await self._transport.handle_async_request(request)

    async def watch_key(self) -> None:
        """Find out early that the key is unusable, and then when it is usable again. Costs no tokens."""
        while not await self._check_key():
            log.error("GROK_API_KEY: Grok does not accept this key, or it is blocked or disabled")
            await anyio.sleep(self.timing.key_check_interval)

    async def _check_key(self) -> bool:
        usable = True  # also for every answer that is unclear
        try:
            with anyio.fail_after(self.timing.key_check_timeout):
                response = await self._send("GET", self._key_url, self._headers)
                async with contextlib.aclosing(response):
                    body = await read_beginning(
                        aiter(cast(httpx.AsyncByteStream, response.stream)), self.timing.error_timeout
                    )
            if response.status_code == 200:
                state = _decode_key_state(body)
                usable = not (state.team_blocked or state.api_key_blocked or state.api_key_disabled)
            elif 400 <= response.status_code <= 403:
                # Without JSON it is a page of Cloudflare or of a proxy, and says nothing of the key.
                usable = not body.lstrip().startswith((b"{", b'"'))
        except (httpx.HTTPError, ValueError, RecursionError, TimeoutError) as error:
            log.info("the API key could not be checked: %s", cause(error))
        self.key_usable = usable
        return usable

    def log_failure(self, error: ChatError, detail: str) -> ChatError:
        """Note an upstream failure for the operator; gives the error. `detail` holds no content."""
        self.metrics.upstream_failures(error.code).inc()
        if isinstance(error, UpstreamAuth):
            log.error("upstream_auth: check GROK_API_KEY and the credits of its team (%s)", detail)
        else:
            log.warning("%s: %s", error.code, detail)
        return error

    async def aclose(self) -> None:
        """Close every connection."""
        await self._transport.aclose()


def _transport(settings: Settings, url: httpx.URL, metrics: Metrics) -> httpx.AsyncBaseTransport:
    max_connections = settings.max_streams + 1  # and one for the key check
    # Seconds, long before the first-token timeout. What was sent and is not acknowledged by then went to a connection
    # that was lost without a word, as by a NAT that forgot it or a laptop that slept.
    unacknowledged_timeout = 3 * settings.connect_timeout
    demo = settings.grok_api_key is None  # which speaks no TLS
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT) if demo else ssl_context(settings)
    options = socket_options(unacknowledged_timeout)
    if settings.proxy is not None:
        return ProxyTransport(settings.proxy, context, UPSTREAM_KEEPALIVE_EXPIRY, options)
    if settings.grok_transport == "httpx":
        # httpx's own limits are 100 connections, and 5 s for idle ones.
        limits = httpx.Limits(max_connections=max_connections, keepalive_expiry=UPSTREAM_KEEPALIVE_EXPIRY)
        return httpx.AsyncHTTPTransport(verify=context, limits=limits, socket_options=options)
    transport = Transport(
        url,
        ssl_context=context,
        max_connections=max_connections,
        connect_timeout=settings.connect_timeout,
        keepalive_expiry=UPSTREAM_KEEPALIVE_EXPIRY,
        unacknowledged_timeout=unacknowledged_timeout,
        spare=0 if demo else settings.grok_spare,
        on_wait=metrics.handshakes_waited.inc,
    )
    metrics.watch_connections(transport.counts)
    return transport
