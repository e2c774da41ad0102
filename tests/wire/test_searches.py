"""Searches: who allows them, who asks for them, how many there may be, and what is told of them."""

import json
import logging
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests import responses
from tests.conftest import HI, InProcessService, failure, refusal, serving
from tests.readers import DONE, READERS, Event, answer, joined, standard
from tests.responses import CREATED, cited, delta, ended, message, searched, source
from tests.upstream import HANG, Gate, Script, Step, Upstream, sse, stream
from tests.wire.test_metrics import samples, values

pytestmark = pytest.mark.anyio

BOTH = {"grok_api": "responses", "grok_tools": "web_search,x_search"}


@pytest.fixture(scope="module")
async def service(grok: Upstream) -> AsyncIterator[InProcessService]:
    async with serving(grok.url, **BOTH, max_tool_calls=2, grok_retries=1) as service:
        yield service


def answer_with(count: int, *more: bytes) -> Script:
    """An answer with so many searches between its two words."""
    searches = [piece for number in range(count) for piece in searched(number + 1, f"canary query {number}")]
    return sse(CREATED, *message(0, "a"), *searches, *more, *message(99, "b"), ended())


# Who allows and who asks.


@pytest.mark.parametrize(
    ("asked", "sent"),
    [
        (None, None),
        ([], None),
        (["web_search"], ["web_search"]),
        (["x_search", "web_search"], ["x_search", "web_search"]),
        (["web_search", "web_search"], ["web_search"]),
        (["web_search"] * 1000, ["web_search"]),
    ],
)
async def test_no_search_without_a_wish(
    grok: Upstream, service: InProcessService, asked: list[str] | None, sent: list[str] | None
) -> None:
    """Grok may search what the request asks for, each once, and nothing if it asks for nothing."""
    grok.set_scripts(responses.answer("ok"))
    assert answer((await service.ask(tools=asked)).content) == "ok"
    assert grok.calls[0].body.get("tools") == (None if sent is None else [{"type": tool} for tool in sent])


@pytest.mark.parametrize(
    ("changes", "asked", "param"),
    [
        ({"grok_api": "responses"}, ["web_search"], "tools[0]"),
        ({"grok_api": "responses", "grok_tools": "x_search"}, ["x_search", "web_search"], "tools[1]"),
        ({}, ["x_search"], "tools[0]"),
    ],
)
async def test_no_search_without_permission_over_the_wire(
    grok: Upstream, changes: dict[str, str], asked: list[str], param: str
) -> None:
    """A search that the operator does not allow is refused, and Grok is not asked."""
    grok.set_scripts(responses.answer("ok"))
    async with serving(grok.url, **changes) as service:
        response = await service.ask(tools=asked)
        problem = refusal(response)
        assert (response.status_code, problem["code"], problem["param"]) == (422, "invalid_request", param)
        assert "operator" in problem["message"]
        assert grok.calls == []
        assert (await service.client.post("/api/chat", json={"messages": HI, "tools": []})).status_code != 422


@pytest.mark.parametrize(
    ("tools", "param"),
    [
        ("web_search", "tools"),
        (5, "tools"),
        ({"web_search": True}, "tools"),
        ([5], "tools[0]"),
        ([None], "tools[0]"),
        ([["web_search"]], "tools[0]"),
        ([{"type": "web_search"}], "tools[0]"),
        (["web_search", "canary"], "tools[1]"),
        (["WEB_SEARCH"], "tools[0]"),
        ([""], "tools[0]"),
    ],
)
async def test_tools_of_another_shape(grok: Upstream, service: InProcessService, tools: object, param: str) -> None:
    """A wish that is no list of known searches is refused with the field's name, and not echoed."""
    grok.set_scripts(responses.answer("ok"))
    response = await service.ask(tools=tools)
    problem = refusal(response)
    assert (response.status_code, problem["code"], problem["param"]) == (422, "invalid_request", param)
    assert "canary" not in response.text
    assert grok.calls == []


# What is told.


