"""One text out of the parts that the Responses API sends, each of them in deltas, or whole, or both.

Knows which text was told already. Does not know JSON, nor the order of events.
"""

from chatproxy.events import Event, ReasoningDelta, TextDelta
from chatproxy.surrogates import HalfJoiner

# An answer of more parts is a fault: what is remembered of each would grow with the answer.
MAX_PARTS = 10_000


class TooManyParts(ValueError):
    """A text has more parts than it may have."""


class JoinedText:
    """One text, made of the parts of several items. Each part comes in deltas, or whole, or both."""

    __slots__ = ("_current", "_each_part", "_event", "_halves", "_items", "_parts", "_separator", "_streamed", "_told")

    def __init__(self, event: type[TextDelta] | type[ReasoningDelta], separator: str, *, each_part: bool) -> None:
        self._event = event
        self._separator = separator  # between two items, or also between two parts of one
        self._each_part = each_part
        self._halves = HalfJoiner()
        self._current: tuple[int, int] | None = None
        self._items: set[int] = set()
        self._parts: set[tuple[int, int]] = set()
        self._streamed: set[int] = set()  # items that came in deltas
        self._told: set[tuple[int, int]] = set()  # parts that came whole

    @property
    def begun(self) -> bool:
        """Whether there is any text."""
        return bool(self._parts)

    def delta(self, item: int, part: int, text: str, events: list[Event]) -> None:
        """The next piece of a part."""
        if not text:
            return
        if self._current != (item, part):
            if (item, part) in self._told:
                return
            self._enter(item, part, events)
            self._streamed.add(item)
        if whole := self._halves.feed(text):
            events.append(self._event(whole))

    def whole(self, item: int, part: int, text: str, events: list[Event]) -> None:
        """A part from its beginning to its end: it repeats what is known of an item that came in deltas."""
        if text and item not in self._streamed and (item, part) not in self._parts:
            self._enter(item, part, events)
            events.append(self._event(self._halves.feed(text) + self._halves.flush()))
            self._told.add((item, part))
            self._current = None

    def flush(self, events: list[Event]) -> None:
        """What is left when a part has ended."""
        if text := self._halves.flush():
            events.append(self._event(text))

    def _enter(self, item: int, part: int, events: list[Event]) -> None:
        self.flush(events)
        new = (item, part) not in self._parts if self._each_part else item not in self._items
        if new and self._parts:
            events.append(self._event(self._separator))
        self._current = item, part
        self._items.add(item)
        self._parts.add(self._current)
        if len(self._parts) > MAX_PARTS:
            raise TooManyParts
