"""The compiled functions refuse wrong arguments and write nothing then, and keep nothing of what they are passed."""

from __future__ import annotations

import ast
import gc
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from concurrent_kv.books.index import Cells, Index
from concurrent_kv.books.records import Entry, Generation, Place
from concurrent_kv.device.streams import Ticks
from concurrent_kv.native import native
from tests.native_support import needs_native
from tests.support import Incomparable, tables_of

pytestmark = needs_native

SCOPE: Any = ["a scope"]
GENERATION = Generation(0, 0)
TICKS: Ticks = {(7, 0): 3}
PLANES, SLOTS, HEADS, BYTES = 2, 4, 2, 8
SHAPE = (PLANES, SLOTS, HEADS, BYTES)
CALLS = 20_000
WARM_UP = 500
SLACK_BYTES = 8 * CALLS  # the interpreter's own caches; one object kept by each call would be twice as much

Error = type[Exception] | tuple[type[Exception], ...]
Case = tuple[dict[int, object], Error]
WRONG_CONTAINER = (TypeError, SystemError)  # the interpreter's word for a list or tuple that is none
WRONG = (*WRONG_CONTAINER, ValueError, IndexError, BufferError, OverflowError, AttributeError, KeyError)


class Arguments:
    """Arguments of a call of each function that succeeds, and the arrays that it writes to."""

    def __init__(self) -> None:
        self.data = torch.arange(PLANES * SLOTS * HEADS * 2, dtype=torch.float32).view(PLANES, SLOTS, HEADS, 2)
        self.batch = torch.full((PLANES, 2, HEADS, 3, 2), -1.0)
        self.difference = torch.ones(PLANES, 1, HEADS, 2)
        self.tables = tables_of([[1, 2], [1, 3]], SLOTS - 1, 3, [[0, 2], [2, 1]])
        self.states = np.arange(12, dtype=np.uint8)
        self.owed = torch.ones(PLANES, 3 + 1, HEADS, 2)
        self.first, self.second, self.third = [made(key) for key in ("first", "second", "third")]
        self.index_keys = self.first.index_key, self.second.index_key
        self.steps, self.held = object(), list[Entry]()
        self.full: list[Entry] = [self.third]
        self.empty: list[Entry] = []
        self.cells: Cells[Entry] = {hash("third"): self.full, hash("empty"): self.empty}
        self.index: Index[Entry] = index_of(self.cells)
        slots, batch, difference = self.data.data_ptr(), self.batch.data_ptr(), self.difference.data_ptr()
        index, columns = np.array([0, 1]), np.array([2, 0])
        self.new = torch.arange(16, dtype=torch.float32).view(2, 2, HEADS, 1, 2)
        self.of: dict[str, list[Any]] = {
            "gather": [slots, SHAPE, batch, 2, 3, 3, 3, self.tables, [1, 2]],
            "gather_stepwise": [
                *(slots, SHAPE, batch, 2, 3, 3, 3, self.tables, [1, 2]),
                [self.steps, None],
                self.steps,
                *(self.owed.data_ptr(), 3, 1),
            ],
            "scatter": [slots, SHAPE, batch, 2, 3, difference, 16, 1, 1, index, columns, np.array([3, 1])],
            "bind": [Entry, Place.NONE],
            "new_entries": [
                *(["a", "b"], SCOPE, GENERATION, [2, 3], ["one", "two"], [0.5, 1.5], [5, 6], [None, self.steps], TICKS),
            ],
            "describe": [[self.first, None, self.second], SCOPE],
            "retain": [[self.first, self.second, self.first], self.held],
            "let_go": [[self.first, self.second, self.first]],
            "name_rows": [[self.first, self.second], [1, 2], [2, 3]],
            "displace": [[self.first, self.second]],
            "items_of": [self.cells],
            "find": [[self.index] * 3, ["third", "empty", "none"], [hash("third"), hash("empty"), hash("none")]],
            "places": [[self.cells, self.cells], ["third", "new"], [hash("third"), hash("new")]],
            "occupy": [[self.full, self.empty], [self.first, self.second], [self.third, None], Place.HELD],
            "append": [
                (self.batch, torch.float32, batch, PLANES // 2, 2, HEADS, 3, 2, 4),
                *(0, 2, self.new[0], self.new[1]),
            ],
            "in_runs": [np.array([7, 3, 8, 2, 70]), 3],
            "hash_rows": [self.states, 3],
            "hash_memory": [self.states.ctypes.data, 3, 4],
            "advise_huge_pages": [slots, 8],
            "are_plain": [["a", 1, ("b", None)]],
            "keep_for_ever": [None],
            "lookup": [self.cells, hash("third")],
        }

    def call(self, name: str, changes: dict[int, object] | None = None) -> Any:
        arguments = [(changes or {}).get(place, argument) for place, argument in enumerate(self.of[name])]
        return getattr(native, name)(*arguments)

    def written(self) -> tuple[object, ...]:
        arrays = (self.data, self.batch)
        entries = [
            [getattr(entry, slot) for slot in Entry.__slots__] for entry in (self.first, self.second, self.third)
        ]
        cells = {key: list(cell) for key, cell in self.cells.items()}
        return *[array.tolist() for array in arrays], entries, list(self.held), cells

    def renew(self) -> None:
        """Undo what is not the same a second time."""
        self.first.refs, self.second.refs = 2, 1
        self.first.index_key, self.second.index_key = self.index_keys
        self.held.clear()
        self.cells.pop(hash("new"), None)
        self.full[:], self.empty[:] = [self.third], []


def made(key: str) -> Entry:
    """An entry of 2 tokens."""
    entry = Entry(key, SCOPE, GENERATION, 2, side=f"side of {key}", written=TICKS)
    entry.row, entry.refs = 5, 2
    entry.index_key = "".join(key)  # an equal key, and another object
    return entry


def index_of(cells: Any) -> Index[Entry]:
    """An index of these cells, the same dict."""
    index: Index[Entry] = Index()
    index.cells = cells
    return index


def refused(places: list[int], wrong: object, error: Error) -> list[Case]:
    """The same wrong argument in each of these places."""
    return [({place: wrong}, error) for place in places]


def unfilled() -> Entry:
    """An entry without anything in its slots."""
    return object.__new__(Entry)


def strided(array: Any) -> Any:
    """The same array, but not contiguous."""
    return np.repeat(array, 2, axis=-1)[..., ::2]


INDEX, PAIR = np.array([0, 1]), np.array([[0, 1]])
LARGER = tables_of([[1, 2], [1, SLOTS]], SLOTS, 3)

CASES: dict[str, list[Case]] = {
    "gather": [
        ({3: 1}, IndexError),
        ({3: "2"}, TypeError),
        ({8: [1, 2**20]}, IndexError),
        ({8: [1, -1]}, IndexError),
        ({8: [1, 2**70]}, OverflowError),
        ({8: (1, 2)}, WRONG_CONTAINER),
        ({8: [1, "2"]}, TypeError),
        ({7: LARGER}, IndexError),
        ({7: PAIR}, TypeError),
        ({7: None}, TypeError),
        ({6: 4}, IndexError),
        ({6: -1}, IndexError),
        ({5: 4}, IndexError),
        ({5: -1}, IndexError),
        ({5: 1.0}, TypeError),
        ({4: -1}, IndexError),
        ({1: SHAPE[:3]}, TypeError),
        ({1: list(SHAPE)}, WRONG_CONTAINER),
        ({1: (2, 4, 2, None)}, TypeError),
        ({0: None}, TypeError),
        ({2: "batch"}, TypeError),
    ],
    "gather_stepwise": [
        ({8: [1, 2**20]}, IndexError),
        ({7: LARGER}, IndexError),
        ({9: [None]}, ValueError),
        ({9: (None, None)}, ValueError),
        ({11: "difference"}, TypeError),
        ({12: 2}, IndexError),
        ({12: 1.0}, TypeError),
        ({13: 0}, ValueError),
        ({1: (2, 4, 2, 6)}, ValueError),
    ],
    "scatter": [
        ({11: np.array([3, SLOTS])}, IndexError),
        ({11: np.array([-1, 3])}, IndexError),
        ({11: range(3, 5)}, IndexError),
        ({11: range(-1, 1)}, IndexError),
        ({11: range(1, 4)}, ValueError),
        ({11: range(2**70)}, OverflowError),
        ({11: strided(np.array([3, 1]))}, ValueError),
        ({11: [3, 1]}, TypeError),
        ({11: np.array([3, 1], dtype=np.int32)}, ValueError),
        ({9: np.array([0, 2])}, IndexError),
        ({9: np.array([0])}, ValueError),
        ({9: PAIR}, ValueError),
        ({9: strided(INDEX)}, ValueError),
        ({10: np.array([0, 3])}, IndexError),
        ({10: np.array([0, -1])}, IndexError),
        ({10: np.array([0.0, 1.0])}, ValueError),
        ({7: 0}, ValueError),
        ({5: 1.5}, TypeError),
        ({3: "2"}, TypeError),
    ],
    "bind": [
        ({0: made("one")}, TypeError),
        ({0: object}, AttributeError),
        ({0: type("Sub", (Entry,), {})}, TypeError),
        ({0: type("Plain", (), dict.fromkeys(Entry.__slots__, 0))}, TypeError),
    ],
    "new_entries": [
        *refused([0, 3, 4, 5, 6, 7], ["one"], ValueError),
        *refused([0, 3, 4, 5, 6, 7], ("one", "two"), TypeError),
        ({3: None}, TypeError),
    ],
    "describe": [
        ({0: [made("one"), "two"]}, TypeError),
        ({0: [None, unfilled()]}, AttributeError),
        ({0: (made("one"),)}, TypeError),
        ({0: None}, TypeError),
    ],
    "retain": [
        ({0: [made("one"), None]}, TypeError),
        ({0: [made("one"), unfilled()]}, AttributeError),
        ({0: (made("one"),)}, TypeError),
        ({1: ()}, TypeError),
    ],
    "let_go": [
        ({0: [made("one"), None]}, TypeError),
        ({0: [made("one"), unfilled()]}, AttributeError),
        ({0: (made("one"),)}, TypeError),
    ],
    "name_rows": [
        ({0: [made("one"), None]}, TypeError),
        ({0: [made("one"), unfilled()]}, AttributeError),
        ({0: (made("one"),)}, TypeError),
        ({1: [1]}, ValueError),
        ({2: (2, 3)}, TypeError),
    ],
    "displace": [
        ({0: [made("one"), None]}, TypeError),
        ({0: [made("one"), unfilled()]}, AttributeError),
        ({0: (made("one"),)}, TypeError),
    ],
    "items_of": [({0: []}, TypeError), ({0: {1: [made("one")], 2: ()}}, TypeError)],
    "find": [
        ({0: [index_of({})]}, ValueError),
        ({0: (index_of({}),) * 3}, TypeError),
        ({0: [index_of({}), "no index", index_of({})]}, AttributeError),
        ({0: [index_of({}), index_of([]), index_of({})]}, TypeError),
        ({1: ("third", "empty", "none")}, TypeError),
        ({1: ["third", "empty", Incomparable("third")], 2: [hash("third")] * 3}, KeyError),
        ({0: [index_of({hash("third"): ["no entry"]})] * 3}, TypeError),
        ({0: [index_of({hash("third"): [unfilled()]})] * 3}, TypeError),
        ({2: [hash("third")]}, ValueError),
        ({2: [[], [], []]}, TypeError),
    ],
    "places": [
        ({0: [{}]}, ValueError),
        ({0: ({}, {})}, TypeError),
        ({1: ("one", "two")}, TypeError),
        ({1: ["new", Incomparable("third")], 2: [hash("new"), hash("third")]}, KeyError),
        ({2: [hash("third")]}, ValueError),
        ({2: (hash("third"), hash("new"))}, TypeError),
        ({2: [hash("third"), "new"]}, TypeError),
        ({0: [{}, []]}, TypeError),
        ({0: [{}, {hash("new"): ()}]}, TypeError),
        ({0: [{}, {hash("new"): ["no entry"]}]}, TypeError),
        ({0: [{}, {hash("new"): [unfilled()]}]}, TypeError),
    ],
    "occupy": [
        ({0: [[]]}, ValueError),
        ({0: ([], [])}, TypeError),
        ({0: [[made("one")], ()]}, TypeError),
        ({0: [[], []]}, ValueError),
        ({0: [[made("one")], [made("two")]]}, ValueError),
        ({1: [made("one")]}, ValueError),
        ({1: [made("one"), None]}, TypeError),
        ({1: [made("one"), unfilled()]}, AttributeError),
        ({2: [None, "two"]}, TypeError),
        ({2: [made("one")]}, ValueError),
    ],
    "are_plain": [({0: ("a", "b")}, TypeError), ({0: None}, TypeError)],
    "keep_for_ever": [],
    "lookup": [({0: []}, TypeError), ({1: []}, TypeError)],
    "append": [
        ({0: [1] * 9}, TypeError),
        ({0: (1,) * 8}, TypeError),
        ({0: (None, torch.float32, 8, 1, 2, HEADS, 3, 2, 4)}, AttributeError),
        ({0: (None, torch.float32, None, 1, 2, HEADS, 3, 2, 4)}, TypeError),
        ({0: (None, torch.float32, 8, 1, 2, HEADS, 3, 2, 4.0)}, TypeError),
        ({1: 1}, IndexError),
        ({1: -2}, IndexError),
        ({1: 2**70}, OverflowError),
        ({2: 4}, IndexError),
        ({2: -1}, IndexError),
        ({2: None}, TypeError),
    ],
    "in_runs": [
        ({0: np.array([1, -1])}, IndexError),
        ({0: np.array([1, 2**31])}, IndexError),
        ({0: PAIR}, ValueError),
        ({0: strided(np.array([3, 1]))}, ValueError),
        ({0: [3, 1]}, TypeError),
        ({1: 2**70}, OverflowError),
        ({1: "3"}, TypeError),
    ],
    "hash_rows": [
        ({0: "text"}, TypeError),
        ({0: np.zeros((4, 4), dtype=np.uint8).T[:, :2]}, ValueError),
        ({1: 1.0}, TypeError),
    ],
    "hash_memory": [({0: None}, TypeError), ({2: 1.0}, TypeError), ({1: 2**70}, OverflowError)],
    "advise_huge_pages": [({0: None}, TypeError), ({1: "8"}, TypeError)],
}
WRONG_CALLS = [
    pytest.param(name, changes, error, id=f"{name} {number}")
    for name, cases in CASES.items()
    for number, (changes, error) in enumerate(cases)
]


@pytest.mark.parametrize(("name", "changes", "error"), WRONG_CALLS)
def test_wrong_arguments_raise_and_write_nothing(name: str, changes: dict[int, object], error: Error) -> None:
    arguments = Arguments()
    before = arguments.written()
    with pytest.raises(error):
        arguments.call(name, changes)
    assert arguments.written() == before


@pytest.mark.parametrize("name", CASES)
def test_too_few_or_too_many_arguments_raise_and_write_nothing(name: str) -> None:
    arguments = Arguments()
    before = arguments.written()
    for wrong in ([], arguments.of[name][:-1], [*arguments.of[name], 0]):
        with pytest.raises(TypeError, match="arguments"):
            getattr(native, name)(*wrong)
    assert arguments.written() == before


def test_the_types_are_of_the_functions_that_there_are_and_of_their_arguments() -> None:
    stub = Path(native.__file__).with_name("_native.pyi").read_text("utf-8")
    typed = {one.name: len(one.args.posonlyargs) for one in ast.parse(stub).body if isinstance(one, ast.FunctionDef)}
    functions = {name for name, each in vars(native).items() if not name.startswith("_") and not isinstance(each, type)}
    assert set(typed) == functions == set(CASES)
    for name, count in typed.items():
        with pytest.raises(TypeError, match=f"expected {count} arguments"):
            getattr(native, name)()


def test_every_function_does_what_it_says_with_the_right_arguments() -> None:
    arguments = Arguments()
    data, batch = arguments.data.clone(), arguments.batch
    arguments.call("gather")
    assert torch.equal(batch[:, 0, :, 1], data[:, 1])
    assert torch.equal(batch[:, 1, :, 2], data[:, 3])
    arguments.call("scatter")
    assert torch.equal(arguments.data[:, 3], batch[:, 0, :, 2] + 1.0)  # the first has the difference
    assert torch.equal(arguments.data[:, 1], batch[:, 1, :, 0])
    assert arguments.call("in_runs") == [range(2, 4), range(7, 9), range(70, 71)]
    assert np.frombuffer(arguments.call("in_runs", {1: 2}), dtype=np.int64).tolist() == [2, 3, 7, 8, 70]
    assert arguments.call("in_runs", {0: np.array([1, 2**30])}) is None
    assert arguments.call("append") == 1
    assert torch.equal(batch[:, :, :, 2:], arguments.new)


def test_entries_are_made_found_and_counted_as_python_does_it() -> None:
    arguments = Arguments()
    for entry, key, length, rank in zip(arguments.call("new_entries"), "ab", (2, 3), (0.5, 1.5), strict=True):
        correction = None if key == "a" else arguments.steps
        side, mark = ("one", 5) if key == "a" else ("two", 6)
        expected = Entry(key, SCOPE, GENERATION, length, side, rank, mark, correction, TICKS)  # type: ignore[arg-type]
        assert [getattr(entry, slot) for slot in Entry.__slots__] == [getattr(expected, s) for s in Entry.__slots__]
        assert gc.is_tracked(entry)
    assert arguments.call("describe") == ([5, 0, 5], [2, 0, 2], [None, None, None], [])
    assert arguments.call("describe", {1: None})[3] == [arguments.first, arguments.second]
    arguments.call("retain")
    assert (arguments.first.refs, arguments.second.refs) == (4, 3)
    assert arguments.held == [arguments.first, arguments.second, arguments.first]
    arguments.first.refs, arguments.second.refs = 2, 2
    assert arguments.call("let_go") == ([arguments.first], [5], [TICKS])
    assert (arguments.first.refs, arguments.second.refs) == (0, 1)
    assert arguments.call("items_of") == [arguments.third]
    assert arguments.call("lookup") is arguments.full
    assert arguments.call("lookup", {1: hash("none")}) is None
    assert arguments.call("find") == [arguments.third, None, None]
    other = index_of({hash("empty"): [arguments.second]})
    assert arguments.call("find", {0: [arguments.index, other, other]}) == [arguments.third, None, None]
    assert arguments.call("find", {0: [other, arguments.index, other]}) == [None, None, None]
    other.extra = {5: [(5, 1)]}
    assert arguments.call("find", {0: [arguments.index, other, other]}) is None
    hashes = [hash("third"), hash("third")]
    assert arguments.call("places", {1: ["new", "third"], 2: hashes}) is None
    assert (
        arguments.call("places", {0: [{}, {}, arguments.cells], 1: ["a", "b", "c"], 2: [1, 2, hash("empty")]}) is None
    )
    twice: list[dict[int, object]] = [{}] * 2
    assert arguments.call("places", {0: twice, 1: ["a", "b"], 2: [1, 1]}) is None
    assert twice[0] == {}
    (full, new), held, old, added = arguments.call("places")
    assert full is arguments.full
    assert new is arguments.cells[hash("new")]
    assert (new, held, old) == ([], [arguments.third, None], [arguments.third])
    assert added[0] is arguments.cells
    arguments.call("occupy")
    assert (arguments.full, arguments.empty) == ([arguments.first], [arguments.second])
    assert arguments.first.index_key is arguments.third.index_key
    assert arguments.second.index_key is arguments.index_keys[1]
    assert (arguments.first.place, arguments.third.place) == (Place.HELD, Place.NONE)
    arguments.call("displace")
    assert (arguments.first.place, arguments.second.place) == (Place.NONE, Place.NONE)


def test_no_rows_and_no_slots_are_no_work() -> None:
    arguments = Arguments()
    none, before = np.empty(0, dtype=np.int64), arguments.written()
    arguments.call("gather", {8: []})
    arguments.call("scatter", {8: 0, 9: none, 10: none, 11: none})
    arguments.call("scatter", {8: 0, 9: none, 10: none, 11: range(9, 9)})
    assert arguments.call("in_runs", {0: none}) == []
    assert arguments.call("hash_rows", {0: b"", 1: 0}) == []
    assert arguments.call("hash_memory", {1: 0}) == []
    assert arguments.written() == before


def shared_by_nobody(arguments: list[Any]) -> list[Any]:
    """Those that the interpreter does not use itself, as it does small numbers, text and None, and what is in lists."""
    several = [*arguments, *(item for one in arguments if isinstance(one, list) for item in one)]
    several += [entry.index_key for entry in several if isinstance(entry, Entry) and hasattr(entry, "index_key")]
    return [one for one in several if isinstance(one, (np.ndarray, list, tuple, range, dict, Entry, Incomparable))]


def growth_of(work: Callable[[], None], watched: list[Any]) -> tuple[int, list[int]]:
    """Bytes and references to each of `watched` that `CALLS` rounds of `work` leave behind."""
    for _ in range(WARM_UP):
        work()
    gc.collect()
    counts = [sys.getrefcount(one) for one in watched]
    tracemalloc.start()
    try:
        work()
        before, _ = tracemalloc.get_traced_memory()
        for _ in range(CALLS):
            work()
        gc.collect()
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    more = [sys.getrefcount(one) for one in watched]
    return after - before, [now - then for now, then in zip(more, counts, strict=True)]


@pytest.mark.parametrize("name", CASES)
def test_calls_keep_no_memory_and_no_references(name: str) -> None:
    arguments = Arguments()
    function, passed = getattr(native, name), arguments.of[name]

    def work() -> None:
        function(*passed)
        arguments.renew()

    grown, references = growth_of(work, shared_by_nobody(passed))
    assert grown < SLACK_BYTES
    assert not any(references)


@pytest.mark.parametrize("name", [name for name, cases in CASES.items() if cases])
def test_calls_that_fail_keep_no_memory_and_no_references(name: str) -> None:
    arguments = Arguments()
    function, right = getattr(native, name), arguments.of[name]
    wrong = [[changes.get(place, one) for place, one in enumerate(right)] for changes, _ in CASES[name]]
    rounds = iter(range(10**9))

    def work() -> None:
        try:
            function(*wrong[next(rounds) % len(wrong)])
        except WRONG:
            return
        raise AssertionError("wrong arguments were taken")

    grown, references = growth_of(work, shared_by_nobody([one for case in wrong for one in case]))
    assert grown < SLACK_BYTES
    assert not any(references)
