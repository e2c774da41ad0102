"""How long Grok goes on for a reader who may come back, and what a late one is told."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from tests.conftest import HI, InProcessService, Service, refusal, serving
from tests.readers import DONE, Event, standard
from tests.upstream import HANG, Call, Gate, Upstream, stream
from tests.wire.test_resume import JSON, address, code, forgotten, name, reading, rest

pytestmark = pytest.mark.anyio

WINDOW = 0.6
TTL = 1.0


@pytest.fixture(scope="module")
async def service(grok: Upstream) -> AsyncIterator[InProcessService]:
    async with serving(grok.url, resume_window=WINDOW, replay_ttl=TTL) as service:
        yield service


async def hung_up(call: Call, since: float) -> float:
    """Seconds from then until Grok was hung up on."""
    return await call.hung_up(within=5) - since


def now() -> float:
    return asyncio.get_running_loop().time()


async def test_abandoned(grok: Upstream, service: InProcessService) -> None:
    """With nobody reading, from the 201 on, Grok goes on for the window and is then hung up; who comes late is told."""
    grok.set_scripts(stream("a", HANG))
    since = now()
    url = await address(service)
    assert WINDOW - 0.1 < await hung_up(grok.calls[0], since) < WINDOW + 0.5
    [a, end] = standard((await rest(service, url)).content)
    assert a == Event("a", id=f"{name(url)}-1")
    assert code(end) == "abandoned"
    assert end.id == f"{name(url)}-2"
    assert (await rest(service, url, end.id)).status_code == 204
    await forgotten(service, url)


async def test_abandoned_by_its_reader(grok: Upstream, service: InProcessService) -> None:
    """The window begins when the last reader leaves, not before; a reader who is there keeps Grok going."""
    grok.set_scripts(stream("a", HANG))
    url = await address(service)
    async with reading(service, url) as first:
        await first.event()
        async with reading(service, url) as second:
            await second.event()
            with pytest.raises(TimeoutError):
                await grok.calls[0].hung_up(within=2 * WINDOW)
        with pytest.raises(TimeoutError):
            await grok.calls[0].hung_up(within=2 * WINDOW)
        since = now()
    assert WINDOW - 0.1 < await hung_up(grok.calls[0], since) < WINDOW + 0.5


async def test_back_in_time(grok: Upstream, service: InProcessService) -> None:
    """Who comes back within the window, again and again, finds the answer going on."""
    gates = [Gate() for _ in range(4)]
    grok.set_scripts(stream(*[step for gate in gates for step in ("a", gate)]))
    url = await address(service)
    after = None
    for gate in gates:
        await asyncio.sleep(WINDOW / 2)  # away
        async with reading(service, url, after) as live:
            after = (await live.event()).id
            gate.open()
    assert [event.data for event in standard((await rest(service, url, after)).content)] == [DONE]
    assert len(grok.calls) == 1


async def test_streamed_to_who_asked(grok: Upstream, service: InProcessService) -> None:
    """The same holds for who asked for the stream itself."""
    grok.set_scripts(stream("a", HANG))
    async with service.asking(resumable=True) as live:
        await live.event()
        since = now()
    url = live.response.headers["Content-Location"]
    assert WINDOW - 0.1 < await hung_up(grok.calls[0], since) < WINDOW + 0.5
    assert code(standard((await rest(service, url)).content)[-1]) == "abandoned"


@pytest.mark.parametrize("accept", [JSON, {"Accept": "text/event-stream"}])
async def test_left_before_the_status(grok: Upstream, service: InProcessService, accept: dict[str, str]) -> None:
    """Who leaves before there is a status has no way back, so Grok is hung up at once."""
    grok.set_scripts([HANG])
    async with service.caller() as caller:
        await caller.post({"messages": HI, "resumable": True}, **accept)
        call = await grok.call()
        since = now()
    assert await hung_up(call, since) < WINDOW / 2


async def test_answers_that_end_by_themselves(grok: Upstream, service: InProcessService) -> None:
    """An answer that was complete before anybody came is whole, and readable for its time and no longer."""
    grok.set_scripts(stream("a", "b"))
    url = await address(service)
    await grok.until(lambda: grok.playing == 0)
    since = now()
    await asyncio.sleep(WINDOW)
    response = await rest(service, url)
    assert [event.data for event in standard(response.content)] == ["a", "b", DONE]
    await forgotten(service, url)
    assert TTL - 0.2 < now() - since < TTL + 0.5
    gone = await rest(service, url, f"{name(url)}-1")
    assert (gone.status_code, refusal(gone)["code"]) == (404, "stream_not_found")


# Hanging up on request.


async def delete(service: Service, id: str) -> httpx.Response:
    return await service.client.delete(f"/api/chat/{id}")


async def stop(service: Service, id: str) -> httpx.Response:
    """As `navigator.sendBeacon` does, which may send any body and type."""
    return await service.client.post(f"/api/chat/{id}/stop", content="", headers={"Content-Type": "text/plain"})


@pytest.mark.parametrize("end", [delete, stop])
async def test_stopped(grok: Upstream, service: InProcessService, end: Any) -> None:
    """Grok is hung up at once; all readers, present and to come, are told; doing it again changes nothing."""
    grok.set_scripts(stream("a", HANG))
    url = await address(service)
    async with reading(service, url) as first, reading(service, url) as second:
        for live in (first, second):
            assert (await live.event()).data == "a"
        since = now()
        response = await end(service, name(url))
        assert (response.status_code, response.content) == (204, b"")
        assert await hung_up(grok.calls[0], since) < 0.5
        for live in (first, second):
            [event] = await live.rest()
            assert code(event) == "stopped"
            assert event.id == f"{name(url)}-2"
    for other in (end, delete, stop):
        assert (await other(service, name(url))).status_code == 204
    assert [event.data for event in standard((await rest(service, url)).content)] == ["a", event.data]
    assert (await rest(service, url, event.id)).status_code == 204
    assert len(grok.calls) == 1


@pytest.mark.parametrize("end", [delete, stop])
@pytest.mark.parametrize("id", ["x", "nobody-knows-this-one"])
async def test_stopping_what_is_not_there(service: InProcessService, end: Any, id: str) -> None:
    """It is not running, which is what was asked for."""
    assert (await end(service, id)).status_code == 204


async def test_stopping_what_is_complete(grok: Upstream, service: InProcessService) -> None:
    """A finished answer stays what it is."""
    grok.set_scripts(stream("a"))
    url = await address(service)
    whole = await rest(service, url)
    assert (await delete(service, name(url))).status_code == 204
    assert (await rest(service, url)).content == whole.content


async def test_stopping_before_the_first_chunk() -> None:
    """What was given its address after the hold can be stopped while Grok still thinks."""
    async with Upstream([HANG]) as grok, serving(grok.url, status_hold=0.05) as service:
        url = await address(service)
        since = now()
        assert (await delete(service, name(url))).status_code == 204
        assert await hung_up(grok.calls[0], since) < 0.5
        [event] = standard((await rest(service, url)).content)
        assert code(event) == "stopped"


async def test_stuck_reader(grok: Upstream, service: InProcessService) -> None:
    """A reader that takes nothing holds up neither Grok nor the other readers."""
    grok.set_scripts(stream(*["x" * 1000] * 2000))
    url = await address(service)
    async with service.caller(receive_buffer=4096) as stuck:
        await stuck.send(f"GET {url} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        await stuck.head()
        response = await rest(service, url)
        events = standard(response.content)
        assert len(events) == 2001
        assert events[-1].data == DONE
        await grok.until(lambda: grok.playing == 0)
