"""Room for a write: slots and quota taken together, from what is free, else from victims, else after a bounded wait."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..books.entry import Entry, Place, Scope, sorted_shards
from ..books.ledger import wake
from ..books.quota import Budget
from ..books.slots import ONE, Slots
from ..device.streams import Ticks
from ..errors import CapacityError, SearchEndedError, WaitTimeoutError
from ..locks.deadline import Deadline
from ..locks.gate import gate

if TYPE_CHECKING:
    from .core import PoolCore
    from .plan import WritePlan

__all__ = [
    "Ticket",
    "cancel",
    "check_budget",
    "give_budget_back",
    "make_room",
    "reserve",
    "reserve_budget",
    "unpublish",
]

VICTIMS_PER_HOLD = 64  # candidates looked at in one hold of the mutex


@dataclass
class Ticket:
    """What a write in flight has taken; given back whole if it fails."""

    entries: int  # pending in the quota (or the budget)
    slots: int
    taken: Slots
    ticks: Ticks
    lent: Slots | None = None  # of `taken`, beyond what the search had left: what is replaced makes up for them
    spent: bool = False  # published: an exception after that must not give the slots back


def reserve(
    pool: PoolCore, scope: Scope, plan: WritePlan, located: Sequence[tuple[Scope, int]], deadline: Deadline
) -> Ticket:
    """All the slots a plan needs, and its place in the quota (or in its search's budget), or nothing."""
    budget = scope.budget
    if budget is not None:
        ticket = _take_reserved(pool, budget, len(plan.keys), plan.num_slots)
        if ticket is not None:
            return ticket
        return _take_from_budget(pool, budget, plan, partial(_freed_by, pool, scope, plan, located, deadline), deadline)
    pool.quota.check_size(pool.name, len(plan.keys), plan.num_slots + plan.shared_slots(pool.storage.ledger.tables))
    freed = _freed_by(pool, scope, plan, located, deadline)
    return _take(pool, plan, freed, deadline)


def _freed_by(
    pool: PoolCore, scope: Scope, plan: WritePlan, located: Sequence[tuple[Scope, int]], deadline: Deadline
) -> tuple[int, int]:
    """Entries and slots that go when a plan's keys are replaced."""
    with gate.lock, pool.storage.locks.read(sorted_shards(located), deadline):
        replaced = _present(scope, plan, located)
        if not replaced:
            return 0, 0
        ledger = pool.storage.ledger
        with gate.lock, ledger.mutex:
            tables = ledger.tables_of(replaced)
            slots = pool.quota.exclusive(tables) if scope.budget is None else ledger.slots.exclusive(tables)
    return len(replaced), slots


def _present(scope: Scope, plan: WritePlan, located: Sequence[tuple[Scope, int]]) -> list[Entry]:
    """The entries that a plan's keys have now. Their shards held."""
    keys = zip(located, plan.keys, plan.hashes, strict=True)
    found = (scope.entries[part].get(key, key_hash) for (_, part), key, key_hash in keys)
    return [entry for entry in found if entry is not None]


def _take(pool: PoolCore, plan: WritePlan, freed: tuple[int, int], deadline: Deadline) -> Ticket:
    """Take slots and quota together, evicting or waiting until both are there."""
    ledger, quota = pool.storage.ledger, pool.quota
    entries = len(plan.keys) - freed[0]
    slots = max(0, plan.num_slots + plan.foreign_slots - freed[1])
    while True:
        with gate.lock, ledger.mutex:
            pool.check_open()
            if quota.fits(entries, slots):
                taken = ledger.slots.allocate(plan.num_slots)
                if taken is not None:
                    quota.pending_entries += entries
                    quota.pending_slots += slots
                    return Ticket(entries, slots, *taken)
            # A pure replacement evicts nobody, however full the storage is: its own old entry will make the room.
            # (Not where that can never be: the headroom is for a few windows at a time.)
            may_evict = entries > 0 or slots > 0 or plan.num_slots > pool.storage.headroom_slots
            victim, waiter = _victim_or_waiter(pool, may_evict, want_slots=quota.fits(entries, 0))
        try:
            _evict_or_wait(pool, victim, waiter, deadline, len(plan.keys), plan.num_slots)
        except BaseException:
            if victim is not None:
                ledger.abandoned.append(partial(ledger.again, partial(_give_back, pool, victim)))
            raise
        del victim  # here, where no lock is held: it may be the last to name the entry


def _take_reserved(pool: PoolCore, budget: Budget, entries: int, slots: int) -> Ticket | None:
    """Take room from what a search has left of its reservation; None with nothing taken if that is not enough."""
    with gate.lock, pool.storage.ledger.mutex:
        pool.check_open()
        # In the same hold as the taking: what a closed search took would never come back.
        if budget.ended is not None:
            raise SearchEndedError(budget.ended)
        if budget.entries + entries > budget.max_entries or slots > budget.reservation.left:
            return None
        taken = pool.storage.ledger.slots.allocate(slots, budget.reservation)
        if taken is None:
            return None
        budget.entries += entries
        return Ticket(entries, slots, *taken)


def _take_from_budget(
    pool: PoolCore,
    budget: Budget,
    plan: WritePlan,
    look_up_freed: Callable[[], tuple[int, int]],
    deadline: Deadline,
) -> Ticket:
    """Take what a search reserved; beyond that, what the pool has or can evict, or an error that says what would do."""
    ledger, quota = pool.storage.ledger, pool.quota
    count, slots = len(plan.keys), plan.num_slots
    freed, looked = (0, 0), False
    while True:
        if budget.missing(count, slots) != (0, 0):
            # What the write replaces makes up for what is missing; looked up only then, as it costs a shard.
            freed = look_up_freed()
        with gate.lock, ledger.mutex:
            pool.check_open()
            # In the same hold as the taking: what a closed search took would never come back.
            if budget.ended is not None:
                raise SearchEndedError(budget.ended)
            entries_short, slots_short = _beyond(budget, count, slots, freed)
            if entries_short or slots_short:
                _extend(pool, budget, entries_short, slots_short)
                entries_short, slots_short = _beyond(budget, count, slots, freed)
            if not entries_short and not slots_short:
                reserved = budget.reservation.left
                taken = ledger.slots.allocate(slots, budget.reservation)
                if taken is not None:
                    budget.entries += count
                    return Ticket(count, slots, *taken, lent=taken.slots[reserved:] if slots > reserved else None)
            elif freed == (0, 0) and not looked:
                looked = True  # somebody else took what was left meanwhile
                continue
            elif not quota.can_ever_fit(entries_short, slots_short):
                raise _budget_error(pool, budget, entries_short, slots_short)
            victim, waiter = _victim_or_waiter(pool, True, want_slots=not entries_short)
        try:
            _evict_or_wait(pool, victim, waiter, deadline, count, slots)
        except BaseException:
            if victim is not None:
                ledger.abandoned.append(partial(ledger.again, partial(_give_back, pool, victim)))
            raise
        del victim  # as in `_take`


def _beyond(budget: Budget, count: int, slots: int, freed: tuple[int, int]) -> tuple[int, int]:
    return budget.missing(count - freed[0], slots - freed[1])


def _extend(pool: PoolCore, budget: Budget, entries: int, slots: int) -> None:
    """Grow a search's budget beyond what it reserved, if the pool has room just now. Mutex held."""
    quota = pool.quota
    if (entries or slots) and quota.fits(entries, slots):
        if slots and not pool.storage.ledger.slots.extend(budget.reservation, slots):
            return
        budget.max_entries += entries
        quota.reserved_entries += entries
        quota.reserved_slots += slots


def check_budget(pool: PoolCore, budget: Budget, replaced: int) -> None:
    """Raise `CapacityError` unless a search's entries fit once `replaced` of them are gone. Mutex held."""
    over = budget.entries - replaced - budget.max_entries
    if over > 0:
        _extend(pool, budget, over, 0)
        if budget.entries - replaced > budget.max_entries:
            raise _budget_error(pool, budget, over, 0)


def _budget_error(pool: PoolCore, budget: Budget, entries: int, slots: int) -> CapacityError:
    need_entries, need_slots = budget.max_entries + entries, budget.reservation.size + slots
    return CapacityError(
        f"the search reserved {budget.max_entries} entries and {budget.reservation.size} slots in {pool.name} and "
        f"needs {entries} entries and {slots} slots more, which are reserved by others; open it with "
        f"entries={need_entries} and tokens={need_slots}, and a pool that holds as much for every search open at once",
        required_entries=need_entries,
        required_slots=need_slots,
    )


def make_room(pool: PoolCore, entries: int, slots: int, deadline: Deadline) -> None:
    """Count `entries` and `slots` more as pending in the pool's quota, evicting or waiting until they fit."""
    ledger, quota = pool.storage.ledger, pool.quota
    while True:
        with gate.lock, ledger.mutex:
            pool.check_open()
            if quota.fits(entries, slots):
                quota.pending_entries += entries
                quota.pending_slots += slots
                return
            victim, waiter = _victim_or_waiter(pool, True, want_slots=quota.fits(entries, 0))
        try:
            _evict_or_wait(pool, victim, waiter, deadline, entries, slots)
        except BaseException:
            if victim is not None:
                ledger.abandoned.append(partial(ledger.again, partial(_give_back, pool, victim)))
            raise
        del victim  # as in `_take`


def reserve_budget(pool: PoolCore, entries: int, slots: int, deadline: Deadline) -> Budget:
    """Set room aside for a search, evicting what no search owns; or an error that says which capacity would do."""
    ledger, quota = pool.storage.ledger, pool.quota
    while True:
        with gate.lock, ledger.mutex:
            pool.check_open()
            if entries > quota.max_entries or slots > quota.max_slots:
                break  # no waiting will help
            if quota.fits(entries, slots):
                reservation = ledger.slots.reserve(slots)
                if reservation is not None:
                    quota.reserved_entries += entries
                    quota.reserved_slots += slots
                    return Budget(quota, reservation, entries)
            may_evict = quota.can_ever_fit(entries, slots)
            victim, waiter = _victim_or_waiter(pool, may_evict, want_slots=quota.fits(entries, 0))
        if victim is not None:
            try:
                _evict(pool, victim, deadline)
            except BaseException:
                ledger.abandoned.append(partial(ledger.again, partial(_give_back, pool, victim)))
                raise
        elif waiter is None:
            deadline.step(pool.name, VICTIMS_PER_HOLD)
        elif not _wait(pool, waiter, deadline):
            deadline.leave_loop(pool.name)
            break
        del victim  # as in `_take`
    with gate.lock, ledger.mutex:
        need_entries, need_slots = quota.reserved_entries + entries, quota.reserved_slots + slots
        if quota.can_ever_fit(entries, slots):
            # Everything that could be evicted was; what is left is pinned or held.
            need_entries += quota.entries + quota.pending_entries
            need_slots += quota.slots + quota.pending_slots
    raise CapacityError(
        f"{pool.name} cannot set {entries} entries and {slots} slots aside for this search: it holds at most "
        f"{quota.max_entries} entries and {quota.max_slots} slots, and what other searches reserved or "
        f"somebody pins is {need_entries - entries} and {need_slots - slots}; a capacity of {need_entries} entries and "
        f"{need_slots} slots would do (or a search with fewer environments, simulations or tokens)",
        required_entries=need_entries,
        required_slots=need_slots,
    )


def give_budget_back(pool: PoolCore, budget: Budget) -> None:
    """Return what a search reserved; nothing happens the second time. Mutex held."""
    slots = pool.storage.ledger.slots.cancel(budget.reservation)
    # No call from the return of that one to the end, so that no asynchronous exception parts what belongs together.
    quota = pool.quota
    quota.reserved_slots -= slots
    quota.reserved_entries -= budget.max_entries
    budget.max_entries = 0


def _victim_or_waiter(pool: PoolCore, may_evict: bool, *, want_slots: bool) -> tuple[Entry | None, Any]:
    """A claimed victim, or an event that is set at the next release, or neither: look again. Mutex held."""
    ledger = pool.storage.ledger
    if not may_evict:
        return None, ledger.waiter()
    for _ in range(VICTIMS_PER_HOLD):
        victim = pool.policy.pop_victim()
        if victim is None:
            if want_slots or not ledger.unpark_shared(pool, VICTIMS_PER_HOLD):
                return None, ledger.waiter()
            continue
        victim.place = Place.CLAIMED
        try:
            if victim.pins:
                victim.place = Place.PINNED
            elif want_slots and ledger.shares_tail(victim):
                ledger.park_shared(victim)
            else:
                return victim, None
        except BaseException:
            ledger.abandoned.append(partial(ledger.again, partial(_give_back, pool, victim)))
            raise
    return None, None


def _evict_or_wait(
    pool: PoolCore, victim: Entry | None, waiter: Any, deadline: Deadline, entries: int, slots: int
) -> None:
    if victim is not None:
        _evict(pool, victim, deadline)
    elif waiter is None:
        deadline.step(pool.name, VICTIMS_PER_HOLD)  # so many were looked at in vain
    elif not _wait(pool, waiter, deadline):
        quota = pool.quota
        raise WaitTimeoutError(
            f"{pool.name}: no room for {entries} entries and {slots} slots within {deadline.seconds:g} s: of "
            f"{quota.max_entries} entries and {quota.max_slots} slots, {quota.entries} and {quota.slots} are stored, "
            f"{quota.reserved_entries} and {quota.reserved_slots} reserved by searches, and nothing can be evicted "
            "(pinned, or held by open batches)"
        )


def _wait(pool: PoolCore, waiter: Any, deadline: Deadline) -> bool:
    """Wait for a release, first of all of what was dropped without being closed; False when the time is over."""
    if pool.storage.ledger.abandoned:
        deadline.leave_loop(pool.name)
        # Looked at after the waiter was registered, so that what is dropped from here on wakes it.
        pool.storage.drain_abandoned(deadline)
        return not pool.storage.ledger.abandoned or deadline.left() > 0
    if deadline.wait_on(waiter) and not deadline.cancelled:
        return True
    with gate.lock, pool.storage.ledger.mutex:
        pool.storage.ledger.forget_waiter(waiter)
    return False


def _evict(pool: PoolCore, victim: Entry, deadline: Deadline) -> None:
    """Take a claimed victim out of the index, if it is still there and still nobody's."""
    ledger, scope = pool.storage.ledger, victim.scope
    dead: list[Entry] = []
    waiters: list[Any] = []
    try:
        deadline.step(pool.name)  # a long entry may take the room of many short ones, a search that of a pool
        part = scope.part_of(victim.key_hash)
        with gate.lock, pool.storage.locks.write((scope.shards[part],), deadline), ledger.mutex:
            if victim.pins:
                victim.place = Place.PINNED
                return
            if not scope.entries[part].remove(victim):
                return
            try:
                dead = unpublish(pool, [victim])
            except Exception:
                ledger.abandoned.append(partial(ledger.again, partial(unpublish, pool, [victim])))
                raise
            pool.counters.eviction_count += 1
            waiters = ledger.take_waiters()
    except BaseException:
        with gate.lock, ledger.mutex:
            _give_back(pool, victim)
            waiters = ledger.take_waiters()  # somebody may have found no victim because this one was claimed
        wake(waiters)
        raise
    wake(waiters)
    del dead


def _give_back(pool: PoolCore, victim: Entry) -> None:
    """Make a claimed victim a candidate again, if it is still in the index. Mutex held."""
    scope = victim.scope
    if victim.place is Place.CLAIMED and scope.entries[scope.part_of(victim.key_hash)].holds(victim):
        pool.policy.give_back(victim)
        victim.place = Place.HELD


def unpublish(pool: PoolCore, entries: list[Entry], *, counted_out: bool = False) -> list[Entry]:
    """Books of entries that left the index: policy, the index's reference, and the quota unless that was done before.

    Returns the dead. Where it raises it can be done again: what takes effect once comes last. Mutex held.
    """
    ledger = pool.storage.ledger
    if not entries:
        return []
    for entry in entries:
        if entry.place is not Place.EXEMPT:
            pool.policy.remove(entry)  # also of victims that were given out and have not come back
        ledger.forget_parked(entry)
        entry.place = Place.NONE
    budget, quota = entries[0].scope.budget, pool.quota
    if budget is None:
        tables = None if counted_out else ledger.tables_of(entries)
        before = quota.entries, quota.slots
        if tables is not None:
            quota.remove(tables)
        try:
            return ledger.let_go(entries)
        except Exception:
            if tables is not None:
                np.add.at(quota.counts, tables.ravel(), ONE)
                quota.entries, quota.slots = before
            raise
    slots = np.unique(ledger.tables_of(entries)) if budget.promoted_to else None
    dead = ledger.let_go(entries)
    if not counted_out:
        budget.entries -= len(entries)
    if slots is not None:
        try:
            _discharge(pool, budget, slots)
        except Exception:  # no memory, no frames
            ledger.abandoned.append(partial(ledger.again, partial(_discharge, pool, budget, slots)))
    return dead


def _discharge(pool: PoolCore, budget: Budget, slots: npt.NDArray[np.int64]) -> None:
    """What only init pools name now is paid for by them; the search can use its room again. Mutex held."""
    allocator = pool.storage.ledger.slots
    counts = allocator.counts[slots]
    elsewhere = sum([quota.counts[slots] for quota in budget.promoted_to])
    allocator.discharge(budget.reservation, slots[(slots > 0) & (counts > 0) & (counts == elsewhere)])


def cancel(pool: PoolCore, scope: Scope, ticket: Ticket, used: Ticks) -> None:
    """Give back what a write took and did not publish."""
    ledger = pool.storage.ledger
    with gate.lock, ledger.mutex:
        if ticket.spent:
            return
        ticket.spent = True
        try:
            ledger.slots.give_back(ticket.taken, used)
        except Exception:
            ticket.spent = False
            raise
        if scope.budget is None:
            pool.quota.pending_entries -= ticket.entries
            pool.quota.pending_slots -= ticket.slots
        else:
            scope.budget.entries -= ticket.entries
        waiters = ledger.take_waiters()
    wake(waiters)
