"""hash_state: agreement with LightZero's, and what it documents beyond that."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from concurrent_kv.errors import InvalidArgumentError
from concurrent_kv.model.hashing import hash_state, hash_states

pytestmark = pytest.mark.usefixtures("loops")

DTYPES = ["float16", "float32", "float64", "int8", "int64", "uint8", "bool", "complex64"]


def legacy_hex(state: Any) -> str:
    """LightZero 0.2.0."""
    return xxhash.xxh64(state.tobytes()).hexdigest()


def legacy_int(state: Any) -> int:
    """LightZero's main branch."""
    return xxhash.xxh64(state.tobytes()).intdigest()


arrays = hnp.arrays(
    dtype=st.sampled_from([np.dtype(name) for name in DTYPES] + [np.dtype(">f4"), np.dtype("M8[s]")]),
    shape=hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4),
)


@given(arrays)
def test_both_forms_agree_with_lightzero_for_any_array(state: np.ndarray[Any, Any]) -> None:
    assert hash_state(state) == hash_state(state, form="int") == legacy_int(state)
    assert hash_state(state, form="hex") == legacy_hex(state)


@given(arrays, st.data())
def test_both_forms_agree_with_lightzero_for_any_view(state: np.ndarray[Any, Any], data: st.DataObject) -> None:
    state = np.moveaxis(state, range(state.ndim), data.draw(st.permutations(range(state.ndim))))
    state = state[tuple(slice(None, None, data.draw(st.sampled_from([1, 2, -1]))) for _ in range(state.ndim))]
    assert hash_state(state) == legacy_int(state)
    assert hash_state(state, form="hex") == legacy_hex(state)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_cpu_tensor_hashes_like_the_array_of_its_values_contiguous_or_not(dtype: str) -> None:
    tensor = torch.arange(48).reshape(2, 4, 6).to(getattr(torch, dtype))
    views = [
        tensor,
        tensor.transpose(0, 2),
        tensor[:, ::2, 1:],
        tensor[0, 0, 0],
        tensor[:0],
        tensor[:1].expand(5, 4, 6),
        tensor.unsqueeze(0).to(memory_format=torch.channels_last),
    ]
    for view in views:
        assert hash_state(view) == legacy_int(view.numpy())
        assert hash_state(view, form="hex") == legacy_hex(view.numpy())


def test_a_bfloat16_tensor_hashes_its_own_bytes() -> None:
    tensor = torch.tensor([[1.0, -2.5], [0.0, 3.0]], dtype=torch.bfloat16)
    for view in (tensor, tensor.t(), tensor[0, 0]):
        assert hash_state(view) == legacy_int(view.contiguous().view(torch.int16).numpy())


def test_gradients_inference_mode_and_conjugation_do_not_change_what_is_hashed() -> None:
    values = np.array([1 + 2j, 3 - 4j], dtype=np.complex64)
    tensor = torch.from_numpy(values)
    assert hash_state(tensor.conj()) == legacy_int(values.conj())
    assert hash_state(tensor.conj().imag) == legacy_int(np.ascontiguousarray(values.conj().imag))
    plain = torch.ones(3)
    assert hash_state(plain.clone().requires_grad_()) == hash_state(plain)
    with torch.inference_mode():
        inferred = torch.ones(3)
    assert hash_state(inferred) == hash_state(plain)


def test_the_state_is_not_changed_and_a_read_only_array_is_accepted() -> None:
    state = np.arange(6.0).reshape(2, 3)
    before = state.copy()
    state.flags.writeable = False
    hash_state(state)
    np.testing.assert_array_equal(state, before)
    grad = torch.ones(3, requires_grad=True)
    hash_state(grad)
    assert grad.requires_grad


def test_contiguous_data_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[Any] = []

    def xxh64(data: Any) -> xxhash.xxh64:
        hashed.append(data)
        return real_xxh64(data)

    real_xxh64 = xxhash.xxh64
    monkeypatch.setattr(xxhash, "xxh64", xxh64)
    state = np.arange(6.0).reshape(2, 3)
    hash_state(state)
    hash_state(torch.from_numpy(state))
    assert len(hashed) == 2
    assert all(np.shares_memory(data, state) for data in hashed)


def test_zero_and_negative_zero_hash_differently() -> None:
    assert hash_state(np.array([0.0])) != hash_state(np.array([-0.0]))
    assert hash_state(torch.tensor([0.0])) != hash_state(torch.tensor([-0.0]))


