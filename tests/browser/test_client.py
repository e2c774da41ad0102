"""client.js in a real browser, loaded from the service: by a page of its own origin, and by one of another."""

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from playwright.async_api import Page

from tests.browser.test_readers import TEXT, TOKENS
from tests.browser.wires import Relay, Site
from tests.conftest import HI, ROOT, InProcessService, serving
from tests.upstream import CLOSE, HANG, Gate, Script, Upstream, stream

pytestmark = pytest.mark.anyio

ORIGINS = ["same origin", "other origin"]

# Asks with these options; what comes is kept in the page.
BEGIN = """([messages, options]) => {
    Object.assign(window, { text: "", events: [], iterated: [], end: null, abort: new AbortController() });
    window.answer = ask(messages, {
        ...options, signal: abort.signal,
        onText: (token) => { text += token; },
        onEvent: ({ error, ...event }) => { events.push({ ...event, ...(error && { code: error.code }) }); },
    });
    answer.then(
        (whole) => { end = { whole }; },
        ({ name, code, message, status, param, requestId, retryAfter }) => {
            end = { name, code, message, status, param, requestId, retryAfter };
        });
}"""


async def load(page: Page, url: str, site: Site | None = None) -> None:
    """Open a document, of the service or of another site, and import the module."""
    await page.goto(site.origin if site else f"{url}/healthz")
    await page.evaluate("async (url) => { Object.assign(window, await import(url)); }", f"{url}/client.js")


async def begin(page: Page, messages: object = HI, **options: object) -> None:
    await page.evaluate(BEGIN, [messages, options])


async def end(page: Page) -> Any:
    """The whole text or the error, once there is one."""
    await page.wait_for_function("window.end !== null", timeout=20_000)
    return await page.evaluate("window.end")


async def shown(page: Page, text: str) -> None:
    await page.wait_for_function("(text) => window.text === text", arg=text, timeout=20_000)


@asynccontextmanager
async def loaded(
    page: Page, site: Site, *scripts: Script, origin: str = "other origin", **changes: object
) -> AsyncIterator[tuple[Upstream, InProcessService, Relay]]:
    """A Grok, a service and a wire to it, with the module loaded through that wire."""
    async with (
        Upstream(*scripts) as upstream,
        serving(upstream.url, allowed_origins=site.origin, **changes) as service,
        Relay(service.port) as relay,
    ):
        await load(page, relay.url, site if origin == "other origin" else None)
        yield upstream, service, relay


@pytest.mark.parametrize("resumable", [True, False])
@pytest.mark.parametrize("origin", ORIGINS)
async def test_answer_through_the_client(page: Page, site: Site, origin: str, resumable: bool) -> None:
    """The exact text, as it comes, whole at the end, and event by event; Grok gets what was said."""
    gate = Gate()
    script = stream("first", gate, *TOKENS, reasoning=["h", "m\n"])
    async with loaded(page, site, script, origin=origin) as (upstream, _, _):
        await begin(page, "Hi", include=["reasoning", "finish"], sessionId="a", resumable=resumable)
        await shown(page, "first")
        gate.open()
        assert await end(page) == {"whole": "first" + TEXT}
        assert await page.evaluate("window.text") == "first" + TEXT
        events = await page.evaluate("window.events")
        assert events[:2] == [{"type": "reasoning", "text": "h"}, {"type": "reasoning", "text": "m\n"}]
        assert {event["type"] for event in events[2:-1]} == {"text"}
        finish = events[-1]
        assert (finish["type"], finish["finish_reason"], finish["model"]) == ("finish", "stop", "grok-4.3")
        assert (
            await page.evaluate("(async () => { for await (const event of answer) iterated.push(event); })()") is None
        )
        assert await page.evaluate("iterated") == events
        [call] = upstream.calls
        assert call.body["messages"] == HI
        assert "x-grok-conv-id" in call.headers


