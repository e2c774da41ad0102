"""What is measured: each scenario, on which kind of connection to the upstream, for whom, and how often."""

from collections.abc import Mapping
from dataclasses import dataclass

from tests.bench import distance, growth, replicas, scenarios
from tests.bench.processes import REDIS
from tests.bench.proxies import CADDY, NAMES, NGINX
from tests.bench.scenarios import Scenario

# Kinds of connection to the upstream.
TLS, PLAIN, FAR_TLS, FAR = WIRES = "tls", "plain", "far_tls", "far"

ROUNDS, QUICK_ROUNDS = 3, 2

PROGRAMS = {"nginx": NGINX, "caddy": CADDY, "redis-server": REDIS}
"""The paths of those that need not be installed."""

OURS = ("chatproxy",)
PEERS = tuple(name for name in NAMES if name != "httpx")


@dataclass(frozen=True)
class Plan:
    """One scenario; `wire` is what the names of its measures begin with, but for plain TCP."""

    scenario: Scenario
    wire: str = PLAIN
    names: tuple[str, ...] = NAMES
    quick_names: tuple[str, ...] = ()  # fewer, if given
    rounds: int = ROUNDS
    quick_rounds: int = QUICK_ROUNDS
    needs: str = ""  # one of PROGRAMS

    def measure(self, value: str) -> str:
        """The name of one of its values in the report."""
        return value if self.wire == PLAIN else f"{self.wire}_{value}"

    def who(self, quick: bool) -> tuple[str, ...]:
        """The names of those that are measured."""
        return self.quick_names if quick and self.quick_names else self.names

    def how_often(self, quick: bool) -> int:
        """The number of rounds."""
        return self.quick_rounds if quick else self.rounds


# httpx's pool takes 17 s to open a thousand connections, and it would need some four cores for a thousand streams: most
# of them would not even begin.
PLANS = {
    "tls-paced": Plan(scenarios.paced, TLS),
    "tls-flood": Plan(scenarios.flood, TLS),
    "tls-short": Plan(scenarios.short, TLS),
    "tls-first": Plan(scenarios.first_token, TLS),
    "tls-memory": Plan(scenarios.memory, TLS, quick_names=PEERS, rounds=1, quick_rounds=1),
    "tls-far": Plan(distance.bursts, FAR_TLS, rounds=2, quick_rounds=1),
    "far": Plan(distance.bursts, FAR, rounds=2, quick_rounds=1),
    "growth": Plan(growth.streams, TLS, names=PEERS, quick_names=OURS, rounds=1, quick_rounds=1),
    "length": Plan(growth.length, TLS, names=OURS),
    "many": Plan(growth.many, TLS, names=OURS, rounds=1, quick_rounds=1),
    "replicas": Plan(replicas.elsewhere, names=OURS, needs="redis-server"),
    "shared": Plan(replicas.shared, names=OURS, needs="redis-server"),
    "processes": Plan(replicas.throughput, names=OURS, rounds=2, quick_rounds=1, needs="nginx"),
    "light": Plan(scenarios.light),
    "paced": Plan(scenarios.paced),
    "flood": Plan(scenarios.flood),
    "formats": Plan(scenarios.formats, names=OURS),
    "short": Plan(scenarios.short),
    "busy": Plan(scenarios.busy),
    "first": Plan(scenarios.first_token),
    "memory": Plan(scenarios.memory, quick_names=PEERS, rounds=1, quick_rounds=1),
    "start": Plan(scenarios.start),
    "leave": Plan(scenarios.leaving),
    "thousand": Plan(scenarios.thousand, names=PEERS, rounds=1, quick_rounds=1),
    "apis": Plan(scenarios.apis, names=OURS),
}


def missing(programs: Mapping[str, str | None]) -> list[str]:
    """What cannot be measured without the programs that have no path: a sentence for each of them."""
    sentences = []
    for program in (name for name, path in programs.items() if not path):
        left_out = [name for name, plan in PLANS.items() if plan.needs == program]
        lost = ["no figures beside it"] if program in NAMES else []
        lost += [f"no {name}" for name in left_out]
        sentences.append(f"{program} is not installed: {', '.join(lost)}")
    return sentences
