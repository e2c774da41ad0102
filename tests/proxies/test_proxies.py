"""Behind the reverse proxies that people have: as they come, with compression, and as the README shows them."""

import asyncio
import json
import statistics
from contextlib import suppress

import httpx
import pytest

from tests.conftest import HI, LiveStream, serving
from tests.proxies.proxies import HAPROXY, PROXIES, Proxy, running
from tests.readers import DONE, Event, answer, joined
from tests.upstream import HANG, RESET, Gate, Upstream, stream

pytestmark = pytest.mark.anyio

each = pytest.mark.parametrize("proxy", [pytest.param(proxy, id=name) for name, proxy in PROXIES.items()])

TEXTS = ["Hel", "lo,\n\nw", " \u00f6rl", "d\u2028 ", "\U0001f642", "\n```\n"]


class Uncompressed(LiveStream):
    """A stream that may be compressed."""

    def __init__(self, response: httpx.Response) -> None:
        super().__init__(response)
        self._pieces = response.aiter_bytes()


@each
@pytest.mark.parametrize("site", ["stock", "compressing", "snippet"])
async def test_token_by_token_through_proxies(proxy: Proxy, site: str) -> None:
    """Each token is there before the next one is sent, and the text is exact."""
    gates = [Gate() for _ in TEXTS]
    burst = [f"{number}\r\n" for number in range(500)]
    script = stream(*(step for pair in zip(TEXTS, gates, strict=True) for step in pair), *burst)
    async with (
        Upstream(script) as upstream,
        serving(upstream.url) as service,
        running(proxy, getattr(proxy, site), service.port) as front,
        front.client.stream("POST", "/api/chat", json={"messages": HI}) as response,
    ):
        live = Uncompressed(response)
        for text, gate in zip(TEXTS, gates, strict=True):
            assert await live.event() == Event(text)
            gate.open()
        *events, last = await live.rest()
        assert last == Event(DONE)
        assert joined(events) == "".join(burst).replace("\r\n", "\n")


async def test_no_delay() -> None:
    """With the README's line HAProxy passes each token on at once."""
    gates = [Gate() for _ in range(9)]
    script = stream("-", *(step for gate in gates for step in (gate, "+")))
    delays = []
    async with (
        Upstream(script) as upstream,
        serving(upstream.url) as service,
        running(HAPROXY, HAPROXY.snippet, service.port) as front,
        front.asking() as live,
    ):
        await live.event()
        for gate in gates:
            await gate.reached.wait()
            opened = asyncio.get_running_loop().time()
            gate.open()
            await live.event()
            delays.append(asyncio.get_running_loop().time() - opened)
        # Without the line most of them take 0.2 s.
        assert statistics.median(delays) < 0.1


@each
async def test_silence_through_proxies(proxy: Proxy) -> None:
    """A Grok that thinks for longer than the proxy would wait is waited for: the comments keep the stream alive."""
    before, between = Gate(), Gate()
    async with (
        Upstream(stream(before, "Hel", between, "lo")) as upstream,
        serving(upstream.url, status_hold=0.2, keep_alive=0.3) as service,
        running(proxy, proxy.impatient, service.port) as front,
        front.asking() as live,
    ):
        await live.comment(5)
        before.open()
        assert await live.event() == Event("Hel")
        await live.comment(10)
        between.open()
        assert await live.rest() == [Event("lo"), Event(DONE)]


@each
async def test_impatience(proxy: Proxy) -> None:
    """The proxy of the test above does give up where there are no comments, and then there is no done marker."""
    async with (
        Upstream(stream("Hel", HANG)) as upstream,
        serving(upstream.url) as service,
        running(proxy, proxy.impatient, service.port) as front,
        front.asking() as live,
    ):
        assert live.response.status_code == 200
        assert await live.event() == Event("Hel")
        # Some say by an untidy end that something is missing, some do not.
        with suppress(httpx.RemoteProtocolError):
            assert await live.rest() == []


