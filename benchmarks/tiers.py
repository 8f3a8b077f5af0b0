"""What a tier costs and brings: a hit by where it is found, an eviction with and without, and hit rates on a trace.

`python -m benchmarks.tiers [--quick] [--json FILE]`. The trace is that of CartPole's searches (`examples.cartpole`):
for each call of the model the parents that it read and the children that it stored. It is recorded first, and then
replayed against pools that are too small for all trees of a moment, as they are and with a tier.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.timing import Samples
from concurrent_kv import DiskTier, DropOldest, HostTier, KeysValues, KVLayout, KVPool
from concurrent_kv.device.paged_slots import PagedSlots
from concurrent_kv.pool.tier import Tier
from examples.cartpole.episode import Asked
from examples.cartpole.job import JobSettings, run_job
from examples.cartpole.model import load_model
from examples.cartpole.play import PlaySettings
from examples.cartpole.search import TreeSearch
from reporting.arguments import file_to_write
from reporting.machine import about
from reporting.progress import track
from reporting.tables import Grid, console_of, origin

Key = tuple[int, int, int]
Trace = list[list[tuple[Key, Key]]]  # the (parent, child) rows of each call

SHAPES = {
    "8 KiB window": KVLayout(num_layers=2, num_heads=2, head_dim=32, max_tokens=8),
    "atari (2 layers of 768, 20 tokens)": KVLayout(num_layers=2, num_heads=8, head_dim=96, max_tokens=20),
    "qwen2.5-0.5b (24 layers of 128, 512 tokens)": KVLayout(
        num_layers=24, num_heads=2, head_dim=64, max_tokens=512, dtype=torch.bfloat16
    ),
}


def whole_window(layout: KVLayout) -> KeysValues:
    """A row that fills the window."""
    shape = (2 * layout.num_layers, 1, layout.num_heads, layout.max_tokens, layout.head_dim)
    return KeysValues.from_packed(torch.randn(shape).to(layout.dtype))


def costs_of(layout: KVLayout, number: int) -> dict[str, Any]:
    """Microseconds of a hit by where it is found, and of a put that evicts, in this thread alone."""
    kv = whole_window(layout)
    tiered, plain = KVPool(layout, 1, tier=HostTier(8 * layout.bytes_per_entry)), KVPool(layout, 1)
    samples = {name: Samples() for name in ("pool", "tier", "tier, moved up", "put, evicts", "put, moves down")}
    for turn in range(number):
        for pool, name in ((plain, "put, evicts"), (tiered, "put, moves down")):
            started = time.perf_counter_ns()
            pool.put(turn % 4, kv)
            samples[name].add(started)
    tiered.put("hit", kv)
    tiered.put("other", kv)
    for key, name in (("other", "pool"), ("hit", "tier")):
        for _ in range(number):
            started = time.perf_counter_ns()
            tiered.get(key)
            samples[name].add(started)
    for _ in range(number):
        tiered.pop("other")
        started = time.perf_counter_ns()
        tiered.get("hit")
        samples["tier, moved up"].add(started)
        tiered.put("other", kv)
    stats = tiered.stats()
    assert stats.move_up_count == number, "a hit did not move up"
    assert not stats.tier_drop_count, "the tier dropped something"
    for pool in (tiered, plain):
        pool.check_integrity()
        pool.close()
    found: dict[str, Any] = {name: sample.as_dict() for name, sample in samples.items()}
    return found | {"bytes": layout.bytes_per_entry}


def disk_costs_of(layout: KVLayout, number: int) -> dict[str, Any]:
    """As `costs_of`, of a tier of one window in memory and the rest in a file, in the folder for temporary files.

    "from the disk" is what the system reads anew; else the bytes are in its page cache still.
    """
    kv, window = whole_window(layout), layout.bytes_per_entry
    samples = {name: Samples() for name in ("file", "file, from the disk", "put, pages out")}
    pool = KVPool(layout, 1, tier=HostTier(window, behind=DiskTier(tempfile.gettempdir(), 8 * window)))
    for turn in range(number):
        started = time.perf_counter_ns()
        pool.put(turn % 4, kv)
        samples["put, pages out"].add(started)
    oldest = number % 4
    file = descriptor_of(pool)
    for turn in range(2 * number):
        name = "file" if turn % 2 else "file, from the disk"
        if name != "file":
            os.fdatasync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        started = time.perf_counter_ns()
        pool.get(oldest)
        samples[name].add(started)
    stats = pool.tier_stats()
    assert stats is not None
    assert stats.disk_read_count == 2 * number * layout.max_tokens, "a hit was not read from the file"
    pool.check_integrity()
    pool.close()
    return {name: sample.as_dict() for name, sample in samples.items()}


def descriptor_of(pool: KVPool) -> int:
    """The file of a pool's tier."""
    tier = pool.storage.tier
    assert isinstance(tier, Tier)
    assert isinstance(tier.host, PagedSlots)
    return tier.host._file._descriptor


