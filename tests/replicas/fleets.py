"""Several services that are one, in this loop, with a Redis of their own."""

import asyncio
import secrets
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager

import httpx

from chatproxy.config.timing import Timing
from tests.conftest import TIMEOUT, InProcessService, LiveStream, Service, seen, serving
from tests.redis_servers import RedisServer
from tests.upstream import Upstream

BRISK = Timing(lease=1.2, sweep_interval=0.2, store_outage=1.5)
"""For what would otherwise take ten seconds."""

JSON = {"Accept": "application/json"}


@asynccontextmanager
async def fleet(
    grok: Upstream, redis: RedisServer, count: int = 2, timing: Timing = BRISK, /, **changes: object
) -> AsyncIterator[list[InProcessService]]:
    """So many replicas, each of which has seen its Redis."""
    shared = {"redis_url": redis.url, "redis_prefix": f"test:{secrets.token_hex(4)}:", **changes}
    async with AsyncExitStack() as stack:
        services = [await stack.enter_async_context(serving(grok.url, timing, **shared)) for _ in range(count)]
        await seen([service.port for service in services])
        yield services


async def start(service: Service, content: str = "Hi", **headers: str) -> str:
    """Start an answer, and give the address where it streams."""
    response = await service.ask(content, headers={**JSON, **{k.replace("_", "-"): v for k, v in headers.items()}})
    assert response.status_code == 201, response.text
    url: str = response.json()["url"]
    return url


def number_of(url: str) -> str:
    """The id in the address of a stream."""
    return url.split("/")[3]


@asynccontextmanager
async def follow(service: Service, url: str, after: str | None = None) -> AsyncIterator[LiveStream]:
    """Read an answer, event by event; leaving it drops the connection."""
    headers: Mapping[str, str] = {} if after is None else {"Last-Event-ID": after}
    async with service.client.stream("GET", url, headers=headers) as response:
        assert response.status_code == 200, await response.aread()
        yield LiveStream(response)


async def becomes(service: Service, path: str, text: str) -> httpx.Response:
    """Wait until this text is in what a GET gives."""
    async with asyncio.timeout(TIMEOUT):
        while True:
            response = await service.client.get(path)
            if text in response.text:
                return response
            await asyncio.sleep(0.02)  # nobody tells when it is so


async def until(client: httpx.AsyncClient, path: str, status: int) -> None:
    """Wait until a GET gives this status."""
    async with asyncio.timeout(TIMEOUT):
        while (await client.get(path)).status_code != status:  # noqa: ASYNC110 -- nobody tells when it is so
            await asyncio.sleep(0.02)
