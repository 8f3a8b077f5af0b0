"""`Tables`: which slots each entry names, in pages that entries share; and `Uses`, how many of some name each slot.

An entry's row of the tables lists its slots, the oldest token first. It is kept as pages of slot numbers. A child names
the pages of its parent that it has in common with it, and gets new ones for what is new: a row costs by its new tokens,
and by one number for each page, however long it is. Every slot in a page of a row is that row's: where a part of the
first page is dropped, or the last one is not full, the child has a copy of the rest.

            start                                                    a window of up to 64 tokens is one page
    parent    .  .  2  3 | 4  5  6  7 | 8  9  .  .                   that starts with the oldest token
    child                  .  5  6  7 |(8  9) 10 11 | 12  .          its first page is a copy without 4, and of
                           new page     new page      new page       the one that was not full; others are shared

Compiled code has the same two classes (`csrc/tables.h`); `new_tables` and `new_uses` make what is there. Every method
that changes something is called with the ledger's mutex held; what reads a row only needs the row to be kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import add, gt
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..device.slot_numbers import SlotArray, Slots, as_array
from ..native import native

__all__ = [
    "MOST",
    "Tables",
    "Uses",
    "copied_rows",
    "in_columns",
    "named_slots",
    "new_tables",
    "new_uses",
    "slots_of_row",
    "weights_of",
]

PAGE = 32  # slots, in windows that are longer than
LONGEST_PAGE = 64  # those in which a row is one page
MOST = 2  # rows of a page that count: one, or more

Rows = Sequence[int]


class Uses(Protocol):
    """How many rows, of those that were added, name each page and each slot. A page counts at most twice in a slot."""

    @property
    def used(self) -> int:
        """Slots that a row names."""

    def add(self, rows: list[int]) -> None:
        """Count rows of the tables in."""

    def remove(self, rows: list[int]) -> None:
        """Count rows out that were counted in."""

    def exclusive(self, rows: list[int]) -> int:
        """Slots that these name, and no other row that was counted in."""

    def weights(self, slots: Slots) -> Any:
        """int32, one for each slot: 0 where no row names it, 1 where one does, more where several do."""

    def counted(self) -> tuple[Any, Any]:
        """int32: rows that name each page, and each slot's weight. For checks."""

    def keep(self, rows: list[int]) -> None:
        """Count these rows, and no others."""


class Tables(Protocol):
    """The slots of rows, and how many rows name each slot. Row 0 names none."""

    @property
    def used(self) -> int:
        """Slots that a row names."""

    @property
    def shared(self) -> int:
        """Slots that several rows name."""

    def enter(
        self, parents: list[int], kept: list[int], own: list[int], taken: Slots, positions: SlotArray
    ) -> tuple[list[int], list[int]]:
        """Make rows: of the newest `kept` tokens of a parent each, and then the next `own` slots of `taken`.

        `positions` are those that the tokens in `taken` are written at. Returns the rows and their last slots. All of
        it, or nothing where it raises. What shares everything with its parent shares no page with it.
        """

    def leave(self, rows: list[int]) -> tuple[Any, bool]:
        """Free rows; returns the int64 slots that none names any more, and whether others of theirs are still named.

        All of it, or nothing where it raises.
        """

    def columns(self, rows: list[int], end: int, columns: int) -> Any:
        """int64 slots `[rows, columns]`, each row's newest before column `end`, 0 elsewhere."""

    def slots_of(self, row: int) -> Any:
        """int64 slots of a row, the oldest token first."""

    def slots_of_all(self, rows: list[int]) -> Any:
        """int64 slots of some rows, one after the other."""

    def pages_of(self, row: int) -> list[tuple[int, list[int]]]:
        """The pages of a row, each with its slots. For checks."""

    def named_elsewhere(self, rows: list[int]) -> bool:
        """Whether another row names the last slot of these, which is the same of all."""

    def positions(self, slots: Slots) -> Any:
        """int32: the position in its row that each slot's token was written at."""

    def exclusive(self, rows: list[int]) -> int:
        """Slots that these name, and no other row."""

    def weights(self, slots: Slots) -> Any:
        """As of `Uses`, of all rows."""

    def counted(self) -> tuple[Any, Any]:
        """As of `Uses`."""

    def keep(self, rows: list[int]) -> None:
        """Free every row but these, and count anew."""


def new_tables(num_slots: int, window: int) -> Tables:
    """Tables of rows of at most `window` of the slots 1 to `num_slots`."""
    return _PythonTables(num_slots, window) if native is None else native.Tables(num_slots, window)


