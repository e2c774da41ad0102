"""The composition root: settings become an ASGI application. Does not know the environment, nor what a chat is."""

import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import NamedTuple

import anyio
from anyio.abc import TaskGroup
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from chatproxy.config import Settings
from chatproxy.config.timing import DEFAULT_TIMING, Timing
from chatproxy.lifecycle import Lifecycle
from chatproxy.metrics import Metrics
from chatproxy.middleware import HostMiddleware, OriginMiddleware, RequestLogMiddleware
from chatproxy.routes import handle_http_exception, routes
from chatproxy.routes.state import AppState
from chatproxy.services.access import Authenticator
from chatproxy.services.budgets import Ledger, MemoryLedger, TokenBudgets
from chatproxy.services.grok.client import Grok
from chatproxy.services.grok.demo import demo
from chatproxy.services.limits import BodyMemory, Concurrency, MemoryRateLimiter, RateLimiter, ReaderLimit
from chatproxy.services.store import MemoryStore, StoreState
from chatproxy.services.streams import StreamRegistry

log = logging.getLogger(__name__)


class Shared(NamedTuple):
    """What replicas have in common; and what a single process has in its memory instead."""

    streams: StreamRegistry
    rate_limiter: RateLimiter
    concurrency: Concurrency
    ledger: Ledger
    store_state: StoreState


@asynccontextmanager
async def _shared(settings: Settings, metrics: Metrics, grok: Grok, timing: Timing) -> AsyncIterator[Shared]:
    readers = ReaderLimit(settings)
    if settings.redis_url is None:
        store = MemoryStore(settings.replay_bytes, settings.replay_total_bytes)
        streams = StreamRegistry(store, settings, readers, metrics)
        rate_limiter, concurrency = MemoryRateLimiter(settings.rate_limit), Concurrency(settings)
        yield Shared(streams, rate_limiter, concurrency, MemoryLedger(settings), store)
        return
    from chatproxy.services.redis.replicas import Replicas  # noqa: PLC0415 -- slow, and of no use to others

    replicas = Replicas(settings, timing)
    metrics.watch_store(lambda: replicas.commands.available)
    grok.on_rate_limited = replicas.remember_rate_limit
    streams = StreamRegistry(replicas.store, settings, readers, metrics, replicas.directory)
    async with replicas.running(streams, grok):
        yield Shared(streams, replicas.rate_limiter, replicas.concurrency, replicas.ledger, replicas.commands)


def _authenticator(settings: Settings, timing: Timing, tasks: TaskGroup) -> Authenticator:
    if settings.auth_jwks_url is None and settings.auth_jwt_secret is None:
        return Authenticator(settings)
    from chatproxy.services.identity.jwks import JWKS  # noqa: PLC0415 -- slow, and of no use to others
    from chatproxy.services.identity.tokens import JWTVerifier, SharedSecret  # noqa: PLC0415 -- the same

    if settings.auth_jwt_secret is not None:
        return Authenticator(settings, JWTVerifier(settings, SharedSecret(settings.auth_jwt_secret)))
    keys = JWKS(settings, timing)
    tasks.start_soon(keys.run)
    return Authenticator(settings, JWTVerifier(settings, keys))


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
            shared = await stack.enter_async_context(_shared(settings, metrics, grok, timing))
            stack.push_async_callback(shared.streams.aclose)
            tasks = await stack.enter_async_context(anyio.create_task_group())
            tasks.start_soon(grok.watch_key)
            budgets = TokenBudgets(settings, shared.ledger, metrics)
            tasks.start_soon(budgets.watch)
            yield {
                "settings": settings,
                "timing": timing,
                "metrics": metrics,
                "lifecycle": lifecycle,
                "authenticator": _authenticator(settings, timing, tasks),
                "grok": grok,
                "streams": shared.streams,
                "rate_limiter": shared.rate_limiter,
                "concurrency": shared.concurrency,
                "budgets": budgets,
                "store_state": shared.store_state,
                "body_memory": BodyMemory(settings),
            }
            tasks.cancel_scope.cancel()

    app = Starlette(
        routes=routes(settings),
        lifespan=lifespan,
        middleware=[
            Middleware(RequestLogMiddleware, metrics, lifecycle),
            Middleware(ProxyHeadersMiddleware, settings.forwarded_allow_ips),  # after the peer was noted
            Middleware(OriginMiddleware, settings),  # before the next, so that a page can read its refusal
            Middleware(HostMiddleware, settings),
        ],
        exception_handlers={HTTPException: handle_http_exception},
    )
    app.router.redirect_slashes = False  # it would redirect to whatever host the Host header names
    app.state.lifecycle = lifecycle
    return app
