"""Loops over entries do the same in compiled code and in Python."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import pytest

from concurrent_kv.books.entries import describe, displace, let_go, new_entries, occupy, retain
from concurrent_kv.books.index import Index, find_in, find_places, take_away
from concurrent_kv.books.records import Entry, Generation, Place, Scope, locate_each
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


def found_in(index: Index[Entry], keys: list[Hashable]) -> list[Entry | None]:
    """The entry of each key in one index."""
    return find_in([index] * len(keys), keys, list(map(hash, keys)))


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
    keys, lengths, sides, priorities, hashes, corrections = columns
    with pytest.raises(ValueError, match=r"must be|shorter|longer"):
        new_entries(keys, SCOPE, GENERATION, lengths, sides, priorities, hashes, corrections, WRITTEN)


def test_entries_are_described_row_by_row() -> None:
    steps: Any = object()
    first, root = entry("first", 2), entry("root", 3, OTHER)
    root.correction = steps
    rows, lengths, corrections, others = describe([first, None, root, first], SCOPE)
    assert rows == [20, 0, 30, 20]
    assert lengths == [2, 0, 3, 2]
    assert corrections == [None, None, steps, None]
    assert others == [root]


def test_references_are_taken_and_dropped_one_for_each_time_an_entry_comes() -> None:
    first, second, held = entry("first"), entry("second"), list[Entry]()
    for _ in range(400):  # more than the numbers that the interpreter keeps
        retain([first, second, first], held)
    assert (first.refs, second.refs, len(held)) == (801, 401, 1200)
    for _ in range(400):
        assert let_go([first, second, first]) == ([], [], [])
    assert let_go([second]) == ([second], [20], [])
    assert (first.refs, second.refs) == (1, 0)


def test_the_dead_say_which_rows_they_had_and_who_used_them() -> None:
    first, second, third, alive = [entry(key) for key in ("first", "second", "third", "alive")]
    first.ticks = alive.ticks = WRITTEN
    third.ticks = {(8, 0): 1}
    alive.refs = 2
    dead, rows, ticks = let_go([first, second, alive, third])
    assert (dead, rows, ticks) == ([first, second, third], [20, 20, 20], [WRITTEN, {(8, 0): 1}])
    assert alive.refs == 1


def test_entries_that_left_the_index_have_no_place() -> None:
    first, second = entry("first"), entry("second")
    first.place = second.place = Place.EXEMPT
    displace([first, second])
    assert (first.place, second.place) == (Place.NONE, Place.NONE)


def test_entries_take_their_places_and_keep_the_key_that_the_index_has() -> None:
    index: Index[Entry] = Index()
    old, replacing, new = entry("key"), entry("key"), entry("new")
    old.index_key = "".join(["k", "ey"])  # an equal key, and another object
    index.put(old)
    places, held, replaced, added = find_places([index] * 2, ["key", "new"], [hash("key"), hash("new")])
    assert (held, replaced, added) == ([old, None], [old], [index.cells])
    assert found_in(index, ["key", "new", "missing"]) == [old, None, None]
    occupy(places, [replacing, new], held, Place.EXEMPT)
    assert found_in(index, ["key", "new"]) == [replacing, new]
    assert replacing.index_key is old.index_key
    assert (replacing.place, new.place, old.place) == (Place.EXEMPT, Place.EXEMPT, Place.NONE)
    assert new.index_key == "new"


def test_new_places_are_taken_away_again_the_newest_first() -> None:
    first, second = index_of("known"), index_of()
    before = dict(first.cells)
    keys: list[Hashable] = ["one", "two", "known", "three"]
    *_, added = find_places([first, second, first, first], keys, list(map(hash, keys)))
    assert list(first.cells) == list(map(hash, ["known", "one", "three"]))
    assert list(second.cells) == [hash("two")]
    assert [cells is first.cells for cells in added] == [True, False, True]
    take_away(added)
    assert (first.cells, second.cells) == (before, {})


def test_a_key_that_raises_leaves_no_new_places() -> None:
    first, second = index_of("known"), index_of()
    before = dict(first.cells)
    keys = ["one", "two", "three", Incomparable("known")]
    with pytest.raises(KeyError, match="incomparable"):
        find_places([first, second, first, first], keys, list(map(hash, keys)))
    assert (first.cells, second.cells) == (before, {})
    with pytest.raises(KeyError, match="incomparable"):
        found_in(first, [Incomparable("known")])


class Colliding:
    """A key whose hash is that of all others of its kind."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __hash__(self) -> int:
        return 7

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Colliding) and other.name == self.name


