"""Every node a tensor of its own, in a mapping: a dict, or a cache from PyPI, with a lock."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers.contestants.base import Contestant, EntryStore, OwnBatch, SearchStore, UnfitError
from benchmarks.peers.shapes import Shape, Trees, difference_of, root_of

__all__ = ["MAPPINGS"]

SPARE = 4  # times as many entries as a search stores fit in a cache: what is measured is no eviction


class Mapping(ABC):
    """What the stores need of a mapping."""

    get: Callable[[int], Tensor | None]
    set: Callable[[int, Tensor], object]
    clear: Callable[[Sequence[int]], object]  # given all keys that are there

    @abstractmethod
    def __init__(self, capacity: int) -> None: ...


class Dict(Mapping):
    """A dict, without a bound: a search knows what it stores."""

    def __init__(self, capacity: int) -> None:
        items: dict[int, Tensor] = {}
        self.get, self.set, self.clear = items.get, items.__setitem__, lambda keys: items.clear()


class BoundedDict(Mapping):
    """A dict that drops the oldest."""

    def __init__(self, capacity: int) -> None:
        items: OrderedDict[int, Tensor] = OrderedDict()

        def store(key: int, kv: Tensor) -> None:
            if len(items) >= capacity and key not in items:
                items.popitem(last=False)
            items[key] = kv

        self.get, self.set, self.clear = items.get, store, lambda keys: items.clear()


class Cachetools(Mapping):
    def __init__(self, capacity: int) -> None:
        items = _module("cachetools").LRUCache(capacity)
        self.get, self.set, self.clear = items.get, items.__setitem__, lambda keys: items.clear()


class Cachebox(Mapping):
    def __init__(self, capacity: int) -> None:
        items = _module("cachebox").LRUCache(capacity)
        self.get, self.set, self.clear = items.get, items.insert, lambda keys: items.clear()


class Moka(Mapping):
    def __init__(self, capacity: int) -> None:
        items = _module("moka_py").Moka(capacity, policy="lru")

        def clear(keys: Sequence[int]) -> None:
            items.clear()
            items.run_pending_tasks()  # or what was stored lives on

        self.get, self.set, self.clear = items.get, items.set, clear


class Theine(Mapping):
    """Keys go one by one: `Cache.clear()` of theine 2.0.0 leaves its policy with entries that it then panics over."""

    def __init__(self, capacity: int) -> None:
        items = _module("theine").Cache(capacity)

        def clear(keys: Sequence[int]) -> None:
            for key in keys:
                items.delete(key)

        self.get = lambda key: items.get(key)[0]
        self.set, self.clear = items.set, clear


def _module(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise UnfitError(f"{name} is not installed") from error


# Searches ------------------------------------------------------------------------------------------------------------


class MappingSearch(OwnBatch):
    """One lock, taken once for a batch of lookups and once for a batch of children; no clone on the way out.

    An entry is copied from its own tensor into the batch, and a child out of it; a tensor that was stored is never
    written to, so that lookups may hand it out as it is.
    """

    def __init__(self, shape: Shape, rows: int, lock: threading.Lock, roots: dict[int, Tensor], own: Mapping) -> None:
        super().__init__(shape, rows)
        self._lock, self._roots, self._own = lock, roots, own
        self._rows = self._buffer.unbind(1)  # [2 * layers, heads, columns, head_dim] each
        self._difference = difference_of(shape) if shape.absolute else None
        self._keys: list[int] = []

    def open(self) -> None:
        self._keys = []

    def close(self) -> None:
        with self._lock:
            self._own.clear(self._keys)

    def gather(self, keys: Sequence[int]) -> None:
        self.assemble(self.look_up(keys))

    def look_up(self, keys: Sequence[int]) -> list[Tensor]:
        """The entries of the parents."""
        own, roots = self._own.get, self._roots
        found = []
        with self._lock:
            for key in keys:
                entry = own(key)
                found.append(roots[key] if entry is None else entry)
        return found

    def assemble(self, entries: Sequence[Tensor]) -> None:
        """Copy entries into the batch, each beside its padding."""
        lengths = [entry.shape[2] for entry in entries]
        end = max(lengths)
        for row, entry, length in zip(self._rows, entries, lengths, strict=True):
            if length < end:
                row.narrow(2, 0, end - length).zero_()
            row.narrow(2, end - length, length).copy_(entry)
        self.gathered(lengths, end)

    def commit(self, keys: Sequence[int]) -> None:
        children = self.cut_out()
        store = self._own.set
        with self._lock:
            for key, child in zip(keys, children, strict=True):
                store(key, child)
        self._keys += keys

    def cut_out(self) -> Sequence[Tensor]:
        """A tensor of its own for each row's tokens, less those that its window drops."""
        end, new = self.end, self.end - self.start
        kept_of, difference = self.shape.kept, self._difference
        children = []
        for row, before in zip(self._rows, self.lengths, strict=True):
            length = before + new
            kept = kept_of(length)
            tokens = row.narrow(2, end - kept, kept)
            children.append(tokens.clone() if difference is None or kept == length else tokens + difference)
        return children

    def kv_bytes(self) -> int:
        found = [self._own.get(key) for key in self._keys]
        return sum(4 * entry.numel() for entry in found if entry is not None)


