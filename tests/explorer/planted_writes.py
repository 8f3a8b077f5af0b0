"""Bugs to plant in publication, room and searches; each function is named after what is wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from typing import Any

import numpy as np
import pytest

from concurrent_kv.books.entries import new_entries
from concurrent_kv.books.ledger import Ledger, wake
from concurrent_kv.books.records import Account, Entry, Generation, Grant, Hold, Located, Place, Scope
from concurrent_kv.device.slot_numbers import Slots, as_array
from concurrent_kv.device.streams import NO_TICKS
from concurrent_kv.locks.deadline import Deadline
from concurrent_kv.pool import room, writing
from concurrent_kv.pool.clearing import sweep_if
from concurrent_kv.pool.core import PoolCore
from concurrent_kv.pool.plan import WritePlan
from concurrent_kv.pool.room import unpublish
from concurrent_kv.search.state import SearchState

Patch = pytest.MonkeyPatch


def epoch_compared_before_the_lock(patch: Patch) -> None:
    def publish(
        pool: PoolCore,
        scope: Scope,
        generation: Generation,
        entries: list[Entry],
        plan: WritePlan,
        located: Located,
        grant: Grant,
        deadline: Deadline,
    ) -> tuple[int, int] | None:
        if scope.generation is not generation:
            return None
        with pool.storage.locks.write(located.shards, deadline):
            _enter_books(pool, entries, plan, located, grant)
        return None

    patch.setattr("concurrent_kv.pool.writing._publish", publish)


def _enter_books(
    pool: PoolCore,
    entries: list[Entry],
    plan: WritePlan,
    located: Located,
    grant: Grant,
) -> None:
    """Publish to a pool that has room, checking nothing. Shards held."""
    old = [part[entry.key] for part, entry in zip(located.parts, entries, strict=True) if entry.key in part]
    with pool.storage.ledger.mutex:
        pool.account.pending_entries -= grant.entries
        pool.account.pending_slots -= grant.slots
        plan.make(pool.storage.ledger, entries, grant.taken)
        pool.account.uses.add([entry.row for entry in entries])
        pool.account.entries += len(entries)
        unpublish(pool, old)
        for part, entry in zip(located.parts, entries, strict=True):
            part.put(entry)
            entry.place = Place.HELD
            pool.policy.add(entry)
        grant.spent = True
        waiters = pool.storage.ledger.take_waiters()
    wake(waiters)


def batch_published_shard_by_shard(patch: Patch) -> None:
    def publish(
        pool: PoolCore,
        scope: Scope,
        generation: Generation,
        entries: list[Entry],
        plan: WritePlan,
        located: Located,
        grant: Grant,
        deadline: Deadline,
    ) -> tuple[int, int] | None:
        pending = grant
        taken = as_array(grant.taken)
        for row, entry in enumerate(entries):
            at = scope.locate(plan.hashes[row : row + 1])
            with pool.storage.locks.write(at.shards, deadline):
                one, first, number = copy(plan), sum(plan.shape.owned[:row]), plan.shape.owned[row]
                one.parents = plan.parents[row : row + 1]
                one.shape = plan.shape._replace(
                    kept=plan.shape.kept[row : row + 1],
                    owned=[number],
                    written_at=plan.shape.written_at[first : first + number],
                )
                pending.taken = taken[first : first + number]
                _enter_books(pool, [entry], one, at, pending)
            pending = Grant(0, 0, grant.taken, grant.ticks)
        return None

    patch.setattr("concurrent_kv.pool.writing._publish", publish)


def published_before_it_is_copied(patch: Patch) -> None:
    def write(pool: PoolCore, scope: Scope, generation: Generation, plan: WritePlan, deadline: Deadline) -> bool:
        located = scope.locate(plan.hashes)
        grant = room.reserve(pool, scope, generation, plan, located, deadline)
        if grant is None:
            return False
        of_each = (plan.shape.lengths, plan.sides, plan.priorities, plan.hashes, plan.corrections)
        entries = new_entries(plan.keys, scope, generation, *of_each, {})
        writing._publish(pool, scope, generation, entries, plan, located, grant, deadline)
        assert plan.source is not None
        pool.storage.tensor.scatter(plan.source, plan.shape.rows, plan.shape.columns, grant.taken)
        return True

    patch.setattr("concurrent_kv.pool.committing.write", write)


def shards_taken_in_the_order_of_the_keys(patch: Patch) -> None:
    locate = Scope.locate

    def unsorted(scope: Scope, hashes: Sequence[int]) -> Located:
        shards = dict.fromkeys(scope.shards[scope.part_of(key_hash)] for key_hash in hashes)
        return locate(scope, hashes)._replace(shards=tuple(shards))

    patch.setattr(Scope, "locate", unsorted)


def slots_reserved_one_at_a_time(patch: Patch) -> None:
    def reserve(
        pool: PoolCore,
        scope: Scope,
        generation: Generation,
        plan: WritePlan,
        located: Located,
        deadline: Deadline,
    ) -> Grant:
        taken: list[Slots] = []
        while len(taken) < plan.num_slots:
            with pool.storage.ledger.mutex:
                one = pool.storage.ledger.slots.allocate(1) if pool.account.fits(0, 1) else None
                if one is None:
                    victim, waiter = room._victim_or_waiter(pool, want_slots=True)
                else:
                    pool.account.pending_slots += 1
                    taken.append(one[0])
            if one is None:
                room._evict_or_wait(pool, victim, waiter, deadline, (1, 1))
        return Grant(0, len(taken), np.concatenate(taken), NO_TICKS)

    patch.setattr("concurrent_kv.pool.writing.reserve", reserve)


class _LateWaiter:
    def __init__(self, ledger: Ledger, register: Callable[[Ledger], Any]) -> None:
        self._ledger = ledger
        self._register = register

    def wait(self, timeout: float) -> bool:
        with self._ledger.mutex:
            event = self._register(self._ledger)
        return bool(event.wait(timeout))


def waiter_registered_after_the_mutex_was_let_go(patch: Patch) -> None:
    real = Ledger.waiter
    patch.setattr(Ledger, "waiter", lambda self: _LateWaiter(self, real))


def release_that_wakes_nobody(patch: Patch) -> None:
    def release(self: Ledger, hold: Hold) -> None:
        with self.mutex:
            self.end(hold)

    patch.setattr(Ledger, "release", release)


def reservation_of_a_search_not_respected(patch: Patch) -> None:
    def fits(self: Account, entries: int, slots: int) -> bool:
        return (
            entries <= self.max_entries - self.entries - self.pending_entries
            and slots <= self.max_slots - self.slots - self.pending_slots
        )

    patch.setattr(Account, "fits", fits)


def search_marked_as_ended_after_its_sweep(patch: Patch) -> None:
    real = SearchState.end

    def end(self: SearchState, reason: str, deadline: Deadline) -> None:
        sweep_if(self.pool, self.scope, lambda entry: True, deadline)
        with patch.context() as no_sweep:
            no_sweep.setattr("concurrent_kv.search.state.sweep_if", lambda *arguments: 0)
            real(self, reason, deadline)

    patch.setattr(SearchState, "end", end)
