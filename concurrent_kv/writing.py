"""The write half of the protocol: reserve all slots or none, copy with no lock held, publish all or nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from .entry import Entry, Generation, Place, Scope
from .errors import CapacityError, ClosedError, SearchEndedError, WaitTimeoutError
from .ledger import wake
from .locks import Deadline
from .plan import WritePlan
from .quota import Budget
from .reading import sorted_shards
from .slots import Slots
from .streams import NO_TICKS, Ticks, merge
from .tensors import plain_torch_state

if TYPE_CHECKING:
    from torch import Tensor

    from .pool import KVPool

__all__ = ["reserve_budget", "unpublish", "write"]

VICTIMS_PER_HOLD = 64  # candidates looked at in one hold of the mutex


class Outcome(Enum):
    """How an attempt to publish ended."""

    PUBLISHED = "published"
    STALE = "stale"  # the scope's epoch or version is over
    NO_ROOM = "no room"  # what it would have replaced, or shared slots with, has left the pool meanwhile


@dataclass
class Ticket:
    """What a write in flight has taken; given back whole if it fails."""

    entries: int  # pending in the quota (or the budget)
    slots: int
    taken: Slots
    ticks: Ticks
    spent: bool = False  # published: an exception after that must not give the slots back


def write(pool: KVPool, scope: Scope, generation: Generation, plan: WritePlan, deadline: Deadline) -> bool:
    """Store what `plan` says, all of it or nothing.

    Returns False, with nothing stored, if `scope` was cleared or its version bumped since `generation`.

    Raises:
        CapacityError: it can never fit.
        WaitTimeoutError: no room, or a shard not free, before the deadline.
        ClosedError: the pool is closed; SearchEndedError: the search is over.
    """
    storage = pool.storage
    ledger, clock = storage.ledger, storage.clock
    located = [(scope, scope.part_of(key)) for key in plan.keys]
    ticket = _reserve(pool, scope, plan, located, deadline)
    used = ticket.ticks
    entries: list[Entry] = []
    try:
        stream = clock.current()
        clock.order_after(stream, merge(merge(ticket.ticks, plan.shared_writes), storage.zeroed))
        written = NO_TICKS
        if plan.source is not None:
            temporaries: tuple[Tensor, ...] = (plan.source,)
            try:
                with plain_torch_state():
                    temporaries += storage.tensor.scatter(
                        plan.source, plan.rows, plan.columns, ticket.taken, plan.difference, plan.runs
                    )
            finally:
                written = clock.stamp(stream, temporaries)
                used = merge(used, written)
            ledger.written_at[ticket.taken] = plan.written_at
            plan.tables[plan.own] = ticket.taken
        entries = _new_entries(pool, scope, generation, plan, merge(written, plan.shared_writes))
        while True:
            outcome, missing = _publish(pool, scope, generation, entries, plan, located, ticket, deadline)
            if outcome is not Outcome.NO_ROOM:
                break
            _make_room(pool, *missing, deadline)
            ticket.entries += missing[0]
            ticket.slots += missing[1]
    except BaseException:
        _cancel(pool, scope, ticket, used)
        raise
    if outcome is Outcome.STALE:
        _cancel(pool, scope, ticket, used)
    return outcome is Outcome.PUBLISHED


def _new_entries(pool: KVPool, scope: Scope, generation: Generation, plan: WritePlan, written: Ticks) -> list[Entry]:
    entries = []
    for i, key in enumerate(plan.keys):
        entry = Entry(
            key,
            scope,
            generation,
            int(plan.kept[i]),
            side=plan.sides[i],
            priority=plan.priorities[i],
            fingerprint=hash((scope.number, key)) if pool.policy.observes_hits else 0,
            correction=plan.corrections[i],
        )
        entry.written = entry.ticks = written
        entries.append(entry)
    return entries


# Room ------------------------------------------------------------


def _reserve(
    pool: KVPool, scope: Scope, plan: WritePlan, located: Sequence[tuple[Scope, int]], deadline: Deadline
) -> Ticket:
    """All the slots a plan needs, and its place in the quota, or nothing."""
    count, slots = len(plan.keys), plan.num_slots
    if scope.budget is not None:
        return _take(pool, scope.budget, count, slots, count, slots, deadline)
    pool.check_capacity(count, slots + plan.foreign_slots)
    replaced = []
    with pool.storage.locks.read(sorted_shards(located), deadline):
        for (_, part), key in zip(located, plan.keys, strict=True):
            entry = scope.entries[part].get(key)
            if entry is not None:
                replaced.append(entry)
        with pool.storage.ledger.mutex:
            freed = pool.quota.exclusive(pool.storage.ledger.tables_of(replaced)) if replaced else 0
    return _take(pool, None, count - len(replaced), max(0, slots + plan.foreign_slots - freed), count, slots, deadline)


def _take(
    pool: KVPool,
    budget: Budget | None,
    new_entries: int,
    new_slots: int,
    count: int,
    slots: int,
    deadline: Deadline,
) -> Ticket:
    """Take slots and quota together, evicting or waiting until both are there."""
    ledger, quota = pool.storage.ledger, pool.quota
    while True:
        with ledger.mutex:
            pool.check_open()
            if budget is not None:
                _extend(pool, budget, *budget.missing(count, slots))
                short_entries, short_slots = budget.missing(count, slots)
                fits = not short_entries and not short_slots
            else:
                fits = quota.fits(new_entries, new_slots)
                short_entries = 0 if quota.fits(new_entries, 0) else new_entries
            if fits:
                taken = ledger.slots.allocate(slots, None if budget is None else budget.reservation)
                if taken is not None:
                    if budget is None:
                        quota.pending_entries += new_entries
                        quota.pending_slots += new_slots
                        return Ticket(new_entries, new_slots, *taken)
                    budget.entries += count
                    return Ticket(count, slots, *taken)
            if (
                budget is not None
                and (short_entries or short_slots)
                and not quota.can_ever_fit(short_entries, short_slots)
            ):
                raise _budget_error(pool, budget, short_entries, short_slots)
            # A pure replacement evicts nobody, however full the storage is: its own old entry will make the room.
            may_evict = budget is not None or new_entries > 0 or new_slots > 0
            victim, waiter = _victim_or_waiter(pool, may_evict, want_slots=not short_entries)
        _evict_or_wait(pool, victim, waiter, deadline, count, slots)


def _extend(pool: KVPool, budget: Budget, entries: int, slots: int) -> None:
    """Grow a search's budget beyond what it reserved, if the pool has room just now. Mutex held."""
    quota = pool.quota
    if (entries or slots) and quota.fits(entries, slots):
        if slots and not pool.storage.ledger.slots.extend(budget.reservation, slots):
            return
        budget.max_entries += entries
        quota.reserved_entries += entries
        quota.reserved_slots += slots


