"""client.js against all that a service, or something before it, may answer: responses are played to its `fetch`."""

import json
from typing import Any

import pytest
from playwright.async_api import Page

from tests import readers
from tests.browser.test_client import begin, end, load
from tests.conftest import serving
from tests.upstream import Upstream

pytestmark = pytest.mark.anyio

# Plays responses: of each conversation those of its first message, in order; after the last one nobody answers.
# Waits are noted, and short ones do not take place; the watchdog's 60 s are left alone.
PLAY = """(scripts) => {
    Object.assign(window, { requests: [], waits: [] });
    const later = setTimeout;
    window.setTimeout = (run, ms) => {
        if (ms < 60_000) waits.push(ms);
        return later(run, ms < 60_000 ? 0 : ms);
    };
    window.fetch = async (url, { method = "GET", headers, body, signal }) => {
        const name = body ? JSON.parse(body).messages[0].content : new URL(url).pathname.split("/")[3];
        requests.push({ name, method, path: new URL(url).pathname, headers, body: body && JSON.parse(body) });
        const { status = 200, headers: given, then, ...played } = scripts[name].shift() ?? { then: "refuse" };
        const pieces = [...played.pieces ?? []];
        if (then === "refuse") throw new TypeError("Failed to fetch");
        const stream = new ReadableStream({
            start(controller) { signal?.addEventListener("abort", () => controller.error(signal.reason)); },
            async pull(controller) {
                if (played.every) await new Promise((resume) => later(resume, played.every));
                if (pieces.length) controller.enqueue(Uint8Array.from(pieces.shift()));
                else if (then === "break") controller.error(new TypeError("network error"));
                else if (then !== "hang") controller.close();
            },
        });
        return new Response(status === 204 ? null : stream, { status, headers: given });
    };
}"""

Played = dict[str, Any]


def played(body: bytes | str, *, size: int = 1_000_000, status: int = 200, then: str = "", **headers: str) -> Played:
    """A response, in pieces of this many bytes; `then` it ends, or breaks, or hangs."""
    data = body.encode() if isinstance(body, str) else body
    pieces = [list(data[at : at + size]) for at in range(0, len(data), size)]
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    return {"status": status, "headers": given, "pieces": pieces, "then": then}


def streamed(body: bytes | str, name: str = "a", **how: Any) -> Played:
    """A response that is an event stream, of the answer with this name."""
    return played(body, Content_Type="text/event-stream", Content_Location=f"/api/chat/{name}/stream", **how)


def problem(code: str) -> str:
    error = {"type": "x", "code": code, "message": "It is so.", "param": "messages[0]", "request_id": "r-1"}
    return json.dumps({"error": error})


@pytest.fixture
async def client(page: Page) -> Page:
    """A page with the module in it, whose `fetch` is still the browser's."""
    async with Upstream() as upstream, serving(upstream.url) as service:
        await load(page, service.url)
    return page


async def play(client: Page, *script: Played, **options: object) -> Any:
    """Play one script, and give how it ended."""
    await client.evaluate(PLAY, {"a": script})
    await begin(client, "a", **options)
    return await end(client)


async def requests(client: Page) -> list[tuple[str, str, str | None]]:
    """Method, path and Last-Event-ID of each request."""
    return [
        (request["method"], request["path"], request["headers"].get("Last-Event-ID"))
        for request in await client.evaluate("requests")
    ]


STREAMS = [
    b"data: a\n\ndata: b\n\n",
    b"data: a\r\rdata: b\r\n\r\ndata: c\n\r\n",
    b"data: one\r\ndata\rdata:\ndata: four\n\n",
    b"\xef\xbb\xbfdata: after a byte order mark\n\n",
    b"data: \xf0\x9f\x98\x80 \xe2\x80\xa8 \xc2\x85 \x00 \x0c \xff\n\n",
    b": comment\n\n:\ndata: a\n: data: no\n\n: id: no\n\n",
    b"data:a\ndata:  two spaces\ndata:\ttab\ndata : no\nDATA: no\n\n",
    b"data\n\ndata:\n\ndata: \ndata: \n\n",
    b"event: message\ndata: 1\n\ndata: 2\n\nevent: b\n\ndata: 3\n\nevent: c\nevent\ndata: 4\n\nevent: d\ndata: 5\n\n",
    b"id: 1\ndata: a\n\ndata: b\n\nid: 2\n\nid: 3\x004\ndata: d\n\nid: lost\n",
    b"id: 1\n\nid\ndata: none\n\n",
    b"data: whole\n\nid: 7\ndata: lost\n",
    b"data: a\n \ndata: b\n\n",
    b"data: url: http://localhost\n\nunknown: x\ndata: y\n\n",
]


