"""Replicas that die, stop for a while, or are replaced: every reader gets a true end, and nothing is paid twice."""

import asyncio
import contextlib
import os
import secrets
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import httpx
import pytest

from tests.conftest import SubprocessService, seen, spawned
from tests.readers import Event, joined, standard
from tests.redis_servers import RedisServer, needs_redis
from tests.replicas.fleets import JSON, follow, number_of, start
from tests.upstream import HANG, Upstream, stream
from tests.wire.test_resume import code

pytestmark = [pytest.mark.anyio, needs_redis, pytest.mark.slow]

# Seconds from the death of a replica until its readers elsewhere must have been told.
TOLD_WITHIN = 10


@asynccontextmanager
async def processes(
    grok: Upstream, redis: RedisServer, count: int, **changes: object
) -> AsyncIterator[list[SubprocessService]]:
    """So many replicas, each a process of its own."""
    shared: Any = {"redis_url": redis.url, "redis_prefix": f"test:{secrets.token_hex(4)}:", **changes}
    async with AsyncExitStack() as stack:
        starting = [stack.enter_async_context(spawned(grok.url, **shared)) for _ in range(count)]
        services = [await each for each in starting]
        await seen([service.port for service in services])
        yield services


async def test_killed_owner(grok: Upstream) -> None:
    """Readers elsewhere are told that the answer was cut off, from wherever they read, and always the same."""
    grok.set_scripts(stream("a", "b", HANG))
    async with RedisServer() as redis, processes(grok, redis, 3) as (owner, other, third):
        url = await start(owner, Idempotency_Key="k")
        id = number_of(url)
        ahead = f"{id}-7"  # the owner may have told its own readers more than it could copy
        async with follow(other, url) as live, follow(third, url, ahead) as far:
            assert [(await live.event()).data for _ in "ab"] == ["a", "b"]
            # A server that was just reached does not know all leases.
            await asyncio.sleep(6)
            since = asyncio.get_running_loop().time()
            owner.process.kill()
            [cut] = await asyncio.wait_for(live.rest(), TOLD_WITHIN + 2)
            assert code(cut) == "upstream_cut_off"
            assert asyncio.get_running_loop().time() - since < TOLD_WITHIN
            assert await asyncio.wait_for(far.rest(), TOLD_WITHIN) == [cut]
        for service in (other, third):
            assert standard((await service.client.get(url)).content)[2:] == [cut]
            response = await service.client.get(url, headers={"Last-Event-ID": ahead})
            assert standard(response.content) == [cut]
            assert (await service.client.get(url, headers={"Last-Event-ID": cut.id})).status_code == 204
            # The key finds the end that there was; asking again is the client's decision.
            again = await service.ask(headers={**JSON, "Idempotency-Key": "k"})
            assert again.json()["url"] == url
        assert len(grok.calls) == 1


async def test_killed_before_the_status(grok: Upstream) -> None:
    """A key whose first try died with its replica before it had a status is free."""
    grok.set_scripts([HANG], stream("a"))
    async with RedisServer() as redis, processes(grok, redis, 2) as (owner, other):
        asked = asyncio.create_task(owner.ask(headers={**JSON, "Idempotency-Key": "k"}))
        await grok.call(0)
        owner.process.kill()
        with contextlib.suppress(httpx.TransportError):
            await asked
        await asyncio.sleep(7)  # the lease is over
        response = await other.ask(headers={**JSON, "Idempotency-Key": "k"})
        assert response.status_code == 201
        assert joined(standard((await other.client.get(response.json()["url"])).content)) == "a"
        assert len(grok.calls) == 2


async def test_owner_that_was_away(grok: Upstream) -> None:
    """A replica that slept finds its answer ended by others: its readers there read on, but nobody is told two ends."""
    grok.set_scripts(stream("a", HANG))
    async with RedisServer() as redis, processes(grok, redis, 2) as (owner, other):
        url = await start(owner)
        async with follow(other, url) as live:
            await live.event()
            await asyncio.sleep(6)
            os.kill(owner.pid, signal.SIGSTOP)
            try:
                [cut] = await asyncio.wait_for(live.rest(), TOLD_WITHIN + 2)
            finally:
                os.kill(owner.pid, signal.SIGCONT)
            assert code(cut) == "upstream_cut_off"
        # With nobody who reads there, it hangs up.
        await grok.calls[0].hung_up(within=20)
        for service in (owner, other):
            async with asyncio.timeout(10):
                while standard((await service.client.get(url)).content) != [Event("a", id=f"{number_of(url)}-1"), cut]:
                    pass
