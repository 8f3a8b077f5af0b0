"""How the computation of a flight can end, whom each ending can happen to, and what is heard of it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import anyio
import pytest
import torch

from concurrent_kv import AsyncKVPool, ClosedError, InvalidArgumentError, KeysValues, KVPool, WaitTimeoutError
from tests.async_support import LOOPS
from tests.flight_sides import (
    Answer,
    Killed,
    LeftBehindSide,
    Portals,
    Side,
    Within,
    in_a_scope,
    in_a_task,
    new_loop,
    plainly,
    under_wait_for,
)
from tests.flight_support import Computation, Waiters
from tests.support import assert_same, tokens
from tests.threading_support import Background

FIRST, TAKEN_OVER = tokens(1, 3), tokens(50, 3)


class BrokenModelError(Exception):
    """What a computation raises."""


@dataclass
class Cell:
    """One computing side with everybody who waits for it, at the moment of the ending."""

    pool: KVPool
    portals: Portals
    waiters: Waiters
    side: Any  # the class that its ending names
    patch: pytest.MonkeyPatch


# What is heard -------------------------------------------------------------------------------------------------------

Verdict = Callable[[list[Answer], Answer], KeysValues | None]


def all_get_the_result(answers: list[Answer], computing: Answer) -> KeysValues:
    for answer in [computing, *answers]:
        assert isinstance(answer, KeysValues), repr(answer)
        assert_same(answer, FIRST)
        if answer is not computing:
            answer.keys.fill_(-1)  # nobody else's
    return FIRST


def all_get_the_result_and_it_is_not_kept(answers: list[Answer], computing: Answer) -> None:
    all_get_the_result(answers, computing)


def one_takes_over(answers: list[Answer], computing: Answer) -> KeysValues:
    assert isinstance(computing, BaseException), repr(computing)
    for answer in answers:
        assert isinstance(answer, KeysValues), repr(answer)
        assert_same(answer, TAKEN_OVER)
        answer.keys.fill_(-1)
    return TAKEN_OVER


def all_others_get_the_result(answers: list[Answer], computing: Answer) -> KeysValues:
    """A worker has computed it, whatever became of its task."""
    assert isinstance(computing, BaseException), repr(computing)
    for answer in answers:
        assert isinstance(answer, KeysValues), repr(answer)
        assert_same(answer, FIRST)
    return FIRST


def assert_own_errors_of_one_cause(kind: type[Exception], answers: list[Answer]) -> None:
    errors = [answer for answer in answers if type(answer) is kind]
    assert len({id(error) for error in errors}) == len(answers), answers
    assert len({id(error.__cause__) for error in errors}) == 1, answers


def all_hear_the_same(kind: type[Exception]) -> Verdict:
    def verdict(answers: list[Answer], computing: Answer) -> None:
        assert isinstance(computing, kind), repr(computing)
        assert_own_errors_of_one_cause(kind, answers)
        assert all(isinstance(answer, kind) and answer.__cause__ is computing for answer in answers), answers

    return verdict


def all_hear_that_it_failed(answers: list[Answer], computing: Answer) -> None:
    """Who holds the claim, and goes on, hears that it is over."""
    assert_own_errors_of_one_cause(BrokenModelError, answers)
    assert isinstance(computing, ClosedError)


def all_hear_that_it_closed(answers: list[Answer], computing: Answer) -> None:
    assert all(isinstance(answer, ClosedError) for answer in [computing, *answers]), answers


# How it ends ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ending:
    """What happens to a computation, whom it can happen to, and what is heard of it.

    Attributes:
        end: makes it happen, when everybody waits.
        heard: what the waiters get; returns what is stored then.
        of_claims, of_workers: the same where a claim is held in a `with`, and where a worker computes for a task, if
            that differs.
        sides: whether it can happen to a side, by its name.
        within: how a task runs its work.
        own_loop: whether the task needs a loop that nobody else uses.
        side: the class of the computing side, if not the usual one.
        leaves_wakers: whether somebody who waited is no longer there to take his waker back.
    """

    end: Callable[[Cell], object]
    heard: Verdict
    of_claims: Verdict | None = None
    of_workers: Verdict | None = None
    sides: Callable[[str], bool] = lambda side: not of("dropped claim")(side)
    within: Within = plainly
    own_loop: bool = False
    side: type[Side] | None = None
    leaves_wakers: bool = False


def goes_on(cell: Cell) -> None:
    cell.side.open()


def raises(error: type[BaseException]) -> Callable[[Cell], None]:
    def end(cell: Cell) -> None:
        cell.side.computation.error = error()
        cell.side.open()

    return end


def makes_what_does_not_fit(cell: Cell) -> None:
    cell.side.computation.result = KeysValues(*torch.zeros(2, 1, 1, 1, 1, 1))
    cell.side.open()


def is_not_copied(cell: Cell) -> None:
    scatter, failures = cell.pool.storage.tensor.scatter, [MemoryError("no memory for a copy")]

    def fails_once(*arguments: Any) -> Any:
        if failures:
            raise failures.pop()
        return scatter(*arguments)

    cell.patch.setattr(cell.pool.storage.tensor, "scatter", fails_once)
    cell.side.open()


def is_interrupted(cell: Cell) -> None:
    cell.side.interrupt()


def is_cut_off_by_its_scope(cell: Cell) -> None:
    cell.side.portal.call(cell.side.scope.cancel)
    if cell.side.how == "sync":
        cell.side.open()  # a scope waits for the worker thread


def runs_out_of_its_scopes_time(cell: Cell) -> None:
    def now() -> None:
        cell.side.scope.deadline = anyio.current_time()

    cell.side.portal.call(now)
    if cell.side.how == "sync":
        cell.side.open()


def is_cut_off_by_asyncio(cell: Cell) -> None:
    """At once, though the worker thread of a sync computation still runs."""
    cell.side.portal.call(cell.side.task.cancel)


def is_cut_off_by_wait_for(cell: Cell) -> None:
    cell.side.portal.call(cell.side.cut_off.set)


def loses_its_loop(cell: Cell) -> None:
    cell.side.portal.call(cell.side.portal.stop, True)
    cell.side.computation.gate.opened.set()


def is_left_behind(cell: Cell) -> None:
    cell.side.leave()


def claim_is_abandoned(cell: Cell) -> None:
    cell.side.there(cell.side.claim.abandon)


def claim_is_failed(cell: Cell) -> None:
    cell.side.there(lambda: cell.side.claim.fail(BrokenModelError()))


def by_a_thread(act: Callable[[KVPool], object]) -> Callable[[Cell], None]:
    """A thread does something to the pool."""
    return lambda cell: Background(lambda: act(cell.pool)).result()


def by_tasks(act: Callable[[AsyncKVPool], Awaitable[object]]) -> Callable[[Cell], None]:
    """A task of each loop does something to the pool, one after the other."""

    def end(cell: Cell) -> None:
        for portal in cell.portals.all():
            portal.call(act, AsyncKVPool(cell.pool))

    return end


def and_goes_on(end: Callable[[Cell], None]) -> Callable[[Cell], None]:
    def and_open(cell: Cell) -> None:
        end(cell)
        cell.side.open()

    return and_open


def waiters_time_out(cell: Cell) -> None:
    aio = AsyncKVPool(cell.pool)

    def in_vain() -> None:
        with pytest.raises(WaitTimeoutError, match=r"pool: the computation of 'key' .* within 0\.001 s"):
            cell.pool.get_or_compute("key", Computation(), timeout=0.001)

    async def task_in_vain() -> None:
        with pytest.raises(WaitTimeoutError, match=r"pool: the computation of 'key' .* within 0\.001 s"):
            await aio.get_or_compute("key", Computation(), timeout=0.001)

    Background(in_vain).result()
    for portal in cell.portals.all():
        portal.call(task_in_vain)
    cell.side.open()


def waiters_are_cancelled(cell: Cell) -> None:
    aio = AsyncKVPool(cell.pool)

    async def by_a_scope() -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(aio.get_or_compute, "key", Computation())
            await anyio.to_thread.run_sync(cell.waiters.wait_for, 1)
            group.cancel_scope.cancel()

    async def by_asyncio() -> None:
        task = asyncio.ensure_future(aio.get_or_compute("key", Computation()))
        await anyio.to_thread.run_sync(cell.waiters.wait_for, 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    async def by_wait_for() -> None:
        task = asyncio.ensure_future(aio.get_or_compute("key", Computation()))
        await anyio.to_thread.run_sync(cell.waiters.wait_for, 1)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(task, 0.001)

    for portal in cell.portals.all():
        portal.call(by_a_scope)
    for portal in cell.portals.asyncio():
        portal.call(by_asyncio)
        portal.call(by_wait_for)
    cell.side.open()


def waiters_are_left_behind(cell: Cell) -> None:
    aio = AsyncKVPool(cell.pool)

    async def until_it_waits() -> None:
        task = asyncio.ensure_future(aio.get_or_compute("key", Computation()))
        task._log_destroy_pending = False  # type: ignore[attr-defined]
        while not cell.waiters.arrived_now():
            await asyncio.sleep(0)

    for kind in filter(of_asyncio, LOOPS):
        loop = new_loop(kind)
        loop.run_until_complete(until_it_waits())
        loop.close()
    cell.side.open()


def of(*words: str) -> Callable[[str], bool]:
    """Sides whose names have one of these words."""
    return lambda side: any(word in side.split(", ") for word in words)


def of_a_loop(side: str) -> bool:
    return not of("thread", "dropped claim")(side)


def of_asyncio(side: str) -> bool:
    return of_a_loop(side) and not of("trio")(side)


def with_a_thread_of_its_own(side: str) -> bool:
    return of("sync")(side) or side == "thread, claim"


ENDINGS: dict[str, Ending] = {
    "returns": Ending(goes_on, all_get_the_result),
    "raises": Ending(raises(BrokenModelError), all_hear_the_same(BrokenModelError), one_takes_over),
    "raises what is no Exception": Ending(raises(Killed), one_takes_over),
    "ends its loop with SystemExit": Ending(raises(SystemExit), one_takes_over, own_loop=True),
    "makes what does not fit": Ending(makes_what_does_not_fit, all_hear_the_same(InvalidArgumentError), one_takes_over),
    "cannot be copied": Ending(is_not_copied, all_hear_the_same(MemoryError), one_takes_over),
    "is interrupted": Ending(is_interrupted, one_takes_over, sides=with_a_thread_of_its_own),
    "is cut off by its scope": Ending(
        is_cut_off_by_its_scope,
        one_takes_over,
        of_workers=all_get_the_result,
        sides=of_a_loop,
        within=in_a_scope,
    ),
    "runs out of its scope's time": Ending(
        runs_out_of_its_scopes_time,
        one_takes_over,
        of_workers=all_get_the_result,
        sides=of_a_loop,
        within=in_a_scope,
    ),
    "is cut off by asyncio's cancel": Ending(is_cut_off_by_asyncio, one_takes_over, sides=of_asyncio, within=in_a_task),
    "is cut off by asyncio's wait_for": Ending(
        is_cut_off_by_wait_for, one_takes_over, sides=of_asyncio, within=under_wait_for
    ),
    "loses its loop": Ending(
        loses_its_loop, one_takes_over, of_workers=all_get_the_result, sides=of_a_loop, own_loop=True
    ),
    "is left behind by its loop": Ending(
        is_left_behind,
        one_takes_over,
        of_workers=all_others_get_the_result,
        sides=of_asyncio,
        side=LeftBehindSide,
    ),
    "claim is dropped": Ending(goes_on, one_takes_over, sides=of("dropped claim")),
    "claim is abandoned": Ending(claim_is_abandoned, one_takes_over, sides=of("claim")),
    "claim is failed": Ending(claim_is_failed, all_hear_that_it_failed, sides=of("claim")),
    "pool is closed by a thread": Ending(by_a_thread(KVPool.close), all_hear_that_it_closed),
    "pool is closed by a task": Ending(by_tasks(AsyncKVPool.close), all_hear_that_it_closed),
    "pool is cleared by a thread": Ending(
        and_goes_on(by_a_thread(KVPool.clear)), all_get_the_result_and_it_is_not_kept
    ),
    "pool is cleared by a task": Ending(
        and_goes_on(by_tasks(AsyncKVPool.clear)), all_get_the_result_and_it_is_not_kept
    ),
    "version is bumped by a thread": Ending(
        and_goes_on(by_a_thread(KVPool.bump_version)), all_get_the_result_and_it_is_not_kept
    ),
    "version is bumped by a task": Ending(
        and_goes_on(by_tasks(AsyncKVPool.bump_version)), all_get_the_result_and_it_is_not_kept
    ),
    "waiters time out": Ending(waiters_time_out, all_get_the_result),
    "waiters are cancelled": Ending(waiters_are_cancelled, all_get_the_result),
    "waiters are left behind by their loops": Ending(waiters_are_left_behind, all_get_the_result, leaves_wakers=True),
}
