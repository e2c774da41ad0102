"""What is asked and what is answered, in the words of neither side.

`services/grok` turns Grok's wire into these events, `formats` turns them into what a client reads. Knows no HTTP, no
event stream and nobody's JSON.
"""

import re
import time
from collections.abc import Callable
from typing import Annotated, Literal

from msgspec import Meta, Raw, Struct

from chatproxy.errors import ChatError


class Redacted:
    """What somebody said: it stays out of reprs, and so out of logs and tracebacks."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"{type(self).__name__}(...)"


# What is asked.


class Message(Redacted, Struct, frozen=True):
    """One turn of the conversation."""

    role: Literal["user", "assistant", "system"]
    content: Annotated[str, Meta(min_length=1, description="Never empty: Grok refuses empty messages.")]


class Chat(Redacted, Struct, frozen=True):
    """A conversation that Grok is asked to continue."""

    messages: list[Message]
    session_id: str | None = None
    tools: tuple[str, ...] = ()  # searches that the client asks for and the operator allows


# What is answered. (gc=False: there are many of them, and none is part of a reference cycle.)


class Started(Struct, frozen=True, gc=False):
    """Grok's first chunk is here: the answer has a status. `model` is what Grok calls itself, if that is known yet."""

    model: str | None = None


class TextDelta(Redacted, Struct, frozen=True, gc=False):
    """The next piece of the answer, never empty."""

    text: str


class ReasoningDelta(Redacted, Struct, frozen=True, gc=False):
    """The next piece of the reasoning, never empty."""

    text: str


class ToolCall(Redacted, Struct, frozen=True, gc=False):
    """A search has started or completed. `id` is the same in both; `query` is known once it has completed."""

    id: str
    tool: str
    status: Literal["started", "completed"]
    query: str | None = None


class Source(Redacted, Struct, frozen=True, gc=False, omit_defaults=True):
    """A page that the answer refers to: an http or https URL."""

    url: str
    title: str | None = None


class Citations(Redacted, Struct, frozen=True):
    """The sources of the whole answer, each once, in the order of their first mention."""

    sources: list[Source]


class Usage(Struct, frozen=True):
    """Tokens as this service counts them: `completion_tokens` never includes the reasoning, whichever API counted."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    reasoning_tokens: int | None = None
    cached_tokens: int | None = None

    @property
    def output_tokens(self) -> int | None:
        """All that was generated: the completion and the reasoning. None if neither is known."""
        return _sum(self.completion_tokens, self.reasoning_tokens)

    @property
    def total_tokens(self) -> int | None:
        """All that was read and generated. None if nothing is known."""
        return _sum(self.prompt_tokens, self.output_tokens)


def _sum(*counts: int | None) -> int | None:
    known = [count for count in counts if count is not None]
    return sum(known) if known else None


class Finished(Struct, frozen=True):
    """How Grok says that it ended: `usage` is Grok's own object, `counts` is what this service reads from it."""

    reason: str | None = None
    model: str | None = None
    usage: Raw = Raw()
    counts: Usage = Usage()
    api: Literal["chat", "responses"] = "chat"


class Done(Struct, frozen=True, gc=False):
    """The end of an answer that is complete."""


class Failed(Struct, frozen=True):
    """The end of an answer that is not."""

    error: ChatError


Event = Started | TextDelta | ReasoningDelta | ToolCall | Citations | Finished | Done | Failed


# Whoever answers in Grok's place chooses what it calls itself, and may put anything there: only a name is logged.
_MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@-]{0,63}")


class StreamSummary:
    """What is known of one answer, for log, metrics and limits: times, counts and its end, never content.

    `end` is done, failed or left, and None while the answer is running. `on_end` is called once, when the end is
    known: before the last events are written.
    """

    __slots__ = (
        "answering",
        "asked_at",
        "code",
        "counts",
        "deltas",
        "end",
        "first_token_ms",
        "model",
        "on_end",
        "request_id",
        "started_at",
        "text_bytes",
        "tool_calls",
    )

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.started_at = time.monotonic()
        self.asked_at: float | None = None  # when the request went to Grok; on the monotonic clock, as the one above
        self.answering = False  # Grok's first chunk has come
        self.first_token_ms: float | None = None  # milliseconds from the request to the first text
        self.deltas = 0  # of text
        self.text_bytes = 0  # of text and reasoning, in UTF-8: what was paid, where Grok does not say
        self.tool_calls: dict[str, int] = {}
        self.model: str | None = None
        self.counts = Usage()
        self.end: Literal["done", "failed", "left"] | None = None
        self.code: str | None = None
        self.on_end: list[Callable[[StreamSummary], None]] = []

    def close(self, end: Literal["done", "failed", "left"], code: str | None = None) -> None:
        """Note the end and tell whoever waits for it. Only the first call counts."""
        if self.end is None:
            self.end, self.code = end, code
            self._call_next()

    def _call_next(self) -> None:
        try:
            while self.on_end:
                self.on_end.pop(0)(self)
        finally:
            if self.on_end:  # one has raised: the others give back what is counted all the same
                self._call_next()

    def fields(self) -> dict[str, object]:
        """The fields of the log line."""
        counts = self.counts
        return {
            "end": self.end,
            "code": self.code,
            "model": self.model if self.model and _MODEL_NAME.fullmatch(self.model) else None,
            "first_token_ms": self.first_token_ms,
            "deltas": self.deltas,
            "prompt_tokens": counts.prompt_tokens,
            "completion_tokens": counts.completion_tokens,
            "reasoning_tokens": counts.reasoning_tokens,
            "tool_calls": sum(self.tool_calls.values()) or None,
        }
