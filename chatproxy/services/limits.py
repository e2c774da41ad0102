"""How much at one time, and how many in a while: answers, readers, new chats, and memory for request bodies.

In memory, for one process. Knows no HTTP server; the header fields are those of the IETF draft "RateLimit header fields
for HTTP".
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from typing import Any, Generic, Protocol, TypeVar

from chatproxy.config import RateLimit, Settings
from chatproxy.errors import Busy, RateLimited
from chatproxy.events import StreamSummary
from chatproxy.services.access import Caller

T = TypeVar("T")

# Bytes of request bodies that are kept at one time, from their first byte until Grok's first chunk. Bodies above
# SMALL_BODY may take three quarters of it, so that a flood of large ones leaves room for what people usually send.
MAX_BODY_MEMORY = 64_000_000
SMALL_BODY = 65_536

# More callers than this within one window are a flood; the oldest are forgotten first.
MAX_CALLERS = 100_000

# At one time, of one resumable stream, by anybody.
MAX_READERS_PER_STREAM = 32


class RateLimiter(Protocol):
    """How many chats a caller may begin (RATE_LIMIT)."""

    async def check(self, caller: Caller) -> None:
        """Raises RateLimited if nothing is left. Counts nothing."""

    async def acquire(self, caller: Caller) -> dict[str, str]:
        """Count one chat. Gives the header fields that tell what is left. Raises RateLimited."""


class MemoryRateLimiter:
    """A RateLimiter in this process: so many in a window that begins with the caller's first chat."""

    def __init__(
        self, rate: RateLimit | None, *, max_callers: int = MAX_CALLERS, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._rate = rate
        self._max_callers = max_callers
        self._clock = clock
        self._windows: dict[str, tuple[float, int]] = {}  # until when (monotonic), how many left; the oldest first

    async def check(self, caller: Caller) -> None:
        """Raises RateLimited if nothing is left."""
        if self._rate is not None:
            self._take(self._rate, caller, 0)

    async def acquire(self, caller: Caller) -> dict[str, str]:
        """Count one chat."""
        return {} if self._rate is None else self._take(self._rate, caller, 1)

    def _take(self, rate: RateLimit, caller: Caller, count: int) -> dict[str, str]:
        now = self._clock()
        while self._windows and (
            len(self._windows) > self._max_callers or next(iter(self._windows.values()))[0] <= now
        ):
            del self._windows[next(iter(self._windows))]
        until, left = self._windows.get(caller.id, (now + rate.seconds, rate.count))
        wait = math.ceil(until - now)
        headers = rate_limit_headers(rate, max(0, left - count), wait)
        if not left:
            raise RateLimited(retry_after=wait, headers=headers)
        if count:
            self._windows[caller.id] = until, left - count
        return headers


def rate_limit_headers(rate: RateLimit, left: int, seconds: int) -> dict[str, str]:
    """How many chats are left of a rate, and in how many seconds there are all again."""
    return {
        "RateLimit-Policy": f'"chats";q={rate.count};w={rate.seconds}',
        "RateLimit": f'"chats";r={left};t={seconds}',
    }


class Lease(Protocol):
    """The right to run one answer, from before Grok is asked until its end is known."""

    def settle(self, summary: StreamSummary) -> None:
        """Give it back. `summary` tells what the answer has cost."""


class Tally:
    """How many there are at one time, for each key and in all."""

    def __init__(self) -> None:
        self.total = 0
        self._counts: dict[str, int] = {}

    def __getitem__(self, key: str) -> int:
        return self._counts.get(key, 0)

    def keys(self) -> Iterable[str]:
        """Of which there are any."""
        return self._counts.keys()

    def add(self, key: str) -> None:
        self.total += 1
        self._counts[key] = self[key] + 1

    def remove(self, key: str) -> None:
        self.total -= 1
        self._counts[key] -= 1
        if not self._counts[key]:
            del self._counts[key]


class Concurrency:
    """At most MAX_STREAMS answers at one time, and MAX_STREAMS_PER_CLIENT for each caller."""

    def __init__(self, settings: Settings) -> None:
        self._limit = settings.max_streams
        self._limit_per_caller = settings.max_streams_per_client
        self._running = Tally()

    async def reserve(self, caller: Caller) -> Lease:
        """A lease for one answer. Raises Busy or RateLimited."""
        if self._running.total >= self._limit:
            raise Busy
        if self._limit_per_caller is not None and self._running[caller.id] >= self._limit_per_caller:
            raise RateLimited
        return _MemoryLease(self._running, caller.id)


class _MemoryLease:
    __slots__ = ("_id", "_running")

    def __init__(self, running: Tally, id: str) -> None:
        self._running = running
        self._id = id
        running.add(id)

    def settle(self, _: StreamSummary) -> None:
        self._running.remove(self._id)


class ReaderLimit:
    """How many read resumable streams at one time: of each stream, for each caller, and in all."""

    def __init__(self, settings: Settings) -> None:
        self._limit = 2 * settings.max_streams
        self._limit_per_caller = 4 * settings.max_streams_per_client if settings.max_streams_per_client else None
        self._by_stream, self._by_caller = Tally(), Tally()

    @contextmanager
    def reading(self, stream: str, caller: Caller) -> Iterator[None]:
        """Inside it, one more reads. Raises Busy or RateLimited."""
        if self._by_stream[stream] >= MAX_READERS_PER_STREAM or self._by_caller.total >= self._limit:
            raise Busy
        if self._limit_per_caller is not None and self._by_caller[caller.id] >= self._limit_per_caller:
            raise RateLimited
        self._by_stream.add(stream)
        self._by_caller.add(caller.id)
        try:
            yield
        finally:
            self._by_stream.remove(stream)
            self._by_caller.remove(caller.id)


class BodyMemory:
    """One bound for all request bodies, from their first byte until Grok's first chunk."""

    def __init__(self, settings: Settings, *, limit: int | None = None) -> None:
        self._limit = limit if limit is not None else max(MAX_BODY_MEMORY, 4 * settings.max_body_bytes)
        self.used = 0

    def hold(self) -> "BodyHold":
        """What one request holds: nothing so far."""
        return BodyHold(self)

    def _fits(self, size: int) -> bool:
        return self.used <= (self._limit if size <= SMALL_BODY else self._limit * 3 // 4)


class BodyHold:
    """The bytes that one request holds. `release` it once they are gone; later calls change nothing."""

    __slots__ = ("_memory", "_size")

    def __init__(self, memory: BodyMemory) -> None:
        self._memory = memory
        self._size = 0

    def grow(self, size: int) -> None:
        """Hold so many bytes more. Raises Busy if that is too much."""
        self._size += size
        self._memory.used += size
        if not self._memory._fits(self._size):
            raise Busy

    def release(self, _: StreamSummary | None = None) -> None:
        """Hold nothing any more."""
        self._memory.used -= self._size
        self._size = 0


class Admitted(Generic[T]):
    """A completion that runs under a lease: an asynchronous context manager around another one.

    Entering it takes the lease, asks Grok, and gives back the request body's memory: Grok's first chunk is here then.
    """

    __slots__ = ("_body", "_caller", "_concurrency", "_summary", "_upstream")

    def __init__(
        self,
        upstream: AbstractAsyncContextManager[T],
        concurrency: Concurrency,
        caller: Caller,
        body: BodyHold,
        summary: StreamSummary,
    ) -> None:
        self._upstream = upstream
        self._concurrency = concurrency
        self._caller = caller
        self._body = body
        self._summary = summary
        summary.on_end.append(body.release)

    async def __aenter__(self) -> T:
        lease = await self._concurrency.reserve(self._caller)
        self._summary.on_end.append(lease.settle)
        self._summary.asked_at = time.monotonic()
        entered = await self._upstream.__aenter__()
        self._summary.answering = True
        self._body.release()
        return entered

    async def __aexit__(self, *exc: Any) -> bool | None:
        return await self._upstream.__aexit__(*exc)
