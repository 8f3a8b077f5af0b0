"""An episode, what a search asks of the model, and what the model answers, as plain numbers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from examples.cartpole.model import ModelConfig, RootOutput, StepOutput
from examples.cartpole.tree import Edge, Evaluation


@dataclass(eq=False)
class Episode:
    """What was observed and done so far; the newest observation waits for its action.

    Its environment's task appends to it, and only while no search is under way from it.
    """

    index: int
    env_id: int
    observations: list[Tensor]  # float32 [4] each, one more than actions
    actions: list[int] = field(default_factory=list)

    @property
    def time(self) -> int:
        """Steps taken."""
        return len(self.actions)


class Asked(NamedTuple):
    """A step to be evaluated: a real one of an episode, or one that its search tries."""

    episode: Episode
    time: int  # steps of the episode before the newest observation that is known
    edge: Edge | None = None  # from a node of the tree; the step that led to that observation if None

    @property
    def action(self) -> int:
        """The step's."""
        return self.episode.actions[self.time - 1] if self.edge is None else self.edge.action


def next_position(config: ModelConfig, steps: int) -> int:
    """Absolute position, in tokens, of the action token that follows `steps` steps."""
    return 1 + steps * config.tokens_per_step


def numbers_of(output: StepOutput) -> Tensor:
    """What a search needs to know of each row, in one tensor, which is fetched at once however many rows there are.

    Float32 `[batch, 3 + actions]`: reward, probability that the episode ends, value, priors of the actions.
    """
    said = output.reward, output.termination_probability, output.value
    return torch.cat((torch.stack(said, dim=1), output.policy_logits.softmax(-1)), dim=1)


def evaluations_in(numbers: Tensor) -> list[Evaluation]:
    """One evaluation for each row of what `numbers_of` returns."""
    return [Evaluation(value, tuple(priors), reward, ends) for reward, ends, value, *priors in numbers.tolist()]


def evaluations_of(output: RootOutput | StepOutput) -> list[Evaluation]:
    """One evaluation for each row."""
    if isinstance(output, StepOutput):
        return evaluations_in(numbers_of(output))
    rows = torch.cat((output.value[:, None], output.policy_logits.softmax(-1)), dim=1).tolist()
    return [Evaluation(value, tuple(priors)) for value, *priors in rows]
