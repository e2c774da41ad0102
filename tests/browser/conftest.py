"""Real Chromium (Debian's package), driven by playwright; skipped where there is none."""

import asyncio
import re
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from playwright.async_api import Browser, Page, Playwright, async_playwright, expect

from tests.browser.wires import Site

CHROMIUM = shutil.which("chromium") or ""
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-default-apps",
    "--disable-domain-reliability",
    "--disable-dev-shm-usage",
    # Nothing outside this machine; and one name that leads here as a rebound one does.
    "--host-resolver-rules=MAP rebound.example 127.0.0.1, MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost",
]


@pytest.fixture(scope="session")
async def playwright() -> AsyncIterator[Playwright]:
    if not CHROMIUM:
        pytest.skip("chromium is not installed")
    async with async_playwright() as playwright:
        yield playwright


@pytest.fixture(scope="session")
async def browser(playwright: Playwright) -> AsyncIterator[Browser]:
    browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
    yield browser
    await browser.close()


@pytest.fixture
async def page(browser: Browser) -> AsyncIterator[Page]:
    """A tab of its own session; an exception that nothing in it catches fails the test."""
    context = await browser.new_context()
    context.set_default_timeout(10_000)
    expect.set_options(timeout=10_000)
    page = await context.new_page()
    uncaught: list[Exception] = []
    page.on("pageerror", lambda error: uncaught.append(error))  # noqa: PLW0108 -- playwright wants a function of ours
    yield page
    await context.close()
    assert uncaught == []


@pytest.fixture
async def tab(playwright: Playwright, tmp_path: Path) -> AsyncIterator[Page]:
    """A tab that is hidden while another is in front, as in real life; playwright's own tabs never are."""
    process = await asyncio.create_subprocess_exec(
        CHROMIUM,
        "--headless",
        "--remote-debugging-port=0",
        "--no-startup-window",  # playwright may wait for ever for a page that begins as it connects
        f"--user-data-dir={tmp_path}",
        *ARGUMENTS,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        assert process.stderr is not None
        address = None
        async with asyncio.timeout(20):
            while address is None:
                address = re.search(r"ws://\S+", (await process.stderr.readline()).decode())
        browser = await playwright.chromium.connect_over_cdp(address[0], no_defaults=True)
        yield await browser.contexts[0].new_page()
        await browser.close()
    finally:
        process.terminate()
        await process.communicate()


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    async with Site() as site:
        yield site
