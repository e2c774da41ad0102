"""OpenAI's Chat Completions, as the `openai` SDKs read them: a stream of chunks, or one JSON.

The Python SDK fails at an event without data, and Go's at a comment: so there are no ids, no reconnection time and no
comments here, and these answers cannot be resumed.
"""

import secrets
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import msgspec
from msgspec import Raw, Struct

from chatproxy.errors import ChatError, InvalidRequest, ModelNotFound, UpstreamFailed
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
    Usage,
)
from chatproxy.formats import Asked, encode_error, encode_json, encode_line
from chatproxy.formats.requests import TextJoiner, decode_body

Role = Literal["user", "assistant", "system"]

_ROLES: dict[str, Role] = {"user": "user", "assistant": "assistant", "system": "system", "developer": "system"}
_TOOLS = ("web_search", "x_search")
_FINISH_REASONS = ("stop", "length", "content_filter", "tool_calls")


# The request.


class CompletionMessage(Redacted, Struct, frozen=True):
    """One turn of the conversation. Of a list of parts the texts are joined; a message without text is left out."""

    role: str
    content: str | list[Raw] | None = None


class StreamOptions(Struct, frozen=True):
    include_usage: bool | None = None


class AnyObject(Struct, frozen=True): ...


class TypedObject(Struct, frozen=True):
    type: str


class CompletionRequest(Redacted, Struct, frozen=True):
    """What asks for another answer than this service gives is refused; what is not listed is ignored."""

    messages: list[CompletionMessage]
    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    prompt_cache_key: str | None = None
    web_search_options: AnyObject | None = None
    tools: list[TypedObject] | None = None
    functions: list[AnyObject] | None = None
    tool_choice: str | AnyObject | None = None
    response_format: TypedObject | None = None
    n: int | None = None
    modalities: list[str] | None = None
    audio: AnyObject | None = None


_decoder = msgspec.json.Decoder(CompletionRequest)


def decode_request(body: bytes, request_id: str, *, model: str, created: int, max_bytes: int) -> Asked:
    """What a request body asks for, of the one `model` there is.

    `created` is a Unix time in seconds, `max_bytes` bounds the text of an answer that is sent whole. Raises
    InvalidJSON, InvalidRequest or ModelNotFound.
    """
    request = decode_body(_decoder, body)
    if request.model not in (None, model):
        raise ModelNotFound(param="model")
    for param, is_refused in (
        ("functions", bool(request.functions)),
        ("tool_choice", request.tool_choice not in (None, "none", "auto")),
        ("response_format", request.response_format not in (None, TypedObject("text"))),
        ("n", request.n not in (None, 1)),
        ("modalities", request.modalities not in (None, [], ["text"])),
        ("audio", request.audio is not None),
    ):
        if is_refused:
            raise InvalidRequest(f"{param}: This service does not offer it. Leave it out.", param=param)
    chat = Chat(_read_messages(request.messages), request.prompt_cache_key, _read_tools(request))
    include_usage = bool(request.stream_options and request.stream_options.include_usage)
    if request.stream:
        return Asked(chat, lambda *_: Chunks(request_id, model, created, include_usage=include_usage))
    return Asked(chat, lambda *_: Whole(request_id, model, created, max_bytes))


def _read_messages(given: Sequence[CompletionMessage]) -> list[Message]:
    if not given:
        raise InvalidRequest("messages: Expected at least one.", param="messages")
    messages, texts = [], TextJoiner()
    for number, message in enumerate(given):
        where, is_last = f"messages[{number}]", number == len(given) - 1
        if message.role not in _ROLES:
            param = f"{where}.role"
            raise InvalidRequest(f'{param}: Expected "user", "assistant", "system" or "developer".', param=param)
        text = message.content or ""
        if isinstance(text, list):
            text = texts.join(text, f"{where}.content", (lambda _: True) if is_last else None)
        if text:
            messages.append(Message(_ROLES[message.role], text))
        elif is_last:
            raise InvalidRequest(f"{where}.content: Expected some text.", param=f"{where}.content")
    return messages


def _read_tools(request: CompletionRequest) -> tuple[str, ...]:
    """The searches that are wished for."""
    wanted = [tool.type for tool in request.tools or ()]
    if any(tool not in _TOOLS for tool in wanted):
        raise InvalidRequest('tools: Expected "web_search" or "x_search" as each type.', param="tools")
    wanted += ["web_search"] if request.web_search_options is not None else []
    return () if request.tool_choice == "none" else tuple(dict.fromkeys(wanted))


# The answer.


def _count_usage(counts: Usage) -> dict[str, object] | None:
    """Grok's usage as OpenAI counts: `completion_tokens` includes the reasoning. None if Grok has told none."""
    if counts == Usage():
        return None
    usage: dict[str, object] = {
        "prompt_tokens": counts.prompt_tokens or 0,
        "completion_tokens": counts.output_tokens or 0,
        "total_tokens": counts.total_tokens or 0,
    }
    if counts.cached_tokens is not None:
        usage["prompt_tokens_details"] = {"cached_tokens": counts.cached_tokens}
    if counts.reasoning_tokens is not None:
        usage["completion_tokens_details"] = {"reasoning_tokens": counts.reasoning_tokens}
    return usage


