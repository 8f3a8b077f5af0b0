"""Flights: one computation for each missing key, however many callers miss it together.

    join -> mine ----- compute, put -----> DONE       each caller gets a copy of the result, which the flight carries
              |------- compute raises ---> FAILED     each waiter hears a copy of the error; nothing is remembered of it
              |------- cancelled, dropped -> ABANDONED  each waiter wakes; the first to run joins again, and computes
              '------- the pool closes --> CLOSED     each caller hears `ClosedError`

A flight belongs to a key in one epoch and weights version: after a clear, callers start another, and the older one's
result reaches its waiters and is not kept. The table's lock is never held while anything is called, and nothing else
is locked inside it; a key's `__eq__` runs under it, its `__hash__` before.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Hashable
from contextlib import suppress
from contextvars import ContextVar
from enum import Enum
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, TypeAlias
from weakref import ref

from ..books.records import Generation, Scope
from ..device.streams import NO_TICKS, Ticks
from ..errors import ClosedError, InvalidTypeError, RecursiveComputationError, shown
from ..locks.deadline import Deadline
from ..locks.gate import gate
from ..never_copied import NeverCopied, is_owned_elsewhere

if TYPE_CHECKING:
    from ..model.kv import KeysValues

__all__ = ["Claim", "Flight", "FlightState", "FlightTable", "computing_here"]

Waker = Callable[[], None]

Place: TypeAlias = "tuple[int, int, Generation]"  # number of the scope, hash of the key, generation

# What the current thread or task is computing, also through `anyio.to_thread`, which copies the context.
computing_here: ContextVar[frozenset[Flight]] = ContextVar("concurrent_kv_computing", default=frozenset())


class FlightState(Enum):
    """Where a computation stands."""

    COMPUTING = "computing"
    DONE = "done"
    FAILED = "failed"
    ABANDONED = "abandoned"
    CLOSED = "closed"


# Looked up once: a member of an enum is found by a call of Python's in CPython 3.11, which may fail.
COMPUTING: Final = FlightState.COMPUTING
DONE: Final = FlightState.DONE
FAILED: Final = FlightState.FAILED
ABANDONED: Final = FlightState.ABANDONED
CLOSED: Final = FlightState.CLOSED


class FlightKey:
    """A key in one generation of a scope.

    Keys are the user's: their `__hash__` runs once, when this is made, their `__eq__` where scope and hash are equal.

    Attributes:
        place: where the table has its flight: the same for all keys of one hash.
    """

    __slots__ = ("generation", "key", "place", "scope_number")

    def __init__(self, scope_number: int, key: Hashable, generation: Generation) -> None:
        self.scope_number = scope_number
        self.key = key
        self.generation = generation
        self.place: Place = (scope_number, hash(key), generation)

    def is_of_the_key_of(self, other: FlightKey) -> bool:
        """Whether both are of one key in one scope, of whatever generation. Runs the key's `__eq__`; no lock held."""
        if self.place[:2] != other.place[:2]:
            return False
        return self.key is other.key or bool(self.key == other.key)


class Ending:
    """What the waiters of a flight take from it; empty until it is over."""

    __slots__ = ("error", "ready", "result")

    def __init__(self) -> None:
        self.result: KeysValues | None = None
        self.ready: Ticks = NO_TICKS  # the copy that made `result`
        self.error: Exception | None = None  # as it was raised; every waiter raises a copy of its own


