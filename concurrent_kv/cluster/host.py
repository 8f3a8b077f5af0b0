"""`Host`: one device's model, cache and evaluator, and the threads that run whole searches over them."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Hashable, Iterable
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from typing import Any

from .._checks import positive_int
from ..errors import ClosedError, InvalidTypeError, KVCacheError, WaitTimeoutError, shown
from ..pool.handle import Handle
from .errors import HostLostError, NoHostError, NotHereError, PlannerError, PlannersOwnError, QueueFullError
from .requests import HostParts, HostStats, Request, Roots, SearchContext, Setup

__all__ = ["Host", "answer_of"]


class _Pending:
    """A request that waits or runs. `started` says that its future is no longer the caller's to cancel."""

    __slots__ = ("future", "loads", "request", "started", "until")

    def __init__(self, request: Request) -> None:
        self.request = request
        self.future: Future[Any] = Future()
        self.until = time.monotonic() + request.seconds
        self.started = False
        self.loads = 0  # of weights, when it began

    def is_wanted(self) -> bool:
        """Whether somebody waits for it; from the first yes on it cannot be cancelled."""
        if not self.started:
            self.started = self.future.set_running_or_notify_cancel()
        return self.started


class Host(Handle):
    """Owns what `setup` makes, and runs the searches of its environments in threads of its own.

    Of one environment one search runs at a time, in the order in which they were asked for; environments that wait take
    turns. The searches of several environments run side by side, so that their leaves meet in the evaluator.

    Args:
        name: what errors call it.
        setup: makes its parts.
        threads: searches that run side by side.
        max_waiting: requests that may wait, over all environments. One that has none waiting may always have one more.
        env_ids: environments that it has from the beginning.
        weights, version: loaded before it serves, unless the version is 0.
    """

    instead_of_copy = "share the cluster, which can be pickled"

    def __init__(
        self,
        name: str,
        setup: Setup,
        *,
        threads: int = 4,
        max_waiting: int = 256,
        env_ids: Iterable[Hashable] = (),
        weights: Any = None,
        version: int = 0,
    ) -> None:
        self.name = name
        self._max_waiting = positive_int("max_waiting", max_waiting)
        parts = setup()
        if not isinstance(parts, HostParts):
            raise InvalidTypeError(f"setup must return HostParts, got {shown(parts)}")
        self._parts = parts
        if version:
            _load(parts, weights)
        # Guards everything below; threads wait on it for work, and whoever empties a host for searches to end.
        self._changed = threading.Condition()
        self._version = version
        self._loads = 0  # begun
        self._paused = False
        self._lost: str | None = None  # why it serves no more
        self._local: dict[Hashable, int] = {}
        self._free = list(range(parts.manager.env_num))
        self._waiting: dict[Hashable, deque[_Pending]] = {}
        self._turns: deque[Hashable] = deque()  # environments of which a request waits and none runs
        self._running: dict[Hashable, _Pending] = {}
        self._leaving: set[Hashable] = set()  # environments whose searches do not begin, as they are being released
        self._counts = dict.fromkeys(("searches", "errors", "reruns", "refused", "expired"), 0)
        for env_id in env_ids:
            self.admit(env_id)
        for number in range(positive_int("threads", threads)):
            threading.Thread(target=self._work, name=f"{name} searches {number}", daemon=True).start()

    # Requests --------------------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> Future[Any]:
        """A future of what the request's planner returns or raises. Never blocks.

        Raises:
            NotHereError: the environment is not, or no longer, this host's.
            QueueFullError: too many wait. HostLostError: the host serves no more. ClosedError.
        """
        expired: list[_Pending] = []
        try:
            with self._changed:
                self._check_serves()
                env_id = request.env_id
                if env_id not in self._local:
                    raise self._not_here(env_id)
                if self._is_full_for(env_id):
                    expired = self._drop_unwanted()
                if self._is_full_for(env_id):
                    self._counts["refused"] += 1
                    raise QueueFullError(
                        f"{self._max_waiting} requests wait at {self.name} already, which is max_waiting: ask again "
                        "later, or have more hosts",
                        host=self.name,
                        limit=self._max_waiting,
                    )
                pending = _Pending(request)
                self._waiting.setdefault(env_id, deque()).append(pending)
                self._note_turn(env_id)
                self._changed.notify_all()
        finally:
            for each in expired:
                self._expire(each)
        return pending.future

    def _number_waiting(self) -> int:
        return sum(map(len, self._waiting.values()))

    def _is_full_for(self, env_id: Hashable) -> bool:
        # An environment that asks for one search after the other is not refused because of one that floods its host.
        return bool(self._waiting.get(env_id)) and self._number_waiting() >= self._max_waiting

    def _note_turn(self, env_id: Hashable) -> None:
        is_busy = env_id in self._running or env_id in self._leaving
        if self._waiting.get(env_id) and not is_busy and env_id not in self._turns:
            self._turns.append(env_id)

    def _drop_unwanted(self) -> list[_Pending]:
        """Make room: take out requests that no caller waits for any more. They are the caller's, to `_expire`."""
        now = time.monotonic()
        unwanted: list[_Pending] = []
        for env_id, queue in self._waiting.items():
            kept = deque[_Pending]()
            for pending in queue:
                if pending.until <= now or pending.future.cancelled():
                    unwanted.append(pending)
                else:
                    kept.append(pending)
            self._waiting[env_id] = kept
        self._counts["expired"] += len(unwanted)
        return unwanted

    def _expire(self, pending: _Pending) -> None:
        """Say so to its caller, whose callbacks this thread runs: no lock held."""
        if pending.is_wanted():
            pending.future.set_exception(
                WaitTimeoutError(
                    f"a search of {pending.request.env_id!r} did not begin at {self.name} within "
                    f"{pending.request.seconds:g} s"
                )
            )

    def _not_here(self, env_id: Hashable) -> NotHereError:
        return NotHereError(f"{self.name} does not have the environment {env_id!r}")

    def _check_serves(self) -> None:
        if self._lost is not None:
            raise self._lost_error()

    def _lost_error(self) -> HostLostError:
        return HostLostError(f"{self.name} serves no more: {self._lost}", host=self.name)

    # Threads ---------------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while (pending := self._take()) is not None:
            self._run(pending)
            del pending

    def _take(self) -> _Pending | None:
        """The next request, which runs then; None when there will be no more."""
        while (found := self._next()) is not None:
            pending, is_running = found
            if is_running:
                return pending
            self._expire(pending)
        return None

    def _next(self) -> tuple[_Pending, bool] | None:
        """The next request, and whether it runs from now on or is too old. None when there will be no more."""
        with self._changed:
            while self._lost is None:
                if self._paused or not self._turns:
                    self._changed.wait()
                    continue
                env_id = self._turns.popleft()
                queue = self._waiting.get(env_id)
                if not queue:
                    continue
                pending = queue.popleft()
                if pending.until <= time.monotonic():
                    self._counts["expired"] += 1
                    self._note_turn(env_id)
                    return pending, False
                if pending.is_wanted():
                    pending.loads = self._loads
                    self._running[env_id] = pending
                    return pending, True
                self._note_turn(env_id)
            return None

    def _run(self, pending: _Pending) -> None:
        request = pending.request
        context = SearchContext(
            request.env_id, self._local[request.env_id], self._parts, self._version, self.name, pending.until
        )
        result: Any = None
        error: Exception | None = None
        try:
            result = request.planner(context, *request.args)
        except BaseException as raised:
            # SystemExit would end this thread, and be heard by nobody; no task can raise the other two.
            if isinstance(raised, Exception) and not isinstance(raised, (StopIteration, CancelledError)):
                error = raised
            else:
                error = PlannerError(
                    f"the planner raised {type(raised).__name__}: {raised}", kind=type(raised).__name__
                )
            if isinstance(error, (HostLostError, NotHereError)):  # of another cluster, say: not of this host
                error = PlannersOwnError(error)
        with self._changed:
            if self._lost is not None and isinstance(error, ClosedError):
                error = self._lost_error()
            del self._running[request.env_id]
            # The weights changed under it: its search was ended, or a root that it had just stored was a miss.
            is_outdated = isinstance(error, KVCacheError) and pending.loads != self._loads
            again = is_outdated and not request.once and self._lost is None
            if again:
                self._counts["reruns"] += 1
                self._waiting.setdefault(request.env_id, deque()).appendleft(pending)
            else:
                self._counts["searches"] += 1
                self._counts["errors"] += error is not None
            self._note_turn(request.env_id)
            self._changed.notify_all()
        if again:
            return
        if error is not None:
            pending.future.set_exception(error)
        else:
            pending.future.set_result(result)

    # Environments ----------------------------------------------------------------------------------------------------

    def admit(self, env_id: Hashable, roots: Roots | None = None) -> None:
        """Have an environment from now on, with entries that another host had of it. May block.

        Entries of other weights are left out, and so is what does not fit: the planner computes it anew.

        Raises:
            NoHostError: the manager has no init pool left for it.
        """
        with self._changed:
            self._check_serves()
            if env_id not in self._local:
                if not self._free:
                    raise NoHostError(
                        f"{self.name} has {len(self._local)} environments, as many as its manager's env_num"
                    )
                self._local[env_id] = self._free.pop(0)
            local_id, version = self._local[env_id], self._version
        if roots is None or roots.version != version:
            return
        # No search of it runs yet: the cluster names its host when this has returned.
        for key, kv, side in roots.entries:
            with suppress(Exception):
                self._parts.manager.set_init_cache(local_id, key, kv, side=side)

    def release(self, env_id: Hashable, timeout: float) -> Roots:
        """Have an environment no more, and return its entries. Waits for a search of it to end. May block.

        Requests that wait for it, and do not begin from now on, hear `NotHereError`.

        Raises:
            WaitTimeoutError: its search did not end in time; it stays here then. NotHereError.
        """
        until = time.monotonic() + timeout
        with self._changed:
            self._check_serves()
            if env_id not in self._local or env_id in self._leaving:
                raise self._not_here(env_id)
            self._leaving.add(env_id)
            with suppress(ValueError):  # a thread would begin its next search while its entries are taken
                self._turns.remove(env_id)
            local_id, version = self._local[env_id], self._version
        try:
            self._wait(lambda: env_id not in self._running, until, f"the search of {env_id!r}")
            pool = self._parts.manager.init_pools[local_id]
            entries = []
            for key in pool.keys():  # noqa: SIM118  (a pool is no dict)
                kv = pool.peek(key, to="cpu")
                if kv is not None:
                    entries.append((key, kv, pool.side(key)))
            pool.clear()
            with self._changed:
                left = self._waiting.pop(env_id, ())
                del self._local[env_id]
                self._free.append(local_id)
        finally:
            with self._changed:
                self._leaving.discard(env_id)
                self._note_turn(env_id)
                self._changed.notify_all()
        for pending in left:  # no lock held: this thread runs their callers' callbacks
            if pending.is_wanted():
                pending.future.set_exception(self._not_here(env_id))
        return Roots(version, tuple(entries))

    def discard(self, env_id: Hashable, timeout: float) -> None:
        """As `release`, and its entries are gone; nothing if it is not here. May block."""
        with suppress(NotHereError):
            self.release(env_id, timeout)

    # Weights ---------------------------------------------------------------------------------------------------------

    def load_weights(self, weights: Any, version: int, timeout: float) -> None:
        """Load weights while no search runs: those that are open end, and are run again with the new. May block.

        Raises:
            WaitTimeoutError: a planner did not end in time; nothing was loaded.
            What the parts' `load` raises: the weights may be loaded in part, so that the host serves no more.
        """
        until = time.monotonic() + timeout
        with self._changed:
            self._check_serves()
            self._paused = True
            self._loads += 1
        try:
            self._parts.manager.bump_version()
            self._wait(lambda: not self._running, until, "searches")
            try:
                _load(self._parts, weights)
            except BaseException as error:
                self._lose(f"loading weights raised {type(error).__name__}")
                raise
            # Once more: a planner that opened a search after the first has stored what the old weights said.
            self._parts.manager.bump_version()
            with self._changed:
                self._version = version
        finally:
            with self._changed:
                self._paused = False
                self._changed.notify_all()

    def _wait(self, condition: Any, until: float, what: str) -> None:
        with self._changed:
            if not self._changed.wait_for(lambda: condition() or self._lost is not None, until - time.monotonic()):
                raise WaitTimeoutError(f"{what} at {self.name} did not end in time")
            self._check_serves()

    # State -----------------------------------------------------------------------------------------------------------

    def has_places(self) -> int:
        """For how many environments."""
        return self._parts.manager.env_num

    def stats(self) -> HostStats:
        """As it is now. Never waits for a search. Raises `HostLostError` where it serves no more."""
        cache = self._parts.manager.get_stats_summary().total
        evaluator = None if self._parts.evaluator is None else self._parts.evaluator.stats()
        with self._changed:
            self._check_serves()
            return HostStats(
                version=self._version,
                environments=len(self._local),
                waiting=sum(not each.future.cancelled() for queue in self._waiting.values() for each in queue),
                running=len(self._running),
                cache=cache,
                evaluator=evaluator,
                **self._counts,
            )

    def check_integrity(self) -> str:
        """What the manager's `check_integrity` reports, as words; raises what it finds."""
        return repr(self._parts.manager.check_integrity())

    def close(self) -> None:
        """End: requests that wait hear `HostLostError`, searches that run are ended. Never waits for a planner."""
        self._lose("it was closed")
        with suppress(ClosedError):
            if self._parts.evaluator is not None:
                self._parts.evaluator.close()
            self._parts.manager.close()

    def _lose(self, why: str) -> None:
        with self._changed:
            if self._lost is not None:
                return
            self._lost = why
            left = [pending for queue in self._waiting.values() for pending in queue]
            self._waiting.clear()
            self._turns.clear()
            self._changed.notify_all()
        for pending in left:
            if pending.is_wanted():
                pending.future.set_exception(self._lost_error())


def _load(parts: HostParts, weights: Any) -> None:
    load = parts.model.load_state_dict if parts.load is None else parts.load
    load(weights)


async def answer_of(host: Host, method: str, *args: Any) -> Any:
    """What a host's method returns, asked by a task: a search takes no thread while it waits, whatever else one."""
    if method == "submit":
        return await asyncio.wrap_future(host.submit(*args))
    return await asyncio.to_thread(getattr(host, method), *args)
