"""Replicas that die, stop for a while, or are replaced: every reader gets a true end, and nothing is paid twice."""

import asyncio
import contextlib
import os
import random
import secrets
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import httpx
import pytest

from tests.conftest import Service, SubprocessService, seen, spawned
from tests.readers import DONE, Event, Standard, joined, standard
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


async def _read_to_the_end(services: Sequence[Service], url: str, chance: random.Random) -> tuple[list[Event], str]:
    """All events, by a reader that is cut off at random and comes back on any replica; and how it ended."""
    events: list[Event] = []
    parser = Standard()
    while True:
        service = chance.choice(services)
        budget = chance.choice((30, 200, 1000, 10**9))
        try:
            headers = {"Last-Event-ID": parser.last_event_id} if parser.last_event_id else {}
            parser = Standard()
            parser.last_event_id = headers.get("Last-Event-ID", "")
            async with service.client.stream("GET", url, headers=headers) as response:
                if response.status_code != 200:
                    body = await response.aread()
                    if response.status_code in (204, 404):
                        return events, str(response.status_code)
                    assert response.status_code in (429, 503), body
                    await asyncio.sleep(0.2)
                    continue
                async for piece in response.aiter_raw():
                    for event in parser.feed(piece):
                        events.append(event)
                        if event.data == DONE:
                            return events, "done"
                        if event.type == "error":
                            return events, str(code(event))
                    budget -= len(piece)
                    if budget < 0:
                        break
        except httpx.TransportError:
            await asyncio.sleep(0.1)


@pytest.mark.parametrize("answers", [int(os.environ.get("CAMPAIGN", "300"))])
async def test_campaign(grok: Upstream, answers: int) -> None:
    """Readers reset, replicas killed, Redis restarted, all at random: no wrong text, no hang, every end true."""
    chance = random.Random(7)  # noqa: S311 -- the same each time
    words = [f"{number} " for number in range(30)]
    text = "".join(words)
    grok.set_scripts(stream(*(step for word in words for step in (word, 0.03))))
    ends: dict[str, int] = {}
    changes = {"replay_ttl": 5, "resume_window": 5, "grok_retries": 0, "log_level": "error"}
    async with RedisServer() as redis, AsyncExitStack() as stack:
        prefix = f"test:{secrets.token_hex(4)}:"
        shared: Any = {"redis_url": redis.url, "redis_prefix": prefix, **changes}
        services = [await stack.enter_async_context(spawned(grok.url, **shared)) for _ in range(3)]
        await seen([service.port for service in services])
        places = asyncio.Semaphore(40)
        asked = 0
        over = asyncio.Event()

        async def one() -> None:
            nonlocal asked
            async with places:
                while True:
                    try:
                        response = await chance.choice(services).ask(headers=JSON)
                    except httpx.TransportError:
                        response = None
                    if response is not None and response.status_code == 201:
                        break
                    await asyncio.sleep(0.2)
                asked += 1
                async with asyncio.timeout(40):
                    events, end = await _read_to_the_end(services, response.json()["url"], chance)
                ids = [int(event.id.rpartition("-")[2]) for event in events if event.type != "error"]
                assert ids == list(range(1, len(ids) + 1))
                said = joined([event for event in events if event.type != "error"])
                assert text.startswith(said)
                if end == "done":
                    assert said == text
                ends[end] = ends.get(end, 0) + 1

        async def havoc() -> None:
            number = 0
            while not over.is_set():
                await asyncio.sleep(3)
                number += 1
                if number in (2, 4):
                    await redis.restart()
                place = number % len(services)
                services[place].process.kill()
                await services[place].exit_code()
                services[place] = await stack.enter_async_context(spawned(grok.url, **shared))

        wreck = asyncio.create_task(havoc())
        async with asyncio.TaskGroup() as tasks:
            for _ in range(answers):
                tasks.create_task(one())
        over.set()
        await wreck
        assert asked == answers
        # 404: Redis was restarted just after the owner had died, so nobody knows of it any more.
        assert set(ends) <= {"done", "upstream_cut_off", "replay_lost", "404", "204", "abandoned"}
        assert ends["done"] > answers / 3
        assert len(grok.calls) <= answers + 60  # those whose replica died before it could say where
        assert -1 not in redis.everything().values()
        async with asyncio.timeout(100):
            while any("{" in key for key in redis.everything()):  # noqa: ASYNC110 -- nobody tells when it is so
                await asyncio.sleep(0.5)
