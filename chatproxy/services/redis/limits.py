"""What callers may do, counted for all replicas together; for this one alone where Redis is away and that is allowed.

The windows and the header fields are those of `MemoryRateLimiter`; only Redis's clock counts.
"""

import logging
import math

from chatproxy.config import RateLimit, Settings
from chatproxy.errors import RateLimited, StoreUnavailable
from chatproxy.events import StreamSummary
from chatproxy.services.access import Caller
from chatproxy.services.limits import Concurrency, Lease, MemoryRateLimiter, rate_limit_headers
from chatproxy.services.redis.commands import Command, Commands
from chatproxy.services.redis.scripts import RATE, RESERVE, Keys

log = logging.getLogger(__name__)

# Seconds that a replica's count of a caller's running answers is kept without being renewed.
COUNT_TTL = 60


class Fallback:
    """What LIMITS_WITHOUT_REDIS says, told to the log once for each outage."""

    def __init__(self, settings: Settings, commands: Commands) -> None:
        self._open = settings.limits_without_redis == "open"
        self._told = False
        commands.on_connect.append(self._connected)

    def _connected(self, _: bool) -> None:
        self._told = False

    def allow(self, error: StoreUnavailable) -> None:
        """Go on without Redis, or raise the error."""
        if not self._open:
            raise error
        if not self._told:
            self._told = True
            log.warning("redis is away: limits count for each replica by itself")


class RedisRateLimiter:
    """A RateLimiter for all replicas."""

    def __init__(self, settings: Settings, commands: Commands, keys: Keys, fallback: Fallback) -> None:
        self._rate = settings.rate_limit
        self._commands = commands
        self._keys = keys
        self._fallback = fallback
        self._local = MemoryRateLimiter(settings.rate_limit)

    async def check(self, caller: Caller) -> None:
        """Raises RateLimited if nothing is left."""
        if self._rate is not None:
            await self._take(self._rate, caller, 0)

    async def acquire(self, caller: Caller) -> dict[str, str]:
        """Count one chat."""
        return {} if self._rate is None else await self._take(self._rate, caller, 1)

    async def _take(self, rate: RateLimit, caller: Caller, count: int) -> dict[str, str]:
        try:
            used, milliseconds = await self._commands.demand(
                *RATE([self._keys.rate(caller.id)], count, rate.count, rate.seconds * 1000)
            )
        except StoreUnavailable as error:
            self._fallback.allow(error)
            if count:
                return await self._local.acquire(caller)
            await self._local.check(caller)
            return {}
        left, wait = rate.count - used, math.ceil(milliseconds / 1000)
        headers = rate_limit_headers(rate, max(0, left - count), wait)
        if left <= 0:
            raise RateLimited(retry_after=wait, headers=headers)
        return headers


class RedisConcurrency(Concurrency):
    """The same bounds, MAX_STREAMS_PER_CLIENT over all replicas.

    Each replica tells how many a caller has there, as an absolute number: nothing is counted down that could be lost.
    """

    def __init__(self, settings: Settings, commands: Commands, keys: Keys, fallback: Fallback) -> None:
        super().__init__(settings)
        self._commands = commands
        self._keys = keys
        self._fallback = fallback
        self._untold: set[str] = set()  # callers whose number has changed
        commands.on_connect.append(self._connected)

    async def reserve(self, caller: Caller) -> Lease:
        """A lease for one answer."""
        lease = await super().reserve(caller)
        if self._limit_per_caller is None:
            return lease
        shared = _SharedLease(lease, self, caller.id)
        try:
            allowed = await self._commands.demand(
                *RESERVE(
                    [self._keys.running(caller.id)],
                    *(self._keys.prefix, self._keys.owner, self._running[caller.id]),
                    *(self._limit_per_caller, COUNT_TTL * 1000),
                )
            )
        except StoreUnavailable as error:
            try:
                self._fallback.allow(error)
            except StoreUnavailable:
                shared.settle(StreamSummary(""))
                raise
            return shared
        except BaseException:
            shared.settle(StreamSummary(""))
            raise
        if not allowed:
            shared.settle(StreamSummary(""))
            raise RateLimited
        return shared

    def tell(self, caller: str) -> None:
        """Its number has changed."""
        self._untold.add(caller)
        if self._commands.available:
            self._commands.send(*self._news())

    def sweep(self) -> None:
        """Renew what is told."""
        self._untold.update(self._running.keys())
        if self._untold and self._limit_per_caller is not None:
            self._commands.send(*self._news())

    def _news(self) -> list[Command]:
        callers, self._untold = self._untold, set()
        commands: list[Command] = []
        for caller in callers:
            key = self._keys.running(caller)
            if count := self._running[caller]:
                commands += [("HSET", key, self._keys.owner, count), ("EXPIRE", key, COUNT_TTL)]
            else:
                commands.append(("HDEL", key, self._keys.owner))
        return commands

    def _connected(self, _: bool) -> None:
        self.sweep()


class _SharedLease:
    def __init__(self, lease: Lease, concurrency: RedisConcurrency, caller: str) -> None:
        self._lease = lease
        self._concurrency = concurrency
        self._caller = caller

    def settle(self, summary: StreamSummary) -> None:
        self._lease.settle(summary)
        self._concurrency.tell(self._caller)
