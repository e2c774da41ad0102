"""What the service offers, as OpenAPI 3.1: made of its routes, its JSON types and its errors.

Does not know how any of it is done.
"""

import re
from collections.abc import Iterable
from itertools import groupby
from typing import Any, NamedTuple

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from chatproxy import __version__, errors
from chatproxy.errors import ChatError
from chatproxy.events import Source
from chatproxy.formats import ErrorBody
from chatproxy.formats.openai import CompletionRequest
from chatproxy.formats.plain import ChatRequest, FinishData, ToolData
from chatproxy.formats.ui_messages import UIChatRequest
from chatproxy.routes.answers import Created
from chatproxy.routes.openai import Model, ModelList
from chatproxy.routes.operations import Health
from chatproxy.routes.possible_errors import (
    BY_ID_ERRORS,
    CHAT_ERRORS,
    HEALTH_ERRORS,
    NO_ROUTE_ERRORS,
    NON_API_ERRORS,
    STREAM_ERRORS,
    STREAM_ROUTE_ERRORS,
    V1_CHAT_ERRORS,
    V1_MODEL_ERRORS,
    V1_MODELS_ERRORS,
    Kinds,
)
from chatproxy.routes.responses import JSONResponse
from chatproxy.routes.state import AppState

Object = dict[str, Any]

_REQUESTS = (ChatRequest, UIChatRequest, CompletionRequest)
_TYPES = (*_REQUESTS, Created, ErrorBody, FinishData, Health, Model, ModelList, Source, ToolData)
_REFERENCES, _SCHEMAS = msgspec.json.schema_components(_TYPES, ref_template="#/components/schemas/{name}")
_SCHEMA = dict(zip(_TYPES, _REFERENCES, strict=True))

_HEADERS = {
    "Allow": "The methods that this path takes.",
    "Content-Location": "Where a resumable answer can be read again.",
    "ETag": "Of what is sent; the same in `If-None-Match` gets a 304.",
    "Location": "Where the answer streams.",
    "RateLimit": "What is left of this caller's chats and tokens, where RATE_LIMIT or TOKEN_BUDGET_PER_CLIENT is set.",
    "RateLimit-Policy": "How many chats and tokens a caller has in a window, where one of these is set.",
    "Retry-After": "Whole seconds to wait.",
    "WWW-Authenticate": "The kind of token that is wanted.",
    "X-Resumable-Stream-Id": "The id of a resumable answer.",
    "X-Should-Retry": "`false` where asking again would not help.",
    "X-Request-ID": "The request's own, if that was sane; quote it to the operator.",
}
_RATE_LIMIT = ("RateLimit", "RateLimit-Policy")
HEADERS_BY_STATUS = {401: ("WWW-Authenticate",), 405: ("Allow",), 429: _RATE_LIMIT}


def _parameter(place: str, name: str, description: str, **schema: Any) -> Object:
    return {
        "name": name,
        "in": place,
        "description": description,
        "required": place == "path",
        "schema": {"type": "string", **schema},
    }


def _answer(description: str, content: Object | None = None, headers: Iterable[str] = ()) -> Object:
    names = sorted(["X-Request-ID", *headers])
    answer: Object = {
        "description": description,
        "headers": {name: {"$ref": f"#/components/headers/{name}"} for name in names},
    }
    return answer if content is None else {**answer, "content": content}


def _json(schema: Object) -> Object:
    return {"application/json": {"schema": schema}}


def _file(description: str, media_type: str) -> "_Operation":
    """A file, which is not sent again to a client that has it."""
    content = {media_type: {"schema": {"type": "string"}}}
    return _Operation(
        {"200": _answer(description, content, ["ETag"]), "304": _answer("It has not changed.", headers=["ETag"])},
        NON_API_ERRORS,
        {"parameters": [_parameter("header", "If-None-Match", "The ETag of what was received before.")]},
    )


def _failure(kinds: Iterable[type[ChatError]]) -> Object:
    codes = sorted(kind.code for kind in kinds)
    return {**_SCHEMA[ErrorBody], "properties": {"error": {"properties": {"code": {"enum": codes}}}}}


