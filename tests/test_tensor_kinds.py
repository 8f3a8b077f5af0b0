"""What kind of tensor may come in, and what torch's defaults may be meanwhile."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from concurrent_kv import (
    DropAndCorrect,
    DropLazily,
    DropOldest,
    InvalidArgumentError,
    KeysValues,
    KVCacheManager,
    KVLayout,
    KVPool,
    PositionSteps,
    PositionTable,
    hash_state,
    hash_states,
)
from concurrent_kv.compat.lightzero.containers import LightZeroKeysValues, from_lightzero, to_lightzero
from concurrent_kv.device.moving import joined_on
from concurrent_kv.model.overflow import Overflow
from tests.support import LAYOUT, WINDOW, append, assert_same, child_of, config, layout, packed, stacked, store, tokens

# Tensors of other kinds -----------------------------------------------------------------------------------------------


def quantised(dense: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(dense, 0.1, 0, torch.quint8)


def compressed(dense: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return dense.flatten(1).to_sparse_csr()


def nested(dense: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([dense, dense])


KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "sparse": lambda dense: dense.to_sparse(),
    "compressed": compressed,
    "quantised": quantised,
    "nested": nested,
}
if torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
    KINDS["mkldnn"] = lambda dense: dense.to_mkldnn()

ROW = torch.ones(2, 1, 2, 3, 3)
NEW = torch.ones(1, 2, 1, 3)
DIFFERENCE = torch.ones(2, 2, 2, WINDOW, 3)
OUT = torch.ones(4, 1, 2, WINDOW, 3)


def in_a_container(tensor: Tensor) -> LightZeroKeysValues:
    made = LightZeroKeysValues(torch.ones(4, 1, 2, WINDOW, 3), 3)
    made[1]._k_cache._cache = tensor
    return made


CALLS: dict[str, tuple[str, Tensor, Callable[[KVPool, Tensor], object]]] = {
    "keys": ("keys", ROW, lambda pool, bad: KeysValues(bad, ROW)),
    "values": ("values", ROW, lambda pool, bad: KeysValues(ROW, bad)),
    "single keys": ("keys", ROW[:, 0], lambda pool, bad: KeysValues.single(bad, ROW[:, 0])),
    "single values": ("values", ROW[:, 0], lambda pool, bad: KeysValues.single(ROW[:, 0], bad)),
    "packed": ("packed", ROW, lambda pool, bad: KeysValues.from_packed(bad)),
    "out": ("out", OUT, lambda pool, bad: pool.gather(["a"], out=bad)),
    "appended keys": ("keys", NEW, lambda pool, bad: pool.gather(["a"]).append(0, bad, NEW)),
    "appended values": ("values", NEW, lambda pool, bad: pool.gather(["a"]).append(0, NEW, bad)),
    "difference": ("difference", DIFFERENCE, lambda pool, bad: DropAndCorrect(7, 2, bad, LAYOUT)),
    "steps": ("difference", DIFFERENCE, lambda pool, bad: PositionSteps(LAYOUT, 2, bad)),
    "table": (r"difference_for\(1\)", DIFFERENCE, lambda pool, bad: PositionTable(LAYOUT, lambda distance: bad)),
    "state": ("state", ROW, lambda pool, bad: hash_state(bad)),
    "states": ("states", ROW, lambda pool, bad: hash_states(bad)),
    "container": ("kv_cache", OUT[0], lambda pool, bad: from_lightzero(in_a_container(bad))),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("call", CALLS)
def test_a_tensor_that_is_not_dense_is_refused_by_name(pool: KVPool, call: str, kind: str) -> None:
    store(pool, ("a", tokens(1, 3)))
    name, dense, act = CALLS[call]
    with pytest.raises(InvalidArgumentError, match=rf"^{name} must be a dense tensor, got .* makes one"):
        act(pool, KINDS[kind](dense))
    assert_same(pool.get("a"), tokens(1, 3))


@pytest.mark.parametrize("call", ["out", "appended keys", "appended values", "difference", "steps", "table"])
def test_a_tensor_without_data_is_refused_by_name(pool: KVPool, call: str) -> None:
    store(pool, ("a", tokens(1, 3)))
    name, dense, act = CALLS[call]
    with pytest.raises(InvalidArgumentError, match=rf"^{name} must .*got .*on meta"):
        act(pool, dense.to("meta"))


def test_tokens_without_data_are_not_copied_to_where_there_is_some() -> None:
    kv = KeysValues(ROW.to("meta"), ROW.to("meta"))
    assert kv.copy().keys.is_meta
    with pytest.raises(InvalidArgumentError, match=r"^device must be meta"):
        kv.to("cpu")
    with pytest.raises(InvalidArgumentError, match=r"^device must be meta"):
        kv.copy(torch.device("cpu"))


# A device by another name --------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("torch_loops")
def test_a_pool_keeps_no_tangents_of_what_is_put_into_it(pool: KVPool) -> None:
    """Forward derivatives ride on a tensor that requires no gradient."""
    forward: Any = forward_ad
    given = packed(tokens(1, 3))
    with forward.dual_level():
        pool.put("key", KeysValues.from_packed(forward.make_dual(given, torch.ones_like(given))))
        found = pool.get("key")
        assert found is not None
        for tensor in (pool.storage.tensor.data, found.packed):
            assert forward.unpack_dual(tensor).tangent is None


def test_a_numbered_cpu_is_the_cpu() -> None:
    numbered = KVLayout(2, 2, 3, WINDOW, device=torch.device("cpu:0"))
    assert numbered == KVLayout(2, 2, 3, WINDOW, device="cpu") == LAYOUT  # type: ignore[arg-type]
    assert hash(numbered) == hash(LAYOUT)


def test_a_pool_on_a_numbered_cpu_gathers_into_buffers_and_takes_policies_of_the_cpu() -> None:
    with KVPool(layout(device="cpu:0"), 4) as pool:
        pool.put("a", tokens(1, 5))
        found = pool.get("a", to="cpu:0")
        assert_same(found, tokens(1, 5))
        assert found is not None
        assert found.to("cpu:0") is found
        with pool.gather(["a"], out=torch.zeros(4, 1, 2, WINDOW, 3)) as batch:
            append(batch, [2])
            pool.commit(["b"], batch, overflow=DropAndCorrect(7, 2, torch.zeros(2, 2, 2, WINDOW, 3), LAYOUT))
        pool.check_integrity()
    with KVCacheManager(config(device="cpu:0"), 1) as manager:
        assert manager.layout.device == torch.device("cpu")


# torch's defaults ----------------------------------------------------------------------------------------------------


@contextmanager
def default_device(device: str) -> Iterator[None]:
    before = torch.get_default_device()
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None if before == torch.device("cpu") else before)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


DEFAULTS: dict[str, Callable[[], Any]] = {
    "meta": lambda: default_device("meta"),
    "device context": lambda: torch.device("meta"),
    "float64": lambda: default_dtype(torch.float64),
    "float16": lambda: default_dtype(torch.float16),
}
DIFFERENCES = torch.ones(2, 2, 2, WINDOW, 3)
OVERFLOWS: dict[str, Callable[[], Overflow]] = {
    "oldest": lambda: DropOldest(7, 2),
    "correct": lambda: DropAndCorrect(7, 2, DIFFERENCES, LAYOUT),
    "table": lambda: DropLazily(7, 2, PositionTable(LAYOUT, lambda distance: distance * DIFFERENCES)),
    "steps": lambda: DropLazily(7, 2, PositionSteps(LAYOUT, 2, DIFFERENCES)),
}
ROOT = tokens(1, 3)
FILLED = tokens(2, 4)
STEPS = [torch.randn(4, 2, 2, 2, 3) for _ in range(4)]


def played(overflow: Callable[[], Overflow]) -> list[KeysValues]:
    """Everything that a pool, a search and LightZero's containers are for, on tensors that are there already."""
    policy = overflow()
    manager = KVCacheManager(config(num_simulations=8), 1)
    manager.set_init_cache(0, "root", ROOT)
    found: list[KeysValues | None] = [manager.get_init_cache(0, "root")]
    with manager.search([0], overflow=policy) as search:
        for depth, new in enumerate(STEPS):
            keys = ["root", "missing"] if depth == 0 else [(depth - 1, 0), (depth - 1, 1)]
            with search.gather(keys, [0, 0]) as batch:
                if depth == 0:
                    batch.fill(1, FILLED)
                assert batch.padding.dtype == torch.int64
                for layer in range(2):
                    batch.append(layer, new[layer], new[2 + layer])
                search.commit([(depth, 0), (depth, 1)], batch)
        search.promote((depth, 1), 0, as_key="leaf")
        found.append(manager.get_init_cache(0, "leaf"))
    pool = manager.wm_pool
    found.append(pool.get_or_compute("computed", lambda: FILLED))
    pool.put("row", KeysValues(FILLED.keys, FILLED.values))
    found += [pool.get("row"), from_lightzero(to_lightzero(ROOT, LAYOUT)), pool.pop("row")]
    pool.put_many(["x", "y"], PAIR) if pool.account.max_entries > 1 else pool.put("x", PAIR.row(0))
    found.append(pool.peek("x"))
    manager.check_integrity()
    manager.close()
    assert None not in found
    return [kv for kv in found if kv is not None]


