"""Who may come in: hostile requests are refused before anything is read or paid, and pages may read why."""

import json
import re
from collections.abc import AsyncIterator

import httpx
import pytest

from tests.conftest import InProcessService, failure, refusal, serving, spawned
from tests.readers import standard
from tests.upstream import CLOSE, Upstream, error, stream
from tests.wire.raw_requests import CHAT, JSON, chunked, read_response, request

pytestmark = pytest.mark.anyio

PAGE = "https://app.example.com"


@pytest.fixture(scope="module")
async def service(grok: Upstream) -> AsyncIterator[InProcessService]:
    async with serving(
        grok.url,
        allowed_origins=f"{PAGE}, http://other.example.org:8080/",
        allowed_hosts="chat.example.com, .example.net",
        max_body_bytes=50_000,
    ) as service:
        yield service


def origin(name: str, *more: tuple[str, str], method: str = "POST", target: str = "/api/chat") -> bytes:
    return request(target, ("Origin", name), *more, method=method)


FOREIGN_ORIGIN = 403, "origin_not_allowed"
FOREIGN_HOST = 421, "host_not_allowed"
NOT_JSON = 415, "unsupported_media_type"
TOO_LARGE = 413, "body_too_large"
TOO_MANY = 431, "headers_too_large"
NOTHING = 404, "not_found"
NO_STREAM = 404, "stream_not_found"

