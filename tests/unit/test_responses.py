"""What the decoder of the Responses API makes of each of its events: no network, no clock."""

import gc
import json
import tracemalloc
from itertools import pairwise
from typing import Any

import pytest

from chatproxy import errors
from chatproxy.events import Citations, Event, Finished, ReasoningDelta, Source, TextDelta, ToolCall, Usage
from chatproxy.services.grok.responses import Decoder
from tests.responses import (
    CREATED,
    IN_PROGRESS,
    USAGE,
    added,
    cited,
    closed,
    delta,
    done,
    ended,
    event,
    failed,
    message,
    message_item,
    opened,
    reasoned,
    reasoning_item,
    response,
    searched,
    source,
    thought,
    web_search,
    x_search,
)
from tests.upstream import DONE


def decode(*pieces: bytes, max_tool_calls: int = 10) -> tuple[list[Event], Decoder]:
    """The events of an answer, which do not depend on where its bytes are cut."""
    body = b"".join(pieces)
    found = []
    for size in (len(body), 7, 1) if len(body) < 100_000 else (65_536, 10_000):
        decoder = Decoder(max_tool_calls)
        events = []
        for start, end in pairwise([*range(0, len(body), size), len(body)]):
            events += decoder.feed(body[start:end])
            if decoder.ended:
                break
        found.append((events, decoder))
    assert all(events == found[0][0] for events, _ in found)
    return found[0]


def text(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, TextDelta))


def reasoning(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, ReasoningDelta))


def said(events: list[Event]) -> list[str]:
    return [event.text for event in events if isinstance(event, TextDelta)]


# The text.


def test_each_delta_once() -> None:
    """A text that comes in deltas and then whole, four times, is told in deltas."""
    output = [message_item("Hello, world")]
    events, decoder = decode(CREATED, IN_PROGRESS, *message(0, "Hello", ", ", "world"), ended(None, output))
    assert said(events) == ["Hello", ", ", "world"]
    assert (decoder.complete, decoder.ended, decoder.failure) == (True, True, None)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_text_that_comes_whole(number: int) -> None:
    """Where no delta came, any of the events with the whole text will do, and it counts once."""
    whole = closed(0, "Hello")
    assert said(decode(*opened(0), whole[number], ended())[0]) == ["Hello"]
    assert said(decode(*opened(0), *whole, whole[number], ended(None, [message_item("Hello")]))[0]) == ["Hello"]


@pytest.mark.parametrize("number", [0, 1, 2])
def test_deltas_of_what_came_whole(number: int) -> None:
    """A text that has come whole is not told again, should its deltas come late; another part of the message is."""
    whole = closed(0, "Hello")[number]
    events, decoder = decode(whole, delta(0, "Hel"), delta(0, "lo"), delta(0, "!", part=1), delta(0, "x"), ended())
    assert said(events) == ["Hello", "!"]
    assert decoder.failure is None


def test_text_in_the_last_event() -> None:
    """Where nothing was sent at all, the last event has the text; else what it repeats is not told."""
    output = [reasoning_item("hm"), message_item("a", "b"), message_item("c")]
    for end in (ended(None, output), ended("max_output_tokens", output)):
        assert said(decode(CREATED, end)[0]) == ["a", "b", "\n\n", "c"]
        assert said(decode(CREATED, *message(1, "x"), end)[0]) == ["x"]
    assert said(decode(ended(None, [{"type": "message", "content": None}, {"content": "x"}, {}]))[0]) == []


def test_several_messages() -> None:
    """Between two messages that have text stands an empty line, whatever their ids, and none beside an empty one."""
    pieces = [*message(0, "a", "b"), *searched(1, "q"), *message(2), *message(3, "c"), *message(9, "d"), ended()]
    assert said(decode(*pieces)[0]) == ["a", "b", "\n\n", "c", "\n\n", "d"]


