"""xAI's Chat Completions API: a chat becomes a request body, an event stream becomes neutral events.

Knows JSON and the order of chunks. Does not know sockets, HTTP, retries or time. What is said here of Grok's wire comes
from xAI's documentation and from recorded answers.
"""

import json
from typing import Any

import msgspec
from msgspec import Raw, Struct

from chatproxy import sse
from chatproxy.config import Settings
from chatproxy.errors import ChatError, UpstreamFailed
from chatproxy.events import Chat, Event, Finished, Message, ReasoningDelta, Redacted, TextDelta
from chatproxy.services.grok import failures
from chatproxy.services.grok.usage import count_chat, readable
from chatproxy.surrogates import HalfJoiner, has_half

PATH = "/chat/completions"


class CompletionRequest(Redacted, Struct, omit_defaults=True):
    """The body of `POST /chat/completions`."""

    model: str
    messages: list[Message]
    stream: bool
    stream_options: dict[str, bool]
    reasoning_effort: str | None = None


# Of each chunk only what is used is decoded; all of it may be missing or null. (gc=False: there are many of them, and
# none is part of a reference cycle.)


class Delta(Redacted, Struct, gc=False):
    """What a chunk adds to the message."""

    content: str | None = None
    reasoning_content: str | None = None


class Choice(Struct, gc=False):
    """The one choice of a chunk."""

    delta: Delta | None = None
    finish_reason: str | None = None


class Chunk(Redacted, Struct, gc=False):
    """A chat completion chunk, or the error that Grok sends in a chunk's place."""

    choices: list[Choice | None] | None = None
    model: str | None = None
    usage: Raw = Raw()
    error: Any = None


_encode = msgspec.json.Encoder().encode
_decode_chunk = msgspec.json.Decoder(Chunk | None).decode


def encode_request(settings: Settings, chat: Chat) -> bytes:
    """The request body for a chat."""
    messages = chat.messages
    if settings.system_prompt:
        messages = [Message("system", str(settings.system_prompt)), *messages]
    return _encode(
        CompletionRequest(settings.grok_model, messages, True, {"include_usage": True}, settings.grok_reasoning_effort)
    )


class Decoder:
    """Turns the bytes of one answer, cut anywhere, into events.

    After each `feed`: `progressed`, whether a chunk was among the bytes (comments and keep-alive frames are none);
    `complete`, whether Grok has said that the answer is (a finish reason or `[DONE]`), after which nothing counts;
    `ended`, whether nothing follows (`[DONE]`, or `failure`). `finished` holds what was said about the end so far.
    """

    __slots__ = (
        "_decoder",
        "_model",
        "_reason",
        "_reasoning",
        "_text",
        "_usage",
        "complete",
        "ended",
        "failure",
        "progressed",
    )

    def __init__(self) -> None:
        self.progressed = self.complete = self.ended = False
        self.failure: tuple[ChatError, str] | None = None  # and what of it may be logged
        self._decoder = sse.Decoder()
        self._text, self._reasoning = HalfJoiner(), HalfJoiner()
        self._reason: str | None = None
        self._model: str | None = None
        self._usage = Raw()

    @property
    def finished(self) -> Finished:
        """Finish reason, model and usage, as far as they were told."""
        usage = readable(self._usage)
        return Finished(self._reason, self._model, usage, count_chat(usage), "chat")

    def feed(self, piece: bytes) -> list[Event]:
        """The events that are complete now."""
        self.progressed = False
        events: list[Event] = []
        try:
            for data in self._decoder.feed(piece):
                if data == b"[DONE]":
                    self.complete = self.ended = True
                elif data and not data.isspace():
                    self._read(data, events)
                if self.ended:
                    break
        except (ValueError, RecursionError):  # sse.TooLong, msgspec.DecodeError, UnicodeDecodeError
            self._fail(f"malformed frame, in a read of {len(piece)} bytes")
        if (self.complete or self.ended) and (self._text.pending or self._reasoning.pending):
            self._flush(events)
        return events

    def _read(self, data: bytes, events: list[Event]) -> None:
        cut = False
        try:
            chunk = _decode_chunk(data)
        except msgspec.ValidationError:
            raise
        except ValueError:
            if not has_half(data):
                raise
            cut = True
            chunk = msgspec.convert(json.loads(data), Chunk | None)  # takes half an emoji for what it is
        if chunk is None:
            return
        if chunk.error:
            self._fail(failures.describe(200, data))
            return
        usage = chunk.usage
        if usage and bytes(usage) != b"null":
            self._usage = usage  # cumulative where it comes more than once
            self.progressed = True
        if chunk.model:
            self._model = chunk.model
        if not chunk.choices:
            self.progressed |= chunk.choices is not None
            return
        choice = chunk.choices[0]
        if choice is None:
            return
        self.progressed = True
        delta = choice.delta
        if delta is not None:
            if text := delta.reasoning_content:
                if cut or self._reasoning.pending:
                    text = self._reasoning.feed(text)
                if text:
                    events.append(ReasoningDelta(text))
            if text := delta.content:
                if cut or self._text.pending:
                    text = self._text.feed(text)
                if text:
                    events.append(TextDelta(text))
        if choice.finish_reason:
            self._reason = choice.finish_reason
            self.complete = True

    def _fail(self, detail: str) -> None:
        self.failure = UpstreamFailed(), detail
        self.ended = True

    def _flush(self, events: list[Event]) -> None:
        if text := self._reasoning.flush():
            events.append(ReasoningDelta(text))
        if text := self._text.flush():
            events.append(TextDelta(text))
