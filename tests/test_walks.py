"""Searches written as generators, led from leaf to leaf by whichever thread calls the model: each gets its own.

No thread looks by itself here (`woken_or_never`): a hand-over that is missing is a hang.
"""

from __future__ import annotations

import gc
import inspect
import logging
import math
import os
import signal
import threading
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from itertools import count
from typing import Any

import pytest

from concurrent_kv import (
    ClosedError,
    InvalidArgumentError,
    InvalidTypeError,
    KeyNotFoundError,
    KVCacheManager,
    ReentrantCallError,
    WaitTimeoutError,
    WrongProcessError,
)
from concurrent_kv.evaluation import Evaluated, Evaluator, Leaf, Walk
from concurrent_kv.evaluation import call as call_module
from concurrent_kv.evaluation import evaluator as evaluator_module
from concurrent_kv.evaluation import queue as queue_module
from concurrent_kv.evaluation import tickets as tickets_module
from concurrent_kv.evaluation.call import calls_here
from concurrent_kv.evaluation.tickets import Run
from concurrent_kv.pool.joint import JointBatch
from tests.evaluating import (
    ENVS,
    NEW,
    counted_now,
    look_every,
    model,
    new_manager,
    root_sum,
    tree_walk,
    value_after,
)
from tests.interrupting import cut_at
from tests.support import HANG_SECONDS
from tests.test_evaluator import Gated, Threads, leaf, play_tree, wait_until

FILES = {str(module.__file__) for module in (call_module, evaluator_module, queue_module, tickets_module)}
OWN_THREAD = pytest.mark.parametrize("own_thread", [False, True])
NOTHING = (0, 0, 0, 0, 0)


@pytest.fixture(autouse=True)
def woken_or_never(monkeypatch: pytest.MonkeyPatch) -> None:
    """No caller looks by itself: a wake-up that is missing is a hang."""
    look_every(10 * HANG_SECONDS, monkeypatch)


@pytest.fixture
def manager() -> Iterator[KVCacheManager]:
    made = new_manager(recur_slots=100_000)
    yield made
    made.check_integrity()
    made.close()


def chain(search: Any, name: str, numbers: Sequence[int], env: int = 0) -> Walk[int, int, list[int]]:
    """Goes down one path, and returns what it heard."""
    parent, heard = "root", []
    for step, number in enumerate(numbers):
        heard.append((yield leaf(search, parent, (name, step), number, env)))
        parent = (name, step)  # type: ignore[assignment]
    return heard


def answers(numbers: Sequence[int], env: int = 0) -> list[int]:
    """What the model says along a chain."""
    total, found = root_sum(env), []
    for number in numbers:
        value, total = value_after(total, number)
        found.append(value)
    return found


class Watched:
    """Walks that say that they were closed, and by which thread."""

    def __init__(self) -> None:
        self.closed: list[str] = []
        self.closed_in: list[int] = []

    def __call__(self, steps: Walk[int, int, Any], name: str = "") -> Walk[int, int, Any]:
        try:
            return (yield from steps)
        except GeneratorExit:
            self.closed.append(name)
            self.closed_in.append(threading.get_ident())
            raise


def is_closed(search: Generator[Any, Any, Any]) -> bool:
    return inspect.getgeneratorstate(search) == inspect.GEN_CLOSED


# Whose is what -------------------------------------------------------------------------------------------------------


def test_a_walk_is_sent_the_output_of_each_leaf_and_its_caller_hears_what_it_returns(manager: KVCacheManager) -> None:
    evaluator = Evaluator(manager, model)
    with manager.search([0]) as search:
        assert evaluator.run(chain(search, "a", [7, 8, 9])) == answers([7, 8, 9])
        assert len(search) == 3
    stats = evaluator.stats()
    assert (stats.rows, stats.calls, stats.failed_rows) == (3, 3, 0)
    assert stats.walk_seconds > 0
    assert counted_now(evaluator) == NOTHING


@OWN_THREAD
def test_walks_that_run_side_by_side_share_calls_and_are_heard_in_their_order(
    manager: KVCacheManager, own_thread: bool
) -> None:
    evaluator = Evaluator(manager, model, max_wait_seconds=HANG_SECONDS, own_thread=own_thread)
    with manager.search([0]) as search:
        numbers = [[1, 2, 3], [], [4, 5, 6], [7]]
        walks = [chain(search, str(number), each) for number, each in enumerate(numbers)]
        assert evaluator.run_many(walks) == [answers(each) for each in numbers]
        assert dict(evaluator.stats().rows_of_calls) == {2: 2, 3: 1}
        assert evaluator.run_many([]) == []
        assert evaluator.run_many(chain(search, name, [1]) for name in "xy") == [answers([1])] * 2
    evaluator.close()


