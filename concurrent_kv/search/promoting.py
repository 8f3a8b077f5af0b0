"""`plan_promotion`: how an entry of a search becomes one of an init pool, in the storage's books."""

from __future__ import annotations

from collections.abc import Hashable

from ..books.records import Entry
from ..locks.gate import gate
from ..pool.plan import WritePlan, plan_put, plan_share, shape_of
from ..pool.reading import copy_out
from .state import SearchState

__all__ = ["plan_promotion"]


def plan_promotion(state: SearchState, entry: Entry, key: Hashable, side: object, priority: float) -> WritePlan:
    """Store one of a search's own entries, or a stand-in, which the caller keeps, in an init pool under `key`.

    What it shares with a root is shared once more. The rest is copied, as a gather would copy it: its slots are the
    search's, which ends before the init pool lets go of it.
    """
    storage = state.storage
    if entry.scope.above is not None:  # a root that stayed in the tier
        return plan_put(storage, [key], copy_out(state, entry), (0,), [side], [priority])
    with gate.lock, state.ledger.mutex:
        root, shared = (state.origins[entry], entry.length) if entry in state.origins else state.root_under(entry)
    if root is not None and shared == entry.length == root.length:
        return plan_share(storage, root, key, side, priority)
    new = entry.length - shared
    hit = root is not None
    shape = shape_of((0,), (shared,), (hit,), new, shared, storage.no_overflow)
    source = copy_out(state, entry).packed
    assert source is not None
    parents = [0 if root is None else root.row]
    plan = WritePlan([key], [side], [priority], [entry.correction if hit else None], shape, parents, source)
    plan.foreign_slots = shared
    if root is not None:
        plan.shared_writes = root.written
    return plan
