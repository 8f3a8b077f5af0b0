"""The lookups of a search: its own entries, the roots it adopted, and its environments' init pools."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

from ..books.records import Entry, Hold
from ..locks.deadline import Deadline
from ..locks.gate import gate
from ..pool.reading import generations_of, retain
from .state import RootKey, SearchState

__all__ = ["adopt", "adopted", "own", "retain_here", "retain_roots"]

Lookup = Callable[[SearchState, list[Entry | None], list[Hashable], Sequence[Hashable]], list[Entry]]


def own(
    state: SearchState, found: list[Entry | None], keys: list[Hashable], env_ids: Sequence[Hashable]
) -> list[Entry]:
    """Find rows that have no entry yet among the search's own; returns what was found. The scope's shard held."""
    return _fill(found, state.own.find(keys))


def adopted(
    state: SearchState, found: list[Entry | None], keys: list[Hashable], env_ids: Sequence[Hashable]
) -> list[Entry]:
    """As `own`, among the adopted roots."""
    get = state.roots.get
    return _fill(found, [get(root) for root in zip(env_ids, keys, strict=True)]) if state.roots else []


def _fill(found: list[Entry | None], entries: Sequence[Entry | None]) -> list[Entry]:
    if not any(found):
        found[:] = entries
        return list(filter(None, entries))
    new = []
    for row, entry in enumerate(entries):
        if entry is not None and found[row] is None:
            found[row] = entry
            new.append(entry)
    return new


def _look_up(
    state: SearchState,
    found: list[Entry | None],
    keys: list[Hashable],
    env_ids: Sequence[Hashable],
    lookups: Sequence[Lookup],
) -> list[Entry]:
    """Look missing rows up with one of `lookups` after the other; returns what was found. The scope's shard held."""
    present: list[Entry] = []
    for look_up in lookups:
        present += look_up(state, found, keys, env_ids)
        if None not in found:
            break
    return present


def retain_here(
    state: SearchState,
    found: list[Entry | None],
    keys: list[Hashable],
    env_ids: Sequence[Hashable],
    lookups: Sequence[Lookup],
    hold: Hold,
    deadline: Deadline,
) -> None:
    """Look missing rows up in what the search owns, with one of `lookups` after the other."""
    if None not in found:
        return
    ledger = state.pool.storage.ledger
    with gate.lock, state.pool.storage.locks.read(state.scope.shards, deadline):
        state.check_open()
        present = _look_up(state, found, keys, env_ids, lookups)
        with gate.lock, ledger.mutex:
            ledger.extend(hold, present)


def retain_roots(
    state: SearchState,
    found: list[Entry | None],
    keys: list[Hashable],
    env_ids: Sequence[Hashable],
    hold: Hold,
    deadline: Deadline,
) -> dict[RootKey, Entry]:
    """Look missing rows up in their environments' init pools; returns what was found there, for `adopt`."""
    missing = [row for row, entry in enumerate(found) if entry is None] if None in found else []
    if not missing:
        return {}
    storage = state.pool.storage
    wanted = [(state.init_pools[env_ids[row]].default_scope, keys[row]) for row in missing]
    generations = generations_of([scope for scope, _ in wanted])
    entries = retain(storage, wanted, generations, deadline, hold=hold, quiet=True)
    new: dict[RootKey, Entry] = {}
    for row, entry in zip(missing, entries, strict=True):
        found[row] = entry
        if entry is not None:
            new[env_ids[row], keys[row]] = entry
    return new


def adopt(state: SearchState, new: dict[RootKey, Entry], deadline: Deadline) -> bool:
    """Keep what `retain_roots` found until the search ends; the caller's hold keeps it until then.

    Called when nothing else of the gather can fail. Returns False, with nothing adopted, if another thread adopted
    another entry under one of these keys meanwhile: that is the root, and has to be looked up.
    """
    storage = state.pool.storage
    with gate.lock, storage.locks.write(state.scope.shards, deadline):
        state.check_open()
        if any(state.roots.get(root, entry) is not entry for root, entry in new.items()):
            return False
        roots, adopted_now = state.with_roots(new)
        with gate.lock, storage.ledger.mutex:
            storage.ledger.extend(state.roots_hold, adopted_now)
            state.roots = roots
    return True
