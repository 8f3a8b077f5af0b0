"""What a write stores: which tokens of a source go into slots of their own, and which slots are shared."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import partial

import numpy as np
from torch import Tensor

from ..books.ledger import Ledger
from ..books.records import Entry
from ..books.tables import Tables
from ..device.modes import plain_torch_state
from ..device.moving import joined_on
from ..device.positions import Correction
from ..device.slot_numbers import Slots
from ..device.streams import NO_TICKS, Ticks
from ..model.kv import KeysValues
from ..model.overflow import Overflow
from .batch import Batch
from .commit_shape import CommitShape, commit_shape, share_shape
from .storage import KVStorage

__all__ = ["WritePlan", "plan_commit", "plan_put", "plan_share"]


class WritePlan:
    """New entries, and where their tokens come from. Token order is row by row, oldest first.

    Attributes:
        keys, sides, priorities, corrections: one for each entry.
        num_slots: how many slots it needs.
        shape: their lengths, how many tokens get slots of their own, and where in `source` those are.
        parents: rows in the tables of the entries that they share slots with, which the caller keeps alive.
        source: contiguous `[2 * layers, batch, heads, columns, head_dim]`; None: nothing is copied.
        parts: `[layers, batch, heads, columns, head_dim]`: keys and values that are copied as they are, not `source`.
        difference: `[2 * layers, kept, heads, head_dim]`, added to the first `runs` runs of as many tokens.
        shared_writes: writes of the shared slots, where nothing is copied: what copies comes after the gather, and so
            after them.
        foreign_slots: shared slots that come from another pool, and count in this one's quota from now on.
        since: when the operation came, if before its deadline began: a commit came with its gather.
        batch: what it commits rows of; its entries are kept until the new ones are published.
        ends_batch: whether no row of it is left after that.
        uses_batch: whether they are kept just now. Under the mutex.
        ended_batch: whether it ended the batch, and no other thread before it. Under the mutex.
        hashes: of the keys, each asked for once: where an entry is looked up, and found again when it goes.
    """

    parts: tuple[Tensor, Tensor] | None = None
    difference: Tensor | None = None
    runs = 0
    shared_writes: Ticks = NO_TICKS
    foreign_slots = 0
    since: float | None = None
    batch: Batch | None = None
    ends_batch = False
    uses_batch = False
    ended_batch = False

    def __init__(
        self,
        keys: list[Hashable],
        sides: list[object],
        priorities: list[float],
        corrections: list[Correction],
        shape: CommitShape,
        parents: list[int],
        source: Tensor | None,
    ) -> None:
        self.keys = keys
        self.hashes = list(map(hash, keys))
        self.sides = sides
        self.priorities = priorities
        self.corrections = corrections
        self.shape = shape
        self.num_slots = len(shape.rows)
        self.parents = parents
        self.source = source

    def leave_batch(self, ledger: Ledger, *, ends: bool) -> list[Entry]:
        """Let go of what `reserve` kept, and of the batch where `ends`; returns the dead. Mutex held."""
        if self.batch is None or not self.uses_batch:
            return []
        # First: what is cut off after this is lost until repair, and not let go of twice.
        self.uses_batch = False
        hold = self.batch.hold
        self.ended_batch = ends and not hold.released
        try:
            return ledger.end_use(hold, release=ends)
        except Exception:  # no frames for the call
            ledger.abandoned.append(partial(ledger.again, [partial(ledger.end_use, hold, release=ends)]))
            return []

    def slots_together(self, tables: Tables, limit: int) -> int:
        """Slots that it needs and shares, if they may be more than `limit`; or a number that is not."""
        shape = self.shape
        most = sum(shape.lengths)
        if most <= limit:
            return most
        shared = {
            slot
            for parent, kept in zip(self.parents, shape.kept, strict=True)
            if kept
            for slot in np.frombuffer(tables.slots_of(parent), dtype=np.int64)[-kept:].tolist()
        }
        return self.num_slots + len(shared)

    def kept_rows(self) -> tuple[list[int], list[int], list[int]]:
        """For `Tables.enter`, rows of what is shared alone: the parents, how much of each stays, and nothing new."""
        sharing = [(parent, kept) for parent, kept in zip(self.parents, self.shape.kept, strict=True) if kept]
        return [parent for parent, _ in sharing], [kept for _, kept in sharing], [0] * len(sharing)

    def make(self, ledger: Ledger, entries: list[Entry], taken: Slots) -> None:
        """Give the new entries their parents' slots and those taken for them; see `Ledger.make`. Mutex held."""
        shape = self.shape
        ledger.make(entries, self.parents, shape.kept, shape.owned, taken, shape.written_at)


