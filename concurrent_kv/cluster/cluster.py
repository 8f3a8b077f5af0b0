"""`Cluster`: the calls of a program that searches on hosts, wherever they are."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from abc import abstractmethod
from collections.abc import Coroutine, Hashable
from concurrent.futures import Future
from typing import Any, TypeVar

from .._checks import check_seconds, hash_of, positive_int
from ..errors import InvalidTypeError, ReentrantCallError, shown
from ..pool.handle import Handle
from .errors import HostLostError, NoAnswerError, NotHereError, PlannersOwnError
from .requests import ClusterStats, Planner, Request
from .router import Route

__all__ = ["Cluster", "in_time", "loop_of_this_process"]

T = TypeVar("T")

PAUSE_SECONDS = 0.01  # before a caller looks again for an environment that was not where it should be


class Cluster(Handle):
    """Searches of many environments, each of which one host has and keeps.

    Threads, and tasks of any asyncio loop, may share one. Every wait is bounded.

    Args:
        timeout: seconds that a call waits, where it is given none.
        retries: of a search whose host is lost, on the host that is made in its place.
        start_timeout: seconds that a host may take until it serves.
    """

    instead_of_copy = "share the one object between threads"

    def __init__(self, *, timeout: float = 60.0, retries: int = 3, start_timeout: float = 120.0) -> None:
        self.start_timeout = check_seconds("start_timeout", start_timeout)
        self.timeout = check_seconds("timeout", timeout)
        self.retries = positive_int("retries", retries, minimum=0)
        self._routes: dict[Hashable, Route] = {}  # as this handle knows them; a host refuses what is not its own

    @abstractmethod
    async def _ask_router(self, method: str, *args: Any, seconds: float) -> Any:
        """What the router's method returns or raises. Its work goes on where the caller has stopped waiting."""

    def _check_name(self, env_id: Hashable) -> None:
        """Raises `InvalidArgumentError` where other processes could not find an environment by this name."""

    # Searches --------------------------------------------------------------------------------------------------------

    def submit(
        self,
        env_id: Hashable,
        planner: Planner,
        *args: Any,
        timeout: float | None = None,
        retries: int | None = None,
    ) -> Future[Any]:
        """A future of what `planner(context, *args)` returns or raises at the environment's host. Never blocks.

        Args:
            env_id: any hashable; an environment that is new gets a host that has room.
            planner: a whole search; see `SearchContext` for what it has. In a cluster of processes it has to be
                picklable, and so have its arguments, its result and its errors.
            timeout: seconds until the answer.
            retries: where the host is lost: 0 for a planner that must not run twice, even where new weights ended it;
                its caller hears `SearchEndedError` then.

        The future's errors: what the planner raises; `QueueFullError`, `NoHostError`, `ClosedError`; `HostLostError`:
            the host was lost once more than `retries`; `NoAnswerError`, a `WaitTimeoutError`: no answer came in time.
        """
        hash_of(env_id, "env_id")
        self._check_name(env_id)
        if not callable(planner):
            raise InvalidTypeError(f"planner must be callable, got {shown(planner)}")
        seconds = self.timeout if timeout is None else check_seconds("timeout", timeout)
        most = self.retries if retries is None else positive_int("retries", retries, minimum=0)
        return started(self._search(env_id, planner, args, seconds, most))

    def search(
        self,
        env_id: Hashable,
        planner: Planner,
        *args: Any,
        timeout: float | None = None,
        retries: int | None = None,
    ) -> Any:
        """As `submit`, and waits for it. May block."""
        return waited_for(self.submit(env_id, planner, *args, timeout=timeout, retries=retries))

    async def search_async(
        self,
        env_id: Hashable,
        planner: Planner,
        *args: Any,
        timeout: float | None = None,
        retries: int | None = None,
    ) -> Any:
        """As `search`, for tasks of asyncio."""
        return await asyncio.wrap_future(self.submit(env_id, planner, *args, timeout=timeout, retries=retries))

    async def _search(
        self, env_id: Hashable, planner: Planner, args: tuple[Any, ...], seconds: float, retries: int
    ) -> Any:
        until = time.monotonic() + seconds
        attempts = strayed = 0

        def left() -> float:
            remaining = until - time.monotonic()
            if remaining <= 0:
                raise NoAnswerError(f"the search of {env_id!r} had no answer within {seconds:g} s")
            return remaining

        while True:
            # Where nothing may be tried twice, a route from before its host was made again must not cost the one try.
            route = self._routes.get(env_id) if retries else None
            if route is None:
                route = self._routes[env_id] = await self._ask_router("route", env_id, seconds=left())
            try:
                return await route.link.ask(
                    "submit", Request(env_id, planner, args, left(), not retries), seconds=left()
                )
            except PlannersOwnError as own:
                raise own.error from own.error.__cause__ if own.__cause__ is own.error else own.__cause__
            except NotHereError:
                strayed += 1
                self._forget(env_id, route)
                await asyncio.sleep(min(PAUSE_SECONDS * strayed, left()))
            except HostLostError as error:
                attempts += 1
                self._forget(env_id, route)
                lost = self._ask_router("lost", route.host, route.incarnation, seconds=max(left(), self.start_timeout))
                if attempts > retries:
                    started(lost).add_done_callback(lambda done: done.exception())
                    raise HostLostError(
                        f"{route.host} was lost during the search of {env_id!r}, {attempts} time(s): {error}",
                        host=route.host,
                        attempts=attempts,
                    ) from None
                await in_time(asyncio.ensure_future(lost), left(), "the router")

    def _forget(self, env_id: Hashable, route: Route) -> None:
        if self._routes.get(env_id) is route:
            del self._routes[env_id]

    # Weights, hosts, environments ------------------------------------------------------------------------------------

    def load_weights(self, weights: Any, *, timeout: float | None = None) -> int:
        """Have every host load weights, and return their version. May block.

        Searches that are open end, and are run again with the new weights; every entry is a miss from now on. When this
        returns, every search that begins is one of these weights. A host whose planners do not end within `timeout` is
        made again with them.

        Raises what `load` raises at the first host that tries them: then nothing has changed, but for that host's
            entries. HostLostError: a host could not be made again.
        """
        seconds = self._seconds(timeout)
        return int(self._call("load_weights", weights, seconds, waits=3 * seconds + self.start_timeout))

    def stats(self, *, timeout: float = 5.0) -> ClusterStats:
        """Of each host, None for one that does not answer in time; `.total` of all. May block."""
        seconds = check_seconds("timeout", timeout)
        stats: ClusterStats = self._call("stats", seconds, waits=seconds + self.timeout)
        return stats

    def environments(self) -> dict[Hashable, str]:
        """The host of each environment. May block."""
        found: dict[Hashable, str] = self._call("environments", waits=self.timeout)
        return found

    def move(self, env_id: Hashable, host: str, *, timeout: float | None = None) -> None:
        """Have another host keep an environment, with its roots. Waits for its search to end. May block.

        Raises:
            WaitTimeoutError: its search did not end in time; it stays where it is.
            NoHostError: that host is full or is being drained. InvalidArgumentError: there is no such host.
        """
        seconds = self._seconds(timeout)
        self._call("move", env_id, host, seconds, waits=seconds + self.start_timeout)

    def forget(self, env_id: Hashable, *, timeout: float | None = None) -> None:
        """Let go of an environment that has ended: its host has room for another. Waits for its search. May block.

        Raises:
            WaitTimeoutError: its search did not end in time; it stays.
        """
        seconds = self._seconds(timeout)
        self._call("forget", env_id, seconds, waits=seconds + self.start_timeout)
        self._routes.pop(env_id, None)

    def add_host(self) -> str:
        """The name of one host more, for environments that are new or moved to it. May block."""
        return str(self._call("add_hosts", 1, waits=self.timeout + self.start_timeout)[0])

    def drain(self, host: str, *, timeout: float | None = None) -> None:
        """Move every environment of a host to the others; it gets no new ones. May block. Raises as `move` does."""
        seconds = self._seconds(timeout)
        self._call("drain", host, seconds, waits=seconds + self.start_timeout)

    def remove_host(self, host: str, *, timeout: float | None = None) -> None:
        """Drain a host, then end it. May block. Raises as `move` does."""
        seconds = self._seconds(timeout)
        self._call("remove_host", host, seconds, waits=seconds + self.start_timeout)

    def check_integrity(self) -> dict[str, str]:
        """Have every host's manager recount everything, at a quiet moment; raises what one finds. May block."""
        reports: dict[str, str] = self._call("check_integrity", self.timeout, waits=self.timeout)
        return reports

    def _seconds(self, timeout: float | None) -> float:
        return self.timeout if timeout is None else check_seconds("timeout", timeout)

    def _call(self, method: str, *args: Any, waits: float) -> Any:
        return waited_for(started(self._ask_router(method, *args, seconds=waits)))


