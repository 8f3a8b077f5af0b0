"""How good the model is, measured on real episodes it was not trained on."""

from __future__ import annotations

import torch
from torch import Generator

from examples.cartpole.model import WorldModel
from examples.cartpole.training.policy import best_action
from examples.cartpole.training.transitions import Collector, Disturbed, Transitions
from examples.cartpole.training.unroll import SegmentSampler, UnrollSettings, make_targets, unroll

EPISODE_STEPS = 500  # CartPole-v1 runs out of time there


def policy_returns(model: WorldModel, *, episodes: int, seed: int) -> list[int]:
    """Returns of whole episodes in which the likeliest action is taken, without any search."""
    collector = Collector(episodes, seed)
    try:
        transitions = collector.collect(lambda observation: best_action(model, observation), EPISODE_STEPS)
    finally:
        collector.close()
    return [int(ended.nonzero()[0]) + 1 for ended in transitions.ended.T]


def disturbed_transitions(model: WorldModel, *, envs: int, steps: int, seed: int) -> Transitions:
    """Episodes of the policy with bursts of pushes that bring it near the edge and over."""
    generator = torch.Generator().manual_seed(seed)
    collector = Collector(envs, seed)
    policy = Disturbed(lambda observation: best_action(model, observation), envs, generator)
    try:
        return collector.collect(policy, steps)
    finally:
        collector.close()


@torch.no_grad()
def prediction_errors(
    model: WorldModel, transitions: Transitions, generator: Generator, *, segments: int, length: int
) -> dict[str, float]:
    """Errors after each of `length` steps on the model's own predictions, all over segments half of which hold an end.

    For step `k`: `observation_k`, root mean square in units of the observation scale; `termination_k`, share of steps
    whose end or going on was called wrongly; `reward_k`, the largest; `value_k`, root mean square, against the real
    returns; `policy_k`, share of steps where another action is likeliest than at the real observation.
    """
    settings = UnrollSettings(batch=segments, length=length, endings=0.5)
    drawn = SegmentSampler(transitions, make_targets(model, model, transitions), generator, settings).sample()
    _, steps = unroll(model, drawn.observation[0], drawn.action)
    errors = {}
    for index, step in enumerate(steps):
        happened = drawn.happened[index] > 0
        alive = drawn.alive[index + 1] > 0
        valued = alive & (drawn.own_choice[index + 1] > 0)
        observation = (model.decode(step.latent) - drawn.observation[index + 1])[happened] / model.observation_scale
        called = (step.termination_logit > 0) == (drawn.terminated[index] > 0)
        agrees = step.policy_logits.argmax(-1) == drawn.policy[index + 1].argmax(-1)
        number = index + 1
        errors[f"observation_{number}"] = observation.square().mean().sqrt().item()
        errors[f"termination_{number}"] = 1.0 - called[happened].float().mean().item()
        errors[f"reward_{number}"] = (step.reward - drawn.reward[index])[happened].abs().max().item()
        errors[f"value_{number}"] = (step.value - drawn.value[index + 1])[valued].square().mean().sqrt().item()
        errors[f"policy_{number}"] = 1.0 - agrees[alive].float().mean().item()
    return errors
