"""Old against new: the released LightZero's cache and ours, in its own world model, in one run and in turns.

    python -m benchmarks.benchmark_kv_cache [--quick] [--device cuda] [--main CHECKOUT] [--json FILE] [--plot FILE]

Needs LightZero (make lightzero). Each search of the one is followed by the same search of the other; medians over the
simulated steps of all searches. With two threads, each has a world model and searches trees of its own, the released
cache once for each model, ours shared. With a checkout of LightZero's main branch, that one's caches are measured
beside these, each workload in a process of its own (`benchmarks.lightzero_main`), and all five stand in one table.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.lightzero_side import Side, same_states
from benchmarks.lightzero_trees import Trees
from concurrent_kv import KVCacheManager
from concurrent_kv.compat.lightzero import attach
from concurrent_kv.compat.lightzero.settings import manager_config
from reporting.arguments import file_to_write
from reporting.progress import track
from reporting.tables import Grid, console_of, origin
from tests.lightzero_support import SHAPES, Shape, make_world_model

TARGETS = {  # times as fast as the released cache path, on one thread, and the whole step
    ("cartpole", 8): (4.0, None),
    ("cartpole", 32): (10.0, 2.0),
    ("lunarlander", 8): (4.0, None),
    ("lunarlander", 32): (8.0, None),
    ("atari", 8): (2.5, None),
    ("atari", 32): (6.0, None),
}
# Times as fast as the main branch's own manager.
TARGETS_OF_MAIN = {"one import": 1.0, "attached": 3.0}
CALLS, COPIES = 12, 1  # at most, of the cache path of a simulated step
WARMING = 4  # searches that do not count: a window of 8 is full at an episode's fourth root


def _ring_bytes(model: Any) -> float:
    """Bytes of one entry of the released ring: a full window, whatever it holds."""
    entry = next(kv for kv in model.shared_pool_recur_infer if kv is not None)
    caches = [cache._cache for layer in entry._keys_values for cache in (layer._k_cache, layer._v_cache)]
    return float(sum(cache.numel() * cache.element_size() for cache in caches))


def released_side(shape: Shape, seed: int, device: str = "cpu") -> Side:
    """A world model as LightZero released it."""
    model = make_world_model(shape, seed=1, device=device)
    return Side(model, Trees(shape, seed, device), lambda: _ring_bytes(model))


def our_sides(shape: Shape, seeds: Sequence[int], device: str = "cpu") -> tuple[list[Side], KVCacheManager]:
    """World models, one for each seed, that share one manager."""
    models = [make_world_model(shape, seed=1, device=device) for _ in seeds]
    envs = shape.env_num
    config = manager_config(models[0], len(seeds)) | {"env_num": len(seeds) * envs}
    slots = config["max_cache_size"] * config["context_length"]
    manager = KVCacheManager(config, len(seeds) * envs, recur_slots=slots)

    def stored() -> float:
        stats = manager.recur_pool.stats()
        return stats.bytes_in_use / stats.entries

    sides = []
    for number, (model, seed) in enumerate(zip(models, seeds, strict=True)):
        attach(model, "on", manager=manager, env_ids=range(number * envs, (number + 1) * envs))
        sides.append(Side(model, Trees(shape, seed, device), stored))
    return sides, manager


def _together(sides: Sequence[Side], **options: bool) -> list[list[Any]]:
    """One search of each side, each in a thread of its own if there are several."""
    if len(sides) == 1:
        return [sides[0].search(**options)]
    states: list[list[Any]] = [[] for _ in sides]
    errors: list[BaseException] = []
    barrier = threading.Barrier(len(sides))

    def run(number: int) -> None:
        try:
            barrier.wait(60.0)
            states[number] = sides[number].search(**options)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(sides))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return states


def compare(name: str, envs: int, threads: int, searches: int, device: str = "cpu") -> dict[str, Any]:
    """Every figure of one workload at one number of environments, on so many threads, on a CPU or a GPU."""
    shape = replace(SHAPES[name], env_num=envs)
    seeds = range(3, 3 + threads)
    old = [released_side(shape, seed, device) for seed in seeds]
    new, manager = our_sides(shape, seeds, device)
    differing = 0
    for number in range(WARMING + searches):
        # In turns, and in turns the first, so that a slow moment of the machine meets both.
        order = (old, new) if number % 2 else (new, old)
        first, second = (_together(sides, keep=number >= WARMING) for sides in order)
        differing += not all(map(same_states, first, second))
    if threads == 1:
        for side in (old[0], new[0]):
            side.search(keep=False, count=True)
    for side in new:
        attach(side.model, "off")
    manager.check_integrity()
    manager.close()
    return {
        "workload": name,
        "environments": envs,
        "layers": shape.num_layers,
        "threads": threads,
        "searches_that_differ": differing,
        "released": _figures(old),
        "ours": _figures(new),
        "cache_speed_up": _median(old, "cache") / _median(new, "cache"),
        "step_speed_up": _median(old, "step") / _median(new, "step"),
        "targets": TARGETS.get((name, envs), (None, None)) if threads == 1 and device == "cpu" else (None, None),
    }


def compare_main(checkout: Path, name: str, envs: int, searches: int, *options: str) -> dict[str, Any]:
    """The main branch's figures of one workload at one number of environments, on one thread: `lightzero_main`."""
    asked = ["benchmarks.lightzero_main", name, str(envs), "--searches", str(searches), *options]
    environment = {**os.environ, "LIGHTZERO": str(checkout.resolve())}
    said = subprocess.run([sys.executable, "-m", *asked], env=environment, capture_output=True, text=True, check=False)
    if said.returncode:
        sys.exit(f"{' '.join(asked)} failed:\n{said.stderr[-4000:]}")
    result: dict[str, Any] = json.loads(said.stdout.splitlines()[-1])
    return result


