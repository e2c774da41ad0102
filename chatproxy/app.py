"""The one place where the parts meet. Does not know the environment, nor what a chat is."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.exceptions import ExceptionMiddleware

from chatproxy.config import Settings
from chatproxy.limits import Limits
from chatproxy.metrics import Metrics
from chatproxy.middleware import Door
from chatproxy.routes import AppState, refuse, routes
from chatproxy.services.demo import demo
from chatproxy.services.grok import Grok
from chatproxy.services.streams import MemoryStore, Streams


def create_app(settings: Settings) -> Starlette:
    """The service as an ASGI application. What it holds open lives as long as its lifespan."""
    metrics = Metrics()

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[AppState]:
        async with AsyncExitStack() as stack:
            base_url = settings.grok_base_url
            if settings.grok_api_key is None:
                base_url = await stack.enter_async_context(demo())
            grok = Grok(settings, base_url, metrics)
            stack.push_async_callback(grok.aclose)
            metrics.streams_in_flight.set_function(lambda: len(grok.running))
            store = MemoryStore(settings.replay_bytes, settings.replay_total_bytes)
            streams = Streams(store, settings.resume_window, settings.replay_ttl, metrics)
            stack.push_async_callback(streams.aclose)
            stack.push_async_callback(_cancel, asyncio.create_task(grok.watch_key()))
            yield {
                "settings": settings,
                "metrics": metrics,
                "limits": Limits(settings.rate_limit),
                "grok": grok,
                "streams": streams,
                "draining": asyncio.Event(),
            }

    app = Starlette(routes=routes(settings.try_page), lifespan=lifespan)
    app.router.redirect_slashes = False  # it would redirect to whatever host the Host header names
    # Not by `middleware`: around that Starlette has a layer for errors, which the door lets none of through.
    app.middleware_stack = Door(ExceptionMiddleware(app.router, {HTTPException: refuse}), settings, metrics)
    return app


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
