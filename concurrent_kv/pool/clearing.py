"""Taking entries out of the index: one, or everything in a scope that is older than its generation."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Sequence
from functools import partial
from typing import Any

from ..books.entry import Entry, Scope
from ..books.index import Index
from ..books.ledger import wake
from ..locks.deadline import Deadline
from ..locks.gate import gate
from .room import unpublish

__all__ = ["discard", "remove", "remove_all", "sweep", "sweep_if", "take_out"]

ENTRIES_PER_HOLD = 256  # entries whose books are closed in one hold of the mutex


def remove(scope: Scope, entry: Entry, deadline: Deadline) -> bool:
    """Take `entry` out of the index if it is still the entry of its key."""
    pool = scope.pool
    ledger = pool.storage.ledger
    part = scope.part_of(entry.key_hash)
    with gate.lock, pool.storage.locks.write((scope.shards[part],), deadline):
        deadline.check(pool.name)
        if not scope.entries[part].remove(entry):
            return False
        with gate.lock, ledger.mutex:
            pool.counters.removal_count += 1
            try:
                dead = unpublish(pool, [entry])
            except Exception:
                ledger.abandoned.append(partial(ledger.again, partial(unpublish, pool, [entry])))
                raise
            waiters = ledger.take_waiters()
    wake(waiters)
    del dead
    return True


def discard(scope: Scope, key: Hashable) -> None:
    """Have the next operation remove the entry that `key` has now. Takes no lock: finalisers come here."""
    # A look without the shard: what is stored under the key later is another entry, and stays.
    entry = scope.entries[scope.part_of(hash(key))].get(key)
    if entry is not None:
        scope.pool.storage.ledger.abandon(partial(remove, scope, entry))


def remove_all(scope: Scope, keys: Collection[Hashable], deadline: Deadline) -> list[Hashable]:
    """Take the entries of all `keys` out of a scope of one shard; or none, and return the keys that it lacks."""
    dead: list[Entry] = []
    index = scope.entries[0]
    with gate.lock, scope.pool.storage.locks.write(scope.shards, deadline):
        deadline.check(scope.pool.name)
        going = index.find_each(keys)
        if None in going:
            return _lacking(keys, going)
        waiters = take_out(scope, index, going, dead)
    wake(waiters)
    # Also what is not among the dead may die here: whoever else held it may have let go of it meanwhile.
    del dead, going
    return []


def _lacking(keys: Collection[Hashable], found: list[Entry | None]) -> list[Hashable]:
    return [key for key, entry in zip(keys, found, strict=True) if entry is None]


def take_out(scope: Scope, index: Index[Entry], going: Sequence[Entry | None], dead: list[Entry]) -> list[Any]:
    """Take entries out and close their books; the dead join `dead`. Returns whom to wake. The shard's write lock held.

    The caller keeps `going` until it has let go of the shard: what another thread still reads dies with the last of
    the two.
    """
    pool = scope.pool
    ledger = pool.storage.ledger
    # The newest first: what they share with older ones goes with those, and the slots that were written together are
    # free together.
    ahead = list(reversed(going))
    for begin in range(0, len(ahead), ENTRIES_PER_HOLD):
        some: list[Entry] = []
        try:
            # One after the other: whatever is raised on the way, `some` has those that have left.
            some.extend(filter(index.remove, filter(None, ahead[begin : begin + ENTRIES_PER_HOLD])))
            with gate.lock, ledger.mutex:
                dead += unpublish(pool, some)
                pool.counters.removal_count += len(some)
        except Exception:
            ledger.abandoned.append(partial(ledger.again, partial(unpublish, pool, some)))
            raise
    with gate.lock, ledger.mutex:
        return ledger.take_waiters()


def sweep(scope: Scope, deadline: Deadline) -> None:
    """Remove every entry of an older generation than the scope's, one shard at a time."""
    sweep_if(scope, lambda entry: entry.generation is not scope.generation, deadline)


def sweep_if(scope: Scope, condition: Callable[[Entry], bool], deadline: Deadline) -> int:
    """Remove the entries that meet `condition` (no user code); returns how many.

    Holds one shard at a time, for work that grows with the entries of that shard; the mutex for bounded work.
    """
    pool = scope.pool
    removed = 0
    for part, shard in enumerate(scope.shards):
        dead: list[Entry] = []
        with gate.lock, pool.storage.locks.write((shard,), deadline):
            going = scope.entries[part].chosen(condition)
            waiters = take_out(scope, scope.entries[part], going, dead)
        wake(waiters)
        removed += len(going)
        # Keys and side data are finalised here, outside of every lock.
        del dead, going
    return removed
