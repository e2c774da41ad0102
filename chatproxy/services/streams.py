"""Resumable streams: the task that reads an answer whoever listens, its readers, its idempotency key, its end.

Does not know HTTP, httpx, or what a frame means. The frames themselves are in an `EventStore`; answers that other
replicas are reading are found through a `Directory`, and then read like those of this process.
"""

import asyncio
import logging
import re
from collections.abc import AsyncGenerator
from contextlib import aclosing

import anyio

from chatproxy import sse
from chatproxy.config import Settings
from chatproxy.errors import (
    ChatError,
    InternalError,
    InvalidLastEventID,
    ReplayLost,
    Stopped,
    StoreUnavailable,
    StreamNotFound,
    StreamTimeout,
    UpstreamCutOff,
)
from chatproxy.events import Failed
from chatproxy.formats import StreamFormat
from chatproxy.metrics import Metrics
from chatproxy.services.access import Caller
from chatproxy.services.limits import ReaderLimit
from chatproxy.services.readers import Readers
from chatproxy.services.relay import Batch, Frames
from chatproxy.services.resumable import (
    FINAL_EVENT_NUMBER,
    Directory,
    ResumableStream,
    SingleReplica,
    other_body,
)
from chatproxy.services.store import EventStore

log = logging.getLogger(__name__)

RECONNECTION_TIME = 2000  # milliseconds that a browser waits before it reconnects