@OWN_THREAD
@pytest.mark.parametrize("parallel_calls", [1, 2])
@pytest.mark.parametrize(("max_rows", "row_sizes"), [(8, ()), (8, (1, 2, 4, 8)), (1, ())])
def test_walks_tasks_of_workers_and_plain_callers_that_search_at_once_hear_what_their_own_paths_say(
    manager: KVCacheManager, own_thread: bool, parallel_calls: int, max_rows: int, row_sizes: Sequence[int]
) -> None:
    evaluator = Evaluator(
        manager,
        model,
        max_rows=max_rows,
        max_wait_seconds=0.05,
        own_thread=own_thread,
        parallel_calls=parallel_calls,
        row_sizes=row_sizes,
        room=NEW,
    )
    threads = Threads()

    def works(search: Any) -> None:
        with evaluator.worker() as worker:
            play_tree(worker.evaluate, search, 2, 2, 20)

    with manager.search(range(ENVS), entries=200, tokens=15_000) as search:
        threads.start(lambda: evaluator.run(tree_walk(search, 0, 0, 20)))
        threads.start(lambda: evaluator.run_many([tree_walk(search, 1, seed, 20) for seed in (4, 5)]))
        threads.start(lambda: works(search))
        threads.start(lambda: play_tree(evaluator.evaluate, search, 3, 3, 20))
        assert threads.join() == [0, [4, 5], None, None]
    stats = evaluator.stats()
    assert (stats.rows, stats.failed_rows) == (100, 0)
    assert sum(rows * calls for rows, calls in stats.rows_of_calls.items()) == stats.rows
    evaluator.close()
    assert counted_now(evaluator) == NOTHING


@OWN_THREAD
def test_two_walks_of_one_tree_that_threads_lead_on_at_once_hear_their_own(
    manager: KVCacheManager, own_thread: bool
) -> None:
    evaluator = Evaluator(manager, model, max_wait_seconds=0.01, parallel_calls=2, own_thread=own_thread)
    threads = Threads()
    lock, keys = threading.Lock(), count()
    with manager.search([0], entries=600, tokens=40_000) as search:
        totals: dict[Any, int] = {"root": root_sum(0)}

        def shares(steps: int) -> Walk[int, int, int]:
            """Grows the tree that the others grow, too."""
            for step in range(steps):
                with lock:  # which is free while it waits for its leaf
                    parent, key = list(totals)[-1 - step % min(3, len(totals))], next(keys)
                value = yield leaf(search, parent, key, step)
                expected, total = value_after(totals[parent], step)
                assert value == expected
                if len(totals) < 12:
                    with lock:
                        totals[key] = total
            return steps

        for _ in range(3):
            threads.start(lambda: evaluator.run_many([shares(40), shares(40)]))
        assert threads.join() == [[40, 40]] * 3
        assert len(search) == 240
    assert evaluator.stats().rows == 240
    evaluator.close()
    assert counted_now(evaluator) == NOTHING


@OWN_THREAD
def test_with_two_parallel_calls_two_threads_lead_walks_on_at_once(manager: KVCacheManager, own_thread: bool) -> None:
    evaluator = Evaluator(manager, model, parallel_calls=2, own_thread=own_thread)
    both, threads = threading.Barrier(2), Threads()

    def meets(search: Any, name: str) -> Walk[int, int, list[int]]:
        both.wait(HANG_SECONDS)
        return (yield from chain(search, name, [1, 2]))

    with manager.search([0]) as search:
        for name in "ab":
            threads.start(lambda name=name: evaluator.run(meets(search, name)))  # type: ignore[misc]
        assert threads.join() == [answers([1, 2])] * 2
    evaluator.close()


def test_with_one_call_at_a_time_no_two_walks_run_at_once(manager: KVCacheManager) -> None:
    evaluator = Evaluator(manager, model, max_wait_seconds=0.01)
    together: list[int] = []
    most, threads = [0], Threads()

    def alone(search: Any, env: int) -> Walk[int, int, None]:
        for step in range(20):
            together.append(env)
            most[0] = max(most[0], len(together))
            together.remove(env)
            yield leaf(search, "root", (env, step), step, env)

    with manager.search(range(ENVS)) as search:
        for env in range(ENVS):
            threads.start(lambda env=env: evaluator.run(alone(search, env)))  # type: ignore[misc]
        assert threads.join() == [None] * ENVS
    assert most == [1]


# What goes wrong stays where it is -----------------------------------------------------------------------------------


@OWN_THREAD
def test_an_error_of_a_leaf_is_raised_where_it_was_yielded_and_may_be_caught_there(
    manager: KVCacheManager, own_thread: bool
) -> None:
    evaluator = Evaluator(manager, model, own_thread=own_thread)

    def tries(search: Any) -> Walk[int, int, list[int]]:
        with pytest.raises(KeyNotFoundError, match="nowhere"):
            yield leaf(search, "nowhere", "never", 1)
        return (yield from chain(search, "a", [1, 2]))

    with manager.search([0]) as search:
        assert evaluator.run(tries(search)) == answers([1, 2])
        assert not search.contains("never")
    assert evaluator.stats().failed_rows == 1
    evaluator.close()


@OWN_THREAD
def test_one_that_fails_leaves_the_others_going_and_the_first_error_is_raised_when_all_have_ended(
    manager: KVCacheManager, own_thread: bool
) -> None:
    evaluator = Evaluator(manager, model, max_wait_seconds=HANG_SECONDS, own_thread=own_thread)
    ended: list[Any] = []

    def fails(search: Any, words: str, steps: int) -> Walk[int, int, None]:
        yield from chain(search, words, [1] * steps)
        ended.append(words)
        raise ValueError(words)

    def lost(search: Any) -> Walk[int, int, None]:
        yield leaf(search, "nowhere", "never", 1)

    def goes_on(search: Any) -> Walk[int, int, None]:
        ended.append((yield from chain(search, "goes on", [1, 2, 3, 4])))

    with manager.search([0]) as search:
        walks = [goes_on(search), fails(search, "late", 3), lost(search), fails(search, "at once", 0)]
        with pytest.raises(ValueError, match="late") as caught:
            evaluator.run_many(walks)
        assert ended == ["at once", "late", answers([1, 2, 3, 4])]
        assert caught.traceback[-1].name == "fails"
        with pytest.raises(KeyNotFoundError):
            evaluator.run_many([lost(search), fails(search, "later", 2)])
    assert all(is_closed(walk) for walk in walks)
    evaluator.close()
    assert counted_now(evaluator) == NOTHING


