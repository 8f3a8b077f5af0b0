"""One run of one profile: its actors, the quiet moments between, and its end."""

from __future__ import annotations

import signal
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from time import monotonic, perf_counter_ns

import anyio

from concurrent_kv import AsyncKVCacheManager, PoolStats, RepairReport
from concurrent_kv.aio.offload import OffloadStats
from stress.access import TaskAccess, ThreadAccess, drive
from stress.actors import Actor, Failure, Failures, Run
from stress.computing import Computations
from stress.faults.errors import Interrupt
from stress.faults.interrupts import SIGNAL, control_c_interrupts
from stress.faults.plan import Faults
from stress.gate import Gate
from stress.measures import Latencies
from stress.monitor import Monitor, Sample, stacks, total_stats
from stress.quiet import check_emptied, check_quiet
from stress.world import Settings, World

__all__ = ["ProfileResult", "Watch", "run_profile"]

LOOK_SECONDS = 0.1  # how often it is looked whether Ctrl-C was pressed
LAG_SECONDS = 0.01  # how often the event loop is asked how late it is
QUIET_SECONDS = 10.0  # between two quiet moments
GROWTH_BYTES = 64 * 2**20  # that the resident size may grow by, from the second quarter to the last
KEPT_THREADS = "Trio thread"  # trio keeps idle workers for ten seconds, whatever loop they were made for

Watch = Callable[[Monitor], AbstractContextManager[object]]


@dataclass(frozen=True)
class ProfileResult:
    """What one run found; `interrupted` if Ctrl-C ended it before its time."""

    settings: Settings
    seconds: float
    samples: list[Sample]
    latencies: dict[str, Latencies]
    loop_lag: Latencies
    operations: Counter[str]
    checks: Counter[str]
    notes: Counter[str]
    faults: Counter[str]
    stats: PoolStats
    offload: OffloadStats | None
    repaired: RepairReport
    quiet_moments: int
    growth_bytes: int
    slots: int
    failures: list[Failure]
    interrupted: bool