def test_messages_that_overlap() -> None:
    """Items are told apart by their index: a second one may begin before the first has ended."""
    pieces = [*opened(0), *opened(1), delta(0, "a"), delta(1, "b"), delta(0, "c"), *closed(0, "ac"), *closed(1, "b")]
    assert said(decode(*pieces, ended())[0]) == ["a", "\n\n", "b", "c"]
    # One in deltas, the other whole.
    pieces = [*opened(0), *opened(1), delta(1, "b"), *closed(0, "a"), delta(1, "c"), *closed(1, "bc"), ended()]
    assert said(decode(*pieces)[0]) == ["b", "\n\n", "a", "c"]


def test_parts_of_one_message() -> None:
    """Parts of one message follow each other as they are."""
    pieces = [*opened(0), delta(0, "a"), delta(0, "b", part=1), done(0, message_item("a", "b")), ended()]
    assert said(decode(*pieces)[0]) == ["a", "b"]
    assert said(decode(*opened(0), done(0, message_item("a", "b")), ended())[0]) == ["a", "b"]
    # What is told whole is taken of an item without deltas only.
    assert said(decode(*opened(0), delta(0, "a"), done(0, message_item("a", "b")), ended())[0]) == ["a"]


def test_text_of_a_new_part() -> None:
    """A part that opens with text has its first delta there."""
    part = {"type": "output_text", "text": "a"}
    opening = event("response.content_part.added", output_index=0, content_index=0, part=part)
    assert said(decode(opening, delta(0, "b"), *closed(0, "ab"), ended())[0]) == ["a", "b"]
    for other in ({"type": "reasoning_text", "text": "a"}, {"type": "output_text", "text": ""}, None, "a"):
        opening = event("response.content_part.added", output_index=0, content_index=0, part=other)
        assert said(decode(opening, delta(0, "b"), ended())[0]) == ["b"]


def test_empty_deltas() -> None:
    """An empty delta is nothing, so that a whole text may still come."""
    assert said(decode(delta(0, ""), *closed(0, "a"), ended())[0]) == ["a"]
    assert said(decode(event("response.output_text.delta", delta=None, output_index=0), delta(0, "a"))[0]) == ["a"]


def test_refusals_of_the_responses_api() -> None:
    """A refusal is text, and the reason of the finish."""
    part = {"type": "refusal", "refusal": "No."}
    item = {**message_item(), "content": [part]}
    in_deltas = [event("response.refusal.delta", output_index=0, content_index=0, delta=text) for text in ("N", "o.")]
    whole = event("response.refusal.done", output_index=0, content_index=0, refusal="No.")
    for pieces in ([*in_deltas, whole, done(0, item)], [whole], [done(0, item)]):
        events, decoder = decode(*pieces, ended(None, [item]))
        assert text(events) == "No."
        assert decoder.finished.reason == "content_filter"


def test_half_emojis() -> None:
    """What was cut inside a pair is joined; what stays half is U+FFFD, and never joined with another text."""
    face = json.loads('"\\ud83d\\ude00"')
    halves = json.loads('["\\ud83d", "\\ude00"]')
    assert said(decode(delta(0, "a" + halves[0]), delta(0, halves[1] + "b"), ended())[0]) == ["a", face + "b"]
    assert text(decode(delta(0, halves[0]), ended())[0]) == "\ufffd"
    assert text(decode(delta(0, halves[0]), delta(1, halves[1]), ended())[0]) == "\ufffd\n\n\ufffd"
    assert text(decode(*closed(0, halves[0] + "a" + face), ended())[0]) == "\ufffda" + face
    assert text(decode(delta(0, halves[0]), event("error", message="x"))[0]) == "\ufffd"
    assert reasoning(decode(thought(0, halves[0]), thought(0, halves[1]), delta(1, "a"), ended())[0]) == face
    assert reasoning(decode(thought(0, halves[0]), DONE)[0]) == "\ufffd"
    cut = [delta(0, halves[0]), cited(0, source("https://a.example")), ended()]
    assert decode(*cut)[0] == [TextDelta("\ufffd"), Citations([Source("https://a.example", "1")])]
    titled = cited(0, source("https://a.example", halves[0]))
    assert decode(titled, ended())[0] == [Citations([Source("https://a.example", "\ufffd")])]


# Reasoning.


