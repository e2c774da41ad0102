"""Limits for each caller and shared secrets, where the operator sets them; and who a caller is."""

import asyncio
import hmac
import json
import logging
from collections.abc import AsyncIterator, Mapping

import httpx
import pytest

from tests.conftest import HI, InProcessService, refusal, serving
from tests.readers import DONE, standard
from tests.upstream import HANG, Gate, Upstream, stream
from tests.wire.test_resume import JSON, address, name, rest

pytestmark = pytest.mark.anyio

PAGE = "https://app.example.com"
TOKENS = ("0123456789abcdef", "fedcba9876543210==")


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def limited(response: httpx.Response) -> int:
    """Checks that it is a 429 of ours; gives the seconds to wait."""
    assert (response.status_code, refusal(response)["code"]) == (429, "rate_limited")
    return int(response.headers["Retry-After"])


# ACCESS_TOKENS.


@pytest.fixture(scope="module")
async def service(grok: Upstream) -> AsyncIterator[InProcessService]:
    async with serving(grok.url, access_tokens=",".join(TOKENS), allowed_origins=PAGE) as service:
        yield service


@pytest.mark.parametrize(
    "headers",
    [
        {},
        bearer("wrong-wrong-wrong"),
        bearer(TOKENS[0][:-1]),
        bearer(TOKENS[0] + "x"),
        bearer(TOKENS[0].upper()),
        bearer(",".join(TOKENS)),
        bearer(f"{TOKENS[0]} {TOKENS[0]}"),
        bearer("\u00e4" * 16),
        {"Authorization": TOKENS[0]},
        {"Authorization": f"Basic {TOKENS[0]}"},
        {"Authorization": "Bearer"},
        {"X-Api-Key": TOKENS[0]},
        {"Cookie": f"token={TOKENS[0]}"},
    ],
)
async def test_unauthorized(grok: Upstream, service: InProcessService, headers: Mapping[str, str]) -> None:
    """Without one of the tokens no chat is begun; a page is told why."""
    grok.set_scripts()
    encoded = [(key.encode(), value.encode("latin-1")) for key, value in {**headers, "Origin": PAGE}.items()]
    response = await service.client.post("/api/chat", json={"messages": HI}, headers=encoded)
    assert (response.status_code, refusal(response)["code"]) == (401, "unauthorized")
    assert response.headers["WWW-Authenticate"] == "Bearer"
    assert response.headers["Access-Control-Allow-Origin"] == PAGE
    assert grok.calls == []


async def test_unauthorized_body(service: InProcessService) -> None:
    """The body of who has no token is not read."""
    async with service.caller() as caller:
        await caller.post(b"", Content_Length="1000")
        assert (await caller.head())[0] == 401


@pytest.mark.parametrize("token", TOKENS)
@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
async def test_authorized(grok: Upstream, service: InProcessService, scheme: str, token: str) -> None:
    """Any of the tokens will do."""
    grok.set_scripts()
    assert (await service.ask(headers={"Authorization": f"{scheme} {token}"})).status_code == 200


async def test_ticket(grok: Upstream, service: InProcessService) -> None:
    """Everything but a new chat goes without a token, for nobody else knows the stream's address."""
    grok.set_scripts()
    url = (await service.ask(headers={**JSON, **bearer(TOKENS[0])})).json()["url"]
    events = standard((await rest(service, url)).content)
    assert events[-1].data == DONE
    again = await service.ask(headers={"Last-Event-ID": events[0].id})
    assert standard(again.content) == events[1:]
    assert (await service.client.post(f"/api/chat/{name(url)}/stop")).status_code == 204
    assert (await service.client.delete(f"/api/chat/{name(url)}")).status_code == 204
    for path in ("/", "/healthz", "/readyz", "/metrics", "/openapi.json"):
        assert (await service.client.get(path)).status_code == 200
    assert len(grok.calls) == 1