class StreamRegistry:
    """The resumable streams of this process."""

    def __init__(
        self,
        store: EventStore,
        settings: Settings,
        readers: ReaderLimit,
        metrics: Metrics,
        directory: Directory | None = None,
    ) -> None:
        self._store = store
        self._directory = directory or SingleReplica()
        self._settings = settings
        self._readers = Readers(readers, settings.resume_window, self._directory)
        self._metrics = metrics
        self._streams: dict[str, ResumableStream] = {}
        self._keys: dict[tuple[str, str], ResumableStream] = {}
        self._names: dict[str, ResumableStream] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def find(self, id: str) -> ResumableStream:
        """Raises StreamNotFound, and StoreUnavailable where it may be another replica's."""
        return self._streams.get(id) or await self._directory.find(id)

    async def find_by_name(self, name: str) -> ResumableStream | None:
        """The last stream of that name, if it has not been read to its end. Raises StoreUnavailable."""
        stream = await self._directory.find_by_name(name.lower(), self._names.get(name.lower()))
        return stream if stream is not None and not stream.read_to_end else None

    async def claim(self, stream: ResumableStream) -> ResumableStream:
        """Make a new stream known; or give the one that its idempotency key has started, and forget the new one.

        Raises InvalidRequest if that one had another body, and StoreUnavailable.
        """
        first = self._keys.setdefault(stream.key, stream) if stream.key else stream
        if first.body_digest != stream.body_digest:
            raise other_body()
        if first is not stream:
            if first.claiming is not None:  # whoever was first is asking the other replicas
                await first.claiming.wait()
            return first.taken_by or first
        self._streams[stream.id] = stream
        try:
            first = await self._directory.claim(stream)
        except BaseException as error:
            self.discard(stream, error)
            raise
        if first is not stream:
            stream.taken_by = first
            del self._streams[stream.id]
            self._release_names(stream)
        stream.end_claim()
        return first

    def discard(self, stream: ResumableStream, error: BaseException) -> None:
        """Forget a stream that was not started, because of that error. Whoever waits for it gets the same one."""
        del self._streams[stream.id]
        stream.upstream = None
        self._refuse(stream, error.copy() if isinstance(error, ChatError) else StoreUnavailable())
        stream.first_chunk_or_error.set()
        stream.end_claim()

    def start(self, stream: ResumableStream, batches: AsyncGenerator[Batch, None]) -> None:
        """Begin to read the answer, whoever listens. It takes the place of an older one with the same name."""
        if stream.name:
            self._names[stream.name] = stream
        task = asyncio.create_task(self._run(stream, batches))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def wait_for_status(self, stream: ResumableStream, caller: Caller) -> None:
        """Wait until the status of a stream is known, at most STATUS_HOLD seconds. Raises ChatError."""
        with self._readers.attached(stream, caller):
            await self._wait_for_status(stream)

    def follow(self, stream: ResumableStream, caller: Caller) -> AsyncGenerator[Frames, None]:
        """A stream from its start. Raises ChatError before the first frame, if no status was sent before."""
        return self.replay(stream, 0, caller)

    async def replay(self, stream: ResumableStream, after: int, caller: Caller) -> AsyncGenerator[Frames, None]:
        """What comes after that number: first what is kept, then what is still to come."""
        with self._readers.attached(stream, caller):
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
        """End an answer, if it is still running: by its id, or by its name. Raises StoreUnavailable."""
        if not self.stop_own(id) and id not in self._streams:
            await self._directory.stop(id)

    def stop_own(self, id: str) -> bool:
        """The same for answers of this process; whether it was one that is running."""
        stream = self._streams.get(id) or self._names.get(id.lower())
        if stream is None or stream.upstream is None:
            return False
        stream.upstream.cancel_with(Stopped())
        return True

    def note_left(self, id: str) -> None:
        """A reader has left another replica: the resume window begins then."""
        if (stream := self._streams.get(id)) is not None:
            self._readers.left(stream)

    def disown(self, id: str) -> None:
        """Other replicas took this one for dead, and have told an end of that answer. It goes on for readers here."""
        stream = self._streams.pop(id, None)
        if stream is not None:
            self._release_names(stream)
            stream.disowned = True
            if stream.upstream is not None and not stream.readers:
                stream.upstream.cancel_with(UpstreamCutOff())

    async def aclose(self) -> None:
        """End every stream without a word."""
        self._readers.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _wait_for_status(self, stream: ResumableStream) -> None:
        with anyio.move_on_after(self._settings.status_hold):
            await stream.first_chunk_or_error.wait()
        if stream.error is not None and not stream.status_sent:
            raise stream.error.copy()
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
            self._directory.note_read(stream)
            error = stream.error  # the store's: the end of the answer could not be kept
        except StreamNotFound:
            error = ReplayLost()
        except ChatError as failure:
            error = failure
        if error is not None:
            last = stream.reader_format().encode([Failed(error)])
            error = None  # its traceback holds this frame
            yield last, True

    async def _run(self, stream: ResumableStream, batches: AsyncGenerator[Batch, None]) -> None:
        """Read an answer to its end, keep its frames, and forget it in the end."""
        store, summary, format = self._store, stream.summary, stream.numbered_format()
        created = False
        try:
            async with aclosing(batches):  # after the end is told: Grok may take its time to close
                try:
                    await store.create(stream.id)
                    created = True
                    async for events, last in batches:  # pragma: no branch -- one is the last
                        frames = format.encode(events)
                        await store.append(stream.id, frames, last=last)
                        stream.written += len(frames)
                        stream.first_chunk_or_error.set()
                        if last:
                            break
                except ChatError as error:  # before Grok's first chunk, or the store's
                    await self._end_with_error(stream, error, format if created else None)
                except Exception:
                    log.exception("a resumable stream ended by a mistake of ours")
                    await self._end_with_error(stream, InternalError(), format if created else None)
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

    async def _end_with_error(self, stream: ResumableStream, error: ChatError, format: StreamFormat | None) -> None:
        """Tell it in the stream (in this format, if anything of the stream is kept), or to who waits for its status."""
        stream.summary.close("failed", error.code)
        if stream.status_sent and format is not None:
            try:
                await self._store.append(stream.id, format.encode([Failed(error)]), last=True)
                stream.written += 1
                return
            except ChatError as failure:
                log.warning("%s: the end of a stream could not be kept", failure.code)
            except Exception:
                log.exception("the end of a stream could not be kept")
        if stream.status_sent:
            stream.error = error.with_traceback(None)
        else:
            self._refuse(stream, error.with_traceback(None))

    def _refuse(self, stream: ResumableStream, error: ChatError) -> None:
        stream.error = error
        self._release_names(stream)  # the next try with this key starts anew
        self._directory.release(stream)

    def _forget(self, id: str) -> None:
        stream = self._streams.pop(id, None)
        if stream is None:  # disowned
            return
        self._release_names(stream)
        # The last frame is the end; before the first delta there may be others.
        self._metrics.unread_deltas.inc(max(0, min(stream.summary.deltas, stream.written - 1 - stream.read)))

    def _release_names(self, stream: ResumableStream) -> None:
        if stream.key and self._keys.get(stream.key) is stream:
            del self._keys[stream.key]
        if stream.name and self._names.get(stream.name) is stream:
            del self._names[stream.name]
