"""Places: how many worker threads of an event loop may be at work, and who has one of them.

No worker waits for room in its task's stead: the task does, without one (`_wait_for_room`). A worker that waits all the
same, for another's computation, or for room in what a user computes, lends its place meanwhile. If it kept it, workers
that wait for each other could take all places, and the one that all of them wait for would find none. So the number of
workers that begin is bounded, and that of computations which wait is not.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from types import TracebackType
from typing import Any
from weakref import ref

import anyio
import anyio.lowlevel

from ..errors import WaitTimeoutError
from ..locks.deadline import lend_place

__all__ = ["Place", "call_soon_here", "has_ended_here"]


def call_soon_here() -> Callable[..., object]:
    """What calls a function on the current event loop from any thread, and from finalisers; soon, in order.

    It raises `RuntimeError` when that loop has ended.
    """
    loop: Any = anyio.lowlevel.current_token().native_token
    # asyncio's loop, or trio's token.
    found: Callable[..., object] = (
        loop.call_soon_threadsafe if hasattr(loop, "call_soon_threadsafe") else loop.run_sync_soon
    )
    return found


def has_ended_here() -> Callable[[], bool] | None:
    """What says whether the current event loop has ended; None for one that never ends with tasks in the air."""
    loop: Any = anyio.lowlevel.current_token().native_token
    if not hasattr(loop, "is_closed"):
        return None
    weak = ref(loop)  # a loop that is forgotten takes its tasks with it, if nothing keeps it alive
    return lambda: (alive := weak()) is None or alive.is_closed()


class Place:
    """One place of a limiter of the current event loop, for a worker and the task that waits for it.

    asyncio's own `cancel()` takes the task away while its worker goes on: the place is then free when the worker ends.
    Each side notes what it does in one list, whose order both of them see.
    """

    def __init__(self, limiter: anyio.CapacityLimiter) -> None:
        self._limiter = limiter
        self._call_soon = call_soon_here()
        self._noted: list[str] = []

    async def take(self, seconds: float, name: str) -> None:
        """Wait for the place; the task's side.

        Raises:
            WaitTimeoutError: none became free in time.
        """
        with suppress(anyio.WouldBlock):
            self._limiter.acquire_on_behalf_of_nowait(self)
            return
        with anyio.move_on_after(seconds):
            await self._limiter.acquire_on_behalf_of(self)
            return
        raise WaitTimeoutError(
            f"{name}: none of its event loop's {self._limiter.total_tokens:g} workers was free within {seconds:g} s"
        )

    def begin(self) -> bool:
        """The worker's side: it begins, unless the task has left; False then."""
        self._noted.append("begun")
        lend_place.set(lambda: _Lent(self._limiter, self._call_soon))  # in the context that the worker runs in
        return self._noted[0] == "begun"

    def end(self) -> None:
        """The worker's side: it has ended what it began."""
        self._noted.append("ended")
        if self._noted.index("ended") == 2:  # after "begun" and "left"
            with suppress(RuntimeError):  # of a loop that has ended
                self._call_soon(self._limiter.release_on_behalf_of, self)

    @property
    def begun(self) -> bool:
        """Whether the worker began before the task left."""
        return bool(self._noted) and self._noted[0] == "begun"

    def leave(self) -> None:
        """The task's side, on its loop: it is done with the worker, or leaves it."""
        self._noted.append("left")
        if self._noted[:2] != ["begun", "left"]:
            self._limiter.release_on_behalf_of(self)


class _Lent(AbstractContextManager[None]):
    """A place that another worker may have for the length of a `with`."""

    def __init__(self, limiter: anyio.CapacityLimiter, call_soon: Callable[..., object]) -> None:
        self._limiter = limiter
        self._call_soon = call_soon

    def __enter__(self) -> None:
        self._change(+1)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._change(-1)

    def _change(self, by: int) -> None:
        # A limiter is changed on its own loop only; one that has ended runs nothing any more.
        with suppress(RuntimeError):
            self._call_soon(_resize, self._limiter, by)


def _resize(limiter: anyio.CapacityLimiter, by: int) -> None:
    limiter.total_tokens += by
