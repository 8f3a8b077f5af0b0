"""`SearchState`: what an open search owns, and its end, which may come from its user or from outside."""

from __future__ import annotations

from collections.abc import Container, Hashable, Iterable, Mapping
from typing import TYPE_CHECKING

from ..books.entries import count_hits
from ..books.index import Index
from ..books.ledger import wake
from ..books.records import Entry, Hold, Scope
from ..errors import SearchEndedError
from ..locks.deadline import Deadline
from ..locks.gate import gate
from ..pool.clearing import drop_taken
from ..pool.room import give_budget_back

if TYPE_CHECKING:  # as in pool/room.py
    from ..pool.batch import Batch
    from ..pool.pool import KVPool

__all__ = ["RootKey", "SearchState"]

RootKey = tuple[Hashable, Hashable]  # (env_id, key)


class SearchState:
    """What a search owns: scope and budget, adopted roots, open batches. Ended once, by the first thread that ends it.

    The search's entries and its roots are guarded by one lock shard, that of its scope.
    """

    def __init__(self, pool: KVPool, init_pools: Mapping[Hashable, KVPool], number: int, scope: Scope) -> None:
        assert scope.budget is not None
        self.pool = pool
        self.init_pools = init_pools
        self.scope = scope
        self.budget = scope.budget
        self.roots: dict[RootKey, Entry] = {}  # under the scope's shard
        # Not pinning: a root may be evicted from its init pool like any other. The search keeps what it adopted.
        self.roots_hold = Hold("search", [])
        self.batches: list[Hold] = []  # under the mutex
        # Taken out of the index by its end, which has yet to close their books. Under the mutex.
        self.going: list[Entry] = []
        self.finished = False  # under the mutex
        # Weights versions that the search began with: a promotion must not carry its entries into a later one.
        self.versions = {env_id: init_pool.default_scope.version for env_id, init_pool in init_pools.items()}
        self.number = number

    @property
    def own(self) -> Index[Entry]:
        """The search's own entries, under the scope's shard."""
        return self.scope.entries[0]

    def parted_roots(self, keys: Container[Hashable]) -> tuple[dict[RootKey, Entry], list[Entry]]:
        """The roots of these keys, and the entries of the others. The scope's shard held."""
        roots = {root: entry for root, entry in self.roots.items() if root[1] in keys}
        return roots, [entry for root, entry in self.roots.items() if root not in roots]

    def own_beside(self, keys: Iterable[Hashable]) -> list[Entry]:
        """The search's own entries but those of `keys`. The scope's shard held."""
        kept = {id(entry) for key in keys if (entry := self.own.get(key)) is not None}
        return self.own.chosen(lambda entry: id(entry) not in kept)

    def with_roots(self, found: Mapping[RootKey, Entry]) -> dict[RootKey, Entry] | None:
        """The roots, then what was found in the init pools; None where they do not agree. The scope's shard held."""
        roots = self.roots.copy()
        for root, entry in found.items():
            if roots.setdefault(root, entry) is not entry:
                return None
        return roots

    @property
    def ended(self) -> str | None:
        """Why it has ended, or is about to be ended by a version bump; None while it is open."""
        return self.scope.ended or self.budget.ended

    def check_open(self) -> None:
        """Raise `SearchEndedError` if it has ended, or is about to be."""
        ended = self.scope.ended or self.budget.ended
        if ended is not None:
            raise SearchEndedError(ended)

    def track(self, batch: Batch) -> None:
        """Have an open batch end with the search, unless that has ended, which raises; count its hits and misses.

        Not earlier: while it was being copied, no end may let its entries go. Counted once, when nothing can time out
        any more: a call that is made again counts once too. Mutex held.
        """
        if self.scope.ended is not None or self.budget.ended is not None:
            self.check_open()
        if len(self.batches) > 64:
            self.batches = [hold for hold in self.batches if not hold.released]
        self.batches.append(batch.hold)
        missing, counters = batch.entries.count(None), self.pool.account.counters
        counters.hit_count += len(batch.entries) - missing - len(batch.others)
        counters.miss_count += missing
        if batch.others:
            count_hits(batch.others)

    def end_cut_off(self) -> list[Entry]:
        """Note the end of a search that no thread will end: it was dropped, or its end was cut off. All locks held.

        Its books are rebuilt without it. Returns what its end had taken out of the index.
        """
        self.scope.ended = self.budget.ended = self.ended or "the search was dropped without being closed"
        for hold in [self.roots_hold, *self.batches]:
            hold.released = True
            self.pool.storage.ledger.holds.discard(hold)
        self.pool.searches.discard(self)
        self.finished = True
        taken, self.going = self.going, []  # a later end must not close their books once more
        return taken

    def _end_holds(self) -> list[Entry]:
        """Let go of the roots and of what open batches read; returns the dead. Mutex held."""
        ledger = self.pool.storage.ledger
        dead = ledger.end(self.roots_hold)
        for hold in self.batches:
            dead += ledger.end(hold)
        return dead

    def end(self, reason: str, deadline: Deadline) -> None:
        """Release everything, and give what was reserved back. What a failed attempt left is done by the next."""
        storage = self.pool.storage
        ledger = storage.ledger
        with gate.lock, storage.locks.write(self.scope.shards, deadline):
            # From here on no batch is opened, no child published and no root adopted.
            if self.scope.ended is None:
                self.scope.ended = reason
            roots, self.roots = self.roots, {}
            taken, cells = self.own.take_all()
            with gate.lock, ledger.mutex:
                self.going += taken
        drop_taken(self.pool, self.going)
        with gate.lock, ledger.mutex:
            if self.finished:
                return
            self.budget.ended = self.budget.ended or self.scope.ended
            dead = self._end_holds()
            give_budget_back(self.pool, self.budget)
            self.pool.searches.discard(self)
            # Last: what is cut off before this is done by who ends it again, each step once.
            self.finished = True
            waiters = ledger.take_waiters()
        wake(waiters)
        del roots, dead, taken, cells
