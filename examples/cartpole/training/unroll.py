"""Second part of the training: the model unrolled on its own predictions, as a search will use it.

Segments of real episodes are walked with the real actions. Only the first observation is given; each later one is the
latent predicted by the model, fed back through the cache under the same window rule as in planning, so that the model
learns with the windows, and with the errors of its own, that it will meet there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from examples.cartpole.model import RootOutput, StepOutput, WorldModel
from examples.cartpole.replay import ReplayCache
from examples.cartpole.training.policy import look
from examples.cartpole.training.transitions import Transitions


@dataclass(frozen=True)
class UnrollSettings:
    """How long and how fast the unrolled model learns, and what its errors weigh."""

    updates: int = 2000
    refresh: int = 250  # updates between two looks at the transitions with the values learned so far
    batch: int = 128  # segments
    length: int = 10  # steps of a segment
    endings: float = 0.25  # share of segments chosen to hold an end of an episode
    learning_rate: float = 1e-3  # falls along half a cosine
    warm_up: int = 100  # updates, from a hundredth of the rate to all of it
    max_gradient_norm: float = 1.0
    latent_weight: float = 1.0
    observation_weight: float = 20.0
    reward_weight: float = 1.0
    termination_weight: float = 1.0
    value_weight: float = 10.0
    policy_weight: float = 1.0


class Targets(NamedTuple):
    """What a teacher makes of every transition."""

    value: Tensor  # [steps, envs], discounted return of the teacher's own choices
    own_choice: Tensor  # bool [steps, envs]: the action was the teacher's, so the value comes from what followed
    policy: Tensor  # [steps, envs, actions], the teacher's probabilities


class Segments(NamedTuple):
    """Pieces of episodes, `length` steps each; the last observation is one more."""

    observation: Tensor  # [length + 1, batch, 4]
    action: Tensor  # int64 [length, batch]
    reward: Tensor  # [length, batch]
    terminated: Tensor  # [length, batch], float
    value: Tensor  # [length + 1, batch]
    policy: Tensor  # [length + 1, batch, actions]
    own_choice: Tensor  # [length + 1, batch], float: 1 where the value is one to learn from
    happened: Tensor  # [length, batch], float: 1 up to the step that ends the episode, itself included
    alive: Tensor  # [length + 1, batch], float: 1 where the observation was acted on


def train_unroll(
    model: WorldModel,
    transitions: Transitions,
    generator: Generator,
    settings: UnrollSettings,
    on_update: Callable[[int, Tensor], None] = lambda _update, _loss: None,
) -> None:
    """Train the whole model in place; its policy as it is now is the teacher's, its values are refined on the way."""
    teacher = copy.deepcopy(model)
    sampler = SegmentSampler(transitions, make_targets(teacher, model, transitions), generator, settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate)
    warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=settings.warm_up)
    fall = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, settings.updates - settings.warm_up))
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm_up, fall], [settings.warm_up])
    for update in range(settings.updates):
        if update > 0 and update % settings.refresh == 0:
            sampler.targets = make_targets(teacher, model, transitions)
        loss = unroll_loss(model, sampler.sample(), settings)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), settings.max_gradient_norm)
        optimizer.step()
        schedule.step()
        on_update(update, loss.detach())


@torch.no_grad()
def make_targets(teacher: WorldModel, critic: WorldModel, transitions: Transitions) -> Targets:
    """What to learn from the real observations: the teacher's policy, and the values of following it.

    The value is the real return for as long as the actions taken were those the teacher finds best, then the critic's
    estimate: what an overruled policy went on to earn says nothing about the policy (Watkins 1989, cut traces).
    """
    shape = transitions.reward.shape
    policy = look(teacher, transitions.observation.flatten(0, 1)).policy_logits.softmax(-1).view(*shape, -1)
    own_choice = transitions.action == policy.argmax(-1)
    critic_value = look(critic, transitions.observation.flatten(0, 1)).value.view(shape)
    next_value = look(critic, transitions.next_observation.flatten(0, 1)).value.view(shape)
    value = torch.empty_like(critic_value)
    later = next_value[-1]
    for step in reversed(range(len(value))):
        later = torch.where(transitions.ended[step], next_value[step], later)
        earned = transitions.reward[step] + teacher.config.discount * ~transitions.terminated[step] * later
        value[step] = later = torch.where(own_choice[step], earned, critic_value[step])
    return Targets(value, own_choice, policy)


