"""The JSON of the Responses API's events: of each what is used. Does not know what any of it means."""

import json
from typing import Any

import msgspec
from msgspec import Raw, Struct

from chatproxy.events import Redacted
from chatproxy.surrogates import has_half, replace_halves

# Of each event only what is used is decoded; all of it may be missing or null. What is `Any` is looked at where it is
# used, because types of events that nobody knows yet may hold anything there.


class Item(Redacted, Struct, gc=False):
    """An output item."""

    type: Any = None
    content: Any = None
    summary: Any = None
    action: Any = None
    input: Any = None
    arguments: Any = None


class Response(Redacted, Struct, gc=False):
    """The response object. It echoes the system prompt, which is not decoded."""

    model: Any = None
    usage: Raw = Raw()
    incomplete_details: Any = None
    error: Raw = Raw()
    output: Raw = Raw()


class StreamEvent(Redacted, Struct, gc=False):
    """An event, or the error that Grok sends in an event's place."""

    type: str | None = None
    output_index: int | None = None
    content_index: int | None = None
    summary_index: int | None = None
    delta: Any = None
    text: Any = None
    refusal: Any = None
    item: Item | None = None
    part: Any = None
    annotation: Any = None
    response: Response | None = None
    error: Any = None


class _Typed(Struct, gc=False):
    type: str


# How the types begin that something is read of. An event of any other type may hold what it likes where those hold
# what is read.
_READ = (
    "error",
    "response.completed",
    "response.content_part.",
    "response.failed",
    "response.incomplete",
    "response.output_item.",
    "response.output_text.",
    "response.reasoning_",
    "response.refusal.",
)

_decode = msgspec.json.Decoder(StreamEvent | None).decode
_decode_type = msgspec.json.Decoder(_Typed).decode
decode_items = msgspec.json.Decoder(list[Item] | None).decode


def decode(data: bytes) -> StreamEvent | None:
    """The event in this JSON, if it is one that may be read. Raises ValueError or RecursionError."""
    event: StreamEvent | None
    try:
        event = _decode(data)
    except msgspec.ValidationError:
        if _decode_type(data).type.startswith(_READ):
            raise
        return None
    except ValueError:
        if not has_half(data):
            raise
        event = _decode(replace_halves(data))
        if event is not None and isinstance(event.delta, str):
            event.delta = json.loads(data)["delta"]  # takes half an emoji for what it is: the other half may follow
    return event


def string(value: Any) -> str:
    """A text, empty if it is missing. Raises ValueError for anything else."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError("a text is no string")
    return value


def objects(value: Any) -> list[dict[str, Any]]:
    """The objects in a list, none if it is no list."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []
