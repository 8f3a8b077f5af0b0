"""Leaves of many searches evaluated together, by threads: each gets its own, whoever shares its call."""

from __future__ import annotations

import gc
import random
import threading
import time
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextvars import Context, copy_context
from functools import partial
from typing import Any

import pytest
import torch

from concurrent_kv import (
    CapacityError,
    ClosedError,
    DropAndCorrect,
    DropLazily,
    DropOldest,
    InvalidArgumentError,
    InvalidTypeError,
    KeyNotFoundError,
    KVCacheManager,
    PositionSteps,
    ReentrantCallError,
    Search,
    SearchEndedError,
    WaitTimeoutError,
    WindowOverflowError,
)
from concurrent_kv.evaluation import NO_PARENT, Evaluated, Evaluator, Leaf
from concurrent_kv.evaluation import evaluator as evaluator_module
from concurrent_kv.evaluation import queue as queue_module
from concurrent_kv.evaluation.call import calls_here
from concurrent_kv.locks.deadline import Deadline
from concurrent_kv.pool.joint import JointBatch
from tests.evaluating import (
    ENVS,
    HEAD_DIM,
    HEADS,
    LAYERS,
    NEW,
    WINDOW,
    cheap_collections,
    counted_now,
    look_every,
    model,
    new_manager,
    root_sum,
    value_after,
)
from tests.interrupting import cut_at
from tests.support import HANG_SECONDS


