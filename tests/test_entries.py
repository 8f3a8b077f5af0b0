"""Loops over entries do the same in compiled code and in Python."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import pytest

from concurrent_kv.books.entries import describe, let_go, new_entries, occupy, retain
from concurrent_kv.books.index import Cells, Index, find_places, take_away
from concurrent_kv.books.records import Entry, Generation, Place
from concurrent_kv.device.streams import Ticks
from tests.support import Incomparable

pytestmark = pytest.mark.usefixtures("loops")

SCOPE: Any = object()
OTHER: Any = object()
GENERATION = Generation(0, 0)
WRITTEN: Ticks = {(7, 0): 3}


def entry(key: Hashable, length: int = 2, scope: Any = SCOPE) -> Entry:
    """An entry that the index has alone."""
    made = Entry(key, scope, GENERATION, length)
    made.row, made.refs = 10 * length, 1
    return made


def test_new_entries_have_what_each_is_given_and_nothing_else() -> None:
    steps: Any = object()
    made = new_entries(
        ["a", "b"], SCOPE, GENERATION, [1, 2], ["side", None], [0.5, 0.0], [8, 9], [steps, None], WRITTEN
    )
    expected = [
        Entry("a", SCOPE, GENERATION, 1, "side", 0.5, 8, steps, WRITTEN),
        Entry("b", SCOPE, GENERATION, 2, None, 0.0, 9, None, WRITTEN),
    ]
    for one, other in zip(made, expected, strict=True):
        assert type(one) is Entry
        for slot in Entry.__slots__:
            assert getattr(one, slot) is getattr(other, slot) or getattr(one, slot) == getattr(other, slot)
        assert one.ticks is one.written is WRITTEN


@pytest.mark.parametrize("shorter", range(6))
def test_columns_of_different_lengths_make_no_entry(shorter: int) -> None:
    columns: list[list[Any]] = [["a", "b"], [1, 2], [None, None], [0.0, 0.0], [0, 0], [None, None]]
    columns[shorter].pop()
    keys, lengths, sides, priorities, fingerprints, corrections = columns
    with pytest.raises(ValueError, match=r"must be|shorter|longer"):
        new_entries(keys, SCOPE, GENERATION, lengths, sides, priorities, fingerprints, corrections, WRITTEN)


def test_entries_are_described_row_by_row() -> None:
    steps: Any = object()
    first, root = entry("first", 2), entry("root", 3, OTHER)
    root.correction = steps
    described = describe([first, None, root, first], SCOPE)
    assert described.rows == [20, 0, 30, 20]
    assert described.lengths == [2, 0, 3, 2]
    assert described.corrections == [None, None, steps, None]
    assert described.others == [root]


def test_references_are_taken_and_dropped_one_for_each_time_an_entry_comes() -> None:
    first, second, held = entry("first"), entry("second"), list[Entry]()
    for _ in range(400):  # more than the numbers that the interpreter keeps
        retain([first, second, first], held)
    assert (first.refs, second.refs, len(held)) == (801, 401, 1200)
    for _ in range(400):
        assert let_go([first, second, first]) == []
    assert let_go([second]) == [second]
    assert (first.refs, second.refs) == (1, 0)


def test_entries_take_their_places_and_keep_the_key_that_the_index_has() -> None:
    index: Index[Entry] = Index()
    old, replacing, new = entry("key"), entry("key"), entry("new")
    old.index_key = ("the", "first", "key")
    index["key"] = old
    places, held, replaced, added = find_places([index.cells] * 2, ["key", "new"])
    assert (held, replaced, added) == ([old, None], [old], [index.cells])
    assert index.find(["key", "new", "missing"]) == [old, None, None]
    occupy(places, [replacing, new], held, Place.EXEMPT)
    assert index.find(["key", "new"]) == [replacing, new]
    assert replacing.index_key is old.index_key
    assert (replacing.place, new.place, old.place) == (Place.EXEMPT, Place.EXEMPT, Place.NONE)
    assert new.index_key == "new"


def test_new_places_are_taken_away_again_the_newest_first() -> None:
    first: Cells[Entry] = {"known": [entry("known")]}
    second: Cells[Entry] = {}
    before = dict(first)
    *_, added = find_places([first, second, first, first], ["one", "two", "known", "three"])
    assert (list(first), list(second)) == (["known", "one", "three"], ["two"])
    assert [cells is first for cells in added] == [True, False, True]
    take_away(added)
    assert (first, second) == (before, {})


def test_a_key_that_raises_leaves_no_new_places() -> None:
    first: Cells[Entry] = {"known": [entry("known")]}
    second: Cells[Entry] = {}
    before = dict(first)
    with pytest.raises(KeyError, match="incomparable"):
        find_places([first, second, first, first], ["one", "two", "three", Incomparable("known")])
    assert (first, second) == (before, {})
    index: Index[Entry] = Index()
    index["known"] = entry("known")
    with pytest.raises(KeyError, match="incomparable"):
        index.find([Incomparable("known")])
