"""The format of this service: `data: <text>` for each delta, `data: [DONE]` at the end.

What is asked for in `include` comes as events with a type of their own; a failure after the status as `event: error`.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, ClassVar, Literal

import msgspec
from msgspec import UNSET, Meta, Raw, Struct, UnsetType

from chatproxy import sse
from chatproxy.errors import ChatError
from chatproxy.events import (
    Chat,
    Citations,
    Done,
    Event,
    Failed,
    Finished,
    Message,
    ReasoningDelta,
    Redacted,
    TextDelta,
    ToolCall,
)
from chatproxy.formats import Asked, EncodeFrame, encode_error, encode_json, encode_line
from chatproxy.formats.requests import decode_body

Include = Literal["reasoning", "finish", "tools", "citations"]
Tool = Literal["web_search", "x_search"]


class ChatRequest(Redacted, Struct, frozen=True):
    """A conversation to be continued by Grok. Unknown fields are ignored."""

    messages: Annotated[list[Message], Meta(min_length=1, description="The conversation so far, oldest first.")]
    sessionId: Annotated[
        str | None, Meta(description="Any stable name of the conversation; makes Grok's prompt cache hit.")
    ] = None
    include: Annotated[list[Include] | None, Meta(description="Events wanted beside the text.")] = None
    tools: Annotated[
        list[Tool] | None, Meta(description="What Grok may search, if this service's operator allows it.")
    ] = None
    resumable: Annotated[bool | None, Meta(description="Number the events, so that a reader can come back.")] = None


class FinishData(Struct):
    """The data of `event: finish`; usage as Grok sent it."""

    finish_reason: str | None
    model: str | None
    usage: Annotated[Raw, Meta(extra_json_schema={"type": ["object", "null"]})]
    api: Annotated[Literal["chat", "responses"], Meta(description="Which of xAI's APIs has told the usage.")]


class ToolData(Redacted, Struct):
    """The data of `event: tool`: a search has started, or has completed. Then it tells what was searched for."""

    tool: str
    status: Literal["started", "completed"]
    query: str | UnsetType | None = UNSET


_decoder = msgspec.json.Decoder(ChatRequest)


def decode_request(body: bytes, request_id: str) -> Asked:
    """What a request body asks for. Raises InvalidJSON or InvalidRequest."""
    request = decode_body(_decoder, body)
    include = frozenset(request.include or ())
    return Asked(
        Chat(request.messages, request.sessionId, tuple(request.tools or ())),
        lambda _, frame: Plain(request_id, include, frame),
        bool(request.resumable),
    )


class Plain:
    """One answer in this format. Events are written by `frame`, which numbers those of a resumable stream."""

    content_type: ClassVar[bytes] = b"text/event-stream; charset=utf-8"
    headers: ClassVar[Mapping[str, str]] = {}
    keep_alive = sse.KEEP_ALIVE
    whole: ClassVar[bool] = False

    __slots__ = ("_frame", "_include", "_reasoning", "_request_id", "_text")

    def __init__(self, request_id: str, include: Collection[Include] = (), frame: EncodeFrame = sse.encode) -> None:
        self._request_id = request_id
        self._include = include
        self._frame = frame
        self._text, self._reasoning = sse.DeltaSplitter(), sse.DeltaSplitter()

    def encode(self, events: Sequence[Event]) -> list[bytes]:
        """The frames of these events."""
        frame = self._frame
        frames: list[bytes] = []
        for event in events:
            match event:
                case TextDelta():
                    frames += [frame(data, None) for data in self._text.feed(event.text)]
                case ReasoningDelta() if "reasoning" in self._include:
                    frames += [frame(data, "reasoning") for data in self._reasoning.feed(event.text)]
                case ToolCall() if "tools" in self._include:
                    query = UNSET if event.status == "started" else event.query
                    frames.append(frame(encode_line(ToolData(event.tool, event.status, query)).decode(), "tool"))
                case Citations() if "citations" in self._include:
                    frames.append(frame(encode_line(event.sources).decode(), "citations"))
                case Finished() if "finish" in self._include:
                    finish = FinishData(event.reason, event.model, event.usage or Raw(b"null"), event.api)
                    frames.append(frame(encode_json(finish).decode(), "finish"))
                case Done():
                    frames.append(frame(sse.DONE, None))
                case Failed():
                    frames += self.encode_failure(event.error)
                case _:
                    pass
        return frames

    def encode_failure(self, error: ChatError) -> list[bytes]:
        """`event: error`."""
        return [self._frame(encode_error(error, self._request_id).decode(), "error")]