@pytest.fixture(autouse=True)
def woken_or_never(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody looks by itself: a wake-up that is missing is a hang."""
    look_every(10 * HANG_SECONDS, monkeypatch)


@pytest.fixture
def manager() -> Iterator[KVCacheManager]:
    made = new_manager(recur_slots=100_000)
    yield made
    made.check_integrity()
    made.close()


def leaf(search: Any, parent: Any, child: Any, number: int = 0, env: int = 0) -> Leaf[int]:
    return Leaf(search, parent, child, number, env)


def wait_until(condition: Callable[[], bool]) -> None:
    """Lets other threads run until `condition` holds, within a bound."""
    deadline = Deadline(HANG_SECONDS)
    while not condition():
        assert deadline.left(), "it never came about"
        time.sleep(0)


class Threads:
    """Threads that must end, and raise nothing that their function did not hand back."""

    def __init__(self) -> None:
        self.results: dict[int, Any] = {}
        self._threads: list[threading.Thread] = []

    def start(self, work: Callable[[], Any]) -> int:
        number = len(self._threads)

        def run() -> None:
            try:
                self.results[number] = work()
            except Exception as error:
                self.results[number] = error

        self._threads.append(threading.Thread(target=run, daemon=True))
        self._threads[-1].start()
        return number

    def join(self) -> list[Any]:
        for thread in self._threads:
            thread.join(HANG_SECONDS)
            assert not thread.is_alive()
        return [self.results[number] for number in range(len(self._threads))]


class Gated:
    """A model that waits, at its `held` call, until it is let go on."""

    def __init__(self, held: int = 0) -> None:
        self.entered, self.go_on = threading.Event(), threading.Event()
        self.rows: list[int] = []
        self._held = held

    def __call__(self, batch: JointBatch, numbers: Sequence[int]) -> Evaluated[int]:
        self.rows.append(len(numbers))
        if len(self.rows) - 1 == self._held:
            self.entered.set()
            assert self.go_on.wait(HANG_SECONDS)
        return model(batch, numbers)


def play_tree(evaluate: Callable[[Leaf[int]], int], search: Any, env: int, seed: int, steps: int) -> None:
    """Grow a random tree, and compare each answer with what its path says."""
    draw = random.Random(seed)
    totals: dict[Any, int] = {"root": root_sum(env)}
    for step in range(steps):
        parent = draw.choice(list(totals)[-4:])
        key, number = (env, seed, step), draw.randrange(90)
        value = evaluate(leaf(search, parent, key, number, env))
        expected, totals[key] = value_after(totals[parent], number)
        assert value == expected


def test_one_leaf_is_gathered_evaluated_and_stored(manager: KVCacheManager) -> None:
    evaluator = Evaluator(manager, model)
    with manager.search([0]) as search:
        value, total = value_after(root_sum(0), 7)
        assert evaluator.evaluate(leaf(search, "root", "child", 7)) == value
        with search.gather(["child"], [0]) as batch:
            assert batch.side == (("side", value),)
            assert int(batch.data.sum()) == total
            assert batch.lengths == (3 + NEW,)


def test_leaves_of_several_searches_pools_and_roots_share_one_call(manager: KVCacheManager) -> None:
    calls: list[int] = []

    def counted(batch: JointBatch, numbers: Sequence[int]) -> Evaluated[int]:
        calls.append(len(numbers))
        return model(batch, numbers)

    evaluator = Evaluator(manager, counted, room=NEW)
    first, second = manager.search([0, 1]), manager.search([2])
    pool = manager.init_pools[3]
    with first, second:
        leaves = [
            leaf(second, "root", "a", 1, 2),
            leaf(first, "root", "b", 2, 0),
            Leaf(pool, "root", "c", 3),
            leaf(first, "root", "d", 4, 1),
            Leaf(pool, NO_PARENT, "e", 5),
            leaf(first, NO_PARENT, "f", 6, 0),
        ]
        expected = [value_after(root_sum(env), number) for env, number in ((2, 1), (0, 2), (3, 3), (1, 4))]
        expected += [value_after(0, 5), value_after(0, 6)]
        assert evaluator.evaluate_many(leaves) == [value for value, _ in expected]
        assert calls == [6]
        for store, key, (_, total) in zip((second, first, pool, first, pool, first), "abcdef", expected, strict=True):
            where: Any = store
            envs = {} if store is pool else {"env_ids": [2 if store is second else 0]}
            with where.gather([key], **envs) as batch:
                assert int(batch.data[:, :, :, : batch.start].sum()) == total
    manager.check_integrity()


@pytest.mark.parametrize("own_thread", [False, True])
@pytest.mark.parametrize("parallel_calls", [1, 2])
@pytest.mark.parametrize("row_sizes", [(), (1, 2, 4, 8)])
@pytest.mark.parametrize("shared", [False, True])
def test_threads_that_search_at_once_get_what_their_own_paths_say(
    manager: KVCacheManager, own_thread: bool, parallel_calls: int, row_sizes: Sequence[int], shared: bool
) -> None:
    evaluator = Evaluator(
        manager,
        model,
        max_rows=8,
        max_wait_seconds=0.05,
        own_thread=own_thread,
        parallel_calls=parallel_calls,
        row_sizes=row_sizes,
        room=NEW,
    )
    together = manager.search(range(ENVS), tokens=15_000)
    threads = Threads()

    def work(env: int) -> None:
        with evaluator.worker() as worker:
            if shared:
                play_tree(worker.evaluate, together, env, env, 25)
            else:
                with manager.search([env]) as search:
                    play_tree(worker.evaluate, search, env, env, 25)

    with together:
        for env in range(ENVS):
            threads.start(lambda env=env: work(env))  # type: ignore[misc]
        assert threads.join() == [None] * ENVS
    stats = evaluator.stats()
    assert stats.rows == 25 * ENVS
    assert sum(rows * calls for rows, calls in stats.rows_of_calls.items()) == stats.rows
    assert stats.failed_rows == 0
    evaluator.close()


def test_stats_are_added_and_subtracted_field_by_field(manager: KVCacheManager) -> None:
    one, other = Evaluator(manager, model, max_rows=2), Evaluator(manager, model)
    with manager.search([0]) as search:
        one.evaluate_many([leaf(search, "root", number, number) for number in range(3)])
        before = one.stats()
        with pytest.raises(KeyNotFoundError):
            one.evaluate_many([leaf(search, parent, 4, 4) for parent in ("root", "nowhere")])
        other.evaluate_many([leaf(search, "root", number, number) for number in range(3)])
    both, between = one.stats() + other.stats(), one.stats() - before
    assert (before.rows_of_calls, other.stats().rows_of_calls) == ({1: 1, 2: 1}, {3: 1})
    assert (both.calls, both.rows, both.failed_rows, both.rows_of_calls) == (4, 7, 1, {1: 2, 2: 1, 3: 1})
    assert (between.calls, between.rows, between.failed_rows, between.rows_of_calls) == (1, 1, 1, {1: 1})
    assert (both.rows_per_call, between.rows_per_call) == (7 / 4, 1.0)
    for name in ("wait", "gather", "model", "commit", "walk"):
        first, second, third = (getattr(stats, f"{name}_seconds") for stats in (before, one.stats(), other.stats()))
        assert getattr(both, f"{name}_seconds") == second + third
        assert getattr(between, f"{name}_seconds") == second - first


def test_workers_of_one_tree_share_a_search(manager: KVCacheManager) -> None:
    evaluator = Evaluator(manager, model, max_wait_seconds=0.05)
    threads = Threads()
    with manager.search([0], entries=400, tokens=30_000) as search:

        def work(seed: int) -> None:
            with evaluator.worker() as worker:
                play_tree(worker.evaluate, search, 0, seed, 30)

        for seed in range(4):
            threads.start(lambda seed=seed: work(seed))  # type: ignore[misc]
        assert threads.join() == [None] * 4
        assert len(search) == 120


# When a call begins ---------------------------------------------------------------------------------------------------


def test_a_call_waits_for_all_workers_and_no_longer(manager: KVCacheManager) -> None:
    gated = Gated(held=-1)
    evaluator = Evaluator(manager, gated, max_wait_seconds=HANG_SECONDS)
    workers = [evaluator.worker() for _ in range(3)]
    threads = Threads()
    with manager.search(range(ENVS)) as search:
        for number, worker in enumerate(workers):
            threads.start(lambda n=number, w=worker: w.evaluate(leaf(search, "root", n, n)))  # type: ignore[misc]
        assert threads.join() == [value_after(root_sum(0), number)[0] for number in range(3)]
        assert gated.rows == [3]
        # One that leaves is waited for no longer.
        threads = Threads()
        for number, worker in enumerate(workers[:2]):
            threads.start(lambda n=number, w=worker: w.evaluate(leaf(search, "root", n, n)))  # type: ignore[misc]
        wait_until(lambda: evaluator.queue.waiting_rows == 2)
        workers[2].close()
        threads.join()
        assert gated.rows == [3, 2]


class Looks:
    """Counts how often a queue is looked at before a wait, and does something between the first look and its wait."""

    def __init__(self, between: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        plain = queue_module.LeafQueue.seconds_until_due

        def looks(queue: queue_module.LeafQueue) -> float:
            seconds = plain(queue)
            if queue.waiting_rows:
                self.count += 1
                if self.count == 1:
                    between()
            return seconds

        monkeypatch.setattr(queue_module.LeafQueue, "seconds_until_due", looks)


@pytest.mark.parametrize("own_thread", [False, True])
def test_who_is_woken_between_its_look_and_its_wait_looks_again_and_once(
    manager: KVCacheManager, monkeypatch: pytest.MonkeyPatch, own_thread: bool
) -> None:
    evaluator = Evaluator(manager, model, max_wait_seconds=HANG_SECONDS, own_thread=own_thread)
    one, other, leaving = [evaluator.worker() for _ in range(3)]
    looks = Looks(leaving.close, monkeypatch)
    threads = Threads()
    with manager.search([0]) as search:
        threads.start(lambda: one.evaluate(leaf(search, "root", 1, 1)))
        wait_until(lambda: looks.count == 2)
        for _ in range(200):  # it sleeps now: the signal that woke it is not that which it waits for
            time.sleep(0)
        assert looks.count == 2
        other.close()
        assert threads.join() == [value_after(root_sum(0), 1)[0]]
    evaluator.close()


def test_a_worker_that_is_dropped_is_waited_for_no_longer(manager: KVCacheManager) -> None:
    evaluator = Evaluator(manager, model, max_wait_seconds=HANG_SECONDS)
    one, other = evaluator.worker(), evaluator.worker()
    threads = Threads()
    with manager.search([0]) as search:
        threads.start(lambda: one.evaluate(leaf(search, "root", 1, 1)))
        wait_until(lambda: evaluator.queue.waiting_rows == 1)
        del other
        gc.collect()
        assert threads.join() == [value_after(root_sum(0), 1)[0]]


class Changing(deque[Any]):
    """Rows that a thread with the lock changes at the first look without it, as may be where there is no GIL."""

    def __iter__(self) -> Iterator[Any]:
        self.looks = getattr(self, "looks", 0) + 1
        if self.looks == 1:
            raise RuntimeError("deque mutated during iteration")
        return super().__iter__()


def test_a_worker_that_is_dropped_while_rows_come_and_go_wakes_who_waits(manager: KVCacheManager) -> None:
    evaluator = Evaluator(manager, model, max_wait_seconds=HANG_SECONDS)
    one, other = evaluator.worker(), evaluator.worker()
    threads = Threads()
    waits: Any = evaluator.queue
    with manager.search([0]) as search:
        threads.start(lambda: one.evaluate(leaf(search, "root", 1, 1)))
        wait_until(lambda: evaluator.queue.waiting_rows == 1)
        with waits._lock:
            waits._rows = Changing(waits._rows)
        del other
        gc.collect()
        assert threads.join() == [value_after(root_sum(0), 1)[0]]


def test_a_finaliser_does_not_look_without_end_at_rows_that_come_and_go() -> None:
    looks: list[int] = []

    class Restless(deque[Any]):
        def __iter__(self) -> Iterator[Any]:
            looks.append(1)
            raise RuntimeError("deque mutated during iteration")

    assert queue_module._all_of(Restless()) == []
    assert len(looks) == queue_module.LOOKS_WITHOUT_LOCK


def test_a_worker_whose_thread_dies_is_waited_for_no_longer(manager: KVCacheManager) -> None:
    evaluator = Evaluator(manager, model, max_wait_seconds=HANG_SECONDS)
    threads = Threads()
    joined, die = threading.Event(), threading.Event()

    def dies() -> None:
        with evaluator.worker():
            joined.set()
            assert die.wait(HANG_SECONDS)
            raise RuntimeError("a bug of the worker's")

    with manager.search([0]) as search, evaluator.worker() as worker:
        threads.start(dies)
        assert joined.wait(HANG_SECONDS)
        threads.start(lambda: worker.evaluate(leaf(search, "root", 1, 1)))
        wait_until(lambda: evaluator.queue.waiting_rows == 1)
        die.set()
        died, value = threads.join()
        assert isinstance(died, RuntimeError)
        assert value == value_after(root_sum(0), 1)[0]


def test_a_call_begins_when_it_is_full_or_its_first_leaf_has_waited_long_enough(manager: KVCacheManager) -> None:
    gated = Gated(held=-1)
    evaluator = Evaluator(manager, gated, max_rows=2, max_wait_seconds=0.01)
    with manager.search([0]) as search, evaluator.worker() as worker, evaluator.worker():
        worker.evaluate_many([leaf(search, "root", number, number) for number in range(5)])
    assert gated.rows == [2, 2, 1]


def test_no_more_calls_are_under_way_than_were_asked_for(manager: KVCacheManager) -> None:
    together, most, lock = [0], [0], threading.Lock()

    def counted(batch: JointBatch, numbers: Sequence[int]) -> Evaluated[int]:
        with lock:
            together[0] += 1
            most[0] = max(most[0], together[0])
        try:
            return model(batch, numbers)
        finally:
            with lock:
                together[0] -= 1

    evaluator = Evaluator(manager, counted, max_rows=1, parallel_calls=2)
    threads = Threads()
    with manager.search([0], entries=400, tokens=30_000) as search:
        for seed in range(4):
            threads.start(lambda seed=seed: play_tree(evaluator.evaluate, search, 0, seed, 25))  # type: ignore[misc]
        assert threads.join() == [None] * 4
    assert 1 <= most[0] <= 2


@pytest.mark.parametrize("own_thread", [False, True])
def test_as_many_calls_are_under_way_as_were_asked_for(manager: KVCacheManager, own_thread: bool) -> None:
    both = threading.Barrier(2)

    def meets(batch: JointBatch, numbers: Sequence[int]) -> Evaluated[int]:
        both.wait(HANG_SECONDS)
        return model(batch, numbers)

    evaluator = Evaluator(manager, meets, max_rows=1, parallel_calls=2, own_thread=own_thread)
    threads = Threads()
    with manager.search([0]) as search:
        for number in range(2):
            threads.start(lambda n=number: evaluator.evaluate(leaf(search, "root", n, n)))  # type: ignore[misc]
        assert threads.join() == [value_after(root_sum(0), number)[0] for number in range(2)]
    evaluator.close()


def test_who_is_busy_with_a_call_is_not_left_to_make_the_next_one(manager: KVCacheManager) -> None:
    held = {number: threading.Event() for number in (1, 9)}
    entered = {number: threading.Event() for number in held}

    def holding(batch: JointBatch, numbers: Sequence[int]) -> Evaluated[int]:
        if numbers[0] in held:
            entered[numbers[0]].set()
            assert held[numbers[0]].wait(HANG_SECONDS)
        return model(batch, numbers)

    evaluator = Evaluator(manager, holding, max_rows=1, parallel_calls=2)
    threads = Threads()
    with manager.search([0]) as search:
        threads.start(lambda: evaluator.evaluate(leaf(search, "root", 9, 9)))
        assert entered[9].wait(HANG_SECONDS)
        threads.start(lambda: evaluator.evaluate_many([leaf(search, "root", n, n) for n in (1, 2)]))
        assert entered[1].wait(HANG_SECONDS)
        other = Threads()
        other.start(lambda: evaluator.evaluate(leaf(search, "root", 3, 3)))
        wait_until(lambda: evaluator.queue.waiting_rows == 2)
        held[9].set()
        # While whose leaf comes before makes a call still.
        assert other.join() == [value_after(root_sum(0), 3)[0]]
        held[1].set()
        threads.join()


# What goes wrong stays where it is ------------------------------------------------------------------------------------


def test_a_leaf_without_its_parent_hears_so_and_the_others_go_on(manager: KVCacheManager) -> None:
    evaluator = Evaluator(manager, model)
    with manager.search([0]) as search:
        leaves = [leaf(search, "root", 1, 1), leaf(search, "nowhere", 2, 2), leaf(search, "root", 3, 3)]
        with pytest.raises(KeyNotFoundError, match="nowhere"):
            evaluator.evaluate_many(leaves)
        assert not search._state.ledger.abandoned  # what was looked up with it is not left to a finaliser
        assert search.contains(1)
        assert not search.contains(2)
        assert search.contains(3)
    assert evaluator.stats().failed_rows == 1


def test_leaves_of_a_search_that_has_ended_hear_so_and_the_others_go_on(manager: KVCacheManager) -> None:
    evaluator = Evaluator(manager, model)
    with manager.search([0]) as search, manager.search([1]) as ended:
        ended.close()
        with pytest.raises(SearchEndedError):
            evaluator.evaluate_many([leaf(ended, "root", 1, 1, 1), leaf(search, "root", 2, 2)])
        assert search.contains(2)


def test_a_search_that_ends_during_the_call_takes_its_leaves_alone(manager: KVCacheManager) -> None:
    gated = Gated()
    evaluator = Evaluator(manager, gated)
    threads = Threads()
    going = manager.search([1])
    with manager.search([0]) as search:
        value, _ = value_after(root_sum(0), 2)
        leaves = [leaf(going, "root", 1, 1, 1), leaf(search, "root", 2, 2)]
        threads.start(lambda: evaluator.evaluate_many(leaves))
        assert gated.entered.wait(HANG_SECONDS)
        going.close()
        # What the ended search had is not given to others while the call reads it.
        for number in range(20):
            manager.recur_pool.put(number, manager.init_pools[2].get("root"))  # type: ignore[arg-type]
        gated.go_on.set()
        (error,) = threads.join()
        assert isinstance(error, SearchEndedError)
        with search.gather([2], [0]) as batch:
            assert batch.side == (("side", value),)


def test_what_is_read_stays_while_it_is_copied_however_its_search_ends(
    manager: KVCacheManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluator = Evaluator(manager, model)
    going = manager.search([1])
    with manager.search([0]) as search:
        evaluator.evaluate(leaf(going, "root", "parent", 5, 1))
        seen: list[int] = []
        tensor = manager.storage.tensor
        gather = type(tensor).gather_together

        def ends_it_first(self: Any, *arguments: Any, **options: Any) -> Any:
            if not going.closed:
                going.close()
                with manager.search([2], tokens=90_000) as other:
                    # All that can be had is written over.
                    for number in range(8):
                        evaluator.evaluate(leaf(other, "root", number, 11, 2))
                    found = gather(self, *arguments, **options)
                    seen.append(1)
                    return found
            return gather(self, *arguments, **options)

        monkeypatch.setattr(type(tensor), "gather_together", ends_it_first)
        sums: list[float] = []

        def looking(batch: JointBatch, numbers: Sequence[int]) -> Evaluated[int]:
            sums.append(float(batch.data[:, :1].sum()))
            return model(batch, numbers)

        watching = Evaluator(manager, looking)
        _, total = value_after(root_sum(1), 5)
        with pytest.raises(SearchEndedError):
            watching.evaluate_many([leaf(going, "parent", "x", 0, 1), leaf(search, "root", "y", 0)])
        assert sums == [total]
        assert search.contains("y")


def test_a_model_that_raises_is_heard_by_all_of_that_call_and_no_others(manager: KVCacheManager) -> None:
    def raising(batch: JointBatch, numbers: Sequence[int]) -> Evaluated[int]:
        if 13 in numbers:
            raise ValueError("thirteen")
        return model(batch, numbers)

    evaluator = Evaluator(manager, raising, max_wait_seconds=HANG_SECONDS)
    threads = Threads()
    with manager.search([0]) as search:
        one, other = evaluator.worker(), evaluator.worker()
        threads.start(lambda: one.evaluate(leaf(search, "root", 1, 13)))
        threads.start(lambda: other.evaluate(leaf(search, "root", 2, 2)))
        first, second = threads.join()
        assert isinstance(first, ValueError)
        assert isinstance(second, ValueError)
        assert first is not second
        assert len(search) == 0
        one.close()
        assert other.evaluate(leaf(search, "root", 2, 2)) == value_after(root_sum(0), 2)[0]


@pytest.mark.parametrize("room", [NEW, None])
def test_a_leaf_whose_parent_leaves_no_room_hears_so_and_the_others_go_on(
    manager: KVCacheManager, room: int | None
) -> None:
    evaluator = Evaluator(manager, model, room=room)
    with manager.search([0]) as search, manager.search([1]) as other:
        parent: Any = "root"
        for number in range(30 if room else 31):  # 3 tokens and these
            if number == 30:
                batch = search.gather([parent], [0])
                for layer in range(LAYERS):
                    batch.append(layer, torch.ones(1, HEADS, 1, HEAD_DIM), torch.ones(1, HEADS, 1, HEAD_DIM))
                search.commit([number], batch)
            else:
                evaluator.evaluate(leaf(search, parent, number, number))
            parent = number
        leaves = [leaf(search, parent, "x", 1), leaf(other, "root", "y", 2, 1)]
        with pytest.raises(WindowOverflowError, match=f"the parent {parent} of this leaf has"):
            evaluator.evaluate_many(leaves if room else leaves[:1])
        if room:
            assert other.contains("y")
        assert not search.contains("x")


class BrokenKey:
    """A key that cannot be compared with the root's."""

    def __hash__(self) -> int:
        return hash("root")

    def __eq__(self, other: object) -> bool:
        raise ValueError("not to be compared")


@pytest.mark.parametrize(("parent", "env", "error"), [("root", 77, InvalidArgumentError), (BrokenKey(), 0, ValueError)])
def test_a_leaf_that_cannot_be_looked_up_hears_so_and_the_others_of_its_search_go_on(
    manager: KVCacheManager, parent: Any, env: int, error: type[Exception]
) -> None:
    evaluator = Evaluator(manager, model)
    with manager.search([0]) as search:
        with pytest.raises(error):
            evaluator.evaluate_many([leaf(search, parent, 1, 1, env), leaf(search, "root", 2, 2)])
        assert search.keys() == [2]


def test_two_leaves_of_one_key_are_both_answered_and_the_later_is_kept(manager: KVCacheManager) -> None:
    evaluator = Evaluator(manager, model)
    with manager.search([0]) as search:
        values = evaluator.evaluate_many([leaf(search, "root", "same", 1), leaf(search, "root", "same", 2)])
        assert values == [value_after(root_sum(0), number)[0] for number in (1, 2)]
        with search.gather(["same"], [0]) as batch:
            assert batch.side == (("side", values[1]),)


def test_what_a_call_that_failed_has_read_is_let_go_though_its_error_is_kept(
    manager: KVCacheManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments: Any, **options: Any) -> None:
        raise ValueError("no copy")

    evaluator = Evaluator(manager, model)
    with manager.search([0]) as search:
        with monkeypatch.context() as patch:
            patch.setattr(type(manager.storage.tensor), "gather_together", fails)
            with pytest.raises(ValueError, match="no copy") as caught:
                evaluator.evaluate(leaf(search, "root", 1))
        before = manager.check_integrity().handles
        del caught
        gc.collect()
        assert manager.check_integrity().handles == before == 1  # the search itself
        assert evaluator.evaluate(leaf(search, "root", 1, 1)) == value_after(root_sum(0), 1)[0]


def test_an_error_between_two_searches_is_not_heard_by_the_first(manager: KVCacheManager) -> None:
    class Answers(list[int]):
        def __getitem__(self, place: Any) -> Any:
            if isinstance(place, slice) and place.start:
                raise ValueError("only the first")
            return super().__getitem__(place)

    def half(batch: JointBatch, numbers: Sequence[int]) -> Evaluated[int]:
        return Evaluated(Answers(model(batch, numbers).outputs))

    evaluator = Evaluator(manager, half, max_wait_seconds=HANG_SECONDS)
    threads = Threads()
    with manager.search([0]) as first, manager.search([1]) as second:
        one, other = evaluator.worker(), evaluator.worker()
        threads.start(lambda: one.evaluate(leaf(first, "root", 1, 1)))
        wait_until(lambda: evaluator.queue.waiting_rows == 1)
        threads.start(lambda: other.evaluate(leaf(second, "root", 1, 1, 1)))
        value, error = threads.join()
        assert value == value_after(root_sum(0), 1)[0]
        assert isinstance(error, ValueError)
        assert first.contains(1)


def test_a_wait_for_room_is_not_made_once_more_for_each_leaf(
    manager: KVCacheManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[int] = []

    def waits(self: Search, keys: Sequence[Any], *arguments: Any, **options: Any) -> None:
        tries.append(len(keys))
        raise WaitTimeoutError("no room in time")

    monkeypatch.setattr(Search, "commit", waits)
    evaluator = Evaluator(manager, model)
    with manager.search([0]) as search, pytest.raises(WaitTimeoutError):
        evaluator.evaluate_many([leaf(search, "root", number, number) for number in range(4)])
    assert tries == [4]


def test_an_error_of_the_model_says_where_it_was_raised(manager: KVCacheManager) -> None:
    def fails_here(batch: JointBatch, numbers: Sequence[int]) -> Evaluated[int]:
        raise ValueError("no")

    evaluator = Evaluator(manager, fails_here)
    with manager.search([0]) as search, pytest.raises(ValueError, match="no") as caught:
        evaluator.evaluate(leaf(search, "root", 1))
    assert "in fails_here" in "".join(traceback.format_exception(caught.value))


def test_a_model_that_asks_its_own_evaluator_hears_so_and_another_it_may_ask(manager: KVCacheManager) -> None:
    def asks(batch: JointBatch, numbers: Sequence[int]) -> Evaluated[int]:
        with manager.search([1]) as search:
            kept.append(copy_context())
            answers = [evaluators[number].evaluate(leaf(search, "root", 1, 2, 1)) for number in numbers]
        model(batch, numbers)
        return Evaluated(answers)

    evaluators = [Evaluator(manager, asks), Evaluator(manager, model)]
    kept: list[Context] = []
    with manager.search([0]) as search:
        with pytest.raises(ReentrantCallError, match="its own model"):
            evaluators[0].evaluate(leaf(search, "root", 1, 0))
        assert evaluators[0].evaluate(leaf(search, "root", 1, 1)) == value_after(root_sum(1), 2)[0]
        # Whoever the model has left behind, such as a task that it began, may ask when the call is over.
        assert kept[0].run(evaluators[0].evaluate, leaf(search, "root", 1, 1)) == value_after(root_sum(1), 2)[0]
    assert calls_here.get() == ()


@pytest.mark.parametrize("own_thread", [False, True])
def test_a_model_that_ends_its_thread_is_survived_by_the_others(manager: KVCacheManager, own_thread: bool) -> None:
    times = [0]

    def ending(batch: JointBatch, numbers: Sequence[int]) -> Evaluated[int]:
        times[0] += 1
        if times[0] == 1:
            raise SystemExit(3)
        return model(batch, numbers)

    evaluator = Evaluator(manager, ending, max_wait_seconds=HANG_SECONDS, own_thread=own_thread)
    with manager.search([0]) as search:
        ended: list[BaseException] = []
        values: list[int] = []

        def work(worker: Any, number: int) -> None:
            with worker:
                try:
                    values.append(worker.evaluate(leaf(search, "root", number, number)))
                except (SystemExit, RuntimeError) as error:
                    ended.append(error)

        threads = Threads()
        for number, worker in enumerate([evaluator.worker(), evaluator.worker()]):
            threads.start(lambda w=worker, n=number: work(w, n))  # type: ignore[misc]
        threads.join()
        # A thread of the evaluator's tells all; a caller's own goes, and the other leaf is evaluated by its caller.
        assert (len(ended), len(values)) == ((2, 0) if own_thread else (1, 1))
        assert evaluator.evaluate(leaf(search, "root", 5, 5)) == value_after(root_sum(0), 5)[0]
    evaluator.close()


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ("nothing", "must return an Evaluated, got str"),
        (Evaluated([1, 2, 3]), "outputs of 1 leaves, got 3"),
        (Evaluated([1], sides=[1, 2]), "sides of 1 leaves, got 2"),
        (Evaluated(None), "outputs as a sequence, got None"),  # type: ignore[arg-type]
        (Evaluated({0: 1}), "outputs as a sequence, got {0: 1}"),  # type: ignore[arg-type]
        (Evaluated({1}), "outputs as a sequence, got {1}"),  # type: ignore[arg-type]
        (Evaluated("a"), "outputs as a sequence, got 'a'"),
        (Evaluated(torch.tensor(1)), "outputs as a sequence, got tensor"),  # type: ignore[arg-type]
        (Evaluated([1], sides=5), "sides as a sequence, got 5"),  # type: ignore[arg-type]
    ],
)
def test_a_model_that_answers_something_else_is_told_so(manager: KVCacheManager, answer: Any, words: str) -> None:
    evaluator: Evaluator[int, int] = Evaluator(manager, lambda batch, numbers: answer)
    with manager.search([0]) as search, pytest.raises((InvalidTypeError, InvalidArgumentError), match=words):
        evaluator.evaluate(leaf(search, "root", 1))


