"""A live view of what caches do, in a terminal: of a job that serves its numbers, or of this very process.

    python -m concurrent_kv.top http://localhost:9100/metrics

Needs `rich` and `prometheus_client`, the extra `top`.
"""

from __future__ import annotations

try:
    import prometheus_client  # noqa: F401
    import rich  # noqa: F401
except ModuleNotFoundError as error:
    if error.name not in ("prometheus_client", "rich"):
        raise
    raise ModuleNotFoundError(
        f"concurrent_kv.top needs {error.name}, which is not installed: pip install 'concurrent-kv[top]'",
        name=error.name,
    ) from error

import argparse
import os
import select
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from http.client import HTTPException
from typing import TypeAlias

from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from .device.graphs import keep_out_of_graphs
from .metrics import Distribution, KVMetrics
from .metrics.table import PREFIX

__all__ = ["Snapshot", "main", "top", "view"]

SECONDS = 1.0  # between two looks
LONGEST_SCRAPE_SECONDS = 10.0
FAILED, INTERRUPTED = 1, 130  # 130 as a shell reports SIGINT
ENDING_KEYS = (b"q", b"Q", b"\x1b", b"")  # the last: the terminal was closed
NO_ANSWER = (OSError, HTTPException, ValueError)
BAR, NONE = 8, "-"  # characters of a bar; what is shown where there is no number

Labels: TypeAlias = "frozenset[tuple[str, str]]"


@dataclass(frozen=True)
class Snapshot:
    """Numbers by their names in Prometheus, without what all have in common, and by their labels.

    Attributes:
        when: in seconds of the monotonic clock.
    """

    when: float
    numbers: Mapping[str, Mapping[Labels, float]]

    def get(self, name: str, **labels: str) -> float | None:
        """The sum of the numbers of that name with at least these labels; None where there is none."""
        wanted = labels.items()
        found = [value for has, value in self.numbers.get(name, {}).items() if wanted <= has]
        return sum(found) if found else None

    def having(self, name: str, *labels: str) -> list[tuple[str, ...]]:
        """The values of these labels that numbers of that name have, in order."""
        dicts = [dict(has) for has in self.numbers.get(name, {})]
        return list(dict.fromkeys(tuple(each.get(label, "") for label in labels) for each in dicts))


def snapshot_of(metrics: KVMetrics) -> Snapshot:
    """As things are in this process."""
    found: dict[str, dict[Labels, float]] = {}
    for sample in metrics.read():
        if not isinstance(sample.value, Distribution):
            labels = frozenset(zip(sample.metric.labels, sample.labels, strict=True))
            found.setdefault(_short(sample.metric.prometheus), {})[labels] = sample.value
    return Snapshot(time.monotonic(), found)


