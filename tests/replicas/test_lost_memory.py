"""Redis comes back with an empty memory before the owner of an answer does."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from chatproxy.config.timing import Timing
from tests.conftest import TIMEOUT, InProcessService, Service, seen, serving
from tests.readers import DONE, joined, standard
from tests.redis_servers import Link, RedisServer, needs_redis
from tests.replicas.fleets import JSON, becomes, follow, number_of, start
from tests.upstream import Gate, Upstream, stream

pytestmark = [pytest.mark.anyio, needs_redis]

PREFIX = "lost:"


@asynccontextmanager
async def two(
    grok: Upstream, timing: Timing
) -> AsyncIterator[tuple[RedisServer, Link, InProcessService, InProcessService]]:
    """A Redis, the link of the first replica to it, that replica, and another one."""
    async with (
        RedisServer() as redis,
        Link(redis.port).running() as link,
        serving(grok.url, timing, redis_url=link.url, redis_prefix=PREFIX) as owner,
        serving(grok.url, timing, redis_url=redis.url, redis_prefix=PREFIX) as other,
    ):
        await seen([owner.port, other.port])
        yield redis, link, owner, other


async def lose_memory(redis: RedisServer, link: Link, other: Service) -> None:
    """Hold the link, and start Redis anew; the other replica has noticed it."""
    link.hold()
    await redis.stop()
    await becomes(other, "/readyz", "unavailable")
    await redis.start()
    await becomes(other, "/metrics", "chatproxy_store_available 1.0")


async def test_owner_comes_back_later(grok: Upstream) -> None:
    """A reader elsewhere of an answer that counts as complete waits for its owner, too, and loses nothing."""
    gate = Gate()
    grok.set_scripts(stream("a", gate, "b"))
    seldom = Timing(sweep_interval=5)  # nobody looks in between
    async with two(grok, seldom) as (redis, link, owner, other):
        url = await start(owner)
        async with follow(other, url) as there:
            assert (await there.event()).data == "a"
            meta = f"{PREFIX}{{{number_of(url)}}}:meta"
            redis.do("HSET", meta, "state", "ended")
            assert (await other.client.head(url)).status_code == 200
            redis.do("HSET", meta, "state", "running")
            await lose_memory(redis, link, other)
            async with asyncio.timeout(TIMEOUT):
                while "cmdstat_xrange" not in redis.do("INFO", "commandstats"):  # noqa: ASYNC110 -- nobody tells
                    await asyncio.sleep(0.02)
            assert (await other.client.head(url)).status_code == 503
            link.go_on()
            gate.open()
            assert [event.data for event in await there.rest()] == ["b", DONE]


async def test_replica_that_starts_later(grok: Upstream) -> None:
    """A replica that was not there when it happened knows of it from the others: nothing is unknown, or paid twice."""
    gate = Gate()
    grok.set_scripts(stream("a", gate, "b"))
    patient = Timing(lease=4)
    async with two(grok, patient) as (redis, link, owner, witness):
        url = await start(owner, Idempotency_Key="one")
        await lose_memory(redis, link, witness)
        async with serving(grok.url, patient, redis_url=redis.url, redis_prefix=PREFIX) as late:
            await seen([late.port])
            again = {**JSON, "Idempotency-Key": "one"}
            assert (await late.client.head(url)).status_code == 503
            assert (await late.ask(headers=again)).status_code == 503
            link.go_on()
            async with asyncio.timeout(TIMEOUT):
                while (await late.client.head(url)).status_code == 503:  # noqa: ASYNC110 -- nobody tells
                    await asyncio.sleep(0.02)
                while (repeated := await late.ask(headers=again)).status_code == 503:  # noqa: ASYNC110 -- the same
                    await asyncio.sleep(0.02)
            assert repeated.json()["url"] == url
            gate.open()
            assert joined(standard((await late.client.get(url)).content)) == "ab"
        assert len(grok.calls) == 1
