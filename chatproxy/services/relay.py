"""Policy: which events a caller gets for Grok's chunks, in which order, and how every stream ends.

Does not know where chunks come from or where events go, and looks at the clock for the report only.
"""

import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from msgspec import Raw

from chatproxy import sse
from chatproxy.errors import ChatError, EmptyAnswer
from chatproxy.metrics import Metrics
from chatproxy.schemas import Chunk, Finish, Usage, decode_usage, encode, encode_error


class Report:
    """What is known of one answer, for log and metrics: times, counts and its end, never content.

    `end` is done, failed or left; None while the answer is running.
    """

    __slots__ = ("code", "deltas", "end", "first_token_ms", "model", "request_id", "started", "usage")

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.started = time.monotonic()
        self.first_token_ms: float | None = None
        self.deltas = 0
        self.model: str | None = None
        self.usage: Usage | None = None
        self.end: str | None = None
        self.code: str | None = None

    def fail(self, error: ChatError) -> None:
        self.end, self.code = "failed", error.code

    def count(self, metrics: Metrics) -> None:
        """Add this answer, which has ended, to the metrics."""
        metrics.stream_ends(self.end or "", self.code or "").inc()
        metrics.deltas.inc(self.deltas)
        if self.first_token_ms is not None:
            metrics.time_to_first_token.observe(self.first_token_ms / 1000)
        for kind, tokens in self.tokens().items():
            if tokens:
                metrics.tokens(kind.removesuffix("_tokens")).inc(tokens)

    def tokens(self) -> dict[str, int | None]:
        """As Grok counts them: the completion's do not include the reasoning's."""
        usage = self.usage or Usage()
        details = usage.completion_tokens_details or Usage.Details()
        return {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "reasoning_tokens": details.reasoning_tokens,
        }

    def fields(self) -> dict[str, str | int | float | None]:
        return {
            "end": self.end,
            "code": self.code,
            "model": self.model,
            "first_token_ms": self.first_token_ms,
            "deltas": self.deltas,
            **self.tokens(),
        }


class Reads(Protocol):
    """The chunks of an answer, read by read; `done` once Grok has said `[DONE]`, with the last of them."""

    done: bool

    def __aiter__(self) -> AsyncIterator[list[Chunk]]: ...


Frame = Callable[[str, str | None], bytes]

# Frames to be written now, and whether they are the last.
Step = tuple[Sequence[bytes], bool]


async def relay(
    upstream: AbstractAsyncContextManager[Reads],
    report: Report,
    include: Collection[str] = (),
    frame: Frame = sse.encode,
) -> AsyncGenerator[Step, None]:
    """Yields for each read of Grok's stream the frames that came in it (maybe none), the end with the last.

    A failure before the first chunk is raised as ChatError, for there is still a status line to
    say it with. After it every failure is an event, and every end exactly one of contract B8's.
    """
    content, reasoning = sse.Text(), sse.Text()
    with_reasoning = "reasoning" in include
    finish_reason: str | None = None
    usage = Raw()
    error: ChatError | None = None
    frames: list[bytes] = []
    async with upstream as reads:
        try:
            async for chunks in reads:
                for chunk in chunks:
                    if chunk.usage and bytes(chunk.usage) != b"null":
                        usage = chunk.usage  # cumulative where it comes more than once
                    if chunk.model:
                        report.model = chunk.model
                    if not chunk.choices:
                        continue
                    choice = chunk.choices[0]
                    if choice.finish_reason:
                        finish_reason = choice.finish_reason
                    delta = choice.delta
                    if delta is None:
                        continue
                    if delta.reasoning_content and with_reasoning:
                        frames += [frame(data, "reasoning") for data in reasoning.feed(delta.reasoning_content)]
                    if delta.content:
                        if not report.deltas:
                            report.first_token_ms = round((time.monotonic() - report.started) * 1000, 1)
                        report.deltas += 1
                        for data in content.feed(delta.content):
                            frames.append(frame(data, None))
                if reads.done:
                    break
                yield frames, False
                frames = []
        except ChatError as failure:
            if finish_reason is None:  # what a Grok that has finished does afterwards changes nothing
                error = failure

        if error is None and not report.deltas:
            error = EmptyAnswer()
        report.usage = _read_usage(usage)
        if "finish" in include and (error is None or finish_reason or usage):
            finish = Finish(finish_reason, report.model, usage or Raw(b"null"))
            frames.append(frame(encode(finish).decode(), "finish"))
        if error is None:
            report.end = "done"
            frames.append(frame(sse.DONE, None))
        else:
            report.fail(error)
            frames.append(failed(error, report.request_id, frame))
        yield frames, True


def failed(error: ChatError, request_id: str, frame: Frame = sse.encode) -> bytes:
    """The frame that tells a failure after the status line."""
    return frame(encode_error(error, request_id).decode(), "error")


def _read_usage(usage: Raw) -> Usage | None:
    try:
        return decode_usage(usage) if usage else None
    except ValueError:
        return None  # not worth an error: the answer is complete
