"""`DropLazily(PositionSteps)` without the compiled module: by numpy on a host, by torch elsewhere, the same bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from concurrent_kv import DropLazily, KeysValues, KVLayout, KVPool, PositionSteps
from concurrent_kv.device.tensors import DROPS_AT_ONCE, SlotTensor
from tests.support import OperatorCalls, bits

pytestmark = pytest.mark.usefixtures("torch_loops")

LAYERS, HEADS, HEAD_DIM, BATCH = 2, 2, 3, 3
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def steps_of(window: int, count: int, dtype: torch.dtype) -> PositionSteps:
    chance = torch.Generator().manual_seed(window)
    difference = torch.randn(LAYERS, 2, HEADS, window, HEAD_DIM, generator=chance).to(dtype)
    return PositionSteps(KVLayout(LAYERS, HEADS, HEAD_DIM, window, dtype), count, difference)


def one_by_one(data: Tensor, moved: np.ndarray, positions: np.ndarray, steps: PositionSteps) -> Tensor:
    """Every token by itself, a difference after the other."""
    data = data.clone()
    for row, column in np.argwhere(moved > 0):
        for at in range(
            positions[row, column] + moved[row, column] - steps.count, positions[row, column] - 1, -steps.count
        ):
            data[:, row, :, column] += steps.packed[:, at]
    return data


@settings(max_examples=60, deadline=None)
@given(data=st.data(), window=st.integers(2, 24), count=st.integers(1, 3), dtype=st.sampled_from(DTYPES))
def test_tokens_are_owed_each_drops_difference_in_turn_bit_for_bit(
    data: st.DataObject, window: int, count: int, dtype: torch.dtype
) -> None:
    steps = steps_of(window, count, dtype)
    positions = np.array(
        [data.draw(st.lists(st.integers(0, window - 1), min_size=window, max_size=window)) for _ in "abc"]
    )
    drops = np.array([data.draw(st.lists(st.integers(0, 24), min_size=window, max_size=window)) for _ in "abc"])
    moved = np.minimum(drops, (window - 1 - positions) // count) * count
    batch = torch.randn(2 * LAYERS, BATCH, HEADS, window, HEAD_DIM).to(dtype)
    expected = one_by_one(batch, moved, positions, steps)
    for on_host in (True, False):
        out = batch.clone()
        SlotTensor(steps.layout, 1, compiled=on_host).correct_stepwise(out, moved, positions, steps)
        assert torch.equal(bits(out), bits(expected)), f"by {'numpy' if on_host else 'torch'}"


def gathers(window: int, *, on_host: bool) -> tuple[int, int]:
    """Operator calls of a gather before and after rows have dropped as often as they can."""
    layout = KVLayout(LAYERS, HEADS, HEAD_DIM, window)
    overflow = DropLazily(window - 1, 2, steps_of(window, 2, torch.float32))
    pool = KVPool(layout, 16, max_slots=16 * window)
    pool.storage.tensor._on_host = on_host
    for key in range(BATCH):
        pool.put(key, KeysValues.from_packed(torch.randn(2 * LAYERS, 1, HEADS, window - 3, HEAD_DIM)))
    counted = []
    for drops in (0, window):
        for _ in range(drops):
            batch = pool.gather(range(BATCH))
            new = torch.randn(LAYERS, BATCH, HEADS, 2, HEAD_DIM)
            batch.append_layers(new, new)
            pool.commit(range(BATCH), batch, overflow=overflow)
        pool.gather(range(BATCH)).close()
        with OperatorCalls() as calls:
            pool.gather(range(BATCH)).close()
        free = (
            "aten.view",
            "aten.unsqueeze",
            "aten.detach",
            "aten.lift_fresh",
            "aten.alias",
            "aten.empty",
            "aten.split",
        )
        counted.append(len([name for name in calls.names if not name.startswith(free)]))
    pool.check_integrity()
    return counted[0], counted[1]


@pytest.mark.parametrize("window", [8, 48, 162])
def test_on_a_host_a_gather_of_moved_tokens_makes_no_operator_call_more(window: int) -> None:
    plain, owed = gathers(window, on_host=True)
    assert owed == plain


@pytest.mark.parametrize("window", [8, 48])
def test_elsewhere_it_makes_one_for_each_drop_and_one_for_every_few(window: int) -> None:
    plain, owed = gathers(window, on_host=False)
    most = window // 2 - 1  # drops that a token can outlive
    assert owed - plain == most + -(-most // DROPS_AT_ONCE)


def test_where_streams_are_simulated_torch_does_it_on_a_cpu_too() -> None:
    steps = steps_of(8, 2, torch.float32)
    positions = np.zeros((1, 8), dtype=np.int64)
    with OperatorCalls() as calls:
        SlotTensor(steps.layout, 1, compiled=False).correct_stepwise(
            torch.zeros(2 * LAYERS, 1, HEADS, 8, HEAD_DIM), positions + 2, positions, steps
        )
    assert any(name.startswith("aten.index_select") for name in calls.names)
