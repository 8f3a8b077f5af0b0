"""The two sides of a flight: who computes it, in every way that there is, and callers of every kind that wait."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import importlib
import threading
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import CancelledError, wait
from contextlib import ExitStack, contextmanager
from typing import Any

import anyio
from anyio.from_thread import BlockingPortal, start_blocking_portal

from concurrent_kv import AsyncKVPool, Claim, KeysValues, KVPool
from tests.async_support import LOOPS
from tests.flight_support import Computation
from tests.threading_support import JOIN_SECONDS, Background

Answer = KeysValues | BaseException
Within = Callable[["TaskSide", Awaitable[Answer]], Awaitable[Answer]]

# Who computes: a thread without a loop, or a task of a loop; by a sync function, by an async one, with a claim that it
# holds in a `with`, or with one that it drops.
SIDES = [
    *(f"thread, {how}" for how in ("sync", "claim", "dropped claim")),
    *(f"{loop}, {how}" for loop in LOOPS for how in ("sync", "async", "claim", "dropped claim")),
]

THREADS, LOOPS_OF_A_KIND, TASKS_OF_A_LOOP = 3, 2, 2
NUM_WAITERS = THREADS + TASKS_OF_A_LOOP * LOOPS_OF_A_KIND * len(LOOPS)


class Killed(BaseException):
    """Ends a computation without being an error of it, as `KeyboardInterrupt` does."""


class DroppedError(Exception):
    """What is said of a caller that ended with a claim in its hands."""


class Portals:
    """Running loops of each kind, each in a thread of its own."""

    def __init__(self, portals: dict[str, list[BlockingPortal]]) -> None:
        self._portals = portals

    def all(self) -> list[BlockingPortal]:
        return [portal for portals in self._portals.values() for portal in portals]

    def one(self, loop: str) -> BlockingPortal:
        return self._portals[loop][0]

    def asyncio(self) -> list[BlockingPortal]:
        return [portal for loop, portals in self._portals.items() if loop != "trio" for portal in portals]


@contextmanager
def running_portals(number: int = LOOPS_OF_A_KIND) -> Iterator[Portals]:
    with ExitStack() as stack:
        yield Portals(
            {loop: [stack.enter_context(running_portal(loop)) for _ in range(number)] for loop in LOOPS},
        )


def new_loop(kind: str) -> asyncio.AbstractEventLoop:
    """A loop of asyncio or uvloop, for who runs it and closes it by hand."""
    loop: asyncio.AbstractEventLoop = importlib.import_module(kind).new_event_loop()
    return loop


@contextmanager
def running_portal(loop: str) -> Iterator[BlockingPortal]:
    backend, options = LOOPS[loop]
    with start_blocking_portal(backend, options) as portal:
        yield portal


# Who computes --------------------------------------------------------------------------------------------------------


class Side(ABC):
    """Who computes "key", and stands at the gate of its computation until that is opened."""

    def __init__(self, pool: KVPool, how: str) -> None:
        self.pool = pool
        self.how = how
        self.computation = Computation()
        self.thread: int | None = None  # where it computes, if that is a thread's own work
        self.claim: Claim | None = None

    def begin(self) -> None:
        self._start()
        assert self.computation.gate.entered.wait(JOIN_SECONDS), "the computation did not begin"

    def open(self) -> None:
        """Let it go on: to its result, or to the error that it is to raise."""
        self.computation.gate.opened.set()

    def there(self, act: Callable[[], object]) -> None:
        """Do something on the side of who computes."""
        act()

    @abstractmethod
    def answer(self) -> Answer:
        """What the computing caller hears."""

    def interrupt(self) -> None:
        """An asynchronous exception in the thread that computes, as Ctrl-C is one."""
        assert self.thread is not None
        set_exception = ctypes.pythonapi.PyThreadState_SetAsyncExc
        assert set_exception(ctypes.c_ulong(self.thread), ctypes.py_object(Killed)) == 1
        self.open()

    @abstractmethod
    def _start(self) -> None:
        """Have somebody compute."""

    def _compute(self) -> KeysValues:
        self.thread = threading.get_ident()
        return self.computation()


class ThreadSide(Side):
    """A thread without a loop."""

    def _start(self) -> None:
        self._background = Background(self._work)

    def _work(self) -> Answer:
        try:
            if self.how == "sync":
                return self.pool.get_or_compute("key", self._compute)
            claim = self.pool.try_claim("key")
            assert claim.mine
            if self.how == "dropped claim":
                self._compute()
                return DroppedError()
            with claim:
                self.claim = claim
                kv = self._compute()
                claim.fulfil(kv)
                return kv
        except BaseException as error:
            return error
        finally:
            self.claim = None

    def answer(self) -> Answer:
        answer: Answer = self._background.result()
        return answer


class TaskSide(Side):
    """A task of a loop. `within` is how the task runs its work, so that it can be cut off."""

    def __init__(self, pool: KVPool, how: str, portal: BlockingPortal, within: Within) -> None:
        super().__init__(pool, how)
        self.portal = portal
        self.within = within
        self.scope: anyio.CancelScope | None = None
        self.task: asyncio.Future[Answer] | None = None
        self.cut_off: anyio.Event | None = None
        self._opened: anyio.Event | None = None

    def _start(self) -> None:
        self._future = self.portal.start_task_soon(self._run)

    async def _run(self) -> Answer:
        try:
            return await self.within(self, self.work())
        except (Exception, Killed) as error:
            return error
        finally:
            self.claim = None

    async def work(self) -> Answer:
        aio = AsyncKVPool(self.pool)
        if self.how == "sync":
            return await aio.get_or_compute("key", self._compute)
        if self.how == "async":
            return await aio.get_or_compute("key", self._compute_in_a_task)
        claim = aio.try_claim("key")
        assert claim.mine
        if self.how == "dropped claim":
            await self._compute_in_a_task()
            return DroppedError()  # returned, as the traceback of one that is raised would hold the claim
        with claim:
            self.claim = claim
            kv = await self._compute_in_a_task()
            await aio.fulfil(claim, kv)
            return kv

    async def _compute_in_a_task(self) -> KeysValues:
        self._opened = anyio.Event()
        self.computation.gate.entered.set()
        await self._opened.wait()
        return self.computation()

    def open(self) -> None:
        super().open()
        if self._opened is not None:
            self.portal.call(self._opened.set)

    def there(self, act: Callable[[], object]) -> None:
        self.portal.call(act)

    def answer(self) -> Answer:
        wait([self._future], JOIN_SECONDS)
        assert self._future.done(), "the computing task hangs"
        if self._future.cancelled():
            return CancelledError()
        return self._future.exception() or self._future.result()


async def plainly(side: TaskSide, work: Awaitable[Answer]) -> Answer:
    return await work


async def in_a_scope(side: TaskSide, work: Awaitable[Answer]) -> Answer:
    with anyio.CancelScope() as side.scope:
        return await work
    raise CancelledError


async def in_a_task(side: TaskSide, work: Awaitable[Answer]) -> Answer:
    side.task = asyncio.ensure_future(work)
    try:
        return await side.task
    except asyncio.CancelledError as error:
        raise CancelledError from error


async def under_wait_for(side: TaskSide, work: Awaitable[Answer]) -> Answer:
    """`asyncio.wait_for`, whose time begins when `cut_off` says so, and is then too short for anything."""
    side.task = asyncio.ensure_future(work)
    side.cut_off = anyio.Event()
    await side.cut_off.wait()
    return await asyncio.wait_for(side.task, 0.001)


class LeftBehindSide(TaskSide):
    """A task of an asyncio loop that somebody steps by hand, and closes with the task pending."""

    def __init__(self, pool: KVPool, how: str, loop: str) -> None:
        super().__init__(pool, how, None, plainly)  # type: ignore[arg-type]  # no portal runs this loop
        self._loop = new_loop(loop)

    def _start(self) -> None:
        async def until_it_computes() -> None:
            task = asyncio.ensure_future(self.work())
            task._log_destroy_pending = False  # type: ignore[attr-defined]  # what it would say is what is tested
            while not self.computation.gate.entered.is_set():
                await asyncio.sleep(0)

        self._loop.run_until_complete(until_it_computes())

    def leave(self) -> None:
        """Close the loop, which cancels nobody: coroutines are closed when they are dropped."""
        self._loop.close()
        worker = next((thread for thread in threading.enumerate() if thread.ident == self.thread), None)
        super(TaskSide, self).open()
        if worker is not None:  # holds the task until it has ended
            worker.join(JOIN_SECONDS)
            assert not worker.is_alive()
        self.claim = self._opened = None
        del self._loop, worker
        gc.collect()

    def open(self) -> None:
        """Nobody is left to go on."""

    def answer(self) -> Answer:
        return CancelledError()


# Who waits -----------------------------------------------------------------------------------------------------------


class Waiting:
    """Threads, and tasks of several loops of each kind, that ask for "key" and would compute `takes_over`."""

    def __init__(self, pool: KVPool, portals: Portals) -> None:
        self.takes_over = Computation(opened=True, value=50)
        aio = AsyncKVPool(pool)

        def ask() -> Answer:
            try:
                return pool.get_or_compute("key", self.takes_over)
            except Exception as error:
                return error

        async def ask_in_a_task() -> Answer:
            try:
                return await aio.get_or_compute("key", self.takes_over)
            except Exception as error:
                return error

        self._threads = [Background(ask) for _ in range(THREADS)]
        self._futures = [
            portal.start_task_soon(ask_in_a_task) for portal in portals.all() for _ in range(TASKS_OF_A_LOOP)
        ]

    def answers(self) -> list[Answer]:
        answers: list[Any] = [thread.result() for thread in self._threads]
        answers += [future.result(JOIN_SECONDS) for future in self._futures]
        assert len(answers) == NUM_WAITERS
        return answers
