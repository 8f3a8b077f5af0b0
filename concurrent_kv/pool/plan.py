"""What a write stores: which tokens of a source go into slots of their own, and which slots are shared.

A `WritePlan` is made for one write. As far as lengths alone decide it, it is a `Shape`, which is remembered.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from ..books.ledger import Ledger
from ..books.records import Entry, Scopes
from ..books.tables import Tables, slots_of_row
from ..device.appends import HostMemory
from ..device.positions import Correction
from ..device.slot_numbers import Slots
from ..device.streams import NO_TICKS, Ticks
from ..device.tensors import Block, Indices
from ..errors import WindowOverflowError
from ..model.kv import KeysValues
from ..model.overflow import Overflow
from ..native import lookup
from .batch import Batch
from .storage import KVStorage

__all__ = ["Shape", "WritePlan", "plan_commit", "plan_put", "plan_share", "shape_of"]

# Of shapes; the commits of a search repeat a few.
REMEMBERED = 256
REMEMBERED_BYTES = 8 << 20
BYTES_OF_ENTRY = 80  # in lists, and in the tuples that it was made of
BYTES_OF_SHAPE = 2048  # its arrays' own records, and its own


class Shape(NamedTuple):
    """The part of a plan that lengths alone decide, remembered for the next of the same. Its arrays are read-only.

    Token order is row by row, oldest first.
    """

    order: list[int]  # the committed rows by position, those to be corrected first
    lengths: list[int]  # [entries] tokens of each new entry
    over: list[bool]  # [entries] whether it overflowed
    kept: list[int]  # [entries] tokens that share slots with the parent: its newest
    owned: list[int]  # [entries] tokens that get slots of their own, after these
    written_at: Indices  # [own tokens] position that each one's bytes are for
    rows: Indices  # [own tokens] where they come from in the batch's buffer
    columns: Indices  # [own tokens]
    block: Block | None  # the same as rows and columns, if they are a block
    corrected: list[int]  # tokens of each corrected entry
    moved: int  # tokens of the longest entry that overflowed; 0: none did

    @property
    def nbytes(self) -> int:
        """Bytes of its arrays and lists, and of what it was made of."""
        arrays = (self.written_at, self.rows, self.columns)
        return sum(array.nbytes for array in arrays) + BYTES_OF_ENTRY * len(self.lengths) + BYTES_OF_SHAPE


class _Remembered:
    """Shapes by what they were made of, bounded in number and in bytes, without a lock.

    Two generations: what is looked up moves into the younger one, and when that is full, the older one is forgotten.
    Every step is one operation on a dict or one assignment: a finaliser, a signal handler or an asynchronous exception
    at any point leaves a table that works, and threads that write at once lose a shape, which is made again.
    """

    def __init__(self, shapes: int, nbytes: int) -> None:
        self._most, self._most_bytes = shapes // 2, nbytes // 2  # of one generation
        self.clear()

    def clear(self) -> None:
        """Forget all of them."""
        self.young: dict[tuple[Any, ...], Shape] = {}
        self._old: dict[tuple[Any, ...], Shape] = {}
        self._young_bytes = 0

    def get(self, key: tuple[Any, ...]) -> Shape | None:
        """The shape that was made of `key`, if it is remembered."""
        found: Shape | None = lookup(self.young, key)
        if found is None:
            found = lookup(self._old, key)
            if found is not None:
                self.add(key, found)
        return found

    def add(self, key: tuple[Any, ...], shape: Shape) -> None:
        """Remember a shape, unless it is as large as a whole generation."""
        nbytes = shape.nbytes
        if nbytes > self._most_bytes:
            return
        if len(self.young) >= self._most or self._young_bytes + nbytes > self._most_bytes:
            self._old, self.young, self._young_bytes = self.young, {}, 0
        self.young[key] = shape
        self._young_bytes += nbytes

    @property
    def nbytes(self) -> int:
        """Bytes of what is remembered."""
        shapes = {id(shape): shape for shape in [*self.young.values(), *self._old.values()]}
        return sum(shape.nbytes for shape in shapes.values())

    def __len__(self) -> int:
        return len(self.young.keys() | self._old.keys())


remembered = _Remembered(REMEMBERED, REMEMBERED_BYTES)


def shape_of(
    rows: Sequence[int],
    gathered: tuple[int, ...],
    hits: tuple[bool, ...],
    new: int | tuple[int, ...],
    start: int,
    overflow: Overflow,
) -> Shape:
    """The shape of a commit of `rows` that had `gathered` tokens each, up to column `start`, and got `new` ones.

    `new` is one number for all rows, or one for each.

    Raises:
        WindowOverflowError: a row grew too long.
    """
    key = (rows, gathered, hits, new, start, overflow.limit, overflow.count, overflow.corrects)
    shape: Shape | None = lookup(remembered.young, key) or remembered.get(key)
    if shape is None:
        shape = _shape_of(rows, np.array(gathered, dtype=np.int64), np.array(hits), new, start, overflow)
        remembered.add(key, shape)
    return shape


def _shape_of(
    rows: Sequence[int],
    gathered: Indices,
    hits: npt.NDArray[np.bool_],
    new: int | tuple[int, ...],
    start: int,
    overflow: Overflow,
) -> Shape:
    added = np.broadcast_to(np.array(new, dtype=np.int64), gathered.shape)
    total = gathered + added
    over = total >= overflow.limit
    _check_lengths(total, added, over, overflow)
    whole = ~hits | (over & overflow.corrects)
    # The corrected rows first, so that their tokens are one range of the copy.
    order = np.argsort(~over, kind="stable") if overflow.corrects else np.arange(len(rows))
    added, total, over, whole = added[order], total[order], over[order], whole[order]
    length = total - overflow.count * over
    owned = np.where(whole, length, np.minimum(added, length))
    kept = length - owned
    moved = overflow.count * (over & (not overflow.corrects))  # written for a position that the drop has left behind
    which = np.repeat(np.arange(len(rows)), owned)
    at = np.arange(len(which)) - np.repeat(np.cumsum(owned) - owned, owned)  # among the entry's own
    from_rows = np.array(rows, dtype=np.int64)[order][which]
    from_columns = at + (start + added - owned)[which]
    corrected = length[over].tolist() if overflow.corrects else []
    # A block has as many tokens of every row, and is corrected as a whole or not at all.
    is_even = len(corrected) in (0, len(rows)) and (owned == owned[0]).all()
    shape = Shape(
        order=order.tolist(),
        lengths=length.tolist(),
        over=over.tolist(),
        kept=kept.tolist(),
        owned=owned.tolist(),
        written_at=at + (kept + moved)[which],
        rows=from_rows,
        columns=from_columns,
        block=_block_of(from_rows, from_columns) if is_even else None,
        corrected=corrected,
        moved=int(length[over].max(initial=0)),
    )
    for array in (shape.written_at, shape.rows, shape.columns):
        array.setflags(write=False)
    return shape


def _block_of(rows: Indices, columns: Indices) -> Block | None:
    """The block that some tokens are, row by row, or None."""
    if not len(rows):
        return None
    (first, last), (left, right) = rows[[0, -1]].tolist(), columns[[0, -1]].tolist()
    block, width = (slice(first, last + 1), slice(left, right + 1)), right + 1 - left
    if (last + 1 - first) * width != len(rows):
        return None
    row, column = np.divmod(np.arange(len(rows)), width)
    return block if (rows == row + first).all() and (columns == column + left).all() else None


def _check_lengths(total: Indices, added: Indices, over: npt.NDArray[np.bool_], overflow: Overflow) -> None:
    if not overflow.count and over.any():
        longest, limit = int(total.max()), overflow.limit
        count = max(int(added.max()), longest - limit + 1)
        raise WindowOverflowError(
            f"rows reach {longest} tokens, the limit is {limit - 1}; commit with an overflow policy that drops"
            f"{f' (limit={limit}, count={count}, say)' if count < limit else ''}: DropOldest for rotary positions, "
            "DropLazily or DropAndCorrect for absolute ones"
        )
    if (total - overflow.count >= overflow.limit).any():
        enough = int(total.max()) - overflow.limit + 1
        raise WindowOverflowError(
            f"rows reach {int(total.max())} tokens: dropping {overflow.count} leaves {overflow.limit} or more; "
            f"{f'an overflow.count of {enough} would do, or ' if enough < overflow.limit else ''}fewer tokens before "
            "each commit would"
        )


# Plans --------------------------------------------------------------------------------------------------------------


class WritePlan:
    """New entries, and where their tokens come from. Token order is row by row, oldest first.

    Attributes:
        keys, sides, priorities, corrections: one for each entry.
        num_slots: how many slots it needs.
        shape: their lengths, how many tokens get slots of their own, and where in `source` those are.
        parents: rows in the tables of the entries that they share slots with, which the caller keeps alive.
        source: contiguous `[2 * layers, batch, heads, columns, head_dim]`; None: nothing is copied.
        memory: that of `source`, where it is known.
        parts: `[layers, batch, heads, columns, head_dim]`: keys and values that are copied as they are, not `source`.
        fill: writes the tokens into the slots taken for them, in the stead of a copy of `source`.
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

    memory: HostMemory | None = None
    parts: tuple[Tensor, Tensor] | None = None
    fill: Callable[[Slots], None] | None = None
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
        shape: Shape,
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

    def slots_together(self, tables: Tables) -> int:
        """Slots that it needs and shares."""
        shape = self.shape
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

    def entries_in(self, scopes: Scopes, written: Ticks) -> list[Entry]:
        """The new entries, of several scopes."""
        of_each = zip(
            self.keys,
            scopes.of_keys(),
            scopes.generations(),
            self.shape.lengths,
            self.sides,
            self.priorities,
            self.hashes,
            self.corrections,
            strict=True,
        )
        return [
            Entry(key, scope, generation, length, side, priority, key_hash, correction, written)
            for key, scope, generation, length, side, priority, key_hash, correction in of_each
        ]

    def make(self, ledger: Ledger, entries: list[Entry], taken: Slots) -> list[int]:
        """Give the new entries their parents' slots and those taken for them; see `Ledger.make`. Mutex held."""
        shape = self.shape
        return ledger.make(entries, self.parents, shape.kept, shape.owned, taken, shape.written_at)


