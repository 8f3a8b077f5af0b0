"""What a write stores: which tokens of a source go into slots of their own, and which slots are shared."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from torch import Tensor

from .entry import Entry
from .errors import InvalidArgumentError, WindowOverflowError
from .kv import KeysValues
from .moving import joined_on, upload
from .overflow import DropAndCorrect, DropLazily, Overflow, PositionTable, RaiseOnOverflow, check_overflow
from .streams import NO_TICKS, Ticks
from .tensors import Indices, plain_torch_state

if TYPE_CHECKING:
    from .batch import Batch
    from .storage import KVStorage

__all__ = ["WritePlan", "plan_commit", "plan_put", "plan_share"]


@dataclass
class WritePlan:
    """New entries, and where their tokens come from. Token order is row by row, oldest first."""

    keys: list[Hashable]
    sides: Sequence[object]
    priorities: Sequence[float]
    corrections: Sequence[PositionTable | None]
    kept: Indices  # [entries] tokens of each new entry
    tables: Indices  # [entries, window] shared slots in place, 0 where `own` is True
    own: npt.NDArray[np.bool_]  # [entries, window] tokens that get slots of their own
    written_at: Indices  # [own tokens] position that each own token's bytes are for
    source: Tensor | None  # contiguous [2 * layers, batch, heads, columns, head_dim]; None: nothing is copied
    rows: Indices  # [own tokens]
    columns: Indices  # [own tokens]
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
    kept = np.array([kv.lengths[row] for row in rows], dtype=np.int64)
    own = np.arange(window)[None, :] >= (window - kept)[:, None]
    which, at = np.nonzero(own)
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
        kept=kept,
        tables=np.zeros((len(keys), window), dtype=np.int64),
        own=own,
        written_at=at - (window - kept)[which],
        source=source,
        rows=np.asarray(rows, dtype=np.int64)[which],
        columns=at - window + kv.end,
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
        kept=np.array([entry.length], dtype=np.int64),
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
    keys: list[Hashable],
    rows: Sequence[int],
    overflow: Overflow | None,
    sides: Sequence[object],
    priorities: Sequence[float],
) -> WritePlan:
    """Store the new tokens of a batch's rows, sharing the slots of what was gathered where the bytes stay the same."""
    window = storage.layout.max_tokens
    check_overflow(overflow, storage.layout)
    new = batch.check_committable(rows)
    total = np.array([batch.gathered(row) for row in rows], dtype=np.int64) + new
    over, dropped = _overflowing(overflow, total, window)
    corrected = over if isinstance(overflow, DropAndCorrect) else np.zeros_like(over)
    if corrected.any() and not corrected.all():
        # The corrected rows first, so that their tokens are one range of the copy.
        order = np.argsort(~corrected, kind="stable")
        rows, keys = [rows[i] for i in order], [keys[i] for i in order]
        sides, priorities = [sides[i] for i in order], [priorities[i] for i in order]
        total, over, corrected = total[order], over[order], corrected[order]
    kept = total - dropped * over
    entries = [batch.entries[row] for row in rows]
    whole = corrected | np.array([entry is None for entry in entries])
    columns = np.arange(window, dtype=np.int64)
    own = columns[None, :] >= (window - np.where(whole, kept, np.minimum(new, kept)))[:, None]
    tables = _shared_tables(storage, entries, whole, new)
    tables[columns[None, :] < (window - kept)[:, None]] = 0
    tables[own] = 0
    which, at = np.nonzero(own)
    moved = dropped * (over & ~corrected)  # bytes written for a position that the drop has already left behind
    plan = WritePlan(
        keys=keys,
        sides=sides,
        priorities=priorities,
        corrections=_corrections(entries, whole, over, overflow),
        kept=kept,
        tables=tables,
        own=own,
        written_at=at - (window - kept)[which] + moved[which],
        source=batch.data,
        rows=np.asarray(rows, dtype=np.int64)[which],
        columns=at - window + batch.end,
    )
    if isinstance(overflow, DropAndCorrect) and corrected.any():
        lengths = kept[corrected]
        if (lengths == lengths[0]).all():
            plan.runs = len(lengths)
            plan.difference = overflow.packed[:, : lengths[0]]
        else:
            position = np.concatenate([np.arange(length) for length in lengths])
            index = upload(position, overflow.packed.device)
            plan.runs = 1
            plan.difference = overflow.packed.index_select(1, index)
    return plan


def _overflowing(overflow: Overflow | None, total: Indices, window: int) -> tuple[npt.NDArray[np.bool_], int]:
    """Which rows overflow, and how many tokens each of them drops."""
    if overflow is None:
        overflow = RaiseOnOverflow(window + 1)
    over = total >= overflow.limit
    if isinstance(overflow, RaiseOnOverflow):
        if over.any():
            raise WindowOverflowError(
                f"rows reach {int(total.max())} tokens, the limit is {overflow.limit - 1}; "
                "commit with overflow=DropOldest(...) or another policy that drops tokens"
            )
        return over, 0
    if (total - overflow.count >= overflow.limit).any():
        raise WindowOverflowError(
            f"rows reach {int(total.max())} tokens: dropping {overflow.count} leaves {overflow.limit} or more; "
            "append fewer tokens before each commit, or drop more"
        )
    return over, overflow.count


def _shared_tables(
    storage: KVStorage, entries: Sequence[Entry | None], whole: npt.NDArray[np.bool_], new: int
) -> Indices:
    """The gathered entries' slot tables moved left by the new tokens; zeros for rows that are stored whole."""
    window = storage.layout.max_tokens
    tables = np.zeros((len(entries), window), dtype=np.int64)
    sharing = [i for i, entry in enumerate(entries) if entry is not None and not whole[i]]
    parents = [entry for i in sharing if (entry := entries[i]) is not None]
    if parents and new < window:
        tables[sharing, : window - new] = storage.ledger.tables_of(parents)[:, new:]
    return tables


def _corrections(
    entries: Sequence[Entry | None],
    whole: npt.NDArray[np.bool_],
    over: npt.NDArray[np.bool_],
    overflow: Overflow | None,
) -> list[PositionTable | None]:
    """The position table by which each new entry has to be corrected on reading."""
    lazy = overflow.table if isinstance(overflow, DropLazily) else None
    corrections: list[PositionTable | None] = []
    for entry, is_whole, is_over in zip(entries, whole.tolist(), over.tolist(), strict=True):
        inherited = None if entry is None or is_whole else entry.correction
        if lazy is not None and inherited is not None and inherited is not lazy:
            raise InvalidArgumentError("overflow.table differs from the table that the row's parent was committed with")
        corrections.append(lazy if lazy is not None and is_over else inherited)
    return corrections
