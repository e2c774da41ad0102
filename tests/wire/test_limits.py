"""Nothing is unbounded: neither places, nor memory, nor the time a stuck reader is waited for."""

import asyncio
import re
import resource
import socket
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import pytest

from chatproxy.config import load
from chatproxy.server import listen
from tests.conftest import HI, Service, SubprocessService, environment, failure, refusal, serving, spawned
from tests.readers import answer
from tests.upstream import (
    CLOSE,
    DONE,
    HANG,
    STREAM_HEAD,
    Call,
    Gate,
    Step,
    Steps,
    Upstream,
    chunk,
    error,
    frame,
    head,
    piece,
    sse,
    stream,
)

pytestmark = pytest.mark.anyio

LINUX = pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux drops such a reader, or tells a process's memory"
)

FIRST = frame(chunk({"role": "assistant", "content": "a"}))
TEXT = piece(frame(chunk({"content": "x" * 4000})))
END = [piece(DONE), piece(b"")]


# Places (MAX_STREAMS), files and bodies.


async def test_busy() -> None:
    """Over MAX_STREAMS a chat is refused without a call, and told when to come back; a place that is free is given."""
    gate = Gate()
    async with Upstream(stream("a", gate, "b")) as grok, serving(grok.url, max_streams=2) as service:
        async with asyncio.TaskGroup() as group:
            running = [group.create_task(service.ask()) for _ in range(2)]
            await grok.until(lambda: len(grok.calls) == 2)
            for resumable in (False, True):
                response = await service.ask(resumable=resumable)
                assert (response.status_code, refusal(response)["code"]) == (503, "busy")
                assert response.headers["Retry-After"] == "1"
            assert len(grok.calls) == 2
            gate.open()
        assert [answer(task.result().content) for task in running] == ["ab", "ab"]
        assert answer((await service.ask()).content) == "ab"


@LINUX
async def test_files() -> None:
    """MAX_STREAMS is the bound, and not the files that a shell allows: the service takes all that it may have."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(limits[1], 1024) - 1, limits[1]))
    try:
        async with Upstream() as grok, spawned(grok.url) as service:
            assert resource.prlimit(service.pid, resource.RLIMIT_NOFILE) == (limits[1], limits[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


# Whatever becomes of an answer, its place is free then.
ENDS: dict[str, Steps] = {
    "done": stream("a"),
    "refused": error(400, {"error": "x"}),
    "cut off": stream("a", CLOSE),
    "malformed": sse(FIRST, b"data: {\n\n", HANG),
    "no text": stream({}),
    "silent": sse(FIRST, HANG),
    "silent from the start": [HANG],
    "not HTTP": [b"canary\r\n\r\n", CLOSE],
    "overloaded": error(503, {"error": "x"}),
}


async def test_bodies_that_never_end() -> None:
    """Together they take no more than their share of memory; small ones are read all the same."""
    large = {"messages": [{"role": "user", "content": "a" * 100_000}]}
    async with Upstream() as grok, serving(grok.url) as service, AsyncExitStack() as stack:
        for _ in range(48):  # of 48 million bytes that large ones may take
            client = await stack.enter_async_context(service.caller())
            await client.post(b"a" * 999_000, Content_Length="999001", Expect="100-continue")
            assert (await client.head())[0] == 100
        status = 200
        async with asyncio.timeout(10):
            while status == 200:  # what was sent may still be on its way
                refused = await service.client.post("/api/chat", json=large)
                status = refused.status_code
        assert (status, refusal(refused)["code"]) == (503, "busy")
        assert int(refused.headers["Retry-After"]) > 0
        assert answer((await service.ask()).content) == "Hello, world"
        await stack.aclose()
        async with asyncio.timeout(10):
            while status == 503:
                status = (await service.client.post("/api/chat", json=large)).status_code
        assert status == 200


async def test_chats_that_wait() -> None:
    """A conversation counts until Grok's first chunk, also once its client has a status."""
    waiting = {"messages": [{"role": "user", "content": "a" * 990_000}]}
    gate = Gate()
    changes = {"status_hold": 0.05}
    async with Upstream(stream(gate, "a")) as grok, serving(grok.url, **changes) as service, AsyncExitStack() as stack:
        for number in range(48):
            client = await stack.enter_async_context(service.caller())
            await client.post(waiting)
            await grok.call(number)
        refused = await service.client.post("/api/chat", json=waiting)
        assert (refused.status_code, refusal(refused)["code"]) == (503, "busy")
        gate.open()
        await client.until(b"[DONE]")
        status = 503
        async with asyncio.timeout(5):
            while status == 503:
                status = (await service.client.post("/api/chat", json=waiting)).status_code
        assert status == 200