class CloningSearch(MappingSearch):
    """The lock for each lookup, which returns a clone, and for each child: every call is safe by itself."""

    def look_up(self, keys: Sequence[int]) -> list[Tensor]:
        return [self._one(key) for key in keys]

    def _one(self, key: int) -> Tensor:
        with self._lock:
            entry = self._own.get(key)
            return (self._roots[key] if entry is None else entry).clone()

    def commit(self, keys: Sequence[int]) -> None:
        for key, child in zip(keys, self.cut_out(), strict=True):
            with self._lock:
                self._own.set(key, child)
        self._keys += keys


class StackedSearch(MappingSearch):
    """Rows of one length are stacked by one operator, and children are views of one copy of the batch.

    Such a copy stays as long as any child of its step, which only a search that ends as a whole may do.
    """

    def assemble(self, entries: Sequence[Tensor]) -> None:
        length = entries[0].shape[2]
        if any(entry.shape[2] != length for entry in entries):
            super().assemble(entries)
            return
        torch.stack(list(entries), 1, out=self._buffer.narrow(3, 0, length))
        self.gathered([length] * len(entries), length)

    def cut_out(self) -> Sequence[Tensor]:
        length = self.lengths[0]
        if any(other != length for other in self.lengths):
            return super().cut_out()
        length += self.end - self.start
        kept = self.shape.kept(length)
        tokens = self._buffer.narrow(3, self.end - kept, kept).movedim(1, 0)
        if self._difference is not None and kept < length:
            return (tokens + self._difference).unbind(0)
        return tokens.clone().unbind(0)


# Single entries ------------------------------------------------------------------------------------------------------


class MappingEntries(EntryStore):
    """With a lock; what is stored is a clone, what is got the stored tensor itself, which no caller writes to."""

    def __init__(self, items: Mapping) -> None:
        self._lock, self._items = threading.Lock(), items

    def prepared(self, kv: Tensor) -> Tensor:
        return kv

    def put(self, key: int, kv: Tensor) -> None:
        made = kv.clone()
        with self._lock:
            self._items.set(key, made)

    def get(self, key: int) -> Tensor | None:
        with self._lock:
            return self._items.get(key)

    def tensor_of(self, found: Tensor) -> Tensor:
        return found


class CloningEntries(MappingEntries):
    """What is got is a clone too: the caller's own."""

    def get(self, key: int) -> Tensor | None:
        with self._lock:
            found = self._items.get(key)
        return None if found is None else found.clone()


class OfMapping(Contestant):
    """A way to use a mapping."""

    def __init__(
        self,
        name: str,
        about: str,
        mapping: type[Mapping],
        bounded: type[Mapping] | None = None,
        search: type[MappingSearch] = MappingSearch,
        entries: type[MappingEntries] | None = MappingEntries,
    ) -> None:
        self.name, self.about = name, about
        self._mapping, self._bounded = mapping, bounded or mapping
        self._search, self._entries = search, entries

    def searches(self, shape: Shape, trees: Trees, count: int = 1, *, apart: bool = False) -> list[SearchStore]:
        roots = {row: root_of(shape, row, trees.root_tokens) for row in range(trees.rows)}
        lock = threading.Lock()
        return [
            self._search(
                shape, trees.rows, threading.Lock() if apart else lock, roots, self._mapping(SPARE * trees.nodes)
            )
            for _ in range(count)
        ]

    def entries(self, shape: Shape, tokens: int, capacity: int) -> EntryStore:
        if self._entries is None:
            raise UnfitError("for searches only")
        return self._entries(self._bounded(capacity))


MAPPINGS: Sequence[Contestant] = (
    OfMapping("dict", "a dict, one lock for a batch of lookups, no clone on the way out", Dict, BoundedDict),
    OfMapping(
        "dict-clone", "a dict, a lock and a clone for each lookup", Dict, BoundedDict, CloningSearch, CloningEntries
    ),
    OfMapping("dict-stack", "as dict, rows of one length stacked and stored at once", Dict, None, StackedSearch, None),
    OfMapping("cachetools", "cachetools.LRUCache, wired as dict", Cachetools),
    OfMapping("cachebox", "cachebox.LRUCache, wired as dict", Cachebox),
    OfMapping("moka", "moka_py.Moka (LRU), wired as dict", Moka),
    OfMapping("theine", "theine.Cache, wired as dict", Theine),
)
