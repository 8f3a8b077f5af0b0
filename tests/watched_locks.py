"""`Watch`: a look at every access to what belongs to a lock, and at the thread that has it."""

from __future__ import annotations

import sys
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import pytest

from concurrent_kv import KVStorage
from concurrent_kv.books.candidates import Candidates
from concurrent_kv.books.eviction import FIFO
from concurrent_kv.books.index import Index
from concurrent_kv.books.ledger import Ledger
from concurrent_kv.books.records import Account, Budget, Entry, Hold, Scope
from concurrent_kv.books.slots import SlotAllocator
from concurrent_kv.books.stats import Counters
from concurrent_kv.books.tables import _PythonTables, _PythonUses
from concurrent_kv.books.turns import Turns
from concurrent_kv.flights.table import FlightTable
from concurrent_kv.locks.deadline import Deadline
from concurrent_kv.locks.gate import gate
from concurrent_kv.locks.shards import ShardLocks
from concurrent_kv.search.state import SearchState
from tests.support import LOCKS

__all__ = ["FIELDS", "UNDER_THE_MUTEX", "Watch"]

# Calls "under the mutex", by their class.
UNDER_THE_MUTEX: dict[type, tuple[str, ...]] = {
    Ledger: (
        *("make", "let_go", "extend", "drop_from", "end", "use", "end_use", "waiter", "forget_waiter", "take_waiters"),
        *("give_back", "borrow", "pay_back", "look_idle", "leave"),
    ),
    Candidates: (
        *("withdraw", "set_aside", "shares_tail", "beside", "return_shared", "return_unshared"),
        *("return_unpinned", "arrange", "forget_parked"),
    ),
    SlotAllocator: (
        *("allocate", "release", "give_back", "part", "add", "whole_runs"),
        *("rebuild", "problems"),
    ),
    _PythonTables: ("enter", "leave", "exclusive", "named_elsewhere", "weights", "keep"),
    _PythonUses: ("add", "remove", "exclusive", "keep"),
    Turns: ("join", "leave", "clear"),
    FIFO: ("add", "remove", "pop_victim", "give_back"),
    Account: ("count", "count_from_zero", "fits"),
    Budget: ("visit", "count_roots"),
    SearchState: (
        *("track", "_end_holds", "_dissolve", "adopt", "part_with", "disown", "root_under"),
        *("own_slots", "_fold_counters"),
    ),
}
# Fields "under the mutex": looked at where they are assigned, but for the first time, in the constructor.
FIELDS: dict[type, tuple[str, ...]] = {
    Entry: ("refs", "pins", "place"),
    Hold: ("entries", "released", "users"),
    Budget: ("entries", "max_entries", "ended"),
    Scope: ("generation",),
    SearchState: ("batches", "finished", "gone"),
    Ledger: ("borrowed", "grants", "when_idle", "parted", "part"),
    Account: (
        *("closed", "counters", "entries", "pending_entries", "pending_slots", "reserved_entries", "reserved_slots"),
    ),
    Counters: tuple(each.name for each in fields(Counters)),
}
# They say so: a number, a look that a finaliser takes, and one that is looked at again under the mutex.
WITHOUT_A_SHARD = {"__len__", "discard", "_present"}

# A search that is being made; and a look at counts that nobody changes meanwhile, of slots that a search keeps.
WITHOUT_THE_MUTEX = {"__init__", "own_slots"}


class Owned:
    """A plain lock that knows which thread has it, and notes where that thread has not entered the gate."""

    def __init__(self, lock: Any, name: str, note: Callable[[str], None]) -> None:
        self.lock, self.name, self.note = lock, name, note
        self.owner: int | None = None

    def acquire(self, *arguments: Any, **options: Any) -> bool:
        if not gate.is_inside:
            self.note(f"{self.name} was taken outside of the gate")
        taken = bool(self.lock.acquire(*arguments, **options))
        if taken:
            self.owner = threading.get_ident()
        return taken

    def release(self) -> None:
        self.owner = None
        self.lock.release()

    def locked(self) -> bool:
        return bool(self.lock.locked())

    @property
    def is_mine(self) -> bool:
        return self.owner == threading.get_ident()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *error: object) -> None:
        self.release()


