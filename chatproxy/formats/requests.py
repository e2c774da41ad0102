"""A request body becomes a validated struct, or an error that names the field and echoes no value."""

from typing import TypeVar

import msgspec

from chatproxy import surrogates
from chatproxy.errors import InvalidJSON, InvalidRequest

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
