"""Many answers while readers, replicas, Redis and its network fail: each ends as it must, and why is known.

`CAMPAIGN=2000` for a long one.
"""

import asyncio
import os
import random
import secrets
from collections import Counter
from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import Any, NamedTuple

import httpx
import pytest

from tests.conftest import TIMEOUT, Service, SubprocessService, seen, spawned
from tests.readers import DONE, Event, Standard, joined
from tests.redis_servers import Link, RedisServer, needs_redis
from tests.replicas.fleets import JSON
from tests.upstream import Upstream, stream
from tests.wire.test_resume import code

pytestmark = [pytest.mark.anyio, needs_redis, pytest.mark.slow]

WORDS = [f"{number} " for number in range(30)]
TEXT = "".join(WORDS)

# Seconds after Redis has lost its memory in which each replica writes again what it has.
SETTLED = 3

# Seconds that a kept answer and a running one without readers live: longer than any reader here is away.
KEPT = 15


class Reading(NamedTuple):
    """What one reader got: its events, and how it ended: an error's code, `done`, or a status."""

    events: list[Event]
    end: str


async def read_to_the_end(services: Sequence[Service], url: str, chance: random.Random) -> Reading:
    """Read an answer by a reader that is cut off at random and comes back on any replica."""
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
                        return Reading(events, str(response.status_code))
                    assert response.status_code in (429, 503), body
                    await asyncio.sleep(0.2)
                    continue
                async for piece in response.aiter_raw():
                    for event in parser.feed(piece):
                        events.append(event)
                        if event.data == DONE:
                            return Reading(events, "done")
                        if event.type == "error":
                            return Reading(events, str(code(event)))
                    budget -= len(piece)
                    if budget < 0:
                        break
        except httpx.TransportError:
            await asyncio.sleep(0.1)


def still_kept(redis: RedisServer, prefix: str) -> list[str]:
    """The answers whose time to live somebody may still renew."""
    kept: list[str] = []
    for key in redis.everything():
        if key.endswith(":meta"):
            state, owner = redis.do("HMGET", key, "state", "owner")
            if state in (b"asking", b"running") and redis.do("EXISTS", f"{prefix}replica:{owner.decode()}"):
                kept.append(key)
    return kept


@pytest.mark.parametrize("answers", [int(os.environ.get("CAMPAIGN", "300"))])
async def test_campaign(grok: Upstream, answers: int) -> None:
    """Readers, replicas, Redis and its network fail at random: no wrong text, no hang, and every end has its cause."""
    chance = random.Random(7)  # noqa: S311 -- the same each time
    grok.set_scripts(stream(*(step for word in WORDS for step in (word, 0.03))))
    clock = asyncio.get_running_loop().time
    prefix = f"test:{secrets.token_hex(4)}:"
    shared: Any = {"redis_prefix": prefix, "replay_ttl": KEPT, "resume_window": KEPT, "grok_retries": 0}
    ends: Counter[str] = Counter()
    untrue: list[str] = []
    killed: dict[SubprocessService, float] = {}
    lost: list[float] = []  # when Redis lost its memory
    unanswered = 0  # requests that may have been paid, and have no answer
    async with RedisServer() as redis, AsyncExitStack() as stack:
        links = [await stack.enter_async_context(Link(redis.port).running()) for _ in range(3)]

        async def replica(place: int) -> SubprocessService:
            service = spawned(grok.url, redis_url=links[place].url, log_level="error", **shared)
            return await stack.enter_async_context(service)

        services = [await replica(place) for place in range(3)]
        await seen([service.port for service in services])
        places = asyncio.Semaphore(40)  # answers at one time
        over = asyncio.Event()

        async def one() -> None:
            nonlocal unanswered
            async with places:
                while True:
                    owner = chance.choice(services)
                    asked_at = clock()
                    try:
                        response = await owner.ask(headers=JSON)
                    except httpx.TransportError:
                        unanswered += 1
                    else:
                        if response.status_code == 201:
                            break
                        assert response.status_code == 503, response.text
                    await asyncio.sleep(0.2)
                async with asyncio.timeout(60):
                    events, end = await read_to_the_end(services, response.json()["url"], chance)
            texts = [event for event in events if event.type != "error"]
            assert [int(event.id.rpartition("-")[2]) for event in texts] == list(range(1, len(texts) + 1))
            said = joined(texts)
            assert TEXT.startswith(said)
            ends[end] += 1
            died = killed.get(owner)
            # Redis forgot it, and its owner had no time to write it again: then nobody knows of it any more.
            forgotten = died is not None and any(asked_at < at and died < at + SETTLED for at in lost)
            causes = {"done": said == TEXT, "upstream_cut_off": died is not None, "404": forgotten}
            if not causes.get(end, forgotten and end == "replay_lost"):
                untrue.append(f"{end} after {len(texts)}: asked {asked_at}, died {died}, Redis lost all at {lost}")

        async def replace(place: int) -> None:
            killed[services[place]] = clock()
            services[place].process.kill()
            await services[place].exit_code()
            services[place] = await replica(place)

        async def havoc() -> None:
            number = 0
            while not over.is_set():
                await asyncio.sleep(3)
                number += 1
                if number in (2, 4):
                    lost.append(clock())
                    await redis.restart()
                if number != 4:  # this time the owners have the time to write all of it again
                    await replace(number % 3)

        async def noise() -> None:
            while not over.is_set():
                link = chance.choice(links)
                await asyncio.sleep(chance.uniform(0.1, 0.5))
                if chance.random() < 0.5:
                    link.reset()
                else:
                    link.hold()
                    await asyncio.sleep(chance.uniform(0.05, 1.5))
                    link.go_on()

        wreck = [asyncio.create_task(havoc()), asyncio.create_task(noise())]
        async with asyncio.TaskGroup() as tasks:
            for _ in range(answers):
                tasks.create_task(one())
        over.set()
        await asyncio.gather(*wreck)
        assert untrue == []
        assert ends["done"] > answers / 3
        assert answers <= len(grok.calls) <= answers + unanswered
        async with asyncio.timeout(TIMEOUT):
            while still_kept(redis, prefix):  # noqa: ASYNC110 -- nobody tells when it is so
                await asyncio.sleep(0.1)
        left = redis.everything()
        assert {key: ttl for key, ttl in left.items() if not 0 <= ttl <= (KEPT + 60) * 1000} == {}
