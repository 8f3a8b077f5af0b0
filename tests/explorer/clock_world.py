"""The stream clock under a scheduler: host threads race on its steps, and the device says which work is behind which.

The device here runs nothing. It knows what it has been told: work comes after all earlier work of its stream, after
what the events covered that its stream was made to wait for, and after what was over when it was enqueued.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from concurrent_kv.books.ledger import Ledger
from concurrent_kv.books.records import Entry, Hold
from concurrent_kv.device.streams import StreamClock, StreamKey, Ticks

from .parts import ModelEvent, ModelLock
from .scheduler import BrokenPromiseError, Scheduler

__all__ = ["ClockWorld", "Work"]

Work = str  # its name


@dataclass(eq=False)
class _Stream:
    number: int
    behind: set[Work] = field(default_factory=set)  # what later work comes after


class _Event:
    covers: frozenset[Work] = frozenset()


class _Streams:
    """A backend each call of which is a step; its events are used again as soon as they are given back."""

    def __init__(self, scheduler: Scheduler, over: set[Work]) -> None:
        self._scheduler = scheduler
        self._over = over
        self.free: list[_Event] = []
        self.made: list[_Event] = []

    def current(self) -> Any:
        raise AssertionError("programs name their streams")

    def use(self, stream: _Stream) -> AbstractContextManager[object]:
        return nullcontext()

    def check(self, stream: object) -> None:
        pass

    def key(self, stream: _Stream) -> StreamKey:
        return (0, stream.number)

    def is_lasting(self, stream: _Stream) -> bool:
        return True

    def is_capturing(self, stream: _Stream) -> bool:
        return False

    def record(self, stream: _Stream) -> _Event:
        self._scheduler.step(f"records an event in stream {stream.number}")
        if not self.free:
            self.made.append(_Event())
            self.free.append(self.made[-1])
        event = self.free.pop()
        event.covers = frozenset(stream.behind)
        return event

    def wait(self, stream: _Stream, event: _Event) -> None:
        self._scheduler.step(f"makes stream {stream.number} wait")
        stream.behind |= event.covers

    def done(self, event: _Event) -> bool:
        self._scheduler.step("asks for an event")
        return event.covers <= self._over

    def synchronize(self, event: _Event, seconds: float, is_over: Callable[[], bool]) -> bool:
        raise AssertionError("nobody waits for the device here")

    def recycle(self, event: _Event) -> None:
        self.free.append(event)

    def protect(self, tensor: object, stream: _Stream) -> None:
        pass


class ClockWorld:
    """A clock, streams by number, and a place where host threads leave what others may use.

    Args:
        streams: how many there are, from 0; the clock knows those of `known` when the program begins.
    """

    def __init__(self, scheduler: Scheduler, *, streams: int = 4, known: Sequence[int] = ()) -> None:
        self.scheduler = scheduler
        self._over: set[Work] = set()
        self.backend = _Streams(scheduler, self._over)
        self.clock = StreamClock(self.backend, lock_factory=lambda: ModelLock(scheduler))
        self.streams = [_Stream(number) for number in range(streams)]
        self.published: dict[str, Ticks] = {}
        for number in known:
            self.clock.stamp(self.streams[number])
        # One slot, in use by `entry`, which an index and perhaps readers hold.
        self.ledger = Ledger(
            1, 1, lock_factory=lambda: ModelLock(scheduler), event_factory=lambda: ModelEvent(scheduler)
        )
        self.entry = Entry("key", None, None, 1)  # type: ignore[arg-type]
        self.uses: set[Work] = set()  # of the slot, so far

    # Steps of host threads -------------------------------------------------------------------------------------------

    def enqueue(self, work: Work, on: int, behind: Iterable[Work] = ()) -> None:
        """Enqueue work, which has to come after all of `behind`."""
        self.scheduler.step(f"enqueues {work} in stream {on}")
        stream = self.streams[on]
        missing = set(behind) - stream.behind - self._over
        if missing:
            raise BrokenPromiseError(f"{work} does not come after {sorted(missing)}")
        stream.behind.add(work)

    def produce(self, name: str, on: int) -> None:
        """Enqueue work called `name`, tick, and only then publish it."""
        self.enqueue(name, on)
        ticks = self.clock.stamp(self.streams[on])
        self.published[name] = ticks

    def consume(self, name: str, on: int, also_behind: Iterable[Work] = ()) -> None:
        """Use what was published as `name`, if it is there by now."""
        ticks = self.published.get(name)
        if ticks is not None:
            self.clock.order_after(self.streams[on], ticks)
            self.enqueue(f"what uses {name}", on, behind=[name, *also_behind])

    def catch_up(self) -> None:
        """The device has done everything that it was given."""
        self.scheduler.step("the device catches up")
        for stream in self.streams:
            self._over |= stream.behind

    # A slot --------------------------------------------------------------------------------------------------------

    def write_first(self, on: int) -> None:
        """Fill the slot, and publish its entry."""
        self.enqueue("first write", on)
        self.uses.add("first write")
        written = self.clock.stamp(self.streams[on])
        with self.ledger.mutex:
            taken = self.ledger.slots.allocate(1)
            assert taken is not None
            self.entry.written = self.entry.ticks = written
            self.ledger.make([self.entry], [0], [0], [1], taken.slots, np.array([0]))

    def read(self, work: Work, on: int) -> None:
        """Read the slot, if its entry is still there."""
        hold = Hold("read", [])
        with self.ledger.mutex:
            if not self.entry.refs:
                return
            self.ledger.extend(hold, [self.entry])
        self.clock.order_after(self.streams[on], self.entry.written)
        self.enqueue(work, on, behind=["first write"])
        self.uses.add(work)
        ticks = self.clock.stamp(self.streams[on])
        with self.ledger.mutex:
            self.ledger.stamp_reads([self.entry], ticks)
        self.ledger.release(hold)

    def remove(self) -> None:
        """Take the entry out of its index."""
        with self.ledger.mutex:
            self.ledger.let_go([self.entry])

    def write_again(self, on: int) -> None:
        """Use the slot again, if it is free."""
        with self.ledger.mutex:
            taken = self.ledger.slots.allocate(1)
        if taken is not None:
            self.clock.order_after(self.streams[on], taken[1])
            self.enqueue("second write", on, behind=self.uses)

    # Checks ----------------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Every event is either free or some mark's, once."""
        marked = [mark.event for known in self.clock._known.values() for mark in known.marks]
        events = [*marked, *self.backend.free]
        if len(events) != len(set(events)) or len(events) != len(self.backend.made):
            raise BrokenPromiseError(
                f"{len(self.backend.made)} events, {len(marked)} in use, {len(events)} accounted for"
            )
