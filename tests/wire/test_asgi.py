"""The application under other ASGI servers, and inside other people's middleware."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import httpx
import pytest
import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from chatproxy.app import create_app
from chatproxy.asgi import LazyApp
from chatproxy.config import load
from tests.conftest import HI, MEASURED, ROOT, TIMEOUT, environment, free_port, refusal
from tests.readers import DONE, answer, standard
from tests.upstream import HANG, Gate, Upstream, error, stream

pytestmark = pytest.mark.anyio

# Each command line of a server, up to the options of ours.
SERVERS = {
    "uvicorn": ["uvicorn", "{app}", "--port", "{port}"],
    "gunicorn": ["gunicorn", "{app}", "--bind", "127.0.0.1:{port}", "--worker-class", "uvicorn_worker.UvicornWorker"],
    "hypercorn": ["hypercorn", "{app}", "--bind", "127.0.0.1:{port}"],
    "granian": ["granian", "{app}", "--interface", "asgi", "--port", "{port}"],
}


async def start(
    server: str, port: int, cwd: Path, variables: dict[str, str], app: str = "chatproxy.asgi:app"
) -> asyncio.subprocess.Process:
    """A server's command line, in a process group of its own."""
    command = [part.format(app=app, port=port) for part in SERVERS[server]]
    paths = {"PATH": os.defpath, "PYTHONPATH": os.pathsep.join([str(ROOT), str(cwd)]), "HOME": str(cwd)}
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", *command),
        env=variables | paths | MEASURED,
        cwd=cwd,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        start_new_session=True,
    )


async def stop(process: asyncio.subprocess.Process) -> str:
    """End it, at last with all that it has started; gives what it has written."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    try:
        async with asyncio.timeout(TIMEOUT):
            written, _ = await process.communicate()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return written.decode()


@asynccontextmanager
async def under(
    server: str, upstream_url: str, cwd: Path, app: str = "chatproxy.asgi:app"
) -> AsyncIterator[httpx.AsyncClient]:
    """The application under a server's command line, once it answers."""
    port = free_port()
    variables = environment(upstream_url, port=None, host=None, grok_retries=0)
    process = await start(server, port, cwd, variables, app)
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=TIMEOUT, trust_env=False) as client:
            async with asyncio.timeout(30):
                while True:
                    with suppress(httpx.TransportError):
                        if (await client.get("/healthz")).is_success:
                            break
                    assert process.returncode is None
                    await asyncio.sleep(0.05)  # a port that is not open yet tells nobody when it will be
            yield client
    finally:
        written = await stop(process)
    assert "Traceback" not in written


@pytest.mark.parametrize("server", SERVERS)
async def test_any_server(server: str, tmp_path: Path) -> None:
    """Answers stream as they come, refusals keep their status, lost readers come back, and who leaves is noticed."""
    gate = Gate()
    async with Upstream(stream("Hel", gate, "lo\r\n")) as grok, under(server, grok.url, tmp_path) as client:
        async with client.stream("POST", "/api/chat", json={"messages": HI}) as response:
            pieces = response.aiter_raw()
            began = await anext(pieces)
            assert (response.status_code, began) == (200, b"data: Hel\n\n")
            gate.open()
            rest = b"".join([piece async for piece in pieces])
        assert began + rest == b"data: Hel\n\ndata: lo\ndata: \n\ndata: [DONE]\n\n"

        grok.set_scripts(error(503, {"code": "unavailable", "error": "at capacity"}))
        refused = await client.post("/api/chat", json={"messages": HI})
        assert (refused.status_code, refusal(refused)["code"]) == (503, "upstream_overloaded")

        gate = Gate()
        grok.set_scripts(stream("a", gate, "b"))
        async with client.stream("POST", "/api/chat", json={"messages": HI, "resumable": True}) as response:
            url = response.headers["Content-Location"]
            async for piece in response.aiter_raw():  # pragma: no branch -- it does not end before
                if b"data: a" in piece:
                    break
        gate.open()
        resumed = await client.get(url, headers={"Last-Event-ID": f"{url.split('/')[3]}-1"})
        assert [event.data for event in standard(resumed.content)] == ["b", DONE]
        assert len(grok.calls) == 1

        grok.set_scripts(stream("a", HANG))
        async with client.stream("POST", "/api/chat", json={"messages": HI}) as response:
            await anext(response.aiter_raw())
        await grok.calls[0].hung_up(within=3)


