"""What every request passes first: request id and log line, host check, origin check and CORS. Plain ASGI.

Does not know bodies, events or Grok.
"""

import logging
import re
import secrets
import time
from collections.abc import Awaitable
from functools import lru_cache
from ipaddress import ip_address
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from chatproxy import logs
from chatproxy.config import Settings
from chatproxy.config.values import origin
from chatproxy.errors import (
    ChatError,
    HeadersTooLarge,
    HostNotAllowed,
    InternalError,
    NotFound,
    OriginNotAllowed,
)
from chatproxy.lifecycle import Lifecycle
from chatproxy.metrics import Metrics
from chatproxy.routes.responses import ClientDisconnected, ErrorResponse, OpenAIErrorResponse, RequestContext
from chatproxy.services.access import MAX_ADDRESS

log = logging.getLogger(__name__)

# Of a request head that the server has let through.
MAX_HEADERS = 100
MAX_HEAD_BYTES = 65_536

# Probed every few seconds, by platforms that know no Host name of ours.
HEALTH_ROUTES = ("/healthz", "/readyz")

# Who may start an answer is decided here; the browser's origin counts on these.
API_PREFIXES = ("/api/", "/v1/")

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")

ALLOWED_METHODS = "GET, POST, DELETE"
ALLOWED_HEADERS = (
    "Authorization, Content-Type, Last-Event-ID, Idempotency-Key, X-Request-ID, traceparent, tracestate, baggage, "
    "sentry-trace, cache-control, x-requested-with"
)
EXPOSED_HEADERS = b"Location, Content-Location, Retry-After, X-Request-ID, X-Should-Retry, X-Resumable-Stream-Id"


class RequestLogMiddleware:
    """The outermost: gives each request an id, turns errors into JSON, and writes one log line when it has ended."""

    def __init__(self, app: ASGIApp, metrics: Metrics, lifecycle: Lifecycle) -> None:
        self.app = app
        self._metrics = metrics
        self._lifecycle = lifecycle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = [value.decode("latin-1") for name, value in scope["headers"] if name == b"x-request-id"]
        request_id = given[0] if len(given) == 1 and REQUEST_ID.fullmatch(given[0]) else secrets.token_hex(16)
        logs.request_id.set(request_id)
        context = RequestContext(request_id, scope["client"][0] if scope.get("client") else None)
        # Some servers have no state, and others share one among requests.
        scope["state"] = {**scope.get("state", {}), "context": context}

        def send_with_headers(message: Message) -> Awaitable[None]:  # not a coroutine of its own for each event
            if message["type"] == "http.response.start":
                context.status = message["status"]
                message["headers"] = [*message["headers"], *context.headers]
            return send(message)

        self._lifecycle.requests += 1
        try:
            await self.app(scope, receive, send_with_headers)
        except ChatError as error:
            context.record_error(error)
            await _error_response(scope)(error, request_id)(scope, receive, send_with_headers)
        except ClientDisconnected:
            context.disconnected = True
        except Exception:
            log.exception("a request failed by a mistake of ours")
            context.record_error(InternalError())
            if not context.status:
                response = _error_response(scope)(InternalError(), request_id)
                await response(scope, receive, send_with_headers)
        finally:
            self._lifecycle.requests -= 1
            self._log(scope, context)

    def _log(self, scope: Scope, context: RequestContext) -> None:
        route = scope["route"].path_format if "route" in scope else "-"
        fields: dict[str, object] = {
            "request_id": context.request_id,
            "client": context.client or _client_address(scope),
            "method": scope["method"],
            "route": route,
            "status": context.status or None,  # None: the client disconnected before there was one
            "ms": round((time.monotonic() - context.started_at) * 1000, 1),
        }
        summary = context.summary
        if summary is not None and context.owns_summary:
            summary.close("left")
            fields |= summary.fields()
        elif summary is not None:  # a reader of a resumable stream, which has a line of its own
            fields |= {"end": "left" if context.disconnected else summary.end, "code": summary.code}
        if context.code is not None:
            fields |= {"code": context.code}
        log.log(logging.DEBUG if route in HEALTH_ROUTES else logging.INFO, "request", extra=fields)
        self._metrics.requests(route, str(context.status)).inc()


