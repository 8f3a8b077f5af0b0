"""The buffers of closed batches, which later gathers of the same shape use: taken and given back without a lock."""

from __future__ import annotations

from threading import Barrier, Thread
from typing import Any

import pytest

from concurrent_kv.device.buffers import MAX_SHAPES, FreeBuffers, new_buffer
from concurrent_kv.device.streams import NO_TICKS
from concurrent_kv.device.tensors import SlotTensor
from tests.support import HANG_SECONDS, LAYOUT
from tests.threading_support import run_threads

THREADS, ROUNDS = 4, 300


@pytest.fixture
def slots() -> SlotTensor:
    return SlotTensor(LAYOUT, 8)


def test_a_buffer_that_was_given_back_is_used_again(slots: SlotTensor) -> None:
    buffer, _ = slots.buffers.take(2, 3)
    slots.buffers.give_back(buffer, NO_TICKS)
    assert slots.buffers.take(2, 3)[0].data_ptr() == buffer.data_ptr()
    assert slots.buffers.take(2, 3)[0].data_ptr() != buffer.data_ptr()


def test_who_finds_that_another_thread_took_the_last_gets_a_new_one(slots: SlotTensor) -> None:
    class Taken(list[Any]):
        """Looks as if there were one."""

        def __bool__(self) -> bool:
            return True

    slots.buffers.by_shape[2, 3] = Taken()
    assert slots.buffers.take(2, 3)[0].shape[1:4:2] == (2, 3)


def test_what_comes_back_after_the_memory_was_freed_is_not_kept(slots: SlotTensor) -> None:
    buffer, _ = slots.buffers.take(2, 3)
    slots.buffers.give_back(new_buffer(slots.layout, 2, 3), NO_TICKS)
    slots.free()
    slots.buffers.give_back(buffer, NO_TICKS)
    assert not any(slots.buffers.by_shape.values())


def test_what_comes_back_while_the_memory_is_freed_is_not_kept(slots: SlotTensor) -> None:
    slots.buffers.give_back(new_buffer(slots.layout, 2, 3), NO_TICKS)
    known = slots.buffers.by_shape[2, 3]

    class Late(list[Any]):
        """The memory is freed between the look at the list and the append."""

        def append(self, item: object) -> None:
            slots.free()
            super().append(item)

    slots.buffers.by_shape[2, 3] = late = Late(known)
    slots.buffers.give_back(new_buffer(slots.layout, 2, 3), NO_TICKS)
    assert not late


def test_buffers_of_few_shapes_are_kept(slots: SlotTensor) -> None:
    for batch in range(1, MAX_SHAPES + 5):
        for _ in range(6):
            slots.buffers.give_back(new_buffer(slots.layout, batch, 2), NO_TICKS)
    assert len(slots.buffers.by_shape) == MAX_SHAPES
    assert {len(free) for free in slots.buffers.by_shape.values()} == {4}


def test_no_two_threads_get_the_same_buffer(slots: SlotTensor) -> None:
    together = Barrier(THREADS)
    mixed_up: list[int] = []

    def work(number: int) -> None:
        together.wait(HANG_SECONDS)
        for _ in range(ROUNDS):
            buffer, _ = slots.buffers.take(1, 2)
            buffer.fill_(number)
            if not (buffer == number).all():
                mixed_up.append(number)
            slots.buffers.give_back(buffer, NO_TICKS)

    threads = [Thread(target=work, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG_SECONDS)
    assert not mixed_up
    assert len(slots.buffers.by_shape[1, 2]) <= 4


def test_a_thread_has_rather_what_it_gave_back_itself(slots: SlotTensor) -> None:
    own, others = new_buffer(slots.layout, 2, 3), new_buffer(slots.layout, 2, 3)
    slots.buffers.give_back(own, NO_TICKS)
    run_threads(lambda: slots.buffers.give_back(others, NO_TICKS))
    assert slots.buffers.take(2, 3)[0].data_ptr() == own.data_ptr()
    assert slots.buffers.take(2, 3)[0].data_ptr() == others.data_ptr()


def test_a_search_has_buffers_of_its_own_and_leaves_them_to_others(slots: SlotTensor) -> None:
    shared = slots.buffers
    first, second = FreeBuffers(LAYOUT, shared), FreeBuffers(LAYOUT, shared)
    buffer = first.take(2, 3)[0]
    first.give_back(buffer, {(0, 1): 2})
    assert second.take(2, 3)[0].data_ptr() != buffer.data_ptr()
    first.leave()
    found, ticks = second.take(2, 3)
    assert found.data_ptr() == buffer.data_ptr()
    assert dict(ticks) == {(0, 1): 2}
    slots.free()
    second.give_back(buffer, NO_TICKS)
    assert not any(second.by_shape.values())