def _annotate(source: Source) -> object:
    """Where in the text the page is referred to is not told. (The AI SDK wants a title.)"""
    citation = {"url": source.url, "title": source.title or source.url, "start_index": 0, "end_index": 0}
    return {"type": "url_citation", "url_citation": citation}


def _finish_reason(finished: Finished) -> str:
    return finished.reason if finished.reason in _FINISH_REASONS else "stop"


_DELTA_END = b',"finish_reason":null}]}\n\n'


class Chunks:
    """One answer as a stream of chunks. All have the same id."""

    content_type: ClassVar[bytes] = b"text/event-stream; charset=utf-8"
    headers: ClassVar[Mapping[str, str]] = {}
    whole: ClassVar[bool] = False

    def __init__(self, request_id: str, model: str, created: int, *, include_usage: bool) -> None:
        self._request_id = request_id
        self._head = {"id": _new_id(), "object": "chat.completion.chunk", "created": created}
        self._include_usage = include_usage
        self._finished = Finished()
        self._role = b'"role":"assistant",'  # goes with the first delta
        self._open(model)

    def _open(self, model: str) -> None:
        self._chunk = b"data: " + encode_line({**self._head, "model": model})[:-1] + b',"choices":['
        self._choice = self._chunk + b'{"index":0,"delta":'
        # A comment would be an event without data to some SDKs.
        self.keep_alive = self._choice + b"{}" + _DELTA_END
        self._text = self._choice + b'{"content":'
        self._reasoning = self._choice + b'{"reasoning_content":'

    def encode(self, events: Sequence[Event]) -> list[bytes]:
        """The frames of these events."""
        frames: list[bytes] = []
        for event in events:
            match event:
                case TextDelta():
                    frames.append(self._delta(self._text, encode_line(event.text)))
                case ReasoningDelta():
                    frames.append(self._delta(self._reasoning, encode_line(event.text)))
                case Started():
                    if event.model is not None:
                        self._open(event.model)
                case Citations():
                    annotations = encode_line([_annotate(source) for source in event.sources])
                    frames.append(self._delta(self._choice + b'{"annotations":', annotations))
                case Finished():
                    self._finished = event
                case Done():
                    frames += self._end()
                case Failed():
                    frames += self.encode_failure(event.error)
                case _:
                    pass
        return frames

    def encode_failure(self, error: ChatError) -> list[bytes]:
        """An event that the SDKs raise as an APIError. (An end without `[DONE]` would look to them like any other.)"""
        return [b"data: " + encode_error(error, self._request_id) + b"\n\n"]

    def _delta(self, head: bytes, content: bytes) -> bytes:
        if self._role:
            start = len(self._choice) + 1
            head, self._role = head[:start] + self._role + head[start:], b""
        return head + content + b"}" + _DELTA_END

    def _end(self) -> list[bytes]:
        frames = [self._choice + b'{},"finish_reason":"%b"}]}\n\n' % _finish_reason(self._finished).encode()]
        if self._include_usage and (usage := _count_usage(self._finished.counts)) is not None:
            frames.append(self._chunk + b'],"usage":' + encode_json(usage) + b"}\n\n")
        return [*frames, b"data: [DONE]\n\n"]


class Whole:
    """One answer as one JSON at its end. Its text is bounded, because all of it is kept until then."""

    content_type: ClassVar[bytes] = b"application/json"
    headers: ClassVar[Mapping[str, str]] = {}
    whole: ClassVar[bool] = True
    keep_alive = b" "  # before a JSON value it means nothing

    def __init__(self, request_id: str, model: str, created: int, max_bytes: int) -> None:
        self._request_id = request_id
        self._model = model
        self._created = created
        self._spare = max_bytes
        self._text, self._reasoning = bytearray(), bytearray()
        self._annotations: list[object] = []
        self._finished = Finished()

    def encode(self, events: Sequence[Event]) -> list[bytes]:
        """Nothing until the end, then the JSON. Raises the ChatError of an answer that failed, or became too long."""
        for event in events:
            match event:
                case TextDelta():
                    self._add(self._text, event.text)
                case ReasoningDelta():
                    self._add(self._reasoning, event.text)
                case Citations():
                    self._annotations += map(_annotate, event.sources)
                case Finished():
                    self._finished = event
                case Done():
                    return [encode_json(self._completion())]
                case Failed():
                    raise event.error
                case _:
                    pass
        return []

    def encode_failure(self, error: ChatError) -> list[bytes]:
        """The error's JSON. (A body that breaks off would make the SDK ask, and the operator pay, again.)"""
        return [encode_error(error, self._request_id)]

    def _add(self, buffer: bytearray, text: str) -> None:
        data = text.encode()
        self._spare -= len(data)
        if self._spare < 0:
            raise UpstreamFailed("Grok's answer is longer than this service keeps. Ask for a stream.")
        buffer += data

    def _completion(self) -> dict[str, object]:
        message: dict[str, object] = {"role": "assistant", "content": self._text.decode(), "refusal": None}
        if self._reasoning:
            message["reasoning_content"] = self._reasoning.decode()
        if self._annotations:
            message["annotations"] = self._annotations
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": _finish_reason(self._finished)}
        return {
            "id": _new_id(),
            "object": "chat.completion",
            "created": self._created,
            "model": self._finished.model or self._model,
            "choices": [choice],
            "usage": _count_usage(self._finished.counts),
        }


def _new_id() -> str:
    return f"chatcmpl-{secrets.token_urlsafe(16)}"
