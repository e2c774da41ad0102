"""From a request for an answer to its response, the same for every format: who asks, limits, Grok, the stream.

Does not know httpx, xAI's addresses, what a body looks like, or how a response is written.
"""

import hashlib
from collections.abc import Callable

from msgspec import Struct
from starlette.requests import Request
from starlette.responses import Response

from chatproxy import sse
from chatproxy.errors import Draining, InvalidRequest, TooManyMessages
from chatproxy.events import StreamSummary
from chatproxy.formats import Asked, MakeFormat
from chatproxy.routes.bodies import authenticate, idempotency_key, read_body, require_json, traceparent
from chatproxy.routes.responses import EventSourceResponse, JSONResponse, while_connected
from chatproxy.routes.state import AppState
from chatproxy.routes.streams import stream_headers, stream_url
from chatproxy.services.access import Caller
from chatproxy.services.budgets import joined
from chatproxy.services.grok.completion import Completion
from chatproxy.services.limits import Admitted, BodyHold
from chatproxy.services.relay import encode, relay
from chatproxy.services.resumable import ResumableStream


class Created(Struct):
    """Where the answer streams: for `new EventSource(url)`."""

    id: str
    url: str


class Prepared(Struct):
    """An answer that may be started. The conversation is in it only as the encoded request to Grok."""

    completion: Completion
    upstream: Admitted[Completion]
    summary: StreamSummary
    make_format: MakeFormat
    resumable: bool
    name: str | None
    only_as_stream: bool
    digest: bytes  # of the request's body
    hold: BodyHold


async def answer(
    request: Request[AppState], decode: Callable[[bytes, str], Asked], *, as_address: bool, resumable: bool = True
) -> Response:
    """Start an answer, or attach to the one that the idempotency key has started.

    `decode` reads the body; `as_address` asks for the stream's address rather than for the stream; a format whose
    answers cannot be `resumable` knows no idempotency keys either. Raises ChatError or ClientDisconnected.
    """
    state = request.state
    caller = await authenticate(request)
    require_json(request)
    key = idempotency_key(request, caller) if resumable else None
    if key is None:  # with one it may be a repetition; else what is refused is so before its body is read
        if state["lifecycle"].draining:
            raise Draining
        await state["rate_limiter"].check(caller)
    prepared = await _prepare(request, caller, decode)
    as_address = as_address and not prepared.only_as_stream
    if as_address or prepared.resumable or key:
        return await _resumable(request, caller, prepared, key, as_address=as_address)

    try:
        headers = await _admit(state, caller, prepared)
    except BaseException:
        prepared.hold.release()
        raise
    summary = prepared.summary
    state["context"].summary, state["context"].owns_summary = summary, True
    format = prepared.make_format("", sse.encode)
    return EventSourceResponse(
        encode(relay(prepared.upstream, summary), format.encode, summary),
        format,
        state["settings"],
        state["metrics"],
        status_hold=state["settings"].status_hold,
        upstream=prepared.completion,
        headers=headers,
    )


async def _prepare(request: Request[AppState], caller: Caller, decode: Callable[[bytes, str], Asked]) -> Prepared:
    state, request_id = request.state, request.state["context"].request_id
    hold = state["body_memory"].hold()
    try:
        body = await read_body(request, hold)
        asked = decode(body, request_id)
        if len(asked.chat.messages) > state["settings"].max_messages:
            raise TooManyMessages(param="messages")
        for number, tool in enumerate(asked.chat.tools):
            if tool not in state["settings"].grok_tools:
                param = f"tools[{number}]"
                raise InvalidRequest(f"{param}: The operator of this service does not allow this search.", param=param)
        digest = hashlib.sha256(body).digest()
        completion = state["grok"].stream(asked.chat, traceparent(request))
    except BaseException:
        hold.release()
        raise
    summary = StreamSummary(request_id)
    summary.on_end.append(state["metrics"].count)
    upstream = Admitted(completion, state["concurrency"], caller, hold, summary)
    return Prepared(
        completion,
        upstream,
        summary,
        asked.make_format,
        asked.resumable,
        asked.name,
        asked.only_as_stream,
        digest,
        hold,
    )


async def _admit(state: AppState, caller: Caller, prepared: Prepared) -> dict[str, str]:
    """Count a new answer; gives the header fields that tell what is left. Raises ChatError, and then counts nothing.

    Tokens come first because they can be given back.
    """
    if state["lifecycle"].draining:
        raise Draining
    reservation = await state["budgets"].reserve(caller, prepared.completion.request_size, prepared.summary)
    try:
        chats = await state["rate_limiter"].acquire(caller)
    except BaseException:
        if reservation is not None:
            reservation.cancel()
        raise
    return chats if reservation is None else joined(chats, reservation.headers)


async def _resumable(
    request: Request[AppState], caller: Caller, prepared: Prepared, key: tuple[str, str] | None, *, as_address: bool
) -> Response:
    state, streams = request.state, request.state["streams"]
    headers: dict[str, str] = {}
    new = ResumableStream(
        prepared.completion, prepared.summary, prepared.make_format, key, prepared.digest, prepared.name
    )
    try:
        stream = await streams.claim(new)
        if stream is new:
            try:
                headers = await _admit(state, caller, prepared)
            except BaseException as error:
                streams.discard(new, error)
                raise
            streams.start(new, relay(prepared.upstream, prepared.summary))
        else:
            prepared.hold.release()
    except BaseException:
        prepared.hold.release()
        raise
    del prepared, new
    state["context"].summary = stream.summary
    if as_address:
        url = stream_url(request, stream)
        await while_connected(request.receive, streams.wait_for_status(stream, caller))
        return JSONResponse(Created(stream.id, url), 201, {**headers, "Location": url})
    return EventSourceResponse(
        streams.follow(stream, caller),
        stream.reader_format(),
        state["settings"],
        state["metrics"],
        headers={**headers, **stream_headers(request, stream)},
    )
