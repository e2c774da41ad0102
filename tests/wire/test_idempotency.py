"""The same key and body, the same answer: a POST that is sent again is not paid again."""

import asyncio
import json
from collections.abc import AsyncIterator

import httpx
import pytest

from tests.conftest import HI, InProcessService, Service, refusal, serving
from tests.readers import joined, standard
from tests.upstream import HANG, Gate, Upstream, error, stream
from tests.wire.test_resume import code, forgotten, rest

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
async def service(grok: Upstream) -> AsyncIterator[InProcessService]:
    async with serving(grok.url, replay_ttl=0.3, resume_window=0.3, grok_retries=0) as service:
        yield service


BODY = json.dumps({"messages": HI, "resumable": True}).encode()


async def ask(
    service: Service, key: str, content: str = "Hi", accept: str = "application/json", **headers: str
) -> httpx.Response:
    headers = {"Accept": accept, "Content-Type": "application/json", "Idempotency-Key": key, **headers}
    return await service.client.post("/api/chat", content=BODY.replace(b"Hi", content.encode()), headers=headers)


async def test_attached(grok: Upstream, service: InProcessService) -> None:
    """The same POST gets the same address, or the same stream from its start, whether it runs or is complete."""
    gate = Gate()
    grok.set_scripts(stream("a", gate, "b"))
    first = await ask(service, "attached")
    assert first.status_code == 201
    again = await ask(service, "attached")
    assert (again.status_code, again.json()) == (201, first.json())
    assert again.headers["Location"] == first.headers["Location"]
    async with asyncio.TaskGroup() as group:
        running = group.create_task(ask(service, "attached", accept="text/event-stream"))
        await gate.reached.wait()
        gate.open()
    complete = await ask(service, "attached", accept="text/event-stream")
    for response in (running.result(), complete):
        assert response.headers["Content-Location"] == first.json()["url"]
        assert joined(standard(response.content)) == "ab"
    assert len(grok.calls) == 1


async def test_at_the_same_time(grok: Upstream, service: InProcessService) -> None:
    """Ten POSTs at once, sent before Grok has said anything, are one."""
    gate = Gate()
    grok.set_scripts([gate, *stream("a")])
    async with asyncio.TaskGroup() as group:
        asked = [group.create_task(ask(service, "at once")) for _ in range(10)]
        await gate.reached.wait()
        gate.open()
    assert {task.result().status_code for task in asked} == {201}
    assert len({task.result().json()["id"] for task in asked}) == 1
    assert len(grok.calls) == 1


async def test_another_body(grok: Upstream, service: InProcessService) -> None:
    """A key that was used with another body is refused, and the first answer is unharmed."""
    grok.set_scripts(stream("a"))
    first = await ask(service, "body")
    other = await ask(service, "body", "Ho")
    assert (other.status_code, refusal(other)["code"], refusal(other)["param"]) == (
        *(422, "invalid_request", "Idempotency-Key"),
    )
    assert joined(standard((await rest(service, first.json()["url"])).content)) == "a"
    assert len(grok.calls) == 1


async def test_other_keys(grok: Upstream, service: InProcessService) -> None:
    """Another key, none, an empty one, or the same of somebody else, is another answer."""
    grok.set_scripts(stream("a"))
    ids = {
        (await ask(service, key, **headers)).json()["id"]
        for key, headers in [
            *(("key", {}), ("another", {}), ("", {}), ("", {})),
            *(("key", {"Authorization": f"Bearer {who}"}) for who in "ab"),
        ]
    }
    assert len(ids) == len(grok.calls) == 6


async def test_long_keys(grok: Upstream, service: InProcessService) -> None:
    """A key has a length that is bounded."""
    grok.set_scripts(stream("a"))
    assert (await ask(service, "x" * 255)).status_code == 201
    response = await ask(service, "x" * 256)
    assert (response.status_code, refusal(response)["param"]) == (422, "Idempotency-Key")
    assert len(grok.calls) == 1


async def test_as_long_as_the_stream(grok: Upstream, service: InProcessService) -> None:
    """A key lives as long as its stream, and is free after it."""
    grok.set_scripts(stream("a"))
    first = await ask(service, "life")
    await forgotten(service, first.json()["url"])
    second = await ask(service, "life", "another body")
    assert second.status_code == 201
    assert second.json()["id"] != first.json()["id"]
    assert len(grok.calls) == 2


async def test_freed_by_a_refusal(grok: Upstream, service: InProcessService) -> None:
    """A first try that failed before its status does not block the second, even with another body."""
    grok.set_scripts(error(503, {"error": "x"}), error(401, {"error": "x"}), stream("a"))
    assert (await ask(service, "refused")).status_code == 503
    assert (await ask(service, "refused", "Ho")).status_code == 502
    assert (await ask(service, "refused")).status_code == 201
    assert len(grok.calls) == 3


