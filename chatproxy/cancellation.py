"""End another task's wait with an error of one's own choice.

As `anyio.CancelScope` does, at a tenth of its cost: it is entered once for each read of Grok's stream. Does not know
who waits, nor what for.
"""

import asyncio
from types import TracebackType


class CancellableWait:
    """A block of one task's awaits that `cancel_with` ends with an exception, from any other task or timer.

    If no task is inside, or if the task inside calls it, the error is kept and raised at the next `__enter__`. Never
    `yield` inside the block (PEP 789): wrap each await separately. A cancellation from elsewhere stays one.
    """

    __slots__ = ("_called", "_error", "_inside", "_task")

    def __init__(self) -> None:
        self._called = False
        self._error: Exception | None = None
        self._inside = False
        self._task: asyncio.Task[object] | None = None  # once it has entered

    def cancel_with(self, error: Exception) -> None:
        """Raise `error` in the block. Only the first call counts."""
        if not self._called:
            self._called = True
            self._error = error
            if self._inside and self._task is not asyncio.current_task():
                assert self._task is not None
                self._task.cancel()

    def __enter__(self) -> None:
        if self._error is not None:
            self._raise()
        if self._task is None:
            self._task = asyncio.current_task()
        self._inside = True

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self._inside = False
        if self._error is not None and kind is asyncio.CancelledError:
            assert self._task is not None
            if self._task.uncancel() == 0:
                self._raise()

    def _raise(self) -> None:
        # An error that its own traceback leads back to would wait for the garbage collector, and all that the frames
        # in between hold with it.
        error, self._error = self._error, None
        assert error is not None
        try:
            raise error from None
        finally:
            del error
