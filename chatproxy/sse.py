"""The event-stream format, in both directions.

Knows bytes and events. Does not know HTTP, JSON, chats or time, and never awaits.
Section numbers are those of the WHATWG HTML standard, "Server-sent events".
"""

import re
from collections.abc import Mapping

# One line or event larger than this is not a chat chunk, it is a fault or an attack.
MAX_EVENT_BYTES = 1_000_000

DONE = "[DONE]"
KEEP_ALIVE = b": keep-alive\n\n"

_DONE_LINE = re.compile(r"^\[DONE\]$", re.MULTILINE)


class TooLong(ValueError):
    """A line or an event is longer than it may be."""


class Decoder:
    """Turns the bytes of an event stream, cut anywhere, into the data of its events.

    Lines end with LF, CR LF or CR and nothing else (9.2.5). Ids and comments are skipped: Grok
    sends none that matter. `max_event_bytes` bounds a line and an event; `larger` gives the bound
    of those event types that have another one, where the type comes before the data.
    """

    __slots__ = (
        "_after_cr",
        "_data",
        "_data_size",
        "_larger",
        "_limit",
        "_rest",
        "_rest_size",
        "_started",
        "max_event_bytes",
    )

    def __init__(self, max_event_bytes: int = MAX_EVENT_BYTES, larger: Mapping[bytes, int] | None = None) -> None:
        self.max_event_bytes = self._limit = max_event_bytes
        self._larger = larger or {}
        self._started = False
        self._after_cr = False
        self._rest: list[bytes] = []  # an unfinished line, in the cuts it came in
        self._rest_size = 0
        self._data: list[bytes] = []  # the data lines of an unfinished event
        self._data_size = 0

    def feed(self, piece: bytes) -> list[bytes]:
        """The data of each event that is complete now. Raises TooLong."""
        if self._after_cr and piece:
            self._after_cr = False
            if piece[0] == 0x0A:
                piece = piece[1:]
        if b"\r" in piece:
            self._after_cr = piece[-1] == 0x0D
            piece = piece.replace(b"\r\n", b"\n").replace(b"\r", b"\n")

        lines = piece.split(b"\n")
        self._rest_size += len(lines[0])
        limit = self._limit
        if self._rest_size > limit:
            raise TooLong
        rest = lines.pop()
        if lines:
            if self._rest:
                self._rest.append(lines[0])
                lines[0] = b"".join(self._rest)
                self._rest.clear()
            self._rest_size = len(rest)
        if rest:
            self._rest.append(rest)
        if lines and not self._started:
            self._started = True
            lines[0] = lines[0].removeprefix(b"\xef\xbb\xbf")  # 9.2.5: one byte order mark is no content

        events: list[bytes] = []
        data, size = self._data, self._data_size
        for line in lines:
            if line.startswith(b"data:") or line == b"data":
                data.append(line[6:] if line[5:6] == b" " else line[5:])
                size += len(line)
                if size > limit:
                    raise TooLong
            elif not line:
                if data:  # 9.2.6: an event without a data line is not dispatched
                    events.append(data[0] if len(data) == 1 else b"\n".join(data))
                    data, size = [], 0
                limit = self.max_event_bytes
            elif line.startswith(b"event:"):
                limit = self._larger.get(line[6:].removeprefix(b" "), self.max_event_bytes)
        self._data, self._data_size, self._limit = data, size, limit
        return events


class DeltaSplitter:
    """Cuts the deltas of one text into the data of events that every reader joins back exactly.

    CR LF and CR become LF, also when a CR LF is cut between two deltas; a line that is exactly
    `[DONE]` is cut in two, so that no reader takes it for the end marker.
    """

    __slots__ = ("_after_cr",)

    def __init__(self) -> None:
        self._after_cr = False

    def feed(self, delta: str) -> list[str]:
        """The data of the events for this delta: usually one, none if nothing is left of it."""
        if self._after_cr and delta:
            self._after_cr = False
            if delta[0] == "\n":
                delta = delta[1:]
        if "\r" in delta:
            self._after_cr = delta[-1] == "\r"
            delta = delta.replace("\r\n", "\n").replace("\r", "\n")
        if DONE not in delta:
            return [delta] if delta else []
        pieces, start = [], 0
        for match in _DONE_LINE.finditer(delta):
            middle = match.start() + len(DONE) // 2
            pieces.append(delta[start:middle])
            start = middle
        pieces.append(delta[start:])
        return pieces


def encode(data: str, type: str | None = None, id: str | None = None) -> bytes:
    """One event as a frame: a data line for each line of `data`, which must be free of CR.

    The id stands after the data, so that a frame cut by the network never moves the reader's
    last event id ahead of what it has read.
    """
    if "\n" in data:
        data = data.replace("\n", "\ndata: ")
    if type is id is None:
        return f"data: {data}\n\n".encode()
    head = f"event: {type}\n" if type else ""
    tail = f"id: {id}\n" if id else ""
    return f"{head}data: {data}\n{tail}\n".encode()


def encode_reconnect_hint(id: str, reconnection_time: int) -> bytes:
    """The frame that gives a reader a place to come back to before the first event.

    9.2.6: an event without data is dropped, but its id and its reconnection time (in
    milliseconds) still count.
    """
    return f"retry: {reconnection_time}\nid: {id}\n\n".encode()
