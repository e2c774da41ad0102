"""How an answer is written: status line, keep-alive comments, leaving callers, the tidy end.

Does not know what an event means, nor where events come from.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Protocol

from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from chatproxy import sse
from chatproxy.config import Settings
from chatproxy.errors import CallerLeft, ChatError, InternalError
from chatproxy.interrupt import Interruptible
from chatproxy.metrics import Metrics
from chatproxy.schemas import encode, encode_error
from chatproxy.services.relay import Report, Step, failed

log = logging.getLogger(__name__)

STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    # "no-transform" keeps proxies from compressing, which holds events back; nginx heeds the last one.
    (b"cache-control", b"no-cache, no-transform"),
    (b"x-accel-buffering", b"no"),
]

# Of each stream the first write and every 64th is timed.
SAMPLED = 64


class Exchange:
    """One request and its answer, for those who do not see both ends of it.

    `report` is there once an answer of Grok is asked for, `stream` until its writing begins, `code` once there is an
    error. `status` is 0 until the status line is sent; `started` is on the monotonic clock.
    """

    __slots__ = ("code", "left", "owns_report", "report", "request_id", "started", "status", "stream")

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.started = time.monotonic()
        self.report: Report | None = None
        self.owns_report = False  # the answer ends with this request
        self.stream: EventSourceResponse | None = None
        self.status = 0
        self.code: str | None = None
        self.left = False

    def fail(self, error: ChatError) -> None:
        self.code = error.code
        if self.report is not None and self.owns_report:
            self.report.fail(error)


class JSONResponse(Response):
    """A JSON answer, encoded by msgspec. Never cached."""

    media_type = "application/json"

    def __init__(self, content: object, status_code: int = 200, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(encode(content), status_code, {"Cache-Control": "no-store", **(headers or {})})


class ErrorResponse(Response):
    """The JSON of contract C1."""

    media_type = "application/json"

    def __init__(self, error: ChatError, request_id: str) -> None:
        headers = {"Cache-Control": "no-store", **error.headers}
        if error.retry_after is not None:
            headers["Retry-After"] = str(error.retry_after)
        super().__init__(encode_error(error, request_id), error.status, headers)


class Watch(Interruptible):
    """Inside it, the task is ended with CallerLeft as soon as the caller closes the connection."""

    def __init__(self, receive: Receive) -> None:
        super().__init__()
        self._receive = receive

    def __enter__(self) -> None:
        super().__enter__()
        self._watcher = asyncio.create_task(self._watch())

    def __exit__(self, *exc: object) -> None:
        self._watcher.cancel()
        del self._watcher  # whose traceback holds us
        super().__exit__(*exc)  # type: ignore[arg-type] # the same three

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.interrupt(CallerLeft(asyncio.get_running_loop().time()))


class EventSourceResponse(StreamingResponse):
    """An event stream, from a generator of frames.

    The status line waits for the generator's first step, so that a ChatError from there becomes an
    honest status; but after STATUS_HOLD it goes out all the same, and what fails later is told in
    the stream. The generator is closed, whatever happens.

    It is written by the middleware, after Starlette has returned: a stream is open for long, and
    Starlette's layers would cost a fifth of its memory, and wrap each of its writes twice.
    """

    def __init__(
        self,
        events: AsyncGenerator[Step, None],
        settings: Settings,
        metrics: Metrics,
        upstream: "Timed | None" = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(events, headers=headers)  # type: ignore[arg-type] # steps, not bytes
        self._events = events
        self._settings = settings
        self._metrics = metrics
        self._upstream = upstream
        self._loop = asyncio.get_running_loop()
        self._started = False
        self._writing = False
        self._wrote_at = 0.0
        self._beat: asyncio.Task[None] | None = None  # the status line or a comment, on its way

    def init_headers(self, headers: Mapping[str, str] | None = None) -> None:
        own = [(name.lower().encode(), value.encode("latin-1")) for name, value in (headers or {}).items()]
        self.raw_headers = STREAM_HEADERS + own

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 -- see write()
        scope["state"]["exchange"].stream = self

    async def write(self, exchange: Exchange, receive: Receive, send_start: Send, send: Send) -> None:
        """Write it all: the status line with `send_start`, what follows with `send`. Raises ChatError, CallerLeft."""
        self._send_start, self._send = send_start, send
        self._hold_until = self._loop.time() + self._settings.status_hold
        self._timer = self._loop.call_later(min(self._settings.status_hold, self._settings.keep_alive), self._tick)
        try:
            # What is left to do when the last event is written, nobody waits for: so it is not watched.
            async with aclosing(self._events):
                with Watch(receive):
                    await self._write_events(exchange)
        except CallerLeft as left:
            if self._upstream is not None:
                self._metrics.hang_up.observe(self._loop.time() - left.at)
            raise
        finally:
            self._timer.cancel()
            if self._beat is not None:
                self._beat.cancel()

    async def _write_events(self, exchange: Exchange) -> None:
        writes = 0
        try:
            async for frames, last in self._events:
                if not self._started:
                    self._started = True
                    await self._start()
                if frames:
                    await self._write(b"".join(frames), last)
                    if self._upstream is not None:
                        if not writes % SAMPLED:
                            self._metrics.overhead.observe(time.perf_counter() - self._upstream.read_at)
                        writes += 1
                if last:
                    return
        except ChatError as error:
            if not self._started:
                raise
            await self._fail(error, exchange)
        except Exception:
            if not self._started:
                raise
            log.exception("a stream ended by a mistake of ours")
            await self._fail(InternalError(), exchange)
        else:
            await self._write(b"", last=True)

    async def _fail(self, error: ChatError, exchange: Exchange) -> None:
        exchange.fail(error)
        await self._write(failed(error, exchange.request_id), last=True)

    async def _start(self) -> None:
        await self._send_start({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        self._wrote_at = self._loop.time()

    async def _write(self, body: bytes, last: bool) -> None:
        if self._beat is not None:
            await self._beat
            self._beat = None
        if last:
            self._timer.cancel()
        self._writing = True
        await self._send({"type": "http.response.body", "body": body, "more_body": not last})
        self._writing = False
        self._wrote_at = self._loop.time()

    async def _keep_alive(self) -> None:
        await self._send({"type": "http.response.body", "body": sse.KEEP_ALIVE, "more_body": True})

    def _tick(self) -> None:
        """One timer for the hold and then for the silence; it looks at the time only when it fires."""
        now = self._loop.time()
        if self._beat is not None and self._beat.done():
            self._beat = None
        if not self._started and now >= self._hold_until:
            self._started = True
            self._wrote_at = now
            self._beat = self._loop.create_task(self._start())
        elif self._started and now >= self._wrote_at + self._settings.keep_alive:
            self._wrote_at = now
            if self._beat is None and not self._writing:
                self._beat = self._loop.create_task(self._keep_alive())
        silent_until = self._wrote_at + self._settings.keep_alive
        due = silent_until if self._started else min(self._hold_until, now + self._settings.keep_alive)
        self._timer = self._loop.call_at(due, self._tick)


class Timed(Protocol):
    """Where frames come from: knows when its last read was (perf_counter)."""

    read_at: float
