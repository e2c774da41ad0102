"""A client that looks at when things arrive: connections, TLS, requests, and event streams event by event.

Does not know what is healthy.
"""

import asyncio
import json
import re
import socket
import ssl
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import anyio
import httpx
from anyio.abc import SocketAttribute
from anyio.streams.tls import TLSAttribute

from chatproxy.config.values import origin

# Seconds for what a healthy service does at once.
PROMPT = 5.0

# More than an answer can be that was asked for by this program.
MAX_BODY = 1_000_000

DONE = "[DONE]"


class Unreachable(Exception):
    """No connection, or no TLS on it; the text says why."""


@dataclass(frozen=True)
class Target:
    """Where the service is: its address without a trailing slash, and the parts of it. Raises ValueError."""

    url: str
    host: str
    port: int
    tls: bool
    prefix: str
    origin: str

    @classmethod
    def parse(cls, url: str) -> "Target":
        parts = urlsplit(url)
        try:
            page, port = origin(url), parts.port
        except ValueError:  # a port that is none
            page = ""
        if not page or parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ValueError("expected an http or https address such as https://chat.example.com")
        if parts.username is not None:
            raise ValueError("expected an http or https address without a user's name")
        tls, prefix = parts.scheme == "https", parts.path.rstrip("/")
        return cls(f"{page}{prefix}", parts.hostname, port or (443 if tls else 80), tls, prefix, page)


async def connect(target: Target, within: float = PROMPT) -> tuple[str, float]:
    """The IP address that takes connections, and the seconds that one took. Raises Unreachable."""
    started = time.monotonic()
    try:
        with anyio.fail_after(within):
            stream = await anyio.connect_tcp(target.host, target.port)
    except socket.gaierror as error:
        text = f"the name {target.host} has no address ({_reason(error)}): look at its DNS record"
        raise Unreachable(text) from None
    except TimeoutError:
        raise Unreachable(f"no answer from port {target.port} within {within:.0f} s: is a firewall closed?") from None
    except OSError as error:
        cause = error.__cause__ or error
        causes = cause.exceptions if isinstance(cause, BaseExceptionGroup) else (cause,)  # one for each address
        if any(isinstance(each, ConnectionRefusedError) for each in causes):
            text = f"refused: nothing listens on port {target.port}; is the service down?"
        else:
            text = f"no connection to port {target.port}: {_reason(causes[-1])}"
        raise Unreachable(text) from None
    seconds = time.monotonic() - started
    address = str(stream.extra(SocketAttribute.remote_address)[0])  # noqa: S610 -- anyio's, not Django's
    await stream.aclose()
    return address, seconds


@dataclass(frozen=True)
class Secured:
    """What a TLS handshake came to: its version, the days that the certificate is still valid, and the ALPN choice."""

    version: str
    days: float
    alpn: str | None


async def secure(target: Target, context: ssl.SSLContext) -> Secured:
    """Raises ssl.SSLCertVerificationError if the certificate is not valid, Unreachable if there is no TLS at all."""
    context.set_alpn_protocols(["h2", "http/1.1"])
    try:
        with anyio.fail_after(PROMPT):
            stream = await anyio.connect_tcp(
                target.host, target.port, ssl_context=context, tls_hostname=target.host, tls_standard_compatible=False
            )
    except ssl.SSLCertVerificationError:
        raise
    except (OSError, anyio.BrokenResourceError, anyio.EndOfStream) as error:
        raise Unreachable(f"no TLS on port {target.port}: {_reason(error)}") from None
    connection = stream.extra(TLSAttribute.ssl_object)  # noqa: S610 -- anyio's, not Django's
    await stream.aclose()
    certificate = connection.getpeercert()
    assert certificate  # it was verified
    days = (ssl.cert_time_to_seconds(str(certificate["notAfter"])) - time.time()) / 86400
    return Secured(connection.version() or "TLS", days, connection.selected_alpn_protocol())


def _reason(error: BaseException) -> str:
    """In a few words."""
    if isinstance(error, ssl.SSLError) and error.reason:
        return error.reason.replace("_", " ").lower()
    return getattr(error, "strerror", None) or type(error).__name__


@dataclass(frozen=True)
class Event:
    """One event of a stream, and when it was there (monotonic clock)."""

    at: float
    type: str
    data: str
    id: str