def test_a_row_of_a_pool_that_outgrows_the_window_is_cut_as_the_evaluator_says(manager: KVCacheManager) -> None:
    limit = 9
    evaluator = Evaluator(manager, model, room=NEW, overflow=DropOldest(limit, 3))
    pool, parent = manager.init_pools[0], "root"
    for number in range(8):
        key = f"{number}"
        evaluator.evaluate(Leaf(pool, parent, key, number))
        parent = key
    with pool.gather([parent]) as batch:
        assert 0 < batch.lengths[0] <= limit


def test_a_leaf_whose_pool_is_cleared_during_the_call_was_stored_before_the_clear(manager: KVCacheManager) -> None:
    pool = manager.init_pools[0]

    def clearing(batch: JointBatch, numbers: Sequence[int]) -> Evaluated[int]:
        answer = model(batch, numbers)
        pool.clear()
        return answer

    assert Evaluator(manager, clearing).evaluate(Leaf(pool, "root", "child", 1)) == value_after(root_sum(0), 1)[0]
    assert pool.keys() == []


def test_of_leaves_that_do_not_all_fit_those_that_do_are_stored() -> None:
    manager = new_manager(recur_slots=1000 * WINDOW)
    evaluator = Evaluator(manager, model)
    with manager.search([0], entries=2, tokens=2 * WINDOW) as search, manager.search([1], entries=998):
        leaves = [leaf(search, "root", number, number) for number in range(4)]
        with pytest.raises(CapacityError):
            evaluator.evaluate_many(leaves)
        assert search.keys() == [0, 1]
    manager.check_integrity()
    manager.close()