def test_what_the_model_raises_is_heard_by_each_walk_of_that_call(manager: KVCacheManager) -> None:
    def raising(batch: JointBatch, numbers: Sequence[int]) -> Evaluated[int]:
        if 13 in numbers:
            raise ValueError("thirteen")
        return model(batch, numbers)

    evaluator = Evaluator(manager, raising, max_wait_seconds=HANG_SECONDS)
    heard: list[ValueError] = []

    def hears(search: Any, name: str, number: int) -> Walk[int, int, list[int]]:
        try:
            yield leaf(search, "root", name, number)
        except ValueError as error:
            heard.append(error)
        return (yield from chain(search, name, [1]))

    with manager.search([0]) as search:
        assert evaluator.run_many([hears(search, "a", 1), hears(search, "b", 13)]) == [answers([1])] * 2
    assert len(heard) == 2
    assert heard[0] is not heard[1]


def test_what_is_no_leaf_of_this_evaluator_is_refused_where_it_was_yielded(manager: KVCacheManager) -> None:
    evaluator = Evaluator(manager, model, max_wait_seconds=HANG_SECONDS)
    other = new_manager()

    def yields(*wrong: Any) -> Walk[int, int, list[int]]:
        for each in wrong:
            try:
                yield each
            except (InvalidTypeError, InvalidArgumentError) as error:
                heard.append(error)
        return (yield from chain(search, "a", [1, 2]))

    def stubborn() -> Walk[int, int, None]:
        yield "leaf"  # type: ignore[misc]

    heard: list[Exception] = []
    with manager.search([0]) as search, other.search([0]) as elsewhere:
        wrong = (None, leaf(elsewhere, "root", 1), leaf(search, [], 1))
        assert evaluator.run(yields(*wrong)) == answers([1, 2])
        assert [type(error) for error in heard] == [InvalidTypeError, InvalidArgumentError, InvalidTypeError]
        with pytest.raises(InvalidTypeError, match="type Leaf, got str"):
            evaluator.run_many([chain(search, "b", [1]), stubborn()])
        assert search.contains(("b", 0))
    assert evaluator.stats().failed_rows == 0  # none was handed in
    other.close()


def test_a_walk_that_ends_before_its_first_leaf_needs_no_call(manager: KVCacheManager) -> None:
    def none(result: int) -> Walk[int, int, int]:
        if result:
            return result
        yield leaf(None, "root", 1)
        return 0

    evaluator = Evaluator(manager, model)
    assert evaluator.run_many([none(1), none(2)]) == [1, 2]
    assert evaluator.stats().calls == 0
    assert counted_now(evaluator) == NOTHING


def test_what_is_no_fresh_generator_is_refused(manager: KVCacheManager) -> None:
    evaluator, other = Evaluator(manager, model), Evaluator(manager, model)

    def runs_itself(search: Any) -> Walk[int, int, list[int]]:
        with pytest.raises(InvalidArgumentError, match="GEN_RUNNING"):
            other.run(itself)
        return (yield from chain(search, "itself", [1]))

    with manager.search([0]) as search:
        begun, over = chain(search, "a", [1]), chain(search, "b", [1])
        next(begun)
        assert evaluator.run(over) == answers([1])
        for search_of, words in ((begun, "GEN_SUSPENDED"), (over, "has not begun, got one in the state GEN_CLOSED")):
            with pytest.raises(InvalidArgumentError, match=words):
                evaluator.run(search_of)
        twice = chain(search, "c", [1])
        with pytest.raises(InvalidArgumentError, match="one of them twice"):
            evaluator.run_many([twice, twice])
        assert evaluator.run(twice) == answers([1])  # it was not begun
        itself = runs_itself(search)
        assert evaluator.run(itself) == answers([1])
        nonsense: list[Any] = [[leaf(search, "root", 1)], lambda: twice, None]
        for wrong in nonsense:
            with pytest.raises(InvalidTypeError, match="a function with a yield in it returns, got"):
                evaluator.run(wrong)
    assert counted_now(evaluator) == NOTHING


@OWN_THREAD
def test_a_walk_that_asks_its_own_evaluator_hears_so_and_another_it_may_ask(
    manager: KVCacheManager, own_thread: bool
) -> None:
    evaluator = Evaluator(manager, model, own_thread=own_thread)
    other = Evaluator(manager, model)

    def asks(search: Any) -> Walk[int, int, list[int]]:
        with evaluator.worker() as worker:
            for call in (
                lambda: evaluator.evaluate(leaf(search, "root", "x", 1)),
                lambda: worker.evaluate(leaf(search, "root", "x", 1)),
                lambda: evaluator.run(chain(search, "x", [1])),
            ):
                with pytest.raises(ReentrantCallError, match="a search that it leads on"):
                    call()
        assert other.run(chain(search, "y", [1])) == answers([1])
        return (yield from chain(search, "a", [1, 2]))

    with manager.search([0]) as search:
        assert evaluator.run(asks(search)) == answers([1, 2])
        assert not search.contains("x")
    assert calls_here.get() == ()
    evaluator.close()


# When calls begin, and who makes them --------------------------------------------------------------------------------


