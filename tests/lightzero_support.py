"""LightZero's released world models in the shapes of its own configurations, and searches over them.

Needs LightZero: import it behind `pytest.importorskip("lzero")`.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from easydict import EasyDict
from torch import Tensor

torch.set_num_threads(1)  # more only get in each other's way: the matrices are small

__all__ = [
    "PATIENCE",
    "SHAPES",
    "Shape",
    "Token",
    "Walk",
    "assert_same_outputs",
    "contexts_of",
    "make_world_model",
    "quietly",
    "recomputed",
]

PATIENCE = 600.0  # seconds: what waits for LightZero, whose import alone may take a minute on a loaded machine

Token = tuple[str, Any, int]  # "obs_embeddings" or "act_tokens"; its state or action; its position in steps


@dataclass(frozen=True)
class Shape:
    """A workload's world model; tokens a step, heads and the rest as LightZero's configuration of that name has it."""

    num_layers: int
    num_heads: int
    embed_dim: int
    context_length: int
    rotary_emb: bool
    num_simulations: int
    observation: int | tuple[int, int, int]
    action_space_size: int
    continuous: bool = False
    env_num: int = 8
    max_blocks: int = 10


SHAPES = {
    "cartpole": Shape(2, 2, 64, 8, True, 25, observation=4, action_space_size=2),
    "lunarlander": Shape(4, 4, 256, 8, False, 25, observation=8, action_space_size=4),
    "atari": Shape(2, 8, 768, 8, False, 50, observation=(3, 64, 64), action_space_size=6),
    "dmc": Shape(2, 8, 768, 4, False, 50, observation=5, action_space_size=1, continuous=True, max_blocks=5),
}


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """LightZero prints every layer that it makes."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def is_main() -> bool:
    """Whether the LightZero that is imported is a checkout of its main branch, rather than 0.2.0."""
    from lzero.model.unizero_world_models.world_model import WorldModel

    return hasattr(WorldModel, "_variable_context_lengths")


def make_world_model(
    shape: Shape, *, seed: int = 0, zero_heads: bool = False, device: str | None = None, **changes: Any
) -> Any:
    """A released `WorldModel` in evaluation mode.

    Args:
        shape: which.
        zero_heads: leave the last layers of the heads at zero, as LightZero begins its training.
        device: "cpu" or "cuda"; a GPU where there is one if left out.
        changes: settings of the world model's configuration.
    """
    os.environ.setdefault("MPLBACKEND", "Agg")
    with quietly():
        from lzero.model.sampled_unizero_model import SampledUniZeroModel
        from lzero.model.unizero_model import UniZeroModel
        from lzero.policy.unizero import UniZeroPolicy

        config = EasyDict(UniZeroPolicy.config["model"]["world_model_cfg"])
        config.update(
            num_layers=shape.num_layers,
            num_heads=shape.num_heads,
            embed_dim=shape.embed_dim,
            context_length=shape.context_length,
            rotary_emb=shape.rotary_emb,
            max_blocks=shape.max_blocks,
            max_tokens=2 * shape.max_blocks,
            obs_type="image" if isinstance(shape.observation, tuple) else "vector",
            action_space_size=shape.action_space_size,
            continuous_action_space=shape.continuous,
            num_simulations=shape.num_simulations,
            env_num=shape.env_num,
            device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
            sigma_type="conditioned",
            fixed_sigma_value=0.5,
            bound_type=None,
            norm_type="BN",
            **changes,
        )
        torch.manual_seed(seed)
        # Only the one takes continuous actions, and on the main branch vectors too.
        is_sampled = shape.continuous or (is_main() and isinstance(shape.observation, int))
        made = SampledUniZeroModel if is_sampled else UniZeroModel
        # With images that one makes a perceptual loss, which only training asks, and which needs torchvision.
        loss = SimpleNamespace(LPIPS=torch.nn.Identity)
        with mock.patch.dict(sys.modules, {"lzero.model.unizero_world_models.lpips": loss}):
            model = made(
                observation_shape=shape.observation,
                action_space_size=shape.action_space_size,
                norm_type="BN",
                world_model_cfg=config,
            )
    world_model = model.world_model.eval()
    world_model.to(world_model.device)
    if not zero_heads:
        for parameter in world_model.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.3)
    if not shape.rotary_emb:
        world_model.precompute_pos_emb_diff_kv()
    return world_model


