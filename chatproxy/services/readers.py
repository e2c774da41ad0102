"""Who reads which resumable stream, and what happens when nobody does any more."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from chatproxy.errors import Abandoned
from chatproxy.services.access import Caller
from chatproxy.services.limits import ReaderLimit
from chatproxy.services.resumable import Directory, ResumableStream

# Seconds between two looks at whether other replicas still have readers of an answer that nobody reads here.
UNREAD_CHECK = 1.0


class Readers:
    """The readers that this process has. What none of them reads is cancelled after the resume window, in seconds."""

    def __init__(self, limit: ReaderLimit, resume_window: float, directory: Directory) -> None:
        self._limit = limit
        self._resume_window = resume_window
        self._directory = directory
        self._tasks: set[asyncio.Task[None]] = set()

    @contextmanager
    def attached(self, stream: ResumableStream, caller: Caller) -> Iterator[None]:
        """Inside it, somebody reads. Raises ChatError."""
        with self._limit.reading(stream.id, caller):
            stream.readers += 1
            if stream.abandon_timer:
                stream.abandon_timer.cancel()
            try:
                yield
            finally:
                stream.readers -= 1
                self.left(stream)

    def left(self, stream: ResumableStream) -> None:
        """Somebody has left, here or elsewhere."""
        if not stream.readers and stream.upstream is not None:
            if stream.abandon_timer:
                stream.abandon_timer.cancel()
            # Whoever left before the status, and gave no key or name, has no way to come back.
            can_return = not stream.disowned and (stream.status_sent or stream.key or stream.name)
            window = self._resume_window if can_return else 0
            stream.abandon_timer = asyncio.get_running_loop().call_later(window, self._abandon, stream, window)

    def _abandon(self, stream: ResumableStream, window: float) -> None:
        task = stream.abandon_timer = asyncio.create_task(self._abandon_unless_read(stream, window))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _abandon_unless_read(self, stream: ResumableStream, window: float) -> None:
        while window and await self._directory.has_readers(stream):
            while await self._directory.has_readers(stream):  # noqa: ASYNC110 -- nobody tells when they leave
                await asyncio.sleep(UNREAD_CHECK)
            await asyncio.sleep(window)
        if stream.upstream is not None:
            stream.upstream.cancel_with(Abandoned())

    def close(self) -> None:
        """Look after nothing any more."""
        for task in self._tasks:
            task.cancel()
