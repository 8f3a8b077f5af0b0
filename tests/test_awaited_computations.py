"""Functions that return something to await, as the computation of the facade's `get_or_compute`."""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import pytest

from concurrent_kv import AsyncKVPool, KeysValues, KVPool
from concurrent_kv.aio import awaiting
from tests.async_support import LOOPS, join_workers, run_on
from tests.support import assert_same, tokens
from tests.threading_support import JOIN_SECONDS

RESULT = tokens(1, 3)


async def compute() -> KeysValues:
    await anyio.lowlevel.checkpoint()
    return RESULT


class Called:
    """An object that is called as an async function is."""

    async def __call__(self) -> KeysValues:
        return await compute()

    def plain(self) -> Awaitable[KeysValues]:
        return compute()


def plain_of(number: int) -> Awaitable[KeysValues]:
    return compute()


# (made anew for every call, whether the first call takes a worker)
FORMS: dict[str, tuple[Callable[[], Any], bool]] = {
    "async function": (lambda: compute, False),
    "partial": (lambda: functools.partial(compute), False),
    "object": (Called, False),
    "lambda": (lambda: lambda: compute(), True),
    "method": (lambda: Called().plain, True),
    "partial of a function": (lambda: functools.partial(plain_of, 1), True),
}


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(awaiting, "_remembered", {})


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("loop", LOOPS)
def test_what_returns_an_awaitable_takes_a_worker_once_at_most(pool: KVPool, loop: str, form: str) -> None:
    made, takes_one = FORMS[form]

    async def work() -> None:
        facade = AsyncKVPool(pool, inline_wait_seconds=1.0)
        for number in range(20):
            assert_same(await facade.get_or_compute(number, made()), RESULT)
        assert facade.offload_stats().worker_count == takes_one

    run_on(loop, work)


def test_a_function_that_computes_is_never_called_on_the_loops_thread(pool: KVPool) -> None:
    seen: list[int] = []

    def computes() -> KeysValues:
        seen.append(threading.get_ident())
        return RESULT

    async def work() -> None:
        facade = AsyncKVPool(pool)
        for number in range(5):
            await facade.get_or_compute(number, computes)

    run_on("asyncio", work)
    assert threading.get_ident() not in seen
    assert len(seen) == 5


def test_a_function_that_gave_an_awaitable_and_gives_a_result_goes_to_a_worker_again(pool: KVPool) -> None:
    seen: list[int] = []

    def sometimes() -> Any:
        seen.append(threading.get_ident())
        return compute() if len(seen) == 1 else RESULT

    async def work() -> None:
        facade = AsyncKVPool(pool)
        for number in range(4):
            assert_same(await facade.get_or_compute(number, sometimes), RESULT)

    run_on("asyncio", work)
    here = threading.get_ident()
    assert [thread == here for thread in seen] == [False, True, False, False]


def test_no_more_functions_are_remembered_than_a_bounded_number() -> None:
    for number in range(3 * awaiting.MOST):
        names: dict[str, Any] = {}
        exec(f"def f(): return {number}", names)
        awaiting.remember(names["f"])
        assert awaiting.gives_awaitables(names["f"])
    assert len(awaiting._remembered) <= awaiting.MOST
    awaiting.remember(int)  # has no code to remember it by
    assert not awaiting.gives_awaitables(int)


def test_functions_of_equal_code_are_not_taken_for_each_other() -> None:
    def made() -> Any:
        names: dict[str, Any] = {}
        exec("def f(): return g()", names)
        return names["f"]

    one, other = made(), made()
    assert one.__code__ == other.__code__
    awaiting.remember(one)
    assert not awaiting.gives_awaitables(other)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("times", [1, 2])
def test_a_key_is_free_once_the_loop_of_an_unfinished_task_is_closed(pool: KVPool, form: str, times: int) -> None:
    """`times`: whether the function is one that was seen before."""
    begun = threading.Event()
    left: list[object] = []

    async def never() -> KeysValues:
        begun.set()
        await asyncio.get_running_loop().create_future()
        raise AssertionError

    class Object(Called):
        async def __call__(self) -> KeysValues:
            return await never()

        def plain(self) -> Awaitable[KeysValues]:
            return never()

    forms: dict[str, Callable[[], Any]] = {
        "async function": lambda: never,
        "partial": lambda: functools.partial(never),
        "object": Object,
        "lambda": lambda: lambda: never(),
        "method": lambda: Object().plain,
        "partial of a function": lambda: functools.partial(lambda number: never(), 1),
    }
    unfinished = forms[form]()

    def left_unfinished(key: str) -> None:
        begun.clear()
        loop = asyncio.new_event_loop()

        async def work() -> None:
            left.append(asyncio.ensure_future(AsyncKVPool(pool).get_or_compute(key, unfinished)))
            with anyio.fail_after(JOIN_SECONDS):
                while not begun.is_set():
                    await asyncio.sleep(0)

        loop.run_until_complete(work())
        loop.close()

    for number in range(times):
        left_unfinished(str(number))
        join_workers()
        # The task is alive, in `left`; nobody will go on with it.
        assert pool.get_or_compute(str(number), lambda: RESULT, timeout=1.0).lengths == (3,)
    for task in left:
        task._log_destroy_pending = False  # type: ignore[attr-defined]
