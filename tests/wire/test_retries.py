"""Another try: before the first chunk only, a few times, soon but not at once, and never for nobody."""

import asyncio
import json
import re
import sys
from collections.abc import AsyncIterator
from itertools import pairwise

import httpx
import pytest

from chatproxy.config.timing import Timing
from tests.conftest import HI, TIMEOUT, InProcessService, failure, refusal, serving
from tests.readers import answer
from tests.upstream import (
    CLOSE,
    DONE,
    HANG,
    RESET,
    STREAM_HEAD,
    Call,
    Gate,
    Script,
    Signal,
    Step,
    Steps,
    Upstream,
    chunk,
    error,
    frame,
    head,
    refusing,
    sse,
    stream,
)

pytestmark = pytest.mark.anyio

OVERLOADED = error(503, {"code": "unavailable", "error": "at capacity"})
LIMITED = error(429, {"code": "resource-exhausted", "error": "Too many requests"})
CREDITS = error(429, {"code": "resource-exhausted", "error": "Your team has used all available credits"})
WRONG_KEY = error(400, {"code": "invalid-argument", "error": "Incorrect API key provided."})
FIRST = frame(chunk({"content": "a"}))


def after(seconds: object, status: int = 503) -> list[Step]:
    return error(status, {"error": "later"}, {"Retry-After": str(seconds)})


@pytest.fixture(scope="module")
async def service(grok: Upstream) -> AsyncIterator[InProcessService]:
    async with serving(grok.url, idle_timeout=0.2) as service:
        yield service


def jitter(seconds: float) -> Timing:
    """The first wait for another try takes so long."""
    return Timing(retry_jitter=lambda *_: seconds)


# The waits are as short as they may be.
QUICK = Timing(retry_jitter=lambda low, _: low)


# What another try may mend.
PASSING: dict[str, Script] = {
    "429": LIMITED,
    "429 HTML": error(429, "<html>"),
    "500": error(500, {"error": "x"}),
    "502": error(502, "<html>"),
    "503": OVERLOADED,
    "504": error(504, "<html>"),
    "520": error(520, "<html>"),
    "524": error(524, "<html>"),
    "529": error(529, {"error": "x"}),
    "closed without a word": [CLOSE],
    "reset without a word": [RESET],
    "closed after the headers": [STREAM_HEAD, CLOSE],
    "reset after the headers": [STREAM_HEAD, RESET],
    "no HTTP": [b"canary\r\n\r\n", CLOSE],
}  # fmt: skip

# What it would only repeat.
LASTING: dict[str, Script] = {
    "301": error(301, "", {"Location": "http://127.0.0.1/v1"}),
    "400": error(400, {"error": "x"}),
    "401": error(401, {"error": "x"}),
    "403": error(403, {"error": "Content violates usage guidelines."}),
    "404": error(404, {"error": "x"}),
    "408": error(408, {"error": "x"}),
    "410": error(410, {"error": "x"}),
    "422": error(422, {"error": "x"}),
    "525": error(525, "<html>"),
    "526": error(526, "<html>"),
    "credits used up": CREDITS,
    "a wrong key": WRONG_KEY,
    "200 with JSON": error(200, {"error": "Timed out waiting for first token"}),
    "an error frame": sse(frame({"error": "x"})),
    "malformed": sse(b"data: {\n\n", HANG),
    "the end marker": sse(DONE),
    "the end": sse(),
}  # fmt: skip


async def asked_together(scripts: dict[str, Script]) -> tuple[dict[str, httpx.Response], dict[str, list[Call]]]:
    """Chats side by side, each with its own script and then an answer; what came of them, and the calls for each."""
    calls: dict[str, list[Call]] = {name: [] for name in scripts}

    def script(call: Call) -> Steps:
        name = call.body["messages"][0]["content"]
        calls[name].append(call)
        steps = scripts[name] if len(calls[name]) == 1 else stream("ok")
        return steps(call) if callable(steps) else steps

    async with Upstream(script) as grok, serving(grok.url) as service, asyncio.TaskGroup() as group:
        tasks = {name: group.create_task(service.ask(name, sessionId=name)) for name in scripts}
    return {name: task.result() for name, task in tasks.items()}, calls


