"""What callers can do to the memory that compiled code looks at: each call ends as it does without compiled code."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any
from weakref import ref

import numpy as np
import pytest
import torch
from torch import Tensor

from concurrent_kv import DropAndCorrect, DropLazily, KeysValues, KVLayout, KVPool, KVStorage, PositionSteps
from concurrent_kv.device.buffers import new_buffer
from concurrent_kv.errors import InvalidArgumentError
from concurrent_kv.native import native
from tests.conftest import MakePool
from tests.native_support import needs_native
from tests.simulated.backend import SimStreams
from tests.simulated.fixtures import gpu as gpu
from tests.simulated.gpu import SimGPU
from tests.support import HANG_SECONDS, LAYOUT, WINDOW, OperatorCalls

pytestmark = pytest.mark.usefixtures("loops")

ONE_NUMBER = KVLayout(1, 1, 1, 8)
TWO_NUMBERS = KVLayout(1, 1, 2, 4)


def pool_with(pool: KVPool, length: int) -> KVPool:
    layout = pool.layout
    pool.put("a", KeysValues.from_packed(torch.zeros(2, 1, 1, length, layout.head_dim)))
    return pool


def committed(pool: KVPool, tokens: int, overflow: DropAndCorrect | DropLazily) -> list[float]:
    """The numbers of an entry after so many tokens of zeros."""
    with pool.gather(["a"]) as batch:
        batch.advance(tokens)
        batch.data[:, :, :, batch.start :] = 0
        pool.commit(["b"], batch, overflow=overflow)
    found = pool.get("b")
    assert found is not None
    return [float(number) for number in found.keys.flatten()]


@pytest.mark.parametrize(
    ("difference", "expected"),
    [
        (torch._neg_view(torch.ones(1, 2, 1, 3, 2)), -1.0),
        (torch._efficientzerotensor((1, 2, 1, 3, 2)), 0.0),
        (torch.nn.Parameter(torch.ones(1, 2, 1, 3, 2)), 1.0),
        (torch.ones(1, 1, 1, 1, 1).expand(1, 2, 1, 3, 2), 1.0),
    ],
    ids=["negative flag", "zeros without memory", "a subclass", "expanded"],
)
def test_a_difference_is_added_whatever_its_memory_is_like(
    make_pool: MakePool, difference: Tensor, expected: float
) -> None:
    pool = pool_with(make_pool(8, TWO_NUMBERS), 3)
    assert committed(pool, 1, DropAndCorrect(4, 1, difference, TWO_NUMBERS)) == [expected] * 6
    steps = PositionSteps(TWO_NUMBERS, 1, difference)
    assert committed(pool, 1, DropLazily(4, 1, steps)) == [expected] * 6


@pytest.mark.parametrize("covered", [1, 2])
def test_a_difference_for_fewer_tokens_than_a_row_keeps_is_refused(make_pool: MakePool, covered: int) -> None:
    pool = pool_with(make_pool(8, ONE_NUMBER), 1 + covered)
    overflow = DropAndCorrect(2 + covered, 2, torch.ones(1, 2, 1, covered, 1), ONE_NUMBER)
    with pytest.raises(InvalidArgumentError, match=rf"overflow.difference must cover the {1 + covered} tokens"):
        committed(pool, 2, overflow)
    assert "b" not in pool


def grown(out: Tensor) -> None:
    out.data = torch.ones(2, 1, 1, 8, 2)


def without_heads(out: Tensor) -> None:
    out.data = torch.ones(2, 1, 8, 64)


@pytest.mark.parametrize("change", [grown, without_heads])
def test_a_buffer_that_got_other_memory_is_not_read_beyond_it(
    make_pool: MakePool, change: Callable[[Tensor], None]
) -> None:
    layout = KVLayout(1, 64, 1, 8)
    pool = make_pool(4, layout)
    pool.put("a", KeysValues.from_packed(torch.ones(2, 1, 64, 3, 1)))
    out = torch.zeros(2, 1, 64, 8, 1)
    batch = pool.gather(["a"], out=out)
    batch.advance(1)
    change(out)
    with pytest.raises((RuntimeError, IndexError, ValueError)):
        pool.commit(["b"], batch)
    batch.close()
    assert "b" not in pool


def test_a_buffer_that_got_numbers_of_another_type_is_stored_as_its_numbers(make_pool: MakePool) -> None:
    layout = KVLayout(1, 2, 3, 8)
    pool = make_pool(4, layout)
    pool.put("a", KeysValues.from_packed(torch.ones(2, 1, 2, 3, 3)))
    out = torch.zeros(2, 1, 2, 8, 3)
    batch = pool.gather(["a"], out=out)
    batch.advance(1)
    out.data = torch.full((2, 1, 2, 8, 3), 2.5, dtype=torch.float64)
    pool.commit(["b"], batch)
    found = pool.get("b")
    assert found is not None
    assert found.keys[0, 0, 0].tolist() == [[1.0] * 3] * 3 + [[2.5] * 3]


@needs_native
def test_others_run_while_a_large_copy_is_made() -> None:
    slots, batch, tables = (
        np.zeros((2, 3, 1 << 22), np.uint8),
        np.zeros((2, 2, 1 << 22), np.uint8),
        native.Tables(2, 1),
    )
    shape = (2, 3, 1, 1 << 22)
    rows, _ = tables.enter([0, 0], [0, 0], [1, 1], range(1, 3), np.arange(2))
    addresses = slots.ctypes.data, batch.ctypes.data
    asked, done, over = threading.Event(), threading.Event(), threading.Event()

    def answer() -> None:
        while asked.wait(HANG_SECONDS) and not over.is_set():
            asked.clear()
            done.set()

    other = threading.Thread(target=answer)
    other.start()
    interval, seen = sys.getswitchinterval(), False
    try:
        sys.setswitchinterval(1000.0)  # nobody runs but where somebody lets go of the interpreter
        for _ in range(200):
            done.clear()
            asked.set()
            native.gather(addresses[0], shape, addresses[1], len(rows), 1, 1, 1, tables, rows)
            seen = done.is_set()
            if seen:
                break
            done.wait(HANG_SECONDS)
    finally:
        sys.setswitchinterval(interval)
        over.set()
        asked.set()
        other.join(HANG_SECONDS)
    assert seen, "nobody else ran during copies of 16 MiB"


@needs_native
def test_compiled_code_does_not_copy_past_the_streams_of_a_device(gpu: SimGPU) -> None:
    storage = KVStorage(LAYOUT, 8, headroom_slots=WINDOW, backend=SimStreams(gpu, 0))
    with OperatorCalls() as calls:
        storage.tensor.gather(storage.ledger.tables, [0], 1, new_buffer(storage.tensor.layout, 1, 1))
    assert "aten.index_select" in [name.rsplit(".", 1)[0] for name in calls.names]


@needs_native
@pytest.mark.parametrize("kind", ["gather", "scatter"])
def test_a_copy_under_way_keeps_the_slots_that_another_thread_frees(kind: str) -> None:
    storage = KVStorage(LAYOUT, 8, headroom_slots=8)
    tensor, compiled = storage.tensor, storage.tensor._native
    if compiled is None:
        pytest.skip("torch keeps what it copies")
    alive = ref(tensor.data)
    seen: list[bool] = []

    class Freed:
        def __getattr__(self, name: str) -> Any:
            def overtaken(*arguments: Any) -> Any:
                tensor.free()
                seen.append(alive() is not None)
                return getattr(compiled, name)(*arguments)

            return overtaken

    tensor._native = Freed()
    out = new_buffer(tensor.layout, 1, 2)
    if kind == "gather":
        tensor.gather(storage.ledger.tables, [0], 1, out)
    else:
        at = np.zeros(1, dtype=np.int64)
        tensor.scatter(out, at, at, range(1, 2))
    assert seen == [True]
    assert alive() is None