class _Runner:
    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.world = World(settings)
        self.over = threading.Event()
        self.failures = Failures(self.over)
        self.gate = Gate()
        self.faults = Faults(self.world, self.gate)
        self.run = Run(self.world, self.faults, self.gate, self.failures, Computations(), self.over)
        profile = settings.profile
        thread_access = ThreadAccess(self.world.manager)
        self.facade = AsyncKVCacheManager(self.world.manager) if profile.tasks else None
        others = [self.faults.tiny.pool] if self.faults.tiny else []
        self.threads = [Actor(self.run, n, f"thread {n}", thread_access) for n in range(1, profile.threads + 1)]
        self.tasks: list[Actor] = []
        if self.facade is not None:
            task_access = TaskAccess(self.facade, others)
            numbers = range(profile.threads + 1, profile.threads + profile.tasks + 1)
            self.tasks = [Actor(self.run, n, f"task {n}", task_access) for n in numbers]
        # With Ctrl-C among the faults the main thread has to be one of the actors.
        is_main = threading.current_thread() is threading.main_thread()
        self.main = self.threads[0] if self.threads and is_main and "interrupts" in settings.faults else None
        self.main_ended = threading.Event()
        self.monitor = Monitor(self.run, [*self.threads, *self.tasks])
        self.repaired = RepairReport(0, 0, 0)
        self.quiet_moments = 0

    def execute(self, watch: Watch) -> ProfileResult:
        threads = [
            threading.Thread(target=self._act, args=(actor,), name=actor.name, daemon=True)
            for actor in self.threads
            if actor is not self.main
        ]
        if self.tasks:
            threads.append(threading.Thread(target=self._loop, name="event loop", daemon=True))
        work = self.faults.work(self.over, lambda message: self.failures.add(Failure("fault", message, "fork")))
        helpers = [threading.Thread(target=each, name="fault", daemon=True) for each in work]
        conductor = threading.Thread(target=self._conduct, name="conductor", daemon=True)
        before = threading.enumerate()
        self.monitor.start()
        try:
            with (
                watch(self.monitor),
                self._hooks(),
                self._control_c(),
                self.faults.collecting(),
            ):
                for thread in (*threads, *helpers, conductor):
                    thread.start()
                self._stay()
        finally:
            self.over.set()
            self.gate.open()
            ended = self._join([*threads, *helpers, conductor])
            if not self.monitor.stop(self.settings.bound_seconds):
                ended = False
                self.failures.add(Failure("stuck", "the statistics cannot be had", "end", stacks()))
        if ended:  # or else this thread would hang as the others do
            self._finish(before)
        return self._result()

    def _control_c(self) -> AbstractContextManager[None]:
        """Where the main thread is an actor: its Ctrl-C are faults, but for those that a person presses."""
        return control_c_interrupts(self._interrupt) if self.main else nullcontext()

    def _interrupt(self) -> None:
        """In a signal handler. The conductor ends the run: an exception here may come up in a finaliser, unheard."""
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True

    def _stay(self) -> None:
        """The main thread's part. Ctrl-C ends the run, and what it found until then counts."""
        try:
            if self.main is not None:
                self._act(self.main)
            self.main_ended.set()
            self.over.wait()
        except KeyboardInterrupt:
            self.main_ended.set()
            if not self.over.is_set():  # or else the conductor's, which frees a thread that is stuck
                self.interrupted = True

    @contextmanager
    def _hooks(self) -> Iterator[None]:
        """Unheard errors, of finalisers and threads, are failures too."""

        def unheard(error: BaseException | None, where: object) -> None:
            if isinstance(error, Interrupt):
                self.faults.count("interrupted finaliser")
            else:
                details = "".join(traceback.format_exception(error)) if error is not None else ""
                self.failures.add(Failure("unheard error", repr(error), repr(where), details))

        before = sys.unraisablehook, threading.excepthook
        sys.unraisablehook = lambda args: unheard(args.exc_value, args.object)
        threading.excepthook = lambda args: unheard(args.exc_value, args.thread)
        try:
            yield
        finally:
            sys.unraisablehook, threading.excepthook = before

    def _act(self, actor: Actor) -> None:
        drive(actor.act())

    def _loop(self) -> None:
        """The tasks, and one that asks how late the loop is."""

        async def lag() -> None:
            while not self.over.is_set():
                began = perf_counter_ns()
                await anyio.sleep(LAG_SECONDS)
                self.monitor.lags.append(max(0, perf_counter_ns() - began - int(LAG_SECONDS * 1e9)))

        async def main() -> None:
            async with anyio.create_task_group() as group:
                group.start_soon(lag)
                for actor in self.tasks:
                    group.start_soon(actor.act)

        try:
            anyio.run(main, backend=self.settings.backend)
        except BaseException as error:
            details = "".join(traceback.format_exception(error))
            self.failures.add(Failure("event loop died", repr(error), "event loop", details))

    def _conduct(self) -> None:
        """Quiet moments now and then, until the time is over."""
        end = monotonic() + self.settings.seconds
        while (left := end - monotonic()) > 0:
            if self._ends_within(min(left, QUIET_SECONDS, self.settings.seconds / 3)):
                break
            self._quiet()
        self.over.set()
        self.gate.open()
        if self.main is not None and not self.main_ended.wait(2 * self.settings.bound_seconds):
            self.failures.add(Failure("stuck", "the main thread does not end", "end", stacks()))
            signal.pthread_kill(threading.main_thread().ident or 0, SIGNAL)  # frees it from most waits

    def _ends_within(self, seconds: float) -> bool:
        """Wait; whether the run is over, or interrupted, before so many seconds are."""
        end = monotonic() + seconds
        while (left := end - monotonic()) > 0:
            if self.interrupted or self.over.wait(min(left, LOOK_SECONDS)):
                return True
        return False

    def _quiet(self) -> None:
        if not self.gate.close(2 * self.settings.bound_seconds):
            message = f"not every actor stood still within {2 * self.settings.bound_seconds:g} s"
            self.failures.add(Failure("stuck", message, "quiet moment", stacks()))
            self.over.set()
        else:
            self._check("quiet moment")
        self.gate.open()

    def _check(self, where: str) -> None:
        try:
            problems = check_quiet(self.run)
        except Exception as error:
            details = "".join(traceback.format_exception(error))
            self.failures.add(Failure("books", repr(error), where, details))
            return
        self.quiet_moments += 1
        self.repaired = RepairReport(*(a + b for a, b in zip(self.repaired, problems.repaired, strict=True)))
        for problem in problems:
            self.failures.add(Failure("books", problem, where, stacks()))

    def _join(self, threads: list[threading.Thread]) -> bool:
        """Whether all of them have ended within the bound."""
        deadline = monotonic() + 2 * self.settings.bound_seconds
        for thread in threads:
            thread.join(max(0.0, deadline - monotonic()))
        stuck = [thread.name for thread in threads if thread.is_alive()]
        if stuck:
            self.failures.add(Failure("stuck", f"threads that do not end: {', '.join(stuck)}", "end", stacks()))
        return not stuck

    def _finish(self, threads_before: list[threading.Thread]) -> None:
        """The last quiet moment, then nothing may be left."""
        if any(failure.kind == "stuck" for failure in self.failures.all()):
            return
        self._check("end")
        self.growth = _growth(self.monitor.samples)
        if self.growth > GROWTH_BYTES:
            self.failures.add(Failure("memory", f"the resident size grew by {self.growth / 2**20:.0f} MiB", "end"))
        try:
            for problem in check_emptied(self.run):
                self.failures.add(Failure("books", problem, "after everything was cleared"))
            self.stats = total_stats(self.world.manager)
            self.faults.close()
            self.world.close()
        except Exception as error:
            details = "".join(traceback.format_exception(error))
            self.failures.add(Failure("books", repr(error), "end", details))
        left = [thread.name for thread in threading.enumerate() if thread not in threads_before]
        left = [name for name in left if not name.startswith(KEPT_THREADS)]
        if left:
            self.failures.add(Failure("left behind", f"threads: {', '.join(left)}", "end"))

    growth = 0
    interrupted = False
    stats: PoolStats

    def _result(self) -> ProfileResult:
        actors = [*self.threads, *self.tasks]
        if not hasattr(self, "stats"):
            self.stats = self.monitor.stats  # the last that could be had
        return ProfileResult(
            settings=self.settings,
            seconds=self.monitor.elapsed,
            samples=self.monitor.samples,
            latencies=dict(self.monitor.latencies),
            loop_lag=self.monitor.loop_lag,
            operations=sum((actor.operations for actor in actors), Counter()),
            checks=sum((actor.checks for actor in actors), Counter()),
            notes=sum((actor.notes for actor in actors), Counter()),
            faults=self.faults.made(),
            stats=self.stats,
            offload=self.facade.offload_stats() if self.facade is not None else None,
            repaired=self.repaired,
            quiet_moments=self.quiet_moments,
            growth_bytes=self.growth,
            slots=self.world.manager.storage.ledger.num_slots,
            failures=self.failures.all(),
            interrupted=self.interrupted,
        )


def _growth(samples: list[Sample]) -> int:
    """Bytes by which the resident size grew from the second quarter of a run to its last."""
    quarter = len(samples) // 4
    if not quarter:
        return 0

    def median(part: list[Sample]) -> int:
        return sorted(sample.rss_bytes for sample in part)[len(part) // 2]

    return median(samples[-quarter:]) - median(samples[quarter : 2 * quarter])


def run_profile(settings: Settings, watch: Watch | None = None) -> ProfileResult:
    """Run one profile and check everything; what it finds is in the result's `failures`."""
    return _Runner(settings).execute(watch or (lambda monitor: nullcontext()))