def new_uses(tables: Tables) -> Uses:
    """Counts of some of the rows of `tables`, at first of none."""
    return _PythonUses(tables) if isinstance(tables, _PythonTables) else native.Uses(tables)


def in_columns(tables: Tables, rows: list[int], end: int, columns: int) -> SlotArray:
    """As `Tables.columns`, as an array."""
    found = tables.columns(rows, end, columns)
    return found if isinstance(found, np.ndarray) else np.frombuffer(found, dtype=np.int64).reshape(len(rows), columns)


def weights_of(counts: Tables | Uses, slots: Slots) -> npt.NDArray[np.int32]:
    """As `Uses.weights`, as an array."""
    return np.frombuffer(counts.weights(slots), dtype=np.int32)


def slots_of_row(tables: Tables, row: int) -> SlotArray:
    """As `Tables.slots_of`, as an array."""
    return np.frombuffer(tables.slots_of(row), dtype=np.int64)


def named_slots(tables: Tables) -> SlotArray:
    """Every slot that a row names."""
    _, slots = tables.counted()
    return np.flatnonzero(np.frombuffer(slots, dtype=np.int32)).astype(np.int64)


def copied_rows(tables: Tables, other: Tables, rows: list[int], lengths: list[int]) -> tuple[list[int], list[int]]:
    """Make rows with the slots of some rows of `other`, which share no page; returns them and their last slots."""
    slots = np.frombuffer(other.slots_of_all(rows), dtype=np.int64)
    positions = np.frombuffer(other.positions(slots), dtype=np.int32).astype(np.int64)
    none = [0] * len(rows)
    return tables.enter(none, none, lengths, slots, positions)


class _Counts:
    """Rows that name each page, and the sum of these over the pages of each slot, at most `MOST` of each page."""

    def __init__(self, num_slots: int, pages: int) -> None:
        self.pages: npt.NDArray[np.int32] = np.zeros(pages, dtype=np.int32)
        self.slots: npt.NDArray[np.int32] = np.zeros(num_slots + 1, dtype=np.int32)

    def slots_in(self, tables: _PythonTables, pages: list[int]) -> SlotArray:
        """The slots in the pages of some rows, and 0; those of a page once for each row that has it."""
        if len(self.pages) < len(tables.slots):
            self.pages = np.concatenate([self.pages, np.zeros(len(tables.slots) - len(self.pages), dtype=np.int32)])
        return tables.slots.take(pages, axis=0).ravel()

    def change(self, tables: _PythonTables, pages: list[int], slots: SlotArray, change: int) -> None:
        """Count one row more, or less, of each of `pages`, which have these slots.

        All of it, or nothing where it raises: what takes effect comes last, and calls no function of Python's.
        """
        numbers: npt.NDArray[np.int64] = np.array(pages, dtype=np.int64)
        if not tables.have_several:  # each page is that of one row
            before = self.pages[numbers]
            after = before + np.int32(change)
            slots, weights = slots, np.full(len(slots), change, dtype=np.int32)
        else:
            numbers, rows = np.unique(numbers, return_counts=True)
            before = self.pages[numbers]
            after = before + (change * rows).astype(np.int32)
            of_each = np.minimum(after, MOST) - np.minimum(before, MOST)
            slots, weights = tables.slots[numbers].ravel(), np.repeat(of_each, tables.width)
        try:
            self.pages.put(numbers, after)
            np.add.at(self.slots, slots, weights)
        except Exception:
            self.pages.put(numbers, before)
            raise
        try:
            self.slots[0] = 0
        except Exception:  # no memory: once more
            self.slots[0] = 0

    def exclusive(self, tables: _PythonTables, pages: list[int]) -> int:
        """Slots that only `pages` name, one row for each of these."""
        numbers, rows = np.unique(np.array(pages, dtype=np.int64), return_counts=True)
        before = self.pages[numbers]
        going = np.minimum(before, MOST) - np.minimum(before - rows, MOST)
        slots, places = np.unique(tables.slots[numbers].ravel(), return_inverse=True)
        weights = np.bincount(places, np.repeat(going, tables.width), len(slots))
        return int(np.count_nonzero((self.slots[slots] == weights) & (slots > 0)))

    def anew(self, tables: _PythonTables, pages: list[int]) -> _Counts:
        """Others, of one row for each of `pages`."""
        counts = _Counts(len(self.slots) - 1, len(tables.slots))
        counts.change(tables, pages, counts.slots_in(tables, pages), 1)
        return counts


