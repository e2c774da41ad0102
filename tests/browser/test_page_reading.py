"""How the try-out page is read: on narrow and dark screens, by screen readers, while it grows; and what is copied."""

import json
from typing import Any

import pytest
from playwright.async_api import Browser, Page, expect

from tests.browser.test_page import button, failure, said, say
from tests.browser.test_readers import TEXT, TOKENS
from tests.browser.wires import MODULES
from tests.conftest import serving
from tests.upstream import CLOSE, Gate, Upstream, stream

pytestmark = pytest.mark.anyio

AXE = MODULES / "axe-core" / "axe.min.js"
CHAT = "**/api/chat"


def answered(*events: tuple[str, object]) -> dict[str, Any]:
    """A response of the service with these events, for what Grok's own wire in these tests does not say."""
    frames = [f"event: {kind}\ndata: {json.dumps(data)}\n\n" for kind, data in events]
    body = "".join([*frames, "data: Found.\n\n", "data: [DONE]\n\n"])
    return {"status": 200, "content_type": "text/event-stream", "body": body}


SEARCHED = answered(
    ("tool", {"tool": "web_search", "status": "started"}),
    ("tool", {"tool": "x_search", "status": "started"}),
    ("tool", {"tool": "web_search", "status": "completed", "query": "<b>weather</b>"}),
    (
        "citations",
        [
            {"url": "https://example.com/a?b=<i>", "title": "<img src=x onerror=alert(1)>"},
            {"url": "http://example.org/"},
            {"url": "javascript:alert(1)", "title": "no link"},
            {"url": " data:text/html,x", "title": "no link"},
        ],
    ),
)


async def allow_search(page: Page, url: str) -> None:
    """Open the page as a service sends it that lets Grok search the web and X."""
    response = await page.request.get(url)
    html = (await response.text()).replace('data-tools=""', 'data-tools="web_search,x_search"')
    await page.route(f"{url}/", lambda route: route.fulfill(response=response, body=html))
    await page.goto(url)


async def test_announcements(page: Page) -> None:
    """A screen reader hears that an answer begins and is complete, and not every token."""
    async with Upstream(stream(*TOKENS)) as upstream, serving(upstream.url) as service:
        await page.goto(service.url)
        await expect(page.get_by_role("log", name="Conversation")).to_have_attribute("aria-live", "off")
        await page.evaluate(
            """() => {
                window.heard = [];
                const status = document.querySelector("[role=status]");
                new MutationObserver(() => heard.push(status.textContent)).observe(status, { childList: true });
            }"""
        )
        await say(page, "Hi")
        await expect(page.get_by_role("status")).to_have_text("Answer complete.")
        assert await page.evaluate("window.heard") == ["Grok is answering.", "Answer complete."]
        await expect(page.get_by_role("heading", name="Grok", level=2)).to_have_count(1)


async def test_following(page: Page) -> None:
    """The page follows the answer while its end is in sight, and holds still for a reader who scrolled up."""
    gates = [Gate(), Gate()]
    lines = [f"line {n}\n" for n in range(200)]
    script = stream(*lines, "one", gates[0], *lines, "two", gates[1], *lines, "three")
    async with Upstream(script) as upstream, serving(upstream.url) as service:
        await page.goto(service.url)
        await say(page, "Hi")
        await expect(said(page)).to_contain_text("one")
        assert await below(page) < 2
        await page.evaluate("log.scrollTop = 100")
        await expect(button(page, "↓ Latest")).to_be_visible()
        gates[0].open()
        await expect(said(page)).to_contain_text("two")
        assert await below(page) > 5000
        assert await page.evaluate("log.scrollTop") == 100
        await button(page, "↓ Latest").click()
        await expect(button(page, "↓ Latest")).to_be_hidden()
        gates[1].open()
        await expect(said(page)).to_contain_text("three")
        assert await below(page) < 2


async def below(page: Page) -> float:
    """How far the end of the log is out of sight, once what has come is on the screen."""
    return float(
        await page.evaluate(
            """async () => {
                await new Promise((resolve) => requestAnimationFrame(() => requestAnimationFrame(resolve)));
                return log.scrollHeight - log.clientHeight - log.scrollTop;
            }"""
        )
    )


async def test_copy(browser: Browser) -> None:
    """What is copied is the answer, exactly; where pages may not use the clipboard, it is selected and then copied."""
    async with Upstream(stream(*TOKENS)) as upstream, serving(upstream.url) as service:
        context = await browser.new_context(permissions=["clipboard-read", "clipboard-write"])
        page = await context.new_page()
        await page.goto(service.url)
        await say(page, "Hi")
        await button(page, "Copy").click()
        await expect(button(page, "Copied")).to_be_visible()
        assert await page.evaluate("navigator.clipboard.readText()") == TEXT
        await page.evaluate("navigator.clipboard.writeText('')")
        await expect(button(page, "Copy")).to_be_visible()
        await page.evaluate("() => { navigator.clipboard.writeText = () => Promise.reject(new Error()); }")
        await button(page, "Copy").click()
        await expect(button(page, "Copied")).to_be_visible()
        assert "# Title\n two  spaces \n\nline" in await page.evaluate("navigator.clipboard.readText()")
        await context.close()