HOSTILE: dict[str, tuple[bytes, tuple[int, str]]] = {
    # Origins
    "foreign": (origin("https://evil.example"), FOREIGN_ORIGIN),
    "null": (origin("null"), FOREIGN_ORIGIN),
    "empty": (origin(""), FOREIGN_ORIGIN),
    "another scheme": (origin("http://app.example.com"), FOREIGN_ORIGIN),
    "another port": (origin(f"{PAGE}:8443"), FOREIGN_ORIGIN),
    "look-alike": (origin("https://app-example.com"), FOREIGN_ORIGIN),
    "look-alike in Cyrillic": (origin("https://\u0430pp.example.com"), FOREIGN_ORIGIN),
    "subdomain": (origin("https://x.app.example.com"), FOREIGN_ORIGIN),
    "parent domain": (origin("https://example.com"), FOREIGN_ORIGIN),
    "prefix trick": (origin(f"{PAGE}.evil.example"), FOREIGN_ORIGIN),
    "suffix trick": (origin("https://evilapp.example.com"), FOREIGN_ORIGIN),
    "user name trick": (origin(f"{PAGE}@evil.example"), FOREIGN_ORIGIN),
    "user name trick on our host": (origin("http://localhost@evil.example"), FOREIGN_ORIGIN),
    "prefix trick on our host": (origin("http://localhost.evil.example"), FOREIGN_ORIGIN),
    "another port of our host": (origin("http://localhost:3000"), FOREIGN_ORIGIN),
    "with a path": (origin(f"{PAGE}/"), FOREIGN_ORIGIN),
    "with a dot": (origin(f"{PAGE}."), FOREIGN_ORIGIN),
    "a pattern": (origin("https://*.example.com"), FOREIGN_ORIGIN),
    "all": (origin("*"), FOREIGN_ORIGIN),
    "a file": (origin("file://"), FOREIGN_ORIGIN),
    "an extension": (origin("chrome-extension://localhost"), FOREIGN_ORIGIN),
    "two": (origin(f"{PAGE}, https://evil.example"), FOREIGN_ORIGIN),
    "allowed and foreign": (origin(PAGE, ("Origin", "https://evil.example")), FOREIGN_ORIGIN),
    "foreign and allowed": (origin("https://evil.example", ("Origin", PAGE)), FOREIGN_ORIGIN),
    "bad port": (origin("http://localhost:99999"), FOREIGN_ORIGIN),
    "bad address": (origin("http://[::1"), FOREIGN_ORIGIN),
    "cross-site without an origin": (request("/api/chat", ("Sec-Fetch-Site", "cross-site")), FOREIGN_ORIGIN),
    "cross-site and null": (origin("null", ("Sec-Fetch-Site", "cross-site")), FOREIGN_ORIGIN),
    "foreign with a large body": (request("/api/chat", ("Origin", "null"), body=b"x" * 60_000), FOREIGN_ORIGIN),
    "foreign, its body still to come": (request("/api/chat", ("Origin", "null"), length="9", body=b""), FOREIGN_ORIGIN),
    "foreign preflight": (
        origin("https://evil.example", ("Access-Control-Request-Method", "POST"), method="OPTIONS"),
        FOREIGN_ORIGIN,
    ),
    "foreign, encoded path": (origin("https://evil.example", target="/%61pi%2Fchat"), FOREIGN_ORIGIN),
    "foreign reader": (origin("null", method="GET", target="/api/chat/x/stream"), FOREIGN_ORIGIN),
    "foreign stop": (origin("null", target="/api/chat/x/stop"), FOREIGN_ORIGIN),
    "foreign delete": (origin("null", method="DELETE", target="/api/chat/x"), FOREIGN_ORIGIN),
    # Content types that a page may send anywhere without being asked
    "text/plain": (request(content_type="text/plain"), NOT_JSON),
    "a form": (request(content_type="application/x-www-form-urlencoded"), NOT_JSON),
    "a multipart form": (request(content_type="multipart/form-data; boundary=x"), NOT_JSON),
    "no type": (request(content_type=None), NOT_JSON),
    "an empty type": (request(content_type=""), NOT_JSON),
    "JSON as a parameter": (request(content_type="text/plain; application/json"), NOT_JSON),
    "two types in one": (request(content_type="text/plain, application/json"), NOT_JSON),
    "two types": (request("/api/chat", ("Content-Type", JSON), content_type="text/plain"), NOT_JSON),
    "another type, its body still to come": (request(content_type="text/plain", length="9", body=b""), NOT_JSON),
    "a longer type": (request(content_type="application/json+x"), NOT_JSON),
    # Hosts
    "rebinding": (request(host="evil.example"), FOREIGN_HOST),
    "rebinding, its body still to come": (request(host="evil.example", length="9", body=b""), FOREIGN_HOST),
    "rebinding with a port": (request(host="evil.example:8000"), FOREIGN_HOST),
    "an address in a name": (request(host="127.0.0.1.nip.io"), FOREIGN_HOST),
    "localhost in a name": (request(host="localhost.evil.example"), FOREIGN_HOST),
    "our name in a name": (request(host="chat.example.com.evil.example"), FOREIGN_HOST),
    "our name at the end": (request(host="evilchat.example.com"), FOREIGN_HOST),
    "our suffix without its dot": (request(host="evilexample.net"), FOREIGN_HOST),
    "a subdomain of an exact name": (request(host="x.chat.example.com"), FOREIGN_HOST),
    "a user name": (request(host="localhost@evil.example"), FOREIGN_HOST),
    "a path": (request(host="localhost/evil.example"), FOREIGN_HOST),
    "two ports": (request(host="localhost:1:2"), FOREIGN_HOST),
    "a bracket": (request(host="[::1].evil.example"), FOREIGN_HOST),
    "an odd address": (request(host="0x7f.0.0.1.evil.example"), FOREIGN_HOST),
    "an empty host": (request(host=""), FOREIGN_HOST),
    "no host": (request(host=None), FOREIGN_HOST),
    "two hosts": (request("/api/chat", ("Host", "evil.example")), FOREIGN_HOST),
    "two hosts, ours last": (request("/api/chat", ("Host", "localhost"), host="evil.example"), FOREIGN_HOST),
    "one host twice": (request("/api/chat", ("Host", "localhost")), FOREIGN_HOST),
    "another header's host": (request("/x", ("X-Forwarded-Host", "localhost"), host="evil.example"), FOREIGN_HOST),
    "rebinding to the metrics": (request("/metrics", method="GET", host="evil.example"), FOREIGN_HOST),
    "rebinding to the page": (request("/", method="GET", host="evil.example"), FOREIGN_HOST),
    # Bodies and heads
    "a large body": (request(body=b" " * 50_000 + CHAT), TOO_LARGE),
    "a large length": (request(length="1000000000"), TOO_LARGE),
    "a large chunked body": (chunked(b"%x\r\n%b\r\n0\r\n\r\n" % (50_001, b" " * 50_001)), TOO_LARGE),
    "a large body in small chunks": (chunked(b"1\r\n \r\n" * 50_001), TOO_LARGE),
    "10,000 headers": (request("/api/chat", *[("X", "y")] * 10_000), TOO_MANY),
    "10,000 headers of one byte": (request("/api/chat", *[("X", "")] * 10_000), TOO_MANY),
    "101 headers": (request("/api/chat", *[("X", "y")] * 97), TOO_MANY),
    "a long header": (request("/api/chat", ("X", "y" * 65_536)), TOO_MANY),
    "a long query": (request(f"/api/chat?{'y' * 65_000}", ("X", "y" * 536)), TOO_MANY),
    # Paths
    "a trailing slash": (request("/api/chat/"), NOTHING),
    "a double slash": (request("//api/chat"), NOTHING),
    "a double slash inside": (request("/api//chat"), NOTHING),
    "a dot": (request("/api/./chat"), NOTHING),
    "two dots": (request("/healthz/../api/chat"), NOTHING),
    "encoded dots": (request("/healthz/%2e%2e/api/chat"), NOTHING),
    "capitals": (request("/API/CHAT"), NOTHING),
    "a semicolon": (request("/api/chat;x"), NOTHING),
    "a backslash": (request("/api\\chat"), NOTHING),
    "a NUL": (request("/api/chat%00"), NOTHING),
    "a line break": (request("/api/chat%0a"), NOTHING),
    "a line break to the metrics": (request("/metrics%0a", method="GET"), NOTHING),
    "files": (request("/%2e%2e/%2e%2e/etc/passwd", method="GET"), NOTHING),
    # Streams of others
    "an unknown stream": (request(f"/api/chat/{'x' * 22}/stream", method="GET"), NO_STREAM),
}  # fmt: skip


