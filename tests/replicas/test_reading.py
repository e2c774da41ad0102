"""An answer is read on any replica as on the one that asks Grok: every event as it comes, once, to the same end."""

import asyncio
import random
from collections.abc import AsyncIterator

import pytest

from tests.conftest import InProcessService
from tests.readers import DONE, Event, joined, standard
from tests.redis_servers import RedisServer, engines, needs_redis
from tests.replicas.fleets import BRISK, becomes, fleet, follow, number_of, start, until
from tests.upstream import CLOSE, HANG, Gate, Upstream, error, stream
from tests.wire.test_resume import TEXT, TOKENS, code, repost

pytestmark = [pytest.mark.anyio, needs_redis]


@pytest.fixture(scope="module", params=engines)
async def redis(request: pytest.FixtureRequest) -> AsyncIterator[RedisServer]:
    async with RedisServer(request.param) as redis:
        yield redis


@pytest.fixture(scope="module")
async def replicas(grok: Upstream, redis: RedisServer) -> AsyncIterator[list[InProcessService]]:
    async with fleet(grok, redis, 3, resume_window=0.6, replay_ttl=2) as replicas:
        yield replicas


async def test_as_it_comes(grok: Upstream, replicas: list[InProcessService]) -> None:
    """A reader elsewhere sees each event before Grok sends the next one."""
    gates = [Gate() for _ in range(5)]
    grok.set_scripts(stream(*[step for number, gate in enumerate(gates) for step in (f"{number}", gate)]))
    owner, other, _ = replicas
    url = await start(owner)
    async with follow(other, url) as live:
        for number, gate in enumerate(gates):
            assert await live.event() == Event(f"{number}", id=f"{number_of(url)}-{number + 1}")
            gate.open()
        assert await live.rest() == [Event(DONE, id=f"{number_of(url)}-6")]
    assert len(grok.calls) == 1


async def test_from_every_position(grok: Upstream, replicas: list[InProcessService]) -> None:
    """After any event the rest is the same on every replica, byte by byte; after the last one there is nothing."""
    grok.set_scripts(stream(*TOKENS))
    owner, *others = replicas
    url = await start(owner)
    events = standard((await owner.client.get(url)).content)
    assert joined(events) == TEXT
    for position in range(0, len(events) - 1, 7):
        headers = {"Last-Event-ID": events[position].id}
        there, *here = [await service.client.get(url, headers=headers) for service in (owner, *others)]
        assert [response.content for response in here] == [there.content] * 2
    for service in others:
        assert (await service.client.get(url, headers={"Last-Event-ID": events[-1].id})).status_code == 204


async def test_many_at_once_over_replicas(grok: Upstream, redis: RedisServer) -> None:
    """Sixty answers, each read on all replicas at the same time, by readers that come at any time, are exact."""
    chance = random.Random(1)  # noqa: S311 -- the same each time
    grok.set_scripts(stream(*[step for token in TOKENS[:60] for step in (token, 0.001)]))

    async def one(replicas: list[InProcessService]) -> set[str]:
        url = await start(chance.choice(replicas))
        await asyncio.sleep(chance.random() * 0.1)
        responses = await asyncio.gather(*(service.client.get(url) for service in replicas))
        assert {standard(response.content)[-1].data for response in responses} == {DONE}
        assert len({response.content for response in responses}) == 1
        return {joined(standard(response.content)) for response in responses}

    async with fleet(grok, redis, 3) as replicas:
        texts = await asyncio.gather(*(one(replicas) for _ in range(60)))
    assert set.union(*texts) == {"".join(TOKENS[:60]).replace("\r", "\n")}


async def test_failed_elsewhere(grok: Upstream, replicas: list[InProcessService]) -> None:
    """The end that is told is the one that it was, and nothing lies after it."""
    grok.set_scripts(stream("a", CLOSE))
    url = await start(replicas[0])
    for service in replicas:
        _, failed = standard((await service.client.get(url)).content)
        assert code(failed) == "upstream_cut_off"
        assert (await service.client.get(url, headers={"Last-Event-ID": failed.id})).status_code == 204


