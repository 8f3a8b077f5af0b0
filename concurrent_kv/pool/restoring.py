"""A file into pools: everything is read and checked, what fits is chosen, and each pool takes it in one write."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from .._checks import check_seconds
from ..books.ledger import Ledger
from ..books.records import Entry, Scope, Scopes
from ..books.tables import Tables
from ..device.positions import Correction
from ..device.slot_numbers import Slots, as_array
from ..errors import InvalidArgumentError, SnapshotMismatchError, shown
from ..locks.deadline import Deadline
from ..locks.gate import gate
from ..model.overflow import DropLazily, Overflow
from ..snapshots.contents import OWED_NOTHING, Contents, Numbers, PoolContents, SideCodec
from ..snapshots.reading import SnapshotFile, path_of
from .core import PoolCore, end_older
from .plan import Shape, WritePlan
from .saving import check_codec, mark_of
from .writing import write

__all__ = ["Loaded", "load_pools"]

ON_MISMATCH = ("error", "convert")
NONE: Numbers = np.empty(0, dtype=np.int64)


class Loaded(NamedTuple):
    """What came out of a snapshot.

    Attributes:
        entries, slots: that are stored now; a slot that several entries of a pool share is one.
        left_out: entries of the file that are not, because they did not fit.
        stored: False where a clear, or a bump of the version, came in between in some pool: it has none of them.
    """

    entries: int
    slots: int
    left_out: int
    stored: bool


class _Part(NamedTuple):
    """A pool, and which entries of the file it is to have."""

    pool: PoolCore
    contents: PoolContents
    chosen: Numbers  # numbers of entries, ascending

    def tables(self) -> tuple[Numbers, Numbers]:
        """Lengths and slots of the chosen entries."""
        lengths, ends = self.contents.lengths, self.contents.ends()
        if len(self.chosen) == len(lengths):
            return lengths, self.contents.tables
        rows = [self.contents.tables[ends[row] - lengths[row] : ends[row]] for row in self.chosen.tolist()]
        return lengths[self.chosen], np.concatenate(rows) if rows else NONE


def load_pools(
    pools: Mapping[str, PoolCore],
    name: str,
    path: object,
    *,
    side: SideCodec | None,
    on_mismatch: str,
    replace: bool,
    overflow: Overflow | None,
    timeout: float | None,
) -> Loaded:
    """Read a file into pools of one storage, by their roles; see `KVPool.load`. `name` is what messages call them."""
    if on_mismatch not in ON_MISMATCH:
        raise InvalidArgumentError(f"on_mismatch must be 'error' or 'convert', got {shown(on_mismatch)}")
    check_codec(side)
    if timeout is not None:
        check_seconds("timeout", timeout)
    first = next(iter(pools.values()))
    storage = first.storage
    storage.enter(timeout)
    storage.clock.current()  # before anything is allocated, which a capture would take into its graph
    for pool in pools.values():
        pool.check_open()
    owed = storage.checked_overflow(overflow) if overflow is not None else None
    with SnapshotFile(path_of(path)) as file:
        contents = file.contents()
        parts, left_out = _Fitting(file.path, name, contents, pools, convert=on_mismatch == "convert").parts()
        corrections = _corrections(file.path, name, contents, parts, owed)
        sides = [_sides(part, side) for part in parts]
        file.check_tokens()
        # From here on nothing is wrong with the file.
        deadline = storage.enter(timeout)
        entries = slots = 0
        stored = True
        for part, of_part in zip(parts, sides, strict=True):
            taken = _Restoring(file, contents, part, of_part, corrections, replace=replace).run(deadline)
            stored = stored and taken is not None
            if taken is not None:
                entries, slots = entries + len(part.chosen), slots + taken
    return Loaded(entries, slots, left_out, stored)


# What fits -----------------------------------------------------------------------------------------------------------


class _Fitting:
    """What of a file goes into which pool; or an error that says why something does not.

    Args:
        path, name: of the file, and of the pool or manager, for messages.
        convert: whether what does not fit is converted, or left out.
    """

    def __init__(
        self, path: str, name: str, contents: Contents, pools: Mapping[str, PoolCore], *, convert: bool
    ) -> None:
        self._path, self._name = path, name
        self._contents = contents
        self._pools = pools
        self._convert = convert

    def parts(self) -> tuple[list[_Part], int]:
        """The parts of the file, and how many entries are in none of them."""
        self._check_layout()
        parts = []
        left_out = 0
        for of_file in self._contents.pools:
            pool = self._pools.get(of_file.role)
            if pool is None:
                self._refuse_or_convert(
                    f"it has a pool {of_file.role!r} of {len(of_file.keys)} entries, and {self._name} has only "
                    f"{', '.join(self._pools)}",
                    "leaves it out",
                )
                left_out += len(of_file.keys)
                continue
            if of_file.version < pool.version:
                raise self._mismatch(
                    f"{of_file.role} was saved under the weights version {of_file.version}, and {pool.name} is at "
                    f"{pool.version}: its entries are of weights that are gone"
                )
            chosen = self._chosen(pool, of_file)
            left_out += len(of_file.keys) - len(chosen)
            parts.append(_Part(pool, of_file, chosen))
        return parts, left_out

    def _check_layout(self) -> None:
        saved, layout = self._contents.layout, next(iter(self._pools.values())).layout
        for name in ("num_layers", "num_heads", "head_dim"):
            if getattr(saved, name) != getattr(layout, name):
                raise self._mismatch(
                    f"it has {name}={getattr(saved, name)}, and {self._name} {name}={getattr(layout, name)}"
                )
        if saved.dtype != layout.dtype:
            self._refuse_or_convert(f"it has the dtype {saved.dtype}, and {self._name} {layout.dtype}", "rounds")
            if self._contents.marks:
                raise self._mismatch(
                    f"it has the dtype {saved.dtype}, and {self._name} {layout.dtype}; entries that are owed "
                    "corrections on reading can be loaded into the same dtype alone"
                )

    def _chosen(self, pool: PoolCore, of_file: PoolContents) -> Numbers:
        """Numbers of the entries that fit: of those that are not too long, the youngest."""
        account, window = pool.account, pool.layout.max_tokens
        chosen = np.arange(len(of_file.keys))
        if self._contents.layout.max_tokens > window and len(chosen):
            starts = of_file.ends() - of_file.lengths
            written = np.maximum.reduceat(self._contents.positions[of_file.tables], starts)
            fits = np.maximum(of_file.lengths, written + 1) <= window
            if not fits.all():
                self._refuse_or_convert(
                    f"its {of_file.role} has {np.count_nonzero(~fits)} entries that reach beyond the window of "
                    f"{window} tokens of {pool.name}; a window of {self._contents.layout.max_tokens} would do",
                    "leaves them out",
                )
                chosen = chosen[fits]
        entries, slots = self._sizes(of_file, chosen)
        if entries > account.max_entries or slots > account.max_slots:
            self._refuse_or_convert(
                f"its {of_file.role} has {entries} entries with {slots} slots, and {pool.name} holds at most "
                f"{account.max_entries} and {account.max_slots}; {account.that_holds(entries, slots)} would do",
                "leaves the oldest out",
            )
            chosen = self._youngest(pool, of_file, chosen)
        return chosen

    @staticmethod
    def _sizes(of_file: PoolContents, chosen: Numbers) -> tuple[int, int]:
        if len(chosen) == len(of_file.keys):
            return len(chosen), len(np.unique(of_file.tables))
        ends, lengths = of_file.ends(), of_file.lengths
        rows = [of_file.tables[ends[row] - lengths[row] : ends[row]] for row in chosen.tolist()]
        return len(chosen), len(np.unique(np.concatenate(rows))) if rows else 0

    @staticmethod
    def _youngest(pool: PoolCore, of_file: PoolContents, chosen: Numbers) -> Numbers:
        """The youngest of some entries, as many as the pool holds."""
        account, ends, lengths = pool.account, of_file.ends(), of_file.lengths
        named: set[int] = set()
        kept: list[int] = []
        for row in reversed(chosen.tolist()):
            named.update(of_file.tables[ends[row] - lengths[row] : ends[row]].tolist())
            if len(kept) == account.max_entries or len(named) > account.max_slots:
                break
            kept.append(row)
        return np.array(kept[::-1], dtype=np.int64)

    def _refuse_or_convert(self, what: str, how: str) -> None:
        if not self._convert:
            raise self._mismatch(f"{what}; on_mismatch='convert' {how}")

    def _mismatch(self, what: str) -> SnapshotMismatchError:
        return SnapshotMismatchError(
            f"the snapshot {self._path} does not go into {self._name}: {what}", path=self._path
        )


def _corrections(
    path: str, name: str, contents: Contents, parts: Sequence[_Part], overflow: Overflow | None
) -> list[Correction]:
    """The table that each of the file's marks tells of: that of the caller's policy."""
    owed = {number for part in parts for row in part.chosen.tolist() if (number := part.contents.owed[row]) >= 0}
    found: list[Correction] = [None] * len(contents.marks)
    table = overflow.table if isinstance(overflow, DropLazily) else None
    mark = None if table is None or not owed else mark_of(table)
    for number in owed:
        if contents.marks[number] != mark:
            raise SnapshotMismatchError(
                f"the snapshot {path} has entries that are owed corrections on reading by a table, "
                f"{contents.marks[number]}; overflow= must be the DropLazily with that table to load them into {name}, "
                f"got {'none' if overflow is None else mark or type(overflow).__name__}",
                path=path,
            )
        found[number] = table
    if owed and contents.layout.max_tokens != parts[0].pool.layout.max_tokens:
        raise SnapshotMismatchError(
            f"the snapshot {path} has entries that are owed corrections on reading, which can be loaded into the same "
            f"window of {contents.layout.max_tokens} tokens alone",
            path=path,
        )
    return found


def _sides(part: _Part, side: SideCodec | None) -> list[object]:
    """Side data of the chosen entries, made by the caller's codec."""
    encoded = [part.contents.sides[row] for row in part.chosen.tolist()]
    if side is None:
        number = sum(data is not None for data in encoded)
        if number:
            raise InvalidArgumentError(
                f"side must be the codec that the snapshot was saved with: {number} entries of {part.contents.role} "
                "have side data, got None"
            )
        return [None] * len(encoded)
    return [None if data is None else side.decode(data) for data in encoded]


