"""The service stops as it promised: nobody is cut off unannounced, and it takes no longer than it may."""

import asyncio
import os
import re
import signal
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import chain, repeat

import httpx
import pytest
import uvicorn
from uvicorn.server import HANDLED_SIGNALS

from tests.conftest import HI, TIMEOUT, LiveStream, Service, failure, refusal, serving, spawned
from tests.readers import DONE, Event, answer
from tests.upstream import HANG, STREAM_HEAD, Call, Gate, Step, Steps, Upstream, chunk, error, frame, piece, stream

pytestmark = pytest.mark.anyio

DRAIN_TIMEOUT = 1.0

# What stopping may take besides: a second for the last words, the end of the process, and a busy machine.
REST = 3.0

LOG_LINE = re.compile(r"\d{4}-\d\d-\d\dT[\d:.]+Z (info|warning) \S.*")


def only_log_lines(stderr: str) -> None:
    """Nothing else was written, nor any error: no traceback, no warning of Python's."""
    assert [line for line in stderr.splitlines() if not LOG_LINE.fullmatch(line)] == []


def endless(text: str = "a", pause: float = 0.05) -> Iterator[Step]:
    return chain([STREAM_HEAD], chain.from_iterable(repeat((piece(frame(chunk({"content": text}))), pause))))


async def stopping(service: Service) -> None:
    """Wait, no longer than a second, until the service says that it is stopping."""
    status = 200
    async with asyncio.timeout(1):
        while status == 200:
            response = await service.client.get("/readyz")
            status = response.status_code
    assert (status, response.json()["reason"]) == (503, "draining")


@asynccontextmanager
async def begun(service: Service, content: str) -> AsyncIterator[LiveStream]:
    """A stream whose first token has come."""
    async with service.asking(content) as live:
        assert (await live.event()).data == "a"
        yield live


async def test_connections_to_grok() -> None:
    """A connection that was kept for the next chat ends with the service."""
    async with Upstream() as grok:
        async with serving(grok.url) as service:
            assert answer((await service.ask()).content) == "Hello, world"
            assert grok.open >= 1
        await grok.until(lambda: grok.open == 0)


async def test_uvicorn_takes_no_signal() -> None:
    """The service's signal handlers stay as they are: uvicorn's would close the listening socket at once."""
    assert threading.current_thread() is threading.main_thread()  # in others uvicorn takes none anyway
    assert "capture_signals" in vars(uvicorn.Server)  # what server.py overrides
    before = {number: signal.getsignal(number) for number in HANDLED_SIGNALS}
    async with Upstream() as grok, serving(grok.url):
        assert {number: signal.getsignal(number) for number in HANDLED_SIGNALS} == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_drain(number: signal.Signals) -> None:
    """Fifty streams: the short ones end as ever, the endless ones are told; new chats are sent elsewhere meanwhile."""
    loop = asyncio.get_running_loop()
    gate = Gate()

    def script(call: Call) -> Steps:
        return stream("a", gate, "b") if call.body["messages"][0]["content"] == "short" else endless()

    async with (
        Upstream(script) as grok,
        spawned(grok.url, drain_timeout=DRAIN_TIMEOUT) as service,
        AsyncExitStack() as stack,
    ):
        streams = {
            kind: [await stack.enter_async_context(begun(service, kind)) for _ in range(25)]
            for kind in ("short", "endless")
        }
        signalled = loop.time()
        service.process.send_signal(number)
        await stopping(service)
        for accept in ("text/event-stream", "application/json"):
            response = await service.ask(headers={"Accept": accept})
            assert (response.status_code, refusal(response)["code"]) == (503, "draining")
            assert int(response.headers["Retry-After"]) >= 1
        assert (await service.client.get("/healthz")).status_code == 200
        gate.open()
        for live in streams["short"]:
            assert await live.rest() == [Event("b"), Event(DONE)]
        assert loop.time() - signalled < DRAIN_TIMEOUT
        for live in streams["endless"]:
            *text, last = await live.rest()
            assert {event.data for event in text} == {"a"}
            assert failure(last, live.response)["code"] == "draining"
        assert DRAIN_TIMEOUT <= loop.time() - signalled < DRAIN_TIMEOUT + REST
        assert await service.exit_code(within=REST) == 0
        assert len(grok.calls) == 50
    only_log_lines(service.stderr)


