"""Rows of slots in shared pages name what was asked for, whatever is shared, dropped and freed; and counts follow."""

from __future__ import annotations

import gc
import tracemalloc
from collections import Counter
from functools import partial
from itertools import chain
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from concurrent_kv.books import tables as tables_module
from concurrent_kv.books.tables import in_columns, new_tables, new_uses, weights_of
from concurrent_kv.device.slot_numbers import Slots
from tests.interrupting import cut_at
from tests.support import LOOPS, loops_of, tables_of

NUM_SLOTS = 1200


def array(numbers: object) -> list[int]:
    """Slots, as a list."""
    listed: list[int] = np.frombuffer(numbers, dtype=np.int64).tolist()  # type: ignore[call-overload]
    return listed


class Model:
    """Tables, the counts of some of their rows, and lists of slots that say what both must hold."""

    def __init__(self, window: int, random: Random) -> None:
        self.window, self.random = window, random
        self.tables = new_tables(NUM_SLOTS, window)
        self.uses = new_uses(self.tables)
        self.rows: dict[int, list[int]] = {}
        self.counted: set[int] = set()
        self.free = list(range(1, NUM_SLOTS + 1))

    def enter(self) -> None:
        """New rows: children of rows that are there, of a part of them, copies, and rows of their own."""
        random, parents, kept, own = self.random, [], [], []
        for _ in range(random.randint(1, 4)):
            parent = random.choice([0, *self.rows])
            theirs = len(self.rows.get(parent, ()))
            share = random.choice([theirs, max(0, theirs - random.randint(0, 40)), random.randint(0, theirs)])
            new = min(random.choice([0, 1, 2, random.randint(0, self.window)]), self.window - share)
            parents.append(parent)
            kept.append(share - (share + new == 0))
            own.append(new + (share + new == 0))
            kept[-1] = max(kept[-1], 0)
        if sum(own) > len(self.free):
            return
        if random.random() < 0.5:
            self.free.sort()
        numbers = [self.free.pop(0) for _ in range(sum(own))]
        taken: Slots = np.array(numbers, dtype=np.int64)
        if numbers and numbers == list(range(numbers[0], numbers[0] + len(numbers))):
            taken = range(numbers[0], numbers[-1] + 1)
        positions = np.array([random.randint(0, 99) for _ in numbers], dtype=np.int64)
        rows, tails = self.tables.enter(parents, kept, own, taken, positions)
        assert np.frombuffer(self.tables.positions(taken), dtype=np.int32).tolist() == positions.tolist()
        expected, first = [], 0
        for parent, share, new in zip(parents, kept, own, strict=True):
            theirs_ = self.rows.get(parent, [])
            expected.append([*theirs_[len(theirs_) - share :], *numbers[first : first + new]])
            first += new
        assert not self.rows.keys() & set(rows)
        assert tails == [slots[-1] for slots in expected]
        self.rows.update(zip(rows, expected, strict=True))
        if random.random() < 0.6:
            self.uses.add(rows)
            self.counted.update(rows)

    def leave(self) -> None:
        """Some rows go, out of the counts first."""
        going = self.random.sample(sorted(self.rows), min(len(self.rows), self.random.randint(1, 4)))
        counted = [row for row in going if row in self.counted]
        alone = self.exclusive(going, self.rows)
        assert self.tables.exclusive(going) == len(alone)
        if counted:
            in_it = {row: self.rows[row] for row in self.counted}
            assert self.uses.exclusive(counted) == len(self.exclusive(counted, in_it))
            self.uses.remove(counted)
            self.counted.difference_update(counted)
        gone = {slot for row in going for slot in self.rows.pop(row)}
        unnamed, others_left = self.tables.leave(going)
        assert sorted(array(unnamed)) == sorted(alone)
        assert others_left == (gone != alone)
        self.free += sorted(alone)

    def exclusive(self, going: list[int], of: dict[int, list[int]]) -> set[int]:
        """Slots that only these rows name, of some."""
        others = {slot for row, slots in of.items() if row not in going for slot in slots}
        return {slot for row in going for slot in of[row]} - others

    def check(self) -> None:
        """Every row, count and column is what the lists say."""
        names = Counter(slot for slots in self.rows.values() for slot in slots)
        assert self.tables.used == len(names)
        assert self.tables.shared == sum(number > 1 for number in names.values())
        counted = {slot for row in self.counted for slot in self.rows[row]}
        assert self.uses.used == len(counted)
        everything = range(1, NUM_SLOTS + 1)
        weights = weights_of(self.tables, everything)
        assert [min(int(weight), 2) for weight in weights] == [min(names[slot], 2) for slot in everything]
        assert set((np.flatnonzero(weights_of(self.uses, everything)) + 1).tolist()) == counted
        assert array(self.tables.slots_of_all(list(self.rows))) == list(chain.from_iterable(self.rows.values()))
        for row, slots in self.rows.items():
            assert array(self.tables.slots_of(row)) == slots
            pages = [slot for _, page in self.tables.pages_of(row) for slot in page if slot]
            assert pages == slots  # a page has nothing that is not the row's
            assert self.tables.named_elsewhere([row]) == (names[slots[-1]] > 1)
        rows = [0, *self.random.sample(sorted(self.rows), min(len(self.rows), 3))]
        end, columns = self.random.randint(0, self.window), self.random.randint(1, self.window)
        expected = []
        for row in rows:
            padded = [*[0] * self.window, *self.rows.get(row, [])]
            shown = padded[len(padded) - end :]
            expected.append([*shown, *[0] * columns][:columns])
        assert in_columns(self.tables, rows, end, columns).tolist() == expected


