"""The write half of the protocol: reserve all slots or none, copy with no lock held, publish all or nothing."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import TYPE_CHECKING

from ..books.entries import new_entries, occupy
from ..books.entry import Entry, Generation, Place, Scope, sorted_shards
from ..books.index import find_places, take_away
from ..books.ledger import wake
from ..device.streams import NO_TICKS, Ticks, merge
from ..errors import ClosedError, SearchEndedError
from ..locks.deadline import Deadline
from ..locks.gate import gate
from .plan import WritePlan
from .room import Ticket, cancel, check_budget, make_room, reserve, unpublish

if TYPE_CHECKING:
    from torch import Tensor

    from .core import PoolCore
    from .storage import KVStorage

__all__ = ["write"]


class Outcome(Enum):
    """How an attempt to publish ended."""

    PUBLISHED = "published"
    STALE = "stale"  # the scope's epoch or version is over
    NO_ROOM = "no room"  # what it would have replaced, or shared slots with, has left the pool meanwhile


def write(pool: PoolCore, scope: Scope, generation: Generation, plan: WritePlan, deadline: Deadline) -> bool:
    """Store what `plan` says, all of it or nothing.

    Returns False, with nothing stored, if `scope` was cleared or its version bumped since `generation`.

    Raises:
        CapacityError: it can never fit.
        WaitTimeoutError: no room, or a shard not free, before the deadline.
        ClosedError: the pool is closed; SearchEndedError: the search is over.
    """
    storage = pool.storage
    ledger, clock = storage.ledger, storage.clock
    located = scope.locate(plan.hashes)
    ticket = reserve(pool, scope, plan, located, deadline)
    used = ticket.ticks
    entries: list[Entry] = []
    try:
        written = NO_TICKS
        if plan.source is not None:
            if clock.backend is None:
                _copy(storage, plan.source, plan, ticket)
            else:
                stream = clock.current()
                clock.order_after(stream, merge(ticket.ticks, storage.zeroed))
                temporaries: tuple[Tensor, ...] = (plan.source,)
                if plan.difference is not None:
                    temporaries += (plan.difference,)
                try:
                    temporaries += _copy(storage, plan.source, plan, ticket)
                finally:
                    written = clock.stamp(stream, temporaries)
                    used = merge(used, written)
        plan.place(ledger, ticket.taken)
        entries = _new_entries(scope, generation, plan, merge(written, plan.shared_writes))
        while True:
            outcome, missing = _publish(pool, scope, generation, entries, plan, located, ticket, deadline)
            if outcome is not Outcome.NO_ROOM:
                break
            make_room(pool, *missing, deadline)
            ticket.entries, ticket.slots = missing
    except BaseException:
        cancel(pool, scope, ticket, used)
        raise
    if outcome is Outcome.STALE:
        cancel(pool, scope, ticket, used)
    return outcome is Outcome.PUBLISHED


def _copy(storage: KVStorage, source: Tensor, plan: WritePlan, ticket: Ticket) -> tuple[Tensor, ...]:
    """Copy a plan's tokens into the slots taken for them; returns what has to live until that is done."""
    shape = plan.shape
    block = shape.block if type(ticket.taken) is range else None
    return storage.tensor.scatter(source, shape.rows, shape.columns, ticket.taken, plan.difference, plan.runs, block)


def _new_entries(scope: Scope, generation: Generation, plan: WritePlan, written: Ticks) -> list[Entry]:
    of_each = (plan.shape.lengths, plan.sides, plan.priorities, plan.hashes, plan.corrections)
    return new_entries(plan.keys, scope, generation, *of_each, written)


# Publication ------------------------------------------------------------


