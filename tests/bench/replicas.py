"""More than one process: what they deliver together, how late a reader at another replica is, what Redis costs."""

import asyncio
import random
import re
from contextlib import ExitStack, closing
from time import monotonic

from redis import Redis

from tests.bench import processes, proxies
from tests.bench.load import Caller, connect, leave
from tests.bench.processes import Target
from tests.bench.scenarios import ENDLESS, Lab, Values, count, opened, repeating, steady

PROCESSES = 1, 2, 3

# Enough to keep three processes busy.
CONNECTIONS = 48

STREAMS, RATE = 20, 50

# What many answers take of Redis: each is read at its owner once and at another replica twice.
SHARED, SLOWLY = 300, 5


async def throughput(lab: Lab, name: str) -> Values:
    """Tokens of a flood and short answers per second, of one process and more behind nginx, on all cores."""
    values = {}
    every = {lab.cores.proxy, lab.cores.upstream, lab.cores.load}
    with ExitStack() as stack:
        services: list[Target] = []
        for count in PROCESSES:
            services.append(stack.enter_context(lab.fresh(name, cores=every)))
            with proxies.front(services, lab.folder, every) as front:
                values[f"tokens_{count}"] = await flood(front, lab.window)
                values[f"answers_{count}"] = await answers(front, lab.window)
    for kind in ("tokens", "answers"):
        for count in PROCESSES[1:]:
            values[f"{kind}_{count}"] /= values[f"{kind}_1"]
    return values


async def flood(target: Target, window: float) -> float:
    """Thousands of tokens per second, as fast as they go."""
    callers = [await connect(target) for _ in range(CONNECTIONS)]
    since = monotonic()
    for caller in callers:
        caller.play(ENDLESS)
    await asyncio.sleep(window)
    taken = monotonic() - since
    leave(callers)
    return sum(caller.check() for caller in callers) / taken / 1e3


async def answers(target: Target, window: float) -> float:
    """Answers of 10 tokens per second."""
    _, count = await repeating(target, CONNECTIONS, window)
    return count / window


async def two(lab: Lab, name: str, stack: ExitStack) -> tuple[str, Target, Target]:
    """The address of a Redis, and two replicas that share it, once they are ready."""
    url = stack.enter_context(processes.redis(lab.folder, lab.cores.upstream))
    first, second = [stack.enter_context(lab.fresh(name, REDIS_URL=url)) for _ in range(2)]
    async with asyncio.timeout(10):
        while any(processes.status(target.port, "/readyz") != 200 for target in (first, second)):  # noqa: ASYNC110 -- nobody tells when
            await asyncio.sleep(0.01)
    return url, first, second


async def elsewhere(lab: Lab, name: str) -> Values:
    """By how many milliseconds later than at the answer's owner an event is at a reader of another replica."""
    with ExitStack() as stack:
        _, owner, other = await two(lab, name, stack)
        begin, phase = monotonic() + 0.3, random.Random(STREAMS)  # noqa: S311 -- no secret
        here = [await connect(owner, "resumable") for _ in range(STREAMS)]
        for caller in here:
            caller.play(ENDLESS, RATE, begin + phase.random() / RATE)
        for caller in here:
            await caller.begun()
        there = [await follow(other, stream_of(caller)) for caller in here]
        for reader in there:
            await reader.begun()
        since = monotonic() + 0.3
        await asyncio.sleep(0.3 + lab.window)
        leave(here + there)
        for caller in here + there:
            caller.check()
        delays = sorted(delay for pair in zip(here, there, strict=True) for delay in behind(*pair, since))
    return {"replica_p50": delays[len(delays) // 2] * 1e3, "replica_p99": delays[len(delays) * 99 // 100] * 1e3}


async def shared(lab: Lab, name: str) -> Values:
    """What many answers of one replica with readers at another take of Redis, and of their owner's CPU."""
    with ExitStack() as stack:
        alone = (await steady(stack.enter_context(lab.fresh(name)), SHARED, SLOWLY, lab.window, "resumable")).cost
        url, owner, other = await two(lab, name, stack)
        server = stack.enter_context(closing(Redis.from_url(url)))
        empty = server.info()["used_memory"]
        here = await opened(owner, SHARED, SLOWLY, "resumable")
        there = [await follow(other, stream_of(caller)) for caller in here for _ in range(2)]
        for reader in there:
            await reader.begun()
        await asyncio.sleep(0.3)
        before, used, seen = server.info(), owner.cpu(), count(here)
        await asyncio.sleep(lab.window)
        after, used, tokens = server.info(), owner.cpu() - used, count(here) - seen
        values = {
            "shared_cost": used / tokens * 1e6 / alone,
            "shared_commands": (after["total_commands_processed"] - before["total_commands_processed"]) / tokens,
            "shared_memory": (after["used_memory"] - empty) / SHARED / 1024,
            "shared_connections": (after["connected_clients"] - 1) / 2,  # without our own
            "shared_slow": float(server.slowlog_len()),
        }
        leave(here + there)
        for caller in here + there:
            caller.check()
    return values


def stream_of(caller: Caller) -> str:
    """The address of the stream that it has started."""
    found = re.search(rb"\r\ncontent-location: ([^\r]+)", caller.received)
    assert found
    return found[1].decode()


async def follow(target: Target, path: str) -> Caller:
    """A reader of a stream, from its beginning."""
    reader = await connect(target, "resumable")
    reader.ask(f"GET {path}")
    return reader


def behind(here: Caller, there: Caller, since: float) -> list[float]:
    """The seconds from an event's arrival here to that there, of those that came after a time."""
    return [later - at for at, later in zip(here.arrived(), there.arrived(), strict=False) if at > since]
