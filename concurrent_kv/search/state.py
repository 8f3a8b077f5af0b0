"""`SearchState`: what an open search owns, and its end, which may come from its user or from outside.

A search has books of its own: a ledger with the slots that it has reserved, and one lock shard for its keys. Its
gathers and commits take these alone. It meets the books of the storage when it opens, adopts a root, promotes an entry,
needs more than it has reserved, and when it ends.

A root that it adopts is an entry of an init pool, in the storage's books. In the search's own there is a *stand-in*: an
entry with the same slots, whose children share them like any other's. The search holds the root itself as long as there
is its stand-in, which stays until no other entry of the search names its slots; so the search frees none of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Container, Hashable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING

import numpy as np

from ..books.entries import name_rows, new_entries, row_of
from ..books.index import Index
from ..books.integrity import (
    IntegrityReport,
    Problem,
    RepairReport,
    compare,
    index_problems,
    rebuild_search,
    recount_of,
    slots_of_entries,
    summed,
)
from ..books.ledger import Ledger, wake
from ..books.records import Budget, Entry, Hold, Scope
from ..books.slots import Run, SlotAllocator, runs_of
from ..books.stats import Counters
from ..books.tables import copied_rows, named_slots, slots_of_row, weights_of
from ..device.buffers import FreeBuffers
from ..device.slot_numbers import SlotArray
from ..device.streams import NO_TICKS, Ticks, merge
from ..errors import SearchEndedError
from ..locks.deadline import Deadline
from ..locks.gate import gate
from ..pool.storage import Domain, SearchCheck

if TYPE_CHECKING:  # as in pool/room.py
    from ..pool.batch import Batch
    from ..pool.pool import KVPool

__all__ = ["RootKey", "SearchState"]

_SEEN = attrgetter("key", "length", "side", "priority", "key_hash", "correction")
NO_ENTRIES: frozenset[Entry] = frozenset()
NO_SLOTS: SlotArray = np.empty(0, dtype=np.int64)
ENTRIES_PER_STEP = 8  # that an end lets go of in the time in which a write stores one

RootKey = tuple[Hashable, Hashable]  # (env_id, key)


class SearchState(Domain):
    """What a search owns: scope and budget, slots, stand-ins of roots, open batches. Ended once, by who ends it first.

    Args:
        pool: that pays for it.
        runs: the slots of its budget.

    Attributes:
        roots: stand-ins by environment and key. Under the shard.
        origins: the root that each stand-in is of. Under the mutex.
        stand_ins: a hold of all of them. Under the mutex.
        roots_hold: a hold, in the storage's ledger, of their roots. It does not pin: a root may be evicted from its
            init pool like any other.
        roots_below: the tier's entries of roots that could not move up, by environment and key. Under the shard.
        found_below: those of them that were found again since. Under the shard, read or write.
        below_hold: a hold, in the tier's ledger, of these. Under the tier's mutex.
        batches: the holds of open ones. Under the mutex.
        gone: entries taken out of the index by its end. Under the mutex.
        finished: whether nothing is left of it. Under the mutex; read without.
    """

    ledger_kind: type[Ledger] = Ledger

    def __init__(
        self, pool: KVPool, init_pools: Mapping[Hashable, KVPool], number: int, budget: Budget, runs: list[Run]
    ) -> None:
        ledger = pool.ledger.of_search(self.ledger_kind)
        buffers = FreeBuffers(pool.layout, pool.buffers)
        super().__init__(pool.storage, pool.account, ledger, pool.storage.search_locks(), buffers)
        self._pool = pool
        self.init_pools = init_pools
        self.budget = budget
        # All of a search's keys under one shard: a gather or commit of any number of rows takes one lock.
        self.scope = Scope(pool.account, f"search {number}", (0,), budget=budget)
        self.roots: dict[RootKey, Entry] = {}
        self.origins: dict[Entry, Entry] = {}
        self.stand_ins = Hold("roots", [])
        self.roots_hold = Hold("search", [])
        self.roots_below: dict[RootKey, Entry] = {}
        self.found_below: set[RootKey] = set()
        self.below_hold = Hold("search", [])
        self.batches: list[Hold] = []
        self.gone: list[Entry] = []
        self.finished = False
        # Weights versions that the search began with: a promotion must not carry its entries into a later one.
        self.versions = {env_id: init_pool.default_scope.version for env_id, init_pool in init_pools.items()}
        ledger.slots.add(runs)

    @property
    def pool(self) -> KVPool:
        """The pool that pays for it."""
        return self._pool

    @property
    def counters(self) -> Counters:
        """What it adds to its pool's."""
        return self.budget.counters

    @property
    def own(self) -> Index[Entry]:
        """The search's own entries, under the scope's shard."""
        return self.scope.entries[0]

    @property
    def slots_in_use(self) -> int:
        """Slots of what it has reserved that are not free. Takes no lock."""
        return self.ledger.slots.in_use

    @property
    def shared_slots(self) -> int:
        """Slots that several of its entries and roots name. Takes no lock."""
        return self.ledger.tables.shared

    @staticmethod
    def owned(keys: Iterable[Hashable], found: Iterable[Entry | None]) -> set[Hashable]:
        """Those of some keys of which something was found."""
        return {key for key, entry in zip(keys, found, strict=True) if entry is not None}

    def own_beside(self, found: Iterable[Entry | None]) -> list[Entry]:
        """The search's own entries but those `found`. The scope's shard held."""
        kept = {id(entry) for entry in found if entry is not None}
        return self.own.chosen(lambda entry: id(entry) not in kept)

    # Life ------------------------------------------------------------------------------------------------------------

    @property
    def ended(self) -> str | None:
        """Why it has ended, or is about to be ended by a version bump; None while it is open."""
        return self.scope.ended or self.budget.ended

    def check_open(self) -> None:
        """Raise `SearchEndedError` if it has ended, or is about to be."""
        ended = self.scope.ended or self.budget.ended
        if ended is not None:
            raise SearchEndedError(ended)
        if self.storage.closed:
            super().check_open()

    def track(self, batch: Batch, counts: bool) -> None:
        """Have an open batch end with the search, unless that has ended, which raises; `counts` its hits and misses.

        Not earlier: while it was being copied, no end may let its entries go. Counted once, when nothing can time out
        any more: a call that is made again counts once too. Mutex held.
        """
        if self.scope.ended is not None or self.budget.ended is not None:
            self.check_open()
        if len(self.batches) > 64:
            self.batches = [hold for hold in self.batches if not hold.released]
        self.batches.append(batch.hold)
        if not counts:
            return
        missing, counters = batch.entries.count(None), self.budget.counters
        counters.hit_count += len(batch.entries) - missing - len(batch.others)
        counters.miss_count += missing
        if batch.others:
            self.budget.count_roots(batch.others)

    def end(self, reason: str, deadline: Deadline) -> None:
        """Release everything, and give what was reserved back. What a failed attempt left is done by the next.

        What operations under way still use goes with the last of them.

        Raises:
            WaitTimeoutError: the scope's shard was not free in time, or, on an event loop's own thread, there is more
                to let go of than it has time for; nothing has happened.
        """
        ledger = self.ledger
        with gate.lock, self.locks.write(self.scope.shards, deadline):
            if deadline.on_loop:  # before anything takes effect
                deadline.step(self.name, self._entries_held() // ENTRIES_PER_STEP)
            # From here on no batch is opened, no child published and no root adopted.
            if self.scope.ended is None:
                self.scope.ended = reason
            try:
                below = self._end_below()
            except Exception:  # no memory, no frames: the next operation does it
                below = []
                ledger.abandoned.append(self.below_hold)
            going = self.own.all()
            with gate.lock, ledger.mutex:
                self.gone += going  # first: what is in it twice does no harm
            taken, cells = self.own.take_all()
            with gate.lock, ledger.mutex:
                self.counters.removal_count += len(taken)
                roots, self.roots = self.roots, {}
                dead = self._end_holds()
                waiters = ledger.take_waiters()
        wake(waiters)
        self.buffers.leave()
        del roots, below, dead, taken, going, cells

    def _entries_held(self) -> int:
        """Entries that its end lets go of, those of open batches too. The scope's shard held."""
        with gate.lock, self.ledger.mutex:
            in_batches = _entries_in(self.batches)
        return len(self.own) + len(self.roots) + len(self.roots_below) + in_batches

    def _end_below(self) -> list[Entry]:
        """Let go of the roots in the tier; returns what may die. The scope's shard held."""
        tier, self.roots_below = self.storage.tier, {}
        if tier is None:
            return []
        with gate.lock, tier.ledger.mutex:
            return tier.ledger.end(self.below_hold)

    def _end_holds(self) -> list[Entry]:
        """Let go of what open batches read, and of everything if nothing else is in use. Mutex held.

        Returns what may die. No entry is let go of by itself: its slots go back with all others.
        """
        ledger = self.ledger
        self.budget.ended = self.budget.ended or self.scope.ended
        dead: list[Entry] = []
        for hold in self.batches:
            dead += ledger.end(hold)
        self.stand_ins.released = True
        ledger.holds.discard(self.stand_ins)
        if not self.finished:
            ledger.when_idle = self._dissolve
        return dead + ledger.look_idle()

    def _dissolve(self) -> list[Entry]:
        """Give the slots back to the storage, and let go of the roots; returns what may die. Mutex held.

        Where it raises it can be done again: each step is done once.
        """
        storage, account, budget = self.storage.ledger, self.account, self.budget
        ticks = self._all_ticks()
        runs = self._all_runs(ticks) if budget.max_slots else []
        gone, origins, none, nowhere = (
            [*self.gone, *self.origins],
            dict[Entry, Entry](),
            list[Entry](),
            SlotAllocator(0),
        )
        with gate.lock, storage.mutex:
            if budget.max_slots:
                reserved = account.reserved_entries - budget.max_entries, account.reserved_slots - budget.max_slots
                storage.slots.add(runs)
                # No call from here to the next comment, so that no asynchronous exception parts what belongs together,
                # and nothing that needs memory.
                account.reserved_entries, account.reserved_slots = reserved
                budget.max_entries = budget.max_slots = 0
            # Each of these once, however often they are done.
            self._fold_counters()
            self._pool.searches.discard(self)
            if ticks is not NO_TICKS:
                storage.stamp_reads(self.origins.values(), ticks)
            gone += storage.end(self.roots_hold)
            self.ledger.waiters += storage.waiters
            storage.waiters.clear()
        # Nothing that needs memory from here to the next comment.
        self.ledger.when_idle = None
        self.ledger.slots, self.ledger.borrowed = nowhere, 0
        self.finished = True
        # Nothing of it may keep keys and side data alive.
        self.gone, self.origins, self.stand_ins.entries = none, origins, none
        self.ledger.parted, self.ledger.part = NO_ENTRIES, None
        # A later search would take them over, and need not.
        with suppress(MemoryError):
            storage.take_tables(self.ledger)
        return gone

    def _all_runs(self, ticks: Ticks) -> list[Run]:
        """Every slot that it has, with these ticks. Mutex held."""
        slots = self.ledger.slots
        whole = slots.whole_runs()
        if whole is not None:
            return [(some, ticks) for some in whole]
        return runs_of(np.concatenate([slots.free_slots(), self.own_slots(named_slots(self.ledger.tables))]), ticks)

    def _all_ticks(self) -> Ticks:
        """Every use of its slots, and of those of its roots. Mutex held."""
        if self.storage.clock.backend is None:
            return NO_TICKS
        ticks = self.ledger.slots.every_use()
        last = NO_TICKS
        for entry in [*self.gone, *self.origins]:
            if entry.ticks is not last:
                last = entry.ticks
                ticks = merge(ticks, last)
        return ticks

    def own_slots(self, slots: SlotArray) -> SlotArray:
        """Of slots that its entries name, those that are its own, and not a root's. Mutex held.

        No lock of the storage's is needed: who names a root's slots there holds it for this search.
        """
        is_own: SlotArray = slots[weights_of(self.storage.ledger.tables, slots) == 0]
        return is_own

    def _fold_counters(self) -> None:
        """Add what it has counted to the accounts it belongs to. Both mutexes held."""
        budget = self.budget
        if budget in self.account.budgets:
            self.account.budgets.discard(budget)
            self.account.counters.add(budget.counters)
        for account in [pool.account for pool in self.init_pools.values() if budget in pool.account.guests]:
            account.guests.discard(budget)
            account.counters.hit_count += budget.root_hits.get(account, 0)

    # Roots -----------------------------------------------------------------------------------------------------------

    def adopt(self, new: Mapping[RootKey, Entry], found: list[Entry | None], hold: Hold) -> list[Entry]:
        """Keep roots found in init pools until the search ends; `found` gets their stand-ins, which `hold` holds too.

        The caller holds the roots. Where another thread has adopted one under the same key meanwhile, perhaps a later
        one, that is the root. Returns the stand-ins that are new. Mutex and shard held.
        """
        standing: dict[Entry | None, Entry] = {}  # by the root
        fresh = dict(new)
        for root, origin in new.items() if self.roots else ():
            stand_in = self.roots.get(root)
            if stand_in is not None:
                standing[origin] = stand_in
                del fresh[root]
        origins = list(fresh.values())
        made = _stand_ins_of(origins)
        standing.update(zip(origins, made, strict=True))
        roots = self.roots | dict(zip(fresh, made, strict=True))
        held = [standing[entry] for entry in found if entry in standing]
        every = [standing.get(entry, entry) for entry in found]
        ledger = self.ledger
        origins_of = self.origins | dict(zip(made, origins, strict=True))
        stand_ins, before = [*self.stand_ins.entries, *made], found[:]
        rows, tails = copied_rows(
            ledger.tables, self.storage.ledger.tables, list(map(row_of, origins)), [entry.length for entry in made]
        )
        try:
            name_rows(made, rows, tails)
            if not self.stand_ins.released:
                ledger.holds.add(self.stand_ins)
            found[:] = every  # as long as it was
            ledger.extend(hold, held)  # of which who releases the hold lets go, also where this fails
            self._hold_roots(origins, made)
        except Exception:
            found[:] = before
            ledger.leave(rows)
            raise
        # No call from here on, and nothing that needs memory.
        self.stand_ins.entries, self.origins, self.roots = stand_ins, origins_of, roots
        return made

    def adopt_below(self, new: dict[RootKey, Entry], found: list[Entry | None], lower: Hold) -> list[Entry]:
        """As `adopt`, of those of `new` that are in the tier, which leave it; `lower` holds what `found` has of them.

        Returns those that the search did not have before. The scope's shard held.
        """
        tier = self.storage.tier
        if tier is None:
            return []
        stayed = {root: self.roots_below[root] for root in new if root in self.roots_below}  # others' by now
        standing: dict[Entry | None, Entry] = {new[root]: entry for root, entry in stayed.items()}
        fresh = {
            root: entry
            for root, entry in new.items()
            if entry.scope.above is not None and root not in self.roots and root not in stayed
        }
        with gate.lock, tier.ledger.mutex:
            tier.ledger.extend(self.below_hold, list(fresh.values()))
            tier.ledger.extend(lower, list(standing.values()))
        self.roots_below = self.roots_below | fresh
        self.found_below.update(stayed)
        found[:] = [standing.get(entry, entry) for entry in found]
        for root in (*stayed, *fresh):
            del new[root]
        return list(fresh.values())

    def not_below(self, keys: list[Hashable]) -> list[Hashable]:
        """Those of some keys of which no root stayed in the tier. The scope's shard held."""
        known = {key for _, key in self.roots_below}
        return [key for key in keys if key not in known]

    def part_below(self, condition: Callable[[Hashable], bool]) -> list[Entry]:
        """Let go of the roots in the tier whose keys meet a condition; returns them. The scope's shard held."""
        return self._part_below({root for root in self.roots_below if condition(root[1])})

    def disown_below(self, entries: Collection[Entry]) -> list[Entry]:
        """Undo `adopt_below`, of those that nothing has found since; returns them. The scope's shard held."""
        if self.scope.ended is not None:
            return []
        unfound = [root for root in self.roots_below if root not in self.found_below]
        return self._part_below({root for root in unfound if self.roots_below[root] in entries})

    def _part_below(self, roots: set[RootKey]) -> list[Entry]:
        """Let go of some roots in the tier. The caller keeps them until it has let go of the scope's shard."""
        tier = self.storage.tier
        if not roots or tier is None:
            return []
        leaving = [self.roots_below[root] for root in roots]
        staying = {root: entry for root, entry in self.roots_below.items() if root not in roots}
        with gate.lock, tier.ledger.mutex:
            self.roots_below = staying
            tier.ledger.drop_from(self.below_hold, leaving)
        self.found_below -= roots
        return leaving

    def _hold_roots(self, origins: list[Entry], stand_ins: list[Entry]) -> None:
        """Hold roots in the books of the storage, whose policies hear of the hits. Mutex held.

        Where it raises, nothing is held.
        """
        storage = self.storage.ledger
        with gate.lock, storage.mutex:
            self.budget.visit(origins)
            storage.extend(self.roots_hold, origins)

    def disown(self, stand_ins: list[Entry]) -> list[Entry]:
        """Undo `adopt`, of those that nothing has found since; returns what may die. Mutex and shard held."""
        if self.scope.ended is not None:
            return []
        leaving = {entry for entry in stand_ins if entry.refs == 1}
        return self.part_with(
            list(leaving), {root: entry for root, entry in self.roots.items() if entry not in leaving}
        )

    def root_under(self, entry: Entry) -> tuple[Entry | None, int]:
        """The root with the most of its newest tokens at the beginning of an entry, and how many. Mutex held."""
        tables = self.ledger.tables
        slots = slots_of_row(tables, entry.row)
        found: tuple[Entry | None, int] = None, 0
        for stand_in, origin in self.origins.items():
            of_root = slots_of_row(tables, stand_in.row)
            shared = int(np.isin(slots, of_root).sum())
            if shared > found[1] and np.array_equal(slots[:shared], of_root[-shared:]):
                found = origin, shared
        return found

    def parted_roots(self, keys: Container[Hashable]) -> tuple[dict[RootKey, Entry], list[Entry]]:
        """The roots of these keys, and the stand-ins of the others. The scope's shard held."""
        roots = {root: entry for root, entry in self.roots.items() if root[1] in keys}
        return roots, [entry for root, entry in self.roots.items() if root not in roots]

    def parted_from_roots(
        self, keys: Collection[Hashable], found: Sequence[Entry | None]
    ) -> tuple[dict[RootKey, Entry], list[Entry], list[Hashable]]:
        """The roots beside those of `keys` of which none was `found`, their stand-ins, and which are no root's either.

        The scope's shard held.
        """
        wanted = {key for key, entry in zip(keys, found, strict=True) if entry is None}
        if not wanted:
            return self.roots, [], []
        known = {key for _, key in self.roots}
        roots, leaving = self.parted_roots(known - wanted)
        return roots, leaving, list(wanted - known)

    def part_with(self, stand_ins: Sequence[Entry], roots: dict[RootKey, Entry]) -> list[Entry]:
        """Let go of the roots of stand-ins as soon as no other entry of the search names their slots. Mutex held.

        `roots` are those that stay.

        Returns what may die; what stays is looked at again whenever an entry dies, or one of them is let go of.
        """
        ledger, part = self.ledger, self._part
        parted = ledger.parted.union(stand_ins)
        # No call from here to the next line, and nothing that needs memory.
        self.roots, ledger.parted, ledger.part = roots, parted, part
        try:
            return part()
        except Exception:  # no memory, no frames: a little later
            ledger.abandoned.append(partial(ledger.again, [part]))
            return []

    def _part(self) -> list[Entry]:
        """Mutex held."""
        ledger, storage = self.ledger, self.storage.ledger
        going = self._named_by_none_beside([entry for entry in ledger.parted if entry.refs == 1])
        if not going:
            return []
        origins, leaving = [self.origins[entry] for entry in going], set(going)
        staying = [entry for entry in self.stand_ins.entries if entry not in leaving]
        parted, part = ledger.parted.difference(going), ledger.part
        ticks = self._all_ticks()
        let_go, parting = partial(self._let_go_of_roots, origins, ticks), iter(going)
        once: list[Callable[[], object] | None] = [let_go]
        ledger.tables.leave(list(map(row_of, going)))  # no slot of theirs is the search's
        # No call of a Python function from here to the next comment, and nothing that needs memory.
        self.stand_ins.entries, ledger.parted, ledger.part = staying, parted, part if parted else None
        for entry in parting:
            entry.row, entry.refs = -1, 0
            del self.origins[entry]
        # What fails from here on is done a little later.
        try:
            with gate.lock, storage.mutex:
                died = let_go()
                once[0] = None
                ledger.waiters += storage.waiters
                storage.waiters.clear()
            going += died
        except Exception:
            storage.abandoned.append(partial(storage.again, once))
        return going

    def _let_go_of_roots(self, origins: list[Entry], ticks: Ticks) -> list[Entry]:
        """Drop the references of roots, once every use of their slots is noted; returns the dead. Both mutexes held."""
        if ticks is not NO_TICKS:
            self.storage.ledger.stamp_reads(origins, ticks)
        return self.storage.ledger.drop_from(self.roots_hold, origins)

    def _named_by_none_beside(self, entries: list[Entry]) -> list[Entry]:
        """Those of some stand-ins whose slots no entry beside these names. Mutex held."""
        tables = self.ledger.tables
        while entries:
            of_each = [slots_of_row(tables, entry.row) for entry in entries]
            slots, rows = np.unique(np.concatenate(of_each), return_counts=True)
            elsewhere = slots[weights_of(tables, slots) > rows]
            staying = [not np.isin(slots, elsewhere).any() for slots in of_each]
            if all(staying):
                break
            entries = [entry for entry, goes in zip(entries, staying, strict=True) if goes]
        return entries

    # Checks ----------------------------------------------------------------------------------------------------------

    def check(self, deadline: Deadline) -> SearchCheck:
        """Compare its books with a recount."""
        with gate.lock, self.locks.read(self.scope.shards, deadline), self.ledger.mutex:
            found = self._check()
        return found

    def _check(self) -> SearchCheck:
        """Mutex and shard held."""
        ledger, budget, stand_ins = self.ledger, self.budget, self.stand_ins.entries
        recount = recount_of(ledger, {self.account: [self.scope]})
        foreign = slots_of_entries(ledger, stand_ins)
        problems, report = compare(ledger, recount, foreign)
        problems += index_problems([self.scope])
        stored = recount.published[self.account]
        name = self.scope.name

        def note(text: str) -> None:
            problems.append(Problem(f"{name} {text}"))

        if budget.entries != len(stored):
            note(f"counts {budget.entries} entries, {len(stored)} are stored")
        if ledger.grants:
            note(f"has {ledger.grants} writes under way")
        if ledger.slots.size != budget.max_slots + ledger.borrowed:
            note(f"has {ledger.slots.size} slots, {budget.max_slots} reserved and {ledger.borrowed} borrowed")
        if ledger.borrowed and ledger.slots.free_count:
            note(f"owes {ledger.borrowed} slots, and has {ledger.slots.free_count} free")
        if self.origins.keys() != set(stand_ins) or Counter(self.origins.values()) != Counter(self.roots_hold.entries):
            note("does not hold each root that it has a stand-in of, once")
        tables = self.storage.ledger.tables
        for entry, origin in self.origins.items():
            if not np.array_equal(slots_of_row(ledger.tables, entry.row), slots_of_row(tables, origin.row)):
                problems.append(Problem("has other slots than its stand-in", origin))
        own = np.flatnonzero(slots_of_entries(ledger, recount.alive()) & ~foreign)
        entries, free, referenced, handles = report
        handles -= self.stand_ins in ledger.holds
        report = IntegrityReport(entries - len(stand_ins), free, referenced, handles)
        return SearchCheck(problems, report, np.concatenate([own, ledger.slots.free_slots()]))

    def mend(self, deadline: Deadline, used: Ticks, kept: list[object]) -> tuple[RepairReport, SlotArray]:
        """Set every count of its books as a recount finds it; or, if nobody will end it any more, note its end."""
        with gate.lock, self.locks.write(self.scope.shards, deadline), self.ledger.mutex:
            return self._mended(used, kept)

    def _mended(self, used: Ticks, kept: list[object]) -> tuple[RepairReport, SlotArray]:
        """Mutex and shard held."""
        with gate.lock, self.storage.ledger.mutex:  # whatever it read of them
            self.storage.ledger.stamp_reads(self.origins.values(), used)
        kept += [*self.roots.values(), *self.origins, *self.origins.values(), *self.gone]
        free = RepairReport(-self.ledger.slots.free_count, 0, 0)  # they are the storage's until `top_up`
        is_over = self.roots_hold.is_orphan or self.ended is not None
        report, slots = self._note_end(kept) if is_over else self._mend(kept)
        return summed(report, free), slots

    def _note_end(self, kept: list[object]) -> tuple[RepairReport, SlotArray]:
        """Its books are rebuilt without it. Mutex and shard held."""
        self.scope.ended = self.budget.ended = self.ended or "the search was dropped without being closed"
        kept += [self.own.take_all(), *self.ledger.holds]
        for hold in (*self.batches, *self.ledger.holds, self.roots_hold):
            hold.released = True
        self.ledger.holds.clear()
        self.ledger.when_idle = None
        self.roots, self.origins, self.gone, self.stand_ins.entries = {}, {}, [], []
        self.ledger.parted, self.ledger.part = frozenset(), None
        pending, self.finished = self.ledger.grants, True
        with gate.lock, self.storage.ledger.mutex:
            self._pool.searches.discard(self)
            self._fold_counters()
        return RepairReport(0, 0, pending), NO_SLOTS

    def _mend(self, kept: list[object]) -> tuple[RepairReport, SlotArray]:
        """Mutex and shard held."""
        known = set(self.stand_ins.entries) & self.origins.keys()
        self.origins = {entry: origin for entry, origin in self.origins.items() if entry in known and entry.row >= 0}
        self.stand_ins.entries = list(self.origins)
        if not self.origins.keys() >= set(self.roots.values()):  # otherwise no key is looked at
            self.roots = {root: entry for root, entry in self.roots.items() if entry in self.origins}
        roots = set(self.roots.values())
        self.ledger.parted = frozenset(entry for entry in self.origins if entry not in roots)
        self.ledger.part = self._part if self.ledger.parted else None
        with gate.lock, self.storage.ledger.mutex:
            self.roots_hold.entries = list(self.origins.values())
        report, own = rebuild_search(self.ledger, self.scope, self.stand_ins, kept)
        self.budget.entries = len(self.own)
        return report, np.flatnonzero(own)

    def top_up(self) -> None:
        """Take free slots of the storage until it has what it has reserved."""
        ledger, storage = self.ledger, self.storage.ledger
        with gate.lock, ledger.mutex:
            lacking = self.budget.max_slots - ledger.slots.size
            ledger.borrowed = max(0, -lacking)
            with gate.lock, storage.mutex:
                runs = storage.slots.part(lacking) if lacking > 0 else []
            ledger.slots.add(runs or [])


def _stand_ins_of(origins: list[Entry]) -> list[Entry]:
    """Entries like these roots, for the books of a search."""
    if not origins:
        return []
    keys, lengths, sides, priorities, hashes, corrections = map(list, zip(*map(_SEEN, origins), strict=True))
    first = origins[0]
    made = new_entries(
        keys, first.scope, first.generation, lengths, sides, priorities, hashes, corrections, first.written
    )
    for entry, origin in zip(made, origins, strict=True):
        entry.scope, entry.generation = origin.scope, origin.generation
        entry.written = entry.ticks = origin.written
    return made


def _entries_in(holds: list[Hold]) -> int:
    return sum([len(hold.entries) for hold in holds])
