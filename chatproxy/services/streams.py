"""Resumable streams: the task that reads an answer whoever listens, its readers, its idempotency key, its end.

Does not know HTTP, httpx, or what a frame means. The frames themselves are in an `EventStore`.
"""

import asyncio
import logging
import re
import secrets
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from itertools import count
from typing import Protocol

import anyio

from chatproxy import sse
from chatproxy.config import Settings
from chatproxy.errors import (
    Abandoned,
    ChatError,
    InternalError,
    InvalidLastEventID,
    InvalidRequest,
    ReplayLost,
    Stopped,
    StreamNotFound,
    StreamTimeout,
)
from chatproxy.events import Failed, StreamSummary
from chatproxy.formats import MakeFormat
from chatproxy.metrics import Metrics
from chatproxy.services.access import Caller
from chatproxy.services.limits import ReaderLimit
from chatproxy.services.relay import Batch, Frames
from chatproxy.services.store import EventStore

log = logging.getLogger(__name__)

RECONNECTION_TIME = 2000  # milliseconds that a browser waits before it reconnects
STREAM_ID = r"[A-Za-z0-9_-]{22}"  # the form of their ids

# The number in the id of a failure that is a reader's own: an event after which there is nothing, whatever comes.
FINAL_EVENT_NUMBER = 2**53 - 1


class Upstream(Protocol):
    """What can be done to the completion that a stream is made of."""

    def cancel_with(self, error: Exception) -> None: ...


class ResumableStream:
    """One resumable answer, from its request until it is forgotten."""

    def __init__(
        self,
        upstream: Upstream,
        summary: StreamSummary,
        make_format: MakeFormat,
        key: tuple[str, str] | None,
        body_digest: bytes,
        name: str | None = None,
    ) -> None:
        id = self.id = secrets.token_urlsafe(16)  # 128 bits: it is the ticket of whoever reads the answer
        self.name = name  # another one, chosen by the client
        self.upstream: Upstream | None = upstream  # until it has ended
        self.summary = summary
        self.key = key
        self.body_digest = body_digest
        self.first_chunk_or_error = asyncio.Event()
        self.error: ChatError | None = None  # before the status was sent; or the store's
        self.status_sent = False  # whoever asked knows the id
        self.readers = 0
        self.written = 0  # frames
        self.read, self.read_to_end = 0, False  # the highest number given to any reader; whether one has taken all
        self.abandon_timer: asyncio.TimerHandle | None = None
        numbers = count(1)
        self.format = make_format(id, lambda data, type: sse.encode(data, type, f"{id}-{next(numbers)}"))
        # A failure of one reader's own has an id, too, so that it does not come back.
        self.reader_format = make_format(id, lambda data, type: sse.encode(data, type, f"{id}-{FINAL_EVENT_NUMBER}"))