def test_who_waits_too_long_takes_the_leaf_out(manager: KVCacheManager) -> None:
    gated = Gated()
    evaluator = Evaluator(manager, gated)
    threads = Threads()
    with manager.search([0]) as search:
        threads.start(lambda: evaluator.evaluate(leaf(search, "root", 1, 1)))
        assert gated.entered.wait(HANG_SECONDS)
        with pytest.raises(WaitTimeoutError, match=r"within 0\.01 s"):
            evaluator.evaluate(leaf(search, "root", 2, 2), timeout=0.01)
        gated.go_on.set()
        assert threads.join() == [value_after(root_sum(0), 1)[0]]
        assert gated.rows == [1]
        assert evaluator.evaluate(leaf(search, "root", 3, 3)) == value_after(root_sum(0), 3)[0]


@pytest.mark.parametrize("own_thread", [False, True])
def test_closing_wakes_who_waits_and_lets_the_call_under_way_end(manager: KVCacheManager, own_thread: bool) -> None:
    gated = Gated()
    evaluator = Evaluator(manager, gated, own_thread=own_thread)
    threads = Threads()
    with manager.search([0]) as search:
        threads.start(lambda: evaluator.evaluate(leaf(search, "root", 1, 1)))
        assert gated.entered.wait(HANG_SECONDS)
        threads.start(lambda: evaluator.evaluate(leaf(search, "root", 2, 2)))
        wait_until(lambda: evaluator.queue.waiting_rows == 1)
        evaluator.close()
        gated.go_on.set()
        value, error = threads.join()
        assert value == value_after(root_sum(0), 1)[0]
        assert isinstance(error, ClosedError)
        with pytest.raises(ClosedError):
            evaluator.evaluate(leaf(search, "root", 3, 3))