class Flight:
    """One computation under way. Settled once, by the first thread to come."""

    __slots__ = ("ending", "key", "loop_ended", "owner", "settling", "state", "waits_for", "wakers")

    def __init__(self, key: FlightKey) -> None:
        self.key = key
        self.state = COMPUTING
        self.owner: ref[Claim] | None = None  # of the claim; dead while the flight is not over: it was cut off
        # Of the waiters, once it is over: the frames that computed reach the flight, and the error those frames.
        self.ending: Ending | None = Ending()
        self.wakers: list[Waker] = []
        self.loop_ended: Callable[[], bool] | None = None  # of the loop that it needs, if it needs one
        self.settling = False  # its result may be in the pool, and be replaced there before the flight is over
        self.waits_for: list[Flight] = []  # whose results its computation waits for just now

    def needs_one_of(self, flights: frozenset[Flight]) -> bool:
        """Whether this computation waits, perhaps through others, for one of `flights`."""
        seen: set[Flight] = set()
        ahead = [self]
        while ahead:
            flight = ahead.pop()
            if flight in flights:
                return True
            if flight not in seen and flight.state is COMPUTING:
                seen.add(flight)
                ahead += flight.waits_for
        return False

    def is_under_way(self) -> bool:
        """Whether it is not over, and its claim alive."""
        return self.state is COMPUTING and self.owner is not None and self.owner() is not None

    def is_orphan(self) -> bool:
        """Whether no task will end it: the loop of the one that computes has ended."""
        loop_ended = self.loop_ended
        return self.state is COMPUTING and loop_ended is not None and loop_ended()

    def over_unheard(self) -> bool:
        """Whether it is over after all; an orphan is abandoned. For a caller that waited in vain."""
        if self.is_orphan():
            self.state = ABANDONED  # as by its finaliser: the next caller to join replaces it
            self.wake()
        return self.state is not COMPUTING

    def subscribe(self, waker: Waker) -> bool:
        """Have `waker` called when the flight is over; False if it is over already. `waker` must not block."""
        self.wakers.append(waker)
        # After the append: the thread that settles sets the state first and looks at the wakers then, so that one of
        # the two sees the other. (A finaliser settles without the table's lock.)
        return self.state is COMPUTING

    def unsubscribe(self, waker: Waker) -> None:
        """Forget a waker of a caller that no longer waits."""
        with suppress(ValueError):
            self.wakers.remove(waker)

    def wake(self) -> None:
        """Call every waker; one may be called twice."""
        for waker in tuple(self.wakers):
            waker()


