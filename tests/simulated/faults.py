"""Faults to plant in the order between streams, and the program on the simulated device that has to notice each.

Most leave one call out: a wait, a tick, a protection, at one place of the library (`sites.py` finds every such place).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from concurrent_kv.books import slots
from concurrent_kv.books.ledger import Ledger
from concurrent_kv.books.slots import SlotAllocator
from concurrent_kv.device import streams
from concurrent_kv.device.buffers import FreeBuffers
from concurrent_kv.device.paged_slots import PagedSlots
from concurrent_kv.device.stream_uses import StreamUses
from concurrent_kv.device.streams import NO_TICKS, StreamClock, Ticks, _Known, _Mark
from concurrent_kv.pool import tier, writing
from concurrent_kv.pool.storage import KVStorage
from concurrent_kv.pool.tier import Tier
from concurrent_kv.search.state import SearchState

from .backend import SimStreams
from .sites import Fault, Plant, left_out

__all__ = ["FAULTS"]

Patch = pytest.MonkeyPatch

LEFT_OUT = [
    left_out("reading.py", "gather_entries", "order_after", "put|get"),
    left_out("reading.py", "gather_entries", "stamp", "read, then reused"),
    left_out("writing.py", "write", "order_after", "read, then reused"),
    left_out("writing.py", "write", "stamp", "put|get"),
    left_out("storage.py", "__init__", "stamp", "put on another than the pool's"),
    left_out("storage.py", "__init__", "share", "dropped while it works"),
    left_out("storage.py", "close", "synchronize", "closed while it works"),
    left_out("storage.py", "close", "everything", "closed while it works"),
    left_out("storage.py", "zero_slot_is_zero", "order_after", "checked on another than the pool's"),
    left_out("saving.py", "_chunks", "order_after", "put, saved on another"),
    left_out("checking.py", "repair", "everything", "cut off and repaired"),
    left_out("streams.py", "everything", "stamp", "cut off and repaired"),
    left_out("streams.py", "protect", "protect", "gather, gather again and drop"),
    left_out("streams.py", "stamp", "protect", "put from elsewhere, one stream"),
    left_out("streams.py", "_meet", "protect", "dropped while it works"),
    left_out("streams.py", "synchronize", "synchronize", "closed while it works"),
    left_out("committing.py", "open_batch", "protect", "gather, gather again and drop"),
    left_out("committing.py", "commit_batch", "use_here", "commit on another, gather again"),
    left_out("overflow.py", "__post_init__", "settle", "corrected"),
    left_out("positions.py", "__init__", "settle", "corrected lazily"),
    left_out("positions.py", "__init__", "settle", "corrected stepwise", number=1),
    left_out("cuda.py", "settle", "synchronize", "corrected"),
    left_out("stream_uses.py", "join", "order_after", "gather|gather"),
    left_out("stream_uses.py", "join", "protect", "gather, wait on another and drop"),
    left_out("stream_uses.py", "_ticks", "stamp", "gather, gather again"),
    left_out("stream_uses.py", "finish", "protect", "closed while its stream is captured"),
    left_out("padded_rows.py", "padding", "use_here", "padding"),
    left_out("padded_rows.py", "padding", "protect", "padding"),
    left_out("padded_rows.py", "_append", "use_here", "appended from elsewhere"),
    left_out("padded_rows.py", "_append", "use_here", "appended to all layers from elsewhere"),
    left_out("padded_rows.py", "advance", "use_here", "written in place on another"),
    left_out("batch.py", "fill", "use_here", "filled on another"),
    left_out("batch.py", "reorder", "use_here", "reordered on another"),
    left_out("padded_rows.py", "use_here", "join", "commit on another, gather again"),
    left_out("padded_rows.py", "use_here", "protect", "appended from elsewhere"),
    left_out("padded_rows.py", "wait", "join", "gather, closed on another, gather again"),
    left_out("padded_rows.py", "synchronize", "synchronize", "batch waited for by the host"),
    left_out("batch.py", "end_rows", "finish", "gather, gather again"),
    left_out("reading.py", "gather_together", "order_after", "put|gather together"),
    left_out("reading.py", "gather_together", "stamp", "gather together, then reused"),
    left_out("joint.py", "open_together", "protect", "gather, gather together and drop"),
    left_out("joint.py", "close", "finish", "gather together, gather again"),
    left_out("call.py", "_opened", "finish", "evaluate on two"),
    left_out("loading.py", "_private_copy", "stamp", "taken from a flight"),
    left_out("waiting.py", "outcome", "order_after", "taken from a flight"),
    left_out("moving.py", "joined_on", "_protect", "taken from a flight"),
    left_out("moving.py", "joined_on", "_protect", "put from another device's other stream", number=1),
    left_out("moving.py", "_protect", "protect", "put unpacked from elsewhere"),
]


# Of what is waited for, a part is forgotten ------------------------------------------------------------------------


def writes_not_told_to_readers(patch: Patch) -> None:
    original = Ledger.make

    def make(self: Ledger, entries: Any, *rows: Any) -> list[int]:
        for entry in entries:
            entry.written = NO_TICKS
        return original(self, entries, *rows)

    patch.setattr(Ledger, "make", make)


def shared_writes_not_told_to_readers(patch: Patch) -> None:
    original = streams.merge
    patch.setattr(writing, "merge", lambda first, second: first if not first else original(first, second))


def reads_not_told_to_the_next_writer(patch: Patch) -> None:
    patch.setattr(Ledger, "stamp_reads", lambda self, entries, ticks: None)


def writes_not_told_to_the_next_writer(patch: Patch) -> None:
    original = SlotAllocator.release

    def release(self: SlotAllocator, slots: Any, ticks: Ticks, **others_left: bool) -> None:
        original(self, slots, NO_TICKS, **others_left)

    patch.setattr(SlotAllocator, "release", release)


def unpublished_writes_not_told_to_the_next_writer(patch: Patch) -> None:
    original = SlotAllocator.give_back
    patch.setattr(SlotAllocator, "give_back", lambda self, slots, ticks: original(self, slots, NO_TICKS))


def uses_of_the_dead_not_told_to_who_outlives_them(patch: Patch) -> None:
    original = SlotAllocator.release

    def release(self: SlotAllocator, slots: Any, ticks: Ticks, **others_left: bool) -> None:
        self.residual = NO_TICKS
        original(self, slots, ticks, **others_left)

    patch.setattr(SlotAllocator, "release", release)


def uses_of_a_search_forgotten_at_its_end(patch: Patch) -> None:
    patch.setattr(SearchState, "_all_ticks", lambda self: NO_TICKS)


def _uses_of_roots_forgotten_in(function: str) -> Callable[[Patch], None]:
    def forgotten(patch: Patch) -> None:
        original = Ledger.stamp_reads

        def stamp_reads(self: Ledger, entries: Any, ticks: Ticks) -> None:
            if sys._getframe(1).f_code.co_name != function:
                original(self, entries, ticks)

        patch.setattr(Ledger, "stamp_reads", stamp_reads)

    forgotten.__name__ = f"uses_of_roots_forgotten_in{function}"
    return forgotten


def slots_reused_one_release_too_early(patch: Patch) -> None:
    original = SlotAllocator.release

    def release(self: SlotAllocator, freed: Any, ticks: Ticks, **others_left: bool) -> None:
        last, self.last = getattr(self, "last", NO_TICKS), ticks  # type: ignore[attr-defined]
        original(self, freed, last, **others_left)

    patch.setattr(SlotAllocator, "release", release)


def only_the_first_of_several_runs_waited_for(patch: Patch) -> None:
    patch.setattr(slots, "merge", lambda first, second: first or second)


def buffers_handed_on_without_their_uses(patch: Patch) -> None:
    original = FreeBuffers.take
    patch.setattr(FreeBuffers, "take", lambda self, *shape: (original(self, *shape)[0], NO_TICKS))


def zeroing_forgotten_by_readers(patch: Patch) -> None:
    _hide_zeroing_from("gather_entries", patch)


def zeroing_forgotten_by_writers(patch: Patch) -> None:
    _hide_zeroing_from("write", patch)


def _hide_zeroing_from(function: str, patch: Patch) -> None:
    def zeroed(self: KVStorage) -> Ticks:
        hidden = sys._getframe(1).f_code.co_name == function
        found: Ticks = NO_TICKS if hidden else self.__dict__["zeroed"]
        return found

    def remember(self: KVStorage, ticks: Ticks) -> None:
        self.__dict__["zeroed"] = ticks

    patch.setattr(KVStorage, "zeroed", property(zeroed, remember), raising=False)


def _only_the_last_user(self: StreamUses, *kept: Tensor, besides: object = None) -> Ticks:
    streams = [stream for key, stream in self._streams.items() if key == self._current]
    return self._clock.stamp(streams[0], kept)


def only_the_last_stream_of_a_batch_told_to_the_next_owner(patch: Patch) -> None:
    original = StreamUses._ticks

    def ticks(self: StreamUses, *kept: Tensor, besides: Any = None) -> Ticks:
        return original(self, *kept, besides=besides) if besides is not None else _only_the_last_user(self, *kept)

    patch.setattr(StreamUses, "_ticks", ticks)


def stream_that_closes_a_batch_not_counted(patch: Patch) -> None:
    patch.setattr(StreamUses, "finish", lambda self, buffer: self._ticks(buffer))


# The clock's own rules -----------------------------------------------------------------------------------------------


def ticked_before_the_work_is_enqueued(patch: Patch) -> None:
    """Rule 1: the event is recorded in front of what it should cover."""
    order_after, stamp = StreamClock.order_after, StreamClock.stamp
    early: dict[Any, Ticks] = {}

    def order_then_stamp(self: StreamClock, stream: Any, ticks: Ticks) -> None:
        order_after(self, stream, ticks)
        early[stream] = stamp(self, stream)

    patch.setattr(StreamClock, "order_after", order_then_stamp)
    patch.setattr(StreamClock, "stamp", lambda self, stream, sources=(): early.pop(stream, None) or stamp(self, stream))


def an_older_event_taken_for_the_tick(patch: Patch) -> None:
    """Rule 2: an event claims to cover more than it does."""

    original = StreamClock._covering

    def covering(self: StreamClock, backend: Any, producer: Any, tick: int) -> Any:
        known = self._known.get(producer)
        if known is None or known.done >= tick or not known.marks:
            return original(self, backend, producer, tick)
        return known.tick, [known.marks[0].event]

    patch.setattr(StreamClock, "_covering", covering)


def seen_without_a_wait(patch: Patch) -> None:
    """Rule 3: what was waited for once is taken for all that will come."""

    class Everything(dict[Any, int]):
        def __setitem__(self, key: Any, tick: int) -> None:
            super().__setitem__(key, 1 << 60)

    original = _Known.__init__

    def init(self: _Known, *arguments: Any) -> None:
        original(self, *arguments)
        self.seen = Everything()

    patch.setattr(_Known, "__init__", init)


def done_before_it_is(patch: Patch) -> None:
    patch.setattr(SimStreams, "done", lambda self, event: True)


def sources_kept_for_nobody(patch: Patch) -> None:
    """Rule 5: a source is freed too soon."""
    original = _Mark.__init__
    patch.setattr(_Mark, "__init__", lambda self, tick, event, kept: original(self, tick, event, ()))


def source_left_out_of_what_is_kept(patch: Patch) -> None:
    original = StreamClock.stamp

    def stamp(self: StreamClock, stream: Any, sources: Any = ()) -> Ticks:
        return original(self, stream, () if sys._getframe(1).f_code.co_name == "write" else sources)

    patch.setattr(StreamClock, "stamp", stamp)


def correction_left_out_of_what_is_kept(patch: Patch) -> None:
    original = StreamClock.stamp

    def stamp(self: StreamClock, stream: Any, sources: Any = ()) -> Ticks:
        return original(self, stream, () if sys._getframe(1).f_code.co_name == "gather_entries" else sources)

    patch.setattr(StreamClock, "stamp", stamp)


def rows_of_a_part_left_out_of_what_is_kept(patch: Patch) -> None:
    """What is corrected lazily is gathered by itself, and copied from there into the buffer of all."""
    original = StreamClock.stamp

    def stamp(self: StreamClock, stream: Any, sources: Any = ()) -> Ticks:
        return original(self, stream, sources[-1:] if sys._getframe(1).f_code.co_name == "gather_together" else sources)

    patch.setattr(StreamClock, "stamp", stamp)


def stream_remembered_from_construction(patch: Patch) -> None:
    """Rule 6: whatever stream the caller is in, the first is taken."""
    original = StreamClock.current

    first: list[Any] = []

    def current(self: StreamClock) -> Any:
        first.append(original(self))
        return first[0]

    patch.setattr(StreamClock, "current", current)


def wrong_stream_waits(patch: Patch) -> None:
    original = SimStreams.wait
    patch.setattr(SimStreams, "wait", lambda self, stream, event: original(self, self.gpu.stream(0), event))


def wrong_stream_recorded(patch: Patch) -> None:
    original = SimStreams.record
    patch.setattr(SimStreams, "record", lambda self, stream: original(self, self.gpu.stream(0)))


def handles_taken_for_streams(patch: Patch) -> None:
    """Rule 6: a stream that has a known one's handle is taken for it."""
    patch.setattr(SimStreams, "is_lasting", lambda self, stream: True)