WRONG = {"MAX_STREAMS": "many", "KEEP_ALIVE": "0"}


@pytest.mark.parametrize("server", SERVERS)
async def test_wrong_settings_under_any_server(server: str, tmp_path: Path) -> None:
    """The start fails, with a line for each wrong value and without a traceback of ours."""
    process = await start(server, free_port(), tmp_path, WRONG)
    async with asyncio.timeout(30):
        written = (await process.communicate())[0].decode()
    assert "MAX_STREAMS: expected int, not 'many'\nKEEP_ALIVE: expected float > 0.0, not '0'" in written
    # hypercorn tells any start that fails by a traceback of its own.
    assert written.count("Traceback") == (server == "hypercorn")
    assert "chatproxy.config" not in written


async def test_import_reads_no_environment(tmp_path: Path) -> None:
    """Importing the application reads no setting, and opens nothing: wrong ones are no matter yet."""
    imported = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-c", "import chatproxy.asgi"],
        env={**WRONG, "PYTHONPATH": str(ROOT), "PATH": os.defpath},
        cwd=tmp_path,
        capture_output=True,
        timeout=30,
    )
    assert (imported.returncode, imported.stdout, imported.stderr) == (0, b"", b"")


class Watching:
    """Middleware of somebody else's."""

    def __init__(self, app: ASGIApp, seen: list[str]) -> None:
        self.app = app
        self.seen = seen

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def watch(message: Message) -> None:
            self.seen.append(message["type"] + str(message.get("body", b""), "utf-8"))
            await send(message)

        await self.app(scope, receive, watch)


async def test_middleware_of_others() -> None:
    """`app.add_middleware` works, and what is added sees each part of a stream as it is written."""
    seen: list[str] = []
    gate = Gate()
    async with Upstream(stream("a", gate, "b")) as grok:
        app = create_app(load(environment(grok.url)))
        app.add_middleware(Watching, seen=seen)
        server = uvicorn.Server(uvicorn.Config(app, port=free_port(), log_config=None))
        serving = asyncio.create_task(server.serve())
        while not server.started:  # noqa: ASYNC110 -- uvicorn tells nobody
            await asyncio.sleep(0.01)
        url = f"http://127.0.0.1:{server.config.port}/api/chat"
        async with (
            httpx.AsyncClient(trust_env=False) as client,
            client.stream("POST", url, json={"messages": HI}) as response,
        ):
            pieces = response.aiter_raw()
            await anext(pieces)
            assert seen[-2:] == ["http.response.start", "http.response.bodydata: a\n\n"]
            gate.open()
            assert [piece async for piece in pieces]
        assert "".join(seen).endswith("data: [DONE]\n\n")
        server.should_exit = True
        await serving


async def test_lifespan_is_needed() -> None:
    """A server that runs no lifespan is told what is missing."""

    async def unused(*_: object) -> Message:
        raise AssertionError

    with pytest.raises(RuntimeError, match="lifespan"):
        await LazyApp()({"type": "http"}, unused, unused)  # type: ignore[arg-type] # neither is called


# A module of somebody else's, which a server is told to serve.
SITE = """
from chatproxy.asgi import app


class Marking:
    def __init__(self, app, mark):
        self.app = app
        self.mark = mark

    async def __call__(self, scope, receive, send):
        async def marking(message):
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-mark", self.mark)]
            elif message.get("body", b"").startswith(b"data: "):
                message["body"] += b": " + self.mark + b"\\n\\n"
            await send(message)

        await self.app(scope, receive, marking)


app.add_middleware(Marking, mark=b"seen")
"""


async def test_middleware_around_the_application_of_servers(tmp_path: Path) -> None:
    """What is added to `chatproxy.asgi.app` is around it when it starts, and sees each part as it is written."""
    (tmp_path / "site_of_mine.py").write_text(SITE)
    gate = Gate()
    async with (
        Upstream(stream("a", gate, "b")) as grok,
        under("uvicorn", grok.url, tmp_path, "site_of_mine:app") as client,
        client.stream("POST", "/api/chat", json={"messages": HI}) as response,
    ):
        pieces = response.aiter_raw()
        assert (response.status_code, response.headers["X-Mark"]) == (200, "seen")
        assert await anext(pieces) == b"data: a\n\n: seen\n\n"
        gate.open()
        rest = b"".join([piece async for piece in pieces])
        assert answer(rest) == "b"
        assert rest.endswith(b"data: [DONE]\n\n: seen\n\n")
