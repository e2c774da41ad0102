"""End somebody else's wait with an error of one's own.

Does not know who waits, nor what for.
"""

import asyncio
from types import TracebackType


class Interruptible:
    """A region of one task's awaits that `interrupt` can end with an exception, from any other task or timer.

    An interrupt from outside of the region, or by whoever is in it, is kept for the next entry.
    The region must not hold a `yield` (PEP 789): enter it around each wait. A cancellation from
    elsewhere stays one.
    """

    __slots__ = ("_error", "_inside", "_task")

    def __init__(self) -> None:
        self._error: Exception | None = None
        self._inside = False
        self._task: asyncio.Task[object] | None = None  # once it has entered

    def interrupt(self, error: Exception) -> None:
        """Raise `error` in the region. Only the first call counts."""
        if self._error is None:
            self._error = error
            if self._inside and self._task is not asyncio.current_task():
                assert self._task is not None
                self._task.cancel()

    def __enter__(self) -> None:
        if self._error is not None:
            raise self._error
        if self._task is None:
            self._task = asyncio.current_task()
        self._inside = True

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self._inside = False
        if self._error is not None and kind is asyncio.CancelledError:
            assert self._task is not None
            if self._task.uncancel() == 0:
                raise self._error from None
