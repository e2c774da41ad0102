"""One answer, paid once: a reader that comes back gets exactly what it missed, from the one completion there is."""

import asyncio
import json
import random
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from _pytest.mark import ParameterSet

from tests.conftest import HI, InProcessService, LiveStream, Service, failure, from_recordings, refusal, serving
from tests.readers import DONE, Event, Standard, answer, joined, standard
from tests.upstream import CLOSE, HANG, Gate, Step, Upstream, error, frames, sse, stream
from tests.wire.test_recordings import as_recorded, load, recordings

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
async def service(grok: Upstream) -> AsyncIterator[InProcessService]:
    async with serving(grok.url, keep_alive=0.2, drain_timeout=0.2) as service:
        yield service


JSON = {"Accept": "application/json"}


async def address(service: Service) -> str:
    """Start an answer, and give the address where it streams."""
    response = await service.ask(headers=JSON)
    assert response.status_code == 201
    url: str = response.json()["url"]
    return url


def name(url: str) -> str:
    return url.split("/")[3]


async def rest(service: Service, url: str, after: str | None = None) -> httpx.Response:
    """What lies after that id, to the end."""
    return await service.client.get(url, headers={} if after is None else {"Last-Event-ID": after})


@asynccontextmanager
async def reading(service: Service, url: str, after: str | None = None) -> AsyncIterator[LiveStream]:
    """The same, event by event; leaving it drops the connection."""
    headers = {} if after is None else {"Last-Event-ID": after}
    async with service.client.stream("GET", url, headers=headers) as response:
        assert response.status_code == 200
        yield LiveStream(response)


# The address.


@pytest.mark.parametrize(
    ("accept", "status"),
    [
        ("application/json", 201),
        ("application/json, text/plain, */*", 201),  # Axios
        ("APPLICATION/JSON; q=0.5", 201),
        ("application/json, text/event-stream;q=0", 201),
        ("text/event-stream", 200),
        ("text/event-stream, application/json", 200),
        ("application/json, text/event-stream;q=0.1", 200),
        ("text/html, */*;q=0.1", 200),
        ("text/*", 200),
        ("", 200),
    ],
)
async def test_accept(grok: Upstream, service: InProcessService, accept: str, status: int) -> None:
    """Who accepts JSON and no event stream gets the address of the answer, everybody else the answer."""
    grok.set_scripts()
    response = await service.ask(headers={"Accept": accept})
    assert response.status_code == status
    assert len(grok.calls) == 1
    if status == 200:
        assert answer(response.content) == "Hello, world"
        assert not {"Location", "Content-Location"} & set(response.headers)
        return
    body = response.json()
    assert re.fullmatch("[A-Za-z0-9_-]{22,}", body["id"])
    assert body == {"id": body["id"], "url": f"/api/chat/{body['id']}/stream"}
    assert response.headers["Location"] == body["url"]
    assert response.headers["Content-Type"] == "application/json"
    assert answer((await rest(service, body["url"])).content) == "Hello, world"
    assert len(grok.calls) == 1


async def test_addresses_are_unguessable(grok: Upstream, service: InProcessService) -> None:
    """Each answer has an address of its own, the same conversation's too."""
    grok.set_scripts()
    asked = [await service.ask(sessionId="one", headers=JSON) for _ in range(20)]
    ids = {response.json()["id"] for response in asked}
    assert len(ids) == 20
    # Random characters: each place sees several in twenty.
    assert all(len(set(place)) > 5 for place in list(zip(*ids, strict=True))[:21])


async def test_address_behind_a_path() -> None:
    """Where a proxy puts the service under a path, addresses begin with it."""
    async with Upstream() as grok, serving(grok.url, root_path="/grok") as service:
        asked = await service.ask(headers=JSON)
        assert asked.json()["url"] == asked.headers["Location"] == f"/grok/api/chat/{asked.json()['id']}/stream"
        streamed = await service.ask(resumable=True)
        assert re.fullmatch("/grok/api/chat/[A-Za-z0-9_-]+/stream", streamed.headers["Content-Location"])


