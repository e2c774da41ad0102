"""The composition root: settings become an ASGI application. Does not know the environment, nor what a chat is."""

import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import anyio
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware

from chatproxy.config import Settings
from chatproxy.config.timing import DEFAULT_TIMING, Timing
from chatproxy.lifecycle import Lifecycle
from chatproxy.metrics import Metrics
from chatproxy.middleware import HostMiddleware, OriginMiddleware, RequestLogMiddleware
from chatproxy.routes import handle_http_exception, routes
from chatproxy.routes.state import AppState
from chatproxy.services.grok.client import Grok
from chatproxy.services.grok.demo import demo
from chatproxy.services.limits import BodyMemory, Concurrency, MemoryRateLimiter, ReaderLimit
from chatproxy.services.store import MemoryStore
from chatproxy.services.streams import StreamRegistry

log = logging.getLogger(__name__)


def create_app(settings: Settings, timing: Timing = DEFAULT_TIMING) -> Starlette:
    """The service as an ASGI application. What it holds open lives as long as its lifespan.

    `app.state.lifecycle` lets a server drain it.
    """
    metrics = Metrics()
    lifecycle = Lifecycle()

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[AppState]:
        if settings.grok_api_key is None:
            log.warning("GROK_API_KEY is not set: answers come from the built-in demo, not from Grok")
        for warning in settings.warnings:
            log.warning("%s", warning)
        async with AsyncExitStack() as stack:
            base_url = settings.grok_base_url
            if settings.grok_api_key is None:
                base_url = await stack.enter_async_context(demo())
            grok = Grok(settings, base_url, metrics, timing)
            stack.push_async_callback(grok.aclose)
            metrics.streams_in_flight.set_function(lambda: len(grok.running))
            lifecycle.completions = grok.running
            store = MemoryStore(settings.replay_bytes, settings.replay_total_bytes)
            streams = StreamRegistry(store, settings, ReaderLimit(settings), metrics)
            stack.push_async_callback(streams.aclose)
            tasks = await stack.enter_async_context(anyio.create_task_group())
            tasks.start_soon(grok.watch_key)
            yield {
                "settings": settings,
                "timing": timing,
                "metrics": metrics,
                "lifecycle": lifecycle,
                "grok": grok,
                "streams": streams,
                "rate_limiter": MemoryRateLimiter(settings.rate_limit),
                "concurrency": Concurrency(settings),
                "body_memory": BodyMemory(settings),
            }
            tasks.cancel_scope.cancel()

    app = Starlette(
        routes=routes(settings),
        lifespan=lifespan,
        middleware=[
            Middleware(RequestLogMiddleware, metrics, lifecycle),
            Middleware(OriginMiddleware, settings),  # before the next, so that a page can read its refusal
            Middleware(HostMiddleware, settings),
        ],
        exception_handlers={HTTPException: handle_http_exception},
    )
    app.router.redirect_slashes = False  # it would redirect to whatever host the Host header names
    app.state.lifecycle = lifecycle
    return app