def _budget_error(pool: KVPool, budget: Budget, entries: int, slots: int) -> CapacityError:
    need_entries, need_slots = budget.max_entries + entries, budget.reservation.size + slots
    return CapacityError(
        f"the search reserved {budget.max_entries} entries and {budget.reservation.size} slots in {pool.name} and "
        f"needs {entries} entries and {slots} slots more, which are reserved by others; open it with "
        f"entries={need_entries} and tokens={need_slots}, and a pool that holds as much for every search open at once",
        required_entries=need_entries,
        required_slots=need_slots,
    )


def _make_room(pool: KVPool, entries: int, slots: int, deadline: Deadline) -> None:
    """Count `entries` and `slots` more as pending in the pool's quota, evicting or waiting until they fit."""
    ledger, quota = pool.storage.ledger, pool.quota
    while True:
        with ledger.mutex:
            pool.check_open()
            if quota.fits(entries, slots):
                quota.pending_entries += entries
                quota.pending_slots += slots
                return
            victim, waiter = _victim_or_waiter(pool, True, want_slots=quota.fits(entries, 0))
        _evict_or_wait(pool, victim, waiter, deadline, entries, slots)


def reserve_budget(pool: KVPool, entries: int, slots: int, deadline: Deadline) -> Budget:
    """Set room aside for a search, evicting what no search owns; or an error that says which capacity would do."""
    ledger, quota = pool.storage.ledger, pool.quota
    while True:
        with ledger.mutex:
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
            _evict(pool, victim, deadline)
        elif waiter is not None and not waiter.wait(deadline.left()):
            break
    with ledger.mutex:
        need_entries, need_slots = quota.reserved_entries + entries, quota.reserved_slots + slots
    raise CapacityError(
        f"{pool.name} cannot set {entries} entries and {slots} slots aside for this search: it holds at most "
        f"{quota.max_entries} entries and {quota.max_slots} slots, and other searches reserved "
        f"{need_entries - entries} and {need_slots - slots}; a capacity of {need_entries} entries and "
        f"{need_slots} slots would do (or a search with fewer environments, simulations or tokens)",
        required_entries=need_entries,
        required_slots=need_slots,
    )


