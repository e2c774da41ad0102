"""What the routes share, made by the application's lifespan."""

from typing import NotRequired, TypedDict

from chatproxy.config import Settings
from chatproxy.config.timing import Timing
from chatproxy.lifecycle import Lifecycle
from chatproxy.metrics import Metrics
from chatproxy.routes.responses import RequestContext
from chatproxy.services.access import Authenticator
from chatproxy.services.budgets import TokenBudgets
from chatproxy.services.grok.client import Grok
from chatproxy.services.limits import BodyMemory, Concurrency, RateLimiter
from chatproxy.services.store import StoreState
from chatproxy.services.streams import StreamRegistry


class AppState(TypedDict):
    """`request.state` of every route."""

    settings: Settings
    timing: Timing
    metrics: Metrics
    lifecycle: Lifecycle
    authenticator: Authenticator
    grok: Grok
    streams: StreamRegistry
    rate_limiter: RateLimiter
    concurrency: Concurrency
    budgets: TokenBudgets
    store_state: StoreState
    body_memory: BodyMemory
    context: NotRequired[RequestContext]  # of this request, from the middleware
