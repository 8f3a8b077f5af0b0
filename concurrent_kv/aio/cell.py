"""`Cell`: where a worker leaves its result, or its error, and a task picks it up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

__all__ = ["Cell"]

T = TypeVar("T")


class Cell(Generic[T]):
    """Closed once by the worker and once by a task that leaves; the second of them undoes what was made.

    Takes no lock, and `undo` must take none: a task may be left by its finaliser, at any point of any thread, the
    worker's inside `deliver` too.

    An error goes this way too: one that is raised in a worker of asyncio's or trio's stays in a circle of theirs, with
    all the frames that it came through, until the garbage collector comes.
    """

    def __init__(self, undo: Callable[[T], object] | None) -> None:
        self._undo = undo
        self._closed_by: list[str] = []  # in the order of their coming
        self._result: T | None = None
        self._errors: list[Exception] = []

    def deliver(self, result: T) -> None:
        """The worker's side. Undoes the result if the task has left."""
        self._result = result
        self._closed_by.append("worker")
        if self._closed_by[0] == "task":
            self._drop()

    def fail(self, error: Exception) -> bool:
        """The worker's side, where the operation raised. It goes unheard if the task has left; False then."""
        self._errors.append(error)
        self._closed_by.append("worker that failed")
        if self._closed_by[0] == "task":
            self._errors.clear()
            return False
        return True

    def leave(self) -> None:
        """The task's side, when it was cancelled. Undoes a result that is there already."""
        self._closed_by.append("task")
        self._errors.clear()
        if self._closed_by[0] == "worker":
            self._drop()

    def take(self) -> T:
        """The task's side, when the worker has ended: its result, or its error raised."""
        if self._errors:
            raise self._errors.pop()  # from here on the frames that it comes through keep it alive no more
        return self._result  # type: ignore[return-value]

    def _drop(self) -> None:
        result, self._result = self._result, None
        if self._undo is not None:
            self._undo(result)  # type: ignore[arg-type]
