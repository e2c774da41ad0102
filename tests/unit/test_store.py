"""What is kept of resumable answers: exact rows, within bounds, forgotten in time; and their owner over any store."""

import asyncio
import gc
import weakref
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

import pytest

from chatproxy.config import load
from chatproxy.errors import (
    Abandoned,
    Busy,
    ChatError,
    InvalidRequest,
    RateLimited,
    ReplayLost,
    Stopped,
    StoreUnavailable,
    StreamNotFound,
)
from chatproxy.events import Done, Finished, Started, StreamSummary, TextDelta
from chatproxy.formats.plain import Plain
from chatproxy.metrics import Metrics
from chatproxy.services.access import Caller
from chatproxy.services.limits import ReaderLimit
from chatproxy.services.relay import Batch
from chatproxy.services.resumable import ResumableStream
from chatproxy.services.store import MAX_BATCH_BYTES, MAX_BATCH_FRAMES, EventStore, MemoryStore, _size
from chatproxy.services.streams import StreamRegistry
from tests.conftest import environment
from tests.readers import Event, standard

pytestmark = pytest.mark.anyio

PLENTY = 10_000_000
SIZE = _size(b"x")


def row(*numbers: int) -> list[bytes]:
    return [bytes([65 + number]) for number in numbers]


async def read(store: EventStore, stream: str, after: int = 0) -> list[bytes]:
    async with asyncio.timeout(5), aclosing(store.read(stream, after)) as batches:
        return [frame async for batch in batches for frame in batch]


async def test_rows() -> None:
    """A reader gets what comes after its number, in order, from its own row."""
    store = MemoryStore(PLENTY, PLENTY)
    for name in ("a", "b"):
        await store.create(name)
    await store.append("a", row(1, 2))
    await store.append("b", row(7))
    await store.append("a", [])
    await store.append("a", row(3))
    assert await store.last("a") == (3, False)
    for name in ("a", "b"):
        await store.close(name, 60)
    assert await store.last("a") == (3, True)
    assert await read(store, "a") == row(1, 2, 3)
    assert await read(store, "a", 2) == row(3)
    assert await read(store, "a", 3) == []
    assert await read(store, "b") == row(7)


async def test_readers_wait() -> None:
    """Any number of readers follow a row that grows, each from where it is; a stuck one holds up no other."""
    store = MemoryStore(PLENTY, PLENTY)
    await store.create("a")
    stuck = store.read("a", 0)
    waiting = [asyncio.create_task(read(store, "a", after)) for after in (0, 0, 1, 3)]
    for number in range(5):
        await store.append("a", row(number))
        if number == 0:
            assert await anext(stuck) == row(0)
        await asyncio.sleep(0)
    await store.close("a", 60)
    assert await asyncio.gather(*waiting) == [row(0, 1, 2, 3, 4)] * 2 + [row(1, 2, 3, 4), row(3, 4)]
    assert [batch async for batch in stuck] == [row(1, 2, 3, 4)]


async def test_long_rows_come_in_batches() -> None:
    """A long row is read in pieces of a bounded size."""
    store = MemoryStore(PLENTY, PLENTY)
    await store.create("a")
    await store.append("a", [b"x"] * (2 * MAX_BATCH_FRAMES + 1))
    await store.close("a", 60)
    assert [len(batch) async for batch in store.read("a", 0)] == [MAX_BATCH_FRAMES, MAX_BATCH_FRAMES, 1]


async def test_unknown_rows() -> None:
    """A row that is not there is told from one that is empty."""
    store = MemoryStore(PLENTY, PLENTY)
    with pytest.raises(StreamNotFound):
        await store.last("a")
    with pytest.raises(StreamNotFound):
        await read(store, "a")
    await store.create("a")
    assert await store.last("a") == (0, False)


async def test_bound_of_a_row() -> None:
    """Of a row too long the oldest frames go; who needs one of them is told, who does not reads on."""
    store = MemoryStore(3 * SIZE, PLENTY)
    await store.create("a")
    slow = store.read("a", 0)
    await store.append("a", row(0))
    assert await anext(slow) == row(0)
    await store.append("a", row(1, 2, 3, 4))
    assert store.size == 3 * SIZE
    assert await store.last("a") == (5, False)
    with pytest.raises(ReplayLost):
        await anext(slow)
    await store.close("a", 60)
    with pytest.raises(ReplayLost):
        await read(store, "a", 1)
    assert await read(store, "a", 2) == row(2, 3, 4)