@pytest.mark.parametrize("loops", LOOPS)
@given(window=st.sampled_from([1, 2, 8, 64, 65, 70, 100, 200]), seed=st.integers(0, 2**32))
def test_rows_name_what_was_asked_for_whatever_is_shared_and_freed(loops: str, window: int, seed: int) -> None:
    random = Random(seed)
    with loops_of(loops):
        model = Model(window, random)
        for _ in range(30):
            if model.rows and random.random() < 0.4:
                model.leave()
            else:
                model.enter()
            model.check()
        model.tables.keep(list(model.rows))
        model.uses.keep(sorted(model.counted))
        model.check()
        left, _ = model.tables.leave(list(model.rows))
        assert sorted([*array(left), *model.free]) == list(range(1, NUM_SLOTS + 1))


@pytest.mark.parametrize("loops", LOOPS)
def test_a_long_chain_costs_by_its_new_tokens(loops: str) -> None:
    depth, step, window = 2048, 8, 8192
    with loops_of(loops):
        tables = new_tables(depth + 1024 * step, window)
        (row,), _ = tables.enter([0], [0], [depth], range(1, depth + 1), np.arange(depth))
        gc.collect()
        tracemalloc.start()
        try:
            for node in range(512):
                first = depth + 1 + node * step
                at = np.arange(step)
                (row,), _ = tables.enter([row], [depth + node * step], [step], range(first, first + step), at)
            grown, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert grown < 512 * (depth + 512 * step) * 8 / 4  # of tables as wide as their rows
        assert len(array(tables.slots_of(row))) == depth + 512 * step


@pytest.mark.parametrize("loops", LOOPS)
def test_what_cannot_be_entered_changes_nothing(loops: str) -> None:
    with loops_of(loops):
        tables = tables_of([[1, 2, 3]], 8, 4)
        for parents, kept, own, taken in (
            ([1], [4], [0], range(0)),  # more than the parent has
            ([1], [0], [0], range(0)),  # nothing at all
            ([1], [3], [2], range(4, 5)),  # fewer slots than tokens
            ([1], [3], [1], range(4, 6)),  # more
        ):
            with pytest.raises(ValueError, match=r"."):
                tables.enter(parents, kept, own, taken, np.arange(len(taken)))
        with pytest.raises(IndexError):
            tables.leave([1, 2])
        assert (tables.used, tables.shared) == (3, 0)
        assert array(tables.slots_of(1)) == [1, 2, 3]
        assert tables.enter([1], [3], [1], range(4, 5), np.arange(1)) == ([2], [4])