@pytest.mark.parametrize(("sent", "expected"), HOSTILE.values(), ids=HOSTILE.keys())
async def test_hostile(grok: Upstream, service: InProcessService, sent: bytes, expected: tuple[int, str]) -> None:
    """It gets the right status, an error in JSON and no permission to read it; Grok is not called."""
    grok.set_scripts()
    async with service.caller() as caller:
        await caller.send(sent)
        response = await read_response(caller)
    problem = refusal(response)
    assert (response.status_code, problem["code"]) == expected
    assert ("ALLOWED_ORIGINS" in problem["message"]) == (expected == FOREIGN_ORIGIN)
    assert ("ALLOWED_HOSTS" in problem["message"]) == (expected == FOREIGN_HOST)
    assert "Set-Cookie" not in response.headers
    if expected == FOREIGN_ORIGIN and PAGE.encode() not in sent:
        assert "Access-Control-Allow-Origin" not in response.headers
    assert grok.calls == []


NO_NAMES = {
    "a word": request("/api/chat/x/stream", method="GET"),
    "dots": request("/api/chat/%2e%2e/stream", method="GET"),
    "a long name": request(f"/api/chat/{'x' * 10_000}/stream", method="GET"),
    "line breaks": request("/api/chat/x%0d%0aSet-Cookie:%20a=b/stream", method="GET"),
    "a pattern": request("/api/chat/*/stream", ("Last-Event-ID", "*-1"), method="GET"),
}


@pytest.mark.parametrize("sent", NO_NAMES.values(), ids=NO_NAMES.keys())
async def test_names_of_nothing(grok: Upstream, service: InProcessService, sent: bytes) -> None:
    """What cannot be the id of an answer might be a chat's: there is nothing to read, and nothing is told of it."""
    grok.set_scripts()
    async with service.caller() as caller:
        await caller.send(sent)
        response = await read_response(caller)
    assert (response.status_code, response.content) == (204, b"")
    assert "Set-Cookie" not in response.headers
    assert grok.calls == []


