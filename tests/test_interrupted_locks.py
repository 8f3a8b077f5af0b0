"""Shard locks after an exception at any point of taking and giving back: nobody is stuck, and nobody slips in.

CPython raises asynchronous exceptions where a function begins and where a call of a C function has ended. A profile
function raises there, one place further every time, until there is none left. What is cut off is dropped; then every
shard can be had for writing, and for reading by two at once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
from readerwriterlock import rwlock

from concurrent_kv import KVPool, WaitTimeoutError
from concurrent_kv.locks import sharded as locks
from concurrent_kv.locks.deadline import Deadline
from concurrent_kv.locks.sharded import ShardedRWLock
from tests.interrupting import cut_at
from tests.support import LAYOUT, assert_same, tokens
from tests.threading_support import JOIN_SECONDS, Background

WATCHED = {locks.__file__, rwlock.__file__}
SHARDS = (0, 1)
MOST_PLACES = 1000


def take(sharded: ShardedRWLock, write: bool, seconds: float = JOIN_SECONDS) -> None:
    with (sharded.write if write else sharded.read)(SHARDS, Deadline(seconds)):
        pass


def check_usable(sharded: ShardedRWLock) -> None:
    """Two can read at once, and one can write, without waiting longer than it takes to look for what was lost."""
    take(sharded, write=True)
    with sharded.read(SHARDS, Deadline(JOIN_SECONDS)):
        Background(lambda: take(sharded, write=False)).result()
        with pytest.raises(WaitTimeoutError):
            Background(lambda: take(sharded, write=True, seconds=0.0)).result()
    take(sharded, write=True, seconds=0.0)
    assert not sharded._holders
    assert not sharded._shut


def at_every_place(work: Callable[[ShardedRWLock], object], again_after: int = 0) -> int:
    """Cut `work` off at each of its places, on locks of its own each time; returns how many there are."""
    for number in range(1, MOST_PLACES):
        sharded = ShardedRWLock(len(SHARDS), name="cut")
        if not cut_at(number, lambda: work(sharded), WATCHED, again_after):  # noqa: B023 - called here and now
            return number - 1
        check_usable(sharded)
    raise AssertionError("the work does not end")


@pytest.mark.parametrize("write", [False, True])
def test_locks_cut_off_anywhere_can_be_had_by_the_next(write: bool) -> None:
    assert at_every_place(lambda sharded: take(sharded, write)) > 10


@pytest.mark.parametrize("write", [False, True])
@pytest.mark.parametrize("again_after", range(1, 30, 3))
def test_locks_cut_off_twice_can_be_had_by_the_next(write: bool, again_after: int) -> None:
    assert at_every_place(lambda sharded: take(sharded, write), again_after) > 10


def test_a_lock_cut_off_while_it_is_waited_for_can_be_had_by_the_next() -> None:
    def wait_in_vain(sharded: ShardedRWLock) -> None:
        with pytest.raises(WaitTimeoutError):
            take(sharded, write=True, seconds=0.0)

    def work(sharded: ShardedRWLock) -> None:
        held, over = threading.Event(), threading.Event()

        def hold() -> None:
            with sharded.read(SHARDS, Deadline(JOIN_SECONDS)):
                held.set()
                assert over.wait(JOIN_SECONDS)

        holder = Background(hold)
        try:
            assert held.wait(JOIN_SECONDS)
            wait_in_vain(sharded)
        finally:
            over.set()
            holder.result()

    assert at_every_place(work) > 10


@pytest.mark.parametrize("write", [False, True])
def test_a_lock_that_is_replaced_keeps_writers_out_until_everybody_has_left_the_old_one(write: bool) -> None:
    """A reader is inside while another thread is cut off anywhere: a writer comes in only after the reader has left."""
    number = 0
    while True:
        number += 1
        sharded = ShardedRWLock(len(SHARDS), name="cut")
        with sharded.read(SHARDS, Deadline(JOIN_SECONDS)):
            again = Background(lambda: cut_at(number, lambda: try_to_take(sharded, write), WATCHED)).result()  # noqa: B023
            for shard in SHARDS:
                check_kept_out(sharded, shard)
        if not again:
            break
        check_usable(sharded)
    assert number > 10


def check_kept_out(sharded: ShardedRWLock, shard: int) -> None:
    def write() -> None:
        with sharded.write((shard,), Deadline(0.0)):
            pass

    with pytest.raises(WaitTimeoutError):
        Background(write).result()


def test_who_gets_a_lock_just_when_it_is_replaced_tries_again() -> None:
    sharded = ShardedRWLock(1, name="cut")
    old = sharded._locks[0]

    class Handle:
        """Replaces the lock between getting it and saying so."""

        c_rw_lock = old

        def acquire(self, blocking: bool, timeout: float = -1) -> bool:
            sharded._replace(0, old)
            return True

    old.gen_wlock = Handle  # type: ignore[method-assign, assignment]
    with sharded.write((0,), Deadline(JOIN_SECONDS)):
        check_kept_out(sharded, 0)
    take_one(sharded)


def test_a_lock_that_a_thread_was_torn_out_of_is_replaced_by_who_wants_it() -> None:
    sharded = ShardedRWLock(1, name="cut")
    old = sharded._locks[0]

    class Handle:
        c_rw_lock = old

        def acquire(self, blocking: bool, timeout: float = -1) -> bool:
            raise RuntimeError("release unlocked lock")

    old.gen_wlock = Handle  # type: ignore[method-assign, assignment]
    with sharded.write((0,), Deadline(JOIN_SECONDS)):
        assert sharded._locks[0] is not old
        check_kept_out(sharded, 0)
    take_one(sharded)


def try_to_take(sharded: ShardedRWLock, write: bool) -> None:
    try:
        take(sharded, write, seconds=0.0)
    except WaitTimeoutError:
        assert write


def test_a_reader_that_waits_to_let_go_is_freed_when_its_lock_is_replaced() -> None:
    sharded = ShardedRWLock(1, name="cut")
    stuck = sharded._locks[0]
    inside, leave = threading.Event(), threading.Event()

    def read() -> None:
        with sharded.read((0,), Deadline(JOIN_SECONDS)):
            inside.set()
            assert leave.wait(JOIN_SECONDS)

    reader = Background(read)
    assert inside.wait(JOIN_SECONDS)
    stuck.c_lock_read_count.acquire()  # as who is cut off between this and its release leaves it
    leave.set()
    sharded._replace(0, stuck)
    reader.result()
    take_one(sharded)


def take_one(sharded: ShardedRWLock) -> None:
    with sharded.write((0,), Deadline(JOIN_SECONDS)):
        pass
    assert not sharded._shut


def test_a_pool_goes_on_after_a_lock_of_it_was_cut_off() -> None:
    with KVPool(LAYOUT, 2, shards=1) as pool:
        pool.put("key", tokens(1, 3))
        for number in range(1, 40):
            cut_at(number, lambda: pool.get("key"), WATCHED)
            assert_same(pool.get("key"), tokens(1, 3))
        pool.repair()
        pool.check_integrity()
