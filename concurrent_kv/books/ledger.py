"""`Ledger`: who holds what. Slots, slot tables, reference counts, handles and waiters, all under one mutex.

A storage has a ledger, and each open search has one of its own, of what it has reserved; the two are locked in the
order of search, then storage.

Methods that say "mutex held" are called inside `with ledger.mutex`; the others take it themselves. What dies under the
mutex is returned to the caller, so that side data and keys are finalised outside of it.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from itertools import repeat
from typing import Any, TypeVar

import numpy as np

from ..device.slot_numbers import SlotArray, Slots
from ..device.streams import NO_TICKS, Ticks, merge
from ..locks.deadline import Deadline
from ..locks.gate import gate
from ..locks.signal import Signal
from .candidates import Candidates
from .entries import let_go, name_rows, retain
from .records import Entry, Hold
from .slots import SlotAllocator
from .tables import Tables, new_tables

__all__ = ["Ledger", "wake"]

L = TypeVar("L", bound="Ledger")

SPARE_TABLES = 4  # of searches that have ended
SPARE_NOTES = 1000


class Ledger:
    """The books of one storage, or of one search.

    Args:
        num_slots: usable slots of the storage, numbered from 1.
        window: tokens of the longest entry.
        lock_factory, event_factory: make the mutex and the waiters' events; a scheduler may pass its own.
        storage: of a search, the ledger of its storage. It has none of the slots at first.

    Attributes:
        borrowed: of the slots of a search, how many it gives back as soon as they are free.
        grants: of a search, its writes under way.
        copies: where there is a tier, of each slot the one in the other ledger (the tier's, or the storage's above it)
            that may have the same bytes, or 0. It has them where the other ledger's array names this one.
        when_idle: of a search that has ended, what is done, once, when it has no hold and no grant any more; returns
            what died of it. Under the mutex.
        parted: of a search, entries that it lets go of as soon as it can, by `part`, which returns what died.
    """

    copies: SlotArray | None = None
    when_idle: Callable[[], list[Entry]] | None = None
    parted: frozenset[Entry] = frozenset()
    part: Callable[[], list[Entry]] | None = None

    def __init__(
        self,
        num_slots: int,
        window: int,
        *,
        lock_factory: Callable[[], Any] = threading.Lock,
        event_factory: Callable[[], Any] = Signal,
        storage: Ledger | None = None,
    ) -> None:
        self.mutex = lock_factory()
        self.num_slots = num_slots
        self.window = window
        self.slots = SlotAllocator(num_slots if storage is None else 0)
        self.tables = new_tables(num_slots, window) if storage is None else storage.tables_of_search()
        self.candidates = Candidates(self.tables)
        self.holds: set[Hold] = set()
        self.waiters: list[Any] = []  # events of the threads that wait for room
        self.storage = storage
        self._spare_tables: list[Tables] = []
        self._no_tables = None if storage is not None else new_tables(0, window)
        self.borrowed = self.grants = 0
        # What finalisers left to be done: they only append, and the next operation does it, within its own deadline.
        self.abandoned: deque[Callable[[Deadline], object]] = _roomy() if storage is None else storage.abandoned
        self.lock_factory, self._event_factory = lock_factory, event_factory

    def tables_of_search(self) -> Tables:
        """Empty tables: those of a search that has ended, whose memory is warm, or others."""
        try:
            return self._spare_tables.pop()
        except IndexError:
            return new_tables(self.num_slots, self.window)

    def take_tables(self, ended: Ledger) -> None:
        """Have the tables of a search that has ended for a later one. The ended one's mutex held.

        A gather under way of nothing but misses may still ask it for row 0, which is in any tables.
        """
        assert self._no_tables is not None
        tables, ended.tables = ended.tables, self._no_tables
        if tables is self._no_tables or self.abandoned:  # taken before; or there may be work with these
            return
        if len(self._spare_tables) < SPARE_TABLES:
            tables.keep([])
            self._spare_tables.append(tables)

    def of_search(self, kind: type[L]) -> L:
        """One for a search over this storage."""
        return kind(
            self.num_slots,
            self.window,
            lock_factory=self.lock_factory,
            event_factory=self._event_factory,
            storage=self,
        )

    def beneath(self, num_slots: int) -> Ledger:
        """One for a tier beneath this storage, whose notes the storage's operations work off."""
        made = Ledger(num_slots, self.window, lock_factory=self.lock_factory, event_factory=self._event_factory)
        made.abandoned = self.abandoned
        return made

    def forget_copies(self) -> None:
        """Know of no free slot that another ledger has its bytes. Mutex held."""
        if self.copies is not None:
            self.copies.put(self.slots.free_slots(), 0)

    def mutex_for_numbers(self) -> AbstractContextManager[object]:
        """What to hold while numbers are read: the mutex, or nothing inside a critical section of this thread."""
        return nullcontext() if gate.is_inside else self.mutex

    # Entries -----------------------------------------------------------------------------------------------------

    def make(
        self,
        entries: list[Entry],
        parents: list[int],
        kept: list[int],
        own: list[int],
        taken: Slots,
        positions: SlotArray,
    ) -> list[int]:
        """Give new entries rows of the tables (see `Tables.enter`), and the reference of the index. Mutex held.

        Returns the rows. All of it, or nothing where it raises.
        """
        rows, tails = self.tables.enter(parents, kept, own, taken, positions)
        try:
            name_rows(entries, rows, tails)
        except Exception:
            self.leave(rows)
            raise
        return rows

    def let_go(self, entries: list[Entry]) -> list[Entry]:
        """Drop one reference of each, and free what the dead had; returns those that died. Mutex held.

        All of it, or nothing where it raises; what cuts in from outside, perhaps after the effect, is for repair.
        """
        dead, rows, used = let_go(entries)
        if dead:
            try:
                ticks: Ticks = NO_TICKS
                for of_one in used:
                    ticks = merge(ticks, of_one)
                parted = self.candidates.beside(rows) if self.candidates.shared else ()
                dying = iter(dead)
                freed, others_left = self.tables.leave(rows)
            except Exception:
                for entry in entries:
                    entry.refs += 1
                raise
            # Nothing that needs memory from here to the `try`.
            for entry in dying:
                entry.row = -1
            try:
                try:
                    self._release(freed, ticks, others_left)
                except MemoryError:
                    self._release(freed, ticks, others_left)  # once more: a search that ends next must have them
            except Exception:  # no memory, no frames: they are free a little later
                self.abandoned.append(partial(self.again, [partial(self._release, freed, ticks, others_left)]))
                if self.borrowed:
                    self.abandoned.append(partial(self.again, [self.pay_back]))  # after these
            if self.borrowed:
                try:
                    self.pay_back()
                except Exception:  # as above: the storage gets them a little later
                    self.abandoned.append(partial(self.again, [self.pay_back]))
            if parted:
                try:
                    self.candidates.return_unshared(parted)
                except Exception:  # as above: they come back to their policies a little later
                    self.abandoned.append(partial(self.again, [self.candidates.return_all]))
        part = self.part
        if part is not None:
            try:
                if dead or not self.parted.isdisjoint(entries):
                    dead += part()
            except Exception:  # as above
                self.abandoned.append(partial(self.again, [part]))
        return dead

    def leave(self, rows: list[int]) -> None:
        """Take rows back that were just made, whose slots are another's; at once or, at worst, later. Mutex held."""
        try:
            self.tables.leave(rows)
        except Exception:  # no memory, no frames
            self.abandoned.append(partial(self.again, [partial(self.tables.leave, rows)]))

    def _release(self, freed: Any, ticks: Ticks, others_left: bool) -> None:
        """Free the slots that `Tables.leave` returned; all of them, or none where it raises. Mutex held."""
        slots = np.frombuffer(freed, dtype=np.int64)
        if self.copies is not None:
            # First: a slot that is given out may have other bytes.
            self.copies.put(slots, 0)
        self.slots.release(slots, ticks, others_left=others_left)

    def give_back(self, slots: Slots, ticks: Ticks) -> None:
        """Free slots that no entry came to name; all of them, or none where it raises. Mutex held."""
        self.slots.give_back(slots, ticks)
        if self.borrowed:
            try:
                self.pay_back()
            except Exception:  # no memory, no frames: the storage gets them a little later
                self.abandoned.append(partial(self.again, [self.pay_back]))

    @property
    def left(self) -> int:
        """Free slots, less those that are borrowed: below 0 while handles keep what was replaced beyond its budget."""
        return self.slots.free_count - self.borrowed

    # Of a search ---------------------------------------------------------------------------------------------------

    def borrow(self, count: int) -> bool:
        """Have slots of the storage beyond what was reserved, until as many are free; False if it lacks them.

        Mutex held.
        """
        storage = self.storage
        assert storage is not None
        borrowed = self.borrowed + count
        with gate.lock, storage.mutex:
            runs = storage.slots.part(count)
            if runs is None:
                return False
            # First: what is cut off after this is for repair.
            self.borrowed = borrowed
            try:
                self.slots.add(runs)
            except Exception:  # no memory, no frames: they are there a little later
                self.abandoned.append(partial(self.again, [partial(self.slots.add, runs)]))
        return True

    def pay_back(self) -> None:
        """Give borrowed slots back to the storage, as far as some are free. Mutex held.

        Who waits for room there is woken with the next of `take_waiters`.
        """
        storage, count = self.storage, min(self.borrowed, self.slots.free_count)
        if not count:
            return
        assert storage is not None
        borrowed = self.borrowed - count
        with gate.lock, storage.mutex:
            runs = self.slots.part(count)
            if not runs:
                return
            # First: what is cut off after this is for repair.
            self.borrowed = borrowed
            try:
                storage.slots.add(runs)
            except Exception:  # as in `borrow`
                self.abandoned.append(partial(storage.again, [partial(storage.slots.add, runs)]))
            self.waiters += storage.waiters
            storage.waiters.clear()

    def look_idle(self) -> list[Entry]:
        """What a search that has ended still has goes with its last hold and grant; returns the dead. Mutex held."""
        if self.when_idle is None or self.holds or self.grants:
            return []
        try:
            return self.when_idle()
        except Exception:  # no memory, no frames
            self.abandoned.append(partial(self.again, [self.look_idle]))
            return []

    def again(self, once: list[Callable[[], object] | None], deadline: Deadline) -> None:
        """Do what failed under the mutex for want of memory or of frames, in the form that `abandoned` takes.

        Takes the work off `once`, as two threads may come to it at the same time. Where it raises, it is there again.
        """
        with gate.lock, self.mutex:
            work, dead = once[0], None
            if work is not None:
                # First: what is cut off after this is lost until repair, and not done twice.
                once[0] = None
                try:
                    dead = work()
                except Exception:
                    once[0] = work  # in its place: this needs no memory
                    raise
            # Also where it was done before: who did it may have failed before it woke anyone.
            waiters = self.take_waiters()
        wake(waiters)
        del dead

    # Holds -------------------------------------------------------------------------------------------------------

    def extend(self, hold: Hold, entries: list[Entry]) -> None:
        """Register a hold if need be, and take a reference of each of `entries` for it. Mutex held."""
        hold.ledger = self
        self.holds.add(hold)
        if hold.pinning:
            # First: what is cut off here is pinned until repair, and no pin of another's is taken away.
            for entry in entries:
                entry.pins += 1
        try:
            retain(entries, hold.entries)
        except Exception:
            if hold.pinning:
                for entry in entries:
                    entry.pins -= 1
            raise

    def drop_from(self, hold: Hold, entries: list[Entry]) -> list[Entry]:
        """Let a hold's reference of each of `entries` go; returns the dead. Mutex held."""
        staying = Counter(hold.entries)
        staying.subtract(entries)
        before, hold.entries = hold.entries, list(staying.elements())
        try:
            return self._unhold(hold, entries)
        except Exception:
            hold.entries = before
            raise

    def end(self, hold: Hold) -> list[Entry]:
        """Release a hold; returns the dead. Nothing happens the second time. Mutex held.

        What an operation under way still uses stays until that lets go of it.
        """
        hold.released = True
        if hold.users or hold not in self.holds:
            return []
        # First: what is cut off from outside after this is lost until repair, and not dropped twice.
        entries = hold.entries
        try:
            self.holds.discard(hold)
            hold.entries = []
            dead = self._unhold(hold, entries) if hold.pinning else self.let_go(entries)
        except Exception:
            hold.entries = entries
            self.holds.add(hold)
            raise
        return dead if self.when_idle is None else dead + self.look_idle()

    def _unhold(self, hold: Hold, entries: list[Entry]) -> list[Entry]:
        """Drop a hold's reference of each; all of them, or none where it raises. Mutex held."""
        unpinned = iter(entries)
        dead = self.let_go(entries)
        if hold.pinning:
            for entry in unpinned:
                entry.pins -= 1
            try:
                self.candidates.return_unpinned(entries)
            except Exception:  # as in `let_go`
                self.abandoned.append(partial(self.again, [partial(self.candidates.return_unpinned, entries)]))
        return dead

    def abandon(self, release: Callable[[Deadline], object]) -> None:
        """Leave something for the next operation, or a thread that waits for room, to release. Takes no lock."""
        self.abandoned.append(release)
        self.stir()

    def stir(self) -> None:
        """Have every thread that waits for room look again. For finalisers: takes no lock."""
        for waiter in tuple(self.waiters if self.storage is None else self.storage.waiters):
            waiter.set()

    def release(self, hold: Hold) -> bool:
        """Release a hold, and wake the threads that wait for room; False if it was released before."""
        dead: list[Entry] = []
        waiters: list[Any] = []
        with gate.lock, self.mutex:
            first = not hold.released
            hold.released = True
            try:
                dead = self.end(hold)
                waiters = self.take_waiters() if self.waiters else waiters
            except BaseException as error:
                self.abandoned.append(hold)
                if not isinstance(error, Exception):
                    raise
        if waiters:
            wake(waiters)
        del dead
        return first

    def use(self, hold: Hold) -> bool:
        """Keep what a hold holds until `end_use`, whoever releases it; False if it is released. Mutex held."""
        if hold.released:
            return False
        hold.users += 1
        return True

    def end_use(self, hold: Hold, *, release: bool) -> list[Entry]:
        """The other end of `use`, and of the hold itself with `release`; returns the dead. Mutex held.

        What cannot be let go of, for want of memory or of frames, is let go of by the next operation.
        """
        hold.users -= 1
        hold.released = hold.released or release
        if not hold.released:
            return []
        try:
            return self.end(hold)
        except BaseException as error:
            self.abandoned.append(hold)
            if not isinstance(error, Exception):
                raise
            return []

    def release_abandoned(self, hold: Hold, deadline: Deadline) -> None:
        """As `release`, in the form that `abandoned` takes; waits for no shard. Raises where it cannot be done."""
        self.again([partial(self.end, hold)], deadline)

    def stamp_reads(self, entries: Iterable[Entry], ticks: Ticks) -> None:
        """Note a use of each entry's slots. Mutex held."""
        for entry in entries:
            entry.ticks = merge(entry.ticks, ticks)

    # Waiting for room ----------------------------------------------------------------------------------------------

    def waiter(self) -> Any:
        """An event that is set at the next release of anything. Mutex held, in the hold that found no room."""
        event = self._event_factory()
        self.waiters.append(event)
        return event

    def forget_waiter(self, event: Any) -> None:
        """Take off the list who no longer waits. Mutex held."""
        with suppress(ValueError):
            self.waiters.remove(event)

    def take_waiters(self) -> list[Any]:
        """The events of all that wait; the caller sets them outside the mutex. Mutex held."""
        waiters, self.waiters = self.waiters, []
        return waiters


def _roomy() -> deque[Callable[[Deadline], object]]:
    """An empty queue that has memory for some notes: finalisers, and what follows an error, may not get any."""
    queue: deque[Any] = deque(repeat(None, SPARE_NOTES))
    queue.clear()  # which keeps it
    return queue


def wake(waiters: Iterable[Any]) -> None:
    """Set the events of `Ledger.take_waiters`, outside the mutex."""
    for waiter in waiters:
        waiter.set()