def test_reasoning_of_the_responses_api() -> None:
    """The summary is told delta by delta, or where none came whole; a new part or item begins a new line."""
    assert reasoning(decode(*reasoned(0, "h", "m"), ended())[0]) == "hm"
    assert reasoning(decode(*reasoned(0), *message(1, "a"), ended())[0]) == ""
    assert reasoning(decode(thought(0, "a"), thought(0, "b", 1), thought(2, "c"), ended())[0]) == "a\nb\nc"
    assert reasoning(decode(done(0, reasoning_item("a", "b")), ended())[0]) == "a\nb"
    whole = event("response.reasoning_summary_text.done", output_index=0, summary_index=0, text="a")
    assert reasoning(decode(whole, done(0, reasoning_item("a")), ended())[0]) == "a"


def test_reasoning_in_full() -> None:
    """Of an item that has its reasoning both in full and as a summary, what comes first is told."""
    full = event("response.reasoning_text.delta", output_index=0, content_index=0, delta="full")
    full_done = event("response.reasoning_text.done", output_index=0, content_index=0, text="full")
    item = {**reasoning_item("short"), "content": [{"type": "reasoning_text", "text": "full"}]}
    assert reasoning(decode(full, thought(0, "short"), full_done, done(0, item), ended())[0]) == "full"
    assert reasoning(decode(thought(0, "short"), full, full_done, done(0, item), ended())[0]) == "short"
    assert reasoning(decode(full_done, ended())[0]) == "full"
    assert reasoning(decode(done(0, {**item, "summary": []}), ended())[0]) == "full"


# Searches and sources.


def calls(*pieces: bytes, **more: int) -> list[tuple[str, str, str, str | None]]:
    events, _ = decode(*pieces, ended(), **more)
    return [(item.id, item.tool, item.status, item.query) for item in events if isinstance(item, ToolCall)]


def test_searches() -> None:
    """A search of the web is told when it starts and when it completes, with what was searched for."""
    assert calls(*searched(0, "cats")) == [
        ("search-0", "web_search", "started", None),
        ("search-0", "web_search", "completed", "cats"),
    ]
    # Added as one that has completed, as in 2025; told twice; not added at all.
    for pieces in (
        [added(0, web_search(0, "cats")), done(0, web_search(0, "cats"))],
        [done(0, {"type": "web_search_call", "arguments": '{"query":"cats","num_results":5}'})],
        [*searched(0, "cats"), *searched(0, "cats")],
        [done(0, web_search(0, "cats"))],
    ):
        assert calls(*pieces) == calls(*searched(0, "cats"))


@pytest.mark.parametrize("name", ["x_keyword_search", "x_semantic_search", "x_user_search"])
def test_searches_on_x(name: str) -> None:
    """A search on X comes as a custom tool's call, whose input is JSON in a string."""
    told = [("search-3", "x_search", "started", None), ("search-3", "x_search", "completed", "cats")]
    input_ = event("response.custom_tool_call_input.delta", output_index=3, delta='{"query":"cats"}')
    assert calls(added(3, x_search(3, "", name)), input_, done(3, x_search(3, "cats", name))) == told
    documented = {"type": "x_search_call", "action": {"query": "cats"}}
    assert calls(added(3, documented), done(3, documented)) == told


def test_searches_that_overlap() -> None:
    """A second search may start before the first completes, and have the same id."""
    same = web_search(0)
    pieces = [added(0, same), added(1, same), done(1, {**same, "action": {"query": "b"}}), done(0, web_search(0, "a"))]
    assert [(id, query) for id, _, status, query in calls(*pieces) if status == "completed"] == [
        ("search-1", "b"),
        ("search-0", "a"),
    ]


@pytest.mark.parametrize(
    "item",
    [
        {"type": "web_search_call"},
        {"type": "web_search_call", "action": {"type": "open_page", "url": "https://example.com"}},
        {"type": "web_search_call", "action": "search"},
        {"type": "custom_tool_call", "input": ""},
        {"type": "custom_tool_call", "input": "[" * 100_000},
        {"type": "custom_tool_call", "input": '{"query": 5}'},
        {"type": "custom_tool_call", "input": '["query"]'},
        {"type": "web_search_call", "arguments": ["query"]},
    ],
)
def test_searches_for_what_is_not_told(item: dict[str, Any]) -> None:
    """Where it is not told what was searched for, the search is told all the same."""
    assert [(status, query) for _, _, status, query in calls(done(0, item))] == [("started", None), ("completed", None)]


