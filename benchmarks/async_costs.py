"""What each operation costs, for threads and for tasks of each event loop, inline and in a worker; and what the
thresholds between inline and worker rest on.

    python -m benchmarks.async_costs [--quick] [--json FILE] [--markdown]

Everything is measured in turn in one run, so that figures of one table can be compared; microseconds, medians of calls.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import importlib.util
import inspect
import json
from collections.abc import Sequence
from time import perf_counter_ns
from typing import Any

import anyio
import numpy as np
import torch

from benchmarks.async_cases import CASES, Case, Tasks, Threads, World
from benchmarks.async_shards import measure_shards, shards_tables
from benchmarks.async_thresholds import thresholds
from reporting.arguments import file_to_write
from reporting.machine import about
from reporting.progress import track
from reporting.tables import Grid, console_of, origin

LOOPS: dict[str, tuple[str, dict[str, Any]]] = {"asyncio": ("asyncio", {}), "trio": ("trio", {})}
if importlib.util.find_spec("uvloop"):
    LOOPS["uvloop"] = ("asyncio", {"use_uvloop": True})
ROUNDS, CALLS = 12, 30  # of every operation on every surface: `ROUNDS` times in turn, `CALLS` calls after each other
QUICK = 1, 2
MICROSECONDS = 1e-3  # of a nanosecond

Samples = dict[tuple[str, str], list[float]]  # (operation, where): microseconds of each call


def time_threads(case: Case, view: Threads, calls: int) -> list[float]:
    """Microseconds of each call, by a thread."""
    taken = []
    for _ in range(calls):
        item = case.before(view)
        begin = perf_counter_ns()
        result = case.call(view, item)
        taken.append((perf_counter_ns() - begin) * MICROSECONDS)
        case.after(view, item, result)
    return taken


async def time_tasks(case: Case, view: Tasks, calls: int) -> list[float]:
    """Microseconds of each call, by a task that has its loop for itself."""
    taken = []
    for _ in range(calls):
        made = case.before(view)
        item = await made if inspect.isawaitable(made) else made
        begin = perf_counter_ns()
        result = await case.call(view, item)
        taken.append((perf_counter_ns() - begin) * MICROSECONDS)
        case.after(view, item, result)
    return taken


def measure_operations(rounds: int, calls: int) -> Samples:
    """Every operation on every surface, in turn."""
    samples: Samples = {}
    world = World()

    def by_a_thread() -> None:
        view = Threads(world)
        view.search = view.open_search()
        for case in CASES:
            samples.setdefault((case.name, "sync"), []).extend(time_threads(case, view, calls))
        view.search.close()

    async def by_a_task(loop: str) -> None:
        views = {"inline": Tasks(world, inline=True), "worker": Tasks(world, inline=False)}
        for view in views.values():
            view.search = await view.open_search()
        for case in CASES:
            for where, view in views.items():
                if where == "worker" or not case.always_in_worker:
                    taken = await time_tasks(case, view, calls)
                    samples.setdefault((case.name, f"{loop} {where}"), []).extend(taken)
        for view in views.values():
            await view.search.close()

    gc.collect()
    gc.disable()
    try:
        for _ in track(range(rounds), "rounds of operations"):
            by_a_thread()
            for loop, (backend, options) in LOOPS.items():
                anyio.run(by_a_task, loop, backend=backend, backend_options=options)
            gc.collect()
    finally:
        gc.enable()
    world.close()
    return samples


# Showing -------------------------------------------------------------------------------------------------------------


def figures_of(samples: Samples) -> dict[str, dict[str, dict[str, float]]]:
    """Median and spread by operation and place, microseconds."""
    figures: dict[str, dict[str, dict[str, float]]] = {}
    for (operation, where), taken in samples.items():
        tenth, median, ninetieth = np.percentile(taken, [10, 50, 90])
        figures.setdefault(operation, {})[where] = {
            "median": round(float(median), 1),
            "p10": round(float(tenth), 1),
            "p90": round(float(ninetieth), 1),
            "calls": len(taken),
        }
    return figures


def operations_table(figures: dict[str, dict[str, dict[str, float]]]) -> Grid:
    places = ["sync", *(f"{loop} {where}" for loop in LOOPS for where in ("inline", "worker"))]
    table = Grid("microseconds: median (10th to 90th percentile)", ("operation", *places))
    for case in CASES:
        cells = []
        for place in places:
            figure = figures[case.name].get(place)
            cells.append("" if figure is None else f"{figure['median']:.0f} ({figure['p10']:.0f}-{figure['p90']:.0f})")
        table.rows.append((f"{case.name}{f', {case.note}' if case.note else ''}", *cells))
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, show, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few calls of everything, to see that it runs")
    parser.add_argument("--json", type=file_to_write, metavar="FILE", help="write all figures there")
    parser.add_argument("--markdown", action="store_true", help="print the tables as docs/async.md has them")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rounds, calls = QUICK if options.quick else (ROUNDS, CALLS)
    operations = figures_of(measure_operations(rounds, calls))
    found = thresholds(LOOPS, quick=options.quick)
    shards = measure_shards(LOOPS, quick=options.quick)
    tables = [operations_table(operations), *found.tables(), *shards_tables(shards)]
    if options.markdown:
        print(*(f"{table.title}\n\n{table.as_markdown()}" for table in tables), sep="\n")
    else:
        console_of().print(*tables, origin())
    if options.json is not None:
        machine = {**about(), "anyio": importlib.metadata.version("anyio")}
        report = {"machine": machine, "operations": operations, **found.as_dict(), "shards": shards}
        options.json.write_text(json.dumps(report, indent=2) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
