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
from chatproxy.config import load
from tests.conftest import HI, MEASURED, ROOT, environment, free_port, refusal
from tests.readers import DONE, answer, standard
from tests.upstream import HANG, Gate, Upstream, error, stream

pytestmark = pytest.mark.anyio

APP = "chatproxy.asgi:app"
SERVERS = {
    "uvicorn": ["uvicorn", APP, "--port", "{port}"],
    "gunicorn": ["gunicorn", APP, "--bind", "127.0.0.1:{port}", "--worker-class", "uvicorn_worker.UvicornWorker"],
    "hypercorn": ["hypercorn", APP, "--bind", "127.0.0.1:{port}"],
    "granian": ["granian", APP, "--interface", "asgi", "--port", "{port}"],
}


@asynccontextmanager
async def under(server: str, upstream_url: str, cwd: Path, **changes: object) -> AsyncIterator[httpx.AsyncClient]:
    """The application under a server's command line, once it answers."""
    port = free_port()
    command = [part.format(port=port) for part in SERVERS[server]]
    variables = environment(upstream_url, pythonpath=ROOT, path=os.defpath, **{"port": None, "host": None, **changes})
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", *command, env=variables | MEASURED, cwd=cwd, start_new_session=True
    )
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=10, trust_env=False) as client:
            async with asyncio.timeout(30):
                while True:
                    with suppress(httpx.TransportError):
                        if (await client.get("/healthz")).is_success:
                            break
                    assert process.returncode is None
                    await asyncio.sleep(0.05)  # a port that is not open yet tells nobody when it will be
            yield client
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            async with asyncio.timeout(10):
                await process.wait()
        except TimeoutError:
            os.killpg(process.pid, signal.SIGKILL)
            await process.wait()


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
            assert answer(began + b"".join([piece async for piece in pieces])) == "Hello\n"

        grok.play(error(400, {"error": "Model not found: x"}))
        refused = await client.post("/api/chat", json={"messages": HI})
        assert (refused.status_code, refusal(refused)["code"]) == (502, "upstream_rejected")

        gate = Gate()
        grok.play(stream("a", gate, "b"))
        async with client.stream("POST", "/api/chat", json={"messages": HI, "resumable": True}) as response:
            url = response.headers["Content-Location"]
            async for piece in response.aiter_raw():
                if b"data: a" in piece:
                    break
        gate.open()
        rest = await client.get(url, headers={"Last-Event-ID": f"{url.split('/')[3]}-1"})
        assert [event.data for event in standard(rest.content)] == ["b", DONE]
        assert len(grok.calls) == 1

        grok.play(stream("a", HANG))
        async with client.stream("POST", "/api/chat", json={"messages": HI}) as response:
            await anext(response.aiter_raw())
        await grok.calls[0].hung_up(within=3)


async def test_environment_is_read_at_the_start(tmp_path: Path) -> None:
    """Importing the application reads no setting; wrong ones are told, each in a line, when the lifespan starts."""
    variables = {"MAX_STREAMS": "many", "KEEP_ALIVE": "0", "PYTHONPATH": str(ROOT), "PATH": os.defpath}
    imported = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-c", "import chatproxy.asgi"],
        env=variables,
        cwd=tmp_path,
        capture_output=True,
    )
    assert (imported.returncode, imported.stderr) == (0, b"")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "uvicorn", APP, "--port", str(free_port())),
        env=variables | MEASURED,
        cwd=tmp_path,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(20):
        _, written = await process.communicate()
    assert process.returncode != 0
    lines = written.decode().splitlines()
    assert any("MAX_STREAMS: " in line for line in lines)
    assert any("KEEP_ALIVE: " in line for line in lines)
    assert b"Traceback" not in written


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
    from chatproxy.asgi import LazyApp  # noqa: PLC0415 -- after the tests that import it in processes of their own

    app = LazyApp()

    async def unused(*_: object) -> Message:
        raise AssertionError

    with pytest.raises(RuntimeError, match="lifespan"):
        await app({"type": "http"}, unused, unused)  # type: ignore[arg-type] # neither is called


async def test_middleware_around_the_lazy_application(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is added before the start is around the application that the lifespan makes."""
    from chatproxy.asgi import LazyApp  # noqa: PLC0415 -- as above

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GROK_API_KEY", "")
    monkeypatch.setattr("chatproxy.logs.configure", lambda *_: None)  # the log of the tests stays theirs
    seen: list[str] = []
    app = LazyApp()
    app.add_middleware(Watching, seen)
    messages = iter([{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}])
    sent: list[Message] = []

    async def receive() -> Message:
        return next(messages)

    async def send(message: Message) -> None:
        sent.append(message)

    await app({"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}, receive, send)
    assert [message["type"] for message in sent] == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
    assert seen == [message["type"] for message in sent]
