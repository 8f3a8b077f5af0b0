"""LightZero's trimming, written plainly over tensors of tokens: the reference that every overflow policy is held to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from concurrent_kv import (
    Batch,
    DropAndCorrect,
    DropLazily,
    DropOldest,
    KeysValues,
    KVCacheManager,
    PositionSteps,
    PositionTable,
    Search,
)
from concurrent_kv.model.overflow import Overflow
from tests.support import HANG_SECONDS, LAYOUT, WINDOW, config, slots_in_use

LAYERS, HEADS, HEAD_DIM = LAYOUT.num_layers, LAYOUT.num_heads, LAYOUT.head_dim
KINDS = ("rotary", "eager", "lazy", "stepwise")

# What an absolute position adds to K and V, as the model would compute it: [2 (K and V), layers, heads, window, dim].
EMBEDDING = torch.randn(2, LAYERS, HEADS, WINDOW, HEAD_DIM, generator=torch.Generator().manual_seed(7))


def difference_for(distance: int) -> Tensor:
    """What is owed to tokens that moved by `distance`: `[layers, 2, heads, window - distance, head_dim]`."""
    moved = EMBEDDING[:, :, :, : WINDOW - distance] - EMBEDDING[:, :, :, distance:]
    return moved.transpose(0, 1).contiguous()


def as_stored(difference: Tensor) -> Tensor:
    """`[layers, 2, heads, tokens, head_dim]` in the order of a row: `[2 * layers, heads, tokens, head_dim]`."""
    return torch.cat([difference[:, 0], difference[:, 1]])


def policy(kind: str, limit: int, count: int) -> Overflow:
    """The library's policy of a kind."""
    if kind == "rotary":
        return DropOldest(limit, count)
    if kind == "eager":
        return DropAndCorrect(limit, count, difference_for(count), LAYOUT)
    if kind == "stepwise":
        return DropLazily(limit, count, PositionSteps(LAYOUT, count, difference_for(count)))
    return DropLazily(limit, count, PositionTable(LAYOUT, difference_for))


def trimmed(row: Tensor, limit: int, count: int, *, corrected: bool) -> Tensor:
    """After appending: at `limit` tokens the oldest `count` go, and the rest is corrected for where it stands now."""
    if row.shape[2] < limit:
        return row
    row = row[:, :, count:]
    if corrected:
        row = row + as_stored(difference_for(count))[:, :, : row.shape[2]]
    return row


@dataclass
class Reference:
    """Rows by key, `[2 * layers, heads, tokens, head_dim]`, beside a search that stores the same."""

    manager: KVCacheManager
    search: Search
    kind: str
    limit: int
    count: int
    rows: dict[object, Tensor] = field(default_factory=dict)
    slots: int = 0
    noise: Callable[..., Tensor] = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(11)
        self.noise = lambda *shape: torch.randn(*shape, generator=generator)
        self.overflow = policy(self.kind, self.limit, self.count)
        self.slots = slots_in_use(self.manager)

    def tokens(self, length: int) -> Tensor:
        """New tokens of one row."""
        return self.noise(2 * LAYERS, HEADS, length, HEAD_DIM)

    def root(self, key: object, length: int) -> None:
        """Put a root."""
        self.rows[key] = self.tokens(length)
        self.manager.set_init_cache(0, key, KeysValues.from_packed(self.rows[key][:, None]))
        self.slots += length

    def step(
        self,
        parents: list[object],
        children: list[object],
        new: int,
        fills: dict[int, int],
        lengths: list[int] | None = None,
    ) -> None:
        """Gather, fill what is said to miss, append `new` tokens to each row, commit; on both sides.

        `fills` are tokens by row, 0 for a row that holds only what is appended to it; `lengths` how many of the
        appended ones each row is committed with.
        """
        keys = [("missing", child) if row in fills else parents[row] for row, child in enumerate(children)]
        batch = self.search.gather(keys, [0] * len(keys))
        before = []
        for row in range(len(keys)):
            if row in fills:
                before.append(self.tokens(fills[row]))
                if fills[row]:
                    batch.fill(row, KeysValues.from_packed(before[row][:, None]))
            else:
                before.append(self.rows[parents[row]])
        self.check_batch(batch, before)
        added = self.noise(2 * LAYERS, len(keys), HEADS, new, HEAD_DIM)
        if new:
            batch.append_layers(added[:LAYERS], added[LAYERS:])
        self.search.commit(children, batch, lengths=lengths, overflow=self.overflow)
        for row, child in enumerate(children):
            got = new if lengths is None else lengths[row]
            whole = torch.cat([before[row], added[:, row, :, :got]], dim=2)
            kept = trimmed(whole, self.limit, self.count, corrected=self.kind != "rotary")
            over = whole.shape[2] >= self.limit
            copied = row in fills or (over and self.kind == "eager")
            self.slots += kept.shape[2] if copied else min(got, kept.shape[2])
            self.rows[child] = kept

    def check_batch(self, batch: Batch, expected: list[Tensor]) -> None:
        """Every row reads as the reference says, padded with zeros."""
        for row, wanted in enumerate(expected):
            length = wanted.shape[2]
            assert batch.lengths[row] == length
            self.same(batch.data[:, row, :, batch.start - length : batch.start], wanted)
            assert not batch.data[:, row, :, : batch.start - length].any()

    def check(self) -> None:
        """Every row ever stored still reads as the reference says, and exactly the expected slots are in use."""
        keys = list(self.rows)
        with self.search.gather(keys, [0] * len(keys)) as batch:
            self.check_batch(batch, [self.rows[key] for key in keys])
        assert slots_in_use(self.manager) == self.slots
        self.manager.check_integrity()

    def same(self, actual: Tensor, expected: Tensor) -> None:
        """Bit for bit; within rounding where tokens are corrected at every read."""
        if self.kind == "lazy":
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(actual, expected)


def roomy_manager() -> KVCacheManager:
    """A manager that never runs out of room in these tests."""
    return KVCacheManager(config(max_cache_size=2000), 1, init_entries=64, recur_slots=4000, wait_timeout=HANG_SECONDS)