async def test_only_text(page: Page, site: Site) -> None:
    """Nothing else comes unless it is asked for, and who gives a function for the reasoning has asked."""
    async with loaded(page, site, stream("4", reasoning=["hm"])):
        await begin(page)
        assert await end(page) == {"whole": "4"}
        assert await page.evaluate("window.events") == [{"type": "text", "text": "4"}]
        await page.evaluate("ask('Hi', { onReasoning: (text) => { window.thought = text; } })")
        assert await page.evaluate("thought") == "hm"


@pytest.mark.parametrize("origin", ORIGINS)
async def test_resumed(page: Page, site: Site, origin: str) -> None:
    """Through lost connections, inside an event and between two, the text is exact and asked for once."""
    gate = Gate()
    async with loaded(page, site, stream(*TOKENS[:40], gate, *TOKENS[40:]), origin=origin) as (upstream, _, relay):
        relay.cuts = [700, 1400]
        await begin(page)
        await shown(page, "".join(TOKENS[:40]))
        assert relay.cuts == []
        relay.cut()
        gate.open()
        assert await end(page) == {"whole": TEXT}
        assert await page.evaluate("window.text") == TEXT
        retries = await page.evaluate("events.filter(({ type }) => type === 'retry')")
        assert {retry["code"] for retry in retries} == {"connection_lost"}
        assert all(0 < retry["seconds"] <= 2 for retry in retries)
        assert len(upstream.calls) == 1


async def test_not_resumable(page: Page, site: Site) -> None:
    """An answer of which nothing is kept ends with its connection, and is not asked for again."""
    async with loaded(page, site, stream("half", HANG)) as (upstream, _, relay):
        await begin(page, resumable=False)
        await shown(page, "half")
        relay.cut()
        assert (await end(page))["code"] == "connection_lost"
        await upstream.calls[0].hung_up()
        assert [request.method for request in relay.requests if request.method != "OPTIONS"] == ["GET", "POST"]


STOPS = {
    "stop": ("answer.stop()", {"name": "ChatError", "code": "stopped", "message": "Stopped."}),
    "signal": ("abort.abort()", {"name": "AbortError"}),
    "reason": ("abort.abort(Object.assign(new Error('enough'), { code: 'mine' }))", {"name": "Error", "code": "mine"}),
    "break": ("(async () => { for await (const event of answer) break; })()", {"name": "ChatError", "code": "stopped"}),
}


@pytest.mark.parametrize("resumable", [True, False])
@pytest.mark.parametrize("way", STOPS)
async def test_stop(page: Page, site: Site, way: str, resumable: bool) -> None:
    """However it is stopped, Grok is hung up at once, and what had come stays."""
    script, told = STOPS[way]
    async with loaded(page, site, stream("half", HANG)) as (upstream, _, _):
        await begin(page, resumable=resumable)
        await shown(page, "half")
        await page.evaluate(script)
        await upstream.calls[0].hung_up()
        ended = await end(page)
        assert {key: ended[key] for key in told} == told
        assert await page.evaluate("window.text") == "half"


async def test_mistake_of_the_page(page: Page, site: Site) -> None:
    """An exception from a function of the page stops the answer, which rejects with it."""
    async with loaded(page, site, stream("half", HANG)) as (upstream, _, _):
        mistake = "ask('Hi', { onText() { throw new RangeError('mine'); } }).catch((error) => error.name)"
        assert await page.evaluate(mistake) == "RangeError"
        await upstream.calls[0].hung_up()


@pytest.mark.parametrize("resumable", [True, False])
async def test_stop_before_anything(page: Page, site: Site, resumable: bool) -> None:
    """Stopping is at once for who asked; Grok is hung up at once, or when the answer's address is known."""
    async with loaded(page, site, [HANG], status_hold=1) as (upstream, _, _):
        await begin(page, resumable=resumable)
        call = await upstream.call()
        await page.evaluate("answer.stop()")
        await page.wait_for_function("window.end !== null", timeout=500)
        await call.hung_up(within=3 if resumable else 1)


