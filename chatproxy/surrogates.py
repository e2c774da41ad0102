"""Halves of UTF-16 pairs in JSON, as `text.slice(0, n)` makes them in JavaScript when it cuts an emoji in two.

JSON can carry such a half as an escape (`\\ud83d`), UTF-8 cannot, and msgspec refuses it. A lone half becomes U+FFFD.
"""

import re

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

# Each escape of a JSON string, so that the second half of an escaped backslash never begins one.
_ESCAPE = re.compile(
    rb"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|(u[dD][89a-fA-F][0-9a-fA-F]{2})|.)", re.DOTALL
)
_HALF = re.compile("[\ud800-\udfff]")


def replace_halves(json: bytes) -> bytes:
    """The same JSON with U+FFFD in place of each lone half."""
    return _ESCAPE.sub(lambda match: rb"\ufffd" if match[1] else match[0], json)


def has_half(json: bytes) -> bool:
    """Whether there may be a lone half in it: a quick look."""
    return b"\\ud" in json or b"\\uD" in json


class HalfJoiner:
    """Joins what was cut inside a pair: the first half is kept back until the next piece of the text is here."""

    __slots__ = ("pending",)

    def __init__(self) -> None:
        self.pending = ""
        """The half that is kept back, if any."""

    def feed(self, text: str) -> str:
        """The text, which may have halves in it, as far as it is whole."""
        text, self.pending = self.pending + text, ""
        if text and "\ud800" <= text[-1] <= "\udbff":
            text, self.pending = text[:-1], text[-1]
        if _HALF.search(text):
            text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        return text

    def flush(self) -> str:
        """What is left when the text has ended."""
        rest, self.pending = self.pending and REPLACEMENT, ""
        return rest