def plan_put(
    storage: KVStorage,
    keys: list[Hashable],
    kv: KeysValues,
    rows: Sequence[int],
    sides: list[object],
    priorities: list[float],
) -> WritePlan:
    """Store rows of `kv` whole."""
    lengths = tuple(map(kv.lengths.__getitem__, rows))
    # As a commit of rows that nothing was gathered for, and nothing appended to.
    shape = shape_of(tuple(rows), lengths, (False,) * len(keys), 0, kv.end, storage.no_overflow)
    packed, parts = kv.packed, None
    if packed is None or not packed.is_contiguous():
        packed, parts = kv.keys, (kv.keys, kv.values)
    plan = WritePlan(keys, sides, priorities, [None] * len(keys), shape, [0] * len(keys), packed)
    plan.parts = parts
    return plan


def plan_share(storage: KVStorage, entry: Entry, key: Hashable, side: object, priority: float) -> WritePlan:
    """Store a retained entry once more, in another pool, under `key`: every slot is shared and nothing is copied."""
    # As a commit of a row that hit, and got nothing.
    shape = shape_of(range(1), (entry.length,), (True,), 0, entry.length, storage.no_overflow)
    plan = WritePlan([key], [side], [priority], [entry.correction], shape, [entry.row], None)
    plan.shared_writes = entry.written
    plan.foreign_slots = entry.length
    return plan


