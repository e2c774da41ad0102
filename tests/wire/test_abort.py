"""Nothing is left of streams that were broken off, however many and wherever.

Run as a program, this is the service in one event loop after the other. It tells its port, then at each SIGUSR1 what
there is of streams; SIGUSR2 ends a loop.
"""

import asyncio
import gc
import json
import logging
import os
import random
import signal
import sys
from asyncio import constants
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvloop

from chatproxy import config
from chatproxy.cancellation import CancellableWait
from chatproxy.connection import HTTPProtocol
from chatproxy.events import Chat, StreamSummary
from chatproxy.routes.responses import EventSourceResponse, RequestContext
from chatproxy.server import Server
from chatproxy.services.grok.completion import Completion
from chatproxy.services.resumable import ResumableStream
from chatproxy.sse import Decoder
from tests.conftest import HI, MEASURED, ROOT, TIMEOUT, Caller, Service, environment, serving, spawned
from tests.readers import answer
from tests.upstream import CLOSE, HANG, RESET, Steps, Upstream, error, sse, stream

STREAMS = 2000
REFUSALS = 200
TOGETHER = 100

LIMITED = error(429, {"code": "resource-exhausted", "error": "Too many requests for team x and model grok-4.3."})
WORDS = [str(number) for number in range(20)]
ANSWERS: list[Steps] = [
    [HANG],
    sse(HANG),
    sse(b": ping\n\n", HANG),
    error(503, {"error": "at capacity"}),
    stream(*WORDS),
    stream(*WORDS, CLOSE),
    stream(*WORDS[:9], RESET),
    stream(*WORDS[:1], HANG),
    stream(*WORDS[:9], 0.01, *WORDS[9:]),
    stream(*["x" * 20_000] * 15),
]  # fmt: skip


async def abort(service: Service, chance: random.Random) -> None:
    """One caller, who leaves at some byte of the request, in some wait, or at some byte of the answer."""
    async with service.caller() as caller:
        body = json.dumps({"messages": HI, "resumable": chance.random() < 0.3}).encode()
        if chance.random() < 0.1:
            await caller.post(body[: chance.randrange(len(body))], Content_Length=str(len(body)))
        else:
            await caller.post(body, Accept=chance.choice(["text/event-stream", "application/json"]))
            if chance.random() < 0.3:
                await asyncio.sleep(chance.random() * 0.02)  # most often nothing has been said by then
            else:
                await read_some(caller, chance.randrange(1, 3000))
        chance.choice([Caller.close, Caller.reset, Caller.half_close])(caller)


async def read_some(caller: Caller, size: int) -> None:
    with suppress(TimeoutError, ConnectionError):
        async with asyncio.timeout(0.05):
            while size > 0 and (data := await caller.some()):
                size -= len(data)


