"""Who owns a resumable answer: one task that reads it, what is kept of it, its readers, its end.

Does not know HTTP, httpx, or what an event means: an answer is a row of frames numbered from 1.
"""

import asyncio
import logging
import re
import secrets
import sys
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager, suppress
from itertools import count
from typing import Protocol

from chatproxy import sse
from chatproxy.errors import (
    Abandoned,
    ChatError,
    InternalError,
    InvalidLastEventID,
    InvalidRequest,
    ReplayLost,
    Stopped,
    StreamNotFound,
)
from chatproxy.metrics import Metrics
from chatproxy.services.relay import Frame, Report, Step, failed

log = logging.getLogger(__name__)

# How long a browser waits before it reconnects, in milliseconds.
RECONNECTION_TIME = 2000

# The number in the id of `replay_lost`: an event after which there is nothing, whatever comes.
NOTHING_AFTER = 2**53 - 1

# So many frames go to a reader at once; a long replay must not become one huge write.
BATCH = 256


class Store(Protocol):
    """Where the frames of resumable answers are kept. Asynchronous, so that it may be another machine."""

    async def open(self, stream: str) -> None:
        """Begin a row of frames."""

    async def append(self, stream: str, frames: Sequence[bytes]) -> None:
        """Add frames to the row, and wake those who read it."""

    async def close(self, stream: str, keep: float) -> None:
        """Nothing will be appended any more; forget the row in `keep` seconds. Its readers may read on."""

    async def last(self, stream: str) -> tuple[int, bool]:
        """The number of the last frame, and whether the row is closed. Raises StreamNotFound."""

    def read(self, stream: str, after: int) -> AsyncGenerator[Sequence[bytes], None]:
        """The frames after that number, then those to come, until the row is closed.

        Raises StreamNotFound, and ReplayLost when some of them are no longer kept.
        """


class _Row:
    def __init__(self) -> None:
        self.frames: deque[bytes] = deque()
        self.dropped = 0
        self.size = 0
        self.closed = False
        self.changed = asyncio.Event()

    def drop_oldest(self) -> int:
        size = _size(self.frames.popleft())
        self.dropped += 1
        self.size -= size
        return size


def _size(frame: bytes) -> int:
    return sys.getsizeof(frame) + 8  # and its place in the row


class MemoryStore:
    """A Store in this process: at most `stream_bytes` for each row and `total_bytes` for all.

    When it is full, the oldest closed rows go first, then the oldest frames of the growing one.
    """

    def __init__(self, stream_bytes: int, total_bytes: int) -> None:
        self.size = 0
        self._stream_bytes = stream_bytes
        self._total_bytes = total_bytes
        self._rows: dict[str, _Row] = {}
        self._closed: dict[str, _Row] = {}  # the oldest first

    async def open(self, stream: str) -> None:
        self._rows[stream] = _Row()

    async def append(self, stream: str, frames: Sequence[bytes]) -> None:
        row = self._rows[stream]
        row.frames.extend(frames)
        size = sum(map(_size, frames))
        row.size += size
        self.size += size
        while row.size > self._stream_bytes:
            self.size -= row.drop_oldest()
        while self.size > self._total_bytes:
            if self._closed:
                oldest = self._forget(next(iter(self._closed)))
                while oldest.frames:  # from under its readers, too
                    oldest.drop_oldest()
            else:
                self.size -= row.drop_oldest()
        self._wake(row)

    async def close(self, stream: str, keep: float) -> None:
        row = self._closed[stream] = self._rows[stream]
        row.closed = True
        self._wake(row)
        asyncio.get_running_loop().call_later(keep, self._expire, stream)  # by its name: eviction may come first

    async def last(self, stream: str) -> tuple[int, bool]:
        row = self._row(stream)
        return row.dropped + len(row.frames), row.closed

    async def read(self, stream: str, after: int) -> AsyncGenerator[Sequence[bytes], None]:
        row = self._row(stream)
        while True:
            start = after - row.dropped
            if start < 0:
                raise ReplayLost
            end = min(start + BATCH, len(row.frames))
            if start < end:
                after += end - start
                yield [row.frames[i] for i in range(start, end)]
            elif row.closed:
                return
            else:
                await row.changed.wait()

    def _row(self, stream: str) -> _Row:
        try:
            return self._rows[stream]
        except KeyError:
            raise StreamNotFound from None

    def _expire(self, stream: str) -> None:
        if stream in self._rows:
            self._forget(stream)

    def _forget(self, stream: str) -> _Row:
        row = self._rows.pop(stream)
        del self._closed[stream]
        self.size -= row.size
        return row

    @staticmethod
    def _wake(row: _Row) -> None:
        row.changed.set()  # each waiter's own future is done by this
        row.changed.clear()


