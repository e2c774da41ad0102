"""`python -m tests.bench [--quick] [--only SCENARIO]`: measure, and print the table."""

# ruff: noqa: T201 -- a command prints

import argparse
import asyncio
import gc
import os
import resource
import sys
from collections import defaultdict
from contextlib import ExitStack
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic

import uvloop

from tests.bench import processes
from tests.bench.report import machine, table
from tests.bench.scenarios import SCENARIOS, Lab, exactness

ROUNDS, QUICK_ROUNDS = 5, 3

# These take long and vary little.
FEWER = "memory", "thousand"
FEWER_ROUNDS, FEWER_QUICK_ROUNDS = 3, 1

# Stock httpx would need some four cores: most of its streams do not even begin.
HOPELESS = {("thousand", "httpx")}

# What compares the service with itself.
ALONE = {("apis", "nginx"), ("apis", "httpx"), ("formats", "nginx"), ("formats", "httpx")}

# Its pool takes 17 s to open a thousand connections.
SLOW = {("memory", "httpx")}


def main() -> None:
    """Parse the arguments and run."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=main.__doc__)
    parser.add_argument("--quick", action="store_true", help="a minute instead of seven, with more noise")
    parser.add_argument("--only", action="append", choices=SCENARIOS, metavar="SCENARIO", help=", ".join(SCENARIOS))
    arguments = parser.parse_args()
    if sys.platform != "linux":
        parser.error("CPU time of other processes is read as Linux has it")
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    uvloop.run(bench(arguments.only or list(SCENARIOS), arguments.quick))


async def bench(scenarios: list[str], quick: bool) -> None:
    """Start everything, check the text of every proxy, then measure in rounds and print."""
    cores, names, began = processes.cores(), processes.available(), monotonic()
    print(
        machine(),
        f"proxy on core {cores.proxy}, upstream on {cores.upstream}, load on {cores.load}",
        sep="\n",
        flush=True,
    )
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="chatproxy-bench-")))
        upstream = stack.enter_context(processes.upstream(folder, cores.upstream))
        fresh = partial(processes.proxy, upstream=upstream, folder=folder, core=cores.proxy)
        targets = {name: stack.enter_context(fresh(name)) for name in names}
        lab = Lab(upstream, targets, fresh, window=0.7 if quick else 3, few=20 if quick else 50)
        os.sched_setaffinity(0, {cores.load})
        gc.disable()  # a pause here would be measured as lateness there

        tokens = sum([await exactness(target) for target in targets.values()])
        print(f"{tokens:,} tokens checked, each as the script has it")

        results: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        rounds, fewer = (QUICK_ROUNDS, FEWER_QUICK_ROUNDS) if quick else (ROUNDS, FEWER_ROUNDS)
        left_out = HOPELESS | ALONE | (SLOW if quick else set())
        for number in range(rounds):
            for scenario, name in product(scenarios, names):
                if (number < fewer or scenario not in FEWER) and (scenario, name) not in left_out:
                    async with asyncio.timeout(90):
                        values = await SCENARIOS[scenario](lab, name)
                    for measure, value in values.items():
                        results[measure][name].append(value)
                    gc.collect()
            print(f"round {number + 1} of {rounds} done after {monotonic() - began:.0f} s", file=sys.stderr)
    print(table(results))


if __name__ == "__main__":
    main()
