"""The try-out page, used as people use it: by keyboard, by roles and names, over wires that break."""

import pytest
from playwright.async_api import Locator, Page, expect

from tests.browser.wires import Relay
from tests.conftest import serving
from tests.upstream import HANG, Gate, Upstream, stream

pytestmark = pytest.mark.anyio


async def say(page: Page, text: str) -> None:
    await page.get_by_role("textbox", name="Message").fill(text)
    await page.keyboard.press("Enter")


def said(page: Page) -> Locator:
    """The text of the last answer."""
    return page.get_by_role("article").last.locator(".said")


def note(page: Page) -> Locator:
    return page.get_by_role("article").last.locator(".note")


def failure(page: Page) -> Locator:
    return page.get_by_role("article").last.locator(".failure span")


def button(page: Page, name: str) -> Locator:
    return page.get_by_role("button", name=name, exact=True)


async def test_conversation(page: Page) -> None:
    """Typed, streamed as it comes, and sent along with the next question on the same prompt cache."""
    gate = Gate()
    async with (
        Upstream(stream("Hel", gate, "lo"), stream("Again")) as upstream,
        serving(upstream.url) as service,
    ):
        await page.goto(service.url)
        await expect(page.locator("textarea")).to_be_focused()  # from the start
        await page.keyboard.type("One")
        await page.keyboard.press("Shift+Enter")
        await page.keyboard.type("two")
        await page.keyboard.press("Enter")
        await expect(said(page)).to_have_text("Hel")
        await expect(button(page, "Stop")).to_be_visible()
        gate.open()
        await expect(said(page)).to_have_text("Hello")
        await expect(note(page)).to_have_text("grok-4.3 · 3 tokens")
        await say(page, "Three")
        await expect(said(page)).to_have_text("Again")
        await expect(button(page, "Send")).to_be_visible()
        first, second = upstream.calls
        assert first.body["messages"] == [{"role": "user", "content": "One\ntwo"}]
        assert second.body["messages"] == [
            {"role": "user", "content": "One\ntwo"},
            {"role": "assistant", "content": "Hello"},
            {"role": "user", "content": "Three"},
        ]
        assert first.headers["x-grok-conv-id"] == second.headers["x-grok-conv-id"]


async def test_new_conversation(page: Page) -> None:
    """A new chat forgets the old one, stops its answer and begins another conversation."""
    async with (
        Upstream(stream("half", HANG), stream("whole")) as upstream,
        serving(upstream.url) as service,
    ):
        await page.goto(service.url)
        await say(page, "Old")
        await expect(said(page)).to_have_text("half")
        await button(page, "New chat").click()
        await upstream.calls[0].hung_up()
        await expect(page.get_by_role("article")).to_have_count(0)
        await page.keyboard.type("New")
        await page.keyboard.press("Enter")
        await expect(said(page)).to_have_text("whole")
        first, second = upstream.calls
        assert second.body["messages"] == [{"role": "user", "content": "New"}]
        assert first.headers["x-grok-conv-id"] != second.headers["x-grok-conv-id"]


async def test_reasoning(page: Page) -> None:
    """Reasoning is folded away, and can be opened."""
    async with Upstream(stream("4", reasoning=["2 + 2", " is 4"])) as upstream, serving(upstream.url) as service:
        await page.goto(service.url)
        await say(page, "2 + 2?")
        await expect(said(page)).to_have_text("4")
        await expect(page.get_by_text("2 + 2 is 4")).to_be_hidden()
        await page.get_by_text("Thought for 1 s").click()
        await expect(page.get_by_text("2 + 2 is 4")).to_be_visible()


@pytest.mark.parametrize("way", ["Escape", "button"])
async def test_stop_on_the_page(page: Page, way: str) -> None:
    """Stop hangs up at once, keeps what had come, and the next question carries it."""
    async with (
        Upstream(stream("half", HANG), stream("whole")) as upstream,
        serving(upstream.url) as service,
    ):
        await page.goto(service.url)
        await say(page, "Hi")
        await expect(said(page)).to_have_text("half")
        await (page.keyboard.press("Escape") if way == "Escape" else button(page, "Stop").click())
        await upstream.calls[0].hung_up()
        await expect(note(page)).to_have_text("Stopped.")
        await expect(button(page, "Try again")).to_be_visible()
        await say(page, "Go on")
        await expect(said(page)).to_have_text("whole")
        assert upstream.calls[1].body["messages"][1] == {"role": "assistant", "content": "half"}
        await expect(button(page, "Try again")).to_have_count(0)


