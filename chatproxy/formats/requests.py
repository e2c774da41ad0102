"""A request body becomes a validated struct, or an error that names the field and echoes no value."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import msgspec
from msgspec import Raw, Struct

from chatproxy import surrogates
from chatproxy.errors import InvalidJSON, InvalidRequest, TooManyMessages

T = TypeVar("T")

# What msgspec's "Invalid enum value" stands for, by the field.
_CHOICES = {
    ".role": '"user", "assistant" or "system"',
    ".include": '"reasoning", "finish", "tools" or "citations"',
    ".tools": '"web_search" or "x_search"',
}


def decode_body(decoder: msgspec.json.Decoder[T], body: bytes) -> T:
    """The struct that `decoder` makes of a body; half an emoji in it becomes U+FFFD.

    Raises InvalidJSON (malformed, not UTF-8, or nested deeper than the parser can go) or InvalidRequest.
    """
    try:
        if not body.isascii():
            body.decode()  # msgspec does not look into what it skips
        try:
            return decoder.decode(body)
        except msgspec.ValidationError:
            raise
        except ValueError:
            if not surrogates.has_half(body):
                raise
            return decoder.decode(surrogates.replace_halves(body))
    except msgspec.ValidationError as error:
        problem = str(error)
    except (ValueError, RecursionError):  # msgspec.DecodeError and UnicodeDecodeError are ValueErrors
        raise InvalidJSON from None
    raise _explain(problem)


class _Part(Struct):
    """A part of a message's content. Foreign ones may hold anything, so nothing is decoded before it is known."""

    type: Raw = Raw()
    text: Raw = Raw()


_NO_OBJECT = _Part()
_part_decoder = msgspec.json.Decoder(_Part)
_string_decoder = msgspec.json.Decoder(str)


# Parts of all messages together. Each is looked at in Python, and nobody else is served meanwhile.
MAX_PARTS = 20_000


class TextJoiner:
    """Gives the text of one message after the other of a conversation. `where` names a message's parts in errors."""

    def __init__(self) -> None:
        self._left = MAX_PARTS

    def join(self, parts: Sequence[Raw], where: str, is_refused: Callable[[bytes], bool] | None) -> str:
        """The texts of a message's parts, joined; parts of other types are left out.

        `is_refused` gets the type of each of those as JSON (empty if it has none). Raises InvalidRequest, or
        InvalidJSON where an escape in a text is none, or TooManyMessages where there are more parts than anybody sends.
        """
        self._left -= len(parts)
        if self._left < 0:
            raise TooManyMessages(param="messages")
        texts = []
        for number, raw in enumerate(parts):
            json = bytes(raw)
            part = _part_decoder.decode(json) if json[:1] == b"{" else _NO_OBJECT
            type = bytes(part.type)
            if type == b'"text"':
                try:
                    texts.append(decode_body(_string_decoder, bytes(part.text) or b"null"))
                except InvalidRequest:
                    param = f"{where}[{number}].text"
                    raise InvalidRequest(f"{param}: Expected `str`.", param=param) from None
            elif is_refused is not None and is_refused(type):
                param = f"{where}[{number}]"
                raise InvalidRequest(f"{param}: Grok gets text only from this service.", param=param)
        return "".join(texts)


def _explain(problem: str) -> InvalidRequest:
    """Turn msgspec's `Expected ... - at `$.messages[0].role`` into an error that echoes no value."""
    problem, _, path = problem.partition(" - at `$")
    path = path.rstrip("`")
    if problem.startswith("Object missing required field `"):
        path += "." + problem.split("`")[1]
        problem = "Required field is missing"
    elif problem.startswith("Invalid enum value"):
        field = path[path.rfind(".") :].partition("[")[0]
        problem = f"Expected {_CHOICES[field]}"
    param = path.lstrip(".") or None
    return InvalidRequest(f"{param}: {problem}." if param else f"{problem}.", param=param)
