"""Readers that keep coming do not starve a writer: who waits for a shard goes before who comes later."""

from __future__ import annotations

from time import monotonic
from types import SimpleNamespace

import pytest
from readerwriterlock import rwlock

from concurrent_kv import WaitTimeoutError
from concurrent_kv.locks import sharded as locks
from concurrent_kv.locks.deadline import Deadline
from concurrent_kv.locks.sharded import ShardedRWLock
from tests.threading_support import JOIN_SECONDS, Background

TRIES = 2000


def read_is_refused(sharded: ShardedRWLock) -> bool:
    try:
        with sharded.read((0,), Deadline(0.0)):
            return False
    except WaitTimeoutError:
        return True


def write(sharded: ShardedRWLock) -> None:
    with sharded.write((0,), Deadline(JOIN_SECONDS)):
        pass


def test_a_reader_that_comes_after_a_waiting_writer_waits() -> None:
    sharded = ShardedRWLock(1, name="fair")
    with sharded.read((0,), Deadline(JOIN_SECONDS)):
        writer = Background(lambda: write(sharded))
        end = monotonic() + JOIN_SECONDS
        while not (refused := read_is_refused(sharded)) and monotonic() < end:
            pass
    assert refused
    writer.result()


def test_without_fair_locks_readers_go_before_a_waiting_writer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "rwlock", SimpleNamespace(RWLockFair=rwlock.RWLockRead))
    sharded = ShardedRWLock(1, name="unfair")
    with sharded.read((0,), Deadline(JOIN_SECONDS)):
        writer = Background(lambda: write(sharded))
        assert not any(read_is_refused(sharded) for _ in range(TRIES))
    writer.result()
