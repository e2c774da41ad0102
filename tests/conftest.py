"""What every test may use: the service under test, and a caller that can misbehave.

    from tests.conftest import serving, spawned, Caller
    from tests.upstream import Upstream, stream

    pytestmark = pytest.mark.anyio

    async def test_answer():
        async with Upstream(stream("Hel", "lo")) as upstream, serving(upstream.url, keep_alive=0.1) as service:
            response = await service.ask("Hi")                  # POST /api/chat, read to the end
            response = await service.client.get("/healthz")     # any other request; an httpx client
            async with service.asking("Hi") as live:            # the same, event by event as they arrive
                assert await live.event() == Event("Hel")
            async with service.caller() as caller:              # a bare socket
                await caller.post({"messages": HI})
                caller.reset()

* `serving(upstream_url, **changes)`: the service in this loop, on a free port. Changes are settings by their lower-case
  names; None takes one away; `timing` is for what no setting changes. `service.settings`, `.url`, `.port`, `.client`.
* `spawned(upstream_url, **changes)`: the same as a process of its own, `python -m chatproxy`, for signals, exit codes
  and memory: also `.pid`, `.process`, `.stderr` (so far), `await .exit_code(within)`. Killed at the end if need be.
* `environment(upstream_url, **changes)`: the variables that both are given.
* `grok` and `service`: fixtures, one of each for a whole test module, with nothing changed. Starting and stopping a
  service takes 0.2 s, so prefer them where the settings allow: `grok.set_scripts(stream("a"))`, then `service.ask()`.
  A module may define its own `service` with other settings.
* `from_recordings(parameters)`: test parameters made from the directory of recorded answers, or one that is skipped.
* `refusal(response)`, `failure(event, response)`: the error of an answer, of an `event: error`; checked to be whole.

Unless changed: a key, no retries other than the defaults, HOST=127.0.0.1, and a port that is free.
A test that makes anything log a traceback fails. With REQUIRE_ALL=1 a skipped test is a failed one.
REDIS_URL=redis://… runs the tests with a Redis of that address, and with REPLICAS=2 each service is two, behind a
proxy that gives each connection to the next one. (For the tests of what replicas have in common; others look at one.)
GROK_TRANSPORT=httpx runs the tests over httpx's own transport; those marked `own_transport` then have no use.
"""

import asyncio
import itertools
import json
import os
import random
import secrets
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from _pytest.mark import ParameterSet

from chatproxy import config
from chatproxy.config.timing import DEFAULT_TIMING, Timing
from chatproxy.server import Server
from tests import readers
from tests.upstream import RESET_ON_CLOSE, Upstream

ROOT = Path(__file__).parent.parent
KEY = "xai-test-0123456789abcdef"
HI = [{"role": "user", "content": "Hi"}]
TIMEOUT = 10.0
"""Seconds that a test waits for something that comes at once when all is well."""
MEASURED = {name: value for name, value in os.environ.items() if name.startswith("COVERAGE_")}
"""The variables of a process that is to be measured as this one is, if it is."""


def environment(upstream_url: str, **changes: object) -> dict[str, str]:
    """The variables for a service whose Grok is at this address."""
    values = {
        "grok_base_url": upstream_url,
        "grok_api_key": KEY,
        "grok_transport": os.environ.get("GROK_TRANSPORT"),
        "redis_url": os.environ.get("REDIS_URL"),
        # What one test leaves there is nothing to another.
        "redis_prefix": f"test:{secrets.token_hex(4)}:",
        "host": "127.0.0.1",
        "port": 0,
        **changes,
    }
    return {
        name.upper(): str(value).lower() if isinstance(value, bool) else str(value)
        for name, value in values.items()
        if value is not None
    }


