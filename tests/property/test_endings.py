"""Every stream has exactly one ending, and it is the true one, whatever Grok does."""

import json
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.conftest import Local, refusal, serving
from tests.readers import DONE as DONE_DATA
from tests.readers import READERS, Event, joined
from tests.upstream import CLOSE, DONE, HANG, RESET, USAGE, Signal, Upstream, chunk, frame, sse

TEXTS = [frame(chunk({"content": text})) for text in ("a", " b", "c\n", "[DONE]", "\r\n")]
QUIET = [
    frame(chunk({})),
    frame(chunk({"role": "assistant", "content": ""})),
    frame(chunk({"reasoning_content": "hm"})),
    frame(chunk(None)),
    frame(chunk(None, usage=USAGE)),
]
FINISH = [frame(chunk({}, finish=reason)) for reason in ("stop", "length")]
NOTHING = [b": ping\n\n", b"\n", b"event: x\n\n", b"retry: 1\nid: 2\n\n"]
FAULTS = [
    frame({"error": "canary", "code": "x"}),
    frame({"error": {"message": "canary", "code": 503}}),
    b"data: canary\n\n",
    b'data: {"choices": 5}\n\n',
    b"data: \xff\n\n",
    b"data: {}canary\n\n",
    b"data:\n\n",
]
CUT = [b"data", b'data: {"choices": [', b": pi", b"\xf0\x9f"]
ENDS: list[Signal | bytes] = [b"", CLOSE, RESET, b"", CLOSE, RESET, b"", CLOSE, RESET, HANG]  # to hang costs time


class Answer(NamedTuple):
    """What Grok sends: whole frames, maybe a part of one, then what it does with the connection."""

    frames: list[bytes]
    cut: bytes
    end: Signal | bytes
    at_once: bool
    """All in one write, or each frame in its own."""


frames = st.lists(
    st.one_of(*(st.sampled_from(kind) for kind in (TEXTS, TEXTS, QUIET, FINISH, NOTHING, FAULTS, [DONE]))), max_size=8
)
answers = st.builds(Answer, frames, st.sampled_from([b"", b"", *CUT]), st.sampled_from(ENDS), st.booleans())


def truth(answer: Answer) -> tuple[int, str, str]:
    """Status, code and text that the contract (A5, B8, C3) gives to this answer; "done" is the code of a good end."""
    begun = finished = False
    text = ""
    for sent in answer.frames:
        if sent in TEXTS + QUIET + FINISH:
            begun = True
            finished = finished or sent in FINISH
            if sent in TEXTS:
                text += json.loads(sent[6:])["choices"][0]["delta"]["content"].replace("\r\n", "\n")
        elif sent == DONE:
            if not begun:
                return 502, "upstream_error", ""
            finished = True
            break
        elif sent in FAULTS:
            if not finished:
                return (200 if begun else 502), "upstream_error", text
            break
    if finished:
        return 200, "done" if text else "empty_answer", text
    if answer.end is HANG:
        return (200, "idle_timeout", text) if begun else (504, "first_token_timeout", "")
    return (200, "upstream_cut_off", text) if begun else (502, "upstream_error", "")


@pytest.fixture(scope="module")
async def service(grok: Upstream) -> AsyncIterator[Local]:
    async with serving(grok.url, grok_retries=0) as service:
        yield service


@pytest.fixture(scope="module")
async def impatient(grok: Upstream) -> AsyncIterator[Local]:
    """A service for a Grok that hangs."""
    async with serving(grok.url, grok_retries=0, idle_timeout=0.5, first_token_timeout=0.5) as service:
        yield service


@pytest.mark.anyio
@given(answer=answers)
@example(Answer([TEXTS[0]], CUT[1], b"", at_once=True))
@example(Answer([TEXTS[0], FINISH[0]], CUT[1], HANG, at_once=False))
@example(Answer([FINISH[0], TEXTS[0]], b"", RESET, at_once=True))
@example(Answer([TEXTS[0], FAULTS[0], DONE], b"", b"", at_once=True))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_one_true_ending(grok: Upstream, service: Local, impatient: Local, answer: Answer) -> None:
    """A status that says what went wrong, or a 200 with all the text and then one end marker or one error event."""
    steps = [*answer.frames, answer.cut]
    grok.play(sse(*([b"".join(steps)] if answer.at_once else steps), answer.end))
    response = await (impatient if answer.end is HANG else service).ask()
    status, code, text = truth(answer)
    assert response.status_code == status
    assert "canary" not in response.text
    if status != 200:
        assert refusal(response)["code"] == code
        return
    for reader in READERS:
        *events, end = reader(response.content)
        assert [event for event in events if event.type != "message" or event.data == DONE_DATA] == []
        assert joined(events) == text
        assert said(end) == code


def said(end: Event) -> Any:
    return "done" if end == Event(DONE_DATA) else json.loads(end.data)["error"]["code"]