def _victim_or_waiter(pool: KVPool, may_evict: bool, *, want_slots: bool) -> tuple[Entry | None, Any]:
    """A claimed victim, or an event that is set at the next release, or neither: look again. Mutex held."""
    ledger = pool.storage.ledger
    if not may_evict:
        return None, ledger.waiter()
    for _ in range(VICTIMS_PER_HOLD):
        victim = pool.policy.pop_victim()
        if victim is None:
            if want_slots or not ledger.unpark_shared(pool):
                return None, ledger.waiter()
        elif victim.pins:
            victim.place = Place.PINNED
        elif want_slots and ledger.shares_tail(victim):
            ledger.park_shared(victim)
        else:
            victim.place = Place.CLAIMED
            return victim, None
    return None, None


def _evict_or_wait(
    pool: KVPool, victim: Entry | None, waiter: Any, deadline: Deadline, entries: int, slots: int
) -> None:
    if victim is not None:
        _evict(pool, victim, deadline)
    elif waiter is not None and not waiter.wait(deadline.left()):
        quota = pool.quota
        raise WaitTimeoutError(
            f"{pool.name}: no room for {entries} entries and {slots} slots within {deadline.seconds:g} s: of "
            f"{quota.max_entries} entries and {quota.max_slots} slots, {quota.entries} and {quota.slots} are stored, "
            f"{quota.reserved_entries} and {quota.reserved_slots} reserved by searches, and nothing can be evicted "
            "(pinned, or held by open batches)"
        )


def _evict(pool: KVPool, victim: Entry, deadline: Deadline) -> None:
    """Take a claimed victim out of the index, if it is still there and still nobody's."""
    ledger, scope = pool.storage.ledger, victim.scope
    part = scope.part_of(victim.key)
    dead: list[Entry] = []
    waiters: list[Any] = []
    try:
        with pool.storage.locks.write((scope.shards[part],), deadline):
            still_there = scope.entries[part].get(victim.key) is victim
            with ledger.mutex:
                if victim.pins and still_there:
                    victim.place = Place.PINNED
                elif still_there:
                    del scope.entries[part][victim.key]
                    dead = unpublish(pool, [victim])
                    pool.counters.eviction_count += 1
                    waiters = ledger.take_waiters()
    except BaseException:
        with ledger.mutex:
            if victim.place is Place.CLAIMED:
                victim.place = Place.HELD
                pool.policy.give_back(victim)
            waiters = ledger.take_waiters()  # somebody may have found no victim because this one was claimed
        wake(waiters)
        raise
    wake(waiters)
    del dead


def unpublish(pool: KVPool, entries: Sequence[Entry], *, counted_out: bool = False) -> list[Entry]:
    """Books of entries that left the index: policy, the index's reference, and the quota unless that was done before.

    Returns the dead. Mutex held.
    """
    ledger = pool.storage.ledger
    if not entries:
        return []
    for entry in entries:
        if entry.place is Place.HELD:
            pool.policy.remove(entry)
        ledger.forget_parked(entry)
        entry.place = Place.NONE
        entry.published = False
    budget = entries[0].scope.budget
    if not counted_out:
        if budget is None:
            pool.quota.remove(ledger.tables_of(entries))
        else:
            budget.entries -= len(entries)
    return ledger.let_go(entries)


# Publication ------------------------------------------------------------


