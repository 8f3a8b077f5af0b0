"""What the model says about nodes of a tree, as plain numbers."""

from __future__ import annotations

from typing import NamedTuple

import torch

from examples.cartpole.model import RootOutput, StepOutput


class Evaluation(NamedTuple):
    """One node. A root, which no simulated step led to, has neither reward nor termination."""

    value: float  # expected discounted return from the node on
    priors: tuple[float, ...]  # of each action
    reward: float = 0.0  # of the step that led to the node
    termination: float = 0.0  # probability that this step ended the episode


def root_evaluations(output: RootOutput) -> list[Evaluation]:
    """One evaluation for each row."""
    numbers = torch.cat((output.value[:, None], output.policy_logits.softmax(-1)), dim=1).tolist()
    return [Evaluation(value, tuple(priors)) for value, *priors in numbers]


def step_evaluations(output: StepOutput) -> list[Evaluation]:
    """One evaluation for each row."""
    # One tensor, so that a batch is fetched at once however many rows it has.
    columns = torch.stack((output.value, output.reward, output.termination_probability), dim=1)
    numbers = torch.cat((columns, output.policy_logits.softmax(-1)), dim=1).tolist()
    return [Evaluation(value, tuple(priors), reward, termination) for value, reward, termination, *priors in numbers]
