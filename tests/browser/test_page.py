"""The try-out page, used as people use it: by keyboard, by roles and names, over wires that break."""

import pytest
from playwright.async_api import Browser, Locator, Page, expect

from tests import readers
from tests.browser.test_readers import TEXT, TOKENS
from tests.browser.wires import Relay
from tests.conftest import serving
from tests.upstream import CLOSE, HANG, Gate, Upstream, error, stream

pytestmark = pytest.mark.anyio


async def say(page: Page, text: str) -> None:
    await page.get_by_role("textbox", name="Message").fill(text)
    await page.keyboard.press("Enter")


def said(page: Page) -> Locator:
    """The text of the last answer."""
    return page.get_by_role("article").last.locator(".said")


def note(page: Page) -> Locator:
    return page.get_by_role("article").last.locator(".note")


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
async def test_stop(page: Page, way: str) -> None:
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
        await expect(button(page, "Retry")).to_be_visible()
        await say(page, "Go on")
        await expect(said(page)).to_have_text("whole")
        assert upstream.calls[1].body["messages"][1] == {"role": "assistant", "content": "half"}
        await expect(button(page, "Retry")).to_have_count(0)


async def test_stop_before_anything(page: Page) -> None:
    """Stop is at once for whoever pressed it before anything came; Grok is hung up when the stream has an address."""
    async with Upstream([HANG]) as upstream, serving(upstream.url, status_hold=1) as service:
        await page.goto(service.url)
        await say(page, "Hi")
        call = await upstream.call()
        await page.keyboard.press("Escape")
        await expect(note(page)).to_have_text("Stopped.", timeout=500)
        await call.hung_up(within=3)


async def test_lost_before_anything(page: Page) -> None:
    """A connection that is lost before anything came is made again, and the answer asked for once."""
    gate = Gate()
    async with (
        Upstream([gate, *stream("whole")]) as upstream,
        serving(upstream.url) as service,
        Relay(service.port) as relay,
    ):
        await page.goto(relay.url)
        await say(page, "Hi")
        await gate.reached.wait()
        relay.cut()
        await relay.until(lambda: [request.method for request in relay.requests].count("POST") == 2)
        gate.open()
        await expect(said(page)).to_have_text("whole")
        assert len(upstream.calls) == 1


async def test_lost_connection(page: Page) -> None:
    """Through three lost connections, two of them inside an event, the text is exact and asked for once."""
    gate = Gate()
    async with (
        Upstream(stream(*TOKENS[:40], gate, *TOKENS[40:])) as upstream,
        serving(upstream.url) as service,
        Relay(service.port) as relay,
    ):
        await page.goto(relay.url)
        relay.cuts = [700, 1400]
        await say(page, "Hi")
        await expect(said(page)).to_contain_text("Title")
        await gate.reached.wait()
        await relay.until(lambda: relay.statuses.count(200) == 5)  # page, readyz, the POST and two more readings
        relay.cut()
        gate.open()
        await expect(button(page, "Send")).to_be_visible()
        assert await said(page).text_content() == TEXT
        assert relay.cuts == []
        assert len(upstream.calls) == 1


async def test_unreachable(page: Page) -> None:
    """A service that stays away is an error that can be retried."""
    async with Upstream(stream("back")) as upstream, serving(upstream.url) as service, Relay(service.port) as relay:
        await page.goto(relay.url)
        relay.down = True
        relay.cut()
        await say(page, "Hi")
        await expect(note(page)).to_have_text("Connection lost, trying again…")
        await expect(page.get_by_text("connection_lost")).to_be_visible(timeout=10_000)
        relay.down = False
        await button(page, "Retry").click()
        await expect(said(page)).to_have_text("back")
        await expect(page.get_by_text("connection_lost")).to_be_hidden()
        assert len(upstream.calls) == 1


async def test_restarted(page: Page) -> None:
    """An answer that went with the service it was on is an error that can be retried."""
    async with (
        Upstream(stream("half", HANG), stream("whole")) as upstream,
        serving(upstream.url, drain_timeout=0) as before,
        serving(upstream.url) as after,
        Relay(before.port) as relay,
    ):
        await page.goto(relay.url)
        await say(page, "Hi")
        await expect(said(page)).to_have_text("half")
        relay.port_beyond = after.port
        relay.cut()
        await expect(page.get_by_text("stream_not_found")).to_be_visible()
        assert len(upstream.calls) == 1
        await button(page, "Retry").click()
        await expect(said(page)).to_have_text("whole")


async def test_refused(page: Page) -> None:
    """A refusal shows its sentence and its code, and can be retried when the service says so."""
    slow_down = error(429, {"code": "rate", "error": "Too many requests"}, {"Retry-After": "2"})
    async with (
        Upstream(slow_down, stream("now")) as upstream,
        serving(upstream.url, grok_retries=0) as service,
    ):
        await page.goto(service.url)
        await say(page, "Hi")
        await expect(page.get_by_text("upstream_rate_limited")).to_be_visible()
        await expect(page.get_by_role("button", name="Retry in ")).to_be_disabled()
        await button(page, "Retry").click()
        await expect(said(page)).to_have_text("now")
        assert upstream.calls[1].body["messages"] == [{"role": "user", "content": "Hi"}]


