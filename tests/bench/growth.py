"""What must not grow: the cost of a token with the number of streams or the length of answers, memory with time."""

import asyncio

from tests.bench.load import connect, leave
from tests.bench.scenarios import Lab, Values, steady, warm

STREAMS = 10, 100, 1000, 3000

# Of all streams together: the same number of tokens, in more and more streams.
TOKENS_PER_SECOND = 3000

# Of an answer; then ten times as many.
TOKENS = 2000

# Short answers in a row, of which the first tenth has gone before anything is compared.
ANSWERS = 5000


async def streams(lab: Lab, name: str) -> Values:
    """CPU per token and memory per stream, with 10 streams up to 3,000."""
    values: Values = {}
    with lab.fresh(name) as target:
        await warm(target)
        rest = target.resident()
        for count in STREAMS:
            cost, _, resident = await steady(target, count, TOKENS_PER_SECOND / count, lab.window)
            values |= {f"cost_{count}": cost, f"memory_{count}": (resident - rest) / count / 2**10}
    return values


async def length(lab: Lab, name: str) -> Values:
    """Whole answers as fast as they go: how many times as much a token costs in one that is ten times as long."""
    costs = []
    for tokens in (TOKENS, 10 * TOKENS):
        callers = [await connect(lab.targets[name]) for _ in range(8)]
        before = lab.targets[name].cpu()
        await asyncio.gather(*(caller.play(tokens) for caller in callers))
        costs.append((lab.targets[name].cpu() - before) / sum(caller.check() for caller in callers))
        leave(callers)
    return {"length": costs[1] / costs[0]}


async def many(lab: Lab, name: str) -> Values:
    """Short answers in a row: what the last tenth of them costs beside the second, and the memory taken meanwhile."""
    costs = []
    with lab.fresh(name) as target:
        caller, rest = await connect(target), 0
        for tenth in range(10):
            before = target.cpu()
            for _ in range(ANSWERS // 10):
                await caller.play(10)
                caller.check()
            costs.append(target.cpu() - before)
            if not tenth:
                rest = target.resident()
        grown = target.resident() - rest
        leave([caller])
    return {"many": costs[-1] / costs[1], "many_memory": grown / 2**20}
