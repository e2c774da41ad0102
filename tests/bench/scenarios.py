"""The situations that are measured, each for one proxy at a time."""

import asyncio
import random
from collections.abc import Callable, Collection, Coroutine
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import monotonic
from typing import NamedTuple, Protocol

from tests.bench.load import Caller, connect, leave
from tests.bench.processes import Cores, Target
from tests.bench.script import CHAT, FRAME_END, RESPONSES, check

# More tokens than a scenario that ends by our leaving will ever see.
ENDLESS = 1_000_000

Values = dict[str, float]


class Fresh(Protocol):
    """Starts a proxy of its own: its name, where it may run, and settings if it is the service."""

    def __call__(
        self, name: str, *, cores: Collection[int] = ..., **settings: str
    ) -> AbstractContextManager[Target]: ...


@dataclass(frozen=True)
class Lab:
    """What there is to measure with, on one kind of connection to the upstream."""

    upstream: Target
    targets: dict[str, Target]
    fresh: Fresh
    folder: Path
    cores: Cores
    window: float  # seconds that a steady load is looked at
    few: int  # repetitions of what takes milliseconds


Scenario = Callable[[Lab, str], Coroutine[None, None, Values]]


async def exactness(target: Target) -> int:
    """Check whole answers, alone and many at once, slow and fast, on new and on used connections."""
    callers = [await connect(target) for _ in range(20)]
    total = 0
    try:
        for tokens, rate in ((1, 0), (10, 0), (150, 300), (2000, 0)):
            await asyncio.gather(*(caller.play(tokens, rate, monotonic()) for caller in callers))
            total += sum(caller.check() for caller in callers)
    finally:
        leave(callers)
    return total


async def opened(target: Target, streams: int, rate: float, format: str = "plain") -> list[Caller]:
    """So many endless streams of so many tokens a second, all begun, each with a time of its own."""
    begin, phase = monotonic() + 0.3 + streams / 1000, random.Random(streams)  # noqa: S311 -- the same for every proxy
    callers = []
    for _ in range(streams):
        caller = await connect(target, format)
        caller.play(ENDLESS, rate, begin + phase.random() / rate)
        callers.append(caller)
    for caller in callers:
        await caller.begun()
    return callers


class Steady(NamedTuple):
    """What a steady load takes."""

    cost: float  # microseconds of CPU per token
    late: float  # milliseconds by which the latest percent of the tokens is late
    resident: int  # bytes of memory while it runs


