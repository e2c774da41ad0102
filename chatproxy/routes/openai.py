"""What OpenAI's SDKs ask for: POST /v1/chat/completions, and the one model there is."""

import re
import time
from functools import partial
from typing import Literal

from msgspec import Struct
from starlette.requests import Request
from starlette.responses import Response

from chatproxy.errors import InvalidLastEventID, ModelNotFound, NotFound
from chatproxy.formats.openai import decode_request
from chatproxy.routes.answers import answer
from chatproxy.routes.bodies import authenticate
from chatproxy.routes.responses import JSONResponse
from chatproxy.routes.state import AppState
from chatproxy.services.resumable import STREAM_ID


class Model(Struct):
    """The model that answers. (Nobody has told when it was made.)"""

    id: str
    object: Literal["model"] = "model"
    created: Literal[0] = 0
    owned_by: Literal["xai"] = "xai"


class ModelList(Struct):
    """All models there are: one."""

    data: list[Model]
    object: Literal["list"] = "list"


async def completions(request: Request[AppState]) -> Response:
    """Ask Grok for an answer, as OpenAI's SDKs do: as a stream of chunks, or whole."""
    if re.fullmatch(f"{STREAM_ID}-[0-9]+", request.headers.get("last-event-id", "")):
        # Whoever has seen an event of an answer must not begin, and pay, another one by coming back.
        raise InvalidLastEventID("Answers cannot be resumed here. Read on at GET /api/chat/{id}/stream.")
    settings = request.state["settings"]
    decode = partial(
        decode_request, model=settings.grok_model, created=int(time.time()), max_bytes=settings.replay_bytes
    )
    # The SDKs accept JSON for streams, too: the body tells what is wanted.
    return await answer(request, decode, as_address=False, resumable=False)


async def models(request: Request[AppState]) -> Response:
    """List the models: the one there is."""
    return JSONResponse(ModelList([await _model(request)]))


async def model(request: Request[AppState]) -> Response:
    """Describe the model."""
    known = await _model(request)
    asked = request.path_params["id"]
    if not asked:
        raise NotFound
    if asked != known.id:
        raise ModelNotFound
    return JSONResponse(known)


async def _model(request: Request[AppState]) -> Model:
    """Raises Unauthorized, for this is how some programs test a token."""
    await authenticate(request)
    return Model(request.state["settings"].grok_model)
