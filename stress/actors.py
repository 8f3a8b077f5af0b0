"""The users of the cache: threads, and tasks of an event loop, each doing one operation after the other."""

from __future__ import annotations

import threading
import traceback
from collections import Counter, defaultdict
from collections.abc import Awaitable
from dataclasses import dataclass
from random import Random
from time import monotonic, perf_counter_ns
from typing import Any

import anyio

from concurrent_kv import WaitTimeoutError
from stress.access import Access
from stress.computing import Computations
from stress.content import BrokenPromiseError
from stress.faults.errors import Interrupt, injected
from stress.faults.plan import Faults
from stress.gate import Gate
from stress.operations import RUN
from stress.world import World

__all__ = ["Actor", "Failure", "Failures", "Run"]

MOST_FAILURES = 20  # then the run is over


@dataclass(frozen=True)
class Failure:
    """Something that must not happen."""

    kind: str  # "broken promise", "wait past its bound", "unexpected error", ...
    message: str
    where: str  # the actor, or the check
    details: str = ""


class Failures:
    """All of them, from all threads; when they are enough, the run is `over`."""

    def __init__(self, over: threading.Event) -> None:
        self._over = over
        self._lock = threading.RLock()  # a finaliser that dies unheard while its thread adds one adds another
        self._all: list[Failure] = []

    def add(self, failure: Failure) -> None:
        with self._lock:
            if len(self._all) < MOST_FAILURES:
                self._all.append(failure)
            if len(self._all) >= MOST_FAILURES:
                self._over.set()

    def all(self) -> list[Failure]:
        with self._lock:
            return list(self._all)


@dataclass(frozen=True)
class Run:
    """What the actors of one run share."""

    world: World
    faults: Faults
    gate: Gate
    failures: Failures
    computations: Computations
    over: threading.Event


class Actor:
    """One thread or task.

    Attributes:
        number: who it is, in what it writes.
        under_way: what it does, and since when (`monotonic()`), for the watchdog, which looks for those that are stuck.
        latencies: nanoseconds of each kind of call, taken away by the monitor.
    """

    def __init__(self, run: Run, number: int, name: str, access: Access) -> None:
        self.run = run
        self.world = run.world
        self.faults = run.faults
        self.computations = run.computations
        self.number = number
        self.name = name
        self.access = access
        self.rng = Random(f"{run.world.settings.seed} {name}")
        self.scope: anyio.CancelScope | None = None  # of a task's operation under way
        self.under_way: tuple[str, float] | None = None
        self.latencies: defaultdict[str, list[int]] = defaultdict(list)
        self.checks: Counter[str] = Counter()
        self.notes: Counter[str] = Counter()
        self.operations: Counter[str] = Counter()
        mix = {**run.world.settings.profile.mix, **run.faults.mix()}
        self._choices = [name for name, weight in mix.items() if weight]
        self._weights = [mix[name] for name in self._choices]
        self._run = {**RUN, **run.faults.operations()}

    async def act(self) -> None:
        """Operations until the run is over."""
        gate, over = self.run.gate, self.run.over
        gate.enter()
        try:
            while not over.is_set():
                if gate.shut:
                    if self.access.is_task:
                        await gate.park_task()
                    else:
                        gate.park()
                    continue
                await self._operate()
        except Exception as error:
            self.run.failures.add(Failure("actor died", repr(error), self.name, traceback.format_exc()))
        finally:
            gate.leave()

    async def _operate(self) -> None:
        name = self.rng.choices(self._choices, self._weights)[0]
        try:
            self.under_way = (name, monotonic())
            await self.faults.disturb(self, name, self._run[name](self))
            self.operations[name] += 1
        except BrokenPromiseError as error:
            self._fail("broken promise", error)
        except WaitTimeoutError as error:
            if self.faults.may_starve and "no room" in str(error):
                self.noted("no room until repair")
            else:
                self._fail("wait past its bound", error)
        except Interrupt:
            self.noted("interrupted")
        except Exception as error:
            if injected(error):
                self.noted(f"injected: {type(error).__name__}")
            else:
                self._fail("unexpected error", error)
        finally:
            self.under_way = None

    def _fail(self, kind: str, error: Exception) -> None:
        details = "".join(traceback.format_exception(error))
        self.run.failures.add(Failure(kind, f"{type(error).__name__}: {error}", self.name, details))

    async def call(self, kind: str, call: Awaitable[Any]) -> Any:
        """Await one call of the cache, and note how long it took if it did not fail."""
        began = perf_counter_ns()
        result = await call
        self.latencies[kind].append(perf_counter_ns() - began)
        return result

    def passed(self, *checks: str, count: int = 1) -> None:
        """Checks that held."""
        for check in checks:
            self.checks[check] += count

    def noted(self, what: str) -> None:
        """Something worth counting that is no failure."""
        self.notes[what] += 1
