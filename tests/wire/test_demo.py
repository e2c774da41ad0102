"""Without a key: the built-in demo, over the same wire and through the same code."""

import asyncio
import json
from time import monotonic

import pytest

from tests.conftest import TIMEOUT, serving, spawned
from tests.readers import DONE, Event, answer, joined, naive
from tests.upstream import CLOSE, Steps, Upstream, chunk, frame
from tests.upstream import DONE as DONE_FRAME

pytestmark = pytest.mark.anyio

NOBODY = "http://127.0.0.1:1/v1"


async def test_demo_says_what_it_is() -> None:
    """The answer, the log and /readyz say that nobody pays and nobody thinks; a stop in between is tidy."""
    async with spawned(NOBODY, grok_api_key=None) as service:
        assert (await service.client.get("/readyz")).json() == {"status": "ok", "demo": True}
        response = await service.ask(include=["reasoning", "finish"])
        *events, finish, last = naive(response.content)
        assert last == Event(DONE)
        assert (finish.type, '"finish_reason":"stop"' in finish.data) == ("finish", True)
        kinds = [event.type for event in events]
        assert kinds == sorted(kinds, key=lambda kind: kind != "reasoning")  # first it thinks, then it speaks
        text = joined([event for event in events if event.type != "reasoning"])
        assert "demo" in text
        assert "GROK_API_KEY" in text
        assert "**" in text  # markdown
        assert "\n\n" in text
        assert "👋" in text
        async with service.asking() as live:
            assert await live.event() is not None
            service.process.terminate()
        assert await service.exit_code(within=TIMEOUT) == 0
    assert "built-in demo" in service.stderr


async def test_demo_at_a_human_pace() -> None:
    """The demo's tokens come one after the other, for as long as one reads along, and two callers at a time."""
    async with serving(NOBODY, grok_api_key=None) as service:
        started = monotonic()
        responses = await asyncio.gather(service.ask(), service.ask())
        assert 1 < monotonic() - started < 20
    assert answer(responses[0].content) == answer(responses[1].content)


async def test_demo_on_both_apis() -> None:
    """The demo says the same on both of xAI's APIs; where a search is asked for, it shows one, with two sources."""
    searching = {"grok_api": "responses", "grok_tools": "web_search,x_search"}
    everything = ["reasoning", "tools", "citations", "finish"]
    async with (
        serving(NOBODY, grok_api_key=None) as chat,
        serving(NOBODY, grok_api_key=None, **searching) as both,
    ):
        plain, same, reasoned, *searched = await asyncio.gather(
            chat.ask(include=["reasoning"]),
            both.ask(include=["reasoning"]),
            both.ask(include=everything),
            *(both.ask(tools=[tool], include=everything) for tool in ("web_search", "x_search")),
        )
    assert joined(naive(plain.content)) == joined(naive(same.content)) == joined(naive(reasoned.content))
    assert joined(naive(plain.content), "reasoning") == joined(naive(same.content), "reasoning")
    assert {event.type for event in naive(reasoned.content)} == {"message", "reasoning", "finish"}
    for response, tool in zip(searched, ("web_search", "x_search"), strict=True):
        events = naive(response.content)
        told = [json.loads(event.data) for event in events if event.type == "tool"]
        assert [(each["tool"], each["status"]) for each in told] == [(tool, "started"), (tool, "completed")]
        assert told[1]["query"]
        *_, citations, finish, end = events
        urls = [source["url"] for source in json.loads(citations.data)]
        assert len(urls) == 2
        for url in urls:
            assert f"]({url})" in joined(events)
        assert (finish.type, end) == ("finish", Event(DONE))


async def test_http_proxy() -> None:
    """Where an HTTP proxy is configured, httpx's transport takes the chat there; NO_PROXY is heeded."""
    async with Upstream() as proxy:
        way = proxy.url.removesuffix("/v1")
        async with spawned("http://grok.invalid/v1", http_proxy=way) as service:
            assert answer((await service.ask()).content)
        assert proxy.calls[0].path == "http://grok.invalid/v1/chat/completions"
        async with spawned(proxy.url, http_proxy="http://127.0.0.1:1", no_proxy="127.0.0.1") as service:
            assert answer((await service.ask()).content)
        assert proxy.calls[1].path == "/v1/chat/completions"


async def test_no_proxy_for_the_demo() -> None:
    """The demo needs no way out, so it works where an HTTP proxy is configured, too."""
    async with spawned(NOBODY, grok_api_key=None, http_proxy="http://127.0.0.1:1") as service:
        assert answer((await service.ask()).content)


@pytest.mark.parametrize(("transport", "status"), [("fast", 502), ("httpx", 200)])
async def test_transport(transport: str, status: int) -> None:
    """GROK_TRANSPORT decides: a reply with a folded header is refused by our own, and read by httpx's."""
    folded = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nX: a\r\n b\r\nConnection: close\r\n\r\n"
    script: Steps = [folded + frame(chunk({"content": "a"})) + DONE_FRAME, CLOSE]
    async with Upstream(script) as grok, serving(grok.url, grok_transport=transport, grok_retries=0) as service:
        assert (await service.ask()).status_code == status


async def test_pace_of_the_demo() -> None:
    """Whoever asks the demo for a pace gets its words at that pace."""
    async with serving(NOBODY, grok_api_key=None) as service:
        started = monotonic()
        response = await service.ask("one word every 0.001 s, please")
        quick = monotonic() - started
        async with service.asking("one word every 60 s") as live:
            assert await live.event()
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.5):
                    await live.event()
    assert "demo" in answer(response.content)
    assert quick < 1.5
