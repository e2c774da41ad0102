"""What callers have spent, written down for all replicas together. The rules are those of `budgets`."""

import asyncio
import itertools
from collections import Counter
from collections.abc import Iterable

from redis.exceptions import RedisError

from chatproxy.config import RateLimit, Settings
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

    def __init__(self, settings: Settings, commands: Commands, keys: Keys, fallback: Fallback) -> None:
        self._common, self._own = settings.token_budget, settings.token_budget_per_client
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
        self._wake = asyncio.Event()
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
        arguments: list[object] = []
        for name, budget in budgets:
            arguments += [budget.count, budget.seconds * 1000, self._reserved[name]]
        reply = await self._commands.demand(
            *RESERVE_TOKENS(
                [key for name, _ in budgets for key in self._keys_of(name)],
                *(self._keys.prefix, self._keys.owner, tokens, RESERVED_TTL, *arguments),
            )
        )
        own: Balance | None = None
        for (name, budget), (used, reserved, milliseconds) in zip(budgets, reply, strict=True):
            if name == ALL:
                self._total = used, reserved
            require(budget, used, reserved, milliseconds / 1000, tokens, name != ALL)
            if name != ALL:
                own = balance(budget, used + reserved + tokens, milliseconds / 1000)
        return own

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
        return self._total

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
        while self._commands.available and (self._telling or self._changed):
            if not self._telling:
                self._telling = {name: (next(self._numbers), self._used.pop(name, 0)) for name in self._changed}
                self._changed.clear()
            names = list(self._telling)
            try:
                replies = await self._commands.execute(*map(self._booking, names))
            except StoreUnavailable:
                return
            for name, reply in zip(names, replies, strict=True):
                if isinstance(reply, RedisError):  # its memory is full
                    return
                if name == ALL:
                    self._total = reply[0], reply[1]
                if not self._reserved[name]:
                    del self._reserved[name]
            self._telling = {}

    def _booking(self, name: str) -> tuple[object, ...]:
        number, tokens = self._telling[name]
        budget = self._common if name == ALL else self._own
        assert budget is not None
        return BOOK(
            list(self._keys_of(name)),
            *(self._keys.owner, number, tokens, self._reserved[name], budget.seconds * 1000, RESERVED_TTL),
        )
