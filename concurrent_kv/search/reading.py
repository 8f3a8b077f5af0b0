"""The lookups of a search: its own entries, the roots it adopted, and its environments' init pools."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

from ..books.index import find_in
from ..books.ledger import wake
from ..books.records import Entry, Hold, locate_each
from ..locks.deadline import Deadline
from ..locks.gate import gate
from ..pool.reading import retain
from ..pool.tier import move_up_each
from .state import RootKey, SearchState

__all__ = ["adopt", "adopted", "disown", "own", "own_or_adopted", "retain_here", "retain_roots"]

Lookup = Callable[[SearchState, "list[Entry | None]", list[Hashable], Sequence[Hashable]], list[Entry]]


def own(
    state: SearchState, found: list[Entry | None], keys: list[Hashable], env_ids: Sequence[Hashable]
) -> list[Entry]:
    """Find rows that have no entry yet among the search's own; returns what was found. The scope's shard held."""
    entries = find_in(list(state.scope.entries) * len(keys), keys, list(map(hash, keys)))
    if any(found):
        entries = [entry if other is None else None for entry, other in zip(entries, found, strict=True)]
        found[:] = [entry or other for entry, other in zip(entries, found, strict=True)]
    else:
        found[:] = entries
    return list(filter(None, entries))


def adopted(
    state: SearchState, found: list[Entry | None], keys: list[Hashable], env_ids: Sequence[Hashable]
) -> list[Entry]:
    """As `own`, among the adopted roots."""
    present: list[Entry] = []
    roots = state.roots
    for row, entry in enumerate(found) if roots else ():
        if entry is None:
            root = found[row] = roots.get((env_ids[row], keys[row]))
            if root is not None:
                present.append(root)
    return present


def adopted_below(
    state: SearchState, found: list[Entry | None], keys: list[Hashable], env_ids: Sequence[Hashable], lower: Hold
) -> None:
    """Find rows that have no entry yet among the roots that stayed in the tier; they join `lower`. The shard held."""
    tier, roots = state.storage.tier, state.roots_below
    present: list[Entry] = []
    for row, entry in enumerate(found) if roots else ():
        if entry is None:
            root = found[row] = roots.get((env_ids[row], keys[row]))
            if root is not None:
                present.append(root)
                state.found_below.add((env_ids[row], keys[row]))
    if present and tier is not None:
        with gate.lock, tier.ledger.mutex:
            tier.leave_loop_to_read(present)
            tier.ledger.extend(lower, present)


def own_or_adopted(
    state: SearchState, found: list[Entry | None], keys: list[Hashable], env_ids: Sequence[Hashable]
) -> list[Entry]:
    """As `own` and then `adopted`, of rows none of which has been found yet."""
    entries = found[:] = find_in(list(state.scope.entries) * len(keys), keys, list(map(hash, keys)))
    if None not in entries:
        return entries  # type: ignore[return-value]
    return [*filter(None, entries), *adopted(state, found, keys, env_ids)]


def retain_here(
    state: SearchState,
    found: list[Entry | None],
    keys: list[Hashable],
    env_ids: Sequence[Hashable],
    look_up: Lookup,
    hold: Hold,
    deadline: Deadline,
    lower: Hold | None = None,
) -> None:
    """Look missing rows up in what the search owns; roots that stayed in the tier join `lower`."""
    if None not in found:
        return
    if not state.roots and not len(state.own) and not state.roots_below:
        state.check_open()  # nothing just now: what comes later need not be found
        return
    ledger = state.ledger
    with gate.lock, state.locks.read(state.scope.shards, deadline):
        if state.scope.ended is not None or state.budget.ended is not None:
            state.check_open()
        present = look_up(state, found, keys, env_ids)
        with gate.lock, ledger.mutex:
            ledger.extend(hold, present)
        if lower is not None and look_up is not own:
            adopted_below(state, found, keys, env_ids, lower)


def retain_roots(
    state: SearchState,
    found: list[Entry | None],
    keys: list[Hashable],
    env_ids: Sequence[Hashable],
    hold: Hold,
    deadline: Deadline,
    lower: Hold | None = None,
) -> dict[RootKey, Entry]:
    """Look missing rows up in their environments' init pools; returns what was found there, for `adopt`.

    `hold` is one of the storage's ledger, `lower` one of the tier's. What is in the tier moves up where there is room.
    """
    missing = [row for row, entry in enumerate(found) if entry is None] if None in found else []
    if not missing:
        return {}
    wanted = [keys[row] for row in missing]
    hashes = list(map(hash, wanted))
    scopes = [state.init_pools[env_ids[row]].default_scope for row in missing]
    generations = {scope: scope.generation for scope in scopes}
    looked_up = locate_each(scopes, hashes), wanted, hashes, generations, deadline
    entries = retain(state.storage, *looked_up, hold=hold, quiet=True, lower=lower)
    tier = state.storage.tier
    if lower is not None and lower.entries and tier is not None:
        move_up_each(tier, [state.init_pools[env_ids[row]] for row in missing], entries, hold, deadline)
    new: dict[RootKey, Entry] = {}
    for row, entry in zip(missing, entries, strict=True):
        found[row] = entry
        if entry is not None:
            new[env_ids[row], keys[row]] = entry
    return new


def adopt(
    state: SearchState,
    new: dict[RootKey, Entry],
    found: list[Entry | None],
    hold: Hold,
    deadline: Deadline,
    lower: Hold | None = None,
) -> list[Entry]:
    """Keep what `retain_roots` found until the search ends; see `SearchState.adopt`.

    Returns what is new: stand-ins, and roots that stayed in the tier.
    """
    below: list[Entry] = []
    with gate.lock, state.locks.write(state.scope.shards, deadline):
        state.check_open()
        if lower is not None:
            below = state.adopt_below(new, found, lower)
        try:
            with gate.lock, state.ledger.mutex:
                made = state.adopt(new, found, hold)
        except Exception:
            state.disown_below(below)  # which `lower` holds
            raise
    return made + below if below else made


def disown(state: SearchState, new: list[Entry], deadline: Deadline) -> None:
    """Undo `adopt`, where no other thread has found these roots meanwhile. (Otherwise the search has them.)"""
    below = {entry for entry in new if entry.scope.above is not None}
    in_storage = [entry for entry in new if entry not in below]
    with gate.lock, state.locks.write(state.scope.shards, deadline):
        parted = state.disown_below(below)
        with gate.lock, state.ledger.mutex:
            dead = state.disown(in_storage)
            waiters = state.ledger.take_waiters()
    wake(waiters)
    del dead, parted
