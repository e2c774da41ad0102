"""The real packages that front ends use: Node scripts that do what a test tells them, and bundles for a browser.

Skipped where node is missing, or its packages: npm install --prefix tests/sdk
"""

import asyncio
import json
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from playwright.async_api import Page

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


@pytest.fixture(scope="session")
def packages() -> None:
    if not NODE:
        pytest.skip("node is not installed")
    if not (HERE / "node_modules").is_dir():
        pytest.skip("its node packages are not installed: npm install --prefix tests/sdk")


@pytest.fixture
def node(packages: None) -> Scripted:  # noqa: ARG001 -- nothing is done without them
    """Starts a script of this folder with arguments; its stderr is the test's."""
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


PAGE = '<!doctype html><meta charset="utf-8"><link rel="icon" href="data:,"><body><script src="app.js"></script>'


@pytest.fixture(scope="session")
async def bundle(
    packages: None,  # noqa: ARG001 -- nothing is done without them
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], Awaitable[Path]]:
    """Gives the page of this folder, with one major of the AI SDK in it, as one script."""
    made: dict[str, Path] = {}

    async def make(major: str) -> Path:
        if major not in made:
            made[major] = tmp_path_factory.mktemp("bundle") / "app.js"
            process = await asyncio.create_subprocess_exec(
                HERE / "node_modules" / ".bin" / "esbuild",
                "page.jsx",
                *("--bundle", "--log-level=warning", "--jsx=automatic", "--define:process.env.NODE_ENV='production'"),
                *(f"--alias:ai=ai-v{major}", f"--alias:@ai-sdk/react=@ai-sdk/react-v{major}"),
                *(f"--alias:openai=openai-v{OPENAI_MAJORS[-1]}", f"--outfile={made[major]}"),
                cwd=HERE,
            )
            assert await process.wait() == 0
        return made[major]

    return make


@pytest.fixture
def visit(page: Page, bundle: Callable[[str], Awaitable[Path]]) -> Callable[..., Awaitable[Page]]:
    """Opens the page at an origin, with options in its address. Who listens there does not know of it."""

    async def open(origin: str, major: str, **options: Any) -> Page:
        script = await bundle(major)
        await page.route(f"{origin}/app", lambda route: route.fulfill(body=PAGE, content_type="text/html"))
        await page.route(f"{origin}/app.js", lambda route: route.fulfill(path=script, content_type="text/javascript"))
        await page.goto(f"{origin}/app#{quote(json.dumps(options))}")
        await page.wait_for_function("window.sendMessage")
        return page

    return open


@pytest.fixture
async def elsewhere(page: Page) -> str:
    """Another origin. A page that nobody really serves may reach this machine only with a permission."""
    origin = "http://localhost:9"
    await page.context.grant_permissions(["local-network-access"], origin=origin)
    return origin
