"""The buffers of closed batches, which later gathers of about their size use: taken and given back without a lock."""

from __future__ import annotations

from threading import Barrier, Thread
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from concurrent_kv.device.buffers import MAX_SHAPES, MAX_SIZES, FreeBuffers, new_buffer, size_of
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


@given(st.integers(1, 1 << 24))
def test_a_size_is_at_most_a_quarter_more_than_what_it_is_for(tokens: int) -> None:
    size = size_of(tokens)
    assert tokens <= size <= tokens * 1.25
    assert size_of(size) == size
    assert size_of(tokens + 1) >= size


def test_batches_of_about_the_same_size_use_the_same_memory_in_turns(slots: SlotTensor) -> None:
    shapes = [(8, 12), (12, 8), (6, 15), (8, 12), (2, 41)]
    assert {size_of(batch * columns) for batch, columns in shapes} == {size_of(96)}
    slots.buffers.give_back(slots.buffers.take(*shapes[0])[0], {(0, 1): 2})
    addresses = set()
    for batch, columns in shapes:
        buffer, ticks = slots.buffers.take(batch, columns)
        assert buffer.shape == new_buffer(slots.layout, batch, columns).shape
        assert buffer.is_contiguous()
        assert dict(ticks) == {(0, 1): 2}
        addresses.add(buffer.fill_(1.0).data_ptr())
        slots.buffers.give_back(buffer, ticks)
    assert len(addresses) == 1


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_what_is_written_into_a_buffer_with_gradients_ends_with_its_user(slots: SlotTensor, mode: Any) -> None:
    weight = torch.nn.Parameter(torch.ones(()))
    with mode():
        slots.buffers.give_back(slots.buffers.take(4, 4)[0], NO_TICKS)
        buffer = slots.buffers.take(3, 5)[0]
    assert not buffer.is_inference()
    buffer[:, 1] = weight.expand(buffer[:, 1].shape)
    torch.autograd.backward(buffer.sum())
    assert weight.grad == buffer[:, 1].numel()
    slots.buffers.give_back(buffer, NO_TICKS)
    with mode():
        again = slots.buffers.take(4, 4)[0]
    assert again.data_ptr() == buffer.data_ptr()
    assert not again.requires_grad
    assert not again.is_inference()


def test_a_buffer_whose_user_gave_it_less_memory_is_not_used_for_more(slots: SlotTensor) -> None:
    buffer = slots.buffers.take(4, 4)[0]
    buffer.data = torch.empty(buffer.shape)
    slots.buffers.give_back(buffer, NO_TICKS)
    assert slots.buffers.take(3, 5)[0].data_ptr() == buffer.data_ptr()
    buffer.data = torch.empty(1).expand(buffer.shape)
    slots.buffers.give_back(buffer, NO_TICKS)
    assert slots.buffers.take(3, 5)[0].data_ptr() != buffer.data_ptr()


def test_who_finds_that_another_thread_took_the_last_gets_a_new_one(slots: SlotTensor) -> None:
    class Taken(list[Any]):
        """Looks as if there were one."""

        def __bool__(self) -> bool:
            return True

    slots.buffers.by_size[size_of(6)] = Taken()
    assert slots.buffers.take(2, 3)[0].shape[1:4:2] == (2, 3)


def test_what_comes_back_after_the_memory_was_freed_is_not_kept(slots: SlotTensor) -> None:
    buffer, _ = slots.buffers.take(2, 3)
    slots.buffers.give_back(new_buffer(slots.layout, 2, 3), NO_TICKS)
    slots.free()
    slots.buffers.give_back(buffer, NO_TICKS)
    assert not any(slots.buffers.by_size.values())


def test_what_comes_back_while_the_memory_is_freed_is_not_kept(slots: SlotTensor) -> None:
    slots.buffers.give_back(new_buffer(slots.layout, 2, 3), NO_TICKS)
    known = slots.buffers.by_size[size_of(6)]

    class Late(list[Any]):
        """The memory is freed between the look at the list and the append."""

        def append(self, item: object) -> None:
            slots.free()
            super().append(item)

    slots.buffers.by_size[size_of(6)] = slots.buffers._by_shape[2][3] = late = Late(known)
    slots.buffers.give_back(new_buffer(slots.layout, 2, 3), NO_TICKS)
    assert not late


def test_buffers_of_few_sizes_are_kept(slots: SlotTensor) -> None:
    sizes = sorted({size_of(tokens) for tokens in range(1, 200)})
    for batch in sizes[: MAX_SIZES + 4]:
        for _ in range(6):
            slots.buffers.give_back(new_buffer(slots.layout, batch, 1), NO_TICKS)
    assert len(slots.buffers.by_size) == MAX_SIZES
    assert {len(free) for free in slots.buffers.by_size.values()} == {4}


def test_shapes_that_are_looked_up_are_bounded(slots: SlotTensor) -> None:
    buffers = slots.buffers
    for _ in range(2):
        for columns in range(1, 3 * MAX_SHAPES):
            buffer, _ = buffers.take(1, columns)
            assert buffer.shape[3] == columns
            buffers.give_back(buffer, NO_TICKS)
            assert sum(map(len, buffers._by_shape.values())) <= MAX_SHAPES
    assert len(buffers.by_size) == MAX_SIZES
    of_shapes = [free for of_batch in buffers._by_shape.values() for free in of_batch.values()]
    assert all(any(free is known for known in buffers.by_size.values()) for free in of_shapes)


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
    assert len(slots.buffers.by_size[size_of(2)]) <= 4


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
    assert not any(second.by_size.values())