@pytest.mark.parametrize("fields", [{"headers": JSON}, {"resumable": True}])
@pytest.mark.parametrize(
    ("script", "status", "code"),
    [
        (error(401, {"error": "x"}), 502, "upstream_auth"),
        (error(429, {"error": "x"}, {"Retry-After": "30"}), 429, "upstream_rate_limited"),
        (error(400, {"error": "exceeds budget"}), 400, "context_length_exceeded"),
    ],
)
async def test_status_is_true(script: list[Step], status: int, code: str, fields: dict[str, Any]) -> None:
    """What Grok refuses has its status in place of the 201, or of the stream, and leaves nothing behind."""
    async with Upstream(script) as grok, serving(grok.url) as service:
        response = await service.ask(**fields)
        assert (response.status_code, refusal(response)["code"]) == (status, code)
        assert not {"Location", "Content-Location"} & set(response.headers)


async def test_failure_after_the_hold_of_a_stream() -> None:
    """Where Grok takes longer than the hold, the 201 goes out, and the stream tells how it failed, again and again."""
    gate = Gate()
    changes = {"status_hold": 0.05, "replay_ttl": 0.5}
    async with Upstream([gate, *error(401, {"error": "x"})]) as grok, serving(grok.url, **changes) as service:
        url = await address(service)
        async with reading(service, url) as live:
            gate.open()
            event = await live.event()
            assert code(event) == "upstream_auth"
            assert event.id == f"{name(url)}-1"
            assert await live.rest() == []
        assert standard((await rest(service, url)).content) == [event]
        assert (await rest(service, url, event.id)).status_code == 204
        await forgotten(service, url)
        unread = (await service.client.get("/metrics")).text
        assert "chatproxy_unread_deltas_total 0.0" in unread


def code(event: Event) -> Any:
    assert event.type == "error"
    return json.loads(event.data)["error"]["code"]


async def forgotten(service: Service, url: str, after: str | None = None, within: float = 5) -> None:
    """Wait until nothing of that answer is known any more, reading meanwhile what lies after that id."""
    async with asyncio.timeout(within):
        while True:
            if (await rest(service, url, after)).status_code == 404:
                return
            await asyncio.sleep(0.02)  # nobody tells when it is so


# The wire.


async def test_bytes(grok: Upstream, service: InProcessService) -> None:
    """A stream begins with its id and the time to wait; each event has its id after its data, the last one too."""
    grok.set_scripts(stream("a", "b\n\nc", "[DONE]", "", reasoning=["hm"]))
    response = await service.ask(resumable=True)
    id = name(response.headers["Content-Location"])
    assert response.text == (
        f"retry: 2000\nid: {id}-0\n\n"
        f"data: a\nid: {id}-1\n\n"
        f"data: b\ndata: \ndata: c\nid: {id}-2\n\n"
        f"data: [DO\nid: {id}-3\n\n"
        f"data: NE]\nid: {id}-4\n\n"
        f"data: [DONE]\nid: {id}-5\n\n"
    )
    assert response.headers["Content-Location"] == f"/api/chat/{id}/stream"
    again = await rest(service, response.headers["Content-Location"])
    assert again.text == response.text
    assert again.headers["Content-Type"] == response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
    assert again.headers["Cache-Control"] == "no-cache, no-transform, no-store"
    assert again.headers["X-Accel-Buffering"] == "no"
    assert again.headers["Content-Location"] == response.headers["Content-Location"]
    resumed = await rest(service, response.headers["Content-Location"], f"{id}-3")
    assert resumed.text == f"retry: 2000\nid: {id}-3\n\ndata: NE]\nid: {id}-4\n\ndata: [DONE]\nid: {id}-5\n\n"


async def test_opening_comes_first(grok: Upstream, service: InProcessService) -> None:
    """The id is there before the first token, so that who drops before it need not ask twice."""
    gate = Gate()
    grok.set_scripts(stream({}, gate, "a"))
    async with service.asking(resumable=True) as live:
        await live.comment()
        id = name(live.response.headers["Content-Location"])
        assert live.raw == f"retry: 2000\nid: {id}-0\n\n: keep-alive\n\n".encode()
    url = f"/api/chat/{id}/stream"
    async with reading(service, url, f"{id}-0") as live:
        gate.open()
        assert await live.rest() == [Event("a", id=f"{id}-1"), Event(DONE, id=f"{id}-2")]
    assert len(grok.calls) == 1


