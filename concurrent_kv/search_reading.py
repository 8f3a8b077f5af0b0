"""The lookups of a search: its own entries, the roots it adopted, and its environments' init pools."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

from .entry import Entry, Hold
from .locks import Deadline
from .reading import generations_of, retain
from .search_state import RootKey, SearchState

__all__ = ["adopted", "own", "retain_here", "retain_roots"]

Lookup = Callable[[SearchState, Sequence[Hashable], Sequence[Hashable]], list[Entry | None]]


def own(state: SearchState, keys: Sequence[Hashable], env_ids: Sequence[Hashable]) -> list[Entry | None]:
    """The search's own entry of each key, or None. The scope's shard held."""
    return state.own.find(keys)


def adopted(state: SearchState, keys: Sequence[Hashable], env_ids: Sequence[Hashable]) -> list[Entry | None]:
    """The adopted root of each key and environment, or None. The scope's shard held."""
    roots = state.roots
    return [roots.get(root) for root in zip(env_ids, keys, strict=True)] if roots else [None] * len(keys)


def retain_here(
    state: SearchState,
    found: list[Entry | None],
    keys: Sequence[Hashable],
    env_ids: Sequence[Hashable],
    lookups: Sequence[Lookup],
    hold: Hold,
    deadline: Deadline,
) -> None:
    """Look missing rows up in what the search owns, with one of `lookups` after the other."""
    missing = _rows_without(found)
    if not missing:
        return
    ledger = state.pool.storage.ledger
    present: list[Entry] = []
    with state.pool.storage.locks.read(state.scope.shards, deadline):
        state.check_open()
        for look_up in lookups:
            if missing:
                entries = look_up(state, [keys[row] for row in missing], [env_ids[row] for row in missing])
                for row, entry in zip(missing, entries, strict=True):
                    found[row] = entry
                present += [entry for entry in entries if entry is not None]
                missing = _rows_without(found)
        with ledger.mutex:
            ledger.extend(hold, present)


def retain_roots(
    state: SearchState,
    found: list[Entry | None],
    keys: Sequence[Hashable],
    env_ids: Sequence[Hashable],
    hold: Hold,
    deadline: Deadline,
) -> None:
    """Look missing rows up in their environments' init pools, and adopt what is found there."""
    missing = _rows_without(found)
    if not missing:
        return
    storage = state.pool.storage
    wanted = [(state.init_pools[env_ids[row]].default_scope, keys[row]) for row in missing]
    generations = generations_of([scope for scope, _ in wanted])
    entries = retain(storage, wanted, generations, deadline, hold=hold, quiet=True)
    new: dict[RootKey, Entry] = {}
    for row, entry in zip(missing, entries, strict=True):
        found[row] = entry
        if entry is not None:
            new[env_ids[row], keys[row]] = entry
    if new:
        # `hold` keeps them alive until the search does.
        with storage.locks.write(state.scope.shards, deadline):
            state.check_open()
            new = {root: entry for root, entry in new.items() if root not in state.roots}
            state.roots.update(new)
            with storage.ledger.mutex:
                storage.ledger.extend(state.roots_hold, list(new.values()))


def _rows_without(found: Sequence[Entry | None]) -> list[int]:
    """The rows that have no entry."""
    return [row for row, entry in enumerate(found) if entry is None]
