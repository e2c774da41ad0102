"""A React page that `useChat` drives, and the `openai` package in a page, in real Chromium."""

from collections.abc import Awaitable, Callable
from typing import Any
from uuid import uuid4

import pytest
from playwright.async_api import Page, expect

from tests.conftest import InProcessService, serving
from tests.sdk.conftest import AI_MAJORS
from tests.upstream import CLOSE, HANG, Gate, Upstream, error, stream

pytestmark = pytest.mark.anyio

NASTY = ["Hel", "lo\n", "\n", "[DONE]", "\n[DONE]\n", " \u2028\u0085", "\U0001f600 ", "data: x\n\n", " "]
TEXT = "".join(NASTY)

Visit = Callable[..., Awaitable[Page]]


async def send(page: Page, text: str = "Hi") -> None:
    await page.evaluate("(text) => void sendMessage({ text })", text)


async def texts(page: Page) -> list[str]:
    """What the answers on the page say."""
    found: list[str] = await page.locator(".assistant .text").all_text_contents()
    return found


@pytest.mark.parametrize("major", AI_MAJORS)
async def test_page_as_it_is(visit: Visit, grok: Upstream, service: InProcessService, major: str) -> None:
    """`useChat()` without an option, on a page of the service's own origin: exact text, reasoning, and metadata."""
    grok.set_scripts(stream(*NASTY, reasoning=["hm"]), stream("two"))
    page = await visit(service.url, major)
    await send(page)
    await expect(page.locator("#status")).to_have_text("ready")
    await expect(page.locator(".assistant .text")).to_have_count(1)
    assert await texts(page) == [TEXT]
    assert await page.locator(".assistant .reasoning").all_text_contents() == ["hm"]
    metadata = await page.evaluate("messages[1].metadata")
    assert (metadata["model"], metadata["usage"]["totalTokens"]) == ("grok-4.3", 20)
    await page.evaluate("void regenerate()")
    await expect(page.locator(".assistant .text")).to_have_text("two")
    assert [[turn["content"] for turn in call.body["messages"]] for call in grok.calls] == [["Hi"], ["Hi"]]


@pytest.mark.parametrize("major", AI_MAJORS)
async def test_page_elsewhere(visit: Visit, elsewhere: str, grok: Upstream, major: str) -> None:
    """From another origin: a reload in the middle shows all of the answer, a second one nothing, and no error."""
    gate = Gate()
    grok.set_scripts(stream("one ", gate, "two"))
    async with serving(grok.url, allowed_origins=elsewhere) as service:
        options = {
            "id": str(uuid4()),
            "resume": True,
            "api": f"{service.url}/api/chat",
            "body": {"resumable": True},
            "throttle": 50,
        }
        page = await visit(elsewhere, major, **options)
        await send(page)
        await expect(page.locator(".assistant .text")).to_have_text("one ")
        await page.reload()
        await expect(page.locator(".assistant .text")).to_have_text("one ")
        gate.open()
        await expect(page.locator("#status")).to_have_text("ready")
        await expect(page.locator(".assistant .text")).to_have_text("one two")
        async with page.expect_response("**/stream") as response:
            await page.reload()
        assert (await response.value).status == 204
        await expect(page.locator("#status")).to_have_text("ready")
        assert await texts(page) == []
    assert len(grok.calls) == 1


@pytest.mark.parametrize("major", AI_MAJORS)
async def test_page_that_fails_and_stops(visit: Visit, grok: Upstream, service: InProcessService, major: str) -> None:
    """Failures before and after the status are our sentences; `stop()`, and a page that is left, hang up Grok."""
    grok.set_scripts(error(401, {"error": "x"}), stream("par", CLOSE), stream("so far", HANG))
    page = await visit(service.url, major)
    for sentence in (
        "Grok does not accept this service's API key or its credits are used up. Only its operator can mend this.",
        "Grok stopped in the middle of the answer. What arrived is incomplete.",
    ):
        await send(page)
        await expect(page.locator("#error")).to_have_text(sentence)
    await send(page)
    await expect(page.locator(".assistant .text").last).to_have_text("so far")
    await page.evaluate("void stop()")
    await grok.calls[2].hung_up(within=1)
    await expect(page.locator("#status")).to_have_text("ready")
    await send(page)
    await grok.call(3)
    await expect(page.locator(".assistant .text").last).to_have_text("so far")
    await page.goto("about:blank")
    await grok.calls[3].hung_up(within=1)
    assert len(grok.calls) == 4


# What a page does with the package.
ASK = """async ([baseURL, params]) => {
    const client = new OpenAI({ baseURL, apiKey: "any", dangerouslyAllowBrowser: true });
    const seen = { content: "" };
    try {
        const answer = await client.chat.completions.create({ model: "grok-4.3", ...params });
        if (!params.stream) return { content: answer.choices[0].message.content };
        for await (const chunk of answer) seen.content += chunk.choices[0]?.delta.content ?? "";
    } catch ({ constructor, status, code, message }) {
        seen.error = { class: constructor.name, status, code, message };
    }
    return seen;
}"""


async def test_openai_in_a_page(visit: Visit, elsewhere: str, grok: Upstream) -> None:
    """From another origin: preflights pass, text is exact, and what must not be asked twice is asked once."""
    hi: Any = [{"role": "user", "content": "Hi"}]
    grok.set_scripts(stream(*NASTY), stream(*NASTY), error(401, {"error": "x"}), stream("par", CLOSE))
    async with serving(grok.url, allowed_origins=elsewhere) as service:
        page = await visit(elsewhere, AI_MAJORS[-1])
        base = f"{service.url}/v1"
        for streamed in (True, False):
            assert await page.evaluate(ASK, [base, {"messages": hi, "stream": streamed}]) == {"content": TEXT}
        refused = (await page.evaluate(ASK, [base, {"messages": hi}]))["error"]
        assert (refused["status"], refused["code"]) == (502, "upstream_auth")
        assert len(grok.calls) == 3
        failed = await page.evaluate(ASK, [base, {"messages": hi, "stream": True}])
        assert (failed["content"], failed["error"]["code"]) == ("par", "upstream_cut_off")
    assert len(grok.calls) == 4
