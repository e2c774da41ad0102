"""What the two formats of other people's front ends make of neutral events: no network, no clock."""

import json
from typing import Any

import pytest

from chatproxy.errors import Stopped, UpstreamFailed
from chatproxy.events import (
    Citations,
    Done,
    Event,
    Failed,
    Finished,
    ReasoningDelta,
    Source,
    Started,
    TextDelta,
    ToolCall,
    Usage,
)
from chatproxy.formats import StreamFormat
from chatproxy.formats.openai import Chunks, Whole
from chatproxy.formats.plain import Include, Plain
from chatproxy.formats.ui_messages import ALL, UIMessages, read_chat_id, recognizes
from tests.readers import DONE, standard

SEARCHED: list[Event] = [
    Started("grok-4.3"),
    ReasoningDelta("hm"),
    ToolCall("t1", "web_search", "started"),
    ToolCall("t1", "web_search", "completed", "the weather"),
    ToolCall("t2", "x_search", "started"),
    ToolCall("t2", "x_search", "completed"),
    TextDelta("It "),
    TextDelta("rains"),
    Citations([Source("https://a.example/", "A"), Source("http://b.example/?q=1")]),
    Finished("stop", "grok-4.3", counts=Usage(12, 3, 5, 4), api="responses"),
    Done(),
]
ALL_TOKENS = {
    "inputTokens": 12,
    "outputTokens": 8,
    "totalTokens": 20,
    "reasoningTokens": 5,
    "cachedInputTokens": 4,
}


def ui(events: list[Event], *include: Include) -> list[Any]:
    """The chunks of a UI message stream, after the two that open it."""
    frames = UIMessages("m1", include or ALL).encode(events)
    assert all(frame.endswith(b"\n\n") and frame.count(b"\n") == 2 for frame in frames)
    chunks = [event.data if event.data == DONE else json.loads(event.data) for event in standard(b"".join(frames))]
    assert chunks[:2] == [{"type": "start", "messageId": "m1"}, {"type": "start-step"}]
    return chunks[2:]


def test_search_as_ui_messages() -> None:
    """Searches are finished calls of dynamic tools that the page must not execute, pages are sources at the end."""
    flags = {"providerExecuted": True, "dynamic": True}
    first, second = "m1-t1", "m1-t2"  # no other message's calls have these ids
    assert ui(SEARCHED) == [
        {"type": "reasoning-start", "id": "1"},
        {"type": "reasoning-delta", "id": "1", "delta": "hm"},
        {"type": "reasoning-end", "id": "1"},
        {"type": "tool-input-start", "toolCallId": first, "toolName": "web_search", **flags},
        {
            "type": "tool-input-available",
            "toolCallId": first,
            "toolName": "web_search",
            "input": {"query": "the weather"},
            **flags,
        },
        {"type": "tool-output-available", "toolCallId": first, "output": {}, **flags},
        {"type": "tool-input-start", "toolCallId": second, "toolName": "x_search", **flags},
        {"type": "tool-input-available", "toolCallId": second, "toolName": "x_search", "input": {}, **flags},
        {"type": "tool-output-available", "toolCallId": second, "output": {}, **flags},
        {"type": "text-start", "id": "2"},
        {"type": "text-delta", "id": "2", "delta": "It "},
        {"type": "text-delta", "id": "2", "delta": "rains"},
        {"type": "text-end", "id": "2"},
        {"type": "source-url", "sourceId": "1", "url": "https://a.example/", "title": "A"},
        {"type": "source-url", "sourceId": "2", "url": "http://b.example/?q=1"},
        {"type": "finish-step"},
        {
            "type": "finish",
            "finishReason": "stop",
            "messageMetadata": {"model": "grok-4.3", "usage": ALL_TOKENS},
        },
        DONE,
    ]


def test_parts_that_alternate() -> None:
    """A part is closed before one of another kind opens, and each has an id of its own."""
    deltas: list[Event] = [TextDelta("a"), ReasoningDelta("b"), ReasoningDelta("c"), TextDelta("d")]
    events = [Started(), *deltas, Finished(), Done()]
    assert [(chunk["type"], chunk.get("id")) for chunk in ui(events)[:-3]] == [
        *[("text-start", "1"), ("text-delta", "1"), ("text-end", "1")],
        *[("reasoning-start", "2"), ("reasoning-delta", "2"), ("reasoning-delta", "2"), ("reasoning-end", "2")],
        *[("text-start", "3"), ("text-delta", "3"), ("text-end", "3")],
    ]


