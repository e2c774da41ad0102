"""What is kept of resumable answers: exact rows, within bounds, forgotten in time; and their owner over any store."""

import asyncio
import gc
import weakref
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

import pytest

from chatproxy.errors import Abandoned, ReplayLost, Stopped, StreamNotFound
from chatproxy.metrics import Metrics
from chatproxy.services.relay import Frame, Report, Step
from chatproxy.services.streams import BATCH, MemoryStore, Store, Streams, _size
from tests.readers import Event, standard

pytestmark = pytest.mark.anyio

PLENTY = 10_000_000
SIZE = _size(b"x")


def row(*numbers: int) -> list[bytes]:
    return [bytes([65 + number]) for number in numbers]


async def read(store: Store, stream: str, after: int = 0) -> list[bytes]:
    async with asyncio.timeout(5), aclosing(store.read(stream, after)) as batches:
        return [frame async for batch in batches for frame in batch]


async def test_rows() -> None:
    """A reader gets what comes after its number, in order, from its own row."""
    store = MemoryStore(PLENTY, PLENTY)
    for name in ("a", "b"):
        await store.open(name)
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
    await store.open("a")
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
    await store.open("a")
    await store.append("a", [b"x"] * (2 * BATCH + 1))
    await store.close("a", 60)
    assert [len(batch) async for batch in store.read("a", 0)] == [BATCH, BATCH, 1]


async def test_unknown_rows() -> None:
    """A row that is not there is told from one that is empty."""
    store = MemoryStore(PLENTY, PLENTY)
    with pytest.raises(StreamNotFound):
        await store.last("a")
    with pytest.raises(StreamNotFound):
        await read(store, "a")
    await store.open("a")
    assert await store.last("a") == (0, False)


async def test_bound_of_a_row() -> None:
    """Of a row too long the oldest frames go; who needs one of them is told, who does not reads on."""
    store = MemoryStore(3 * SIZE, PLENTY)
    await store.open("a")
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
        await store.open(name)
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
    store = MemoryStore(PLENTY, (BATCH + 2) * SIZE)
    await store.open("a")
    await store.append("a", [b"x"] * (BATCH + 1))
    await store.close("a", 60)
    reading = store.read("a", 0)
    await anext(reading)
    await store.open("b")
    await store.append("b", [b"x"] * 2)
    with pytest.raises(ReplayLost):
        await anext(reading)


async def test_expiry() -> None:
    """A closed row is forgotten after its time; what is dropped before is not missed then."""
    store = MemoryStore(PLENTY, 2 * SIZE)
    for name, keep in {"a": 0.05, "b": 0.1}.items():
        await store.open(name)
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
    await store.open("a")
    await store.append("a", [b"x" * 1000, b""])
    assert 1000 + 2 * 33 < store.size < 1000 + 2 * 64


# The owner of the answers, over a store that is somewhere else.


class Remote:
    """A Store whose every answer takes a while."""

    def __init__(self) -> None:
        self._store = MemoryStore(PLENTY, PLENTY)

    async def open(self, stream: str) -> None:
        await asyncio.sleep(0.001)
        await self._store.open(stream)

    async def append(self, stream: str, frames: Sequence[bytes]) -> None:
        await asyncio.sleep(0.001)
        await self._store.append(stream, frames)

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
    """What an owner interrupts, and why."""

    def __init__(self) -> None:
        self.interrupted: asyncio.Queue[Exception] = asyncio.Queue()

    def interrupt(self, error: Exception) -> None:
        self.interrupted.put_nowait(error)


TOKENS = [str(number) for number in range(50)]


async def events(frame: Frame) -> AsyncGenerator[Step, None]:
    for token in TOKENS:
        await asyncio.sleep(0)
        yield [frame(token, None)], False
    yield [frame("[DONE]", None)], True


@pytest.mark.parametrize("store", [MemoryStore(PLENTY, PLENTY), Remote()], ids=["memory", "remote"])
async def test_any_store(store: Store) -> None:
    """Readers that come at any time, from any position, get the same events, wherever they are kept."""
    streams = Streams(store, 60, 60, Metrics())
    answer = streams.start(events, Upstream(), Report("id"))
    expected = [Event(token, id=f"{answer.id}-{number}") for number, token in enumerate([*TOKENS, "[DONE]"], 1)]

    async def resume(after: int) -> list[Event]:
        position, more = await streams.position(answer, f"{answer.id}-{after}")
        assert more
        return standard(b"".join([frame async for frames, _ in streams.replay(answer, position) for frame in frames]))

    first = standard(b"".join([frame async for frames, _ in streams.follow(answer, 10) for frame in frames]))
    assert first == expected
    assert await asyncio.gather(*map(resume, range(51))) == [expected[after:] for after in range(51)]
    assert await streams.position(answer, f"{answer.id}-51") == (51, False)
    await streams.aclose()


async def test_nothing_is_left() -> None:
    """A forgotten answer leaves nothing behind: no frames, no key, no object."""
    metrics = Metrics()
    store = MemoryStore(PLENTY, PLENTY)
    streams = Streams(store, 60, 0.02, metrics)
    answer = streams.start(events, Upstream(), Report("id"), ("", "key"), b"digest")
    assert streams.find_key(("", "key"), b"digest") is answer
    async with asyncio.timeout(5):
        async for _ in streams.follow(answer, 10):
            pass
        gone = asyncio.Event()
        weakref.finalize(answer, gone.set)
        stream = answer.id
        del answer
        while not gone.is_set():
            await asyncio.sleep(0.01)
            gc.collect()
    with pytest.raises(StreamNotFound):
        streams.find(stream)
    assert streams.find_key(("", "key"), b"other") is None
    assert store.size == 0
    await streams.aclose()


async def endless(frame: Frame) -> AsyncGenerator[Step, None]:
    while True:
        yield [frame("a", None)], False
        await asyncio.sleep(0.001)


async def test_interruptions() -> None:
    """Upstream is hung up when nobody reads for a while, or on request; each time it is told why."""
    streams = Streams(MemoryStore(PLENTY, PLENTY), 0.02, 60, Metrics())
    upstream = Upstream()
    answer = streams.start(endless, upstream, Report("id"))
    async with asyncio.timeout(5):
        await streams.decide(answer, 10)
        assert isinstance(await upstream.interrupted.get(), Abandoned)
        streams.stop(answer.id)
        assert isinstance(await upstream.interrupted.get(), Stopped)
    streams.stop("another")
    assert upstream.interrupted.empty()
    await streams.aclose()


async def test_closing() -> None:
    """When the service ends, owners that still read are ended with it."""
    streams = Streams(MemoryStore(PLENTY, PLENTY), 60, 60, Metrics())
    answer = streams.start(endless, Upstream(), Report("id"))
    await streams.decide(answer, 10)
    async with asyncio.timeout(5):
        await streams.aclose()
    assert answer.upstream is None
    written = answer.written
    await asyncio.sleep(0.01)
    assert answer.written == written