def streams_forgotten_while_they_are_used(patch: Patch) -> None:
    """Rule 6: what was met is forgotten before it ticks, and the tick is nobody's."""

    def stamp(self: StreamClock, stream: Any, sources: Any = ()) -> Ticks:
        backend = self.backend
        assert backend is not None
        me, mine = self._meet(backend, stream)
        with self._lock:
            self._now += 1
            tick = mine.tick = self._now
            mine.recording += 1
        self._record(backend, mine, stream, tick, tuple(sources))
        self._retire(backend)
        return {me: tick}

    patch.setattr(StreamClock, "stamp", stamp)


def streams_of_one_handle_taken_to_come_one_after_another(patch: Patch) -> None:
    """Rule 6: of two streams that had a handle, only the later one's work is waited for."""
    patch.setattr(StreamClock, "_of_others", lambda self, known, tick: [])


def no_event_for_a_second_stream(patch: Patch) -> None:
    """Rule 7, too far: only streams that are alone need none."""

    def stamp(self: StreamClock, stream: Any, sources: Any = ()) -> Ticks:
        me, known = self._meet(self.backend, stream)  # type: ignore[arg-type]
        self._now += 1
        known.tick = known.done = self._now
        return {me: self._now}

    patch.setattr(StreamClock, "stamp", stamp)