@each
async def test_leaving_through_proxies(proxy: Proxy) -> None:
    """A caller who leaves is noticed through the proxy, with the next comment at the latest, and Grok is hung up on."""
    async with (
        Upstream(stream("Hel", HANG)) as upstream,
        serving(upstream.url, keep_alive=0.3) as service,
        running(proxy, proxy.stock, service.port) as front,
    ):
        async with front.asking() as live:
            assert await live.event() == Event("Hel")
        await upstream.calls[0].hung_up(within=2)


@each
async def test_broken(proxy: Proxy) -> None:
    """An answer that breaks off is told as an event, in a stream that ends tidily."""
    async with (
        Upstream(stream("Hel", RESET)) as upstream,
        serving(upstream.url) as service,
        running(proxy, proxy.stock, service.port) as front,
    ):
        response = await front.ask()
        async with front.asking() as live:
            token, error = await live.rest()
    assert response.status_code == 200
    assert token == Event("Hel")
    assert error.type == "error"
    assert json.loads(error.data)["error"]["code"] == "upstream_cut_off"


@each
async def test_prefix(proxy: Proxy) -> None:
    """Under a path of a larger site the service finds its own addresses."""
    async with (
        Upstream() as upstream,
        serving(upstream.url, root_path="/grok") as service,
        running(proxy, proxy.prefixed, service.port) as front,
    ):
        created = await front.client.post(
            "/grok/api/chat", json={"messages": HI}, headers={"Accept": "application/json"}
        )
        assert created.status_code == 201
        address = created.headers["Location"]
        assert address.startswith("/grok/api/chat/")
        assert answer((await front.client.get(address)).content) == "Hello, world"


@each
async def test_own_name(proxy: Proxy) -> None:
    """With the README's lines a page of the same site may call, and a page of another one may not."""
    async with (
        Upstream() as upstream,
        serving(upstream.url, allowed_hosts="chat.example.com") as service,
        running(proxy, proxy.snippet, service.port) as front,
    ):
        statuses = {}
        for origin in ("https://chat.example.com", "https://chat.example.org"):
            response = await front.ask(headers={"Host": "chat.example.com", "Origin": origin})
            statuses[origin] = response.status_code
    assert statuses == {"https://chat.example.com": 200, "https://chat.example.org": 403}


@each
async def test_addresses(proxy: Proxy) -> None:
    """With the README's lines the service knows its callers by their addresses, whatever they say these are."""
    async with (
        Upstream() as upstream,
        serving(upstream.url, rate_limit="1/minute") as service,
        running(proxy, proxy.snippet, service.port) as front,
    ):
        statuses = []
        for address, forged in (("127.0.0.2", {}), ("127.0.0.2", {"X-Forwarded-For": "192.0.2.1"}), ("127.0.0.3", {})):
            transport = httpx.AsyncHTTPTransport(local_address=address)
            async with httpx.AsyncClient(base_url=front.url, transport=transport) as client:
                response = await client.post("/api/chat", json={"messages": HI}, headers=forged)
            statuses.append(response.status_code)
    assert statuses == [200, 429, 200]


@each
async def test_metrics(proxy: Proxy) -> None:
    """With the README's lines nobody outside sees the metrics, by whatever name they are asked for."""
    names = ["/metrics", "/metrics?", "/metrics/", "//metrics", "/%6detrics", "/./metrics", "/api/../metrics"]
    async with (
        Upstream() as upstream,
        serving(upstream.url) as service,
        running(proxy, proxy.snippet, service.port) as front,
    ):
        assert "chatproxy_" in (await service.client.get("/metrics")).text
        for name in [*names, f"{front.url}/metrics"]:
            async with front.caller() as caller:
                await caller.send(
                    f"GET {name} HTTP/1.1\r\nHost: 127.0.0.1:{front.port}\r\nConnection: close\r\n\r\n".encode()
                )
                status, _ = await caller.head()
                assert (name, status) == (name, 404)
                assert b"chatproxy_" not in await caller.rest()
