"""A search over a tiny init pool and recurrent pool under a scheduler."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from concurrent_kv import Batch, KVPool, Search
from concurrent_kv.locks.deadline import Deadline
from concurrent_kv.pool.core import bump_versions
from concurrent_kv.search.search import open_search

from .history import Kind, Value
from .scheduler import BrokenPromiseError, Scheduler
from .world import LAYOUT, WINDOW, World, append, entries_of, keys_values, rows_of

__all__ = ["SearchWorld"]

ENV = 0


class SearchWorld(World):
    """`pool` is the init pool of the one environment; searches pay from `recur`. Their keys start at 10.

    Args:
        scheduler, setting: as `World`.
        recur_entries, recur_slots: quota of the recurrent pool.
        search: entries and slots that the search `search` reserves before the program begins; None: there is none.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        *,
        recur_entries: int = 2,
        recur_slots: int = 2 * WINDOW,
        search: tuple[int, int] | None = (2, 2 * WINDOW),
        **setting: Any,
    ) -> None:
        super().__init__(scheduler, more_slots=recur_slots, **setting)
        self.recur = KVPool(LAYOUT, recur_entries, max_slots=recur_slots, storage=self.storage, name="recur")
        self.own: dict[int, Value] = {}  # what the search must still have while it is open
        self._may_be: dict[int, Value] = {}  # what commits that were cut short may have stored in it
        self._numbers = 0
        if search is not None:
            self.search = self.open(*search)

    def pools(self) -> Sequence[KVPool]:
        return [self.pool, self.recur] if hasattr(self, "recur") else [self.pool]

    def open(self, entries: int, slots: int) -> Search:
        """Open a search as `KVCacheManager.search` does."""
        self._numbers += 1
        return open_search(
            self.recur,
            {ENV: self.pool},
            [ENV],
            number=self._numbers,
            entries_per_env=entries,
            entries=entries,
            tokens=slots,
            order="own_first",
            overflow=None,
            deadline=Deadline(10.0),
        )

    def bump(self) -> None:
        """As `KVCacheManager.bump_version`."""
        with self._call(Kind.CLEAR):
            bump_versions(self.pools(), "cache", self.storage.enter())

    def fill_recur(self, what: Mapping[int, Value]) -> None:
        """Put entries that no search owns into the recurrent pool, before the program begins."""
        for key, stored in what.items():
            self.recur.put(key, keys_values((stored,)))

    def gather_here(self, keys: Sequence[int]) -> Batch:
        """Gather through the search; what it must have and what was once stored is all that it may find."""
        expected = [self.own.get(key) for key in keys]
        batch = self.search.gather(keys, [ENV] * len(keys))
        for key, own, found in zip(keys, expected, rows_of(batch), strict=True):
            if found not in ([own] if own else [*self._once_stored(key), None]):
                batch.close()
                raise BrokenPromiseError(f"the search found {found} for {key}")
        return batch

    def grow(self, children: Mapping[int, tuple[int, int]]) -> bool:
        """Gather parents and commit children through the search, `{child: (parent, label)}`; whether all were hits."""
        with self.gather_here([parent for parent, _ in children.values()]) as batch:
            rows = rows_of(batch)
            if None in rows:
                return False
            append(batch, [label for _, label in children.values()])
            grown = {
                child: (*row, label)
                for (child, (_, label)), row in zip(children.items(), rows, strict=True)
                if row is not None
            }
            self._may_be.update(grown)
            self.search.commit(list(children), batch)
        self.own.update(grown)
        return True

    def promote(self, key: int, as_key: int) -> bool:
        with self._call(Kind.WRITE, [as_key], [self.own[key]]) as call:
            call.since, call.stored = call.began, self.search.promote(key, ENV, as_key=as_key)
        return call.stored

    def drop(self) -> None:
        """Forget the search without closing it."""
        self.own.clear()
        del self.search

    def release(self, *keys: int) -> None:
        for key in keys:
            del self.own[key]
        self.search.release(keys)

    def _once_stored(self, key: int) -> list[Value]:
        written = [
            stored
            for call in self.calls
            if call.kind is Kind.WRITE
            for at, stored in zip(call.keys, call.writes, strict=True)
            if at == key
        ]
        return [found for found in (self.before.get(key), self._may_be.get(key)) if found is not None] + written

    def watch(self) -> None:
        """Also: what searches reserved is not taken by others."""
        super().watch()
        for pool in self.pools():
            if len(entries_of(pool.default_scope)) + pool.account.reserved_entries > pool.account.max_entries:
                raise BrokenPromiseError(f"{pool.name} holds more entries than its searches leave")

    def check_statistics(self) -> None:
        """Rows that a search asks for count in several pools: programs over one pool check them."""

    def check(self) -> None:
        """The world's checks, with the search still open and after it closed; then nothing of it is left."""
        super().check()
        if hasattr(self, "search"):
            if not self.search.closed:
                for key in self.own:
                    self.gather_here([key]).close()
            self.search.close()
            super().check()
        account, ledger = self.recur.account, self.storage.ledger
        lacking = ledger.num_slots - ledger.slots.size
        if account.reserved_entries or account.reserved_slots or lacking:
            raise BrokenPromiseError(
                f"no search is open, and {account.reserved_entries} entries and {account.reserved_slots} slots are "
                f"reserved in the quota, and the storage lacks {lacking}"
            )
