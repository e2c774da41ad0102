"""Connections to Grok that are made before they are needed."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest

from chatproxy.services.grok.spares import Spares
from tests.conftest import InProcessService, Service, serving
from tests.upstream import HANG, Gate, Upstream, stream

pytestmark = [pytest.mark.anyio, pytest.mark.own_transport]


async def connections(service: Service) -> tuple[int, int, int]:
    """Busy ones, those that are ready (idle and spare ones), and how many requests have waited for a handshake."""
    lines = (await service.client.get("/metrics")).text.splitlines()
    values = {name: int(float(value)) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}
    busy, *ready = (values[f'chatproxy_upstream_connections{{state="{state}"}}'] for state in ("busy", "idle", "spare"))
    return busy, sum(ready), values["chatproxy_handshakes_waited_total"]


async def become(service: Service, busy: int, ready: int) -> None:
    """Wait until so many are busy, and at least so many ready, and see that it stays so."""
    for _ in range(2):
        async with asyncio.timeout(5):
            while not ((found := await connections(service))[0] == busy and found[1] >= ready):  # noqa: ASYNC110 -- nobody tells when
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)


@asynccontextmanager
async def checked(grok: Upstream, **changes: object) -> AsyncIterator[InProcessService]:
    """A service that has checked its key, and kept the connection."""
    async with serving(grok.url, **changes) as service:
        await become(service, 0, 1)
        yield service


async def test_burst(grok: Upstream) -> None:
    """After one chat, two at once find connections, and wait for no handshake; then there are two more."""
    grok.set_scripts(stream("a"))
    gate = Gate()
    async with checked(grok) as service:
        assert (await service.ask()).status_code == 200
        await become(service, 0, 2)
        waited = (await connections(service))[2]
        grok.set_scripts(stream("a", gate))
        asking = [asyncio.create_task(service.ask()) for _ in range(2)]
        await grok.call(1)
        await become(service, 2, 2)
        assert (await connections(service))[2] == waited
        gate.open()
        for each in asking:
            assert (await each).status_code == 200
        await become(service, 0, 2)


async def test_none_before_the_first_chat(grok: Upstream) -> None:
    """Nothing but the check of the key connects before somebody has had an answer."""
    async with Upstream() as grok, serving(grok.url) as service:
        await grok.until(lambda: len(grok.probes) == 1)
        await asyncio.sleep(0.1)
        assert grok.connections == 1
        await become(service, 0, 1)
        await service.ask()
        await grok.until(lambda: grok.connections >= 2)


@pytest.mark.parametrize(
    "changes", [{"grok_spare": 0}, {"grok_transport": "httpx"}, {"grok_api_key": None}], ids=["0", "httpx", "demo"]
)
async def test_no_spares(changes: dict[str, object]) -> None:
    """None where none are wanted, with httpx's transport, and in the demo."""
    async with Upstream() as grok, serving(grok.url, **changes) as service:
        for _ in range(2):
            assert (await service.ask()).status_code == 200
        await asyncio.sleep(0.1)
        text = (await service.client.get("/metrics")).text
        assert grok.connections <= 2  # the check of the key may have one of its own
        assert 'state="spare"} 0' in text or 'state="spare"' not in text


async def test_replaced(grok: Upstream) -> None:
    """Connections that the server has closed are replaced once it has answered again."""
    async with Upstream(stream("a")) as grok, checked(grok) as service:
        await service.ask()
        await become(service, 0, 2)
        for connection in list(grok._connections):
            connection._transport.close()
        assert (await service.ask()).status_code == 200
        await become(service, 0, 2)


async def test_all_closed_at_the_end(grok: Upstream) -> None:
    """The end of the service closes those that are spare, and the one that is just being made."""
    async with Upstream(stream("a")) as grok:
        async with serving(grok.url, grok_spare=20) as service:
            await service.ask()
        await grok.until(lambda: grok.open == 0)
        count = grok.connections
        await asyncio.sleep(0.1)
        assert grok.connections == count


async def test_busy_ones_do_not_count(grok: Upstream) -> None:
    """However many answers are running, so many are spare, and no more."""
    grok.set_scripts(stream("a", HANG))
    async with checked(grok, grok_spare=3) as service:
        tasks = [asyncio.create_task(service.ask()) for _ in range(10)]
        await become(service, 10, 3)
        assert (await connections(service))[1] == 3
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await become(service, 0, 3)


# Without a network.


class Away:
    """Makes connections, or does not; counts the tries."""

    def __init__(self) -> None:
        self.tries: list[float] = []
        self.made = 0
        self.fails = True

    async def make(self) -> None:
        self.tries.append(time.monotonic())
        if self.fails:
            raise httpx.ConnectError("away")
        self.made += 1


@asynccontextmanager
async def spares(away: Away) -> AsyncIterator[Spares]:
    found = Spares(2, away.make, lambda: away.made)
    try:
        yield found
    finally:
        found.close()


async def test_away_for_spares() -> None:
    """A server that is away is asked less and less often, and at once again when a request was answered."""
    away = Away()
    async with spares(away) as made:
        made.want()
        await asyncio.sleep(1.5)
        for _ in range(100):
            made.fill()  # as each request does
        assert len(away.tries) == 2  # at once, and after a second; the next one would come two seconds later
        away.fails = False
        made.want()
        async with asyncio.timeout(1):
            while away.made < 2:  # noqa: ASYNC110 -- nobody tells when
                await asyncio.sleep(0.01)


async def test_spares_that_are_closed_at_once() -> None:
    """A server that closes what nobody uses is not asked again and again."""
    away = Away()
    away.fails = False
    async with spares(away) as made:
        made.want()
        await asyncio.sleep(0.05)
        assert away.made == 2
        for _ in range(10):
            away.made -= 1
            made.lost(0.01)
            await asyncio.sleep(0.02)
        assert len(away.tries) == 2
        away.made = 1
        made.lost(300.0)  # an old one
        assert len(away.tries) == 2


async def test_closed_spares() -> None:
    """After the end none are made."""
    away = Away()
    async with spares(away) as made:
        made.want()
    made.want()
    await asyncio.sleep(0.05)
    assert away.tries == []