async def test_repost_before_the_end_is_copied(
    grok: Upstream, redis: RedisServer, replicas: list[InProcessService]
) -> None:
    """Who has read the end, and asks another replica for what follows, gets it again, though Redis learns it later."""
    gate = Gate()
    grok.set_scripts(stream("a", gate, CLOSE))
    owner, other, _ = replicas
    url = await start(owner)
    async with follow(other, url) as elsewhere, follow(owner, url) as live:
        await elsewhere.event()
        redis.do("CLIENT", "PAUSE", 200, "WRITE")
        gate.open()
        _, failed = await live.rest()
        assert await repost(other, failed.id) == [failed]


async def test_failure_after_the_hold_elsewhere(grok: Upstream, redis: RedisServer) -> None:
    """Who reads before Grok has said anything is told of a refusal that comes late."""
    gate = Gate()
    grok.set_scripts([gate, *error(401, {"error": "x"})])
    async with fleet(grok, redis, status_hold=0.05, keep_alive=0.1) as (owner, other):
        url = await start(owner)
        async with follow(other, url) as live:
            await live.comment()
            gate.open()
            assert code(await live.event()) == "upstream_auth"
            assert await live.rest() == []


async def test_large_frames(grok: Upstream, replicas: list[InProcessService]) -> None:
    """What is too large to be published is read all the same, at once."""
    gate = Gate()
    large = "x" * 200_000
    grok.set_scripts(stream("a", gate, large, "b"))
    url = await start(replicas[0])
    async with follow(replicas[1], url) as live:
        await live.event()
        gate.open()
        assert [event.data for event in await live.rest()] == [large, "b", DONE]


async def test_positions_beyond_the_copy(grok: Upstream, replicas: list[InProcessService]) -> None:
    """While an answer runs, a reader may be ahead of the copy, and waits; what never was is refused after the end."""
    gate = Gate()
    grok.set_scripts(stream("a", gate, "b", "c"))
    url = await start(replicas[0])
    async with follow(replicas[1], url, f"{number_of(url)}-2") as live:
        gate.open()
        assert [event.data for event in await live.rest()] == ["c", DONE]
    response = await replicas[1].client.get(url, headers={"Last-Event-ID": f"{number_of(url)}-5"})
    assert response.json()["error"]["code"] == "invalid_last_event_id"


async def test_position_that_never_comes(grok: Upstream, replicas: list[InProcessService]) -> None:
    """Who waits for an event that never comes is told so at the end, and does not hang."""
    gate = Gate()
    grok.set_scripts(stream("a", gate))
    url = await start(replicas[0])
    async with follow(replicas[1], url, f"{number_of(url)}-99") as live:
        gate.open()
        assert [code(event) for event in await live.rest()] == ["replay_lost"]


@pytest.mark.parametrize("how", ["delete", "stop"])
async def test_stopped_from_elsewhere(grok: Upstream, replicas: list[InProcessService], how: str) -> None:
    """Stopping on any replica hangs up Grok at once, and every reader is told."""
    grok.set_scripts(stream("a", HANG))
    url = await start(replicas[0])
    async with follow(replicas[1], url) as live:
        await live.event()
        path = url.removesuffix("/stream")
        client = replicas[2].client
        response = await (client.delete(path) if how == "delete" else client.post(f"{path}/stop"))
        assert response.status_code == 204
        await grok.calls[0].hung_up(within=2)
        assert [code(event) for event in await live.rest()] == ["stopped"]
    for service in replicas:
        assert (await service.client.delete(path)).status_code == 204
        assert (await service.client.delete("/api/chat/AAAAAAAAAAAAAAAAAAAAAA")).status_code == 204
        assert (await service.client.delete("/api/chat/unknown")).status_code == 204


async def test_stop_that_nobody_heard(grok: Upstream, redis: RedisServer, replicas: list[InProcessService]) -> None:
    """A request to stop that was not heard of is found by the owner's next look."""
    grok.set_scripts(stream("a", HANG))
    url = await start(replicas[0])
    prefix = replicas[0].settings.redis_prefix
    redis.do("SET", f"{prefix}{{{number_of(url)}}}:stop", "1", "EX", 60)
    await grok.calls[0].hung_up(within=2)