def recorded(envs: int, steps: int, simulations: int) -> Trace:
    """What CartPole's searches read and store."""
    trace: Trace = []
    evaluate = TreeSearch._evaluate

    def noted(search: TreeSearch, batch: Any, asked: Sequence[Asked]) -> Any:
        trace.append([keys_of(each) for each in asked])
        return evaluate(search, batch, asked)

    TreeSearch._evaluate = noted  # type: ignore[assignment, method-assign]
    try:
        play = PlaySettings(envs=envs, threads=0, simulations=simulations, episodes=envs, max_steps=steps, seed=1)
        run_job(load_model(), JobSettings(play=play), None)
    finally:
        TreeSearch._evaluate = evaluate  # type: ignore[method-assign]
    return trace


def keys_of(asked: Asked) -> tuple[Key, Key]:
    """A row's parent and child."""
    episode, at, edge = asked.episode.index, asked.time, asked.edge
    if edge is None:
        return (episode, at - 1, 0), (episode, at, 0)
    return (episode, at, edge.parent.number), (episode, at, edge.number)


def replayed(trace: Trace, entries: int, tier_windows: int, policy: str) -> dict[str, Any]:
    """Hits of a pool of so many entries; what is missed is computed anew, as a whole row."""
    layout = KVLayout(num_layers=2, num_heads=2, head_dim=32, max_tokens=16)
    tier = HostTier(tier_windows * layout.bytes_per_entry) if tier_windows else None
    pool = KVPool(layout, entries, policy=policy, tier=tier)
    lengths: dict[Key, int] = {}
    drop = DropOldest(limit=layout.max_tokens - 1, count=2, step=2)
    row = torch.randn(2 * layout.num_layers, 1, layout.num_heads, layout.max_tokens, layout.head_dim)
    started = time.perf_counter()
    for call in trace:
        for begin in range(0, len(call), entries // 2):
            part = call[begin : begin + entries // 2]
            parents, children = [parent for parent, _ in part], [child for _, child in part]
            with pool.gather(parents) as batch:
                for number, parent in enumerate(parents):
                    if not batch.hits[number]:
                        batch.fill(number, KeysValues.from_packed(row[:, :, :, : lengths.get(parent, 2)].clone()))
                batch.data[:, :, :, batch.end : batch.end + 2] = 1.0
                batch.advance(2)
                pool.commit(children, batch, overflow=drop)
            for parent, child in part:
                length = lengths.get(parent, 2) + 2
                lengths[child] = length - 2 if length >= layout.max_tokens - 1 else length
    seconds = time.perf_counter() - started
    stats, below = pool.stats(), pool.tier_stats()
    pool.check_integrity()
    pool.close()
    return {
        "policy": policy,
        "entries": entries,
        "tier_windows": tier_windows,
        "hit_rate": round(stats.hit_rate, 4),
        "requests": stats.request_count,
        "tier_hits": stats.tier_hit_count,
        "moved_down": stats.move_down_count,
        "moved_up": stats.move_up_count,
        "dropped": stats.tier_drop_count,
        "tier_evictions": 0 if below is None else below.eviction_count,
        "seconds": round(seconds, 2),
    }


def tables(costs: dict[str, Any], found: Sequence[dict[str, Any]]) -> tuple[Grid, Grid]:
    """Microseconds by shape, and what came of the replays."""
    operations = [name for name in next(iter(costs.values())) if name != "bytes"]
    of_costs = Grid("microseconds, median", ("shape", *operations))
    for shape, of_shape in costs.items():
        of_costs.rows.append((shape, *(f"{of_shape[name]['median_us']:,.1f}" for name in operations)))
    columns = ("hit_rate", "requests", "tier_hits", "moved_down", "moved_up", "dropped", "tier_evictions", "seconds")
    of_trace = Grid("the trace of CartPole's searches", ("policy", "entries, windows of the tier", *columns), keys=2)
    for each in found:
        names = each["policy"], f"{each['entries']}, {each['tier_windows']}"
        of_trace.rows.append((*names, *(f"{each[column]:,}" for column in columns)))
    return of_costs, of_trace


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print; with `--json`, write the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a few samples, a short trace: to see that it runs")
    parser.add_argument("--json", type=file_to_write, help="where the figures go")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    number = 20 if options.quick else 400
    costs = {}
    for name, layout in track(list(SHAPES.items()), "shapes"):
        times = number if layout.max_tokens < 100 else number // 4
        costs[name] = costs_of(layout, times) | disk_costs_of(layout, times)
    trace = recorded(envs=8, steps=4 if options.quick else 30, simulations=25)
    rows = sum(map(len, trace))
    sizes = (64,) if options.quick else (32, 64, 128, 256)
    asked = [
        (entries, windows, policy)
        for policy in ("fifo", "lru")
        for entries in sizes
        for windows in (0, entries, 8 * entries)
    ]
    found = [replayed(trace, *each) for each in track(asked, "replays of the trace")]
    console_of().print(*tables(costs, found), origin())
    if options.json:
        figures = {"machine": about(), "costs": costs, "trace": {"calls": len(trace), "rows": rows}, "hit_rates": found}
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
