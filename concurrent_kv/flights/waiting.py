"""Waiting for a flight, in a thread or a task: bounded, never in a circle, and without a place that others need."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from ..device.modes import plain_torch_state
from ..device.streams import StreamClock
from ..errors import ClosedError, RecursiveComputationError, WaitTimeoutError, shown
from ..locks.deadline import Deadline, lend_place
from ..locks.signal import Signal
from ..model.kv import KeysValues
from .error_copies import copy_of
from .table import Claim, Flight, FlightState, computing_here

__all__ = ["outcome", "timed_out", "wait_in_thread", "waiting_for"]


@contextmanager
def waiting_for(flight: Flight, name: str) -> Iterator[None]:
    """Entered to wait for a flight: says so of what is being computed here, and lends the caller's place meanwhile.

    Raises:
        RecursiveComputationError: the flight waits for what is being computed here; it would be for ever.
    """
    computing = computing_here.get()
    try:
        # First said, then looked: of computations that begin to wait for each other at once, one sees the other.
        for own in computing:
            own.waits_for.append(flight)
        if computing and flight.needs_one_of(computing):
            raise RecursiveComputationError(
                f"{name}: the computation of {shown(flight.key.key)} waits for the one that asks for it, for ever"
            )
        with lend_place.get()():
            yield
    finally:
        for own in computing:
            own.waits_for.remove(flight)


def wait_in_thread(flight: Flight, deadline: Deadline, name: str) -> None:
    """Block the calling thread until a flight is over.

    Raises:
        WaitTimeoutError: it was not over before the deadline.
        RecursiveComputationError: see `waiting_for`.
    """
    over = Signal()
    try:
        if flight.subscribe(over.set):
            with waiting_for(flight, name):
                heard = over.wait(deadline.left())
            # The thread that ended it may have been cut off between two wakers, or its loop may have ended.
            if not heard and not flight.over_unheard():
                raise timed_out(flight, deadline, name)
    finally:
        flight.unsubscribe(over.set)


def timed_out(flight: Flight, deadline: Deadline, name: str) -> WaitTimeoutError:
    """What a caller that waited in vain for a flight hears."""
    return WaitTimeoutError(
        f"{name}: the computation of {shown(flight.key.key)} by another caller was not over within "
        f"{deadline.seconds:g} s; a timeout= that is longer than it takes would do"
    )


def outcome(joined: Claim, clock: StreamClock, name: str) -> KeysValues | None:
    """A private copy of the result of an ended flight, made in the caller's stream.

    None if the flight was abandoned: the caller has to join again.

    Raises:
        Exception: a copy of the error that the computation raised, which is its `__cause__`; see `copy_of`.
        ClosedError: the pool was closed meanwhile.
    """
    state, ending = joined.flight.state, joined.ending
    if state is FlightState.DONE:
        assert ending is not None
        assert ending.result is not None
        stream = clock.current()
        clock.order_after(stream, ending.ready)
        with plain_torch_state():
            return ending.result.copy()
    if state is FlightState.FAILED:
        assert ending is not None
        assert ending.error is not None
        _raise_copy(ending.error)
    if state is FlightState.CLOSED:
        raise ClosedError(
            f"{name} was closed, or its scope dropped, while {shown(joined.flight.key.key)} was being computed"
        )
    return None


def _raise_copy(error: Exception) -> NoReturn:
    # No variable names the copy: it would be in the frame that its own traceback keeps alive.
    if (raised := [copy_of(error)])[0] is error:
        raise error
    raise raised.pop() from error
