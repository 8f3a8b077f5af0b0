"""Faults to plant in the stream clock and around it; each function is named after the rule that it breaks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from concurrent_kv.books.ledger import Ledger
from concurrent_kv.books.records import Hold
from concurrent_kv.books.slots import SlotAllocator
from concurrent_kv.device.streams import NO_TICKS, StreamClock, Ticks, _Mark

from .clock_world import ClockWorld

__all__ = ["PLANTED_IN_THE_CLOCK"]

Patch = pytest.MonkeyPatch


# Rule 1: enqueue, then tick and stamp, then publish or release -------------------------------------------------------


def rule_1_ticked_before_the_work_is_enqueued(patch: Patch) -> None:
    def produce(self: ClockWorld, name: str, on: int) -> None:
        ticks = self.clock.stamp(self.streams[on])
        self.enqueue(name, on)
        self.published[name] = ticks

    patch.setattr(ClockWorld, "produce", produce)


def rule_1_recorded_before_the_tick_is_taken(patch: Patch) -> None:
    """Another thread's work, enqueued in between and ticked before, would be taken for covered."""

    def stamp(self: StreamClock, stream: Any, sources: Any = ()) -> Ticks:
        backend = self.backend
        assert backend is not None
        me, mine = self._meet(backend, stream)
        event = backend.record(stream)
        with self._lock:
            self._now += 1
            tick = mine.tick = self._now
            mine.marks.append(_Mark(tick, event, ()))
        self._retire(backend)
        return {me: tick}

    patch.setattr(StreamClock, "stamp", stamp)


def rule_1_read_released_before_it_is_stamped(patch: Patch) -> None:
    def read(self: ClockWorld, work: str, on: int) -> None:
        hold = Hold("read", [])
        with self.ledger.mutex:
            if not self.entry.refs:
                return
            self.ledger.extend(hold, [self.entry])
        self.clock.order_after(self.streams[on], self.entry.written)
        self.enqueue(work, on, behind=["first write"])
        self.uses.add(work)
        self.ledger.release(hold)
        ticks = self.clock.stamp(self.streams[on])
        with self.ledger.mutex:
            self.ledger.stamp_reads([self.entry], ticks)

    patch.setattr(ClockWorld, "read", read)


def tick_not_taken_in_one_piece(patch: Patch) -> None:
    """Two threads count at once, and the count goes back."""

    def stamp(self: StreamClock, stream: Any, sources: Any = ()) -> Ticks:
        backend = self.backend
        assert backend is not None
        me, mine = self._meet(backend, stream)
        with self._lock:
            before = self._now
        with self._lock:
            tick = mine.tick = self._now = before + 1
        mark = _Mark(tick, backend.record(stream), ())
        with self._lock:
            mine.marks.append(mark)
        self._retire(backend)
        return {me: tick}

    patch.setattr(StreamClock, "stamp", stamp)


# Rule 2: an event covers the tick read before it is recorded ---------------------------------------------------------


def rule_2_covered_tick_read_after_the_record(patch: Patch) -> None:
    def covering(self: StreamClock, backend: Any, producer: Any, tick: int) -> tuple[int, list[Any]] | None:
        with self._lock:
            known = self._known.get(producer)
            if known is None or known.done >= tick:
                return None
            for mark in known.marks:
                if mark.tick >= tick:
                    return mark.tick, [mark.event]
            stream = known.stream
        event = backend.record(stream)
        with self._lock:
            covered = known.tick
            known.marks.append(_Mark(covered, event, ()))
        return covered, [event]

    patch.setattr(StreamClock, "_covering", covering)


def rule_2_an_older_event_taken(patch: Patch) -> None:
    original = StreamClock._covering

    def covering(self: StreamClock, backend: Any, producer: Any, tick: int) -> tuple[int, list[Any]] | None:
        known = self._known.get(producer)
        if known is not None and known.done < tick and known.marks:
            return known.tick, [known.marks[0].event]
        return original(self, backend, producer, tick)

    patch.setattr(StreamClock, "_covering", covering)


# Rule 3: enqueue the wait, then raise what was seen ------------------------------------------------------------------


