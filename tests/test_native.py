"""The compiled functions leave the bytes that their counterparts in Python leave, and can be done without."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from concurrent_kv import KVLayout, PositionSteps
from concurrent_kv.device.buffers import new_buffer
from concurrent_kv.device.tensors import Indices, SlotTensor
from concurrent_kv.model.hashing import hash_states
from concurrent_kv.native import native
from tests.native_support import needs_native, random_bits, random_numbers, same_bits, without_native
from tests.support import HANG_SECONDS, NATIVE_USERS, tables_of

ROOT = Path(__file__).resolve().parent.parent
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LARGE = 1 << 18  # bytes from which on a copy lets go of the GIL

seeds = st.integers(0, 2**32 - 1)
layouts = st.builds(
    KVLayout,
    num_layers=st.integers(1, 3),
    num_heads=st.integers(1, 3),
    head_dim=st.sampled_from([1, 2, 3, 5, 8, 32, 64]),  # 128 and 256 bytes are copied by code of their own
    max_tokens=st.integers(1, 7),
    dtype=st.sampled_from(DTYPES),
)


def both(layout: KVLayout, num_slots: int, seed: int) -> tuple[SlotTensor, SlotTensor]:
    """Slots of the same random bits, with compiled code and without."""
    pair = SlotTensor(layout, num_slots), SlotTensor(layout, num_slots, compiled=False)
    stored = random_bits(seed, tuple(pair[0].data.shape), layout.dtype)
    stored[:, 0] = 0
    for tensor in pair:
        tensor.data.copy_(stored)
    return pair


# Hashes --------------------------------------------------------------------------------------------------------------


@needs_native
@pytest.mark.parametrize("length", range(201))
def test_hashes_of_every_short_length_are_those_of_xxhash(length: int) -> None:
    rows = np.random.default_rng(length).integers(0, 256, (3, length), dtype=np.uint8)
    expected = [xxhash.xxh64_hexdigest(row.tobytes()) for row in rows]
    assert native.hash_rows(rows, 3) == expected
    assert native.hash_memory(rows.ctypes.data, 3, length) == expected


@needs_native
@given(st.binary(max_size=5000), st.integers(0, 40))
def test_hashes_of_any_bytes_wherever_they_begin_are_those_of_xxhash(data: bytes, first: int) -> None:
    part = memoryview(data)[first:]
    expected = [xxhash.xxh64_hexdigest(part)]
    assert native.hash_rows(part, 1) == expected
    array = np.frombuffer(part, dtype=np.uint8)
    assert native.hash_memory(array.ctypes.data, 1, len(array)) == expected


@needs_native
@given(
    rows=st.integers(1, 5),
    columns=st.integers(0, 30),
    name=st.sampled_from(["float32", "float16", "float64", "uint8", "int64", "bool", "complex64", "int32"]),
    transposed=st.booleans(),
    seed=seeds,
)
def test_states_have_the_same_keys_either_way(rows: int, columns: int, name: str, transposed: bool, seed: int) -> None:
    shape = (columns, rows) if transposed else (rows, columns)
    numbers = np.random.default_rng(seed).integers(0, 200, shape).astype(name)
    array = numbers.T if transposed else numbers
    tensor = torch.from_numpy(numbers).T if transposed else torch.from_numpy(numbers)
    compiled = hash_states(array), hash_states(tensor)
    with pytest.MonkeyPatch.context() as patch:
        without_native(patch)
        assert (hash_states(array), hash_states(tensor)) == compiled
    assert compiled[0] == [xxhash.xxh64_hexdigest(row.tobytes()) for row in array]


# Copies --------------------------------------------------------------------------------------------------------------


@needs_native
@given(layout=layouts, num_slots=st.integers(1, 12), batch=st.integers(1, 5), seed=seeds, data=st.data())
def test_a_gather_is_the_same_bytes_either_way(
    layout: KVLayout, num_slots: int, batch: int, seed: int, data: st.DataObject
) -> None:
    window = layout.max_tokens
    compiled, plain = both(layout, num_slots, seed)
    end = data.draw(st.integers(0, window), "end")
    columns = data.draw(st.integers(max(1, end), window), "columns")
    lengths = data.draw(st.lists(st.integers(1, window), min_size=6, max_size=6), "lengths")
    random = np.random.default_rng(seed)
    tables = tables_of([random.integers(1, num_slots + 1, length).tolist() for length in lengths], num_slots, window)
    rows = data.draw(st.lists(st.integers(0, 6), min_size=batch, max_size=batch), "rows")
    whole = data.draw(st.booleans(), "whole")
    outs = [new_buffer(tensor.layout, batch, columns).fill_(7.0) for tensor in (compiled, plain)]
    compiled.gather(tables, rows, end, outs[0], whole=whole)
    plain.gather(tables, rows, end, outs[1], whole=whole)
    if not whole:
        assert (outs[0][:, :, :, end:] == 7.0).all()
    filled = columns if whole else end
    assert same_bits(outs[0][:, :, :, :filled], outs[1][:, :, :, :filled])


@needs_native
@given(
    layout=layouts,
    batch=st.integers(1, 4),
    columns=st.integers(1, 7),
    tokens=st.integers(0, 14),
    a_range=st.booleans(),
    seed=seeds,
)
def test_a_scatter_is_the_same_bytes_either_way(
    layout: KVLayout, batch: int, columns: int, tokens: int, a_range: bool, seed: int
) -> None:
    pair = both(layout, 20, seed)
    source = random_bits(seed + 1, tuple(new_buffer(pair[0].layout, batch, columns).shape), layout.dtype)
    rows, at, slots = picked(batch, columns, tokens, a_range, seed)
    for tensor in pair:
        tensor.scatter(source, rows, at, slots)
    assert same_bits(pair[0].data, pair[1].data)


def picked(batch: int, columns: int, tokens: int, a_range: bool, seed: int) -> tuple[Indices, Indices, range | Indices]:
    """Any tokens of a batch, and as many of 20 slots."""
    random = np.random.default_rng(seed)
    rows, at = random.integers(0, batch, tokens), random.integers(0, columns, tokens)
    first = int(random.integers(1, 21 - tokens + 1))
    return rows, at, range(first, first + tokens) if a_range else random.permutation(20)[:tokens] + 1


@needs_native
@given(layout=layouts, batch=st.integers(1, 4), tokens=st.integers(0, 14), a_range=st.booleans(), seed=seeds)
def test_keys_and_values_in_two_tensors_are_scattered_as_they_would_be_in_one(
    layout: KVLayout, batch: int, tokens: int, a_range: bool, seed: int
) -> None:
    apart, joined = both(layout, 20, seed)
    source = random_bits(seed + 1, tuple(new_buffer(apart.layout, batch, 5).shape), layout.dtype)
    keys, values = source[: layout.num_layers].clone(), source[layout.num_layers :].clone()
    rows, at, slots = picked(batch, 5, tokens, a_range, seed)
    assert apart.scatter_parts(keys, values, rows, at, slots) == ()
    joined.scatter(source, rows, at, slots)
    assert same_bits(apart.data, joined.data)


def test_only_plain_contiguous_host_memory_is_scattered_as_it_is() -> None:
    layout = KVLayout(num_layers=1, num_heads=2, head_dim=2, max_tokens=4)
    tensor, slots, at = SlotTensor(layout, 4), range(1, 3), np.arange(2)
    plain = torch.randn(1, 1, 2, 2, 2)
    for other in (plain, plain.transpose(2, 3), torch.nn.Parameter(plain), torch._neg_view(plain)):
        temporaries = tensor.scatter_parts(other, plain, np.zeros(2, dtype=np.int64), at, slots)
        assert (temporaries == ()) == (native is not None and other is plain)
        assert torch.equal(tensor.data[:, 1:3], torch.cat([other, plain])[:, 0].transpose(1, 2))


@needs_native
@given(
    layout=layouts,
    batch=st.integers(1, 4),
    kept=st.integers(1, 5),
    runs=st.integers(1, 3),
    more=st.integers(0, 3),
    a_range=st.booleans(),
    seed=seeds,
)
def test_a_scatter_with_a_difference_is_the_same_bytes_either_way(
    layout: KVLayout, batch: int, kept: int, runs: int, more: int, a_range: bool, seed: int
) -> None:
    pair = both(layout, 20, seed)
    source = random_numbers(seed + 1, tuple(new_buffer(pair[0].layout, batch, 5).shape), layout.dtype)
    shape = (2 * layout.num_layers, kept + 2, layout.num_heads, layout.head_dim)
    difference = random_numbers(seed + 2, shape, layout.dtype)[:, :kept]  # planes further apart than their numbers
    rows, at, slots = picked(batch, 5, min(20, runs * kept + more), a_range, seed)
    for tensor in pair:
        tensor.scatter(source, rows, at, slots, difference, runs)
    assert same_bits(pair[0].data, pair[1].data)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_copies_large_enough_to_let_go_of_the_gil_are_the_same_bytes_either_way(dtype: torch.dtype) -> None:
    layout = KVLayout(num_layers=4, num_heads=4, head_dim=64, max_tokens=20, dtype=dtype)
    compiled, plain = both(layout, 400, 1)
    source = random_bits(2, tuple(new_buffer(plain.layout, 16, 20).shape), dtype)
    assert source.nbytes > LARGE
    rows, columns = (index.ravel() for index in np.indices((16, 20)))
    slots = np.random.default_rng(3).permutation(400)[:320] + 1
    tables = tables_of(slots.reshape(16, 20).tolist(), 400, 20)
    for tensor in (compiled, plain):
        tensor.scatter(source, rows, columns, slots)
        out = new_buffer(tensor.layout, 16, 20)
        tensor.gather(tables, list(range(1, 17)), 20, out)
        assert same_bits(out, source)
    assert same_bits(compiled.data, plain.data)


@needs_native
@pytest.mark.parametrize("head_dim", [5, 32, 64, 96])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_tokens_owed_steps_are_the_same_bytes_either_way(head_dim: int, count: int) -> None:
    layout = KVLayout(num_layers=2, num_heads=3, head_dim=head_dim, max_tokens=9)
    window = layout.max_tokens
    compiled, plain = both(layout, 60, 1)
    numbers = random_numbers(1, tuple(plain.data.shape), layout.dtype)
    numbers[:, 0] = 0
    for tensor in (compiled, plain):
        tensor.data.copy_(numbers)
    difference = random_numbers(2, (2, 2, 3, window - count, head_dim), layout.dtype)
    steps = PositionSteps(layout, count, difference)
    random = np.random.default_rng(count)
    slots = random.permutation(60)[: 6 * window].reshape(6, window) + 1
    moved = [True, False, True, True, True, False]
    lengths = [9, 9, 8, 4, 1, 5]
    written = [
        (random.integers(np.arange(length), window) if has_moved else np.full(length, window - 1)).tolist()
        for length, has_moved in zip(lengths, moved, strict=True)
    ]
    tables = tables_of([row[:length].tolist() for row, length in zip(slots, lengths, strict=True)], 60, window, written)
    out, expected = new_buffer(compiled.layout, 6, window), new_buffer(plain.layout, 6, window)
    rows = list(range(1, 7))
    others = iter([None, PositionSteps(layout, count, difference)])  # whom nothing is owed here
    owed_by = [steps if has_moved else next(others) for has_moved in moved]
    assert compiled.gather_stepwise(tables, rows, window, out, owed_by, steps)
    assert not plain.gather_stepwise(tables, rows, window, expected, owed_by, steps)
    plain.gather(tables, rows, window, expected)
    positions = np.maximum(np.arange(window) - (window - np.array(lengths))[:, None], 0)
    owed = np.zeros((6, window), dtype=np.int64)
    for row, (length, at) in enumerate(zip(lengths, written, strict=True)):
        if moved[row]:
            owed[row, window - length :] = np.array(at) - np.arange(length)
    plain.correct_stepwise(expected, owed, positions, steps)
    assert same_bits(out, expected)


def test_all_modules_that_choose_compiled_loops_are_known_to_the_tests_that_choose_others() -> None:
    root = ROOT / "concurrent_kv"
    users = {
        ".".join(file.relative_to(root).with_suffix("").parts)
        for file in root.rglob("*.py")
        if re.search(r"^from \.[\w.]*native import .*\bnative$", file.read_text(), re.MULTILINE)
    }
    assert users - {"__main__", "compat.lightzero.settings"} == set(NATIVE_USERS)


# Without it ----------------------------------------------------------------------------------------------------------

SEARCH = """
import torch
from concurrent_kv import DropOldest, KeysValues, KVCacheManager
from concurrent_kv.native import native
assert native is None
sizes = {"num_layers": 2, "num_heads": 2, "embed_dim": 64, "context_length": 8, "num_simulations": 25}
manager = KVCacheManager(config=sizes | {"max_cache_size": 500, "device": "cpu"}, env_num=1)
token = torch.randn(2, 2, 1, 32)
manager.set_init_cache(0, "root", KeysValues.single(token, token))
with manager.search(env_ids=[0], overflow=DropOldest(limit=7, count=2)) as search:
    batch = search.gather(["root"], env_ids=[0])
    for layer in range(2):
        batch.append(layer, torch.randn(1, 2, 2, 32), torch.randn(1, 2, 2, 32))
    search.commit(["child"], batch)
    child = search.gather(["child"], env_ids=[0])
    assert child.lengths == (3,) and torch.equal(child.data[:, :, :, :3], batch.data[:, :, :, :3])
print(manager.check_integrity())
"""


def test_a_search_works_where_the_environment_switches_the_module_off() -> None:
    environment = os.environ | {"CONCURRENT_KV_NATIVE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", SEARCH], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=HANG_SECONDS
    )
    assert done.returncode == 0, done.stderr
    assert "IntegrityReport" in done.stdout


def test_without_the_module_nothing_copies_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    without_native(monkeypatch)
    layout = KVLayout(num_layers=1, num_heads=1, head_dim=2, max_tokens=2)
    tensor = SlotTensor(layout, 2)
    tables = tables_of([[1]], 2, 2)
    assert tensor.gather(tables, [1], 2, new_buffer(tensor.layout, 1, 2))  # indices, which compiled code does without
