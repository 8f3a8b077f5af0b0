"""Keys that could never be found again are refused, by name; whatever equals itself with True or False is a key."""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from concurrent_kv import InvalidTypeError, KVCacheManager, KVPool
from tests.support import Incomparable, stacked, tokens

pytestmark = pytest.mark.usefixtures("loops")

TWO = stacked(tokens(1, 2), tokens(2, 2))


class Symbolic:
    """Builds an expression where it is compared, as columns of a query do."""

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> Any:
        return ["=", self, other]


class Colour(enum.Enum):
    RED = 1


UNFIT = {
    "tensor": torch.tensor(1),
    "vector": torch.tensor([1, 2]),
    "parameter": torch.nn.Parameter(torch.zeros(2)),
    "tensor in a tuple": ("a", torch.tensor(1)),
    "tensor in a tuple in a tuple": ("a", (1, torch.tensor(1))),
    "tensor in a set": frozenset([torch.tensor(1)]),
    "expression": Symbolic(),
    "expression in a tuple": ("a", Symbolic()),
}
CALLS: dict[str, tuple[str, Callable[[KVPool, Any], object]]] = {
    "put": ("key", lambda pool, key: pool.put(key, tokens(1, 2))),
    "put_many": ("keys", lambda pool, key: pool.put_many(["a", key], TWO)),
    "get": ("key", lambda pool, key: pool.get(key)),
    "peek": ("key", lambda pool, key: pool.peek(key)),
    "pop": ("key", lambda pool, key: pool.pop(key)),
    "pin": ("key", lambda pool, key: pool.pin(key)),
    "in": ("key", lambda pool, key: key in pool),
    "gather": ("keys", lambda pool, key: pool.gather([key])),
    "try_claim": ("key", lambda pool, key: pool.try_claim(key)),
    "get_or_compute": ("key", lambda pool, key: pool.get_or_compute(key, lambda: tokens(1, 2))),
    "scope": ("name", lambda pool, key: pool.scope(key)),
}


@pytest.mark.parametrize("key", UNFIT.values(), ids=UNFIT)
@pytest.mark.parametrize("call", CALLS)
def test_a_key_that_equals_nothing_is_refused_by_name(pool: KVPool, call: str, key: object) -> None:
    name, act = CALLS[call]
    with pytest.raises(InvalidTypeError, match=rf"^{name} must .*(hash_state|tolist)"):
        act(pool, key)
    assert len(pool) == 0


def test_a_tensor_of_keys_is_refused_with_what_would_do(pool: KVPool) -> None:
    for keys in (torch.tensor([1, 2]), torch.zeros(2, 3)):
        with pytest.raises(InvalidTypeError, match=r"^keys must .*torch\.Tensor.*tolist\(\)"):
            pool.put_many(keys, TWO)  # type: ignore[arg-type]
    pool.put_many(torch.tensor([1, 2]).tolist(), TWO)
    assert pool.get(1) is not None


def test_a_search_refuses_such_keys_too(manager: KVCacheManager) -> None:
    key: Any = torch.tensor(1)
    manager.set_init_cache(0, "root", tokens(1, 2))
    with manager.search([0]) as search:
        for act in (
            lambda: search.gather([key], [0]),
            lambda: search.release([key]),
            lambda: search.keep([key]),
            lambda: search.contains(key),
            lambda: search.promote(key, 0),
            lambda: search.promote("root", 0, as_key=key),
        ):
            with pytest.raises(InvalidTypeError, match=r"^(as_key|keys?) must .*torch\.Tensor"):
                act()
        with pytest.raises(InvalidTypeError, match=r"^env_ids must .*torch\.Tensor"):
            search.gather(["root"], [key])


KEYS = {
    "int": (np.int64(3), 3),
    "float": (np.float64(0.5), 0.5),
    "str": (np.str_("a"), "a"),
    "bool": (np.bool_(True), True),
    "bytes": (b"a", b"a"),
    "none": (None, None),
    "enum": (Colour.RED, Colour.RED),
    "nested": ((1, ("a", np.int32(2))), (1, ("a", 2))),
    "set": (frozenset([1, 2]), frozenset([2, 1])),
    "nan": (float("nan"), None),
    "numpy nan": (np.float64("nan"), None),
}


@pytest.mark.parametrize(("key", "equal"), KEYS.values(), ids=KEYS)
def test_whatever_equals_with_true_or_false_is_a_key(pool: KVPool, key: Any, equal: Any) -> None:
    pool.put(key, tokens(1, 2))
    assert pool.get(key) is not None
    if equal is not None:
        assert pool.get(equal) is not None
    pool.put_many([key, "other"], TWO)
    assert len(pool) == 2


def test_an_array_of_numbers_is_a_sequence_of_keys(pool: KVPool) -> None:
    pool.put_many(np.array([1, 2]), TWO)  # type: ignore[arg-type]
    assert pool.get(2) is not None


def test_a_key_that_raises_where_it_is_compared_is_no_error_until_then(pool: KVPool) -> None:
    key = Incomparable("a")
    pool.put(key, tokens(1, 2))
    assert pool.get(key) is not None


def test_each_type_of_keys_is_asked_once(pool: KVPool) -> None:
    asked: list[int] = []

    class Counting:
        def __hash__(self) -> int:
            return 1

        def __eq__(self, other: object) -> bool:
            asked.append(1)
            return self is other

    key = Counting()
    for _ in range(4):
        pool.put(key, tokens(1, 2))
    assert len(asked) == 1
