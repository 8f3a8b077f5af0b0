"""The world model: a small causal transformer over (observation, action) tokens, in the manner of UniZero.

A path through the model is a sequence of tokens `observation, action, observation, action, ...`, two to a step. The
output at an observation token gives value and policy, the output at an action token gives the next latent, the reward
and whether the episode ends. When planning, only the first observation is real: every later observation token is the
latent which the model itself predicted (Pu et al. 2024, "UniZero").

The model holds no state between calls. What it has already seen of a path is in the `PastKeysValues` it is handed, so
one model may serve several threads, each with a cache of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

DEFAULT_WEIGHTS = Path(__file__).parent / "weights" / "cartpole.pt"


class PastKeysValues(Protocol):
    """The K and V of the tokens a batch of paths has seen, to which each layer adds those of the new tokens."""

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add `[batch, heads, n, head_dim]` after every row's tokens; return all of that layer's K and V.

        Both results are `[batch, heads, columns, head_dim]`, the new tokens last. Rows are left-padded to the longest,
        so that the valid tokens of every row end at the same column. `keys` are rotated to their absolute positions.
        """
        ...

    @property
    def padding(self) -> Tensor:
        """Padding columns on the left of each row: int64 `[batch]`."""
        ...


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the model, and the discount its values are trained for.

    Field names are those `KVCacheManager(config=...)` reads.
    """

    num_layers: int = 2
    num_heads: int = 2
    embed_dim: int = 64
    context_length: int = 8  # tokens
    observation_size: int = 4
    num_actions: int = 2
    discount: float = 0.99  # per step

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.embed_dim // self.num_heads

    @property
    def tokens_per_step(self) -> int:
        """Tokens one simulated step adds to a path: its action and its predicted observation."""
        return 2

    @property
    def window_limit(self) -> int:
        """Length in tokens at which a path drops its oldest step (LightZero's rule)."""
        return self.context_length - 1

    @property
    def value_scale(self) -> float:
        """Return of an endless episode with reward 1 a step: the value head's output is a fraction of it."""
        return 1.0 / (1.0 - self.discount)


class RootOutput(NamedTuple):
    """What the model says at a real observation."""

    latent: Tensor  # [batch, embed_dim], the observation token
    value: Tensor  # [batch], expected discounted return
    policy_logits: Tensor  # [batch, actions]


class StepOutput(NamedTuple):
    """What the model says about one action, and at the latent it leads to."""

    latent: Tensor  # [batch, embed_dim], predicted, already appended to the path as its observation token
    reward: Tensor  # [batch], for the step itself
    termination_logit: Tensor  # [batch], that the step ends the episode (running out of time is not an end)
    value: Tensor  # [batch], expected discounted return after the step, if it did not end the episode
    policy_logits: Tensor  # [batch, actions], at the predicted latent

    @property
    def termination_probability(self) -> Tensor:
        """Probability that the step ends the episode, `[batch]`: what follows counts `1 - p` times."""
        return torch.sigmoid(self.termination_logit)


class RotaryEmbedding(nn.Module):
    """Rotary positions (Su et al. 2021, "RoFormer"): attention sees differences of positions only."""

    def __init__(self, head_dim: int, base: float = 10_000.0) -> None:
        super().__init__()
        frequencies = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
        self.register_buffer("frequencies", frequencies, persistent=False)  # [head_dim / 2], radians per token
        self.frequencies: Tensor

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines, float32 `[batch, 1, head_dim / 2]`, of a token of each row."""
        # In float32 the product would lose about position * 1e-7 radians: late positions would see other differences.
        radians = positions[:, None, None] * self.frequencies
        return radians.cos().float(), radians.sin().float()

    @staticmethod
    def rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        """Rotate the halves of `x` `[..., batch, heads, head_dim]` against each other."""
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cosines - second * sines, second * cosines + first * sines), dim=-1)


class Block(nn.Module):
    """Attention over the cache and a feed-forward network, each behind a layer norm."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        width = config.embed_dim
        self.layer = layer
        self.num_heads = config.num_heads
        self.attention_norm = nn.LayerNorm(width)
        self.queries_keys_values = nn.Linear(width, 3 * width)
        self.attention_output = nn.Linear(width, width)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor, past: PastKeysValues, angles: tuple[Tensor, Tensor]) -> Tensor:
        """Map a token of each row, `x` `[batch, embed_dim]`, to the same shape, appending its K and V to `past`."""
        batch, width = x.shape
        projected = self.queries_keys_values(self.attention_norm(x)).view(batch, 3, self.num_heads, -1).transpose(0, 1)
        rotated = RotaryEmbedding.rotate(projected[:2], *angles)
        queries, keys = rotated.unsqueeze(3).unbind()  # [batch, heads, 1, head_dim] each
        keys, values = past.append(self.layer, keys, projected[2].unsqueeze(2))
        visible = visible_columns(past.padding, keys.shape[2])
        attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=visible)
        x = x + self.attention_output(attended.reshape(batch, width))
        output: Tensor = x + self.feed_forward(x)
        return output


def visible_columns(padding: Tensor, columns: int) -> Tensor:
    """Which of so many columns the token in the last of them may attend to: bool `[batch, 1, 1, columns]`."""
    return torch.arange(columns, device=padding.device) >= padding[:, None, None, None]


