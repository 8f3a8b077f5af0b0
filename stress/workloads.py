"""The workloads of the benchmarks, and what their models do at the window's end, in numbers that can be checked."""

from __future__ import annotations

import torch

from benchmarks.workloads import TOKENS_PER_STEP, WORKLOADS, Workload
from concurrent_kv import DropAndCorrect, DropLazily, DropOldest, KVLayout, PositionTable
from stress.content import FIELDS, MOVES

__all__ = ["POSITIONS", "TOKENS_PER_STEP", "WORKLOADS", "Workload", "overflow_of"]

POSITIONS = ("rotary", "absolute", "lazy")


def overflow_of(layout: KVLayout, positions: str) -> DropOldest | DropAndCorrect | DropLazily:
    """What LightZero does at the window's end; corrections add to the field `MOVES` of the tokens that stay."""
    limit, count = layout.max_tokens - 1, TOKENS_PER_STEP
    if positions == "rotary":
        return DropOldest(limit, count)
    if positions == "absolute":
        return DropAndCorrect(limit, count, _moved_by(layout, 1, layout.max_tokens - count), layout)
    return DropLazily(
        limit, count, PositionTable(layout, lambda distance: _moved_by(layout, distance, layout.max_tokens - distance))
    )


def _moved_by(layout: KVLayout, amount: int, tokens: int) -> torch.Tensor:
    """`[layers, 2, heads, tokens, head_dim]` with `amount` in every `MOVES` field."""
    difference = torch.zeros(layout.num_layers, 2, layout.num_heads, tokens, layout.head_dim)
    difference[..., MOVES::FIELDS] = amount
    return difference
