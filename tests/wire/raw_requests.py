"""Requests as bytes, for what no HTTP client would send, and the whole response to one."""

import json

import httpx

from tests.conftest import HI, Caller

CHAT = json.dumps({"messages": HI}).encode()
JSON = "application/json"


def request(
    target: str = "/api/chat",
    *more: tuple[str, str],
    method: str = "POST",
    host: str | None = "localhost",
    content_type: str | None = JSON,
    length: str | None = None,
    body: bytes = CHAT,
) -> bytes:
    """A request that would start a chat, but for what is changed; `more` are headers."""
    headers = [
        *([] if host is None else [("Host", host)]),
        *([] if content_type is None else [("Content-Type", content_type)]),
        ("Content-Length", str(len(body)) if length is None else length),
        ("Connection", "close"),
        *more,
    ]
    return "\r\n".join([f"{method} {target} HTTP/1.1", *map(": ".join, headers), "", ""]).encode() + body


def chunked(body: bytes, *more: tuple[str, str]) -> bytes:
    head = request("/api/chat", ("Transfer-Encoding", "chunked"), *more, body=b"")
    return head.replace(b"Content-Length: 0\r\n", b"") + body


async def read_response(caller: Caller) -> httpx.Response:
    """The whole answer; the connection is closed after it."""
    status, *lines = (await caller.until(b"\r\n\r\n")).decode("latin-1").rstrip().split("\r\n")
    fields = [(name, text.strip()) for name, _, text in (line.partition(":") for line in lines)]
    content = b""
    if ("transfer-encoding", "chunked") in fields:
        while piece := await caller.piece():
            content += piece
    return httpx.Response(int(status.split(" ")[1]), headers=fields, content=content + await caller.rest())
