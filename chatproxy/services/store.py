"""Where the frames of resumable streams are kept: a protocol, and its implementation in memory.

A stream is a row of frames, numbered from 1. Does not know what a frame means.
"""

import asyncio
import sys
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from typing import Protocol

from chatproxy.errors import Busy, ReplayLost, StreamNotFound

# What a reader is given at once, at most: a long replay must not become one huge write.
MAX_BATCH_FRAMES = 256
MAX_BATCH_BYTES = 65_536


class StoreState(Protocol):
    """Whether what is kept can be reached."""

    @property
    def seen(self) -> bool:
        """It could be, at least once."""

    @property
    def available(self) -> bool:
        """It can be now."""


class EventStore(Protocol):
    """Keeps frames for readers that come back. Any call may raise a ServiceError if the store is out of reach."""

    async def create(self, stream: str) -> None:
        """Begin a stream. Raises Busy if there is no room for another one."""

    async def append(self, stream: str, frames: Sequence[bytes], *, last: bool = False) -> None:
        """Add frames to a stream, and wake those who read it. `last`: the answer's end is the last of them."""

    async def close(self, stream: str, keep: float) -> None:
        """Nothing will be appended any more; forget the stream in `keep` seconds. Its readers may read on."""

    async def last(self, stream: str) -> tuple[int, bool]:
        """The number of the last frame, and whether the stream is closed. Raises StreamNotFound."""

    def read(self, stream: str, after: int) -> AsyncGenerator[Sequence[bytes], None]:
        """The frames after that number, then those to come, until the stream is closed.

        Raises StreamNotFound, and ReplayLost when some of them are no longer kept.
        """


class _Log:
    """The frames of one stream, and how far its readers are."""

    def __init__(self) -> None:
        self.frames: deque[bytes] = deque()
        self.dropped = 0  # so many frames from the beginning are no longer kept
        self.size = 0  # bytes
        self.closed = self.expired = False
        self.changed = asyncio.Event()
        self.positions: dict[object, int] = {}  # of each reader: the number of the last frame that it was given
        self.read = 0  # every reader was given the frames up to this number

    def move(self, reader: object, position: int) -> None:
        self.positions[reader] = position
        self.read = max(self.read, min(self.positions.values()))

    def drop_oldest(self) -> int:
        """Forget one frame; gives its size."""
        size = _size(self.frames.popleft())
        self.dropped += 1
        self.size -= size
        return size


def _size(frame: bytes) -> int:
    return sys.getsizeof(frame) + 8  # and its place in the log