def _median(sides: Sequence[Side], what: str) -> float:
    medians: list[float] = [getattr(side, what).median for side in sides]
    return sum(medians) / len(medians)


def _figures(sides: Sequence[Side]) -> dict[str, Any]:
    return {
        "cache_ms": _median(sides, "cache") / 1e3,
        "step_ms": _median(sides, "step") / 1e3,
        "cache": sides[0].cache.as_dict(),
        "step": sides[0].step.as_dict(),
        "operator_calls": sides[0].calls,
        "copies_to_host": sides[0].copies,
        "bytes_per_node": sides[0].bytes_per_node,
    }


def table(results: Sequence[dict[str, Any]]) -> Grid:
    """What is compared, the released code's figure before ours."""
    columns = ("cache path, ms", "times as fast", "step, ms", "times as fast", "calls", "to host", "KiB a node")
    shown = Grid(
        "the released LightZero > this cache",
        ("workload", "envs, threads", *columns),
        keys=2,
        legend="In brackets: the target. Calls: operator calls of the cache path; to host: copies to the host.",
    )
    for result in results:
        old, new, (cache_target, step_target) = result["released"], result["ours"], result["targets"]
        one = result["threads"] == 1
        row = (
            result["workload"],
            f"{result['environments']}, {result['threads']}",
            f"{old['cache_ms']:.2f} > {new['cache_ms']:.2f}",
            _faster(result["cache_speed_up"], cache_target),
            f"{old['step_ms']:.1f} > {new['step_ms']:.1f}",
            _faster(result["step_speed_up"], step_target),
            f"{old['operator_calls']} > {new['operator_calls']}" if one else "",
            f"{old['copies_to_host']} > {new['copies_to_host']}" if one else "",
            f"{old['bytes_per_node'] / 1024:.1f} > {new['bytes_per_node'] / 1024:.1f}",
        )
        shown.rows.append(row)
    return shown


def table_of_all(results: Sequence[dict[str, Any]]) -> Grid:
    """The cache paths of both versions and of what replaces their caches, on one thread."""
    commit = results[0]["main"]["commit"]
    columns = ("0.2.0", "0.2.0, attached", "main, its manager", "main, one import", "main, attached")
    title = f"cache path, ms (times as fast (target)); main: commit {commit[:8]}"
    shown = Grid(title, ("workload", "envs", *columns), keys=2)
    for result in results:
        target, contestants = result["targets"][0], result["main"]["contestants"]
        own, *others = (contestants[name]["cache_ms"] for name in ("own manager", *TARGETS_OF_MAIN))
        targets = TARGETS_OF_MAIN.values()
        row = (
            result["workload"],
            str(result["environments"]),
            f"{result['released']['cache_ms']:.2f}",
            f"{result['ours']['cache_ms']:.2f} ({_faster(result['cache_speed_up'], target)})",
            f"{own:.2f}",
            *(f"{ms:.2f} ({_faster(own / ms, wanted)})" for ms, wanted in zip(others, targets, strict=True)),
        )
        shown.rows.append(row)
    return shown