def plan_put(
    storage: KVStorage,
    keys: list[Hashable],
    kv: KeysValues,
    rows: Sequence[int],
    sides: list[object],
    priorities: list[float],
) -> WritePlan:
    """Store rows of `kv` whole."""
    window = storage.layout.max_tokens
    lengths = tuple([kv.lengths[row] for row in rows])
    # As a commit of rows that nothing was gathered for, and nothing appended to.
    shape = commit_shape(tuple(rows), lengths, (False,) * len(keys), 0, kv.end, window, storage.drop_of(None))
    packed, parts = kv.packed, None
    if packed is None or not packed.is_contiguous():
        if storage.tensor.takes(kv.keys) and storage.tensor.takes(kv.values):
            packed, parts = kv.keys, (kv.keys, kv.values)
        else:
            with plain_torch_state():
                packed = joined_on(kv.keys.device, [kv.keys.detach(), kv.values.detach()])
    plan = WritePlan(keys, sides, priorities, [None] * len(keys), shape, [0] * len(keys), packed.detach())
    plan.parts = parts
    return plan


def plan_share(storage: KVStorage, entry: Entry, key: Hashable, side: object, priority: float) -> WritePlan:
    """Store a retained entry once more, in another pool, under `key`: every slot is shared and nothing is copied."""
    shape = share_shape(entry.length, storage.layout.max_tokens)
    plan = WritePlan([key], [side], [priority], [entry.correction], shape, [entry.row], None)
    plan.shared_writes = entry.written
    plan.foreign_slots = entry.length
    return plan


def plan_commit(
    storage: KVStorage,
    batch: Batch,
    new: int | tuple[int, ...],
    keys: list[Hashable],
    rows: Sequence[int],
    overflow: Overflow | None,
    sides: list[object],
    priorities: list[float],
) -> WritePlan:
    """Store the new tokens of a batch's rows, sharing the gathered slots where the bytes stay the same.

    `new` is how many every row got, or how many each of them.
    """
    window = storage.layout.max_tokens
    drop = storage.drop_of(overflow)
    overflow = storage.no_overflow if overflow is None else overflow
    if type(rows) is range:  # the whole batch
        hits, table_rows, inherited = batch.hits, batch.table_rows, batch.corrections
    else:
        rows = tuple(rows)
        hits = tuple([batch.hits[row] for row in rows])
        table_rows, inherited = [batch.table_rows[row] for row in rows], [batch.corrections[row] for row in rows]
    if storage.corrects_lazily:
        foreign = overflow.foreign(inherited)
        if foreign:
            hits = tuple([hit and other not in foreign for hit, other in zip(hits, inherited, strict=True)])
    shape = commit_shape(rows, batch.gathered_by(rows), hits, new, batch.start, window, drop)
    if shape.corrected and len(shape.corrected) < len(rows):
        keys, table_rows = [keys[i] for i in shape.order], [table_rows[i] for i in shape.order]
        sides, priorities = [sides[i] for i in shape.order], [priorities[i] for i in shape.order]
        inherited = [inherited[i] for i in shape.order]
    corrections: list[Correction] = [None] * len(keys)
    if storage.corrects_lazily:
        shared = [correction if kept else None for correction, kept in zip(inherited, shape.kept, strict=True)]
        corrections = overflow.corrections(shared, shape.over, shape.moved)
    plan = WritePlan(keys, sides, priorities, corrections, shape, table_rows, batch.data)
    plan.batch, plan.since = batch, batch.opened
    difference = overflow.difference_of(shape.corrected) if shape.corrected else None
    if difference is not None:
        plan.difference, plan.runs = difference
    return plan