async def test_searches_are_told(grok: Upstream, service: InProcessService) -> None:
    """Searches are told to who asked, as they happen; to others there is nothing but the text."""
    gate = Gate()
    first, second = (
        searched(0, "cats"),
        [responses.added(1, responses.x_search(1)), responses.done(1, responses.x_search(1, "\r\n[DONE]"))],
    )
    grok.set_scripts(sse(CREATED, first[0], gate, *first[1:], *second, *message(2, "a"), ended()))
    async with service.asking(include=["tools"], tools=["web_search", "x_search"]) as live:
        started = await live.event()
        gate.open()
        *events, text, end = await live.rest()
    assert [(event.type, json.loads(event.data)) for event in (started, *events)] == [
        ("tool", {"tool": "web_search", "status": "started"}),
        ("tool", {"tool": "web_search", "status": "completed", "query": "cats"}),
        ("tool", {"tool": "x_search", "status": "started"}),
        ("tool", {"tool": "x_search", "status": "completed", "query": "\r\n[DONE]"}),
    ]
    assert (text, end) == (Event("a"), Event(DONE))
    for include in ([], ["reasoning"], ["citations"]):
        assert answer((await service.ask(include=include)).content) == "a"


async def test_a_search_for_nothing(grok: Upstream, service: InProcessService) -> None:
    """Where it is not told what was searched for, the query is null."""
    grok.set_scripts(sse(CREATED, *searched(0, ""), *message(1, "a"), ended()))
    response = await service.ask(include=["tools"])
    told = [json.loads(event.data) for event in standard(response.content) if event.type == "tool"]
    assert told[1] == {"tool": "web_search", "status": "completed", "query": None}


async def test_citations_are_told_once(grok: Upstream, service: InProcessService) -> None:
    """The sources come in one event just before the finish; to others there is nothing but the text."""
    a, b = "https://a.example/", "http://b.example/"
    notes = [cited(0, source(url, title)) for url, title in ((a, "1"), (b, b), (a, "3"))]
    grok.set_scripts(sse(CREATED, delta(0, "x"), notes[0], delta(0, "y"), *notes, ended()))
    response = await service.ask(include=["citations", "finish"])
    assert [event.type for event in standard(response.content)] == [
        *("message", "message", "citations", "finish", "message"),
    ]
    [told] = [json.loads(event.data) for event in standard(response.content) if event.type == "citations"]
    assert told == [{"url": a, "title": "1"}, {"url": b, "title": b}]
    for include in ([], ["tools"]):
        assert answer((await service.ask(include=include)).content) == "xy"


async def test_sources_break_no_frame(grok: Upstream, service: InProcessService) -> None:
    """Whatever the web puts into sources and queries, every reader sees one event of bounded size, and the text."""
    bad = [
        "javascript:alert(1)",
        "https://a.example/\n\nevent: error\ndata: x",
        "https://a.example/\r\rdata: [DONE]",
        "https://a.example/" + "x" * 100_000,
    ]
    good = [source(f"https://example.com/{number}", "\r\n\r\ndata: [DONE]\u2028") for number in range(9_999)]
    notes = [cited(0, each) for each in (*map(source, bad), source("https://long.example", "x" * 900_000), *good)]
    query = "\n\nevent: error\ndata: {}\n\n" + "x" * 500_000
    grok.set_scripts(sse(CREATED, *searched(0, query), delta(1, "a"), b"".join(notes), ended()))
    response = await service.ask(include=["tools", "citations"])
    for reader in READERS:
        started, completed, text, citations, end = reader(response.content)
        assert (started.type, completed.type, citations.type) == ("tool", "tool", "citations")
        assert (text, end) == (Event("a"), Event(DONE))
        urls = [each["url"] for each in json.loads(citations.data)]
        assert urls == ["https://long.example", *(f"https://example.com/{number}" for number in range(99))]
        assert json.loads(completed.data)["query"] == query[:1000]
    assert len(response.content) < 20_000