def copied_straight_from_the_callers_memory(patch: Patch) -> None:
    """A copy from pinned memory of the caller's, which reads what is there when it runs."""

    def joined_on(device: torch.device, parts: Any) -> Tensor:
        moved = [
            torch.empty(part.shape, dtype=part.dtype, device=device).copy_(part, non_blocking=True) for part in parts
        ]
        return torch.cat(moved)

    patch.setattr("concurrent_kv.model.kv.joined_on", joined_on)


FORGOTTEN = [
    (writes_not_told_to_readers, "put|get"),
    (shared_writes_not_told_to_readers, "stored once more, read on another"),
    (reads_not_told_to_the_next_writer, "read, then reused"),
    (writes_not_told_to_the_next_writer, "put on one, then on another, reused"),
    (unpublished_writes_not_told_to_the_next_writer, "cleared while it is copied"),
    (uses_of_the_dead_not_told_to_who_outlives_them, "parent read, parent and child popped, reused"),
    (slots_reused_one_release_too_early, "read, then reused"),
    (reads_not_told_to_the_next_writer, "search read, then closed, reused"),
    (unpublished_writes_not_told_to_the_next_writer, "search closed|its commit, reused"),
    (uses_of_a_search_forgotten_at_its_end, "search read, then closed, reused"),
    (_uses_of_roots_forgotten_in("_dissolve"), "root read by a search, closed, popped, reused"),
    (_uses_of_roots_forgotten_in("_let_go_of_roots"), "root read by a search, not kept, popped, reused"),
    (only_the_first_of_several_runs_waited_for, "several runs, reused at once"),
    (buffers_handed_on_without_their_uses, "gather, gather again"),
    (zeroing_forgotten_by_readers, "misses on another than the pool's"),
    (zeroing_forgotten_by_writers, "put on another than the pool's"),
    (only_the_last_stream_of_a_batch_told_to_the_next_owner, "two streams read a batch"),
    (stream_that_closes_a_batch_not_counted, "gather, ordered by the user, closed on another"),
    (ticked_before_the_work_is_enqueued, "put|get"),
    (an_older_event_taken_for_the_tick, "put often|get often"),
    (seen_without_a_wait, "put often|get often"),
    (done_before_it_is, "put|get"),
    (sources_kept_for_nobody, "put from elsewhere"),
    (source_left_out_of_what_is_kept, "put from elsewhere"),
    (source_left_out_of_what_is_kept, "corrected"),
    (correction_left_out_of_what_is_kept, "corrected lazily"),
    (correction_left_out_of_what_is_kept, "corrected stepwise"),
    (rows_of_a_part_left_out_of_what_is_kept, "corrected lazily, gathered together"),
    (stream_remembered_from_construction, "put|get"),
    (wrong_stream_waits, "put|get"),
    (wrong_stream_recorded, "put|get"),
    (handles_taken_for_streams, "handle of a stream used again"),
    (streams_forgotten_while_they_are_used, "put, get on another|stream forgotten"),
    (streams_of_one_handle_taken_to_come_one_after_another, "read by two of one handle, reused"),
    (no_event_for_a_second_stream, "put|get"),
    (copied_straight_from_the_callers_memory, "put from the host"),
]

