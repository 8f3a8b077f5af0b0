"""A small transformer over batches of fixed shape, as a function of tensors alone, which compilers and graphs take."""

from __future__ import annotations

import os
import random
import shutil
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from concurrent_kv import DropOldest, KeysValues, KVCacheManager
from concurrent_kv.evaluation import NO_PARENT, Evaluated, Evaluator, Leaf
from concurrent_kv.pool.joint import JointBatch

LAYERS, HEADS, HEAD_DIM, WINDOW, NEW, ACTIONS = 2, 2, 8, 12, 2, 16
WIDTH = HEADS * HEAD_DIM
ENVS = 4
SECONDS_TO_COMPILE = 600.0  # in which the slowest machine does it
OVERFLOW = DropOldest(limit=WINDOW - NEW + 1, count=NEW, step=NEW)

# What a compiler is given: past keys and values `[2 * layers, rows, heads, window, head_dim]`, padding `[rows]`, tokens
# `[rows, new]`. What it makes: values `[rows]`, new keys and new values `[layers, rows, heads, new, head_dim]`.
Step: TypeAlias = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


class Transformer(nn.Module):
    """Reads the past where it lies, and returns what is to be appended instead of appending it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(ACTIONS, WIDTH)
        self.inputs = nn.ModuleList([nn.Linear(WIDTH, 3 * WIDTH) for _ in range(LAYERS)])
        self.outputs = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)])
        self.value = nn.Linear(WIDTH, 1)

    def forward(self, past: Tensor, padding: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows, window, new = past.shape[1], past.shape[3], tokens.shape[1]
        start = window - new  # a constant: what was gathered ends at the same column in every batch
        column = torch.arange(window, device=past.device)
        seen = column >= padding[:, None, None, None]
        seen = seen & (column <= start + torch.arange(new, device=past.device)[:, None])
        x = self.embedding(tokens)
        made: list[tuple[Tensor, Tensor]] = []
        for layer, (inputs, outputs) in enumerate(zip(self.inputs, self.outputs, strict=True)):
            queries, keys, values = (
                part.view(rows, new, HEADS, HEAD_DIM).transpose(1, 2) for part in inputs(x).chunk(3, -1)
            )
            all_keys = torch.cat([past[layer, :, :, :start], keys], 2)
            all_values = torch.cat([past[LAYERS + layer, :, :, :start], values], 2)
            found = F.scaled_dot_product_attention(queries, all_keys, all_values, attn_mask=seen)
            x = torch.tanh(x + outputs(found.transpose(1, 2).reshape(rows, new, WIDTH)))
            made.append((keys, values))
        return self.value(x[:, -1])[:, 0], torch.stack([k for k, _ in made]), torch.stack([v for _, v in made])


def new_transformer(device: torch.device | str = "cpu") -> Transformer:
    """The same one each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return Transformer().to(device).eval()


def new_manager(device: torch.device | str = "cpu") -> KVCacheManager:
    """A manager whose init pools have a root of `env + 1` tokens each, under the key "root"."""
    config = {
        "num_layers": LAYERS,
        "num_heads": HEADS,
        "embed_dim": WIDTH,
        "context_length": WINDOW,
        "num_simulations": 60,
        "max_cache_size": 1000,
        "device": str(device),
    }
    manager = KVCacheManager(config, ENVS)
    for env in range(ENVS):
        numbers = torch.randn(2 * LAYERS, 1, HEADS, env + 1, HEAD_DIM, generator=torch.Generator().manual_seed(env))
        manager.set_init_cache(env, "root", KeysValues.from_packed(numbers.to(device)))
    return manager


class FixedShapes:
    """A model for evaluators around a step. `beyond`: what it said of the rows after its leaves'."""

    def __init__(self, step: Step) -> None:
        self.beyond: list[float] = []
        self._step = step

    def __call__(self, batch: JointBatch, actions: Sequence[int]) -> Evaluated[float]:
        with torch.inference_mode():
            tokens = tokens_of(actions, batch.batch_size).to(batch.data.device)
            values, new_keys, new_values = self._step(batch.data, batch.padding, tokens)
            batch.append_layers(new_keys, new_values)
            found = values.tolist()
        self.beyond += found[len(actions) :]
        return Evaluated(found[: len(actions)])


def append_zeros(batch: JointBatch) -> None:
    """What a model appends whose values nobody looks at."""
    new = torch.zeros(LAYERS, batch.batch_size, HEADS, NEW, HEAD_DIM, device=batch.data.device)
    batch.append_layers(new, new)


def tokens_of(actions: Sequence[int], rows: int) -> Tensor:
    """Two tokens for each action, and any for the rows after them."""
    numbers = [*actions, *range(rows - len(actions))]
    return torch.tensor([[number % ACTIONS, (3 * number + 1) % ACTIONS] for number in numbers])


Turns = list[list[tuple[int, Any, Any, int]]]  # the leaves of each turn: environment, parent, child, action


def turns_of(seed: int, rows: Sequence[int]) -> Turns:
    """Trees of all environments that grow by so many leaves a turn, some of which share a parent."""
    draw = random.Random(seed)
    known: dict[int, list[Any]] = {env: ["root"] for env in range(ENVS)}
    turns: Turns = []
    for turn, number in enumerate(rows):
        envs = [draw.randrange(ENVS) for _ in range(number)]
        turns.append(
            [(env, draw.choice(known[env][-3:]), (turn, leaf), draw.randrange(90)) for leaf, env in enumerate(envs)]
        )
        for env, _, child, _ in turns[-1]:
            known[env].append(child)
    return turns


def play(evaluator: Evaluator[int, float], manager: KVCacheManager, turns: Turns) -> tuple[list[float], list[Tensor]]:
    """What the evaluator's model says of each leaf, and what is stored of it; of nothing else."""
    values: list[float] = []
    stored: list[Tensor] = []
    with manager.search(range(ENVS), overflow=OVERFLOW) as search:
        for turn in turns:
            values += evaluator.evaluate_many(
                [Leaf(search, parent, child, action, env) for env, parent, child, action in turn]
            )
            for env, _, child, _ in turn:
                with search.gather([child], [env]) as batch:
                    stored.append(batch.data.clone())
        assert len(search) == len(values)
    return values, stored


def warm_up(evaluator: Evaluator[int, Any], manager: KVCacheManager, sizes: Sequence[int]) -> None:
    """Have a model compiled or captured for each size before a search waits for it. Nothing stays stored."""
    with manager.search([0]) as search:
        for size in sizes:
            evaluator.evaluate_many(
                [Leaf(search, NO_PARENT, row, 0, 0) for row in range(size)], timeout=SECONDS_TO_COMPILE
            )


def why_no_inductor() -> str:
    """Why torch's own compiler cannot be tried here; empty if it can."""
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++")):
        return "torch.compile's own backend needs a C++ compiler, and there is none here"
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return "torch.compile's own backend needs Python's headers, and there are none here"
    return ""


BACKENDS: list[Any] = [
    "aot_eager",
    pytest.param("inductor", marks=pytest.mark.skipif(bool(why_no_inductor()), reason=why_no_inductor())),
]