async def steady(target: Target, streams: int, rate: float, window: float, format: str = "plain") -> Steady:
    """Look at so many streams of so many tokens a second for a while, and check them."""
    callers = await opened(target, streams, rate, format)
    await asyncio.sleep(0.3)

    before, since, seen = target.cpu(), monotonic(), count(callers)
    await asyncio.sleep(window)
    used, until, tokens = target.cpu() - before, monotonic(), count(callers) - seen
    resident = target.resident()
    leave(callers)

    for caller in callers:
        caller.check()
    late = sorted(seconds for caller in callers for seconds in caller.lateness(since, until))
    return Steady(used / tokens * 1e6, late[len(late) * 99 // 100] * 1e3, resident)


def count(callers: list[Caller]) -> int:
    """The tokens they have received so far."""
    return sum(caller.received.count(FRAME_END) for caller in callers)


async def light(lab: Lab, name: str) -> Values:
    """10 streams of 50 tokens a second."""
    return {"light": (await steady(lab.targets[name], 10, 50, lab.window)).cost}


async def paced(lab: Lab, name: str) -> Values:
    """100 streams of 50 tokens a second."""
    return {"paced": (await steady(lab.targets[name], 100, 50, lab.window)).cost}


async def thousand(lab: Lab, name: str) -> Values:
    """1,000 streams of 20 tokens a second: is a core enough?"""
    cost, late, _ = await steady(lab.targets[name], 1000, 20, lab.window)
    return {"thousand": cost, "late": late}


async def flood(lab: Lab, name: str) -> Values:
    """8 streams as fast as they go, up to 10,000 tokens each."""
    return {"flood": await flood_cost(lab.targets[name], lab.window)}


async def flood_cost(target: Target, window: float) -> float:
    """CPU microseconds per token."""
    callers = [await connect(target) for _ in range(8)]
    before = target.cpu()
    ends = [caller.play(10_000) for caller in callers]
    await asyncio.wait(ends, timeout=window)
    used = target.cpu() - before
    leave(callers)
    return used / sum(caller.check() for caller in callers) * 1e6


async def formats(lab: Lab, name: str) -> Values:
    """100 streams of 50 tokens a second in each format: by how much the others cost more than our own."""
    plain, ui, openai = [
        (await steady(lab.targets[name], 100, 50, lab.window, format)).cost for format in ("plain", "ui", "openai")
    ]
    return {"ui": ui / plain, "openai": openai / plain}


async def short(lab: Lab, name: str) -> Values:
    """One answer of 10 tokens after the other on a connection kept alive: nothing is shared between them."""
    return {"short": await repeated(lab.targets[name], 1, lab.window)}


async def busy(lab: Lab, name: str) -> Values:
    """The same on 16 connections: the proxy has no rest, and does much in one go."""
    return {"busy": await repeated(lab.targets[name], 16, lab.window)}


async def repeated(target: Target, connections: int, window: float) -> float:
    """CPU microseconds per answer of 10 tokens."""
    used, answers = await repeating(target, connections, window)
    return used / answers * 1e6


async def repeating(target: Target, connections: int, window: float) -> tuple[float, int]:
    """Answers of 10 tokens, one after the other on each connection: seconds of CPU, and how many there were."""
    callers = [await connect(target) for _ in range(connections)]
    await asyncio.gather(*(caller.play(10) for caller in callers))
    answers: list[bytearray] = []
    before, until = target.cpu(), monotonic() + window

    async def repeat(caller: Caller) -> None:
        while monotonic() < until:
            await caller.play(10)
            answers.append(caller.received)

    await asyncio.gather(*map(repeat, callers))
    used = target.cpu() - before
    leave(callers)
    for answer in set(map(bytes, answers)):
        check(answer, raw=target.raw, tokens=10)
    return used, len(answers)


async def first_token(lab: Lab, name: str) -> Values:
    """One answer at a time on one connection: what the proxy adds to the wait for the first token."""
    return {"first": (await first(lab.targets[name], lab.few) - await first(lab.upstream, lab.few)) * 1e3}


async def first(target: Target, times: int) -> float:
    """The median time to the first token, in seconds."""
    caller = await connect(target)
    waits = []
    for _ in range(times):
        await caller.play(2, 200, monotonic())
        caller.check()
        waits.append(caller.arrived()[0] - caller.asked)
    leave([caller])
    return median(waits)


async def leaving(lab: Lab, name: str) -> Values:
    """A caller leaves in silence, long before the next token: how soon upstream knows."""
    watcher = await connect(lab.upstream)
    waits = []
    for _ in range(lab.few):
        caller = await connect(lab.targets[name])
        caller.play(2, 0.01, monotonic())
        await caller.begun()
        seen = watcher.ask("GET /hang-up")
        await asyncio.sleep(0.01)
        left = monotonic()
        leave([caller])
        await seen
        waits.append(float(watcher.body()) - left)
    leave([watcher])
    return {"leave": median(waits) * 1e3}


async def start(lab: Lab, name: str) -> Values:
    """From the start of the process to the first 200 on /healthz."""
    with lab.fresh(name) as target:
        return {"start": target.start_ms}


async def warm(target: Target) -> None:
    """Give it a few answers."""
    callers = [await connect(target) for _ in range(10)]
    await asyncio.gather(*(caller.play(10) for caller in callers))
    leave(callers)


async def memory(lab: Lab, name: str) -> Values:
    """A new process after a few answers, and with 1,000 streams open of a token a second each."""
    with lab.fresh(name) as target:
        await warm(target)
        rest = target.resident()
        callers = await opened(target, 1000, 1)
        await asyncio.sleep(1)
        grown = target.resident() - rest
        leave(callers)
        for caller in callers:
            caller.check()
    return {"rest": rest / 2**20, "stream": grown / 1000 / 2**10}


async def apis(lab: Lab, name: str) -> Values:
    """The Responses API beside Chat Completions: how many times as much a token costs, and how many bytes it has."""
    chat = lab.targets[name]
    with lab.fresh("responses") as target:
        await exactness(target)
        paced = (await steady(target, 100, 50, lab.window)).cost / (await steady(chat, 100, 50, lab.window)).cost
        flooded = await flood_cost(target, lab.window) / await flood_cost(chat, lab.window)
    return {"apis": paced, "apis_flood": flooded, "apis_bytes": len(RESPONSES.round) / len(CHAT.round)}
