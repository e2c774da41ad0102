"""Real answers of Grok on the Responses API, as others recorded them, arrive exactly.

They are read from the directory that XAI_RESPONSES_RECORDINGS names.
"""

import json
import random
from collections.abc import AsyncIterator, Callable, Iterator
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from _pytest.mark import ParameterSet

from tests.conftest import InProcessService, from_recordings, refusal, serving
from tests.readers import DONE, READERS, Event, joined, standard
from tests.upstream import Upstream, error, sse

pytestmark = pytest.mark.anyio

VARIABLE = "XAI_RESPONSES_RECORDINGS"


@pytest.fixture(scope="module")
async def service(grok: Upstream) -> AsyncIterator[InProcessService]:
    async with serving(grok.url, grok_api="responses", grok_tools="web_search,x_search", grok_retries=0) as service:
        yield service


def recordings(directory: Path) -> Iterator[ParameterSet]:
    for path in sorted(directory.glob("*.sse")):
        yield pytest.param(path, id=path.stem)


class Recording(NamedTuple):
    body: bytes
    reads: list[int]
    """Byte lengths of the reads in which it was recorded; of its frames where that is not known."""
    events: list[Event]
    """Text, reasoning and searches, each delta an event of ours."""
    citations: list[dict[str, str]]
    finish: dict[str, Any]
    text: str
    """The text of the messages in the last event."""


def load(path: Path) -> Recording:
    """The recording, taken apart by the standard's parser and Python's JSON, with none of our code."""
    body = path.read_bytes()
    meta = json.loads(path.with_suffix(".meta.json").read_text())
    sent = [json.loads(event.data) for event in standard(body)]
    events: list[Event] = []
    pages: dict[str, dict[str, str]] = {}
    for told in sent:
        match told["type"].removeprefix("response."):
            case "output_text.delta":
                events.append(Event(told["delta"]))
            case "reasoning_summary_text.delta":
                events.append(Event(told["delta"], "reasoning"))
            case "output_item.added" if tool := tool_of(told["item"]):
                events.append(Event(json.dumps({"tool": tool, "status": "started"}), "tool"))
            case "output_item.done" if tool := tool_of(told["item"]):
                item = told["item"]
                asked = item.get("action") or json.loads(item.get("input") or item["arguments"])
                completed = {"tool": tool, "status": "completed", "query": asked["query"]}
                events.append(Event(json.dumps(completed), "tool"))
            case "output_text.annotation.added":
                note = told["annotation"]
                pages.setdefault(note["url"], {key: note[key] for key in ("url", "title") if key in note})
            case _:
                pass
    last = sent[-1]["response"]
    finish = {
        "finish_reason": "stop" if last["status"] == "completed" else "length",
        "model": last["model"],
        "usage": last["usage"],
        "api": "responses",
    }
    messages = [item["content"] for item in last["output"] if item["type"] == "message"]
    text = "\n\n".join("".join(part["text"] for part in parts) for parts in messages)
    frames = [len(frame) + 2 for frame in body.split(b"\n\n")[:-1]]
    return Recording(body, meta.get("reads", frames), events, [*pages.values()], finish, text)


def tool_of(item: dict[str, Any]) -> str | None:
    return {"web_search_call": "web_search", "custom_tool_call": "x_search"}.get(item["type"])


def as_recorded(recording: Recording) -> list[bytes]:
    edges = [0, *accumulate(recording.reads)]
    assert edges[-1] == len(recording.body)
    return [recording.body[a:b] for a, b in pairwise(edges)]


def byte_by_byte(recording: Recording) -> list[bytes]:
    """Single bytes, of a long recording the first and the last 10,000."""
    body, size = recording.body, 10_000
    ends = [body[:size], body[-size:]] if len(body) > 2 * size else [body, b""]
    single = [[bytes([byte]) for byte in part] for part in ends]
    return [*single[0], body[size:-size], *single[1]] if ends[1] else single[0]


def at_random(recording: Recording) -> list[bytes]:
    chance = random.Random(recording.body)  # noqa: S311 -- the same cuts each time
    size = len(recording.body)
    edges = sorted({0, *chance.sample(range(1, size), k=min(size // 20, 1000)), size})
    return [recording.body[a:b] for a, b in pairwise(edges)]


@pytest.mark.parametrize("cut", [as_recorded, byte_by_byte, at_random])
@pytest.mark.parametrize("path", from_recordings(recordings, VARIABLE))
async def test_responses_recording(
    grok: Upstream, service: InProcessService, path: Path, cut: Callable[[Recording], list[bytes]]
) -> None:
    """One event for each delta and each step of a search, then the sources, then the finish, then the end."""
    recording = load(path)
    grok.set_scripts(sse(*cut(recording)))
    response = await service.ask(include=["reasoning", "tools", "citations", "finish"])
    assert response.status_code == 200
    for reader in READERS:
        *events, finish, end = reader(response.content)
        assert end == Event(DONE)
        assert finish.type == "finish"
        assert json.loads(finish.data) == recording.finish
        if recording.citations:
            told = events.pop()
            assert told.type == "citations"
            assert json.loads(told.data) == recording.citations
        assert [parsed(event) for event in events] == [parsed(event) for event in recording.events]
        assert joined(events) == recording.text


def parsed(event: Event) -> Any:
    return (event.type, json.loads(event.data)) if event.type == "tool" else event


@pytest.mark.parametrize("path", from_recordings(recordings, VARIABLE))
async def test_responses_recording_alone(grok: Upstream, service: InProcessService, path: Path) -> None:
    """To who asks for nothing else a recording is nothing but its text, and its end."""
    recording = load(path)
    grok.set_scripts(sse(*as_recorded(recording)))
    response = await service.ask()
    for reader in READERS:
        assert reader(response.content) == [
            *(event for event in recording.events if event.type == "message"),
            Event(DONE),
        ]


REFUSED = {
    "error-400-effort-none": "upstream_rejected",
    "error-422-malformed-input": "upstream_rejected",
    "nonstream-200-web-search": "upstream_error",
}


def refusals(directory: Path) -> Iterator[ParameterSet]:
    for path in sorted(directory.glob("*.json")):
        if not path.name.endswith(".meta.json"):
            yield pytest.param(path, id=path.stem)


@pytest.mark.parametrize("path", from_recordings(refusals, VARIABLE))
async def test_recorded_refusals(grok: Upstream, service: InProcessService, path: Path) -> None:
    """Recorded answers that are no stream have the status and code of the table, and say nothing of Grok's words."""
    meta = json.loads(path.with_suffix(".meta.json").read_text())
    grok.set_scripts(error(meta["response"]["status"], path.read_bytes()))
    response = await service.ask()
    assert (response.status_code, refusal(response)["code"]) == (502, REFUSED[path.stem])
    assert path.read_text()[:60] not in response.text
