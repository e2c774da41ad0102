"""`python -m chatproxy --reload`, which is `make run`."""

import asyncio
import shutil
import signal
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from tests.conftest import ROOT, spawned
from tests.upstream import Upstream

pytestmark = pytest.mark.anyio


async def test_reload(tmp_path: Path) -> None:
    """Changed code is served without a new start, and Ctrl-C ends both processes."""
    errors = tmp_path / "chatproxy" / "errors.py"
    shutil.copytree(ROOT / "chatproxy", errors.parent)
    async with (
        Upstream() as upstream,
        spawned(upstream.url, "--reload", cwd=tmp_path, pythonpath=tmp_path) as service,
    ):
        try:
            before = (await service.client.get("/nowhere")).json()["error"]["message"]
            code = errors.read_text()
            assert code.count(before) == 1
            async with asyncio.timeout(20):
                message = before
                while message == before:
                    # Saved again and again: the reloader takes what it sees at its first look for unchanged.
                    errors.write_text(code.replace(before, "Changed."))
                    await asyncio.sleep(0.2)
                    with suppress(httpx.TransportError):  # a kept connection ends with the old process
                        message = (await service.client.get("/nowhere")).json()["error"]["message"]
            assert message == "Changed."
        finally:
            service.process.send_signal(signal.SIGINT)
            await service.exit_code(within=20)
