"""What Grok searched for, and what it refers to: the items and annotations of the Responses API that tell it.

Both come from the web, so both are bounded here. Knows no order of events, and no text.
"""

import re
from collections.abc import Sequence
from typing import Any

import msgspec

from chatproxy.errors import ToolLimit
from chatproxy.events import Event, Source, ToolCall
from chatproxy.services.grok.response_events import Item

# In number, and in characters.
MAX_SOURCES = 100
MAX_URL = 2_000
MAX_TITLE = 300
MAX_QUERY = 1_000

# What a browser may be sent to: http or https, a host, and nothing that breaks a line.
_WEB_URL = re.compile(r"https?://[^\s\x00-\x20\x7f/?#\\][^\s\x00-\x20\x7f]*", re.IGNORECASE)

# The items that are searches. Those on X are recorded as custom_tool_call, and documented as x_search_call.
_TOOLS = {"web_search_call": "web_search", "custom_tool_call": "x_search", "x_search_call": "x_search"}


class Searches:
    """The searches of one answer, told apart by the index of their item: ids repeat, and searches overlap."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._completed: dict[int, bool] = {}

    def __bool__(self) -> bool:
        return bool(self._completed)

    @property
    def running(self) -> bool:
        """Whether a search has started and not completed."""
        return not all(self._completed.values())

    def complete(self, items: Sequence[Item], events: list[Event]) -> None:
        """Tell of what has not completed so far, by the items that the end of the answer repeats."""
        for index, completed in self._completed.items():
            if not completed and 0 <= index < len(items):
                self.see(index, items[index], events, completed=True)

    def see(self, index: int, item: Item, events: list[Event], *, completed: bool) -> None:
        """Tell of a search that has started or completed, each once. Raises ToolLimit for one too many."""
        tool = _TOOLS.get(item.type) if isinstance(item.type, str) else None
        if tool is None:
            return
        id = f"search-{index}"
        if index not in self._completed:
            if len(self._completed) == self._limit:
                raise ToolLimit
            self._completed[index] = False
            events.append(ToolCall(id, tool, "started"))
        if completed and not self._completed[index]:
            self._completed[index] = True
            events.append(ToolCall(id, tool, "completed", _query(item)))


def _query(item: Item) -> str | None:
    """What was searched for, if that is told: in the action of a web search, or in JSON within a string.

    That is the input of a search on X; and the arguments of a search of the web, until the end of 2025.
    """
    asked = item.action
    given = item.input or item.arguments
    if isinstance(given, str) and given:
        try:
            asked = msgspec.json.decode(given)
        except (ValueError, RecursionError):
            return None
    query = asked.get("query") if isinstance(asked, dict) else None
    return query[:MAX_QUERY] if isinstance(query, str) and query else None


class Sources:
    """The pages that an answer refers to, each once, in the order of their first mention."""

    def __init__(self) -> None:
        self._found: dict[str, Source] = {}

    def __bool__(self) -> bool:
        return bool(self._found)

    def add(self, annotation: Any) -> None:
        """Note what an annotation refers to, if that is a page."""
        if not isinstance(annotation, dict) or len(self._found) == MAX_SOURCES:
            return
        url, title = annotation.get("url"), annotation.get("title")
        if isinstance(url, str) and len(url) <= MAX_URL and _WEB_URL.fullmatch(url) and url not in self._found:
            self._found[url] = Source(url, title[:MAX_TITLE] if isinstance(title, str) and title else None)

    def all(self) -> list[Source]:
        """What was found so far."""
        return [*self._found.values()]