@pytest.mark.parametrize("resumable", [False, True], ids=["plain", "resumable"])
async def test_places_are_freed(resumable: bool) -> None:
    """Whatever becomes of an answer, and whoever leaves it, the place is free afterwards."""
    changes = {"max_streams": 1, "idle_timeout": 0.1, "first_token_timeout": 0.1, "grok_retries": 0}
    async with Upstream() as grok, serving(grok.url, **changes) as service:
        for steps in ENDS.values():
            grok.set_scripts(steps)
            await service.ask(resumable=resumable)
            assert len(grok.calls) == 1
        for waiting in ("no headers", "headers"):
            grok.set_scripts([HANG] if waiting == "no headers" else sse(HANG))
            async with service.caller() as caller:
                await caller.post({"messages": HI, "resumable": resumable})
                await grok.call()
            await grok.until(lambda: grok.playing == 0)
        grok.set_scripts()
        assert (await service.ask(resumable=resumable)).status_code == 200


@pytest.mark.parametrize("resumable", [False, True], ids=["plain", "resumable"])
async def test_place_is_free_at_the_end_marker(resumable: bool) -> None:
    """Whoever has read `[DONE]` may ask again, also while Grok takes its time to end the body."""
    async with (
        Upstream([*stream("a")[:-1], 0.8, b"0\r\n\r\n"]) as grok,
        serving(grok.url, max_streams=1, max_streams_per_client=1) as service,
    ):
        for _ in range(3):
            async with service.asking(resumable=resumable) as live:
                while (event := await live.event()).data != "[DONE]":
                    assert event.type == "message"
        assert len(grok.calls) == 3


# Memory.


@asynccontextmanager
async def within(service: SubprocessService, megabytes: int) -> AsyncIterator[None]:
    """The most memory that the service has resident inside of it is so little above what it had before."""
    process = Path(f"/proc/{service.pid}")

    def resident(which: str) -> int:
        found = re.search(rf"{which}:\s+(\d+) kB", (process / "status").read_text())
        assert found
        return int(found[1]) * 1024

    (process / "clear_refs").write_text("5")  # forget the peak so far
    before = resident("VmRSS")
    yield
    assert resident("VmHWM") - before < megabytes * 1_000_000


@asynccontextmanager
async def warm(grok: Upstream, **changes: Any) -> AsyncIterator[SubprocessService]:
    """A service of its own that has answered before."""
    async with spawned(grok.url, **changes) as service:
        grok.set_scripts(stream("a"))
        for _ in range(10):
            assert answer((await service.ask()).content) == "a"
        yield service


SIZE = 200_000_000
BLOCK = 100_000


