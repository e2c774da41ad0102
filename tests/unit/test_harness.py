"""The tests' own tools: a reader or a scripted Grok that is wrong would prove nothing."""

import asyncio
import re
from collections import Counter

import httpx
import pytest

from tests import conftest
from tests.conftest import ROOT
from tests.readers import READERS, Event, Standard, answer, by_httpx_sse, comments, naive, standard
from tests.upstream import CLOSE, GOOD_KEY, HANG, RESET, Call, Gate, Script, Steps, Upstream, error, raw, sse, stream

# By the names of web-platform-tests, as in test_sse.py; here with types, ids and reconnection times.
STREAMS = [
    pytest.param(b"data: a\n\ndata: b", [Event("a")], id="unfinished"),
    pytest.param(b"data: a\r\r", [Event("a")], id="a CR at the end"),
    pytest.param(b"\xef\xbb\xbfevent: x\rdata: a\r\ndata: b\n\n", [Event("a\nb", "x")], id="BOM and line breaks"),
    pytest.param(b"event: x\n\ndata: a\n\n", [Event("a")], id="a type without data is forgotten"),
    pytest.param(b"event: x\nevent:\ndata: a\n\n", [Event("a")], id="an empty type is message"),
    pytest.param(b"id: 1\ndata: a\n\ndata: b\n\nid\n\n", [Event("a", id="1"), Event("b", id="1")], id="ids"),
    pytest.param(b"id: 1\n\ndata: a\n\n", [Event("a", id="1")], id="an id without data counts"),
    pytest.param(b"id: 1\nid: 2\0\ndata: a\n\n", [Event("a", id="1")], id="an id with NUL is ignored"),
    pytest.param(b"data\n\ndata\ndata\n\ndata:\n\n", [Event(""), Event("\n"), Event("")], id="empty data"),
    pytest.param(b"data:  a\ndata:b\n data: c\nDATA: d\n: e\n\n", [Event(" a\nb")], id="fields"),
    pytest.param("data: \u2028é\ufeff\n\n".encode(), [Event("\u2028é\ufeff")], id="other characters"),
    pytest.param(b"data: \xff\n\n", [Event("\ufffd")], id="not UTF-8"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "events"), STREAMS)
def test_standard(body: bytes, events: list[Event]) -> None:
    """The parser follows the standard, in one piece and byte by byte."""
    assert standard(body) == events
    parser = Standard()
    fed = [event for i in range(len(body)) for event in parser.feed(body[i : i + 1])]
    assert fed + parser.close() == events


def test_standard_keeps_the_rest() -> None:
    """Comments, the last event id and the reconnection time are kept beside the events."""
    parser = Standard()
    assert parser.feed(b": hi\n:\nretry: 12\nretry: +3\nretry: 4x\nid: 5\n\nid: 6\n") == []
    assert (parser.comments, parser.reconnection_time, parser.last_event_id) == (["hi", ""], 12, "5")
    assert comments(b": a\n\ndata: b\n\n:c\n\n") == ["a", "c"]


def test_other_readers() -> None:
    """The naive reader and the library see what a browser sees in a stream of ours."""
    body = b": keep-alive\n\ndata: a\ndata: \nid: s-1\n\nevent: error\ndata: {}\nid: s-2\n\n"
    assert standard(body) == naive(body) == by_httpx_sse(body) == [Event("a\n", id="s-1"), Event("{}", "error", "s-2")]


@pytest.mark.parametrize(
    "body",
    [
        b"data: a\n\n",
        b"data: a\n\ndata: [DONE]\n\ndata: [DONE]\n\n",
        b"data: a\n\nevent: error\ndata: {}\n\ndata: [DONE]\n\n",
        b"data: a\n\nevent: error\ndata: [DONE]\n\n",
        b"data: a\r\n\r\ndata: [DONE]\r\n\r\n",
        b"data:a\n\ndata: [DONE]\n\n",
    ],
)
def test_answer_is_strict(body: bytes) -> None:
    """An answer that ends otherwise, holds something else, or reads differently elsewhere is none."""
    with pytest.raises(AssertionError):
        answer(body)
    assert answer(b"data: a\n\ndata: b\n\ndata: [DONE]\n\n") == "ab"
    assert (standard, naive, by_httpx_sse) == READERS


