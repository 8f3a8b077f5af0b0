"""The shapes of the real workloads, from LightZero's own configurations, by name."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from concurrent_kv import DropAndCorrect, DropLazily, DropOldest, KVLayout, PositionTable
from stress.content import FIELDS, MOVES

__all__ = ["POSITIONS", "WORKLOADS", "Workload", "overflow_of"]

TOKENS_PER_STEP = 2  # one for the action, one for the observation it leads to
POSITIONS = ("rotary", "absolute", "lazy")


@dataclass(frozen=True)
class Workload:
    """A model's shapes and a search's size. `positions`: how a row that outgrows the window is shortened."""

    name: str
    num_layers: int
    num_heads: int
    embed_dim: int
    context_length: int  # window, in tokens
    envs: int
    simulations: int  # of one search, for each environment
    positions: str

    @property
    def layout(self) -> KVLayout:
        return KVLayout(self.num_layers, self.num_heads, self.embed_dim // self.num_heads, self.context_length)


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("cartpole", 2, 2, 64, 8, 8, 25, "rotary"),
        Workload("lunarlander", 4, 4, 256, 8, 8, 25, "absolute"),
        Workload("atari", 2, 8, 768, 8, 8, 50, "absolute"),
        Workload("atari-stack4", 4, 8, 768, 8, 8, 50, "absolute"),
        Workload("atari-multitask", 4, 24, 768, 8, 26, 50, "absolute"),
        Workload("dmc", 2, 8, 768, 4, 8, 50, "absolute"),
        Workload("jericho", 2, 24, 768, 8, 4, 50, "absolute"),
        Workload("memory", 4, 4, 256, 162, 8, 50, "absolute"),
    )
}


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
