"""`python -m chatproxy doctor` as a program: what it prints, its exit code, and what it needs."""

import asyncio
import json
import signal
import sys

import pytest

from tests.conftest import MEASURED, ROOT, TIMEOUT, free_port, serving
from tests.upstream import Upstream, unreachable
from tests.wire.test_doctor import PACED, TOKEN, canned, response

pytestmark = pytest.mark.anyio


async def started(*arguments: str, **variables: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "chatproxy", "doctor", *arguments),
        cwd=ROOT,
        env={"PYTHONIOENCODING": "utf-8", **variables, **MEASURED},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


async def command(*arguments: str, **variables: str) -> tuple[int, str, str]:
    """Exit code and output of the command, run without any setting."""
    process = await started(*arguments, **variables)
    async with asyncio.timeout(40):
        out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


@pytest.mark.parametrize("arguments", [["--json"], []])
async def test_command(arguments: list[str]) -> None:
    """The report fits on a phone, or is JSON for programs; the exit code is 0 where nothing is wrong."""
    async with Upstream(PACED) as grok, serving(grok.url, access_tokens=TOKEN) as service:
        code, out, err = await command(service.url, *arguments, CHATPROXY_TOKEN=TOKEN)
    assert (code, err) == (0, "")
    assert TOKEN not in out
    if arguments:
        report = json.loads(out)
        assert (report["url"], report["ok"], report["answer"]) == (service.url, True, "grok")
        assert [check["name"] for check in report["checks"]][:2] == ["reachable", "TLS"]
        assert all(set(check) == {"name", "ok", "message", "fixes"} for check in report["checks"])
    else:
        lines = out.splitlines()
        assert max(map(len, lines)) <= 60
        assert lines[0] == f"chatproxy doctor {service.url}"
        assert any(line.startswith("✓ tokens      one by one, 30 in ") for line in lines)
        assert lines[-1] == "Nothing is wrong."


async def test_command_finds_faults() -> None:
    """With anything wrong the exit code is 1, and each line to change is printed."""
    code, out, _ = await command(f"http://127.0.0.1:{free_port()}")
    assert code == 1
    assert "✗ reachable   refused: nothing listens on port" in out
    assert out.endswith("1 to mend.\n")
    async with canned({"": response(502, "text/html", b"")}) as url:
        code, out, _ = await command(url)
    assert code == 1
    assert "\n    nginx: proxy_pass http://127.0.0.1:8000;\n" in out
    assert max(map(len, out.splitlines())) <= 60


@pytest.mark.parametrize("arguments", [["chat.example.com"], ["http://a", "--origin", "a"], ["http://a?b"], []])
async def test_command_is_not_understood(arguments: list[str]) -> None:
    """What is no address is told as that, with exit code 2."""
    code, out, err = await command(*arguments)
    assert (code, out) == (2, "")
    assert "http" in err or "url" in err


async def test_interrupted_doctor() -> None:
    """Ctrl-C ends it without a traceback."""
    with unreachable() as url:
        process = await started(url)
        assert process.stdout is not None
        async with asyncio.timeout(TIMEOUT):
            assert b"doctor" in await process.stdout.readline()
            process.send_signal(signal.SIGINT)
            _, err = await process.communicate()
    assert (process.returncode, err) == (130, b"")
