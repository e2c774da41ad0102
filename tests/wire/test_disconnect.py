"""Whoever leaves takes Grok's answer along within a second: however they go, and whatever is waited for just then."""

import asyncio
import logging
import re
import sys
from collections.abc import Callable, Iterator
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import HI, TIMEOUT, Caller, InProcessService, serving
from tests.upstream import (
    STREAM_HEAD,
    Call,
    Gate,
    Script,
    Step,
    Upstream,
    chunk,
    error,
    frame,
    head,
    piece,
    sse,
    unreachable,
)

pytestmark = pytest.mark.anyio

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="connections on their way are listed as Linux has it")

CHAT = {"messages": HI}
TEXT = frame(chunk({"role": "assistant", "content": "a"}))

WAYS: dict[str, Callable[[Caller], None]] = {
    "FIN": Caller.close,
    "RST": Caller.reset,
    "half-close": Caller.half_close,
}
ways = pytest.mark.parametrize("leave", WAYS.values(), ids=WAYS.keys())


class Ends(logging.Handler):
    """The log lines of requests, as they end."""

    def __init__(self) -> None:
        super().__init__()
        self._lines: asyncio.Queue[logging.LogRecord] = asyncio.Queue()

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.put_nowait(record)

    async def next(self) -> dict[str, Any]:
        async with asyncio.timeout(1):
            return vars(await self._lines.get())


@pytest.fixture
def ends() -> Iterator[Ends]:
    log = logging.getLogger("chatproxy.middleware")
    level, handler = log.level, Ends()
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    yield handler
    log.setLevel(level)
    log.removeHandler(handler)


async def started(grok: Upstream, caller: Caller, script: Script) -> Call:
    """A chat that has reached Grok."""
    seen = len(grok.calls)
    grok.scripts = [script]
    await caller.post(CHAT)
    return await grok.call(seen)


# What Grok has done so far, up to where it waits; and whether the caller has a status by then.
MOMENTS: dict[str, tuple[Callable[[Gate], Script], bool]] = {
    "while Grok holds its headers back": (lambda gate: [gate], False),
    "after Grok's headers": (sse, False),
    "after a comment": (lambda gate: sse(b": ping\n\n", gate), False),
    "inside the first frame": (lambda gate: sse(TEXT[:20], gate), False),
    "inside an error": (lambda gate: [head(500, {"Content-Length": "100"}), b'{"code"', gate], False),
    "before the first token": (lambda gate: sse(frame(chunk({"role": "assistant"})), gate), True),
    "mid-stream": (lambda gate: sse(TEXT, gate), True),
    "inside a later frame": (lambda gate: sse(TEXT, TEXT[:20], gate), True),
    "after the finish reason": (lambda gate: sse(TEXT, frame(chunk({}, finish="stop")), gate), True),
}  # fmt: skip


@ways
@pytest.mark.parametrize(("script", "begun"), MOMENTS.values(), ids=MOMENTS.keys())
async def test_leaving(
    grok: Upstream,
    service: InProcessService,
    ends: Ends,
    script: Callable[[Gate], Script],
    begun: bool,
    leave: Callable[[Caller], None],
) -> None:
    """Grok is hung up on, and the request ends as one whose caller left."""
    gate = Gate()
    async with service.caller() as caller:
        call = await started(grok, caller, script(gate))
        async with asyncio.timeout(TIMEOUT):
            await gate.reached.wait()
        if begun:
            assert (await caller.head())[0] == 200
        leave(caller)
        await call.hung_up(within=1)
    line = await ends.next()
    assert (line["status"], line["end"], line["code"]) == (200 if begun else None, "left", None)


@ways
async def test_leaving_after_the_hold(grok: Upstream, ends: Ends, leave: Callable[[Caller], None]) -> None:
    """A caller who has seen nothing but comments leaves like any other."""
    async with serving(grok.url, status_hold=0.05, keep_alive=0.05) as service, service.caller() as caller:
        call = await started(grok, caller, [Gate()])
        await caller.until(b": keep-alive\n\n")
        leave(caller)
        await call.hung_up(within=1)
        assert (await ends.next())["end"] == "left"


@ways
@pytest.mark.parametrize("resumable", [False, True], ids=["plain", "no way to come back"])
async def test_leaving_before_the_status(
    grok: Upstream, service: InProcessService, ends: Ends, resumable: bool, leave: Callable[[Caller], None]
) -> None:
    """Whoever leaves before the status cannot come back, so Grok is hung up on for a resumable answer, too."""
    seen = len(grok.calls)
    grok.scripts = [[Gate()]]
    async with service.caller() as caller:
        await caller.post({**CHAT, "resumable": resumable}, Accept="application/json" if resumable else "*/*")
        call = await grok.call(seen)
        leave(caller)
        await call.hung_up(within=1)
        assert (await ends.next())["status"] is None