def snapshot_at(url: str) -> Snapshot:
    """As a scrape says.

    Raises:
        OSError, HTTPException: there is no answer. ValueError: what is answered is no scrape.
    """
    with urllib.request.urlopen(url, timeout=LONGEST_SCRAPE_SECONDS) as answer:
        text = answer.read().decode()
    found: dict[str, dict[Labels, float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name.startswith(f"{PREFIX}_"):
                found.setdefault(_short(sample.name), {})[frozenset(sample.labels.items())] = sample.value
    return Snapshot(time.monotonic(), found)


def _short(name: str) -> str:
    return name.removeprefix(f"{PREFIX}_")


# What is drawn -------------------------------------------------------------------------------------------------------


def view(now: Snapshot, before: Snapshot | None = None) -> RenderableType:
    """What one look shows; rates are of what came since `before`, and missing without."""
    managers = now.having("lock_waits_total", "manager") or now.having("evaluator_calls_total", "manager")
    parts: list[RenderableType] = []
    for (manager,) in managers:
        parts += _manager(manager, now, before)
    return Group(*parts) if parts else Text("there are no numbers of a cache there (yet)")


def _manager(manager: str, now: Snapshot, before: Snapshot | None) -> Iterator[RenderableType]:
    shared, waits = now.get("shared_slots", manager=manager), _rate("lock_waits_total", now, before, manager=manager)
    share = _rate("lock_wait_seconds_total", now, before, manager=manager)
    said = [f"slots shared {_number(shared)}", f"lock waits/s {_number(waits)}", f"waiting for locks {_percent(share)}"]
    yield Text.assemble((manager, "bold"), "  ", "   ".join(said))
    pools = now.having("entries", "manager", "pool")
    if any(of == manager for of, _ in pools):
        yield _pools(manager, [pool for of, pool in pools if of == manager], now, before)
    evaluators = [name for of, name in now.having("evaluator_calls_total", "manager", "evaluator") if of == manager]
    if evaluators:
        yield _evaluators(manager, evaluators, now, before)


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    return table


def _pools(manager: str, pools: Sequence[str], now: Snapshot, before: Snapshot | None) -> Table:
    table = _table("pool", "entries", "slots", "hits", "rows/s", "evicted/s", "searches", "waiting")
    for pool in pools:
        of = {"manager": manager, "pool": pool}
        table.add_row(
            pool,
            _fill(now.get("entries", **of), now.get("max_entries", **of)),
            _fill(now.get("slots", **of), now.get("max_slots", **of)),
            _percent(_ratio("hits_total", "queries_total", now, before, **of)),
            _number(_rate("queries_total", now, before, **of)),
            _number(_rate("evictions_total", now, before, **of)),
            _number(now.get("open_searches", **of)),
            _number(now.get("waiters", **of)),
        )
    return table


def _evaluators(manager: str, evaluators: Sequence[str], now: Snapshot, before: Snapshot | None) -> Table:
    table = _table("evaluator", "rows/call", "calls/s", "waiting", "gather", "model", "commit", "walks", "failed")
    for name in evaluators:
        of = {"manager": manager, "evaluator": name}
        busy = [
            _percent(_rate("evaluator_busy_seconds_total", now, before, part=part, **of))
            for part in ("gather", "model", "commit", "walk")
        ]
        table.add_row(
            name,
            _number(_ratio("evaluator_rows_total", "evaluator_calls_total", now, before, **of)),
            _number(_rate("evaluator_calls_total", now, before, **of)),
            _number(now.get("evaluator_waiting_rows", **of)),
            *busy,
            _number(now.get("evaluator_failed_rows_total", **of)),
        )
    return table


def _grown(name: str, now: Snapshot, before: Snapshot | None, **labels: str) -> float | None:
    """What was counted since `before`, or in all without; all, too, where the job was started again since."""
    value = now.get(name, **labels)
    earlier = (before.get(name, **labels) if before is not None else None) or 0.0
    return value if value is None or value < earlier else value - earlier


def _rate(name: str, now: Snapshot, before: Snapshot | None, **labels: str) -> float | None:
    grown = _grown(name, now, before, **labels)
    if grown is None or before is None or now.when <= before.when:
        return None
    return grown / (now.when - before.when)


def _ratio(part: str, whole: str, now: Snapshot, before: Snapshot | None, **labels: str) -> float | None:
    """Of what came since `before`; of all, where nothing did."""
    for since in (before, None):
        number, of = _grown(part, now, since, **labels), _grown(whole, now, since, **labels)
        if number is not None and of:
            return number / of
    return None


def _number(value: float | None) -> str:
    if value is None:
        return NONE
    for least, unit, ending in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if value >= least:
            return f"{value / unit:.3g}{ending}"
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.1f}"


def _percent(share: float | None) -> str:
    if share is None or share >= 10:
        return NONE if share is None else f"{_number(100 * share)}%"
    return f"{100 * share:.0f}%" if share in (0, 1) else f"{100 * share:.1f}%"


def _fill(value: float | None, most: float | None) -> Text:
    if value is None or not most:
        return Text(NONE)
    share = value / most
    full = round(BAR * min(share, 1.0))
    color = "green" if share < 0.8 else "yellow" if share < 0.95 else "red"
    return Text.assemble(("█" * full, color), ("░" * (BAR - full), "dim"), f" {100 * min(share, 9.99):3.0f}%")


# The program ---------------------------------------------------------------------------------------------------------


def top(
    source: str | KVMetrics,
    *,
    seconds: float = SECONDS,
    once: bool = False,
    console: Console | None = None,
    ended: Callable[[float], bool] | None = None,
) -> int:
    """Show what a job's caches do until q, Esc or Ctrl-C is pressed; returns what a program ends with.

    Args:
        source: the URL of a job that serves its numbers; or the `KVMetrics` of this process, whose threads go on
            meanwhile.
        seconds: between two looks.
        once: look twice, `seconds` apart, print the table and end.
        console: where to show it.
        ended: waits for so many seconds, and says whether to end; looks at the keyboard if left out.
    """
    console = console or Console()
    try:
        look = partial(snapshot_at, _url(source)) if isinstance(source, str) else partial(snapshot_of, source)
        if once:
            before = look()
            time.sleep(seconds)
            console.print(view(look(), before))
            where = source if isinstance(source, str) else "this process"
            console.print(f"{where}, {datetime.now(timezone.utc):%Y-%m-%d %H:%M:%S} UTC", style="dim", highlight=False)
            return 0
        with _keys() as pressed:
            return _show(look, seconds, console, ended or pressed)
    except NO_ANSWER as error:
        Console(stderr=True).print(f"{source}: {error}", markup=False, highlight=False)
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED


def _show(look: Callable[[], Snapshot], seconds: float, console: Console, ended: Callable[[float], bool]) -> int:
    before, now = None, look()
    with Live(view(now), console=console, auto_refresh=False, screen=console.is_terminal) as live:
        while not ended(seconds):
            try:
                before, now = now, look()
                shown = view(now, before)
            except NO_ANSWER as error:  # the job has ended, or is started again
                shown = Group(view(now, before), Text(f"no answer: {error}", style="red"))
                before, now = None, now
            live.update(shown, refresh=True)
    return 0


def _url(source: str) -> str:
    """As it is written, or as it is meant where only a host and a port are given."""
    url = source if "://" in source else f"http://{source}"
    if not url.startswith(("http://", "https://")):
        raise ValueError("the URL must begin with http:// or https://")
    return url if "/" in url.split("://", 1)[1] else f"{url}/metrics"


@contextmanager
def _keys() -> Iterator[Callable[[float], bool]]:
    """Gives what waits for some seconds and says whether a key was pressed meanwhile that ends the program."""
    try:
        import termios
        import tty

        keyboard = sys.stdin.fileno()
        is_terminal = os.isatty(keyboard)
    except (ImportError, OSError, ValueError):  # on another system, or where there is no stdin
        is_terminal = False
    if not is_terminal:
        yield _sleep
        return
    before = termios.tcgetattr(keyboard)

    def pressed(seconds: float) -> bool:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            # Past Python's buffer, which `select` does not see.
            if select.select([keyboard], [], [], left)[0] and os.read(keyboard, 64) in ENDING_KEYS:
                return True
        return False

    try:
        tty.setcbreak(keyboard)
        yield pressed
    finally:
        termios.tcsetattr(keyboard, termios.TCSADRAIN, before)


def _sleep(seconds: float) -> bool:
    time.sleep(seconds)
    return False


def main(arguments: Sequence[str] | None = None) -> int:
    """Show, until a key is pressed."""
    parser = argparse.ArgumentParser(prog="python -m concurrent_kv.top", description="What a job's caches do, live.")
    parser.add_argument("url", help="where the job serves its numbers; or HOST:PORT")
    parser.add_argument("--seconds", type=_seconds, default=SECONDS, help="between two looks (default: %(default)g)")
    parser.add_argument("--once", action="store_true", help="look twice, print one table, and end")
    options = parser.parse_args(arguments)
    return top(options.url, seconds=options.seconds, once=options.once)


def _seconds(text: str) -> float:
    with suppress(ValueError):
        if 0 < float(text) < float("inf"):
            return float(text)
    raise argparse.ArgumentTypeError(f"must be a number of seconds above 0, not {text!r}")


keep_out_of_graphs(__name__)

if __name__ == "__main__":
    sys.exit(main())
