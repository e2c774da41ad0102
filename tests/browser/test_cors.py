"""What a page at another origin can read: the status, the code and the waiting time of every refusal."""

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
from playwright.async_api import Page

from chatproxy.formats import plain
from tests.browser.wires import Site
from tests.conftest import HI, serving, spawned
from tests.upstream import HANG, Script, Upstream, error, refusing, sse, stream, unreachable

pytestmark = pytest.mark.anyio

CHAT = {"messages": HI}
POST = {"method": "POST", "headers": {"Content-Type": "application/json"}, "body": json.dumps(CHAT)}
SETTINGS = {"grok_retries": 0, "drain_timeout": 0}
LIMIT = error(429, {"code": "resource-exhausted", "error": "Too many requests for this model."}, {"Retry-After": "7"})

# What the page does: fetch, and give what it could read of the answer.
FETCH = """async ([url, { chat, ...init }]) => {
    if (chat) {
        const headers = { "Content-Type": "application/json", ...init.headers };
        init = { method: "POST", body: JSON.stringify(chat), ...init, headers };
    }
    const response = await fetch(url, init);
    const { error } = await response.json();
    const headers = ["Retry-After", "X-Request-ID"].map((name) => response.headers.get(name));
    return [response.status, error.code, error.request_id === headers[1], headers[0]];
}"""


@dataclass
class Case:
    """One refusal: what the page asks, with which settings, of which Grok."""

    status: int
    code: str
    ask: Mapping[str, Any] = field(default_factory=lambda: {"chat": CHAT})
    path: str = "/api/chat"
    grok: Script = field(default_factory=lambda: stream("unused"))
    settings: Mapping[str, object] = field(default_factory=dict)
    retry_after: str | None = None
    host: str = "127.0.0.1"
    before: int = 0
    """So many chats are asked for before."""


def refusal(status: int, text: str) -> Script:
    return error(status, {"code": "some-code", "error": text})


CASES = [
    Case(400, "invalid_json", {"chat": CHAT, "body": "{"}),
    Case(422, "invalid_request", {"chat": {"messages": []}}),
    Case(413, "body_too_large", {"chat": {"messages": [{"role": "user", "content": "x" * 3_000_000}]}}),
    Case(413, "too_many_messages", {"chat": {"messages": HI * 3}}, settings={"max_messages": 2}),
    Case(415, "unsupported_media_type", {"method": "POST", "body": "{}"}),
    Case(406, "not_acceptable", {"chat": CHAT, "headers": {"Accept": "text/html"}}),
    Case(404, "not_found", {}, path="/api/elsewhere"),
    Case(405, "method_not_allowed", {}),
    Case(404, "stream_not_found", {}, path=f"/api/chat/{'x' * 22}/stream"),
    Case(421, "host_not_allowed", {}, host="rebound.example"),
    Case(401, "unauthorized", settings={"access_tokens": "some-access-token"}),
    Case(429, "rate_limited", settings={"rate_limit": "1/minute"}, before=1, retry_after="60"),
    Case(503, "busy", settings={"max_streams": 1}, grok=stream("a", HANG), before=1, retry_after="1"),
    Case(400, "content_policy", grok=refusal(403, "Content violates usage guidelines.")),
    Case(400, "context_length_exceeded", grok=refusal(400, "This model's maximum prompt length is 10 but …")),
    Case(429, "upstream_rate_limited", grok=LIMIT, retry_after="7"),
    Case(502, "upstream_auth", grok=refusal(401, "Bad credentials")),
    Case(502, "upstream_rejected", grok=refusal(404, "Model not found")),
    Case(502, "upstream_error", grok=error(500, "<h1>Oops</h1>")),
    Case(503, "upstream_overloaded", grok=refusal(503, "at capacity"), retry_after="1"),
    Case(504, "first_token_timeout", grok=sse(HANG), settings={"first_token_timeout": 0.2}),
    Case(504, "stream_timeout", grok=sse(HANG), settings={"stream_timeout": 0.2}),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.status} {case.code}")
async def test_refusal(page: Page, site: Site, case: Case) -> None:
    """Status, code, request id and Retry-After of a refusal can be read from an allowed origin."""
    async with (
        Upstream(case.grok) as upstream,
        serving(upstream.url, **SETTINGS, allowed_origins=site.origin, **case.settings) as service,
    ):
        url = f"http://{case.host}:{service.port}{case.path}"
        await page.goto(site.origin)
        for _ in range(case.before):
            assert await page.evaluate("async ([url, chat]) => (await fetch(url, chat)).status", [url, POST]) == 200
        assert await page.evaluate(FETCH, [url, case.ask]) == [case.status, case.code, True, case.retry_after]


async def test_unreachable_across_origins(page: Page, site: Site) -> None:
    """The same where there is no Grok."""
    with refusing() as refused, unreachable() as silent:
        for base_url, status, code in (
            (refused, 502, "upstream_unreachable"),
            (silent, 504, "connect_timeout"),
        ):
            async with serving(base_url, **SETTINGS, allowed_origins=site.origin, connect_timeout=0.2) as service:
                await page.goto(site.origin)
                outcome = await page.evaluate(FETCH, [f"{service.url}/api/chat", {"chat": CHAT}])
                assert outcome == [status, code, True, None]


async def test_mistake(
    page: Page, site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The same when the service itself makes a mistake."""
    monkeypatch.setattr(plain, "decode_body", None)
    async with Upstream() as upstream, serving(upstream.url, allowed_origins=site.origin) as service:
        await page.goto(site.origin)
        outcome = await page.evaluate(FETCH, [f"{service.url}/api/chat", {"chat": CHAT}])
        assert outcome == [500, "internal_error", True, None]
    caplog.clear()  # its traceback is meant


async def test_draining(page: Page, site: Site) -> None:
    """The same when the service is about to stop and still finishes an answer."""
    async with (
        Upstream(stream("half", HANG)) as upstream,
        spawned(upstream.url, allowed_origins=site.origin) as service,
    ):
        await page.goto(site.origin)
        url = f"{service.url}/api/chat"
        assert await page.evaluate("async ([url, chat]) => (await fetch(url, chat)).status", [url, POST]) == 200
        service.process.terminate()
        async with asyncio.timeout(5):
            ready = 200
            while ready == 200:
                ready = (await service.client.get("/readyz")).status_code
        assert await page.evaluate(FETCH, [url, {"chat": CHAT}]) == [503, "draining", True, "5"]


async def test_stranger(page: Page, site: Site) -> None:
    """A page at an origin that is not allowed can read nothing, and nothing is asked of Grok."""
    async with Upstream() as upstream, serving(upstream.url, allowed_origins="https://elsewhere.example") as service:
        await page.goto(site.origin)
        outcome = await page.evaluate(
            "([url, init]) => fetch(url, init).then((response) => response.status, (error) => error.name)",
            [f"{service.url}/api/chat", POST],
        )
        assert outcome == "TypeError"
        assert upstream.calls == []