@pytest.mark.parametrize("where", ["looking", "calling"])
def test_who_waits_for_a_thread_of_the_evaluators_that_ends_hears_so(
    manager: KVCacheManager, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    ended: list[Any] = []

    def ends(*arguments: Any) -> bool:
        raise MemoryError("where nobody expects it")

    monkeypatch.setattr(threading, "excepthook", ended.append)
    if where == "looking":
        monkeypatch.setattr(queue_module.LeafQueue, "_is_due", ends)
    else:
        monkeypatch.setattr(evaluator_module, "_call_for_others", ends)
    evaluator = Evaluator(manager, model, own_thread=True)
    with manager.search([0]) as search, pytest.raises(ClosedError):
        evaluator.evaluate(leaf(search, "root", 1))
    wait_until(lambda: bool(ended))
    monkeypatch.undo()
    assert counted_now(evaluator) == (0, 0, 0, 0, 0)


def test_a_closed_evaluator_takes_no_workers(manager: KVCacheManager) -> None:
    evaluator = Evaluator(manager, model)
    with evaluator.worker() as worker, manager.search([0]) as search:
        evaluator.close()
        evaluator.close()
        with pytest.raises(ClosedError):
            evaluator.worker()
        with pytest.raises(ClosedError):
            worker.evaluate(leaf(search, "root", 1))
        assert counted_now(evaluator) == (0, 0, 1, 0, 0)
    assert counted_now(evaluator) == (0, 0, 0, 0, 0)


# Cut off -------------------------------------------------------------------------------------------------------------


def test_a_caller_that_is_cut_off_anywhere_holds_nobody_up_and_is_counted_no_more(manager: KVCacheManager) -> None:
    files = {str(module.__file__) for module in (evaluator_module, queue_module)}
    evaluator = Evaluator(manager, model, max_wait_seconds=HANG_SECONDS)
    number = 0
    while True:
        number += 1
        with manager.search([0], entries=20) as search, manager.search([1], entries=20) as others:
            threads = Threads()
            with evaluator.worker() as cut_off, evaluator.worker() as other:
                threads.start(lambda: other.evaluate(leaf(others, "root", 1, 1, 1)))
                wait_until(lambda: evaluator.queue.waiting_rows == 1)
                leaves = [leaf(search, "root", each, each) for each in range(2)]
                was_cut = cut_at(number, partial(cut_off.evaluate_many, leaves), files, jumps=True)
                assert evaluator.queue.waiting_rows <= 1  # the other's
                cut_off.close()
                assert threads.join() == [value_after(root_sum(1), 1)[0]]
        assert counted_now(evaluator) == (0, 0, 0, 0, 0)
        if not was_cut:
            break
    assert number > 100
    with cheap_collections():
        for place in range(1, 30):
            cut_at(place, evaluator.worker, files)
            gc.collect()
            assert counted_now(evaluator) == (0, 0, 0, 0, 0)
    manager.repair()  # what a commit had, and was cut off


@pytest.mark.parametrize("how", ["dropped", "closed"])
def test_an_evaluator_that_is_dropped_or_closed_ends_its_thread(manager: KVCacheManager, how: str) -> None:
    before = set(threading.enumerate())
    evaluator = Evaluator(manager, model, own_thread=True)
    (thread,) = set(threading.enumerate()) - before
    if how == "dropped":
        del evaluator
        gc.collect()
    else:
        evaluator.close()
    thread.join(HANG_SECONDS)
    assert not thread.is_alive()


# Shapes, and what cannot be -------------------------------------------------------------------------------------------


def test_with_row_sizes_a_batch_has_the_same_shape_and_memory_each_time(manager: KVCacheManager) -> None:
    seen: list[tuple[tuple[int, ...], int, int]] = []
    kept: list[torch.Tensor] = []  # other memory would be at other addresses
    weight = torch.ones((), requires_grad=True)

    def looking(batch: JointBatch, numbers: Sequence[int]) -> Evaluated[int]:
        seen.append((tuple(batch.data.shape), batch.data.data_ptr(), batch.start))
        kept.append(batch.data)
        assert batch.data.grad_fn is None  # what the call before wrote into it, with whatever gradients, is over
        batch.data.mul_(weight)
        assert not batch.data[:, len(numbers) :].any()
        assert batch.padding.tolist()[len(numbers) :] == [batch.start] * (batch.batch_size - len(numbers))
        return model(batch, numbers)

    evaluator = Evaluator(manager, looking, max_rows=4, row_sizes=(2, 4), room=NEW)
    with manager.search([0]) as search:
        for step in range(3):
            evaluator.evaluate_many([leaf(search, "root", (step, number), number) for number in range(3)])
            evaluator.evaluate(leaf(search, (step, 1), (step, 9), 1))
    whole = (2 * LAYERS, 4, HEADS, WINDOW, HEAD_DIM)
    assert {shape for shape, _, _ in seen} == {whole, (whole[0], 2, *whole[2:])}
    assert len({address for _, address, _ in seen}) == 2
    assert {start for _, _, start in seen} == {WINDOW - NEW}


def test_what_was_handed_in_and_its_output_are_let_go_without_the_collector(manager: KVCacheManager) -> None:
    class Thing:
        pass

    def makes(batch: JointBatch, numbers: Sequence[Any]) -> Evaluated[Any]:
        model(batch, [1] * len(numbers))
        return Evaluated([Thing() for _ in numbers])

    evaluator = Evaluator(manager, makes)
    gc.collect()
    gc.disable()
    try:
        with manager.search([0]) as search:
            given = Thing()
            got = evaluator.evaluate(Leaf(search, "root", "child", given, 0))
            alive = weakref.ref(given), weakref.ref(got)
            del given, got
            assert [each() for each in alive] == [None, None]
    finally:
        gc.enable()


def test_leaves_may_come_from_a_generator(manager: KVCacheManager) -> None:
    evaluator = Evaluator(manager, model)
    with manager.search([0]) as search:
        found = evaluator.evaluate_many(leaf(search, "root", number, number) for number in range(3))  # type: ignore[arg-type]
        assert found == [value_after(root_sum(0), number)[0] for number in range(3)]


def test_with_one_row_a_call_the_batch_is_what_a_gather_gives(manager: KVCacheManager) -> None:
    batches: list[torch.Tensor] = []

    def looking(batch: JointBatch, numbers: Sequence[int]) -> Evaluated[int]:
        batches.append(batch.data.clone())
        return model(batch, numbers)

    evaluator = Evaluator(manager, looking, max_rows=1, room=NEW)
    with manager.search([0, 1]) as search:
        evaluator.evaluate_many([leaf(search, "root", env, env, env) for env in range(2)])
        for env, found in enumerate(batches):
            with search.gather(["root"], [env], room=NEW) as batch:
                assert torch.equal(batch.data, found)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_rows": 0}, "max_rows"),
        ({"parallel_calls": 0}, "parallel_calls"),
        ({"max_wait_seconds": -1.0}, "max_wait_seconds"),
        ({"row_sizes": (2, 1), "room": 2}, "row_sizes must ascend"),
        ({"row_sizes": (2,), "room": 2, "max_rows": 4}, "to at least max_rows=4"),
        ({"row_sizes": (64,)}, "room must be given"),
        ({"room": WINDOW + 1}, "room must be at most"),
    ],
)
def test_what_cannot_work_is_refused(manager: KVCacheManager, options: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidArgumentError, match=words):
        Evaluator(manager, model, **options)