class SegmentSampler:
    """Draws segments at random, a share of them around ends of episodes, which are rare once the policy is good."""

    def __init__(
        self, transitions: Transitions, targets: Targets, generator: Generator, settings: UnrollSettings
    ) -> None:
        self._transitions = transitions
        self.targets = targets
        self._generator = generator
        self._settings = settings
        self._last_start = len(transitions.reward) - settings.length - 1
        self._ends = transitions.terminated.nonzero()  # [ends, (step, env)]
        if self._last_start < 0 or len(self._ends) == 0:
            raise ValueError("the transitions must hold one whole segment and one end of an episode")

    def sample(self) -> Segments:
        """Draw a batch."""
        length = self._settings.length
        start, env = self._starts()
        steps = start + torch.arange(length + 1)[:, None]  # [length + 1, batch]
        transitions = self._transitions
        over = transitions.ended[steps[:-1], env].cumsum(0) > 0  # [length, batch], after the step
        alive = torch.cat((torch.ones_like(over[:1]), ~over)).float()
        # A segment's last observation is the next one of its last step: past an end, row t + 1 is another episode.
        following = transitions.next_observation[steps[:-1], env]
        return Segments(
            observation=torch.cat((transitions.observation[start, env][None], following)),
            action=transitions.action[steps[:-1], env],
            reward=transitions.reward[steps[:-1], env],
            terminated=transitions.terminated[steps[:-1], env].float(),
            value=self.targets.value[steps, env],
            policy=self.targets.policy[steps, env],
            own_choice=self.targets.own_choice[steps, env].float(),
            happened=alive[:-1],
            alive=alive,
        )

    def _starts(self) -> tuple[Tensor, Tensor]:
        batch = self._settings.batch
        start = self._integers(self._last_start + 1, batch)
        env = self._integers(self._transitions.reward.shape[1], batch)
        chosen = int(batch * self._settings.endings)
        ends = self._ends[self._integers(len(self._ends), chosen)]
        before = self._integers(self._settings.length, chosen)
        start[:chosen] = (ends[:, 0] - before).clamp(0, self._last_start)
        env[:chosen] = ends[:, 1]
        return start, env

    def _integers(self, below: int, count: int) -> Tensor:
        return torch.randint(below, (count,), generator=self._generator)


def unroll(model: WorldModel, observation: Tensor, actions: Tensor) -> tuple[RootOutput, list[StepOutput]]:
    """Walk from real observations `[batch, 4]` by `actions` `[length, batch]` on the model's own predictions."""
    batch = len(observation)
    config = model.config
    past = ReplayCache(config.num_layers, limit=config.window_limit, drop=config.tokens_per_step, rows=batch)
    position = torch.zeros(batch, dtype=torch.int64)
    root = model.initial(observation, past, position)
    steps = []
    for step, action in enumerate(actions):
        steps.append(model.recurrent(action, past, position + 1 + step * config.tokens_per_step))
        past.end_step()
    return root, steps


def unroll_loss(model: WorldModel, segments: Segments, settings: UnrollSettings) -> Tensor:
    """Weighted sum of all errors, a scalar."""
    root, steps = unroll(model, segments.observation[0], segments.action)
    latent = torch.stack([root.latent, *(step.latent for step in steps)])  # [length + 1, batch, embed_dim]
    value = torch.stack([root.value, *(step.value for step in steps)])
    log_policy = torch.stack([root.policy_logits, *(step.policy_logits for step in steps)]).log_softmax(-1)
    reward = torch.stack([step.reward for step in steps])
    termination_logit = torch.stack([step.termination_logit for step in steps])

    seen = torch.cat((torch.ones_like(segments.happened[:1]), segments.happened))
    valued = segments.alive * segments.own_choice
    value_error = (value - segments.value) / model.config.value_scale
    # The encoder must not follow the predictions, or both would agree on saying nothing.
    goal = model.encode(segments.observation[1:]).detach()
    observation_error = (model.decode(latent) - segments.observation) / model.observation_scale
    termination_error = F.binary_cross_entropy_with_logits(termination_logit, segments.terminated, reduction="none")
    return (
        settings.latent_weight * _mean((latent[1:] - goal).square().mean(-1), segments.happened)
        + settings.observation_weight * _mean(observation_error.square().mean(-1), seen)
        + settings.reward_weight * _mean((reward - segments.reward).square(), segments.happened)
        + settings.termination_weight * _mean(termination_error, segments.happened)
        + settings.value_weight * _mean(value_error.square(), valued)
        - settings.policy_weight * _mean((segments.policy * log_policy).sum(-1), segments.alive)
    )


def _mean(errors: Tensor, counted: Tensor) -> Tensor:
    return (errors * counted).sum() / counted.sum()
