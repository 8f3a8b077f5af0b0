"""The write half of the protocol: reserve all slots or none, copy with no lock held, publish all or nothing."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import TYPE_CHECKING, Any

from .entry import Entry, Generation, Place, Scope
from .errors import ClosedError, SearchEndedError
from .ledger import wake
from .locks import Deadline
from .plan import WritePlan
from .reading import sorted_shards
from .room import Ticket, cancel, make_room, reserve, unpublish
from .streams import NO_TICKS, Ticks, merge
from .tensors import plain_torch_state

if TYPE_CHECKING:
    from torch import Tensor

    from .pool_core import PoolCore

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
    located = [(scope, scope.part_of(key)) for key in plan.keys]
    ticket = reserve(pool, scope, plan, located, deadline)
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
            make_room(pool, *missing, deadline)
            ticket.entries += missing[0]
            ticket.slots += missing[1]
    except BaseException:
        cancel(pool, scope, ticket, used)
        raise
    if outcome is Outcome.STALE:
        cancel(pool, scope, ticket, used)
    return outcome is Outcome.PUBLISHED


def _new_entries(pool: PoolCore, scope: Scope, generation: Generation, plan: WritePlan, written: Ticks) -> list[Entry]:
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


# Publication ------------------------------------------------------------


def _publish(
    pool: PoolCore,
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
        deadline.check(pool.name)
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
            for part, entry, previous in zip(parts, entries, replaced, strict=True):
                if previous is not None:
                    # A dict keeps the key it has: without this the old key object would be finalised under the shard.
                    del part[previous.key]
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
                if ticket.lent is not None and len(ticket.lent):
                    ledger.slots.charge(scope.budget.reservation, ticket.lent)
            pool.counters.insert_count += len(entries) - len(old)
            pool.counters.replace_count += len(old)
            ticket.spent = True
            waiters = ledger.take_waiters()
    wake(waiters)
    del dead, old, replaced, previous
    return Outcome.PUBLISHED, (0, 0)


def _count_in(pool: PoolCore, scope: Scope, plan: WritePlan, old: Sequence[Entry], ticket: Ticket) -> tuple[int, int]:
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


def _count_out(pool: PoolCore, scope: Scope, plan: WritePlan, old: Sequence[Entry], ticket: Ticket) -> None:
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
        part.pop(entry.key, None)
        if old is not None:
            part[old.key] = old
