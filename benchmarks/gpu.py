"""Gather and commit on a GPU: launches, synchronisations and microseconds, beside a copy for each entry; streams.

Where LightZero is installed, also the recurrent step of its world model, with its own cache and with ours.

`make gpu` runs this after the tests of `tests/gpu`. Figures go to `benchmarks/results/` with `--json`.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu_cases import PerEntry, Pooled, copy_of, device_micros, issue_micros
from benchmarks.gpu_lightzero import COLUMNS as STEP_COLUMNS
from benchmarks.gpu_lightzero import measure_steps, missing
from benchmarks.workloads import WORKLOADS
from reporting.arguments import file_to_write
from reporting.machine import about
from reporting.progress import track
from reporting.tables import Grid, console_of, origin

__all__ = ["count_calls", "main"]

LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaLaunchKernelExC", "cudaMemcpyAsync", "cudaMemsetAsync")
SYNCHRONISATIONS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")
ROUNDS = 5  # of each measurement, of which the median is taken
COLUMNS = ("launches", "syncs", "issue_us", "device_us", "copy_us", "copy_share")


def count_calls(names: Iterable[str]) -> tuple[int, int]:
    """How many of the runtime's calls launch something, and how many make the host wait."""
    counts = Counter(names)
    return sum(counts[name] for name in LAUNCHES), sum(counts[name] for name in SYNCHRONISATIONS)


def calls_of(work: Callable[[], object], device: torch.device) -> tuple[int, int]:
    """Launches and synchronisations of one `work()`; operator calls on a CPU, which has neither."""
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
        torch.cuda.synchronize(device)
    with profile(activities=activities) as profiled:
        work()
    return count_calls(event.name for event in profiled.events() or ())


def measure(name: str, rows: int, device: torch.device, times: int) -> list[dict[str, Any]]:
    """One workload at one number of rows: gather and commit, pooled and per entry."""
    workload = WORKLOADS[name]
    pooled, per_entry = Pooled(workload, rows, device), PerEntry(workload, rows, device)
    for _ in range(3):
        pooled.step()
        per_entry.gather()
        per_entry.commit()
    token = pooled.layout.bytes_per_token // 4
    stored = pooled.steady if workload.positions == "absolute" else 2
    copies = {
        "gather": copy_of(rows * pooled.steady * token, device),
        "commit": copy_of(rows * stored * token, device),
    }

    def commit() -> None:
        pooled.gather()
        pooled.append()
        pooled.commit()

    def uncommitted() -> None:
        pooled.gather()
        pooled.append()
        pooled._batch.close()

    results = []
    for operation in ("gather", "commit"):
        copy = statistics.median(device_micros(copies[operation], device, times) for _ in range(ROUNDS))
        for how in ("pooled", "per entry"):
            figures: dict[str, Any] = {"workload": name, "rows": rows, "operation": operation, "how": how}
            if how == "per entry":
                work: Callable[[], object] = getattr(per_entry, operation)
                calls, issue = calls_of(work, device), issue_micros(work, device, times)
                on_device = statistics.median(device_micros(work, device, times) for _ in range(ROUNDS))
            elif operation == "gather":

                def work() -> None:
                    pooled.gather()
                    pooled._batch.close()

                calls, issue = calls_of(work, device), issue_micros(work, device, times)
                on_device = statistics.median(device_micros(work, device, times) for _ in range(ROUNDS))
            else:
                # A commit ends its batch: what a step takes less the same step without one.
                calls, issue = _of_commits(pooled, device, times)
                whole = statistics.median(device_micros(commit, device, times) for _ in range(ROUNDS))
                rest = statistics.median(device_micros(uncommitted, device, times) for _ in range(ROUNDS))
                on_device = whole - rest
            figures |= {
                "launches": calls[0],
                "syncs": calls[1],
                "issue_us": round(statistics.median(issue), 2),
                "device_us": round(on_device, 2),
                "copy_us": round(copy, 2),
                "copy_share": round(copy / on_device, 3) if on_device > 0 else None,
            }
            results.append(figures)
    pooled.close()
    return results


def _of_commits(pooled: Pooled, device: torch.device, times: int) -> tuple[tuple[int, int], list[float]]:
    """Calls of one commit, and the host's microseconds of several."""
    issue = []
    for _ in range(times):
        pooled.gather()
        pooled.append()
        issue += issue_micros(pooled.commit, device, 1)
    pooled.gather()
    pooled.append()
    return calls_of(pooled.commit, device), issue


