"""How many tokens may be spent: estimated before an answer, booked after it. In memory, for one process.

Knows no HTTP server; the header fields are those of the IETF draft "RateLimit header fields for HTTP".
"""

import itertools
import math
import time
from collections.abc import Callable, Iterable
from typing import Protocol

import anyio
from msgspec import Struct

from chatproxy.config import RateLimit, Settings
from chatproxy.errors import BudgetSpent
from chatproxy.events import StreamSummary
from chatproxy.metrics import Metrics
from chatproxy.services.access import Caller
from chatproxy.services.estimates import Estimator
from chatproxy.services.limits import MAX_CALLERS

# Seconds between two looks at whether running answers have outgrown what is reserved for them.
RAISE_INTERVAL = 2.0

# Seconds to wait where all that is left is reserved for answers that are running.
RESERVED_RETRY_AFTER = 10


class Balance(Struct, frozen=True):
    """Of one budget: tokens left, and the seconds until there are all again."""

    left: int
    seconds: int


class Ledger(Protocol):
    """Where it is written down what is reserved and what is used."""

    async def reserve(self, caller: str, tokens: int) -> Balance | None:
        """Reserve tokens for one answer; gives what is left of the caller's own budget, if it has one.

        Raises BudgetSpent, and StoreUnavailable.
        """

    def change(self, caller: str, *, reserved: int, used: int) -> None:
        """Add to what is reserved, which may be negative, and to what is used."""

    def total(self) -> tuple[int, int]:
        """Of the budget for all callers: tokens used, and reserved."""


class _Account:
    __slots__ = ("reserved", "until", "used")

    def __init__(self, until: float) -> None:
        self.until = until
        self.used = 0
        self.reserved = 0


