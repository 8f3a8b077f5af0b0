"""First part of the training: value and policy at real observations, by PPO (Schulman et al. 2017) on real episodes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from examples.cartpole.model import RootOutput, WorldModel
from examples.cartpole.replay import ReplayCache
from examples.cartpole.training.transitions import Collector, Transitions


@dataclass(frozen=True)
class PolicySettings:
    """How long and how fast the policy learns."""

    rounds: int = 200
    steps: int = 32  # of each environment, per round
    epochs: int = 12  # gradient steps per round, each on the whole round
    learning_rate: float = 1e-3  # falls linearly to zero, as does the clip range
    clip: float = 0.2
    gae_lambda: float = 0.9
    value_weight: float = 5.0  # values count as fractions of the value scale, so their errors are small numbers
    observation_weight: float = 2.0  # of what `decode` gets wrong: latents keep what the policy has no use for yet
    max_gradient_norm: float = 0.5


def look(model: WorldModel, observation: Tensor) -> RootOutput:
    """Value and policy of real observations `[batch, 4]`, each the first token of a path of its own."""
    batch = len(observation)
    config = model.config
    past = ReplayCache(config.num_layers, limit=config.window_limit, drop=config.tokens_per_step, rows=batch)
    return model.initial(observation, past, torch.zeros(batch, dtype=torch.int64))


@torch.no_grad()
def best_action(model: WorldModel, observation: Tensor) -> Tensor:
    """Action the policy finds likeliest: int64 `[batch]`."""
    return look(model, observation).policy_logits.argmax(-1)


def train_policy(
    model: WorldModel,
    collector: Collector,
    generator: Generator,
    settings: PolicySettings,
    on_round: Callable[[int, Transitions], None] = lambda _round, _transitions: None,
) -> Transitions:
    """Train value and policy in place; return every transition seen on the way."""
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.learning_rate)
    seen = []

    @torch.no_grad()
    def sampled(observation: Tensor) -> Tensor:
        probabilities = look(model, observation).policy_logits.softmax(-1)
        return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)

    for index in range(settings.rounds):
        left = 1.0 - index / settings.rounds
        optimizer.param_groups[0]["lr"] = settings.learning_rate * left
        transitions = collector.collect(sampled, settings.steps)
        _improve(model, optimizer, transitions, settings, clip=settings.clip * left)
        seen.append(transitions)
        on_round(index, transitions)
    return Transitions.joined(seen)


def advantages(transitions: Transitions, value: Tensor, next_value: Tensor, *, discount: float, decay: float) -> Tensor:
    """Generalised advantage estimates (Schulman et al. 2015), `[steps, envs]` like the values.

    An episode that ran out of time goes on in the model's eyes: its last value counts. One that ended does not.
    """
    goes_on = (~transitions.terminated).float()
    surprise = transitions.reward + discount * goes_on * next_value - value
    carried = torch.zeros_like(value[0])
    result = torch.empty_like(value)
    for step in reversed(range(len(value))):
        carried = surprise[step] + discount * decay * (~transitions.ended[step]) * carried
        result[step] = carried
    return result


def _improve(
    model: WorldModel, optimizer: torch.optim.Optimizer, transitions: Transitions, settings: PolicySettings, clip: float
) -> None:
    observation = transitions.observation.flatten(0, 1)
    action = transitions.action.flatten()[:, None]
    with torch.no_grad():
        before = look(model, observation)
        old_log_probability = before.policy_logits.log_softmax(-1).gather(1, action).squeeze(1)
        next_value = look(model, transitions.next_observation.flatten(0, 1)).value
        shape = transitions.reward.shape
        advantage = advantages(
            transitions,
            before.value.view(shape),
            next_value.view(shape),
            discount=model.config.discount,
            decay=settings.gae_lambda,
        ).flatten()
        target = advantage + before.value
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    for _ in range(settings.epochs):
        output = look(model, observation)
        log_policy = output.policy_logits.log_softmax(-1)
        ratio = (log_policy.gather(1, action).squeeze(1) - old_log_probability).exp()
        gain = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage).mean()
        value_loss = F.mse_loss(output.value / model.config.value_scale, target / model.config.value_scale)
        observation_error = (model.decode(output.latent) - observation) / model.observation_scale
        observation_loss = observation_error.square().mean()
        loss = settings.value_weight * value_loss + settings.observation_weight * observation_loss - gain
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), settings.max_gradient_norm)
        optimizer.step()