async def test_readers_elsewhere_count(grok: Upstream, replicas: list[InProcessService]) -> None:
    """A reader on another replica keeps Grok going; the window begins when the last one has left."""
    grok.set_scripts(stream("a", HANG))
    url = await start(replicas[0])
    async with follow(replicas[1], url) as live:
        await live.event()
        with pytest.raises(TimeoutError):
            await grok.calls[0].hung_up(within=2)
    since = asyncio.get_running_loop().time()
    assert 0.5 < await grok.calls[0].hung_up(within=4) - since < 2.5
    assert [code(event) for event in standard((await replicas[2].client.get(url)).content)[1:]] == ["abandoned"]


async def test_drained_owner(grok: Upstream, redis: RedisServer) -> None:
    """When the owner stops, its readers elsewhere are told as its own are, and what is kept can still be read there."""
    grok.set_scripts(stream("a", HANG))
    async with fleet(grok, redis, 1, redis_prefix="drained:") as (other,):
        async with fleet(grok, redis, 1, redis_prefix="drained:", drain_timeout=0.1) as (owner,):
            url = await start(owner)
            reading = asyncio.create_task(other.client.get(url))
            await becomes(other, "/metrics", "chatproxy_store_available 1.0")
        events = standard((await reading).content)
        assert [event.data for event in events[:-1]] == ["a"]
        assert code(events[-1]) == "draining"
        assert standard((await other.client.get(url)).content) == events


async def test_chat_ids_over_replicas(grok: Upstream, replicas: list[InProcessService]) -> None:
    """What `useChat` asks for by its chat's id is found on any replica, until somebody has read it to its end."""
    gate = Gate()
    grok.set_scripts(stream("a", gate, "b"))
    id = "0f8fad5b-d9cb-469f-a165-70867728950e"
    message = {"id": "1", "role": "user", "parts": [{"type": "text", "text": "Hi"}]}
    owner, other, third = replicas
    body = {"id": id, "messages": [message], "trigger": "submit-message", "resumable": True}
    url = f"/api/chat/{id}/stream"
    assert (await other.client.get(url)).status_code == 204
    async with owner.client.stream("POST", "/api/chat", json=body) as response:
        assert response.status_code == 200
        await gate.reached.wait()
    async with follow(other, url) as one, follow(third, url) as another:
        gate.open()
        events = await one.rest()
        assert await another.rest() == events
        assert '"delta":"b"' in "".join(event.data for event in events)
    for service in replicas:
        await until(service.client, url, 204)


async def test_nothing_is_left_over_replicas(grok: Upstream, redis: RedisServer) -> None:
    """Every key has the prefix and a time to live from the start; none tells what anybody said; none is left."""
    gate = Gate()
    grok.set_scripts(stream("a", gate))
    limits = {"rate_limit": "100/second", "max_streams_per_client": 50}
    async with fleet(grok, redis, 2, BRISK, redis_prefix="left:", replay_ttl=0.5, **limits) as (owner, other):
        url = await start(owner, "secret words", Idempotency_Key="secret key")
        await gate.reached.wait()
        keys = {key: left for key, left in redis.everything().items() if key.startswith("left:")}
        assert len(keys) >= 6
        assert all(0 < left <= 100_000 for left in keys.values())
        assert not [key for key in keys if "secret" in key or "127.0.0" in key]
        gate.open()
        await other.client.get(url)
        await until(other.client, url, 404)
        assert not [key for key in redis.everything() if number_of(url) in key or "left:key" in key]


