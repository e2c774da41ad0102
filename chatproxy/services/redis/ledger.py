"""What callers have spent, written down for all replicas together. The rules are those of `budgets`."""

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import Iterable

from redis.exceptions import RedisError

from chatproxy.config import RateLimit, Settings
from chatproxy.config.timing import Timing
from chatproxy.errors import StoreUnavailable
from chatproxy.services.budgets import Balance, MemoryLedger, balance, require
from chatproxy.services.redis.commands import Commands
from chatproxy.services.redis.limits import Fallback
from chatproxy.services.redis.scripts import BOOK, RESERVE_TOKENS, Keys

# Milliseconds that what a replica has reserved is kept without being told again.
RESERVED_TTL = 86_400_000

# The name of the budget for all callers, among those of callers.
ALL = ""


class RedisLedger:
    """A Ledger for all replicas. `run` it in a task.

    Each replica tells how much it has reserved, as an absolute number, and what was used, in numbered bookings: a
    booking whose reply was lost is sent again with its number, and counts once.
    """

    def __init__(self, settings: Settings, timing: Timing, commands: Commands, keys: Keys, fallback: Fallback) -> None:
        self._common, self._own = settings.token_budget, settings.token_budget_per_client
        self._lease = timing.lease
        self._commands = commands
        self._keys = keys
        self._fallback = fallback
        self._local = MemoryLedger(settings)
        self._reserved: Counter[str] = Counter()  # by this replica; by caller
        self._used: Counter[str] = Counter()  # and not told yet
        self._changed: set[str] = set()
        self._telling: dict[str, tuple[int, int]] = {}  # by caller: the number of the booking, and tokens
        self._numbers = itertools.count(1)
        self._total = 0, 0
        self._total_until = 0.0  # when that window ends; on the monotonic clock
        self._wake = asyncio.Event()
        self._flushing = asyncio.Lock()
        commands.on_connect.append(self._connected)

    async def reserve(self, caller: str, tokens: int) -> Balance | None:
        """Reserve tokens for one answer."""
        budgets = self._budgets(caller)
        for name, _ in budgets:
            self._reserved[name] += tokens
        try:
            found = await self._reserve(budgets, tokens)
        except StoreUnavailable as error:
            try:
                self._fallback.allow(error)
                return await self._local.reserve(caller, tokens)
            except BaseException:
                self._count(budgets, -tokens, 0)
                raise
        except BaseException:  # refused, or nobody knows
            self._count(budgets, -tokens, 0)
            raise
        self._local.change(caller, reserved=tokens, used=0)
        return found

    async def _reserve(self, budgets: list[tuple[str, RateLimit]], tokens: int) -> Balance | None:
        # Of a server that was just started, or reached, replicas may not have renewed their leases yet.
        settled = asyncio.get_running_loop().time() - self._commands.connected_at > self._lease
        arguments: list[object] = []
        for name, budget in budgets:
            arguments += [budget.count, budget.seconds * 1000, self._reserved[name]]
        reply = await self._commands.demand(
            *RESERVE_TOKENS(
                [key for name, _ in budgets for key in self._keys_of(name)],
                *(self._keys.prefix, self._keys.owner, tokens, RESERVED_TTL),
                *(int(self._lease * 1000), int(settled), *arguments),
            )
        )
        for (name, budget), (used, reserved, milliseconds) in zip(budgets, reply, strict=True):
            if name == ALL:
                self._note_total(used, reserved, milliseconds)
            require(budget, used, reserved, milliseconds / 1000, tokens, name != ALL)
        if self._common is not None:
            used, reserved, milliseconds = reply[0]
            self._note_total(used, reserved + tokens, milliseconds)
        if self._own is None:
            return None
        used, reserved, milliseconds = reply[-1]
        return balance(self._own, used + reserved + tokens, milliseconds / 1000)

    def change(self, caller: str, *, reserved: int, used: int) -> None:
        """Settle, or reserve more: told to Redis in the background."""
        self._local.change(caller, reserved=reserved, used=used)
        self._count(self._budgets(caller), reserved, used)

    def _count(self, budgets: list[tuple[str, RateLimit]], reserved: int, used: int) -> None:
        for name, _ in budgets:
            self._reserved[name] += reserved
            self._used[name] += used
            self._changed.add(name)
        self._wake.set()

    def total(self) -> tuple[int, int]:
        """As last heard from Redis."""
        used, reserved = self._total
        return used if time.monotonic() < self._total_until else 0, reserved

    def _note_total(self, used: int, reserved: int, milliseconds: int) -> None:
        self._total, self._total_until = (used, reserved), time.monotonic() + milliseconds / 1000

    def _budgets(self, caller: str) -> list[tuple[str, RateLimit]]:
        return [(name, budget) for name, budget in ((ALL, self._common), (caller, self._own)) if budget is not None]

    def _keys_of(self, name: str) -> Iterable[str]:
        return self._keys.used(name), self._keys.reserved(name)

    def _connected(self, _: bool) -> None:
        self._changed.update(name for name, tokens in self._reserved.items() if tokens)
        self._wake.set()

    def sweep(self) -> None:
        """Try again what was refused."""
        if self._telling:
            self._wake.set()

    async def run(self) -> None:
        """Tell Redis what has changed, as long as it is there."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            await self.flush()

    async def flush(self) -> None:
        """Tell all there is now. What could not be told is kept for later."""
        async with self._flushing:
            await self._flush()

    async def _flush(self) -> None:
        while self._commands.available and (self._telling or self._changed):
            for name in self._changed - self._telling.keys():
                self._changed.discard(name)
                self._telling[name] = next(self._numbers), self._used.pop(name, 0)
            told = list(self._telling)
            try:
                replies = await self._commands.execute(*map(self._booking, told))
            except StoreUnavailable:
                return
            refused = False
            for name, reply in zip(told, replies, strict=True):
                if isinstance(reply, RedisError):  # its memory is full, or the key is not ours
                    refused = True
                    continue
                del self._telling[name]
                if name == ALL:
                    self._note_total(*reply)
                if not self._reserved[name]:
                    del self._reserved[name]
            if refused:
                return

    def _booking(self, name: str) -> tuple[object, ...]:
        number, tokens = self._telling[name]
        budget = self._common if name == ALL else self._own
        assert budget is not None
        return BOOK(
            list(self._keys_of(name)),
            *(self._keys.owner, number, tokens, self._reserved[name], budget.seconds * 1000, RESERVED_TTL),
        )