async def test_tried_again() -> None:
    """What may pass is tried again, with the very same request, and the caller sees the answer alone."""
    responses, calls = await asked_together(PASSING)
    assert {name: response.text for name, response in responses.items()} == dict.fromkeys(
        PASSING, "data: ok\n\ndata: [DONE]\n\n"
    )
    for first, second in calls.values():
        assert first.content == second.content
        assert first.headers == second.headers
        assert 0.1 <= second.arrived_at - first.arrived_at < 0.5 + 0.5


async def test_not_tried_again() -> None:
    """What another try would only repeat is told at once."""
    responses, calls = await asked_together(LASTING)
    assert {name: len(made) for name, made in calls.items()} == dict.fromkeys(LASTING, 1)
    assert [name for name, response in responses.items() if response.is_success] == []


@pytest.mark.parametrize("retries", [None, 0, 1])
async def test_how_often(retries: int | None) -> None:
    """GROK_RETRIES times, by default twice; the first wait is at most half a second."""
    async with Upstream(OVERLOADED) as grok, serving(grok.url, grok_retries=retries) as service:
        response = await service.ask()
        assert (response.status_code, refusal(response)["code"]) == (503, "upstream_overloaded")
        arrived = [call.arrived_at for call in grok.calls]
    assert len(arrived) == 1 + (2 if retries is None else retries)
    for number, (earlier, later) in enumerate(pairwise(arrived)):
        assert 0.1 * 2**number <= later - earlier < 0.5 * 2**number + 0.5


@pytest.mark.parametrize("signal", [CLOSE, RESET])
async def test_kept_connection_breaks(signal: Signal) -> None:
    """A try is a try, on a kept connection as well: a Grok that breaks off may have worked for it."""
    async with (
        Upstream(stream("a"), stream("b"), [signal], [signal], stream("c")) as grok,
        serving(grok.url, grok_retries=1) as service,
    ):
        await asyncio.gather(service.ask(), service.ask())
        response = await service.ask()
        assert refusal(response)["code"] == "upstream_error"
        assert len(grok.calls) == 4
        assert (await service.ask()).text == "data: c\n\ndata: [DONE]\n\n"


async def test_waits_grow() -> None:
    """But for the jitter, each wait is twice as long as the one before."""
    async with Upstream(OVERLOADED) as grok, serving(grok.url, QUICK, grok_retries=3) as service:
        await service.ask()
    waits = [later.arrived_at - earlier.arrived_at for earlier, later in pairwise(grok.calls)]
    assert waits == [pytest.approx(seconds, abs=0.15) for seconds in (0.15, 0.25, 0.45)]


async def test_waits_do_not_grow_for_ever() -> None:
    """From the fourth on they are alike, so that none of many tries is too far away to be made."""
    async with Upstream(OVERLOADED) as grok, serving(grok.url, jitter(0.01), grok_retries=10) as service:
        await service.ask()
        assert len(grok.calls) == 11
    assert grok.calls[-1].arrived_at - grok.calls[-2].arrived_at < 1


async def test_refused_connections() -> None:
    """A connection that is refused is tried again; each failure counts in the metrics."""
    with refusing() as url:
        async with serving(url, QUICK) as service:
            response = await service.ask()
            assert refusal(response)["code"] == "upstream_unreachable"
            failures = await metric(service, 'chatproxy_upstream_failures_total{code="upstream_unreachable"}')
    assert failures == 3


async def metric(service: InProcessService, name: str) -> float:
    found = re.search(rf"^{re.escape(name)} (\S+)$", (await service.client.get("/metrics")).text, re.MULTILINE)
    assert found
    return float(found[1])


async def test_jitter() -> None:
    """Those who failed together do not come back together."""
    tries: dict[str, list[float]] = {}

    def script(call: Call) -> Steps:
        times = tries.setdefault(call.body["messages"][0]["content"], [])
        times.append(call.arrived_at)
        return OVERLOADED if len(times) == 1 else stream("ok")

    async with Upstream(script) as grok, serving(grok.url) as service, asyncio.TaskGroup() as group:
        for number in range(20):
            group.create_task(service.ask(str(number)))
    waits = sorted(second - first for first, second in tries.values())
    assert len(waits) == 20
    assert waits[0] >= 0.1
    assert waits[-1] < 0.5 + 0.5
    assert waits[-1] - waits[0] > 0.1