class FlightTable:
    """The flights of one pool."""

    def __init__(
        self,
        name: str,
        lock_factory: Callable[[], Any] = threading.Lock,
        check_process: Callable[[], None] = lambda: None,
    ) -> None:
        self.name = name
        self.check_process = check_process  # raises in a forked child, where no thread releases the lock
        self._lock = lock_factory()
        # By place; a change replaces the tuple, so that a thread sees whether it still is what it has looked at.
        self._flights: dict[Place, tuple[Flight, ...]] = {}
        self._closed = False
        # Flights of claims that were dropped: a finaliser may only append, and the next operation forgets them.
        self.dropped: deque[Flight] = deque()

    def __len__(self) -> int:
        """Computations under way."""
        if gate.is_inside:
            return len(self._all())
        with gate.lock, self._lock:
            dead = self._forget_dropped()
            number = len(self._all())
        del dead
        return number

    def _all(self) -> list[Flight]:
        return [flight for flights in list(self._flights.values()) for flight in flights]

    def join(self, scope: Scope, key: Hashable, generation: Generation, claim: Claim) -> bool:
        """Give `claim` the flight of a key; returns whether it is the one to compute.

        Raises:
            RecursiveComputationError: the caller is inside the computation of this very key.
            ClosedError: the pool is closed.
        """
        flight_key = FlightKey(scope.number, key, generation)
        within = computing_here.get()
        if any(flight.key.is_of_the_key_of(flight_key) for flight in within if flight.is_under_way()):
            raise _own_key(self.name, key)  # of whatever generation
        # In the claim before it is in the table: if an exception arrives in between, the claim's finaliser ends it.
        new = claim.flight = Flight(flight_key)
        claim.ending = new.ending
        new.owner = ref(claim)
        there: tuple[Flight, ...] = ()
        flight: Flight | None = None
        while (others := self._join_where(claim, new, there, flight)) is not None:
            there = others
            # Keys are compared here, where no lock is held: a comparison may take its time, and call this pool.
            flight = next((other for other in there if other.key.is_of_the_key_of(flight_key)), None)
        if claim.mine and flight is not None:
            flight.over_unheard()  # a waiter of an orphan takes over, too
        return claim.mine

    def _join_where(
        self, claim: Claim, new: Flight, there: tuple[Flight, ...], flight: Flight | None
    ) -> tuple[Flight, ...] | None:
        """Give `claim` the flight that its key has among those `there`, or put the new one there.

        Returns those that are there instead, with nothing done; None where it is done.
        """
        place = new.key.place
        with gate.lock, self._lock:
            if self._closed:
                raise ClosedError(f"{self.name} is closed")
            dead = self._forget_dropped()
            others = self._flights.get(place, ())
            if others is there:
                if flight is None or flight.state is not COMPUTING or flight.is_orphan():
                    self._flights[place] = (*_without(there, flight), new)
                else:
                    claim.late = flight.settling
                    claim.mine, claim.flight, claim.ending = False, flight, flight.ending
        del dead
        return None if others is there else others

    def _forget_dropped(self) -> list[Flight]:
        """Take abandoned flights out; they, and their keys, die with what this returns, outside of the lock."""
        dead = []
        while self.dropped:
            flight = self.dropped[0]
            dead.append(flight)
            self._take_out(flight)
            self.dropped.popleft()
        return dead

    def _take_out(self, flight: Flight) -> None:
        """Take a flight that is over out of the table, if it is there, without a look at any key. Lock held."""
        place = flight.key.place
        there = self._flights.get(place, ())
        if there == (flight,):
            del self._flights[place]
        elif flight in there:
            self._flights[place] = _without(there, flight)

    def abandon_orphans(self) -> int:
        """End the flights whose claims are dead, and those that were cut off while they ended. Returns how many."""
        with gate.lock, self._lock:
            flights = self._all()
        orphans = [flight for flight in flights if flight.owner is None or flight.owner() is None]
        for flight in orphans:
            if not self.settle(flight, ABANDONED):
                self._forget(flight)
        return len(orphans)

    def settle(
        self,
        flight: Flight,
        state: FlightState,
        *,
        result: KeysValues | None = None,
        ready: Ticks = NO_TICKS,
        error: Exception | None = None,
    ) -> bool:
        """End a flight and wake its waiters; False if it was over before."""
        with gate.lock, self._lock:
            if flight.state is not COMPUTING:
                return False
            ending = flight.ending
            if ending is not None:
                ending.result, ending.ready, ending.error = result, ready, error
            flight.state, flight.ending = state, None
        try:
            self._forget(flight)
        except (MemoryError, RecursionError):
            self.dropped.append(flight)  # the next operation takes it out
            flight.wake()
        return True

    def _forget(self, flight: Flight) -> None:
        """Wake the waiters of a flight that is over, then take it out: if this is cut off, repair finds it."""
        flight.wake()
        with gate.lock, self._lock:
            self._take_out(flight)

    def close_scope(self, number: int) -> None:
        """End the flights of a scope that was dropped with `ClosedError`."""
        with gate.lock, self._lock:
            flights = self._all()
        for flight in flights:
            if flight.key.scope_number == number:
                self.settle(flight, CLOSED)

    def close(self) -> None:
        """End every flight with `ClosedError`, and every later join."""
        with gate.lock, self._lock:
            self._closed = True
            flights = self._all()
        for flight in flights:
            self.settle(flight, CLOSED)


def _without(flights: tuple[Flight, ...], gone: Flight | None) -> tuple[Flight, ...]:
    return tuple([flight for flight in flights if flight is not gone])


def _own_key(name: str, key: Hashable) -> RecursiveComputationError:
    return RecursiveComputationError(
        f"{name}: the computation of {shown(key)} asked for {shown(key)} itself, and would wait for its own end"
    )