def _publish(
    pool: KVPool,
    scope: Scope,
    generation: Generation,
    entries: Sequence[Entry],
    plan: WritePlan,
    located: Sequence[tuple[Scope, int]],
    ticket: Ticket,
    deadline: Deadline,
) -> tuple[Outcome, tuple[int, int]]:
    """Make all entries visible together, or none; and the entries and slots that are missing where there is no room."""
    ledger = pool.storage.ledger
    dead: list[Entry] = []
    with pool.storage.locks.write(sorted_shards(located), deadline):
        if scope.ended is not None:
            raise SearchEndedError(scope.ended)
        if pool.closed:
            raise ClosedError(f"{pool.name} is closed")
        # Under the shards' write locks: a clear that raises the epoch from here on will sweep what is published here.
        if scope.generation is not generation:
            with ledger.mutex:
                pool.counters.stale_write_count += len(entries)
            return Outcome.STALE, (0, 0)
        parts = [scope.entries[part] for _, part in located]
        replaced = [part.get(entry.key) for part, entry in zip(parts, entries, strict=True)]
        old = [entry for entry in replaced if entry is not None]
        missing = _count_in(pool, scope, plan, old, ticket)
        if any(missing):
            return Outcome.NO_ROOM, missing
        try:
            for part, entry in zip(parts, entries, strict=True):
                part[entry.key] = entry
        except BaseException:
            _restore(parts, entries, replaced)
            _count_out(pool, scope, plan, old, ticket)
            raise
        with ledger.mutex:
            ledger.make(entries, plan.tables)
            dead = unpublish(pool, old, counted_out=True)
            for entry in entries:
                entry.published = True
                if scope.budget is None:
                    entry.place = Place.HELD
                    pool.policy.add(entry)
                else:
                    entry.place = Place.EXEMPT
            if scope.budget is not None:
                scope.budget.entries -= len(old)
            pool.counters.insert_count += len(entries) - len(old)
            pool.counters.replace_count += len(old)
            ticket.spent = True
            waiters = ledger.take_waiters()
    wake(waiters)
    del dead, old, replaced
    return Outcome.PUBLISHED, (0, 0)


def _count_in(pool: KVPool, scope: Scope, plan: WritePlan, old: Sequence[Entry], ticket: Ticket) -> tuple[int, int]:
    """Exchange old entries for new ones in the quota; or change nothing and say by how much that would exceed it."""
    if scope.budget is not None:
        return 0, 0
    ledger, quota = pool.storage.ledger, pool.quota
    with ledger.mutex:
        quota.pending_entries -= ticket.entries
        quota.pending_slots -= ticket.slots
        quota.add(plan.tables)
        if old:
            quota.remove(ledger.tables_of(old))
        missing = quota.excess()
    if any(missing):
        _count_out(pool, scope, plan, old, ticket)
    return missing


def _count_out(pool: KVPool, scope: Scope, plan: WritePlan, old: Sequence[Entry], ticket: Ticket) -> None:
    """Undo `_count_in`."""
    if scope.budget is None:
        ledger, quota = pool.storage.ledger, pool.quota
        with ledger.mutex:
            if old:
                quota.add(ledger.tables_of(old))
            quota.remove(plan.tables)
            quota.pending_entries += ticket.entries
            quota.pending_slots += ticket.slots


def _restore(parts: Sequence[dict[Any, Entry]], entries: Sequence[Entry], replaced: Sequence[Entry | None]) -> None:
    """Undo the index changes of a publication that failed in a key's own `__eq__` or `__hash__`."""
    for part, entry, old in zip(parts, entries, replaced, strict=True):
        if part.get(entry.key) is entry:
            if old is None:
                del part[entry.key]
            else:
                part[entry.key] = old


def _cancel(pool: KVPool, scope: Scope, ticket: Ticket, used: Ticks) -> None:
    """Give back what a write took and did not publish."""
    ledger = pool.storage.ledger
    with ledger.mutex:
        if ticket.spent:
            return
        ticket.spent = True
        ledger.slots.give_back(ticket.taken, used)
        if scope.budget is None:
            pool.quota.pending_entries -= ticket.entries
            pool.quota.pending_slots -= ticket.slots
        else:
            scope.budget.entries -= ticket.entries
        waiters = ledger.take_waiters()
    wake(waiters)
