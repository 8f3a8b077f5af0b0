"""What absolute positions owe to tokens that moved when older ones were dropped: the model's position differences."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .._checks import positive_int
from ..errors import InvalidArgumentError, InvalidTypeError, shown
from .cuda import refuse_capture, settle
from .layout import KVLayout
from .tensor_checks import check_tensor

__all__ = ["Correction", "PositionSteps", "PositionTable", "packed_difference"]


def packed_difference(name: str, difference: Tensor, layout: KVLayout) -> Tensor:
    """`[layers, 2, heads, tokens, head_dim]` as the storage orders it: `[2 * layers, tokens, heads, head_dim]`."""
    if not isinstance(layout, KVLayout):
        raise InvalidTypeError(f"layout must be a KVLayout, got {type(layout).__name__}")
    check_tensor(name, difference)
    expected = (layout.num_layers, 2, layout.num_heads, layout.head_dim)
    if difference.dim() != 5 or (*difference.shape[:3], difference.shape[4]) != expected:
        raise InvalidArgumentError(
            f"{name} must have the shape [layers={expected[0]}, 2 (K and V), heads={expected[2]}, tokens, "
            f"head_dim={expected[3]}], got {tuple(difference.shape)}"
        )
    if difference.dtype != layout.dtype:
        raise InvalidArgumentError(f"{name} must have the dtype {layout.dtype}, got {difference.dtype}")
    if difference.is_meta:
        raise InvalidArgumentError(f"{name} must have data, got a tensor on {difference.device}")
    refuse_capture(layout.device)
    difference = difference.detach().to(layout.device)
    return difference.permute(1, 0, 3, 2, 4).flatten(0, 1).contiguous()


class PositionTable:
    """The model's position differences for every distance a token can have moved, in the storage's order.

    Args:
        layout: the layout of the pool it is for.
        difference_for: `difference_for(distance)` gives `[layers, 2 (K and V), heads, window - distance, head_dim]`:
            what is added to a token that stands at position `i` now and was written at position `i + distance`.
            Called once for every distance from 1 to window - 1.
    """

    def __init__(self, layout: KVLayout, difference_for: Callable[[int], Tensor]) -> None:
        if not isinstance(layout, KVLayout):
            raise InvalidTypeError(f"layout must be a KVLayout, got {type(layout).__name__}")
        if not callable(difference_for):
            raise InvalidTypeError(f"difference_for must be a function of a distance, got {shown(difference_for)}")
        refuse_capture(layout.device)
        window = layout.max_tokens
        table = torch.zeros(
            (2 * layout.num_layers, window, window, layout.num_heads, layout.head_dim),
            dtype=layout.dtype,
            device=layout.device,
        )
        for distance in range(1, window):
            name = f"difference_for({distance})"
            packed = packed_difference(name, difference_for(distance), layout)
            if packed.shape[1] < window - distance:
                raise InvalidArgumentError(f"{name} must cover {window - distance} tokens, got {packed.shape[1]}")
            table[:, distance, : window - distance] = packed[:, : window - distance]
        self.layout = layout
        self.window = window
        # [2 * layers, (distance, position, head), head_dim]: one index_select corrects a whole batch.
        self.rows = table.flatten(1, 3)
        settle(table.device)


class PositionSteps:
    """The model's position difference of one drop, added once for each drop that a token has outlived, in their order.

    What a token then reads as is bit for bit what adding the difference at every drop gives (`DropAndCorrect`).

    Args:
        layout: the layout of the pool it is for.
        count: tokens that every drop takes.
        difference: `[layers, 2 (K and V), heads, tokens, head_dim]`; `difference[..., i, :]` is added to the token that
            *becomes* token `i`. As many tokens as any row keeps that drops some.
    """

    def __init__(self, layout: KVLayout, count: int, difference: Tensor) -> None:
        self.count = positive_int("count", count)
        packed = packed_difference("difference", difference, layout)
        covered = packed.shape[1]
        if not 0 < covered <= layout.max_tokens:
            raise InvalidArgumentError(f"difference must cover 1 to {layout.max_tokens} tokens, got {covered}")
        self.layout = layout
        self.covered = covered
        # -0.0 changes no number, as 0.0 does: one more token of it, which stands for no step at all.
        shape = (packed.shape[0], layout.max_tokens + 1, *packed.shape[2:])
        table = torch.full(shape, -0.0, dtype=layout.dtype, device=layout.device)
        table[:, :covered] = packed
        self.packed = table[:, :covered]  # [2 * layers, tokens, heads, head_dim]
        self.rows = table.flatten(1, 2)  # [2 * layers, (position, head), head_dim]
        settle(table.device)
        # [tokens, 2 * layers, heads, head_dim], for additions without torch; None on a device, and in bfloat16.
        on_host = table.device.type == "cpu" and table.dtype is not torch.bfloat16
        self.numbers = self.packed.transpose(0, 1).contiguous().numpy() if on_host else None


Correction = PositionTable | PositionSteps | None  # what an entry is owed on reading