class Claim(NeverCopied):
    """The right, and the duty, to compute one key: a handle, ended once.

    Leaving its `with`, or dropping it, abandons what was neither fulfilled nor failed: another caller takes over.

    Attributes:
        mine: whether the caller is the one to compute; False where another caller is at it.
        flight: the computation; set by `FlightTable.join`.
        ending: what it ends with, for this caller; None where this caller ended it with an error.
        late: whether another caller's result may have been in the pool, and be over, before this caller came: it has to
            look it up again instead of taking what the flight carries.
    """

    _internal = frozenset(("abandon", "over"))

    instead_of_copy = "share the one object, or ask for another with try_claim()"

    flight: Flight
    ending: Ending | None

    def __init__(
        self,
        table: FlightTable,
        store: Callable[..., bool],
        copy: Callable[[KeysValues], tuple[KeysValues, Ticks]],
    ) -> None:
        self.mine = True
        self.late = False
        self._table = table
        self._store = store
        self._copy = copy  # gives a private copy, and the ticks of what made it

    @property
    def over(self) -> bool:
        """Whether the computation has ended, in whatever way."""
        return self.flight.state is not COMPUTING

    def fulfil(self, kv: KeysValues, *, timeout: float | None = None) -> bool:
        """Store the result and hand it to every waiter. May block.

        Returns False if the pool did not keep it: its scope was cleared, or its version bumped, meanwhile.

        Raises:
            ClosedError: the claim is not the caller's, or is over. WrongProcessError.
            ReentrantCallError: the calling thread is inside a critical section; `abandon` works there.
            InvalidArgumentError, WaitTimeoutError, ...: see `KVPool.put`; the claim is still open then.
        """
        self._check_mine()
        self.flight.settling = True
        try:
            stored = self._store(kv, timeout=timeout)
        except BaseException:
            self.flight.settling = False
            raise
        self.pass_on(kv)
        return stored

    def pass_on(self, kv: KeysValues) -> None:
        """Hand a result, one row, to every waiter, without storing it.

        Raises:
            ClosedError, InvalidArgumentError: as `fulfil`.
        """
        self._check_mine()
        result, ready = self._copy(kv)
        # After the copy: a task that has left may write to its tensors again, and what was copied since may be torn.
        Deadline(0.0).check(self._table.name)
        self._table.settle(self.flight, DONE, result=result, ready=ready)

    def fail(self, error: Exception) -> None:
        """End the computation with an error, of which every waiter hears a copy. Never blocks.

        Raises:
            InvalidTypeError: `error` is no `Exception`.
            ClosedError: as `fulfil`.
        """
        self._check_mine()
        if not isinstance(error, Exception):
            raise InvalidTypeError(f"error must be an Exception, got {error!r}; abandon() ends a claim without one")
        # Not this claim's: the frames that the error came through reach the claim.
        self.ending = None
        self._table.settle(self.flight, FAILED, error=error)

    def abandon(self) -> None:
        """Leave the computation to the next caller to ask. Never blocks; fine if it is over, or not the caller's."""
        # Takes no lock: finalisers come here, of claims and of coroutines that computed, at any point of any thread and
        # inside the table's lock too. The wakers are reentrant by contract, and the next to join replaces the flight.
        flight = getattr(self, "flight", None)
        if flight is not None and self.mine and flight.state is COMPUTING:
            flight.state = ABANDONED
            try:
                flight.wake()
            finally:
                self._table.dropped.append(flight)

    def computing(self) -> _Computing:
        """A context in which asking for the claimed key raises instead of waiting for itself."""
        return _Computing(self.flight)

    def _check_mine(self) -> None:
        self._table.check_process()
        gate.check(self._table.name)
        if not self.mine or self.over:
            raise ClosedError(
                "this claim is over: fulfilled, failed or abandoned before"
                if self.mine
                else "this key is being computed by another caller; get_or_compute() waits for its result"
            )

    def __enter__(self) -> Claim:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abandon()

    def __del__(self) -> None:
        flight = getattr(self, "flight", None)
        if flight is not None and not is_owned_elsewhere(flight.owner, self):
            self.abandon()


class _Computing:
    """Marks a flight as being computed in this context, for the length of a `with`."""

    __slots__ = ("_flight", "_token")

    def __init__(self, flight: Flight) -> None:
        self._flight = flight

    def __enter__(self) -> None:
        # Without those that are over: an exception may have cut off the end of their `with`.
        within = frozenset(flight for flight in computing_here.get() if flight.is_under_way())
        self._token = computing_here.set(within | {self._flight})

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A coroutine that its loop left behind is closed in another context, whose variable says nothing of this one.
        with suppress(ValueError):
            computing_here.reset(self._token)