class MemoryStore:
    """An EventStore in this process: at most `stream_bytes` for each stream and `total_bytes` for all.

    When it is full, the oldest closed streams go first, then what all readers of a running one have read, the largest
    stream first, and at last the oldest frames of the largest stream. So a new stream loses nothing to older ones; it
    is refused where nothing can go.
    """

    seen = available = True  # see StoreState

    def __init__(self, stream_bytes: int, total_bytes: int) -> None:
        self.size = 0  # bytes that are held, also for readers of streams that are closed or expired
        self._stream_bytes = stream_bytes
        self._total_bytes = total_bytes
        self._logs: dict[str, _Log] = {}
        self._closed: dict[str, _Log] = {}  # the oldest first

    async def create(self, stream: str) -> None:
        """Begin a stream."""
        self.begin(stream)

    def begin(self, stream: str, dropped: int = 0) -> None:
        """`create` without waiting; so many frames from the beginning are not kept. Raises Busy."""
        if self.size >= self._total_bytes:
            self._make_room(self._total_bytes - self._total_bytes // 20, unread=False)
            if self.size >= self._total_bytes:
                raise Busy
        log = self._logs[stream] = _Log()
        log.dropped = dropped

    async def append(self, stream: str, frames: Sequence[bytes], *, last: bool = False) -> None:  # noqa: ARG002
        """Add frames."""
        self.add(stream, frames)

    def add(self, stream: str, frames: Sequence[bytes]) -> None:
        """`append` without waiting."""
        log = self._logs[stream]
        log.frames.extend(frames)
        size = sum(map(_size, frames))
        log.size += size
        self.size += size
        while log.size > self._stream_bytes:
            self.size -= log.drop_oldest()
        if self.size > self._total_bytes:
            # A little more than needed, so that the next frames find room without another look at all streams.
            self._make_room(self._total_bytes - self._total_bytes // 20, unread=False)
            if self.size > self._total_bytes:
                self._make_room(self._total_bytes, unread=True)
        self._wake(log)

    async def close(self, stream: str, keep: float) -> None:
        """End a stream."""
        self.finish(stream)
        asyncio.get_running_loop().call_later(keep, self._expire, stream)  # by its name: eviction may come first

    def finish(self, stream: str) -> None:
        """`close` without waiting, for a stream that is kept until `forget` or eviction."""
        log = self._closed[stream] = self._logs[stream]
        log.closed = True
        self._wake(log)

    def peek(self, stream: str, after: int, max_bytes: int) -> tuple[int, int, list[bytes]]:
        """How many frames are no longer kept, the last one's number, and what is next after `after`.

        Where that is no longer kept, it is the first that is; at least one, if there is one. Raises StreamNotFound.
        """
        log = self._log(stream)
        frames = _batch(log.frames, max(0, after - log.dropped), max_bytes)
        return log.dropped, log.dropped + len(log.frames), frames

    def __contains__(self, stream: str) -> bool:
        return stream in self._logs

    def forget(self, stream: str) -> None:
        """Keep nothing of a stream, if anything is."""
        if stream in self._logs:
            self._closed.setdefault(stream, self._logs[stream])
            self._forget(stream)

    async def last(self, stream: str) -> tuple[int, bool]:
        """Where a stream ends."""
        log = self._log(stream)
        return log.dropped + len(log.frames), log.closed

    async def read(self, stream: str, after: int) -> AsyncGenerator[Sequence[bytes], None]:
        """The frames after that number."""
        log = self._log(stream)
        reader = object()
        log.move(reader, after)
        try:
            while True:
                start = after - log.dropped
                if start < 0:
                    raise ReplayLost
                if batch := _batch(log.frames, start, MAX_BATCH_BYTES):
                    after += len(batch)
                    yield batch
                    log.move(reader, after)
                elif log.closed:
                    return
                else:
                    await log.changed.wait()
        finally:
            del log.positions[reader]
            if log.expired and not log.positions and stream in self._closed:
                self._forget(stream)

    def _log(self, stream: str) -> _Log:
        try:
            return self._logs[stream]
        except KeyError:
            raise StreamNotFound from None

    def _make_room(self, size: int, *, unread: bool) -> None:
        """Forget until no more than `size` bytes are held; `unread`: also what some reader still needs."""
        while self.size > size and self._closed:
            self._forget(next(iter(self._closed)))
        logs = sorted(self._logs.values(), key=lambda log: log.size, reverse=True)
        for number, log in enumerate(logs):
            # With `unread`, down to the size of the next smaller one: then they give in turn.
            floor = logs[number + 1].size if number + 1 < len(logs) else 0
            while self.size > size and log.frames and (log.dropped < log.read or (unread and log.size > floor)):
                self.size -= log.drop_oldest()
        if unread and logs:
            while self.size > size:
                largest = max(logs, key=lambda log: log.size)
                if not largest.frames:  # pragma: no cover -- then nothing is held
                    break
                self.size -= largest.drop_oldest()

    def _expire(self, stream: str) -> None:
        log = self._closed.get(stream)
        if log is None:
            return
        log.expired = True
        if not log.positions:
            self._forget(stream)

    def _forget(self, stream: str) -> None:
        log = self._logs.pop(stream)
        del self._closed[stream]
        while log.frames:  # from under its readers, too: they would go on holding what nobody counts
            self.size -= log.drop_oldest()

    @staticmethod
    def _wake(log: _Log) -> None:
        log.changed.set()  # each waiter's own future is done by this
        log.changed.clear()


def _batch(frames: deque[bytes], start: int, max_bytes: int) -> list[bytes]:
    """The next frames, up to the bounds of a batch; at least one if there is one."""
    batch: list[bytes] = []
    size = 0
    for i in range(start, min(start + MAX_BATCH_FRAMES, len(frames))):
        size += len(frames[i])
        if batch and size > max_bytes:
            break
        batch.append(frames[i])
    return batch
