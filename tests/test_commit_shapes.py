"""Shapes of commits are remembered, in so many bytes and no more."""

from __future__ import annotations

import threading
from itertools import count

import numpy as np
import pytest

from concurrent_kv import KVLayout, KVPool, RaiseOnOverflow
from concurrent_kv.pool.plan import REMEMBERED, REMEMBERED_BYTES, Shape, remembered, shape_of
from tests.support import HANG_SECONDS, append, assert_same, child_of, store, tokens

WIDE = 512


@pytest.fixture(autouse=True)
def nothing_remembered() -> None:
    remembered.clear()


def numbered(number: int, rows: int = 128, window: int = WIDE) -> Shape:
    """One of many shapes of as many rows, each with lengths of its own."""
    lengths = tuple(1 + (number * 131 + row * 17) % 400 for row in range(rows))
    new = tuple(1 + (number + row) % 5 for row in range(rows))
    return shape_of(range(rows), lengths, (True,) * rows, new, max(lengths), RaiseOnOverflow(window + 1))


def test_shapes_of_many_rows_in_a_wide_window_stay_within_their_bytes() -> None:
    most = 0
    for number in range(300):
        numbered(number)
        most = max(most, remembered.nbytes)
    assert 0 < most <= REMEMBERED_BYTES


def test_small_shapes_stay_within_their_number() -> None:
    for number in range(3 * REMEMBERED):
        numbered(number, rows=2, window=WIDE)
    assert 0 < len(remembered) <= REMEMBERED


def test_a_shape_as_large_as_all_that_may_be_remembered_is_made_and_forgotten() -> None:
    rows, window = 300, 16384
    shape = shape_of(range(rows), (5,) * rows, (True,) * rows, 1500, 5, RaiseOnOverflow(window + 1))
    assert shape.nbytes > REMEMBERED_BYTES
    assert len(remembered) == 0


def test_a_shape_in_use_is_made_once_whatever_comes_between() -> None:
    kept = numbered(0, rows=4)
    for number in range(1, 5 * REMEMBERED):
        numbered(number, rows=4)
        assert numbered(0, rows=4) is kept


def test_the_bytes_of_a_shape_are_those_of_its_arrays_and_more() -> None:
    shape = numbered(3)
    arrays = [field for field in shape if isinstance(field, np.ndarray)]
    assert len(arrays) == 3
    assert sum(array.nbytes for array in arrays) < shape.nbytes


def test_threads_that_make_shapes_at_once_all_get_the_right_one() -> None:
    start, failed = threading.Barrier(4), []

    def work(first: int) -> None:
        start.wait(HANG_SECONDS)
        for number in range(first, first + 400):
            shape = numbered(number % 150, rows=3)
            wanted = sum(1 + (number % 150 + row) % 5 for row in range(3))
            if len(shape.rows) != wanted:
                failed.append(number)

    threads = [threading.Thread(target=work, args=(37 * number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG_SECONDS)
    assert not any(thread.is_alive() for thread in threads)
    assert not failed
    assert len(remembered) <= REMEMBERED


def test_commits_read_the_same_when_their_shapes_were_forgotten() -> None:
    layout = KVLayout(2, 2, 3, 8)
    pool = KVPool(layout, 64)
    numbers = count()
    store(pool, (next(numbers), tokens(1, 3)))
    for key in range(6):
        remembered.clear()
        with pool.gather([0]) as batch:
            append(batch, [key + 5])
            pool.commit([("child", key)], batch)
        assert_same(pool.get(("child", key)), child_of(tokens(1, 3), key + 5))
    pool.check_integrity()
