"""A thread hands a result into an event loop, and the loop hands one to the thread: through the pool, by its key.

    python -m examples.threads_and_loops --backend trio

A claim to a key says that its result will come. A caller that asks for the key meanwhile waits for it: a thread by
blocking, a task by awaiting, without holding its loop. No caller needs to know who else there is, or on which loop.
"""

from __future__ import annotations

import argparse
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import anyio
import torch

from concurrent_kv import AsyncKVPool, Claim, KeysValues, KVLayout, KVPool

LAYOUT = KVLayout(num_layers=2, num_heads=2, head_dim=32, max_tokens=8)


def evaluate(state: str) -> KeysValues:
    """Stands for the world model: the keys and values of one token, `[layers, batch, heads, tokens, head_dim]`."""
    print(f"{state!r} is computed in {threading.current_thread().name}")
    token = torch.full((2, 1, 2, 1, 32), float(len(state)))
    return KeysValues(token, -token)


def search_thread(pool: KVPool, for_the_loop: Claim) -> KeysValues:
    """A thread without a loop: gives one result, waits for one, and shares the computation of a third."""
    with for_the_loop:  # left without a result, the claim would pass to the caller that waits
        for_the_loop.fulfil(evaluate("root"))
    pool.get_or_compute("shared", lambda: evaluate("shared"))
    return pool.get_or_compute("next root", lambda: evaluate("next root, as no caller had claimed it"))


async def environment_loop(pool: AsyncKVPool, for_the_thread: Claim) -> KeysValues:
    """A task, the other way round."""
    root = await pool.get_or_compute("root", lambda: evaluate("root, as no caller had claimed it"))
    await pool.get_or_compute("shared", lambda: evaluate("shared"))
    with for_the_thread:
        await pool.fulfil(for_the_thread, evaluate("next root"))
    return root


def main(arguments: Sequence[str] | None = None) -> int:
    """Hand one result each way; 0 if both arrived and each key was computed once."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=["asyncio", "trio"], default="asyncio", help="default: %(default)s")
    options = parser.parse_args(arguments)
    with KVPool(LAYOUT, max_entries=100) as pool, ThreadPoolExecutor(1, "the search thread") as threads:
        # Claimed before any caller asks; either may also be claimed where it is computed, racing then with the caller.
        for_the_loop, for_the_thread = pool.try_claim("root"), pool.try_claim("next root")
        searching = threads.submit(search_thread, pool, for_the_loop)
        root = anyio.run(environment_loop, AsyncKVPool(pool), for_the_thread, backend=options.backend)
        next_root = searching.result()
        stored = pool.stats().insert_count
        pool.check_integrity()
    print(f"the loop got {root.lengths[0]} token from the thread, and the thread {next_root.lengths[0]} from the loop")
    print(f"{stored} keys were asked for by both, and {stored} results stored")
    return 0 if stored == 3 else 1


if __name__ == "__main__":
    raise SystemExit(main())
