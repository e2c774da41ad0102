"""Health: whether the loop turns, whether chats are welcome, and early whether the key is any good."""

import asyncio
import logging
from collections.abc import AsyncIterator
from itertools import chain, repeat

import pytest

from chatproxy.config.timing import Timing
from tests.conftest import KEY, TIMEOUT, InProcessService, Service, serving
from tests.readers import answer
from tests.upstream import CLOSE, GOOD_KEY, HANG, RESET, Gate, Script, Upstream, error, head, refusing, unreachable

pytestmark = pytest.mark.anyio

READY = (200, {"status": "ok"})
USELESS = (503, {"status": "unavailable", "reason": "upstream_auth"})


async def ready(service: Service) -> tuple[int, object]:
    response = await service.client.get("/readyz")
    assert response.headers["Cache-Control"] == "no-store"
    return response.status_code, response.json()


async def becomes(service: Service, state: tuple[int, object]) -> None:
    """Wait until the service is in this state."""
    async with asyncio.timeout(5):
        while await ready(service) != state:
            pass


async def test_healthy() -> None:
    """A service that runs is healthy and ready, and asking costs no tokens."""
    async with Upstream() as grok, serving(grok.url) as service:
        await grok.until(lambda: len(grok.probes) == 1)
        for _ in range(3):
            response = await service.client.get("/healthz")
            assert (response.status_code, response.json()) == (200, {"status": "ok"})
            assert await ready(service) == READY
        assert (len(grok.calls), len(grok.probes), grok.strays) == (0, 1, [])


async def test_question_about_the_key() -> None:
    """The key is asked about once, with itself and nothing else."""
    async with Upstream() as grok, serving(grok.url):
        await grok.until(lambda: len(grok.probes) == 1)
        [probe] = grok.probes
    assert (probe.method, probe.path, probe.content) == ("GET", "/v1/api-key", b"")
    assert probe.headers["authorization"] == f"Bearer {KEY}"


# What Grok says of a key that is no good, and of one that may be.
USELESS_KEYS: dict[str, Script] = {
    "blocked team": error(200, {**GOOD_KEY, "team_blocked": True}),
    "blocked": error(200, {**GOOD_KEY, "api_key_blocked": True}),
    "disabled": error(200, {**GOOD_KEY, "api_key_disabled": True}),
    "400": error(400, {"code": "invalid-argument", "error": "Incorrect API key provided. canary"}),
    "401": error(401, {"error": "canary"}),
    "403": error(403, {"error": "canary"}),
}
UNCLEAR: dict[str, Script] = {
    "403 block page": error(403, "<html>blocked</html>"),
    "403 without a body": error(403, ""),
    "404": error(404, {"error": "No handler found on route"}),
    "429": error(429, {"error": "x"}, {"Retry-After": "60"}),
    "500": error(500, {"error": "x"}),
    "503": error(503, "<html>"),
    "302": error(302, "", {"Location": "http://127.0.0.1/"}),
    "not JSON": error(200, b"canary"),
    "JSON of another kind": error(200, []),
    "flags of another kind": error(200, {**GOOD_KEY, "team_blocked": "canary"}),
    "flags that are missing": error(200, {}),
    "not UTF-8": error(200, b'{"name": "\xff"}'),
    "a deep nest": error(200, b'{"x": ' + b"[" * 50_000 + b"]" * 50_000 + b"}"),
    "closed": [CLOSE],
    "reset": [RESET],
    "too much": chain([head(200, {"Content-Length": "9" * 9}), b'{"x": "'], repeat(b"x" * 100_000)),
    "cut off": [head(200, {"Content-Length": "100"}), b'{"team_blocked": true', CLOSE],
}  # fmt: skip


@pytest.mark.parametrize("said", USELESS_KEYS.values(), ids=USELESS_KEYS.keys())
async def test_useless_key(said: Script, caplog: pytest.LogCaptureFixture) -> None:
    """With a key that is no good the service is not ready, and says which variable to look at; it tells no secret."""
    async with Upstream(key=said) as grok, serving(grok.url) as service:
        await becomes(service, USELESS)
        assert (await service.client.get("/healthz")).status_code == 200
        assert grok.calls == []
    errors = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert ["GROK_API_KEY" in line for line in errors] == [True]
    assert KEY not in caplog.text
    assert "canary" not in caplog.text


