"""A host of whole numbers, and planners that search there: each answer is checked against what its path says."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from concurrent_kv import KeysValues, KVCacheManager
from concurrent_kv.cluster import Cluster, HostParts, SearchContext
from concurrent_kv.evaluation import Evaluated, Evaluator, JointBatch, Leaf, Walk
from tests.evaluating import HEAD_DIM, HEADS, LAYERS, MODULUS, NEW, WINDOW
from tests.support import HANG_SECONDS

ROOT_TOKENS = 3
OF_A_VALUE = 2 * LAYERS * HEADS * NEW * HEAD_DIM  # numbers that a leaf's tokens repeat its value


class LoadError(Exception):
    """Says its number, not what its constructor takes."""

    def __init__(self, number: int, word: str) -> None:
        super().__init__(f"{word} {number}")
        self.number = number


class Model:
    """What it says of a leaf depends on its path and on the weights, which are a number."""

    def __init__(self) -> None:
        self.weights = 0
        self.in_a_call: Callable[[], None] = lambda: None

    def load_state_dict(self, weights: int) -> None:
        if weights < 0:
            self.weights = weights  # half loaded
            raise LoadError(weights, "negative")
        self.weights = weights

    def __call__(self, batch: JointBatch, numbers: Sequence[int]) -> Evaluated[int]:
        self.in_a_call()
        totals = batch.data[:, : len(numbers), :, : batch.end].sum((0, 2, 3, 4)).tolist()
        values = [value_of(int(total), number, self.weights) for total, number in zip(totals, numbers, strict=True)]
        new = torch.zeros(batch.batch_size, HEADS, NEW, HEAD_DIM)
        for row, value in enumerate(values):
            new[row] = value
        for layer in range(LAYERS):
            batch.append(layer, new, new)
        return Evaluated(values)


def value_of(total: int, number: int, weights: int) -> int:
    return (total * 3 + number + weights) % MODULUS


def new_parts(envs: int) -> HostParts:
    torch.set_num_threads(1)
    config = {
        "num_layers": LAYERS,
        "num_heads": HEADS,
        "embed_dim": HEADS * HEAD_DIM,
        "context_length": WINDOW,
        "num_simulations": 8,
        "max_cache_size": 9 * envs,
        "device": "cpu",
    }
    manager = KVCacheManager(config, envs, init_entries=4, wait_timeout=HANG_SECONDS)
    model = Model()
    return HostParts(manager, Evaluator(manager, model, room=NEW, timeout=HANG_SECONDS), model)


def setup(envs: int = 8) -> Callable[[], HostParts]:
    return partial(new_parts, envs)


class Found(NamedTuple):
    """What a search returns."""

    host: str
    local_id: int
    version: int
    weights: int
    values: tuple[int, ...]
    root_was_there: bool
    pid: int


def root_of(env_id: int) -> int:
    """What each number of an environment's root is."""
    return env_id % 7 + 1


def plan(context: SearchContext, steps: int = 4) -> Found:
    """A whole search: a chain of leaves below the root, which is computed where it is a miss."""
    return _plan(context, steps, lambda step: None)


def _plan(context: SearchContext, steps: int, at: Callable[[str], None]) -> Found:
    at("start")
    env_id: Any = context.env_id
    pool = context.manager.init_pools[context.local_id]
    key = ("root", env_id)
    root_was_there = pool.contains(key)
    if not root_was_there:
        packed = torch.full((2 * LAYERS, 1, HEADS, ROOT_TOKENS, HEAD_DIM), float(root_of(env_id)))
        pool.put(key, KeysValues.from_packed(packed), side=("of", env_id))
    assert pool.side(key) == ("of", env_id)
    context.model.in_a_call = lambda: at("between gather and commit")
    with context.manager.search([context.local_id]) as search:
        values = context.evaluator.run(_chain(search, context, key, steps, at))
    at("before the answer")
    return Found(
        context.host, context.local_id, context.version, context.model.weights, values, root_was_there, os.getpid()
    )


def _chain(
    search: Any, context: SearchContext, parent: Any, steps: int, at: Callable[[str], None]
) -> Walk[int, int, tuple[int, ...]]:
    values = []
    for step in range(steps):
        child = (context.env_id, step)
        values.append((yield Leaf(search, parent, child, step, context.local_id)))
        at("after commit")
        parent = child
    return tuple(values)


