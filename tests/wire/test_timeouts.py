"""The four clocks: each alone ends a chat with its own code, and nothing else winds it up again."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from itertools import chain, repeat

import pytest

from chatproxy.config.timing import Timing
from tests.conftest import HI, Caller, InProcessService, Service, failure, refusal, serving
from tests.readers import answer
from tests.upstream import (
    DONE,
    EVENT_STREAM,
    HANG,
    STREAM_HEAD,
    Call,
    Script,
    Step,
    Steps,
    Upstream,
    chunk,
    error,
    frame,
    head,
    piece,
    sse,
    stream,
    unreachable,
)

pytestmark = pytest.mark.anyio

LONG: dict[str, float] = {
    "connect_timeout": 60,
    "first_token_timeout": 60,
    "idle_timeout": 60,
    "stream_timeout": 60,
    "grok_retries": 0,
}
SHORT = 0.3

Services = Callable[..., Awaitable[InProcessService]]


@pytest.fixture(scope="module")
async def services(grok: Upstream) -> AsyncIterator[Services]:
    """One service for each set of changes to the long clocks, made when it is first asked for."""
    made: dict[tuple[tuple[str, float], ...], InProcessService] = {}
    async with AsyncExitStack() as stack:

        async def service(**changes: float) -> InProcessService:
            key = tuple(changes.items())
            if key not in made:
                made[key] = await stack.enter_async_context(serving(grok.url, **{**LONG, **changes}))
            return made[key]

        yield service


FIRST = frame(chunk({"role": "assistant", "content": "a"}))


def drip(data: bytes) -> Callable[[], Iterator[Step]]:
    """So many bytes again and again, much more often than any clock here strikes."""
    return lambda: chain.from_iterable(repeat((piece(data), 0.03)))


def letters() -> Iterator[Step]:
    """A frame that comes byte by byte and will not be complete in time."""
    return chain.from_iterable((piece(bytes([letter])), 0.03) for letter in FIRST * 10 if letter != 0x0A)


# Silence, in all the forms it has.
SILENCES: dict[str, Callable[[], Iterator[Step]]] = {
    "nothing": lambda: iter([HANG]),
    "comments": drip(b": ping\n\n"),
    "events without data": drip(b"event: ping\nid: 1\n\n"),
    "half a frame": letters,
}
silences = pytest.mark.parametrize("silence", SILENCES.values(), ids=SILENCES.keys())

holds = pytest.mark.parametrize("hold", [60, 0.05], ids=["before the status", "after the hold"])


async def told(service: Service, hold: float) -> tuple[str, float]:
    """The code that a chat without any text fails with, and after how many seconds.

    It is a 504 as long as the hold lasts, an event after it.
    """
    loop = asyncio.get_running_loop()
    began = loop.time()
    async with asyncio.timeout(5), service.asking() as live:
        response = live.response
        if hold > 1:
            await response.aread()
            assert response.status_code == 504
            return refusal(response)["code"], loop.time() - began
        assert response.status_code == 200
        [event] = await live.rest()
        return failure(event, response)["code"], loop.time() - began


@holds
async def test_connect_timeout(hold: float) -> None:
    """No connection within CONNECT_TIMEOUT."""
    with unreachable() as url:
        async with serving(url, **{**LONG, "connect_timeout": SHORT}, status_hold=hold) as service:
            code, seconds = await told(service, hold)
    assert code == "connect_timeout"
    assert SHORT <= seconds < SHORT + 1


async def test_connect_timeout_with_tls() -> None:
    """Agreeing on TLS is a part of connecting."""
    async with Upstream() as grok:
        url = grok.url.replace("http:", "https:")  # it will take what is said for half a request, and wait
        async with serving(url, **{**LONG, "connect_timeout": SHORT}) as service:
            code, seconds = await told(service, 60)
            assert code == "connect_timeout"
            assert SHORT <= seconds < SHORT + 1
            await grok.until(lambda: grok.open == 0, within=6)  # the check of the key gives up, too


@holds
@pytest.mark.parametrize("begun", [[], [STREAM_HEAD]], ids=["no headers", "headers"])
async def test_first_token_timeout(grok: Upstream, services: Services, hold: float, begun: list[Step]) -> None:
    """No chunk within FIRST_TOKEN_TIMEOUT of the request."""
    grok.set_scripts([*begun, HANG])
    code, seconds = await told(await services(first_token_timeout=SHORT, status_hold=hold), hold)
    assert code == "first_token_timeout"
    assert SHORT <= seconds < SHORT + 1
    await grok.calls[0].hung_up(within=1)


@holds
@silences
async def test_first_token_timeout_in_silence(
    grok: Upstream, services: Services, hold: float, silence: Callable[[], Steps]
) -> None:
    """What is no chunk is no progress."""
    grok.set_scripts(chain([STREAM_HEAD], silence()))
    code, seconds = await told(await services(first_token_timeout=SHORT, status_hold=hold), hold)
    assert code == "first_token_timeout"
    assert SHORT <= seconds < SHORT + 1
    await grok.calls[0].hung_up(within=1)


@silences
async def test_idle_timeout(grok: Upstream, services: Services, silence: Callable[[], Steps]) -> None:
    """No chunk for IDLE_TIMEOUT after the last one; what was said before has arrived."""
    loop = asyncio.get_running_loop()
    service = await services(idle_timeout=SHORT, keep_alive=0.1)
    grok.set_scripts(chain([STREAM_HEAD, piece(FIRST)], silence()))
    async with asyncio.timeout(5), service.asking() as live:
        assert (await live.event()).data == "a"
        began = loop.time()
        [event] = await live.rest()
        seconds = loop.time() - began
        assert failure(event, live.response)["code"] == "idle_timeout"
        assert SHORT - 0.1 <= seconds < SHORT + 1
        await grok.calls[0].hung_up(within=1)
    assert set(live.comments) == {"keep-alive"}


async def test_chunks_are_progress() -> None:
    """Any chunk winds the idle clock up, with text or without; the clock of the first token has no say any more."""
    chunks = [{}, {"reasoning_content": "hm"}, {"content": "b"}] * 3
    script = stream("a", *[item for delta in chunks for item in (delta, 0.1)])
    async with (
        Upstream(script) as grok,
        serving(grok.url, **{**LONG, "idle_timeout": SHORT, "first_token_timeout": SHORT}) as service,
    ):
        assert answer((await service.ask()).content) == "abbb"


# What Grok does for ever, as the stream clock sees it.
ENDLESS: dict[str, Callable[[], Steps]] = {
    "text": lambda: chain([STREAM_HEAD], drip(FIRST)()),
    "silence": lambda: [STREAM_HEAD, piece(FIRST), HANG],
    "comments": lambda: chain([STREAM_HEAD, piece(FIRST)], drip(b": ping\n\n")()),
}


@pytest.mark.parametrize("script", ENDLESS.values(), ids=ENDLESS.keys())
async def test_stream_timeout(grok: Upstream, services: Services, script: Callable[[], Steps]) -> None:
    """STREAM_TIMEOUT after the request it is over, however steadily the text comes."""
    loop = asyncio.get_running_loop()
    service = await services(stream_timeout=SHORT)
    grok.set_scripts(script())
    began = loop.time()
    async with asyncio.timeout(5), service.asking() as live:
        *text, event = await live.rest()
    seconds = loop.time() - began
    assert {token.data for token in text} == {"a"}
    assert failure(event, live.response)["code"] == "stream_timeout"
    assert SHORT <= seconds < SHORT + 1
    await grok.calls[0].hung_up(within=1)


# Where the stream clock can strike before the first chunk.
EARLY: dict[str, Callable[[], Steps]] = {
    "silence": lambda: [HANG],
    "comments": lambda: chain([STREAM_HEAD], drip(b": ping\n\n")()),
    "an error that does not end": lambda: [head(400, {"Content-Length": "9"}), HANG],
    "waiting for another try": lambda: error(503, {"error": "at capacity"}, {"Retry-After": "2"}),
}


@holds
@pytest.mark.parametrize("script", EARLY.values(), ids=EARLY.keys())
async def test_stream_timeout_before_the_first_chunk(
    grok: Upstream, services: Services, script: Callable[[], Steps], hold: float
) -> None:
    """It counts from the request, so it may strike first of all, whatever is waited for."""
    grok.set_scripts(script())
    code, seconds = await told(await services(stream_timeout=SHORT, grok_retries=1, status_hold=hold), hold)
    assert code == "stream_timeout"
    assert SHORT <= seconds < SHORT + 1
    await grok.until(lambda: grok.playing == 0, within=1)


async def test_stream_timeout_while_connecting() -> None:
    """Nor is a connection waited for longer than the whole answer may take."""
    with unreachable() as url:
        async with serving(url, **{**LONG, "stream_timeout": SHORT}) as service:
            code, seconds = await told(service, 60)
    assert code == "stream_timeout"
    assert SHORT <= seconds < SHORT + 1


async def test_stream_timeout_while_the_loop_is_busy() -> None:
    """A clock that runs out unseen, just before another try, ends that try all the same."""

    def busy(*_: float) -> float:
        time.sleep(2 * SHORT)  # on purpose: nothing else runs meanwhile
        return 0

    changes = {**LONG, "stream_timeout": SHORT, "grok_retries": 1}
    async with (
        Upstream(error(503, {"error": "at capacity"}), [HANG]) as grok,
        serving(grok.url, Timing(retry_jitter=busy), **changes) as service,
    ):
        assert refusal(await service.ask())["code"] == "stream_timeout"


async def test_clock_of_each_try() -> None:
    """The first token's clock begins anew with each try: two of them together may take longer."""
    timing = Timing(retry_jitter=lambda low, _: low)  # the shortest wait
    slow_error = [0.4, *error(503, {"error": "at capacity"})]
    slow_answer = [0.6, *stream("late")]
    async with (
        Upstream(slow_error, slow_answer) as grok,
        serving(grok.url, timing, **{**LONG, "first_token_timeout": 0.9, "grok_retries": 1}) as service,
    ):
        assert answer((await service.ask()).content) == "late"
        assert len(grok.calls) == 2