@pytest.mark.anyio
async def test_upstream_plays() -> None:
    """Scripts are played in order, with gates; the last one again and again."""
    gate = Gate()
    async with (
        Upstream(stream("a", gate, "b"), error(429, {"error": "x"}, {"Retry-After": "3"})) as grok,
        client() as http,
    ):
        asked = asyncio.create_task(chat(http, grok))
        call = await grok.call()
        await gate.reached.wait()
        assert (grok.playing, grok.open, call.body, call.path) == (1, 1, {"n": 1}, "/v1/chat/completions")
        gate.open()
        answered = await asked
        assert answered.headers["content-type"] == "text/event-stream"
        assert [event.data[:5] for event in standard(answered.content)] == ['{"id"'] * 4 + ["[DONE"]
        for _ in range(2):
            refused = await chat(http, grok)
            assert (refused.status_code, refused.headers["retry-after"], refused.json()) == (429, "3", {"error": "x"})
        assert (await http.get(f"{grok.url}/api-key")).json() == GOOD_KEY
        assert (await http.get(f"{grok.url}/models")).status_code == 404
        assert (len(grok.calls), len(grok.probes), len(grok.strays)) == (3, 1, 1)
        assert {call.connection for call in grok.calls} == {1}
        assert (grok.connections, grok.playing) == (1, 0)


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("script", "failure"),
    [
        (sse(b"a", CLOSE), httpx.RemoteProtocolError),
        (sse(b"a", RESET), httpx.ReadError),
        ([CLOSE], httpx.RemoteProtocolError),
    ],
)
async def test_upstream_breaks_off(script: Script, failure: type[Exception]) -> None:
    """FIN and RST come when the script says so, and count as its end, not as the caller's."""
    async with Upstream(script) as grok, client() as http:
        with pytest.raises(failure):
            await chat(http, grok)
        assert not grok.calls[0].left.is_set()
        assert grok.playing == 0


@pytest.mark.anyio
async def test_upstream_sees_the_caller_leave() -> None:
    """A caller who goes while the script runs is noticed, whether it waits or writes more than is taken."""
    gate = Gate()
    async with Upstream([HANG], raw(*[b"x" * 65_536] * 1000, gate)) as grok:
        for index in range(2):
            _, writer = await asyncio.open_connection("127.0.0.1", grok.port, limit=1024)
            writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: 2\r\n\r\n{")
            await grok.until(lambda: grok.open == 1)
            writer.write(b"}")
            call = await grok.call(index)
            assert (grok.playing, call.body) == (1, {})
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.2):
                    await gate.reached.wait()
            writer.close()
            assert await call.hung_up() > call.arrived_at
            assert call.sent < 30_000_000
            await grok.until(lambda: grok.open == 0)


@pytest.mark.anyio
async def test_upstream_reports_errors_in_scripts() -> None:
    """A test whose script fails does not pass."""

    def script(call: Call) -> Steps:
        raise KeyError(call.path)

    with pytest.raises(BaseExceptionGroup, match="a script failed"):  # noqa: PT012 -- it is the context that raises
        async with Upstream(script) as grok, client() as http:
            with pytest.raises(httpx.TransportError):
                await chat(http, grok)


@pytest.mark.anyio
async def test_end_of_a_live_stream() -> None:
    """Whoever waits for an event or a comment after the end is told that none will come."""
    async with (
        Upstream() as grok,
        client() as http,
        http.stream("POST", f"{grok.url}/chat/completions", json={}) as response,
    ):
        live = conftest.LiveStream(response)
        await live.rest()
        with pytest.raises(EOFError):
            await live.event()
        with pytest.raises(EOFError):
            await live.comment()


def client() -> httpx.AsyncClient:
    return httpx.AsyncClient(trust_env=False)


async def chat(http: httpx.AsyncClient, grok: Upstream) -> httpx.Response:
    return await http.post(f"{grok.url}/chat/completions", json={"n": 1})


def test_require_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """With REQUIRE_ALL=1 a skip is a failure that says what is missing, and an expected failure is not."""

    def skipped() -> pytest.TestReport:
        return pytest.TestReport(
            "test", ("file", 1, "test"), {}, "skipped", ("file", 1, "Skipped: no browser"), "setup"
        )

    monkeypatch.delenv("REQUIRE_ALL", raising=False)
    report = skipped()
    conftest.required(report)
    assert report.outcome == "skipped"
    monkeypatch.setenv("REQUIRE_ALL", "1")
    conftest.required(report)
    assert (report.outcome, report.longrepr) == ("failed", "REQUIRE_ALL=1, and yet: Skipped: no browser")
    expected = skipped()
    expected.wasxfail = "reason"
    conftest.required(expected)
    assert expected.outcome == "skipped"


def test_names_are_unique() -> None:
    """No two tests have one name, so that `pytest -k` picks the one that is meant."""
    names = [
        name
        for path in (ROOT / "tests").rglob("test_*.py")
        if "node_modules" not in path.parts
        for name in re.findall(r"^(?:async )?def (test_\w+)", path.read_text(), re.MULTILINE)
    ]
    assert [name for name, count in Counter(names).items() if count > 1] == []
