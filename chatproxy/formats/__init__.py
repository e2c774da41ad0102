"""What clients read: one module for each format, from neutral events to frames, and from a request body to a chat.

A format knows JSON and frames. It does not know HTTP, time or Grok.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, ClassVar, Protocol

import msgspec
from msgspec import Meta, Struct

from chatproxy.errors import ChatError
from chatproxy.events import Chat, Event

encode_json = msgspec.json.Encoder().encode

# Writes an event with this data and type as a frame. A resumable stream's also writes the event's id.
EncodeFrame = Callable[[str, str | None], bytes]


class StreamFormat(Protocol):
    """What one answer looks like to its reader. An object for each answer: it keeps what has been opened."""

    content_type: ClassVar[bytes]
    headers: ClassVar[Mapping[str, str]]  # of the 200, besides those of every stream
    whole: ClassVar[bool]  # one JSON at the end rather than a stream: the status waits for the end

    @property
    def keep_alive(self) -> bytes:
        """Sent when nothing else is, between two frames."""

    def encode(self, events: Sequence[Event]) -> list[bytes]:
        """The frames of these events, maybe none. `Done` or `Failed` is the last event that it is given.

        A `whole` format raises the error of `Failed`, for there may still be a status line to say it with.
        """

    def encode_failure(self, error: ChatError) -> list[bytes]:
        """The last frames of an answer that failed after its status line."""


# The format of one answer, for its stream's id (empty if it is not resumable).
MakeFormat = Callable[[str, EncodeFrame], StreamFormat]


class Asked(Struct):
    """What a request body asks for, in whatever format.

    `name` is a second one for a resumable answer, chosen by the client: whoever knows it may read the answer.
    `only_as_stream` means that a client which accepts JSON wants the answer all the same, and not its address.
    """

    chat: Chat
    make_format: MakeFormat
    resumable: bool = False
    name: str | None = None
    only_as_stream: bool = False


class ErrorDetail(Struct):
    """What went wrong, for a front-end developer."""

    type: Annotated[str, Meta(description="request_error, service_error or upstream_error")]
    code: Annotated[str, Meta(description="Stable; meant for programs.")]
    message: Annotated[str, Meta(description="A sentence to act on; not stable.")]
    param: Annotated[str | None, Meta(description="The field at fault, such as messages[2].role.")]
    request_id: Annotated[str | None, Meta(description="The same as the X-Request-ID header.")]


class ErrorBody(Struct):
    """Every error: as a response body, and as the data of `event: error`."""

    error: ErrorDetail


# Line breaks to Python's `str.splitlines`, with which some clients tear an event's data apart.
_LINE_SEPARATOR = re.compile("[\u0085\u2028\u2029]")


def encode_line(value: object) -> bytes:
    """A value as JSON, on one line for every reader."""
    json = encode_json(value)
    if json.isascii() or not _LINE_SEPARATOR.search(text := json.decode()):
        return json
    return _LINE_SEPARATOR.sub(lambda match: f"\\u{ord(match[0]):04x}", text).encode()


def encode_error(error: ChatError, request_id: str | None) -> bytes:
    """The JSON of an error, the same in every format."""
    return encode_json(ErrorBody(ErrorDetail(error.type, error.code, error.message, error.param, request_id)))
