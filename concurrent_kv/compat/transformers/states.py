"""What a text keeps as a whole: states of convolutions and recurrences, from a model's layers and back.

An entry has them in its side data, as one run of bytes: a copy of its own, which no later step writes to.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import LinearAttentionLayer

from ...errors import InvalidArgumentError

__all__ = ["TextState", "of_layers", "to_layers"]


class Piece(NamedTuple):
    """One state of one layer in the bytes of a text."""

    layer: int  # of those that have states
    is_recurrent: bool
    number: int
    shape: tuple[int, ...]  # of one row
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of it."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, eq=False)
class TextState:
    """An entry's side data, and what the model keeps of its text as a whole.

    Attributes:
        side: the side data that was given.
        data: uint8, the pieces one after the other.
        pieces: what it is made of.
        ready: on a GPU, when it was written.
    """

    side: object
    data: Tensor
    pieces: tuple[Piece, ...]
    ready: torch.cuda.Event | None


def of_layers(sides: Sequence[object], layers: Sequence[LinearAttentionLayer]) -> list[object]:
    """Side data of each row, with its states as the layers have them now."""
    pieces, parts = list[Piece](), list[Tensor]()
    for number, layer in enumerate(layers):
        for is_recurrent, states in ((False, layer.conv_states), (True, layer.recurrent_states)):
            for index, state in states.items():
                if state is not None:
                    pieces.append(Piece(number, is_recurrent, index, tuple(state.shape[1:]), state.dtype))
                    parts.append(state.detach().reshape(state.shape[0], -1).contiguous().view(torch.uint8))
    if not parts:
        raise InvalidArgumentError("there are no states yet: the model has to be given tokens before a commit")
    rows = [row.clone() for row in torch.cat(parts, 1)]
    ready = None
    if parts[0].is_cuda:
        ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
        ready.record()
    whole = tuple(pieces)
    return [TextState(side, row, whole, ready) for side, row in zip(sides, rows, strict=True)]


def to_layers(sides: Sequence[object], layers: Sequence[LinearAttentionLayer]) -> None:
    """Give the layers the states of gathered rows; nothing where no row has any."""
    texts = [side for side in sides if isinstance(side, TextState)]
    if not texts:
        return
    if len(texts) < len(sides):
        raise InvalidArgumentError(
            f"batch must have rows with states, or without, got {len(texts)} of {len(sides)} with some: give texts "
            "that are new to the model a batch of their own"
        )
    for text in texts:
        if text.ready is not None:
            torch.cuda.current_stream(text.data.device).wait_event(text.ready)
            text.data.record_stream(torch.cuda.current_stream(text.data.device))
    data, first = torch.stack([text.data for text in texts]), 0
    for piece in texts[0].pieces:
        part = data[:, first : first + piece.nbytes].clone().view(piece.dtype)
        first += piece.nbytes
        layer, state = layers[piece.layer], part.view(len(texts), *piece.shape)
        if layer.device is None:
            layer.device, layer.dtype = state.device, state.dtype
        if piece.is_recurrent:
            layer.recurrent_states[piece.number] = state
            layer.is_recurrent_states_initialized[piece.number] = True
        else:
            layer.conv_states[piece.number] = state
            layer.conv_kernel_size[piece.number] = state.shape[-1]
            layer.is_conv_states_initialized[piece.number] = True
        layer.has_previous_state[piece.number] = True
