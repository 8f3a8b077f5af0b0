"""A manager's operations work in the stream that they are given, from threads and from tasks."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch

from concurrent_kv import AsyncKVCacheManager, KeysValues, KVCacheManager
from tests.async_support import run_on
from tests.simulated.fixtures import gpu as gpu
from tests.simulated.gpu import SimGPU

NAMED: dict[str, Callable[[Any, KeysValues, Any], object]] = {
    "set_init_cache": lambda manager, kv, stream: manager.set_init_cache(0, "new", kv, stream=stream),
    "get_init_cache": lambda manager, kv, stream: manager.get_init_cache(0, "init", stream=stream),
    "set_recur_cache": lambda manager, kv, stream: manager.set_recur_cache("new", kv, stream=stream),
    "get_recur_cache": lambda manager, kv, stream: manager.get_recur_cache("recur", stream=stream),
    "set_wm_cache": lambda manager, kv, stream: manager.set_wm_cache("new", kv, stream=stream),
    "get_wm_cache": lambda manager, kv, stream: manager.get_wm_cache("wm", stream=stream),
    "hierarchical_get": lambda manager, kv, stream: manager.hierarchical_get(0, "recur", stream=stream),
}


def row(gpu: SimGPU, number: float) -> KeysValues:
    return KeysValues.from_packed(torch.full((2, 1, 1, 2, 1), number).to(gpu.devices[0]))


def run_device(gpu: SimGPU) -> None:
    gpu.queues.run_until(lambda: gpu.queues.idle)


def manager_on(gpu: SimGPU) -> KVCacheManager:
    config = {"num_layers": 1, "num_heads": 1, "embed_dim": 1, "context_length": 4, "num_simulations": 1}
    manager = KVCacheManager({**config, "max_cache_size": 4, "device": gpu.devices[0]}, 1, recur_slots=16)
    manager.set_init_cache(0, "init", row(gpu, 1.0))
    manager.set_recur_cache("recur", row(gpu, 2.0))
    manager.set_wm_cache("wm", row(gpu, 3.0))
    return manager


def streams_that_worked(gpu: SimGPU) -> set[str]:
    run_device(gpu)
    return {ran.partition(":")[0] for ran in gpu.queues.ran}


@pytest.mark.parametrize("operation", NAMED)
def test_an_operation_works_in_the_stream_that_it_is_given(gpu: SimGPU, operation: str) -> None:
    manager = manager_on(gpu)
    kv = row(gpu, 5.0)
    run_device(gpu)
    del gpu.queues.ran[:]
    assert NAMED[operation](manager, kv, gpu.stream(2)) is not None
    assert streams_that_worked(gpu) == {"2"}
    manager.check_integrity()
    manager.close()


@pytest.mark.parametrize("operation", NAMED)
def test_so_it_does_when_it_is_awaited(gpu: SimGPU, operation: str) -> None:
    manager = manager_on(gpu)
    kv = row(gpu, 5.0)
    run_device(gpu)
    del gpu.queues.ran[:]

    async def main() -> None:
        made = NAMED[operation](AsyncKVCacheManager(manager), kv, gpu.stream(2))
        assert inspect.isawaitable(made)
        assert await made is not None

    run_on("asyncio", main)
    assert streams_that_worked(gpu) == {"2"}
    manager.check_integrity()
    manager.close()


def test_a_search_works_in_the_streams_that_it_is_given(gpu: SimGPU) -> None:
    manager = manager_on(gpu)
    stream: Any = gpu.stream
    with manager.search([0]) as search:
        run_device(gpu)
        del gpu.queues.ran[:]
        batch = search.gather(["init"], [0], stream=stream(1))
        assert streams_that_worked(gpu) == {"1"}
        with gpu.use(stream(1)):
            batch.append(0, torch.ones(1, 1, 1, 1).to(gpu.devices[0]), torch.ones(1, 1, 1, 1).to(gpu.devices[0]))
        run_device(gpu)
        del gpu.queues.ran[:]
        search.commit(["child"], batch, stream=stream(3))
        assert streams_that_worked(gpu) == {"3"}
        assert gpu.current() is stream(0)
    manager.check_integrity()
    manager.close()


def test_what_was_set_in_one_stream_is_got_in_another(gpu: SimGPU) -> None:
    manager = manager_on(gpu)
    stream: Any = gpu.stream
    for number in (1, 2):
        with gpu.use(stream(number)):
            kv = row(gpu, number + 7.0)
        manager.set_recur_cache("recur", kv, stream=stream(number))
    found = manager.hierarchical_get(0, "recur", stream=stream(3))
    gpu.queues.run_until(lambda: gpu.queues.idle, [stream(3), stream(2), stream(1)])
    assert found is not None
    assert gpu.read(found.keys).unique().tolist() == [9.0]  # type: ignore[no-untyped-call]
    manager.check_integrity()
    manager.close()