async def test_stream_of_somebody_else(grok: Upstream, service: InProcessService) -> None:
    """Who comes back with an id that is none is told so in a stream, which ends its retries, and starts nothing."""
    grok.set_scripts()
    for last_event_id in ("x-1", "x", "-", f"{'x' * 10_000}-1", "x-1-0", "x-\u00b2", "\u00e4-1", "*-0", "null"):
        async with service.caller() as caller:
            await caller.send(request("/api/chat", ("Last-Event-ID", last_event_id)))
            response = await read_response(caller)
        assert response.status_code == 200
        [event] = standard(response.content)
        assert failure(event, response)["code"] == "stream_not_found"
    assert grok.calls == []


@pytest.mark.parametrize(
    "forged",
    [
        [("X-Forwarded-For", "192.0.2.1")],
        [("X-Forwarded-For", "192.0.2.1, 192.0.2.2")],
        [("X-Forwarded-For", "192.0.2.1"), ("X-Forwarded-For", "192.0.2.2")],
        [("X-Forwarded-For", "[2001:db8::1]:80")],
        [("X-Forwarded-For", "127.0.0.1")],
        [("X-Forwarded-For", "")],
        [("X-Forwarded-For", "unknown, \u00e4")],
        [("X-Real-IP", "192.0.2.1"), ("X-Client-IP", "192.0.2.1"), ("CF-Connecting-IP", "192.0.2.1")],
        [("Forwarded", "for=192.0.2.1")],
    ],
)
async def test_forged_address(forged: list[tuple[str, str]]) -> None:
    """Who is no proxy of ours stays who it is, whatever it says, and its limit is used up."""
    async with Upstream() as grok, serving(grok.url, forwarded_allow_ips="192.0.2.9", rate_limit="1/day") as service:
        assert (await service.ask()).status_code == 200
        async with service.caller() as caller:
            await caller.send(request("/api/chat", *forged))
            response = await read_response(caller)
        assert (response.status_code, refusal(response)["code"]) == (429, "rate_limited")
        assert len(grok.calls) == 1


BREAKS = "a\r\nX-Canary: b\r\n\r\nc\nd\re\0f"


async def test_line_breaks_reach_no_header(grok: Upstream, service: InProcessService) -> None:
    """Whatever a caller may put into JSON, a path or a query gets into no header, ours or Grok's."""
    grok.set_scripts()
    answered = await service.ask(BREAKS, sessionId=BREAKS, resumable=True, include=["finish"])
    [call] = grok.calls
    encoded = str(httpx.QueryParams({"x": BREAKS})).removeprefix("x=")
    url = answered.headers["Content-Location"]
    others = [
        await service.client.get(f"{url}?lastEventId={encoded}"),
        await service.client.get(f"/api/chat/{encoded}/stream?{encoded}"),
        await service.client.delete(f"/api/chat/{encoded}"),
        await service.client.get(f"/{encoded}"),
    ]
    assert [response.status_code for response in (answered, *others)] == [200, 400, 204, 204, 404]
    for response in (answered, *others):
        assert "canary" not in str(response.headers).lower()
    assert "canary" not in str(call.headers).lower()
    assert len(call.headers["x-grok-conv-id"]) == 32


# Those who may come in.