@pytest.mark.parametrize("resumable", [False, True], ids=["plain", "resumable"])
async def test_slow_reader_stops_the_idle_clock(resumable: bool) -> None:
    """As long as the reader keeps us from reading, Grok is not silent; the answer is whole in the end."""
    size, count = 4000, 1500  # more than all buffers on the way hold

    def script(_: Call) -> Steps:
        text = piece(frame(chunk({"content": "x" * size})))
        return chain([STREAM_HEAD], repeat(text, count), [piece(DONE), piece(b"")])

    changes = {**LONG, "idle_timeout": SHORT, "keep_alive": 0.1, "replay_bytes": 100_000_000}
    async with (
        Upstream(script) as grok,
        serving(grok.url, **changes, replay_total_bytes=100_000_000) as service,
        service.caller(receive_buffer=8192) as caller,
    ):
        await caller.post({"messages": HI, "resumable": resumable}, Connection="close")
        call = await grok.call()
        if not resumable:  # else our own copy is read on, whoever reads us
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(3 * SHORT):
                    await call.played.wait()
        body = await rest(caller)
        assert body.count(b"x" * size) == count
        assert b"data: [DONE]\n" in body


async def rest(caller: Caller) -> bytes:
    """All that is still to come, as fast as it comes."""
    pieces = []
    while data := await caller.some():
        pieces.append(data)
    return b"".join(pieces)