async def test_no_copy_of_nothing(page: Page) -> None:
    """While an answer is being written, or where there is none, there is nothing to copy."""
    gate = Gate()
    async with Upstream(stream("half", gate), stream(CLOSE)) as upstream, serving(upstream.url) as service:
        await page.goto(service.url)
        await say(page, "Hi")
        await expect(said(page)).to_have_text("half")
        await expect(button(page, "Copy")).to_be_hidden()
        gate.open()
        await expect(button(page, "Copy")).to_be_visible()
        await say(page, "Hi")
        await expect(failure(page)).to_be_visible()
        await expect(page.get_by_role("article").last.get_by_role("button", name="Copy")).to_be_hidden()


async def test_searches_and_sources(page: Page) -> None:
    """Searches and sources are listed as the text they are; only web addresses become links."""
    async with Upstream() as upstream, serving(upstream.url) as service:
        await page.route(CHAT, lambda route: route.fulfill(**SEARCHED))
        await allow_search(page, service.url)
        asked: list[Any] = []
        page.on("request", lambda request: asked.append(request.post_data_json) if request.method == "POST" else None)
        await say(page, "Hi")
        await expect(said(page)).to_have_text("Found.")
        await page.get_by_label("Let Grok search").check()
        await say(page, "Hi")
        answer = page.get_by_role("article").last
        await expect(answer.locator(".said")).to_have_text("Found.")
        await expect(answer.locator(".searches li")).to_have_text(["Searched the web: <b>weather</b>", "Searching X…"])
        links = answer.get_by_role("link")
        await expect(links).to_have_text(["<img src=x onerror=alert(1)>", "http://example.org/"])
        for link in await links.all():
            assert await link.get_attribute("rel") == "noreferrer noopener"
            assert await link.get_attribute("target") == "_blank"
        assert [request.get("tools") for request in asked] == [None, ["web_search", "x_search"]]
        assert asked[1]["include"] == ["reasoning", "finish", "tools", "citations"]


async def test_no_search(page: Page) -> None:
    """Where the service does not let Grok search, nobody is offered to."""
    async with Upstream() as upstream, serving(upstream.url) as service:
        await page.goto(service.url)
        await expect(page.get_by_label("Let Grok search")).to_be_hidden()


async def test_narrow_and_dark(browser: Browser) -> None:
    """At the width of a small phone nothing sticks out, and the dark scheme is dark."""
    async with Upstream(stream("wide" * 200)) as upstream, serving(upstream.url) as service:
        context = await browser.new_context(viewport={"width": 320, "height": 640}, color_scheme="dark")
        page = await context.new_page()
        await page.goto(service.url)
        await say(page, "w" * 200)
        await expect(button(page, "Send")).to_be_visible()
        assert await page.evaluate("document.documentElement.scrollWidth") == 320
        assert await page.evaluate("log.scrollWidth") == 320
        assert await page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(19, 20, 25)"
        await context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
async def test_accessible(browser: Browser, width: int, scheme: Any) -> None:
    """axe-core finds nothing: before an answer, after one, after searches, beside an error, and asking for a token."""
    if not AXE.exists():
        pytest.skip("its node packages are not installed: npm install --prefix tests/browser")
    async with (
        Upstream(stream("whole", reasoning=["hm"]), stream("half", CLOSE)) as upstream,
        serving(upstream.url) as service,
    ):
        context = await browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
        page = await context.new_page()
        await allow_search(page, service.url)
        await page.evaluate(AXE.read_text())
        assert await violations(page) == []
        await say(page, "Hi")
        await expect(button(page, "Copy")).to_be_visible()
        await page.get_by_text("Thought for 1 s").click()
        assert await violations(page) == []
        await say(page, "Hi")
        await expect(failure(page)).to_be_visible()
        assert await violations(page) == []
        await page.route(CHAT, lambda route: route.fulfill(**SEARCHED))
        await say(page, "Hi")
        await expect(said(page)).to_have_text("Found.")
        assert await violations(page) == []
        unauthorized = {"error": {"code": "unauthorized", "message": "No."}}
        await page.route(CHAT, lambda route: route.fulfill(status=401, json=unauthorized))
        await say(page, "Hi")
        await expect(page.get_by_label("Access token")).to_be_visible()
        assert await violations(page) == []
        assert await page.evaluate("document.documentElement.scrollWidth") == width
        await context.close()


async def violations(page: Page) -> list[Any]:
    """What axe-core finds, with the elements where."""
    found: list[Any] = await page.evaluate(
        """async () => (await axe.run()).violations.map(({ id, nodes }) => [id, nodes.map(({ html, any }) =>
            [html, any.map(({ message }) => message)])])"""
    )
    return found


async def test_search_in_the_demo(page: Page) -> None:
    """Where the operator allows searches the page offers them; the demo's sources are shown, and open safely."""
    demo = {"grok_api_key": None, "grok_base_url": None, "grok_api": "responses", "grok_tools": "web_search"}
    async with serving("", **demo) as service:
        await page.goto(service.url)
        await page.get_by_role("checkbox", name="Search").check()
        await say(page, "Hi")
        await expect(page.get_by_role("status")).to_have_text("Answer complete.")
        links = await page.locator("#log a").evaluate_all(
            "(links) => links.map((link) => [link.protocol, link.rel, link.target])"
        )
        assert links == [["https:", "noreferrer noopener", "_blank"]] * 2


async def test_no_search_without_permission(page: Page) -> None:
    """Elsewhere it does not."""
    async with Upstream() as upstream, serving(upstream.url) as service:
        await page.goto(service.url)
        await expect(page.get_by_role("checkbox", name="Search")).to_be_hidden()