async def test_tokens_are_compared_in_constant_time(service: InProcessService, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was sent is compared with each token, whichever it is, by the comparison made for it."""
    compared: list[tuple[bytes, bytes]] = []

    def compare(a: bytes, b: bytes) -> bool:
        compared.append((a, b))
        return a == b

    monkeypatch.setattr(hmac, "compare_digest", compare)
    for sent in (*TOKENS, "wrong-wrong-wrong"):
        await service.ask(headers=bearer(sent))
        assert compared == [(sent.encode(), token.encode()) for token in TOKENS]
        compared.clear()


# RATE_LIMIT.


async def test_rate_limit() -> None:
    """So many chats for each caller, with what is left in the headers; then 429 until the time is over."""
    async with Upstream() as grok, serving(grok.url, rate_limit="2/minute", allowed_origins=PAGE) as service:
        first = await service.ask()
        assert (first.status_code, first.headers["RateLimit-Policy"]) == (200, '"chats";q=2;w=60')
        assert first.headers["RateLimit"] == '"chats";r=1;t=60'
        second = await service.ask(headers=JSON)
        assert (second.status_code, second.headers["RateLimit"]) == (201, '"chats";r=0;t=60')
        for _ in range(2):
            third = await service.ask(headers={"Origin": PAGE})
            assert 58 <= limited(third) <= 60
            assert third.headers["RateLimit"] == f'"chats";r=0;t={third.headers["Retry-After"]}'
            assert third.headers["RateLimit-Policy"] == '"chats";q=2;w=60'
            assert third.headers["Access-Control-Allow-Origin"] == PAGE
        assert len(grok.calls) == 2
        # What begins no chat is not counted, and not refused.
        events = standard((await rest(service, second.json()["url"])).content)
        assert (await service.ask(headers={"Last-Event-ID": events[0].id})).status_code == 200
        assert (await service.client.get("/healthz")).status_code == 200
        assert "RateLimit" not in (await service.client.get("/healthz")).headers


async def test_rate_limit_is_over_in_time() -> None:
    """When the time is over the caller has all of its chats again."""
    async with Upstream() as grok, serving(grok.url, rate_limit="1/second") as service:
        assert (await service.ask()).status_code == 200
        assert limited(await service.ask()) == 1
        async with asyncio.timeout(3):
            while True:
                if (await service.ask()).status_code == 200:
                    break
                await asyncio.sleep(0.05)  # nobody tells when it is over
        assert len(grok.calls) == 2


async def test_no_limits() -> None:
    """Where nothing is set, nothing is counted and no header says so."""
    async with Upstream() as grok, serving(grok.url) as service:
        response = await service.ask()
        assert not {"RateLimit", "RateLimit-Policy"} & set(response.headers)


async def test_what_is_refused_before_is_not_counted() -> None:
    """A request that is refused for its token, its type or what it accepts takes no chat away."""
    async with Upstream() as grok, serving(grok.url, rate_limit="1/day", access_tokens=TOKENS[0]) as service:
        assert (await service.ask()).status_code == 401
        assert (await service.ask(headers={"Accept": "image/png"})).status_code == 406
        text = {**bearer(TOKENS[0]), "Content-Type": "text/plain"}
        assert (await service.client.post("/api/chat", content="x", headers=text)).status_code == 415
        assert (await service.ask(headers=bearer(TOKENS[0]))).status_code == 200


# MAX_STREAMS_PER_CLIENT.


async def test_streams_for_each_caller() -> None:
    """So many answers for each caller at a time; others are unharmed, and a place is free when an answer ends."""
    gate = Gate()
    async with Upstream(stream("a", gate)) as grok, serving(grok.url, max_streams_per_client=2) as service:
        async with service.asking(headers=of("192.0.2.1")) as live:
            await live.event()
            url = (await service.ask(headers={**JSON, **of("192.0.2.1")})).json()["url"]  # nobody need read it
            assert limited(await service.ask(headers=of("192.0.2.1"))) == 1
            assert limited(await service.ask(headers={**JSON, **of("192.0.2.1")})) == 1
            assert len(grok.calls) == 2
            async with service.asking(headers=of("192.0.2.2")) as other:
                await other.event()
                gate.open()
                await other.rest()
            await live.rest()
        await rest(service, url)
        assert (await service.ask(headers=of("192.0.2.1"))).status_code == 200
        assert len(grok.calls) == 4


async def test_places_of_those_who_left() -> None:
    """Who leaves, or stops the answer, has the place again."""
    async with Upstream(stream("a", HANG)) as grok, serving(grok.url, max_streams_per_client=1) as service:
        async with service.asking() as live:
            await live.event()
        await grok.calls[0].hung_up()
        url = await address(service)
        limited(await service.ask())
        await service.client.delete(f"/api/chat/{name(url)}")
        await grok.calls[1].hung_up()
        async with service.asking() as live:
            await live.event()
        assert len(grok.calls) == 3


async def test_attaching_takes_no_place() -> None:
    """Who asks for the same answer again, or comes back to it, takes no second place."""
    gate = Gate()
    async with Upstream(stream("a", gate)) as grok, serving(grok.url, max_streams_per_client=1) as service:
        keyed = {**JSON, "Idempotency-Key": "key"}
        first = await service.ask(headers=keyed)
        again = await service.ask(headers=keyed)
        assert (again.status_code, again.json()) == (201, first.json())
        gate.open()
        events = standard((await rest(service, first.json()["url"])).content)
        assert [event.data for event in events] == ["a", DONE]
        assert len(grok.calls) == 1


# Who a caller is.


def of(client: str) -> dict[str, str]:
    return {"X-Forwarded-For": client}


@pytest.mark.parametrize(
    ("trusted", "forwarded", "client"),
    [
        ("127.0.0.1", "192.0.2.1", "192.0.2.1"),
        ("127.0.0.1", "203.0.113.9, 192.0.2.1", "192.0.2.1"),  # the last is the one that the proxy saw
        ("127.0.0.1", "", "127.0.0.1"),
        ("127.0.0.0/8, 10.0.0.0/8", "203.0.113.9, 192.0.2.1, 10.1.2.3", "192.0.2.1"),  # two proxies of ours
        ("127.0.0.1", "2001:db8::1", "2001:db8::1"),
        ("127.0.0.1", "[2001:db8::1]:1234", "2001:db8::1"),
        ("127.0.0.1", "192.0.2.1:1234", "192.0.2.1"),
        ("192.0.2.9", "192.0.2.1", "127.0.0.1"),  # not from a proxy of ours
        ("192.0.2.0/24", "192.0.2.1", "127.0.0.1"),
        (",", "192.0.2.1", "127.0.0.1"),
        ("*", "192.0.2.1, 10.1.2.3", "192.0.2.1"),
    ],
)
async def test_address(trusted: str, forwarded: str, client: str, caplog: pytest.LogCaptureFixture) -> None:
    """X-Forwarded-For is believed from the proxies that are set, up to the first address that is none of them."""
    caplog.set_level(logging.INFO, "chatproxy")
    async with Upstream() as grok, serving(grok.url, forwarded_allow_ips=trusted, rate_limit="1/day") as service:
        assert (await service.ask(headers=of(forwarded))).status_code == 200
        limited(await service.ask(headers=of(forwarded)))
        # It is a caller of its own.
        other = await service.ask(headers=of("198.51.100.7"))
        assert other.status_code == (429 if client == "127.0.0.1" and forwarded else 200)
    lines = [record for record in caplog.records if record.getMessage() == "request"]
    assert [vars(line)["client"] for line in lines[:2]] == [client] * 2


@pytest.mark.parametrize(
    "sent", ["203.0.113.9 status=200 end=done", "canary", "a" * 30_000, "fe80::1%" + "a" * 99, "é"]
)
async def test_what_is_no_address(sent: str, caplog: pytest.LogCaptureFixture) -> None:
    """What a proxy passes on in an address's place is not logged."""
    caplog.set_level(logging.INFO, "chatproxy")
    headers = [(b"X-Forwarded-For", sent.encode())]
    async with Upstream() as grok, serving(grok.url, forwarded_allow_ips="*") as service:
        assert (await service.client.get("/v1/models", headers=headers)).status_code == 200
    [line] = [record for record in caplog.records if record.getMessage() == "request"]
    assert vars(line)["client"] == "unknown"


async def test_trailers(caplog: pytest.LogCaptureFixture) -> None:
    """What follows a body is no header: a proxy that passes it on (HAProxy does) has not written it."""
    caplog.set_level(logging.INFO, "chatproxy")
    body = json.dumps({"messages": HI}).encode()
    head = b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nX-Forwarded-For: 192.0.2.1\r\nX-Request-ID: kept\r\n"
    head += b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    trailers = b"X-Forwarded-For: 203.0.113.9\r\nHost: evil.example\r\nX-Request-ID: forged\r\n\r\n"
    async with Upstream() as grok, serving(grok.url) as service, service.caller() as caller:
        await caller.send(head + b"%x\r\n%b\r\n0\r\n%b" % (len(body), body, trailers))
        status, headers = await caller.head()
        await caller.until(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    assert (status, headers["x-request-id"]) == (200, "kept")
    [line] = [record for record in caplog.records if record.getMessage() == "request"]
    assert vars(line)["client"] == "192.0.2.1"


async def test_network() -> None:
    """An IPv6 subscriber has many addresses, and is one caller."""
    async with Upstream() as grok, serving(grok.url, rate_limit="1/day") as service:
        assert (await service.ask(headers=of("2001:db8:0:1::1"))).status_code == 200
        limited(await service.ask(headers=of("2001:db8:0:1:ffff::2")))
        assert (await service.ask(headers=of("2001:db8:0:2::1"))).status_code == 200
