"""The readers that the README names besides client.js, run in a browser from a page at another origin."""

from typing import Any

import pytest
from playwright.async_api import Page

from tests.browser.wires import FETCH_EVENT_SOURCE, Relay, Site
from tests.conftest import HI, ROOT, serving
from tests.upstream import CLOSE, HANG, Gate, Upstream, error, stream

pytestmark = pytest.mark.anyio

RESUMING = ["event-source", "fetch-event-source", "resuming-fetch"]
READERS = ["fetch", *RESUMING]

TOKENS = [
    *("\n", "\n\n", "# Title", "\n", " two  spaces ", "\n\nline\n", "\ttab", "data: [DONE]", "[DONE]", "\n[DONE]\n"),
    *("\u2028", "\u2029", "\x85", "\ufeff", "emoji 😀", "é", " ", "  \n  ", "id: 1", ":", "event: error\n", "```\n"),
    *(f"token {n}\n" for n in range(100)),
]
TEXT = "".join(TOKENS)


def test_named() -> None:
    """The README names each of them."""
    paths = [*(ROOT / "tests/browser/readers").glob("*.js")]
    assert {path.stem for path in paths} == {*READERS}
    readme = (ROOT / "README.md").read_text()
    assert all(f"(tests/browser/readers/{path.name})" in readme for path in paths)


async def load(page: Page, reader: str, site: Site) -> None:
    """Open the other site and put one reader on it."""
    if reader == "fetch-event-source" and not FETCH_EVENT_SOURCE.exists():
        pytest.skip("its node packages are not installed: npm install --prefix tests/browser")
    await page.goto(site.origin)
    await page.evaluate("async (path) => { window.ask = (await import(path)).ask; }", f"/readers/{reader}.js")


async def begin(page: Page, service: str) -> None:
    """Ask; what comes is kept in the page."""
    await page.evaluate(
        """([service, messages]) => {
            window.text = "", window.end = null, window.gone = new AbortController();
            ask(service, messages, (token) => { text += token; }, gone.signal).then(
                () => { end = "done"; },
                (error) => { end = { code: error.code, message: error.message }; });
        }""",
        [service, HI],
    )


async def end(page: Page) -> Any:
    """How it ended, once it has."""
    await page.wait_for_function("window.end !== null", timeout=20_000)
    return await page.evaluate("window.end")


@pytest.mark.parametrize("reader", READERS)
async def test_answer_in_a_reader(page: Page, site: Site, reader: str) -> None:
    """Every reader gives the exact text, as it comes, and knows when it is complete."""
    gate = Gate()
    async with (
        Upstream(stream("first", gate, *TOKENS)) as upstream,
        serving(upstream.url, allowed_origins=site.origin) as service,
    ):
        await load(page, reader, site)
        await begin(page, service.url)
        await page.wait_for_function("window.text === 'first'")
        gate.open()
        assert await end(page) == "done"
        assert await page.evaluate("window.text") == "first" + TEXT
        assert len(upstream.calls) == 1


@pytest.mark.parametrize("reader", READERS)
async def test_refused_in_a_reader(page: Page, site: Site, reader: str) -> None:
    """A refusal is an error with the service's code and sentence, and is not asked again."""
    full = error(503, {"code": "at capacity", "error": "The service is at capacity."})
    async with (
        Upstream(full) as upstream,
        serving(upstream.url, allowed_origins=site.origin, grok_retries=0) as service,
    ):
        await load(page, reader, site)
        await begin(page, service.url)
        ended = await end(page)
        assert ended["code"] == "upstream_overloaded"
        assert ended["message"].endswith(".")
        assert await page.evaluate("window.text") == ""
        assert len(upstream.calls) == 1


@pytest.mark.parametrize("reader", READERS)
async def test_failed_in_a_reader(page: Page, site: Site, reader: str) -> None:
    """A failure in the middle is an error too, after the text that had come."""
    async with (
        Upstream(stream("half an ", "answ", CLOSE)) as upstream,
        serving(upstream.url, allowed_origins=site.origin) as service,
    ):
        await load(page, reader, site)
        await begin(page, service.url)
        assert (await end(page))["code"] == "upstream_cut_off"
        assert await page.evaluate("window.text") == "half an answ"
        assert len(upstream.calls) == 1


async def test_dropped(page: Page, site: Site) -> None:
    """The plain reader does not take a lost connection for the end."""
    async with (
        Upstream(stream("half", HANG)) as upstream,
        serving(upstream.url, allowed_origins=site.origin) as service,
        Relay(service.port) as relay,
    ):
        await load(page, "fetch", site)
        await begin(page, relay.url)
        await page.wait_for_function("window.text === 'half'")
        relay.cut()
        assert (await end(page))["message"]


async def test_aborted(page: Page, site: Site) -> None:
    """Aborting the plain reader hangs up Grok."""
    async with (
        Upstream(stream("half", HANG)) as upstream,
        serving(upstream.url, allowed_origins=site.origin) as service,
    ):
        await load(page, "fetch", site)
        await begin(page, service.url)
        await page.wait_for_function("window.text === 'half'")
        await page.evaluate("window.gone.abort()")
        await upstream.calls[0].hung_up()


@pytest.mark.parametrize("reader", RESUMING)
async def test_resumed_in_a_reader(page: Page, site: Site, reader: str) -> None:
    """Through lost connections, inside an event and between two, the text is exact and asked for once."""
    gate = Gate()
    async with (
        Upstream(stream(*TOKENS[:40], gate, *TOKENS[40:])) as upstream,
        serving(upstream.url, allowed_origins=site.origin) as service,
        Relay(service.port) as relay,
    ):
        await load(page, reader, site)
        relay.cuts = [700]
        await begin(page, relay.url)
        await page.wait_for_function("(text) => window.text === text", arg="".join(TOKENS[:40]), timeout=20_000)
        assert relay.cuts == []
        relay.cut()
        gate.open()
        assert await end(page) == "done"
        assert await page.evaluate("window.text") == TEXT
        assert len(upstream.calls) == 1


@pytest.mark.parametrize("reader", RESUMING)
async def test_restarted_in_a_reader(page: Page, site: Site, reader: str) -> None:
    """After a restart of the service the answer is gone: the reader says so, and Grok is not asked again."""
    async with (
        Upstream(stream("half", HANG)) as upstream,
        serving(upstream.url, allowed_origins=site.origin, drain_timeout=0) as before,
        serving(upstream.url, allowed_origins=site.origin) as after,
        Relay(before.port) as relay,
    ):
        await load(page, reader, site)
        await begin(page, relay.url)
        await page.wait_for_function("window.text === 'half'")
        relay.port_beyond = after.port
        relay.cut()
        ended = await end(page)  # EventSource shows neither status nor body
        assert ended.get("code") == (None if reader == "event-source" else "stream_not_found")
        assert await page.evaluate("window.text") == "half"
        assert len(upstream.calls) == 1
