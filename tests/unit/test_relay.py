"""Which events a client gets for Grok's chunks, and how every answer ends: no network, no clock."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from chatproxy import errors, sse
from chatproxy.events import Event as Received
from chatproxy.events import Finished, StreamSummary, Usage
from chatproxy.formats.plain import Plain
from chatproxy.services.grok.chat_completions import Decoder
from chatproxy.services.relay import encode, relay
from tests.readers import DONE, Event, standard
from tests.upstream import USAGE, chunk, frame

pytestmark = pytest.mark.anyio

Read = list[dict[str, Any]]


class Grok:
    """Gives these reads, each some chunks in JSON, and `[DONE]` with the last of them, or fails, late or at once."""

    def __init__(
        self, reads: list[Read], fails: errors.ChatError | None = None, refuses: errors.ChatError | None = None
    ) -> None:
        self.decoder = Decoder()
        self.ended = False
        self.open = 0
        self._reads = reads
        self._fails = fails
        self._refuses = refuses

    @property
    def complete(self) -> bool:
        return self.decoder.complete or self.ended

    @property
    def finished(self) -> Finished:
        return self.decoder.finished

    def __aiter__(self) -> AsyncIterator[list[Received]]:
        return self._events()

    async def _events(self) -> AsyncIterator[list[Received]]:
        for number, read in enumerate(self._reads, 1):
            self.ended = number == len(self._reads) and self._fails is None
            yield self.decoder.feed(b"".join(map(frame, read)))
        assert self._fails is not None
        raise self._fails

    @asynccontextmanager
    async def answer(self) -> AsyncIterator["Grok"]:
        if self._refuses:
            raise self._refuses
        self.open += 1
        try:
            yield self
        finally:
            self.open -= 1


async def steps(grok: Grok, *include: Any, summary: StreamSummary | None = None) -> list[list[Event]]:
    """What is written after each read. Only the last is the last, and then Grok is let go."""
    summary = summary or StreamSummary("id")
    batches = relay(grok.answer(), summary)
    taken = [step async for step in encode(batches, Plain("id", include).encode, summary)]
    assert [last for _, last in taken] == [False] * (len(taken) - 1) + [True]
    assert grok.open == 0
    return [standard(b"".join(frames)) for frames, _ in taken]


def text(*tokens: str) -> Read:
    return [chunk({"content": token}) for token in tokens]


def code(event: Event) -> Any:
    assert event.type == "error"
    return json.loads(event.data)["error"]["code"]


END = Event(DONE)
STOP = [chunk({}, finish="stop")]
COUNTS = [chunk(None, usage=USAGE)]


async def test_each_read_is_written_at_once() -> None:
    """What came in one read leaves in one step, the end with the last; reads without text are empty steps."""
    grok = Grok([text("a", "b"), [chunk({"role": "assistant"})], text("c"), STOP + COUNTS])
    assert await steps(grok) == [[Event("a"), Event("b")], [], [Event("c")], [END]]


async def test_nothing_is_merged_or_lost() -> None:
    """Text beside a role or a finish reason counts, empty and missing text does not, and line breaks become LF."""
    grok = Grok(
        [
            [
                chunk({"role": "assistant", "content": "a"}),
                chunk({"content": ""}),
                chunk({"content": None}),
                chunk(None),
            ],
            [{"choices": [{"index": 0}]}, {"choices": [{"delta": None}]}, {"choices": None, "usage": {}}],
            text("b\r", "\nc", "\n", " d "),
            [chunk({"content": "[DONE]"}, finish="stop")],
        ]
    )
    assert [event.data for step in await steps(grok) for event in step] == [
        *("a", "b\n", "c", "\n", " d ", "[DO", "NE]", DONE),
    ]


async def test_optional_events() -> None:
    """Reasoning and the finish are told to who asked, and to nobody else; usage as Grok gave it last."""
    other = {**USAGE, "prompt_tokens": 1}
    reads = [
        [chunk({"reasoning_content": "hm"}), chunk({"reasoning_content": "[DONE]", "content": "a"}, usage=other)],
        [chunk({"content": "b"}, finish="length"), *COUNTS, chunk(None, usage=None, model="grok-5")],
    ]
    assert await steps(Grok(reads)) == [[Event("a")], [Event("b"), END]]
    assert await steps(Grok(reads), "reasoning") == [
        [Event("hm", "reasoning"), Event("[DO", "reasoning"), Event("NE]", "reasoning"), Event("a")],
        [Event("b"), END],
    ]
    [first, [b, finish, end]] = await steps(Grok(reads), "finish")
    assert (first, b, end) == ([Event("a")], Event("b"), END)
    assert finish.type == "finish"
    assert json.loads(finish.data) == {"finish_reason": "length", "model": "grok-5", "usage": USAGE, "api": "chat"}


CUT = errors.UpstreamCutOff()


@pytest.mark.parametrize(
    ("reads", "fails", "end"),
    [
        ([text("a"), STOP], None, None),
        ([text("a")], None, None),  # Grok's own [DONE] is enough
        ([text("a"), STOP], CUT, None),  # and so is its finish reason, whatever comes after it
        ([text("a"), STOP, text("b")], errors.UpstreamFailed(), None),
        ([text("a"), STOP], errors.Stopped(), None),
        ([text("a")], CUT, "upstream_cut_off"),
        ([text("a"), COUNTS], errors.IdleTimeout(), "idle_timeout"),
        ([text("a")], errors.Stopped(), "stopped"),
        ([text("a")], errors.Draining(), "draining"),
        ([STOP], None, "empty_answer"),
        ([[chunk({"reasoning_content": "hm"})], STOP], None, "empty_answer"),
        ([[chunk({"role": "assistant", "content": ""})]], None, "empty_answer"),
        ([STOP], CUT, "empty_answer"),
        ([COUNTS], CUT, "upstream_cut_off"),
    ],
)
@pytest.mark.parametrize("include", [(), ("finish", "reasoning")])
async def test_one_end(
    reads: list[Read], fails: errors.ChatError | None, end: str | None, include: tuple[str, ...]
) -> None:
    """Every answer ends once: with the done marker if Grok finished and there was text, else with the error."""
    summary = StreamSummary("id")
    ends: list[StreamSummary] = []
    summary.on_end.append(ends.append)
    events = [event for step in await steps(Grok(reads, fails), *include, summary=summary) for event in step]
    assert ends == [summary]
    *others, last = events
    assert {event.type for event in others} <= {"message", "reasoning", "finish"}
    assert END not in others
    if end is None:
        assert last == END
        assert (summary.end, summary.code) == ("done", None)
    else:
        assert code(last) == end
        assert json.loads(last.data)["error"]["request_id"] == "id"
        assert (summary.end, summary.code) == ("failed", end)
    # The finish is told before an error too, if Grok had told it.
    told = STOP in reads or COUNTS in reads or end is None
    assert [event.type for event in others].count("finish") == ("finish" in include and told)


async def test_refusal_of_the_relay() -> None:
    """What fails before the first chunk is raised, for there is still a status to tell it with."""

    with pytest.raises(errors.UpstreamAuth):
        await steps(Grok([], refuses=errors.UpstreamAuth()))


async def test_leaving_of_the_relay() -> None:
    """Who stops reading lets Grok go, at the first step or later."""
    for taken in (1, 2):
        grok = Grok([text("a"), text("b"), text("c")])
        summary = StreamSummary("id")
        batches = relay(grok.answer(), summary)
        for _ in range(taken):
            await anext(batches)
        assert grok.open == 1
        await batches.aclose()
        assert (grok.open, summary.end, summary.model) == (0, "left", "grok-4.3")


async def test_own_framing() -> None:
    """Every event is framed by whoever wants ids on it, the last one and errors included."""
    for fails in (None, CUT):
        asked: list[tuple[str, str | None]] = []

        def frame(data: str, kind: str | None, asked: list[tuple[str, str | None]] = asked) -> bytes:
            asked.append((data, kind))
            return sse.encode(data, kind, f"x-{len(asked)}")

        grok = Grok([[chunk({"reasoning_content": "hm", "content": "a"})], COUNTS], fails)
        format = Plain("id", ["reasoning", "finish"], frame)
        summary = StreamSummary("id")
        written = [step async for step in encode(relay(grok.answer(), summary), format.encode, summary)]
        ids = [event.id for frames, _ in written for event in standard(b"".join(frames))]
        assert ids == ["x-1", "x-2", "x-3", "x-4"]
        assert [kind for _, kind in asked] == ["reasoning", None, "finish", "error" if fails else None]


async def test_summary() -> None:
    """Counts, model and tokens are noted for the log, and nothing that was said."""
    summary = StreamSummary("id")
    await steps(Grok([text("canary", ""), [chunk({"content": "\r"}), *COUNTS], STOP]), summary=summary)
    fields = summary.fields()
    assert fields.pop("first_token_ms") is not None
    assert fields == {
        "end": "done",
        "code": None,
        "model": "grok-4.3",
        "deltas": 2,
        "prompt_tokens": 12,
        "completion_tokens": 3,
        "reasoning_tokens": 5,
        "tool_calls": None,
    }
    assert "canary" not in repr([getattr(summary, name) for name in StreamSummary.__slots__])


def test_every_one_is_told_of_the_end() -> None:
    """Who waits for the end of an answer is told in order, also after somebody who fails at it; and only once."""
    told: list[str | None] = []

    def fail(_: StreamSummary) -> None:
        told.append("failing")
        raise ZeroDivisionError

    summary = StreamSummary("id")
    summary.on_end += [lambda _: told.append("first"), fail, lambda ended: told.append(ended.end)]
    with pytest.raises(ZeroDivisionError):
        summary.close("done")
    summary.close("left")
    assert told == ["first", "failing", "done"]


@pytest.mark.parametrize("usage", [None, {}, {"prompt_tokens": None}, {"prompt_tokens": "many"}, [], "x", 5])
async def test_odd_usage(usage: object) -> None:
    """Usage of another shape is passed on as it came, and not counted."""
    summary = StreamSummary("id")
    [*_, [finish, end]] = await steps(Grok([text("a"), [chunk(None, usage=usage)]]), "finish", summary=summary)
    assert end == END
    assert json.loads(finish.data)["usage"] == usage
    assert summary.counts == Usage()