class MemoryLedger:
    """A Ledger in this process. A window begins with the first use; what is still reserved then goes over to it."""

    def __init__(
        self, settings: Settings, *, max_callers: int = MAX_CALLERS, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._common, self._own = settings.token_budget, settings.token_budget_per_client
        self._max_callers = max_callers
        self._clock = clock
        self._total = _Account(0)
        self._callers: dict[str, _Account] = {}  # the oldest window first

    async def reserve(self, caller: str, tokens: int) -> Balance | None:
        """Reserve tokens for one answer."""
        accounts = list(self._accounts(caller))
        for budget, account in accounts:
            require(budget, account.used, account.reserved, account.until - self._clock(), tokens, budget is self._own)
        for _, account in accounts:
            account.reserved += tokens
        if self._own is None:
            return None
        account = self._callers[caller]
        return balance(self._own, account.used + account.reserved, account.until - self._clock())

    def change(self, caller: str, *, reserved: int, used: int) -> None:
        """Settle, or reserve more."""
        for _, account in self._accounts(caller):
            account.reserved += reserved
            account.used += used

    def total(self) -> tuple[int, int]:
        """Of the budget for all callers."""
        return self._total.used if self._total.until > self._clock() else 0, self._total.reserved

    def _accounts(self, caller: str) -> Iterable[tuple[RateLimit, _Account]]:
        now = self._clock()
        if self._common is not None:
            if self._total.until <= now:
                self._total.used, self._total.until = 0, now + self._common.seconds
            yield self._common, self._total
        if self._own is not None:
            account = self._callers.get(caller)
            if account is None or account.until <= now:
                fresh = _Account(now + self._own.seconds)
                fresh.reserved = self._callers.pop(caller).reserved if account is not None else 0
                self._callers[caller] = account = fresh
                self._forget(now)
            yield self._own, account

    def _forget(self, now: float) -> None:
        excess = len(self._callers) - self._max_callers
        forgotten: list[str] = []
        for caller, account in itertools.islice(self._callers.items(), len(self._callers) - 1):  # never the newest
            if account.until > now and len(forgotten) >= excess:
                break
            if not account.reserved:  # else its answer is running, and will be booked
                forgotten.append(caller)
        for caller in forgotten:
            del self._callers[caller]


def require(budget: RateLimit, used: int, reserved: int, seconds: float, tokens: int, own: bool) -> None:
    """Raises BudgetSpent, unless something is left, and enough; but one answer may run for whatever it costs."""
    if used < budget.count and (used + reserved + tokens <= budget.count or not reserved):
        return
    wait, why = RESERVED_RETRY_AFTER, "reserved for answers that are running"
    if used >= budget.count:
        wait, why = max(1, math.ceil(seconds)), "used up for now"
    if not own:  # whose total is nobody else's business
        raise BudgetSpent(f"The tokens of this service are {why}. Wait for Retry-After seconds.", retry_after=wait)
    raise BudgetSpent(
        f"Your tokens are {why}. Wait for Retry-After seconds.",
        retry_after=wait,
        headers=budget_headers(budget, balance(budget, used + reserved, seconds)),
    )


def balance(budget: RateLimit, spent: int, seconds: float) -> Balance:
    """What is left of a budget."""
    return Balance(max(0, budget.count - spent), max(1, math.ceil(seconds)))


def budget_headers(budget: RateLimit, balance: Balance) -> dict[str, str]:
    """The same as header fields. (The draft registers no unit for tokens; the word is ours.)"""
    return {
        "RateLimit-Policy": f'"tokens";q={budget.count};w={budget.seconds};qu="tokens"',
        "RateLimit": f'"tokens";r={balance.left};t={balance.seconds}',
    }


class Reservation:
    """What is reserved for one answer; settled when its summary is closed. `headers` tell what is left."""

    __slots__ = ("_budgets", "_caller", "_request_size", "_summary", "_tokens", "headers")

    def __init__(self, budgets: "TokenBudgets", caller: str, request_size: int, summary: StreamSummary) -> None:
        self.headers: dict[str, str] = {}
        self._budgets = budgets
        self._caller = caller
        self._request_size = request_size
        self._summary = summary
        self._tokens = budgets.estimator.before(request_size)

    async def enter(self) -> Balance | None:
        balance = await self._budgets.ledger.reserve(self._caller, self._tokens)
        self._budgets.running.add(self)
        self._summary.on_end.append(self._settle)
        return balance

    def cancel(self) -> None:
        """Give all back: the answer does not begin."""
        self._summary.on_end.remove(self._settle)
        self._budgets.running.discard(self)
        self._budgets.ledger.change(self._caller, reserved=-self._tokens, used=0)

    def _settle(self, summary: StreamSummary) -> None:
        self._budgets.running.discard(self)
        tokens, estimated = self._budgets.estimator.after(self._request_size, self._tokens, summary)
        if estimated:
            self._budgets.metrics.budget_estimated.inc()
        self._budgets.ledger.change(self._caller, reserved=-self._tokens, used=tokens)

    def raise_(self) -> None:
        asked = self._summary.asked_at is not None
        tokens = self._budgets.estimator.so_far(self._request_size, 0, self._summary) if asked else 0
        if (more := tokens - self._tokens) > 0:
            self._tokens = tokens
            self._budgets.ledger.change(self._caller, reserved=more, used=0)


class TokenBudgets:
    """TOKEN_BUDGET and TOKEN_BUDGET_PER_CLIENT: each answer reserves before Grok is asked, and settles at its end."""

    def __init__(self, settings: Settings, ledger: Ledger, metrics: Metrics) -> None:
        self.estimator = Estimator()
        self.ledger = ledger
        self.metrics = metrics
        self.running: set[Reservation] = set()
        self._own = settings.token_budget_per_client
        self.limited = settings.token_budget is not None or self._own is not None
        if settings.token_budget is not None:
            metrics.watch_budget(settings.token_budget.count, ledger.total)

    async def reserve(self, caller: Caller, request_size: int, summary: StreamSummary) -> Reservation | None:
        """Reserve what an answer may cost, for a request of so many bytes; None where there are no budgets.

        Raises BudgetSpent and StoreUnavailable.
        """
        if not self.limited:
            return None
        reservation = Reservation(self, caller.id, request_size, summary)
        balance = await reservation.enter()
        if self._own is not None and balance is not None:
            reservation.headers = budget_headers(self._own, balance)
        return reservation

    async def watch(self) -> None:
        """Reserve more for answers that have outgrown their estimate, until cancelled."""
        while self.limited:
            await anyio.sleep(RAISE_INTERVAL)
            for reservation in self.running:
                reservation.raise_()


def joined(*fields: dict[str, str]) -> dict[str, str]:
    """Header fields of several policies: each field is a list."""
    names = dict.fromkeys(name for some in fields for name in some)
    return {name: ", ".join(some[name] for some in fields if name in some) for name in names}
