"""Grok a round trip of 80 ms away: what chats wait for that begin at once when there were none for a while."""

import asyncio
from contextlib import ExitStack
from time import monotonic

from tests.bench.load import Caller, connect, leave
from tests.bench.scenarios import Lab, Values, first

DELAY = 0.04
"""Seconds in each direction."""

BURSTS = 1, 2, 10, 50

# Seconds between the only chat that a proxy had and the burst. Upstream has closed that chat's connection meanwhile, as
# servers do after minutes; whoever keeps connections ready has had the time to make others.
REST = 3.0


async def bursts(lab: Lab, name: str) -> Values:
    """So many chats at once, each size on a proxy of its own: milliseconds to the first token beyond upstream's own."""
    own = await first(lab.upstream, 3)
    values = {}
    with ExitStack() as stack:
        targets = {size: stack.enter_context(lab.fresh(name)) for size in BURSTS}
        earlier = [await connect(target) for target in targets.values()]
        await asyncio.gather(*(caller.play(10, after=", and close") for caller in earlier))
        leave(earlier)
        await asyncio.sleep(REST)
        for size, target in targets.items():
            callers = [await connect(target) for _ in range(size)]
            waits = sorted([wait - own for wait in await burst(callers)])
            leave(callers)
            values[f"burst_{size}_p50"] = waits[size // 2] * 1e3
            if size > 1:
                values[f"burst_{size}_p99"] = waits[size * 99 // 100] * 1e3
    return values


async def burst(callers: list[Caller]) -> list[float]:
    """Seconds to the first token of each of them, asking at once."""
    await asyncio.gather(*(caller.play(2, 200, monotonic()) for caller in callers))
    for caller in callers:
        caller.check()
    return [caller.arrived()[0] - caller.asked for caller in callers]