def _event(kind: str, description: str, data: Object | None = None) -> Object:
    """An event whose data is text, or JSON of this schema. Of a resumable answer it has an id."""
    content = {} if data is None else {"contentMediaType": "application/json", "contentSchema": data}
    return {
        "description": description,
        "properties": {
            "event": {"const": kind},
            "data": {"type": "string", **content},
            "id": {"type": "string"},
        },
        "required": ["data"] if kind == "message" else ["event", "data"],
    }


def _refusals(kinds: Kinds, *, v1: bool = False) -> Object:
    """An answer for each status, which tells the codes that it can stand for."""
    refusals = {}

    def status_of(kind: type[ChatError]) -> int:
        return 400 if v1 and kind is errors.InvalidRequest else kind.status

    for status, group in groupby(sorted(kinds, key=lambda kind: (status_of(kind), kind.code)), status_of):
        alike = list(group)
        description = "\n".join(f"* `{kind.code}`: {kind.message}" for kind in alike)
        headers = [
            *HEADERS_BY_STATUS.get(status, ()),
            *({"Retry-After"} if any(kind.retry_after for kind in alike) else ()),
            *({"X-Should-Retry"} if v1 else ()),
        ]
        refusals[str(status)] = _answer(description, _json(_failure(alike)), headers)
    return refusals


class _Operation(NamedTuple):
    """What a route cannot tell of itself."""

    answers: Object
    refusals: Kinds
    request: Object = {}  # noqa: RUF012 -- nobody changes it


_LAST_EVENT_ID = "The id of the last event received. What follows it is sent, and no new answer is started."
_EVENTS = {
    "text/event-stream": {
        # Before OpenAPI 3.2 the schema of an event stream is that of each event.
        "schema": {
            "type": "object",
            "oneOf": [
                _event("message", "A piece of the answer, or `[DONE]`: it is complete."),
                _event("reasoning", "A piece of the reasoning, if included."),
                _event("tool", "A search has started or completed, if included.", _SCHEMA[ToolData]),
                _event(
                    "citations",
                    "The pages that the answer refers to, before the finish, if included and if there are any.",
                    {"type": "array", "items": _SCHEMA[Source], "maxItems": 100},
                ),
                _event("finish", "Just before the end, if included.", _SCHEMA[FinishData]),
                _event("error", "In place of `[DONE]`, if the answer failed.", _failure(STREAM_ERRORS)),
            ],
        },
        "example": "data: Hel\n\ndata: lo\n\ndata: [DONE]\n\n",
    }
}
_COMPLETION = {
    "text/event-stream": {"schema": {"type": "object", "description": "Chunks as OpenAI's, then `[DONE]`."}},
    "application/json": {"schema": {"type": "object", "description": "A chat completion as OpenAI's, or an error."}},
}
_LINKS = {
    name: {"operationRef": f"#/paths/~1api~1chat~1{{id}}{operation}", "parameters": {"id": "$response.body#/id"}}
    for name, operation in {"read": "~1stream/get", "stop": "~1stop/post", "delete": "/delete"}.items()
}
_TOKEN: Object = {"security": [{"token": []}, {}]}
_STOPPED = {"204": _answer("The answer has ended, or is unknown; nothing is paid for it any more.")}

