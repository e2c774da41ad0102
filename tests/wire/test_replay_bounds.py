"""What is kept for those who come back is bounded, and what is not kept any more is said to be lost."""

import asyncio
import re
import sys
from pathlib import Path

import pytest

from tests.conftest import SubprocessService, serving, spawned
from tests.readers import DONE, joined, standard
from tests.upstream import HANG, Gate, Upstream, error, stream
from tests.wire.test_resume import address, code, forgotten, name, reading, repost, rest

pytestmark = pytest.mark.anyio

NOTHING_AFTER = 2**53 - 1


async def test_replay_of_a_long_answer(grok: Upstream) -> None:
    """Of an answer longer than REPLAY_BYTES the end can be read again; who needs more is told, and never gets a gap."""
    grok.set_scripts(stream(*map(str, range(100))))
    async with serving(grok.url, replay_bytes=3000) as service:
        response = await service.ask(resumable=True)
        events = standard(response.content)
        assert joined(events) == "".join(map(str, range(100)))  # who reads along misses nothing
        url = response.headers["Content-Location"]
        lost = 0
        for position in range(101):
            resumed = standard((await rest(service, url, f"{name(url)}-{position}")).content)
            if resumed != events[position:]:
                [end] = resumed
                assert (code(end), end.id) == ("replay_lost", f"{name(url)}-{NOTHING_AFTER}")
                lost = position
        assert 50 < lost < 99
        assert standard((await rest(service, url, f"{name(url)}-{lost + 1}")).content) == events[lost + 1 :]
        [end] = standard((await rest(service, url)).content)
        assert (await rest(service, url, end.id)).status_code == 204
        assert [code(event) for event in await repost(service, end.id)] == ["replay_lost"]
        assert len(grok.calls) == 1


async def test_reader_who_falls_behind(grok: Upstream) -> None:
    """A reader of a running answer who is too far behind is told so, while others read on."""
    gate = Gate()
    grok.set_scripts(stream("a", *["b" * 100] * 50, gate, "c"))
    async with serving(grok.url, replay_bytes=2000) as service:
        url = await address(service)
        await gate.reached.wait()
        async with reading(service, url) as live:
            assert code(await live.event()) == "replay_lost"
            assert await live.rest() == []
        async with reading(service, url, f"{name(url)}-51") as live:
            gate.open()
            assert [event.data for event in await live.rest()] == ["c", DONE]


async def test_answers_that_make_room(grok: Upstream) -> None:
    """Over REPLAY_TOTAL_BYTES the oldest finished answers go: who has all of one gets 204, who needs it is told."""
    grok.set_scripts(stream(*["x" * 100] * 10))
    async with serving(grok.url, replay_total_bytes=6000, replay_ttl=2) as service:
        urls = []
        for _ in range(4):
            urls.append(await address(service))
            events = standard((await rest(service, urls[-1])).content)
            assert len(events) == 11
        first, last = urls[0], urls[-1]
        assert standard((await rest(service, last)).content) == events
        for after in (None, f"{name(first)}-0", f"{name(first)}-10"):
            [end] = standard((await rest(service, first, after)).content)
            assert (code(end), end.id) == ("replay_lost", f"{name(first)}-{NOTHING_AFTER}")
        assert (await rest(service, first, f"{name(first)}-11")).status_code == 204
        assert (await rest(service, first, end.id)).status_code == 204
        assert (await rest(service, first, f"{name(first)}-12")).status_code == 400
        assert [code(event) for event in await repost(service, f"{name(first)}-3")] == ["replay_lost"]
        await forgotten(service, first)
        assert len(grok.calls) == 4


async def test_late_failure_that_makes_room() -> None:
    """So it is with an answer that failed before its first chunk, of which the failure is all there is."""
    gate = Gate()
    scripts = [[gate, *error(401, {"error": "x"})], stream(*["x" * 100] * 10)]
    changes = {"status_hold": 0.05, "replay_total_bytes": 1000}
    async with Upstream(*scripts) as grok, serving(grok.url, **changes) as service:
        url = await address(service)
        gate.open()
        [failed] = standard((await rest(service, url)).content)
        await rest(service, await address(service))
        assert (await rest(service, url, failed.id)).status_code == 204
        assert [code(event) for event in standard((await rest(service, url)).content)] == ["replay_lost"]


async def test_running_answers_are_kept_longest(grok: Upstream) -> None:
    """An answer that is still running is kept while finished ones can go in its place."""
    gate = Gate()
    grok.set_scripts(stream("a", gate, "b"), stream(*["x" * 100] * 10))
    async with serving(grok.url, replay_total_bytes=6000) as service:
        running = await address(service)
        for _ in range(10):
            await rest(service, await address(service))
        gate.open()
        events = standard((await rest(service, running)).content)
        assert [event.data for event in events] == ["a", "b", DONE]


# Many of them.

FINISHED, RUNNING = 1000, 200
TOTAL = 4_000_000
TTL = 8


def resident(service: SubprocessService) -> int:
    """Bytes of memory that it has resident."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{service.pid}/status").read_text())
    assert found
    return int(found[1]) * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="what another process has used is read as Linux has it")
async def test_many() -> None:
    """1,000 finished and 200 running answers take no more memory than configured, and are forgotten in time."""
    async with (
        Upstream(stream(*["x" * 5000] * 4)) as grok,
        spawned(
            grok.url,
            replay_bytes=100_000,
            replay_total_bytes=TOTAL,
            replay_ttl=TTL,
            resume_window=60,
            log_level="warning",
        ) as service,
    ):

        async def begin(count: int) -> list[str]:
            """Start so many, twenty at a time."""
            places = asyncio.Semaphore(20)

            async def one() -> str:
                async with places:
                    return await address(service)

            return await asyncio.gather(*[one() for _ in range(count)])

        await begin(50)
        before = resident(service)
        finished = await begin(FINISHED)
        await grok.until(lambda: grok.playing == 0)
        grok.set_scripts(stream("x" * 5000, HANG))
        running = await begin(RUNNING)
        # Their text alone is 21 MB. What is known of an answer beside its frames takes some 6 kB.
        assert resident(service) - before < TOTAL + 10_000 * (FINISHED + RUNNING)

        # They are there.
        [*_, end] = standard((await rest(service, finished[-1])).content)
        assert end.data == DONE
        async with reading(service, running[0]) as live:
            assert (await live.event()).type in ("message", "error")
        assert grok.playing == RUNNING

        for url in running:
            assert (await service.client.delete(f"/api/chat/{name(url)}")).status_code == 204
        await grok.until(lambda: grok.playing == 0)
        await forgotten(service, running[-1], within=2 * TTL)
        for url in [*finished, *running]:
            assert (await rest(service, url)).status_code == 404