def _without_moved(
    tables: Tables, rows: list[int], inherited: list[Correction], hits: tuple[bool, ...], over: list[bool]
) -> tuple[bool, ...]:
    """`hits` without rows that overflow now, and whose tokens had moved before without a correction (by `DropOldest`).

    Those are stored whole. Slots remember where their tokens were written: of shared ones, a later read would correct
    the way that they went before, too.
    """
    asked = [hit and is_over and other is None for hit, is_over, other in zip(hits, over, inherited, strict=True)]
    if True not in asked:
        return hits
    # If any token has moved, then the oldest.
    oldest = [slots_of_row(tables, row)[0] if is_asked else 0 for row, is_asked in zip(rows, asked, strict=True)]
    written_at = np.frombuffer(tables.positions(np.array(oldest, dtype=np.int64)), dtype=np.int32).tolist()
    return tuple(
        [hit and not (is_asked and position) for hit, is_asked, position in zip(hits, asked, written_at, strict=True)]
    )


def plan_commit(
    storage: KVStorage,
    tables: Tables,
    batch: Batch,
    new: int | tuple[int, ...],
    keys: list[Hashable],
    rows: Sequence[int],
    overflow: Overflow,
    sides: list[object],
    priorities: list[float],
) -> WritePlan:
    """Store the new tokens of a batch's rows, sharing the gathered slots where the bytes stay the same.

    `tables` have its entries; `new` is how many every row got, or how many each of them.
    """
    start, gathered, hits, table_rows, inherited = batch.before(rows)
    if storage.corrects_lazily:
        foreign = overflow.foreign(inherited)
        if foreign:
            hits = tuple([hit and other not in foreign for hit, other in zip(hits, inherited, strict=True)])
    if storage.tier is not None:
        # Of a row that was read from the tier no slot is here: its children own all of their tokens.
        hits = tuple([hit and row > 0 for hit, row in zip(hits, table_rows, strict=True)])
    if overflow.corrects_lazily and None in inherited:
        added = new if isinstance(new, tuple) else (new,) * len(gathered)
        over = [count + more >= overflow.limit for count, more in zip(gathered, added, strict=True)]
        hits = _without_moved(tables, table_rows, inherited, hits, over)
    first, in_buffer = batch.first_row, rows if type(rows) is range else tuple(rows)
    if first:
        in_buffer = range(first, first + len(rows)) if type(rows) is range else tuple([first + row for row in rows])
    shape = shape_of(in_buffer, gathered, hits, new, start, overflow)
    if shape.corrected and len(shape.corrected) < len(rows):
        keys, table_rows = [keys[i] for i in shape.order], [table_rows[i] for i in shape.order]
        sides, priorities = [sides[i] for i in shape.order], [priorities[i] for i in shape.order]
        inherited = [inherited[i] for i in shape.order]
    corrections: list[Correction] = [None] * len(keys)
    if storage.corrects_lazily:
        shared = [correction if kept else None for correction, kept in zip(inherited, shape.kept, strict=True)]
        corrections = overflow.corrections(shared, shape.over, shape.moved)
    plan = WritePlan(keys, sides, priorities, corrections, shape, table_rows, batch.data)
    plan.batch, plan.since, plan.memory = batch, batch.opened, batch.memory
    difference = overflow.difference_of(shape.corrected) if shape.corrected else None
    if difference is not None:
        plan.difference, plan.runs = difference
    return plan