async def test_stop_before_anything_on_the_page(page: Page) -> None:
    """Stop is at once for whoever pressed it before anything came; Grok is hung up when the stream has an address."""
    async with Upstream([HANG]) as upstream, serving(upstream.url, status_hold=1) as service:
        await page.goto(service.url)
        await say(page, "Hi")
        call = await upstream.call()
        await page.keyboard.press("Escape")
        await expect(note(page)).to_have_text("Stopped.", timeout=500)
        await call.hung_up(within=3)


async def test_access_token(page: Page) -> None:
    """A token is asked for when one is needed, and kept in memory only: not for whoever opens the page next."""
    async with Upstream() as upstream, serving(upstream.url, access_tokens="some-access-token") as service:
        await page.goto(service.url)
        token = page.get_by_label("Access token")
        await expect(token).to_be_hidden()
        for attempt in ("wrong", "some-access-token"):
            if attempt == "wrong":
                await say(page, "Hi")
                await expect(
                    page.get_by_role("log").get_by_text("This service asks for an access token.")
                ).to_be_visible()
            else:
                refused = page.get_by_role("log").get_by_text("This service does not accept your access token.")
                await expect(refused).to_be_visible()
            await expect(page.get_by_text("unauthorized")).to_be_visible()
            await expect(token).to_be_focused()
            await page.keyboard.type(attempt)
            await page.keyboard.press("Enter")
        await expect(said(page)).to_have_text("Hello, world")
        await expect(token).to_be_hidden()
        await say(page, "Hi")
        await expect(said(page)).to_have_text("Hello, world")
        assert await page.evaluate("localStorage.length + sessionStorage.length + document.cookie.length") == 0
        await page.reload()
        await say(page, "Hi")
        await expect(token).to_be_focused()


async def test_closed_on_the_page(page: Page) -> None:
    """Closing the page hangs up at once."""
    async with Upstream(stream("half", HANG)) as upstream, serving(upstream.url) as service:
        await page.goto(service.url)
        await say(page, "Hi")
        await expect(said(page)).to_have_text("half")
        await page.goto("about:blank")
        await upstream.calls[0].hung_up()


async def test_under_a_prefix_on_the_page(page: Page) -> None:
    """Behind a proxy with a path prefix the page asks, resumes and stops under that prefix."""
    async with (
        Upstream(stream("half", HANG)) as upstream,
        serving(upstream.url, root_path="/grok") as service,
        Relay(service.port, strip="/grok") as relay,
    ):
        await page.goto(f"{relay.url}/grok/")
        await say(page, "Hi")
        await expect(said(page)).to_have_text("half")
        relay.cut()
        await relay.until(lambda: relay.requests[-1].path.endswith("/stream"))
        await page.keyboard.press("Escape")
        await upstream.calls[0].hung_up()
        assert {request.path[:6] for request in relay.requests} == {"/grok/"}


async def test_nothing_from_elsewhere(page: Page) -> None:
    """The page asks nobody but its service, breaks none of its own policy, and shows markup as the text it is."""
    asked: list[str] = []
    complaints: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: complaints.append(message.text))
    markup = "<img src=x onerror=alert(1)> **bold** <script>alert(2)</script>"
    async with Upstream(stream(markup, reasoning=[markup])) as upstream, serving(upstream.url) as service:
        response = await page.goto(service.url)
        assert response is not None
        assert response.headers["content-security-policy"].startswith("default-src 'none';")
        await say(page, markup)
        await expect(said(page)).to_have_text(markup)
        await expect(button(page, "Send")).to_be_visible()
        assert await page.locator("#log").locator("img, script, b, strong").count() == 0
        assert {url for url in asked if not url.startswith((f"{service.url}/", "data:"))} == set()
        assert complaints == []


async def test_demo(page: Page) -> None:
    """Without a key the page says that it runs on the demo, and with one it does not."""
    hint = page.get_by_text("Demo: set GROK_API_KEY")
    async with Upstream() as upstream:
        async with serving(upstream.url, grok_api_key=None) as service:
            await page.goto(service.url)
            await expect(hint).to_be_visible()
        async with serving(upstream.url) as service, page.expect_response("**/readyz"):
            await page.goto(service.url)
        await expect(hint).to_be_hidden()
