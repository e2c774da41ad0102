"""The routes of the service: one coroutine for each, a request in, a response out."""

from collections.abc import Awaitable, Callable

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from chatproxy.config import Settings
from chatproxy.errors import MethodNotAllowed, NotFound
from chatproxy.routes import openai, operations
from chatproxy.routes.assets import Assets
from chatproxy.routes.chat import chat
from chatproxy.routes.openapi import openapi
from chatproxy.routes.state import AppState
from chatproxy.routes.streams import stop, stream


class Endpoint:
    """A handler as an ASGI application: around a function Starlette puts layers that a stream would hold while open."""

    def __init__(self, handler: Callable[[Request[AppState]], Awaitable[Response]]) -> None:
        self._handler = handler
        self.__doc__ = handler.__doc__

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        response = await self._handler(Request(scope, receive, send))
        await response(scope, receive, send)


def routes(settings: Settings) -> list[Route]:
    """The route table."""
    assets = Assets(settings.grok_tools)
    return [
        Route("/api/chat", Endpoint(chat), methods=["POST"]),
        Route("/api/chat/{id}/stream", Endpoint(stream), methods=["GET"]),
        Route("/api/chat/{id}/stop", stop, methods=["POST"]),
        Route("/api/chat/{id}", stop, methods=["DELETE"]),
        Route("/v1/chat/completions", Endpoint(openai.completions), methods=["POST"]),
        Route("/v1/models", openai.models),
        Route("/v1/models/{id:path}", openai.model),
        Route("/healthz", operations.healthz),
        Route("/readyz", operations.readyz),
        Route("/metrics", operations.metrics),
        Route("/openapi.json", openapi),
        Route("/client.js", assets.client),
        Route("/client.d.ts", assets.types),
        *([Route("/", assets.page)] if settings.try_page else []),
    ]


async def handle_http_exception(_: Request, error: Exception) -> Response:
    """Starlette's own 404 and 405, in our words."""
    assert isinstance(error, HTTPException)
    kind = MethodNotAllowed if error.status_code == 405 else NotFound
    raise kind(headers=error.headers) from None
