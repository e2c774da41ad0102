"""When to make connections before they are needed. Does not know what a connection is."""

import asyncio
from collections.abc import Awaitable, Callable

import anyio
import httpx

# Seconds. Without a chat for so long no connections are kept ready any more.
WANTED_FOR = 3600.0

# Seconds to wait after a connection could not be made, or was closed by the server within MIN_LIFETIME seconds: the
# first of these, then twice that, up to the second. A request that is answered ends the waiting.
MIN_DELAY, MAX_DELAY = 1.0, 60.0
MIN_LIFETIME = 10.0


class Spares:
    """Makes connections until there are as many as wanted, one at a time, and slower where the server is away.

    `make` makes one, or raises httpx.TransportError; `count` tells how many are idle.
    """

    def __init__(self, wanted: int, make: Callable[[], Awaitable[None]], count: Callable[[], int]) -> None:
        self._wanted = wanted
        self._make = make
        self._count = count
        self._until = 0.0  # on the loop's clock
        self._delay = 0.0
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def want(self) -> None:
        """A request was answered: the server is there, and there may be more requests."""
        self._until = asyncio.get_running_loop().time() + WANTED_FOR
        self._delay = 0.0
        self._wake.set()
        self.fill()

    def lost(self, lifetime: float | None) -> None:
        """One that was idle is closed; `lifetime` is in seconds if it was the server that closed it."""
        if lifetime is not None and lifetime < MIN_LIFETIME:
            self._slow_down()
        self.fill()

    def fill(self) -> None:
        """Make what is missing, in the background."""
        if self._task is None and self._missing():
            self._task = asyncio.create_task(self._fill())

    def close(self) -> None:
        """Make none any more."""
        self._wanted = 0
        if self._task is not None:
            self._task.cancel()

    def _missing(self) -> bool:
        return self._count() < self._wanted and asyncio.get_running_loop().time() < self._until

    def _slow_down(self) -> None:
        self._delay = min(max(MIN_DELAY, 2 * self._delay), MAX_DELAY)

    async def _fill(self) -> None:
        try:
            while self._missing():
                if self._delay:
                    self._wake.clear()
                    with anyio.move_on_after(self._delay):
                        await self._wake.wait()
                try:
                    await self._make()
                except httpx.TransportError:
                    self._slow_down()
        finally:
            self._task = None