class HostMiddleware:
    """Refuses heads that are too large, and host names that are not this service's, against DNS rebinding."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app = app
        self._allowed = settings.allowed_hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request. Raises ChatError."""
        if scope["type"] == "http":
            headers = scope["headers"]
            if len(headers) > MAX_HEADERS or _head_size(scope) > MAX_HEAD_BYTES:
                raise HeadersTooLarge
            path = route_path(scope)
            if path.endswith("\n"):  # Starlette's patterns overlook it, and so might a proxy that keeps /metrics back
                raise NotFound
            hosts = [value.decode("latin-1") for name, value in headers if name == b"host"]
            if path not in HEALTH_ROUTES and not (len(hosts) == 1 and self._is_permitted(hosts[0])):
                raise HostNotAllowed
        await self.app(scope, receive, send)

    def _is_permitted(self, host: str) -> bool:
        """Whether the Host header can name this service; a foreign name that resolves to it is DNS rebinding."""
        if len(host) > MAX_HOST or not (match := _HOST.fullmatch(host.lower())):
            return False
        name = match[1]
        return (
            "." not in name
            or _is_ip_literal(name)
            or any(
                allowed in ("*", name) or (allowed[0] == "." and (name.endswith(allowed) or name == allowed[1:]))
                for allowed in self._allowed
            )
        )


class OriginMiddleware:
    """Refuses pages of other sites that are not listed, before the body is read; and answers CORS to those that are."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app = app
        self._allowed = frozenset(settings.allowed_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request. Raises OriginNotAllowed."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        # Browsers send one; two are never a listed origin.
        name = ", ".join(headers.getlist("origin")) if "origin" in headers else None
        listed = name is not None and self._is_listed(name)
        response_headers = scope["state"]["context"].headers
        response_headers.append((b"vary", b"Origin"))
        if name is not None and listed:
            response_headers.append((b"access-control-allow-origin", name.encode("latin-1")))
            response_headers.append((b"access-control-expose-headers", EXPOSED_HEADERS))
        preflight = scope["method"] == "OPTIONS" and "access-control-request-method" in headers
        if route_path(scope).startswith(API_PREFIXES) and not listed and not self._is_same_site(name, headers):
            raise OriginNotAllowed
        if preflight:
            await Response(status_code=204, headers=_preflight_headers(headers))(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def _is_listed(self, name: str) -> bool:
        return name in self._allowed or ("*" in self._allowed and name != "null")

    @staticmethod
    def _is_same_site(name: str | None, headers: Headers) -> bool:
        if name is None:
            return headers.get("sec-fetch-site") != "cross-site"
        try:
            # A proxy may have taken the TLS off, so the scheme that counts is the browser's.
            scheme = urlsplit(name).scheme
            return scheme in ("http", "https") and origin(name) == origin(f"{scheme}://{headers.get('host')}")
        except ValueError:
            return False


def _client_address(scope: Scope) -> str | None:
    """For the log: an address and nothing else, for a proxy may pass on whatever the client has sent for one."""
    address: str | None = scope["client"][0] if scope.get("client") else None
    known = address is None or (len(address) <= MAX_ADDRESS and _is_ip_literal(address))
    return address if known else "unknown"


def _preflight_headers(headers: Headers) -> dict[str, str]:
    """What a preflight is told: the fixed list, and what OpenAI's SDKs ask for besides."""
    asked = headers.get("access-control-request-headers", "").lower().split(",")
    allowed = [ALLOWED_HEADERS, *(name for name in map(str.strip, asked) if _SDK_HEADER.fullmatch(name))]
    return {
        "Access-Control-Allow-Methods": ALLOWED_METHODS,
        "Access-Control-Allow-Headers": ", ".join(allowed),
        "Access-Control-Max-Age": "600",
    }


def _error_response(scope: Scope) -> type[ErrorResponse]:
    return OpenAIErrorResponse if route_path(scope).startswith("/v1/") else ErrorResponse


def route_path(scope: Scope) -> str:
    """The path below ROOT_PATH, as the routes match it."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    return path[len(root) :] if root and path.startswith(root + "/") else path


def _head_size(scope: Scope) -> int:
    fields = sum(len(name) + len(value) for name, value in scope["headers"])
    return fields + len(scope.get("raw_path") or b"") + len(scope["query_string"])


# OpenAI's SDKs send a family of header names, which grows between their versions.
_SDK_HEADER = re.compile(r"x-stainless-[a-z0-9-]{1,64}|openai-organization|openai-project|user-agent")

# RFC 1035: 253 characters at most, and a port.
MAX_HOST = 260
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::\d{1,5})?")


@lru_cache(256)
def _is_ip_literal(name: str) -> bool:
    try:
        ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True
