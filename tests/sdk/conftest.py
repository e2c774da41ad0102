"""The real packages that front ends use: Node scripts that do what a test tells them, and bundles for a browser.

Skipped where node is missing, or its packages: npm install --prefix tests/sdk
"""

import asyncio
import json
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.browser.conftest import browser, page, playwright

__all__ = ["browser", "page", "playwright"]

HERE = Path(__file__).parent
NODE = shutil.which("node") or ""
AI_MAJORS = ("5", "6", "7")
OPENAI_MAJORS = ("4", "6", "7")


class Script:
    """A running Node script: a JSON command in, a JSON answer out."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def __call__(self, do: str, **fields: Any) -> Any:
        """One command, and what it gave."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"do": do, **fields}).encode() + b"\n")
        async with asyncio.timeout(60):
            line = await self._process.stdout.readline()
        assert line, "the script has ended"
        return json.loads(line)


Scripted = Callable[..., AbstractAsyncContextManager[Script]]


@pytest.fixture
def node() -> Scripted:
    """Starts a script of this folder with arguments; its stderr is the test's."""
    if not NODE:
        pytest.skip("node is not installed")
    if not (HERE / "node_modules").is_dir():
        pytest.skip("its node packages are not installed: npm install --prefix tests/sdk")
    return _run


@asynccontextmanager
async def _run(name: str, *arguments: str) -> AsyncIterator[Script]:
    process = await asyncio.create_subprocess_exec(
        NODE,
        HERE / name,
        *arguments,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=2**24,
    )
    try:
        yield Script(process)
    finally:
        process.kill()
        await process.communicate()
