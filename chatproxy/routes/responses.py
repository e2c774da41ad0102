"""How a response is written: JSON, errors, and event streams with their status, comments, disconnects and tidy end.

Does not know what an event means, nor where events come from.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Coroutine, Mapping
from contextlib import aclosing, suppress
from typing import Any, Protocol

import anyio
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from chatproxy.cancellation import CancellableWait
from chatproxy.config import Settings
from chatproxy.errors import ChatError, InternalError, InvalidRequest
from chatproxy.events import StreamSummary
from chatproxy.formats import StreamFormat, encode_error, encode_json
from chatproxy.metrics import Metrics
from chatproxy.services.relay import Frames

log = logging.getLogger(__name__)

STREAM_HEADERS = [
    # "no-store": an answer is private. "no-transform" keeps proxies from compressing, which holds events back; nginx
    # heeds the last one.
    (b"cache-control", b"no-cache, no-transform, no-store"),
    (b"x-accel-buffering", b"no"),
]

# Of each stream the first write and every 64th is timed.
SAMPLED = 64


class ClientDisconnected(Exception):
    """The client closed the connection, at this time of the loop's clock. Nobody is left to be told."""

    def __init__(self, at: float) -> None:
        super().__init__()
        self.at = at


class RequestContext:
    """One request and its response, for those who do not see both ends of it.

    `summary` is there once an answer of Grok is read: `owns_summary` if the answer ends with this request. `code` is
    that of an error. `status` is 0 until the status line is sent; `started_at` is on the monotonic clock. `headers` are
    added to whatever the response is. `peer` is the address at the other end of the connection, which may be a proxy's;
    `client` is what the log calls the client, if that is not an address.
    """

    __slots__ = (
        "client",
        "code",
        "disconnected",
        "headers",
        "owns_summary",
        "peer",
        "request_id",
        "started_at",
        "status",
        "summary",
    )

    def __init__(self, request_id: str, peer: str | None) -> None:
        self.request_id = request_id
        self.peer = peer
        self.client: str | None = None
        self.started_at = time.monotonic()
        self.summary: StreamSummary | None = None
        self.owns_summary = False
        self.status = 0
        self.code: str | None = None
        self.disconnected = False
        self.headers = [(b"x-request-id", request_id.encode())]

    def record_error(self, error: ChatError) -> None:
        """Note it for the log line, and as the end of the answer."""
        self.code = error.code
        if self.summary is not None and self.owns_summary:
            self.summary.close("failed", error.code)


