"""The tables: what was measured, side by side, and which targets are met."""

import os
import platform
import re
import ssl
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median

from tests.bench import growth
from tests.bench.distance import BURSTS
from tests.bench.processes import REDIS
from tests.bench.proxies import CADDY, NGINX

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


def bursts(wire: str) -> dict[str, Row]:
    """Those of `distance`."""
    no_handshake = {1: (Limit("≤ 40: no handshake", plus=40),), 2: (Limit("≤ 40: no handshake", plus=40),)}
    rows = {
        f"{wire}_burst_{size}_{part}": Row(
            f"time to first token, added to upstream's, of {size} at once, {part}", "ms", no_handshake.get(size, ())
        )
        for size in BURSTS
        for part in ("p50", "p99")
    }
    del rows[f"{wire}_burst_1_p99"]  # of one there is one time
    return rows


SECTIONS = {
    "Over TLS to Grok": {
        "tls_paced": Row("CPU per token, 100 streams x 50 tokens/s", "µs"),
        "tls_flood": Row("CPU per token, flood", "µs"),
        "tls_short": Row("CPU per stream of 10 tokens, one after the other", "µs"),
        "tls_first": Row("time to first token, added to upstream's", "ms"),
        "tls_rest": Row("resident memory at rest", "MiB"),
        "tls_stream": Row("resident memory per open stream, of 1,000", "KiB", (Limit("≤ 48", plus=48),)),
    },
    "Over TLS to a Grok 80 ms away, after a pause": bursts("far_tls"),
    "Over plain TCP to a Grok 80 ms away, after a pause": bursts("far"),
    "Growth, over TLS to Grok": {
        **{
            f"tls_cost_{count}": Row(f"CPU per token, 3,000 a second in {count:,} streams", "µs")
            for count in growth.STREAMS
        },
        **{
            f"tls_memory_{count}": Row(f"resident memory per open stream, of {count:,}", "KiB")
            for count in growth.STREAMS
        },
        "tls_length": Row("CPU per token, 20,000 tokens at once to 2,000", "x"),
        "tls_many": Row("CPU per stream of 10 tokens, the last of 5,000 to the first", "x"),
        "tls_many_memory": Row("memory that 4,500 streams of 10 tokens leave taken", "MiB"),
    },
    "Several processes (they share all cores with upstream and load), over plain TCP to Grok": {
        "replica_p50": Row("an event at another replica, later than at its own, p50", "ms", (Limit("≤ 3", plus=3),)),
        "replica_p99": Row("the same, p99", "ms"),
        "shared_cost": Row("CPU per token at its owner, 300 answers read there and twice elsewhere", "x without Redis"),
        "shared_commands": Row("commands that Redis runs per token, those in scripts included", ""),
        "shared_memory": Row("memory in Redis per answer, while it is running", "KiB"),
        "shared_connections": Row("connections to Redis per replica", "", (Limit("≤ 2", plus=2),)),
        "shared_slow": Row("commands that took Redis more than 10 ms", "", (Limit("none"),)),
        "tokens_1": Row("flood through nginx, 1 process", "1,000 tokens/s"),
        "tokens_2": Row("the same, 2 processes", "x 1 process"),
        "tokens_3": Row("the same, 3 processes", "x 1 process"),
        "answers_1": Row("streams of 10 tokens through nginx, 1 process", "streams/s"),
        "answers_2": Row("the same, 2 processes", "x 1 process"),
        "answers_3": Row("the same, 3 processes", "x 1 process"),
    },
    "Over plain TCP to Grok": {
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
        "first": Row(
            "time to first token, added to upstream's", "ms", (Limit("≤ nginx + 1", "nginx", times=1, plus=1),)
        ),
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
    },
}

TITLES = {"nginx": "nginx", "caddy": "Caddy", "chatproxy": "chatproxy", "httpx": "on httpx"}
RATIOS = {"nginx": "x nginx", "caddy": "x Caddy", "httpx": "x httpx"}


def tables(results: Results) -> str:
    """A Markdown table for each section of which something was measured."""
    if unknown := set(results).difference(*SECTIONS.values()):
        raise ValueError(f"measured, and in no table: {', '.join(sorted(unknown))}")
    found = {
        title: {measure: row for measure, row in rows.items() if measure in results} for title, rows in SECTIONS.items()
    }
    return "\n\n".join(f"**{title}**\n\n{table(results, rows)}" for title, rows in found.items() if rows)


def table(results: Results, rows: Mapping[str, Row]) -> str:
    """Medians (and the least and the most of the rounds), ratios, targets; no column for who was not measured."""
    names = [name for name in TITLES if any(name in results[measure] for measure in rows)]
    others = [name for name in names if name in RATIOS]
    lines = [["", *(TITLES[name] for name in names), *(RATIOS[name] for name in others), "target"]]
    for measure, row in rows.items():
        values = results[measure]
        medians = {name: median(rounds) for name, rounds in values.items()}
        lines.append(
            [
                f"{row.title} ({row.unit})",
                *(spread(values.get(name)) for name in names),
                *(ratio(medians, name) for name in others),
                ", ".join(f"{limit.text} {VERDICTS[limit.met(medians)]}" for limit in row.limits),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def ratio(medians: Mapping[str, float], name: str) -> str:
    """How many times as much the service takes as this one."""
    if "chatproxy" not in medians or medians.get(name, 0) <= 0:
        return "-"
    return f"{medians['chatproxy'] / medians[name]:.2f}"


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
    cores, processor = len(os.sched_getaffinity(0)), model[1] if model else platform.machine()
    packages = [f"{name} {version(name)}" for name in PACKAGES]
    programs = [said(NGINX, "-v"), said(CADDY, "version"), said(REDIS, "--version")]
    return (
        f"{datetime.now().astimezone():%Y-%m-%d}, {cores} cores ({processor}), Linux {platform.release()}\n"
        f"Python {platform.python_version()}, {', '.join(packages)}\n"
        f"{', '.join([ssl.OPENSSL_VERSION, *filter(None, programs)])}"
    )


def said(program: str | None, *arguments: str) -> str:
    """The name and version of a program, as it tells them; nothing if it is not installed."""
    if not program:
        return ""
    done = subprocess.run([program, *arguments], check=True, capture_output=True, text=True)  # noqa: S603 -- found by us
    found = re.search(r"v?(\d+(\.\d+)+)", done.stdout + done.stderr)
    return f"{Path(program).name} {found[1] if found else '?'}"