@OWN_THREAD
def test_a_call_waits_for_the_next_leaf_of_each_walk_as_of_each_worker_and_no_longer(
    manager: KVCacheManager, own_thread: bool
) -> None:
    gated, threads = Gated(held=-1), Threads()
    evaluator = Evaluator(manager, gated, max_wait_seconds=HANG_SECONDS, own_thread=own_thread)
    worker = evaluator.worker()
    with manager.search([0]) as search:
        threads.start(lambda: evaluator.run_many([chain(search, "a", [1, 2]), chain(search, "b", [3])]))
        wait_until(lambda: evaluator.queue.waiting_rows == 2)
        assert gated.rows == []
        assert worker.evaluate(leaf(search, "root", "w", 4)) == answers([4])[0]
        assert gated.rows == [3]  # and the second leaf of the one waits for the worker's, but not for the other walk
        wait_until(lambda: evaluator.queue.waiting_rows == 1)
        assert worker.evaluate(leaf(search, "root", "v", 5)) == answers([5])[0]
        assert threads.join() == [[answers([1, 2]), answers([3])]]
        assert gated.rows == [3, 2]
        worker.close()
    evaluator.close()
    assert counted_now(evaluator) == NOTHING


def test_a_caller_whose_walks_are_over_hands_the_work_to_the_others(manager: KVCacheManager) -> None:
    gated = Gated()
    evaluator = Evaluator(manager, gated, max_wait_seconds=HANG_SECONDS)
    first, others = Threads(), Threads()
    with manager.search([0]) as search:
        first.start(lambda: evaluator.run(chain(search, "first", [1])))
        assert gated.entered.wait(HANG_SECONDS)
        others.start(lambda: evaluator.run(chain(search, "longer", [2, 3, 4])))
        wait_until(lambda: counted_now(evaluator)[2] == 2)
        others.start(lambda: evaluator.evaluate(leaf(search, "root", "plain", 5)))
        wait_until(lambda: counted_now(evaluator)[0] == 2)
        gated.go_on.set()
        assert first.join() == [answers([1])]
        assert others.join() == [answers([2, 3, 4]), answers([5])[0]]
    assert counted_now(evaluator) == NOTHING


def test_a_plain_caller_hands_walks_to_their_own_caller(manager: KVCacheManager) -> None:
    gated = Gated()
    evaluator = Evaluator(manager, gated, max_wait_seconds=HANG_SECONDS)
    first, other = Threads(), Threads()
    with manager.search([0]) as search:
        first.start(lambda: evaluator.evaluate(leaf(search, "root", "plain", 5)))
        assert gated.entered.wait(HANG_SECONDS)
        other.start(lambda: evaluator.run(chain(search, "longer", [2, 3, 4])))
        wait_until(lambda: counted_now(evaluator)[2] == 1)
        gated.go_on.set()
        assert first.join() == [answers([5])[0]]
        assert other.join() == [answers([2, 3, 4])]


def test_a_caller_whose_walk_another_led_to_its_end_is_woken_at_once(manager: KVCacheManager) -> None:
    heard, first_entered, second_go_on = threading.Event(), threading.Event(), threading.Event()
    calls = count()

    def holding(batch: JointBatch, numbers: Sequence[int]) -> Evaluated[int]:
        call = next(calls)
        if call == 0:
            first_entered.set()
            assert second_go_on.wait(HANG_SECONDS)
        if call == 2:  # by whose begin the short walk has ended
            assert heard.wait(HANG_SECONDS)
        return model(batch, numbers)

    evaluator = Evaluator(manager, holding, max_wait_seconds=HANG_SECONDS)
    threads = Threads()

    def short(search: Any) -> list[int]:
        found = evaluator.run(chain(search, "short", [4]))
        heard.set()
        return found

    with manager.search([0]) as search:
        threads.start(lambda: evaluator.run(chain(search, "long", [1, 2, 3])))
        assert first_entered.wait(HANG_SECONDS)
        threads.start(lambda: short(search))
        wait_until(lambda: counted_now(evaluator)[2] == 2)
        second_go_on.set()
        assert threads.join() == [answers([1, 2, 3]), answers([4])]


def test_the_time_of_a_leaf_is_counted_and_not_that_of_the_walk() -> None:
    seen: list[float] = []

    def looks() -> Walk[int, int, None]:
        seen.append(run.waits_since)
        yield leaf(None, "root", 1)

    run = Run([looks()], lambda: None)
    (walker,) = run.walkers
    assert run.waits_since < math.inf  # for a caller to lead it on
    walker.lead_on(lambda each: None)
    assert seen == [math.inf]
    assert walker.ticket is not None
    assert run.waits_since == walker.ticket.since
    walker.ticket.rows[0].succeed(1)
    walker.lead_on(lambda each: None)
    assert run.is_over
    assert run.waits_since == math.inf


