"""Resumable streams by their id, or by the chat's: GET reads on, DELETE and POST .../stop end the answer."""

import re
from collections.abc import AsyncGenerator
from contextlib import aclosing

from starlette.requests import Request
from starlette.responses import Response

from chatproxy.errors import ChatError, StreamNotFound
from chatproxy.formats.plain import Plain
from chatproxy.routes.responses import EventSourceResponse
from chatproxy.routes.state import AppState
from chatproxy.services.access import anonymous
from chatproxy.services.relay import Frames
from chatproxy.services.resumable import STREAM_ID, ResumableStream


async def stream(request: Request[AppState]) -> Response:
    """Read an answer from its start, or what lies after the last event ID."""
    streams, id = request.state["streams"], request.path_params["id"]
    if re.fullmatch(STREAM_ID, id):
        found = await streams.find(id)
    elif (named := await streams.find_by_name(id)) is not None:
        found = named
    else:
        # `useChat` asks on every page load, by its chat's id, and takes anything but this for an error.
        return Response(status_code=204)
    last_event_id = request.headers.get("last-event-id") or request.query_params.get("lastEventId")
    after, more = await streams.parse_last_event_id(found, last_event_id or f"{found.id}-0")
    if not more:
        return Response(status_code=204)
    if request.method == "HEAD":
        format = found.reader_format()
        return Response(headers={"Content-Type": format.content_type.decode(), **format.headers})
    return _replay(request, found, after)


async def stop(request: Request[AppState]) -> Response:
    """End an answer at once; the same if it has ended, or is unknown."""
    await request.state["streams"].stop(request.path_params["id"])
    return Response(status_code=204)


async def resume_post(request: Request[AppState], last_event_id: str) -> Response:
    """What fetch-event-source sends when it reconnects. It retries any answer but a stream for ever."""
    state, streams = request.state, request.state["streams"]
    try:
        found = await streams.find(last_event_id.rpartition("-")[0])
        after, _ = await streams.parse_last_event_id(found, last_event_id)
    except ChatError as error:
        format = Plain(state["context"].request_id)
        failure = StreamNotFound() if error.status < 500 else error
        frames = _only(format.encode_failure(failure))
        return EventSourceResponse(frames, format, state["settings"], state["metrics"])
    return _replay(request, found, after, repeat_last=True)


def stream_url(request: Request[AppState], stream: ResumableStream) -> str:
    """The address of a stream, as the client sees it."""
    return f"{request.scope['root_path']}/api/chat/{stream.id}/stream"


def stream_headers(request: Request[AppState], stream: ResumableStream) -> dict[str, str]:
    """Where a resumable answer can be read again: as an address, and as the id that assistant-ui looks for."""
    return {"Content-Location": stream_url(request, stream), "X-Resumable-Stream-Id": stream.id}


def _replay(request: Request[AppState], stream: ResumableStream, after: int, *, repeat_last: bool = False) -> Response:
    state = request.state
    state["context"].summary = stream.summary
    caller = anonymous(request.client.host if request.client else None)
    frames = state["streams"].replay(stream, after, caller)
    return EventSourceResponse(
        _or_last(frames, state["streams"].replay(stream, after - 1, caller)) if repeat_last else frames,
        stream.reader_format(),
        state["settings"],
        state["metrics"],
        headers=stream_headers(request, stream),
    )


async def _or_last(
    frames: AsyncGenerator[Frames, None], last: AsyncGenerator[Frames, None]
) -> AsyncGenerator[Frames, None]:
    """The last event again where nothing comes, for a reader who has not understood that it was the last."""
    given = 0
    async with aclosing(frames), aclosing(last):
        async for batch in frames:
            given += len(batch[0])
            yield batch
        if given == 1:  # the hint how to reconnect
            async for batch in last:
                yield batch


async def _only(frames: list[bytes]) -> AsyncGenerator[Frames, None]:
    yield frames, True
