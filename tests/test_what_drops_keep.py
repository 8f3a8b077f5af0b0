"""What a drop keeps of a model's keys and values, against recomputing the remaining window: docs/windows.md says it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import layer_norm, scaled_dot_product_attention

from concurrent_kv import DropAndCorrect, DropLazily, DropOldest, KeysValues, KVLayout, KVPool, PositionSteps
from concurrent_kv.model.overflow import Overflow

WINDOW, COUNT, HEADS, HEAD_DIM = 12, 2, 2, 8
WIDTH = HEADS * HEAD_DIM
ROUNDING = 1e-5


class Gpt:
    """A small GPT: `layers` of attention, with absolute positions added to the embeddings or with rotary ones."""

    def __init__(self, layers: int, *, norm: bool = True, rotary: bool = False) -> None:
        chance = torch.Generator().manual_seed(3)
        self.layout = KVLayout(layers, HEADS, HEAD_DIM, WINDOW)
        self.norm, self.rotary = norm, rotary
        self.positions = torch.randn(WINDOW, WIDTH, generator=chance)
        self.weights = torch.randn(layers, 4, WIDTH, WIDTH, generator=chance) / WIDTH**0.5  # of q, k, v, and the output

    def split(self, x: Tensor) -> Tensor:
        """`[tokens, width]` as `[1, heads, tokens, head_dim]`."""
        return x.view(1, -1, HEADS, HEAD_DIM).transpose(1, 2)

    def rotated(self, x: Tensor, positions: Tensor) -> Tensor:
        half = HEAD_DIM // 2
        angles = positions[:, None] * 10.0 ** (-torch.arange(half) / half)
        first, second = x.chunk(2, dim=-1)
        cosines, sines = angles.cos(), angles.sin()
        return torch.cat((first * cosines - second * sines, second * cosines + first * sines), dim=-1)

    def __call__(self, x: Tensor, position: int, past: KeysValues | None = None) -> KeysValues:
        """Keys and values of embeddings `x` `[tokens, width]`, which stand from `position` on, behind `past`."""
        at = torch.arange(position, position + len(x))
        if not self.rotary:
            x = x + self.positions[at]
        keys, values = [], []
        for layer, (q, k, v, out) in enumerate(self.weights):
            y = layer_norm(x, (WIDTH,)) if self.norm else x
            query, key, value = (self.split(y @ weight.T) for weight in (q, k, v))
            if self.rotary:
                query, key = self.rotated(query, at), self.rotated(key, at)
            keys.append(key)
            values.append(value)
            if past is not None:
                key = torch.cat((past.keys[layer], key), dim=2)
                value = torch.cat((past.values[layer], value), dim=2)
            seen = torch.ones(len(x), key.shape[2], dtype=torch.bool).tril(key.shape[2] - len(x))
            attended = scaled_dot_product_attention(query, key, value, attn_mask=seen)
            x = x + attended.transpose(1, 2).reshape(-1, WIDTH) @ out.T
        return KeysValues(torch.stack(keys), torch.stack(values))

    def difference(self) -> Tensor:
        """As docs/windows.md makes it: the positions' keys and values, new place less old, without any norm."""
        of_positions = torch.stack(
            [
                torch.stack([self.split(self.positions @ weight.T)[0] for weight in (k, v)])
                for _, k, v, _ in self.weights
            ]
        )
        return of_positions[:, :, :, :-COUNT] - of_positions[:, :, :, COUNT:]


def dropped(model: Gpt, embeddings: Tensor, overflow: Overflow) -> tuple[KeysValues, KeysValues]:
    """What the pool holds after one drop, and what the model computed for the same tokens before it."""
    pool = KVPool(model.layout, 4)
    root, last = embeddings[:-1], embeddings[-1:]
    computed = model(root, 0)
    pool.put("root", computed)
    new = model(last, len(root), computed)
    with pool.gather(["root"]) as batch:
        batch.append_layers(new.keys, new.values)
        pool.commit(["child"], batch, overflow=overflow)
    kept = pool.get("child")
    assert kept is not None
    pool.check_integrity()
    whole = KeysValues(torch.cat((computed.keys, new.keys), 3), torch.cat((computed.values, new.values), 3))
    return kept, KeysValues(whole.keys[:, :, :, COUNT:], whole.values[:, :, :, COUNT:])


@pytest.fixture
def embeddings() -> Tensor:
    return torch.randn(WINDOW, WIDTH, generator=torch.Generator().manual_seed(5))


def eager(model: Gpt) -> Overflow:
    return DropAndCorrect(WINDOW, COUNT, model.difference(), model.layout)


def lazy(model: Gpt) -> Overflow:
    return DropLazily(WINDOW, COUNT, PositionSteps(model.layout, COUNT, model.difference()))


@pytest.mark.parametrize("policy", [eager, lazy])
def test_what_is_corrected_is_bit_for_bit_what_was_computed_plus_the_difference(
    policy: Callable[[Gpt], Overflow], embeddings: Tensor
) -> None:
    model = Gpt(3)
    kept, computed = dropped(model, embeddings, policy(model))
    added = model.difference()
    assert torch.equal(kept.keys[:, 0], computed.keys[:, 0] + added[:, 0])
    assert torch.equal(kept.values[:, 0], computed.values[:, 0] + added[:, 1])


def test_where_keys_are_linear_in_the_positions_the_correction_is_what_recomputing_gives_but_for_rounding(
    embeddings: Tensor,
) -> None:
    model = Gpt(1, norm=False)
    kept, _ = dropped(model, embeddings, eager(model))
    again = model(embeddings[COUNT:], 0)
    torch.testing.assert_close(kept.keys, again.keys, rtol=ROUNDING, atol=ROUNDING)
    torch.testing.assert_close(kept.values, again.values, rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize(("layers", "norm"), [(1, True), (2, False)], ids=["behind a norm", "in the second layer"])
def test_elsewhere_the_correction_is_an_approximation(layers: int, norm: bool, embeddings: Tensor) -> None:
    model = Gpt(layers, norm=norm)
    kept, _ = dropped(model, embeddings, eager(model))
    again = model(embeddings[COUNT:], 0)
    assert (kept.keys[-1] - again.keys[-1]).abs().mean() > 1000 * ROUNDING


def test_rotary_keys_of_the_first_layer_are_those_of_the_remaining_window_up_to_a_common_rotation(
    embeddings: Tensor,
) -> None:
    model = Gpt(1, rotary=True)
    kept, computed = dropped(model, embeddings, DropOldest(WINDOW, COUNT))
    assert torch.equal(kept.keys, computed.keys)
    again = model(embeddings[COUNT:], 0)
    moved = torch.full((WINDOW - COUNT,), -COUNT)
    torch.testing.assert_close(model.rotated(kept.keys[0], moved), again.keys[0], rtol=ROUNDING, atol=ROUNDING)
    torch.testing.assert_close(kept.values, again.values, rtol=ROUNDING, atol=ROUNDING)


def test_rotary_keys_of_later_layers_have_seen_what_was_dropped(embeddings: Tensor) -> None:
    model = Gpt(2, rotary=True)
    kept, computed = dropped(model, embeddings, DropOldest(WINDOW, COUNT))
    assert torch.equal(kept.keys, computed.keys)
    again = model(embeddings[COUNT:], 0)
    assert (kept.values[-1] - again.values[-1]).abs().mean() > 1000 * ROUNDING