def measure_streams(name: str, rows: int, device: torch.device, times: int, threads: int) -> dict[str, Any]:
    """Steps a second of so many threads over one pool, each on a stream of its own."""
    workload = WORKLOADS[name]
    pool = Pooled.pool_for(workload, rows, device, owners=threads)
    cases = [Pooled(workload, rows, device, pool, owner) for owner in range(threads)]
    errors: list[BaseException] = []
    started: list[float] = []
    start = threading.Barrier(threads + 1, action=lambda: started.append(time.perf_counter()))

    def run(case: Pooled) -> None:
        try:
            if device.type == "cuda":
                stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
                stream.wait_stream(torch.cuda.default_stream(device))
                with torch.cuda.stream(stream):
                    _steps(case, times, start, stream.synchronize)
            else:
                _steps(case, times, start, lambda: None)
        except BaseException as error:
            errors.append(error)
            start.abort()

    workers = [threading.Thread(target=run, args=(case,)) for case in cases]
    for worker in workers:
        worker.start()
    start.wait()
    for worker in workers:
        worker.join()
    seconds = time.perf_counter() - started[0]
    if errors:
        raise errors[0]
    cases[0].close()
    return {"workload": name, "rows": rows, "threads": threads, "steps_per_second": round(threads * times / seconds, 1)}


def _steps(case: Pooled, times: int, start: threading.Barrier, synchronize: Callable[[], object]) -> None:
    for _ in range(3):
        case.step()
    synchronize()
    start.wait()
    for _ in range(times):
        case.step()
    synchronize()


def table(results: Sequence[dict[str, Any]]) -> Grid:
    """Every figure of gathers and commits."""
    shown = Grid(
        "gathers and commits",
        ("workload, rows", "operation", *COLUMNS),
        keys=2,
        legend="copy_us: one copy of the same bytes, in the same run; copy_share: of that bandwidth",
    )
    for result in results:
        names = f"{result['workload']}, {result['rows']} rows", f"{result['operation']}, {result['how']}"
        shown.rows.append((*names, *(str(result[column]) for column in COLUMNS)))
    return shown


def streams_table(results: Sequence[dict[str, Any]]) -> Grid:
    """Threads over one pool, each on a stream of its own."""
    shown = Grid("threads over one pool, each on a stream of its own", ("workload, rows", "threads", "steps a second"))
    for result in results:
        name = f"{result['workload']}, {result['rows']} rows"
        shown.rows.append((name, str(result["threads"]), f"{result['steps_per_second']:,}"))
    return shown


def steps_table(results: Sequence[dict[str, Any]]) -> Grid:
    """LightZero's recurrent step."""
    shown = Grid("LightZero's recurrent step: the released cache > ours", STEP_COLUMNS, keys=2)
    shown.rows += [tuple(_old_and_new(result[column]) for column in STEP_COLUMNS) for result in results]
    return shown


def _old_and_new(figure: Any) -> str:
    return f"{figure['released']:g} > {figure['ours']:g}" if isinstance(figure, dict) else f"{figure}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, show."""
    options = _parser().parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks.gpu: there is no GPU here, and nothing was measured", file=sys.stderr)
        return 1
    device = torch.device("cuda", torch.cuda.current_device()) if options.device == "cuda" else torch.device("cpu")
    asked = [(name, rows) for name in options.workloads for rows in options.rows]
    results = [
        figures
        for name, rows in track(asked, "gathers and commits")
        for figures in measure(name, rows, device, options.times)
    ]
    streams = [
        measure_streams(name, options.rows[0], device, options.times, threads)
        for name in track(options.workloads, "streams")
        for threads in (1, 4)
    ]
    absent = missing(options.workloads, options.searches)
    steps = [] if absent else list(measure_steps(options.workloads, options.rows, device.type, options.searches))
    console_of().print(table(results), streams_table(streams), absent or steps_table(steps), origin())
    if options.json is not None:
        report = {"about": _about(device, arguments), "operations": results, "streams": streams, "steps": steps}
        options.json.write_text(json.dumps(report, indent=2) + "\n", "utf-8")
    return 0


def _about(device: torch.device, arguments: Sequence[str] | None) -> dict[str, Any]:
    return {
        **about(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor(),
        "command": " ".join(["python -m benchmarks.gpu", *(sys.argv[1:] if arguments is None else arguments)]),
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--rows", nargs="+", type=int, default=[8, 32, 256], help="rows of a batch (default: 8 32 256)")
    parser.add_argument("--times", type=int, default=50, help="repetitions of each measurement (default: %(default)s)")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: to try the script out")
    searches = "searches of LightZero's world model that count, of each side (default: %(default)s; 0: none)"
    parser.add_argument("--searches", type=int, default=3, help=searches)
    parser.add_argument("--json", type=file_to_write, help="write every figure to this file")
    return parser


if __name__ == "__main__":
    sys.exit(main())
