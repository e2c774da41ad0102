"""Budgets of all replicas together: one edge, one bill, whatever becomes of Redis and of a replica."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator

import httpx
import pytest

from chatproxy.config.timing import Timing
from tests.conftest import TIMEOUT, Service, refusal, serving
from tests.redis_servers import RedisServer, engines, needs_redis
from tests.replicas.fleets import BRISK, becomes, fleet
from tests.upstream import DONE, HANG, Gate, Upstream, chunk, error, frame, sse, stream
from tests.wire.test_budgets import answer, common, denied, finish, left, own, settled, spent, usage

pytestmark = [pytest.mark.anyio, needs_redis]


@pytest.fixture(scope="module", params=engines)
async def redis(request: pytest.FixtureRequest) -> AsyncIterator[RedisServer]:
    async with RedisServer(request.param) as redis:
        yield redis


async def back(service: Service) -> None:
    """Wait until the service has its Redis again."""
    async with asyncio.timeout(TIMEOUT):
        while "unavailable" in (await service.client.get("/readyz")).text:  # noqa: ASYNC110 -- nobody tells when
            await asyncio.sleep(0.02)


async def booked(service: Service, tokens: int) -> None:
    """Wait until at least so many are booked."""
    async with asyncio.timeout(TIMEOUT):
        while (await spent(service))[0] < tokens:  # noqa: ASYNC110 -- nobody tells when
            await asyncio.sleep(0.02)


async def answered(service: Service) -> httpx.Response:
    """What a chat gets once Redis has answered in time, for which a busy machine may need another try."""
    while (response := await service.ask()).status_code == 503:
        assert refusal(response)["code"] == "store_unavailable"
    return response


async def test_edge_of_all(grok: Upstream, redis: RedisServer) -> None:
    """Two hundred chats at once on two replicas get what fits into the budget, and then one answer more at most."""
    gate = Gate()
    grok.set_scripts(sse(gate, frame(chunk({"content": "a"})), finish(usage(40, 9960)), DONE))
    async with fleet(grok, redis, 2, BRISK, **own("15000/day")) as replicas:
        asking = [asyncio.create_task(answered(replicas[number % 2])) for number in range(200)]
        async with asyncio.timeout(20):
            while sum(task.done() for task in asking) < 198:  # noqa: ASYNC110 -- two of 6,000 fit
                await asyncio.sleep(0.01)
        gate.open()
        statuses = Counter([(await task).status_code for task in asking])
        assert statuses == {200: 2, 429: 198}
        for service in replicas:
            async with asyncio.timeout(5):
                while denied(await answered(service)) == 10:  # noqa: ASYNC110 -- nobody tells when
                    await asyncio.sleep(0.01)
        assert len(grok.calls) == 2


async def test_one_bill(grok: Upstream, redis: RedisServer) -> None:
    """What one replica has booked is spent on the others, on those that start later, and after all have stopped."""
    grok.set_scripts(answer(counts=usage(40, 10)))
    settings = {"redis_prefix": "bill:", **common("60000/day"), **own("50000/day")}
    async with fleet(grok, redis, 2, BRISK, **settings) as replicas:
        for service in replicas:
            assert (await service.ask()).status_code == 200
            await settled(service)
        again = await replicas[0].ask()
        await settled(replicas[0])
        assert (await settled(replicas[0]))[0] == 150
        assert left(again) > 50_000 - 100 - 7000
    async with fleet(grok, redis, 1, BRISK, **settings) as (later,):
        assert left(await later.ask()) < 50_000 - 150 - 4000
        assert (await settled(later))[0] == 200
    assert {key: ttl for key, ttl in redis.everything().items() if ttl <= 0} == {}
    assert {key.split(":")[1] for key in redis.everything() if key.startswith("bill:")} <= {"tokens", "replica"}
    assert not any("127.0.0.1" in key for key in redis.everything())


async def test_stopped_replica(grok: Upstream, redis: RedisServer) -> None:
    """A replica that is stopped books what it had running."""
    grok.set_scripts(stream("a", HANG))
    settings = {"redis_prefix": "stopped:", **common("100000/day")}
    async with fleet(grok, redis, 1, BRISK, **settings) as (other,):
        async with fleet(grok, redis, 1, BRISK, drain_timeout=0, **settings) as (service,), service.asking() as live:
            await live.event()
        grok.set_scripts(answer(counts=usage(40, 10)))
        assert (await other.ask()).status_code == 200
        assert (await settled(other))[0] > 2000


async def test_dead_replica(grok: Upstream, redis: RedisServer) -> None:
    """What a replica that died had reserved counts as used: its answers are not free."""
    grok.set_scripts(answer(counts=usage(40, 10)))
    async with fleet(grok, redis, 1, BRISK, redis_prefix="dead:", **common("100000/day")) as (service,):
        assert (await service.ask()).status_code == 200
        await settled(service)
        [key] = [key for key in redis.everything() if key.startswith("dead:") and key.endswith(":reserved")]
        redis.do("HSET", key, "another", 7000, "#another", 3)
        redis.do("SET", "dead:replica:another", "1", "PX", 200)
        assert (await service.ask()).status_code == 200
        assert (await spent(service))[0] < 7000
        await asyncio.sleep(BRISK.lease + 0.1)
        assert (await service.ask()).status_code == 200
        assert (await settled(service))[0] == 7150
        assert redis.do("HEXISTS", key, "another") == redis.do("HEXISTS", key, "#another") == 0


async def test_leases_lost_at_once(grok: Upstream, redis: RedisServer) -> None:
    """After Redis was away, replicas that had no time to come back do not count as dead."""
    grok.set_scripts(answer(counts=usage(40, 10)))
    settings = {"redis_prefix": "leases:", **common("100000/day")}
    async with fleet(grok, redis, 1, BRISK, **settings) as (service,):
        assert (await service.ask()).status_code == 200
        await settled(service)
        await asyncio.sleep(BRISK.lease)
        [key] = [key for key in redis.everything() if key.startswith("leases:") and key.endswith(":reserved")]
        redis.do("CLIENT", "KILL", "TYPE", "normal")
        await becomes(service, "/readyz", '"store":"unavailable"')
        redis.do("HSET", key, "another", 7000)
        await back(service)
        assert (await service.ask()).status_code == 200
        async with asyncio.timeout(TIMEOUT):
            while (await spent(service))[:2] != (100, 7000):  # noqa: ASYNC110 -- nobody tells when
                await asyncio.sleep(0.02)


async def test_reserving_shows_life(grok: Upstream, redis: RedisServer) -> None:
    """A replica that reserves is alive, though it has not renewed its lease in time."""
    drowsy = Timing(lease=1.2, sweep_interval=60)
    gate = Gate()
    grok.set_scripts(sse(gate, frame(chunk({"content": "a"})), finish(usage(40, 10)), DONE), answer(counts=usage(50)))
    async with fleet(grok, redis, 2, drowsy, redis_prefix="life:", **common("100000/day")) as (first, second):
        await asyncio.sleep(drowsy.lease + 0.1)
        assert not [key for key in redis.everything() if key.startswith("life:replica:")]
        running = asyncio.create_task(first.ask())
        await grok.call()
        assert (await second.ask()).status_code == 200
        gate.open()
        assert (await running).status_code == 200
        await booked(first, 100)
        assert (await spent(first))[0] == 100


async def test_window_of_all(grok: Upstream, redis: RedisServer) -> None:
    """The window ends for all replicas at once, and what is shown of it does too, though nobody asks."""
    grok.set_scripts(answer(counts=usage(40, 60)))
    settings = {"redis_prefix": "window:", **common("100/day"), **own("100/day")}
    async with fleet(grok, redis, 2, BRISK, **settings) as (first, second):
        assert (await first.ask()).status_code == 200
        await booked(first, 100)
        for key in redis.everything():
            if key.startswith("window:") and key.endswith(":used"):
                redis.do("PEXPIRE", key, 2000)
        assert denied(await second.ask()) <= 2
        assert (await spent(second))[0] == 100
        async with asyncio.timeout(TIMEOUT):
            while (await spent(second))[0]:  # noqa: ASYNC110 -- nobody tells when
                await asyncio.sleep(0.02)
        assert (await second.ask()).status_code == 200


async def test_foreign_key(grok: Upstream, redis: RedisServer) -> None:
    """A key that is not ours holds up the bookings of nobody else, and what it held up is booked once it is gone."""
    gate = Gate()
    slow = sse(frame(chunk({"content": "a"})), gate, finish(usage(40, 10)), DONE)
    grok.set_scripts(slow, answer(counts=usage(40, 60)))
    settings = {"redis_prefix": "foreign:", **own("50000/day")}
    one, another = ({"X-Forwarded-For": f"203.0.113.{number}"} for number in range(2))
    async with fleet(grok, redis, 1, BRISK, **settings) as (service,):

        def used() -> list[str]:
            return [key for key in redis.everything() if key.startswith("foreign:") and key.endswith(":used")]

        async with service.asking(headers=one) as live:
            await live.event()
            [key] = used()
            redis.do("DEL", key)
            redis.do("RPUSH", key, "x")
            gate.open()
            await live.rest()
        assert (await service.ask(headers=one)).status_code == 503
        for _ in range(2):
            assert (await service.ask(headers=another)).status_code == 200
        [its] = [name for name in used() if name != key]
        async with asyncio.timeout(TIMEOUT):
            while redis.do("GET", its) != b"200":  # noqa: ASYNC110 -- nobody tells when
                await asyncio.sleep(0.02)
        redis.do("DEL", key)
        async with asyncio.timeout(TIMEOUT):
            while redis.do("GET", key) != b"50":  # noqa: ASYNC110 -- nobody tells when
                await asyncio.sleep(0.02)


@pytest.mark.parametrize("policy", ["closed", "open"])
async def test_without_redis(grok: Upstream, policy: str) -> None:
    """While Redis is away a budget lets nobody in, or each replica counts by itself; what was used is booked later."""
    grok.set_scripts(answer(counts=usage(40, 10)))
    async with (
        RedisServer() as redis,
        fleet(grok, redis, 1, BRISK, limits_without_redis=policy, **common("100000/day"), **own("8000/day")) as (
            service,
        ),
    ):
        assert (await service.ask()).status_code == 200
        await settled(service)
        await redis.stop()
        await becomes(service, "/readyz", '"store":"unavailable"')
        response = await service.ask()
        if policy == "closed":
            assert (response.status_code, refusal(response)["code"]) == (503, "store_unavailable")
        else:
            assert response.status_code == 200
            gate = Gate()
            slow = sse(frame(chunk({"content": "a"})), gate, finish(usage(40, 960)), DONE)
            grok.set_scripts(slow, answer(counts=usage(40, 10)))
            async with service.asking() as live:
                await live.event()
                assert denied(await service.ask()) == 10
                gate.open()
                await live.rest()
        await redis.start()
        await back(service)
        assert (await service.ask()).status_code == 200
        await booked(service, 50 if policy == "closed" else 1100)
        assert (await settled(service))[0] == (50 if policy == "closed" else 1100)  # the first is forgotten


async def test_lost_replies(grok: Upstream) -> None:
    """A booking of which nobody knows whether it has arrived is sent again, and counts once."""
    gate = Gate()
    grok.set_scripts(sse(frame(chunk({"content": "a"})), gate, finish(usage(40, 960)), DONE), answer(counts=usage(1)))
    async with RedisServer() as redis, fleet(grok, redis, 1, BRISK, **common("100000/day")) as (service,):
        async with service.asking() as live:
            await live.event()
            redis.pause()
            gate.open()
            await live.rest()
            await becomes(service, "/readyz", '"store":"unavailable"')
            redis.go_on()
        await back(service)
        assert (await service.ask()).status_code == 200
        await booked(service, 1001)
        assert (await settled(service))[0] == 1001


async def test_refused_reservations(grok: Upstream, redis: RedisServer) -> None:
    """What is refused, by the budget, by Grok, or for want of a place, stays reserved nowhere."""
    grok.set_scripts(error(400, {"error": "x"}))
    async with fleet(grok, redis, 2, BRISK, **common("8000/day"), **own("7000/day")) as replicas:
        for service in replicas * 3:
            assert (await service.ask()).status_code == 502
            await settled(service)
        gate = Gate()
        grok.set_scripts(stream("a", gate))
        async with replicas[0].asking() as live:
            await live.event()
            for _ in range(3):
                assert denied(await replicas[1].ask()) == 10
            gate.open()
            await live.rest()
        await settled(replicas[0])
        assert (await spent(replicas[0]))[1] == 0


async def test_full_memory(grok: Upstream) -> None:
    """Where Redis has no room for a booking, it is told again once there is."""
    grok.set_scripts(answer(counts=usage(40, 10)))
    async with (
        RedisServer() as redis,
        serving(grok.url, BRISK, redis_url=redis.url, **common("100000/day")) as service,
    ):
        await becomes(service, "/readyz", '"ok"')
        gate = Gate()
        grok.set_scripts(
            sse(frame(chunk({"content": "a"})), gate, finish(usage(40, 10)), DONE), answer(counts=usage(1))
        )
        async with service.asking() as live:
            await live.event()
            redis.do("CONFIG", "SET", "maxmemory", 1)
            gate.open()
            await live.rest()
            await asyncio.sleep(0.1)
        assert (await service.ask()).status_code == 503
        redis.do("CONFIG", "SET", "maxmemory", 0)
        await booked(service, 50)
        assert (await service.ask()).status_code == 200
        await booked(service, 51)
