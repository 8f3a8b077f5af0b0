"""What metrics cost: a scrape, and an operation of an object that is timed against one that is not.

    PYTHONPATH=. python -m benchmarks.metrics --json benchmarks/results/metrics/two_cores.json

Times are medians; where two are compared they were taken in turns, in one process.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Hashable, Sequence
from statistics import median
from time import perf_counter
from typing import Any

import torch
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from prometheus_client import CollectorRegistry, generate_latest

from benchmarks.async_cases import CONFIG, ENVS, LENGTH, ROWS, SEARCH, WINDOW, rows_of
from concurrent_kv import KVCacheManager
from concurrent_kv.evaluation import Evaluated, Evaluator, Leaf
from concurrent_kv.metrics import KVMetrics
from concurrent_kv.metrics.otel import KVInstruments
from concurrent_kv.metrics.prometheus import KVCollector
from concurrent_kv.pool.joint import JointBatch
from reporting.arguments import file_to_write
from reporting.progress import track
from reporting.tables import Grid, console_of, origin

STEPS = 20  # of a search
LAYERS, HEADS, HEAD_DIM = 2, 2, 32  # of `CONFIG`

Seconds = dict[str, list[float]]


def new_manager(envs: int = ENVS) -> KVCacheManager:
    """One whose init pools have a root each."""
    sizes = {**CONFIG, "max_cache_size": max(4 * SEARCH, envs * 26)}
    manager = KVCacheManager(sizes, envs)
    for env in range(envs):
        manager.set_init_cache(env, "root", rows_of(manager.layout, 1, LENGTH - 3))
    return manager


def scrapes(turns: int) -> dict[str, dict[str, float]]:
    """Microseconds and numbers of a scrape, by how many environments are shown, and how."""
    found = {}
    for envs, by_environment in track(((1, False), (100, False), (100, True)), "scrapes"):
        manager = new_manager(envs)
        metrics = KVMetrics(manager, by_environment=by_environment)
        registry = CollectorRegistry()
        registry.register(KVCollector(metrics=metrics))
        reader = InMemoryMetricReader()
        provider = MeterProvider(metric_readers=[reader])
        KVInstruments(provider.get_meter("benchmark"), metrics=metrics)
        reads: dict[str, Callable[[], object]] = {
            "read": metrics.read,
            "prometheus": lambda registry=registry: generate_latest(registry),  # type: ignore[misc]
            "opentelemetry": reader.get_metrics_data,
            "get_stats_summary().as_dict()": lambda manager=manager: manager.get_stats_summary().as_dict(),  # type: ignore[misc]
        }
        name = f"{envs} environments{', each' if by_environment else ''}"
        found[name] = {"numbers": float(len(metrics.read()))}
        found[name]["text_bytes"] = float(len(generate_latest(registry)))
        for what, read in reads.items():
            read()
            found[name][f"{what}_us"] = median(_seconds_of(read) for _ in range(turns)) * 1e6
        provider.shutdown()
        manager.check_integrity()
        manager.close()
    return found


def _seconds_of(operation: Callable[[], object]) -> float:
    began = perf_counter()
    operation()
    return perf_counter() - began


def one_search(manager: KVCacheManager, found: Seconds, prefix: str, **options: Any) -> None:
    """Gathers and commits of a search over all environments, each timed from outside."""
    envs, new = tuple(range(ENVS)), torch.ones(ROWS, HEADS, 1, HEAD_DIM)
    gathers, commits = found.setdefault(f"{prefix}gather", []), found.setdefault(f"{prefix}commit", [])
    with manager.search(envs, **options) as search:
        keys: list[Hashable] = ["root"] * ROWS
        for step in range(WINDOW - LENGTH):
            for again in range(STEPS):
                began = perf_counter()
                batch = search.gather(keys, envs, room=1)
                gathers.append(perf_counter() - began)
                for layer in range(LAYERS):
                    batch.append(layer, new, new)
                children: list[Hashable] = [(step, row) for row in range(ROWS)]
                began = perf_counter()
                search.commit(children, batch)
                commits.append(perf_counter() - began)
                if again == STEPS - 1:
                    keys = children


def operations(turns: int) -> dict[str, float]:
    """Microseconds of a gather and a commit of 8, plain, timed, and of a search that records its tree."""
    managers = {"plain ": new_manager(), "timed ": new_manager(), "recording ": new_manager()}
    metrics = KVMetrics(managers["timed "], durations=True)
    found: Seconds = {}
    for turn in track(range(turns + 3), "operations"):
        kinds = list(managers.items())
        for kind, manager in kinds[turn % 3 :] + kinds[: turn % 3]:
            one_search(manager, found if turn >= 3 else {}, kind, record_tree=kind == "recording ")
    assert metrics.read()
    for manager in managers.values():
        manager.check_integrity()
        manager.close()
    return {name: median(seconds) * 1e6 for name, seconds in sorted(found.items())}


def calls(turns: int) -> dict[str, float]:
    """Microseconds of an evaluator's call of 8 leaves with a model that does next to nothing, plain and timed."""

    def model(batch: JointBatch, inputs: Sequence[int]) -> Evaluated[int]:
        new = torch.ones(batch.batch_size, HEADS, 1, HEAD_DIM)
        for layer in range(LAYERS):
            batch.append(layer, new, new)
        return Evaluated(list(inputs))

    managers = {"plain ": new_manager(), "timed ": new_manager()}
    evaluators: dict[str, Evaluator[int, int]] = {kind: Evaluator(manager, model) for kind, manager in managers.items()}
    metrics = KVMetrics(managers["timed "], evaluators["timed "], durations=True)
    found: Seconds = {}
    for turn in track(range(turns), "calls"):
        for kind in sorted(managers, reverse=bool(turn % 2)):
            with managers[kind].search(range(ENVS)) as search:
                for step in range(STEPS):
                    leaves = [Leaf(search, "root", (step, env), env, env) for env in range(ROWS)]
                    began = perf_counter()
                    evaluators[kind].evaluate_many(leaves)
                    if turn:
                        found.setdefault(f"{kind}call of 8", []).append(perf_counter() - began)
    assert metrics.read()
    for kind, manager in managers.items():
        evaluators[kind].close()
        manager.check_integrity()
        manager.close()
    return {name: median(seconds) * 1e6 for name, seconds in sorted(found.items())}


def tables(result: dict[str, Any]) -> tuple[Grid, Grid]:
    """What `main` found."""
    of_scrapes = Grid("a scrape: microseconds, numbers, bytes of text", ("", *result["scrapes"]))
    for name in next(iter(result["scrapes"].values())):
        of_scrapes.rows.append((name, *(f"{figures[name]:,.0f}" for figures in result["scrapes"].values())))
    of_operations = Grid("an operation, microseconds", ("", "median"))
    of_operations.rows += [(name, f"{micros:,.1f}") for name, micros in result["operations_us"].items()]
    return of_scrapes, of_operations


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.metrics", description=__doc__)
    parser.add_argument("--turns", type=int, default=60, help="of each (default: %(default)s)")
    parser.add_argument("--json", type=file_to_write, metavar="FILE", help="write the figures there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "turns": options.turns,
        "scrapes": scrapes(options.turns),
        "operations_us": {**operations(options.turns), **calls(options.turns)},
    }
    console_of().print(*tables(result), origin())
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