async def test_stopped_before_it_began(page: Page, site: Site) -> None:
    """With a signal that is aborted already nothing is asked."""
    async with loaded(page, site, stream("unused")) as (upstream, _, relay):
        aborted = "ask('Hi', { signal: AbortSignal.abort() }).catch((error) => error.name)"
        assert await page.evaluate(aborted) == "AbortError"
        assert [request.method for request in relay.requests] == ["GET"]
        assert upstream.calls == []


async def test_signal_is_let_go(page: Page, site: Site) -> None:
    """A signal that outlives its answers keeps nothing of them."""
    async with loaded(page, site, stream("whole")):
        listeners = await page.evaluate(
            """async () => {
                const { signal } = new AbortController();
                let listeners = 0;
                for (const [name, step] of [["addEventListener", 1], ["removeEventListener", -1]]) {
                    signal[name] = (...given) => {
                        listeners += step;
                        AbortSignal.prototype[name].apply(signal, given);
                    };
                }
                await ask("Hi", { signal });
                return listeners;
            }"""
        )
        assert listeners == 0


@pytest.mark.parametrize("origin", ORIGINS)
async def test_closed(page: Page, site: Site, origin: str) -> None:
    """A page that stops while it is being closed hangs up at once."""
    async with loaded(page, site, stream("half", HANG), origin=origin) as (upstream, _, _):
        await page.evaluate("addEventListener('pagehide', () => answer.stop())")
        await begin(page)
        await shown(page, "half")
        await page.goto("about:blank")
        await upstream.calls[0].hung_up()


async def test_restarted_through_the_client(page: Page, site: Site) -> None:
    """After a restart of the service the answer is gone: that is told, and Grok is not asked again."""
    async with (
        loaded(page, site, stream("half", HANG), drain_timeout=0) as (upstream, _, relay),
        serving(upstream.url, allowed_origins=site.origin) as after,
    ):
        await begin(page)
        await shown(page, "half")
        relay.port_beyond = after.port
        relay.cut()
        ended = await end(page)
        assert (ended["code"], ended["status"]) == ("stream_not_found", 404)
        assert ended["requestId"]
        assert await page.evaluate("window.text") == "half"
        assert len(upstream.calls) == 1


async def test_under_a_prefix(page: Page, site: Site) -> None:
    """Loaded from under a path prefix it asks, resumes and stops there, whether or not the service knows the prefix."""
    for root_path in ("/grok", None):
        async with (
            Upstream(stream("half", HANG)) as upstream,
            serving(upstream.url, allowed_origins=site.origin, root_path=root_path) as service,
            Relay(service.port, strip="/grok") as relay,
        ):
            await load(page, f"{relay.url}/grok", site)
            await begin(page)
            await shown(page, "half")
            relay.cut()
            await relay.until(lambda: relay.requests[-1].path.endswith("/stream"))
            await page.evaluate("answer.stop()")
            await upstream.calls[0].hung_up()
            assert {request.path[:6] for request in relay.requests} == {"/grok/"}


async def test_readme(page: Page, site: Site) -> None:
    """The lines of the README work as they are printed."""
    [lines] = re.findall(r"```js\n(import .+?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert lines.count("http://localhost:8000/") == 1
    async with loaded(page, site, stream("Hel", "lo"), stream("half", CLOSE), stream("half", HANG)) as (grok, _, relay):
        script = lines.replace("http://localhost:8000", relay.url)
        await page.evaluate("document.body.innerHTML = '<p id=output></p><button id=button>Stop</button>'")
        for said in ("Hello", "half" + "Grok stopped in the middle of the answer. What arrived is incomplete."):
            await page.evaluate("output.textContent = ''")
            await page.add_script_tag(type="module", content=script)
            await page.wait_for_function("(text) => output.textContent === text", arg=said)
        await page.evaluate("output.textContent = ''")
        await page.add_script_tag(type="module", content=script)
        await page.wait_for_function("output.textContent === 'half'")
        await page.get_by_role("button").click()
        await page.wait_for_function("output.textContent === 'halfStopped.'")
        await grok.calls[2].hung_up()
