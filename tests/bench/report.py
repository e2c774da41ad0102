"""The table: what was measured, side by side, and which targets are met."""

import os
import platform
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median

from tests.bench.processes import NGINX

# measure -> proxy -> one value per round
Results = Mapping[str, Mapping[str, list[float]]]

PACKAGES = "starlette", "uvicorn", "httptools", "uvloop", "msgspec", "httpx"


@dataclass(frozen=True)
class Limit:
    """The most a measure of the service may be: so many times the same of another proxy, plus so much."""

    text: str
    of: str = ""
    times: float = 0.0
    plus: float = 0.0

    def met(self, medians: Mapping[str, float]) -> bool | None:
        """Whether it is kept; None where there is nothing to compare with, or the yardstick itself does not keep it."""
        yardstick = medians.get(self.of)
        if self.of and (yardstick is None or (not self.times and yardstick > self.plus)):
            return None
        return medians["chatproxy"] <= self.times * (yardstick or 0) + self.plus


@dataclass(frozen=True)
class Row:
    """One measure."""

    title: str
    unit: str
    limits: tuple[Limit, ...] = ()


ROWS = {
    "light": Row("CPU per token, 10 streams x 50 tokens/s", "µs"),
    "paced": Row(
        "CPU per token, 100 streams x 50 tokens/s",
        "µs",
        (Limit("≤ 2.5 x nginx", "nginx", times=2.5), Limit("≤ 1/3 x httpx", "httpx", times=1 / 3)),
    ),
    "thousand": Row("CPU per token, 1,000 streams x 20 tokens/s", "µs"),
    "flood": Row("CPU per token, flood", "µs", (Limit("≤ 8 x nginx", "nginx", times=8),)),
    "ui": Row("CPU per token of a UI message stream, 100 x 50", "x plain", (Limit("≤ 1.6", plus=1.6),)),
    "openai": Row("CPU per token of OpenAI's chunks, 100 x 50", "x plain", (Limit("≤ 1.6", plus=1.6),)),
    "short": Row(
        "CPU per stream of 10 tokens, one after the other",
        "µs",
        (Limit("≤ 6 x nginx", "nginx", times=6), Limit("≤ 1/8 x httpx", "httpx", times=1 / 8)),
    ),
    "busy": Row("CPU per stream of 10 tokens, 16 at once", "µs"),
    "first": Row("time to first token, added to upstream's", "ms", (Limit("≤ nginx + 1", "nginx", times=1, plus=1),)),
    "rest": Row("resident memory at rest", "MiB", (Limit("≤ 45", plus=45),)),
    "stream": Row("resident memory per open stream, of 1,000", "KiB", (Limit("≤ 24", plus=24),)),
    "start": Row("start to the first 200 on /healthz", "ms", (Limit("≤ 500", plus=500),)),
    "leave": Row("a silent caller leaves -> upstream hung up", "ms", (Limit("≤ 5", plus=5),)),
    "apis": Row("CPU per token, Responses API to Chat Completions", "x", (Limit("≤ 1.5", plus=1.5),)),
    "apis_flood": Row("the same, flood", "x"),
    "apis_bytes": Row("bytes per token, Responses API to Chat Completions", "x"),
    "late": Row(
        "token lateness p99, 1,000 streams x 20 tokens/s", "ms", (Limit("≤ 250, as nginx", "nginx", plus=250),)
    ),
}


def table(results: Results) -> str:
    """A Markdown table: medians (and the least and the most of the rounds), ratios, targets."""
    lines = [["", "nginx", "chatproxy", "on httpx", "x nginx", "x httpx", "target"]]
    for measure, row in ROWS.items():
        if measure not in results:
            continue
        values = results[measure]
        medians = {name: median(rounds) for name, rounds in values.items()}
        ours = medians["chatproxy"]
        lines.append(
            [
                f"{row.title} ({row.unit})",
                *(spread(values.get(name)) for name in ("nginx", "chatproxy", "httpx")),
                *(f"{ours / medians[name]:.2f}" if medians.get(name, 0) > 0 else "-" for name in ("nginx", "httpx")),
                ", ".join(f"{limit.text} {VERDICTS[limit.met(medians)]}" for limit in row.limits),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


VERDICTS = {True: "(met)", False: "(MISSED)", None: "(not judged)"}


def spread(rounds: list[float] | None) -> str:
    """The median, and between which values it lies."""
    if not rounds:
        return "-"
    digits = 1 if median(rounds) < 100 else 0
    return f"{median(rounds):.{digits}f} ({min(rounds):.{digits}f}-{max(rounds):.{digits}f})"


def machine() -> str:
    """What it was measured on and with."""
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    nginx = "no nginx"
    if NGINX:
        said = subprocess.run([NGINX, "-v"], check=True, capture_output=True, text=True)  # noqa: S603 -- found by us
        nginx = said.stderr.strip().rpartition(": ")[2]
    cores, processor = len(os.sched_getaffinity(0)), model[1] if model else platform.machine()
    return (
        f"{datetime.now().astimezone():%Y-%m-%d}, {cores} cores ({processor}), Linux {platform.release()}\n"
        f"Python {platform.python_version()}, {', '.join(f'{name} {version(name)}' for name in PACKAGES)}, {nginx}"
    )