def test_searches_of_an_answer_cut_short() -> None:
    """Where no search is told to be done, the end of the answer tells that it was; one that it leaves out was not."""
    pieces = [added(0, web_search(0)), added(1, x_search(1, "")), added(2, web_search(2)), added(7, web_search(7))]
    output = [web_search(0, "cats"), x_search(1, "dogs"), message_item("a")]
    for begun in ([delta(2, "a")], []):
        events, decoder = decode(*pieces, *begun, ended("max_output_tokens", output))
        done_ = [(e.id, e.query) for e in events if isinstance(e, ToolCall) and e.status == "completed"]
        assert done_ == [("search-0", "cats"), ("search-1", "dogs")]
        assert (said(events), decoder.finished.reason) == (["a"], "length")
    events, decoder = decode(*pieces, delta(2, "a"), event("response.completed", response={"output": [5]}))
    assert (len(events), decoder.failure) == (5, None)


def test_other_items() -> None:
    """What else Grok may do is no search."""
    for kind in ("function_call", "code_interpreter_call", "mcp_call", "canary", None, 5, ["web_search_call"]):
        assert calls(added(0, {"type": kind}), done(0, {"type": kind})) == []


def test_too_many_searches() -> None:
    """The search after the last that is allowed ends the answer, and what came before it is told."""
    pieces = [delta(0, "a"), *searched(1, "q"), *searched(2, "q"), *searched(3, "q"), delta(4, "b"), ended()]
    events, decoder = decode(*pieces, max_tool_calls=2)
    assert text(events) == "a"
    assert len(events) == 5
    assert decoder.failure is not None
    assert isinstance(decoder.failure[0], errors.ToolLimit)
    assert (decoder.complete, decoder.ended) == (False, True)
    events, decoder = decode(*pieces, max_tool_calls=3)
    assert (text(events), decoder.failure) == ("a\n\nb", None)


def citations(*pieces: bytes) -> list[Source]:
    events, _ = decode(*pieces, ended())
    assert all(not isinstance(event, Citations) for event in events[:-1])
    return events[-1].sources if events and isinstance(events[-1], Citations) else []


def test_sources() -> None:
    """Each page is told once, in the order of its first mention, just before the end, in any of the three shapes."""
    a, b, c = "https://a.example/?q=1#x", "http://b.example", "HTTPS://c.example/\u00fc"
    shapes = [source(a, "1"), source(b, b, start_index=0, end_index=0), {"type": "url_citation", "url": c}]
    expected = [Source(a, "1"), Source(b, b), Source(c)]
    told = [cited(0, shape) for shape in shapes]
    assert citations(*opened(0), delta(0, "x"), told[0], delta(0, "y"), *told, *told, *closed(0, "xy")) == expected
    # In the message alone, or in the last event alone.
    assert citations(*opened(0), delta(0, "x"), *closed(0, "x", shapes)) == expected
    events, _ = decode(ended(None, [message_item("x", annotations=shapes)]))
    assert events == [TextDelta("x"), Citations(expected)]
    # In the last event alone, though the text came in deltas: of an answer that is cut short.
    cut = [
        *searched(0, "q"),
        delta(1, "x"),
        ended("max_output_tokens", [web_search(0), message_item("x", annotations=shapes)]),
    ]
    events, _ = decode(*cut)
    assert (said(events), events[-1]) == (["x"], Citations(expected))
    assert citations(delta(0, "x")) == []
    assert citations(told[0], cited(0, source(a, "another title"))) == [Source(a, "1")]


@pytest.mark.parametrize(
    "url",
    [
        "javascript:alert(1)",
        "JavaScript:alert(1)",
        " javascript:alert(1)",
        "data:text/html,x",
        "ftp://a.example",
        "//a.example",
        "https:a.example",
        "https://",
        "https:///path",
        "https://a.example/\r\n\r\nevent: error",
        "https://a.example/\u2028x",
        "https://a.example/ x",
        "https://a.example/\0",
        "\nhttps://a.example",
        "https://a.example/" + "x" * 2_000,
        "",
        None,
        5,
        ["https://a.example"],
    ],
)
def test_sources_that_are_no_pages(url: object) -> None:
    """What is no http or https address, breaks a line or is longer than an address is not told."""
    assert citations(cited(0, source(url))) == []