# The write -----------------------------------------------------------------------------------------------------------


class _RestoredPlan(WritePlan):
    """Entries of a file: which of the slots taken for them each one names.

    Args:
        numbers: for each token of each entry, its place among the slots taken.
        positions: of each of these tokens, that it was written at.
    """

    def __init__(
        self,
        keys: list[object],
        sides: list[object],
        priorities: list[float],
        corrections: list[Correction],
        lengths: Numbers,
        numbers: Numbers,
        positions: Numbers,
    ) -> None:
        of_each = lengths.tolist()
        none = [0] * len(of_each)
        slots = np.arange(int(numbers.max()) + 1)
        shape = Shape([], of_each, [], none, of_each, positions, slots, slots, None, [], 0)
        super().__init__(keys, sides, priorities, corrections, shape, none, torch.empty(0, device="cpu"))
        self._numbers = numbers

    def slots_together(self, tables: Tables) -> int:
        """Each once."""
        return self.num_slots

    def make(self, ledger: Ledger, entries: list[Entry], taken: Slots) -> list[int]:
        """Give each entry a row of its own, which shares slots with the others, and no page. Mutex held."""
        shape = self.shape
        slots = as_array(taken)[self._numbers]
        return ledger.make(entries, self.parents, shape.kept, shape.owned, slots, shape.written_at)