# A caller that leaves ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["before its first leaf", "in a call", "in the queue"])
def test_a_caller_that_waits_too_long_closes_its_walks_at_once_and_holds_no_other_up(
    manager: KVCacheManager, where: str
) -> None:
    gated, watched, threads = Gated(), Watched(), Threads()
    evaluator = Evaluator(manager, gated, max_wait_seconds=HANG_SECONDS)
    with manager.search([0]) as search:
        if where == "in a call":  # which the other makes, for both
            late = watched(chain(search, "late", [1, 2]), "late")
            seat = evaluator.worker()

            def times_out() -> None:
                with pytest.raises(WaitTimeoutError):
                    evaluator.run(late, timeout=0.2)
                timed_out.set()

            timed_out = threading.Event()
            threads.start(times_out)
            wait_until(lambda: evaluator.queue.waiting_rows == 1)
            threads.start(lambda: seat.evaluate(leaf(search, "root", "other", 3)))
            assert timed_out.wait(HANG_SECONDS)
            gated.go_on.set()
            assert threads.join() == [None, answers([3])[0]]
            seat.close()
        else:
            threads.start(lambda: evaluator.run(chain(search, "first", [1, 2, 3])))
            assert gated.entered.wait(HANG_SECONDS)
            late = watched(chain(search, "late", [1, 2]), "late")
            if where == "before its first leaf":
                with pytest.raises(WaitTimeoutError, match=r"within 0\.01 s"):
                    evaluator.run(late, timeout=0.01)
            gated.go_on.set()
            assert threads.join() == [answers([1, 2, 3])]
            if where == "in the queue":
                with evaluator.worker(), pytest.raises(WaitTimeoutError):
                    evaluator.run(late, timeout=0.01)
        assert is_closed(late)
        assert watched.closed == ([] if where == "before its first leaf" else ["late"])
        assert evaluator.run(chain(search, "after", [5])) == answers([5])
    assert counted_now(evaluator) == NOTHING


