"""One answer of Grok: the request, its retries, timeouts and cancellation; bytes go in, events come out.

Does not know which of xAI's APIs it drives: a decoder tells what is progress, what completes an answer, what ends it.
"""

import asyncio
import contextlib
import itertools
import math
import ssl
import time
from collections.abc import AsyncGenerator, Callable
from types import TracebackType
from typing import NoReturn, Self, cast

import anyio
import httpx

from chatproxy.cancellation import CancellableWait
from chatproxy.errors import (
    ChatError,
    ConnectTimeout,
    FirstTokenTimeout,
    IdleTimeout,
    StreamTimeout,
    UpstreamCutOff,
    UpstreamFailed,
    UpstreamOverloaded,
    UpstreamRateLimited,
    UpstreamUnreachable,
)
from chatproxy.events import Event, Finished
from chatproxy.services.grok import failures
from chatproxy.services.grok.network import cause, read_beginning
from chatproxy.services.grok.protocol import Client, Decoder

# httpx's own transport lets some errors of TLS through as they are.
TRANSPORT_ERRORS = (httpx.TransportError, ssl.SSLError)

# Seconds. Usage and `[DONE]` follow the finish reason at once; a Grok that has finished is not waited for.
FINISH_GRACE = 1.0

# Seconds. A Retry-After above this is the client's to wait for, not ours.
MAX_RETRY_WAIT = 5