class _Restoring:
    """One pool's part of a file, stored in one write."""

    def __init__(
        self,
        file: SnapshotFile,
        contents: Contents,
        part: _Part,
        sides: list[object],
        corrections: list[Correction],
        *,
        replace: bool,
    ) -> None:
        self._file = file
        self._contents = contents
        self._part = part
        self._sides = sides
        self._corrections = corrections
        self._replace = replace

    def run(self, deadline: Deadline) -> int | None:
        """Store it; returns the slots that it takes, or None where a clear or a bump came in between."""
        part, pool, of_file = self._part, self._part.pool, self._part.contents
        is_newer = of_file.version > pool.version
        renewal = (int(self._replace), of_file.version) if is_newer or self._replace else None
        rows = part.chosen.tolist()
        scope_of = [of_file.scope_of[row] for row in rows]
        used = sorted({*scope_of})
        number_of = {number: place for place, number in enumerate(used)}
        scopes = [self._scope(of_file.scopes[number]) for number in used] or [pool.default_scope]
        into = Scopes(scopes, [number_of[number] for number in scope_of], renewal)
        slots: int | None = 0
        if not rows:
            with gate.lock, pool.ledger.mutex:
                into.renew()
        else:
            slots = self._write(into, rows, deadline)
        if renewal is not None and slots is not None:
            end_older(pool, of_file.version, is_newer, deadline)
        return slots

    def _scope(self, name: tuple[object] | None) -> Scope:
        return self._part.pool.default_scope if name is None else self._part.pool.scope(name[0])

    def _write(self, into: Scopes, rows: list[int], deadline: Deadline) -> int | None:
        pool, of_file = self._part.pool, self._part.contents
        lengths, tables = self._part.tables()
        used, numbers = np.unique(tables, return_inverse=True)
        owed = [of_file.owed[row] for row in rows]
        plan = _RestoredPlan(
            [of_file.keys[row] for row in rows],
            self._sides,
            [of_file.priorities[row] for row in rows],
            [None if number == OWED_NOTHING else self._corrections[number] for number in owed],
            lengths,
            numbers,
            self._contents.positions[tables],
        )

        def fill(taken: Slots) -> None:
            started = time.monotonic()
            for at, tokens in self._file.tokens(used):
                pool.storage.tensor.write_slots(taken[at : at + len(tokens)], tokens)
            deadline.extend(time.monotonic() - started)  # the disk's time, not the pool's

        plan.fill = fill
        return len(used) if write(pool, into, into.generation, plan, deadline) else None
