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

from tests.bench import processes, proxies
from tests.bench.distance import DELAY
from tests.bench.plan import FAR, FAR_TLS, PLANS, PROGRAMS, QUICK_ROUNDS, ROUNDS, TLS, WIRES, Plan, missing
from tests.bench.processes import Cores
from tests.bench.proxies import RAW
from tests.bench.report import machine, tables
from tests.bench.scenarios import Lab, Values, exactness
from tests.bench.script import WrongAnswerError

# Seconds after which nothing more is begun, and that one scenario may take.
TOTAL, EACH = 480.0, 60.0

# What 3,000 streams take: in a peer two each, and as many where TLS ends.
OPEN_FILES = 7000


def main() -> None:
    """Parse the arguments and run."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=main.__doc__)
    parser.add_argument("--quick", action="store_true", help="some five minutes instead of up to ten, with more noise")
    parser.add_argument("--only", action="append", choices=PLANS, metavar="SCENARIO", help=", ".join(PLANS))
    arguments = parser.parse_args()
    if sys.platform != "linux":
        parser.error("CPU time of other processes is read as Linux has it")
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most < OPEN_FILES:
        parser.error(f"{OPEN_FILES} open files are needed, and `ulimit -Hn` says {most}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    uvloop.run(bench(arguments.only or list(PLANS), arguments.quick))


async def bench(scenarios: list[str], quick: bool) -> None:
    """Start everything, check the text of every proxy, then measure in rounds and print."""
    began = monotonic()
    cores = processes.cores()
    print(machine(), f"proxy on core {cores.proxy}, upstream on {cores.upstream}, load on {cores.load}", sep="\n")
    print(*missing(PROGRAMS), sep="\n", flush=True)
    plans = [PLANS[name] for name in scenarios if PROGRAMS.get(PLANS[name].needs, "none is needed")]
    available = proxies.available()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="chatproxy-bench-")))
        labs = {wire: lab(wire, folder, cores, quick, stack) for wire in WIRES if any(p.wire == wire for p in plans)}
        os.sched_setaffinity(0, {cores.load})
        gc.disable()  # a pause here would be measured as lateness there

        tokens = sum(
            await asyncio.gather(*(exactness(target) for each in labs.values() for target in each.targets.values()))
        )
        print(f"{tokens:,} tokens checked, each as the script has it", flush=True)

        results: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        try:
            for number in range(QUICK_ROUNDS if quick else ROUNDS):
                for plan, name in product(plans, available):
                    if number >= plan.how_often(quick) or name not in plan.who(quick) or monotonic() - began > TOTAL:
                        continue
                    values = await measured(plan, labs[plan.wire], name)
                    for value in values:
                        results[plan.measure(value)][name].append(values[value])
                    gc.collect()
                taken = monotonic() - began
                print(
                    f"round {number + 1} {'done' if taken <= TOTAL else 'cut off'} after {taken:.0f} s", file=sys.stderr
                )
        finally:
            print(tables(results))


async def measured(plan: Plan, lab: Lab, name: str) -> Values:
    """What a scenario gives for one proxy. A peer that fails is told, and gives nothing; the service must not.

    Where a machine is too busy, httpx's transport does not get enough of it for all streams to begin: that is told.
    """
    try:
        async with asyncio.timeout(EACH):
            return await plan.scenario(lab, name)
    except (WrongAnswerError, OSError) as error:  # a TimeoutError is one, too
        told = str(error) or f"it took more than {EACH:.0f} s"
        if name not in RAW and not (name == "httpx" and isinstance(error, TimeoutError)):
            raise RuntimeError(f"{plan.scenario.__name__} on {name} ({plan.wire}): {told}") from error
        print(f"{plan.scenario.__name__} on {name} ({plan.wire}) does not count: {told}", flush=True)
        return {}


def lab(wire: str, folder: Path, cores: Cores, quick: bool, stack: ExitStack) -> Lab:
    """The upstream, what stands before it on this kind of connection, and the proxies."""
    upstream = stack.enter_context(processes.upstream(folder, cores.upstream))
    if wire in (TLS, FAR_TLS):
        upstream = stack.enter_context(processes.relay(upstream, folder, cores.upstream, tls=True))
    far = wire in (FAR, FAR_TLS)
    if far:
        upstream = stack.enter_context(processes.relay(upstream, folder, cores.upstream, delay=DELAY))
    fresh = partial(proxies.proxy, upstream=upstream, folder=folder, cores=[cores.proxy])
    names = [] if far else proxies.available()
    targets = {name: stack.enter_context(fresh(name)) for name in names}
    return Lab(upstream, targets, fresh, folder, cores, window=0.7 if quick else 2, few=20 if quick else 50)


if __name__ == "__main__":
    main()
