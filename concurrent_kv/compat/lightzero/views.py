"""Read-only mappings from keys to entries, for code that looked into LightZero's dictionaries."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping

from ...books.index import Index
from ...books.records import Entry, Scope
from ...locks.gate import gate
from ...pool.storage import Domain
from .attachment import Attachment

__all__ = ["KeyIndex", "entries_of", "init_views", "recur_view"]

Entries = list[tuple[Hashable, int]]  # keys, each with its hash


class KeyIndex(Mapping[Hashable, int]):
    """The keys that are stored just now, each with its hash; a snapshot at every call. May block.

    Args:
        entries: gives the snapshot.
        clear: what `clear()` does.
    """

    def __init__(self, entries: Callable[[], Entries], clear: Callable[[], None]) -> None:
        self._entries = entries
        self._clear = clear

    def __getitem__(self, key: Hashable) -> int:
        return dict(self._entries())[key]

    def __iter__(self) -> Iterator[Hashable]:
        return iter([key for key, _ in self._entries()])

    def __len__(self) -> int:
        return len(self._entries())

    def clear(self) -> None:
        """Remove every entry."""
        self._clear()

    def __repr__(self) -> str:
        return f"KeyIndex({dict(self._entries())!r})"


def entries_of(domain: Domain, scope: Scope) -> Entries:
    """The keys of a scope, and their hashes."""
    deadline = domain.storage.enter()
    found: Entries = []
    for part, shard in enumerate(scope.shards):
        with gate.lock, domain.locks.read((shard,), deadline):
            found += _rows_in(scope.entries[part])
    return found


def _rows_in(part: Index[Entry]) -> Entries:
    """As `entries_of`, of one shard, held for reading."""
    return [(key, entry.key_hash) for key, entry in part.items()]


def recur_view(kv: Attachment) -> KeyIndex:
    """The nodes of the calling thread's search. An attached model's keys are (environment, hash)."""
    session = kv.session

    def entries() -> Entries:
        if session.search is None:
            return []
        state = session.search._state
        return entries_of(state, state.scope)

    return KeyIndex(entries, kv.forget_nodes)


def init_views(kv: Attachment) -> list[KeyIndex]:
    """The roots of each of the model's environments, by LightZero's hash, on its main branch a number.

    Made anew at every look: cheap, and of its role."""

    is_number = kv.kind.is_main

    def view(row: int, env_id: int) -> KeyIndex:
        pool = kv.manager.init_pools[env_id]

        def entries() -> Entries:
            return [(_hash_in(key, is_number), number) for key, number in entries_of(pool, pool.default_scope)]

        return KeyIndex(entries, lambda: kv.clear_roots(row))

    return [view(row, env_id) for row, env_id in enumerate(kv.env_ids)]


def _hash_in(key: Hashable, is_number: bool) -> Hashable:
    hashed = key[1] if isinstance(key, tuple) else key
    return int(hashed, 16) if is_number and isinstance(hashed, str) else hashed
