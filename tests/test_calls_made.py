"""Functions of the package that one operation of a pool calls in its steady state: a cost that no machine changes."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import ParamSpec, TypeVar

import anyio
import pytest
import torch

import concurrent_kv
from concurrent_kv import AsyncKVCacheManager, Batch, KeysValues, KVCacheManager, KVLayout, KVPool

P = ParamSpec("P")
R = TypeVar("R")
PACKAGE = os.path.dirname(os.path.abspath(concurrent_kv.__file__)) + os.sep
ROWS, LAYERS = 8, 2
SIZES = {"num_layers": LAYERS, "num_heads": 2, "embed_dim": 8, "context_length": 16}
CONFIG = {**SIZES, "num_simulations": 4, "max_cache_size": 100, "device": "cpu"}
# As CPython 3.11 counts: from 3.12 on a comprehension is no call. A change that needs fewer lowers the bound.
AT_MOST = {
    "compiled": {"get": 16, "put": 39, "gather": 18, "commit": 61, "append": 6, "search": 17, "close": 8},
    "torch": {"get": 33, "put": 92, "gather": 49, "commit": 148, "append": 11, "search": 49, "close": 9},
}
# A coroutine that goes on after its loop's turn counts as called again.
AWAITED_AT_MOST = {
    "compiled": {"get": 25, "get_or_compute": 28, "put": 53, "gather": 29, "search": 31},
    "torch": {"get": 42, "get_or_compute": 45, "put": 110, "gather": 60, "search": 62},
}


def functions_called(operation: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> tuple[R, Counter[str]]:
    """What `operation` returns, and how often it calls each function of the package, in this thread."""
    with counting() as called:
        result = operation(*args, **kwargs)
    return result, called


@contextmanager
def counting() -> Iterator[Counter[str]]:
    """How often this thread calls each function of the package meanwhile."""
    called: Counter[str] = Counter()

    def note(frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            called[f"{frame.f_code.co_filename.removeprefix(PACKAGE)}:{frame.f_code.co_name}"] += 1

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        yield called
    finally:
        sys.setprofile(before)


def steady(kind: str) -> Counter[str]:
    """The functions called by the fourth of four equal operations."""
    layout = KVLayout(LAYERS, 2, 4, 16)
    called: Counter[str] = Counter()
    with KVPool(layout, 64) as pool:
        tokens = KeysValues.from_packed(torch.ones(2 * LAYERS, 1, 2, 4, 4))
        for row in range(ROWS):
            pool.put(row, tokens)
        new = torch.ones(ROWS, 2, 1, 4)
        for _ in range(4):
            if kind == "get":
                _, called = functions_called(pool.get, 0)
                continue
            if kind == "put":
                _, called = functions_called(pool.put, 0, tokens)
                continue
            batch, called = functions_called(pool.gather, list(range(ROWS)))
            for layer in range(LAYERS):
                _, appended = functions_called(batch.append, layer, new, new)
            if kind == "commit":
                children = [("child", row) for row in range(ROWS)]
                _, called = functions_called(pool.commit, children, batch)
            _, closed = functions_called(batch.close)
            called = {"append": appended, "close": closed}.get(kind, called)
        pool.check_integrity()
    return called


def steady_in_a_search() -> Counter[str]:
    """The functions called by the gather of a search's fourth step, of entries of its own."""
    new = torch.ones(ROWS, 2, 1, 4)
    called: Counter[str] = Counter()
    with KVCacheManager(CONFIG, ROWS) as manager:
        for row in range(ROWS):
            manager.set_init_cache(row, (0, row), KeysValues.from_packed(torch.ones(2 * LAYERS, 1, 2, 4, 4)))
        envs = tuple(range(ROWS))
        with manager.search(envs) as search:
            for step in range(4):
                batch, called = functions_called(search.gather, [(step, row) for row in range(ROWS)], envs)
                for layer in range(LAYERS):
                    batch.append(layer, new, new)
                search.commit([(step + 1, row) for row in range(ROWS)], batch)
        manager.check_integrity()
    return called


async def steady_in_a_task(kind: str) -> Counter[str]:
    """The functions called by the fourth of four equal operations of a task, on the loop's own thread."""
    tokens = KeysValues.from_packed(torch.ones(2 * LAYERS, 1, 2, 4, 4))
    envs = keys = tuple(range(ROWS))
    called: Counter[str] = Counter()
    async with AsyncKVCacheManager(config=CONFIG, env_num=ROWS) as manager, manager.search(envs) as search:
        pool = manager.wm_pool
        for row in keys:
            await pool.put(row, tokens)
            await manager.set_init_cache(row, row, tokens)
        operations: dict[str, Callable[[], Awaitable[object]]] = {
            "get": lambda: pool.get(0),
            "get_or_compute": lambda: pool.get_or_compute(0, lambda: tokens),
            "put": lambda: pool.put(0, tokens),
            "gather": lambda: pool.gather(keys),
            "search": lambda: search.gather(keys, envs),
        }
        for _ in range(4):
            with counting() as called:
                result = await operations[kind]()
            if isinstance(result, Batch):
                result.close()
        assert manager.offload_stats().worker_count == 0
    return called


@pytest.mark.parametrize("kind", AWAITED_AT_MOST["torch"])
def test_an_awaited_operation_calls_no_more_functions_than_it_did(loops: str, kind: str) -> None:
    called = anyio.run(steady_in_a_task, kind)
    assert sum(called.values()) <= AWAITED_AT_MOST[loops][kind], called


@pytest.mark.parametrize("kind", AT_MOST["torch"])
def test_an_operation_calls_no_more_functions_than_it_did(loops: str, kind: str) -> None:
    called = steady_in_a_search() if kind == "search" else steady(kind)
    assert sum(called.values()) <= AT_MOST[loops][kind], called
