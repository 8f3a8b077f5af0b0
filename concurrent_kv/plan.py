"""What a write stores: which tokens of a source go into slots of their own, and which slots are shared."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from torch import Tensor

from .commit_shape import CommitShape, Drop, commit_shape
from .entry import Entry
from .errors import InvalidArgumentError
from .kv import KeysValues
from .moving import joined_on, upload
from .overflow import DropAndCorrect, DropLazily, Overflow, PositionTable
from .streams import NO_TICKS, Ticks
from .tensors import Block, Indices, plain_torch_state

if TYPE_CHECKING:
    from .batch import Batch
    from .storage import KVStorage

__all__ = ["WritePlan", "plan_commit", "plan_put", "plan_share"]


@dataclass
class WritePlan:
    """New entries, and where their tokens come from. Token order is row by row, oldest first."""

    keys: Sequence[Hashable]
    sides: Sequence[object]
    priorities: Sequence[float]
    corrections: Sequence[PositionTable | None]
    lengths: Sequence[int]  # tokens of each new entry
    tables: Indices  # [entries, window] shared slots in place, 0 where `own` is True
    own: npt.NDArray[np.bool_]  # [entries, window] tokens that get slots of their own
    written_at: Indices  # [own tokens] position that each own token's bytes are for
    source: Tensor | None  # contiguous [2 * layers, batch, heads, columns, head_dim]; None: nothing is copied
    rows: Indices  # [own tokens]
    columns: Indices  # [own tokens]
    block: Block | None = None  # the same, if they are a block
    difference: Tensor | None = None  # [2 * layers, kept, heads, head_dim], added to the first `runs` runs
    runs: int = 0
    # Writes of the shared slots, where nothing is copied: what copies comes after the gather, and so after them.
    shared_writes: Ticks = field(default_factory=lambda: NO_TICKS)
    foreign_slots: int = 0  # shared slots that come from another pool, and count in this one's quota from now on

    @property
    def num_slots(self) -> int:
        """Slots it needs."""
        return len(self.rows)

    def shared_slots(self) -> int:
        """Slots it shares with what is there already."""
        return int(np.count_nonzero(np.unique(self.tables))) if self.tables.any() else 0


def plan_put(
    storage: KVStorage,
    keys: list[Hashable],
    kv: KeysValues,
    rows: Sequence[int],
    sides: Sequence[object],
    priorities: Sequence[float],
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
    return WritePlan(
        keys=keys,
        sides=sides,
        priorities=priorities,
        corrections=[None] * len(keys),
        lengths=shape.lengths,
        tables=np.zeros((len(keys), window), dtype=np.int64),
        own=shape.own,
        written_at=shape.written_at,
        source=source,
        rows=shape.rows,
        columns=shape.columns,
        block=shape.block,
    )


def plan_share(storage: KVStorage, entry: Entry, key: Hashable, side: object, priority: float) -> WritePlan:
    """Store a retained entry once more, in another pool, under `key`: every slot is shared and nothing is copied."""
    empty = np.empty(0, dtype=np.int64)
    tables = storage.ledger.tables_of([entry])
    return WritePlan(
        keys=[key],
        sides=[side],
        priorities=[priority],
        corrections=[entry.correction],
        lengths=[entry.length],
        tables=tables,
        own=np.zeros(tables.shape, dtype=bool),
        written_at=empty,
        source=None,
        rows=empty,
        columns=empty,
        shared_writes=entry.written,
        foreign_slots=entry.length,
    )


def plan_commit(
    storage: KVStorage,
    batch: Batch,
    new: int,
    keys: Sequence[Hashable],
    rows: Sequence[int],
    overflow: Overflow | None,
    sides: Sequence[object],
    priorities: Sequence[float],
) -> WritePlan:
    """Store the `new` tokens of a batch's rows, sharing the gathered slots where the bytes stay the same."""
    window = storage.layout.max_tokens
    drop = storage.drop_of(overflow)
    if type(rows) is range:  # the whole batch
        parents, hits = batch.entries, batch.hits
    else:
        parents = [batch.entries[row] for row in rows]
        hits = tuple([parent is not None for parent in parents])
        rows = tuple(rows)
    shape = commit_shape(rows, batch.gathered_by(rows), hits, new, batch.start + new, window, drop)
    if shape.corrected and len(shape.corrected) < len(rows):
        keys, parents = [keys[i] for i in shape.order], [parents[i] for i in shape.order]
        sides, priorities = [sides[i] for i in shape.order], [priorities[i] for i in shape.order]
        rows = tuple([rows[i] for i in shape.order])
    tables = _shared_tables(batch, rows, shape)
    plan = WritePlan(
        keys=keys,
        sides=sides,
        priorities=priorities,
        corrections=_corrections(storage, parents, shape, overflow),
        lengths=shape.lengths,
        tables=tables,
        own=shape.own,
        written_at=shape.written_at,
        source=batch.data,
        rows=shape.rows,
        columns=shape.columns,
        block=shape.block,
    )
    if isinstance(overflow, DropAndCorrect) and shape.corrected:
        plan.difference, plan.runs = _difference(overflow.packed, shape.corrected)
    return plan


def _shared_tables(batch: Batch, rows: Sequence[int], shape: CommitShape) -> Indices:
    """The gathered entries' slot tables moved left by the new tokens; zeros for rows that are stored whole."""
    if not shape.sharing:
        return np.zeros((len(rows), batch.tables.shape[1]), dtype=np.int64)
    parents = batch.tables if type(rows) is range else batch.tables.take(rows, axis=0)
    tables = parents.take(shape.parents, axis=1)
    if shape.masked:
        tables *= shape.shared
    return tables


def _corrections(
    storage: KVStorage, parents: Sequence[Entry | None], shape: CommitShape, overflow: Overflow | None
) -> Sequence[PositionTable | None]:
    """The position table by which each new entry has to be corrected on reading."""
    corrections: list[PositionTable | None] = [None] * len(parents)
    if not storage.corrects_lazily:
        return corrections
    for i in shape.sharing:
        corrections[i] = None if (parent := parents[i]) is None else parent.correction
    if isinstance(overflow, DropLazily):
        if any(inherited not in (None, overflow.table) for inherited in corrections):
            raise InvalidArgumentError("overflow.table differs from the table that the row's parent was committed with")
        return [overflow.table if over else inherited for over, inherited in zip(shape.over, corrections, strict=True)]
    return corrections


def _difference(packed: Tensor, lengths: Sequence[int]) -> tuple[Tensor, int]:
    """What is added to the corrected tokens, and to how many runs of as many tokens; `packed` as in the policy."""
    if min(lengths) == max(lengths):
        return packed[:, : lengths[0]], len(lengths)
    position = np.concatenate([np.arange(length) for length in lengths])
    return packed.index_select(1, upload(position, packed.device)), 1
