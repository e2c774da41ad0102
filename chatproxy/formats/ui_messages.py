"""The UI message stream of the Vercel AI SDK, which `useChat` of its majors 5, 6 and 7 reads: JSON in `data:` events.

The clients validate what they read, and fail on a type or an enum value that they do not know.
"""

import secrets
from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, ClassVar, Literal
from uuid import UUID

import msgspec
from msgspec import Meta, Raw, Struct

from chatproxy import sse
from chatproxy.errors import ChatError, InvalidJSON, InvalidRequest
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
    Source,
    Started,
    TextDelta,
    ToolCall,
)
from chatproxy.formats import Asked, EncodeFrame, encode_line
from chatproxy.formats.plain import Include
from chatproxy.formats.requests import TextJoiner, decode_body

ALL: frozenset[Include] = frozenset(("reasoning", "finish", "tools", "citations"))

# What all majors know; any other reason is "other". (Where Grok has told none, it has finished all the same.)
_FINISH_REASONS = {
    None: "stop",
    "stop": "stop",
    "length": "length",
    "content_filter": "content-filter",
    "tool_calls": "tool-calls",
}


# The request.


class UIMessage(Redacted, Struct, frozen=True):
    """A message of the AI SDK. Its text parts are read; a file is refused in the last message; all else is left out."""

    role: Literal["user", "assistant", "system"]
    parts: Annotated[list[Raw], Meta(extra_json_schema={"items": {}})]


class IgnoredObject(Struct, frozen=True):
    """An object that means something to the page only, whatever is in it."""


class UIChatRequest(Redacted, Struct, frozen=True):
    """What `useChat` posts. Unknown fields are ignored."""

    messages: Annotated[list[UIMessage], Meta(min_length=1, description="The conversation so far, oldest first.")]
    id: Annotated[
        str | None,
        Meta(description="The chat's id. A UUID is also a name under which a resumable answer can be read again."),
    ] = None
    sessionId: Annotated[
        str | None, Meta(description="Any stable name of the conversation, if it is another one than `id`.")
    ] = None
    include: Annotated[
        list[Include] | None, Meta(description="What is wanted beside the text; all of it where this is absent.")
    ] = None
    tools: Annotated[
        list[Literal["web_search", "x_search"]] | IgnoredObject | None,
        Meta(description="What Grok may search, if this service's operator allows it. An object is ignored."),
    ] = None
    resumable: Annotated[bool | None, Meta(description="Number the events, so that a reader can come back.")] = None


class _MessageShape(Struct):
    parts: Raw = Raw()
    content: Raw = Raw()


class _Shape(Struct):
    messages: list[_MessageShape]


_decoder = msgspec.json.Decoder(UIChatRequest)
_shape_decoder = msgspec.json.Decoder(_Shape)


def recognizes(body: bytes) -> bool:
    """Whether a body is for this format: some message has `parts` and no `content`."""
    if b'"parts"' not in body:
        return False
    try:
        shape = decode_body(_shape_decoder, body)
    except (InvalidJSON, InvalidRequest):
        return False
    return any(message.parts and bytes(message.content) in (b"", b"null") for message in shape.messages)


def decode_request(body: bytes, _: str) -> Asked:
    """What a request body asks for. Raises InvalidJSON, InvalidRequest or TooManyMessages."""
    request = decode_body(_decoder, body)
    last = len(request.messages) - 1
    messages = []
    texts = TextJoiner()
    for number, message in enumerate(request.messages):
        where = f"messages[{number}].parts"
        # The page keeps a message that was refused in its history, and must be able to go on.
        text = texts.join(message.parts, where, _is_file if number == last else None)
        # After a failure `useChat` keeps an answer without text, and sends it with every later turn.
        if text:
            messages.append(Message(message.role, text))
        elif number == last:
            raise InvalidRequest(f"{where}: Expected some text.", param=where)
    include = ALL if request.include is None else frozenset(request.include)
    tools = tuple(request.tools) if isinstance(request.tools, list) else ()
    resumable = bool(request.resumable)
    return Asked(
        Chat(messages, request.id if request.sessionId is None else request.sessionId, tools),
        lambda id, frame: UIMessages(id or secrets.token_urlsafe(16), include, frame),
        resumable,
        read_chat_id(request.id) if resumable and request.id else None,
        only_as_stream=True,
    )


def _is_file(type: bytes) -> bool:
    return type == b'"file"'


def read_chat_id(id: str) -> str | None:
    """A chat's id, if it can be the ticket of whoever reads the chat: a UUID. Others can be guessed."""
    try:
        uuid = str(UUID(id))
    except ValueError:
        return None
    return uuid if uuid == id.lower() else None  # not one of the other ways to write it


