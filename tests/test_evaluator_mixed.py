"""Threads and tasks of two loops at one evaluator, with everything that may go wrong, for a while: nothing is mixed up.

Each searcher grows a chain and compares what it hears with what its path says; it is cancelled, waits too little,
drops workers, ends its search in the middle, and hears errors of the model's, of missing parents and of keys. Some are
walks, which any thread may lead on. However the threads take their turns, all end in time, and nothing stays in use.
"""

from __future__ import annotations

import gc
import random
import threading
from collections.abc import Callable, Sequence
from typing import Any

import anyio
import pytest

from concurrent_kv import ClosedError, KeyNotFoundError, KVCacheManager, SearchEndedError, WaitTimeoutError
from concurrent_kv.aio import AsyncEvaluator
from concurrent_kv.evaluation import Evaluated, Evaluator, Walk
from concurrent_kv.pool.joint import JointBatch
from tests.async_support import join_workers, run_on
from tests.evaluating import ENVS, NEW, counted_now, model, new_manager, root_sum, value_after
from tests.support import HANG_SECONDS
from tests.test_evaluator import Threads, leaf, wait_until

STEPS = 60
SEARCHES = 10 + 4 * 3  # that may be open at once: one of each chain, and three of each of those who run walks
RAISES, EXITS = 1000, 2000  # inputs that the model raises at


class Exits(BaseException):
    """Ends whatever makes the call."""


def faulty(batch: JointBatch, numbers: Sequence[int]) -> Evaluated[int]:
    if RAISES in numbers:
        raise ValueError("the model fails")
    if EXITS in numbers:
        raise Exits
    return model(batch, numbers)


class Chain:
    """What one searcher has grown, and what it may hear next."""

    def __init__(self, manager: KVCacheManager, seed: int) -> None:
        self.draw = random.Random(seed)
        self.manager, self.env = manager, seed % ENVS
        self.answers = 0
        self.begin()

    def begin(self) -> None:
        self.search = self.manager.search([self.env], entries=STEPS, tokens=2000)
        self.path: Any = "root"
        self.total, self.length = root_sum(self.env), 0

    def end(self) -> None:
        self.search.close()

    def next(self) -> tuple[list[Any], list[int]]:
        """Leaves to hand in, and what the answers are."""
        kind = self.draw.choices(["plain", "many", "lost", "raises", "exits"], [20, 6, 2, 1, 1])[0]
        if self.length > 20:
            self.end()
            self.begin()
        if kind == "lost":
            return [leaf(self.search, "nowhere", "never", 1, self.env)], []
        if kind in ("raises", "exits"):
            return [leaf(self.search, self.path, "never", RAISES if kind == "raises" else EXITS, self.env)], []
        numbers = [self.draw.randrange(90) for _ in range(3 if kind == "many" else 1)]
        keys = [(self.length, number, place) for place, number in enumerate(numbers)]
        leaves = [
            leaf(self.search, self.path, key, number, self.env) for key, number in zip(keys, numbers, strict=True)
        ]
        return leaves, [value_after(self.total, number)[0] for number in numbers]

    def heard(self, leaves: list[Any], expected: list[int], answers: list[int]) -> None:
        assert answers == expected
        self.answers += 1
        self.path, self.length = leaves[0].child, self.length + 1
        self.total = value_after(self.total, leaves[0].inputs)[1]

    def failed(self, leaves: list[Any], error: BaseException) -> None:
        """An error that it may hear: its own, or of a model that was called for others, too."""
        if isinstance(error, KeyNotFoundError):
            assert leaves[0].parent == "nowhere"
        else:
            assert isinstance(error, (ValueError, Exits, WaitTimeoutError, RuntimeError, SearchEndedError)), error


def in_a_thread(evaluator: Evaluator[int, int], chain: Chain) -> None:
    worker: Any = evaluator.worker()
    for _ in range(STEPS):
        leaves, expected = chain.next()
        by = chain.draw.choice([worker, worker, evaluator])
        timeout = chain.draw.choice([None, None, 0.0, 0.001])
        closes = chain.draw.random() < 0.05
        try:
            if closes:  # while it waits, perhaps
                closer = threading.Thread(target=chain.search.close, daemon=True)
                closer.start()
            chain.heard(leaves, expected, by.evaluate_many(leaves, timeout=timeout))
        except (Exception, Exits) as error:
            chain.failed(leaves, error)
        if closes:
            closer.join(HANG_SECONDS)
            chain.begin()
        if chain.draw.random() < 0.1:
            del by
            worker = evaluator.worker()  # the one before is dropped
    chain.end()


async def in_a_task(evaluator: AsyncEvaluator[int, int], chain: Chain) -> None:
    with evaluator.worker() as worker:
        for _ in range(STEPS):
            leaves, expected = chain.next()
            with anyio.move_on_after(chain.draw.choice([HANG_SECONDS, HANG_SECONDS, 0.0, 0.001])):
                try:
                    chain.heard(leaves, expected, await worker.evaluate_many(leaves))
                except (Exception, Exits) as error:
                    chain.failed(leaves, error)
    chain.end()


