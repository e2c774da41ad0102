"""POST /api/chat: what the Accept header and the body's shape ask for, and what a client sends that comes back."""

import re
from functools import lru_cache
from typing import Literal

from starlette.requests import Request
from starlette.responses import Response

from chatproxy.errors import NotAcceptable
from chatproxy.formats import Asked, plain, ui_messages
from chatproxy.routes.answers import answer
from chatproxy.routes.state import AppState
from chatproxy.routes.streams import resume_post

# Characters. Browsers send less; longer ones are not remembered, and mean nothing more.
MAX_ACCEPT = 1000


async def chat(request: Request[AppState]) -> Response:
    """Ask Grok for an answer: as a stream, or as the stream's address."""
    if last_event_id := request.headers.get("last-event-id"):
        return await resume_post(request, last_event_id)
    wanted = negotiate(",".join(request.headers.getlist("accept"))[:MAX_ACCEPT])
    return await answer(request, decode_body, as_address=wanted == "address")


def decode_body(body: bytes, request_id: str) -> Asked:
    """What a body asks for, in the format whose shape it has. Raises InvalidJSON or InvalidRequest."""
    decode = ui_messages.decode_request if ui_messages.recognizes(body) else plain.decode_request
    return decode(body, request_id)


@lru_cache(64)
def negotiate(accept: str) -> Literal["stream", "address"]:
    """What an Accept header asks for. Raises NotAcceptable."""
    ranges = (part.replace(" ", "").lower() for part in accept.split(","))
    accepted = {part.partition(";")[0] for part in ranges if not re.search(r";q=0(\.0*)?(;|$)", part)} - {""}
    if not accepted or "text/event-stream" in accepted:
        return "stream"
    if "application/json" in accepted:
        return "address"
    if accepted & {"*/*", "text/*"}:
        return "stream"
    raise NotAcceptable
