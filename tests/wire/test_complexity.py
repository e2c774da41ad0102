"""Growth, not stopwatch: twice as much costs about twice as much, and a long stream no more memory than a short one.

CPU time and memory are the service's alone; it runs in a process of its own.
"""

import asyncio
import re
import sys
import time
from collections.abc import Awaitable, Callable, Iterable
from contextlib import AsyncExitStack
from itertools import chain, repeat
from pathlib import Path

import pytest

from chatproxy.sse import Decoder
from tests.conftest import HI, SubprocessService, spawned
from tests.readers import DONE, Event, joined, naive
from tests.upstream import HANG, STREAM_HEAD, Step, Upstream, chunk, frame, frames, piece, sse, stream

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="what another process has used is read as Linux has it"),
]

# The end of an answer, from the finish reason to the last byte.
TAIL = b"".join(step for step in sse(*frames())[1:] if isinstance(step, bytes))

# What the memory of a process may grow by itself; a list of the tokens, say, would take more.
SLACK = 4_000_000


def used(service: SubprocessService) -> float:
    """Seconds of CPU time that the service has used so far, user and system."""
    # Linux makes the ID of another process's CPU clock from its PID: clock_getcpuclockid(3).
    return time.clock_gettime(~service.pid << 3 | 2)


def peak(service: SubprocessService) -> int:
    """The most bytes of memory that it has ever had resident."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{service.pid}/status").read_text())
    assert found
    return int(found[1]) * 1024


def tokens(text: str, count: int, together: int = 100) -> Iterable[Step]:
    """An answer of so many chunks with this text, `together` of them in one write."""
    return chain([STREAM_HEAD], repeat(piece(frame(chunk({"content": text}))) * together, count // together), [TAIL])


def cut(data: bytes, size: int) -> Iterable[Step]:
    """An answer that begins with these bytes, in transfer chunks of this size but one write."""
    return [STREAM_HEAD, b"".join(piece(data[at : at + size]) for at in range(0, len(data), size)), TAIL]


def lines(count: int) -> bytes:
    """One upstream event of so many lines; the JSON is broken where white space may be."""
    return b'data: {"choices":[{"index":0,"delta":{"content":"x"}}]\n' + b"data:  \n" * count + b"data: }\n\n"


# What grows, how much of it there is at first, and the upstream's answer with its text.
SHAPES: dict[str, tuple[int, Callable[[int], tuple[Iterable[Step], str]]]] = {
    "chunks": (10_000, lambda n: (tokens("token ", n), "token " * n)),
    "pieces of an event": (18_000, lambda n: (cut(frame(chunk({"content": "x" * 25 * n})), 25), "x" * 25 * n)),
    "lines of an event": (60_000, lambda n: (cut(lines(n), 20_000), "x")),
    "line breaks of a token": (150_000, lambda n: (cut(frame(chunk({"content": "\n" * n})), 20_000), "\n" * n)),
    "done markers of a token": (
        12_000,
        lambda n: (cut(frame(chunk({"content": "[DONE]\n" * n})), 20_000), "[DONE]\n" * n),
    ),
    "comments": (200_000, lambda n: (cut(b": ping\n\n" * n + frame(chunk({"content": "x"})), 20_000), "x")),
}


async def linear(cost: Callable[[int], Awaitable[float]], size: int) -> bool:
    """Whether twice the size costs at most about twice as much; were each looked at again for each, it would be 4 x.

    The least of some measurements counts: whatever else the machine does can only add to it.
    """
    await cost(size)
    single, double = [], []
    for number in range(12):
        single.append(await cost(size))
        double.append(await cost(2 * size))
        if number >= 2 and min(double) < 3 * min(single):
            return True
    return False


@pytest.mark.parametrize(("power", "passes"), [(1, True), (2, False)])
async def test_growth_is_seen(power: int, passes: bool) -> None:
    """What costs four times as much for twice the size is found, and what costs twice as much is not."""

    async def cost(size: int) -> float:
        return float(size**power)

    assert await linear(cost, 100) is passes


@pytest.mark.parametrize("resumable", [False, True], ids=["plain", "resumable"])
@pytest.mark.parametrize("shape", SHAPES)
async def test_cost_of_an_answer(shape: str, resumable: bool) -> None:
    """Twice as much of it is about twice as much work."""
    size, answer = SHAPES[shape]

    async def cost(size: int) -> float:
        grok.scripts[:] = [lambda _: answer(size)[0]]
        before = used(service)
        response = await service.ask(resumable=resumable)
        cost = used(service) - before
        *events, last = naive(response.content)
        assert last == Event(DONE, id=last.id)
        assert joined(events) == answer(size)[1]
        return cost

    async with Upstream() as grok, spawned(grok.url) as service:
        assert await linear(cost, size)


async def test_cost_of_reads() -> None:
    """An event that comes byte by byte is twice the work if it is twice as long."""

    async def cost(size: int) -> float:
        decoder = Decoder()
        before = time.process_time()
        for byte in b"data:" + b"x" * size:
            assert not decoder.feed(bytes([byte]))
        cost = time.process_time() - before
        assert decoder.feed(b"\n\n") == [b"x" * size]
        return cost

    assert await linear(cost, 100_000)


async def test_cost_of_callers() -> None:
    """Twice as many streams at a time, opened and left, are about twice as much work."""

    async def cost(callers: int) -> float:
        before = used(service)
        async with AsyncExitStack() as stack:
            for caller in [await stack.enter_async_context(service.caller()) for _ in range(callers)]:
                await caller.post({"messages": HI})
                await caller.until(b"data: a\n\n")
            assert grok.playing == callers
        await grok.until(lambda: grok.playing == 0)
        return used(service) - before

    async with Upstream(stream("a", HANG)) as grok, spawned(grok.url) as service:
        assert await linear(cost, 100)


@pytest.mark.own_transport
@pytest.mark.parametrize("resumable", [False, True], ids=["plain", "resumable"])
@pytest.mark.parametrize(("text", "count"), [("token ", 100_000), ("x" * 4_000, 10_000)], ids=["tokens", "bytes"])
async def test_memory_of_a_long_answer(text: str, count: int, resumable: bool) -> None:
    """An answer ten times as long takes no more memory; what is kept for replay has a bound of its own.

    (Here that is so small, and the upstream so fast, that even a steady reader may be told `replay_lost`.)
    """

    async def read(count: int) -> None:
        grok.scripts[:] = [lambda _: tokens(text, count)]
        body = {"messages": HI, "resumable": resumable}
        received = 0
        async with asyncio.timeout(60), service.client.stream("POST", "/api/chat", json=body) as response:
            async for data in response.aiter_raw():
                received += len(data)
            await grok.until(lambda: grok.playing == 0)
        assert (received == len(f"data: {text}\n\n") * count + len(f"data: {DONE}\n\n")) or resumable
        assert grok.calls[-1].played.is_set()

    async with Upstream() as grok, spawned(grok.url, replay_bytes=100_000) as service:
        await read(count // 10)
        before = peak(service)
        await read(count)
        grown = peak(service) - before
    assert grown < SLACK
