"""One resumable answer, and where the answers of other replicas are found.

Does not know HTTP, Redis, or what a frame means.
"""

import asyncio
import secrets
from itertools import count
from typing import Protocol

from chatproxy import sse
from chatproxy.errors import ChatError, InvalidRequest, StreamNotFound
from chatproxy.events import StreamSummary
from chatproxy.formats import MakeFormat, StreamFormat

STREAM_ID = r"[A-Za-z0-9_-]{22}"  # the form of their ids

# The number in the id of a failure that is a reader's own: an event after which there is nothing, whatever comes.
FINAL_EVENT_NUMBER = 2**53 - 1


class Upstream(Protocol):
    """What can be done to the completion that a stream is made of."""

    def cancel_with(self, error: Exception) -> None: ...


class ResumableStream:
    """One resumable answer, from its request until it is forgotten."""

    def __init__(
        self,
        upstream: Upstream | None,
        summary: StreamSummary,
        make_format: MakeFormat,
        key: tuple[str, str] | None,
        body_digest: bytes,
        name: str | None = None,
        id: str | None = None,
    ) -> None:
        # 128 bits: it is the ticket of whoever reads the answer.
        self.id = id or secrets.token_urlsafe(16)
        self.name = name  # another one, chosen by the client
        self.upstream = upstream  # until it has ended; of another replica's answer there is none
        self.claiming: asyncio.Event | None = asyncio.Event()  # until it is known whether its key is its own
        self.taken_by: ResumableStream | None = None  # which had the key before
        self.disowned = False  # other replicas have told an end of it
        self.over = False  # another replica's: it has ended
        self.summary = summary
        self.key = key
        self.body_digest = body_digest
        self.first_chunk_or_error = asyncio.Event()
        self.error: ChatError | None = None  # before the status was sent; or the store's
        self.status_sent = False  # whoever asked knows the id
        self.readers = 0
        self.written = 0  # frames
        self.read, self.read_to_end = 0, False  # the highest number given to any reader; whether one has taken all
        self.abandon_timer: asyncio.TimerHandle | asyncio.Task[None] | None = None
        self._make_format = make_format

    def end_claim(self) -> None:
        """It is known whether the key is its own: whoever waits to know goes on."""
        if self.claiming is not None:
            self.claiming.set()
            self.claiming = None

    def numbered_format(self) -> StreamFormat:
        """For the answer: each event has an id, numbered from 1."""
        numbers = count(1)
        return self._make_format(self.id, lambda data, type: sse.encode(data, type, f"{self.id}-{next(numbers)}"))

    def reader_format(self) -> StreamFormat:
        """For one reader: a failure of its own has an id, too, so that the reader does not come back."""
        id = f"{self.id}-{FINAL_EVENT_NUMBER}"
        return self._make_format(self.id, lambda data, type: sse.encode(data, type, id))


def other_body() -> InvalidRequest:
    """The error of a request whose key has started an answer to something else."""
    return InvalidRequest("This Idempotency-Key was used with another body.", param="Idempotency-Key")


class Directory(Protocol):
    """Finds the answers of all replicas. Whatever has to ask for it may raise StoreUnavailable."""

    async def claim(self, stream: ResumableStream) -> ResumableStream:
        """Make it known to all; or give the stream of another replica that its idempotency key has started.

        Raises InvalidRequest if that one had another body.
        """

    def release(self, stream: ResumableStream) -> None:
        """It ended before its status: whoever waits for it gets its error, and the key may be used again."""

    async def find(self, id: str) -> ResumableStream:
        """Another replica's stream. Raises StreamNotFound."""

    async def find_by_name(self, name: str, own: ResumableStream | None) -> ResumableStream | None:
        """The last stream of that name, which may be this replica's `own`; none if it has been read to its end."""

    def note_read(self, stream: ResumableStream) -> None:
        """Somebody has read it to its end."""

    async def stop(self, id: str) -> None:
        """End another replica's stream, by its id or by its name, if there is one."""

    async def has_readers(self, stream: ResumableStream) -> bool:
        """Whether other replicas have readers of this one's stream."""


class SingleReplica:
    """The Directory of a process that is alone."""

    async def claim(self, stream: ResumableStream) -> ResumableStream:
        """Nobody else has a stream."""
        return stream

    def release(self, stream: ResumableStream) -> None:
        """Nobody else waits."""

    async def find(self, id: str) -> ResumableStream:  # noqa: ARG002
        """Nobody else has one."""
        raise StreamNotFound

    async def find_by_name(self, name: str, own: ResumableStream | None) -> ResumableStream | None:  # noqa: ARG002
        """Nobody else has one."""
        return own

    def note_read(self, stream: ResumableStream) -> None:
        """Nobody else asks."""

    async def stop(self, id: str) -> None:
        """Nobody else has one."""

    async def has_readers(self, stream: ResumableStream) -> bool:  # noqa: ARG002
        """Nobody else reads."""
        return False
