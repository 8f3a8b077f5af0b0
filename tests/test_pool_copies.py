"""What goes into a pool and what comes out: bit for bit, never aliased, in whatever mode of torch the caller is in."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import Tensor

from concurrent_kv import KeysValues, KVPool
from tests.conftest import MakePool
from tests.support import WINDOW, append, assert_same, bits, child_of, layout, packed, stacked, tokens

pytestmark = pytest.mark.usefixtures("loops")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
MODES: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "plain": nullcontext,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
}


def noise(dtype: torch.dtype, length: int = 5) -> KeysValues:
    """Random bits: NaN with payloads, infinities, -0.0 and denormals included."""
    generator = torch.Generator().manual_seed(length)
    shape = (4, 1, 2, length, 3 * dtype.itemsize)
    data = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8).view(dtype)
    data[0, 0, 0, 0, :3] = torch.tensor([float("nan"), -0.0, float("inf")], dtype=dtype)
    return KeysValues.from_packed(data)


# Dtypes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtype_in_is_dtype_out_bit_for_bit(make_pool: MakePool, dtype: torch.dtype) -> None:
    pool = make_pool(layout=layout(dtype=dtype))
    kv = noise(dtype)
    pool.put("a", kv)
    for found in (pool.get("a"), pool.peek("a"), pool.pin("a").get(), pool.pop("a")):
        assert_same(found, kv)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gather_and_a_commit_keep_every_bit(make_pool: MakePool, dtype: torch.dtype) -> None:
    pool = make_pool(layout=layout(dtype=dtype))
    kv, new = noise(dtype), packed(noise(dtype, 2))
    pool.put("a", kv)
    batch = pool.gather(["a"])
    for layer in range(2):
        batch.append(layer, new[layer], new[2 + layer])
    pool.commit(["b"], batch)
    assert_same(pool.get("b"), KeysValues.from_packed(torch.cat([packed(kv), new], dim=3)))


# Inputs --------------------------------------------------------------------------------------------------------------


def views_of(kv: KeysValues) -> dict[str, KeysValues]:
    """The same tokens in tensors of other strides and offsets."""
    keys, values = kv.keys, kv.values
    columns = torch.full((*keys.shape[:3], keys.shape[3] * 2, keys.shape[4]), float("nan"))
    strided_keys, strided_values = columns[:, :, :, ::2], columns.clone()[:, :, :, 1::2]
    strided_keys.copy_(keys)
    strided_values.copy_(values)
    whole = torch.cat([keys, values])
    return {
        "transposed": KeysValues(
            keys.transpose(2, 3).contiguous().transpose(2, 3), values.transpose(0, 4).contiguous().transpose(0, 4)
        ),
        "strided": KeysValues(strided_keys, strided_values),
        "packed transposed": KeysValues.from_packed(whole.transpose(0, 4).contiguous().transpose(0, 4)),
        "windowed": KeysValues.from_packed(
            torch.nn.functional.pad(whole, (0, 0, 2, 1), value=float("nan")),
            [kv.end],
            kv.end + 2,
        ),
        "row of a batch": stacked(tokens(9, 8), kv, tokens(8, 1)).row(1),
        "separate": KeysValues(keys.clone(), values.clone()),
    }


@pytest.mark.parametrize("view", list(views_of(tokens(1, 4))))
def test_any_strides_are_stored_alike(pool: KVPool, view: str) -> None:
    pool.put("a", views_of(tokens(1, 4))[view])
    assert_same(pool.get("a"), tokens(1, 4))


@pytest.mark.parametrize("view", list(views_of(tokens(1, 4))))
def test_put_does_not_write_to_its_input(pool: KVPool, view: str) -> None:
    kv = views_of(tokens(1, 4))[view]
    before = bits(kv.keys).clone(), bits(kv.values).clone()
    pool.put("a", kv)
    pool.put("a", tokens(2, 8))
    pool.get("a")
    assert torch.equal(bits(kv.keys), before[0])
    assert torch.equal(bits(kv.values), before[1])


def test_what_was_put_does_not_change_with_the_callers_tensor(pool: KVPool) -> None:
    kv = tokens(1, 4)
    pool.put("a", kv)
    kv.keys.zero_()
    kv.values.zero_()
    assert_same(pool.get("a"), tokens(1, 4))


def test_appending_and_committing_do_not_write_to_their_inputs(pool: KVPool) -> None:
    pool.put("a", tokens(1, 4))
    batch = pool.gather(["a", "missing"])
    filling, new = tokens(2, 6), torch.ones(2, 2, 2, 3)
    batch.fill(1, filling)
    for layer in range(2):
        batch.append(layer, new, new)
    batch.data.add_(1.0)
    pool.commit(["b", "c"], batch)
    assert_same(filling, tokens(2, 6))
    assert torch.equal(new, torch.ones(2, 2, 2, 3))
    assert_same(pool.get("a"), tokens(1, 4))


# Outputs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("read", ["get", "peek", "pop", "pin"])
def test_what_was_read_never_changes_afterwards(make_pool: MakePool, read: str) -> None:
    pool = make_pool(1)
    pool.put("a", tokens(1, 4))
    found = pool.pin("a").get() if read == "pin" else getattr(pool, read)("a")
    for i in range(8):
        pool.put(i, tokens(50 + i, WINDOW))
    assert_same(found, tokens(1, 4))


@pytest.mark.parametrize("read", ["get", "peek"])
def test_writing_to_what_was_read_changes_nothing_in_the_pool(pool: KVPool, read: str) -> None:
    pool.put("a", tokens(1, 4))
    found = getattr(pool, read)("a")
    found.keys.zero_()
    found.values.zero_()
    assert_same(getattr(pool, read)("a"), tokens(1, 4))


def test_two_reads_of_a_key_share_no_memory(pool: KVPool) -> None:
    pool.put("a", tokens(1, 4))
    first, second = pool.get("a"), pool.get("a")
    assert first is not None
    assert second is not None
    first.keys.zero_()
    assert_same(second, tokens(1, 4))


def test_writing_to_a_gathered_buffer_changes_no_entry(pool: KVPool) -> None:
    pool.put("a", tokens(1, 4))
    with pool.gather(["a", "a"]) as batch:
        batch.data.fill_(5.0)
        assert_same(pool.get("a"), tokens(1, 4))


# Modes of torch ------------------------------------------------------------------------------------------------------


def made_under(mode: str, value: int, length: int) -> KeysValues:
    with MODES[mode]():
        return KeysValues.from_packed(packed(tokens(value, length)).clone())


@pytest.mark.parametrize("making", MODES)
@pytest.mark.parametrize("writing", MODES)
@pytest.mark.parametrize("reading", MODES)
def test_any_mixture_of_modes_stores_and_reads_alike(
    make_pool: MakePool, making: str, writing: str, reading: str
) -> None:
    with MODES[reading]():
        pool = make_pool(1)
    kv = made_under(making, 1, 4)
    for _ in range(2):
        with MODES[writing]():
            pool.put("a", kv)
        with MODES[reading]():
            assert_same(pool.get("a"), tokens(1, 4))
        with MODES[making]():
            assert_same(pool.pop("a"), tokens(1, 4))


@pytest.mark.parametrize("gathering", MODES)
@pytest.mark.parametrize("appending", MODES)
@pytest.mark.parametrize("committing", MODES)
def test_a_batch_goes_through_any_mixture_of_modes(
    pool: KVPool, gathering: str, appending: str, committing: str
) -> None:
    pool.put("a", tokens(1, 3))
    for value in (2, 3):
        with MODES[gathering]():
            batch = pool.gather(["a", "missing"])
        batch.fill(1, made_under(appending, 5, 3))
        with MODES[appending]():
            append(batch, [value, value])
        with MODES[committing]():
            pool.commit(["b", "c"], batch)
        assert_same(pool.get("b"), child_of(tokens(1, 3), value))
        assert_same(pool.get("c"), child_of(tokens(5, 3), value))


def test_outputs_are_ordinary_tensors_whatever_the_mode(pool: KVPool) -> None:
    with torch.inference_mode():
        pool.put("a", tokens(1, 4))
        found, batch = pool.get("a"), pool.gather(["a"])
    assert found is not None
    for tensor in (found.keys, found.values, batch.data):
        assert not tensor.is_inference()
        assert not tensor.requires_grad


def with_grad(kv: KeysValues) -> KeysValues:
    return KeysValues(kv.keys.clone().requires_grad_(), kv.values.clone().requires_grad_() * 1.0)


def test_inputs_that_require_gradients_are_stored_detached(pool: KVPool) -> None:
    pool.put("a", with_grad(tokens(1, 4)))
    found = pool.get("a")
    assert_same(found, tokens(1, 4))
    assert found is not None
    assert not found.keys.requires_grad
    assert not pool.storage.tensor.data.requires_grad


def test_filling_with_gradients_leaves_no_graph_in_the_buffer(pool: KVPool) -> None:
    with pool.gather(["missing"]) as batch:
        batch.fill(0, with_grad(tokens(1, 4)))
        assert not batch.data.requires_grad


def test_appending_with_gradients_leaves_no_graph_in_the_buffer(pool: KVPool) -> None:
    pool.put("a", tokens(1, 4))
    new: Tensor = torch.ones(1, 2, 2, 3, requires_grad=True) * 2.0
    batch = pool.gather(["a"])
    for layer in range(2):
        batch.append(layer, new, new)
    pool.commit(["b"], batch)
    with pool.gather(["a"]) as again:
        assert not again.data.requires_grad
    assert not pool.storage.tensor.data.requires_grad


@pytest.mark.parametrize("mode", MODES)
def test_an_out_buffer_made_in_any_mode_is_gathered_into(pool: KVPool, mode: str) -> None:
    pool.put("a", tokens(1, 4))
    with MODES[mode]():
        out = torch.zeros(4, 1, 2, WINDOW, 3)
        with pool.gather(["a"], out=out):
            pass
    assert torch.equal(out[:, :, :, :4], packed(tokens(1, 4)))


# Tensors whose numbers are not simply in their memory -----------------------------------------------------------------


def test_tensors_whose_sign_is_a_flag_are_stored_with_their_sign(pool: KVPool) -> None:
    kv = stacked(tokens(1, 3))
    assert kv.packed is not None
    pool.put("a", KeysValues.from_packed(torch._neg_view(kv.packed)))
    assert_same(pool.get("a"), KeysValues.from_packed(-kv.packed))


def test_zeros_without_memory_are_stored_as_zeros(pool: KVPool) -> None:
    zeros = packed(stacked(tokens(1, 3))) * 0
    pool.put("a", KeysValues.from_packed(torch._efficientzerotensor(zeros.shape)))
    assert_same(pool.get("a"), KeysValues.from_packed(zeros))


def test_a_pool_can_be_read_within_a_transform(pool: KVPool) -> None:
    pool.put("a", stacked(tokens(1, 3)))

    def scaled(factor: Tensor) -> Tensor:
        kv = pool.get("a")
        assert kv is not None
        return packed(kv).sum() * factor

    assert torch.func.grad(scaled)(torch.tensor(2.0)) == scaled(torch.tensor(1.0))


def test_a_gather_is_a_change_of_the_callers_buffer_that_autograd_sees(pool: KVPool) -> None:
    pool.put("a", stacked(tokens(1, 3)))
    out = torch.zeros(4, 1, 2, WINDOW, 3)
    weight = torch.ones((), requires_grad=True)
    product = (weight * out).sum()
    pool.gather(["a"], out=out).close()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()  # type: ignore[no-untyped-call]
