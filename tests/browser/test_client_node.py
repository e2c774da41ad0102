"""client.js outside of browsers: in Node, through every cut of the wire, and under TypeScript's eyes."""

import asyncio
import json
import re
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.async_api import Page

from tests.browser.test_client import load
from tests.browser.wires import MODULES, Relay, Site
from tests.conftest import ROOT, InProcessService, serving
from tests.upstream import Upstream, stream

pytestmark = pytest.mark.anyio

CLIENT = ROOT / "chatproxy" / "browser" / "client.js"
HERE = Path(__file__).parent
NODE = shutil.which("node") or ""
TSC = MODULES / "typescript" / "bin" / "tsc"

TOKENS = ["a\n", "\n\n", " \u2028é😀 ", "[DONE]", "\ndata: x", " "]
TEXT = "".join(TOKENS)

Ask = Callable[[int], Awaitable[list[Any]]]
"""Asks so many times at once, and gives [whole text, joined tokens] or the error's code for each."""


@asynccontextmanager
async def node(url: str, directory: Path) -> AsyncIterator[Ask]:
    if not NODE:
        pytest.skip("node is not installed")
    # Before version 20 Node takes a .js file for a module only where a package.json says so.
    module = shutil.copy(CLIENT, directory / "client.mjs")
    process = await asyncio.create_subprocess_exec(
        *(NODE, HERE / "answers.mjs", module, url), stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None

    async def ask(times: int) -> list[Any]:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(f"{times}\n".encode())
        async with asyncio.timeout(30):
            answers: list[Any] = json.loads(await process.stdout.readline())
        return answers

    try:
        yield ask
    finally:
        process.kill()
        await process.wait()


async def cut_everywhere(relay: Relay, ask: Ask, positions: range, at_once: int) -> int:
    """Cut one answer at each position, so many at once; gives how many answers that were. Each has to be exact."""
    for first in range(0, len(positions), at_once):
        relay.cuts = [*positions[first : first + at_once]]
        count = len(relay.cuts)
        assert await ask(count) == [[TEXT, TEXT]] * count
        assert relay.cuts == []
    return len(positions)


async def lengths(service: InProcessService) -> tuple[int, int]:
    """About how many bytes the head and the body of such an answer have."""
    async with service.asking(resumable=True) as live:
        await live.rest()
    return sum(len(name) + len(text) + 4 for name, text in live.response.headers.items()) + 19, len(live.raw)


async def test_every_cut_in_node(tmp_path: Path) -> None:
    """Wherever the first connection is cut, in its head too, the text is exact, and each answer is asked for once."""
    async with Upstream(stream(*TOKENS)) as upstream, serving(upstream.url) as service:
        head, body = await lengths(service)
        async with Relay(service.port) as relay, node(relay.url, tmp_path) as ask:
            answers = await cut_everywhere(relay, ask, range(head + body + 100), 40)
        assert len(upstream.calls) == 1 + answers


async def test_every_cut_in_a_browser(page: Page, site: Site) -> None:
    """The same in the middle of the answer, at each position of some frames, in a browser with its six connections."""
    async with (
        Upstream(stream(*TOKENS)) as upstream,
        serving(upstream.url, allowed_origins=site.origin) as service,
        Relay(service.port) as relay,
    ):
        await load(page, relay.url, site)
        head, body = await lengths(service)

        async def ask(times: int) -> list[Any]:
            answers: list[Any] = await page.evaluate(
                """(times) => Promise.all(Array.from({ length: times }, async () => {
                    let text = "";
                    const whole = await ask("Hi", { onText: (token) => { text += token; } });
                    return [whole, text];
                }))""",
                times,
            )
            return answers

        middle = head + body // 2
        answers = await cut_everywhere(relay, ask, range(middle - 60, middle + 60), 6)
        assert len(upstream.calls) == 1 + answers


async def test_no_address(tmp_path: Path) -> None:
    """From a file the client cannot know where the service is, and says so instead of looking for it."""
    async with node("", tmp_path) as ask:
        assert await ask(1) == ["TypeError: The address of the service is missing."]


async def tsc(*arguments: str | Path) -> None:
    """Run TypeScript's compiler in its strictest mode; it has to be content."""
    if not NODE or not TSC.exists():
        pytest.skip("TypeScript is not installed: npm install --prefix tests/browser")
    process = await asyncio.create_subprocess_exec(
        *(NODE, TSC, "--ignoreConfig", "--strict", "--target", "es2022", "--module", "esnext"),
        *("--moduleResolution", "bundler", "--lib", "es2022,dom,dom.iterable", "--types", "", *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()


async def test_types(tmp_path: Path) -> None:
    """The module keeps its own types, which are those that it is served with, and a page can rely on them."""
    await tsc("--allowJs", "--checkJs", "--declaration", "--emitDeclarationOnly", "--outDir", tmp_path, CLIENT)
    derived = (tmp_path / "client.d.ts").read_text().replace("./client.d.ts", str(CLIENT.with_suffix(".d.ts")))
    (tmp_path / "derived.d.ts").write_text(derived)
    (tmp_path / "same.ts").write_text(
        f"""
        type Served = typeof import("{CLIENT.with_suffix("")}");
        type Derived = typeof import("./derived");
        declare const served: Served, derived: Derived;
        export const there: Derived = served, back: Served = derived;
        """
    )
    await tsc("--noEmit", "--skipLibCheck", "false", tmp_path / "same.ts")
    await tsc("--noEmit", HERE / "consumer.ts")


def test_described() -> None:
    """Every option that the module takes is described in its types, and named in the README."""
    types = CLIENT.with_suffix(".d.ts").read_text()
    [options] = re.findall(r"interface Options \{(.+?)\n\}", types, re.DOTALL)
    names = re.findall(r"^  (\w+)\?:", options, re.MULTILINE)
    code = CLIENT.read_text()
    assert len(names) == 11
    for name in names:
        assert re.search(rf"\b{name}\b", code)
        assert f"`{name}" in (ROOT / "README.md").read_text()
