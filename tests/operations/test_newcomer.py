"""The first ten minutes: the README's steps, from a fresh copy of the project, with nothing but Python and make."""

import asyncio
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from tests.conftest import ROOT, free_port
from tests.readers import joined, standard

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

# Where packages come from, and which certificates are trusted, is this machine's business.
KEPT = re.compile(r"(HOME|TMPDIR|PIP_\w+|\w*SSL_CERT\w*|REQUESTS_CA_BUNDLE|(?i:\w+_proxy))")


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


@pytest.fixture
def bare(tmp_path: Path) -> dict[str, str]:
    """The environment of a machine that has Python, make, and what every system has."""
    programs = tmp_path / "bin"
    programs.mkdir()
    python = Path(sys.base_prefix, "bin", f"python{sys.version_info.major}.{sys.version_info.minor}")
    (programs / "python3").symlink_to(python)
    for name in ("make", "sh", "awk", "touch"):
        found = shutil.which(name)
        assert found, name
        (programs / name).symlink_to(found)
    return {"PATH": str(programs)} | {name: value for name, value in os.environ.items() if KEPT.fullmatch(name)}


def seconds_of_cpu(session: int) -> float:
    """What the processes of a session have used so far, with those that they have waited for. Linux tells it."""
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended meanwhile
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[3]) == session:
                ticks += sum(map(int, fields[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")


async def test_first_steps(copy: Path, bare: dict[str, str]) -> None:
    """`make` lists the commands; `make run` sets up, says in one line where to click, serves; curl gets an answer."""
    if (curl := shutil.which("curl")) is None:
        pytest.skip("curl is not installed")
    run, ask = re.findall(r"```sh\n(.*?)```", (copy / "README.md").read_text(), re.DOTALL)[:2]
    listed = await asyncio.create_subprocess_exec("make", cwd=copy, env=bare, stdout=asyncio.subprocess.PIPE)
    assert re.search(r"(?m)^  make run +\S", (await listed.communicate())[0].decode())

    port = free_port()
    serving = await asyncio.create_subprocess_exec(
        *shlex.split(run),
        cwd=copy,
        env={**bare, "PORT": str(port)},
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
        # Fifteen seconds are promised where the packages are in pip's cache. CPU time is what is left of that on a
        # machine that is busy, or has to download them first.
        used = seconds_of_cpu(serving.pid)
        assert used < 15
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
        _, *arguments = shlex.split(ask.replace("http://localhost:8000", f"http://localhost:{port}"))
        asked = await asyncio.create_subprocess_exec(
            *(curl, "--silent", "--noproxy", "*", "--max-time", "60", *arguments),
            env=bare,
            stdout=asyncio.subprocess.PIPE,
        )
        events = standard((await asked.communicate())[0])
        assert events[-1].data == "[DONE]"
        assert len(joined(events)) > 50
    finally:
        os.killpg(serving.pid, signal.SIGINT)
        async with asyncio.timeout(20):
            rest, _ = await serving.communicate()
    assert [f":{port}" in line for line in (told + rest.decode()).splitlines()].count(True) == 1
