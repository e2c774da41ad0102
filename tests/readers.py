"""Three readers of an event stream, so that no test rests on one reading of the format.

`standard` follows the WHATWG HTML standard, "Server-sent events" (9.2.5 and 9.2.6), step by step; `Standard` is the
same for bytes that are still arriving. `naive` is what many front ends do: split at blank lines, strip `data: `.
`by_httpx_sse` is the library. Each gives the events in order; `answer` gives the text of a stream that ended well.
"""

import codecs
import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

import httpx
import httpx_sse


class Event(NamedTuple):
    data: str
    type: str = "message"
    id: str = ""
    """The last event ID at the time of the event."""


DONE = "[DONE]"


class Standard:
    """The parser of the standard, fed with bytes in any cut."""

    def __init__(self) -> None:
        self.comments: list[str] = []
        self.last_event_id = ""
        self.reconnection_time: int | None = None
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._text = ""
        self._begun = False
        self._data = ""
        self._type = ""
        self._id = ""

    def feed(self, piece: bytes) -> list[Event]:
        """The events that are complete with this piece."""
        self._text += self._utf8.decode(piece)
        if not self._begun and self._text:
            self._begun = True
            self._text = self._text.removeprefix("\ufeff")
        *lines, self._text = re.split(r"\r\n|\n|\r(?!\n|\Z)", self._text)
        return [event for line in lines if (event := self._line(line)) is not None]

    def close(self) -> list[Event]:
        """The end of the stream. A last CR was a whole line break; an event without its blank line is dropped."""
        last, cr, _ = self._text.partition("\r")
        self._text = ""
        return [event] if cr and (event := self._line(last)) is not None else []

    def _line(self, line: str) -> Event | None:
        if line == "":
            return self._dispatch()
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        match field:
            case "":
                self.comments.append(value)
            case "event":
                self._type = value
            case "data":
                self._data += value + "\n"
            case "id" if "\0" not in value:
                self._id = value
            case "retry" if re.fullmatch("[0-9]+", value):
                self.reconnection_time = int(value)
        return None

    def _dispatch(self) -> Event | None:
        self.last_event_id = self._id
        data, kind = self._data, self._type
        self._data = self._type = ""
        return Event(data.removesuffix("\n"), kind or "message", self._id) if data else None


def standard(body: bytes) -> list[Event]:
    parser = Standard()
    return parser.feed(body) + parser.close()


def comments(body: bytes) -> list[str]:
    """The comments of a stream, read by the standard."""
    parser = Standard()
    parser.feed(body)
    return parser.comments


def naive(body: bytes) -> list[Event]:
    """Split at blank lines, strip `data: `."""
    events = []
    for block in body.decode().split("\n\n"):
        fields: dict[str, list[str]] = {"data": [], "event": ["message"], "id": [""]}
        for line in block.split("\n"):
            for name, values in fields.items():
                if line.startswith(f"{name}: "):
                    values.append(line[len(name) + 2 :])
        if fields["data"]:
            events.append(Event("\n".join(fields["data"]), fields["event"][-1], fields["id"][-1]))
    return events


def by_httpx_sse(body: bytes) -> list[Event]:
    """httpx-sse. (After an id it makes an empty event of each comment; that adds nothing to a text.)"""
    response = httpx.Response(200, headers={"Content-Type": "text/event-stream"}, content=body)
    return [Event(event.data, event.event, event.id) for event in httpx_sse.EventSource(response).iter_sse()]


READERS: tuple[Callable[[bytes], list[Event]], ...] = (standard, naive, by_httpx_sse)


def joined(events: Iterable[Event], kind: str = "message") -> str:
    """The text that the events of one type make together; the done marker is not text."""
    return "".join(event.data for event in events if event.type == kind and event.data != DONE)


def answer(body: bytes) -> str:
    """The text of an answer that ended in the done marker and holds nothing but text, in all three readers alike."""
    texts = []
    for reader in READERS:
        *events, last = reader(body)
        assert last == Event(DONE, id=last.id)
        assert [event for event in events if event.type != "message" or event.data == DONE] == []
        texts.append(joined(events))
    assert texts == [texts[0]] * len(READERS)
    return texts[0]
