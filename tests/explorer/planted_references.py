"""Bugs to plant in references, evictions and epochs; each function is named after what is wrong."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import pytest

from concurrent_kv.books.ledger import wake
from concurrent_kv.books.records import Entry, Generation, Hold, Located, Scope
from concurrent_kv.locks.deadline import Deadline
from concurrent_kv.pool import committing, reading, writing
from concurrent_kv.pool.clearing import sweep_if
from concurrent_kv.pool.core import PoolCore
from concurrent_kv.pool.plan import WritePlan
from concurrent_kv.pool.room import unpublish

Patch = pytest.MonkeyPatch


def references_released_before_commit_shares_them(patch: Patch) -> None:
    def write(pool: PoolCore, scope: Scope, generation: Generation, plan: WritePlan, deadline: Deadline) -> bool:
        for hold in [hold for hold in pool.ledger.holds if hold.what in ("batch", "commit")]:
            hold.users = 0
            pool.ledger.release(hold)
        return writing.write(pool, scope, generation, plan, deadline)

    patch.setattr("concurrent_kv.pool.committing.write", write)


def slots_freed_before_the_readers_copy_is_done(patch: Patch) -> None:
    def copy_out(domain: Any, entry: Entry, to: Any = None) -> Any:
        domain.ledger.release(next(hold for hold in domain.ledger.holds if entry in hold.entries))
        return reading.copy_out(domain, entry, to)

    patch.setattr("concurrent_kv.pool.pool.copy_out", copy_out)


def _patch_retain(patch: Patch, *, compared: bool, under_the_shard: bool) -> None:
    def retain(
        storage: Any,
        located: Located,
        keys: Sequence[Hashable],
        hashes: Sequence[int],
        generations: dict[Scope, Generation],
        deadline: Deadline,
        *,
        hold: Hold,
        quiet: bool = False,
    ) -> list[Entry | None]:
        def extend() -> None:
            with storage.ledger.mutex:
                storage.ledger.extend(hold, [entry for entry in found if entry is not None])

        with storage.locks.read(located.shards, deadline):
            found = [part.get(key) for part, key in zip(located.parts, keys, strict=True)]
            if compared:
                found = [entry if entry and entry.generation is generations[entry.scope] else None for entry in found]
            if under_the_shard:
                extend()
        if not under_the_shard:
            extend()
        return found

    patch.setattr("concurrent_kv.pool.pool.retain", retain)


def references_taken_after_the_shard_was_let_go(patch: Patch) -> None:
    _patch_retain(patch, compared=True, under_the_shard=False)


def index_reference_dropped_twice(patch: Patch) -> None:
    def remove(pool: PoolCore, scope: Scope, entry: Entry, deadline: Deadline) -> bool:
        part = scope.part_of(entry.key_hash)
        with pool.storage.locks.write((scope.shards[part],), deadline), pool.storage.ledger.mutex:
            scope.entries[part].pop(entry.key, None)
            unpublish(pool, [entry])
        return True

    patch.setattr("concurrent_kv.pool.pool.remove", remove)


def _patch_evict(patch: Patch, *, checked: bool) -> None:
    def evict(pool: PoolCore, victim: Entry, deadline: Deadline) -> None:
        ledger, scope = pool.storage.ledger, victim.scope
        part = scope.part_of(victim.key_hash)
        with pool.storage.locks.write((scope.shards[part],), deadline):
            if checked and scope.entries[part].get(victim.key) is not victim:
                return
            scope.entries[part].pop(victim.key, None)
            with ledger.mutex:
                unpublish(pool, [victim])
                waiters = ledger.take_waiters()
        wake(waiters)

    patch.setattr("concurrent_kv.pool.room._evict", evict)


def victim_not_checked_again_under_its_lock(patch: Patch) -> None:
    _patch_evict(patch, checked=False)


def victim_pinned_meanwhile_evicted_all_the_same(patch: Patch) -> None:
    _patch_evict(patch, checked=True)


def epochs_not_compared_by_reads(patch: Patch) -> None:
    _patch_retain(patch, compared=False, under_the_shard=True)


def epoch_of_a_commit_read_after_the_gather(patch: Patch) -> None:
    def open_batch(storage: Any, scope: Scope, generation: Generation, *rest: Any) -> Any:
        return committing.open_batch(storage, scope, scope.generation, *rest)

    patch.setattr("concurrent_kv.pool.pool.open_batch", open_batch)


def epoch_of_a_commit_read_at_the_commit(patch: Patch) -> None:
    def write(pool: PoolCore, scope: Scope, generation: Generation, plan: WritePlan, deadline: Deadline) -> bool:
        return writing.write(pool, scope, scope.generation, plan, deadline)

    patch.setattr("concurrent_kv.pool.committing.write", write)


def swept_before_the_epoch_is_raised(patch: Patch) -> None:
    def renew(self: PoolCore, deadline: Deadline, scopes: Any = None) -> None:
        for scope in self.scopes():
            sweep_if(self, scope, lambda entry: True, deadline)
            with self.storage.ledger.mutex:
                scope.generation = Generation(scope.generation.epoch + 1, scope.generation.version)

    patch.setattr(PoolCore, "renew", renew)