async def test_idle_clock_goes_on_after_a_slow_reader() -> None:
    """Once the reader has caught up, a silent Grok is a silent Grok again."""
    text = piece(frame(chunk({"content": "x" * 4000})))
    script: Script = [STREAM_HEAD, *[text] * 1500, HANG]
    async with (
        Upstream(script) as grok,
        serving(grok.url, **{**LONG, "idle_timeout": SHORT}) as service,
        service.caller(receive_buffer=8192) as caller,
    ):
        await caller.post({"messages": HI}, Connection="close")
        call = await grok.call()
        with pytest.raises(TimeoutError):
            await call.hung_up(within=3 * SHORT)
        body = await rest(caller)
    assert body.count(b"x" * 4000) == 1500
    [data] = [line for line in body.split(b"\n") if line.startswith(b'data: {"error"')]
    assert json.loads(data.removeprefix(b"data: "))["error"]["code"] == "idle_timeout"


async def test_stream_timeout_of_a_slow_reader() -> None:
    """While a slow reader keeps us from reading Grok, the stream clock goes on; who reads on is told that it struck."""
    text = piece(frame(chunk({"content": "x" * 4000})))
    async with (
        Upstream(lambda _: chain([STREAM_HEAD], repeat(text))) as grok,
        serving(grok.url, **{**LONG, "stream_timeout": 1}) as service,
        service.caller(receive_buffer=8192) as caller,
    ):
        await caller.post({"messages": HI}, Connection="close")
        call = await grok.call()
        with pytest.raises(TimeoutError):
            await call.hung_up(within=1.2)
        body = await rest(caller)
        await call.hung_up(within=1)
    [data] = [line for line in body.split(b"\n") if line.startswith(b'data: {"error"')]
    assert json.loads(data.removeprefix(b"data: "))["error"]["code"] == "stream_timeout"