def from_recordings(
    parameters: Callable[[Path], Iterable[ParameterSet]], variable: str = "XAI_RECORDINGS"
) -> list[ParameterSet]:
    """What is made of the directory that the variable names; without it one parameter that is skipped."""
    directory = os.environ.get(variable)
    skip = pytest.mark.skip(reason=f"{variable} names no directory of recordings")
    return [*parameters(Path(directory))] if directory else [pytest.param(None, marks=skip, id="none")]


def refusal(response: httpx.Response) -> dict[str, Any]:
    """The error that an answer consists of. It has all of its fields, and the request's id."""
    assert response.headers["Content-Type"] == "application/json"
    return _problem(response.content, response)


def failure(event: readers.Event, response: httpx.Response) -> dict[str, Any]:
    """The error that an `event: error` of this answer holds."""
    assert event.type == "error"
    return _problem(event.data, response)


def _problem(data: str | bytes, response: httpx.Response) -> dict[str, Any]:
    body = json.loads(data)
    assert list(body) == ["error"]
    problem: dict[str, Any] = body["error"]
    assert set(problem) == {"type", "code", "message", "param", "request_id"}
    assert problem["type"]
    assert problem["message"].endswith(".")
    assert problem["request_id"] == response.headers["X-Request-ID"]
    return problem


class LiveStream:
    """An event stream that is still being read."""

    def __init__(self, response: httpx.Response) -> None:
        self.response = response
        self.raw = b""
        """All bytes so far."""
        self._pieces = response.aiter_raw()
        self._parser = readers.Standard()
        self._events: list[readers.Event] = []

    @property
    def comments(self) -> list[str]:
        """All comments so far."""
        return self._parser.comments

    async def _more(self) -> bool:
        async with asyncio.timeout(TIMEOUT):
            piece = await anext(self._pieces, b"")
        self.raw += piece
        self._events += self._parser.feed(piece)
        return piece != b""

    async def event(self) -> readers.Event:
        """The next event; EOFError if the stream ends first."""
        while not self._events:
            if not await self._more():
                raise EOFError(self.raw)
        return self._events.pop(0)

    async def comment(self, number: int = 1) -> None:
        """Wait until this many comments have come; what else comes meanwhile is kept for later."""
        while len(self.comments) < number:
            if not await self._more():
                raise EOFError(self.raw)

    async def rest(self) -> list[readers.Event]:
        """All events that are still to come, up to the end."""
        while await self._more():
            pass
        events, self._events = self._events, []
        return events


class Caller:
    """A caller on a bare socket: bytes out, bytes in, and every way to leave."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def send(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def post(self, body: object, path: str = "/api/chat", **headers: str) -> None:
        """Send a request with a JSON body (bytes as they are). Header names with `_` for `-`."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        usual = {"Host": "localhost", "Content_Type": "application/json", "Content_Length": str(len(data))}
        lines = [f"{name.replace('_', '-')}: {text}" for name, text in {**usual, **headers}.items()]
        await self.send("\r\n".join([f"POST {path} HTTP/1.1", *lines, "", ""]).encode() + data)

    async def head(self) -> tuple[int, dict[str, str]]:
        """The status and the headers (names in lower case) of the answer."""
        head = (await self.until(b"\r\n\r\n")).decode("latin-1")
        status, *lines = head.rstrip().split("\r\n")
        return int(status.split(" ")[1]), {
            name.lower(): text.strip() for name, _, text in (line.partition(":") for line in lines)
        }

    async def until(self, end: bytes) -> bytes:
        async with asyncio.timeout(TIMEOUT):
            return await self._reader.readuntil(end)

    async def exactly(self, size: int) -> bytes:
        async with asyncio.timeout(TIMEOUT):
            return await self._reader.readexactly(size)

    async def some(self, limit: int = 65536) -> bytes:
        """What has come, at least one byte, b"" at the end."""
        async with asyncio.timeout(TIMEOUT):
            return await self._reader.read(limit)

    async def rest(self) -> bytes:
        async with asyncio.timeout(TIMEOUT):
            return await self._reader.read()

    def at_eof(self) -> bool:
        """Whether all has been read, and no more can come."""
        return self._reader.at_eof()

    async def piece(self) -> bytes:
        """One transfer chunk of the answer's body; b"" is its tidy end."""
        size = int(await self.until(b"\r\n"), 16)
        async with asyncio.timeout(TIMEOUT):
            return (await self._reader.readexactly(size + 2))[:-2]

    def half_close(self) -> None:
        """FIN from our side, still reading."""
        self._writer.write_eof()

    def close(self) -> None:
        """FIN in both directions."""
        self._writer.close()

    def reset(self) -> None:
        """RST."""
        self._writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
        self._writer.transport.abort()


