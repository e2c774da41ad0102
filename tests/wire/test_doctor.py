"""`python -m chatproxy doctor`: what it tells of the service itself, what it costs, and how it is called."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import pytest

from chatproxy.doctor.client import Target
from chatproxy.doctor.command import examine
from chatproxy.doctor.visit import Check, Visit
from tests.conftest import serving
from tests.upstream import CLOSE, DONE, HANG, Steps, Upstream, chunk, error, frame, sse, stream

pytestmark = pytest.mark.anyio

NOBODY = "http://127.0.0.1:1/v1"
TOKEN = "t0ken-of-sixteen"  # noqa: S105 -- nobody's
BRIEF: Mapping[str, object] = {"grok_api_key": None, "keep_alive": 0.3, "resume_window": 0.3}


WORDS: list[str | float] = [step for number in range(40) for step in (f" {number}", 0.03)]
PACED = stream(*WORDS)


class Told:
    """What the doctor tells, and what it says beforehand."""

    def __init__(self, checks: list[Check], announced: list[str]) -> None:
        self.checks = {check.name: check for check in checks}
        self.announced = announced

    @property
    def marks(self) -> dict[str, bool | None]:
        return {name: check.ok for name, check in self.checks.items()}

    @property
    def faults(self) -> dict[str, str]:
        return {name: check.message for name, check in self.checks.items() if check.ok is False}


async def doctor(
    url: str, *, token: str | None = None, seconds: float = 30, silence: float = 1.0, window: float = 1.5
) -> Told:
    checks: list[Check] = []
    announced: list[str] = []
    await examine(
        Visit(
            Target.parse(url),
            checks.append,
            announced.append,
            token=token,
            seconds=seconds,
            silence=silence,
            window=window,
        )
    )
    return Told(checks, announced)


@asynccontextmanager
async def canned(replies: Mapping[str, bytes | list[bytes | float]]) -> AsyncIterator[str]:
    """A server that answers with these bytes and pauses, by the beginning of the request line; else with 404."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            line = (await reader.readuntil(b"\r\n\r\n")).decode()
            found = [reply for start, reply in replies.items() if line.startswith(start)]
            reply = found[0] if found else response(404, "application/json", b"[]")
            for step in [reply] if isinstance(reply, bytes) else reply:
                if isinstance(step, bytes):
                    writer.write(step)
                else:
                    await asyncio.sleep(step)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


def response(status: int, kind: str, body: bytes, *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status} -", f"Content-Type: {kind}", "Connection: close", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


def problem(code: str, status: int) -> bytes:
    body = {"error": {"type": "-", "code": code, "message": "So.", "param": None, "request_id": "-"}}
    return response(status, "application/json", json.dumps(body).encode())


OURS = {"GET /api/chat/doctor": problem("stream_not_found", 404)}


async def test_all_well_with_the_demo() -> None:
    """Of a healthy service everything is found well, silence and leaving too, and it is said that nothing is spent."""
    async with serving(NOBODY, **BRIEF) as service:
        told = await doctor(service.url)
    assert told.announced == ["The built-in demo answers: nothing is spent."]
    well = {"reachable", "HTTP", "health", "host", "headers", "first token", "tokens", "ending", "resume", "stop"}
    assert told.marks == {**dict.fromkeys(well | {"keep-alive", "leaving", "key"}, True), "TLS": None, "metrics": None}


async def test_one_answer_of_grok() -> None:
    """A real Grok is asked once, whatever is looked at, and that is said beforehand."""
    async with Upstream(PACED) as grok, serving(grok.url) as service:
        told = await doctor(service.url)
        assert len(grok.calls) == 1
    assert told.announced == ["Grok answers: one short answer is spent."]
    assert told.faults == {}
    assert {told.marks["keep-alive"], told.marks["leaving"]} == {None}
    assert told.checks["resume"].message == "dropped after 30 tokens, and nothing is missing"


