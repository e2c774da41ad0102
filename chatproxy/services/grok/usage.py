"""What Grok says that an answer has cost, in the words of either of xAI's APIs."""

from contextlib import suppress
from typing import Annotated

import msgspec
from msgspec import Meta, Raw, Struct

from chatproxy.events import Usage

# More than any answer takes: what is outside of this is a mistake of the sender, and would spoil every sum it got into.
Tokens = Annotated[int, Meta(ge=0, le=10**12)]


class _Details(Struct):
    reasoning_tokens: Tokens | None = None
    cached_tokens: Tokens | None = None


class _ChatUsage(Struct):
    prompt_tokens: Tokens | None = None
    completion_tokens: Tokens | None = None
    prompt_tokens_details: _Details | None = None
    completion_tokens_details: _Details | None = None


class _ResponsesUsage(Struct):
    input_tokens: Tokens | None = None
    output_tokens: Tokens | None = None
    input_tokens_details: _Details | None = None
    output_tokens_details: _Details | None = None


_NONE = _Details()
_UNKNOWN = Usage()
_decode_chat = msgspec.json.Decoder(_ChatUsage | None).decode
_decode_responses = msgspec.json.Decoder(_ResponsesUsage | None).decode


def readable(usage: Raw) -> Raw:
    """The same, or nothing if it is not UTF-8: it is passed on as it came."""
    try:
        bytes(usage).decode()
    except UnicodeDecodeError:
        return Raw()
    return usage


def count_chat(usage: Raw) -> Usage:
    """The tokens in a usage of Chat Completions; nothing where it cannot be read, for the answer counts without."""
    if not usage:
        return _UNKNOWN
    found: _ChatUsage | None = None
    with suppress(ValueError):
        found = _decode_chat(usage)
    if found is None:
        return _UNKNOWN
    reasoning = (found.completion_tokens_details or _NONE).reasoning_tokens
    cached = (found.prompt_tokens_details or _NONE).cached_tokens
    return Usage(found.prompt_tokens, found.completion_tokens, reasoning, cached)


def count_responses(usage: Raw) -> Usage:
    """The same for the Responses API, where the reasoning is part of the output."""
    if not usage:
        return _UNKNOWN
    found: _ResponsesUsage | None = None
    with suppress(ValueError):
        found = _decode_responses(usage)
    if found is None:
        return _UNKNOWN
    reasoning = (found.output_tokens_details or _NONE).reasoning_tokens
    cached = (found.input_tokens_details or _NONE).cached_tokens
    completion = None if found.output_tokens is None else max(0, found.output_tokens - (reasoning or 0))
    return Usage(found.input_tokens, completion, reasoning, cached)