@pytest.mark.parametrize("said", UNCLEAR.values(), ids=UNCLEAR.keys())
async def test_unclear_key(said: Script, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever is unclear speaks for the key."""
    async with Upstream(key=said) as grok, serving(grok.url) as service:
        await grok.until(lambda: len(grok.probes) == 1)
        [probe] = grok.probes
        await grok.until(lambda: probe.played.is_set() or probe.left.is_set())
        assert answer((await service.ask()).content) == "Hello, world"  # by then it has been read
        assert await ready(service) == READY
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


async def test_nobody_to_ask() -> None:
    """Nor does it matter that Grok cannot be reached just now."""
    with refusing() as refused, unreachable() as lost:
        for url in (refused, lost):
            async with serving(url, connect_timeout=0.1) as service:
                assert await ready(service) == READY


async def test_start_does_not_wait() -> None:
    """Chats are answered before Grok has said anything of the key."""
    async with Upstream(key=[HANG]) as grok, serving(grok.url) as service:
        await grok.until(lambda: len(grok.probes) == 1)
        assert await ready(service) == READY
        assert answer((await service.ask()).content) == "Hello, world"


@pytest.mark.parametrize("begun", [b"", head(200, {"Content-Length": "100"}), head(401, {"Content-Length": "100"})])
async def test_silence_about_the_key(begun: bytes) -> None:
    """An answer about the key that does not come, or not to its end, is not waited for, and speaks for it."""
    timing = Timing(key_check_timeout=0.1)
    async with Upstream(key=[begun, HANG]) as grok, serving(grok.url, timing) as service:
        await grok.until(lambda: len(grok.probes) == 1)
        await grok.probes[0].hung_up()
        assert await ready(service) == READY


async def test_key_that_is_mended() -> None:
    """A key that is no good is asked about again, and until the answer is here it remains no good."""
    timing = Timing(key_check_interval=0.1)
    async with Upstream(key=error(401, {"error": "x"})) as grok, serving(grok.url, timing) as service:
        await becomes(service, USELESS)
        gate = Gate()
        grok.key = [gate, *error(200, GOOD_KEY)]
        async with asyncio.timeout(TIMEOUT):
            await gate.reached.wait()
        assert await ready(service) == USELESS
        gate.open()
        await becomes(service, READY)


async def test_useless_key_and_chats() -> None:
    """A key that seems to be no good does not keep chats from Grok, who knows best."""
    async with Upstream(key=error(401, {"error": "x"})) as grok, serving(grok.url) as service:
        await becomes(service, USELESS)
        assert answer((await service.ask()).content) == "Hello, world"


@pytest.fixture
async def demo() -> AsyncIterator[InProcessService]:
    async with serving("http://127.0.0.1:1/v1", grok_api_key=None, grok_base_url=None) as service:
        yield service


async def test_demo_in_readyz(demo: InProcessService) -> None:
    """Without a key the service is ready, and says what it is."""
    assert await ready(demo) == (200, {"status": "ok", "demo": True})


@pytest.mark.parametrize("path", ["/healthz", "/readyz"])
async def test_any_host_may_ask(service: InProcessService, path: str) -> None:
    """Whoever asks for its health may do so by any name, and with HEAD; nothing else is answered."""
    response = await service.client.get(path, headers={"Host": "anything.example"})
    assert response.status_code == 200
    assert (await service.client.head(path)).status_code == 200
    assert (await service.client.post(path)).status_code == 405


async def test_health_while_full() -> None:
    """A service that can take no more chats for the moment is still healthy."""
    async with Upstream([HANG]) as grok, serving(grok.url, max_streams=1) as service, service.caller() as caller:
        await caller.post({"messages": [{"role": "user", "content": "Hi"}]})
        await grok.call()
        assert (await service.ask()).status_code == 503
        assert (await service.client.get("/healthz")).status_code == 200
        assert await ready(service) == READY
