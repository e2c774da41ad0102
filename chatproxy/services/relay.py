"""Policy: which events a client gets for Grok's, in which order, and that every answer has exactly one end.

Does not know where events come from or what they look like to a client; looks at the clock for the summary only.
"""

import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, aclosing
from typing import Protocol

from chatproxy.errors import ChatError, EmptyAnswer
from chatproxy.events import Done, Event, Failed, Finished, ReasoningDelta, Started, StreamSummary, TextDelta, ToolCall

# Events that came together, and whether they are the last.
Batch = tuple[Sequence[Event], bool]

# The same as frames.
Frames = tuple[Sequence[bytes], bool]


class EventSource(Protocol):
    """Grok's events, read by read. See `Completion`."""

    @property
    def complete(self) -> bool: ...

    @property
    def ended(self) -> bool: ...

    @property
    def finished(self) -> Finished: ...

    def __aiter__(self) -> AsyncIterator[Sequence[Event]]: ...


async def relay(
    upstream: AbstractAsyncContextManager[EventSource], summary: StreamSummary
) -> AsyncGenerator[Batch, None]:
    """Yields for each read of Grok's stream the events that came in it (maybe none), the end with the last.

    A failure before the first chunk is raised as ChatError, for there is still a status line to say it with. After it
    every failure is an event, and the last event is `Done` or `Failed`.
    """
    error: ChatError | None = None
    try:
        async with upstream as source:
            events: list[Event] = [Started(source.finished.model)]
            try:
                async for received in source:
                    for event in received:
                        if type(event) is TextDelta:
                            if not summary.deltas:
                                summary.first_token_ms = round((time.monotonic() - summary.started_at) * 1000, 1)
                            summary.deltas += 1
                            summary.text_bytes += _size(event.text)
                        else:
                            _count(event, summary)
                    events += received
                    if source.ended:
                        break
                    yield events, False
                    events = []
            except ChatError as failure:
                if not source.complete:  # what a Grok that has finished does afterwards changes nothing
                    error = failure
            finally:
                finished = source.finished
                summary.model, summary.counts = finished.model, finished.counts
            if error is None and not summary.deltas:
                error = EmptyAnswer()
            if error is None or finished.reason or finished.usage:
                events.append(finished)
            if error is None:
                events.append(Done())
                summary.close("done")
            else:
                events.append(Failed(error))
                summary.close("failed", error.code)
            error = None  # its traceback holds this frame
            yield events, True
    except ChatError as failure:
        summary.close("failed", failure.code)
        raise
    finally:
        summary.close("left")


def _count(event: Event, summary: StreamSummary) -> None:
    match event:
        case ReasoningDelta():
            summary.text_bytes += _size(event.text)
        case ToolCall(tool=tool, status="started"):
            summary.tool_calls[tool] = summary.tool_calls.get(tool, 0) + 1
        case _:
            pass


def _size(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


async def encode(
    batches: AsyncGenerator[Batch, None],
    encode_events: Callable[[Sequence[Event]], list[bytes]],
    summary: StreamSummary,
) -> AsyncGenerator[Frames, None]:
    """The same answer as frames. Raises what the format raises, which is then the end of the answer."""
    async with aclosing(batches):
        async for events, last in batches:
            try:
                frames = encode_events(events)
            except ChatError as error:
                summary.close("failed", error.code)
                raise
            yield frames, last