async def storm(grok: Upstream, service: Service, streams: int, refusals: int) -> None:
    """So many streams that are broken off, then so many that Grok refuses; the next is answered within a second."""
    last = {"Connection": "close"}  # one that is kept would keep what it was about
    chance = random.Random(streams)  # noqa: S311 -- the same storm each time
    grok.set_scripts(lambda _: chance.choice(ANSWERS))
    for _ in range(streams // TOGETHER):
        async with asyncio.TaskGroup() as group:
            for _ in range(TOGETHER):
                group.create_task(abort(service, chance))
        assert (await service.client.get("/healthz", headers=last)).is_success  # it has caught up
    await grok.until(lambda: grok.playing == 0)  # everybody was hung up on

    grok.set_scripts(LIMITED)
    refused = await asyncio.gather(*(service.ask(headers=last) for _ in range(refusals)))
    assert ["upstream_rate_limited" in response.text for response in refused] == [True] * refusals
    grok.set_scripts()
    async with asyncio.timeout(1):
        assert answer((await service.ask(headers=last)).content) == "Hello, world"


# Of each of these there is one for a stream, a request or a connection, and none besides.
KINDS = (
    *(CancellableWait, Chat, Completion, Decoder, EventSourceResponse, HTTPProtocol, RequestContext),
    *(ResumableStream, StreamSummary),
)

Remains = dict[str, int]


def objects() -> Counter[str]:
    return Counter(type(thing).__name__ for thing in gc.get_objects() if isinstance(thing, KINDS))


def remains() -> Remains:
    """What there is: objects of these kinds, tasks (those that are done, too), open files, and megabytes of memory."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        **objects(),
        "tasks": sum(isinstance(thing, asyncio.Task) for thing in gc.get_objects()),
        "files": len([*Path("/proc/self/fd").iterdir()]),
        "megabytes": pages * os.sysconf("SC_PAGE_SIZE") // 1_000_000,
    }


def tell(what: object) -> None:
    print(json.dumps(what), flush=True)  # noqa: T201 -- this is how the program talks to the test


async def one_loop(settings: config.Settings) -> None:
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    loop.slow_callback_duration = 60  # how slow is not what is asked here
    loop.add_signal_handler(signal.SIGUSR1, lambda: tell(remains()))
    loop.add_signal_handler(signal.SIGUSR2, stop.set)
    async with Server(settings).running() as port:
        tell(port)
        await stop.wait()
    tell(remains())


def main() -> None:
    constants.DEBUG_STACK_DEPTH = 1  # type: ignore[misc] # most of what debugging costs; nobody looks at the stacks
    logging.getLogger("chatproxy").addHandler(logging.NullHandler())
    logging.getLogger("chatproxy").propagate = False  # what others log goes to stderr
    settings = config.load(os.environ)
    # Python 3.11 traces how a cancelled coroutine returns, but not how it is called: coverage loses those around it.
    for loop_factory in (asyncio.new_event_loop, uvloop.new_event_loop):  # pragma: no branch
        with asyncio.Runner(loop_factory=loop_factory) as runner:
            runner.run(one_loop(settings))


class Program:
    """This file, run as a program."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def told(self) -> Any:
        assert self._process.stdout
        async with asyncio.timeout(TIMEOUT):
            return json.loads(await self._process.stdout.readline())

    async def remains(self) -> Remains:
        self._process.send_signal(signal.SIGUSR1)
        remains: Remains = await self.told()
        return remains

    async def stop(self) -> Remains:
        self._process.send_signal(signal.SIGUSR2)
        remains: Remains = await self.told()
        return remains

    async def end(self) -> tuple[str, int]:
        """What it has written to stderr, and its exit code."""
        async with asyncio.timeout(TIMEOUT):
            _, errors = await self._process.communicate()
        assert self._process.returncode is not None
        return errors.decode(), self._process.returncode


@asynccontextmanager
async def program(upstream_url: str, **changes: object) -> AsyncIterator[Program]:
    variables = environment(upstream_url, **changes, pythonasynciodebug=1, pythonpath=ROOT)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-W", "error", "-m", "tests.wire.test_abort"),
        env=variables | MEASURED,
        cwd=ROOT,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        yield Program(process)
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


LINUX = pytest.mark.skipif(sys.platform != "linux", reason="files and memory are counted as Linux has them")
CHANGES = {"resume_window": 0.1, "replay_ttl": 0.1, "status_hold": 0.02, "grok_retries": 0}


@LINUX
@pytest.mark.own_transport
@pytest.mark.anyio
async def test_nothing_is_left() -> None:
    """After 2,000 broken streams all is as before: objects, tasks, files, memory; in each of two event loops."""
    async with Upstream() as grok, program(grok.url, **CHANGES) as run:
        memory = []
        for _ in range(2):
            async with client(await run.told()) as service:
                await storm(grok, service, TOGETHER, 1)  # what is made only once is there now
                before = await settled(grok, run)
                await storm(grok, service, STREAMS, REFUSALS)
                after = await settled(grok, run)
            before.pop("megabytes")
            memory.append(after.pop("megabytes"))
            assert after == before
            end = await run.stop()
            assert (set(end), end["tasks"]) == (ALWAYS, 2)  # the loop's, and the server's
        assert await run.end() == ("", 0)
    assert memory[1] - memory[0] < 10  # what the first storm took is enough for the second


@asynccontextmanager
async def client(port: int) -> AsyncIterator[Service]:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(
        base_url=f"http://127.0.0.1:{port}", timeout=TIMEOUT, trust_env=False, limits=limits
    ) as client:
        yield Service(port, client)


ALWAYS = {"tasks", "files", "megabytes"}
TASKS = 3  # the loop's, the server's, and its lifespan's


async def settled(grok: Upstream, run: Program) -> Remains:
    """What remains once nothing is left of any stream. Connections to Grok that are kept for later do not count."""
    async with asyncio.timeout(5):
        while set(remains := await run.remains()) != ALWAYS or remains["tasks"] > TASKS:  # noqa: ASYNC110
            await asyncio.sleep(0.05)  # what could be resumed is forgotten in its time
    remains["files"] -= grok.open
    return remains


@pytest.mark.own_transport
@pytest.mark.anyio
@pytest.mark.parametrize("resumable", [False, True], ids=["plain", "resumable"])
async def test_no_garbage(resumable: bool) -> None:
    """A complete answer is freed when it ends, or is forgotten; it does not wait for the garbage collector."""
    async with Upstream(stream("a")) as grok, serving(grok.url, replay_ttl=0.1) as service:
        gc.collect()
        gc.disable()
        try:
            before = objects()
            async with service.caller() as caller:
                await caller.post({"messages": HI, "resumable": resumable}, Connection="close")
                assert b"data: [DONE]\n" in await caller.rest()
            async with asyncio.timeout(5):
                while objects() - before:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)  # what is freed tells nobody
        finally:
            gc.enable()


@pytest.mark.anyio
async def test_reset_between_two_requests(service: Service) -> None:
    """A caller who resets a connection that waits for the next request leaves nothing behind."""
    async with service.caller() as caller:
        await caller.post({"messages": HI})
        await caller.until(b"\r\n0\r\n\r\n")
        assert remains()["Protocol"] == 1
        caller.reset()
        async with asyncio.timeout(5):
            while {"Protocol", "RequestContext"} & remains().keys():  # noqa: ASYNC110
                await asyncio.sleep(0.01)  # what is forgotten tells nobody


@LINUX
@pytest.mark.anyio
async def test_nothing_but_log_lines() -> None:
    """The service as it is started has nothing to say of such a storm but its log lines, with all warnings on."""
    changes: dict[str, Any] = {"pythonasynciodebug": 1, "log_format": "json", **CHANGES}
    async with Upstream() as grok, spawned(grok.url, python=("-W", "error"), **changes) as service:
        await storm(grok, service, 200, 20)
        service.process.terminate()
        assert await service.exit_code() == 0
    lines = [json.loads(line) for line in service.stderr.splitlines()]
    assert {line["logger"].split(".")[0] for line in lines} <= {"chatproxy", "asyncio"}
    # Being slow is all that asyncio may complain about.
    complaints = [line["message"] for line in lines if line["logger"] == "asyncio"]
    assert [text for text in complaints if not text.startswith("Executing ")] == []
    assert [line for line in lines if line["level"] == "error" or "exception" in line] == []
    assert sum(line["message"] == "request" for line in lines) > 200


if __name__ == "__main__":
    main()