def rule_3_seen_raised_before_the_wait(patch: Patch) -> None:
    def order_after(self: StreamClock, stream: Any, ticks: Ticks) -> None:
        backend = self.backend
        assert backend is not None
        me, mine = self._meet(backend, stream)
        for producer, tick in ticks.items():
            if producer == me or mine.seen.get(producer, 0) >= tick:
                continue
            found = self._covering(backend, producer, tick)
            if found is not None:
                with self._lock:
                    mine.seen[producer] = max(found[0], mine.seen.get(producer, 0))
                backend.wait(stream, *found[1])

    patch.setattr(StreamClock, "order_after", order_after)


def rule_3_all_that_is_ticked_by_now_taken_for_seen(patch: Patch) -> None:
    def order_after(self: StreamClock, stream: Any, ticks: Ticks) -> None:
        backend = self.backend
        assert backend is not None
        me, mine = self._meet(backend, stream)
        for producer, tick in ticks.items():
            if producer == me or mine.seen.get(producer, 0) >= tick:
                continue
            found = self._covering(backend, producer, tick)
            if found is not None:
                backend.wait(stream, *found[1])
                with self._lock:
                    mine.seen[producer] = self._known[producer].tick

    patch.setattr(StreamClock, "order_after", order_after)


# Rule 4: a freed slot carries the ticks of its reads and of its writes -----------------------------------------------


def rule_4_reads_left_out(patch: Patch) -> None:
    patch.setattr(Ledger, "stamp_reads", lambda self, entries, ticks: None)


def rule_4_only_the_last_read_kept(patch: Patch) -> None:
    def stamp_reads(self: Ledger, entries: Any, ticks: Ticks) -> None:
        for entry in entries:
            entry.ticks = {**entry.written, **ticks}

    patch.setattr(Ledger, "stamp_reads", stamp_reads)


def rule_4_writes_left_out(patch: Patch) -> None:
    original = Ledger.make

    def make(self: Ledger, entries: Any, *rows: Any) -> list[int]:
        for entry in entries:
            entry.ticks = NO_TICKS
        return original(self, entries, *rows)

    patch.setattr(Ledger, "make", make)


def rule_4_freed_without_ticks(patch: Patch) -> None:
    original = SlotAllocator.release
    patch.setattr(SlotAllocator, "release", lambda self, slots, ticks, **left: original(self, slots, NO_TICKS, **left))


# The events ----------------------------------------------------------------------------------------------------------


def mark_taken_without_a_second_look(patch: Patch) -> None:
    def retire(self: StreamClock, backend: Any) -> None:
        for known in list(self._known.values()):
            while True:
                with self._lock:
                    mark = known.marks[0] if known.marks else None
                if mark is None or not backend.done(mark.event):
                    break
                with self._lock:
                    if known.marks:
                        known.marks.popleft()
                    known.done = max(known.done, mark.tick)
                backend.recycle(mark.event)

    patch.setattr(StreamClock, "_retire", retire)


def all_taken_for_done_when_one_event_has_fired(patch: Patch) -> None:
    def retire(self: StreamClock, backend: Any) -> None:
        for known in list(self._known.values()):
            with self._lock:
                mark = known.marks[0] if known.marks else None
            if mark is not None and backend.done(mark.event):
                with self._lock:
                    known.done = known.tick

    patch.setattr(StreamClock, "_retire", retire)


PLANTED_IN_THE_CLOCK: dict[Callable[[Patch], None], str] = {
    rule_1_ticked_before_the_work_is_enqueued: "produce x, y|consume x, y",
    rule_1_recorded_before_the_tick_is_taken: "two threads produce on one stream|consume both",
    rule_1_read_released_before_it_is_stamped: "read|remove|write again",
    tick_not_taken_in_one_piece: "two threads count|consume",
    rule_2_covered_tick_read_after_the_record: "made alone, more made|consume|consume more",
    rule_2_an_older_event_taken: "produce x, y|consume x, y",
    rule_3_seen_raised_before_the_wait: "two threads consume on one stream",
    rule_3_all_that_is_ticked_by_now_taken_for_seen: "produce x, y|consume x, y",
    rule_4_reads_left_out: "read|remove|write again",
    rule_4_only_the_last_read_kept: "read|read|remove, write again",
    rule_4_writes_left_out: "remove|write again, never read",
    rule_4_freed_without_ticks: "remove|write again, never read",
    mark_taken_without_a_second_look: "two threads retire, the device catches up",
    all_taken_for_done_when_one_event_has_fired: "one of two is done",
}