class Service:
    """A running service, as its callers see it."""

    def __init__(self, port: int, client: httpx.AsyncClient) -> None:
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.client = client

    async def ask(
        self, content: str = "Hi", *, headers: Mapping[str, str] | None = None, **fields: object
    ) -> httpx.Response:
        """POST /api/chat with one message, read to the end. Fields are added to the body, or replace what is there."""
        body = {"messages": [{"role": "user", "content": content}], **fields}
        return await self.client.post("/api/chat", json=body, headers=headers)

    @asynccontextmanager
    async def asking(
        self, content: str = "Hi", *, headers: Mapping[str, str] | None = None, **fields: object
    ) -> AsyncIterator[LiveStream]:
        """The same, open while the context is; leaving it hangs up. Inside, the status line and headers are there."""
        body = {"messages": [{"role": "user", "content": content}], **fields}
        async with self.client.stream("POST", "/api/chat", json=body, headers=headers) as response:
            yield LiveStream(response)

    @asynccontextmanager
    async def caller(self, *, receive_buffer: int | None = None) -> AsyncIterator[Caller]:
        """A bare socket. A small `receive_buffer` (bytes) makes a reader that is soon full when it does not read."""
        sock = socket.socket()
        sock.setblocking(False)
        if receive_buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", self.port))
        reader, writer = await asyncio.open_connection(sock=sock, limit=receive_buffer or 2**16)
        try:
            yield Caller(reader, writer)
        finally:
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()


class InProcessService(Service):
    """A service in this loop."""

    def __init__(self, port: int, client: httpx.AsyncClient, settings: config.Settings) -> None:
        super().__init__(port, client)
        self.settings = settings


class SubprocessService(Service):
    """A service in a process of its own."""

    def __init__(self, port: int, client: httpx.AsyncClient, process: asyncio.subprocess.Process) -> None:
        super().__init__(port, client)
        self.process = process
        self.pid = process.pid
        self.stderr = ""
        """What it has written so far; complete after `exit_code`."""

    async def read_stderr(self) -> None:
        assert self.process.stderr is not None
        while piece := await self.process.stderr.read(65536):
            self.stderr += piece.decode(errors="replace")

    async def exit_code(self, within: float = TIMEOUT) -> int:
        """Wait for its end."""
        async with asyncio.timeout(within):
            code = await self.process.wait()
            await self.reading
        return code

    async def ready(self) -> None:
        """Wait until it answers."""
        async with asyncio.timeout(30):
            while True:
                with suppress(httpx.TransportError):
                    if (await self.client.get("/healthz")).is_success:
                        return
                assert self.process.returncode is None, self.stderr
                await asyncio.sleep(0.02)  # a port that is not open yet tells nobody when it will be

    reading: asyncio.Task[None]


def _client(port: int, *, keep: bool = True) -> httpx.AsyncClient:
    # No limit of connections, no environment, and keep-alives that cannot outlive the server.
    return httpx.AsyncClient(
        base_url=f"http://127.0.0.1:{port}",
        timeout=TIMEOUT,
        trust_env=False,
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=100 if keep else 0),
    )


