"""Places: how many worker threads of an event loop may be at work, and who has one of them.

Those for what users compute are lent to others by who waits inside a computation.
A computation may ask for another key and wait for it. If it kept its place meanwhile, computations that wait for each
other could take all places, and the one that all of them wait for would find none. So the number of computations that
run is bounded, and that of those which wait is not.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, asynccontextmanager, suppress
from types import TracebackType
from typing import Any

import anyio
import anyio.lowlevel

from ..errors import WaitTimeoutError
from ..flight_waiting import lend_place

__all__ = ["call_soon_here", "holding", "taken"]


@asynccontextmanager
async def taken(limiter: anyio.CapacityLimiter, seconds: float, name: str) -> AsyncIterator[None]:
    """Hold a place of `limiter`, of the current event loop.

    Raises:
        WaitTimeoutError: none became free in time.
    """
    borrower = object()
    try:
        limiter.acquire_on_behalf_of_nowait(borrower)
    except anyio.WouldBlock:
        acquired = False
        with anyio.move_on_after(seconds):
            await limiter.acquire_on_behalf_of(borrower)
            acquired = True
        if not acquired:
            raise WaitTimeoutError(
                f"{name}: none of its event loop's {limiter.total_tokens:g} workers was free within {seconds:g} s"
            ) from None
    try:
        yield
    finally:
        limiter.release_on_behalf_of(borrower)


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


def holding(limiter: anyio.CapacityLimiter, operation: Callable[[], Any]) -> Callable[[], Any]:
    """`operation`, to be run by a worker that holds a place of `limiter`, which belongs to the current event loop."""
    call_soon = call_soon_here()

    def run() -> Any:
        lend_place.set(lambda: _Lent(limiter, call_soon))  # in the copy of the context that a worker runs in
        return operation()

    return run


class _Lent(AbstractContextManager[None]):
    """A place that somebody else may have for the length of a `with`."""

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
