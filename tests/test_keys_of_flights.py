"""When a computation's key is hashed and compared: once, in its own scope, with keys of the same hash only."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from concurrent_kv import KeysValues, KVPool, RecursiveComputationError
from tests.support import Incomparable, tokens
from tests.threading_support import JOIN_SECONDS, Background, Gate


class Own:
    """A key that takes every other for one of its kind."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __hash__(self) -> int:
        return hash(self.name)

    def __eq__(self, other: object) -> bool:
        return self.name == other.name  # type: ignore[attr-defined, no-any-return]


class Unhashable:
    """A key whose `__hash__` raises from some moment on."""

    def __init__(self) -> None:
        self.raises = False

    def __hash__(self) -> int:
        if self.raises:
            raise KeyError("unhashable")
        return 7


def compute(number: int) -> Callable[[], KeysValues]:
    return lambda: tokens(number, 2)


@pytest.mark.parametrize("other", ["text", 3, ("a", 1), None, Own("b")])
@pytest.mark.parametrize("own_first", [True, False])
def test_keys_of_different_hashes_are_not_compared_inside_a_computation(
    pool: KVPool, other: object, own_first: bool
) -> None:
    first, second = (Own("a"), other) if own_first else (other, Own("a"))

    def outer() -> KeysValues:
        pool.get_or_compute(second, compute(2))
        return tokens(1, 2)

    assert pool.get_or_compute(first, outer).lengths == (2,)
    assert len(pool) == 2


def test_keys_of_different_scopes_are_not_compared_inside_a_computation(pool: KVPool) -> None:
    outer_key, inner_key = Incomparable("a"), Incomparable("a")

    def outer() -> KeysValues:
        pool.get_or_compute(inner_key, compute(2), scope=pool.scope("other"))
        return tokens(1, 2)

    assert pool.get_or_compute(outer_key, outer).lengths == (2,)


def test_an_equal_key_inside_its_own_computation_is_still_refused(pool: KVPool) -> None:
    def outer() -> KeysValues:
        return pool.get_or_compute(Own("a"), compute(2))

    with pytest.raises(RecursiveComputationError):
        pool.get_or_compute(Own("a"), outer)


def test_a_key_is_refused_inside_its_computation_after_a_clear_too(pool: KVPool) -> None:
    def outer() -> KeysValues:
        pool.clear()
        return pool.get_or_compute("a", compute(2))

    with pytest.raises(RecursiveComputationError):
        pool.get_or_compute("a", outer)


@pytest.mark.parametrize("end", ["drop", "abandon", "fail", "pass_on"])
def test_the_key_of_a_claim_that_ends_is_not_hashed_again(pool: KVPool, end: str) -> None:
    key = Unhashable()
    claim = pool.try_claim(key)
    key.raises = True
    if end == "drop":
        del claim
    elif end == "abandon":
        claim.abandon()
    elif end == "fail":
        claim.fail(ValueError())
    else:
        claim.pass_on(tokens(1, 2))
    assert pool.try_claim("another").mine
    assert pool.get_or_compute("third", compute(3)).lengths == (2,)
    key.raises = False
    assert pool.try_claim(key).mine  # nothing of the ended one is left


@pytest.mark.parametrize("end", ["drop", "abandon", "fail"])
def test_the_key_of_a_claim_that_ends_is_not_compared(pool: KVPool, end: str) -> None:
    """Others of the same hash stand in its way in the table: it is taken out without a look at them."""

    class Same:
        asked = True

        def __hash__(self) -> int:
            return 7

        def __eq__(self, other: object) -> bool:
            assert self.asked
            return self is other

    keys = [Same() for _ in range(3)]
    claims = [pool.try_claim(key) for key in keys]
    Same.asked = False
    last = claims.pop()
    if end == "drop":
        del last
    elif end == "abandon":
        last.abandon()
    else:
        last.fail(ValueError())
    assert len(pool.flights) == 2
    Same.asked = True
    assert pool.try_claim(keys[2]).mine
    assert not pool.try_claim(keys[0]).mine


def test_an_equal_key_that_comes_while_another_is_computed_waits_for_it(pool: KVPool) -> None:
    gate = Gate()

    def gated() -> KeysValues:
        gate.pass_through()
        return tokens(1, 2)

    first = Background(lambda: pool.get_or_compute(Own("a"), gated))
    assert gate.entered.wait(JOIN_SECONDS)
    assert not pool.try_claim(Own("a")).mine
    gate.opened.set()
    assert first.result().lengths == (2,)
