"""Nothing is held back, and silence is filled."""

import asyncio
from itertools import pairwise

import httpx
import pytest

from tests.conftest import serving
from tests.readers import DONE, Event, answer, comments, standard
from tests.upstream import DONE as DONE_FRAME
from tests.upstream import HANG, STREAM_HEAD, Gate, Step, Upstream, chunk, frame, frames, piece, sse, stream

pytestmark = pytest.mark.anyio

FIRST = frame(chunk({"role": "assistant", "content": "a"}))


async def test_token_by_token() -> None:
    """Each token is seen before Grok has sent the next, and the headers with the first."""
    gates = [Gate(), Gate(), Gate()]
    script = stream("a", gates[0], "b", gates[1], "c", gates[2])
    async with Upstream(script) as grok, serving(grok.url) as service, service.asking() as live:
        for token, gate in zip("abc", gates, strict=True):
            assert await live.event() == Event(token)
            gate.open()
        assert await live.rest() == [Event(DONE)]
    assert live.comments == []


async def test_pace() -> None:
    """Tokens keep the distance that Grok gave them."""
    loop = asyncio.get_running_loop()
    script = stream("a", 0.3, "b", 0.3, "c", 0.3, "d")
    async with Upstream(script) as grok, serving(grok.url) as service, service.asking() as live:
        seen = []
        for token in "abcd":
            assert await live.event() == Event(token)
            seen.append(loop.time())
        await live.rest()
    for earlier, later in pairwise(seen):
        assert later - earlier == pytest.approx(0.3, abs=0.15)


async def test_frame_cut_anywhere() -> None:
    """Half a frame is no event; the other half makes it one at once, though the next frame has begun."""
    first, second, *rest = frames("añ", "b")
    assert isinstance(first, bytes)
    assert isinstance(second, bytes)
    middle = first.index("ñ".encode()) + 1
    gates = [Gate(), Gate()]
    script = sse(first[:middle], gates[0], first[middle:] + second[:20], gates[1], second[20:], *rest)
    async with Upstream(script) as grok, serving(grok.url) as service, asyncio.timeout(5):
        async with asyncio.TaskGroup() as group:
            asked = group.create_task(service.client.send(_request(service.client), stream=True))
            await gates[0].reached.wait()
            await asyncio.wait([asked], timeout=0.1)
            assert not asked.done()
            gates[0].open()
        response = await asked
        pieces = response.aiter_raw()
        assert await anext(pieces) == "data: añ\n\n".encode()
        gates[1].open()
        assert b"".join([piece async for piece in pieces]) == b"data: b\n\ndata: [DONE]\n\n"


@pytest.mark.parametrize("delta", [{"role": "assistant"}, {"role": "assistant", "reasoning_content": "hm"}, {}])
async def test_status_with_the_first_chunk(delta: dict[str, str]) -> None:
    """The first chunk decides the status, whether it holds text or not; Grok's headers alone do not."""
    gates = [Gate(), Gate()]
    script: list[Step] = [
        STREAM_HEAD,
        gates[0],
        piece(frame(chunk(delta))),
        gates[1],
        piece(FIRST + DONE_FRAME),
        piece(b""),
    ]
    async with Upstream(script) as grok, serving(grok.url) as service, asyncio.timeout(5), service.caller() as caller:
        await caller.post({"messages": [{"role": "user", "content": "Hi"}]})
        head = asyncio.create_task(caller.head())
        await gates[0].reached.wait()
        await asyncio.wait([head], timeout=0.1)
        assert not head.done()
        gates[0].open()
        assert (await head)[0] == 200
        gates[1].open()
        body = b""
        while part := await caller.piece():
            body += part
        assert body == b"data: a\n\ndata: [DONE]\n\n"


async def test_keep_alive_before_the_first_token() -> None:
    """While Grok holds even its headers back, the status comes after the hold, then comments; the answer is whole."""
    gate = Gate()
    script = [gate, *stream("a", "b")]
    changes = {"status_hold": 0.2, "keep_alive": 0.1}
    async with Upstream(script) as grok, serving(grok.url, **changes) as service, service.asking() as live:
        assert live.response.status_code == 200
        await live.comment(3)
        assert gate.reached.is_set()
        gate.open()
        events = await live.rest()
    assert events == [Event("a"), Event("b"), Event(DONE)]
    assert set(live.comments) == {"keep-alive"}
    assert live.raw.startswith(b": keep-alive\n\n" * 3)


async def test_keep_alive_in_silence() -> None:
    """When Grok falls silent, even inside a frame, comments fill the silence and nothing is lost or doubled."""
    first, second, *rest = frames("a", "b")
    assert isinstance(second, bytes)
    gates = [Gate(), Gate()]
    script = sse(0.25, first, gates[0], second[:30], gates[1], second[30:], *rest)
    async with Upstream(script) as grok, serving(grok.url, keep_alive=0.1) as service, service.asking() as live:
        async with asyncio.timeout(5):
            await live.comment(2)
            gates[0].open()
            await live.comment(4)
        gates[1].open()
        assert await live.rest() == [Event("a"), Event("b"), Event(DONE)]
    assert answer(live.raw) == "ab"


async def test_reasoning_is_silence_where_nobody_asked_for_it() -> None:
    """A long reasoning that is not passed on is silence to the caller, and filled."""
    thinking = [item for _ in range(20) for item in ({"reasoning_content": "hm"}, 0.03)]
    async with Upstream(stream(*thinking, "a")) as grok, serving(grok.url, keep_alive=0.1) as service:
        response = await service.ask()
    assert answer(response.content) == "a"
    assert len(comments(response.content)) >= 2


async def test_no_keep_alive_while_tokens_come() -> None:
    """Tokens that come steadily leave no room for comments."""
    tokens = [item for n in range(20) for item in (str(n), 0.05)]
    async with Upstream(stream(*tokens)) as grok, serving(grok.url, keep_alive=0.6) as service:
        response = await service.ask()
    assert comments(response.content) == []
    assert len(standard(response.content)) == 21


async def test_comments_of_grok_are_not_passed_on() -> None:
    """Grok's comments are neither events nor a sign of life to the caller; ours come in their place."""
    script = sse(FIRST, *[item for _ in range(20) for item in (b": upstream\n\n", 0.03)], DONE_FRAME)
    async with Upstream(script) as grok, serving(grok.url, keep_alive=0.1) as service:
        response = await service.ask()
    assert answer(response.content) == "a"
    assert set(comments(response.content)) == {"keep-alive"}


@pytest.mark.parametrize("finish", ["stop", None])
async def test_end_is_not_held_back(finish: str | None) -> None:
    """The end marker comes with Grok's own, though Grok leaves its connection open; that is hung up on soon."""
    script = [*stream("a", finish=finish, usage=False)[:-1], HANG]
    async with Upstream(script) as grok, serving(grok.url) as service:
        async with service.asking() as live:
            async with asyncio.timeout(0.5):
                assert [await live.event(), await live.event()] == [Event("a"), Event(DONE)]
            assert await live.rest() == []
        await grok.until(lambda: grok.playing == 0)


def _request(client: httpx.AsyncClient) -> httpx.Request:
    return client.build_request("POST", "/api/chat", json={"messages": [{"role": "user", "content": "Hi"}]})
