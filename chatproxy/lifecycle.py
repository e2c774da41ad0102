"""Whether the service takes new chats, what is still running, and how to end it. Knows no server and no signals."""

from collections.abc import Collection
from typing import Protocol

import anyio

from chatproxy.errors import Draining


class Running(Protocol):
    """An answer that is being made."""

    def cancel_with(self, error: Exception) -> None: ...


class Lifecycle:
    """One for each application; whoever runs it may drain it. Without that an end is what the server makes of it."""

    def __init__(self) -> None:
        self.draining = False  # new chats are refused
        self.requests = 0  # being served; counted by the outermost middleware
        self.completions: Collection[Running] = ()  # once the application has started

    def end_streams(self) -> None:
        """Tell every reader that the service stops, and close Grok's streams."""
        for completion in list(self.completions):
            completion.cancel_with(Draining())

    async def idle(self, seconds: float) -> bool:
        """Wait until nothing runs any more, for a reader or to be resumed; whether that came within `seconds`."""
        with anyio.move_on_after(seconds):
            while self.requests or self.completions:  # noqa: ASYNC110 -- both change too often to signal each time
                await anyio.sleep(0.02)
        return not (self.requests or self.completions)