async def test_bound_of_all() -> None:
    """When all together are too much, the oldest closed rows go, whoever reads them; then frames of the growing one."""
    store = MemoryStore(PLENTY, 6 * SIZE)
    for name in "abc":
        await store.create(name)
        await store.append(name, row(0, 1))
    await store.close("b", 60)
    await store.close("a", 60)
    reading = store.read("b", 0)
    assert await anext(reading) == row(0, 1)
    slow = store.read("b", 1)
    await store.append("c", row(2))
    with pytest.raises(StreamNotFound):  # closed first
        await store.last("b")
    assert await read(store, "a") == row(0, 1)
    assert [batch async for batch in reading] == []  # it had everything
    with pytest.raises(StreamNotFound):
        await anext(slow)
    await store.append("c", row(3, 4))
    with pytest.raises(StreamNotFound):
        await store.last("a")
    await store.append("c", row(5, 6))
    assert store.size == 6 * SIZE
    with pytest.raises(ReplayLost):
        await anext(store.read("c", 0))
    assert await anext(store.read("c", 1)) == row(1, 2, 3, 4, 5, 6)


async def test_evicted_under_a_reader() -> None:
    """A reader whose row is dropped half-way is told, and gets no gap."""
    store = MemoryStore(PLENTY, (MAX_BATCH_FRAMES + 2) * SIZE)
    await store.create("a")
    await store.append("a", [b"x"] * (MAX_BATCH_FRAMES + 1))
    await store.close("a", 60)
    reading = store.read("a", 0)
    await anext(reading)
    await store.create("b")
    await store.append("b", [b"x"] * 2)
    with pytest.raises(ReplayLost):
        await anext(reading)


async def test_expiry() -> None:
    """A closed row is forgotten after its time; what is dropped before is not missed then."""
    store = MemoryStore(PLENTY, 2 * SIZE)
    for name, keep in {"a": 0.05, "b": 0.1}.items():
        await store.create(name)
        await store.append(name, row(0, 1))
        await store.close(name, keep)
    gone = asyncio.Event()
    asyncio.get_running_loop().call_later(0.15, gone.set)
    await gone.wait()
    assert store.size == 0
    with pytest.raises(StreamNotFound):
        await store.last("b")


async def test_size_is_what_is_kept() -> None:
    """The size that is bounded is that of the memory: of each frame, and its place."""
    store = MemoryStore(PLENTY, PLENTY)
    await store.create("a")
    await store.append("a", [b"x" * 1000, b""])
    assert 1000 + 2 * 33 < store.size < 1000 + 2 * 64


# The owner of the answers, over a store that is somewhere else.


class Remote:
    """An EventStore whose every answer takes a while."""

    def __init__(self) -> None:
        self._store = MemoryStore(PLENTY, PLENTY)

    async def create(self, stream: str) -> None:
        await asyncio.sleep(0.001)
        await self._store.create(stream)

    async def append(self, stream: str, frames: Sequence[bytes], *, last: bool = False) -> None:
        await asyncio.sleep(0.001)
        await self._store.append(stream, frames, last=last)

    async def close(self, stream: str, keep: float) -> None:
        await asyncio.sleep(0.001)
        await self._store.close(stream, keep)

    async def last(self, stream: str) -> tuple[int, bool]:
        await asyncio.sleep(0.001)
        return await self._store.last(stream)

    async def read(self, stream: str, after: int) -> AsyncGenerator[Sequence[bytes], None]:
        await asyncio.sleep(0.001)
        async for batch in self._store.read(stream, after):
            await asyncio.sleep(0.001)
            yield batch


class Upstream:
    """What a stream is made of: who is cancelled, and why."""

    def __init__(self) -> None:
        self.cancelled: asyncio.Queue[Exception] = asyncio.Queue()

    def cancel_with(self, error: Exception) -> None:
        self.cancelled.put_nowait(error)


CALLER = Caller("192.0.2.1", "192.0.2.1")
TOKENS = [str(number) for number in range(50)]


def registry(store: EventStore, metrics: Metrics | None = None, **changes: object) -> StreamRegistry:
    settings = load(environment("http://127.0.0.1/v1", **changes))
    return StreamRegistry(store, settings, ReaderLimit(settings), metrics or Metrics())


def new(key: tuple[str, str] | None = None, digest: bytes = b"", upstream: Upstream | None = None) -> ResumableStream:
    return ResumableStream(
        upstream or Upstream(), StreamSummary("id"), lambda _, frame: Plain("id", (), frame), key, digest
    )


async def batches(tokens: Sequence[str] = TOKENS) -> AsyncGenerator[Batch, None]:
    yield [Started()], False
    for token in tokens:
        await asyncio.sleep(0)
        yield [TextDelta(token)], False
    yield [Finished(), Done()], True


async def endless() -> AsyncGenerator[Batch, None]:
    while True:
        yield [TextDelta("a")], False
        await asyncio.sleep(0.001)