OF_TIERS = [
    left_out("reading.py", "fill_rows", "stamp", "tier: gathered from below, waited for by the host"),
    left_out("tier.py", "_copy", "order_after", "tier: down after the write"),
    left_out("tier.py", "_copy", "stamp", "tier: read after the move down"),
    left_out("tier.py", "_copy", "order_after", "tier: put, popped, up into its slots"),
    left_out("tier.py", "_copy", "stamp", "tier: up, its room below reused"),
    left_out("tier.py", "read", "order_after", "tier: read after the move down"),
    left_out("tier.py", "read", "stamp", "tier: read below, popped, its room reused"),
    left_out("paged_slots.py", "_frames_for", "synchronize", "tier: disk: paged out after its copy"),
    left_out("paged_slots.py", "_end", "stamp", "tier: disk: paged out after its copy"),
    left_out("paged_slots.py", "_end", "stamp", "tier: disk: read in memory, which is used again"),
]


def _nothing_noted_of(name: str) -> Plant:
    """Copies of tokens that are shared with earlier ones are not told to their readers."""

    def plant(patch: Patch) -> None:
        patch.setattr(Tier, name, property(lambda tier: NO_TICKS, lambda tier, ticks: None), raising=False)

    plant.__name__ = f"nothing_noted_of{name}"
    return plant


