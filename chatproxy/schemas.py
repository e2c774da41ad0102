"""The JSON shapes that cross a wire, and their codecs, made once.

Does not know HTTP, tasks or the event-stream format.
"""

import json
from itertools import accumulate
from typing import Annotated, Any, Literal, NoReturn

import msgspec
from msgspec import Meta, Raw, Struct

from chatproxy.errors import ChatError, InvalidJSON, InvalidRequest


class Private:
    """What somebody said: it stays out of reprs, and so out of logs and tracebacks."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"{type(self).__name__}(...)"


# What a browser sends (contract A1). Unknown fields are ignored.


class Message(Private, Struct, frozen=True):
    """One turn of the conversation."""

    role: Literal["user", "assistant", "system"]
    content: Annotated[str, Meta(min_length=1, description="Never empty: Grok refuses empty messages.")]


class Chat(Private, Struct, frozen=True):
    """A conversation to be continued by Grok."""

    messages: Annotated[list[Message], Meta(min_length=1, description="The conversation so far, oldest first.")]
    sessionId: Annotated[
        str | None, Meta(description="Any stable name of the conversation; makes Grok's prompt cache hit.")
    ] = None
    include: Annotated[
        list[Literal["reasoning", "finish"]] | None, Meta(description="Events wanted beside the text.")
    ] = None
    resumable: Annotated[bool | None, Meta(description="Number the events, so that a reader can come back.")] = None


class Created(Struct):
    """Where the answer streams: for `new EventSource(url)`."""

    id: str
    url: str


class Problem(Struct):
    """What went wrong, for a front-end developer."""

    type: Annotated[str, Meta(description="request_error, service_error or upstream_error")]
    code: Annotated[str, Meta(description="Stable; meant for programs.")]
    message: Annotated[str, Meta(description="A sentence to act on; not stable.")]
    param: Annotated[str | None, Meta(description="The field at fault, such as messages[2].role.")]
    request_id: Annotated[str | None, Meta(description="The same as the X-Request-ID header.")]


class Failure(Struct):
    """Every error: as a response body, and as the data of `event: error`."""

    error: Problem


class Health(Struct, omit_defaults=True):
    """Whether the service takes chats. `demo`: no key is set, answers come from the built-in demo."""

    status: Literal["ok", "unavailable"]
    reason: Literal["draining", "upstream_auth"] | None = None
    demo: bool = False


class Finish(Struct):
    """The data of `event: finish`; usage as Grok sent it."""

    finish_reason: str | None
    model: str | None
    usage: Annotated[Raw, Meta(extra_json_schema={"type": ["object", "null"]})]


# What Grok sends. Of each chunk only what is used is decoded; all of it may be missing or null. (gc=False: there are
# many of them, and none is part of a cycle.)


class Delta(Private, Struct, gc=False):
    content: str | None = None
    reasoning_content: str | None = None


class Choice(Struct, gc=False):
    delta: Delta | None = None
    finish_reason: str | None = None


class Chunk(Private, Struct, gc=False):
    """A chat completion chunk, or the error that Grok sends in a chunk's place."""

    choices: list[Choice] | None = None
    model: str | None = None
    usage: Raw = Raw()
    error: Any = None


class Usage(Struct):
    """The counts that are logged. `completion_tokens` does not include the reasoning."""

    class Details(Struct):
        reasoning_tokens: int | None = None

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    completion_tokens_details: Details | None = None


class Refusal(Private, Struct):
    """The body of an upstream error: `error` is a string, or an object with a message and a code."""

    class Detail(Private, Struct):
        message: str = ""
        code: str | int | None = None

    error: str | Detail = ""
    code: str | int | None = None


class KeyState(Struct):
    """Upstream's `GET /api-key`."""

    team_blocked: bool = False
    api_key_blocked: bool = False
    api_key_disabled: bool = False


# What Grok is asked (contract A2).


class CompletionRequest(Struct, omit_defaults=True):
    model: str
    messages: list[Message]
    stream: bool
    stream_options: dict[str, bool]
    reasoning_effort: str | None = None


encode = msgspec.json.Encoder().encode
decode_chunk = msgspec.json.Decoder(Chunk).decode
decode_usage = msgspec.json.Decoder(Usage).decode
decode_refusal = msgspec.json.Decoder(Refusal | str).decode
decode_key_state = msgspec.json.Decoder(KeyState).decode

_decode_chat = msgspec.json.Decoder(Chat).decode

# Of a request body. A chat is three deep; what is unknown in it is ignored, but has to be read, and takes its time.
MAX_DEPTH = 100
MAX_BRACKETS = 100_000


def decode_chat(body: bytes) -> Chat:
    """The validated chat. Raises InvalidJSON or InvalidRequest, which names the field and no value."""
    try:
        chat = _decode_chat(body)
        if body.count(b"[") + body.count(b"{") > MAX_DEPTH:
            _check_nesting(body)
        # msgspec keeps the last of two equal keys; another reader of the same bytes may keep the first.
        _find_duplicates(body.decode())
    except msgspec.ValidationError as error:
        _explain(str(error))
    except (ValueError, RecursionError):  # msgspec.DecodeError and UnicodeDecodeError are ValueErrors
        raise InvalidJSON from None
    return chat


def _check_nesting(body: bytes) -> None:
    """Raises InvalidJSON or InvalidRequest."""
    # The body is valid JSON: of the pieces between quotation marks each second is a string.
    pieces = body.replace(rb"\\", b"").replace(rb"\"", b"").split(b'"')[::2]
    brackets = b"".join(pieces).translate(None, delete=_NO_BRACKETS)
    if len(brackets) > MAX_BRACKETS:
        raise InvalidRequest("The request body has too many objects and lists.")
    # How deep a parser can go depends on the version of Python; how deep a body may be does not.
    if max(accumulate(map(_STEPS.__getitem__, brackets))) > MAX_DEPTH:
        raise InvalidJSON


_STEPS = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}
_NO_BRACKETS = bytes(set(range(256)) - set(_STEPS))


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> None:
    if len({name for name, _ in pairs}) != len(pairs):
        raise InvalidRequest("The request body has an object with the same key twice.")


# Numbers stay text: a very long one would be refused by int() only after a long time.
_find_duplicates = json.JSONDecoder(object_pairs_hook=_refuse_duplicates, parse_int=str, parse_float=str).decode


def _explain(problem: str) -> NoReturn:
    """Turn msgspec's `Expected ... - at `$.messages[0].role`` into an error that echoes no value."""
    problem, _, path = problem.partition(" - at `$")
    path = path.rstrip("`")
    if problem.startswith("Object missing required field `"):
        path += "." + problem.split("`")[1]
        problem = "Required field is missing"
    elif problem.startswith("Invalid enum value"):
        allowed = '"user", "assistant" or "system"' if path.startswith(".messages") else '"reasoning" or "finish"'
        problem = f"Expected {allowed}"
    param = path.lstrip(".") or None
    raise InvalidRequest(f"{param}: {problem}." if param else f"{problem}.", param=param) from None


def encode_error(error: ChatError, request_id: str | None) -> bytes:
    """The JSON of C1."""
    return encode(Failure(Problem(error.type, error.code, error.message, error.param, request_id)))
