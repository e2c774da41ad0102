"""A request's body and head fields, read and bounded. Does not know what is in the body."""

import asyncio
import re

from starlette.requests import ClientDisconnect, Request

from chatproxy.errors import BodyTimeout, BodyTooLarge, InvalidRequest, UnsupportedMediaType
from chatproxy.routes.responses import ClientDisconnected
from chatproxy.routes.state import AppState
from chatproxy.services.access import Caller
from chatproxy.services.limits import BodyHold

# Characters.
MAX_IDEMPOTENCY_KEY = 255

# W3C Trace Context, section 3.2.2.
_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")

# RFC 8259, 8.1: a parser may ignore it.
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def require_json(request: Request[AppState]) -> None:
    """Raises UnsupportedMediaType for a body that is not plain JSON."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    coding = request.headers.get("content-encoding", "identity").strip().lower()
    if media_type != "application/json" or coding != "identity":
        raise UnsupportedMediaType


async def read_body(request: Request[AppState], hold: BodyHold) -> bytes:
    """The body, counted in `hold`.

    Raises BodyTooLarge or Busy as soon as that is known, BodyTimeout, or ClientDisconnected.
    """
    limit = request.state["settings"].max_body_bytes
    if int(request.headers.get("content-length", "0")) > limit:
        raise BodyTooLarge
    pieces: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(request.state["timing"].body_timeout):
            async for piece in request.stream():
                size += len(piece)
                hold.grow(len(piece))
                if size > limit:
                    raise BodyTooLarge
                pieces.append(piece)
    except TimeoutError:
        raise BodyTimeout from None
    except ClientDisconnect:
        raise ClientDisconnected(asyncio.get_running_loop().time()) from None
    return b"".join(pieces).removeprefix(_BYTE_ORDER_MARK)


async def authenticate(request: Request[AppState]) -> Caller:
    """Who sends a request. Raises Unauthorized or AuthUnavailable."""
    context, address = request.state["context"], request.client.host if request.client else None
    caller = await request.state["authenticator"].authenticate(request.headers, address, context.peer)
    context.client = caller.label
    return caller


def idempotency_key(request: Request[AppState], caller: Caller) -> tuple[str, str] | None:
    """The key and whose it is. Raises InvalidRequest."""
    key = request.headers.get("idempotency-key")
    if not key:
        return None
    if len(key) > MAX_IDEMPOTENCY_KEY:
        raise InvalidRequest(f"Idempotency-Key is longer than {MAX_IDEMPOTENCY_KEY}.", param="Idempotency-Key")
    return caller.scope, key


def traceparent(request: Request[AppState]) -> str | None:
    """The request's trace, if it is well formed."""
    given = request.headers.get("traceparent", "")
    return given if _TRACEPARENT.fullmatch(given) else None