class Upstream(Protocol):
    """What an owner can do to the answer it reads."""

    def interrupt(self, error: Exception) -> None: ...


class Answer:
    """One resumable answer, from its request until it is forgotten."""

    def __init__(self, upstream: Upstream, report: Report, key: tuple[str, str] | None, digest: bytes) -> None:
        id = self.id = secrets.token_urlsafe(16)  # 128 bits: it is the ticket of whoever reads the answer
        self.upstream: Upstream | None = upstream  # until it has ended
        self.report = report
        self.key = key
        self.digest = digest
        self.decided = asyncio.Event()  # Grok's first chunk is here, or its refusal
        self.refused: ChatError | None = None
        self.told = False  # the caller has its status, and so the id
        self.readers = 0
        self.written = 0
        self.read = 0  # the highest number given to any reader
        self.farewell: asyncio.TimerHandle | None = None
        numbers = count(1)
        self.frame: Frame = lambda data, type: sse.encode(data, type, f"{id}-{next(numbers)}")


class Streams:
    """The resumable answers of this process."""

    def __init__(self, store: Store, resume_window: float, replay_ttl: float, metrics: Metrics) -> None:
        self._store = store
        self._resume_window = resume_window
        self._replay_ttl = replay_ttl
        self._metrics = metrics
        self._answers: dict[str, Answer] = {}
        self._keys: dict[object, Answer] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def find(self, stream: str) -> Answer:
        """Raises StreamNotFound."""
        try:
            return self._answers[stream]
        except KeyError:
            raise StreamNotFound from None

    def find_key(self, key: tuple[str, str] | None, digest: bytes) -> Answer | None:
        """The answer that was started with this idempotency key. Raises InvalidRequest if it had another body."""
        answer = self._keys.get(key) if key else None
        if answer and answer.digest != digest:
            raise InvalidRequest("This Idempotency-Key was used with another body.", param="Idempotency-Key")
        return answer

    def start(
        self,
        events: Callable[[Frame], AsyncGenerator[Step, None]],
        upstream: Upstream,
        report: Report,
        key: tuple[str, str] | None = None,
        digest: bytes = b"",
    ) -> Answer:
        """Begin to read `events` (made from the answer's own framing), whoever listens."""
        answer = Answer(upstream, report, key, digest)
        self._answers[answer.id] = answer
        if key:
            self._keys[key] = answer
        task = asyncio.create_task(self._own(answer, events(answer.frame)))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return answer

    async def decide(self, answer: Answer, hold: float) -> None:
        """Wait until the status of `answer` is known, at most `hold` seconds. Raises ChatError."""
        with self._reading(answer):
            with suppress(TimeoutError):
                async with asyncio.timeout(hold):
                    await answer.decided.wait()
            if answer.refused:
                raise answer.refused
            answer.told = True

    async def follow(self, answer: Answer, hold: float) -> AsyncGenerator[Step, None]:
        """The answer from its start, for the caller who asked. Raises ChatError before the first frame."""
        await self.decide(answer, hold)
        async with aclosing(self.replay(answer, 0)) as steps:
            async for step in steps:
                yield step

    async def replay(self, answer: Answer, after: int) -> AsyncGenerator[Step, None]:
        """What comes after that number: first what is kept, then what is still to come."""
        with self._reading(answer):
            yield [sse.opening(f"{answer.id}-{after}", RECONNECTION_TIME)], False
            try:
                if after == NOTHING_AFTER:
                    raise ReplayLost
                async with aclosing(self._store.read(answer.id, after)) as batches:
                    async for batch in batches:
                        after += len(batch)
                        answer.read = max(answer.read, after)
                        yield batch, False
            except (ReplayLost, StreamNotFound):
                id = f"{answer.id}-{NOTHING_AFTER}"
                lost = failed(ReplayLost(), answer.report.request_id, lambda data, type: sse.encode(data, type, id))
                yield [lost], True

    async def position(self, answer: Answer, last_event_id: str) -> tuple[int, bool]:
        """The number in that id, and whether anything comes after it. Raises InvalidLastEventID."""
        stream, _, number = last_event_id.rpartition("-")
        if stream != answer.id or not re.fullmatch(r"[0-9]{1,16}", number):
            raise InvalidLastEventID
        after = int(number)
        if after == NOTHING_AFTER:
            return after, False
        try:
            last, closed = await self._store.last(stream)
        except StreamNotFound:  # dropped to make room for others: who still needs it is told by `replay`
            last, closed = answer.written, True
        if after > last:
            raise InvalidLastEventID
        return after, after < last or not closed

    def stop(self, stream: str) -> None:
        """Hang up, if that answer is still running."""
        if (answer := self._answers.get(stream)) and answer.upstream:
            answer.upstream.interrupt(Stopped())

    async def aclose(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _own(self, answer: Answer, events: AsyncGenerator[Step, None]) -> None:
        """Read an answer to its end, keep it, and forget it in the end."""
        store, report = self._store, answer.report
        await store.open(answer.id)
        async with aclosing(events):  # after the end is told: Grok may take its time to close
            try:
                async for frames, last in events:  # pragma: no branch -- one is the last
                    await store.append(answer.id, frames)
                    answer.written += len(frames)
                    answer.decided.set()
                    if last:
                        break
            except ChatError as error:  # before Grok's first chunk
                await self._fail(answer, error)
            except Exception:
                log.exception("an answer ended by a mistake of ours")
                await self._fail(answer, InternalError())
            finally:
                answer.upstream = None
                answer.decided.set()
                if answer.farewell:
                    answer.farewell.cancel()
                keep = 0 if answer.refused else self._replay_ttl
                await store.close(answer.id, keep)
                asyncio.get_running_loop().call_later(keep, self._forget, answer.id)
                report.count(self._metrics)
                if not answer.refused:  # else its request's own line tells it
                    log.info("stream ended", extra={"request_id": report.request_id, **report.fields()})

    async def _fail(self, answer: Answer, error: ChatError) -> None:
        answer.report.fail(error)
        if answer.told:
            answer.written += 1
            await self._store.append(answer.id, [failed(error, answer.report.request_id, answer.frame)])
        else:
            answer.refused = error
            self._keys.pop(answer.key, None)  # the next try with this key starts anew

    def _forget(self, stream: str) -> None:
        answer = self._answers.pop(stream)
        if self._keys.get(answer.key) is answer:
            del self._keys[answer.key]
        # The last frame is the end; before the first delta there may be others.
        self._metrics.unread_deltas.inc(max(0, min(answer.report.deltas, answer.written - 1 - answer.read)))

    @contextmanager
    def _reading(self, answer: Answer) -> Iterator[None]:
        """Somebody reads. When nobody does any more, Grok is hung up after the resume window."""
        answer.readers += 1
        if answer.farewell:
            answer.farewell.cancel()
        try:
            yield
        finally:
            answer.readers -= 1
            if not answer.readers and answer.upstream:
                # Whoever left before the status, and gave no key, has no way to come back.
                window = self._resume_window if answer.told or answer.key else 0
                loop = asyncio.get_running_loop()
                answer.farewell = loop.call_later(window, answer.upstream.interrupt, Abandoned())
