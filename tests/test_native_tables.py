"""The compiled tables refuse what is wrong and change nothing then, and no call keeps memory."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from concurrent_kv.native import native
from tests.native_support import needs_native

pytestmark = needs_native

SLOTS, CALLS = 4000, 5000
NEW, POSITIONS = np.array([200, 205, 207]), np.arange(3)
REFUSED = (ValueError, IndexError, TypeError, OverflowError, SystemError)


class Books:
    """Tables of a long window with one row of 150 tokens, which is counted in."""

    def __init__(self) -> None:
        self.tables = native.Tables(SLOTS, 200)
        self.uses = native.Uses(self.tables)
        (self.row,), _ = self.tables.enter([0], [0], [150], range(1, 151), np.arange(150))
        self.uses.add([self.row])

    def every_call(self) -> None:
        """Every method, once, and all as it was."""
        tables, uses = self.tables, self.uses
        rows, _ = tables.enter([self.row, self.row], [150, 40], [3, 0], NEW, POSITIONS)
        uses.add(rows)
        for counts in (tables, uses):
            counts.exclusive(rows)
            counts.weights(NEW)
            counts.weights(range(1, 5))
            counts.counted()
        tables.columns(rows, 10, 20)
        tables.slots_of(rows[0])
        tables.pages_of(rows[0])
        tables.named_elsewhere(rows[:1])
        tables.positions(NEW)
        uses.remove(rows)
        tables.leave(rows)
        tables.keep([self.row])
        uses.keep([self.row])

    def numbers(self) -> tuple[Any, ...]:
        return (
            (self.tables.used, self.tables.shared, self.uses.used),
            [bytes(each) for counts in (self.tables, self.uses) for each in counts.counted()],
            bytes(self.tables.slots_of(self.row)),
        )


WRONG: dict[str, Callable[[Books], object]] = {
    "more kept than there is": lambda b: b.tables.enter([b.row], [151], [0], range(0), np.arange(0)),
    "fewer positions": lambda b: b.tables.enter([b.row], [1], [3], NEW, np.arange(2)),
    "a slot that is none": lambda b: b.tables.enter([b.row], [1], [3], np.array([1, 2, SLOTS + 1]), POSITIONS),
    "slot 0": lambda b: b.tables.enter([b.row], [1], [3], np.array([0, 1, 2]), POSITIONS),
    "a position below 0": lambda b: b.tables.enter([b.row], [1], [3], NEW, np.array([1, -2, 3])),
    "a text of numbers": lambda b: b.tables.enter([b.row], "x", [3], NEW, POSITIONS),
    "a text among parents": lambda b: b.tables.enter([b.row, "a"], [1, 1], [3, 0], NEW, POSITIONS),
    "no such parent": lambda b: b.tables.enter([10**6], [1], [3], NEW, POSITIONS),
    "int32 slots": lambda b: b.tables.enter([b.row], [1], [3], NEW.astype(np.int32), POSITIONS),
    "too few arguments": lambda b: b.tables.enter([b.row], [1], [3], NEW),
    "leave a free row": lambda b: b.tables.leave([77]),
    "leave a text": lambda b: b.tables.leave("x"),
    "keep a free row": lambda b: b.tables.keep([77]),
    "count a free row": lambda b: b.uses.add([77]),
    "count a text": lambda b: b.uses.add(["a"]),
    "columns below 0": lambda b: b.tables.columns([b.row], -1, 2),
    "columns of no row": lambda b: b.tables.columns([10**6], 1, 2),
    "slots of no row": lambda b: b.tables.slots_of(10**6),
    "slots of a text": lambda b: b.tables.slots_of("x"),
    "weights of no slot": lambda b: b.tables.weights(np.array([SLOTS + 1])),
    "last slot of a free row": lambda b: b.tables.named_elsewhere([77]),
    "positions of a text": lambda b: b.tables.positions("x"),
    "uses of no tables": lambda b: native.Uses(3),
    "slots below 0": lambda b: native.Tables(-1, 3),
}


def grown(work: Callable[[], object]) -> int:
    """Bytes that many calls leave behind."""
    for _ in range(100):
        work()
    gc.collect()
    tracemalloc.start()
    try:
        work()
        gc.collect()  # which keeps some memory of its own, without the GIL
        before, _ = tracemalloc.get_traced_memory()
        for _ in range(CALLS):
            work()
        gc.collect()
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return after - before


@pytest.mark.parametrize("name", WRONG)
def test_wrong_calls_raise_and_neither_change_nor_keep_anything(name: str) -> None:
    books = Books()
    before = books.numbers()

    def call() -> None:
        with pytest.raises(REFUSED):
            WRONG[name](books)

    call()
    assert books.numbers() == before

    def again() -> None:
        try:
            WRONG[name](books)
        except REFUSED:
            return

    assert grown(again) < CALLS


def test_right_calls_keep_nothing() -> None:
    books = Books()
    before = books.numbers()
    assert grown(books.every_call) < CALLS
    assert books.numbers() == before


def test_what_was_not_counted_in_is_not_counted_out() -> None:
    books = Books()
    (other,), _ = books.tables.enter([0], [0], [3], NEW, POSITIONS)
    with pytest.raises(ValueError, match="was not counted in"):
        books.uses.remove([other])
    assert books.uses.used == 150
