"""The command: runs all checks against one address, and writes the report for people or for programs."""

import json
import sys
from textwrap import fill, wrap

import anyio
import httpx

from chatproxy.doctor import advice, answer, survey
from chatproxy.doctor.client import Target
from chatproxy.doctor.visit import Check, Visit

# A phone held upright.
WIDTH = 60

_MARKS = {True: "✓", False: "✗", None: "\u2013"}
_NAME = 12


def run(url: str, origin: str | None = None, token: str | None = None, as_json: bool = False) -> int:
    """Examine the service at `url` and write to standard output.

    Gives the exit code: 1 if anything is wrong, 2 if an address is none, 130 if it was interrupted, else 0.
    """
    try:
        target = Target.parse(url)
        origin = origin and Target.parse(origin).origin
    except ValueError as problem:
        sys.stderr.write(f"{problem}\n")
        return 2
    try:
        return anyio.run(_run, target, origin, token, as_json)
    except KeyboardInterrupt:
        return 130


async def _run(target: Target, origin: str | None, token: str | None, as_json: bool) -> int:
    checks: list[Check] = []

    def tell(check: Check) -> None:
        checks.append(check)
        if not as_json:
            _write(render(check))

    def announce(text: str) -> None:
        if not as_json:
            _write(fill(text, WIDTH))

    announce(f"chatproxy doctor {target.url}")
    visit = Visit(target, tell, announce, origin=origin, token=token)
    await examine(visit)
    if as_json:
        _write(json.dumps(report(visit, checks), ensure_ascii=False, indent=2))
    faults = sum(check.ok is False for check in checks)
    announce(f"{faults} to mend." if faults else "Nothing is wrong.")
    return 1 if faults else 0


async def examine(visit: Visit) -> None:
    """All checks, one after the other."""
    way = await survey.reach(visit)
    if way is None:
        return
    async with httpx.AsyncClient(
        verify=way.verify,
        timeout=None,  # noqa: S113 -- each request has one
        trust_env=False,  # a proxy that this machine is told to use is not what is examined
        headers={"Accept-Encoding": "gzip, deflate", "User-Agent": "chatproxy-doctor"},
    ) as visit.http:
        if await survey.survey(visit, way.alpn):
            await answer.examine(visit)
    if visit.leaks:
        visit.tell("key", False, f"what looks like a key stands in {', '.join(sorted(visit.leaks))}", advice.HEADERS)
    else:
        visit.tell("key", True, f"no header names one, in {visit.replies} responses")


def render(check: Check) -> str:
    """One check as lines of at most WIDTH characters."""
    head = f"{_MARKS[check.ok]} {check.name:{_NAME}}"
    lines = wrap(check.message, WIDTH, initial_indent=head, subsequent_indent=" " * len(head), break_on_hyphens=False)
    for proxy, line in check.fixes.items():
        lines += wrap(
            f"{proxy}: {line}", WIDTH, initial_indent="    ", subsequent_indent="      ", break_on_hyphens=False
        )
    return "\n".join(lines)


def report(visit: Visit, checks: list[Check]) -> dict[str, object]:
    """What `--json` prints."""
    return {
        "url": visit.target.url,
        "ok": all(check.ok is not False for check in checks),
        "answer": {True: "demo", False: "grok", None: "unknown"}[visit.demo],
        "checks": [
            {"name": check.name, "ok": check.ok, "message": check.message, "fixes": dict(check.fixes)}
            for check in checks
        ],
    }


def _write(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
