"""This replica among the others: its two connections, its lease, and what it looks after every second."""

import logging
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Protocol
from weakref import WeakValueDictionary

import anyio
from redis.exceptions import RedisError

from chatproxy.config import Settings
from chatproxy.config.timing import Timing
from chatproxy.errors import StoreUnavailable
from chatproxy.services.redis.commands import Commands
from chatproxy.services.redis.copies import RedisStore
from chatproxy.services.redis.directory import RedisDirectory
from chatproxy.services.redis.ledger import RedisLedger
from chatproxy.services.redis.limits import Fallback, RedisConcurrency, RedisRateLimiter
from chatproxy.services.redis.mirrors import Mirrors, Remotes
from chatproxy.services.redis.scripts import RETRY_AFTER, Keys
from chatproxy.services.redis.subscriptions import Subscriptions
from chatproxy.services.store import MemoryStore
from chatproxy.services.streams import StreamRegistry

log = logging.getLogger(__name__)

# Seconds.
FLUSH_TIMEOUT = 1.0  # for the last frames, when this replica stops
COUNTS_SWEEP = 20  # sweeps between two renewals of how much callers have running


class Upstream(Protocol):
    """What the replicas share of Grok: until when it refuses."""

    def wait_until_over(self, seconds: float) -> None: ...


class Replicas:
    """All that takes the place of what a single process keeps in its memory."""

    def __init__(self, settings: Settings, timing: Timing) -> None:
        assert settings.redis_url is not None
        # A name of this start: what a replica was before it was started anew is another one's, and dead.
        self._keys = Keys(settings, secrets.token_urlsafe(12))
        self._timing = timing
        self.commands = Commands(settings.redis_url, timing.lease, self._keys.loss_marker)
        self._subscriptions = Subscriptions(settings.redis_url, 3 * timing.sweep_interval)
        remotes: Remotes = WeakValueDictionary()
        memory = MemoryStore(settings.replay_bytes, settings.replay_total_bytes)
        self._mirrors = Mirrors(memory, self.commands, self._subscriptions, self._keys, settings, timing, remotes)
        self.store = RedisStore(memory, self.commands, self._mirrors, self._keys, settings)
        self.directory = RedisDirectory(self.commands, self.store, self._keys, settings, remotes, timing)
        fallback = Fallback(settings, self.commands)
        self.rate_limiter = RedisRateLimiter(settings, self.commands, self._keys, fallback)
        self.ledger = RedisLedger(settings, timing, self.commands, self._keys, fallback)
        self.concurrency = RedisConcurrency(settings, self.commands, self._keys, fallback)

    @asynccontextmanager
    async def running(self, streams: StreamRegistry, upstream: Upstream) -> AsyncIterator[None]:
        """Inside it, this replica is one of them. Leaving it writes what is not yet copied, and says goodbye."""
        self._streams, self._upstream = streams, upstream
        self._due = anyio.Event()
        self.store.on_disowned = streams.disown
        self.commands.on_connect.append(self._connected)
        self._subscriptions.subscribe(self._keys.own_lease, self._told)
        self._subscriptions.subscribe(self._keys.retry_after, self._told_to_wait)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self.commands.run)
            tasks.start_soon(self._subscriptions.run)
            tasks.start_soon(self.store.run)
            tasks.start_soon(self.ledger.run)
            tasks.start_soon(self._sweep_for_ever)
            try:
                yield
            finally:
                with anyio.move_on_after(FLUSH_TIMEOUT, shield=True), suppress(StoreUnavailable):
                    await self.store.flush()
                    await self.ledger.flush()
                    await self.commands.execute(("DEL", self._keys.own_lease))
                await self._mirrors.aclose()
                await self.directory.aclose()
                tasks.cancel_scope.cancel()

    def remember_rate_limit(self, seconds: float) -> None:
        """Grok has told to wait for so long: the others need not ask."""
        milliseconds = max(1, int(seconds * 1000))
        self.commands.send(
            RETRY_AFTER([self._keys.retry_after], milliseconds), ("PUBLISH", self._keys.retry_after, milliseconds)
        )

    def _connected(self, _: bool) -> None:
        self._due.set()  # a lease may have run out meanwhile

    def _told(self, message: bytes | None) -> None:
        what, _, id = (message or b"").decode(errors="replace").partition(" ")
        if what == "stop":
            self._streams.stop_own(id)
        elif what == "left":
            self._streams.note_left(id)

    def _told_to_wait(self, message: bytes | None) -> None:
        if message is not None and message.isdigit():
            self._upstream.wait_until_over(int(message) / 1000)

    async def _sweep_for_ever(self) -> None:
        number = 0
        while True:
            with anyio.move_on_after(self._timing.sweep_interval):
                await self._due.wait()
            self._due = anyio.Event()
            with suppress(StoreUnavailable):
                await self._sweep()
                self.store.sweep()
                self.ledger.sweep()
                if not number % COUNTS_SWEEP:
                    self.concurrency.sweep()
                number += 1

    async def _sweep(self) -> None:
        keys, running = self._keys, self.store.running()
        flags = [("MGET", *map(keys.stop, running))] if running else []
        lease, _, wait, *replies = await self.commands.execute(
            ("SET", keys.own_lease, "1", "PX", int(self._timing.lease * 1000)),
            # The other connection takes silence for its loss.
            ("PUBLISH", keys.own_lease, "alive"),
            ("PTTL", keys.retry_after),
            *flags,
        )
        if isinstance(lease, RedisError):
            log.warning("redis has no room: answers that other replicas read may end with replay_lost")
        if isinstance(wait, int) and wait > 0:
            self._upstream.wait_until_over(wait / 1000)
        for flag, id in zip(replies[0] if flags else (), running, strict=bool(flags)):
            if flag is not None:
                self._streams.stop_own(id)
