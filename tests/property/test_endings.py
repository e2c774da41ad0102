"""Every stream has exactly one ending, and it is the true one, whatever Grok does."""

import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests import responses
from tests.conftest import InProcessService, refusal, serving
from tests.readers import DONE as DONE_DATA
from tests.readers import READERS, Event, joined
from tests.upstream import CLOSE, DONE, HANG, RESET, USAGE, Signal, Upstream, chunk, frame, sse


class Wire(NamedTuple):
    """What Grok may send on one of its APIs."""

    texts: dict[bytes, str]
    """Frames with text, and that text as it arrives."""
    quiet: list[bytes]
    """Frames without, which are a beginning all the same."""
    finish: list[bytes]
    nothing: list[bytes]
    """What is no beginning, and changes nothing."""
    faults: dict[bytes, tuple[int, str]]
    """What ends an answer, and the status and code if it comes before the beginning."""
    cut: list[bytes]
    closed: bool
    """Nothing counts after the finish, not even text."""


TEXTS = ("a", " b", "c\n", "[DONE]", "\r\n")
NOTHING = [b": ping\n\n", b"\n", b"event: x\n\n", b"retry: 1\nid: 2\n\n", b"data:\n\n"]
FAILED = 502, "upstream_error"
FAULTS = [b"data: canary\n\n", b"data: \xff\n\n", b"data: {}canary\n\n"]
CUT = [b"data", b'data: {"choices": [', b": pi", b"\xf0\x9f", b"event: response.completed\n"]
CHAT = Wire(
    texts={frame(chunk({"content": text})): text.replace("\r\n", "\n") for text in TEXTS},
    quiet=[
        frame(chunk({})),
        frame(chunk({"role": "assistant", "content": ""})),
        frame(chunk({"reasoning_content": "hm"})),
        frame(chunk(None)),
        frame(chunk(None, usage=USAGE)),
    ],
    finish=[frame(chunk({}, finish=reason)) for reason in ("stop", "length")],
    nothing=NOTHING,
    faults=dict.fromkeys(
        [
            frame({"error": "canary", "code": "x"}),
            frame({"error": {"message": "canary", "code": 503}}),
            b'data: {"choices": 5}\n\n',
            *FAULTS,
        ],
        FAILED,
    ),
    cut=CUT,
    closed=False,
)
RESPONSES = Wire(
    texts={responses.delta(7, text): text.replace("\r\n", "\n") for text in TEXTS},
    quiet=[
        *responses.opened(7),
        responses.thought(0, "hm"),
        responses.added(1, responses.web_search(1)),
        responses.cited(7, responses.source("https://example.com")),
        responses.event("response.canary", output_index=3),
    ],
    finish=[responses.ended(), responses.ended("max_output_tokens", usage=None)],
    nothing=[*NOTHING, responses.CREATED, responses.IN_PROGRESS, responses.event("response.canary")],
    faults={
        **dict.fromkeys(FAULTS, FAILED),
        frame({"error": "canary", "code": "x"}): FAILED,
        frame({"error": {"message": "canary", "code": 503}}): (503, "upstream_overloaded"),
        responses.event("error", code="x", message="canary"): FAILED,
        responses.event("error", code="rate_limit_exceeded", message="canary"): (429, "upstream_rate_limited"),
        responses.failed("server_error", "canary"): FAILED,
        responses.failed("invalid-argument", "canary"): (502, "upstream_rejected"),
    },
    cut=CUT,
    closed=True,
)
WIRES = {"chat": CHAT, "responses": RESPONSES}
ENDS: list[Signal | bytes] = [b"", CLOSE, RESET, b"", CLOSE, RESET, b"", CLOSE, RESET, HANG]  # to hang costs time


class Answer(NamedTuple):
    """What Grok sends: whole frames, maybe a part of one, then what it does with the connection."""

    api: str
    frames: list[bytes]
    cut: bytes
    end: Signal | bytes
    at_once: bool
    """All in one write, or each frame in its own."""


def sent(api: str) -> st.SearchStrategy[Answer]:
    wire = WIRES[api]
    kinds = ([*wire.texts], [*wire.texts], wire.quiet, wire.finish, wire.nothing, [*wire.faults], [DONE])
    frames = st.lists(st.one_of(*(st.sampled_from(kind) for kind in kinds)), max_size=8)
    return st.builds(
        Answer, st.just(api), frames, st.sampled_from([b"", b"", *wire.cut]), st.sampled_from(ENDS), st.booleans()
    )


def truth(answer: Answer) -> tuple[int, str, str]:
    """Status, code and text that this answer is to have; "done" is the code of a good end."""
    wire = WIRES[answer.api]
    begun = finished = False
    text = ""
    for sent in answer.frames:
        if sent in wire.texts or sent in wire.quiet + wire.finish:
            begun = True
            finished = finished or sent in wire.finish
            text += wire.texts.get(sent, "")
            if finished and wire.closed:
                break
        elif sent == DONE:
            if not begun:
                return *FAILED, ""
            finished = True
            break
        elif sent in wire.faults:
            if not finished:
                return (200, "upstream_error", text) if begun else (*wire.faults[sent], "")
            break
    if finished:
        return 200, "done" if text else "empty_answer", text
    if answer.end is HANG:
        return (200, "idle_timeout", text) if begun else (504, "first_token_timeout", "")
    return (200, "upstream_cut_off", text) if begun else (*FAILED, "")


class Services(NamedTuple):
    usual: InProcessService
    impatient: InProcessService
    """For a Grok that hangs."""


@pytest.fixture(scope="module")
async def services(grok: Upstream) -> AsyncIterator[dict[str, Services]]:
    """Two for each API."""
    patience = {"idle_timeout": 0.5, "first_token_timeout": 0.5}
    async with AsyncExitStack() as stack:
        yield {
            api: Services(
                *[
                    await stack.enter_async_context(serving(grok.url, grok_retries=0, grok_api=api, **changes))
                    for changes in ({}, patience)
                ]
            )
            for api in WIRES
        }


@pytest.mark.anyio
@given(answer=st.one_of(sent("chat"), sent("responses")))
@example(Answer("chat", [next(iter(CHAT.texts))], CUT[1], b"", at_once=True))
@example(Answer("chat", [next(iter(CHAT.texts)), CHAT.finish[0]], CUT[1], HANG, at_once=False))
@example(Answer("chat", [CHAT.finish[0], next(iter(CHAT.texts))], b"", RESET, at_once=True))
@example(Answer("chat", [next(iter(CHAT.texts)), next(iter(CHAT.faults)), DONE], b"", b"", at_once=True))
@example(Answer("responses", [responses.CREATED, next(iter(RESPONSES.texts))], CUT[1], b"", at_once=True))
@example(Answer("responses", [next(iter(RESPONSES.texts)), RESPONSES.finish[0]], CUT[1], HANG, at_once=False))
@example(Answer("responses", [responses.CREATED, *RESPONSES.faults], b"", b"", at_once=True))
@example(Answer("responses", [responses.CREATED], b"", HANG, at_once=False))
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_one_true_ending(grok: Upstream, services: dict[str, Services], answer: Answer) -> None:
    """A status that says what went wrong, or a 200 with all the text and then one end marker or one error event."""
    steps = [*answer.frames, answer.cut]
    grok.set_scripts(sse(*([b"".join(steps)] if answer.at_once else steps), answer.end))
    usual, impatient = services[answer.api]
    response = await (impatient if answer.end is HANG else usual).ask()
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