def test_odd_annotations() -> None:
    """An annotation of another shape is nothing; a title is text of a bounded length, or none."""
    odd: list[object] = [None, "https://a.example", [], {}, 5]
    for annotation in odd:
        assert citations(cited(0, annotation)) == []
    for title, told in (("x" * 100_000, "x" * 300), ("a\r\nb", "a\r\nb"), ("", None), (5, None), ({}, None)):
        assert citations(cited(0, source("https://a.example", title))) == [Source("https://a.example", told)]


def test_many_sources() -> None:
    """At most a hundred sources are told, however many there are."""
    pieces = [cited(0, source(f"https://example.com/{number}")) for number in range(10_000)]
    events, _ = decode(*pieces, ended())
    [told] = events
    assert isinstance(told, Citations)
    assert [item.url for item in told.sources] == [f"https://example.com/{number}" for number in range(100)]


# Progress and ends.


@pytest.mark.parametrize(
    ("piece", "progress"),
    [
        (CREATED, False),
        (IN_PROGRESS, False),
        (event("response.queued", response=response()), False),
        (b": keepalive\n\n", False),
        (event("response.doom_loop_check", canary=1), False),
        (b"data: null\n\n", False),
        (b"data:\n\n", False),
        (added(0, reasoning_item()), True),
        (added(0, web_search(0)), True),
        (event("response.web_search_call.searching", output_index=0), True),
        (event("response.canary.added", output_index=0), True),
        (event("response.output_text.delta", delta="a"), True),
        (delta(0, ""), True),
        (ended(), True),
    ],
)
def test_progress(piece: bytes, progress: bool) -> None:
    """What belongs to an item is progress; the response object, comments and unknown events are none."""
    decoder = Decoder(10)
    decoder.feed(piece)
    assert decoder.progressed == progress
    assert decoder.failure is None
    decoder.feed(b": keepalive\n\n")
    assert not decoder.progressed


def test_finish() -> None:
    """The last event tells reason, model and usage; of the counts the reasoning is no part of the completion."""
    _, decoder = decode(CREATED, delta(0, "a"))
    assert decoder.finished == Finished(model="grok-4.3", api="responses")
    assert not decoder.complete
    _, decoder = decode(CREATED, delta(0, "a"), ended(model="grok-5"))
    finished = decoder.finished
    assert json.loads(bytes(finished.usage)) == USAGE
    assert (finished.reason, finished.model, finished.api) == ("stop", "grok-5", "responses")
    assert finished.counts == Usage(prompt_tokens=12, completion_tokens=3, reasoning_tokens=5, cached_tokens=4)


def test_usage_of_a_failed_answer() -> None:
    """What a failed answer has used is told, too: it is paid."""
    told = response(status="failed", error={"code": "server_error", "message": "x"}, usage=USAGE)
    _, decoder = decode(CREATED, delta(0, "a"), event("response.failed", response=told))
    assert decoder.failure is not None
    assert json.loads(bytes(decoder.finished.usage)) == USAGE
    assert (decoder.finished.reason, decoder.finished.model) == (None, "grok-4.3")


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        ("max_output_tokens", "length"),
        ("content_filter", "content_filter"),
        ("max_time_limit", "max_time_limit"),
    ],
)
def test_incomplete(told: str, reason: str) -> None:
    """An answer that Grok did not complete is one all the same, without any event that closes its items."""
    events, decoder = decode(*opened(0), delta(0, "a"), ended(told))
    assert (text(events), decoder.complete, decoder.failure) == ("a", True, None)
    assert decoder.finished.reason == reason


