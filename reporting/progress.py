"""How far long work is and when it is likely to be over: drawn in a terminal, a line now and then in a log."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol, TypeVar

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from reporting.tables import console_of

__all__ = ["Figures", "Work", "duration", "to_go", "track", "watched"]

LINE_SECONDS = 30.0  # between two lines in a log
WIDEST = 30  # characters of what is done, beside a bar
T = TypeVar("T")


def duration(seconds: float) -> str:
    """In words: "40 s", "12 min", "3 h 20 min"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def to_go(share: float, seconds: float) -> str:
    """In words, what is left where a share of the work, from 0 to 1, has taken so long: "about 12 min to go"."""
    return f"about {duration(seconds * (1 - share) / share)} to go" if share > 0 else "no telling yet how long"


class Work:
    """So many parts of some work, of which `part` says that one more is done.

    It draws where it is told so, in the calling thread: nothing runs beside what is measured.

    Args:
        name: of the work.
        parts: how many.
        console: where; stderr if left out.
        clock: seconds.
    """

    def __init__(
        self,
        name: str,
        parts: int,
        *,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name, self._parts, self._clock = name, parts, clock
        self._console = console or console_of(stderr=True)
        self._done = 0
        self._began = self._said = clock()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            auto_refresh=False,
            transient=True,
            get_time=clock,
            speed_estimate_period=float("inf"),  # of all parts so far: they may be few, and long
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task(name, total=parts)

    def __enter__(self) -> Work:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def begin(self, what: str) -> None:
        """What is done from now on."""
        self._bar.update(self._task, description=what[:WIDEST], refresh=True)

    def part(self, what: str = "") -> None:
        """One part more is done; `what` it was."""
        self._done += 1
        self._bar.update(self._task, advance=1, refresh=True)
        if self._bar.disable and self._done < self._parts and self._clock() - self._said >= LINE_SECONDS:
            self._said = self._clock()
            passed = self._said - self._began
            self._console.print(
                f"{self._name}: {self._done} of {self._parts} in {duration(passed)}, "
                f"{to_go(self._done / self._parts, passed)}{f'; last {what}' if what else ''}",
                markup=False,
                soft_wrap=True,
            )


def track(items: Sequence[T], name: str) -> Iterator[T]:
    """The items, one after the other; each is a part of the work."""
    with Work(name, len(items)) as work:
        for item in items:
            yield item
            work.part()


class Figures(Protocol):
    """What can be watched while it goes on."""

    def __rich__(self) -> RenderableType:
        """Drawn anew at every refresh, in a thread of its own."""

    def line(self) -> str:
        """The same in a line of a log."""


@contextmanager
def watched(figures: Figures, console: Console, *, a_second: float = 4.0) -> Iterator[None]:
    """Show figures within the `with`: in a terminal so many times a second, in a log a line now and then."""
    live: AbstractContextManager[object]
    if console.is_terminal:
        live = Live(figures, console=console, refresh_per_second=a_second, transient=True)
    else:
        live = _lines(figures, console)
    with live:
        yield


@dataclass
class _Lines:
    """Of this process' log: short works one after the other share the time between two lines."""

    said: float = field(default_factory=time.monotonic)  # when the last was


_log = _Lines()


@contextmanager
def _lines(figures: Figures, console: Console) -> Iterator[None]:
    over = threading.Event()

    def say() -> None:
        while not over.wait(max(0.0, _log.said + LINE_SECONDS - time.monotonic())):
            console.print(figures.line(), markup=False, soft_wrap=True)
            _log.said = time.monotonic()

    saying = threading.Thread(target=say, name="progress", daemon=True)
    saying.start()
    try:
        yield
    finally:
        over.set()
        saying.join(LINE_SECONDS)  # a line that is being written