@pytest.mark.parametrize("end", [None, CLOSE])
async def test_every_event_has_an_id(grok: Upstream, service: InProcessService, end: Step | None) -> None:
    """Optional events and errors are numbered like text, and replayed like it."""
    grok.set_scripts(stream("a", *([end] if end else []), reasoning=["hm"]))
    response = await service.ask(resumable=True, include=["reasoning", "finish"])
    events = standard(response.content)
    kinds = ["reasoning", "message", "error"] if end else ["reasoning", "message", "finish", "message"]
    assert [event.type for event in events] == kinds
    id = name(response.headers["Content-Location"])
    assert [event.id for event in events] == [f"{id}-{number}" for number, _ in enumerate(events, 1)]
    if end:
        assert failure(events[-1], response)["code"] == "upstream_cut_off"
    for number in range(len(events)):
        resumed = await rest(service, response.headers["Content-Location"], f"{id}-{number}")
        assert standard(resumed.content) == events[number:]


# Coming back: exact text, one completion.

LF = "\n"
TOKENS = [
    *(
        " two",
        "  ",
        "\n",
        "\n\n",
        "[DONE]",
        "\n[DONE]\n",
        "data: x\n\n",
        ": c",
        "id: 9",
        "\u2028",
        "\x00",
        "é",
        "😀",
        "\r",
    ),
    *(f" token {number}{LF * (number % 3)}" for number in range(236)),
]
TEXT = "".join(TOKENS).replace("\r", "\n")


async def test_drop_after_each_position(grok: Upstream, service: InProcessService) -> None:
    """A reader that drops after every single event of a running answer, and comes back, reads it exactly."""
    gates = [Gate() for _ in TOKENS]
    grok.set_scripts(stream(*[step for pair in zip(TOKENS, gates, strict=True) for step in pair]))
    url = await address(service)
    closed = iter(gates)
    read: list[Event] = []
    while not read or read[-1].data != DONE:
        async with reading(service, url, read[-1].id if read else None) as live:
            read.append(await live.event())
        next(closed, gates[-1]).open()
    assert joined(read) == TEXT
    assert [event.id for event in read] == [f"{name(url)}-{number}" for number, _ in enumerate(read, 1)]
    assert (await rest(service, url, read[-1].id)).status_code == 204
    assert len(grok.calls) == 1


def scripts(directory: Path) -> Iterator[ParameterSet]:
    """The recorded answers that are long enough."""
    for param in recordings(directory):
        if param.id in LONG:
            yield param


LONG = ("grok-3-mini-high-long-thinking", "grok-4-fast-reasoning-markdown")


def script(path: Path | None, pause: float = 0) -> tuple[list[Step], str]:
    """What Grok plays, and the text that is to be read."""
    if path is None:
        return stream(*[step for token in TOKENS for step in (token, pause)]), TEXT
    recording = load(path)
    text = "".join(event.data for event in recording.text)
    return sse(*[step for piece in as_recorded(recording) for step in (piece, pause)]), text


@pytest.mark.parametrize("path", [pytest.param(None, id="made"), *from_recordings(scripts)])
async def test_resume_from_each_position(grok: Upstream, service: InProcessService, path: Path | None) -> None:
    """From every position what follows is exactly what was missed."""
    played, text = script(path)
    grok.set_scripts(played)
    url = await address(service)
    events = standard((await rest(service, url)).content)
    assert joined(events) == text
    assert len(events) > 200
    for position, event in enumerate(events[:-1], 1):
        assert standard((await rest(service, url, event.id)).content) == events[position:]
    assert len(grok.calls) == 1


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("path", [pytest.param(None, id="made"), *from_recordings(scripts)])
async def test_random_drops(grok: Upstream, service: InProcessService, path: Path | None, seed: int) -> None:
    """Two readers at once, each cut off five times at any byte, read a running answer exactly."""
    played, text = script(path, pause=0.001)
    grok.set_scripts(played)
    chance = random.Random(seed)  # noqa: S311 -- the same cuts each time
    url = await address(service)
    async with asyncio.TaskGroup() as group:
        readers = [
            group.create_task(dropping(service, url, [chance.randrange(1, 4000) for _ in range(5)])) for _ in "ab"
        ]
    for reader in readers:
        assert joined(reader.result()) == text
        assert [event.id for event in reader.result()] == [
            f"{name(url)}-{number}" for number, _ in enumerate(reader.result(), 1)
        ]
    assert len(grok.calls) == 1