@pytest.mark.parametrize(
    ("host", "name"),
    [
        ("localhost", PAGE),
        ("localhost", "http://other.example.org:8080"),
        ("localhost:8000", "http://localhost:8000"),
        ("127.0.0.1:80", "http://127.0.0.1"),
        ("[::1]:8000", "http://[::1]:8000"),
        ("chat.example.com", "https://chat.example.com"),  # a proxy has taken the TLS off
        ("CHAT.example.com:443", "https://chat.example.com"),
        ("example.net", None),
        ("a.b.example.net", "https://a.b.example.net"),
        ("192.0.2.1", None),
        ("[2001:db8::1]", None),
        ("gpu-box", None),
    ],
)
async def test_welcome(grok: Upstream, service: InProcessService, host: str, name: str | None) -> None:
    """Our own pages, those of listed origins and programs are answered under every name that can be ours."""
    grok.set_scripts()
    async with service.caller() as caller:
        await caller.send(request("/api/chat", *([] if name is None else [("Origin", name)]), host=host))
        response = await read_response(caller)
    assert response.status_code == 200
    assert len(grok.calls) == 1


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (request("/healthz", method="GET", host="evil.example"), 200),
        (request("/readyz", method="GET", host="evil.example"), 200),
        (request("/api/chat", ("Sec-Fetch-Site", "same-origin")), 200),
        (request("/api/chat", ("Sec-Fetch-Site", "same-site"), ("Origin", PAGE)), 200),
        (request("/api/chat", ("Sec-Fetch-Site", "cross-site"), ("Origin", PAGE)), 200),
        (request("/", ("Sec-Fetch-Site", "cross-site"), method="GET"), 200),
    ],
)
async def test_not_hostile(service: InProcessService, sent: bytes, status: int) -> None:
    """What looks hostile and is not: health checks, and links from elsewhere."""
    async with service.caller() as caller:
        await caller.send(sent)
        assert (await read_response(caller)).status_code == status


@pytest.mark.parametrize("name", ["https://evil.example", "http://localhost:3000", "null"])
async def test_anyone(name: str) -> None:
    """Where `*` is set any page may come, but none that hides its origin; and any name is ours."""
    async with Upstream() as grok, serving(grok.url, allowed_origins="*", allowed_hosts="*") as service:
        response = await service.ask(headers={"Origin": name, "Host": "evil.example"})
        if name == "null":
            assert (response.status_code, refusal(response)["code"]) == FOREIGN_ORIGIN
            assert "Access-Control-Allow-Origin" not in response.headers
        else:
            assert response.status_code == 200
            assert response.headers["Access-Control-Allow-Origin"] == name


ANSWERS = {
    "a stream": (request(), 200),
    "an address": (request("/api/chat", ("Accept", JSON)), 201),
    "nothing": (request("/api/chat/x", method="DELETE"), 204),
    "health": (request("/healthz", method="GET"), 200),
    "no JSON": (request(body=b"{"), 400),
    "no stream": (request(f"/api/chat/{'x' * 22}/stream", method="GET"), 404),
    "no chat": (request("/api/chat/x/stream", method="GET"), 204),
    "no path": (request("/x"), 404),
    "no method": (request(method="PUT"), 405),
    "no accepted type": (request("/api/chat", ("Accept", "text/html")), 406),
    "too large": (request(length="60000"), 413),
    "no type": (request(content_type=None), 415),
    "another host": (request(host="evil.example"), 421),
    "no shape": (request(body=b"{}"), 422),
    "too many headers": (request("/api/chat", *[("X", "y")] * 100), 431),
}


@pytest.mark.parametrize(("sent", "status"), ANSWERS.values(), ids=ANSWERS.keys())
async def test_readable(service: InProcessService, sent: bytes, status: int) -> None:
    """Every answer, errors included, may be read by a page of an allowed origin, and has the request's id."""
    async with service.caller() as caller:
        await caller.send(sent.replace(b"\r\n", f"\r\nOrigin: {PAGE}\r\nX-Request-ID: a.B_0-9\r\n".encode(), 1))
        response = await read_response(caller)
    assert response.status_code == status
    readable(response, PAGE)
    assert response.headers["X-Request-ID"] == "a.B_0-9"


