"""The core's operations beside their floor: what a plain copy of the same bytes takes, measured in the same run."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.timing import Samples
from benchmarks.workloads import TOKENS_PER_STEP, WORKLOADS, Workload
from concurrent_kv import DropAndCorrect, KeysValues
from reporting.arguments import file_to_write
from reporting.progress import track
from reporting.tables import Grid, console_of, origin

OPERATIONS = ("gather", "append", "commit", "get", "put")
now = time.perf_counter_ns


class Core:
    """One workload at one number of rows: what each operation took, and what copying its bytes took."""

    def __init__(self, workload: Workload, rows: int) -> None:
        self.workload, self.rows = workload, rows
        self.took = {name: Samples() for name in OPERATIONS}
        self.floor = {name: Samples() for name in OPERATIONS}
        self._manager = workload.manager(rows, workload.simulations)
        self._overflow = workload.overflow()
        layout = workload.layout
        new = (rows, layout.num_heads, TOKENS_PER_STEP, layout.head_dim)
        self._new = [(torch.randn(new), torch.randn(new)) for _ in range(layout.num_layers)]
        root = (layout.num_layers, layout.num_heads, 1, layout.head_dim)
        for env in range(rows):
            self._manager.set_init_cache(env, "root", KeysValues.single(torch.randn(root), torch.randn(root)))
        steady = workload.window - 3  # tokens of nearly every node of a search
        full = (layout.num_layers, layout.num_heads, steady, layout.head_dim)
        self._entry = KeysValues.single(torch.randn(full), torch.randn(full))
        stored = steady if isinstance(self._overflow, DropAndCorrect) else TOKENS_PER_STEP
        token = layout.bytes_per_token // 4
        self._copies = {
            "gather": (torch.randn(rows * steady * token), torch.empty(rows * steady * token)),
            "append": (torch.randn(rows * TOKENS_PER_STEP * token), torch.empty(rows * TOKENS_PER_STEP * token)),
            "commit": (torch.randn(rows * stored * token), torch.empty(rows * stored * token)),
            "get": (torch.randn(steady * token), torch.empty(steady * token)),
            "put": (torch.randn(steady * token), torch.empty(steady * token)),
        }

    def search(self, keep: bool = True) -> None:
        """One search of the workload's simulations; `keep` says whether it counts."""
        took = self.took if keep else {name: Samples() for name in OPERATIONS}
        envs = list(range(self.rows))
        keys: list[Any] = ["root"] * self.rows
        with self._manager.search(envs, overflow=self._overflow) as search:
            for simulation in range(self.workload.simulations):
                children = [simulation * self.rows + env for env in envs]
                started = now()
                batch = search.gather(keys, envs)
                took["gather"].add(started)
                started = now()
                for layer, (new_keys, new_values) in enumerate(self._new):
                    batch.append(layer, new_keys, new_values)
                took["append"].add(started)
                started = now()
                search.commit(children, batch)
                took["commit"].add(started)
                keys = children
                self._one_entry(simulation, took)
                self._floors()

    def _one_entry(self, number: int, took: dict[str, Samples]) -> None:
        started = now()
        self._manager.set_wm_cache(number, self._entry)
        took["put"].add(started)
        started = now()
        self._manager.get_wm_cache(number)
        took["get"].add(started)

    def _floors(self) -> None:
        for name, (source, target) in self._copies.items():
            started = now()
            target.copy_(source)
            self.floor[name].add(started)

    def as_dict(self) -> dict[str, Any]:
        """Every figure by name."""
        return {
            "workload": self.workload.name,
            "rows": self.rows,
            "operations": {name: self.took[name].as_dict() for name in OPERATIONS},
            "floor": {name: self.floor[name].as_dict() for name in OPERATIONS},
        }

    def close(self) -> None:
        """Check the books, and free the storage."""
        self._manager.check_integrity()
        self._manager.close()


def table(results: Sequence[dict[str, Any]]) -> Grid:
    """Microseconds: median (quartiles), and the floor."""
    title = "microseconds, median (quartiles) / one copy of the same bytes; by workload and rows"
    shown = Grid(title, ("workload", "rows", *OPERATIONS), keys=2)
    for result in results:
        cells = []
        for name in OPERATIONS:
            took, floor = result["operations"][name], result["floor"][name]
            spread = f"({took['first_quartile_us']:.0f}-{took['third_quartile_us']:.0f})"
            cells.append(f"{took['median_us']:.1f} {spread} / {floor['median_us']:.1f}")
        shown.rows.append((result["workload"], str(result["rows"]), *cells))
    return shown


def measure(names: Sequence[str], rows: Sequence[int], searches: int) -> list[dict[str, Any]]:
    """Every workload at every number of rows, in turns, so that a slow moment of the machine meets all of them."""
    cores = [Core(WORKLOADS[name], count) for name in names for count in rows]
    for number in track(range(searches + 2), "searches of each"):
        for core in cores:
            core.search(keep=number >= 2)
    results = [core.as_dict() for core in cores]
    for core in cores:
        core.close()
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, show."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(1)
    results = measure(options.workloads, options.rows, options.searches)
    console_of().print(table(results), origin())
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=2) + "\n", "utf-8")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.core", description=__doc__)
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), default=["cartpole", "lunarlander", "atari"])
    parser.add_argument("--rows", nargs="+", type=int, default=[8, 32], help="rows of a batch (default: 8 32)")
    parser.add_argument("--searches", type=int, default=20, help="searches of each that count (default: %(default)s)")
    parser.add_argument("--json", type=file_to_write, help="write every figure to this file")
    return parser


if __name__ == "__main__":
    sys.exit(main())