async def test_short_answer() -> None:
    """An answer that ends before the connection was to be dropped is resumed from its middle."""
    async with Upstream(stream("Hel", "lo")) as grok, serving(grok.url) as service:
        told = await doctor(service.url)
    assert told.faults == {}
    assert told.checks["tokens"].message == "2 are too few to tell"
    assert told.checks["resume"].message == "dropped after 1 tokens, and nothing is missing"


async def test_lumps_of_grok() -> None:
    """Lumps that may be Grok's own are no fault; a whole answer at one time is."""
    lump = frame(chunk({"content": "a"})) * 8
    async with (
        Upstream(sse(lump, 0.5, lump, 0.5, lump, 0.5, lump, DONE), sse(lump * 5, DONE)) as grok,
        serving(grok.url) as service,
    ):
        told = [await doctor(service.url), await doctor(service.url)]
    assert told[0].faults == {}
    assert "Grok's own pace" in told[0].checks["tokens"].message
    assert "at once" in told[1].faults["tokens"]


async def test_silent_grok() -> None:
    """Keep-alives are seen if a real Grok happens to be silent."""
    async with Upstream(stream("a", 0.8, *WORDS)) as grok, serving(grok.url, keep_alive=0.3) as service:
        told = await doctor(service.url)
    assert told.checks["keep-alive"].ok is True


@pytest.mark.parametrize(
    ("script", "fault", "says"),
    [
        (error(401, {}), "answer", "502 upstream_auth"),
        (stream(0.8, done=False, finish=None), "first token", "the answer failed"),
        (stream("a", "b", CLOSE), "ending", "upstream_cut_off"),
        (stream("a", "b", HANG), "ending", "none: no answer within"),
        (stream(HANG), "first token", "no token within"),
    ],
    ids=["refused", "failed at once", "failed", "hangs", "silent"],
)
async def test_failing_grok(script: Steps, fault: str, says: str) -> None:
    """What fails behind the service is told as such, in time, and nothing goes on when the doctor has gone."""
    async with Upstream(script) as grok, serving(grok.url, grok_retries=0, status_hold=0.3) as service:
        told = await doctor(service.url, seconds=4)
        await grok.until(lambda: grok.playing == 0)
    assert {*told.faults} == {fault}
    assert says in told.faults[fault]


async def test_token_needed() -> None:
    """Where tokens are needed, it says so, and goes in with one."""
    async with Upstream(PACED) as grok, serving(grok.url, access_tokens=TOKEN) as service:
        without, within = await doctor(service.url), await doctor(service.url, token=TOKEN)
    assert without.faults == {"answer": "401: give a token, as CHATPROXY_TOKEN or --token"}
    assert within.faults == {}


async def test_left_alone_by_the_doctor() -> None:
    """An answer that still runs when it should have been given up is told, and ended."""
    async with serving(NOBODY, **{**BRIEF, "resume_window": 60}) as service:
        told = await doctor(service.url)
        metrics = (await service.client.get("/metrics")).text
    assert {*told.faults} == {"leaving"}
    assert "or RESUME_WINDOW is longer" in told.faults["leaving"]
    assert "chatproxy_streams_in_flight 0.0" in metrics


async def test_not_seen() -> None:
    """What the service refuses to show is told as not seen, and is no fault."""
    async with serving(NOBODY, **BRIEF, rate_limit="1/hour") as service:
        told = await doctor(service.url)
    assert told.faults == {}
    for name in ("keep-alive", "leaving"):
        assert told.checks[name].ok is None
        assert "429 rate_limited" in told.checks[name].message


async def test_long_keep_alive() -> None:
    """Silence that is longer than we look is no fault."""
    async with serving(NOBODY, **{**BRIEF, "keep_alive": 60}) as service:
        told = await doctor(service.url)
    assert told.faults == {}
    assert "none within 1 s" in told.checks["keep-alive"].message


