"""One coroutine for each route: a request in, a Response out.

Does not know httpx, xAI's addresses, or how an event is written.
"""

import asyncio
import hashlib
import hmac
import re
from collections.abc import AsyncGenerator
from functools import lru_cache
from typing import Literal, NotRequired, TypedDict

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from chatproxy import metrics as prometheus
from chatproxy.assets import Assets
from chatproxy.config import Settings
from chatproxy.errors import (
    BodyTimeout,
    BodyTooLarge,
    Busy,
    CallerLeft,
    ChatError,
    Draining,
    InvalidRequest,
    MethodNotAllowed,
    NotAcceptable,
    NotFound,
    StreamNotFound,
    TooManyMessages,
    Unauthorized,
    UnsupportedMediaType,
)
from chatproxy.limits import Limits, caller
from chatproxy.metrics import Metrics
from chatproxy.openapi import describe
from chatproxy.responses import EventSourceResponse, Exchange, JSONResponse, Watch
from chatproxy.schemas import Chat, Created, Health, decode_chat
from chatproxy.services.grok import Completion, Grok
from chatproxy.services.relay import Report, Step, failed, relay
from chatproxy.services.streams import NOTHING_AFTER, Answer, Streams

# A caller who needs longer for a megabyte is holding a connection rather than using it.
BODY_TIMEOUT = 60.0

# What is kept of all bodies while they come in; beyond it only small ones are read.
MAX_BODIES_BYTES = 64_000_000
SMALL_BODY = 65_536

MAX_IDEMPOTENCY_KEY = 255

# W3C Trace Context, section 3.2.2.
_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")


class AppState(TypedDict):
    """What the routes share, made by the application's lifespan."""

    settings: Settings
    metrics: Metrics
    limits: Limits
    grok: Grok
    streams: Streams
    draining: asyncio.Event
    exchange: NotRequired[Exchange]  # of this request, from the middleware


async def chat(request: Request[AppState]) -> Response:
    """POST /api/chat: a new answer as a stream or as the stream's address, or the rest of an earlier one."""
    if last_event_id := request.headers.get("last-event-id"):
        return await _resume(request, last_event_id)
    state = request.state
    wanted = _wanted(",".join(request.headers.getlist("accept")))
    _authorize(request)
    if state["draining"].is_set():
        raise Draining
    media_type = request.headers.get("content-type", "").partition(";")[0]
    if media_type.strip().lower() != "application/json":
        raise UnsupportedMediaType
    address = caller(request.client.host) if request.client else ""
    headers = state["limits"].take(address)
    body = await _read_body(request)
    chat = decode_chat(body)
    if len(chat.messages) > state["settings"].max_messages:
        raise TooManyMessages(param="messages")

    traceparent = request.headers.get("traceparent", "")
    upstream = state["grok"].stream(
        chat, client=address, traceparent=traceparent if _TRACEPARENT.fullmatch(traceparent) else None
    )
    exchange = state["exchange"]
    report = Report(exchange.request_id)
    if wanted == "stream" and not chat.resumable:
        exchange.report, exchange.owns_report = report, True
        events = relay(upstream, report, chat.include or ())
        return EventSourceResponse(events, state["settings"], state["metrics"], upstream, headers)

    answer = _resumable(request, upstream, report, chat, body)
    exchange.report = answer.report
    streams, hold, url = state["streams"], state["settings"].status_hold, _stream_url(request, answer)
    if wanted == "stream":
        headers["Content-Location"] = url
        return EventSourceResponse(streams.follow(answer, hold), state["settings"], state["metrics"], headers=headers)
    with Watch(request.receive):
        await streams.decide(answer, hold)
    return JSONResponse(Created(answer.id, url), 201, {**headers, "Location": url})


async def stream(request: Request[AppState]) -> Response:
    """GET /api/chat/{id}/stream: an answer from its start, or what lies after the last event id."""
    state = request.state
    answer = state["streams"].find(request.path_params["id"])
    last_event_id = request.headers.get("last-event-id") or request.query_params.get("lastEventId")
    after, more = await state["streams"].position(answer, last_event_id or f"{answer.id}-0")
    if not more:
        return Response(status_code=204)
    return _replay(request, answer, after)


async def stop(request: Request[AppState]) -> Response:
    """DELETE /api/chat/{id} and POST /api/chat/{id}/stop: hang up; the same if there is nothing to hang up."""
    request.state["streams"].stop(request.path_params["id"])
    return Response(status_code=204)


async def healthz(_: Request[AppState]) -> Response:
    """GET /healthz: the loop turns."""
    return JSONResponse(Health("ok"))


async def readyz(request: Request[AppState]) -> Response:
    """GET /readyz: whether new chats are welcome."""
    state = request.state
    demo = state["settings"].grok_api_key is None
    if state["draining"].is_set():
        return JSONResponse(Health("unavailable", "draining", demo), 503)
    if not state["grok"].key_usable:
        return JSONResponse(Health("unavailable", "upstream_auth", demo), 503)
    return JSONResponse(Health("ok", demo=demo))


async def metrics(request: Request[AppState]) -> Response:
    """GET /metrics: counters and histograms, for Prometheus."""
    return Response(request.state["metrics"].render(), headers={"Content-Type": prometheus.CONTENT_TYPE})


