"""Calls inside a function that `torch.compile` compiles: its graph breaks there, and everything works."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from concurrent_kv import (
    DropAndCorrect,
    DropLazily,
    DropOldest,
    KeysValues,
    KVCacheManager,
    KVPool,
    PositionSteps,
    hash_state,
)
from concurrent_kv.device.graphs import FOLDER
from tests.support import LAYOUT, WINDOW, assert_same, config, packed, tokens
from tests.test_travelling_errors import modules

DIFFERENCE = torch.ones(2, 2, 2, WINDOW, 3)
OVERFLOWS = {
    "none": None,
    "oldest": DropOldest(7, 2),
    "correct": DropAndCorrect(7, 2, DIFFERENCE, LAYOUT),
    "lazily": DropLazily(7, 2, PositionSteps(LAYOUT, 2, DIFFERENCE)),
}


@pytest.fixture(autouse=True)
def compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class World:
    """A pool, a manager, and what a model does with them between two lines of its own."""

    def __init__(self) -> None:
        self.pool = KVPool(LAYOUT, 4)
        self.pool.put("a", tokens(1, 3))
        self.manager = KVCacheManager(config(), 2)
        self.manager.set_init_cache(0, "root", tokens(1, 5))

    def check(self) -> None:
        for owner in (self.pool, self.manager):
            owner.check_integrity()
            owner.close()


def steps(batch: Any, x: Tensor) -> Tensor:
    new = x[:1, 0, :, :2] * 2
    for layer in range(2):
        keys, values = batch.append(layer, new, new + 1)
    return torch.add(keys, values)


def put(world: World, x: Tensor) -> Tensor:
    y = x * 2
    world.pool.put("b", KeysValues.from_packed(y))
    return y + 1


def get(world: World, x: Tensor) -> Tensor:
    found = world.pool.get("a")
    assert found is not None
    return found.keys.sum() + x


def get_or_compute(world: World, x: Tensor) -> Tensor:
    return world.pool.get_or_compute("new", lambda: KeysValues.from_packed(x * 3)).keys + 1


def commit(world: World, x: Tensor) -> Tensor:
    batch = world.pool.gather(["a"])
    seen = steps(batch, x) + 1
    world.pool.commit(["c"], batch)
    return seen


def gather_into(world: World, x: Tensor) -> Tensor:
    out = torch.zeros(4, 1, 2, WINDOW, 3)
    with world.pool.gather(["a"], out=out):
        return torch.add(out, x[:, :, :, :1])


def search(world: World, x: Tensor) -> Tensor:
    opened = world.manager.search([0])
    batch = opened.gather(["root"], [0])
    seen = steps(batch, x)
    opened.commit(["child"], batch)
    opened.promote("child", 0)
    opened.close()
    return seen - 1


def search_in_a_with(world: World, x: Tensor) -> Tensor:
    with world.manager.search([0]) as opened:
        with opened.gather(["root"], [0]) as batch:
            seen = steps(batch, x)
            opened.commit(["child"], batch)
        return seen * 2


def fill(world: World, x: Tensor) -> Tensor:
    batch = world.pool.gather(["missing"])
    batch.fill(0, KeysValues.from_packed(x))
    seen = steps(batch, x) * batch.lengths[0]
    world.pool.commit(["filled"], batch)
    return seen + batch.padding


def pin(world: World, x: Tensor) -> Tensor:
    pinned = world.pool.pin("a")
    seen = pinned.get().keys.sum() + x
    pinned.close()
    return seen


def the_rest(world: World, x: Tensor) -> Tensor:
    y = x + 1
    pool = world.pool
    pool.put_many(["p"], KeysValues.from_packed(y))
    assert pool.contains("p")
    assert len(pool.keys()) == len(pool) == pool.stats().entries
    pool.peek("p")
    pool.pop("p")
    pool.try_claim("q").abandon()
    pool.clear()
    pool.bump_version()
    pool.put(hash_state(y), KeysValues.from_packed(y))
    return y * 2


CALLERS: tuple[Callable[[World, Tensor], Tensor], ...] = (
    put,
    get,
    get_or_compute,
    commit,
    gather_into,
    search,
    search_in_a_with,
    fill,
    pin,
    the_rest,
)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("caller", CALLERS, ids=lambda caller: caller.__name__)
def test_a_compiled_function_may_call_it(caller: Callable[[World, Tensor], Tensor], dynamic: bool) -> None:
    compiled = torch.compile(caller, backend="eager", dynamic=dynamic)
    for length in (2, 4):
        world, plain = World(), World()
        x = packed(tokens(3, length))
        assert torch.equal(compiled(world, x), caller(plain, x))
        assert sorted(map(str, world.pool.keys())) == sorted(map(str, plain.pool.keys()))
        for key in world.pool:
            seen = world.pool.get(key)
            assert seen is not None
            assert_same(plain.pool.get(key), seen)
        world.check()
        plain.check()


@pytest.mark.parametrize("overflow", OVERFLOWS.values(), ids=OVERFLOWS)
def test_a_compiled_model_may_append_and_commit(overflow: Any) -> None:
    def step(world: World, x: Tensor) -> Tensor:
        with world.manager.search([0], overflow=overflow) as opened:
            with opened.gather(["root"], [0]) as batch:
                seen = steps(batch, x)
                opened.commit(["child"], batch)
            return seen

    world, plain = World(), World()
    x = packed(tokens(3, 2))
    assert torch.equal(torch.compile(step, backend="eager")(world, x), step(plain, x))
    world.check()
    plain.check()


def test_what_a_user_computes_is_compiled_all_the_same(pool: KVPool) -> None:
    compiled: list[bool] = []

    def compute() -> KeysValues:
        compiled.append(torch.compiler.is_compiling())
        return tokens(1, 3)

    def caller(x: Tensor) -> Tensor:
        return pool.get_or_compute("key", compute).keys + x

    torch.compile(caller, backend="eager")(torch.ones(1))
    assert len(compiled) == 1


def test_no_function_of_the_package_is_wrapped_or_left_unmarked() -> None:
    """A mark costs a call nothing, a wrapper does. The doors are all public functions, the rooms all code."""
    unmarked = []
    for module in modules():
        for value in vars(module).values():
            if getattr(value, "__module__", None) != module.__name__:
                continue
            for member in vars(value).values() if inspect.isclass(value) else (value,):
                is_ours = isinstance(member, types.FunctionType) and member.__code__.co_filename.startswith(FOLDER)
                if is_ours and not getattr(member, "_torchdynamo_disable", False):
                    unmarked.append(f"{module.__name__}.{member.__qualname__}")
    assert not unmarked
