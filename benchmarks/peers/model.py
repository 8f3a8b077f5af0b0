"""A transformer of a workload's size, to stand between gather and commit: what a cache costs beside its model."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.peers.contestants.base import SearchStore
from benchmarks.peers.shapes import Shape

__all__ = ["Model"]


class Model(nn.Module):
    """Layers of attention over a batch's keys and values and of a feed-forward network, with random weights.

    Its outputs mean nothing. Several threads may use it at once.
    """

    def __init__(self, shape: Shape, rows: int, tokens: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self._heads, self._width = shape.heads, shape.heads * shape.head_dim
        width = self._width
        self._qkv = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(shape.layers))
        self._out = nn.ModuleList(nn.Linear(width, width) for _ in range(shape.layers))
        self._feed = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
            for _ in range(shape.layers)
        )
        self._input = torch.randn(rows, tokens, width)

    @torch.no_grad()
    def step(self, store: SearchStore) -> Tensor:
        """Read the batch that was gathered, append each layer's keys and values to it; `[rows, tokens, width]`."""
        hidden = self._input
        rows, tokens, width = hidden.shape
        for layer, (qkv, out, feed) in enumerate(zip(self._qkv, self._out, self._feed, strict=True)):
            query, keys, values = (
                part.view(rows, tokens, self._heads, -1).transpose(1, 2) for part in qkv(hidden).split(width, dim=2)
            )
            all_keys, all_values = store.append(layer, keys, values)
            attended = F.scaled_dot_product_attention(query, all_keys, all_values)
            hidden = hidden + out(attended.transpose(1, 2).reshape(rows, tokens, width))
            hidden = hidden + feed(hidden)
        return hidden