async def test_names_without_redis(grok: Upstream) -> None:
    """While Redis is away a chat's id finds what is here, and what may be elsewhere is unavailable."""
    gate = Gate()
    grok.set_scripts(stream("a", gate))
    id = "1f8fad5b-d9cb-469f-a165-70867728950e"
    message = {"id": "1", "role": "user", "parts": [{"type": "text", "text": "Hi"}]}
    body = {"id": id, "messages": [message], "trigger": "submit-message", "resumable": True}
    url = f"/api/chat/{id}/stream"
    async with RedisServer() as redis, fleet(grok, redis, redis_prefix="names:") as (owner, other):
        async with owner.client.stream("POST", "/api/chat", json=body) as response:
            assert response.status_code == 200
            await gate.reached.wait()
        [key] = [key for key in redis.everything() if key.startswith("names:name:")]
        # Where the name leads nowhere, what is here counts.
        for planted in (("DEL", key), ("SET", key, "A" * 22), ("SET", key, "*")):
            redis.do(*planted)
            async with follow(owner, url) as live:
                assert live.response.status_code == 200
            assert (await other.client.get(url)).status_code == 204
        assert (await other.client.delete(f"/api/chat/{id}")).status_code == 204
        redis.pause()
        try:
            await becomes(owner, "/readyz", "unavailable")
            await becomes(other, "/readyz", "unavailable")
            async with follow(owner, url) as live:
                gate.open()
                assert (await live.rest())[-1].data == DONE
            assert (await other.client.get(url)).status_code == 503
        finally:
            redis.go_on()


async def test_stopped_by_name(grok: Upstream, replicas: list[InProcessService]) -> None:
    """A chat is stopped by its id on any replica."""
    grok.set_scripts(stream("a", HANG))
    id = "2f8fad5b-d9cb-469f-a165-70867728950e"
    message = {"id": "1", "role": "user", "parts": [{"type": "text", "text": "Hi"}]}
    body = {"id": id, "messages": [message], "trigger": "submit-message", "resumable": True}
    async with replicas[0].client.stream("POST", "/api/chat", json=body) as response:
        assert response.status_code == 200
        assert (await replicas[1].client.post(f"/api/chat/{id.upper()}/stop")).status_code == 204
        await grok.calls[0].hung_up(within=2)


async def test_little_memory(grok: Upstream, redis: RedisServer) -> None:
    """What the owner drops to make room is dropped in Redis, too; who needs it elsewhere is told."""
    grok.set_scripts(stream(*["x" * 1000] * 50))
    bounds = {"replay_bytes": 20_000, "replay_total_bytes": 60_000}
    async with fleet(grok, redis, 2, BRISK, redis_prefix="little:", **bounds) as (owner, other):
        urls = []
        for _ in range(6):
            urls.append(await start(owner))
            await owner.client.get(urls[-1])
        async with asyncio.timeout(10):
            while sum(":events" in key for key in redis.everything() if key.startswith("little:")) > 3:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        assert (await other.client.get(urls[0])).status_code == 404
        [lost] = standard((await other.client.get(urls[-1])).content)
        assert code(lost) == "replay_lost"
        last = standard(
            (await other.client.get(urls[-1], headers={"Last-Event-ID": f"{number_of(urls[-1])}-45"})).content
        )
        assert [event.data for event in last] == [*["x" * 1000] * 5, DONE]


async def test_asleep_owner_with_a_reader(grok: Upstream, redis: RedisServer) -> None:
    """An owner that others have declared dead goes on for the reader that it has, and for nobody else."""
    gate = Gate()
    grok.set_scripts(stream("a", gate, "b"))
    async with fleet(grok, redis, redis_prefix="asleep:") as (owner, other):
        url = await start(owner)
        id = number_of(url)
        async with follow(owner, url) as here:
            assert (await here.event()).data == "a"
            async with follow(other, url) as there:
                await there.event()
                entry = b"\x95\x02\x91\xc4\x0edata: nothing\n\xa6failed\xb0upstream_cut_off\xc3"
                redis.do("XADD", f"asleep:{{{id}}}:events", "1-0", "f", entry)
                redis.do("HSET", f"asleep:{{{id}}}:meta", "state", "ended")
                gate.open()
                assert [event.data for event in await here.rest()] == ["b", DONE]
                await there.rest()
        texts = {(await service.client.get(url)).text for service in (owner, other)}
        assert len(texts) == 1
        assert "data: nothing" in texts.pop()
