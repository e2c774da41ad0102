"""The door: request ids, host and origin checks, CORS, every error's JSON, and one log line at the end.

Plain ASGI. Does not know bodies, events or Grok.
"""

import logging
import re
import secrets
import time
from collections.abc import Mapping
from functools import lru_cache
from ipaddress import ip_address
from itertools import chain
from urllib.parse import urlsplit

from starlette._utils import get_route_path
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from chatproxy import logs
from chatproxy.config import Settings
from chatproxy.errors import (
    CallerLeft,
    ChatError,
    HeadersTooLarge,
    HostNotAllowed,
    InternalError,
    NotFound,
    OriginNotAllowed,
)
from chatproxy.metrics import Metrics
from chatproxy.responses import ErrorResponse, Exchange
from chatproxy.values import origin

log = logging.getLogger(__name__)

MAX_HEADERS = 100
MAX_HEAD_BYTES = 65_536

HEALTH = ("/healthz", "/readyz")

_SANE_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")

_PREFLIGHT = {
    "Access-Control-Allow-Methods": "GET, POST, DELETE",
    "Access-Control-Allow-Headers": (
        "Authorization, Content-Type, Last-Event-ID, Idempotency-Key, X-Request-ID, traceparent"
    ),
    "Access-Control-Max-Age": "600",
}
_EXPOSED = b"Location, Content-Location, Retry-After, X-Request-ID"


class Door:
    """Every request comes in and every answer goes out through here."""

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics) -> None:
        self.app = app
        self._origins = frozenset(settings.allowed_origins)
        self._hosts = settings.allowed_hosts
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers: dict[str, str] = {}
        for name, value in scope["headers"]:
            text, key = value.decode("latin-1"), name.decode("latin-1")
            headers[key] = f"{headers[key]}, {text}" if key in headers else text
        request_id = headers.get("x-request-id", "")
        if not _SANE_ID.fullmatch(request_id):
            request_id = secrets.token_hex(16)
        logs.request_id.set(request_id)
        exchange = scope["state"]["exchange"] = Exchange(request_id)
        extra = [(b"x-request-id", request_id.encode())]

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                message["headers"] = [*message["headers"], *extra]
            await send(message)

        try:
            extra += self._cors(headers)
            preflight = scope["method"] == "OPTIONS" and "access-control-request-method" in headers
            if not (preflight and self._allowed(headers.get("origin", ""))):  # so that the refusal itself is readable
                self._check(scope, headers)
            del headers  # an answer may be long
            if preflight:
                await Response(status_code=204, headers=_PREFLIGHT)(scope, receive, send_with_headers)
            else:
                await self.app(scope, receive, send_with_headers)
            stream, exchange.stream = exchange.stream, None  # it holds on to `exchange` from here on
            if stream is not None:
                await stream.write(exchange, receive, send_with_headers, send)
        except ChatError as error:
            exchange.fail(error)
            await ErrorResponse(error, request_id)(scope, receive, send_with_headers)
        except CallerLeft:
            exchange.left = True
        except Exception:
            log.exception("a request failed by a mistake of ours")
            exchange.fail(InternalError())
            if not exchange.status:
                await ErrorResponse(InternalError(), request_id)(scope, receive, send_with_headers)
        finally:
            self._finish(scope, exchange)

    def _check(self, scope: Scope, headers: Mapping[str, str]) -> None:
        """Refuse, before the body is read, what no honest caller sends. Raises ChatError."""
        head = chain((scope["raw_path"], scope["query_string"]), *scope["headers"])
        if len(scope["headers"]) > MAX_HEADERS or sum(map(len, head)) > MAX_HEAD_BYTES:
            raise HeadersTooLarge
        path = get_route_path(scope)
        if path.endswith("\n"):  # Starlette's patterns overlook it, and a proxy that keeps /metrics back might, too
            raise NotFound
        if path not in HEALTH and not self._known_host(headers.get("host", "")):
            raise HostNotAllowed
        if path.startswith("/api/") and not self._welcome(headers):
            raise OriginNotAllowed

    def _known_host(self, host: str) -> bool:
        """Whether the Host header can name us; a foreign name that resolves to us is DNS rebinding."""
        if not (match := _HOST.fullmatch(host.lower())):
            return False
        name = match[1]
        return (
            "." not in name
            or _is_ip_literal(name)
            or any(
                allowed in ("*", name) or (allowed[0] == "." and (name.endswith(allowed) or name == allowed[1:]))
                for allowed in self._hosts
            )
        )

    def _welcome(self, headers: Mapping[str, str]) -> bool:
        name = headers.get("origin")
        if name is None:
            return headers.get("sec-fetch-site") != "cross-site"
        if self._allowed(name):
            return True
        try:
            # A proxy may have taken the TLS off, so the scheme that counts is the browser's.
            scheme = urlsplit(name).scheme
            return scheme in ("http", "https") and origin(name) == origin(f"{scheme}://{headers.get('host')}")
        except ValueError:
            return False

    def _allowed(self, name: str) -> bool:
        return name in self._origins or ("*" in self._origins and name != "null")

    def _cors(self, headers: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
        vary = [(b"vary", b"Origin")]
        name = headers.get("origin")
        if name is None or not self._allowed(name):
            return vary
        return [
            *vary,
            (b"access-control-allow-origin", name.encode("latin-1")),
            (b"access-control-expose-headers", _EXPOSED),
        ]

    def _finish(self, scope: Scope, exchange: Exchange) -> None:
        """One log line, now that the request has ended."""
        route = scope["route"].path if "route" in scope else "-"
        fields = {
            "request_id": exchange.request_id,
            "client": scope["client"][0] if scope["client"] else None,
            "method": scope["method"],
            "route": route,
            "status": exchange.status or None,  # None: the caller left before there was one
            "ms": round((time.monotonic() - exchange.started) * 1000, 1),
        }
        report = exchange.report
        if report is not None and exchange.owns_report:
            if exchange.left:
                report.end = "left"
            report.count(self._metrics)
            fields |= report.fields()
        elif report is not None:  # a reader of a resumable answer, which has a line of its own
            fields |= {"end": "left" if exchange.left else report.end, "code": report.code}
        if exchange.code is not None:
            fields |= {"code": exchange.code}
        log.info("request", extra=fields)
        self._metrics.requests(route, str(exchange.status)).inc()


_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::\d{1,5})?")


@lru_cache(1024)
def _is_ip_literal(name: str) -> bool:
    try:
        ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True
