"""What this service needs of one of xAI's APIs, without any I/O: see `chat_completions` for the one there is."""

from typing import Protocol

from chatproxy.errors import ChatError
from chatproxy.events import Event, Finished


class Decoder(Protocol):
    """Turns the bytes of one answer, cut anywhere, into events."""

    progressed: bool
    """Of the last `feed`: something of the answer was among the bytes. Comments and keep-alive frames are none."""
    complete: bool
    """Grok has said that the answer is complete: nothing that follows counts."""
    ended: bool
    """Nothing follows: Grok's last word was read, or there is a `failure`."""
    failure: tuple[ChatError, str] | None
    """What went wrong, and what of it may be logged."""

    @property
    def finished(self) -> Finished:
        """What was said about the end, so far."""

    def feed(self, piece: bytes) -> list[Event]:
        """The events that are complete now."""
