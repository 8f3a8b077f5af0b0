"""Guards of evaluators whose absence no other test noticed: `docs/mutants.md`."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch

from concurrent_kv import (
    DropOldest,
    InvalidArgumentError,
    InvalidTypeError,
    KVCacheManager,
    Search,
    WaitTimeoutError,
)
from concurrent_kv.aio import AsyncEvaluator
from concurrent_kv.evaluation import Evaluated, Evaluator, EvaluatorWorker, Leaf, call
from concurrent_kv.evaluation import evaluator as evaluator_module
from concurrent_kv.evaluation import queue as queue_module
from concurrent_kv.evaluation.queue import Group, LeafQueue
from concurrent_kv.evaluation.stats import CallTimes
from concurrent_kv.evaluation.tickets import Ticket
from concurrent_kv.locks.gate import gate
from concurrent_kv.pool.joint import JointBatch
from tests.async_support import run_on
from tests.evaluating import WINDOW, counted_now, model, new_manager, root_sum, value_after
from tests.interrupting import cut_at
from tests.support import HANG_SECONDS


@pytest.fixture
def manager() -> Iterator[KVCacheManager]:
    made = new_manager()
    yield made
    made.check_integrity()
    made.close()


def test_the_time_of_each_part_of_a_call_is_counted_there(
    manager: KVCacheManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(call, "perf_counter", lambda: now[0])
    gather, commit = call.ModelCall._gather, call.ModelCall._commit

    def gathering(self: call.ModelCall, *arguments: Any) -> None:
        now[0] += 1
        gather(self, *arguments)

    def committing(self: call.ModelCall, *arguments: Any) -> None:
        now[0] += 4
        commit(self, *arguments)

    def modelling(batch: JointBatch, numbers: Sequence[int]) -> Evaluated[int]:
        now[0] += 2
        return model(batch, numbers)

    monkeypatch.setattr(call.ModelCall, "_gather", gathering)
    monkeypatch.setattr(call.ModelCall, "_commit", committing)
    evaluator = Evaluator(manager, modelling)
    with manager.search([0]) as search:
        for number in range(3):
            evaluator.evaluate(Leaf(search, "root", number, number, 0))
    stats = evaluator.stats()
    assert (stats.gather_seconds, stats.model_seconds, stats.commit_seconds) == (3, 6, 12)


def test_a_worker_that_cannot_enter_the_streams_of_its_task_leaves_the_call_to_others(
    manager: KVCacheManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def gone() -> Iterator[None]:
        raise RuntimeError("a device that is gone")
        yield

    evaluator = AsyncEvaluator(Evaluator(manager, model))

    async def main() -> None:
        with manager.search([0]) as search:
            with monkeypatch.context() as patched:
                patched.setattr("concurrent_kv.aio.evaluator.current_streams", gone)
                with pytest.raises(RuntimeError, match="a device that is gone"):
                    await evaluator.evaluate(Leaf(search, "root", 1, 1, 0))
            assert counted_now(evaluator.sync) == (0, 0, 0, 0, 0)
            assert await evaluator.evaluate(Leaf(search, "root", 2, 2, 0)) == model_says(2)

    run_on("asyncio", main)


def model_says(number: int) -> int:
    """Of a leaf under the root of the first environment."""
    return value_after(root_sum(0), number)[0]


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"model": 3}, InvalidTypeError, "model must be callable, got int"),
        ({"overflow": DropOldest(WINDOW + 1, 2)}, InvalidArgumentError, "limit"),
    ],
    ids=["model", "overflow"],
)
def test_what_cannot_work_is_refused_when_the_evaluator_is_made(
    manager: KVCacheManager, arguments: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        Evaluator(manager, **({"model": model} | arguments))


def test_a_worker_that_hands_in_nothing_waits_for_nothing_and_is_not_counted_as_waiting(
    manager: KVCacheManager,
) -> None:
    evaluator = Evaluator(manager, model)
    with evaluator.worker() as worker, AsyncEvaluator(evaluator).worker() as of_task:
        assert worker.evaluate_many([]) == []
        assert run_on("asyncio", of_task.evaluate_many, []) == []
        assert counted_now(evaluator) == (0, 0, 2, 0, 0)


def test_the_evaluators_thread_calls_the_model_in_its_own_stream(
    manager: KVCacheManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = [False]

    @contextmanager
    def stream(device: torch.device) -> Iterator[None]:
        assert device == manager.storage.layout.device
        inside[0] = True
        yield
        inside[0] = False

    def looking(batch: JointBatch, numbers: Sequence[int]) -> Evaluated[bool]:
        model(batch, numbers)
        return Evaluated([inside[0]] * len(numbers))

    monkeypatch.setattr("concurrent_kv.evaluation.evaluator._own_stream", stream)
    evaluator = Evaluator(manager, looking, own_thread=True)
    with manager.search([0]) as search:
        assert evaluator.evaluate(Leaf(search, "root", 1, 1, 0))
    evaluator.close()


def test_a_caller_that_waits_too_long_and_is_cut_off_as_it_leaves_is_counted_no_more(manager: KVCacheManager) -> None:
    files = {str(module.__file__) for module in (evaluator_module, queue_module)}
    evaluator, number = Evaluator(manager, model, max_wait_seconds=HANG_SECONDS), 0

    def waits_in_vain(search: Search, worker: EvaluatorWorker[int, int]) -> None:
        with pytest.raises(WaitTimeoutError):
            worker.evaluate(Leaf(search, "root", 1, 1, 0), timeout=0)

    with manager.search([0]) as search, evaluator.worker() as worker, evaluator.worker():
        while cut_at(number + 1, partial(waits_in_vain, search, worker), files, jumps=True):
            number += 1
            assert counted_now(evaluator) == (0, 0, 2, 0, 0)
    assert number > 20


class Noting:
    """A lock that notes at each entry whether its thread is inside the gate."""

    def __init__(self) -> None:
        self.entered: list[bool] = []
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        self._lock.acquire()
        self.entered.append(gate.is_inside)

    def __exit__(self, *error: object) -> None:
        self._lock.release()


def test_each_operation_on_the_queue_is_one_critical_section_inside_the_gate() -> None:
    waits: Any = LeafQueue(max_rows=8, max_wait_seconds=HANG_SECONDS, parallel_calls=1)
    lock = waits._lock = Noting()
    leaf: Any = None
    evaluated, withdrawn = (Ticket([leaf], lambda: None, worker=False) for _ in range(2))
    group, seat = Group(evaluated), object()
    for operation in (
        partial(waits.join, seat),
        partial(waits.add, evaluated),
        waits.seconds_until_due,
        partial(waits.take, group),
        partial(waits.leave, seat),
        partial(waits.take, group),
        partial(waits.finish, group, CallTimes(), 1),
        partial(waits.add, withdrawn),
        partial(waits.part, None, withdrawn),
        waits.stats,
        waits.close,
    ):
        lock.entered.clear()
        operation()
        assert lock.entered == [True], operation
