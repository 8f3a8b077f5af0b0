"""Snapshots: a pool into a file and back, beside copying and writing the same bytes, and beside recomputing its roots.

    python -m benchmarks.snapshots [--rounds 7] [--quick] [--json FILE]

Shapes are those of a world model (`atari`: trees of a search, in windows of 8 tokens) and of a language model
(`qwen2.5-0.5b`: a prompt of 1,000 tokens and 64 continuations of 3 tokens). Contestants take
turns, round by round, and each file is on the disk (`fsync`) when its time is over:

- `save`, `load`: this library; `load` into an empty pool of the same size, from a file in the system's memory;
- `copy`: the slots' bytes from one tensor to another; `write`: a tensor of them to a file, with nothing else;
- `torch.save`, `torch.load`: one tensor of them, without keys or tables;
- `by hand`: `torch.save` of what `get` gives of every key, which shares nothing.

Peak memory is the most that the process had beyond what it had before, in any round, sampled every half millisecond.
A root is recomputed by a transformer of the shape with random weights, in the layout's dtype; the encoder of an
observation, and the tokenizer, are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.peers.machine import About
from benchmarks.workloads import TOKENS_PER_STEP, WORKLOADS
from concurrent_kv import KeysValues, KVLayout, KVPool
from reporting.arguments import file_to_write
from reporting.progress import track
from reporting.tables import Grid, console_of, origin

MIB = 2**20
SAMPLED_SECONDS = 0.0005
QWEN = KVLayout(num_layers=24, num_heads=2, head_dim=64, max_tokens=4096, dtype=torch.bfloat16)


@dataclass
class Case:
    """A pool to save, and how to make one that can take it."""

    name: str
    what: str
    pool: KVPool
    empty: Callable[[], KVPool]


def random_tokens(layout: KVLayout, rows: int, tokens: int) -> KeysValues:
    return KeysValues.from_packed(
        torch.randn(2 * layout.num_layers, rows, layout.num_heads, tokens, layout.head_dim).to(layout.dtype)
    )


def grow(pool: KVPool, parents: Sequence[Any], children: Sequence[Any], new: int, overflow: Any = None) -> None:
    """Children of some entries, with `new` tokens each."""
    layout = pool.layout
    room = None if layout.max_tokens <= 64 else new
    with pool.gather(parents, room=room) as batch:
        for layer in range(layout.num_layers):
            shape = (len(parents), layout.num_heads, new, layout.head_dim)
            batch.append(layer, torch.randn(shape).to(layout.dtype), torch.randn(shape).to(layout.dtype))
        pool.commit(children, batch, overflow=overflow)


def atari(rows: int) -> Case:
    """Trees of as many searches, of the workload's simulations."""
    workload = WORKLOADS["atari"]
    layout, overflow = workload.layout, workload.overflow()
    entries = rows * (workload.simulations + 1)
    pool = KVPool(layout, entries)
    pool.put_many([(row, 0) for row in range(rows)], random_tokens(layout, rows, 1))
    draw = torch.Generator().manual_seed(0)
    for number in range(1, workload.simulations + 1):
        parents = torch.randint(0, number, (rows,), generator=draw).tolist()
        at = [(row, parent) for row, parent in enumerate(parents)]
        grow(pool, at, [(row, number) for row in range(rows)], TOKENS_PER_STEP, overflow)
    what = f"{rows} trees of {workload.simulations + 1} nodes, windows of {layout.max_tokens} tokens"
    return Case("atari", what, pool, lambda: KVPool(layout, entries))


def qwen(prompt: int, nodes: int, new: int, depth: int) -> Case:
    """A prompt and a tree of continuations."""
    slots = prompt + nodes * new + QWEN.max_tokens
    pool = KVPool(QWEN, nodes + 1, max_slots=slots)
    pool.put(0, random_tokens(QWEN, 1, prompt))
    parents, depths, draw = [0], {0: 0}, torch.Generator().manual_seed(0)
    for number in range(1, nodes + 1):
        parent = parents[int(torch.randint(0, len(parents), (1,), generator=draw))]
        grow(pool, [parent], [number], new)
        depths[number] = depths[parent] + 1
        if depths[number] < depth:
            parents.append(number)
    what = f"{prompt:,} tokens and {nodes} continuations of {new} tokens"
    return Case("qwen2.5-0.5b", what, pool, lambda: KVPool(QWEN, nodes + 1, max_slots=slots))


# Measuring -----------------------------------------------------------------------------------------------------------