PAIR = stacked(tokens(3, 2), tokens(4, 2))


@pytest.mark.parametrize("overflow", OVERFLOWS)
@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.usefixtures("loops")
def test_the_defaults_of_torch_change_nothing(default: str, overflow: str) -> None:
    expected = played(OVERFLOWS[overflow])
    with DEFAULTS[default]():
        seen = played(OVERFLOWS[overflow])
    assert len(seen) == len(expected)
    for kv, wanted in zip(seen, expected, strict=True):
        assert kv.keys.device == torch.device("cpu")
        assert_same(kv, wanted)


@pytest.mark.parametrize("default", DEFAULTS)
def test_a_hash_is_the_same_whatever_the_defaults_of_torch(default: str) -> None:
    state = torch.ones(3, 2).t()
    expected = hash_state(state)
    with DEFAULTS[default]():
        assert hash_state(state) == expected


def test_what_goes_to_an_accelerator_goes_through_host_memory_whatever_the_default_device() -> None:
    part = torch.ones(2, 3)
    with default_device("meta"):
        # To "meta", as to any other device than the parts': without a device of its own, the memory on the way would be
        # on the default one.
        moved = joined_on(torch.device("meta"), [part, part])
    assert moved.shape == (4, 3)


def test_a_child_is_what_its_parent_and_its_tokens_say_under_another_default_device(pool: KVPool) -> None:
    store(pool, ("a", ROOT))
    new = child_of(ROOT, 7)
    added = new.packed
    assert added is not None
    with default_device("meta"), pool.gather(["a"]) as batch:
        for layer in range(2):
            batch.append(layer, added[layer, :, :, 3:], added[2 + layer, :, :, 3:])
        pool.commit(["b"], batch)
    assert_same(pool.get("b"), new)