class LedByAnother:
    """A caller leads a walk of another caller's, which has a second walk, hears that its time is over, and leaves."""

    def __init__(self, evaluator: Evaluator[int, int], search: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.evaluator, self.search = evaluator, search
        self.in_walk, self.go_on = threading.Event(), threading.Event()
        self.watched, self.leader, self.leaver = Watched(), Threads(), Threads()
        self.waiting: list[Run] = []
        self.is_late = False
        self._seconds_left = evaluator.seconds_left
        monkeypatch.setattr(evaluator, "seconds_left", self.seconds_left)

    def seconds_left(self, run: Run, seconds: float) -> float:
        if len(run.walkers) == 2:
            self.waiting.append(run)
            if self.is_late:
                raise WaitTimeoutError("it is late")
        return self._seconds_left(run, seconds)

    def led(self) -> Walk[int, int, Any]:
        self.in_walk.set()
        assert self.go_on.wait(HANG_SECONDS)
        return (yield from chain(self.search, "led", [1, 2]))

    def play(self, gated: Gated, led: Callable[[], Walk[int, int, Any]] | None = None) -> None:
        self.leader.start(lambda: self.evaluator.run(chain(self.search, "leader", [1, 2])))
        assert gated.entered.wait(HANG_SECONDS)
        self.walks = [self.watched((led or self.led)(), "led"), self.watched(chain(self.search, "other", [1]), "other")]
        self.leaver.start(lambda: self.evaluator.run_many(self.walks))
        wait_until(lambda: counted_now(self.evaluator)[2] == 3)
        gated.go_on.set()
        assert self.in_walk.wait(HANG_SECONDS)
        self.is_late = True
        for run in list(self.waiting):
            run.wake()
        (error,) = self.leaver.join()
        assert isinstance(error, WaitTimeoutError)
        self.go_on.set()


def test_a_walk_that_is_led_on_while_its_caller_leaves_is_closed_at_its_next_leaf(
    manager: KVCacheManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    gated = Gated()
    evaluator = Evaluator(manager, gated, max_wait_seconds=HANG_SECONDS)
    with manager.search([0]) as search:
        played = LedByAnother(evaluator, search, monkeypatch)
        played.play(gated)
        assert played.leader.join() == [answers([1, 2])]
        assert played.watched.closed == ["led"]  # the other had not begun
        assert played.watched.closed_in != [threading.get_ident()]
        assert all(is_closed(walk) for walk in played.walks)
        assert search.keys() == [("leader", 0), ("leader", 1)]
    assert counted_now(evaluator) == NOTHING


def test_a_walk_that_ends_while_its_caller_leaves_is_over_for_all(
    manager: KVCacheManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    gated = Gated()
    evaluator = Evaluator(manager, gated, max_wait_seconds=HANG_SECONDS)
    with manager.search([0]) as search:
        played = LedByAnother(evaluator, search, monkeypatch)

        class FailedError(ValueError):
            """Of which there may be weak references."""

        alive: list[weakref.ref[Any]] = []

        def ends() -> Walk[int, int, Any]:
            played.in_walk.set()
            assert played.go_on.wait(HANG_SECONDS)
            error = FailedError("which no caller hears")
            alive.append(weakref.ref(error))
            try:
                raise error
            finally:
                del error
            yield leaf(search, "root", 1)

        gc.collect()
        gc.disable()
        try:
            played.play(gated, ends)
            assert played.leader.join() == [answers([1, 2])]
            assert alive[0]() is None
        finally:
            gc.enable()
    assert counted_now(evaluator) == NOTHING


class Rude:
    """Walks that raise, or go on, when they are closed."""

    def __init__(self, search: Any) -> None:
        self.search = search

    def raises(self, words: str) -> Walk[int, int, None]:
        try:
            yield from chain(self.search, words, [1, 2])
        except GeneratorExit:
            raise ValueError(words) from None

    def goes_on(self) -> Walk[int, int, None]:
        while True:
            try:
                yield leaf(self.search, "root", "on", 1)
            except GeneratorExit:
                if not self.patience:
                    raise
                self.patience -= 1

    patience = 1


def test_a_walk_that_raises_when_it_is_closed_is_heard_by_its_caller_when_all_are_closed(
    manager: KVCacheManager,
) -> None:
    evaluator = Evaluator(manager, model, max_wait_seconds=HANG_SECONDS)
    watched = Watched()
    with manager.search([0]) as search, evaluator.worker():
        rude = Rude(search)
        walks = [
            watched(chain(search, "polite", [1]), "first"),
            rude.raises("one"),
            rude.raises("two"),
            watched(chain(search, "also", [1]), "last"),
        ]
        with pytest.raises(ValueError, match="one") as caught:
            evaluator.run_many(walks, timeout=0.0)
        assert sorted(watched.closed) == ["first", "last"]
        assert all(is_closed(walk) for walk in walks)
        contexts: list[str] = []
        context = caught.value.__context__
        while context is not None:
            contexts.append(type(context).__name__)
            context = context.__context__
        assert "WaitTimeoutError" in contexts
        with pytest.raises(RuntimeError, match="ignored GeneratorExit"):
            evaluator.run_many([rude.goes_on(), watched(chain(search, "third", [1]), "third")], timeout=0.0)
        assert "third" in watched.closed
    assert counted_now(evaluator) == NOTHING


@pytest.mark.parametrize("kind", ["raises", "goes on"])
def test_a_walk_that_raises_when_its_leader_closes_it_is_heard_by_no_other_caller(
    manager: KVCacheManager, kind: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    gated = Gated()
    evaluator = Evaluator(manager, gated, max_wait_seconds=HANG_SECONDS)
    with manager.search([0]) as search, caplog.at_level(logging.ERROR):
        played, rude = LedByAnother(evaluator, search, monkeypatch), Rude(search)

        def led() -> Walk[int, int, Any]:
            played.in_walk.set()
            assert played.go_on.wait(HANG_SECONDS)
            return (yield from rude.raises("led") if kind == "raises" else rude.goes_on())

        played.play(gated, led)
        assert played.leader.join() == [answers([1, 2])]
    assert "a search raised when it was closed" in caplog.text
    assert counted_now(evaluator) == NOTHING


def test_a_walk_that_cannot_be_closed_after_its_error_is_heard_by_its_own_caller_alone(
    manager: KVCacheManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    gated = Gated()
    evaluator = Evaluator(manager, gated, max_wait_seconds=HANG_SECONDS)
    leader, other = Threads(), Threads()
    plain = tickets_module.Ticket.__init__

    def short_of_memory(self: Any, leaves: Any, *rest: Any, **options: Any) -> None:
        if leaves and leaves[0].child == ("rude", 0):
            raise MemoryError
        plain(self, leaves, *rest, **options)

    monkeypatch.setattr(tickets_module.Ticket, "__init__", short_of_memory)
    with manager.search([0]) as search:
        leader.start(lambda: evaluator.run(chain(search, "leader", [1, 2])))
        assert gated.entered.wait(HANG_SECONDS)
        walk = Rude(search).raises("rude")
        other.start(lambda: evaluator.run(walk))
        wait_until(lambda: counted_now(evaluator)[2] == 2)
        gated.go_on.set()
        assert isinstance(other.join()[0], MemoryError)
        assert is_closed(walk)
        assert leader.join() == [answers([1, 2])]
    assert counted_now(evaluator) == NOTHING


class Exits(BaseException):
    """Ends whatever thread leads a walk on."""


def test_what_ends_the_thread_that_leads_a_walk_is_heard_there_and_others_go_on(manager: KVCacheManager) -> None:
    gated = Gated()
    evaluator = Evaluator(manager, gated, max_wait_seconds=HANG_SECONDS)
    leader, ending, other = Threads(), Threads(), Threads()
    heard: list[BaseException] = []
    watched = Watched()

    def leads(search: Any) -> None:
        try:
            evaluator.run(watched(chain(search, "leader", [1, 2])))
        except Exits as error:
            heard.append(error)

    def exits(search: Any) -> Walk[int, int, None]:
        yield from chain(search, "exits", [1])
        raise Exits

    with manager.search([0]) as search:
        leader.start(lambda: leads(search))
        assert gated.entered.wait(HANG_SECONDS)
        ending.start(lambda: evaluator.run(exits(search)))
        other.start(lambda: evaluator.run(chain(search, "other", [1, 2, 3])))
        wait_until(lambda: counted_now(evaluator)[2] == 3)
        gated.go_on.set()
        leader.join()
        (error,) = ending.join()
        assert other.join() == [answers([1, 2, 3])]
        assert len(heard) == 1
        assert isinstance(error, RuntimeError)
        assert "interrupted" in str(error)
        with pytest.raises(Exits):  # where a caller leads its own
            evaluator.run(exits(search))
    assert counted_now(evaluator) == NOTHING


def test_what_would_end_a_thread_of_the_evaluators_is_heard_by_the_walks_caller(manager: KVCacheManager) -> None:
    evaluator = Evaluator(manager, model, max_wait_seconds=HANG_SECONDS, own_thread=True)

    def exits(search: Any) -> Walk[int, int, None]:
        yield from chain(search, "exits", [1])
        raise Exits

    with manager.search([0]) as search:
        with pytest.raises(RuntimeError, match="interrupted"):
            evaluator.run_many([exits(search), chain(search, "other", [1, 2, 3])])
        assert search.contains(("other", 2))
        assert evaluator.run(chain(search, "after", [1])) == answers([1])
    evaluator.close()
    assert counted_now(evaluator) == NOTHING


def test_a_caller_that_is_cut_off_anywhere_closes_its_walks_and_takes_nothing_from_others(
    manager: KVCacheManager,
) -> None:
    evaluator = Evaluator(manager, model, max_wait_seconds=HANG_SECONDS)
    number, was_cut, hurt = 0, True, 0
    while was_cut:
        number += 1
        with manager.search([0], entries=20) as search, manager.search([1], entries=20) as others:
            threads, seat, worker = Threads(), evaluator.worker(), evaluator.worker()

            def frees(walk: Any, seat: Any = seat) -> Walk[int, int, Any]:
                seat.close()  # no call was due before
                return (yield from walk)

            threads.start(lambda others=others: evaluator.run(chain(others, "a", [1, 2], 1)))  # type: ignore[misc]
            wait_until(lambda: evaluator.queue.waiting_rows == 1)

            def works(worker: Any = worker, others: Any = others) -> int:
                with worker:
                    return worker.evaluate(leaf(others, "root", 1, 1, 1))  # type: ignore[no-any-return]

            threads.start(works)
            wait_until(lambda: evaluator.queue.waiting_rows == 2)
            walks = [frees(chain(search, "b", [1])), chain(search, "c", [1, 2])]
            was_cut = cut_at(number, partial(evaluator.run_many, walks), FILES, jumps=True)
            calls_here.set(())
            seat.close()
            first, second = threads.join()
            # The one that was led on at that moment has lost its place.
            assert first == answers([1, 2], 1) or (isinstance(first, RuntimeError) and "interrupted" in str(first))
            hurt += first != answers([1, 2], 1)
            assert second == answers([1], 1)[0]
            assert all(is_closed(walk) or inspect.getgeneratorstate(walk) == inspect.GEN_CREATED for walk in walks)
        assert counted_now(evaluator) == NOTHING
    assert number > 200
    assert hurt < number / 10
    manager.repair()  # what a commit had, and was cut off


def test_a_caller_that_is_cut_off_anywhere_as_it_leaves_closes_its_walks(manager: KVCacheManager) -> None:
    evaluator = Evaluator(manager, model, max_wait_seconds=HANG_SECONDS)
    number, was_cut, left = 0, True, 0
    with manager.search([0]) as search, evaluator.worker():  # whose leaf the walks wait for
        while was_cut:
            number += 1
            walks = [chain(search, name, [1]) for name in "ab"]

            def run(walks: Any = walks) -> None:
                with pytest.raises(WaitTimeoutError):
                    evaluator.run_many(walks, timeout=0.0)

            was_cut = cut_at(number, run, FILES, jumps=True)
            left += all(is_closed(walk) for walk in walks)
            assert all(is_closed(walk) or inspect.getgeneratorstate(walk) == inspect.GEN_CREATED for walk in walks)
            assert counted_now(evaluator) == (0, 0, 1, 0, 0)
    assert left > 30


# The evaluator is closed ---------------------------------------------------------------------------------------------


@OWN_THREAD
@pytest.mark.parametrize("parallel_calls", [1, 2])
def test_when_the_evaluator_is_closed_each_walk_hears_so_where_it_yielded_and_may_go_on(
    manager: KVCacheManager, own_thread: bool, parallel_calls: int
) -> None:
    gated, threads = Gated(), Threads()
    evaluator = Evaluator(
        manager, gated, max_wait_seconds=HANG_SECONDS, own_thread=own_thread, parallel_calls=parallel_calls
    )
    heard: list[str] = []

    def hears(search: Any, name: str) -> Walk[int, int, str]:
        for step in count():
            try:
                yield leaf(search, "root", (name, step), 1)
            except ClosedError:
                heard.append(f"{name} {step}")
                break
        with pytest.raises(ClosedError):
            yield leaf(search, "root", (name, "again"), 1)
        return name

    with manager.search([0]) as search:
        for name in "abc":
            threads.start(lambda name=name: evaluator.run(hears(search, name)))  # type: ignore[misc]
        assert gated.entered.wait(HANG_SECONDS)
        wait_until(lambda: counted_now(evaluator)[2] == 3)
        evaluator.close()
        gated.go_on.set()
        assert threads.join() == ["a", "b", "c"]
        assert sorted(each[0] for each in heard) == ["a", "b", "c"]
        assert any(each.endswith("1") for each in heard)  # of the call under way, which went on
        with pytest.raises(ClosedError):
            evaluator.run(chain(search, "x", [1]))
    assert counted_now(evaluator) == NOTHING


@OWN_THREAD
@pytest.mark.parametrize("how", ["closed", "dropped"])
def test_walks_whose_leaves_wait_when_the_evaluator_is_closed_hear_so(
    manager: KVCacheManager, own_thread: bool, how: str
) -> None:
    evaluator = Evaluator(manager, model, max_wait_seconds=HANG_SECONDS, own_thread=own_thread)
    threads = Threads()
    with manager.search([0]) as search, evaluator.worker():
        for name in "ab":
            threads.start(lambda name=name: evaluator.run(chain(search, name, [1])))  # type: ignore[misc]
        wait_until(lambda: evaluator.queue.waiting_rows == 2)
        if how == "closed":
            evaluator.close()
        else:
            evaluator.queue.close_unlocked()  # as its finaliser
        assert [type(error) for error in threads.join()] == [ClosedError] * 2
    assert counted_now(evaluator) == NOTHING
    assert evaluator.stats().failed_rows == 2


def test_a_walk_that_is_led_on_while_the_evaluator_is_closed_hears_so_at_its_leaf(manager: KVCacheManager) -> None:
    evaluator = Evaluator(manager, model)

    def closes(search: Any) -> Walk[int, int, str]:
        evaluator.close()
        with pytest.raises(ClosedError):
            yield leaf(search, "root", 1)
        return "heard"

    with manager.search([0]) as search:
        assert evaluator.run(closes(search)) == "heard"
    assert evaluator.stats().failed_rows == 1
    assert counted_now(evaluator) == NOTHING


def test_callers_lead_their_walks_on_where_the_threads_of_a_closed_evaluator_have_ended(
    manager: KVCacheManager,
) -> None:
    before = set(threading.enumerate())
    evaluator = Evaluator(manager, model, max_wait_seconds=HANG_SECONDS, own_thread=True)
    (own,) = set(threading.enumerate()) - before
    in_walk, go_on, threads = threading.Event(), threading.Event(), Threads()

    def holds(search: Any) -> Walk[int, int, str]:
        try:
            yield leaf(search, "root", "a", 1)
        except ClosedError:
            in_walk.set()
            assert go_on.wait(HANG_SECONDS)
        return "held"

    def late(search: Any) -> Walk[int, int, str]:
        for _ in range(3):
            with pytest.raises(ClosedError):
                yield leaf(search, "root", "b", 1)
        return "late"

    with manager.search([0]) as search, evaluator.worker():
        threads.start(lambda: evaluator.run(holds(search)))
        wait_until(lambda: evaluator.queue.waiting_rows == 1)
        threads.start(lambda: evaluator.run(late(search)))
        wait_until(lambda: evaluator.queue.waiting_rows == 2)
        evaluator.close()
        assert in_walk.wait(HANG_SECONDS)
        go_on.set()
        assert threads.join() == ["held", "late"]
        own.join(HANG_SECONDS)
        assert not own.is_alive()
    assert counted_now(evaluator) == NOTHING


def test_where_a_thread_of_the_evaluators_ends_walks_hear_so_at_their_leaves(
    manager: KVCacheManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[Any] = []

    def ends(*arguments: Any) -> None:
        raise MemoryError("where it is not expected")

    monkeypatch.setattr(threading, "excepthook", ended.append)
    monkeypatch.setattr(evaluator_module, "_call_for_others", ends)
    evaluator = Evaluator(manager, model, own_thread=True)
    with manager.search([0]) as search:
        for call in (evaluator.run, lambda walk: evaluator.run_many([walk, chain(search, "b", [1])])):
            with pytest.raises(ClosedError):
                call(chain(search, "a", [1]))
    wait_until(lambda: bool(ended))
    assert counted_now(evaluator) == NOTHING


# What is kept --------------------------------------------------------------------------------------------------------


class Thing:
    """Of which there may be weak references."""


def things(batch: JointBatch, numbers: Sequence[Any]) -> Evaluated[Any]:
    model(batch, [1] * len(numbers))
    return Evaluated([Thing() for _ in numbers])


@pytest.mark.parametrize("ending", ["returns", "fails", "two fail", "leaf fails", "wrong leaf", "times out", "closed"])
def test_walks_are_let_go_of_without_the_collector(manager: KVCacheManager, ending: str) -> None:
    evaluator: Evaluator[Any, Any] = Evaluator(manager, things)
    alive: list[weakref.ref[Any]] = []

    def watched(thing: Any) -> Any:
        alive.append(weakref.ref(thing))
        return thing

    def walk(search: Any) -> Walk[Any, Any, Any]:
        watched((yield Leaf(search, "root", object(), watched(Thing()), 0)))
        if ending in ("fails", "two fail"):
            raise watched(type("Failed", (ValueError,), {})())
        if ending == "leaf fails":
            yield Leaf(search, "nowhere", object(), watched(Thing()), 0)
        if ending == "wrong leaf":
            yield watched(Thing())
        if ending == "closed":
            evaluator.close()
        if ending in ("times out", "closed"):
            seats.append(evaluator.worker() if ending == "times out" else None)
            yield Leaf(search, "root", object(), watched(Thing()), 0)
        return watched(Thing())

    seats: list[Any] = []
    gc.collect()
    gc.disable()
    try:
        with manager.search([0]) as search:
            walks = [watched(walk(search)) for _ in range(2 if ending == "two fail" else 1)]
            if ending == "returns":
                assert len(evaluator.run_many(walks)) == 1
            else:
                raised = False
                try:
                    evaluator.run_many(walks, timeout=0.0)
                except Exception:
                    raised = True
                assert raised
            walks.clear()
            assert len(alive) >= 3
            assert [each() for each in alive if each() is not None] == []
    finally:
        gc.enable()


# Elsewhere -----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_walk_that_wakes_up_in_a_forked_child_hears_so_and_the_parent_goes_on(manager: KVCacheManager) -> None:
    evaluator = Evaluator(manager, model)
    found: list[int] = []

    def forks(search: Any) -> Walk[int, int, list[int]]:
        child = os.fork()
        if not child:
            signal.alarm(int(HANG_SECONDS))
        found.append(child)
        return (yield from chain(search, "a", [1]))

    with manager.search([0]) as search:
        walk = forks(search)
        try:
            value: Any = evaluator.run(walk)
        except BaseException as error:
            value = error
        if not found[0]:
            os._exit(0 if isinstance(value, WrongProcessError) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(found[0], 0)[1]) == 0
        assert value == answers([1])