@pytest.mark.parametrize("usage", [None, {}, {"output_tokens": "many"}, [], "x", 5])
def test_usage_of_another_shape(usage: object) -> None:
    """It is passed on as it came, and not counted."""
    _, decoder = decode(delta(0, "a"), ended(usage=usage))
    assert (json.loads(bytes(decoder.finished.usage)) if decoder.finished.usage else None) == usage
    assert decoder.finished.counts == Usage()
    _, decoder = decode(delta(0, "a"), ended().replace(b'"total_tokens"', b'"\xff"'))
    assert (decoder.finished.usage, decoder.finished.counts) == (Finished().usage, Usage())


@pytest.mark.parametrize("last", [b'"response":null', b'"response":{}', b'"response":{"incomplete_details":5}'])
def test_a_bare_end(last: bytes) -> None:
    """The last event ends the answer whatever it tells."""
    for kind, reason in ((b"completed", "stop"), (b"incomplete", "length")):
        events, decoder = decode(delta(0, "a"), b'data: {"type":"response.%b",%b}\n\n' % (kind, last))
        assert (text(events), decoder.complete, decoder.finished.reason) == ("a", True, reason)


def test_done_marker() -> None:
    """`[DONE]`, which is documented, ends an answer; and nothing counts after an end."""
    for end in (DONE, ended()):
        events, decoder = decode(delta(0, "a"), end, delta(0, "b"), event("error", message="x"), b"data: {\n\n")
        assert (text(events), decoder.complete, decoder.failure) == ("a", True, None)


@pytest.mark.parametrize(
    "fault",
    [
        event("error", code="x", message="canary", param=None),
        failed("server_error", "canary"),
        event("response.failed", response=None),
        b'data: {"code":"x","error":"canary"}\n\n',
        b'data: {"error":{"message":"canary","code":503}}\n\n',
        b"data: {canary\n\n",
        b'data: "canary"\n\n',
        b'data: {"type":5}\n\n',
        b'data: {"type":"response.output_text.delta","output_index":0,"delta":{}}\n\n',
        b'data: {"type":"response.output_text.delta","output_index":"0","delta":"a"}\n\n',
        b'data: {"type":"response.output_text.delta","output_index":0,"delta":"\\ud83d"\n\n',
        b'data: {"a":' + b"[" * 100_000 + b"\n\n",
        b'data: {"type":"response.completed","response":{"output":[5]}}\n\n',
    ],
)
def test_failures(fault: bytes) -> None:
    """An error in an event's place, or what is none, ends the answer; what came before it is told."""
    before = [] if b"output" in fault and b"[5]" in fault else [delta(0, "a")]
    events, decoder = decode(*before, fault, delta(0, "b"))
    assert text(events) == "a" * len(before)
    assert decoder.failure is not None
    error, detail = decoder.failure
    assert type(error) is errors.UpstreamFailed
    assert "canary" not in detail
    assert (decoder.complete, decoder.ended) == (False, True)


KNOWN = [
    ("rate_limit_exceeded", "canary", errors.UpstreamRateLimited),
    ("resource-exhausted", "canary", errors.UpstreamRateLimited),
    ("Some resource has been exhausted", "Too many requests", errors.UpstreamRateLimited),
    ("429", "canary", errors.UpstreamRateLimited),
    (429, "another canary", errors.UpstreamRateLimited),
    (None, "Rate limit reached for canary", errors.UpstreamRateLimited),
    ("resource-exhausted", "used all available credits", errors.UpstreamAuth),
    ("insufficient_quota", "canary", errors.UpstreamAuth),
    (None, "your team has reached its monthly spending limit", errors.UpstreamAuth),
    ("permission-denied", "canary", errors.UpstreamAuth),
    ("invalid-argument", "Incorrect API key provided", errors.UpstreamAuth),
    ("invalid_api_key", None, errors.UpstreamAuth),
    ("permission-denied", "Content violates usage guidelines.", errors.ContentPolicy),
    ("content_policy_violation", "canary", errors.ContentPolicy),
    ("invalid-argument", "maximum prompt length is 5", errors.ContextLengthExceeded),
    ("context_length_exceeded", "canary", errors.ContextLengthExceeded),
    ("invalid-argument", "canary", errors.UpstreamRejected),
    ("not-found", "Model not found: canary", errors.UpstreamRejected),
    (None, "This model does not support parameter canary", errors.UpstreamRejected),
    ("unavailable", "canary", errors.UpstreamOverloaded),
    (None, "The model is at capacity", errors.UpstreamOverloaded),
    ("503", None, errors.UpstreamOverloaded),
    ("500", "canary", errors.UpstreamFailed),
    ("server_error", "Internal error during token generation", errors.UpstreamFailed),
    (None, None, errors.UpstreamFailed),
]