def uses_of_slots_forgotten_by_moves(patch: Patch) -> None:
    """A move does not hear what used the slots that it takes."""
    original = tier._enter

    def enter(*arguments: Any) -> Any:
        way = original(*arguments)
        if way is not None:
            way.made.ticks = NO_TICKS
        return way

    patch.setattr(tier, "_enter", enter)


def reads_from_memory_before_a_file_not_counted(patch: Patch) -> None:
    """What was read while it was paged out, and is still being copied, is given away."""
    original = PagedSlots._frames_of

    def frames_of(slots: PagedSlots, of: Any) -> Any:
        frames, copy = original(slots, of)
        slots._copy_counts[copy.frames] -= 1
        return frames, copy

    patch.setattr(PagedSlots, "_frames_of", frames_of)


FORGOTTEN += [
    (reads_from_memory_before_a_file_not_counted, "tier: disk: paged out|get"),
    (_nothing_noted_of("_stored"), "tier: shared tokens down on one, the rest on another"),
    (_nothing_noted_of("_raised"), "tier: shared tokens up on one, the rest on another"),
    (uses_of_slots_forgotten_by_moves, "tier: read below, popped, its room reused"),
    (uses_of_slots_forgotten_by_moves, "tier: put, popped, up into its slots"),
]

FAULTS = [
    *LEFT_OUT,
    *OF_TIERS,
    *(Fault(plant.__name__.replace("_", " "), program, plant) for plant, program in FORGOTTEN),
]