class Completion(CancellableWait):
    """An asynchronous context manager, and inside it an iterator that gives the events of one read at a time.

    Being inside means that Grok's first chunk is here. The iteration ends when Grok has said that nothing follows, and
    any other end is raised as a ChatError, after all events before it were given.
    """

    def __init__(
        self, grok: Client, content: bytes, headers: httpx.Headers, make_decoder: Callable[[], Decoder]
    ) -> None:
        super().__init__()
        self.read_at = 0.0  # when the last events came (perf_counter)
        self._grok = grok
        self.request_size = len(content)
        self._content: bytes | None = content  # the request's body, until the first chunk: it may be large
        self._headers = headers
        self._make_decoder = make_decoder
        self._decoder = make_decoder()
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.Handle | None = None
        self._waiting_since: float | None = None  # on the loop's clock, while a read is waited for
        self._stream: httpx.AsyncByteStream | None = None
        self._first: list[Event] | None = None
        self._end: ChatError | None = None  # what is raised once the events before it were given

    @property
    def complete(self) -> bool:
        """Grok has said that the answer is complete."""
        return self._decoder.complete

    @property
    def ended(self) -> bool:
        """Nothing follows the events that were given."""
        return self._decoder.ended and self._end is None and self._first is None

    @property
    def finished(self) -> Finished:
        """What Grok has said of the end, so far."""
        return self._decoder.finished

    async def __aenter__(self) -> Self:
        """Ask, with retries, and wait for the first chunk. Raises ChatError."""
        settings = self._grok.settings
        self._grok.running.add(self)
        self._deadline = self._loop.time() + settings.stream_timeout
        try:
            with self:
                await self._open_with_retries()
        except BaseException:
            await self._release()
            raise
        self._content = None
        if not self.complete:
            self._arm_timeout(settings.idle_timeout, IdleTimeout)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        """Close the stream; but after Grok's last word read to the end of the body, so that the connection is kept."""
        try:
            if kind in (None, GeneratorExit) and self._decoder.ended and self._decoder.failure is None:
                self._waiting_since = self._loop.time()
                self._task = None  # the stream may be closed by another task than the one that has read it
                with contextlib.suppress(*TRANSPORT_ERRORS, ChatError), self:
                    async for _ in self._pieces:
                        pass
        finally:
            await self._release()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> list[Event]:
        if self._first is not None:
            events, self._first = self._first, None
            return events
        if self._end is None:
            if self._decoder.ended:
                raise StopAsyncIteration
            self._waiting_since = self._loop.time()
            try:
                with self:
                    return await self._read()
            except (*TRANSPORT_ERRORS, StopAsyncIteration) as error:
                self._end = self._failed(UpstreamCutOff(), type(error).__name__)
            finally:
                if self._decoder.complete:
                    # The grace period is for all that follows, however many reads it comes in.
                    self._timeout -= self._loop.time() - self._waiting_since
                self._waiting_since = None
        end, self._end = self._end, None
        assert end is not None
        try:
            raise end from None
        finally:
            del end  # its traceback holds this frame

    def _arm_timeout(self, seconds: float, error: type[ChatError]) -> None:
        """From now on a wait for a chunk may take so long, and so may the one that is going on, from now."""
        self._timeout, self._timeout_error = seconds, error
        if self._waiting_since is not None:
            self._waiting_since = self._loop.time()
        if self._timer is not None:
            self._timer.cancel()
        # Not called directly: `cancel_with` from this task only stores the error, and would not end the wait that is
        # about to begin.
        self._timer = self._loop.call_soon(self._tick)

    def _tick(self) -> None:
        """One timer for all timeouts but the connection's; it looks at the time only when it fires."""
        now = self._loop.time()
        # While a slow reader keeps us from reading, only the deadline of the whole answer counts.
        due = (now if self._waiting_since is None else self._waiting_since) + self._timeout
        if now >= self._deadline:
            self.cancel_with(self._failed(StreamTimeout(), "the answer took too long"))
        elif now >= due:
            self.cancel_with(self._failed(self._timeout_error(), f"no chunk for {self._timeout:g} s"))
        else:
            self._timer = self._loop.call_at(min(due, self._deadline), self._tick)

    def _failed(self, error: ChatError, detail: str) -> ChatError:
        # What a Grok that has finished does afterwards is no failure.
        return error if self.complete else self._grok.log_failure(error, detail)

    async def _open_with_retries(self) -> None:
        settings = self._grok.settings
        give_up_at = self._loop.time() + settings.first_token_timeout
        for attempt in itertools.count():  # pragma: no branch -- it has no end
            self._waiting_since = self._loop.time()
            self._arm_timeout(settings.first_token_timeout, FirstTokenTimeout)
            try:
                await self._attempt()
                return
            except _Retryable as failure:
                error, after = failure.error, failure.after
            finally:
                self._waiting_since = None
            await self._close()
            self._decoder = self._make_decoder()
            # Exponential with jitter: at most half a second first, and four in the end.
            jitter = self._grok.timing.retry_jitter
            wait = after + 0.05 if after is not None else jitter(0.1, 0.5) * 2 ** min(attempt, 3)
            too_late = self._loop.time() + wait > give_up_at
            if attempt == settings.grok_retries or (after or 0) > MAX_RETRY_WAIT or too_late:
                try:
                    raise error
                finally:
                    del error  # its traceback holds this frame
            await anyio.sleep(wait)

    async def _attempt(self) -> None:
        """One request, up to its first chunk. Raises ChatError or _Retryable."""
        grok = self._grok
        if (wait := grok.rate_limited_until - self._loop.time()) > 0:
            raise UpstreamRateLimited(retry_after=math.ceil(wait))
        assert self._content is not None
        try:
            response = await grok.send(self._content, self._headers)
            self._stream = cast(httpx.AsyncByteStream, response.stream)
            self._pieces = aiter(self._stream)
            content_type = response.headers.get("content-type", "").lower()
            if response.status_code != 200 or not content_type.startswith("text/event-stream"):
                await self._raise_for_response(response)
            events = await self._read()
        except httpx.ConnectTimeout:
            raise _Retryable(grok.log_failure(ConnectTimeout(), "no connection in time")) from None
        except (httpx.ConnectError, httpx.ProxyError) as error:
            raise _Retryable(grok.log_failure(UpstreamUnreachable(), cause(error))) from None
        except TRANSPORT_ERRORS as error:
            raise _Retryable(grok.log_failure(UpstreamFailed(), type(error).__name__)) from None
        except StopAsyncIteration:
            raise grok.log_failure(UpstreamFailed(), "ended before the first chunk") from None
        if not self._decoder.progressed:
            end, self._end = self._end, None
            try:
                # An error in place of the first chunk that says what a 429 or a 503 would have said.
                if isinstance(end, UpstreamRateLimited | UpstreamOverloaded):
                    raise _Retryable(end)
                raise end or grok.log_failure(UpstreamFailed(), "[DONE] before the first chunk")
            finally:
                del end  # its traceback holds this frame
        self._first = events

    async def _read(self) -> list[Event]:
        """The events of the next read that makes progress, or that ends the answer."""
        decoder = self._decoder
        was_complete = decoder.complete
        events: list[Event] = []
        while not events:
            events = decoder.feed(await anext(self._pieces))
            if decoder.failure is not None:
                self._end = None if decoder.complete else self._failed(*decoder.failure)
            if decoder.progressed or decoder.ended:
                break
        if decoder.complete and not was_complete:
            self._arm_timeout(FINISH_GRACE, IdleTimeout)
        self.read_at = time.perf_counter()
        return events

    async def _raise_for_response(self, response: httpx.Response) -> NoReturn:
        """Raise what a response that is no event stream stands for."""
        body = await read_beginning(self._pieces, self._grok.timing.error_timeout)
        status = response.status_code
        error = failures.classify(status, body)
        after: int | None = None
        if isinstance(error, UpstreamRateLimited | UpstreamOverloaded):
            after = failures.parse_retry_after(response.headers.get("retry-after", ""))
            error.retry_after = after or error.retry_after
            if isinstance(error, UpstreamRateLimited) and after is not None:
                self._grok.remember_rate_limit(after)
        self._grok.log_failure(error, failures.describe(status, body))
        # 525 and 526: TLS trouble between Cloudflare and xAI, which no retry mends.
        retry = isinstance(error, UpstreamRateLimited) or (status >= 500 and status not in (525, 526))
        try:
            raise _Retryable(error, after) if retry else error
        finally:
            del error

    async def _close(self) -> None:
        if self._stream is not None:
            stream, self._stream = self._stream, None
            if isinstance(self._pieces, AsyncGenerator):
                await self._pieces.aclose()
            await stream.aclose()

    async def _release(self) -> None:
        self._content = None
        if self._timer is not None:
            self._timer.cancel()
        self._grok.running.discard(self)
        self._task = None
        if self._decoder.ended:
            await self._close()
        else:
            with anyio.CancelScope(shield=True):  # a second cancellation must not leave the connection open
                await self._close()


class _Retryable(Exception):
    """A failure before the first chunk that another try may mend, after so many seconds."""

    def __init__(self, error: ChatError, after: float | None = None) -> None:
        self.error = error
        self.after = after