async def test_readable_mistake(
    service: InProcessService, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """So is a mistake of ours, which is told without its words."""
    monkeypatch.setattr("chatproxy.formats.plain.decode_body", lambda *_: int("canary"))
    response = await service.ask("canary", headers={"Origin": PAGE})
    caplog.clear()
    assert (response.status_code, refusal(response)["code"]) == (500, "internal_error")
    assert "canary" not in response.text
    readable(response, PAGE)


def readable(response: httpx.Response, page: str) -> None:
    assert response.headers["Access-Control-Allow-Origin"] == page
    assert "Origin" in response.headers["Vary"].split(", ")
    exposed = set(response.headers["Access-Control-Expose-Headers"].split(", "))
    ours = {"Location", "Content-Location", "Retry-After", "X-Request-ID"}
    assert exposed == {*ours, "X-Should-Retry", "X-Resumable-Stream-Id"}
    assert "Access-Control-Allow-Credentials" not in response.headers


@pytest.mark.parametrize("path", ["/api/chat", "/api/chat/x", "/api/chat/x/stream", "/nowhere"])
async def test_preflight(service: InProcessService, path: str) -> None:
    """A browser that asks first is told what it may send."""
    asked = {"Origin": PAGE, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    response = await service.client.options(path, headers=asked)
    assert response.status_code == 204
    assert response.content == b""
    readable(response, PAGE)
    assert set(response.headers["Access-Control-Allow-Methods"].split(", ")) == {"GET", "POST", "DELETE"}
    assert set(response.headers["Access-Control-Allow-Headers"].lower().split(", ")) == {
        *("authorization", "content-type", "last-event-id", "idempotency-key", "x-request-id", "traceparent"),
        *("tracestate", "baggage", "sentry-trace", "cache-control", "x-requested-with"),
    }


async def test_preflight_of_an_sdk(service: InProcessService) -> None:
    """OpenAI's SDKs send a family of names that grows; any other name is not allowed by being asked for."""
    names = "x-stainless-lang,X-Stainless-Retry-Count, openai-organization,x-evil,x-stainless-a b"
    asked = {"Origin": PAGE, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": names}
    response = await service.client.options("/v1/chat/completions", headers=asked)
    allowed = set(response.headers["Access-Control-Allow-Headers"].lower().split(", "))
    assert {"x-stainless-lang", "x-stainless-retry-count", "openai-organization"} <= allowed
    assert not {name for name in allowed if "evil" in name or " " in name}


async def test_no_origin_no_cors(service: InProcessService) -> None:
    """Without an origin nothing is allowed to any, but caches are told that it depends."""
    response = await service.client.get("/healthz")
    assert "Access-Control-Allow-Origin" not in response.headers
    assert response.headers["Vary"] == "Origin"


# The request's id.


@pytest.mark.parametrize("sent", ["a", "A-b_c.9", "x" * 128])
async def test_request_id_in_every_answer(service: InProcessService, sent: str) -> None:
    """A sane id of the caller's is kept."""
    assert (await service.client.get("/healthz", headers={"X-Request-ID": sent})).headers["X-Request-ID"] == sent


@pytest.mark.parametrize("sent", [None, "", "x" * 129, "a b", "a,b", "\u00e4", "a;b", '"a"', "a/b"])
async def test_new_request_id(service: InProcessService, sent: str | None) -> None:
    """Any other is replaced, each time by another."""
    seen = set()
    for _ in range(2):
        async with service.caller() as caller:
            more = [] if sent is None else [("X-Request-ID", sent)]
            await caller.send(request("/healthz", *more, method="GET"))
            seen.add((await read_response(caller)).headers["X-Request-ID"])
    assert len(seen) == 2
    assert all(re.fullmatch("[0-9a-f]{32}", name) for name in seen)


async def test_request_id_in_every_line() -> None:
    """Whatever is logged while a request is served, or for the answer it left behind, names the request."""
    broken = [error(503, {"error": "x"}), stream("a", CLOSE), stream("b", CLOSE)]
    async with Upstream(*broken) as grok, spawned(grok.url, log_format="json", resume_window=0.1) as service:
        for name, resumable in {"one": False, "two": True}.items():
            await service.ask(resumable=resumable, headers={"X-Request-ID": name})
        await service.client.get("/nowhere", headers={"X-Request-ID": "three"})
        service.process.terminate()
        assert await service.exit_code() == 0
    lines = [json.loads(line) for line in service.stderr.splitlines()]
    ids = [line.get("request_id") for line in lines]
    first, last = ids.index("one"), ids.index("three")
    assert ids[first:last] == ["one"] * ids.count("one") + ["two"] * ids.count("two")
    assert [line["message"] for line in lines[first : last + 1] if line["level"] == "info"] == [
        *("request", "stream ended", "request", "request"),
    ]
    assert sum(line["level"] == "warning" for line in lines[first:last]) == 3