@pytest.mark.parametrize("status", [429, 503])
async def test_retry_after(status: int) -> None:
    """A short Retry-After is honoured: not sooner, and not much later."""
    async with Upstream(after(1, status), stream("ok")) as grok, serving(grok.url) as service:
        assert answer((await service.ask()).content) == "ok"
        first, second = grok.calls
    assert 1 <= second.arrived_at - first.arrived_at < 1.5


@pytest.mark.parametrize(
    ("seconds", "changes", "told"),
    [
        pytest.param(6, {}, "6", id="just too long"),
        pytest.param(30, {}, "30", id="long"),
        pytest.param(100_000, {}, "120", id="very long"),
        pytest.param(2, {"first_token_timeout": 1}, "2", id="longer than the first token may take"),
    ],
)
@pytest.mark.parametrize(
    ("status", "code"), [(429, "upstream_rate_limited"), (503, "upstream_overloaded"), (529, "upstream_overloaded")]
)
async def test_long_retry_after(seconds: int, changes: dict[str, object], told: str, status: int, code: str) -> None:
    """A wait that is too long for us is the caller's: the status says so at once."""
    loop = asyncio.get_running_loop()
    async with Upstream(after(seconds, status)) as grok, serving(grok.url, **changes) as service:
        began = loop.time()
        response = await service.ask()
        assert loop.time() - began < 0.9
        assert (refusal(response)["code"], response.headers["Retry-After"]) == (code, told)
        assert len(grok.calls) == 1


async def test_local_answer_until_retry_after_has_passed() -> None:
    """After a 429 with Retry-After others are told the same without a call, until it has passed."""
    async with Upstream(after(1, 429), stream("ok")) as grok, serving(grok.url, grok_retries=0) as service:
        first = await service.ask()
        assert (first.status_code, first.headers["Retry-After"]) == (429, "1")
        for accept in ("text/event-stream", "application/json"):
            other = await service.ask(headers={"Accept": accept})
            assert (other.status_code, refusal(other)["code"]) == (429, "upstream_rate_limited")
            assert other.headers["Retry-After"] == "1"
        assert len(grok.calls) == 1
        await asyncio.sleep(1)  # as we were told to
        assert answer((await service.ask()).content) == "ok"
        assert len(grok.calls) == 2


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(LIMITED, id="429 without a time"),
        pytest.param(after("Wed, 21 Oct 2026 07:28:00 GMT", 429), id="429 with a date"),
        pytest.param(after(60, 503), id="503 with a time"),
        pytest.param(CREDITS, id="credits used up"),
    ],
)
async def test_no_local_answer(script: Script) -> None:
    """Nothing else keeps the next chat from Grok."""
    async with Upstream(script, stream("ok")) as grok, serving(grok.url, grok_retries=0) as service:
        assert (await service.ask()).status_code >= 400
        assert answer((await service.ask()).content) == "ok"


@pytest.mark.parametrize(
    "end",
    [
        pytest.param([CLOSE], id="closed"),
        pytest.param([RESET], id="reset"),
        pytest.param([frame({"error": "at capacity"})], id="an error frame"),
        pytest.param([b"data: {\n\n"], id="malformed"),
        pytest.param([HANG], id="silent"),
    ],
)
@pytest.mark.parametrize("first", [FIRST, frame(chunk({"role": "assistant"}))], ids=["text", "a role"])
async def test_never_after_the_first_chunk(
    grok: Upstream, service: InProcessService, first: bytes, end: list[Step]
) -> None:
    """An answer that has begun is never asked for again."""
    grok.set_scripts(sse(first, *end), stream("ok"))
    async with service.asking() as live:
        *_, event = await live.rest()
    assert failure(event, live.response)["code"].startswith(("upstream_", "idle_"))
    assert len(grok.calls) == 1


async def test_after_the_hold() -> None:
    """A caller who has seen only comments gets the answer of another try."""
    gate = Gate()
    async with (
        Upstream([gate, *OVERLOADED], OVERLOADED, stream("ok")) as grok,
        serving(grok.url, QUICK, status_hold=0.1, keep_alive=0.1) as service,
        service.asking() as live,
    ):
        assert live.response.status_code == 200
        await live.comment()
        gate.open()
        await live.rest()
        assert len(grok.calls) == 3
    assert answer(live.raw) == "ok"


