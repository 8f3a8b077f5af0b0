"""The workloads: LightZero's own configurations, by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from concurrent_kv import DropAndCorrect, DropOldest, KVCacheManager, KVLayout

if TYPE_CHECKING:  # another checkout may have it elsewhere: make bench ARGS="--beside ..."
    from concurrent_kv.model.overflow import Overflow

__all__ = ["TOKENS_PER_STEP", "WORKLOADS", "Workload"]

TOKENS_PER_STEP = 2


@dataclass(frozen=True)
class Workload:
    """The shapes of one configuration."""

    name: str
    layers: int
    heads: int
    embed_dim: int
    window: int  # tokens
    envs: int
    simulations: int  # of one search
    positions: Literal["rotary", "absolute"]

    @property
    def layout(self) -> KVLayout:
        """Shapes of the cache."""
        return KVLayout(self.layers, self.heads, self.embed_dim // self.heads, self.window)

    def overflow(self) -> Overflow:
        """What LightZero does at the window's end: at window - 1 tokens, the oldest two go."""
        limit, count = self.window - 1, TOKENS_PER_STEP
        if self.positions == "rotary":
            return DropOldest(limit, count)
        layout = self.layout
        shape = (layout.num_layers, 2, layout.num_heads, limit - count, layout.head_dim)
        return DropAndCorrect(limit, count, torch.randn(shape), layout)

    def manager(self, envs: int, simulations: int) -> KVCacheManager:
        """A manager with room for one search at a time, of `simulations` over `envs` environments."""
        config = {
            "num_layers": self.layers,
            "num_heads": self.heads,
            "embed_dim": self.embed_dim,
            "context_length": self.window,
            "num_simulations": simulations,
            "max_cache_size": envs * (simulations + 1),
            "device": "cpu",
        }
        return KVCacheManager(config, envs)


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