class JSONResponse(Response):
    """A JSON answer, encoded by msgspec. Never cached."""

    media_type = "application/json"

    def __init__(self, content: object, status_code: int = 200, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(encode_json(content), status_code, {"Cache-Control": "no-store", **(headers or {})})


class ErrorResponse(Response):
    """An error as JSON, with its status."""

    media_type = "application/json"

    def __init__(self, error: ChatError, request_id: str) -> None:
        headers = {"Cache-Control": "no-store", **error.headers}
        if error.retry_after is not None:
            headers["Retry-After"] = str(error.retry_after)
        super().__init__(encode_error(error, request_id), error.status, headers)


# Seconds. OpenAI's JavaScript SDK takes no longer Retry-After for what it is, and comes back at once.
MAX_SDK_WAIT = 60


class OpenAIErrorResponse(ErrorResponse):
    """The same for OpenAI's SDKs, which are told not to ask again unless waiting is all that it takes.

    Without that they repeat most requests twice, and Grok may have to be paid for each.
    """

    def __init__(self, error: ChatError, request_id: str) -> None:
        super().__init__(error, request_id)
        if isinstance(error, InvalidRequest):
            self.status_code = 400  # OpenAI's own; LangChain takes a 422 for something that passes
        if error.retry_after is None or error.retry_after > MAX_SDK_WAIT:
            self.headers["X-Should-Retry"] = "false"


class _Over(Exception):
    """There is nothing left to be listened for."""


async def while_connected(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Do some work, which ends with ClientDisconnected as soon as the client closes the connection.

    It has a task of its own, and ours listens: each event wakes the coroutines that write it, and not in addition those
    of the whole application around them.
    """
    loop = asyncio.get_running_loop()
    task, listening = loop.create_task(work), CancellableWait()
    task.add_done_callback(lambda _: listening.cancel_with(_Over()))
    disconnected_at = 0.0
    try:
        with suppress(_Over), listening:
            while (await receive())["type"] != "http.disconnect":
                pass
            disconnected_at = loop.time()
    finally:
        if not task.done():  # the client has left, or somebody ends us: anyio's scopes do so at every await
            task.cancel()
            with anyio.CancelScope(shield=True):
                await asyncio.wait([task])
    try:
        if task.cancelled():
            raise ClientDisconnected(disconnected_at)
        task.result()
    finally:
        del task  # which holds an error that holds this frame


class EventSourceResponse(StreamingResponse):
    """An event stream, from a generator of frames.

    The status line waits for the generator's first step, so that a ChatError from there becomes an honest status; but
    after `status_hold` seconds it goes out all the same, and what fails later is told in the stream. (Without
    `status_hold` the generator sees to it.) A `whole` format's status waits for the last step instead. The generator is
    closed, whatever happens. Raises ChatError before the status line, and ClientDisconnected.
    """

    def __init__(
        self,
        frames: AsyncGenerator[Frames, None],
        format: StreamFormat,
        settings: Settings,
        metrics: Metrics,
        *,
        status_hold: float | None = None,
        upstream: "HasReadTime | None" = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self._format = format
        super().__init__(frames, headers=headers)  # type: ignore[arg-type] # batches of frames, not bytes
        self._frames = frames
        self._metrics = metrics
        self._upstream = upstream
        self._keep_alive_interval = settings.keep_alive
        self._status_hold = status_hold
        self._loop = asyncio.get_running_loop()
        self._started = False
        self._writing = False
        self._wrote_at = 0.0
        self._pulse: asyncio.Task[None] | None = None  # the status line or a comment, on its way

    def init_headers(self, headers: Mapping[str, str] | None = None) -> None:
        """The fields of every stream, those of the format, and the response's own."""
        own = {**self._format.headers, **(headers or {})}
        self.raw_headers = [(b"content-type", self._format.content_type), *STREAM_HEADERS]
        self.raw_headers += [(name.lower().encode(), value.encode("latin-1")) for name, value in own.items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Write it all."""
        self._context: RequestContext = scope["state"]["context"]
        self._send = send
        try:
            # After the last event only cleanup remains (reading Grok's stream to its end, so that its connection can be
            # reused): nobody listens for a disconnect then.
            async with aclosing(self._frames):
                await while_connected(receive, self._write_frames())
        except ClientDisconnected as disconnected:
            if self._upstream is not None:
                self._metrics.hang_up.observe(self._loop.time() - disconnected.at)
            raise
        finally:
            del self._send, self._context  # a traceback may hold this response for a while

    async def _write_frames(self) -> None:
        writes = 0
        self._hold_until = self._loop.time() + (self._status_hold or 0)
        self._timer: asyncio.TimerHandle | None = None
        if self._status_hold is not None:
            self._timer = self._loop.call_at(self._hold_until, self._tick)
        try:
            async for frames, last in self._frames:
                if not self._started and (last or not self._format.whole):
                    self._started = True
                    await self._start()
                if frames:
                    await self._write(b"".join(frames), last)
                    if self._upstream is not None:
                        if not writes % SAMPLED:
                            self._metrics.overhead.observe(time.perf_counter() - self._upstream.read_at)
                        writes += 1
                if last:
                    if not frames:
                        break
                    return
            await self._write(b"", last=True)
        except ChatError as error:
            if not self._started:
                raise
            await self._end_with_error(error)
        except Exception:
            if not self._started:
                raise
            log.exception("a stream ended by a mistake of ours")
            await self._end_with_error(InternalError())
        finally:  # at once: who gets the error may be about to answer with a status of its own
            if self._timer is not None:
                self._timer.cancel()
            if self._pulse is not None:
                self._pulse.cancel()

    async def _end_with_error(self, error: ChatError) -> None:
        self._context.record_error(error)
        await self._write(b"".join(self._format.encode_failure(error)), last=True)

    async def _start(self) -> None:
        await self._send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        self._wrote_at = self._loop.time()
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(self._keep_alive_interval, self._tick)

    async def _write(self, body: bytes, last: bool) -> None:
        self._writing = True
        if self._pulse is not None:
            await self._pulse
            self._pulse = None
        if last and self._timer is not None:
            self._timer.cancel()
        await self._send({"type": "http.response.body", "body": body, "more_body": not last})
        self._writing = False
        self._wrote_at = self._loop.time()

    async def _keep_alive(self) -> None:
        await self._send({"type": "http.response.body", "body": self._format.keep_alive, "more_body": True})

    def _tick(self) -> None:
        """One timer for the hold and then for keep-alives; it looks at the time only when it fires."""
        now = self._loop.time()
        if self._pulse is not None and self._pulse.done():
            self._pulse = None
        if not self._started and now >= self._hold_until:
            self._started = True
            self._wrote_at = now
            self._pulse = self._loop.create_task(self._start())
        elif self._started and now >= self._wrote_at + self._keep_alive_interval:
            self._wrote_at = now
            if self._pulse is None and not self._writing:
                self._pulse = self._loop.create_task(self._keep_alive())
        due = self._wrote_at + self._keep_alive_interval if self._started else self._hold_until
        self._timer = self._loop.call_at(due, self._tick)


class HasReadTime(Protocol):
    """Where frames come from: knows when its last read was (perf_counter)."""

    read_at: float