@pytest.mark.parametrize(("code", "words", "kind"), KNOWN)
def test_failure_before_the_first_item(code: object, words: object, kind: type[errors.ChatError]) -> None:
    """Before anything of the answer came an error stands for the status that it would have had; after it, for none."""
    told = {"code": code, "message": words}
    for fault in (
        event("error", **told, param=None),
        event("error", error=told),
        event("response.failed", response=response(error=told)),
        b"data: " + json.dumps({"code": code, "error": words or "x"}).encode() + b"\n\n",
        b"data: " + json.dumps({"error": told}).encode() + b"\n\n",
    ):
        _, decoder = decode(CREATED, b": keepalive\n\n", fault)
        assert decoder.failure is not None
        assert type(decoder.failure[0]) is kind
        assert "canary" not in decoder.failure[1]
        _, decoder = decode(CREATED, added(0, reasoning_item()), fault)
        assert decoder.failure is not None
        assert type(decoder.failure[0]) is errors.UpstreamFailed


# Bounds.


@pytest.mark.parametrize(("size", "fits"), [(5_000_000, True), (7_900_000, True), (8_100_000, False)])
def test_the_last_event_may_be_large(size: int, fits: bool) -> None:
    """It repeats the whole answer, so it has a bound of its own; and no more of it is kept than is needed."""
    last = ended(None, [message_item("x" * size)])
    tracemalloc.start()
    try:
        events, decoder = decode(delta(0, "a"), last)
        finished = decoder.finished
        assert text(events) == "a"
        assert (decoder.failure is None) == fits
        assert finished.reason == ("stop" if fits else None)
        if fits:
            gc.collect()
            assert tracemalloc.get_traced_memory()[0] < 1_000_000
    finally:
        tracemalloc.stop()


def test_no_other_event_may_be_large() -> None:
    """An event of more than a megabyte is a fault, also after one that may be larger has begun and ended."""
    large = delta(0, "x" * 1_100_000)
    assert decode(delta(0, "a"), large)[1].failure is not None
    assert decode(delta(0, "a"), event("response.failed.canary"), large)[1].failure is not None
    assert decode(delta(0, "a"), b"event: response.completed\n\n", large[6:])[1].failure is not None
    assert decode(delta(0, "a"), delta(0, "x" * 990_000))[1].failure is None


def test_many_items() -> None:
    """What is remembered of an answer is bounded: one of more parts than any model makes is a fault."""
    _, decoder = decode(*(delta(number, "x") for number in range(10_000)))
    assert decoder.failure is None
    _, decoder = decode(*(delta(number, "x") for number in range(10_001)))
    assert decoder.failure is not None


@pytest.mark.parametrize(
    "unknown",
    [
        event("response.canary", delta={"a": 1}, text=[], part=5, annotation="x", error=None),
        event("response.canary.delta", output_index=0, delta="canary"),
        event("response.audio.delta", output_index=0, delta="canary"),
        event("response.function_call_arguments.delta", output_index=0, delta="canary"),
        event("response.image_generation_call.partial_image", output_index=0, partial_image_b64="canary"),
        b'data: {"canary": 1}\n\n',
        b"data: {}\n\n",
        event("response.output_item.added", output_index=0, item=None),
        event("response.output_item.done", output_index=0, item=None),
        event("response.canary", item="canary"),
        event("response.canary", response=["canary"], output_index=0),
        event("canary", output_index="0", content_index=0.5, summary_index={}),
        event("response.content_part.done", output_index=0, part={"type": "canary", "text": "canary"}),
    ],
)
def test_unknown_events(unknown: bytes) -> None:
    """What nobody knows yet changes nothing."""
    events, decoder = decode(CREATED, unknown, delta(1, "a"), unknown, delta(1, "b"), unknown, ended())
    assert events == [TextDelta("a"), TextDelta("b")]
    assert decoder.failure is None
