"""The allocator: slots that are written together stay together, and nothing is lost or handed out twice."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from concurrent_kv.books import slots as slots_module
from concurrent_kv.books.slots import SlotAllocator
from concurrent_kv.device.slot_numbers import as_array
from tests.interrupting import cut_at

pytestmark = pytest.mark.usefixtures("loops")


def held(slots: SlotAllocator, count: int) -> np.ndarray:
    """`count` slots that are taken."""
    taken = slots.allocate(count)
    assert taken is not None
    return as_array(taken.slots)


def test_slots_that_follow_each_other_are_taken_where_there_are_some() -> None:
    slots = SlotAllocator(100)
    small, large = [held(slots, 2) for _ in range(10)], held(slots, 80)
    for one in small[::2]:
        slots.give_back(one, {})
    slots.give_back(large, {})
    taken = slots.allocate(40)
    assert taken is not None
    assert taken.slots == range(int(large[0]), int(large[0]) + 40)


def test_neighbours_freed_after_each_other_are_one_run_again() -> None:
    slots = SlotAllocator(20)
    entries = [held(slots, 5) for _ in range(4)]
    for entry in [entries[1], entries[2], entries[0], entries[3]]:
        slots.give_back(entry, {})
    taken = slots.allocate(20)
    assert taken is not None
    assert taken.slots == range(1, 21)


def test_runs_that_turn_out_to_follow_each_other_are_one_range() -> None:
    slots = SlotAllocator(20)
    entries = [held(slots, 5) for _ in range(4)]
    for entry in [entries[0], entries[2], entries[1], entries[3]]:
        slots.give_back(entry, {})
    taken = slots.allocate(20)
    assert taken is not None
    assert taken.slots == range(1, 21)


def test_neighbours_that_other_streams_used_are_not_waited_for() -> None:
    slots = SlotAllocator(10)
    first, second = held(slots, 5), held(slots, 5)
    slots.give_back(first, {(0, 1): 1})
    slots.give_back(second, {(0, 2): 7})
    taken = slots.allocate(5)
    assert taken is not None
    assert (taken.slots, dict(taken.ticks)) == (range(1, 6), {(0, 1): 1})


def test_slots_in_pieces_are_taken_where_no_run_is_long_enough() -> None:
    slots = SlotAllocator(20)
    entries = [held(slots, 5) for _ in range(4)]
    for entry in [entries[0], entries[2]]:
        slots.give_back(entry, {})
    taken = slots.allocate(10)
    assert taken is not None
    assert not isinstance(taken.slots, range)
    assert sorted(taken.slots.tolist()) == sorted([*entries[0].tolist(), *entries[2].tolist()])


def test_a_run_carries_the_uses_of_all_that_were_joined_to_it() -> None:
    slots = SlotAllocator(10)
    first, second = held(slots, 5), held(slots, 5)
    slots.give_back(first, {(0, 1): 3})
    slots.give_back(second, {(0, 1): 4})
    taken = slots.allocate(10)
    assert taken is not None
    assert isinstance(taken.slots, range)
    assert taken.ticks == {(0, 1): 4}


@pytest.mark.parametrize("number", [3, 40, 100])
@pytest.mark.parametrize("apart", [2, 65, 5000])
def test_slots_freed_together_in_any_order_lie_in_ascending_order(number: int, apart: int) -> None:
    slots = SlotAllocator(number * apart + 1)
    held(slots, slots.size)
    going = np.arange(number) * apart + 1
    slots.give_back(np.concatenate([going[::-2], going[-2::-2]]), {})
    assert slots.free_slots().tolist() == going.tolist()
    taken = slots.allocate(2)
    assert taken is not None
    assert as_array(taken.slots).tolist() == going[:2].tolist()


def test_slots_are_parted_from_one_allocator_to_join_another() -> None:
    slots, own = SlotAllocator(30), SlotAllocator(0)
    runs = slots.part(9)
    assert runs is not None
    own.add(runs)
    assert (slots.size, slots.free_count, own.size, own.free_count) == (21, 21, 9, 9)
    assert own.whole_runs() == [range(1, 10)]
    assert own.part(10) is None
    assert not own.problems(np.zeros(31, dtype=bool))
    taken = held(own, 4)
    assert (own.size, own.free_count, own.in_use) == (9, 5, 4)
    assert own.whole_runs() == [range(1, 10)]
    slots.add(own.part(5) or [])
    assert (slots.size, own.size, own.free_count) == (26, 4, 0)
    assert own.whole_runs() is None
    assert sorted([*taken.tolist(), *slots.free_slots().tolist()]) == list(range(1, 31))


def test_as_many_slots_are_parted_as_asked_for_from_whatever_runs() -> None:
    slots = SlotAllocator(20)
    for one in [held(slots, 5) for _ in range(4)][::2]:
        slots.give_back(one, {(0, 1): 3})
    runs = slots.part(7)
    assert runs is not None
    assert [(list(as_array(some)), dict(ticks)) for some, ticks in runs] == [
        ([1, 2, 3, 4, 5], {(0, 1): 3}),
        ([11, 12], {(0, 1): 3}),
    ]
    assert slots.free_slots().tolist() == [13, 14, 15]


@given(steps=st.lists(st.integers(0, 12), max_size=40))
def test_whatever_is_taken_and_freed_nothing_is_lost_or_handed_out_twice(steps: list[int]) -> None:
    slots = SlotAllocator(30)
    mine: list[np.ndarray] = []
    for step in steps:
        taken = slots.allocate(step)
        if taken is None:
            slots.give_back(mine.pop(step % len(mine)), {})
            continue
        assert len(taken.slots) == step
        array = as_array(taken.slots)
        assert array.dtype == np.int64
        # Whoever gets slots that follow each other is told so: a copy of a block depends on it.
        if step:
            assert isinstance(taken.slots, range) == np.array_equal(array, np.arange(step) + array[0])
            mine.append(array)
        used = np.concatenate([*mine, slots.free_slots()])
        assert sorted(used.tolist()) == list(range(1, 31))


def test_slots_that_an_operation_was_cut_off_with_are_no_room_until_repair() -> None:
    cut, number = True, 0
    while cut:
        number += 1
        slots = SlotAllocator(20)
        entries = [held(slots, 2) for _ in range(10)]
        for one in entries[::2]:
            slots.give_back(one, {})
        cut = cut_at(number, lambda: slots.allocate(7), {slots_module.__file__}, jumps=True)  # noqa: B023
        taken: list[int] = []
        while (some := slots.allocate(3)) is not None:
            taken += as_array(some.slots).tolist()
        assert len({*taken}) == len(taken)
        kept = np.zeros(21, dtype=bool)
        kept[np.concatenate(entries[1::2])] = True
        assert not kept[taken].any()
        slots.rebuild(np.arange(21) > 0, kept, {})
        assert not slots.problems(kept)
        assert slots.allocate(10) is not None
    assert number > 10


class Breaking(list[Any]):
    """Runs of which only the first two can be had."""

    def __iter__(self) -> Iterator[Any]:
        yield from super().__iter__()
        raise MemoryError


def test_runs_that_cannot_all_be_added_are_not_added_at_all() -> None:
    allocator = SlotAllocator(8)
    before = list(allocator._runs)
    with pytest.raises(MemoryError):
        allocator._append(Breaking([(range(20, 22), {}), (range(30, 32), {})]))
    assert list(allocator._runs) == before


def test_a_run_that_is_taken_whole_leaves_the_others_in_their_order() -> None:
    allocator = SlotAllocator(0)
    allocator.add([(range(1, 2), {}), (range(3, 5), {}), (range(6, 9), {}), (range(10, 14), {})])
    taken = allocator.allocate(3)
    assert taken is not None
    assert list(taken.slots) == [6, 7, 8]
    assert allocator.free_slots().tolist() == [1, 3, 4, 10, 11, 12, 13]
