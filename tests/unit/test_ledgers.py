"""Which accounts of callers are kept: all that matter, and no more than so many."""

import pytest

from chatproxy.config import RateLimit, Settings
from chatproxy.errors import BudgetSpent
from chatproxy.services.budgets import MemoryLedger

pytestmark = pytest.mark.anyio


class _Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


async def test_forgotten_callers() -> None:
    """A flood of callers makes the oldest be forgotten, except one whose answer is running; it holds up nobody else."""
    clock = _Clock()
    ledger = MemoryLedger(Settings(token_budget_per_client=RateLimit(100, 3600)), max_callers=3, clock=clock)
    await ledger.reserve("running", 60)
    for name in ("a", "b", "c", "d", "e"):
        await ledger.reserve(name, 60)
        ledger.change(name, reserved=-60, used=100)
    for name in ("running", "d", "e"):
        with pytest.raises(BudgetSpent):
            await ledger.reserve(name, 60)
    for name in ("a", "b"):
        assert await ledger.reserve(name, 60) is not None
    clock.now = 3600.0  # a new window: what is still reserved is reserved in it
    for name in ("d", "running"):
        balance = await ledger.reserve(name, 40)
        assert balance is not None
        assert balance.left == (60 if name == "d" else 0)