async def test_forgotten() -> None:
    """An abandoned answer that is forgotten when the doctor looks again is no fault."""
    async with serving(NOBODY, **BRIEF, replay_ttl=0.2) as service:
        told = await doctor(service.url)
    assert told.faults == {}
    assert "404 stream_not_found" in told.checks["leaving"].message


async def test_lumps_of_the_demo() -> None:
    """The demo never sends lumps, so somebody makes them."""
    demo = response(200, "application/json", b'{"status": "ok", "demo": true}')
    lumps: list[bytes | float] = [events(end=b"")]
    for number in range(5):
        lumps += [b"".join(b"data: a\nid: a-%d\n\n" % (8 * number + each) for each in range(8)), 0.5]
    async with canned({**OURS, "GET /readyz": demo, "POST": lumps}) as url:
        told = await doctor(url)
    assert "a buffer holds them back" in told.faults["tokens"]


async def test_by_name() -> None:
    """Metrics that are open on this machine are no fault by its name either."""
    async with Upstream(PACED) as grok, serving(grok.url) as service:
        told = await doctor(f"http://localhost:{service.port}")
    assert told.faults == {}
    assert told.marks["metrics"] is None


async def test_not_ready() -> None:
    """A service that is not ready is told with the reason."""
    unready = response(503, "application/json", b'{"status": "unavailable", "reason": "draining"}')
    async with canned({**OURS, "GET /readyz": unready, "POST": problem("draining", 503)}) as url:
        told = await doctor(url)
    assert told.faults == {"health": "/readyz says draining: it is shutting down", "answer": "503 draining: So."}


async def test_nothing_public_but_the_chat() -> None:
    """Where only /api/ is public, it cannot say whose answer it will be, and health is no fault."""
    async with canned({**OURS, "POST": response(405, "text/plain", b"")}) as url:
        told = await doctor(url)
    assert told.announced == ["Demo or Grok, that is not public: at most one short answer is spent."]
    assert told.faults == {"answer": "405 from the proxy, not from the service"}
    assert told.checks["health"].message == "/healthz is not public (404)"


async def test_no_answer_at_all() -> None:
    """Something that takes connections and says nothing of HTTP is told."""
    async with canned({"": b"SSH-2.0-x\r\n"}) as url:
        told = await doctor(url)
    assert {*told.faults} == {"health", "host"}
    assert told.faults["host"].startswith("no answer: ")


HEAD = ("Cache-Control: no-transform", "X-Request-ID: a", "Content-Location: /api/chat/a/stream")


def events(*ids: int, end: bytes = b"data: [DONE]\nid: a-9\n\n") -> bytes:
    body = b"".join(b"data: %d\nid: a-%d\n\n" % (id, id) for id in ids) + end
    return response(200, "text/event-stream", body, *HEAD)


@pytest.mark.parametrize(
    ("routes", "fault", "says"),
    [
        ({"POST": events(1, end=b""), "GET": problem("stream_not_found", 404)}, "resume", "another replica"),
        ({"POST": events(1, 2), "GET": response(404, "text/html", b"")}, "resume", "404 and an HTML page"),
        ({"POST": events(1, 2), "GET": events(1, 2)}, "resume", "is something cached?"),
        ({"POST": events(1), "GET": events(end=b""), "DELETE": b""}, "ending", "broken off after 0.0 s"),
        ({"POST": response(200, "text/event-stream", b"")}, "first token", "no token within 0 s"),
    ],
)
async def test_not_resumed(routes: Mapping[str, bytes], fault: str, says: str) -> None:
    """A stream that another machine does not know, or that comes back otherwise, is told."""
    async with canned({**OURS, **routes}) as url:
        told = await doctor(url)
    assert says in told.faults[fault]


async def test_no_such_name() -> None:
    """A name without an address is told as that."""
    assert "nobody.invalid has no address" in (await doctor("http://nobody.invalid")).faults["reachable"]