async def test_failed(page: Page) -> None:
    """A failure in the middle keeps the text; a retry begins the answer anew."""
    async with (
        Upstream(stream("half", CLOSE), stream("whole")) as upstream,
        serving(upstream.url) as service,
    ):
        await page.goto(service.url)
        await say(page, "Hi")
        await expect(page.get_by_text("upstream_cut_off")).to_be_visible()
        await expect(said(page)).to_have_text("half")
        await button(page, "Retry").click()
        await expect(said(page)).to_have_text("whole")
        assert upstream.calls[1].body["messages"] == [{"role": "user", "content": "Hi"}]


async def test_too_long(page: Page) -> None:
    """An answer that was cut at the length limit says so."""
    async with Upstream(stream("and so", finish="length")) as upstream, serving(upstream.url) as service:
        await page.goto(service.url)
        await say(page, "Hi")
        await expect(note(page)).to_contain_text("Cut short")


async def test_access_token(page: Page) -> None:
    """A token is asked for when one is needed, and kept for the session."""
    async with Upstream() as upstream, serving(upstream.url, access_tokens="some-access-token") as service:
        await page.goto(service.url)
        token = page.get_by_label("Access token")
        await expect(token).to_be_hidden()
        for attempt in ("wrong", "some-access-token"):
            if attempt == "wrong":
                await say(page, "Hi")
            await expect(page.get_by_text("unauthorized")).to_be_visible()
            await expect(token).to_be_focused()
            await page.keyboard.type(attempt)
            await page.keyboard.press("Enter")
        await expect(said(page)).to_have_text("Hello, world")
        await expect(token).to_be_hidden()
        await page.reload()
        await say(page, "Hi")
        await expect(said(page)).to_have_text("Hello, world")


async def test_closed(page: Page) -> None:
    """Closing the page hangs up at once."""
    async with Upstream(stream("half", HANG)) as upstream, serving(upstream.url) as service:
        await page.goto(service.url)
        await say(page, "Hi")
        await expect(said(page)).to_have_text("half")
        await page.goto("about:blank")
        await upstream.calls[0].hung_up()


async def test_under_a_prefix(page: Page) -> None:
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


STREAMS = [
    b"data: a\n\ndata: b\n\n",
    b"data: a\r\rdata: b\r\n\r\ndata: c\n\r\n",
    b"data: one\r\ndata\rdata:\ndata: four\n\n",
    b"\xef\xbb\xbfdata: after a byte order mark\n\n",
    b"data: \xf0\x9f\x98\x80 \xe2\x80\xa8 \xc2\x85 \xff\n\n",
    b": comment\n\n:\ndata: a\n: data: no\n\n: id: no\n\n",
    b"data:a\ndata:  two spaces\ndata:\ttab\ndata : no\nDATA: no\n\n",
    b"data\n\ndata:\n\ndata: \ndata: \n\n",
    b"event: a\ndata: 1\n\ndata: 2\n\nevent: b\n\ndata: 3\n\nevent: c\nevent\ndata: 4\n\n",
    b"id: 1\ndata: a\n\ndata: b\n\nid: 2\n\nid\ndata: c\n\nid: 3\x004\ndata: d\n\nid: lost\n",
    b"retry: 1000\n\nretry: 10x\nretry: -1\nretry:\n\ndata: a\n\n",
    b"data: whole\n\ndata: lost\n",
    b"data: a\n \ndata: b\n\n",
    b"data: url: http://localhost\n\nunknown: x\ndata: y\n\n",
]


async def test_reads_as_the_standard_says(page: Page) -> None:
    """The page's reader gives what the standard says, however the bytes are cut."""
    async with Upstream() as upstream, serving(upstream.url) as service:
        await page.goto(service.url)
        read = await page.evaluate(
            """(streams) => Promise.all(streams.flatMap((bytes) => [1, 2, 3, 5, 1000].map(async (size) => {
                const state = { lastEventId: "", retry: null }, events = [];
                let at = 0;
                const next = async () => {
                    const piece = Uint8Array.from(bytes.slice(at, at += size));
                    return piece.length ? piece : undefined;
                };
                for await (const { type, data } of readEvents(next, state)) {
                    events.push([data, type, state.lastEventId]);
                }
                return [events, state.lastEventId, state.retry];
            })))""",
            [list(body) for body in STREAMS],
        )
    expected = []
    for body in STREAMS:
        parser = readers.Standard()
        events = [list(event) for event in parser.feed(body) + parser.close()]
        expected += [[events, parser.last_event_id, parser.reconnection_time]] * 5
    assert read == expected