@pytest.mark.parametrize("missing", sorted(ALL))
def test_include_as_ui_messages(missing: Include) -> None:
    """What is not included is not sent, and leaves no trace."""
    told = {chunk["type"] for chunk in ui(SEARCHED)[:-1]}
    types = {
        "reasoning": {"reasoning-start", "reasoning-delta", "reasoning-end"},
        "tools": {"tool-input-start", "tool-input-available", "tool-output-available"},
        "citations": {"source-url"},
        "finish": set[str](),
    }[missing]
    rest = ui(SEARCHED, *(ALL - {missing}))
    assert {chunk["type"] for chunk in rest[:-1]} == told - types
    assert ("messageMetadata" in rest[-2]) == (missing != "finish")


@pytest.mark.parametrize(
    ("reason", "as_ui", "as_openai"),
    [
        ("stop", "stop", "stop"),
        ("length", "length", "length"),
        ("content_filter", "content-filter", "content_filter"),
        ("tool_calls", "tool-calls", "tool_calls"),
        ("a new one", "other", "stop"),
        (None, "stop", "stop"),
    ],
)
def test_finish_reasons(reason: str | None, as_ui: str, as_openai: str) -> None:
    """The clients get a finish reason that they know, whatever Grok says."""
    events: list[Event] = [Started(), TextDelta("a"), Finished(reason), Done()]
    assert ui(events)[-2] == {"type": "finish", "finishReason": as_ui}
    chunk = json.loads(Chunks("r", "m", 0, include_usage=False).encode(events)[-2][6:])
    assert chunk["choices"] == [{"index": 0, "delta": {}, "finish_reason": as_openai}]
    [whole] = Whole("r", "m", 0, 100).encode(events)
    assert json.loads(whole)["choices"][0]["finish_reason"] == as_openai


@pytest.mark.parametrize(
    ("counts", "as_ui", "as_openai"),
    [
        (Usage(), None, None),
        (
            Usage(12, 3),
            {"inputTokens": 12, "outputTokens": 3, "totalTokens": 15},
            {"prompt_tokens": 12, "completion_tokens": 3, "total_tokens": 15},
        ),
        (
            Usage(reasoning_tokens=5),
            {"outputTokens": 5, "totalTokens": 5, "reasoningTokens": 5},
            {
                "prompt_tokens": 0,
                "completion_tokens": 5,
                "total_tokens": 5,
                "completion_tokens_details": {"reasoning_tokens": 5},
            },
        ),
        (
            Usage(12, 0, 5, 0),
            {"inputTokens": 12, "outputTokens": 5, "totalTokens": 17, "reasoningTokens": 5, "cachedInputTokens": 0},
            {
                "prompt_tokens": 12,
                "completion_tokens": 5,
                "total_tokens": 17,
                "prompt_tokens_details": {"cached_tokens": 0},
                "completion_tokens_details": {"reasoning_tokens": 5},
            },
        ),
    ],
)
def test_usage(counts: Usage, as_ui: Any, as_openai: Any) -> None:
    """What was generated includes the reasoning, totals add up, and what is not known is left out."""
    events: list[Event] = [Started(), TextDelta("a"), Finished("stop", None, counts=counts), Done()]
    finish = ui(events)[-2]
    assert finish.get("messageMetadata", {}).get("usage") == as_ui
    frames = Chunks("r", "m", 0, include_usage=True).encode(events)
    told = [chunk["usage"] for frame in frames[:-1] if "usage" in (chunk := json.loads(frame[6:]))]
    assert told == ([] if as_openai is None else [as_openai])
    [whole] = Whole("r", "m", 0, 100).encode(events)
    assert json.loads(whole)["usage"] == as_openai


def test_failure_as_ui_messages() -> None:
    """What Grok has told of the end comes before the error; without it the error is alone, and nothing follows."""
    error = {"type": "error", "errorText": Stopped.message}
    counted = Finished(None, "grok-4.3", counts=Usage(12, 3))
    events: list[Event] = [Started(), TextDelta("a"), counted, Failed(Stopped())]
    usage = {"inputTokens": 12, "outputTokens": 3, "totalTokens": 15}
    metadata = {"type": "message-metadata", "messageMetadata": {"model": "grok-4.3", "usage": usage}}
    assert ui(events)[2:] == [metadata, error]
    assert ui(events, "reasoning")[2:] == [error]
    assert ui([Started(), Failed(Stopped())]) == [error]


