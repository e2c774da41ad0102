"""What a completion needs: of the client whose connections it uses, and of one of xAI's APIs, without any I/O."""

from typing import Any, Protocol

import httpx

from chatproxy.config import Settings
from chatproxy.config.timing import Timing
from chatproxy.errors import ChatError
from chatproxy.events import Event, Finished


class Client(Protocol):
    """What all completions share; see `client.Grok`."""

    settings: Settings
    timing: Timing
    running: set[Any]
    """The completions that are being made."""
    rate_limited_until: float
    """On the loop's clock: until then Grok would answer 429."""

    def remember_rate_limit(self, seconds: float) -> None:
        """Grok has told to wait for so long."""

    async def send(self, content: bytes, headers: httpx.Headers) -> httpx.Response:
        """Ask once. Raises httpx.TransportError."""

    def log_failure(self, error: ChatError, detail: str) -> ChatError:
        """Note an upstream failure for the operator; gives the error."""


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
