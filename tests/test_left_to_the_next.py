"""What cannot be done where it falls due is left in `Ledger.abandoned`, and the next operation does it, once."""

from __future__ import annotations

from functools import partial
from threading import Barrier, Thread

import pytest

from concurrent_kv import KVPool
from concurrent_kv.books.ledger import Ledger
from concurrent_kv.books.records import Entry
from concurrent_kv.locks.deadline import Deadline
from concurrent_kv.locks.gate import gate
from tests.support import HANG_SECONDS, tokens

pytestmark = pytest.mark.usefixtures("loops")

NOW = Deadline(0.0)


def test_it_wakes_who_waits_for_room(pool: KVPool) -> None:
    ledger = pool.storage.ledger
    with gate.lock, ledger.mutex:
        waiter = ledger.waiter()
    ledger.again([lambda: None], NOW)
    assert waiter.wait(0.0)


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


def test_a_use_of_a_batch_ends_once_though_two_threads_end_it(pool: KVPool) -> None:
    pool.put("key", tokens(1, 2))
    ledger = pool.storage.ledger
    with pool.gather(["key"]) as batch:
        assert ledger.use(batch.hold)
        job = partial(ledger.again, [partial(ledger.end_use, batch.hold)])
        job(NOW)
        job(NOW)
        assert batch.hold.users == 0
    assert not ledger.holds
    pool.check_integrity()


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


def test_a_use_that_cannot_end_for_want_of_memory_ends_with_the_next(
    pool: KVPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool.put("key", tokens(1, 2))
    ledger, batch = pool.storage.ledger, pool.gather(["key"])
    assert ledger.use(batch.hold)
    batch.close()
    failures = [MemoryError()]
    let_go = Ledger.let_go

    def fails_once(self: Ledger, entries: list[Entry]) -> list[Entry]:
        if failures:
            raise failures.pop()
        return let_go(self, entries)

    monkeypatch.setattr(Ledger, "let_go", fails_once)
    ledger.abandoned.append(partial(ledger.again, [partial(ledger.end_use, batch.hold)]))
    for users in (1, 0):
        pool.storage.drain_abandoned(NOW)
        assert batch.hold.users == users
    assert not ledger.holds
    pool.check_integrity()