@dataclass
class Walk:
    """Searches over several episodes, the same for every model that is walked: which nodes and actions are drawn.

    One `root()` and many `simulate()` make a search, `act()` ends it. Trees grow at random, and no edge twice; what the
    models answer decides nothing but the states they are asked for next, which are the first model's.
    """

    shape: Shape
    env_num: int
    seed: int = 0
    timestep: Any = field(init=False)

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(self.seed)
        self.generator = torch.Generator().manual_seed(self.seed)
        self.new_episode()

    def new_episode(self) -> None:
        """The next root begins an episode in every environment."""
        self.rows = self.env_num
        self.observation = self._observe()
        self.action: list[Any] = [-1] * self.rows
        self.timestep = np.zeros(self.rows, dtype=np.int64)

    def _observe(self) -> Tensor:
        size = self.shape.observation
        return torch.randn(self.rows, *(size if isinstance(size, tuple) else (size,)), generator=self.generator)

    def _draw_actions(self) -> list[Any]:
        if self.shape.continuous:
            size = (self.rows, self.shape.action_space_size)
            return list(self.random.uniform(-1, 1, size).astype(np.float32))
        return list(self.random.integers(0, self.shape.action_space_size, self.rows))

    def root(self, models: Sequence[Any], current: Tensor | None = None) -> list[tuple[Any, ...]]:
        """A new search, from `current` where it is given; returns what each model answers."""
        current = self._observe() if current is None else current
        device = models[0].device
        asked = {"obs": self.observation.to(device), "action": self.action, "current_obs": current.to(device)}
        answers = [model.forward_initial_inference(dict(asked), self.timestep) for model in models]
        self.observation, self.action = current, self._draw_actions()
        self.nodes = [answers[0][1].cpu().numpy()]
        self.depths = [np.zeros(self.rows, dtype=np.int64)]
        self.edges: set[tuple[int, int, int]] = set()
        self.simulation = 0
        return answers

    def simulate(self, models: Sequence[Any], parents: Sequence[int] | None = None) -> list[tuple[Any, ...]]:
        """One simulated step of every environment, from `parents` where they are given; what each model answers."""
        drawn = [self._edge(row, None if parents is None else parents[row]) for row in range(self.rows)]
        states = np.stack([self.nodes[parent][row] for row, (parent, _) in enumerate(drawn)])
        depths = np.array([self.depths[parent][row] for row, (parent, _) in enumerate(drawn)])
        actions = torch.from_numpy(np.array([action for _, action in drawn])).to(models[0].device)
        answers = [
            model.forward_recurrent_inference([(states, actions)], self.simulation, depths.tolist(), self.timestep)
            for model in models
        ]
        self.nodes.append(answers[0][1].cpu().numpy())
        self.depths.append(depths + 1)
        self.simulation += 1
        return answers

    def _edge(self, row: int, parent: int | None) -> tuple[int, Any]:
        """A node of a row's tree and an action that was not tried there yet."""
        while True:
            node = int(self.random.integers(0, len(self.nodes))) if parent is None else parent
            if self.shape.continuous:
                return node, self.random.uniform(-1, 1, self.shape.action_space_size).astype(np.float32)
            action = int(self.random.integers(0, self.shape.action_space_size))
            if (row, node, action) not in self.edges:
                self.edges.add((row, node, action))
                return node, action

    def act(self) -> None:
        """The environments step on."""
        self.timestep = self.timestep + 1

    def lose_root(self, row: int) -> None:
        """The next root of `row` follows a state that no cache knows, so its context is shorter than the others'."""
        self.observation = self.observation.clone()
        self.observation[row] += 1

    def finish(self, row: int) -> None:
        """The environment of a row has ended: later rows move up, in what comes; what came before still has its row."""
        self.rows -= 1
        self.timestep = np.delete(self.timestep, row)


def assert_same_outputs(answers: Sequence[tuple[Any, ...]]) -> None:
    """Every model gave the same outputs, bit for bit."""
    first, *others = answers
    for other in others:
        for ours, theirs in zip(first, other, strict=True):
            assert (ours is None) == (theirs is None)
            if ours is not None:
                assert torch.equal(ours, theirs)


def contexts_of(model: Any, states: Any, start_pos: Any = (0, 0, 0, 0)) -> list[Tensor]:
    """What a model retrieves for each row's state: `[2 * layers, heads, tokens, head_dim]` of its valid tokens."""
    model.keys_values_wm_list, model.keys_values_wm_size_list = [], []
    positions = torch.tensor(start_pos)
    model.keys_values_wm_size_list = model.retrieve_or_generate_kvcache(states, len(states), 0, positions)
    lengths = model.trim_and_pad_kv_cache(is_init_infer=False)
    layers = list(model.keys_values_wm._keys_values)
    caches = [layer._k_cache for layer in layers] + [layer._v_cache for layer in layers]
    packed = torch.stack([cache._cache[:, :, : cache._size] for cache in caches])
    return [packed[:, row, :, packed.shape[3] - length :].clone() for row, length in enumerate(lengths)]


def recomputed(model: Any, tokens: Sequence[Token]) -> Tensor:
    """K and V of a path of tokens, computed from nothing: `[2 * layers, heads, tokens, head_dim]`."""
    kv = model.transformer.generate_empty_keys_values(n=1, max_tokens=model.context_length)
    with torch.no_grad():
        for kind, value, position in tokens:
            is_number = kind == "act_tokens" and not model.continuous_action_space
            shape = (1, 1) if is_number else (1, 1, -1)
            model.forward(
                {kind: torch.as_tensor(value).reshape(shape)},
                past_keys_values=kv,
                is_init_infer=True,
                start_pos=position,
            )
    layers = list(kv._keys_values)
    return torch.stack([layer._k_cache.get()[0] for layer in layers] + [layer._v_cache.get()[0] for layer in layers])
