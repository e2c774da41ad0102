"""Real answers of Grok, as others recorded them, arrive exactly.

They are read from the directory that XAI_RECORDINGS names.
"""

import hashlib
import json
import random
from collections.abc import Callable, Iterator
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from _pytest.mark import ParameterSet

from chatproxy.sse import Decoder
from tests.conftest import InProcessService, from_recordings
from tests.readers import DONE, READERS, Event, standard
from tests.upstream import Upstream, sse

pytestmark = pytest.mark.anyio


def recordings(directory: Path) -> Iterator[ParameterSet]:
    for path in sorted(directory.glob("*.sse")):
        yield pytest.param(path, id=path.stem)


class Recording(NamedTuple):
    body: bytes
    reads: list[int]
    """Byte lengths of the reads in which it was recorded; of its frames where that is not known."""
    deltas: list[Event]
    """Reasoning and text, each delta an event of ours."""
    finish: dict[str, Any]

    @property
    def text(self) -> list[Event]:
        return [event for event in self.deltas if event.type == "message"]


def load(path: Path) -> Recording:
    """The recording, taken apart by the standard's parser and Python's JSON, with none of our code."""
    body = path.read_bytes()
    meta = json.loads(path.with_suffix(".meta.json").read_text())
    chunks = [json.loads(event.data) for event in standard(body) if event.data != DONE]
    deltas = []
    finish: dict[str, Any] = {"finish_reason": None, "model": chunks[0]["model"], "usage": None, "api": "chat"}
    for chunk in chunks:
        finish["usage"] = chunk.get("usage", finish["usage"])
        for choice in chunk["choices"]:
            finish["finish_reason"] = choice.get("finish_reason", finish["finish_reason"])
            delta = choice["delta"]
            deltas += [Event(delta[key], kind) for key, kind in KINDS.items() if delta.get(key)]
    text = "".join(event.data for event in deltas if event.type == "message")
    assert hashlib.sha256(text.encode()).hexdigest() == meta["stats"]["text_sha256"]
    frames = [len(frame) + 2 for frame in body.split(b"\n\n")[:-1]]
    return Recording(body, meta.get("reads", frames), deltas, finish)


KINDS = {"reasoning_content": "reasoning", "content": "message"}


def as_recorded(recording: Recording) -> list[bytes]:
    edges = [0, *accumulate(recording.reads)]
    assert edges[-1] == len(recording.body)
    return [recording.body[a:b] for a, b in pairwise(edges)]


def byte_by_byte(recording: Recording) -> list[bytes]:
    """Single bytes; of a long recording the first and the last 20,000, and the rest as recorded."""
    pieces, start = [], 0
    for size in recording.reads:
        read = recording.body[start : start + size]
        outer = start < 20_000 or start + size > len(recording.body) - 20_000
        pieces += [read[i : i + 1] for i in range(size)] if outer else [read]
        start += size
    return pieces


def at_random(recording: Recording) -> list[bytes]:
    chance = random.Random(recording.body)  # noqa: S311 -- the same cuts each time
    size = len(recording.body)
    edges = sorted({0, *chance.sample(range(1, size), k=min(size // 20, 2000)), size})
    return [recording.body[a:b] for a, b in pairwise(edges)]


@pytest.mark.parametrize("cut", [as_recorded, byte_by_byte, at_random])
@pytest.mark.parametrize("path", from_recordings(recordings))
async def test_recording(
    grok: Upstream, service: InProcessService, path: Path, cut: Callable[[Recording], list[bytes]]
) -> None:
    """One event for each delta, its text unchanged, then the finish, then the one true end."""
    recording = load(path)
    grok.set_scripts(sse(*cut(recording)))
    response = await service.ask(include=["reasoning", "finish"])
    assert response.status_code == 200
    for reader in READERS:
        *events, finish, end = reader(response.content)
        assert events == recording.deltas
        assert finish.type == "finish"
        assert json.loads(finish.data) == recording.finish
        assert is_true(end, recording)


@pytest.mark.parametrize("path", from_recordings(recordings))
async def test_text_alone(grok: Upstream, service: InProcessService, path: Path) -> None:
    """To who asks for nothing else a recording is nothing but its text, and its end."""
    recording = load(path)
    grok.set_scripts(sse(*as_recorded(recording)))
    response = await service.ask()
    for reader in READERS:
        *events, end = reader(response.content)
        assert events == recording.text
        assert is_true(end, recording)


@pytest.mark.parametrize("path", from_recordings(recordings))
def test_every_byte_alone(path: Path) -> None:
    """The decoder finds the same events when all of a recording comes byte by byte."""
    body = path.read_bytes()
    decoder = Decoder()
    events = [data.decode() for i in range(len(body)) for data in decoder.feed(body[i : i + 1])]
    assert events == [event.data for event in standard(body)]


def is_true(end: Event, recording: Recording) -> bool:
    """Whether this is the end for a recording with text, or without."""
    if recording.text:
        return end == Event(DONE)
    return end.type == "error" and json.loads(end.data)["error"]["code"] == "empty_answer"
