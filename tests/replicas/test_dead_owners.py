"""Answers whose replica is dead, as Redis shows them: they are planted there, so nothing has to be killed."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from chatproxy.config.timing import Timing
from tests.readers import standard
from tests.redis_servers import RedisServer, engines, needs_redis
from tests.replicas.fleets import BRISK, becomes, fleet
from tests.upstream import Upstream
from tests.wire.test_resume import code

pytestmark = [pytest.mark.anyio, needs_redis]

ID = "A" * 22
URL = f"/api/chat/{ID}/stream"


@pytest.fixture(scope="module", params=engines)
async def redis(request: pytest.FixtureRequest) -> AsyncIterator[RedisServer]:
    async with RedisServer(request.param) as redis:
        yield redis


def plant(redis: RedisServer, prefix: str, state: str) -> None:
    """An answer of a replica that has no lease."""
    fields = {"version": "1", "owner": "dead", "digest": "d", "request": "r", "named": "0", "format": "plain"}
    meta = f"{prefix}{{{ID}}}:meta"
    redis.do("HSET", meta, "state", state, *(part for pair in fields.items() for part in pair))
    redis.do("EXPIRE", meta, 60)


async def test_died_before_its_status_was_told(grok: Upstream, redis: RedisServer) -> None:
    """Whoever reads an answer whose replica died while it asked is told so, and does not wait for a status first."""
    prefix = "asking:"
    async with fleet(grok, redis, 1, BRISK, redis_prefix=prefix, status_hold=60) as (service,):
        plant(redis, prefix, "asking")
        response = await asyncio.wait_for(service.client.get(URL), 8)
        assert [code(event) for event in standard(response.content)] == ["upstream_cut_off"]
        assert redis.do("HGET", f"{prefix}{{{ID}}}:meta", "state") == b"ended"


async def test_dead_while_connections_are_lost(grok: Upstream, redis: RedisServer) -> None:
    """A replica that loses its connection to Redis every other second finds out all the same that another is dead."""
    prefix = "resets:"
    async with fleet(grok, redis, 1, Timing(lease=3, sweep_interval=0.2), redis_prefix=prefix) as (service,):
        plant(redis, prefix, "running")
        reading = asyncio.create_task(service.client.get(URL))
        for _ in range(4):
            await asyncio.wait([reading], timeout=1.5)
            redis.do("CLIENT", "KILL", "TYPE", "normal")
        response = await asyncio.wait_for(reading, 1)
        assert [code(event) for event in standard(response.content)] == ["upstream_cut_off"]
        await becomes(service, "/readyz", "ok")