async def test_drain_ends_with_the_last_stream() -> None:
    """Once nothing runs any more nothing is waited for, though there is time left."""
    gate = Gate()
    async with Upstream(stream("a", gate, "b")) as grok, spawned(grok.url, drain_timeout=60) as service:
        async with begun(service, "Hi") as live:
            service.process.terminate()
            await stopping(service)
            gate.open()
            assert await live.rest() == [Event("b"), Event(DONE)]
        assert await service.exit_code(within=REST) == 0
    only_log_lines(service.stderr)


async def test_nothing_to_drain() -> None:
    """An idle service stops at once, whatever connections are kept open."""
    async with Upstream() as grok, spawned(grok.url, drain_timeout=60) as service, service.caller() as caller:
        await caller.send(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await caller.until(b"\r\n\r\n")
        service.process.terminate()
        assert await service.exit_code(within=REST) == 0
    only_log_lines(service.stderr)


@pytest.mark.parametrize(
    "script", [[HANG], error(503, {"error": "x"}, {"Retry-After": "4"})], ids=["waiting", "a retry"]
)
async def test_drain_before_the_status(script: list[Step]) -> None:
    """A chat that has no status yet when the time is over gets a true one."""
    async with Upstream(script) as grok, spawned(grok.url, drain_timeout=0.3) as service:
        asked = asyncio.create_task(service.ask())
        await grok.call()
        service.process.terminate()
        response = await asked
        assert (response.status_code, refusal(response)["code"]) == (503, "draining")
        assert await service.exit_code(within=REST) == 0
    only_log_lines(service.stderr)


async def test_resumable_while_draining() -> None:
    """A resumable answer can still be resumed while it runs, and tells everyone in the end; new ones are refused."""
    async with Upstream(endless()) as grok, spawned(grok.url, drain_timeout=DRAIN_TIMEOUT) as service:
        created = (await service.ask(headers={"Accept": "application/json"})).json()
        async with service.client.stream("GET", created["url"]) as response:
            live = LiveStream(response)
            first = await live.event()
            service.process.terminate()
            await stopping(service)
            async with service.client.stream("GET", created["url"], headers={"Last-Event-ID": first.id}) as again:
                other = LiveStream(again)
                assert again.status_code == 200
                *_, last = await live.rest()
                assert [*(await other.rest())][-1] == last
        assert '"code":"draining"' in last.data
        assert last.type == "error"
        assert await service.exit_code(within=REST) == 0
    only_log_lines(service.stderr)


async def test_repeated_while_draining() -> None:
    """A POST that only repeats one with the same key gets that one's answer; with another key it would be a new one."""
    body = {"messages": HI}
    async with Upstream(endless()) as grok, spawned(grok.url, drain_timeout=DRAIN_TIMEOUT) as service:
        async with service.asking(headers={"Idempotency-Key": "a"}) as live:
            assert (await live.event()).data == "a"
            service.process.terminate()
            await stopping(service)
            for key in ({"Idempotency-Key": "b"}, {}):
                response = await service.client.post("/api/chat", json=body, headers=key)
                assert (response.status_code, refusal(response)["code"]) == (503, "draining")
            async with service.asking(headers={"Idempotency-Key": "a"}) as again:
                assert again.response.headers["Content-Location"] == live.response.headers["Content-Location"]
                last = (await again.rest())[-1]
            assert failure(last, live.response)["code"] == "draining"
        assert len(grok.calls) == 1
        assert await service.exit_code(within=REST) == 0
    only_log_lines(service.stderr)


async def test_unread_while_draining() -> None:
    """A resumable answer that nobody reads just then is waited for like any other, and can be read."""
    gate = Gate()
    async with Upstream(stream("a", gate, "b")) as grok, spawned(grok.url, drain_timeout=TIMEOUT) as service:
        created = (await service.ask(headers={"Accept": "application/json"})).json()
        service.process.terminate()
        with pytest.raises(TimeoutError):
            await service.exit_code(within=0.5)
        async with service.client.stream("GET", created["url"]) as response:
            live = LiveStream(response)
            assert (await live.event()).data == "a"
            gate.open()
            assert [event.data for event in await live.rest()] == ["b", DONE]
        assert await service.exit_code(within=REST) == 0
    only_log_lines(service.stderr)


async def test_nobody_holds_up_the_end() -> None:
    """Readers who take nothing, half a request, and answers that nobody reads are not waited for for ever."""
    text = "x" * 4000

    def script(call: Call) -> Steps:
        return endless(text, 0) if call.body["messages"][0]["content"] == "Hi" else endless()

    async with (
        Upstream(script) as grok,
        spawned(grok.url, drain_timeout=0.5) as service,
        service.caller(receive_buffer=4096) as stuck,
        service.caller(receive_buffer=4096) as stuck_too,
        service.caller() as slow,
        service.caller() as silent,
    ):
        await stuck.post({"messages": HI})
        await stuck_too.post({"messages": HI, "resumable": True})
        await slow.post(b'{"messages"', Content_Length="1000")
        await silent.send(b"POST /api")
        await service.ask("unread", headers={"Accept": "application/json"})
        await grok.until(lambda: grok.playing == 3)
        service.process.terminate()
        assert await service.exit_code(within=0.5 + REST) == 0
        await grok.until(lambda: grok.open == 0)
    only_log_lines(service.stderr)


@pytest.mark.parametrize(
    ("first", "second"),
    [(signal.SIGTERM, signal.SIGTERM), (signal.SIGINT, signal.SIGINT), (signal.SIGTERM, signal.SIGINT)],
)
async def test_second_signal(first: signal.Signals, second: signal.Signals) -> None:
    """A second signal ends the process at once, with exit code 1."""
    async with Upstream(endless()) as grok, spawned(grok.url, drain_timeout=60) as service, begun(service, "Hi"):
        service.process.send_signal(first)
        await stopping(service)
        service.process.send_signal(second)
        assert await service.exit_code(within=REST) == 1
    only_log_lines(service.stderr)


# Under the reloader, which is `make run`: two processes, and Ctrl-C reaches both.


@pytest.mark.parametrize("running", [False, True], ids=["idle", "with a stream"])
async def test_ctrl_c_under_the_reloader(running: bool) -> None:
    """Ctrl-C stops both processes as a signal stops one: the stream is told, the exit code is 0, nothing is printed."""
    async with (
        Upstream(endless()) as grok,
        spawned(grok.url, "--reload", drain_timeout=0.5) as service,
        AsyncExitStack() as stack,
    ):
        streams = [await stack.enter_async_context(begun(service, "Hi"))] if running else []
        os.killpg(service.pid, signal.SIGINT)
        for live in streams:
            *_, last = await live.rest()
            assert failure(last, live.response)["code"] == "draining"
        assert await service.exit_code(within=0.5 + REST) == 0
        with pytest.raises(httpx.ConnectError):  # nobody is left to answer
            await service.client.get("/healthz")
    only_log_lines(service.stderr)


async def test_second_ctrl_c_under_the_reloader() -> None:
    """Another Ctrl-C does not wait for the streams."""
    async with Upstream(endless()) as grok, spawned(grok.url, "--reload", drain_timeout=60) as service:
        async with begun(service, "Hi"):
            os.killpg(service.pid, signal.SIGINT)
            await stopping(service)
            await asyncio.sleep(0.6)  # nobody is that quick; the first may reach the service twice
            os.killpg(service.pid, signal.SIGINT)
            await service.exit_code(within=REST)
        with pytest.raises(httpx.ConnectError):  # nobody is left to answer
            await service.client.get("/healthz")
    only_log_lines(service.stderr)


async def test_signal_to_the_reloader() -> None:
    """A signal to the reloader alone, as from a supervisor, stops both."""
    async with Upstream(endless()) as grok, spawned(grok.url, "--reload", drain_timeout=0.5) as service:
        async with begun(service, "Hi") as live:
            service.process.terminate()
            *_, last = await live.rest()
            assert failure(last, live.response)["code"] == "draining"
        assert await service.exit_code(within=REST) == 0
        with pytest.raises(httpx.ConnectError):  # nobody is left to answer
            await service.client.get("/healthz")
    only_log_lines(service.stderr)