def expected(env_id: int, weights: int = 0, steps: int = 4) -> tuple[int, ...]:
    """The values of `plan`."""
    total, values = root_of(env_id) * 2 * LAYERS * HEADS * ROOT_TOKENS * HEAD_DIM, []
    for step in range(steps):
        values.append(value_of(total, step, weights))
        total += values[-1] * OF_A_VALUE
    return tuple(values)


def plan_between_loads(context: SearchContext, begun: Path, go_on: Path) -> Found:
    """As `plan`; but between its root and its search it waits for `go_on`, once."""
    env_id: Any = context.env_id
    packed = torch.full((2 * LAYERS, 1, HEADS, ROOT_TOKENS, HEAD_DIM), float(root_of(env_id)))
    pool = context.manager.init_pools[context.local_id]
    pool.put(("root", env_id), KeysValues.from_packed(packed), side=("of", env_id))
    if not begun.exists():
        begun.touch()
        until_there(go_on)
    with context.manager.search([context.local_id]) as search:
        values = context.evaluator.run(_chain(search, context, ("root", env_id), 4, lambda step: None))
    return Found(context.host, context.local_id, context.version, context.model.weights, values, False, os.getpid())


def store_what_cannot_travel(context: SearchContext) -> None:
    plan(context)
    packed = torch.ones(2 * LAYERS, 1, HEADS, ROOT_TOKENS, HEAD_DIM)
    pool = context.manager.init_pools[context.local_id]
    pool.put("other", KeysValues.from_packed(packed), side=threading.Lock())


STEPS = ("start", "between gather and commit", "after commit", "before the answer")


def dying(context: SearchContext, step: str, marker: Path) -> Found:
    """As `plan`; but at one of its steps its process is killed, if none was before."""

    def at(reached: str) -> None:
        if reached == step and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    return _plan(context, 4, at)


def always_dying(context: SearchContext) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class OddError(Exception):
    """Its constructor takes something else than what it keeps as `args`."""

    def __init__(self, code: int, *, reason: str) -> None:
        super().__init__(f"{reason}: {code}")
        self.code = code


def failing(context: SearchContext, code: int) -> None:
    raise OddError(code, reason="odd")


def refusing(context: SearchContext) -> None:
    raise TimeoutError("of the planner's own")


def counted_and_raising(context: SearchContext, ran: Path, error: BaseException) -> None:
    with ran.open("a") as file:
        file.write("x")
    raise error


class NotMadeHere:
    """Can be pickled, and not unpickled."""

    def __reduce__(self) -> Any:
        return refuse_to_be_made, ()


def refuse_to_be_made() -> None:
    raise LookupError("not made here")


def counted_with_a_result_that_cannot_be_made(context: SearchContext, ran: Path) -> NotMadeHere:
    with ran.open("a") as file:
        file.write("x")
    return NotMadeHere()


def exiting(context: SearchContext) -> None:
    raise SystemExit(3)


def waiting(context: SearchContext, begun: Path, go_on: Path) -> Found:
    """As `plan`, after a file is there."""
    begun.touch()
    until_there(go_on)
    return plan(context)


def grow_until(context: SearchContext, begun: Path, go_on: Path) -> Found:
    """A search whose first half comes before `go_on`, and its other half after."""
    if begun.exists():
        return plan(context)

    def at(reached: str) -> None:
        if reached == "after commit":
            begun.touch()
            until_there(go_on)

    return _plan(context, 4, at)


def until_there(path: Path) -> None:
    """Wait, within bounds, for another process to make a file."""
    until = time.monotonic() + HANG_SECONDS
    while not path.exists():
        if time.monotonic() > until:
            raise AssertionError(f"{path.name} was not there in time")
        time.sleep(0.005)


def touching(context: SearchContext, path: Path) -> None:
    path.touch()


def search_in_a_task(cluster: Cluster, env: int) -> Found:
    found: Found = cluster.search(env, plan)
    return found


class Player:
    """An actor that searches."""

    def __init__(self, cluster: Cluster, env: int) -> None:
        self.cluster, self.env = cluster, env

    async def search(self) -> Any:
        return await self.cluster.search_async(self.env, plan)


class Learner:
    """An actor whose weights a cluster loads."""

    def weights(self) -> int:
        return 13

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def envs_of(environments: dict[Any, str], host: str) -> Iterator[Any]:
    return (env_id for env_id, at in environments.items() if at == host)
