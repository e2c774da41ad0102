"""The try-out page over wires that break, and with a service that refuses: it says so in plain words and goes on."""

import pytest
from playwright.async_api import Page, expect

from tests.browser.test_page import button, failure, note, said, say
from tests.browser.test_readers import TEXT, TOKENS
from tests.browser.wires import Relay
from tests.conftest import serving
from tests.upstream import CLOSE, HANG, Gate, Upstream, error, stream

pytestmark = pytest.mark.anyio


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
        await relay.until(
            lambda: relay.statuses.count(200) == 6
        )  # page, client.js, readyz, the POST and two more readings
        relay.cut()
        gate.open()
        await expect(button(page, "Send")).to_be_visible()
        assert await said(page).text_content() == TEXT
        assert relay.cuts == []
        assert len(upstream.calls) == 1


async def test_unreachable_told_by_the_page(page: Page) -> None:
    """A service that stays away is an error that can be retried."""
    async with Upstream(stream("back")) as upstream, serving(upstream.url) as service, Relay(service.port) as relay:
        await page.goto(relay.url)
        relay.down = True
        relay.cut()
        await say(page, "Hi")
        await expect(note(page)).to_have_text("The service cannot be reached. Trying again…")
        await expect(page.get_by_text("connection_lost")).to_be_visible(timeout=10_000)
        relay.down = False
        await button(page, "Try again").click()
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
        await button(page, "Try again").click()
        await expect(said(page)).to_have_text("whole")


async def test_refused(page: Page) -> None:
    """A refusal shows its sentence, its code and how long to wait, and can be retried when the service says so."""
    slow_down = error(429, {"code": "rate", "error": "Too many requests"}, {"Retry-After": "90"})
    async with (
        Upstream(slow_down, stream("now")) as upstream,
        serving(upstream.url, grok_retries=0) as service,
    ):
        await page.clock.install()
        await page.goto(service.url)
        await say(page, "Hi")
        await expect(failure(page)).to_have_text("Grok is receiving too many requests. Wait for 90 s.")
        await expect(page.get_by_text("upstream_rate_limited")).to_be_visible()
        await expect(button(page, "Try again in 90 s")).to_be_disabled()
        await page.clock.run_for(89_000)
        await expect(button(page, "Try again in 1 s")).to_be_disabled()
        await page.clock.run_for(1000)
        await expect(button(page, "Try again")).to_be_enabled()
        assert len(upstream.calls) == 1


async def test_asked_too_often(page: Page) -> None:
    """A caller at the limit is told so in plain words, and for how long."""
    async with Upstream(stream("once")) as upstream, serving(upstream.url, rate_limit="1/hour") as service:
        await page.goto(service.url)
        await say(page, "Hi")
        await expect(button(page, "Copy")).to_be_visible()
        await say(page, "Hi")
        await expect(failure(page)).to_have_text("You have asked as often as this service allows for now.")
        await expect(page.get_by_role("button", name="Try again in 60 min")).to_be_disabled()


@pytest.mark.parametrize(
    ("setting", "whose"), [("token_budget", "The tokens of this service"), ("token_budget_per_client", "Your tokens")]
)
async def test_spent_budget(page: Page, setting: str, whose: str) -> None:
    """Where tokens are used up, the page says whose, and in how many hours there are some again."""
    async with Upstream(stream("once")) as upstream, serving(upstream.url, **{setting: "5/day"}) as service:
        await page.goto(service.url)
        await say(page, "Hi")
        await expect(button(page, "Copy")).to_be_visible()
        await say(page, "Hi")
        await expect(failure(page)).to_have_text(f"{whose} are used up for now. Wait for 24 h.")
        await expect(button(page, "Try again in 24 h")).to_be_disabled()
        assert len(upstream.calls) == 1


async def test_soon_again(page: Page) -> None:
    """A wait of few seconds is waited for by itself, and the page says why."""
    slow_down = error(503, {"code": "x", "error": "at capacity"}, {"Retry-After": "1"})
    async with (
        Upstream(slow_down, stream("now")) as upstream,
        serving(upstream.url, grok_retries=0) as service,
    ):
        await page.goto(service.url)
        await say(page, "Hi")
        await expect(note(page)).to_have_text("Grok is at capacity. Wait for 1 s. Trying again…")
        await expect(said(page)).to_have_text("now")
        assert len(upstream.calls) == 2


async def test_failed_told_by_the_page(page: Page) -> None:
    """A failure in the middle keeps the text; a retry begins the answer anew."""
    async with (
        Upstream(stream("half", CLOSE), stream("whole")) as upstream,
        serving(upstream.url) as service,
    ):
        await page.goto(service.url)
        await say(page, "Hi")
        await expect(page.get_by_text("upstream_cut_off")).to_be_visible()
        await expect(failure(page)).to_contain_text("This answer is not complete. Grok stopped in the middle")
        await expect(said(page)).to_have_text("half")
        await button(page, "Try again").click()
        await expect(said(page)).to_have_text("whole")
        assert upstream.calls[1].body["messages"] == [{"role": "user", "content": "Hi"}]


async def test_too_long(page: Page) -> None:
    """An answer that was cut at the length limit says so."""
    async with Upstream(stream("and so", finish="length")) as upstream, serving(upstream.url) as service:
        await page.goto(service.url)
        await say(page, "Hi")
        await expect(note(page)).to_contain_text("Cut short")