async def test_reads_as_the_standard_says(client: Page) -> None:
    """It gives what the standard says, however the bytes are cut, and comes back with the last event id."""
    scripts = {
        f"{number}-{size}": [streamed(body, f"{number}-{size}", size=size), played("", status=204)]
        for number, body in enumerate(STREAMS)
        for size in (1, 2, 3, 5, 1000)
    }
    await client.evaluate(PLAY, scripts)
    read = await client.evaluate(
        """async (names) => Promise.all(names.map(async (name) => {
            const texts = [];
            await ask(name, { onText: (text) => texts.push(text) }).catch(({ code }) => texts.push(code));
            return [texts, requests.find((request) => request.name === name && !request.body).headers["Last-Event-ID"]];
        }))""",
        [*scripts],
    )
    expected = []
    for body in STREAMS:
        parser = readers.Standard()
        events = parser.feed(body) + parser.close()
        texts = [event.data for event in events if event.type == "message"]
        expected += [[[*texts, "connection_lost"], parser.last_event_id]] * 5
    assert read == expected


async def test_events(client: Page) -> None:
    """Each event of the service is told in its own shape; what is unknown, or comes after the end, is left out."""
    citations = [{"url": "https://example.com/", "title": "An example"}, {"url": "https://example.org/"}]
    frames = {
        "reasoning": "h\ndata: m",
        "tool": '{"tool": "web_search", "status": "completed", "query": "q"}',
        "unknown": "x",
        "message": "text",
        "citations": json.dumps(citations),
        "finish": '{"finish_reason": "stop", "model": "m", "usage": null}',
    }
    body = "".join(f"event: {kind}\ndata: {data}\n\n" for kind, data in frames.items())
    assert await play(client, streamed(body + "data: [DONE]\n\ndata: late\n\n")) == {"whole": "text"}
    assert await client.evaluate("events") == [
        {"type": "reasoning", "text": "h\nm"},
        {"type": "tool", "tool": "web_search", "status": "completed", "query": "q"},
        {"type": "text", "text": "text"},
        {"type": "citations", "citations": citations},
        {"type": "finish", "finish_reason": "stop", "model": "m", "usage": None},
    ]


HTML = "<html><body><h1>502 Bad Gateway</h1></body></html>"
TOLD = {"message": "It is so.", "param": "messages[0]", "requestId": "r-1"}


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (played(problem("invalid_request"), status=422), {"code": "invalid_request", "status": 422, **TOLD}),
        (played(problem("unauthorized"), status=401), {"code": "unauthorized", "status": 401}),
        (
            played(problem("rate_limited"), status=429, Retry_After="6"),
            {"code": "rate_limited", "status": 429, "retryAfter": 6},
        ),
        (played(problem("upstream_auth"), status=502, Retry_After="1"), {"code": "upstream_auth", "retryAfter": 1}),
        (played(problem("busy"), status=503), {"code": "busy", "retryAfter": 0}),
        (played(HTML, status=502, X_Request_ID="proxy-1"), {"code": "http_502", "status": 502, "requestId": "proxy-1"}),
        (played(HTML, status=503, Retry_After="Fri, 31 Dec 1999 23:59:59 GMT"), {"code": "http_503", "retryAfter": 0}),
        (played('{"error": "no"}', status=400), {"code": "http_400", "param": None}),
        (played("null", status=404), {"code": "http_404"}),
        (played(HTML, Content_Type="text/html"), {"code": "not_an_event_stream", "status": 200}),
        (played("{}"), {"code": "not_an_event_stream"}),
        (streamed(f"event: error\ndata: {problem('stopped')}\n\n"), {"code": "stopped", "status": 0, **TOLD}),
        (
            streamed(f"data: half\n\nevent: error\nid: a-9\ndata: {problem('replay_lost')}\n\n"),
            {"code": "replay_lost", "status": 0},
        ),
    ],
)
async def test_final(client: Page, answer: Played, told: dict[str, object]) -> None:
    """What the service says, or something before it, is an error with all that is known, and nobody is asked again."""
    ended = await play(client, answer)
    assert {key: ended[key] for key in told} == told
    assert ended["name"] == "ChatError"
    assert ended["message"].endswith(".")
    assert len(await requests(client)) == 1


async def test_short_wait(client: Page) -> None:
    """A Retry-After of seconds is waited for, told, and asked again with the same key."""
    full = played(problem("busy"), status=503, Retry_After="5")
    assert await play(client, full, streamed("data: now\n\ndata: [DONE]\n\n")) == {"whole": "now"}
    assert await client.evaluate("waits") == [5000]
    assert await client.evaluate("events[0]") == {"type": "retry", "code": "busy", "seconds": 5}
    first, second = await client.evaluate("requests")
    assert first == second
    assert first["headers"]["Idempotency-Key"]


async def test_wait_without_end(client: Page) -> None:
    """A service that always wants another wait is believed four times."""
    full = played(problem("busy"), status=429, Retry_After="1")
    assert (await play(client, *[full] * 9))["code"] == "busy"
    assert await client.evaluate("waits") == [1000] * 4