async def test_refused_together(grok: Upstream, service: InProcessService) -> None:
    """Who waits for the same answer is refused with it."""
    gate = Gate()
    grok.set_scripts([gate, *error(401, {"error": "x"})])
    async with asyncio.TaskGroup() as group:
        asked = [group.create_task(ask(service, "together")) for _ in range(3)]
        await gate.reached.wait()
        gate.open()
    assert [(task.result().status_code, refusal(task.result())["code"]) for task in asked] == [
        (502, "upstream_auth")
    ] * 3
    assert len(grok.calls) == 1


async def test_kept_after_a_late_failure() -> None:
    """What failed after its address was given stays what it is: the same key finds the failure."""
    gate = Gate()
    async with (
        Upstream([gate, *error(401, {"error": "x"})]) as grok,
        serving(grok.url, status_hold=0.05) as service,
    ):
        first = await ask(service, "late")
        gate.open()
        [failed] = standard((await rest(service, first.json()["url"])).content)
        assert code(failed) == "upstream_auth"
        again = await ask(service, "late")
        assert (again.status_code, again.json()) == (201, first.json())
        assert len(grok.calls) == 1


async def test_left_before_the_status_with_a_key(grok: Upstream, service: InProcessService) -> None:
    """Who left before the status can come back with the key, for the window; then Grok is hung up and the key free."""
    gate = Gate()
    grok.set_scripts([gate, *stream("a")], [HANG], stream("b"))

    async def leave() -> None:
        async with service.caller() as caller:
            await caller.post(BODY, Idempotency_Key="back")
            await grok.call(len(grok.calls))

    await leave()
    async with asyncio.TaskGroup() as group:
        back = group.create_task(ask(service, "back"))
        await gate.reached.wait()
        gate.open()
    assert joined(standard((await rest(service, back.result().json()["url"])).content)) == "a"
    assert len(grok.calls) == 1
    await forgotten(service, back.result().json()["url"])
    await leave()
    await grok.calls[1].hung_up(within=2)
    third = await ask(service, "back", "Ho")
    assert joined(standard((await rest(service, third.json()["url"])).content)) == "b"
    assert len(grok.calls) == 3


async def test_key_alone_makes_it_resumable(grok: Upstream, service: InProcessService) -> None:
    """A key is enough, whatever the body says: the answer can be read again, and is asked for once."""
    grok.set_scripts(stream("a", "b"))
    headers = {"Idempotency-Key": "alone"}
    first = await service.ask(headers=headers)
    again = await service.ask(headers=headers)
    assert first.headers["Content-Location"] == again.headers["Content-Location"]
    assert joined(standard(first.content)) == joined(standard(again.content)) == "ab"
    assert len(grok.calls) == 1


async def test_repeated_requests_are_not_counted() -> None:
    """A request that is sent again attaches, and takes nothing of the rate limit; another key is another chat."""
    gate = Gate()
    async with Upstream(stream("a", gate, "b")) as grok, serving(grok.url, rate_limit="1/minute") as service:
        async with service.asking(headers={"Idempotency-Key": "x"}) as live:
            await live.event()
        async with service.asking(headers={"Idempotency-Key": "x"}) as live:
            assert (await live.event()).data == "a"
            gate.open()
            assert [event.data for event in await live.rest()] == ["b", "[DONE]"]
        assert (await ask(service, "x", "other")).status_code == 422
        for key in ({"Idempotency-Key": "y"}, {}):
            refused = await service.ask(headers=key)
            assert (refused.status_code, refusal(refused)["code"]) == (429, "rate_limited")
        assert len(grok.calls) == 1


async def test_refused_requests_are_not_counted() -> None:
    """What never becomes a chat takes nothing of the rate limit."""
    async with Upstream() as grok, serving(grok.url, rate_limit="1/minute", max_messages=1) as service:
        for body in (b"{", b"{}", json.dumps({"messages": HI * 2}).encode()):
            response = await service.client.post(
                "/api/chat", content=body, headers={"Content-Type": "application/json"}
            )
            assert response.status_code in (400, 413, 422)
        assert (await service.ask()).status_code == 200
        assert (await service.ask()).status_code == 429


async def test_keys_of_strangers() -> None:
    """The same key from another address is another answer, and its body is nobody else's business."""
    gate = Gate()
    async with Upstream(stream("a", gate)) as grok, serving(grok.url) as service:
        mine = await ask(service, "1", **{"X-Forwarded-For": "192.0.2.1"})
        stranger = await ask(service, "1", **{"X-Forwarded-For": "192.0.2.2"})
        other = await ask(service, "1", "something else", **{"X-Forwarded-For": "192.0.2.3"})
        again = await ask(service, "1", **{"X-Forwarded-For": "192.0.2.1"})
        assert [response.status_code for response in (mine, stranger, other, again)] == [201] * 4
        assert len({response.json()["id"] for response in (mine, stranger, other, again)}) == 3
        assert again.json() == mine.json()
        gate.open()
