"""Real answers of Grok, as others recorded them, arrive exactly.

They are read from the directory that XAI_RECORDINGS names.
"""

import hashlib
import json
import os
import random
from collections.abc import Callable, Iterator
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.conftest import Local
from tests.readers import DONE, READERS, Event, standard
from tests.upstream import Upstream, sse

pytestmark = pytest.mark.anyio

NONE = pytest.param(None, marks=pytest.mark.skip(reason="XAI_RECORDINGS names no directory of recordings"), id="none")


def recordings() -> Iterator[Any]:
    directory = os.environ.get("XAI_RECORDINGS")
    paths = sorted(Path(directory).glob("*.sse")) if directory else []
    yield from (pytest.param(path, id=path.stem) for path in paths) if paths else [NONE]


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
    finish: dict[str, Any] = {"finish_reason": None, "model": chunks[0]["model"], "usage": None}
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
    return [recording.body[i : i + 1] for i in range(len(recording.body))]


def at_random(recording: Recording) -> list[bytes]:
    chance = random.Random(recording.body)  # noqa: S311 -- the same cuts each time
    size = len(recording.body)
    edges = sorted({0, *chance.sample(range(1, size), k=min(size // 20, 2000)), size})
    return [recording.body[a:b] for a, b in pairwise(edges)]


@pytest.mark.parametrize("cut", [as_recorded, byte_by_byte, at_random])
@pytest.mark.parametrize("path", [*recordings()])
async def test_recording(grok: Upstream, service: Local, path: Path, cut: Callable[[Recording], list[bytes]]) -> None:
    """One event for each delta, its text unchanged, then the finish, then an end as B8 says."""
    recording = load(path)
    grok.play(sse(*cut(recording)))
    response = await service.ask(include=["reasoning", "finish"])
    assert response.status_code == 200
    for reader in READERS:
        *events, finish, end = reader(response.content)
        assert events == recording.deltas
        assert finish.type == "finish"
        assert json.loads(finish.data) == recording.finish
        assert is_true(end, recording)


@pytest.mark.parametrize("path", [*recordings()])
async def test_text_alone(grok: Upstream, service: Local, path: Path) -> None:
    """To who asks for nothing else a recording is nothing but its text, and its end."""
    recording = load(path)
    grok.play(sse(*as_recorded(recording)))
    response = await service.ask()
    for reader in READERS:
        *events, end = reader(response.content)
        assert events == recording.text
        assert is_true(end, recording)


def is_true(end: Event, recording: Recording) -> bool:
    """Whether this is the end for a recording with text, or without."""
    if recording.text:
        return end == Event(DONE)
    return end.type == "error" and json.loads(end.data)["error"]["code"] == "empty_answer"
