"""Readers of one key: gathers a second by 1, 2 and 4 threads of one pool, in turns. Most telling without the GIL.

    python -m benchmarks.readers [--rounds 7] [--seconds 0.5]

Every thread gathers eight rows of the same entry, and closes the batch. Medians, and quartiles in brackets.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import threading
from collections.abc import Sequence
from time import perf_counter

import torch

from concurrent_kv import KeysValues, KVLayout, KVPool
from reporting.progress import track
from reporting.tables import Grid, console_of, origin

CARTPOLE = KVLayout(num_layers=2, num_heads=2, head_dim=32, max_tokens=8)
THREADS = (1, 2, 4)
ROWS = 8


def gathers_a_second(pool: KVPool, threads: int, seconds: float) -> float:
    """Of all threads together."""
    keys, done = ["root"] * ROWS, [0] * threads
    begin, over = threading.Barrier(threads + 1), threading.Event()

    def read(number: int) -> None:
        begin.wait()
        count = 0
        while not over.is_set():
            pool.gather(keys).close()
            count += 1
        done[number] = count

    readers = [threading.Thread(target=read, args=(number,)) for number in range(threads)]
    for reader in readers:
        reader.start()
    begin.wait()
    began = perf_counter()
    over.wait(seconds)  # nobody sets it before
    over.set()
    for reader in readers:
        reader.join()
    return sum(done) / (perf_counter() - began)


def main(argv: Sequence[str] | None = None) -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="turns of each number of threads (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=0.5, help="of a turn (default: %(default)s)")
    asked = parser.parse_args(argv)
    torch.set_num_threads(1)
    pool = KVPool(CARTPOLE, 16)
    pool.put("root", KeysValues.from_packed(torch.ones(4, 1, 2, 5, 32)))
    rates: dict[int, list[float]] = {threads: [] for threads in THREADS}
    for _ in track(range(asked.rounds), "rounds"):
        for threads in THREADS:
            rates[threads].append(gathers_a_second(pool, threads, asked.seconds))
    pool.check_integrity()
    console_of().print(table(rates), origin())


def table(rates: dict[int, list[float]]) -> Grid:
    """By threads."""
    has_gil = getattr(sys, "_is_gil_enabled", lambda: True)()
    title = f"gathers a second, {'with' if has_gil else 'without'} the GIL: median (quartiles)"
    shown = Grid(title, ("threads", "a second", "by one thread"))
    for threads, found in rates.items():
        first, median, third = statistics.quantiles(found, n=4) if len(found) > 1 else found * 3
        by_one = median / statistics.median(rates[1])
        shown.rows.append((str(threads), f"{median:,.0f} ({first:,.0f} to {third:,.0f})", f"{by_one:.2f}"))
    return shown


if __name__ == "__main__":
    main()