def test_leaves_of_other_managers_and_other_things_are_refused(manager: KVCacheManager) -> None:
    evaluator = Evaluator(manager, model)
    other = new_manager()
    with other.search([0]) as search:
        with pytest.raises(InvalidArgumentError, match="of another"):
            evaluator.evaluate(leaf(search, "root", 1))
        with pytest.raises(InvalidTypeError, match="type Leaf, got str"):
            evaluator.evaluate("leaf")  # type: ignore[arg-type]
        with pytest.raises(InvalidTypeError, match="got int"):
            evaluator.evaluate(leaf(3, "root", 1))
        with pytest.raises(InvalidTypeError, match="leaves must be a sequence of leaves, got Leaf"):
            evaluator.evaluate_many(leaf(search, "root", 1))  # type: ignore[arg-type]
        with pytest.raises(InvalidTypeError, match="searches must be a sequence of generators, got None"):
            evaluator.run_many(None)  # type: ignore[arg-type]
    with pytest.raises(InvalidTypeError, match="must be a KVCacheManager"):
        Evaluator("manager", model)  # type: ignore[arg-type]
    with pytest.raises(InvalidTypeError, match="row_sizes must be a sequence of ints, got 64"):
        Evaluator(manager, model, row_sizes=64)  # type: ignore[arg-type]
    other.close()