def test_keys_of_one_hash_have_places_of_their_own_in_the_order_of_their_writes() -> None:
    index = index_of()
    keys = [Colliding(name) for name in "abc"]
    other = entry("other")
    for key in keys[:2]:
        write(index, [entry(key)])
        write(index, [other])
    write(index, [entry(keys[2]), entry(Colliding("a"))])  # a new one, and one that is replaced, in one write
    assert [key for key, _ in index.items()] == [keys[0], "other", keys[1], keys[2]]
    assert [found.key if found else None for found in found_in(index, [*keys, Colliding("d")])] == [*keys, None]
    assert not index.misplaced()
    base = index[keys[0]]
    assert index.remove(base)
    assert not index.remove(base)
    assert not index.holds(base)
    assert [key in index for key in keys] == [False, True, True]
    write(index, [entry(keys[0])])
    assert [key in index for key in keys] == [True, True, True]
    for key in keys:
        assert index.remove(index[key])
    assert (len(index), index.extra) == (1, {})


def test_a_key_is_replaced_where_it_is_once_the_first_of_its_hash_has_gone() -> None:
    index = index_of()
    first, second = Colliding("a"), Colliding("b")
    write(index, [entry(first), entry(second)])
    assert index.remove(index[first])
    replacing = entry(Colliding("b"))
    write(index, [replacing])
    assert (len(index), index[second]) == (1, replacing)


def test_places_of_one_hash_that_were_taken_away_again_are_used_again() -> None:
    index = index_of()
    keys = [Colliding(name) for name in "abc"]
    write(index, [entry(keys[0])])
    for _ in range(3):
        *_, added = find_places([index, index], list[Hashable](keys[1:]), [7, 7])
        take_away(added)
        assert (len(index), [key in index for key in keys]) == (1, [True, False, False])
    write(index, [entry(keys[1])])
    assert len(index.extra[7]) == 1


def test_an_entry_leaves_the_index_whatever_its_key_has_become() -> None:
    class Changing:
        number = 1

        def __hash__(self) -> int:
            if not self.number:
                raise KeyError("no hash any more")
            return self.number

    key = Changing()
    index = index_of()
    stored = entry(key)
    write(index, [stored])
    for number in (2, 0):
        key.number = number
        assert index.holds(stored)
        assert index.remove(stored)
        index.put(stored)


def test_the_shards_of_keys_are_ascending_however_a_set_has_them() -> None:
    scope = Scope(OTHER, "scope", tuple(range(3, 43)))
    hashes = [39, 8, 1, 8, -1, 16]  # a set of small numbers begins with those that are multiples of its table's size
    for located in (scope.locate(hashes), locate_each([scope] * len(hashes), hashes)):
        assert located.shards == (4, 11, 19, 42)
        assert located.scopes == [scope] * len(hashes)
        assert [scope.entries.index(part) for part in located.parts] == [39, 8, 1, 8, 39, 16]


def index_of(*keys: Hashable) -> Index[Entry]:
    """An index with an entry for each key."""
    index: Index[Entry] = Index()
    for key in keys:
        index.put(entry(key))
    return index


def write(index: Index[Entry], entries: list[Entry]) -> None:
    """Put entries of different keys into an index, in the stead of those of equal keys."""
    hashes = [entry.key_hash for entry in entries]
    places, held, _, _ = find_places([index] * len(entries), [entry.key for entry in entries], hashes)
    occupy(places, entries, held, Place.EXEMPT)