def _faster(speed_up: float, target: float | None) -> str:
    if target is None:
        return f"{speed_up:.1f}"
    return f"{speed_up:.1f} ({'' if speed_up >= target else 'missed '}{target:g})"


def plot(results: Sequence[dict[str, Any]], path: Path) -> None:
    """How many times as fast the cache path and the step are, on one thread, as bars."""
    import matplotlib as mpl

    mpl.use("Agg")
    logging.getLogger("matplotlib").setLevel(logging.WARNING)  # LightZero's imports make every logger talk
    from matplotlib import pyplot

    shown = [result for result in results if result["threads"] == 1]
    figure, axes = pyplot.subplots(figsize=(1.6 * len(shown) + 2, 4), layout="constrained")
    for offset, (name, label) in enumerate((("cache_speed_up", "cache path"), ("step_speed_up", "recurrent step"))):
        at = [number + 0.4 * offset for number in range(len(shown))]
        axes.bar_label(axes.bar(at, [result[name] for result in shown], 0.4, label=label), fmt="%.1f")
    axes.axhline(1.0, color="gray", linewidth=0.8)
    labels = [f"{result['workload']}\n{result['environments']} environments" for result in shown]
    axes.set_xticks([number + 0.2 for number in range(len(shown))], labels)
    axes.set_ylabel("times as fast as the released LightZero")
    axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare, show. 1 if a search led to other states than the released code's, or a step has too many calls."""
    parser = _parser()
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    of_main = []
    if options.cpu_time:
        if options.threads != [1] or options.device != "cpu":
            parser.error("--cpu-time is for --threads 1 on a CPU")
        Side.clock = staticmethod(time.thread_time_ns)
        of_main = ["--cpu-time"]
    console, quick = console_of(), options.quick
    searches = options.searches or (2 if quick else 6)
    asked = [
        (name, envs, threads)
        for name in options.workloads or (["cartpole"] if quick else ["cartpole", "lunarlander", "atari"])
        for envs in options.environments or ([8] if quick else [8, 32])
        for threads in options.threads or ([1] if quick else [1, 2])
    ]
    results = []
    for name, envs, threads in track(asked, "workloads"):
        results.append(compare(name, envs, threads, searches, options.device))
    console.print(table(results))
    if options.main is not None:
        alone = [result for result in results if result["threads"] == 1]
        for result in track(alone, "workloads of the main branch"):
            result["main"] = compare_main(options.main, result["workload"], result["environments"], searches, *of_main)
        console.print(table_of_all(alone))
    console.print(origin())
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=2) + "\n", "utf-8")
    if options.plot is not None:
        plot(results, options.plot)
    failures = _failures(results)
    for failure in failures:
        console_of(stderr=True).print(f"FAILED: {failure}", style="bold red", soft_wrap=True)
    return 1 if failures else 0


def _failures(results: Sequence[dict[str, Any]]) -> list[str]:
    """What must not happen on any machine; how fast it is may depend on that."""
    found = []
    for result in results:
        where, ours = f"{result['workload']}, {result['environments']} environments", result["ours"]
        if result["searches_that_differ"]:
            found.append(f"{where}: {result['searches_that_differ']} searches led to other states")
        if ours["operator_calls"] > CALLS:
            found.append(f"{where}: {ours['operator_calls']} operator calls in a step, {CALLS} are allowed")
        if ours["copies_to_host"] > COPIES:
            found.append(f"{where}: {ours['copies_to_host']} copies to the host in a step, {COPIES} are allowed")
        main = result.get("main", {})
        if main.get("searches_that_differ"):
            found.append(f"{where}: {main['searches_that_differ']} searches of the main branch led to other states")
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.benchmark_kv_cache", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="cartpole with 8 environments on one thread, 2 searches")
    parser.add_argument("--workloads", nargs="+", choices=list(SHAPES))
    parser.add_argument("--environments", nargs="+", type=int, help="default: 8 32")
    parser.add_argument("--threads", nargs="+", type=int, choices=[1, 2], help="default: 1 2")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--searches", type=int, help="searches of each side that count (default: 6)")
    parser.add_argument("--main", type=Path, help="a checkout of LightZero's main branch, measured beside 0.2.0")
    parser.add_argument(
        "--cpu-time", action="store_true", help="time the thread, where others use the machine meanwhile"
    )
    parser.add_argument("--json", type=file_to_write, help="write every figure to this file")
    parser.add_argument("--plot", type=file_to_write, help="draw the speed-ups into this file (needs matplotlib)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