class _PythonTables:
    """`Tables` in Python.

    Args:
        num_slots: slots are 1 to `num_slots`.
        window: tokens of the longest row.
    """

    def __init__(self, num_slots: int, window: int) -> None:
        self.width = window if window <= LONGEST_PAGE else PAGE
        # Threads that hold no lock read it: an array that is too small is replaced, never resized in place.
        self.slots: SlotArray = np.zeros((64, self.width), dtype=np.int64)  # of each page
        self._pages: list[list[int]] = [[0]]  # of each row
        self._start = [0]  # of each row, in its first page
        self._length = [0]
        self.have_several = 0  # rows that have several pages
        self._free_rows: list[int] = []
        self._free_pages = list(range(63, 0, -1))  # page 0 has no slots, for good
        self._written_at: npt.NDArray[np.int32] = np.zeros(num_slots + 1, dtype=np.int32)
        self._counts = _Counts(num_slots, 64)

    @property
    def used(self) -> int:
        return int(np.count_nonzero(self._counts.slots))

    @property
    def shared(self) -> int:
        return int(np.count_nonzero(self._counts.slots > 1))

    def enter(
        self, parents: list[int], kept: list[int], own: list[int], taken: Slots, positions: SlotArray
    ) -> tuple[list[int], list[int]]:
        slots = as_array(taken)
        lengths = list(map(add, kept, own))
        if (
            sum(own) != len(slots)
            or not all(lengths)
            or any(map(gt, kept, [self._length[parent] for parent in parents]))
        ):
            raise ValueError("there must be as many parents, tokens and slots, and no more kept than there are")
        number = len(parents)
        if len(self._free_rows) < number:
            self._grow_rows(number)
        short = max(lengths, default=0) <= self.width  # a page each, of the row's own
        if short:
            starts, tables = [0] * number, self._short_rows(parents, kept, own, slots)
            numbers = self._take_pages(number)
            pages = [[page] for page in numbers]
            tails = tables[range(number), [length - 1 for length in lengths]].tolist()
        else:
            pages, starts, new = self._long_rows(parents, kept, own, slots)
            tables = np.concatenate(new)
            numbers = self._take_pages(len(tables))
            left = iter(numbers)
            pages = [[next(left) if page < 0 else page for page in of_row] for of_row in pages]
            tails = [int(page[page > 0][-1]) for page in (one[-1] for one in new)]
        rows = self._free_rows[len(self._free_rows) - number :]
        # What is written to from here on is free, until the counts say otherwise.
        self.slots[numbers] = tables
        self._written_at.put(slots, positions)  # numpy's assignment to these crashes where its memory is short
        for row, of_row, start, length in zip(rows, pages, starts, lengths, strict=True):
            self._pages[row], self._start[row], self._length[row] = of_row, start, length
        every = numbers if short else [page for of_row in pages for page in of_row]
        made, several = (rows, tails), self.have_several
        self.have_several += sum([len(of_row) > 1 for of_row in pages])
        rows_left, pages_left = len(self._free_rows) - number, len(self._free_pages) - len(numbers)
        try:
            # First: what is cut off after this is lost until repair, and no row or page is given out twice.
            del self._free_rows[rows_left:]
            del self._free_pages[pages_left:]
            self._counts.change(self, every, self._counts.slots_in(self, every), 1)
        except Exception:
            self.have_several = several
            if len(self._free_rows) == rows_left:
                self._free_rows += rows
            if len(self._free_pages) == pages_left:
                self._free_pages += numbers
            raise
        return made

    def _short_rows(self, parents: list[int], kept: list[int], own: list[int], slots: SlotArray) -> SlotArray:
        """The only page of each new row."""
        tables = np.zeros((len(parents), self.width), dtype=np.int64)
        if len({*kept}) == len({*own}) == 1 and not self.have_several:
            old, new = kept[0], own[0]
            lengths = [self._length[parent] for parent in parents]
            if old and len({*lengths}) == 1:
                theirs = self.slots.take([self._pages[parent][0] for parent in parents], axis=0)
                tables[:, :old] = theirs[:, lengths[0] - old : lengths[0]]
            elif old:
                at = np.array(lengths)[:, None] - old + np.arange(old)
                tables[:, :old] = self.slots[[self._pages[parent] for parent in parents], at]
            tables[:, old : old + new] = slots.reshape(len(parents), new)
            return tables
        next_own = 0
        for table, parent, old, new in zip(tables, parents, kept, own, strict=True):
            table[:old] = self._tokens(parent, self._length[parent] - old, old)
            table[old : old + new] = slots[next_own : next_own + new]
            next_own += new
        return tables

    def _long_rows(
        self, parents: list[int], kept: list[int], own: list[int], slots: SlotArray
    ) -> tuple[list[list[int]], list[int], list[SlotArray]]:
        """Of each new row its pages, below 0 where they are new; where it starts; and the slots of its new pages."""
        width = self.width
        pages: list[list[int]] = []
        starts: list[int] = []
        tables: list[SlotArray] = []
        next_own = 0
        for parent, of_parent, of_row in zip(parents, kept, own, strict=True):
            length = of_parent + of_row
            begin = self._start[parent] + self._length[parent] - of_parent
            shares = of_parent > 0 and of_row > 0 and length > width
            start = begin % width if shares else 0
            table = [-1] * -(-(start + length) // width)
            first = begin // width
            # Shared: from the first page that is the row's as it stands, to the last one that the parent fills.
            whole = 0 if start == (self._start[parent] if first == 0 else 0) else 1
            last = max(whole, (start + of_parent) // width) if shares else whole
            table[whole:last] = self._pages[parent][first + whole : first + last]
            left = of_parent if whole == last else of_parent - (last * width - start)  # of the parent's, after these
            flat = np.zeros((len(table) - last + (whole if whole < last else last)) * width, dtype=np.int64)
            if whole < last and whole:
                flat[start:width] = self._tokens(parent, self._length[parent] - of_parent, width - start)
            end = len(flat) - (len(table) * width - start - length)
            flat[end - of_row - left : end - of_row] = self._tokens(parent, self._length[parent] - left, left)
            flat[end - of_row : end] = slots[next_own : next_own + of_row]
            next_own += of_row
            pages.append(table)
            starts.append(start)
            tables.append(flat.reshape(-1, width))
        return pages, starts, tables

    def _tokens(self, row: int, first: int, count: int) -> SlotArray:
        """Slots of some tokens of a row that follow each other."""
        width, begin = self.width, self._start[row] + first
        page = begin // width
        flat = self.slots[self._pages[row][page : -(-(begin + count) // width)]].ravel()
        return flat[begin - page * width : begin - page * width + count]

    def _grow_rows(self, wanted: int) -> None:
        have = len(self._length)
        more = max(have, wanted)
        self._pages += [[0]] * more
        self._start += [0] * more
        self._length += [0] * more
        self._free_rows[:0] = range(have + more - 1, have - 1, -1)

    def _take_pages(self, wanted: int) -> list[int]:
        """Free pages, which stay free until they are taken off."""
        have = len(self.slots)
        if len(self._free_pages) < wanted:
            more = max(have, wanted)
            self.slots = np.concatenate([self.slots, np.zeros((more, self.width), dtype=np.int64)])
            self._free_pages[:0] = range(have + more - 1, have - 1, -1)
        return self._free_pages[len(self._free_pages) - wanted :]

    def leave(self, rows: list[int]) -> tuple[Any, bool]:
        pages = self.pages_in(rows)
        counts = self._counts
        slots = counts.slots_in(self, pages)
        several = sum([len(self._pages[row]) > 1 for row in rows])
        numbers = list({*pages}) if several else pages
        emptied, several = zip(rows, [[0] for _ in rows], strict=True), self.have_several - several
        counts.change(self, pages, slots, -1)
        try:
            unnamed = slots[(counts.slots[slots] == 0) & (slots > 0)]
            if len(rows) > 1 and len(unnamed):
                unnamed.sort()
                unnamed = unnamed[np.concatenate([[True], unnamed[1:] != unnamed[:-1]])]
            left = unnamed, bool(np.logical_or.reduce(counts.slots[slots] > 0))
            free = [page for page in numbers if not counts.pages[page]]
            self._free_rows += rows
            try:
                self._free_pages += free
            except Exception:
                del self._free_rows[len(self._free_rows) - len(rows) :]
                raise
        except Exception:
            counts.change(self, pages, slots, 1)
            raise
        # No call of a function from here on, and nothing that needs memory.
        for row, none in emptied:
            self._length[row], self._pages[row] = 0, none
        self.have_several = several
        return left

    def pages_in(self, rows: Rows) -> list[int]:
        """The pages of rows that are taken, one after the other."""
        for row in rows:
            if row < 0 or not self._length[row]:
                raise IndexError(f"row {row} is free")
        return [page for row in rows for page in self._pages[row]]

    def columns(self, rows: list[int], end: int, columns: int) -> SlotArray:
        lengths = [self._length[row] for row in rows]
        if columns <= self.width and lengths.count(end) == len(lengths):
            # A page has zeros after its last token.
            return self.slots.take([self._pages[row][0] for row in rows], axis=0)[:, :columns]
        out = np.zeros((len(rows), columns), dtype=np.int64)
        for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            shown = min(length, end)
            if shown:
                found = self._tokens(row, length - shown, shown)
                out[i, end - shown : end] = found[: max(0, columns - end + shown)]
        return out

    def slots_of(self, row: int) -> SlotArray:
        return self._tokens(row, 0, self._length[row])

    def slots_of_all(self, rows: list[int]) -> SlotArray:
        return np.concatenate([np.empty(0, dtype=np.int64), *map(self.slots_of, rows)])

    def pages_of(self, row: int) -> list[tuple[int, list[int]]]:
        pages = self._pages[row] if self._length[row] else []
        return [(page, self.slots[page].tolist()) for page in pages]

    def named_elsewhere(self, rows: list[int]) -> bool:
        pages = {self._pages[row][-1] for row in rows}
        slot = self._tokens(rows[0], self._length[rows[0]] - 1, 1)[0]
        of_pages = self._counts.pages[list(pages)]
        return bool(of_pages.sum() > len(rows) or self._counts.slots[slot] != np.minimum(of_pages, MOST).sum())

    def positions(self, slots: Slots) -> npt.NDArray[np.int32]:
        return self._written_at[as_array(slots)]

    def exclusive(self, rows: list[int]) -> int:
        return self._counts.exclusive(self, self.pages_in(rows))

    def weights(self, slots: Slots) -> npt.NDArray[np.int32]:
        return self._counts.slots[as_array(slots)]

    def counted(self) -> tuple[Any, Any]:
        return self._counts.pages, self._counts.slots

    def keep(self, rows: list[int]) -> None:
        kept = set(rows)
        pages = self.pages_in(rows)
        used = set(pages)
        free_rows = [row for row in range(len(self._length) - 1, 0, -1) if row not in kept]
        free_pages = [page for page in range(len(self.slots) - 1, 0, -1) if page not in used]
        self.have_several = sum([len(self._pages[row]) > 1 for row in rows])
        counts = self._counts.anew(self, pages)
        for row in free_rows:
            self._length[row], self._pages[row] = 0, [0]
        # No call from here on: these belong together.
        self._counts, self._free_rows, self._free_pages = counts, free_rows, free_pages


class _PythonUses:
    """`Uses` in Python, of rows of `tables`."""

    def __init__(self, tables: _PythonTables) -> None:
        self._tables = tables
        self._counts = _Counts(len(tables._written_at) - 1, len(tables.slots))
        self.used = 0

    def add(self, rows: list[int]) -> None:
        pages, slots = self._in(rows)
        fresh = slots[(self._counts.slots[slots] == 0) & (slots > 0)]
        before = self.used
        # First: what is cut off after this leaves too much counted until repair, which lets nothing in.
        self.used = before + len(np.unique(fresh))
        try:
            self._counts.change(self._tables, pages, slots, 1)
        except Exception:
            self.used = before
            raise

    def remove(self, rows: list[int]) -> None:
        pages, slots = self._in(rows)
        if pages and not self._counts.pages[pages].all():
            raise ValueError("a row was not counted in")
        self._counts.change(self._tables, pages, slots, -1)
        try:
            gone = slots[(self._counts.slots[slots] == 0) & (slots > 0)]
            gone.sort()
            self.used -= min(len(gone), 1) + int(np.add.reduce(gone[1:] != gone[:-1]))
        except Exception:
            self._counts.change(self._tables, pages, slots, 1)
            raise

    def _in(self, rows: list[int]) -> tuple[list[int], SlotArray]:
        """The pages of rows, and the slots in them."""
        pages = self._tables.pages_in(rows)
        return pages, self._counts.slots_in(self._tables, pages)

    def exclusive(self, rows: list[int]) -> int:
        return self._counts.exclusive(self._tables, self._tables.pages_in(rows))

    def weights(self, slots: Slots) -> npt.NDArray[np.int32]:
        return self._counts.slots[as_array(slots)]

    def counted(self) -> tuple[Any, Any]:
        return self._counts.pages, self._counts.slots

    def keep(self, rows: list[int]) -> None:
        counts = self._counts.anew(self._tables, self._tables.pages_in(rows))
        used = int(np.count_nonzero(counts.slots))
        # No call from here on: the two belong together.
        self._counts, self.used = counts, used
