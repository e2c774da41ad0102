"""What operators and their platforms ask: health, readiness, metrics."""

from typing import Literal

from msgspec import Struct
from starlette.requests import Request
from starlette.responses import Response

from chatproxy.metrics import CONTENT_TYPE
from chatproxy.routes.responses import JSONResponse
from chatproxy.routes.state import AppState


class Health(Struct, omit_defaults=True):
    """Whether the service takes chats. `demo`: no key is set, answers come from the built-in demo.

    `store`: Redis is away, so resumable answers are refused; a balancer should not mind, for it is so everywhere.
    """

    status: Literal["ok", "unavailable"]
    reason: Literal["draining", "upstream_auth", "auth_unavailable", "store_unavailable"] | None = None
    demo: bool = False
    store: Literal["unavailable"] | None = None


async def healthz(_: Request[AppState]) -> Response:
    """Tell that the process is alive."""
    return JSONResponse(Health("ok"))


async def readyz(request: Request[AppState]) -> Response:
    """Tell whether new chats are taken."""
    state = request.state
    demo = state["settings"].grok_api_key is None
    if state["lifecycle"].draining:
        return JSONResponse(Health("unavailable", "draining", demo), 503)
    if not state["grok"].key_usable:
        return JSONResponse(Health("unavailable", "upstream_auth", demo), 503)
    if not state["authenticator"].ready:
        return JSONResponse(Health("unavailable", "auth_unavailable", demo), 503)
    if not state["store_state"].seen:
        return JSONResponse(Health("unavailable", "store_unavailable", demo), 503)
    return JSONResponse(Health("ok", demo=demo, store=None if state["store_state"].available else "unavailable"))


async def metrics(request: Request[AppState]) -> Response:
    """Give the counters and histograms, for Prometheus."""
    return Response(request.state["metrics"].render(), headers={"Content-Type": CONTENT_TYPE})