async def begin(
    streams: StreamRegistry, stream: ResumableStream, made_of: AsyncGenerator[Batch, None]
) -> ResumableStream:
    assert await streams.claim(stream) is stream
    streams.start(stream, made_of)
    return stream


@pytest.mark.parametrize("store", [MemoryStore(PLENTY, PLENTY), Remote()], ids=["memory", "remote"])
async def test_any_store(store: EventStore) -> None:
    """Readers that come at any time, from any position, get the same events, wherever they are kept."""
    streams = registry(store)
    stream = await begin(streams, new(), batches())
    expected = [Event(token, id=f"{stream.id}-{number}") for number, token in enumerate([*TOKENS, "[DONE]"], 1)]

    async def resume(after: int) -> list[Event]:
        number, more = await streams.parse_last_event_id(stream, f"{stream.id}-{after}")
        assert more
        replay = streams.replay(stream, number, CALLER)
        return standard(b"".join([frame async for frames, _ in replay for frame in frames]))

    first = standard(b"".join([frame async for frames, _ in streams.follow(stream, CALLER) for frame in frames]))
    assert first == expected
    for start in (0, 30):
        numbers = range(start, min(start + 30, 51))
        assert await asyncio.gather(*map(resume, numbers)) == [expected[after:] for after in numbers]
    assert await streams.parse_last_event_id(stream, f"{stream.id}-51") == (51, False)
    await streams.aclose()


async def test_nothing_is_left_of_the_store() -> None:
    """A forgotten stream leaves nothing behind: no frames, no key, no object."""
    store = MemoryStore(PLENTY, PLENTY)
    streams = registry(store, replay_ttl=0.02)
    stream = await begin(streams, new(("a", "key"), b"digest"), batches())
    assert await streams.claim(new(("a", "key"), b"digest")) is stream
    with pytest.raises(InvalidRequest):
        await streams.claim(new(("a", "key"), b"other"))
    another = new(("b", "key"), b"other")
    assert await streams.claim(another) is another
    streams.discard(another, RateLimited())
    async with asyncio.timeout(5):
        async for _ in streams.follow(stream, CALLER):
            pass
        gone = asyncio.Event()
        weakref.finalize(stream, gone.set)
        id = stream.id
        del stream
        while not gone.is_set():
            await asyncio.sleep(0.01)
            gc.collect()
    with pytest.raises(StreamNotFound):
        await streams.find(id)
    later = new(("a", "key"), b"other")
    assert await streams.claim(later) is later
    assert store.size == 0
    await streams.aclose()


async def test_cancellations() -> None:
    """Upstream is cancelled when nobody reads for a while, or on request; each time it is told why."""
    streams = registry(MemoryStore(PLENTY, PLENTY), resume_window=0.02)
    upstream = Upstream()
    stream = await begin(streams, new(upstream=upstream), endless())
    async with asyncio.timeout(5):
        await streams.wait_for_status(stream, CALLER)
        assert isinstance(await upstream.cancelled.get(), Abandoned)
        await streams.stop(stream.id)
        assert isinstance(await upstream.cancelled.get(), Stopped)
    await streams.stop("another")
    assert upstream.cancelled.empty()
    await streams.aclose()


async def test_closing() -> None:
    """When the service ends, streams that are still made are ended with it."""
    streams = registry(MemoryStore(PLENTY, PLENTY))
    stream = await begin(streams, new(), endless())
    await streams.wait_for_status(stream, CALLER)
    async with asyncio.timeout(5):
        await streams.aclose()
    assert stream.upstream is None
    assert stream.summary.end == "left"
    written = stream.written
    await asyncio.sleep(0.01)
    assert stream.written == written


# A store that fails.


class Failing(MemoryStore):
    """A store that is out of reach from some call on."""

    def __init__(self, calls: int, error: Exception | None = None) -> None:
        super().__init__(PLENTY, PLENTY)
        self._left = calls
        self._error = error or StoreUnavailable()

    def _call(self) -> None:
        if not self._left:
            raise self._error
        self._left -= 1

    async def create(self, stream: str) -> None:
        self._call()
        await super().create(stream)

    async def append(self, stream: str, frames: Sequence[bytes], *, last: bool = False) -> None:
        self._call()
        await super().append(stream, frames, last=last)


async def test_store_that_cannot_begin() -> None:
    """The client is told at once, and nothing is kept of the stream, nor of its key."""
    streams = registry(Failing(0), status_hold=60, replay_ttl=60)
    stream = await begin(streams, new(("a", "key")), batches())
    async with asyncio.timeout(5):
        with pytest.raises(StoreUnavailable):
            await streams.wait_for_status(stream, CALLER)
        again = new(("a", "key"))
        assert await streams.claim(again) is again
        while True:
            try:
                await streams.find(stream.id)
            except StreamNotFound:
                break
            await asyncio.sleep(0)
    assert stream.summary.code == "store_unavailable"
    await streams.aclose()