async def test_unreachable_told_by_the_client(client: Page) -> None:
    """A service that is not reached is asked five times, with the same key and growing waits."""
    ended = await play(client, headers={"X-Tenant": "b"}, token="t")  # noqa: S106 -- no secret
    assert (ended["code"], ended["status"], ended["message"]) == (
        "connection_lost",
        0,
        "The service cannot be reached.",
    )
    asked = await client.evaluate("requests")
    assert asked == [asked[0]] * 5
    assert asked[0]["body"] == {"messages": [{"role": "user", "content": "a"}], "include": [], "resumable": True}
    headers = asked[0]["headers"]
    assert (headers["Authorization"], headers["X-Tenant"]) == ("Bearer t", "b")
    for wait, most in zip(await client.evaluate("waits"), (250, 500, 1000, 2000), strict=True):
        assert most / 2 <= wait <= most


async def test_not_asked_twice(client: Page) -> None:
    """Without a key the service could not tell a second request from another one, so there is none."""
    assert (await play(client, resumable=False))["code"] == "connection_lost"
    [asked] = await client.evaluate("requests")
    assert "Idempotency-Key" not in asked["headers"]


async def test_began_without_address(client: Page) -> None:
    """Where a proxy takes the answer's address away, it cannot be found again, and is not paid again."""
    begun = played("data: half\n\n", then="break", Content_Type="text/event-stream")
    assert (await play(client, begun))["code"] == "connection_lost"
    assert len(await requests(client)) == 1


async def test_comes_back(client: Page) -> None:
    """It comes back through refusals of the moment, after each event anew, not faster than it should nor for ever."""
    not_now = [played(HTML, status=502), played(problem("draining"), status=503), played(problem("x"), status=429)]
    more = streamed("id: a-2\ndata: b\n\n", then="break")
    ended = await play(client, streamed("retry: 100\nid: a-0\n\nid: a-1\ndata: a\n\n"), *not_now * 9, more)
    assert (ended["code"], ended["message"]) == ("connection_lost", "The connection was lost.")
    assert await client.evaluate("text") == "ab"
    [asked, *resumed] = await requests(client)
    assert asked == ("POST", "/api/chat", None)
    assert resumed == [("GET", "/api/chat/a/stream", "a-1")] * 28 + [("GET", "/api/chat/a/stream", "a-2")] * 30
    waits = await client.evaluate("waits")
    assert len(waits) == 58
    assert all(50 <= wait <= 100 for wait in waits)


@pytest.mark.parametrize("status", [204, 404])
async def test_gone(client: Page, status: int) -> None:
    """An answer of which no more will come, or that is forgotten, is not asked for again."""
    gone = played("" if status == 204 else problem("stream_not_found"), status=status)
    ended = await play(client, streamed("id: a-0\n\n", then="break"), gone)
    assert ended["code"] == ("connection_lost" if status == 204 else "stream_not_found")
    assert await requests(client) == [("POST", "/api/chat", None), ("GET", "/api/chat/a/stream", "a-0")]


async def test_silence(client: Page) -> None:
    """A connection that is silent for a minute is dead; one with a comment now and then is not."""
    await client.clock.install()
    slow = streamed("data: a\nid: a-1\n\n: keep-alive\n\n", size=8, then="hang") | {"every": 40_000}
    await client.evaluate(PLAY, {"a": [slow, streamed("data: b\n\ndata: [DONE]\n\n")]})
    await begin(client, "a")
    await client.clock.run_for(len(slow["pieces"]) * 40_000 + 59_000)
    assert len(await requests(client)) == 1
    await client.clock.run_for(2_000)
    assert await end(client) == {"whole": "ab"}
    assert await requests(client) == [("POST", "/api/chat", None), ("GET", "/api/chat/a/stream", "a-1")]


async def test_growth(client: Page) -> None:
    """Reading an event in small pieces costs four times as much when it is four times as long, not sixteen times."""
    ratio = await client.evaluate(
        """async () => {
            const spend = async (pieces) => {
                const encode = (text) => new TextEncoder().encode(text);
                let left = pieces;
                const body = new ReadableStream({
                    start(controller) { controller.enqueue(encode("data: ")); },
                    pull(controller) {
                        if (left--) controller.enqueue(encode("0123456789abcdef"));
                        else { controller.enqueue(encode("\\n\\ndata: [DONE]\\n\\n")); controller.close(); }
                    },
                });
                window.fetch = async () => new Response(body, { headers: { "Content-Type": "text/event-stream" } });
                const begun = performance.now();
                if ((await ask("Hi")).length !== pieces * 16) throw new Error("not all of it");
                return performance.now() - begun;
            };
            const least = async (pieces) => Math.min(await spend(pieces), await spend(pieces), await spend(pieces));
            await spend(1000);
            return await least(40_000) / await least(10_000);
        }"""
    )
    assert ratio < 9