def _publish(
    pool: PoolCore,
    scope: Scope,
    generation: Generation,
    entries: list[Entry],
    plan: WritePlan,
    located: Sequence[tuple[Scope, int]],
    ticket: Ticket,
    deadline: Deadline,
) -> tuple[Outcome, tuple[int, int]]:
    """Make all entries visible together, or none; and the entries and slots that are missing where there is no room."""
    ledger = pool.storage.ledger
    dead: list[Entry] = []
    shards = scope.shards if len(scope.shards) == 1 else sorted_shards(located)
    with gate.lock, pool.storage.locks.write(shards, deadline):
        if deadline.caller is not None:
            deadline.check(pool.name)
        if scope.ended is not None:
            raise SearchEndedError(scope.ended)
        if pool.closed:
            raise ClosedError(f"{pool.name} is closed")
        # Under the shards' write locks: a clear that raises the epoch from here on will sweep what is published here.
        if scope.generation is not generation:
            with gate.lock, ledger.mutex:
                pool.counters.stale_write_count += len(entries)
            return Outcome.STALE, (0, 0)
        cells, replaced, old, added = find_places(scope.parts_of(located), plan.keys, plan.hashes)
        try:
            with gate.lock, ledger.mutex:
                missing = _admit(pool, scope, entries, plan, old, ticket)
                if ticket.spent:
                    dead = _enter(pool, scope, entries, cells, replaced, old, ticket)
                # Where it did not fit, others may: it keeps nothing while it waits for all that it needs.
                waiters = ledger.take_waiters()
        finally:
            if not ticket.spent:
                take_away(added)
    if waiters:
        wake(waiters)
    outcome = Outcome.PUBLISHED if ticket.spent else Outcome.NO_ROOM
    del dead, old, replaced, cells
    return outcome, missing


def _enter(
    pool: PoolCore,
    scope: Scope,
    entries: list[Entry],
    cells: list[list[Entry]],
    replaced: list[Entry | None],
    old: list[Entry],
    ticket: Ticket,
) -> list[Entry]:
    """Put admitted entries into their places, and close the books of the replaced; returns the dead. Mutex held."""
    budget = scope.budget
    occupy(cells, entries, replaced, Place.HELD if budget is None else Place.EXEMPT)
    dead = unpublish(pool, old, counted_out=True) if old else []
    if budget is not None:
        budget.entries -= len(old)
        if ticket.lent is not None:
            pool.storage.ledger.slots.charge(budget.reservation, ticket.lent)
    pool.counters.insert_count += len(entries) - len(old)
    pool.counters.replace_count += len(old)
    return dead


def _admit(
    pool: PoolCore, scope: Scope, entries: list[Entry], plan: WritePlan, old: list[Entry], ticket: Ticket
) -> tuple[int, int]:
    """Count the new entries in and the old ones out, and name the slots: the ticket is spent then. Mutex held.

    Or, where that would exceed the quota, take the ticket's place in it back and say how much the write needs.
    """
    ledger, quota = pool.storage.ledger, pool.quota
    if scope.budget is None:
        entries_taken, slots_taken = ticket.entries, ticket.slots
        # First: what is cut off here is lost until repair, and not given back twice, which would let too many in.
        ticket.entries = ticket.slots = 0
        quota.pending_entries -= entries_taken
        quota.pending_slots -= slots_taken
        before = quota.entries, quota.slots
        quota.add(plan.tables)
        if old:
            quota.remove(ledger.tables_of(old))
        if any(quota.excess()):
            needed = max(0, quota.entries - before[0]), max(0, quota.slots - before[1])
            _count_out(pool, plan, old)
            return needed
        leaving = [entry for entry in old if entry.place is Place.HELD]
        try:
            _change_candidates(pool, leaving, entries)
            ledger.make(entries, plan.placed)
        except BaseException:
            _keep_candidates(pool, leaving, entries)
            _count_out(pool, plan, old)
            raise
    else:
        # Less may be replaced than when the room was taken: a key may have been released meanwhile.
        check_budget(pool, scope.budget, len(old))
        ledger.make(entries, plan.placed)
    ticket.spent = True
    return 0, 0


def _change_candidates(pool: PoolCore, leaving: list[Entry], entries: list[Entry]) -> None:
    """Tell the policy which entries go and which come; it may be the user's, and raise. Nothing has taken effect."""
    for entry in leaving:
        pool.policy.remove(entry)
    for entry in entries:
        pool.policy.add(entry)


def _keep_candidates(pool: PoolCore, leaving: list[Entry], entries: list[Entry]) -> None:
    for entry in entries:
        pool.policy.remove(entry)
    for entry in reversed(leaving):
        pool.policy.give_back(entry)


def _count_out(pool: PoolCore, plan: WritePlan, old: list[Entry]) -> None:
    if old:
        pool.quota.add(pool.storage.ledger.tables_of(old))
    pool.quota.remove(plan.tables)
