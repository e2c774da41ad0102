"""The first ten minutes: the README's steps, from a fresh copy of the project, with nothing but Python and make."""

import asyncio
import os
import re
import shlex
import signal
import subprocess
from pathlib import Path

import httpx
import pytest

from tests.conftest import ROOT, free_port
from tests.readers import joined, standard

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

# Where packages come from, and which certificates are trusted, is this machine's business.
KEPT = re.compile(r"(PATH|HOME|TMPDIR|PIP_\w+|\w*SSL_CERT\w*|REQUESTS_CA_BUNDLE|(?i:\w+_proxy))")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """What a clone has: no .venv, no caches."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, stdout=subprocess.PIPE, check=False)  # noqa: S607
    if listed.returncode:
        pytest.skip("this is no clone")
    for name in filter(None, listed.stdout.decode().split("\0")):
        target = tmp_path / "chatproxy" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    return tmp_path / "chatproxy"


async def test_first_steps(copy: Path) -> None:
    """`make` lists the commands; `make run` sets up, says where to click and serves; curl gets an answer."""
    readme = (copy / "README.md").read_text()
    run, ask = re.findall(r"```sh\n(.*?)```", readme, re.DOTALL)[:2]
    environ = {name: value for name, value in os.environ.items() if KEPT.fullmatch(name)}
    listed = await asyncio.create_subprocess_exec("make", cwd=copy, env=environ, stdout=asyncio.subprocess.PIPE)
    assert re.search(r"(?m)^  make run +\S", (await listed.communicate())[0].decode())

    port = free_port()
    serving = await asyncio.create_subprocess_exec(
        *shlex.split(run),
        cwd=copy,
        env={**environ, "PORT": str(port)},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        assert serving.stdout is not None
        told = ""
        async with asyncio.timeout(120):  # with packages in the cache it takes ten seconds
            while f"http://localhost:{port}" not in told:
                line = (await serving.stdout.readline()).decode()
                assert line, told
                told += line
        async with httpx.AsyncClient(trust_env=False, base_url=f"http://localhost:{port}") as client:
            async with asyncio.timeout(30):
                while True:
                    try:
                        page = await client.get("/")
                        break
                    except httpx.TransportError:
                        await asyncio.sleep(0.1)  # a port that is not open yet tells nobody when it will be
            assert page.status_code == 200
            assert "<title>" in page.text
            [body] = re.findall(r"-d '(.+?)'", ask)
            answer = await client.post(
                "/api/chat", content=body, headers={"Content-Type": "application/json"}, timeout=30
            )
        events = standard(answer.content)
        assert events[-1].data == "[DONE]"
        assert len(joined(events)) > 50
    finally:
        os.killpg(serving.pid, signal.SIGINT)
        async with asyncio.timeout(20):
            await serving.communicate()
