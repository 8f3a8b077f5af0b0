"""What a search does to a cache: shapes, trees, and the tokens of every node. The same for every contestant."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.workloads import TOKENS_PER_STEP, WORKLOADS

__all__ = ["Shape", "Trees", "difference_of", "new_tokens", "root_of"]

SETS_OF_TOKENS = 4  # that steps take in turns: new tokens come hot from a model, not from memory


@dataclass(frozen=True)
class Shape:
    """Of one token, one window, and what happens at the window's end. float32.

    Attributes:
        window: columns of a batch.
        limit: a row that is this long after appending loses its oldest `dropped` tokens.
        absolute: whether a difference is added to the tokens that stay then.
    """

    layers: int
    heads: int
    head_dim: int
    window: int
    limit: int
    dropped: int = TOKENS_PER_STEP
    absolute: bool = False

    @classmethod
    def of(cls, workload: str) -> Shape:
        """Of a workload of WORKLOADS, by name."""
        found = WORKLOADS[workload]
        head_dim = found.embed_dim // found.heads
        absolute = found.positions == "absolute"
        return cls(found.layers, found.heads, head_dim, found.window, found.window - 1, TOKENS_PER_STEP, absolute)

    @classmethod
    def from_dict(cls, sizes: dict[str, Any]) -> Shape:
        """Of what `dataclasses.asdict` made, or of a workload: `{"workload": name}`."""
        return cls.of(sizes["workload"]) if "workload" in sizes else cls(**sizes)

    @property
    def parts(self) -> int:
        """Keys and values of all layers."""
        return 2 * self.layers

    @property
    def token_numbers(self) -> int:
        """Numbers of one token's K and V over all layers."""
        return self.parts * self.heads * self.head_dim

    @property
    def token_bytes(self) -> int:
        """Bytes of the same."""
        return 4 * self.token_numbers

    def kept(self, length: int) -> int:
        """Tokens that a row of `length` tokens, appended ones included, keeps."""
        return length - self.dropped if length >= self.limit else length


def root_of(shape: Shape, row: int, tokens: int) -> Tensor:
    """The root's tokens of one environment, `[2 * layers, heads, tokens, head_dim]`."""
    generator = torch.Generator().manual_seed(row)
    return torch.randn(shape.parts, shape.heads, tokens, shape.head_dim, generator=generator)


def difference_of(shape: Shape) -> Tensor:
    """What is added to tokens that stay when others are dropped, `[2 * layers, heads, limit - dropped, head_dim]`."""
    generator = torch.Generator().manual_seed(1 << 20)
    kept = shape.limit - shape.dropped
    return torch.randn(shape.parts, shape.heads, kept, shape.head_dim, generator=generator)


def new_tokens(shape: Shape, rows: int, tokens: int, number: int) -> list[tuple[Tensor, Tensor]]:
    """What a model appends at the step `number`: K and V of each layer, `[rows, heads, tokens, head_dim]`."""
    generator = torch.Generator().manual_seed((1 << 21) + number)
    size = (shape.parts, rows, shape.heads, tokens, shape.head_dim)
    parts = torch.randn(size, generator=generator).unbind(0)
    return [(parts[layer], parts[shape.layers + layer]) for layer in range(shape.layers)]


class Trees:
    """One tree for each row, which grows by one node of every tree at each step.

    Half of the parents are the newest node of their tree, the others any older one: deep enough to fill a window of 8,
    wide enough that rows are not equally long. Keys are whole numbers, as hashes of states are; the root's is its row.

    Args:
        rows: trees.
        steps: steps of a search.
        root_tokens: tokens of each root.
        step_tokens: tokens appended at each step.
        deep: in so many steps each node is the child of the one before; those of later steps are all children of the
            last of these. A random tree if left out.
        reuse_keys: a step's children in a deep tree take the keys of the step before, which they replace: for those
            whose nodes are whole copies, of which no memory holds many.
    """

    def __init__(
        self,
        shape: Shape,
        rows: int,
        steps: int,
        root_tokens: int,
        step_tokens: int,
        *,
        deep: int | None = None,
        reuse_keys: bool = False,
    ) -> None:
        draw = random.Random(rows)
        self.rows, self.step_tokens, self.root_tokens = rows, step_tokens, root_tokens
        self.parents: list[list[int]] = []
        self.children: list[list[int]] = []
        self.gathered: list[list[int]] = []  # tokens of each parent
        self.stored: list[list[int]] = []  # tokens of each child
        trees = [[row] for row in range(rows)]  # the keys of each, oldest first
        length_of = dict.fromkeys(range(rows), root_tokens)
        for step in range(steps):
            if deep is None:
                parents = [tree[-1] if draw.random() < 0.5 else draw.choice(tree) for tree in trees]
            else:
                parents = [tree[min(step, deep)] for tree in trees]
            number = step + 1
            if reuse_keys and deep is not None:
                number = 1 if step < deep else 2
            children = [number * rows + row for row in range(rows)]
            self.parents.append(parents)
            self.children.append(children)
            self.gathered.append([length_of[parent] for parent in parents])
            self.stored.append([shape.kept(length + step_tokens) for length in self.gathered[-1]])
            length_of.update(zip(children, self.stored[-1], strict=True))
            for child, tree in zip(children, trees, strict=True):
                tree.append(child)

    def stored_tokens(self, shape: Shape) -> list[int]:
        """Tokens that each step's children add where prefixes are shared: the new ones, or all that are corrected."""
        return [
            sum(
                kept if shape.absolute and kept < before + self.step_tokens else self.step_tokens
                for before, kept in zip(gathered, stored, strict=True)
            )
            for gathered, stored in zip(self.gathered, self.stored, strict=True)
        ]

    @property
    def steps(self) -> int:
        """Steps of a search."""
        return len(self.parents)

    @property
    def nodes(self) -> int:
        """Nodes that a search stores, roots not included."""
        return self.rows * self.steps

    def tokens_of_steps(self, shape: Shape) -> list[list[tuple[Tensor, Tensor]]]:
        """What is appended at each step: a few sets in turns."""
        count = min(SETS_OF_TOKENS, self.steps)
        sets = [new_tokens(shape, self.rows, self.step_tokens, number) for number in range(count)]
        return [sets[step % count] for step in range(self.steps)]