class WorldModel(nn.Module):
    """Encoder, transformer and heads.

    Tensors are float32, positions int64. `positions[i]` is the absolute index, in tokens, of the first token which the
    call appends to row `i`. K are cached rotated to it, so that dropping a path's oldest tokens corrects nothing.
    """

    def __init__(self, config: ModelConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or ModelConfig()
        width = config.embed_dim
        # About the largest values of a live episode: metres, metres a second, radians, radians a second.
        self.register_buffer("observation_scale", torch.tensor([2.4, 3.0, 0.21, 3.0]), persistent=False)
        self.observation_scale: Tensor
        self.encoder = _mlp(config.observation_size, width)
        self.latent_norm = nn.LayerNorm(width, elementwise_affine=False)
        self.action_embedding = nn.Embedding(config.num_actions, width)
        self.rotary = RotaryEmbedding(config.head_dim)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.output_norm = nn.LayerNorm(width)
        self.latent_head = _mlp(width, width)
        self.reward_head = _mlp(width, 1)
        self.termination_head = _mlp(width, 1)
        self.value_head = _mlp(width, 1)
        self.policy_head = _mlp(width, config.num_actions)
        self.decoder = _mlp(width, config.observation_size)

    def initial(self, observation: Tensor, past: PastKeysValues, positions: Tensor) -> RootOutput:
        """Begin paths at real observations.

        Args:
            observation: CartPole's own `[batch, 4]`, unscaled.
            past: empty rows; each gains one token.
            positions: `[batch]`, where each path begins.
        """
        latent = self.encode(observation)
        value, policy_logits = self._observe(latent, past, positions)
        return RootOutput(latent, value, policy_logits)

    def observe(self, action: Tensor, observation: Tensor, past: PastKeysValues, positions: Tensor) -> RootOutput:
        """Take one action in each path, then look at the real observation it led to.

        Args:
            action: int64 `[batch]`.
            observation: CartPole's own `[batch, 4]`, unscaled.
            past: the paths so far, each ending with an observation token; each row gains two tokens.
            positions: `[batch]`, of the action tokens; the observations come one later.
        """
        self._forward_token(self.action_embedding(action), past, positions)
        latent = self.encode(observation)
        value, policy_logits = self._observe(latent, past, positions + 1)
        return RootOutput(latent, value, policy_logits)

    def recurrent(self, action: Tensor, past: PastKeysValues, positions: Tensor) -> StepOutput:
        """Take one action in each path, then look at the latent it leads to.

        Args:
            action: int64 `[batch]`.
            past: the paths so far, each ending with an observation token; each row gains two tokens.
            positions: `[batch]`, of the action tokens; the predicted observations come one later.
        """
        token = self.action_embedding(action)
        hidden = self._forward_token(token, past, positions)
        latent = self.latent_norm(self.latent_head(hidden))
        reward = self.reward_head(hidden).squeeze(-1)
        termination_logit = self.termination_head(hidden).squeeze(-1)
        value, policy_logits = self._observe(latent, past, positions + 1)
        return StepOutput(latent, reward, termination_logit, value, policy_logits)

    def step(
        self, action: Tensor, observation: Tensor, is_real: Tensor, past: PastKeysValues, positions: Tensor
    ) -> StepOutput:
        """Steps of both kinds together: `observe` where a real observation is known, `recurrent` elsewhere.

        Args:
            action: int64 `[batch]`.
            observation: CartPole's own `[batch, 4]`, unscaled; whatever it is, it counts only where it is real.
            is_real: bool `[batch]`.
            past: the paths so far, each ending with an observation token; each row gains two tokens.
            positions: `[batch]`, of the action tokens; the observations come one later.
        """
        hidden = self._forward_token(self.action_embedding(action), past, positions)
        predicted = self.latent_norm(self.latent_head(hidden))
        latent = torch.where(is_real[:, None], self.encode(observation), predicted)
        reward = self.reward_head(hidden).squeeze(-1)
        termination_logit = self.termination_head(hidden).squeeze(-1)
        value, policy_logits = self._observe(latent, past, positions + 1)
        return StepOutput(latent, reward, termination_logit, value, policy_logits)

    def encode(self, observation: Tensor) -> Tensor:
        """Latents `[..., embed_dim]` of real observations `[..., 4]`."""
        latent: Tensor = self.latent_norm(self.encoder(observation / self.observation_scale))
        return latent

    def decode(self, latent: Tensor) -> Tensor:
        """Observations `[..., 4]`, in CartPole's units, that latents `[..., embed_dim]` stand for.

        Planning needs none of it: it keeps the latents from collapsing in training, and lets a person look at them.
        """
        observation: Tensor = self.decoder(latent) * self.observation_scale
        return observation

    def _observe(self, latent: Tensor, past: PastKeysValues, positions: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self._forward_token(latent, past, positions)
        value = self.value_head(hidden).squeeze(-1) * self.config.value_scale
        return value, self.policy_head(hidden)

    def _forward_token(self, token: Tensor, past: PastKeysValues, positions: Tensor) -> Tensor:
        angles, hidden = self.rotary.angles(positions), token
        for block in self.blocks:
            hidden = block(hidden, past, angles)
        output: Tensor = self.output_norm(hidden)
        return output


def load_model(path: Path | str = DEFAULT_WEIGHTS) -> WorldModel:
    """Make the trained model from a file of `torch.save`: float32, on the CPU, for evaluation, without gradients."""
    model = WorldModel()
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True)["weights"])
    return model.eval().requires_grad_(False)


def _mlp(inputs: int, outputs: int, hidden: int = 128) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.GELU(), nn.Linear(hidden, outputs))