# What is read and stored ----------------------------------------------------------------------------------------------


LIMIT, DROPPED = 9, 3
DIFFERENCE = torch.randint(1, 5, (LAYERS, 2, HEADS, WINDOW, HEAD_DIM)).float()


def overflows(manager: KVCacheManager) -> dict[str, Any]:
    layout = manager.storage.layout
    return {
        "oldest": DropOldest(LIMIT, DROPPED),
        "correct": DropAndCorrect(LIMIT, DROPPED, DIFFERENCE, layout),
        "lazily": DropLazily(LIMIT, DROPPED, PositionSteps(layout, DROPPED, DIFFERENCE)),
    }


@pytest.mark.parametrize("overflow", ["oldest", "correct", "lazily"])
@pytest.mark.parametrize("row_sizes", [(), (8,)])
def test_what_is_read_and_stored_together_is_what_each_search_reads_and_stores_alone(
    manager: KVCacheManager, overflow: str, row_sizes: Sequence[int]
) -> None:
    seen: list[torch.Tensor] = []

    def appends(batch: Any, numbers: Sequence[int]) -> Evaluated[None]:
        seen.extend(
            batch.data[:, row, :, batch.start - held : batch.start].clone()
            for row, held in enumerate(batch.lengths[: len(numbers)])
        )
        new = torch.zeros(batch.batch_size, HEADS, NEW, HEAD_DIM)
        for row, number in enumerate(numbers):
            new[row] = number
        for layer in range(LAYERS):
            batch.append(layer, new, new + 0.5)
        return Evaluated([None] * len(numbers))

    alone = new_manager(recur_slots=100_000)
    evaluator: Any = Evaluator(manager, appends, room=NEW, max_rows=8, row_sizes=row_sizes)
    draw = random.Random(5)
    options = overflows(manager)[overflow], overflows(alone)[overflow]
    with (
        manager.search([0, 1], overflow=options[0]) as first,
        manager.search([2], overflow=options[0]) as second,
        alone.search([0, 1], overflow=options[1]) as first_alone,
        alone.search([2], overflow=options[1]) as second_alone,
    ):
        known: dict[int, list[Any]] = {env: ["root"] for env in range(3)}
        for step in range(12):
            asked = [(env, draw.choice(known[env][-3:]), (env, step), 10 * step + env) for env in (2, 0, 1)]
            evaluator.evaluate_many(
                [leaf(second if env == 2 else first, parent, key, number, env) for env, parent, key, number in asked]
            )
            together, seen[:] = list(seen), []
            for env, parent, key, number in asked:
                of_env = second_alone if env == 2 else first_alone
                with of_env.gather([parent], [env], room=NEW) as batch:
                    appends(batch, [number])
                    of_env.commit([key], batch)
                known[env].append(key)
            assert all(map(torch.equal, together, seen))
            seen.clear()
    alone.check_integrity()
    alone.close()


def test_a_model_compiled_for_fixed_shapes_is_compiled_once_for_each_size(manager: KVCacheManager) -> None:
    graphs: list[Any] = []

    def compiler(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    def totals(rows: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
        return rows.sum((0, 2, 3, 4)) + 0 * padding

    torch._dynamo.reset()
    compiled = torch.compile(totals, backend=compiler, dynamic=False)
    sums: list[float] = []

    def looking(batch: JointBatch, numbers: Sequence[int]) -> Evaluated[int]:
        sums.extend(compiled(batch.data[:, :, :, : batch.start], batch.padding)[: len(numbers)].tolist())
        return model(batch, numbers)

    evaluator = Evaluator(manager, looking, max_rows=4, row_sizes=(2, 4), room=NEW)
    with manager.search([0, 1]) as search:
        for step, rows in enumerate((1, 2, 3, 4, 2, 1, 3)):
            sums.clear()
            evaluator.evaluate_many([leaf(search, "root", (step, row), row, row % 2) for row in range(rows)])
            assert sums == [root_sum(row % 2) for row in range(rows)]
    assert len(graphs) == 2
    torch._dynamo.reset()
