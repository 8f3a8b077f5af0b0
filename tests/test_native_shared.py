"""What threads share of the compiled module, used by four of them at once.

`make test-threadsanitizer` runs this file under ThreadSanitizer, where torch is not installed: nothing here imports it.
"""

from __future__ import annotations

import ctypes
import inspect
import subprocess
import sys
import threading
from array import array
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from random import Random
from typing import Any, Literal

import pytest

import concurrent_kv.books.entries  # noqa: F401  (binds the class of entries)
from concurrent_kv.books.index import Index
from concurrent_kv.books.records import NO_PLACE, Entry, Place
from concurrent_kv.locks.contention import Contention
from concurrent_kv.locks.deadline import Deadline
from concurrent_kv.native import native

pytestmark = pytest.mark.skipif(native is None, reason="the compiled module was not built, or is switched off")

THREADS = 4
ROUNDS = 60
BOUND_SECONDS = 300.0
SCOPE: Any = ["a scope"]
WINDOW = 100  # of several pages
SLOTS_OF_EACH = 40  # threads
COMMON = 90  # slots of the row that all threads read
SLOTS = COMMON + THREADS * SLOTS_OF_EACH


@pytest.fixture(autouse=True)
def eager_switching() -> Iterator[None]:
    """Where there is a GIL, threads take turns so often that their work overlaps."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def together(work: Callable[[int], object], *others: Callable[[], object]) -> None:
    """Run `work(number)` in all threads but those for `others`, at once; raises the first error of any."""
    errors: list[BaseException] = []
    barrier = threading.Barrier(THREADS)

    def run(number: int) -> None:
        try:
            barrier.wait(BOUND_SECONDS)
            others[number]() if number < len(others) else work(number)
        except BaseException as error:
            errors.append(error)

    running = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(THREADS)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join(BOUND_SECONDS)
    if errors:
        raise errors[0]
    assert not any(thread.is_alive() for thread in running), "a thread hangs"


def numbers(data: bytearray, code: Literal["q", "i"] = "q") -> list[int]:
    return memoryview(data).cast(code).tolist()


def own_slots(mine: int) -> range:
    first = COMMON + 1 + mine * SLOTS_OF_EACH
    return range(first, first + SLOTS_OF_EACH)


class Books:
    """Tables with a row that every thread reads, and others come and go beside it; and counts of them.

    Every token was written `moved` positions behind where it stands in its row.
    """

    def __init__(self, moved: int = 0) -> None:
        self.moved = moved
        self.tables = native.Tables(SLOTS, WINDOW)
        self.uses = native.Uses(self.tables)
        positions = array("q", range(moved, moved + COMMON))
        (self.common,), _ = self.tables.enter([0], [0], [COMMON], range(1, COMMON + 1), positions)
        self.uses.add([self.common])

    def child(self, slots: range) -> int:
        """A row that shares the pages of the common one, and has these slots for the last of its own."""
        positions = array("q", range(COMMON + self.moved, COMMON + self.moved + len(slots)))
        rows, tails = self.tables.enter([self.common], [COMMON], [len(slots)], slots, positions)
        assert tails == [slots[-1]]
        return int(rows[0])

    def check(self) -> None:
        """Only the common row is there, and what is counted of it is what its pages have."""
        pages = self.tables.pages_of(self.common)
        named = {slot for _, slots in pages for slot in slots if slot}
        for counts in (self.tables, self.uses):
            of_pages, weights = counts.counted()
            assert [page for page, rows in enumerate(numbers(of_pages, "i")) if rows] == sorted(
                page for page, _ in pages
            )
            assert {slot for slot, weight in enumerate(numbers(weights, "i")) if weight} == named
            assert counts.used == COMMON
        assert self.tables.shared == 0


class Memory:
    """Slots of float32 `[planes, slots, heads, 4]`, and a batch of one row that takes them, by their addresses."""

    PLANES, HEADS, NUMBERS = 2, 2, 4

    def __init__(self, slots: int, columns: int) -> None:
        planes, heads, each = self.PLANES, self.HEADS, self.NUMBERS
        self.shape = (planes, slots + 1, heads, 4 * each)
        self.columns = columns
        self.slots = (ctypes.c_float * (planes * (slots + 1) * heads * each))()
        owed = planes * (columns + 1) * heads * each
        self.owed = (ctypes.c_float * owed)(*[1.0] * owed)

    def batch(self) -> Any:
        return (ctypes.c_float * (self.PLANES * self.HEADS * self.columns * self.NUMBERS))()

    def write(self, slots: range, value: float) -> None:
        """The same number in each of some slots."""
        batch = self.batch()
        for at in range(len(batch)):
            batch[at] = value
        rows, columns = array("q", [0] * len(slots)), array("q", range(len(slots)))
        # Nothing is added, by additions: ThreadSanitizer does not see what `memcpy` writes.
        each = self.HEADS * self.NUMBERS
        nothing = (ctypes.c_float * (self.PLANES * each))()
        added = (ctypes.addressof(nothing), 4 * each, 1, len(slots))
        where = (ctypes.addressof(self.slots), self.shape, ctypes.addressof(batch), 1, self.columns)
        native.scatter(*where, *added, rows, columns, slots)

    def of_row(self, tables: Any, row: int, end: int) -> tuple[Any, ...]:
        """What a gather of a row is called with, and the batch that it goes into."""
        batch = self.batch()
        where = (ctypes.addressof(self.slots), self.shape, ctypes.addressof(batch), 1, self.columns)
        return batch, (*where, end, end, tables, [row])

    def is_filled_with(self, batch: Any, columns: range, value: float) -> bool:
        """Whether these columns of a batch have one number, in all planes and heads."""
        found = memoryview(batch).cast("B").cast("f").tolist()
        per_head = self.columns * self.NUMBERS
        return all(
            set(found[head * per_head + columns[0] * self.NUMBERS : head * per_head + (columns[-1] + 1) * self.NUMBERS])
            == {value}
            for head in range(self.PLANES * self.HEADS)
        )


def new_entries(names: list[str], written: object = None) -> list[Entry]:
    ones, none = [1] * len(names), [None] * len(names)
    made: list[Entry] = native.new_entries(
        names, SCOPE, object(), ones, none, [0.0] * len(names), list(map(hash, names)), none, written or {}
    )
    return made


PROGRAMS: dict[Callable[[], None], tuple[str, ...]] = {}


def of(*names: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """A program that shares these between threads."""

    def noted(program: Callable[[], None]) -> Callable[[], None]:
        PROGRAMS[program] = names
        return program

    return noted


# Tables, and what reads them -----------------------------------------------------------------------------------------


@of("Tables", "Uses")
def rows_come_and_go_beside_one_that_is_read() -> None:
    books = Books()
    tables, uses, common = books.tables, books.uses, books.common
    whole = list(range(1, COMMON + 1))

    def work(mine: int) -> None:
        rng = Random(mine)
        for _ in range(ROUNDS):
            slots = own_slots(mine)[: rng.randint(1, WINDOW - COMMON)]
            row = books.child(slots)
            uses.add([row])
            assert numbers(tables.slots_of(row)) == whole + list(slots)
            assert numbers(tables.slots_of_all([common, row])) == whole + whole + list(slots)
            assert numbers(tables.columns([row], 4, 4)) == (whole + list(slots))[-4:]
            assert numbers(tables.positions(slots), "i") == list(range(COMMON, COMMON + len(slots)))
            assert tables.pages_of(common)[0][1] == whole[:32]
            assert numbers(tables.weights(slots), "i") == numbers(uses.weights(slots), "i") == [1] * len(slots)
            assert not tables.named_elsewhere([row])
            assert tables.exclusive([row]) >= len(slots) <= uses.exclusive([row])
            assert min(tables.used, uses.used) >= COMMON + len(slots)
            assert tables.shared >= 64
            assert len(tables.counted()) == len(uses.counted()) == 2
            uses.remove([row])
            freed, others_left = tables.leave([row])
            assert set(slots) <= set(numbers(freed))
            assert others_left

    together(work)
    books.check()


@of("Tables", "Uses")
def numbers_are_those_of_a_moment() -> None:
    """What is exclusive is found by counting rows out and in again, which nothing shows."""
    books, over = Books(), threading.Event()
    shares = books.child(own_slots(0)[:1])

    def look() -> None:
        try:
            for _ in range(20 * ROUNDS):
                assert books.tables.exclusive([books.common, shares]) == COMMON + 1
                assert books.uses.exclusive([books.common]) == COMMON
        finally:
            over.set()

    def work(mine: int) -> None:
        while not over.is_set():
            assert books.tables.used == COMMON + 1
            assert books.tables.shared == COMMON
            assert books.uses.used == COMMON

    together(work, look)
    books.tables.leave([shares])
    books.check()


@of("Tables", "Uses", "gather")
def tables_grow_while_they_are_read() -> None:
    shown, over = [Books()], threading.Event()

    def grow() -> None:
        try:
            for _ in range(ROUNDS // 3):
                books = shown[0] = Books()
                made: list[int] = []
                for number in (50, 100, 200, 400):
                    parents, none = [books.common] * number, [0] * number
                    made += books.tables.enter(parents, [WINDOW // 2] * number, none, range(0), array("q"))[0]
                    books.uses.keep([books.common, *made])
                books.tables.keep([books.common])
                books.uses.keep([books.common])
                books.check()
        finally:
            over.set()

    def read(mine: int) -> None:
        memory = Memory(SLOTS, WINDOW)
        while not over.is_set():
            books = shown[0]
            batch, arguments = memory.of_row(books.tables, books.common, COMMON)
            for _ in range(10):
                native.gather(*arguments)
            assert memory.is_filled_with(batch, range(COMMON), 0.0)
            for _ in range(10):
                assert len(books.tables.slots_of(books.common)) == 8 * COMMON
            assert len(books.tables.slots_of_all([books.common])) == 8 * COMMON
            assert numbers(books.tables.columns([books.common], 2, 2)) == [COMMON - 1, COMMON]
            assert books.tables.used == COMMON
            assert books.uses.used == COMMON
            assert books.tables.exclusive([books.common]) >= 0

    together(read, grow)


def handed_on(moved: int, gather: Callable[[Memory, tuple[Any, ...]], None]) -> None:
    """Threads write slots, enter them, and hand the row to whoever gathers next; all gather the common row, too.

    What is gathered has one more added for each position that tokens have moved.
    """
    books, memory = Books(moved), Memory(SLOTS, WINDOW)
    memory.write(range(1, COMMON + 1), 7.0)
    lock, left, free = threading.Lock(), list[tuple[range, int, float]](), SimpleQueue[range]()
    for mine in range(THREADS):  # a row may be gathered while its thread writes the next
        free.put(own_slots(mine)[:8])
        free.put(own_slots(mine)[8:16])

    def work(mine: int) -> None:
        for round_ in range(ROUNDS // 2):
            slots, value = free.get(timeout=BOUND_SECONDS), float(mine * ROUNDS + round_ + 8)
            memory.write(slots, value)
            with lock:
                left.append((slots, books.child(slots), value))
                slots, row, value = left.pop(0)
            end = COMMON + len(slots)
            batch, arguments = memory.of_row(books.tables, row, end)
            gather(memory, arguments)
            assert memory.is_filled_with(batch, range(COMMON), 7.0 + moved)
            assert memory.is_filled_with(batch, range(COMMON, end), value + moved)
            with lock:
                books.tables.leave([row])
            free.put(slots)

    together(work)
    books.check()


@of("gather", "scatter")
def what_one_thread_wrote_another_gathers() -> None:
    handed_on(0, lambda memory, arguments: native.gather(*arguments))


@of("gather_stepwise")
def what_tokens_are_owed_is_added_in_every_thread() -> None:
    def gather(memory: Memory, arguments: tuple[Any, ...]) -> None:
        owing = object()
        native.gather_stepwise(*arguments, [owing], owing, ctypes.addressof(memory.owed), memory.columns, 1)

    handed_on(1, gather)


@of("gather", "scatter", "advise_huge_pages")
def large_copies_let_other_threads_run() -> None:
    slots, each = 2, 1 << 14  # bytes of a head of a token: more than a copy needs to let go of the GIL
    shape = (4, slots + 1, 4, each)
    data = (ctypes.c_char * (4 * (slots + 1) * 4 * each))()
    tables = native.Tables(slots, 1)
    (row,), _ = tables.enter([0], [0], [1], range(1, 2), array("q", [0]))
    source = (ctypes.c_char * (4 * 4 * each)).from_buffer_copy(bytes(range(256)) * (each // 16))
    index = array("q", [0])

    def scatter(slot: int) -> None:
        where = ctypes.addressof(data), shape, ctypes.addressof(source), 1, 1
        native.scatter(*where, 0, 0, 1, 0, index, index, range(slot, slot + 1))

    scatter(1)
    native.advise_huge_pages(ctypes.addressof(data), len(data))

    def write() -> None:
        for _ in range(8):
            scatter(2)

    def work(mine: int) -> None:
        batch = (ctypes.c_char * len(source))()
        for _ in range(8):
            native.gather(ctypes.addressof(data), shape, ctypes.addressof(batch), 1, 1, 1, 1, tables, [row])
            native.advise_huge_pages(ctypes.addressof(data), len(data))
        assert batch.raw == source.raw

    together(work, write)


# Entries and their index ---------------------------------------------------------------------------------------------


@of("bind", "new_entries", "describe", "retain", "let_go", "name_rows", "displace")
def entries_are_described_while_others_count_their_references() -> None:
    mutex, held = threading.Lock(), list[Entry]()
    common = new_entries(["one", "two", "three"], {(7, 0): 1})
    with mutex:
        native.name_rows(common, [1, 2, 3], [4, 5, 6])

    def work(mine: int) -> None:
        for round_ in range(ROUNDS):
            own = new_entries([f"{mine} {round_}", f"{mine} {round_} too"])
            with mutex:
                native.name_rows(own, [mine, mine], [0, 0])
                native.retain(common, held)
            rows, lengths, _, others = native.describe([*common, None, *own], SCOPE)  # no lock: they are kept
            assert (rows, lengths, others) == ([1, 2, 3, 0, mine, mine], [1, 1, 1, 0, 1, 1], [])
            with mutex:
                for entry in common:
                    entry.place = Place.HELD
                native.displace(common)
                assert native.let_go(common) == ([], [], [])
                del held[-len(common) :]
                assert native.let_go(own) == (own, [mine, mine], [])

    together(work)
    assert [entry.refs for entry in common] == [1, 1, 1]
    assert not held
    assert {entry.place for entry in common} == {NO_PLACE}


@of("ShardLocks", "find", "places", "occupy", "items_of", "lookup")
def an_index_is_read_and_written_under_its_shards() -> None:
    locks, mutex = native.ShardLocks(2, Contention("locks")), threading.Lock()
    parts = [Index[Entry]() for _ in range(2)]
    names = [f"key {number}" for number in range(6)]

    def part_of(name: str) -> int:
        return names.index(name) % 2

    def write(chosen: list[str], entries: list[Entry]) -> None:
        shards = sorted({*map(part_of, chosen)})
        with locks.write(shards, Deadline(BOUND_SECONDS)):
            dicts = [parts[part_of(name)].cells for name in chosen]
            found = native.places(dicts, chosen, list(map(hash, chosen)))
            assert found is not None
            cells, held, _, _ = found
            with mutex:
                native.occupy(cells, entries, held, Place.EXEMPT)

    def work(mine: int) -> None:
        rng = Random(mine)
        for _ in range(ROUNDS):
            chosen = rng.sample(names, 2)
            write(chosen, new_entries(chosen))
            one = rng.choice(names)
            part = part_of(one)
            with locks.read([part], Deadline(BOUND_SECONDS)):
                for entry in native.find([parts[part]], [one], [hash(one)]):
                    assert entry is None or entry.key == one
                assert all(entry.place is Place.EXEMPT for entry in native.items_of(parts[part].cells))
            # As `discard` and a put do, without the shard: what is found may be on its way out, and is kept meanwhile.
            seen = parts[part].get(one)
            assert seen is None or seen.key == one
            if rng.random() < 0.3:
                with locks.write([part], Deadline(BOUND_SECONDS)):
                    parts[part].pop(one)

    together(work)
    assert locks.held == 0
    assert all(entry.index_key == entry.key for part in parts for entry in part.values())


@of("occupy")
def a_cell_shows_nothing_but_its_entry() -> None:
    """To a thread without the shard's lock, while a cell of Python's, without room for an item, is filled."""
    cell: list[Entry] = []
    over = threading.Event()

    def fill() -> None:
        (entry,) = new_entries(["key"])
        try:
            for _ in range(100 * ROUNDS):
                native.occupy([cell], [entry], [None], Place.EXEMPT)
                cell.clear()
        finally:
            over.set()

    def work(mine: int) -> None:
        while not over.is_set():
            for seen in cell:
                assert isinstance(seen, Entry)

    together(work, fill)


# Locks ---------------------------------------------------------------------------------------------------------------


@of("ShardLocks", "Held")
def memory_is_written_by_one_and_read_by_many() -> None:
    """Plain memory: a lock that let a reader in beside a writer would be a race, not only a wrong sum."""
    contention = Contention("locks")
    locks = native.ShardLocks(3, contention)
    assert locks.contention is contention
    assert locks.count == 3
    memory = [ctypes.create_string_buffer(64) for _ in range(3)]
    source = [ctypes.create_string_buffer(bytes([value]) * 64) for value in range(2)]
    known = {native.hash_rows(each.raw[:64], 1)[0] for each in source}
    index = array("q", [0])

    def work(mine: int) -> None:
        rng = Random(mine)
        for _ in range(ROUNDS):
            shards = sorted(rng.sample(range(3), rng.randint(1, 3)))
            if rng.random() < 0.4:
                held = locks.write(shards, Deadline(BOUND_SECONDS))
                with held:
                    assert held.wait(0.0)
                    assert locks.held >= 1
                    for shard in shards:
                        to, start = ctypes.addressof(memory[shard]), ctypes.addressof(rng.choice(source))
                        native.scatter(to, (1, 1, 1, 64), start, 1, 1, 0, 0, 1, 0, index, index, range(1))
            else:
                with locks.read(shards, Deadline(BOUND_SECONDS)):
                    for shard in shards:
                        (found,) = native.hash_memory(ctypes.addressof(memory[shard]), 1, 64)
                        assert found in known

    together(work)
    assert locks.held == 0


@of("Held")
def holds_that_are_dropped_let_go() -> None:
    locks = native.ShardLocks(1, Contention("locks"))

    def work(mine: int) -> None:
        for round_ in range(ROUNDS):
            held = (locks.write if round_ % 4 == mine else locks.read)([0], Deadline(BOUND_SECONDS))
            held.__enter__()
            del held  # its end lets go

    together(work)
    assert locks.held == 0


@of("Gate")
def each_thread_is_inside_its_own_sections() -> None:
    gate = native.Gate()

    def work(mine: int) -> None:
        for _ in range(ROUNDS):
            assert not gate.holds()
            with gate, gate:
                assert gate.holds()

    together(work)


@of("keep_for_ever")
def what_is_kept_for_ever_is_used_by_all() -> None:
    kept = object()
    native.keep_for_ever(kept)

    def work(mine: int) -> None:
        native.keep_for_ever(kept)  # not made by this thread, or kept already
        for _ in range(ROUNDS):
            assert [kept] * 3 == [kept, kept, kept]

    together(work)


@of("lookup", "are_plain")
def containers_are_looked_at_while_another_thread_changes_them() -> None:
    found: dict[object, int] = {}
    keys: list[object] = ["a", (1, "b"), 2.0]
    over = threading.Event()

    def change() -> None:
        try:
            for number in range(10 * ROUNDS):
                found[number % 7, "key"] = number
                keys.append((number, (number, "c")))
                del keys[3:]
                if number % 5 == 0:
                    found.clear()
        finally:
            over.set()

    def work(mine: int) -> None:
        while not over.is_set():
            number = native.lookup(found, (mine, "key"))
            assert number is None or number % 7 == mine
            assert native.are_plain(keys)

    together(work, change)


# What only reads its arguments ---------------------------------------------------------------------------------------


@of("hash_rows", "hash_memory", "in_runs")
def arguments_are_read_by_all() -> None:
    states = bytes(range(96))
    expected, memory = native.hash_rows(states, 3), ctypes.create_string_buffer(states, 96)
    address = ctypes.addressof(memory)

    def work(mine: int) -> None:
        slots = array("q", [5, 3, 4, 9])
        for _ in range(ROUNDS):
            assert native.hash_rows(states, 3) == native.hash_memory(address, 3, 32) == expected
            assert native.in_runs(slots, 4) == [range(3, 6), range(9, 10)]

    together(work)


class Plain:
    """What `append` asks of a tensor, over memory of its own."""

    dtype, is_cpu = "float32", True

    def __init__(self, *shape: int) -> None:
        self.shape = shape
        count = 1
        for size in shape:
            count *= size
        self.memory = (ctypes.c_float * count)(*[1.0] * count)

    def stride(self) -> tuple[int, ...]:
        strides, step = list[int](), 1
        for size in reversed(self.shape):
            strides.insert(0, step)
            step *= size
        return tuple(strides)

    def is_neg(self) -> bool:
        return False

    def data_ptr(self) -> int:
        return ctypes.addressof(self.memory)


@of("append")
def all_append_the_same_tensors_to_their_batches() -> None:
    keys, values = Plain(2, 2, 1, 4), Plain(2, 2, 1, 4)

    def work(mine: int) -> None:
        batch = Plain(2, 2, 2, ROUNDS, 4)
        memory = (batch, batch.dtype, batch.data_ptr(), 1, 2, 2, ROUNDS, 4, 4)
        for end in range(ROUNDS):
            assert native.append(memory, 0, end, keys, values) == 1
        assert set(batch.memory) == {1.0}

    together(work)


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_threads_share(program: Callable[[], None]) -> None:
    program()


def test_every_function_and_class_is_shared_by_a_program() -> None:
    shared = {name for names in PROGRAMS.values() for name in names}
    exported = {name for name, each in vars(native).items() if inspect.isbuiltin(each) or inspect.isclass(each)}
    assert shared == exported


SECOND_INTERPRETER = """
import _interpreters
error = _interpreters.exec(_interpreters.create("isolated"), "import concurrent_kv._native")
print("imported" if error is None else error.msg)
"""


@pytest.mark.skipif(sys.version_info < (3, 13), reason="this Python has no interpreters beside its first to start")
def test_a_second_interpreter_gets_nothing_of_what_is_static() -> None:
    done = subprocess.run([sys.executable, "-c", SECOND_INTERPRETER], capture_output=True, text=True, check=True)
    assert "does not support loading in subinterpreters" in done.stdout, done