class Peak:
    """The most memory that the process has in a `with`, beyond what it had at its beginning."""

    def __enter__(self) -> Peak:
        self._process, self._over = psutil.Process(), threading.Event()
        self._before = self._most = self._process.memory_info().rss
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._over.wait(SAMPLED_SECONDS):
            self._most = max(self._most, self._process.memory_info().rss)

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()
        self.nbytes = self._most - self._before


def durable(path: Path) -> None:
    """Have a file on the disk."""
    opened = os.open(path, os.O_RDONLY)
    os.fsync(opened)
    os.close(opened)


def measure(case: Case, folder: Path, rounds: int) -> dict[str, Any]:
    """Seconds and peak memory of every contestant."""
    pool, path = case.pool, folder / "pool.snapshot"
    with Peak() as first:
        saved = pool.save(path)
    tensor = torch.randn(saved.slots, pool.layout.bytes_per_token // 4)
    target = torch.empty_like(tensor)
    plain, bare, hand = folder / "plain.pt", folder / "bare", folder / "hand.pt"
    by_hand = sum(kv.keys.nbytes + kv.values.nbytes for key in pool if (kv := pool.peek(key)) is not None)

    def load() -> None:
        with empty:
            assert empty.load(path).entries == saved.entries

    def write() -> None:
        with bare.open("wb", buffering=0) as file:
            view = tensor.numpy().data.cast("B")
            while view:
                view = view[file.write(view) :]
            os.fsync(file.fileno())

    def save_plain() -> None:
        torch.save(tensor, plain)
        durable(plain)

    def save_by_hand() -> None:
        entries = {key: pool.peek(key) for key in pool}
        torch.save({key: (kv.keys, kv.values) for key, kv in entries.items() if kv is not None}, hand)
        durable(hand)

    contestants: dict[str, Callable[[], object]] = {
        "save": lambda: pool.save(path),
        "load": load,
        "copy": lambda: target.copy_(tensor),
        "write": write,
        "torch.save": save_plain,
        "torch.load": lambda: torch.load(plain),
        "by hand": save_by_hand,
    }
    took: dict[str, list[float]] = {name: [] for name in contestants}
    peaks: dict[str, list[int]] = {name: [] for name in contestants} | {"save": [first.nbytes]}
    for number in track(range(rounds + 1), f"rounds of {case.name}"):
        for name, act in contestants.items():
            empty = case.empty()
            with Peak() as peak:
                began = time.perf_counter()
                act()
                seconds = time.perf_counter() - began
            empty.close()
            peaks[name].append(peak.nbytes)
            if number:  # the first is not counted
                took[name].append(seconds)
    pool.check_integrity()
    shared = saved.slots * pool.layout.bytes_per_token
    return {
        "case": case.name,
        "what": case.what,
        "entries": saved.entries,
        "slot_mib": round(shared / MIB, 1),
        "file_mib": round(saved.nbytes / MIB, 1),
        "by_hand_mib": round(by_hand / MIB, 1),
        "seconds": {name: round(statistics.median(each), 4) for name, each in took.items()},
        "seconds_each": {name: [round(one, 4) for one in each] for name, each in took.items()},
        "mib_a_second": {name: round(shared / MIB / statistics.median(each), 1) for name, each in took.items()},
        "peak_mib": {name: round(max(each) / MIB, 1) for name, each in peaks.items()},
    }


# Recomputing ---------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """A layer of a transformer: attention over its own tokens, and a gated MLP."""

    def __init__(self, hidden: int, heads: int, kv_heads: int, inner: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, hidden // heads
        self.query = nn.Linear(hidden, hidden)
        self.key_value = nn.Linear(hidden, 2 * kv_heads * self.head_dim)
        self.out = nn.Linear(hidden, hidden, bias=False)
        self.gate, self.up = nn.Linear(hidden, inner, bias=False), nn.Linear(hidden, inner, bias=False)
        self.down = nn.Linear(inner, hidden, bias=False)
        self.first, self.second = nn.RMSNorm(hidden), nn.RMSNorm(hidden)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch, tokens, hidden = x.shape
        normed = self.first(x)
        query = self.query(normed).view(batch, tokens, self.heads, -1).transpose(1, 2)
        keys, values = self.key_value(normed).view(batch, tokens, 2, self.kv_heads, -1).permute(2, 0, 3, 1, 4)
        found = F.scaled_dot_product_attention(query, keys, values, is_causal=True, enable_gqa=True)
        x = x + self.out(found.transpose(1, 2).reshape(batch, tokens, hidden))
        normed = self.second(x)
        return x + self.down(F.silu(self.gate(normed)) * self.up(normed)), keys, values


def recomputing(
    name: str, layout: KVLayout, sizes: tuple[int, int, int], rows: int, tokens: int, folder: Path, rounds: int
) -> dict[str, Any]:
    """Roots of the shape, restored from a file, and recomputed and stored."""
    hidden, heads, inner = sizes
    model = nn.ModuleList([Block(hidden, heads, layout.num_heads, inner) for _ in range(layout.num_layers)])
    model.to(layout.dtype)
    path, keys = folder / "roots.snapshot", list(range(rows))

    def empty() -> KVPool:
        return KVPool(layout, rows, max_slots=max(rows * tokens, layout.max_tokens))

    @torch.no_grad()
    def recompute(pool: KVPool) -> None:
        x, kept = torch.randn(rows, tokens, hidden, dtype=layout.dtype), []
        for block in model:
            x, *of_layer = block(x)
            kept.append(of_layer)
        of_keys, of_values = (torch.stack(list(side)) for side in zip(*kept, strict=True))
        pool.put_many(keys, KeysValues(of_keys, of_values))

    with empty() as pool:
        recompute(pool)
        nbytes = pool.save(path).nbytes
    took: dict[str, list[float]] = {"restored": [], "recomputed": []}
    for number in track(range(rounds + 1), f"roots of {name}"):
        for how, act in (("restored", lambda pool: pool.load(path)), ("recomputed", recompute)):
            with empty() as pool:
                began = time.perf_counter()
                act(pool)
                seconds = time.perf_counter() - began
                assert len(pool) == rows
            if number:
                took[how].append(seconds)
    medians = {how: statistics.median(each) for how, each in took.items()}
    return {
        "case": name,
        "what": f"{rows} root{'s' if rows > 1 else ''} of {tokens:,} tokens",
        "file_mib": round(nbytes / MIB, 1),
        "seconds": {how: round(seconds, 4) for how, seconds in medians.items()},
        "seconds_each": {how: [round(one, 4) for one in each] for how, each in took.items()},
        "times": round(medians["recomputed"] / medians["restored"], 1),
    }


# Showing -------------------------------------------------------------------------------------------------------------


def tables(results: dict[str, Any]) -> list[Grid]:
    """The figures."""
    shown = []
    for result in results["files"]:
        title = (
            f"{result['case']}: {result['what']}; {result['entries']:,} entries, {result['slot_mib']} MiB of slots, "
            f"{result['by_hand_mib']} MiB by hand"
        )
        table = Grid(title, ("", "seconds", "MiB/s of slots", "peak memory, MiB"))
        for name, seconds in result["seconds"].items():
            speed, peak = f"{result['mib_a_second'][name]:,.0f}", f"{result['peak_mib'][name]:,.1f}"
            table.rows.append((name, f"{seconds:.3f}", speed, peak))
        shown.append(table)
    table = Grid("roots, seconds", ("", "roots", "restored", "recomputed", "times"), keys=2)
    for result in results["roots"]:
        seconds = result["seconds"]
        restored, recomputed = f"{seconds['restored']:.4f}", f"{seconds['recomputed']:.4f}"
        table.rows.append((result["case"], result["what"], restored, recomputed, f"{result['times']:,}"))
    return [*shown, table]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, show, write."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.snapshots", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7, help="rounds that count (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="small pools and two rounds: does it run at all?")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default: %(default)s)")
    parser.add_argument("--json", type=file_to_write, help="write every figure to this file")
    parser.add_argument("--folder", type=Path, help="where the files are written (default: the system's for such)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    rounds, about = 2 if options.quick else options.rounds, About()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        files = []
        cases: tuple[Callable[[], Case], ...] = (
            lambda: qwen(1000, 64, 3, depth=1),
            lambda: atari(8 if options.quick else 64),
        )
        for make in cases:
            case = make()
            files.append(measure(case, folder, rounds))
            case.pool.close()
        of_atari = WORKLOADS["atari"].layout
        tokens = 64 if options.quick else 1000
        roots = [
            recomputing("atari", of_atari, (768, 8, 3072), 128, 7, folder, rounds),
            recomputing("qwen2.5-0.5b", QWEN, (896, 14, 4864), 1, tokens, folder, min(rounds, 3)),
        ]
    results: dict[str, Any] = {"about": about.as_dict("python -m benchmarks.snapshots"), "files": files, "roots": roots}
    console_of().print(*tables(results), origin(results["about"]))
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=2) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