async def dropping(service: Service, url: str, cuts: list[int]) -> list[Event]:
    """All events, by a reader whose connection is cut off after so many bytes each time, by FIN or by RST."""
    events: list[Event] = []
    after = ""
    to_come = iter(cuts)
    while not events or events[-1].data != DONE:
        cut = next(to_come, 2**60)
        parser = Standard()
        async with service.caller() as caller:
            await caller.send(f"GET {url} HTTP/1.1\r\nHost: localhost\r\nLast-Event-ID: {after}\r\n\r\n".encode())
            assert (await caller.head())[0] == 200
            left = cut
            while left and (piece := await caller.piece()):
                events += parser.feed(piece[:left])
                left -= len(piece[:left])
            if cut % 2:
                caller.reset()
        after = parser.last_event_id
    return events


async def test_many_readers(grok: Upstream, service: InProcessService) -> None:
    """Thirty readers that come one after the other while the answer runs each see all of it, in order."""
    gates = [Gate() for _ in range(30)]
    grok.set_scripts(stream(*[step for number, gate in enumerate(gates) for step in (f"{number} ", gate)]))
    url = await address(service)
    async with asyncio.TaskGroup() as group:
        readers = []
        for gate in gates:
            await gate.reached.wait()
            readers.append(group.create_task(rest(service, url)))
            gate.open()
    bodies = {reader.result().content for reader in readers}
    assert [answer(body.replace(b": keep-alive\n\n", b"")) for body in bodies] == [
        "".join(f"{number} " for number in range(30))
    ] * len(bodies)
    assert len(grok.calls) == 1


async def test_polyfills(grok: Upstream, service: InProcessService) -> None:
    """Who cannot send headers puts the id into the address; the header counts more."""
    grok.set_scripts(stream("a", "b", "c"))
    url = await address(service)
    id = name(url)
    assert [event.data for event in standard((await service.client.get(f"{url}?lastEventId={id}-1")).content)] == [
        *("b", "c", DONE),
    ]
    both = await rest(service, f"{url}?lastEventId={id}-1", f"{id}-2")
    assert [event.data for event in standard(both.content)] == ["c", DONE]
    assert (await service.client.get(f"{url}?lastEventId={id}-4")).status_code == 204
    assert len(standard((await service.client.get(f"{url}?lastEventId=")).content)) == 4
    assert len(standard((await rest(service, url, "")).content)) == 4


async def test_other_methods(grok: Upstream, service: InProcessService) -> None:
    """HEAD tells what GET would, and reads nothing; any other method is refused."""
    grok.set_scripts(stream("a", HANG))
    url = await address(service)
    response = await service.client.head(url)
    assert (response.status_code, response.headers["Content-Type"]) == (200, "text/event-stream; charset=utf-8")
    response = await service.client.post(url)
    assert (response.status_code, set(response.headers["Allow"].split(", "))) == (405, {"GET", "HEAD"})


# What is not there.


@pytest.mark.parametrize(
    "after",
    [
        *("x", "-", "-0", "x-1", "0", "{id}", "{id}-", "{id}-x", "{id}--1", "{id}-1.0", "{id}-+1", "{id}-1 2"),
        *("{id}-\u00b2", "{id}-99", "{id}-4", "{id}-9007199254740992", "{id}-99999999999999999999", "{other}-1"),
    ],
)
async def test_invalid_ids(grok: Upstream, service: InProcessService, after: str) -> None:
    """An id of another stream, of an event that was never sent, or that is none, is refused."""
    grok.set_scripts(stream("a", "b"))
    url, other = await address(service), await address(service)
    await rest(service, url)
    after = after.format(id=name(url), other=name(other))
    response = await service.client.get(url, headers=[(b"Last-Event-ID", after.encode("latin-1"))])
    assert (response.status_code, refusal(response)["code"]) == (400, "invalid_last_event_id")
    assert len(grok.calls) == 2