async def test_half_an_error_body_is_read_for_a_time() -> None:
    """The body of an error has a clock of its own; what there is of it decides, and the four clocks do not strike."""
    timing = Timing(error_timeout=SHORT)
    loop = asyncio.get_running_loop()
    start = head(500, {"Content-Type": "text/html", "Connection": "close"})
    endless: Iterator[Step] = chain([start], chain.from_iterable(repeat((b"x", 0.01))))
    async with Upstream(endless) as grok, serving(grok.url, timing, **LONG) as service:
        began = loop.time()
        async with asyncio.timeout(5):
            response = await service.ask()
        assert (response.status_code, refusal(response)["code"]) == (502, "upstream_error")
        assert loop.time() - began < SHORT + 1
        await grok.calls[0].hung_up(within=1)


async def test_keep_alives_in_all_waits() -> None:
    """After the hold no wait is without comments: for headers, for another try, for the first token, for the next."""
    tries: list[Script] = [
        [0.4, *error(503, {"error": "at capacity"})],
        sse(0.4, FIRST, 0.4, FIRST, DONE),
    ]
    async with (
        Upstream(*tries) as grok,
        serving(grok.url, **{**LONG, "grok_retries": 1}, status_hold=0.1, keep_alive=0.1) as service,
        service.asking() as live,
    ):
        assert live.response.headers["Content-Type"].startswith(EVENT_STREAM["Content-Type"])
        await live.rest()
    comment = b": keep-alive\n\n"
    before, between, after = live.raw.split(b"data: a\n\n")
    assert before == comment * (len(before) // len(comment))
    assert len(before) // len(comment) >= 4  # of the 8 in the 0.8 s that it takes at least
    assert len(between) // len(comment) >= 1
    assert after == b"data: [DONE]\n\n"


# After the finish reason.


@pytest.mark.parametrize("resumable", [False, True], ids=["plain", "resumable"])
async def test_comments_after_the_finish(grok: Upstream, service: InProcessService, resumable: bool) -> None:
    """What follows the finish reason gets one second in all, also if it is comments without end."""
    finished = frame(chunk({"content": "a"}, finish="stop"))
    grok.set_scripts(lambda _: chain(sse(finished)[:2], chain.from_iterable(repeat((0.3, piece(b": ping\n\n")), 40))))
    loop = asyncio.get_running_loop()
    began = loop.time()
    response = await service.ask(resumable=resumable)
    assert answer(response.content) == "a"
    assert 0.5 < loop.time() - began < 3
    await grok.until(lambda: grok.playing == 0)