# The answer.


class UIMessages:
    """One answer in this format. Events are written by `frame`, which numbers those of a resumable stream."""

    content_type: ClassVar[bytes] = b"text/event-stream; charset=utf-8"
    headers: ClassVar[Mapping[str, str]] = {"X-Vercel-AI-UI-Message-Stream": "v1"}
    whole: ClassVar[bool] = False
    keep_alive = sse.KEEP_ALIVE

    def __init__(self, message_id: str, include: Collection[Include] = ALL, frame: EncodeFrame = sse.encode) -> None:
        self._message_id = message_id
        self._include = include
        self._frame = frame
        self._open: Literal["text", "reasoning"] | None = None  # the part that deltas are added to
        self._head = b""  # of its deltas
        self._parts = self._sources = 0
        self._finished = Finished()

    def encode(self, events: Sequence[Event]) -> list[bytes]:
        """The frames of these events."""
        frames: list[bytes] = []
        for event in events:
            match event:
                case TextDelta():
                    self._add_delta("text", event.text, frames)
                case ReasoningDelta() if "reasoning" in self._include:
                    self._add_delta("reasoning", event.text, frames)
                case Started():
                    frames += [self._chunk("start", messageId=self._message_id), self._chunk("start-step")]
                case ToolCall() if "tools" in self._include:
                    self._close_part(frames)
                    frames += self._tool_call(event)
                case Citations() if "citations" in self._include:
                    self._close_part(frames)
                    frames += map(self._source, event.sources)
                case Finished():
                    self._finished = event
                case Done():
                    self._close_part(frames)
                    reason = _FINISH_REASONS.get(self._finished.reason, "other")
                    frames += [
                        self._chunk("finish-step"),
                        self._chunk("finish", finishReason=reason, messageMetadata=self._metadata()),
                        self._frame(sse.DONE, None),
                    ]
                case Failed():
                    if (metadata := self._metadata()) is not None:
                        frames.append(self._chunk("message-metadata", messageMetadata=metadata))
                    frames += self.encode_failure(event.error)
                case _:
                    pass
        return frames

    def encode_failure(self, error: ChatError) -> list[bytes]:
        """An `error` chunk, after which the client reads no more."""
        return [self._chunk("error", errorText=error.message)]

    def _chunk(self, type: str, **fields: object) -> bytes:
        present = {name: value for name, value in fields.items() if value is not None}
        return self._frame(encode_line({"type": type, **present}).decode(), None)

    def _add_delta(self, kind: Literal["text", "reasoning"], text: str, frames: list[bytes]) -> None:
        if self._open != kind:
            self._close_part(frames)
            self._parts += 1
            self._open = kind
            self._head = b'{"type":"%b-delta","id":"%d","delta":' % (kind.encode(), self._parts)
            frames.append(self._chunk(f"{kind}-start", id=str(self._parts)))
        frames.append(self._frame((self._head + encode_line(text) + b"}").decode(), None))

    def _close_part(self, frames: list[bytes]) -> None:
        if self._open is not None:
            frames.append(self._chunk(f"{self._open}-end", id=str(self._parts)))
            self._open = None

    def _tool_call(self, call: ToolCall) -> list[bytes]:
        # As a call that was executed elsewhere, the page neither executes it nor asks again because of it; as a dynamic
        # one it needs no schema there. Pages look calls up by their ids in the whole chat, not only in one message.
        flags = {"toolCallId": f"{self._message_id}-{call.id}", "providerExecuted": True, "dynamic": True}
        if call.status == "started":
            return [self._chunk("tool-input-start", toolName=call.tool, **flags)]
        query = {} if call.query is None else {"query": call.query}
        return [
            self._chunk("tool-input-available", toolName=call.tool, input=query, **flags),
            self._chunk("tool-output-available", output={}, **flags),
        ]

    def _source(self, source: Source) -> bytes:
        self._sources += 1
        return self._chunk("source-url", sourceId=str(self._sources), url=source.url, title=source.title)

    def _metadata(self) -> dict[str, object] | None:
        """Model and usage in the AI SDK's names, as far as they are wanted and known."""
        if "finish" not in self._include:
            return None
        counts = self._finished.counts
        tokens = {
            "inputTokens": counts.prompt_tokens,
            "outputTokens": counts.output_tokens,  # includes the reasoning
            "totalTokens": counts.total_tokens,
            "reasoningTokens": counts.reasoning_tokens,
            "cachedInputTokens": counts.cached_tokens,
        }
        usage = {name: count for name, count in tokens.items() if count is not None}
        known = {"model": self._finished.model, "usage": usage or None}
        return {name: value for name, value in known.items() if value is not None} or None
