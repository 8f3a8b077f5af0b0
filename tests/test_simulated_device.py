"""The simulated device itself: what is late, what keeps an order, and when memory is garbage."""

from __future__ import annotations

import pytest
import torch

from tests.simulated.fixtures import gpu as gpu
from tests.simulated.gpu import SimGPU
from tests.simulated.queues import Event, SimStream

ONES, TWOS, THREES = (torch.full((3,), float(number)) for number in (1, 2, 3))


def run(gpu: SimGPU, *streams: SimStream) -> None:
    """Run all that these streams can do, one after the other, and then the rest."""
    for stream in streams:
        while gpu.queues.can_run(stream):
            gpu.queues.run_next(stream)
    gpu.queues.run_until(lambda: gpu.queues.idle)


def numbers(gpu: SimGPU, tensor: torch.Tensor) -> list[float]:
    found: list[float] = gpu.read(tensor).tolist()
    return found


def on_device(gpu: SimGPU, tensor: torch.Tensor, *, stream: int = 0) -> torch.Tensor:
    """A copy on device 0, made and finished on a stream."""
    with gpu.use(gpu.stream(stream)):
        made = tensor.to(gpu.devices[0])
    run(gpu)
    return made


def test_an_operator_runs_late_and_memory_is_garbage_until_then(gpu: SimGPU) -> None:
    total = on_device(gpu, ONES) + on_device(gpu, TWOS)
    assert 3.0 not in numbers(gpu, total)
    run(gpu)
    assert numbers(gpu, total) == [3.0] * 3


def test_a_stream_runs_its_work_in_order(gpu: SimGPU) -> None:
    number = on_device(gpu, ONES)
    number.mul_(5)
    number.add_(1)
    run(gpu)
    assert numbers(gpu, number) == [6.0] * 3


@pytest.mark.parametrize(("first", "result"), [(1, 6.0), (2, 10.0)])
def test_streams_run_in_any_order(gpu: SimGPU, first: int, result: float) -> None:
    number = on_device(gpu, ONES)
    with gpu.use(gpu.stream(1)):
        number.mul_(5)
    with gpu.use(gpu.stream(2)):
        number.add_(1)
    run(gpu, gpu.stream(first))
    assert numbers(gpu, number) == [result] * 3


def test_a_wait_holds_a_stream_back_until_its_event(gpu: SimGPU) -> None:
    number, event = on_device(gpu, ONES), Event()
    with gpu.use(gpu.stream(1)):
        number.mul_(5)
    gpu.queues.record(gpu.stream(1), event)
    gpu.queues.wait(gpu.stream(2), event)
    with gpu.use(gpu.stream(2)):
        number.add_(1)
    assert not gpu.queues.can_run(gpu.stream(2))
    run(gpu, gpu.stream(2))
    assert numbers(gpu, number) == [6.0] * 3


def test_a_wait_is_for_what_its_event_was_when_it_was_made(gpu: SimGPU) -> None:
    number, event = on_device(gpu, ONES), Event()
    gpu.queues.record(gpu.stream(1), event)
    gpu.queues.wait(gpu.stream(2), event)
    with gpu.use(gpu.stream(1)):
        number.mul_(5)
    gpu.queues.record(gpu.stream(1), event)  # recorded anew: the wait does not follow it
    with gpu.use(gpu.stream(2)):
        number.add_(1)
    run(gpu, gpu.stream(2))
    assert numbers(gpu, number) == [10.0] * 3


def test_what_the_host_asks_for_is_waited_for(gpu: SimGPU) -> None:
    number = ONES.to(gpu.devices[0]) * 5
    assert bool((number == 5).all())
    target = torch.empty(3)
    target.copy_(number + 1)
    assert target.tolist() == [6.0] * 3


def test_pageable_memory_is_read_at_once_and_pinned_memory_late(gpu: SimGPU) -> None:
    pageable, pinned = ONES.clone(), gpu.pinned(ONES)
    copies = [source.to(gpu.devices[0], non_blocking=True) for source in (pageable, pinned)]
    pageable.fill_(2)
    pinned.fill_(2)
    run(gpu)
    assert [numbers(gpu, copy) for copy in copies] == [[1.0] * 3, [2.0] * 3]