async def test_last_failure_after_the_hold() -> None:
    """When no try succeeds, the stream tells the last failure."""
    gate = Gate()
    async with (
        Upstream([gate, *OVERLOADED], [STREAM_HEAD, RESET]) as grok,
        serving(grok.url, QUICK, status_hold=0.1, grok_retries=1) as service,
        service.asking() as live,
    ):
        gate.open()
        [event] = await live.rest()
        assert failure(event, live.response)["code"] == "upstream_error"
        assert len(grok.calls) == 2


async def test_not_past_the_first_token_timeout() -> None:
    """A try that would begin after FIRST_TOKEN_TIMEOUT is not made, though there are some left."""
    slow = [0.3, *OVERLOADED]
    async with Upstream(slow) as grok, serving(grok.url, QUICK, first_token_timeout=0.6, grok_retries=9) as service:
        response = await service.ask()
        assert refusal(response)["code"] == "upstream_overloaded"
        assert len(grok.calls) == 2


@pytest.mark.parametrize("accept", ["text/event-stream", "application/json"])
async def test_never_for_nobody(accept: str) -> None:
    """Once the caller has left, before the status or after it, nothing more is asked."""
    gate = Gate()
    async with Upstream([gate, *OVERLOADED], stream("late")) as grok, serving(grok.url, QUICK) as service:
        async with service.caller() as caller:
            await caller.post({"messages": HI}, Accept=accept)
            async with asyncio.timeout(TIMEOUT):
                await gate.reached.wait()
            caller.close()
            await grok.calls[0].hung_up()
        gate.open()
        with pytest.raises(TimeoutError):
            await grok.call(1, within=0.4)


async def test_never_for_a_stopped_answer() -> None:
    """Nor once the caller has said that it is enough."""
    gate = Gate()
    async with (
        Upstream([gate, *OVERLOADED], stream("late")) as grok,
        serving(grok.url, jitter(0.4), status_hold=0.1) as service,
    ):
        created = (await service.ask(headers={"Accept": "application/json"})).json()
        async with service.client.stream("GET", created["url"]) as reading:
            gate.open()
            await grok.until(lambda: grok.playing == 0)
            assert (await service.client.delete(f"/api/chat/{created['id']}")).status_code == 204
            body = (await reading.aread()).decode()
        [data] = re.findall(r"^event: error\ndata: (.*)$", body, re.MULTILINE)
        assert json.loads(data)["error"]["code"] == "stopped"
        with pytest.raises(TimeoutError):
            await grok.call(1, within=0.6)


async def test_same_place() -> None:
    """While a chat waits for another try it keeps its place, so that retries do not come on top of MAX_STREAMS."""
    async with Upstream(OVERLOADED, stream("ok")) as grok, serving(grok.url, jitter(0.4), max_streams=1) as service:
        asked = asyncio.create_task(service.ask())
        await grok.until(lambda: len(grok.calls) == 1 and grok.playing == 0)
        assert refusal(await service.ask())["code"] == "busy"
        assert answer((await asked).content) == "ok"


async def test_hung_up_before_the_next() -> None:
    """An error whose body does not end is read up to a bound, and hung up on before Grok is asked again."""
    endless: Script = [head(503, {"Content-Length": "1000000000"}), b"x" * 100_000, HANG]
    async with Upstream(endless, stream("ok")) as grok, serving(grok.url, grok_retries=1) as service:
        async with asyncio.timeout(3):
            response = await service.ask()
        assert answer(response.content) == "ok"
        first, second = grok.calls
        assert first.left.is_set()
        assert first.left_at < second.arrived_at


@pytest.mark.skipif(sys.platform != "linux", reason="needs a socket filter")
@pytest.mark.parametrize("transport", ["fast", "httpx"])
async def test_lost_connection_to_grok(transport: str) -> None:
    """A kept connection that was lost without a word costs seconds: the chat goes on over a new one."""
    async with Upstream() as upstream, serving(upstream.url, connect_timeout=0.2, grok_transport=transport) as service:
        await service.ask()
        upstream.lose_connections()
        async with asyncio.timeout(TIMEOUT):
            assert answer((await service.ask()).content) == "Hello, world"
        assert upstream.calls[-1].connection > upstream.calls[0].connection
