"""Any answer arrives exactly, however it is cut into deltas and its bytes into reads."""

import json
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from chatproxy import sse
from tests import readers, upstream
from tests.conftest import InProcessService
from tests.readers import READERS, Event, joined
from tests.upstream import Upstream

# What has torn answers apart elsewhere.
SPECIAL = [
    *[
        "\r",
        "\n",
        "\r\n",
        "\n\n",
        "[DONE]",
        "\n[DONE]\n",
        "\r\n[DONE]\r\n",
        "[DO",
        "NE]",
        "data: ",
        "data: [DONE]\n\n",
        ":",
        ": c",
    ],
    *[
        "\u2028",
        "\u2029",
        "\u0085",
        "\0",
        "\x0b",
        "\x0c",
        "\x1c",
        "\x1e",
        "\ufeff",
        " ",
        "\t",
        "😀",
        "é",
        "\\",
        '"',
        "\\n",
    ],
]
texts = (
    st.lists(st.one_of(st.sampled_from(SPECIAL), st.text(max_size=8)), min_size=1, max_size=12)
    .map("".join)
    .filter(bool)
)


@st.composite
def deltas(draw: st.DrawFn) -> list[str]:
    """A text, cut anywhere; some deltas are empty."""
    text = draw(texts)
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=8)))
    return [text[a:b] for a, b in pairwise([0, *cuts, len(text)])]


def folded(text: str) -> str:
    """The text with the only line break that an event stream can carry."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


@given(deltas())
@example(["x\r", "\n[DONE]"])
@example(["\r\n[DONE]\r", "\n", "[DONE]\n"])
@settings(max_examples=1000)
def test_frames_are_exact(answer: list[str]) -> None:
    """The frames of any deltas join to the text in every reader, and no line of them is the end marker."""
    text = sse.DeltaSplitter()
    frames = [sse.encode(data) for delta in answer for data in text.feed(delta)]
    assert b"data: [DONE]" not in b"".join(frames).split(b"\n")
    for reader in READERS:
        events = reader(b"".join(frames))
        assert "".join(event.data for event in events) == folded("".join(answer))
        assert {event.type for event in events} <= {"message"}


@st.composite
def streams(draw: st.DrawFn) -> tuple[list[str], list[str], list[bytes]]:
    """Reasoning, an answer, and the pieces in which an upstream that speaks in its own way sends them."""
    reasoning, answer = draw(deltas()), draw(deltas())
    end_of_line = draw(st.sampled_from(["\n", "\r\n", "\r"]))
    escaped = draw(st.booleans())
    space = draw(st.sampled_from(["", " "]))
    body = draw(st.sampled_from(["", "\ufeff", ": hello\n\n"]))
    for delta in [*({"reasoning_content": text} for text in reasoning), *({"content": text} for text in answer)]:
        body += f"data:{space}{json.dumps(upstream.chunk(delta), ensure_ascii=escaped)}{end_of_line}{end_of_line}"
    data = body.encode() + upstream.DONE
    cuts = sorted(draw(st.lists(st.integers(1, len(data) - 1), max_size=6)))
    return reasoning, answer, [data[a:b] for a, b in pairwise([0, *cuts, len(data)])]


UI = {"messages": [{"role": "user", "parts": [{"type": "text", "text": "Hi"}]}]}
OPENAI = {"messages": [{"role": "user", "content": "Hi"}]}


def ui_texts(body: bytes) -> tuple[str, str]:
    """Reasoning and text of a UI message stream, in every reader of event streams."""
    texts = []
    for reader in READERS:
        *events, end = reader(body)
        assert end.data == readers.DONE
        chunks = [json.loads(event.data) for event in events if event.data]  # httpx-sse makes events of comments
        deltas: dict[str, list[str]] = {"reasoning-delta": [], "text-delta": []}
        for chunk in chunks:
            deltas.get(chunk["type"], []).append(chunk.get("delta", ""))
        texts.append(("".join(deltas["reasoning-delta"]), "".join(deltas["text-delta"])))
    assert texts == [texts[0]] * len(READERS)
    return texts[0]


def chunk_texts(body: bytes) -> tuple[str, str]:
    """Those of OpenAI's chunks, read line by line as some clients do, with every line break that Python knows."""
    lines = [line.removeprefix("data: ") for line in body.decode().splitlines() if line]
    assert lines[-1] == readers.DONE
    found = [json.loads(line)["choices"][0]["delta"] for line in lines[:-1]]
    return "".join(d.get("reasoning_content", "") for d in found), "".join(d.get("content", "") for d in found)


def whole_texts(body: bytes) -> tuple[str, str]:
    """Those of one JSON."""
    message = json.loads(body)["choices"][0]["message"]
    return message.get("reasoning_content", ""), message["content"]


FORMATS: list[tuple[str, dict[str, Any], Callable[[bytes], tuple[str, str]]]] = [
    ("/api/chat", UI, ui_texts),
    ("/api/chat", {**UI, "resumable": True}, ui_texts),
    ("/v1/chat/completions", {**OPENAI, "stream": True}, chunk_texts),
    ("/v1/chat/completions", OPENAI, whole_texts),
]


@pytest.mark.anyio
@given(stream=streams())
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_other_formats_are_exact(
    grok: Upstream, service: InProcessService, stream: tuple[list[str], list[str], list[bytes]]
) -> None:
    """In JSON not even the line breaks are folded: text and reasoning are what Grok has sent, in each format."""
    reasoning, answer, pieces = stream
    grok.set_scripts(upstream.sse(*pieces))
    for path, body, texts in FORMATS:
        response = await service.client.post(path, json=body)
        assert response.status_code == 200
        assert texts(response.content) == ("".join(reasoning), "".join(answer))


@pytest.mark.anyio
@given(stream=streams())
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_answers_are_exact(
    grok: Upstream, service: InProcessService, stream: tuple[list[str], list[str], list[bytes]]
) -> None:
    """Over real sockets, in every reader: the joined events are the answer, the reasoning events the reasoning."""
    reasoning, answer, pieces = stream
    grok.set_scripts(upstream.sse(*pieces))
    response = await service.ask(include=["reasoning"])
    assert response.status_code == 200
    for reader in READERS:
        events = reader(response.content)
        assert joined(events, "reasoning") == folded("".join(reasoning))
        assert joined(events) == folded("".join(answer))
        assert [event for event in events if event.data == readers.DONE and event.type == "message"] == events[-1:]
        assert events[-1] == Event(readers.DONE)
