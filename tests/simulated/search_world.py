"""Searches on a simulated device: an init pool, a recurrent pool, and what each search must still have.

A search that only one host thread uses has to answer exactly as a dict would. What several use is given every key once,
so that whatever they find under it can only be one value.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from concurrent_kv import DropOldest, KVPool, Search
from concurrent_kv.locks.deadline import Deadline
from concurrent_kv.pool.core import bump_versions
from concurrent_kv.search.search import open_search
from tests.explorer.history import Call, Kind, Value
from tests.explorer.programs import must

from .acts import correcting
from .batch_acts import append
from .world import WINDOW, GpuWorld

__all__ = ["OVERFLOWS", "OWN_KEYS", "GpuSearchWorld"]

ENV = 0
OWN_KEYS = 10  # from here on keys are searches' own, below they are roots'
DROPPED = 2  # tokens, where a row fills the window
OVERFLOWS: dict[str, Callable[[GpuWorld], Any]] = {
    "error": lambda world: None,
    "drop": lambda world: DropOldest(WINDOW, DROPPED),
    "correct": correcting,
}


@dataclass(eq=False)
class _Stored:
    """What an entry holds; known when everything is over."""

    value: Value = ()


@dataclass(eq=False)
class _Known:
    """A search, and what it must have."""

    search: Search
    drops: bool
    shared: bool
    own: dict[int, _Stored] = field(default_factory=dict)
    roots: dict[int, _Stored] = field(default_factory=dict)

    def expected(self, key: int) -> _Stored | None:
        return self.own.get(key) or self.roots.get(key)


class GpuSearchWorld(GpuWorld):
    """`pool` is the init pool of the one environment; searches pay from `recur`.

    Args:
        arguments, setting: as `GpuWorld`.
        recur_entries, recur_slots: quota of the recurrent pool.

    Attributes:
        may_end: whether somebody began to end a search under its users' hands.
    """

    def __init__(self, *arguments: Any, recur_entries: int = 4, recur_slots: int = 4 * WINDOW, **setting: Any) -> None:
        super().__init__(*arguments, more_slots=recur_slots, **setting)
        self.recur = KVPool(self.pool.layout, recur_entries, max_slots=recur_slots, storage=self.storage, name="recur")
        self.searches: dict[str, _Known] = {}
        self.may_end = False
        self._roots_seen: list[tuple[int, Value]] = []
        self._put_in_recur: dict[int, list[Value]] = {}
        self._opened = 0

    # Life ------------------------------------------------------------------------------------------------------------

    def open(self, name: str, entries: int, slots: int, overflow: str, *, shared: bool = False) -> None:
        self._opened += 1
        search = open_search(
            self.recur,
            {ENV: self.pool},
            [ENV],
            number=self._opened,
            entries_per_env=entries,
            entries=entries,
            tokens=slots,
            order="own_first",
            overflow=OVERFLOWS[overflow](self),
            deadline=Deadline(10.0),
        )
        self.searches[name] = _Known(search, overflow != "error", shared)

    def end(self, name: str, *, drop: bool = False) -> None:
        """Close a search, or forget it."""
        known = self.searches.pop(name, None)
        if known is not None:
            self.may_end |= known.shared
            if not drop:
                known.search.close()

    def bump(self) -> None:
        """As `KVCacheManager.bump_version`."""
        self.may_end = True
        with self.noted(Kind.CLEAR):
            bump_versions((self.pool, self.recur), "cache", self.storage.enter())

    def close(self) -> None:
        self.may_end = True
        super().close()

    # Operations ------------------------------------------------------------------------------------------------------

    def look_up(self, name: str, keys: Sequence[int], *, on: int, close_on: int | None = None) -> None:
        """Gather through a search and let go, perhaps in another stream or without closing (-1)."""
        known = self.searches.get(name)
        if known is not None:
            batch, _ = self._gather(known, keys, on)
            if close_on != -1:
                with self.on(on if close_on is None else close_on):
                    batch.close()

    def grow(
        self,
        name: str,
        children: Mapping[int, tuple[int, int]],
        *,
        on: int,
        model: int,
        commit: int,
        fill_on: int,
        one_by_one: bool = False,
        lengths: Sequence[int] | None = None,
        from_nothing: bool = False,
        between: Callable[[GpuSearchWorld], object] = lambda world: None,
    ) -> None:
        """Gather parents, give misses two tokens, append, and commit children `{child: (parent, label)}`.

        With `lengths`, 0 or 1 of each row, misses can be left to what is appended to them `from_nothing`.
        """
        known = self.searches.get(name)
        if known is None:
            return
        batch, read = self._gather(known, [parent for parent, _ in children.values()], on)
        between(self)
        filled: dict[int, Value] = {}
        labels = [label for _, label in children.values()]
        with self.on(fill_on):
            for row, label in enumerate(labels):
                if not batch.hits[row] and not from_nothing:
                    filled[row] = (label + 1, label + 2)
                    batch.fill(row, self.source(filled[row]))
        if not batch.room:
            batch.close()
            return
        with self.on(model):
            append(self, batch, labels)
        given = [1] * len(labels) if lengths is None else lengths[: len(labels)]
        new_tokens = [length if row in filled or batch.hits[row] else 1 for row, length in enumerate(given)]
        grown = [
            self._grown(known, read, row, filled.get(row), (label,)[: new_tokens[row]])
            for row, label in enumerate(labels)
        ]
        rows = [[row] for row in range(len(labels))] if one_by_one else [list(range(len(labels)))]
        for number, some in enumerate(rows):
            new = {child: grown[row] for row, child in enumerate(children) if row in some}
            if known.shared:  # before others can find it
                known.own.update(new)
            with self.on(model if number % 2 else commit):
                of_some = None if lengths is None else [new_tokens[row] for row in some]
                known.search.commit(list(new), batch, rows=some, lengths=of_some)
            known.own.update(new)

    def _grown(self, known: _Known, read: Call, row: int, filled: Value | None, new: Value) -> _Stored:
        stored = _Stored()
        drops = known.drops  # nothing here may keep the search, which can be dropped

        def resolve() -> None:
            whole = (*(filled or read.seen[row] or ()), *new)
            stored.value = whole[DROPPED:] if drops and len(whole) >= WINDOW else whole

        self.look_at_end(resolve)
        return stored

    def _gather(self, known: _Known, keys: Sequence[int], on: int) -> tuple[Any, Call]:
        expected = [known.expected(key) for key in keys]
        with self.on(on):
            batch = known.search.gather(keys, [ENV] * len(keys))
            call = Call(Kind.READ, tuple(keys), (), 0)
            self.look_at_batch(call, batch)
        if not known.shared:
            for key, stored, hit in zip(keys, expected, batch.hits, strict=True):
                must(hit or not stored, f"an open search has lost {key}")
                must(stored is not None or not hit or key < OWN_KEYS, f"a search has {key}, which nobody stored")
                if hit and not stored:
                    known.roots[key] = self._root(call, keys.index(key))
        self.look_at_end(lambda: self._compare(call, expected))
        return batch, call

    def _root(self, call: Call, row: int) -> _Stored:
        stored = _Stored()

        def resolve() -> None:
            stored.value = call.seen[row] or ()

        self.look_at_end(resolve)
        return stored

    def _compare(self, call: Call, expected: Sequence[_Stored | None]) -> None:
        for key, seen, stored in zip(call.keys, call.seen, expected, strict=True):
            if seen is not None and stored is not None:
                must(seen == stored.value, f"a search found {seen} for {key}, where {stored.value} was stored")
            elif seen is not None and key < OWN_KEYS:
                self._roots_seen.append((key, seen))

    def promote(self, name: str, number: int, as_key: int) -> None:
        """Promote the `number`-th of what the search has, counted round and round."""
        known = self.searches.get(name)
        has = [] if known is None else [*known.own.items(), *known.roots.items()]
        if known is None or not has:
            return
        key, stored = has[number % len(has)]
        with self.noted(Kind.WRITE, [as_key]) as call:
            call.since, call.stored = call.began, known.search.promote(key, ENV, as_key=as_key)

        def resolve() -> None:
            call.writes = (stored.value,)

        self.look_at_end(resolve)

    def release(self, name: str, number: int) -> None:
        """Release the `number`-th of what the search owns, counted round and round."""
        known = self.searches.get(name)
        if known is not None and known.own:
            key = list(known.own)[number % len(known.own)]
            known.search.release([key])
            if not known.shared:
                del known.own[key]

    def keep(self, name: str, keys: Collection[int]) -> None:
        known = self.searches.get(name)
        if known is not None:
            known.search.keep(list(keys))
            if not known.shared:
                known.own = {key: stored for key, stored in known.own.items() if key in keys}
                known.roots = {key: stored for key, stored in known.roots.items() if key in keys}

    def put_in_recur(self, key: int, what: Value, *, on: int) -> None:
        """An entry that no search owns, and that any may push out."""
        self._put_in_recur.setdefault(key, []).append(what)
        with self.on(on):
            self.recur.put(key, self.source(what))

    def get_from_recur(self, key: int, *, on: int) -> None:
        with self.on(on):
            found = self.recur.get(key)
        if found is not None:
            self.look_at_end(
                lambda: must(self.labels_in(found) in self._put_in_recur.get(key, ()), f"nobody put what {key} holds")
            )

    # Checks ----------------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """What open searches own is there to the end; roots are what somebody put; nothing stays reserved."""
        self.settle()
        if not self.storage.closed:
            for key in self._put_in_recur:
                self.get_from_recur(key, on=0)
            for known in self.searches.values():
                if not known.shared and not known.search.closed and known.own:
                    self._gather(known, list(known.own), 0)[0].close()
        self.look_at_end(self._check_roots)
        self.handles += [known.search for known in self.searches.values()]
        super().check()
        account, ledger = self.recur.account, self.storage.ledger
        lacking = ledger.num_slots - ledger.slots.size
        must(not (account.reserved_entries or account.reserved_slots or lacking), "room stayed reserved")

    def _check_roots(self) -> None:
        for key, seen in self._roots_seen:
            put = [
                what
                for call in self.calls
                if call.kind is Kind.WRITE
                for at, what in zip(call.keys, call.writes, strict=False)
                if at == key
            ]
            must(seen in (self.before.get(key), *put), f"{seen} was found for {key}, and nobody put it there")