@dataclass
class Reply:
    """An answer as far as it was read.

    `ended`: how the reading ended. Of an event stream: `done` or `failed` as the stream said, `cut` if it stopped
    without saying so, `left` if we closed it, `silent` if nothing came for as long as we cared to wait, `late` if our
    time was over. Of anything else: `whole`. `status` is 0 if there was none, and `problem` then says why.
    """

    asked_at: float
    status: int = 0
    version: str = ""
    headers: httpx.Headers = field(default_factory=httpx.Headers)
    body: bytearray = field(default_factory=bytearray)
    events: list[Event] = field(default_factory=list)
    comments: list[float] = field(default_factory=list)
    ended: str = "cut"
    ended_at: float = 0.0
    problem: str = ""

    @property
    def texts(self) -> list[Event]:
        """The events that carry text of the answer."""
        return [event for event in self.events if event.type == "message" and event.data != DONE]

    @property
    def media_type(self) -> str:
        kind: str = self.headers.get("content-type", "")
        return kind.partition(";")[0].strip().lower()

    @property
    def json(self) -> dict[str, Any]:
        """The body, if it is a JSON object, else an empty one."""
        with suppress(ValueError):
            value = json.loads(self.body)
            if isinstance(value, dict):
                return value
        return {}

    @property
    def code(self) -> str | None:
        """The code of the service's own error, in the body or in the stream; None if somebody else speaks."""
        value = self.json
        if self.ended == "failed":
            with suppress(ValueError):
                value = json.loads(self.events[-1].data)
        error = value.get("error")
        return error.get("code") if isinstance(error, dict) and "request_id" in error else None


class Lines:
    """Reads an event stream as the standard says, for streams whose lines end in LF, as the service's do."""

    def __init__(self) -> None:
        self._rest = b""
        self._type, self._id = "", ""
        self._data: list[str] = []

    def feed(self, piece: bytes, reply: Reply) -> None:
        """Add what is whole now to the reply."""
        now = time.monotonic()
        *lines, self._rest = (self._rest + piece).split(b"\n")
        for line in lines:
            name, _, value = line.decode(errors="replace").removesuffix("\r").partition(":")
            value = value.removeprefix(" ")
            if name == "data":
                self._data.append(value)
            elif name == "event":
                self._type = value
            elif name == "id":
                self._id = value
            elif not name and value:
                reply.comments.append(now)
            elif not name:
                if self._data:
                    reply.events.append(Event(now, self._type or "message", "\n".join(self._data), self._id))
                self._type, self._data = "", []


async def ask(
    client: httpx.AsyncClient,
    method: str,
    url: str,
    headers: Mapping[str, str] | None = None,
    body: object = None,
    *,
    within: float = PROMPT,
    silence: float = 600.0,
    until: Callable[[Reply], bool] = lambda _: False,
) -> Reply:
    """One request, read to its end, for `within` seconds at most, or until nothing came for `silence` seconds.

    An event stream is left, by closing the connection, as soon as `until` says so. Raises nothing: the reply tells.
    """
    reply = Reply(time.monotonic())
    loop = asyncio.get_running_loop()
    deadline = loop.time() + within
    try:
        async with (
            asyncio.timeout_at(deadline) as timeout,
            client.stream(method, url, headers=headers, json=body) as response,
        ):
            reply.status, reply.headers, reply.version = (
                response.status_code,
                response.headers,
                response.http_version,
            )
            streaming = reply.media_type == "text/event-stream"
            lines = Lines()
            async for piece in response.aiter_bytes():
                timeout.reschedule(min(deadline, loop.time() + silence))
                reply.body += piece
                if streaming:
                    lines.feed(piece, reply)
                    reply.ended = _told(reply)
                    if reply.ended == "cut" and until(reply):
                        reply.ended = "left"
                if reply.ended in ("done", "failed", "left") or len(reply.body) > MAX_BODY:
                    break
            if not streaming:
                reply.ended = "whole"
    except TimeoutError:
        reply.ended = "late" if loop.time() >= deadline else "silent"
        reply.problem = f"no answer within {within:.0f} s"
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        reply.problem = re.sub(r"[^ -~]", "", str(error))[:80] or type(error).__name__
    reply.ended_at = time.monotonic()
    return reply


def _told(reply: Reply) -> str:
    """How the stream says it has ended, `cut` while it has not."""
    last = reply.events[-1] if reply.events else None
    if last is None or (last.type, last.data) != ("message", DONE):
        return "failed" if last is not None and last.type == "error" else "cut"
    return "done"