def test_shape_and_dtype_are_not_part_of_the_hash() -> None:
    state = np.arange(6, dtype=np.int32)
    assert hash_state(state) == hash_state(state.reshape(2, 3)) == hash_state(state.view(np.uint8))


def test_an_array_subclass_hashes_the_bytes_it_says_it_has() -> None:
    masked = np.ma.masked_array([1.0, 2.0], mask=[True, False])
    assert hash_state(masked) == legacy_int(masked)


@pytest.mark.parametrize("state", [[1.0, 2.0], (1,), 3, 1.5, "state", b"state", None, {"a": 1}, memoryview(b"ab")])
def test_what_is_neither_array_nor_tensor_is_an_error_that_names_the_argument(state: Any) -> None:
    with pytest.raises(InvalidArgumentError, match=rf"^state must be .* got {type(state).__name__}"):
        hash_state(state)


@pytest.mark.parametrize("dtype", [object, [("id", "i4"), ("value", object)]], ids=["object", "record with objects"])
def test_an_array_of_objects_is_an_error_because_its_bytes_are_addresses(dtype: Any) -> None:
    with pytest.raises(InvalidArgumentError, match=r"^state must hold plain values"):
        hash_state(np.empty(2, dtype=dtype))


@pytest.mark.parametrize(
    "state", [torch.eye(2).to_sparse(), torch.empty(2, device="meta")], ids=["sparse", "without data"]
)
def test_a_tensor_without_dense_data_is_an_error(state: torch.Tensor) -> None:
    with pytest.raises(InvalidArgumentError, match=r"^state must be a dense tensor"):
        hash_state(state)


@pytest.mark.parametrize("form", ["hexdigest", "", None, 16])
def test_an_unknown_form_is_an_error_that_says_what_would_do(form: Any) -> None:
    with pytest.raises(InvalidArgumentError, match=r"^form must be 'int' or 'hex', got "):
        hash_state(np.zeros(1), form=form)


@pytest.mark.parametrize("make", [np.asarray, torch.from_numpy], ids=["array", "tensor"])
@pytest.mark.parametrize("shape", [(3, 1, 4), (3,), (1, 5), (2, 0)])
def test_hash_states_is_the_hex_hash_of_every_row(make: Any, shape: tuple[int, ...]) -> None:
    states = make(np.random.default_rng(0).normal(size=shape).astype(np.float32))
    assert hash_states(states) == [hash_state(states[row], form="hex") for row in range(shape[0])]


def test_hash_states_reads_rows_that_are_not_contiguous() -> None:
    states = np.arange(24.0).reshape(4, 6)[:, ::2]
    assert hash_states(states) == [hash_state(row, form="hex") for row in states]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int64, torch.complex64])
def test_one_element_hashes_the_same_whatever_its_strides(dtype: torch.dtype) -> None:
    element = torch.tensor([3, 5, 7]).to(dtype)[::2][1:]
    assert element.stride() == (2,)
    plain = torch.tensor([7]).to(dtype)
    assert hash_state(element) == hash_state(plain)
    assert hash_states(element) == hash_states(plain)


@pytest.mark.parametrize(
    "dtype", ["?", "i1", "u2", "i4", "u8", "f2", "f4", "f8", "c8", "m8[s]", "S3", "V5", ">f4", ">i8"]
)
def test_hash_states_reads_the_bytes_of_any_dtype(dtype: str) -> None:
    kind: np.dtype[Any] = np.dtype(dtype)
    data = bytes(number % 2 for number in range(6 * kind.itemsize + 1))
    for offset in (0, 1):  # not aligned with 1
        states = np.frombuffer(data, kind, count=6, offset=offset).reshape(3, 2)
        assert hash_states(states) == [legacy_hex(row) for row in states]


@pytest.mark.parametrize("states", [[[1.0]], np.float32(1), np.empty((0, 2)), torch.tensor(1.0)])
def test_hash_states_of_no_rows_is_an_error_that_names_the_argument(states: Any) -> None:
    with pytest.raises(InvalidArgumentError, match=r"^states must be an array or tensor with at least one row"):
        hash_states(states)


def test_tensors_whose_sign_is_a_flag_hash_like_their_numbers() -> None:
    states = torch.randn(3, 4)
    assert hash_states(torch._neg_view(states)) == hash_states(-states)