def blocks(data: bytes) -> Iterator[Step]:
    """So much of it in all, in transfer chunks."""
    return repeat(piece(data * (BLOCK // len(data))), SIZE // BLOCK)


# An upstream that sends 200 MB and never a frame.
FLOODS: dict[str, tuple[Callable[[], Iterator[Step]], str]] = {
    "a line without end": (lambda: chain([piece(b"data: ")], blocks(b"x")), "upstream_error"),
    "a comment without end": (lambda: chain([piece(b": ")], blocks(b"x")), "upstream_error"),
    "an event without end": (lambda: blocks(b"data: x\n"), "upstream_error"),
    "an event of empty lines": (lambda: blocks(b"data\n"), "upstream_error"),
    "one transfer chunk": (lambda: chain([b"%x\r\n" % SIZE, b"data: "], repeat(b"x" * BLOCK, SIZE // BLOCK)),
                           "upstream_error"),
}  # fmt: skip


@pytest.mark.own_transport
@LINUX
@pytest.mark.parametrize(("flood", "code"), FLOODS.values(), ids=FLOODS.keys())
async def test_flood_of_grok(flood: Callable[[], Iterator[Step]], code: str) -> None:
    """Grok is hung up on after a megabyte of what will be no frame, before the first chunk or after it."""
    async with Upstream() as grok, warm(grok, grok_retries=0) as service, within(service, 20):
        grok.set_scripts(lambda _: chain([STREAM_HEAD], flood()))
        response = await service.ask()
        assert (response.status_code, refusal(response)["code"]) == (502, code)
        grok.scripts = [lambda _: chain([STREAM_HEAD, piece(FIRST)], flood())]
        async with service.asking() as live:
            token, event = await live.rest()
        assert token.data == "a"
        assert failure(event, live.response)["code"] == code
        for call in grok.calls:
            await call.hung_up()
            assert call.sent < SIZE / 10


@LINUX
async def test_flood_of_comments() -> None:
    """200 MB of comments are no fault and cost nothing."""
    comments = b": " + b"ping " * 39 + b"\n\n"  # a million of them
    async with Upstream() as grok, warm(grok) as service, within(service, 20):
        grok.set_scripts(lambda _: chain([STREAM_HEAD, piece(FIRST)], blocks(comments), END))
        async with asyncio.timeout(30):
            assert answer((await service.ask()).content) == "a"
        assert grok.calls[0].sent > SIZE * 0.9


@LINUX
async def test_flood_of_an_error() -> None:
    """Of an error body without end only the beginning is read."""
    async with Upstream() as grok, warm(grok, grok_retries=0) as service, within(service, 20):
        kind = {"Content-Type": "text/html", "Content-Length": str(SIZE)}
        grok.set_scripts(lambda _: chain([head(500, kind)], repeat(b"x" * BLOCK, SIZE // BLOCK)))
        assert (await service.ask()).status_code == 502
        await grok.calls[0].hung_up()
        assert grok.calls[0].sent < SIZE / 10


@LINUX
@pytest.mark.parametrize("shape", ["tokens", "a large event"])
async def test_flood_to_a_stuck_reader(shape: str) -> None:
    """A reader who stops reading under a flood stops the flood: Grok is not read any further."""
    text = TEXT if shape == "tokens" else piece(frame(chunk({"content": "x\n" * 400_000})))

    async with AsyncExitStack() as stack:
        grok = await stack.enter_async_context(Upstream())
        service = await stack.enter_async_context(warm(grok))
        await stack.enter_async_context(within(service, 20))
        caller = await stack.enter_async_context(service.caller(receive_buffer=4096))
        grok.set_scripts(lambda _: chain([STREAM_HEAD], repeat(text, SIZE // len(text))))
        await caller.post({"messages": HI})
        call = await grok.call()
        await stalled(call)
        assert call.sent < SIZE / 10


@LINUX
async def test_flood_to_a_stuck_reader_of_a_resumable_answer() -> None:
    """A resumable answer is read on without its reader, but kept only up to REPLAY_BYTES; others read all of it."""
    async with AsyncExitStack() as stack:
        grok = await stack.enter_async_context(Upstream())
        service = await stack.enter_async_context(warm(grok, replay_bytes=1_000_000))
        await stack.enter_async_context(within(service, 20))
        caller = await stack.enter_async_context(service.caller(receive_buffer=4096))
        grok.set_scripts(lambda _: chain([STREAM_HEAD], repeat(TEXT, 20_000), END))
        await caller.post({"messages": HI, "resumable": True})
        call = await grok.call()
        async with asyncio.timeout(30):
            await call.played.wait()
        assert call.sent > 80_000_000


async def stalled(call: Call) -> None:
    """Wait until nothing more of the script is taken."""
    async with asyncio.timeout(10):
        sent = -1
        while sent != call.sent:
            sent = call.sent
            await asyncio.sleep(0.3)  # that nothing happens shows only with time


# Stuck readers (WRITE_TIMEOUT).

WRITE_TIMEOUT = 0.7


def flood(_: Call) -> Steps:
    return chain([STREAM_HEAD], repeat(TEXT))


@LINUX
@pytest.mark.parametrize("resumable", [False, True], ids=["plain", "resumable"])
async def test_stuck_reader_and_its_place(resumable: bool) -> None:
    """A reader who takes nothing for WRITE_TIMEOUT is dropped, socket and all; Grok is hung up on, a place free."""
    changes = {"write_timeout": WRITE_TIMEOUT, "max_streams": 1, "resume_window": 0.1, "replay_bytes": 100_000}
    async with (
        Upstream(flood) as grok,
        serving(grok.url, **changes) as service,
        service.caller(receive_buffer=4096) as caller,
    ):
        await caller.post({"messages": HI, "resumable": resumable})
        await caller.head()
        began = asyncio.get_running_loop().time()
        assert connections(service) == 1
        left_at = await grok.calls[0].hung_up(within=WRITE_TIMEOUT + 4)
        assert left_at - began > WRITE_TIMEOUT * 0.9
        assert connections(service) == 0
        grok.set_scripts(stream("ok"))
        assert answer((await service.ask()).content) == "ok"
        with pytest.raises(ConnectionError):  # after what was on its way, and no tidy end
            await caller.rest()


def connections(service: Service) -> int:
    """The established connections of callers, as the kernel has them on our side."""
    ours = re.compile(rf"^ *\d+: 0100007F:{service.port:04X} \S+ 01 ", re.MULTILINE)
    return len(ours.findall(Path("/proc/net/tcp").read_text()))


@LINUX
@pytest.mark.parametrize(("seconds", "told"), [(0.0001, 1), (2.5, 2500), (31_536_000, 2**31 - 1)])
def test_write_timeout_of_the_kernel(seconds: float, told: int) -> None:
    """Whatever WRITE_TIMEOUT may be, the kernel is told as much as it takes, and never to wait without end."""
    with listen(load(environment("http://localhost/v1", write_timeout=seconds))) as sock:
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == told


@LINUX
async def test_stuck_reader_in_silence() -> None:
    """Keep-alives that are not taken are writes, too: a reader is missed though Grok says nothing."""
    changes = {"write_timeout": WRITE_TIMEOUT, "keep_alive": 0.02}
    async with (
        Upstream(stream("x" * 500_000, HANG)) as grok,
        serving(grok.url, **changes) as service,
        service.caller(receive_buffer=4096) as caller,
    ):
        await caller.post({"messages": HI})
        await (await grok.call()).hung_up(within=WRITE_TIMEOUT + 4)


async def test_slow_but_steady_reader() -> None:
    """Whoever reads little, but again and again, gets it all, though it takes many times WRITE_TIMEOUT."""
    script = chain([STREAM_HEAD], repeat(TEXT, 120), END)
    loop = asyncio.get_running_loop()
    async with (
        Upstream(script) as grok,
        serving(grok.url, write_timeout=0.7) as service,
        service.caller(receive_buffer=4096) as caller,
    ):
        await caller.post({"messages": HI}, Connection="close")
        await caller.head()
        began = loop.time()
        body = b""
        while data := await caller.some(4096):
            body += data
            await asyncio.sleep(0.02)
        assert loop.time() - began > 3 * 0.7
    assert body.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    assert body.count(b"x" * 1000) == 120 * 4
