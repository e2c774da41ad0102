"""What is counted and claimed once, on whatever replica a request arrives: idempotency keys and limits."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator

import httpx
import pytest

from tests.conftest import InProcessService, Service, refusal
from tests.readers import joined, standard
from tests.redis_servers import RedisServer, engines, needs_redis
from tests.replicas.fleets import JSON, becomes, fleet, start
from tests.upstream import HANG, Gate, Upstream, error, stream

pytestmark = [pytest.mark.anyio, needs_redis]


@pytest.fixture(scope="module", params=engines)
async def redis(request: pytest.FixtureRequest) -> AsyncIterator[RedisServer]:
    async with RedisServer(request.param) as redis:
        yield redis


@pytest.fixture(scope="module")
async def replicas(grok: Upstream, redis: RedisServer) -> AsyncIterator[list[InProcessService]]:
    async with fleet(grok, redis, grok_retries=0) as replicas:
        yield replicas


async def ask(service: Service, key: str, content: str = "Hi") -> httpx.Response:
    return await service.ask(content, headers={**JSON, "Idempotency-Key": key})


async def test_at_the_same_instant(grok: Upstream, replicas: list[InProcessService]) -> None:
    """The same key on two replicas at once, a hundred times: Grok is asked a hundred times."""
    grok.set_scripts(stream("a", 0.005, "b"))
    for number in range(100):
        first, second = await asyncio.gather(*(ask(service, f"instant {number}") for service in replicas))
        assert (first.status_code, second.status_code) == (201, 201)
        assert first.json() == second.json()
    assert len(grok.calls) == 100


async def test_attached_elsewhere(grok: Upstream, replicas: list[InProcessService]) -> None:
    """The key finds the answer on any replica, while it runs and when it is complete; another body is refused."""
    gate = Gate()
    grok.set_scripts(stream("a", gate, "b"))
    first, second = [await ask(service, "attached") for service in replicas]
    assert first.json() == second.json()
    for service in replicas:
        other = await ask(service, "attached", "Ho")
        assert (other.status_code, refusal(other)["param"]) == (422, "Idempotency-Key")
    gate.open()
    complete = [await service.ask(headers={"Idempotency-Key": "attached"}) for service in replicas]
    assert [joined(standard(response.content)) for response in complete] == ["ab", "ab"]
    assert complete[0].content == complete[1].content
    assert len(grok.calls) == 1


async def test_refused_together_elsewhere(grok: Upstream, replicas: list[InProcessService]) -> None:
    """Who waits for the same answer is refused with it, on any replica, and the key is free at once."""
    gate = Gate()
    grok.set_scripts([gate, *error(400, {"error": "exceeds budget"})], stream("a"))
    async with asyncio.TaskGroup() as tasks:
        asked = [tasks.create_task(ask(service, "refused")) for service in replicas for _ in range(3)]
        await gate.reached.wait()
        await asyncio.sleep(0.2)  # the others are waiting by now; if not, they are asked for below
        gate.open()
    told = Counter(task.result().status_code for task in asked)
    assert told[400] >= 1
    assert set(told) <= {400, 201}
    assert (await ask(replicas[1], "refused", "Ho")).status_code == (422 if told[201] else 201)


async def test_freed_by_a_refusal_elsewhere(grok: Upstream, replicas: list[InProcessService]) -> None:
    """A first try that failed before its status blocks nobody, even with another body."""
    grok.set_scripts(error(503, {"error": "x"}), stream("a"))
    assert (await ask(replicas[0], "freed")).status_code == 503
    assert (await ask(replicas[1], "freed", "Ho")).status_code == 201


async def test_rate_limit_of_all(grok: Upstream, redis: RedisServer) -> None:
    """However many ask at once on two replicas, exactly as many get in as the limit says."""
    grok.set_scripts(stream("a"))
    async with fleet(grok, redis, rate_limit="20/hour") as replicas:
        responses = await asyncio.gather(*(replicas[number % 2].ask() for number in range(60)))
        assert Counter(response.status_code for response in responses) == {200: 20, 429: 40}
        refused = [response for response in responses if response.status_code == 429]
        assert {refusal(response)["code"] for response in refused} == {"rate_limited"}
        assert all(3500 < int(response.headers["Retry-After"]) <= 3600 for response in refused)
        left = [response.headers["RateLimit"] for response in responses if response.status_code == 200]
        assert sorted(int(text.partition("r=")[2].partition(";")[0]) for text in left) == list(range(20))
    assert len(grok.calls) == 20


async def test_repetitions_elsewhere_are_not_counted(grok: Upstream, redis: RedisServer) -> None:
    """A request that is sent again takes nothing of the limit, on whatever replica."""
    grok.set_scripts(stream("a"))
    async with fleet(grok, redis, rate_limit="1/hour") as replicas:
        assert [(await ask(service, "counted once")).status_code for service in (*replicas, *replicas)] == [201] * 4
        refused = await ask(replicas[1], "another")
        assert refusal(refused)["code"] == "rate_limited"
        # Its key was not taken, so another replica does not wait for an answer that never began.
        assert (await ask(replicas[0], "another", "Ho")).status_code == 429


async def test_window_ends(grok: Upstream, redis: RedisServer) -> None:
    """When a window is over, all chats are there again."""
    grok.set_scripts(stream("a"))
    async with fleet(grok, redis, rate_limit="1/second") as replicas:
        assert (await replicas[0].ask()).status_code == 200
        assert (await replicas[1].ask()).status_code == 429
        await asyncio.sleep(1.1)
        assert (await replicas[1].ask()).status_code == 200


async def test_running_answers_of_all(grok: Upstream, redis: RedisServer) -> None:
    """Running answers count on all replicas, and a place is free as soon as one has ended, wherever it ran."""
    gate = Gate()
    grok.set_scripts(stream("a", gate))
    async with fleet(grok, redis, max_streams_per_client=3) as replicas:
        responses = await asyncio.gather(*(replicas[number % 2].ask(headers=JSON) for number in range(12)))
        assert Counter(response.status_code for response in responses) == {201: 3, 429: 9}
        gate.open()
        url = next(response for response in responses if response.status_code == 201).json()["url"]
        await replicas[0].client.get(url)
        async with asyncio.timeout(5):
            while (await replicas[1].ask()).status_code == 429:  # noqa: ASYNC110 -- nobody tells when it is free
                await asyncio.sleep(0.02)


async def test_places_of_the_dead(grok: Upstream, redis: RedisServer) -> None:
    """What a replica that died had running is free again when its lease is over, and what ran elsewhere is not."""
    grok.set_scripts(stream("a", HANG))
    async with fleet(grok, redis, 1, redis_prefix="places:", max_streams_per_client=2) as (other,):
        await start(other)
        [key] = [key for key in redis.everything() if key.startswith("places:open:")]
        redis.do("SET", "places:replica:dead", "1", "PX", 300)
        redis.do("HSET", key, "dead", 5)
        assert (await other.ask(headers=JSON)).status_code == 429
        async with asyncio.timeout(5):
            while (response := await other.ask(headers=JSON)).status_code == 429:
                pass
        assert response.status_code == 201
        assert redis.do("HLEN", key) == 1


async def test_retry_after_of_all(grok: Upstream, redis: RedisServer) -> None:
    """What Grok has told one replica to wait is kept by all of them, one that starts later, too."""
    grok.set_scripts(error(429, {"error": "x"}, {"Retry-After": "60"}), stream("a"))
    async with fleet(grok, redis, redis_prefix="wait:", grok_retries=0) as (first, second):
        assert (await first.ask()).status_code == 429
        async with asyncio.timeout(5):
            while (response := await second.ask()).status_code == 200:
                pass
        assert refusal(response)["code"] == "upstream_rate_limited"
        assert 55 < int(response.headers["Retry-After"]) <= 60
        asked = len(grok.calls)
        async with fleet(grok, redis, 1, redis_prefix="wait:") as (third,):
            async with asyncio.timeout(5):
                while (await third.ask()).status_code != 429:
                    asked += 1
        assert (await second.ask()).status_code == 429
        assert len(grok.calls) == asked
        await becomes(second, "/readyz", "ok")


async def test_memory_of_redis_is_lost(grok: Upstream) -> None:
    """After a restart with an empty memory nobody is told that an answer is unknown, and none is started again."""
    gate = Gate()
    grok.set_scripts(stream("a", gate, "b"))
    async with RedisServer() as redis, fleet(grok, redis) as (owner, other):
        url = (await ask(owner, "lost")).json()["url"]
        await redis.restart()
        statuses: Counter[int] = Counter()
        async with asyncio.timeout(15):
            while True:
                repeated, found = await ask(other, "lost"), await other.client.head(url)
                statuses.update((repeated.status_code, found.status_code))
                if (repeated.status_code, found.status_code) == (201, 200):
                    break
                await asyncio.sleep(0.01)  # nobody tells when Redis is there again
        assert statuses.keys() == {200, 201, 503}
        assert repeated.json()["url"] == url
        gate.open()
        assert joined(standard((await other.client.get(url)).content)) == "ab"
        assert len(grok.calls) == 1
