"""Where a task's computations run: on its loop's own thread, or in worker threads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

import anyio
import anyio.to_thread

T = TypeVar("T")


class Runner(Protocol):
    """Runs a function for a task."""

    async def __call__(self, work: Callable[..., T], *args: object) -> T:
        """What `work(*args)` returns."""
        ...


async def on_the_loop(work: Callable[..., T], *args: object) -> T:
    """Run it at once; the loop's other tasks wait meanwhile."""
    return work(*args)


class InThreads:
    """Runs functions in at most so many worker threads. Belongs to the event loop that uses it."""

    def __init__(self, threads: int) -> None:
        self._limiter = anyio.CapacityLimiter(threads)

    async def __call__(self, work: Callable[..., T], *args: object) -> T:
        """Run it while the loop goes on."""
        return await anyio.to_thread.run_sync(work, *args, limiter=self._limiter)