@pytest.mark.parametrize("leave", [Caller.close, Caller.reset], ids=["FIN", "RST"])
async def test_leaving_while_we_write(
    grok: Upstream, service: InProcessService, ends: Ends, leave: Callable[[Caller], None]
) -> None:
    """A caller who has not read for so long that we wait to write is missed all the same."""
    async with service.caller(receive_buffer=4096) as caller:
        call = await started(grok, caller, flood)
        await stalled(call)
        leave(caller)
        await call.hung_up(within=1)
    assert (await ends.next())["end"] == "left"


def flood(_: Call) -> Iterator[Step]:
    """An answer without end, as fast as it is taken."""
    return chain([STREAM_HEAD], repeat(piece(frame(chunk({"content": "x" * 4000})))))


async def stalled(call: Call) -> None:
    """Wait until nothing more of the script is taken."""
    async with asyncio.timeout(10):
        sent = -1
        while sent != call.sent:
            sent = call.sent
            await asyncio.sleep(0.2)  # that nothing happens shows only with time


@ways
async def test_leaving_between_two_tries(
    grok: Upstream, service: InProcessService, ends: Ends, leave: Callable[[Caller], None]
) -> None:
    """Whoever leaves while we wait for another try ends the waiting, and nothing more is asked."""
    seen = len(grok.calls)
    async with service.caller() as caller:
        await started(grok, caller, error(503, {"error": "at capacity"}, {"Retry-After": "1"}))
        await grok.until(lambda: grok.playing == 0)
        leave(caller)
        line = await ends.next()
    assert (line["status"], line["end"]) == (None, "left")
    with pytest.raises(TimeoutError):
        await grok.call(seen + 1, within=1.2)


@ways
async def test_leaving_with_half_a_body(
    grok: Upstream, service: InProcessService, ends: Ends, leave: Callable[[Caller], None]
) -> None:
    """Whoever leaves before the request is complete has asked nothing."""
    seen = len(grok.calls)
    async with service.caller() as caller:
        await caller.post(b'{"messages": [', Content_Length="100")
        leave(caller)
        line = await ends.next()
    assert line["status"] is None
    assert len(grok.calls) == seen


@LINUX
@ways
async def test_leaving_while_connecting(ends: Ends, leave: Callable[[Caller], None]) -> None:
    """A connection to Grok that is not yet made is given up."""
    with unreachable() as url:
        async with serving(url) as service, service.caller() as caller:
            await connecting(url, 1)  # the check of the key
            await caller.post(CHAT)
            await connecting(url, 2)
            leave(caller)
            await connecting(url, 1)
            assert (await ends.next())["status"] is None


async def connecting(url: str, number: int) -> None:
    """Wait until so many connections to this address are on their way; the two that fill its queue do not count."""
    port = int(url.split(":")[2].removesuffix("/v1"))
    to_it = re.compile(rf"^ *\d+: \S+ 0100007F:{port:04X} 02 ", re.MULTILINE)  # 02 is SYN_SENT
    fillers = 1
    async with asyncio.timeout(1):
        while len(to_it.findall(Path("/proc/net/tcp").read_text())) != number + fillers:  # noqa: ASYNC110
            await asyncio.sleep(0.01)  # the kernel tells nobody


@pytest.mark.own_transport
@ways
async def test_leaving_while_tls_begins(ends: Ends, leave: Callable[[Caller], None]) -> None:
    """A connection to Grok is given up also while TLS is being agreed on."""
    async with Upstream() as grok, serving(grok.url.replace("http:", "https:")) as service, service.caller() as caller:
        await grok.until(lambda: grok.open == 1)  # the check of the key
        await caller.post(CHAT)
        await grok.until(lambda: grok.open == 2)
        leave(caller)
        await grok.until(lambda: grok.open == 1, within=1)
        assert (await ends.next())["status"] is None


async def test_hang_up_is_measured(grok: Upstream, service: InProcessService, ends: Ends) -> None:
    """The time from leaving to hanging up is a metric."""

    async def observed() -> tuple[float, float]:
        text = (await service.client.get("/metrics")).text
        count, total = (re.search(rf"chatproxy_hang_up_seconds_{name} (\S+)", text) for name in ("count", "sum"))
        assert count
        assert total
        return float(count[1]), float(total[1])

    before = await observed()
    async with service.caller() as caller:
        call = await started(grok, caller, [Gate()])
        caller.close()
        await call.hung_up()
        await ends.next()
    after = await observed()
    assert after[0] - before[0] == 1
    assert after[1] - before[1] < 1
