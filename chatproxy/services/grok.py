"""The only conversation with xAI: request, retries, clocks and failures; bytes become chunks.

Does not know ASGI, browsers, or which events they get. What is said here about Grok's wire comes
from xAI's documentation and from recorded answers.
"""

import asyncio
import contextlib
import hashlib
import itertools
import logging
import math
import random
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator
from types import TracebackType
from typing import NoReturn, Self, cast

import httpx

from chatproxy import sse
from chatproxy.config import Settings
from chatproxy.errors import (
    Busy,
    ChatError,
    ConnectTimeout,
    ContentPolicy,
    ContextLengthExceeded,
    FirstTokenTimeout,
    IdleTimeout,
    RateLimited,
    StreamTimeout,
    UpstreamAuth,
    UpstreamCutOff,
    UpstreamFailed,
    UpstreamOverloaded,
    UpstreamRateLimited,
    UpstreamRejected,
    UpstreamUnreachable,
)
from chatproxy.interrupt import Interruptible
from chatproxy.metrics import Metrics
from chatproxy.schemas import (
    Chat,
    Chunk,
    CompletionRequest,
    Message,
    decode_chunk,
    decode_key_state,
    decode_refusal,
    encode,
)
from chatproxy.services.network import ProxyTransport, cause, ssl_context
from chatproxy.services.transport import Transport

log = logging.getLogger(__name__)

# Usage and `[DONE]` follow the finish reason at once; a Grok that has finished is not waited for.
FINISH_GRACE = 1.0

# How much of an upstream error is read, and for how long.
MAX_ERROR_BYTES = 65_536
ERROR_TIMEOUT = 5.0

# How much of its message is searched for what must not be logged, which may take quadratic time.
MAX_ERROR_TEXT = 1000

# A Retry-After above this is the caller's to wait for, not ours; xAI's own client caps it at 120.
MAX_RETRY_WAIT = 5
MAX_RETRY_AFTER = 120

# A new TLS connection costs the next chat two round trips, so idle ones are kept for minutes.
KEEP_CONNECTION = 300.0

KEY_CHECK_TIMEOUT = 5.0
KEY_CHECK_INTERVAL = 60.0


class Grok:
    """The shared part: connections, running answers, what is known of key and rate limit.

    One for each event loop. `base_url` is xAI's API, or what speaks like it.
    """

    def __init__(self, settings: Settings, base_url: str, metrics: Metrics) -> None:
        self.settings = settings
        self.metrics = metrics
        self.running: set[Completion] = set()
        self.key_usable = True
        self.rate_limited_until = 0.0  # on the loop's clock
        self._completions_url = httpx.URL(f"{base_url}/chat/completions")
        self._key_url = httpx.URL(f"{base_url}/api-key")
        self._transport = _transport(settings)
        self._headers = httpx.Headers(
            {
                "Host": self._key_url.netloc.decode(),
                "Authorization": f"Bearer {settings.grok_api_key or 'demo'}",
                "Accept": "text/event-stream",
                "Accept-Encoding": "identity",
                "Content-Type": "application/json",
            }
        )

    def stream(self, chat: Chat, *, client: str | None = None, traceparent: str | None = None) -> "Completion":
        """Grok's answer to `chat`: enter it, then iterate. `client` is only noted, as the one it is for."""
        return Completion(self, chat, client, traceparent)

    async def send(self, chat: Chat, traceparent: str | None) -> httpx.Response:
        """Ask once. The answer's body is still to be read. Raises httpx.TransportError."""
        settings = self.settings
        messages = chat.messages
        if settings.system_prompt:
            messages = [Message("system", str(settings.system_prompt)), *messages]
        body = CompletionRequest(
            settings.grok_model, messages, True, {"include_usage": True}, settings.grok_reasoning_effort
        )
        headers = self._headers.copy()
        if chat.sessionId is not None:
            # A digest, so that any id fits into a header; keyed, so that it says nothing to others.
            key = hashlib.sha256((settings.grok_api_key or "").encode()).digest()
            headers["x-grok-conv-id"] = hashlib.blake2b(chat.sessionId.encode(), digest_size=16, key=key).hexdigest()
        if traceparent is not None:
            headers["traceparent"] = traceparent
        content = encode(body)
        headers["Content-Length"] = str(len(content))
        return await self._ask("POST", self._completions_url, headers, content)

    async def _ask(self, method: str, url: httpx.URL, headers: httpx.Headers, body: bytes = b"") -> httpx.Response:
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
            await asyncio.sleep(KEY_CHECK_INTERVAL)

    async def _check_key(self) -> bool:
        usable = True  # also for every answer that is unclear
        try:
            async with asyncio.timeout(KEY_CHECK_TIMEOUT):
                response = await self._ask("GET", self._key_url, self._headers)
                async with contextlib.aclosing(response):
                    body = await _beginning(_pieces(response))
            if response.status_code == 200:
                state = decode_key_state(body)
                usable = not (state.team_blocked or state.api_key_blocked or state.api_key_disabled)
            else:
                usable = not 400 <= response.status_code <= 403
        except (httpx.HTTPError, ValueError, RecursionError, TimeoutError) as error:
            log.info("the API key could not be checked: %s", type(error).__name__)
        self.key_usable = usable
        return usable

    def failed(self, error: ChatError, detail: str) -> ChatError:
        """Note an upstream failure for the operator. `detail` holds no content."""
        self.metrics.upstream_failures(error.code).inc()
        if isinstance(error, UpstreamAuth):
            log.error("upstream_auth: check GROK_API_KEY and the credits of its team (%s)", detail)
        else:
            log.warning("%s: %s", error.code, detail)
        return error

    async def aclose(self) -> None:
        await self._transport.aclose()


