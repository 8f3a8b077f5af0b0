"""Waiting for a flight, in a thread or a task: bounded, never in a circle, and without a place that others need."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..device.streams import StreamClock
from ..device.tensors import plain_torch_state
from ..errors import ClosedError, RecursiveComputationError, WaitTimeoutError, shown
from ..locks.deadline import Deadline, lend_place
from ..locks.signal import Signal
from ..model.kv import KeysValues
from .table import Flight, FlightState, computing_here

__all__ = ["outcome", "timed_out", "wait_in_thread", "waiting_for"]


@contextmanager
def waiting_for(flight: Flight, name: str) -> Iterator[None]:
    """Entered by who waits for a flight: says so of what is being computed here, and lends its place meanwhile.

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
                f"{name}: the computation of {shown(flight.key[1])} waits for the one that asks for it, for ever"
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
    """What somebody who waited in vain for a flight hears."""
    return WaitTimeoutError(
        f"{name}: the computation of {shown(flight.key[1])} by another caller was not over within "
        f"{deadline.seconds:g} s"
    )


def outcome(flight: Flight, clock: StreamClock, name: str) -> KeysValues | None:
    """A private copy of an ended flight's result, made in the caller's stream.

    None if the flight was abandoned: the caller has to join again.

    Raises:
        Exception: the error that the computation raised.
        ClosedError: the pool was closed meanwhile.
    """
    if flight.state is FlightState.DONE:
        assert flight.result is not None
        stream = clock.current()
        clock.order_after(stream, flight.ready)
        with plain_torch_state():
            return flight.result.copy()
    if flight.state is FlightState.FAILED:
        assert flight.error is not None
        raise flight.error
    if flight.state is FlightState.CLOSED:
        raise ClosedError(f"{name} was closed while {shown(flight.key[1])} was being computed")
    return None