def as_walk(chain: Chain, answered: list[int]) -> Walk[int, int, Chain]:
    """Yields each leaf of a chain, which its caller has opened: here it must not wait for room."""
    try:
        for _ in range(STEPS // 4):
            leaves, expected = chain.next()
            try:
                answers: list[int] = []
                while len(answers) < len(leaves):
                    answers.append((yield leaves[len(answers)]))
                chain.heard(leaves, expected, answers)
            except Exception as error:
                chain.failed(leaves, error)
    finally:
        answered.append(chain.answers)
    return chain


def ends_walks(error: BaseException) -> None:
    """An error that whoever runs walks may hear: what ended a call or a leader, or that it waited too little."""
    if isinstance(error, RuntimeError):
        assert "interrupted" in str(error)
    else:
        assert isinstance(error, (WaitTimeoutError, Exits)), error


def runs_walks(evaluator: Evaluator[int, int], manager: KVCacheManager, seed: int, answered: list[int]) -> None:
    draw = random.Random(seed)
    for _ in range(20):
        chains = [Chain(manager, draw.randrange(1000)) for _ in range(draw.randrange(1, 4))]
        walks = [as_walk(chain, answered) for chain in chains]
        try:
            assert evaluator.run_many(walks, timeout=draw.choice([None, None, 0.0, 0.001])) == chains
        except (Exception, Exits) as error:
            ends_walks(error)
        for chain in chains:  # while a walk is led on still, perhaps
            chain.end()


async def awaits_walks(
    evaluator: AsyncEvaluator[int, int], manager: KVCacheManager, seed: int, answered: list[int]
) -> None:
    draw = random.Random(seed)
    for _ in range(20):
        chains = [Chain(manager, draw.randrange(1000)) for _ in range(draw.randrange(1, 4))]
        walks = [as_walk(chain, answered) for chain in chains]
        with anyio.move_on_after(draw.choice([HANG_SECONDS, HANG_SECONDS, 0.0, 0.001])):
            try:
                assert await evaluator.run_many(walks) == chains
            except (Exception, Exits) as error:
                ends_walks(error)
        for chain in chains:
            chain.end()


@pytest.mark.parametrize("own_thread", [False, True])
@pytest.mark.parametrize("row_sizes", [(), (2, 8)])
def test_whatever_goes_wrong_each_hears_its_own_and_nothing_is_left(own_thread: bool, row_sizes: Sequence[int]) -> None:
    manager = new_manager(entries=SEARCHES * STEPS, recur_slots=400_000)
    evaluator = Evaluator(
        manager,
        faulty,
        max_rows=8,
        max_wait_seconds=0.005,
        parallel_calls=2,
        own_thread=own_thread,
        row_sizes=row_sizes,
        room=NEW,
    )
    chains = [Chain(manager, seed) for seed in range(10)]
    threads, of_walks = Threads(), list[int]()

    def loop(kind: str, on_loop: bool, of_loop: list[Chain]) -> Callable[[], None]:
        facade = AsyncEvaluator(evaluator, on_loop=on_loop)

        async def main() -> None:
            async with anyio.create_task_group() as tasks:
                for chain in of_loop:
                    tasks.start_soon(in_a_task, facade, chain)
                tasks.start_soon(awaits_walks, facade, manager, 100 + on_loop, of_walks)

        return lambda: run_on(kind, main)

    for chain in chains[:4]:
        threads.start(lambda chain=chain: in_a_thread(evaluator, chain))  # type: ignore[misc]
    for seed in (200, 201):
        threads.start(lambda seed=seed: runs_walks(evaluator, manager, seed, of_walks))  # type: ignore[misc]
    threads.start(loop("asyncio", False, chains[4:7]))
    threads.start(loop("trio", True, chains[7:]))
    assert threads.join() == [None] * 8
    join_workers()  # calls of tasks that were cancelled end in them
    gc.collect()
    # An evaluator's thread may still close walks whose caller has left.
    wait_until(lambda: counted_now(evaluator)[1] == 0)
    assert counted_now(evaluator) == (0, 0, 0, 0, 0)
    assert sum(chain.answers for chain in chains) > STEPS
    assert sum(of_walks) > 0
    # It goes on as before.
    with manager.search([0]) as search:
        assert evaluator.evaluate(leaf(search, "root", 1, 1)) == value_after(root_sum(0), 1)[0]
    evaluator.close()
    with pytest.raises(ClosedError):
        evaluator.worker()
    stats = manager.recur_pool.stats()
    assert (stats.entries, stats.reserved_entries, stats.reserved_slots) == (0, 0, 0)
    assert manager.check_integrity().handles == 0
    manager.close()