class Completion(Interruptible):
    """One answer of Grok: an asynchronous context manager, and inside it an iterator of chunks.

    Being inside means that Grok's first chunk is here. Each step gives the chunks of one read;
    the iteration ends when Grok says `[DONE]`, and any other end is raised as a ChatError, after
    all chunks before it were given.
    """

    __slots__ = (
        "_asked_at",
        "_chat",
        "_deadline",
        "_decoder",
        "_end",
        "_finished",
        "_first",
        "_grok",
        "_loop",
        "_patience",
        "_pieces",
        "_stream",
        "_timer",
        "_too_late",
        "_traceparent",
        "_waiting_since",
        "client",
        "done",
        "read_at",
    )

    def __init__(self, grok: Grok, chat: Chat, client: str | None, traceparent: str | None) -> None:
        super().__init__()
        self.client = client
        self.done = False  # Grok has said `[DONE]`
        self.read_at = 0.0  # when the last chunks came (perf_counter)
        self._grok = grok
        self._chat: Chat | None = chat
        self._traceparent = traceparent
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.Handle | None = None
        self._waiting_since: float | None = None
        self._finished = False
        self._stream: httpx.AsyncByteStream | None = None
        self._first: list[Chunk] = []
        self._end: ChatError | type[StopAsyncIteration] | None = None  # what comes after the chunks that were given

    async def __aenter__(self) -> Self:
        """Ask, with retries, and wait for the first chunk. Raises ChatError."""
        grok, settings = self._grok, self._grok.settings
        if len(grok.running) >= settings.max_streams:
            raise Busy
        limit = settings.max_streams_per_client
        if limit is not None and sum(other.client == self.client for other in grok.running) >= limit:
            raise RateLimited
        grok.running.add(self)
        self._asked_at = self._loop.time()
        self._deadline = self._asked_at + settings.stream_timeout
        try:
            with self:
                await self._open()
        except BaseException:
            await self._leave()
            raise
        if not self._finished:
            self._be_patient(settings.idle_timeout, IdleTimeout)
        self._chat = None  # it may be large, and the answer long
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        """Hang up; but after Grok's `[DONE]` read to the end of the body, so that the connection is kept."""
        try:
            if kind in (None, GeneratorExit) and self.done:
                self._waiting_since = self._loop.time()
                self._be_patient(FINISH_GRACE, IdleTimeout)
                with contextlib.suppress(httpx.TransportError, ChatError), self:
                    async for _ in self._pieces:
                        pass
        finally:
            await self._leave()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> list[Chunk]:
        chunks = self._first
        if chunks:
            self._first = []
            return chunks
        if self._end is None:
            self._waiting_since = self._loop.time()
            try:
                with self:
                    chunks = await self._read()
            except (httpx.TransportError, StopAsyncIteration) as error:
                self._end = self._failed(UpstreamCutOff(), type(error).__name__)
            finally:
                self._waiting_since = None
        if not chunks:
            assert self._end is not None
            raise self._end
        return chunks

    def _be_patient(self, seconds: float, too_late: type[ChatError]) -> None:
        """From now on a wait for chunks may take so long, beginning anew with the one that is going on."""
        self._patience, self._too_late = seconds, too_late
        if self._waiting_since is not None:
            self._waiting_since = self._loop.time()
        if self._timer is not None:
            self._timer.cancel()
        # By the loop: an interrupt of our own would not end the wait that we are about to begin.
        self._timer = self._loop.call_soon(self._tick)

    def _tick(self) -> None:
        """All clocks but the connection's in one timer, which looks at the time only when it fires."""
        now = self._loop.time()
        # While a slow reader keeps us from reading, only the stream's clock goes on.
        too_late_at = (now if self._waiting_since is None else self._waiting_since) + self._patience
        if now >= self._deadline:
            self.interrupt(self._failed(StreamTimeout(), "the answer took too long"))
        elif now >= too_late_at:
            self.interrupt(self._failed(self._too_late(), f"no chunk for {self._patience:g} s"))
        else:
            self._timer = self._loop.call_at(min(too_late_at, self._deadline), self._tick)

    def _failed(self, error: ChatError, detail: str) -> ChatError:
        # What a Grok that has finished does afterwards is no failure.
        return error if self._finished else self._grok.failed(error, detail)

    async def _open(self) -> None:
        settings = self._grok.settings
        for attempt in itertools.count():  # pragma: no branch -- it has no end
            self._waiting_since = self._loop.time()
            self._be_patient(settings.first_token_timeout, FirstTokenTimeout)
            try:
                await self._try()
                return
            except _Retryable as failure:
                await self._close()
                # Exponential with jitter: at most half a second first, and four in the end.
                jitter = random.uniform(0.1, 0.5)  # noqa: S311 -- spreads load, keeps no secret
                wait = jitter * 2 ** min(attempt, 3) if failure.after is None else failure.after + 0.05
                late = self._loop.time() + wait > self._asked_at + settings.first_token_timeout
                if attempt == settings.grok_retries or (failure.after or 0) > MAX_RETRY_WAIT or late:
                    raise failure.error from None
            finally:
                self._waiting_since = None
            await asyncio.sleep(wait)

    async def _try(self) -> None:
        """One request, up to its first chunk. Raises ChatError or _Retryable."""
        grok = self._grok
        if (wait := grok.rate_limited_until - self._loop.time()) > 0:
            raise UpstreamRateLimited(retry_after=math.ceil(wait))
        self._decoder = sse.Decoder()
        try:
            assert self._chat is not None
            response = await grok.send(self._chat, self._traceparent)
            self._stream = cast(httpx.AsyncByteStream, response.stream)
            self._pieces = aiter(self._stream)
            content_type = response.headers.get("content-type", "").lower()
            if response.status_code != 200 or not content_type.startswith("text/event-stream"):
                await self._refuse(response)
            self._first = await self._read()
        except httpx.ConnectTimeout:
            raise _Retryable(grok.failed(ConnectTimeout(), "no connection in time")) from None
        except (httpx.ConnectError, httpx.ProxyError) as error:
            raise _Retryable(grok.failed(UpstreamUnreachable(), cause(error))) from None
        except httpx.TransportError as error:
            raise _Retryable(grok.failed(UpstreamFailed(), type(error).__name__)) from None
        except StopAsyncIteration:
            raise grok.failed(UpstreamFailed(), "ended before the first chunk") from None
        if not self._first:
            if isinstance(self._end, ChatError):
                raise self._end
            raise grok.failed(UpstreamFailed(), "[DONE] before the first chunk")

    async def _read(self) -> list[Chunk]:
        """The chunks of the next read that holds any; none only if `_end` is known."""
        chunks: list[Chunk] = []
        while not chunks and self._end is None:
            chunks = self._decode(await anext(self._pieces))
        self.read_at = time.perf_counter()
        return chunks

    def _decode(self, piece: bytes) -> list[Chunk]:
        """The chunks that are complete now. What ends the answer after them is kept in `_end`."""
        chunks: list[Chunk] = []
        try:
            for data in self._decoder.feed(piece):
                if data == b"[DONE]":
                    self.done = self._finished = True
                    self._end = StopAsyncIteration  # the type: an instance would be in a cycle with us once raised
                    break
                chunk = decode_chunk(data)
                choices = chunk.choices
                if chunk.error is not None or (choices is None and not chunk.usage):
                    self._end = self._failed(UpstreamFailed(), self._describe(200, data))
                    break
                chunks.append(chunk)
                if choices and choices[0].finish_reason:
                    self._finished = True
        except (ValueError, RecursionError):  # sse.TooLong, msgspec.DecodeError, UnicodeDecodeError
            self._end = self._failed(UpstreamFailed(), f"malformed frame, in a read of {len(piece)} bytes")
        if self._finished and self._end is None:
            self._be_patient(FINISH_GRACE, IdleTimeout)
        return chunks

    async def _refuse(self, response: httpx.Response) -> NoReturn:
        """Turn an answer that is no event stream into its error."""
        body = await _beginning(self._pieces)
        status = response.status_code
        error = _classify(status, _read_refusal(body)[1].lower())
        after: int | None = None
        if isinstance(error, UpstreamRateLimited | UpstreamOverloaded):
            if re.fullmatch(r"\d{1,9}", asked := response.headers.get("retry-after", "")):
                error.retry_after = after = max(1, min(int(asked), MAX_RETRY_AFTER))
            if isinstance(error, UpstreamRateLimited) and after is not None:
                self._grok.rate_limited_until = self._loop.time() + after
        self._grok.failed(error, self._describe(status, body))
        # 525 and 526: TLS trouble between Cloudflare and xAI, which no retry mends.
        if isinstance(error, UpstreamRateLimited) or (status >= 500 and status not in (525, 526)):
            raise _Retryable(error, after)
        raise error

    def _describe(self, status: int, body: bytes) -> str:
        """An upstream error for the log: no keys, ids or addresses, and no word of the conversation."""
        code, text = _read_refusal(body)
        about = f"status {status}, code {str(code)[:80]!r}, {len(body)} bytes"
        if self._chat is None:
            return about  # nobody knows any more what was said
        if len(text) > MAX_ERROR_TEXT:
            text = text[:MAX_ERROR_TEXT].rpartition(" ")[0]  # or what is private might be cut, and not be found
        text = text.replace(self._grok.settings.grok_api_key or "xai-", "xai-")
        spoken = {word for message in self._chat.messages for word in _WORD.findall(message.content)}
        text = _WORD.sub(lambda word: "…" if word[0] in spoken else word[0], _PRIVATE.sub("…", text))
        return f"{about}: {text[:200]!r}"

    async def _close(self) -> None:
        if self._stream is not None:
            stream, self._stream = self._stream, None
            if isinstance(self._pieces, AsyncGenerator):
                await self._pieces.aclose()
            await stream.aclose()

    async def _leave(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._grok.running.discard(self)
        if self.done:
            await self._close()
        else:
            await asyncio.shield(self._close())  # a second cancellation must not leave the connection open


class _Retryable(Exception):
    """A failure before the first chunk that another try may mend, after so many seconds."""

    def __init__(self, error: ChatError, after: float | None = None) -> None:
        self.error = error
        self.after = after


_WORD = re.compile(r"\w{4,}")
_PRIVATE = re.compile(
    r"xai-[\w.-]*|\S*\*{3}\S*"  # keys, masked keys
    r"|[0-9a-fA-F]{8}-(?:[0-9a-fA-F]{4}-){3}[0-9a-fA-F]{12}"  # UUIDs
    r"|\S+@\S+|https?://\S+|\b\d{1,3}(?:\.\d{1,3}){3}\b|(?:[0-9a-fA-F]{1,4}:){3,7}[0-9a-fA-F]{1,4}"  # addresses
)


def _pieces(response: httpx.Response) -> AsyncIterator[bytes]:
    return aiter(cast(httpx.AsyncByteStream, response.stream))


async def _beginning(pieces: AsyncIterator[bytes]) -> bytes:
    """The body of a short answer: up to a size, a time, or its breaking off."""
    body = b""
    with contextlib.suppress(httpx.TransportError, TimeoutError):
        async with asyncio.timeout(ERROR_TIMEOUT):
            async for piece in pieces:
                body += piece[:MAX_ERROR_BYTES]
                if len(body) >= MAX_ERROR_BYTES:
                    break
    return body


def _read_refusal(body: bytes) -> tuple[str | int | None, str]:
    """xAI's code and message, from any of its envelopes; of anything else (HTML) neither."""
    try:
        refusal = decode_refusal(body)
    except (ValueError, RecursionError):
        return None, ""
    if isinstance(refusal, str):
        return None, refusal
    if isinstance(refusal.error, str):
        return refusal.code, refusal.error
    return refusal.error.code if refusal.code is None else refusal.code, refusal.error.message


def _classify(status: int, text: str) -> ChatError:
    """The outcome that an answer other than an event stream stands for; `text` in lower case.

    A wrong key is a 400, and a 403 has four meanings: only the words tell them apart.
    """
    if 400 <= status < 500:
        if "violates usage guidelines" in text or "safety_check" in text:
            return ContentPolicy()
        if status in (401, 403) or (status == 429 and ("credits" in text or "spending limit" in text)):
            return UpstreamAuth()
        if status == 429:
            return UpstreamRateLimited()
        if status == 400 and ("api key" in text or "authorization" in text):
            return UpstreamAuth()
        if status == 400 and ("maximum prompt length" in text or "exceeds budget" in text or "context length" in text):
            return ContextLengthExceeded()
        return UpstreamRejected()
    if status in (503, 529):
        return UpstreamOverloaded()
    return UpstreamFailed()


def _transport(settings: Settings) -> httpx.AsyncBaseTransport:
    places = settings.max_streams + 1  # and one for the key check
    context = ssl_context(settings)
    if settings.proxy is not None:
        return ProxyTransport(settings.proxy, context, KEEP_CONNECTION)
    if settings.grok_transport == "httpx":
        # httpx's own limits are 100 connections, and 5 s for idle ones.
        limits = httpx.Limits(max_connections=places, keepalive_expiry=KEEP_CONNECTION)
        return httpx.AsyncHTTPTransport(verify=context, limits=limits)
    return Transport(ssl_context=context, max_connections=places, keepalive_expiry=KEEP_CONNECTION)