async def openapi(request: Request[AppState]) -> Response:
    """GET /openapi.json: what this service offers."""
    listed = [
        (method, route.path, route.endpoint.__doc__)
        for route in request.app.routes
        for method in sorted(route.methods - {"HEAD"})
    ]
    return JSONResponse(describe(listed, request.scope["root_path"]))


async def refuse(_: Request, error: Exception) -> Response:
    """Starlette's own 404 and 405, in our words."""
    assert isinstance(error, HTTPException)
    kind = MethodNotAllowed if error.status_code == 405 else NotFound
    raise kind(headers=error.headers) from None


def routes(try_page: bool) -> list[Route]:
    """All routes of the service."""
    assets = Assets()
    reading = Route("/api/chat/{id}/stream", stream)
    reading.methods = {"GET"}  # Starlette adds HEAD
    return [
        Route("/api/chat", chat, methods=["POST"]),
        reading,
        Route("/api/chat/{id}/stop", stop, methods=["POST"]),
        Route("/api/chat/{id}", stop, methods=["DELETE"]),
        Route("/healthz", healthz),
        Route("/readyz", readyz),
        Route("/metrics", metrics),
        Route("/openapi.json", openapi),
        Route("/client.js", assets.client),
        Route("/client.d.ts", assets.types),
        *([Route("/", assets.page)] if try_page else []),
    ]


def _resumable(request: Request[AppState], upstream: Completion, report: Report, chat: Chat, body: bytes) -> Answer:
    """A new resumable answer, or the one that its idempotency key has started. Raises InvalidRequest."""
    streams, include = request.state["streams"], chat.include or ()
    key, digest = _idempotency_key(request), hashlib.sha256(body).digest()
    # Nothing may be awaited between the look-up and the start, or one key might start two answers.
    answer = streams.find_key(key, digest)
    if answer is None:
        answer = streams.start(lambda frame: relay(upstream, report, include, frame), upstream, report, key, digest)
    return answer


async def _resume(request: Request[AppState], last_event_id: str) -> Response:
    """What fetch-event-source sends when it reconnects. It retries any answer but a stream for ever."""
    streams = request.state["streams"]
    try:
        answer = streams.find(last_event_id.rpartition("-")[0])
        after, more = await streams.position(answer, last_event_id)
    except ChatError:
        frame = failed(StreamNotFound(), request.state["exchange"].request_id)
        return EventSourceResponse(_only(frame), request.state["settings"], request.state["metrics"])
    if not more and after != NOTHING_AFTER:
        after -= 1  # the last event again, for a reader who has not understood that it was the last
    return _replay(request, answer, after)


def _replay(request: Request[AppState], answer: Answer, after: int) -> Response:
    state = request.state
    state["exchange"].report = answer.report
    headers = {"Content-Location": _stream_url(request, answer)}
    return EventSourceResponse(
        state["streams"].replay(answer, after), state["settings"], state["metrics"], headers=headers
    )


async def _only(frame: bytes) -> AsyncGenerator[Step, None]:
    yield [frame], True


def _stream_url(request: Request[AppState], answer: Answer) -> str:
    return f"{request.scope['root_path']}/api/chat/{answer.id}/stream"


@lru_cache(256)
def _wanted(accept: str) -> Literal["stream", "address"]:
    """What the Accept header asks for. Raises NotAcceptable."""
    ranges = (part.replace(" ", "").lower() for part in accept.split(","))
    accepted = {part.partition(";")[0] for part in ranges if not re.search(r";q=0(\.0*)?(;|$)", part)} - {""}
    if not accepted or "text/event-stream" in accepted:
        return "stream"
    if "application/json" in accepted:
        return "address"
    if accepted & {"*/*", "text/*"}:
        return "stream"
    raise NotAcceptable


def _authorize(request: Request[AppState]) -> None:
    """Raises Unauthorized, unless no tokens are set or one of them was sent."""
    tokens = request.state["settings"].access_tokens
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    # Each is compared, in constant time, so that the time tells nothing of any.
    known = [hmac.compare_digest(given.strip().encode(), token.encode()) for token in tokens]
    if tokens and not (scheme.lower() == "bearer" and any(known)):
        raise Unauthorized(headers={"WWW-Authenticate": "Bearer"})


async def _read_body(request: Request[AppState]) -> bytes:
    """Raises BodyTooLarge or Busy as soon as that is known, BodyTimeout, or CallerLeft."""
    limit, limits = request.state["settings"].max_body_bytes, request.state["limits"]
    if int(request.headers.get("content-length", "0")) > limit:
        raise BodyTooLarge
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT):
            async for piece in request.stream():
                body += piece
                limits.bodies += len(piece)
                if len(body) > limit:
                    raise BodyTooLarge
                if len(body) > SMALL_BODY and limits.bodies > MAX_BODIES_BYTES:
                    raise Busy
    except TimeoutError:
        raise BodyTimeout from None
    except ClientDisconnect:
        raise CallerLeft(asyncio.get_running_loop().time()) from None
    finally:
        limits.bodies -= len(body)
    return bytes(body)


def _idempotency_key(request: Request[AppState]) -> tuple[str, str] | None:
    key = request.headers.get("idempotency-key")
    if not key:
        return None
    if len(key) > MAX_IDEMPOTENCY_KEY:
        raise InvalidRequest(f"Idempotency-Key is longer than {MAX_IDEMPOTENCY_KEY}.", param="Idempotency-Key")
    return request.headers.get("authorization", ""), key