_OPERATIONS = {
    "POST /api/chat": _Operation(
        {
            "200": _answer(
                "The answer; for the AI SDK's `useChat` a UI message stream, whose chunks are the data of the events.",
                _EVENTS,
                ["Content-Location", "X-Resumable-Stream-Id", *_RATE_LIMIT],
            ),
            "201": {
                **_answer(
                    "The address of the answer's stream, for clients that accept JSON but no event stream.",
                    _json(_SCHEMA[Created]),
                    ["Location", *_RATE_LIMIT],
                ),
                "links": _LINKS,
            },
        },
        CHAT_ERRORS,
        {
            **_TOKEN,
            "parameters": [
                _parameter(
                    "header",
                    "Idempotency-Key",
                    "Makes the request safe to repeat: the same key and body give the same, resumable, answer.",
                    maxLength=255,
                ),
                _parameter("header", "Last-Event-ID", f"{_LAST_EVENT_ID} The body is ignored."),
                _parameter("header", "traceparent", "W3C Trace Context; passed on to Grok."),
            ],
            "requestBody": {
                "required": True,
                "content": _json({"anyOf": [_SCHEMA[ChatRequest], _SCHEMA[UIChatRequest]]}),
            },
        },
    ),
    "GET /api/chat/{id}/stream": _Operation(
        {
            "200": _answer("The answer.", _EVENTS, ["Content-Location", "X-Resumable-Stream-Id"]),
            "204": _answer("Nothing more will come; or the id is that of a chat of which nothing is left."),
        },
        STREAM_ROUTE_ERRORS,
        {
            "parameters": [
                _parameter("header", "Last-Event-ID", _LAST_EVENT_ID),
                _parameter("query", "lastEventId", "The same, for clients that cannot send headers."),
            ]
        },
    ),
    "POST /api/chat/{id}/stop": _Operation(_STOPPED, BY_ID_ERRORS),
    "DELETE /api/chat/{id}": _Operation(_STOPPED, BY_ID_ERRORS),
    "POST /v1/chat/completions": _Operation(
        {"200": _answer("The answer, as a stream if the body says so.", _COMPLETION, _RATE_LIMIT)},
        V1_CHAT_ERRORS,
        {**_TOKEN, "requestBody": {"required": True, "content": _json(_SCHEMA[CompletionRequest])}},
    ),
    "GET /v1/models": _Operation({"200": _answer("The list.", _json(_SCHEMA[ModelList]))}, V1_MODELS_ERRORS, _TOKEN),
    "GET /v1/models/{id}": _Operation({"200": _answer("The model.", _json(_SCHEMA[Model]))}, V1_MODEL_ERRORS, _TOKEN),
    "GET /healthz": _Operation({"200": _answer("The process is alive.", _json(_SCHEMA[Health]))}, HEALTH_ERRORS),
    "GET /readyz": _Operation(
        {
            "200": _answer("New chats are taken.", _json(_SCHEMA[Health])),
            "503": _answer("New chats are refused; `reason` tells why.", _json(_SCHEMA[Health])),
        },
        HEALTH_ERRORS,
    ),
    "GET /metrics": _Operation(
        {"200": _answer("The metrics.", {"text/plain": {"schema": {"type": "string"}}})}, NON_API_ERRORS
    ),
    "GET /openapi.json": _Operation({"200": _answer("This document.", _json({"type": "object"}))}, NON_API_ERRORS),
    "GET /client.js": _file("The module.", "text/javascript"),
    "GET /client.d.ts": _file("The types.", "text/plain"),
    "GET /": _file("The page.", "text/html"),
}


def describe(routes: Iterable[tuple[str, str, str]], root_path: str) -> Object:
    """The document, from each route's method, path and purpose."""
    paths: Object = {}
    for method, path, purpose in routes:
        operation = _OPERATIONS[f"{method} {path}"]
        ids = [
            _parameter("path", name, "The answer's id, or its chat's; or the model's.")
            for name in re.findall(r"{(\w+)}", path)
        ]
        request_id = _parameter("header", "X-Request-ID", "To be logged and sent back; 128 of `A-Za-z0-9._-` at most.")
        paths.setdefault(path, {"parameters": [*ids, request_id]})[method.lower()] = {
            "summary": purpose,
            **operation.request,
            "responses": {**operation.answers, **_refusals(operation.refusals, v1=path.startswith("/v1/"))},
        }
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "chatproxy",
            "version": __version__,
            "description": "Grok's answers as server-sent events. What is not listed here is a 404 or a 405.",
        },
        "servers": [{"url": root_path or "/"}],
        "paths": paths,
        "components": {
            "schemas": _SCHEMAS,
            "headers": {name: {"description": text, "schema": {"type": "string"}} for name, text in _HEADERS.items()},
            "responses": _refusals(NO_ROUTE_ERRORS),
            "securitySchemes": {
                "token": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "Only where ACCESS_TOKENS, AUTH_JWKS_URL or AUTH_JWT_SECRET is set.",
                }
            },
        },
    }


async def openapi(request: Request[AppState]) -> Response:
    """Describe this service."""
    listed = [
        (method, route.path_format, route.endpoint.__doc__.splitlines()[0])
        for route in request.app.routes
        for method in sorted(route.methods - {"HEAD"})
    ]
    return JSONResponse(describe(listed, request.scope["root_path"]))
