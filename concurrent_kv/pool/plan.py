"""What a write stores: which tokens of a source go into slots of their own, and which slots are shared."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from torch import Tensor

from ..books.records import Entry
from ..books.tables import Tables
from ..device.moving import joined_on, upload
from ..device.positions import Correction, PositionSteps
from ..device.slot_numbers import Slots
from ..device.streams import NO_TICKS, Ticks
from ..device.tensors import plain_torch_state
from ..errors import InvalidArgumentError
from ..model.kv import KeysValues
from ..model.overflow import DropAndCorrect, DropLazily, DropOldest, Overflow
from .batch import Batch
from .commit_shape import CommitShape, Drop, commit_shape, share_shape
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
        difference: `[2 * layers, kept, heads, head_dim]`, added to the first `runs` runs of as many tokens.
        shared_writes: writes of the shared slots, where nothing is copied: what copies comes after the gather, and so
            after them.
        foreign_slots: shared slots that come from another pool, and count in this one's quota from now on.
        since: when the operation came, if before its deadline began: a commit came with its gather.
        hashes: of the keys, each asked for once: where an entry is looked up, and found again when it goes.
    """

    difference: Tensor | None = None
    runs = 0
    shared_writes: Ticks = NO_TICKS
    foreign_slots = 0
    since: float | None = None

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

    def enter(self, tables: Tables, taken: Slots) -> tuple[list[int], list[int]]:
        """Make the new entries' rows of their parents' slots and of those taken for them; see `Tables.enter`."""
        shape = self.shape
        return tables.enter(self.parents, shape.kept, shape.owned, taken, shape.written_at)


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
    shape = commit_shape(tuple(rows), lengths, (False,) * len(keys), 0, kv.end, window, Drop.of(None, window))
    with plain_torch_state():
        packed = kv.packed
        if packed is None or not packed.is_contiguous():
            packed = joined_on(kv.keys.device, [kv.keys.detach(), kv.values.detach()])
        source = packed.detach()
    return WritePlan(keys, sides, priorities, [None] * len(keys), shape, [0] * len(keys), source)


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
    if type(rows) is range:  # the whole batch
        hits, table_rows, inherited = batch.hits, batch.table_rows, batch.corrections
    else:
        rows = tuple(rows)
        hits = tuple([batch.hits[row] for row in rows])
        table_rows, inherited = [batch.table_rows[row] for row in rows], [batch.corrections[row] for row in rows]
    if storage.corrects_lazily:
        hits = _shareable(inherited, hits, overflow)
    shape = commit_shape(rows, batch.gathered_by(rows), hits, new, batch.start, window, drop)
    if shape.corrected and len(shape.corrected) < len(rows):
        keys, table_rows = [keys[i] for i in shape.order], [table_rows[i] for i in shape.order]
        sides, priorities = [sides[i] for i in shape.order], [priorities[i] for i in shape.order]
        inherited = [inherited[i] for i in shape.order]
    corrections: list[Correction] = [None] * len(keys)
    if storage.corrects_lazily:
        corrections = _corrections(inherited, shape, overflow)
    plan = WritePlan(keys, sides, priorities, corrections, shape, table_rows, batch.data)
    if isinstance(overflow, DropAndCorrect) and shape.corrected:
        plan.difference, plan.runs = _difference(overflow, shape.corrected)
    return plan


def _shareable(inherited: list[Correction], hits: tuple[bool, ...], overflow: Overflow | None) -> tuple[bool, ...]:
    """Which rows may share their parents' tokens: not those that would move by another table than these did.

    What was gathered of them is corrected already, and is stored whole.
    """
    if isinstance(overflow, DropLazily):
        foreign = {*inherited} - {None, overflow.table}
    elif isinstance(overflow, DropOldest):
        foreign = {correction for correction in {*inherited} if isinstance(correction, PositionSteps)}
    else:
        return hits
    if not foreign:
        return hits
    return tuple([hit and correction not in foreign for hit, correction in zip(hits, inherited, strict=True)])


def _corrections(inherited: list[Correction], shape: CommitShape, overflow: Overflow | None) -> list[Correction]:
    """What each new entry has to be corrected by on reading; `inherited` is what its parent is corrected by."""
    corrections: list[Correction] = [None] * len(inherited)
    if isinstance(overflow, DropLazily):
        table = overflow.table
        if isinstance(table, PositionSteps):
            _check_covers("overflow.table", shape.moved, table.covered)
        if False not in shape.over:
            return [table] * len(inherited)
    for i, kept in enumerate(shape.kept):
        if kept:
            corrections[i] = inherited[i]
    if isinstance(overflow, DropLazily):
        return [
            overflow.table if over else correction for over, correction in zip(shape.over, corrections, strict=True)
        ]
    return corrections


def _difference(overflow: DropAndCorrect, lengths: Sequence[int]) -> tuple[Tensor, int]:
    """What is added to the corrected tokens, and to how many runs of as many tokens."""
    packed = overflow.packed
    _check_covers("overflow.difference", max(lengths), packed.shape[1])
    if min(lengths) == max(lengths):
        return overflow.first(lengths[0]), len(lengths)
    position = np.concatenate([np.arange(length) for length in lengths])
    return packed.index_select(1, upload(position, packed.device)), 1


def _check_covers(name: str, tokens: int, covered: int) -> None:
    if tokens > covered:
        raise InvalidArgumentError(
            f"{name} must cover the {tokens} tokens that a row keeps here, got {covered}; rows keep more than "
            "limit - count where several tokens are appended before a commit"
        )
