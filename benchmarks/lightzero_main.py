"""LightZero's main branch: its own manager, ours through the one import, and ours attached, in one run and in turns.

    python -m benchmarks.lightzero_main WORKLOAD ENVIRONMENTS [--searches N] [--cpu-time]   (LIGHTZERO: a checkout)

Prints one line of JSON. `python -m benchmarks.benchmark_kv_cache --main CHECKOUT` runs it in a process of its own: the
other one measures 0.2.0.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import torch

from benchmarks.lightzero_side import Side, same_states
from benchmarks.lightzero_trees import Trees
from concurrent_kv.compat.lightzero import Attachment, LightZeroKVCacheManager, attach, detach
from tests.lightzero_checkout import CHECKOUT, commit_of
from tests.lightzero_support import SHAPES, Shape, make_world_model

__all__ = ["CONTESTANTS", "compare"]

CONTESTANTS = ("own manager", "one import", "attached")
WARMING = 4  # searches that do not count: a window of 8 is full at an episode's fourth root


def _side(contestant: str, shape: Shape) -> Side:
    from lzero.model.unizero_world_models import kv_cache_manager

    made = LightZeroKVCacheManager if contestant == "one import" else kv_cache_manager.KVCacheManager
    with mock.patch.object(kv_cache_manager, "KVCacheManager", made):
        model = make_world_model(shape, seed=1, device="cpu", use_new_cache_manager=True)
    if contestant == "attached":
        attachment = attach(model, "on")
        assert isinstance(attachment, Attachment)
        pool = attachment.manager.recur_pool
    elif contestant == "one import":
        pool = model.kv_cache_manager.manager.recur_pool
    else:
        pool = None

    def stored() -> float:
        if pool is not None:
            stats = pool.stats()
            return stats.bytes_in_use / stats.entries
        entry = next(kv for kv in model.kv_cache_manager.recur_pool._pool if kv is not None)
        caches = [cache._cache for layer in entry._keys_values for cache in (layer._k_cache, layer._v_cache)]
        return float(sum(cache.numel() * cache.element_size() for cache in caches))

    return Side(model, Trees(shape, 3), stored)


def compare(name: str, envs: int, searches: int) -> dict[str, Any]:
    """Each contestant's figures for one workload at one number of environments, on one thread of a CPU."""
    sides = {contestant: _side(contestant, replace(SHAPES[name], env_num=envs)) for contestant in CONTESTANTS}
    differing = 0
    for number in range(WARMING + searches):
        # In turns, and in turns the first, so that a slow moment of the machine meets all of them.
        turn = number % len(CONTESTANTS)
        order = CONTESTANTS[turn:] + CONTESTANTS[:turn]
        states = [sides[contestant].search(keep=number >= WARMING) for contestant in order]
        differing += not all(same_states(states[0], other) for other in states[1:])
    for side in sides.values():
        side.search(keep=False, count=True)
    sides["one import"].model.kv_cache_manager.manager.check_integrity()
    detach(sides["attached"].model)
    return {
        "commit": commit_of(CHECKOUT or ""),
        "workload": name,
        "environments": envs,
        "searches_that_differ": differing,
        "contestants": {contestant: _figures(side) for contestant, side in sides.items()},
    }


def _figures(side: Side) -> dict[str, Any]:
    return {
        "cache_ms": side.cache.median / 1e3,
        "step_ms": side.step.median / 1e3,
        "cache": side.cache.as_dict(),
        "step": side.step.as_dict(),
        "operator_calls": side.calls,
        "copies_to_host": side.copies,
        "bytes_per_node": side.bytes_per_node,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lightzero_main", description=__doc__)
    parser.add_argument("workload", choices=list(SHAPES))
    parser.add_argument("environments", type=int)
    parser.add_argument("--searches", type=int, default=6)
    parser.add_argument("--cpu-time", action="store_true")
    options = parser.parse_args(arguments)
    if options.cpu_time:
        Side.clock = staticmethod(time.thread_time_ns)
    if CHECKOUT is None:
        sys.exit("LIGHTZERO must be the folder of a checkout of LightZero, and is not set")
    torch.set_num_threads(1)
    print(json.dumps(compare(options.workload, options.environments, options.searches)))


if __name__ == "__main__":
    main()
