"""A wait that somebody else ends."""

import asyncio
import gc
import weakref
from contextlib import suppress

import pytest

from chatproxy.cancellation import CancellableWait
from chatproxy.config import load
from chatproxy.errors import Stopped
from chatproxy.events import Chat, Message
from chatproxy.metrics import Metrics
from chatproxy.services.grok.client import Grok
from tests.conftest import TIMEOUT, environment
from tests.upstream import Upstream

pytestmark = pytest.mark.anyio


class Over(Exception):
    """What waits end with here."""


async def waiting(region: CancellableWait) -> "asyncio.Task[str]":
    """A task that waits in the region; it tells in the end what ended the wait, and how often it was cancelled."""

    async def wait() -> str:
        with pytest.raises(Over) as over, region:
            await asyncio.sleep(TIMEOUT)
        task = asyncio.current_task()
        assert task
        return f"{over.value}, and cancelled {task.cancelling()} times"

    task = asyncio.create_task(wait())
    await asyncio.sleep(0)
    return task


async def test_interrupted() -> None:
    """The wait ends with the error, the first one if there are more, and nobody was cancelled."""
    region = CancellableWait()
    task = await waiting(region)
    region.cancel_with(Over("first"))
    region.cancel_with(Over("second"))
    assert await task == "first, and cancelled 0 times"


async def test_interrupted_before() -> None:
    """An interrupt that finds nobody waiting is kept for whoever comes."""
    region = CancellableWait()
    with region:
        pass
    region.cancel_with(Over("early"))
    assert await (await waiting(region)) == "early, and cancelled 0 times"


async def test_interrupted_by_itself() -> None:
    """Whoever interrupts the region that it is in goes on to its end, and no further."""
    region = CancellableWait()
    with region:
        region.cancel_with(Over("own"))
        await asyncio.sleep(0)
    assert await (await waiting(region)) == "own, and cancelled 0 times"


async def test_error_leads_to_nothing_that_leads_back() -> None:
    """The error is gone as soon as it was handled, and all that its traceback holds with it."""

    async def give_up(wait: CancellableWait) -> None:
        with suppress(Over), wait:
            await asyncio.sleep(TIMEOUT)

    gc.collect()
    gc.disable()
    try:
        error = Over()
        gone = weakref.ref(error)
        wait = CancellableWait()
        task = asyncio.create_task(give_up(wait))
        await asyncio.sleep(0)
        wait.cancel_with(error)
        del error
        await task
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("first", ["cancel", "interrupt"])
async def test_cancelled(first: str) -> None:
    """A cancellation stays one, whether it came before an interrupt or after it."""
    region = CancellableWait()
    task = await waiting(region)
    if first == "cancel":
        task.cancel()
    region.cancel_with(Over())
    if first == "interrupt":
        task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_stopped_before_it_was_asked_for() -> None:
    """An answer of Grok's that was stopped by then is not asked for."""
    async with Upstream() as upstream:
        grok = Grok(load(environment(upstream.url)), upstream.url, Metrics())
        completion = grok.stream(Chat([Message("user", "Hi")]))
        completion.cancel_with(Stopped())
        with pytest.raises(Stopped):
            await completion.__aenter__()
        assert grok.running == set()
        await grok.aclose()
    assert upstream.calls == []