async def test_several_messages_are_one_text(grok: Upstream, service: InProcessService) -> None:
    """Text before and after searches is one answer, with an empty line in between."""
    grok.set_scripts(answer_with(2))
    assert answer((await service.ask()).content) == "a\n\nb"


async def test_searches_resume(grok: Upstream, service: InProcessService) -> None:
    """Searches and sources are numbered with the rest, and replayed."""
    grok.set_scripts(answer_with(1, cited(0, source("https://a.example"))))
    response = await service.ask(include=["tools", "citations", "finish"], resumable=True)
    events = standard(response.content)
    again = await service.client.get(
        response.headers["Content-Location"], headers={"Last-Event-ID": events[1].id, "Accept": "text/event-stream"}
    )
    assert standard(again.content) == events[2:]
    assert [event.type for event in events[2:]] == ["tool", "message", "message", "citations", "finish", "message"]


# How many.


@pytest.mark.parametrize("at_once", [False, True])
async def test_too_many_searches_end_it(grok: Upstream, service: InProcessService, at_once: bool) -> None:
    """At the search after the last that is allowed Grok is hung up; what came before is told, and the reason."""
    gate = Gate()
    pieces: list[Step] = [
        CREATED,
        *message(0, "a"),
        *searched(1, "x"),
        *searched(2, "x"),
        gate,
        *searched(3, "x"),
        HANG,
    ]
    if at_once:
        grok.set_scripts(answer_with(3))
    else:
        grok.set_scripts(sse(*pieces))
        gate.open()
    response = await service.ask(include=["tools"])
    *events, last = standard(response.content)
    assert joined(events) == "a"
    assert [event.type for event in events].count("tool") == 4
    assert failure(last, response)["code"] == "tool_limit"
    if not at_once:
        await grok.calls[0].hung_up()
    assert len(grok.calls) == 1


async def test_as_many_searches_as_allowed(grok: Upstream, service: InProcessService) -> None:
    """The limit itself is allowed, and a search counts once however often it is told."""
    grok.set_scripts(answer_with(2, *searched(1, "x"), *searched(2, "x")))
    assert answer((await service.ask()).content) == "a\n\nb"


async def test_no_retry_after_a_search(grok: Upstream, service: InProcessService) -> None:
    """A search has cost money: whatever fails after it, Grok is not asked again."""
    for script in (sse(CREATED, searched(0, "x")[0]), sse(CREATED, searched(0, "x")[0] + b"data: {\n\n")):
        grok.set_scripts(script)
        response = await service.ask()
        assert (response.status_code, standard(response.content)[-1].type) == (200, "error")
        assert len(grok.calls) == 1


async def test_searches_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    """Searches are counted by tool in the metrics, and in the log line of their answer: what for, nowhere."""
    caplog.set_level(logging.DEBUG)
    on_x = [responses.added(50, responses.x_search(50)), responses.done(50, responses.x_search(50, "canary"))]
    scripts: list[Script] = [
        answer_with(2, *on_x, cited(0, source("https://canary.example", "canary"))),
        answer_with(4),
        responses.answer("a"),
    ]
    async with Upstream(*scripts) as grok, serving(grok.url, **BOTH, max_tool_calls=3) as service:
        for _ in scripts:
            await service.ask(include=["tools", "citations"], tools=["web_search"])
        found = await samples(service)
    assert values(found, "tool_calls_total") == {("web_search",): 5, ("x_search",): 1}
    assert values(found, "stream_ends_total") == {("", "done"): 2, ("tool_limit", "failed"): 1}
    lines: list[dict[str, Any]] = [vars(record) for record in caplog.records]
    assert [line["tool_calls"] for line in lines if line.get("route") == "/api/chat"] == [3, 3, None]
    assert "canary" not in str(lines)
    assert "canary" not in str(found)


async def test_the_other_api_has_none(grok: Upstream) -> None:
    """On Chat Completions nothing new is told, whatever is asked for."""
    grok.set_scripts(stream("a"))
    async with serving(grok.url) as service:
        assert answer((await service.ask(include=["tools", "citations"])).content) == "a"
    assert "tools" not in grok.calls[0].body