# The loop that all clusters of a process share -----------------------------------------------------------------------

_lock = threading.Lock()
_loop: tuple[int, asyncio.AbstractEventLoop, threading.Thread] | None = None


def loop_of_this_process() -> asyncio.AbstractEventLoop:
    """An event loop that a thread of this process runs, for what clusters wait for; made at the first call."""
    return _loop_and_thread()[0]


def _loop_and_thread() -> tuple[asyncio.AbstractEventLoop, threading.Thread]:
    global _loop
    with _lock:
        # A forked child has the loop of its parent, and no thread that runs it.
        if _loop is None or _loop[0] != os.getpid():
            loop = asyncio.new_event_loop()
            thread = threading.Thread(target=loop.run_forever, name="concurrent_kv cluster", daemon=True)
            thread.start()
            _loop = (os.getpid(), loop, thread)
        return _loop[1], _loop[2]


def started(coroutine: Coroutine[Any, Any, T]) -> Future[T]:
    """A future of a coroutine that the process' loop runs."""
    return asyncio.run_coroutine_threadsafe(coroutine, loop_of_this_process())


def waited_for(future: Future[T]) -> T:
    """Its result. What it waits for is bounded already."""
    if threading.current_thread() is _loop_and_thread()[1]:
        future.cancel()
        raise ReentrantCallError("a callback of a cluster's future asked the cluster, and would wait for itself")
    try:
        return future.result()
    finally:
        future.cancel()  # where the caller was interrupted


async def in_time(awaitable: asyncio.Future[T], seconds: float, what: str) -> T:
    """The result of a future, or `NoAnswerError`; then, or where the caller is cancelled, it is cancelled."""
    try:
        # Not wait_for: a TimeoutError that the future itself has could not be told from its own.
        done, _ = await asyncio.wait({awaitable}, timeout=seconds)
    except asyncio.CancelledError:
        awaitable.cancel()
        raise
    if not done:
        awaitable.cancel()
        raise NoAnswerError(f"{what} had not answered within {seconds:.3g} s (timeout=)")
    return awaitable.result()
