"""A model of whole numbers for evaluators: what it says of a leaf depends on its path alone, exactly."""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from concurrent_kv import KeysValues, KVCacheManager
from concurrent_kv.aio import evaluator as for_tasks
from concurrent_kv.evaluation import Evaluated, Evaluator, Leaf, Walk, queue
from concurrent_kv.evaluation import evaluator as for_threads
from concurrent_kv.pool.joint import JointBatch

LAYERS, HEADS, HEAD_DIM, WINDOW, NEW = 2, 2, 3, 64, 2
ENVS = 4
# Floats count whole numbers exactly up to 2 ** 24: of a path's longest row, all its numbers together stay below.
MODULUS = 97


def new_manager(*, simulations: int = 60, entries: int = 1000, **options: Any) -> KVCacheManager:
    """A manager whose init pools have a root of 3 tokens each, of value `env + 1`, under the key "root"."""
    config = {
        "num_layers": LAYERS,
        "num_heads": HEADS,
        "embed_dim": HEADS * HEAD_DIM,
        "context_length": WINDOW,
        "num_simulations": simulations,
        "max_cache_size": entries,
        "device": "cpu",
    }
    manager = KVCacheManager(config, ENVS, **options)
    for env in range(ENVS):
        packed = torch.full((2 * LAYERS, 1, HEADS, 3, HEAD_DIM), float(env + 1))
        manager.set_init_cache(env, "root", KeysValues.from_packed(packed))
    return manager


def root_sum(env: int) -> int:
    """What the tokens of a root add up to."""
    return (env + 1) * 2 * LAYERS * HEADS * 3 * HEAD_DIM


def value_after(total: int, number: int) -> tuple[int, int]:
    """What the model says of a leaf whose path adds up to `total`, and what its own path adds up to."""
    value = (total * 3 + number) % MODULUS
    return value, total + value * 2 * LAYERS * HEADS * NEW * HEAD_DIM


def model(batch: JointBatch, numbers: Sequence[int]) -> Evaluated[int]:
    """See `value_after`."""
    totals = batch.data[:, : len(numbers), :, : batch.end].sum((0, 2, 3, 4)).tolist()
    values = [value_after(int(total), number)[0] for total, number in zip(totals, numbers, strict=True)]
    new = torch.zeros(batch.batch_size, HEADS, NEW, HEAD_DIM)
    for row, value in enumerate(values):
        new[row] = value
    for layer in range(LAYERS):
        batch.append(layer, new, new)
    return Evaluated(values, sides=[("side", value) for value in values])


def tree_walk(search: Any, env: int, seed: int, steps: int) -> Walk[int, int, int]:
    """Grows a random tree, compares each answer with what its path says, and returns its seed."""
    draw = random.Random(seed)
    totals: dict[Any, int] = {"root": root_sum(env)}
    for step in range(steps):
        parent = draw.choice(list(totals)[-4:])
        key, number = (env, seed, step), draw.randrange(90)
        value = yield Leaf(search, parent, key, number, env)
        expected, totals[key] = value_after(totals[parent], number)
        assert value == expected
    return seed


def look_every(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """How often whoever waits for an evaluator looks by itself."""
    for module in (queue, for_threads, for_tasks):
        monkeypatch.setattr(module, "LOOK_SECONDS", seconds)


def counted_now(evaluator: Evaluator[Any, Any]) -> tuple[int, ...]:
    """Rows and walks that can be led on, calls, workers, waiting workers, and those of them with rows, as counted."""
    waits: Any = evaluator.queue
    with waits._lock:
        waits._note_gone()  # which notes the workers that were dropped
        waiting = len(waits._rows) + len(waits._ready)
        return (waiting, *(len(each) for each in (waits._groups, waits._workers, waits._waiting, waits._queued)))


@contextmanager
def cheap_collections() -> Iterator[None]:
    """What is here before is no garbage, and need not be looked at by each collection."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