async def test_nothing_left(grok: Upstream, service: InProcessService) -> None:
    """After the last event there is nothing: 204, which native EventSource takes for the end."""
    grok.set_scripts(stream("a"))
    url = await address(service)
    events = standard((await rest(service, url)).content)
    response = await rest(service, url, events[-1].id)
    assert (response.status_code, response.content) == (204, b"")
    assert "Content-Type" not in response.headers


async def test_end_is_told_at_once(grok: Upstream, service: InProcessService) -> None:
    """Who reads does not wait for a Grok that has said `[DONE]` to close, nor does who asks what is left."""
    grok.set_scripts(sse(*frames("a"), HANG))
    url = await address(service)
    events = standard((await rest(service, url)).content)
    assert events[-1].data == DONE
    assert (await rest(service, url, events[-1].id)).status_code == 204
    assert await repost(service, events[-1].id) == events[-1:]
    assert grok.playing == 1


async def test_only_resumable_streams_are_kept(grok: Upstream, service: InProcessService) -> None:
    """A plain stream has no ids, and nothing to come back to."""
    grok.set_scripts(stream("a"))
    response = await service.ask()
    assert response.content == b"data: a\n\ndata: [DONE]\n\n"


# Who reconnects with a POST.


async def repost(service: Service, after: str, content: bytes = b"{}") -> list[Event]:
    """What fetch-event-source does: the same request, body and all, with the id of its last event."""
    headers = {"Last-Event-ID": after, "Content-Type": "application/json"}
    response = await service.client.post("/api/chat", content=content, headers=headers)
    assert response.status_code == 200
    assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
    return standard(response.content)


@pytest.mark.parametrize("content", [json.dumps({"messages": HI}).encode(), b"", b"{", b"x" * 2_000_000])
async def test_repost(grok: Upstream, service: InProcessService, content: bytes) -> None:
    """A POST with an id gets what lies after it, whatever its body; of a finished answer at least the last event."""
    grok.set_scripts(stream("a", "b"))
    response = await service.ask(resumable=True)
    events = standard(response.content)
    id = name(response.headers["Content-Location"])
    for position in range(4):
        assert await repost(service, f"{id}-{position}", content) == events[min(position, 2) :]
    assert len(grok.calls) == 1


async def test_repost_while_it_runs(grok: Upstream, service: InProcessService) -> None:
    """It follows a running answer, too."""
    gate = Gate()
    grok.set_scripts(stream("a", gate, "b"))
    async with service.asking(resumable=True) as live:
        first = await live.event()
    async with asyncio.TaskGroup() as group:
        posted = group.create_task(repost(service, first.id))
        await gate.reached.wait()
        gate.open()
    assert [event.data for event in posted.result()] == ["b", DONE]
    assert len(grok.calls) == 1


async def test_repost_after_a_failure(grok: Upstream, service: InProcessService) -> None:
    """The end that is told again is the end that it was."""
    grok.set_scripts(stream("a", CLOSE))
    response = await service.ask(resumable=True)
    [_, failed] = standard(response.content)
    assert await repost(service, failed.id) == [failed]


@pytest.mark.parametrize("after", ["x", "x-1", "{id}-99", "{id}", "-"])
async def test_repost_of_what_is_not_there(grok: Upstream, service: InProcessService, after: str) -> None:
    """An unknown stream, or id, is told in the stream, for another status would be retried for ever."""
    grok.set_scripts(stream("a"))
    url = await address(service)
    [event] = await repost(service, after.format(id=name(url)))
    assert code(event) == "stream_not_found"
    assert len(grok.calls) == 1


async def test_restart() -> None:
    """After a restart of the service those who come back are told that it is gone, and nothing is asked again."""
    async with Upstream(stream("a", "b")) as grok:
        async with serving(grok.url) as service:
            url = await address(service)
            await rest(service, url)
        async with serving(grok.url) as service:
            for after in (None, f"{name(url)}-1", f"{name(url)}-3"):
                gone = await rest(service, url, after)
                assert (gone.status_code, refusal(gone)["code"]) == (404, "stream_not_found")
            [event] = await repost(service, f"{name(url)}-1", json.dumps({"messages": HI, "resumable": True}).encode())
            assert code(event) == "stream_not_found"
        assert len(grok.calls) == 1