def test_search_as_chunks() -> None:
    """Searches are not shown; pages come as annotations before the end; the model is what Grok calls itself."""
    *frames, done = Chunks("r", "configured", 1_700_000_000, include_usage=False).encode(SEARCHED)
    assert done == b"data: [DONE]\n\n"
    chunks = [json.loads(frame.removeprefix(b"data: ")) for frame in frames]
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert {(chunk["object"], chunk["created"], chunk["model"]) for chunk in chunks} == {
        ("chat.completion.chunk", 1_700_000_000, "grok-4.3")
    }
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"role": "assistant", "reasoning_content": "hm"},
        {"content": "It "},
        {"content": "rains"},
        {"annotations": ANNOTATIONS},
        {},
    ]


@pytest.mark.parametrize(
    "format", [Plain("r", ALL), UIMessages("m1"), Chunks("r", "m", 1_700_000_000, include_usage=False)]
)
def test_strange_line_breaks(format: StreamFormat) -> None:
    """Titles and queries come from the web: what Python's `str.splitlines` breaks lines at is escaped in them, too."""
    breaks = "a\u2028b\u2029c\x85d\ne"
    events: list[Event] = [
        ToolCall("t1", "web_search", "completed", breaks),
        Citations([Source("https://a.example/", breaks)]),
    ]
    lines = b"".join(format.encode(events)).decode().splitlines()
    told = [json.loads(line.removeprefix("data: ")) for line in lines if line and not line.startswith("event: ")]
    assert repr(breaks) in str(told)


ANNOTATIONS = [
    {
        "type": "url_citation",
        "url_citation": {"url": "https://a.example/", "title": "A", "start_index": 0, "end_index": 0},
    },
    {
        "type": "url_citation",
        "url_citation": {
            "url": "http://b.example/?q=1",
            "title": "http://b.example/?q=1",
            "start_index": 0,
            "end_index": 0,
        },
    },
]


def test_search_as_a_whole() -> None:
    """All of it is in the message of the one JSON."""
    format = Whole("r", "configured", 1_700_000_000, 100)
    assert format.encode(SEARCHED[:5]) == []
    [answer] = format.encode(SEARCHED[5:])
    told = json.loads(answer)
    assert told.pop("id").startswith("chatcmpl-")
    assert told == {
        "object": "chat.completion",
        "created": 1_700_000_000,
        "model": "grok-4.3",
        "choices": [
            {
                "index": 0,
                "message": {
                    "role": "assistant",
                    "content": "It rains",
                    "refusal": None,
                    "reasoning_content": "hm",
                    "annotations": ANNOTATIONS,
                },
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": 12,
            "completion_tokens": 8,
            "total_tokens": 20,
            "prompt_tokens_details": {"cached_tokens": 4},
            "completion_tokens_details": {"reasoning_tokens": 5},
        },
    }


def test_bound_of_a_whole() -> None:
    """Text and reasoning count together, in bytes; one more than allowed is the end."""
    format = Whole("r", "m", 0, 5)
    assert format.encode([Started(), ReasoningDelta("é"), TextDelta("abc")]) == []
    with pytest.raises(UpstreamFailed):
        format.encode([TextDelta("d")])


UUID = "0b8a1f4e-6c1d-4f7a-9b57-1d2c3e4f5a6b"


@pytest.mark.parametrize(
    ("given", "name"),
    [
        (UUID, UUID),
        (UUID.upper(), UUID),
        (UUID.replace("-", ""), None),
        (f"{{{UUID}}}", None),
        (f"urn:uuid:{UUID}", None),
        ("chat", None),
        ("", None),
        ("aBcDeFgHiJkLmNoP", None),
        (UUID + "\n", None),
    ],
)
def test_chat_ids(given: str, name: str | None) -> None:
    """Only a UUID, written as everybody writes it, is a name under which an answer can be read."""
    assert read_chat_id(given) == name


@pytest.mark.parametrize(
    ("body", "recognized"),
    [
        ('{"messages": [{"parts": []}]}', True),
        ('{"messages": [{"role": "user", "content": "x"}, {"parts": null}]}', True),
        ('{"messages": [{"parts": [], "content": null}]}', True),
        ('{"messages": [{"parts": [], "content": "x"}]}', False),
        ('{"messages": [{"parts": [], "content": ""}]}', False),
        ('{"messages": [{"content": "\\"parts\\""}]}', False),
        ('{"messages": [{}], "parts": []}', False),
        ('{"messages": "x", "parts": []}', False),
        ('{"messages": [{"parts": []}', False),
        ("[" * 10_000 + '"parts"', False),
    ],
)
def test_shape(body: str, recognized: bool) -> None:
    """A body is the AI SDK's if some message has parts and no content."""
    assert recognizes(body.encode()) == recognized