@asynccontextmanager
async def serving(
    upstream_url: str, timing: Timing = DEFAULT_TIMING, /, **changes: object
) -> AsyncIterator[InProcessService]:
    """The service in this loop, on a free port, stopped at the end. `timing`: what no setting changes."""
    settings = config.load(environment(upstream_url, **changes))
    async with AsyncExitStack() as stack:
        ports = [
            await stack.enter_async_context(Server(settings, timing).running())
            for _ in range(int(os.environ.get("REPLICAS", "1")))
        ]
        port = ports[0] if len(ports) == 1 else await stack.enter_async_context(round_robin(ports))
        client = await stack.enter_async_context(_client(port, keep=len(ports) == 1))
        if settings.redis_url and "redis_url" not in changes:
            await seen(ports)
        yield InProcessService(port, client, settings)


async def seen(ports: Sequence[int]) -> None:
    """Wait until these services have seen their Redis."""
    for port in ports:
        async with _client(port) as client, asyncio.timeout(TIMEOUT):
            while "store_unavailable" in (await client.get("/readyz")).text:  # noqa: ASYNC110 -- nobody tells when
                await asyncio.sleep(0.01)


@asynccontextmanager
async def round_robin(ports: Sequence[int]) -> AsyncIterator[int]:
    """A proxy that gives each connection to the next of these ports; gives its own port."""
    turns = itertools.cycle(ports)
    tasks: set[asyncio.Task[None]] = set()

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while piece := await reader.read(65536):
                writer.write(piece)
                await writer.drain()
            writer.write_eof()
        except OSError:
            writer.transport.abort()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            to_reader, to_writer = await asyncio.open_connection("127.0.0.1", next(turns))
            try:
                await asyncio.gather(pump(reader, to_writer), pump(to_reader, writer))
            finally:
                to_writer.close()
        except (OSError, asyncio.CancelledError):
            pass  # as a proxy does: both connections are closed
        finally:
            writer.close()
            tasks.discard(task)

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.wait([asyncio.ensure_future(asyncio.sleep(0)), *tasks])


@asynccontextmanager
async def spawned(
    upstream_url: str, *arguments: str, python: tuple[str, ...] = (), cwd: Path | None = None, **changes: object
) -> AsyncIterator[SubprocessService]:
    """`python -m chatproxy` with a clean environment, once it answers; killed at the end if it still runs.

    It leads a process group of its own, as in a terminal; all of it is killed. `python` are options of the interpreter.
    Names in `changes` that are no settings become variables all the same (`pythonasynciodebug=1`).
    """
    port = free_port()
    variables = environment(upstream_url, **{"port": port, "pythonpath": ROOT, "path": os.defpath, **changes})
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *python,
        "-m",
        "chatproxy",
        *arguments,
        env=variables | MEASURED,
        cwd=cwd or ROOT / "tests",  # where no .env is
        stdin=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    async with _client(port) as client:
        service = SubprocessService(port, client, process)
        service.reading = asyncio.create_task(service.read_stderr())
        try:
            await service.ready()
            yield service
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await service.exit_code()


def free_port() -> int:
    """A port below those that the kernel hands out by itself, so that nobody takes it before the service does."""
    while True:
        port = random.randrange(20_000, 32_000)  # noqa: S311 -- no secret
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def _no_tracebacks(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Nothing that a test does makes anything log a traceback; one who means to can `caplog.clear()`."""
    yield
    assert [record for when in ("setup", "call") for record in caplog.get_records(when) if record.exc_info] == []


@pytest.fixture(scope="module")
async def grok() -> AsyncIterator[Upstream]:
    """One scripted Grok for all tests of a module."""
    async with Upstream() as grok:
        yield grok


@pytest.fixture(scope="module")
async def service(grok: Upstream) -> AsyncIterator[InProcessService]:
    """One service for all tests of a module, with nothing changed."""
    async with serving(grok.url) as service:
        yield service


def required(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Turn a skip into a failure where REQUIRE_ALL=1 says that nothing may be missing."""
    if report.skipped and os.environ.get("REQUIRE_ALL") == "1" and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.longrepr = f"REQUIRE_ALL=1, and yet: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    required(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    required(report)
    return report
