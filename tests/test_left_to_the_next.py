"""What cannot be done where it falls due is left in `Ledger.abandoned`, and the next operation does it, once."""

from __future__ import annotations

from functools import partial
from threading import Barrier, Thread

import pytest

from concurrent_kv import KVPool
from concurrent_kv.books.ledger import Ledger
from concurrent_kv.books.records import Entry, Hold
from concurrent_kv.locks.deadline import Deadline
from concurrent_kv.locks.gate import gate
from tests.support import HANG_SECONDS, append, tokens

pytestmark = pytest.mark.usefixtures("loops")

NOW = Deadline(0.0)


def test_it_wakes_who_waits_for_room(pool: KVPool) -> None:
    ledger = pool.storage.ledger
    with gate.lock, ledger.mutex:
        waiter = ledger.waiter()
    ledger.again([lambda: None], NOW)
    assert waiter.wait(0.0)


def test_who_waits_is_woken_by_the_next_where_who_did_it_had_no_memory_for_that(
    pool: KVPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger, done = pool.storage.ledger, list[str]()
    with gate.lock, ledger.mutex:
        waiter = ledger.waiter()
    ledger.abandoned.append(partial(ledger.again, [partial(done.append, "done")]))

    def fails(self: Ledger) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "take_waiters", fails)
        assert not pool.storage.drain_abandoned(NOW)
    assert pool.storage.drain_abandoned(NOW)
    assert done == ["done"]
    assert waiter.wait(0.0)


def test_what_the_interpreter_had_no_memory_to_call_is_left_to_the_next(pool: KVPool) -> None:
    outcomes: list[Exception | None] = [SystemError("returned NULL without setting an exception"), None]

    def release(deadline: Deadline) -> None:
        outcome = outcomes.pop(0)
        if outcome is not None:
            raise outcome

    pool.storage.ledger.abandoned.append(release)
    assert not pool.storage.drain_abandoned(NOW)
    assert pool.storage.drain_abandoned(NOW)
    assert outcomes == []


def test_threads_that_come_to_it_at_the_same_time_do_it_once(pool: KVPool) -> None:
    done: list[str] = []
    job = partial(pool.storage.ledger.again, [partial(done.append, "done")])
    together = Barrier(2)

    class Both:
        """Taken from the queue by both threads before either of them begins."""

        def __call__(self, deadline: Deadline) -> None:
            together.wait(HANG_SECONDS)
            job(deadline)

    pool.storage.ledger.abandoned.append(Both())
    threads = [Thread(target=pool.storage.drain_abandoned, args=(NOW,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG_SECONDS)
    assert done == ["done"]
    assert not pool.storage.ledger.abandoned


def test_what_fails_is_there_again_for_the_next(pool: KVPool) -> None:
    outcomes = [MemoryError(), None, None]

    def work() -> None:
        outcome = outcomes.pop(0)
        if outcome is not None:
            raise outcome

    pool.storage.ledger.abandoned.append(partial(pool.storage.ledger.again, [work]))
    for left in (2, 1, 1):
        pool.get("any")
        assert len(outcomes) == left


def test_a_hold_that_cannot_be_released_is_left_once_however_often_it_is_tried(
    pool: KVPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool.put("key", tokens(1, 2))
    ledger = pool.storage.ledger

    def fails(self: Ledger, entries: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "let_go", fails)
        pool.gather(["key"]).close()
        for _ in range(3):
            pool.storage.drain_abandoned(NOW)
            (job,) = ledger.abandoned
            with pytest.raises(MemoryError):  # by a thread that came to it at the same time
                job(NOW)
        assert len(ledger.abandoned) == 1
    pool.storage.drain_abandoned(NOW)
    assert not ledger.abandoned
    assert not ledger.holds
    pool.check_integrity()


def test_a_commit_whose_batch_cannot_end_for_want_of_memory_leaves_that_to_the_next(
    pool: KVPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool.put("key", tokens(1, 2))
    batch = pool.gather(["key"])
    append(batch, [2])
    failures = [MemoryError()]
    end = Ledger.end

    def fails_once(self: Ledger, hold: Hold) -> list[Entry]:
        if failures:
            raise failures.pop()
        return end(self, hold)

    monkeypatch.setattr(Ledger, "end", fails_once)
    assert pool.commit(["child"], batch)
    assert batch.closed
    assert batch.hold.users == 0
    assert pool.storage.ledger.holds
    assert pool.get("child") is not None
    assert not pool.storage.ledger.holds
    pool.check_integrity()