class StreamRegistry:
    """The resumable streams of this process."""

    def __init__(self, store: EventStore, settings: Settings, readers: ReaderLimit, metrics: Metrics) -> None:
        self._store = store
        self._settings = settings
        self._readers = readers
        self._metrics = metrics
        self._streams: dict[str, ResumableStream] = {}
        self._keys: dict[tuple[str, str], ResumableStream] = {}
        self._names: dict[str, ResumableStream] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def find(self, id: str) -> ResumableStream:
        """Raises StreamNotFound."""
        try:
            return self._streams[id]
        except KeyError:
            raise StreamNotFound from None

    async def find_by_name(self, name: str) -> ResumableStream | None:
        """The last stream of that name, if it has not been read to its end."""
        stream = self._names.get(name.lower())
        return stream if stream is not None and not stream.read_to_end else None

    async def claim(self, stream: ResumableStream) -> ResumableStream:
        """Make a new stream known; or give the one that its idempotency key has started, and forget the new one.

        Raises InvalidRequest if that one had another body.
        """
        first = self._keys.setdefault(stream.key, stream) if stream.key else stream
        if first.body_digest != stream.body_digest:
            raise InvalidRequest("This Idempotency-Key was used with another body.", param="Idempotency-Key")
        if first is stream:
            self._streams[stream.id] = stream
        return first

    def discard(self, stream: ResumableStream) -> None:
        """Forget a stream that was not started."""
        del self._streams[stream.id]
        self._release_names(stream)

    def start(self, stream: ResumableStream, batches: AsyncGenerator[Batch, None]) -> None:
        """Begin to read the answer, whoever listens. It takes the place of an older one with the same name."""
        if stream.name:
            self._names[stream.name] = stream
        task = asyncio.create_task(self._run(stream, batches))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def wait_for_status(self, stream: ResumableStream, caller: Caller) -> None:
        """Wait until the status of a stream is known, at most STATUS_HOLD seconds. Raises ChatError."""
        with self._attached(stream, caller):
            await self._wait_for_status(stream)

    def follow(self, stream: ResumableStream, caller: Caller) -> AsyncGenerator[Frames, None]:
        """A stream from its start. Raises ChatError before the first frame, if no status was sent before."""
        return self.replay(stream, 0, caller)

    async def replay(self, stream: ResumableStream, after: int, caller: Caller) -> AsyncGenerator[Frames, None]:
        """What comes after that number: first what is kept, then what is still to come."""
        with self._attached(stream, caller):
            if not stream.status_sent:
                await self._wait_for_status(stream)
            async with aclosing(self._read(stream, after)) as batches:
                async for batch in batches:
                    yield batch

    async def parse_last_event_id(self, stream: ResumableStream, last_event_id: str) -> tuple[int, bool]:
        """The number in an event id, and whether anything comes after it. Raises InvalidLastEventID."""
        id, _, digits = last_event_id.rpartition("-")
        if id != stream.id or not re.fullmatch(r"[0-9]{1,16}", digits):
            raise InvalidLastEventID
        number = int(digits)
        if number == FINAL_EVENT_NUMBER:
            return number, False
        try:
            last, closed = await self._store.last(stream.id)
        except StreamNotFound:  # dropped to make room for others: who still needs it is told when it reads
            last, closed = stream.written, True
        if number > last:
            raise InvalidLastEventID
        return number, number < last or not closed or stream.error is not None

    async def stop(self, id: str) -> None:
        """End an answer, if it is still running: by its id, or by its name."""
        stream = self._streams.get(id) or self._names.get(id.lower())
        if stream is not None and stream.upstream is not None:
            stream.upstream.cancel_with(Stopped())

    async def aclose(self) -> None:
        """End every stream without a word."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _wait_for_status(self, stream: ResumableStream) -> None:
        with anyio.move_on_after(self._settings.status_hold):
            await stream.first_chunk_or_error.wait()
        if stream.error is not None and not stream.status_sent:
            raise type(stream.error)(
                stream.error.message, retry_after=stream.error.retry_after, headers=stream.error.headers
            )
        stream.status_sent = True

    async def _read(self, stream: ResumableStream, after: int) -> AsyncGenerator[Frames, None]:
        yield [sse.encode_reconnect_hint(f"{stream.id}-{after}", RECONNECTION_TIME)], False
        deadline = asyncio.get_running_loop().time() + self._settings.stream_timeout
        error: ChatError | None = None
        try:
            if after == FINAL_EVENT_NUMBER:
                raise ReplayLost
            async with aclosing(self._store.read(stream.id, after)) as batches:
                async for batch in batches:
                    after += len(batch)
                    stream.read = max(stream.read, after)
                    yield batch, False
                    if asyncio.get_running_loop().time() > deadline:
                        raise StreamTimeout
            stream.read_to_end = True
            error = stream.error  # the store's: the end of the answer could not be kept
        except StreamNotFound:
            error = ReplayLost()
        except ChatError as failure:
            error = failure
        if error is not None:
            last = stream.reader_format.encode([Failed(error)])
            error = None  # its traceback holds this frame
            yield last, True

    async def _run(self, stream: ResumableStream, batches: AsyncGenerator[Batch, None]) -> None:
        """Read an answer to its end, keep its frames, and forget it in the end."""
        store, summary = self._store, stream.summary
        created = False
        try:
            async with aclosing(batches):  # after the end is told: Grok may take its time to close
                try:
                    await store.create(stream.id)
                    created = True
                    async for events, last in batches:  # pragma: no branch -- one is the last
                        frames = stream.format.encode(events)
                        await store.append(stream.id, frames)
                        stream.written += len(frames)
                        stream.first_chunk_or_error.set()
                        if last:
                            break
                except ChatError as error:  # before Grok's first chunk, or the store's
                    await self._end_with_error(stream, error, created)
                except Exception:
                    log.exception("a resumable stream ended by a mistake of ours")
                    await self._end_with_error(stream, InternalError(), created)
                finally:
                    await self._close(stream, created)
        finally:
            summary.close("left")
            if stream.status_sent or stream.error is None:  # else the line of its request tells it
                log.info("stream ended", extra={"request_id": summary.request_id, **summary.fields()})

    async def _close(self, stream: ResumableStream, created: bool) -> None:
        stream.upstream = None
        stream.first_chunk_or_error.set()
        if stream.abandon_timer:
            stream.abandon_timer.cancel()
        keep = self._settings.replay_ttl if stream.status_sent or stream.error is None else 0
        asyncio.get_running_loop().call_later(keep, self._forget, stream.id)
        if created:
            try:
                await self._store.close(stream.id, keep)
            except ChatError as error:
                log.warning("%s: the end of a stream could not be kept", error.code)
            except Exception:
                log.exception("the end of a stream could not be kept")

    async def _end_with_error(self, stream: ResumableStream, error: ChatError, created: bool) -> None:
        stream.summary.close("failed", error.code)
        if stream.status_sent and created:
            try:
                await self._store.append(stream.id, stream.format.encode([Failed(error)]))
                stream.written += 1
                return
            except ChatError as failure:
                log.warning("%s: the end of a stream could not be kept", failure.code)
            except Exception:
                log.exception("the end of a stream could not be kept")
        stream.error = error.with_traceback(None)
        if not stream.status_sent:
            self._release_names(stream)  # the next try with this key starts anew

    def _forget(self, id: str) -> None:
        stream = self._streams.pop(id)
        self._release_names(stream)
        # The last frame is the end; before the first delta there may be others.
        self._metrics.unread_deltas.inc(max(0, min(stream.summary.deltas, stream.written - 1 - stream.read)))

    def _release_names(self, stream: ResumableStream) -> None:
        if stream.key and self._keys.get(stream.key) is stream:
            del self._keys[stream.key]
        if stream.name and self._names.get(stream.name) is stream:
            del self._names[stream.name]

    @contextmanager
    def _attached(self, stream: ResumableStream, caller: Caller) -> Iterator[None]:
        """Somebody reads. When nobody does any more, Grok is cancelled after the resume window. Raises ChatError."""
        with self._readers.reading(stream.id, caller):
            stream.readers += 1
            if stream.abandon_timer:
                stream.abandon_timer.cancel()
            try:
                yield
            finally:
                stream.readers -= 1
                if not stream.readers and stream.upstream is not None:
                    # Whoever left before the status, and gave no key or name, has no way to come back.
                    can_return = stream.status_sent or stream.key or stream.name
                    window = self._settings.resume_window if can_return else 0
                    loop = asyncio.get_running_loop()
                    stream.abandon_timer = loop.call_later(window, stream.upstream.cancel_with, Abandoned())