async def test_store_that_fails_in_the_middle() -> None:
    """Readers get what was kept, and then the error instead of silence."""
    streams = registry(Failing(12))
    stream = await begin(streams, new(), batches())
    async with asyncio.timeout(5):
        read = [frame async for frames, _ in streams.follow(stream, CALLER) for frame in frames]
    *tokens, end = standard(b"".join(read))
    assert [event.data for event in tokens] == TOKENS[:10]
    assert (end.type, "store_unavailable" in end.data) == ("error", True)
    await streams.aclose()


async def test_store_with_a_mistake(caplog: pytest.LogCaptureFixture) -> None:
    """Any other error of a store is a mistake of ours, and ends the stream as one."""
    streams = registry(Failing(12, ValueError("canary")))
    stream = await begin(streams, new(), batches())
    async with asyncio.timeout(5):
        read = [frame async for frames, _ in streams.follow(stream, CALLER) for frame in frames]
    assert "internal_error" in standard(b"".join(read))[-1].data
    assert "a resumable stream ended by a mistake of ours" in caplog.messages
    caplog.clear()
    await streams.aclose()


# What goes first when there is too much.


async def test_slow_readers_hold_nothing_that_is_not_counted() -> None:
    """What readers of closed and expired streams still need is counted, and goes when there is too much."""
    store = MemoryStore(PLENTY, 10 * SIZE)
    readers = []
    for name in "abcde":
        await store.create(name)
        await store.append(name, row(0, 1, 2))
        readers.append(store.read(name, 0))
        assert await anext(readers[-1]) == row(0, 1, 2)
        await store.close(name, 0.01)
        assert store.size <= 10 * SIZE
    held = store.size
    expired = asyncio.Event()
    asyncio.get_running_loop().call_later(0.05, expired.set)
    await expired.wait()
    assert store.size == held > 0
    for reader in readers:
        await reader.aclose()
    assert store.size == 0


async def test_new_streams_lose_nothing_to_older_ones() -> None:
    """When running streams fill the memory, the largest one gives, and not the one that has just begun."""
    store = MemoryStore(PLENTY, 20 * SIZE)
    await store.create("old")
    await store.append("old", [b"x"] * 18)
    await store.create("new")
    reading = store.read("new", 0)
    await store.append("new", row(0))
    assert await anext(reading) == row(0)
    for number in range(1, 8):
        await store.append("new", row(number))
        assert store.size <= 20 * SIZE
    assert await anext(reading) == row(1, 2, 3, 4, 5, 6, 7)
    with pytest.raises(ReplayLost):
        await anext(store.read("old", 0))


async def test_no_room_for_another_stream() -> None:
    """Where nothing can go without a reader's loss, a new stream is refused; once something was read, it is not."""
    store = MemoryStore(PLENTY, 20 * SIZE)
    await store.create("a")
    await store.append("a", [b"x"] * 20)
    with pytest.raises(Busy):
        await store.create("b")
    reading = store.read("a", 0)
    await anext(reading)
    waiting = asyncio.create_task(anext(reading))
    await asyncio.sleep(0)
    await store.create("b")
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)


async def test_batches_of_large_frames() -> None:
    """A batch has a bounded size, but always a frame."""
    store = MemoryStore(PLENTY, PLENTY)
    await store.create("a")
    large = b"x" * (MAX_BATCH_BYTES // 2)
    await store.append("a", [large, large, b"y", large * 5, b"z"])
    await store.close("a", 60)
    assert [len(batch) async for batch in store.read("a", 0)] == [2, 1, 1, 1]


async def test_readers_are_bounded() -> None:
    """Of one stream so many read at a time, and of one client so many of all; a reader who goes makes room."""
    streams = registry(MemoryStore(PLENTY, PLENTY), max_streams_per_client=1)
    stream = await begin(streams, new(), endless())
    kept = [streams.replay(stream, 0, Caller(str(number % 16), "")) for number in range(32)]
    for replay in kept:
        await anext(replay)
    with pytest.raises(Busy):
        await anext(streams.replay(stream, 0, Caller("another", "")))
    await kept.pop().aclose()
    other = await begin(streams, new(), endless())
    for _ in range(2):
        kept.append(streams.replay(other, 0, Caller("0", "")))
        await anext(kept[-1])
    with pytest.raises(ChatError) as error:
        await anext(streams.replay(other, 0, Caller("0", "")))
    assert error.value.code == "rate_limited"
    for replay in kept:
        await replay.aclose()
    await anext(streams.replay(stream, 0, CALLER))
    await streams.aclose()