class OwnedDict(dict[Any, Any]):
    """A dict that is looked at and changed with a lock alone, but for its length."""

    lock: Owned

    def get(self, *arguments: Any) -> Any:
        self._look("get")
        return super().get(*arguments)

    def pop(self, *arguments: Any) -> Any:
        self._look("pop")
        return super().pop(*arguments)

    def values(self) -> Any:
        self._look("values")
        return super().values()

    def __setitem__(self, key: Any, value: Any) -> None:
        self._look("item")
        super().__setitem__(key, value)

    def __delitem__(self, key: Any) -> None:
        self._look("del")
        super().__delitem__(key)

    def _look(self, what: str) -> None:
        if not self.lock.is_mine:
            self.lock.note(f"{what} of what belongs to {self.lock.name}, without it")


class OwnedSet(set[Any]):
    """A set that is changed with a lock alone."""

    lock: Owned

    def add(self, each: Any) -> None:
        self._look("add")
        super().add(each)

    def discard(self, each: Any) -> None:
        self._look("discard")
        super().discard(each)

    def _look(self, what: str) -> None:
        if not self.lock.is_mine:
            self.lock.note(f"{what} to what belongs to {self.lock.name}, without it")


class Watch:
    """Notes every access to the books of a manager that its thread has not the lock for."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.patch = patch
        self.found: Counter[str] = Counter()
        self.seen: Counter[str] = Counter()
        self.active = False
        self.shards: dict[int, tuple[Index[Entry], int, bool]] = {}  # by the id of a scope's part; whether a search's
        self.held: defaultdict[int, list[tuple[bool, tuple[int, ...], bool]]] = defaultdict(list)  # by thread
        self.locks: Any = None  # of the storage
        self.mutex: Owned
        self.mutexes: list[Owned] = []  # that of the storage, and those of searches
        self.of_ledger: dict[int, tuple[object, Owned]] = {}  # by the id of a ledger, or of what is its own
        self._watch_scopes()

    def begin(self, storage: KVStorage) -> None:
        ledger = storage.ledger
        self.locks = storage.locks
        self.mutex = self._watch_ledger(ledger, "the mutex")
        of_search = Ledger.of_search

        def watched(this: Ledger, kind: type[Ledger]) -> Ledger:
            made = of_search(this, kind)
            self._watch_ledger(made, "a search's mutex")
            return made

        self.patch.setattr(Ledger, "of_search", watched)
        for pool in storage.pools:
            self._watch_pool(pool)
        for owner, names in UNDER_THE_MUTEX.items():
            for name in names:
                self._watch_call(owner, name)
        for owner, names in FIELDS.items():
            self._watch_fields(owner, frozenset(names))
        self._watch_shards()
        self.active = True

    def note(self, what: str) -> None:
        if not self.active:
            return
        frame = sys._getframe(1)
        while frame.f_back is not None and frame.f_code.co_filename == __file__:
            frame = frame.f_back
        self.found[f"{frame.f_code.co_filename.rpartition('/')[2]}:{frame.f_code.co_name}: {what}"] += 1

    def _watch_ledger(self, ledger: Ledger, name: str) -> Owned:
        mutex = Owned(ledger.mutex, name, self.note)
        ledger.mutex = mutex
        self.mutexes.append(mutex)
        for each in (ledger, ledger.slots, ledger.tables, ledger.candidates):
            self.of_ledger[id(each)] = each, mutex
        ledger.holds = self._owned_set(ledger.holds, mutex)
        return mutex

    def _is_held(self, this: object) -> bool:
        """Whether the calling thread has the mutex of an object's ledger; any one, where it has none of its own."""
        known = self.of_ledger.get(id(this))
        return known[1].is_mine if known is not None else any(mutex.is_mine for mutex in self.mutexes)

    def _is_allowed(self) -> bool:
        """Whether the call comes from where no mutex is needed."""
        frames = sys._getframe(2), sys._getframe(3)
        return any(frame.f_code.co_name in WITHOUT_THE_MUTEX for frame in frames)

    def _owned_set(self, members: set[Any], mutex: Owned) -> OwnedSet:
        owned = OwnedSet(members)
        owned.lock = mutex
        return owned

    def _watch_pool(self, pool: Any) -> None:
        pool.searches = self._owned_set(pool.searches, self.mutex)
        for name in ("budgets", "guests"):
            setattr(pool.account, name, self._owned_set(getattr(pool.account, name), self.mutex))
        scopes = OwnedDict(pool.account.scopes)
        scopes.lock = self.mutex
        pool.account.scopes = scopes
        flights: FlightTable = pool.flights
        flights._lock = Owned(flights._lock, "the flights' lock", self.note)
        table = OwnedDict(flights._flights)
        table.lock = flights._lock
        flights._flights = table

    def _watch_call(self, owner: type, name: str) -> None:
        original = getattr(owner, name)

        def watched(this: Any, *arguments: Any, **options: Any) -> Any:
            self.seen[f"{owner.__name__}.{name}"] += 1
            if not self._is_held(this) and not self._is_allowed():
                self.note(f"{owner.__name__}.{name} without the mutex")
            return original(this, *arguments, **options)

        self.patch.setattr(owner, name, watched)

    def _watch_fields(self, owner: type, names: frozenset[str]) -> None:
        def watched(this: Any, name: str, value: object) -> None:
            if name in names and hasattr(this, name):
                self.seen[f"{owner.__name__}.{name}"] += 1
                if not self._is_held(this) and sys._getframe(1).f_code.co_name != "__init__":
                    self.note(f"{owner.__name__}.{name} without the mutex")
            object.__setattr__(this, name, value)

        self.patch.setattr(owner, "__setattr__", watched)

    # Shards

    def _watch_scopes(self) -> None:
        make = Scope.__init__

        def made(scope: Scope, *arguments: Any, **options: Any) -> None:
            make(scope, *arguments, **options)
            for part, shard in zip(scope.entries, scope.shards, strict=True):
                self.shards[id(part)] = part, shard, scope.budget is not None

        self.patch.setattr(Scope, "__init__", made)

    def _watch_shards(self) -> None:
        for kind in LOCKS:
            self._watch_locks(kind, "read")
            self._watch_locks(kind, "write")
        cells = Index.__dict__["cells"]

        def looked_at(index: Index[Entry]) -> Any:
            self._look_at(index, write=False)
            return cells.__get__(index)

        self.patch.setattr(Index, "cells", property(looked_at, cells.__set__))
        for name in ("remove", "new_place", "put", "take_all", "clear", "drop_empty"):
            self._watch_change(name)

        def assign_roots(state: SearchState, value: Any) -> None:
            if "roots" in vars(state):
                self.seen["SearchState.roots"] += 1
                self._look_at(state.own, write=True)
            vars(state)["roots"] = value

        self.patch.setattr(
            SearchState, "roots", property(lambda state: vars(state)["roots"], assign_roots), raising=False
        )

    def _watch_locks(self, kind: Any, name: str) -> None:
        lock = getattr(kind, name)

        @contextmanager
        def held(locks: ShardLocks, shards: Sequence[int], deadline: Deadline) -> Iterator[None]:
            if not gate.is_inside:
                self.note("shards were taken outside of the gate")
            with lock(locks, shards, deadline):
                mine = self.held[threading.get_ident()]
                mine.append((locks is not self.locks, tuple(shards), name == "write"))
                try:
                    yield
                finally:
                    mine.pop()

        self.patch.setattr(kind, name, held)

    def _watch_change(self, name: str) -> None:
        original = getattr(Index, name)

        def watched(index: Index[Entry], *arguments: Any) -> Any:
            self._look_at(index, write=True)
            return original(index, *arguments)

        self.patch.setattr(Index, name, watched)

    def _look_at(self, index: Index[Entry], *, write: bool) -> None:
        known = self.shards.get(id(index))
        if known is None:
            return
        self.seen["shard for writing" if write else "shard for reading"] += 1
        for of_search, shards, writes in self.held[threading.get_ident()]:
            if known[2] is of_search and known[1] in shards and (writes or not write):
                return
        frame = sys._getframe(1)
        for _ in range(8):
            if frame.f_code.co_name in WITHOUT_A_SHARD:
                return
            if frame.f_back is None:
                break
            frame = frame.f_back
        self.note(f"a scope's index without its shard{' for writing' if write else ''}")
