"""What stands in an entry: every number of every token says whose it is, so that a read proves what it is.

A token's numbers repeat eight fields over the head: `KEY`, `SCOPE`, two halves of `VERSION`, `WRITER`, `PLACE` (where
it stood in the sequence it was written in), `MOVES` (what corrections of its position added) and `PLANE` (which layer,
K or V, and head the number stands in). All are below 2 ** 16, which float32 holds exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from concurrent_kv import Batch, KeysValues, KVLayout

__all__ = ["FIELDS", "MOVES", "BrokenPromiseError", "Content", "Token"]

FIELDS = 8
MOVES, PLANE = 6, 7
HALF = 1 << 16


class BrokenPromiseError(AssertionError):
    """Something that the package promises did not hold."""


class Token(NamedTuple):
    """What one token says of itself."""

    key: int
    scope: int
    version: int
    writer: int
    place: int
    moves: int = 0

    def fields(self) -> tuple[int, ...]:
        return (self.key, self.scope, self.version // HALF, self.version % HALF, self.writer, self.place, self.moves, 0)


def _token(fields: Sequence[float]) -> Token:
    key, scope, high, low, writer, place, moves, _ = (int(field) for field in fields)
    return Token(key, scope, high * HALF + low, writer, place, moves)


class Content:
    """Makes and reads the contents of entries of one layout."""

    def __init__(self, layout: KVLayout) -> None:
        if layout.head_dim % FIELDS or layout.dtype is not torch.float32:
            raise ValueError(f"contents need float32 and heads of a multiple of {FIELDS} numbers, got {layout}")
        self.layout = layout
        self._repeats = layout.head_dim // FIELDS
        planes = 2 * layout.num_layers * layout.num_heads
        # [2 * layers, 1, heads, 1, head_dim]: zero but for the field PLANE.
        self._template = torch.zeros(2 * layout.num_layers, 1, layout.num_heads, 1, layout.head_dim)
        self._template[..., PLANE::FIELDS] = torch.arange(1.0, planes + 1).view(-1, 1, layout.num_heads, 1, 1)

    def packed(self, rows: Sequence[Sequence[Token]], end: int | None = None) -> Tensor:
        """`[2 * layers, rows, heads, end, head_dim]`, left-padded with zeros to the longest row (or to `end`)."""
        end = max(map(len, rows)) if end is None else end
        fields = torch.zeros(len(rows), end, FIELDS)
        valid = torch.zeros(len(rows), end, dtype=torch.bool)
        for number, row in enumerate(rows):
            if row:
                fields[number, end - len(row) :] = torch.tensor([token.fields() for token in row], dtype=torch.float32)
                valid[number, end - len(row) :] = True
        heads = fields.repeat(1, 1, self._repeats)[None, :, None]
        return (self._template + heads) * valid[None, :, None, :, None]

    def row(self, tokens: Sequence[Token]) -> KeysValues:
        """One row."""
        return KeysValues.from_packed(self.packed([tokens]))

    def rows(self, rows: Sequence[Sequence[Token]]) -> KeysValues:
        """Several rows, left-padded."""
        packed = self.packed(rows)
        return KeysValues.from_packed(packed, [len(row) for row in rows], packed.shape[3])

    def read(self, kv: KeysValues) -> list[Token]:
        """The tokens of one row; `BrokenPromiseError` if a single number of it says otherwise than the rest."""
        packed = torch.cat([kv.keys, kv.values])[:, :, :, kv.end - kv.lengths[0] : kv.end]
        return self._read(packed)

    def read_row(self, batch: Batch, row: int) -> list[Token]:
        """As `read`, of one row of a batch; its padding must be zero."""
        begin = batch.end - batch.lengths[row]
        data = batch.data[:, row : row + 1]
        if bool(data[:, :, :, :begin].any()):
            raise BrokenPromiseError(f"row {row} of a batch has numbers in its padding")
        return self._read(data[:, :, :, begin : batch.end])

    def check(self, batch: Batch, rows: Sequence[Sequence[Token]]) -> None:
        """Raise unless a batch holds exactly `rows`, an empty one for a miss."""
        lengths = tuple(map(len, rows))
        if batch.lengths != lengths:
            raise BrokenPromiseError(f"a batch has rows of {batch.lengths} tokens, {lengths} were stored")
        if torch.equal(batch.data[:, :, :, : batch.end], self.packed(rows, batch.end)):
            return
        for number, row in enumerate(rows):
            if (found := self.read_row(batch, number) if row else []) != list(row):
                raise BrokenPromiseError(f"row {number} of a batch is {found}, {list(row)} was stored")
        raise BrokenPromiseError("a batch has numbers in its padding")

    def append(self, batch: Batch, rows: Sequence[Sequence[Token]]) -> None:
        """Append the same number of tokens to every row of a batch, in every layer, as a model does."""
        new, layers = self.packed(rows), self.layout.num_layers
        for layer in range(layers):
            batch.append(layer, new[layer], new[layers + layer])

    def _read(self, packed: Tensor) -> list[Token]:
        # [tokens, fields] as the first plane has them; every other plane has to agree.
        fields = packed[0, 0, 0, :, :FIELDS] - self._template[0, 0, 0, :, :FIELDS]
        expected = self._template + fields.repeat(1, self._repeats)[None, None, None]
        if not torch.equal(packed, expected):
            values = sorted({float(number) for number in (packed - expected).flatten().tolist()})[:8]
            raise BrokenPromiseError(f"torn: an entry that begins as {fields.tolist()} differs elsewhere, by {values}")
        return [_token(token) for token in fields.tolist()]
