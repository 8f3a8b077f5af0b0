"""Taking entries out of the index: one, or everything in a scope that is older than its generation."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from ..books.index import Index
from ..books.ledger import wake
from ..books.records import Entry, Scope
from ..locks.deadline import Deadline
from ..locks.gate import gate
from .room import unpublish

if TYPE_CHECKING:  # as in room.py
    from .storage import Domain

__all__ = ["discard", "remove", "sweep_if", "sweep_scopes", "take_out"]

ENTRIES_PER_HOLD = 256  # entries whose books are closed in one hold of the mutex
SCOPES_PER_HOLD = 256  # scopes that are looked into in one hold of a shard


def remove(domain: Domain, scope: Scope, entry: Entry, deadline: Deadline) -> bool:
    """Take `entry` out of the index if it is still the entry of its key."""
    ledger = domain.ledger
    part = scope.part_of(entry.key_hash)
    with gate.lock, domain.locks.write((scope.shards[part],), deadline):
        deadline.check(domain.name)
        if not scope.entries[part].remove(entry):
            return False
        try:
            with gate.lock, ledger.mutex:
                domain.counters.removal_count += 1
                dead = unpublish(domain, [entry])
        except Exception:
            ledger.abandoned.append(partial(ledger.again, [partial(unpublish, domain, [entry])]))
            raise
        with gate.lock, ledger.mutex:
            waiters = ledger.take_waiters()
    wake(waiters)
    del dead
    return True


def discard(domain: Domain, scope: Scope, key: Hashable) -> None:
    """Have the next operation remove the entry that `key` has now. Takes no lock: finalisers come here."""
    # A look without the shard: what is stored under the key later is another entry, and stays.
    part = scope.part_of(hash(key))
    entry = scope.entries[part].get(key)
    if scope.below is not None:
        # It may have moved by then, and have been moving just now.
        entry = entry or scope.below.entries[part].get(key) or scope.entries[part].get(key)
        if entry is not None:
            domain.ledger.abandon(partial(_remove_wherever, domain, scope, entry))
    elif entry is not None:
        domain.ledger.abandon(partial(remove, domain, scope, entry))


def _remove_wherever(domain: Domain, scope: Scope, entry: Entry, deadline: Deadline) -> None:
    """As `remove`, of an entry of a pool or of the tier beneath it, which may have moved to the other meanwhile."""
    part = scope.part_of(entry.key_hash)
    dead: list[Entry] = []
    going: list[Entry] = []
    with gate.lock, domain.locks.write((scope.shards[part],), deadline):
        deadline.check(domain.name)
        waiters = _take_line_out(domain, scope, part, entry, going, dead)
    wake(waiters)
    del dead, going


def _take_line_out(
    domain: Domain, scope: Scope, part: int, entry: Entry, going: list[Entry], dead: list[Entry]
) -> list[Any]:
    """Take out what an entry is now, which joins `going`; returns whom to wake. The shard's write lock held."""

    def is_same(other: Entry) -> bool:
        return other is entry or (line is not None and getattr(other, "line", None) is line)

    line = getattr(entry, "line", None)
    waiters: list[Any] = []
    for owner, where in ((domain, scope), (domain.storage.tier, scope.below)):
        if owner is not None and where is not None:
            found = where.entries[part].chosen_of(entry.key_hash, is_same)
            going += found
            waiters += take_out(owner, where.entries[part], found, dead)
    return waiters


def take_out(domain: Domain, index: Index[Entry], going: Sequence[Entry | None], dead: list[Entry]) -> list[Any]:
    """Take entries out and close their books; the dead join `dead`. Returns whom to wake. The shard's write lock held.

    The caller keeps `going` until it has let go of the shard: what another thread still reads dies with the last of
    the two.
    """
    ledger = domain.ledger
    # The newest first: what they share with older ones goes with those, and the slots that were written together are
    # free together.
    ahead = list(reversed(going))
    for begin in range(0, len(ahead), ENTRIES_PER_HOLD):
        some = index.remove_each(filter(None, ahead[begin : begin + ENTRIES_PER_HOLD]))
        try:
            with gate.lock, ledger.mutex:
                domain.counters.removal_count += len(some)
                died = unpublish(domain, some)
        except Exception:
            ledger.abandoned.append(partial(ledger.again, [partial(unpublish, domain, some)]))
            raise
        dead += died
    with gate.lock, ledger.mutex:
        return ledger.take_waiters()


def sweep_scopes(domain: Domain, scopes: Sequence[Scope], deadline: Deadline) -> None:
    """Remove every entry of an older generation than its scope's, of scopes of a pool, one shard at a time.

    Each shard is locked once for many scopes: of thousands, most may be empty.
    """
    by_shards: dict[tuple[int, ...], list[Scope]] = {}
    for scope in scopes:
        by_shards.setdefault(scope.shards, []).append(scope)
    for shards, alike in by_shards.items():
        for begin in range(0, len(alike), SCOPES_PER_HOLD):
            for part, shard in enumerate(shards):
                _sweep_part(domain, alike[begin : begin + SCOPES_PER_HOLD], part, shard, deadline)


def _sweep_part(domain: Domain, scopes: Sequence[Scope], part: int, shard: int, deadline: Deadline) -> None:
    """The part of `sweep_scopes` that one shard guards."""
    dead: list[Entry] = []
    going: list[Entry] = []
    waiters: list[Any] = []
    try:
        with gate.lock, domain.locks.write((shard,), deadline):
            _take_out_old(domain, scopes, part, going, dead, waiters)
    finally:
        wake(waiters)
        # Keys and side data are finalised here, outside of every lock.
        del dead, going


def _take_out_old(
    domain: Domain, scopes: Sequence[Scope], part: int, going: list[Entry], dead: list[Entry], waiters: list[Any]
) -> None:
    """Take out what is older than its scope, in one part of each scope. The shard's write lock held."""
    for scope in scopes:
        index, generation = scope.entries[part], scope.generation
        if index.cells:
            old = [entry for entry in index.values() if entry.generation is not generation]
            going += old  # dies outside of the shard, also where a key raises on the way
            waiters += take_out(domain, index, old, dead)


def sweep_if(domain: Domain, scope: Scope, condition: Callable[[Entry], bool], deadline: Deadline) -> int:
    """Remove the entries that meet `condition` (no user code); returns how many.

    Holds one shard at a time, for work that grows with the entries of that shard; the mutex for bounded work.
    """
    removed = 0
    for part, shard in enumerate(scope.shards):
        dead: list[Entry] = []
        with gate.lock, domain.locks.write((shard,), deadline):
            going = scope.entries[part].chosen(condition)
            waiters = take_out(domain, scope.entries[part], going, dead)
        wake(waiters)
        removed += len(going)
        # Keys and side data are finalised here, outside of every lock.
        del dead, going
    return removed