@pytest.mark.parametrize("loops", LOOPS)
def test_a_row_that_was_not_counted_in_is_not_counted_out(loops: str) -> None:
    with loops_of(loops):
        tables = tables_of([[1, 2], [3]], 8, 4)
        uses = new_uses(tables)
        uses.add([1])
        for rows in ([2], [1, 2]):
            with pytest.raises(ValueError, match="was not counted in"):
                uses.remove(rows)
            assert uses.used == 2
        uses.remove([1])
        assert uses.used == 0


@pytest.mark.parametrize("step", ["enter", "add", "remove", "leave", "keep", "keep counts"])
@pytest.mark.parametrize("window", [8, 200])
@pytest.mark.parametrize("reused", [True, False])
def test_what_is_cut_off_counts_too_much_at_most_and_nothing_is_given_out_twice(
    window: int, step: str, reused: bool
) -> None:
    """Of the tables in Python, between whose steps an asynchronous exception may come."""
    cut, number = True, 0
    while cut:
        number += 1
        with loops_of("torch"):
            tables = Trial(window)
            for _ in range(3 if step in ("enter", "add") else 1):
                cut = cut_at(number, partial(tables.do, step), {tables_module.__file__}, jumps=True)
                tables.lose(reused)
            tables.go_on()
    assert number > 5


class Trial:
    """A parent and two children, of which one goes, and what others do after a step that may have been cut off."""

    def __init__(self, window: int) -> None:
        self.length, self.new = window - 4, 2
        self.tables = new_tables(NUM_SLOTS, window)
        self.uses = new_uses(self.tables)
        self.free = list(range(NUM_SLOTS, 0, -1))
        self.rows: dict[int, list[int]] = {0: []}
        self.parent = self.enter(0, 0, self.length)
        self.sibling, self.going = self.child(), self.child()
        self.staying = [self.parent, self.sibling, self.going]
        self.uses.add(self.staying)

    def enter(self, parent: int, kept: int, own: int) -> int:
        taken = [self.free.pop() for _ in range(own)]
        positions = np.arange(own)
        (row,), _ = self.tables.enter([parent], [kept], [own], np.array(taken, dtype=np.int64), positions)
        assert row not in self.rows
        self.rows[row] = self.rows[parent][len(self.rows[parent]) - kept :] + taken
        return row

    def child(self) -> int:
        return self.enter(self.parent, self.length, self.new)

    def do(self, step: str) -> None:
        staying = [self.parent, self.sibling]
        if step == "enter":
            self.child()
            return
        if step == "add":
            self.uses.add([self.child()])
            return
        self.staying = staying
        if step == "remove":
            self.uses.remove([self.going])
        elif step == "leave":
            self.tables.leave([self.going])
        elif step == "keep":
            self.tables.keep(staying)
        else:
            self.uses.keep(staying)

    def lose(self, reused: bool) -> None:
        """What a step made that was cut off: nobody names its rows, and its slots are given back."""
        self.rows = {row: self.rows[row] for row in (0, *self.staying)}
        if reused:
            named = self.named()
            self.free = [slot for slot in range(NUM_SLOTS, 0, -1) if slot not in named]

    def go_on(self) -> None:
        made = [self.child(), self.child(), self.enter(0, 0, self.new)]
        self.uses.add(made)
        self.check()
        for row in made:
            self.uses.remove([row])
            unnamed, _ = self.tables.leave([row])
            slots = self.rows.pop(row)
            assert {*array(unnamed)} <= {*slots} - self.named()
            self.check()
        left = self.staying
        self.tables.keep(left)
        self.uses.keep(left)
        assert (self.tables.used, self.uses.used) == (len(self.named()), len(self.named()))
        self.uses.remove(left)
        self.tables.leave(left)
        assert (self.tables.used, self.uses.used) == (0, 0)

    def named(self) -> set[int]:
        return {slot for slots in self.rows.values() for slot in slots}

    def check(self) -> None:
        named = sorted(self.named())
        assert {row: array(self.tables.slots_of(row)) for row in self.rows} == self.rows
        assert self.uses.used >= len(named)
        for counts in (self.tables, self.uses):
            assert weights_of(counts, np.array(named, dtype=np.int64)).all()
