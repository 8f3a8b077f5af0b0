"""The model as a search calls it: a step of all rows as one call of torch, traced over plain tensors.

Eagerly a step is some two hundred calls of torch's operators. Each lets go of the GIL and takes it again, and other
threads that search get in between. Traced it is one call, which does without the GIL from its beginning to its end, and
takes half the time: there is no Python between the operators.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor, nn

from concurrent_kv.evaluation import JointBatch
from examples.cartpole.episode import numbers_of
from examples.cartpole.model import WorldModel


class Steps:
    """What a model says of steps. Threads may share it; what is loaded into the model later counts here too.

    Tracing takes a second. It changes nothing that a model says, but for rounding.

    Attributes:
        tokens: that a step adds to a path.
    """

    def __init__(self, model: WorldModel) -> None:
        self.tokens = model.config.tokens_per_step
        self._recurrent = _traced(model)
        self._step = _traced(model, real=True)

    def recurrent(self, actions: Tensor, batch: JointBatch, positions: Tensor) -> Tensor:
        """`numbers_of` what `WorldModel.recurrent` says, with the paths in a batch that has room for a step only."""
        return self._run(self._recurrent, batch, actions, positions)

    def step(
        self, actions: Tensor, observation: Tensor, is_real: Tensor, batch: JointBatch, positions: Tensor
    ) -> Tensor:
        """`numbers_of` what `WorldModel.step` says, in the same way."""
        return self._run(self._step, batch, actions, positions, observation, is_real)

    def _run(self, traced: Callable[..., Tensor], batch: JointBatch, *given: Tensor) -> Tensor:
        if batch.room != self.tokens:  # what is traced writes to the last columns, whatever is there
            raise ValueError(f"the batch must have room for the {self.tokens} tokens of a step, got {batch.room}")
        numbers = traced(batch.data, batch.padding, *given)
        batch.advance(self.tokens)
        return numbers


@lru_cache(maxsize=1)
def steps_of(model: WorldModel) -> Steps:
    """Those of a model: traced once."""
    return Steps(model)


class _Step(nn.Module):
    """A step as a function of tensors. It writes K and V of its tokens to the last columns of `data`."""

    def __init__(self, model: WorldModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, data: Tensor, padding: Tensor, actions: Tensor, positions: Tensor, *real: Tensor) -> Tensor:
        past = _Columns(data, padding, free=self.model.config.tokens_per_step)
        if real:
            observation, is_real = real
            return numbers_of(self.model.step(actions, observation, is_real, past, positions))
        return numbers_of(self.model.recurrent(actions, past, positions))


class _Columns:
    """`PastKeysValues` in a buffer `[2 * layers, batch, heads, columns, head_dim]`, whose last columns are free."""

    def __init__(self, data: Tensor, padding: Tensor, *, free: int) -> None:
        self.padding = padding
        keys, values = data.chunk(2)
        self._layers = list(zip(keys.unbind(), values.unbind(), strict=True))
        self._free = [free] * len(self._layers)

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write a token of each row to the first free column; return what is before the next one."""
        all_keys, all_values = self._layers[layer]
        column = -self._free[layer]  # from the right: a trace has no other number of the columns
        all_keys[:, :, column] = keys[:, :, 0]
        all_values[:, :, column] = values[:, :, 0]
        self._free[layer] -= 1
        end = column + 1 or None
        return all_keys[:, :, :end], all_values[:, :, :end]


def _traced(model: WorldModel, *, real: bool = False) -> Callable[..., Tensor]:
    step = _Step(model)
    if sys.version_info >= (3, 14):
        return step  # torch says of a trace that it may break there
    config, rows = model.config, 2  # of the example that is traced: any others will do
    data = torch.zeros(2 * config.num_layers, rows, config.num_heads, config.context_length, config.head_dim)
    numbers = torch.zeros(rows, dtype=torch.int64)
    seen = torch.zeros(rows, config.observation_size), torch.ones(rows, dtype=torch.bool)
    with warnings.catch_warnings(), torch.no_grad():
        # What torch would have instead has to be compiled first, and some of it holds the GIL while it runs.
        warnings.filterwarnings("ignore", "`torch.jit.trace", DeprecationWarning)
        traced: Callable[..., Tensor] = torch.jit.trace(  # type: ignore[no-untyped-call]
            step, (data, numbers, numbers, numbers, *(seen if real else ())), check_trace=False
        )
    return traced