@pytest.mark.parametrize("torchs", [True, False])
def test_only_torchs_pinned_memory_outlives_a_copy_from_it(gpu: SimGPU, torchs: bool) -> None:
    pinned = gpu.pinned(ONES, torchs=torchs)
    copy = pinned.to(gpu.devices[0], non_blocking=True)
    del pinned
    run(gpu)
    assert (numbers(gpu, copy) == [1.0] * 3) is torchs


def test_freed_memory_is_used_again_behind_the_work_of_its_own_stream_only(gpu: SimGPU) -> None:
    source = on_device(gpu, ONES, stream=1)
    with gpu.use(gpu.stream(1)):
        here = source.clone()
    with gpu.use(gpu.stream(2)):
        elsewhere = source.clone()
    del source
    run(gpu, gpu.stream(1))
    assert numbers(gpu, here) == [1.0] * 3
    assert 1.0 not in numbers(gpu, elsewhere)


def test_memory_that_a_view_names_is_not_freed(gpu: SimGPU) -> None:
    source = on_device(gpu, ONES)
    view = source[1:]
    del source
    run(gpu)
    assert numbers(gpu, view) == [1.0] * 2


def test_a_stream_that_the_allocator_was_told_of_is_waited_for_and_holds_nobody_up(gpu: SimGPU) -> None:
    source = on_device(gpu, ONES, stream=1)
    with gpu.use(gpu.stream(2)):
        copy = source.clone()
    gpu.protect(source, gpu.stream(2))
    del source
    with gpu.use(gpu.stream(1)):
        other = TWOS.to(gpu.devices[0])
    assert gpu.queues.can_run(gpu.stream(1))
    run(gpu, gpu.stream(1))
    assert numbers(gpu, copy) == [1.0] * 3
    assert numbers(gpu, other) == [2.0] * 3


def test_memory_allocated_on_one_stream_and_first_written_on_another_becomes_garbage_late(gpu: SimGPU) -> None:
    """What `record_stream` does not help against: an earlier owner's work is still to come."""
    with gpu.use(gpu.stream(1)):
        buffer = torch.empty(3, device=gpu.devices[0])
    with gpu.use(gpu.stream(2)):
        buffer.fill_(1)
    gpu.protect(buffer, gpu.stream(2))
    run(gpu, gpu.stream(2))
    assert 1.0 not in numbers(gpu, buffer)


def test_a_copy_between_devices_comes_in_the_order_of_both_current_streams(gpu: SimGPU) -> None:
    with gpu.use(gpu.stream(1, 1), gpu.stream(2)):
        source = ONES.to(gpu.devices[1])
        there = torch.empty(3, device=gpu.devices[0]).copy_(source)
        there.add_(1)
    assert not gpu.queues.can_run(gpu.stream(0))
    run(gpu, gpu.stream(2))
    assert numbers(gpu, there) == [2.0] * 3


def test_tensors_of_two_devices_do_not_mix(gpu: SimGPU) -> None:
    with pytest.raises(RuntimeError, match="expected all tensors"):
        ONES.to(gpu.devices[0]) + ONES.to(gpu.devices[1])
    with pytest.raises(RuntimeError, match="expected all tensors"):
        ONES.to(gpu.devices[0]) + ONES


def test_an_index_out_of_range_is_a_fault_of_the_device(gpu: SimGPU) -> None:
    torch.index_select(on_device(gpu, ONES), 0, torch.tensor([7]).to(gpu.devices[0]))
    run(gpu)
    assert gpu.faults
    gpu.faults.clear()


def test_tensors_of_the_device_are_of_no_use_outside_of_it() -> None:
    with SimGPU() as gpu:
        tensor = ONES.to(gpu.devices[0])
    with pytest.raises(AssertionError, match="outside of the simulated device"):
        tensor.add_(1)
