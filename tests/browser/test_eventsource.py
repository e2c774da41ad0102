"""The browser's own reconnecting, at another origin: what was paid once is asked once, and the end is the end."""

import asyncio

import pytest
from playwright.async_api import Page

from tests.browser.test_readers import TEXT, TOKENS, begin, end, load
from tests.browser.wires import Relay, Site
from tests.conftest import HI, serving
from tests.upstream import Gate, Upstream, stream

pytestmark = pytest.mark.anyio

NEVER_CLOSED = """async ([service, messages]) => {
    const body = JSON.stringify({ messages });
    const headers = { "Content-Type": "application/json", Accept: "application/json" };
    const response = await fetch(`${service}/api/chat`, { method: "POST", headers, body });
    window.data = [];
    new EventSource(new URL((await response.json()).url, service)).onmessage = (event) => data.push(event.data);
}"""


async def test_end_is_the_end(page: Page, site: Site) -> None:
    """Through forced drops the text is exact; one that is never closed comes once more, gets a 204 and rests."""
    async with (
        Upstream(stream(*TOKENS)) as upstream,
        serving(upstream.url, allowed_origins=site.origin) as service,
        Relay(service.port) as relay,
    ):
        await page.goto(site.origin)
        relay.cuts = [700, 1400]
        await page.evaluate(NEVER_CLOSED, [relay.url, HI])
        await relay.until(lambda: relay.statuses[-1:] == [204], within=20)
        *texts, last = await page.evaluate("window.data")
        assert ("".join(texts), last) == (TEXT, "[DONE]")
        assert [request.method for request in relay.requests] == ["OPTIONS", "POST", "GET", "GET", "GET", "GET"]
        assert relay.statuses[1:] == [201, 200, 200, 200, 204]
        assert relay.cuts == []
        await asyncio.sleep(10)  # what does not happen can only be waited for
        assert len(relay.requests) == 6
        assert len(upstream.calls) == 1


async def test_hidden_tab(tab: Page, site: Site) -> None:
    """fetch-event-source lets go while its tab is hidden, misses nothing when it is shown, and rests after the end."""
    gates = [Gate(), Gate()]
    script = stream(*TOKENS[:40], gates[0], *TOKENS[40:80], gates[1], *TOKENS[80:])
    async with (
        Upstream(script) as upstream,
        serving(upstream.url, allowed_origins=site.origin) as service,
        Relay(service.port) as relay,
    ):
        await load(tab, "fetch-event-source", site)
        await begin(tab, relay.url)
        for shown, gate in zip((40, 80), gates, strict=True):
            text = "".join(TOKENS[:shown])
            await tab.wait_for_function("(text) => window.text === text", arg=text)
            await hide_and_show(tab, gate)
        assert await end(tab) == "done"
        assert await tab.evaluate("window.text") == TEXT
        seen = len(relay.requests)
        await hide_and_show(tab)
        assert await tab.evaluate("fetch('/').then((response) => response.status)") == 200  # time to have asked again
        assert len(relay.requests) == seen
        assert [request.method for request in relay.requests if request.method != "OPTIONS"] == ["POST"] * 3
        assert len(upstream.calls) == 1


async def hide_and_show(tab: Page, meanwhile: Gate | None = None) -> None:
    other = await tab.context.new_page()
    await tab.wait_for_function("document.hidden", polling=50)
    if meanwhile is not None:
        meanwhile.open()
    await other.close()
    await tab.bring_to_front()
    await tab.wait_for_function("!document.hidden", polling=50)
