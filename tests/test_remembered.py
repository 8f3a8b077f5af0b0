"""What is kept for the next call of the same arguments is bounded in bytes, and never wrong."""

from __future__ import annotations

import random
from typing import Any

import pytest

from concurrent_kv.device import tensors
from concurrent_kv.remembered import remembered
from tests.threading_support import Background


def kept_bytes(function: Any) -> int:
    return sum(size for _, size in function.kept.values())


def lengths_of(number: int) -> Any:
    made: list[int] = []

    def size_of(value: bytes) -> int:
        return len(value)

    @remembered(most_bytes=1000, most=number, size_of=size_of)
    def made_of(length: int) -> bytes:
        made.append(length)
        return bytes(length)

    return made_of, made


def test_the_same_arguments_are_computed_once() -> None:
    made_of, made = lengths_of(10)
    assert made_of(100) is made_of(100)
    assert made == [100]


def test_the_oldest_go_when_the_bytes_are_too_many() -> None:
    made_of, made = lengths_of(100)
    for length in range(200, 210):
        made_of(length)
        assert kept_bytes(made_of) <= 1000
    made_of(209)
    assert made.count(209) == 1
    made_of(200)
    assert made.count(200) == 2


def test_the_oldest_go_when_they_are_too_many() -> None:
    made_of, made = lengths_of(3)
    for length in (1, 2, 3, 4):
        made_of(length)
    assert len(made_of.kept) == 3
    made_of(4)
    made_of(1)
    assert made == [1, 2, 3, 4, 1]


def test_what_is_too_large_by_itself_pushes_nothing_out() -> None:
    made_of, made = lengths_of(10)
    made_of(10)
    made_of(251)
    made_of(251)
    made_of(10)
    assert made == [10, 251, 251]


def test_an_error_is_not_kept() -> None:
    @remembered(most_bytes=1000, most=10, size_of=len)
    def fails(number: int) -> bytes:
        raise LookupError(number)

    for _ in range(2):
        with pytest.raises(LookupError):
            fails(1)
    assert not fails.kept  # type: ignore[attr-defined]


def test_threads_that_meet_get_right_results_and_keep_to_the_bound() -> None:
    made_of, _ = lengths_of(20)

    def work(seed: int) -> None:
        chosen = random.Random(seed)
        for _ in range(5000):
            length = chosen.randrange(1, 250)
            assert len(made_of(length)) == length

    for thread in [Background(lambda seed=seed: work(seed)) for seed in range(4)]:  # type: ignore[misc]
        thread.result()
    made_of(1)
    made_of(251)
    assert kept_bytes(made_of) <= 1000
    assert len(made_of.kept) <= 20


def test_columns_of_all_kinds_in_a_long_window_leave_a_bounded_number_of_bytes() -> None:
    window = 512
    for end in range(1, window):
        assert len(tensors._columns_of(window, end, window)) == window
        assert kept_bytes(tensors._columns_of) <= tensors.REMEMBERED_BYTES
