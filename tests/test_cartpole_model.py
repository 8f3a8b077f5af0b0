"""Promises of the CartPole world model, its plain cache and its training."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from examples.cartpole.episode import numbers_of
from examples.cartpole.model import DEFAULT_WEIGHTS, RootOutput, RotaryEmbedding, StepOutput, WorldModel, load_model
from examples.cartpole.replay import ReplayCache, replay_path
from examples.cartpole.steps import Steps
from examples.cartpole.training.__main__ import TrainSettings, save_model, train
from examples.cartpole.training.figures import disturbed_transitions, policy_returns, prediction_errors
from examples.cartpole.training.policy import PolicySettings, advantages
from examples.cartpole.training.transitions import Transitions
from examples.cartpole.training.unroll import UnrollSettings, make_targets

ROUNDING = 1e-5  # of outputs around 1; values are compared as fractions of the value scale
# Steps, largest root mean square error of the observation in units of its scale, largest share of wrong endings. The
# committed weights' own figures, in their metadata, are about half of these.
BOUNDS = [(1, 0.07, 0.04), (5, 0.07, 0.04), (10, 0.08, 0.05)]
PATHS: list[list[int]] = [[], [1], [0, 1], [1, 1, 0], [0, 1, 0, 1, 1, 0]]  # actions; lengths 1, 3, 5, 5, 5


class PaddedCache:
    """Paths of different lengths in one batch, left-padded with `filling`."""

    def __init__(self, caches: list[ReplayCache], filling: float) -> None:
        longest = max(len(cache) for cache in caches)
        self.padding = torch.tensor([longest - len(cache) for cache in caches])
        keys, values = zip(*(cache.keys_values() for cache in caches), strict=True)
        self.keys = self._padded(keys, longest, filling)  # [layers, batch, heads, tokens, head_dim]
        self.values = self._padded(values, longest, filling)

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        self.keys[layer] = torch.cat((self.keys[layer], keys), dim=2)
        self.values[layer] = torch.cat((self.values[layer], values), dim=2)
        return self.keys[layer], self.values[layer]

    @staticmethod
    def _padded(rows: tuple[Tensor, ...], longest: int, filling: float) -> list[Tensor]:
        layers, heads, _, head_dim = rows[0].shape
        batch = torch.full((layers, len(rows), heads, longest, head_dim), filling)
        for index, row in enumerate(rows):
            batch[:, index, :, longest - row.shape[2] :] = row
        return list(batch)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model() -> WorldModel:
    return load_model()


@pytest.fixture(scope="module")
def real(model: WorldModel) -> Transitions:
    return disturbed_transitions(model, envs=4, steps=600, seed=7)


def observations(count: int) -> Tensor:
    return torch.randn(count, 4, generator=Generator().manual_seed(3)) * torch.tensor([1.0, 1.0, 0.1, 1.0])


def step_together(model: WorldModel, filling: float = 0.0, first_position: int = 0) -> StepOutput:
    """One step of all `PATHS` in a padded batch."""
    starts = observations(len(PATHS))
    replays = [replay_path(model, starts[row], actions, first_position) for row, actions in enumerate(PATHS)]
    past = PaddedCache([replay.cache for replay in replays], filling)
    positions = torch.tensor([first_position + 1 + 2 * len(actions) for actions in PATHS])
    return model.recurrent(torch.tensor([row % 2 for row in range(len(PATHS))]), past, positions)


def differences(model: WorldModel, left: StepOutput, right: StepOutput) -> list[float]:
    scales = StepOutput(*(torch.ones(()) for _ in left))._replace(value=torch.tensor(model.config.value_scale))
    return [((a - b) / scale).abs().max().item() for a, b, scale in zip(left, right, scales, strict=True)]


def test_a_batched_step_equals_the_steps_taken_one_by_one(model: WorldModel) -> None:
    together = step_together(model)
    starts = observations(len(PATHS))
    for row, actions in enumerate(PATHS):
        alone = replay_path(model, starts[row], [*actions, row % 2]).output
        assert isinstance(alone, StepOutput)
        assert max(differences(model, StepOutput(*(field[row : row + 1] for field in together)), alone)) < ROUNDING


def test_a_step_of_both_kinds_equals_a_real_one_and_a_predicted_one(model: WorldModel) -> None:
    starts, seen = observations(len(PATHS)), observations(2 * len(PATHS))[len(PATHS) :]
    actions, positions = torch.tensor([0, 1, 1, 0, 1]), torch.tensor([1 + 2 * len(path) for path in PATHS])

    def past() -> PaddedCache:
        return PaddedCache(
            [replay_path(model, start, path).cache for start, path in zip(starts, PATHS, strict=True)], 0
        )

    is_real = torch.tensor([True, False, True, True, False])
    mixed_past, real_past, predicted_past = past(), past(), past()
    mixed = model.step(actions, seen, is_real, mixed_past, positions)
    real = model.observe(actions, seen, real_past, positions)
    predicted = model.recurrent(actions, predicted_past, positions)
    for name in RootOutput._fields:
        assert torch.allclose(getattr(mixed, name)[is_real], getattr(real, name)[is_real], atol=ROUNDING), name
    for name in StepOutput._fields:
        assert torch.allclose(getattr(mixed, name)[~is_real], getattr(predicted, name)[~is_real], atol=ROUNDING), name
    for layer in range(model.config.num_layers):
        for rows, other in ((is_real, real_past), (~is_real, predicted_past)):
            assert torch.allclose(mixed_past.keys[layer][rows], other.keys[layer][rows], atol=ROUNDING)
            assert torch.allclose(mixed_past.values[layer][rows], other.values[layer][rows], atol=ROUNDING)
    assert not torch.allclose(real.value, predicted.value)


class Columns:
    """A batch as `Steps` see one: the paths in a buffer whose last columns are free."""

    def __init__(self, past: PaddedCache, room: int) -> None:
        self.padding, self.room = past.padding, room
        self.data = torch.nn.functional.pad(
            torch.cat((torch.stack(past.keys), torch.stack(past.values))), (0, 0, 0, room)
        )
        self.advanced = 0

    def advance(self, tokens: int) -> None:
        self.advanced += tokens


def with_new_weights(model: WorldModel) -> WorldModel:
    changed = WorldModel(model.config).eval().requires_grad_(False)
    changed.load_state_dict({name: weight * 1.1 for name, weight in model.state_dict().items()})
    return changed


@pytest.mark.parametrize("new_weights", [False, True])
def test_traced_steps_say_and_append_what_the_model_does(model: WorldModel, new_weights: bool) -> None:
    traced = WorldModel(model.config).eval().requires_grad_(False)
    steps = Steps(traced)
    traced.load_state_dict((with_new_weights(model) if new_weights else model).state_dict())
    for paths in (PATHS, PATHS[:1], PATHS[1:2] * 9):  # of other sizes than the batch that was traced
        starts, seen = observations(len(paths)), observations(2 * len(paths))[len(paths) :]
        actions = torch.tensor([row % 2 for row in range(len(paths))])
        positions = torch.tensor([1 + 2 * len(path) for path in paths])
        replays = [replay_path(traced, start, path).cache for start, path in zip(starts, paths, strict=True)]
        for is_real in (None, actions == 0):
            past = PaddedCache(replays, 0.0)
            batch: Any = Columns(PaddedCache(replays, 0.0), room=steps.tokens)
            if is_real is None:
                expected = traced.recurrent(actions, past, positions)
                numbers = steps.recurrent(actions, batch, positions)
            else:
                expected = traced.step(actions, seen, is_real, past, positions)
                numbers = steps.step(actions, seen, is_real, batch, positions)
            assert torch.allclose(numbers, numbers_of(expected), rtol=1e-4, atol=ROUNDING)
            assert torch.allclose(batch.data, torch.stack([*past.keys, *past.values]), atol=ROUNDING)
            assert batch.advanced == steps.tokens


def test_traced_steps_take_no_batch_whose_last_columns_are_not_theirs(model: WorldModel) -> None:
    batch: Any = Columns(PaddedCache([replay_path(model, observations(1)[0], []).cache], 0.0), room=3)
    with pytest.raises(ValueError, match="room for the 2 tokens of a step, got 3"):
        Steps(model).recurrent(torch.zeros(1, dtype=torch.int64), batch, torch.ones(1, dtype=torch.int64))
    assert batch.advanced == 0


def test_left_padding_has_no_influence(model: WorldModel) -> None:
    assert differences(model, step_together(model), step_together(model, filling=1e4)) == [0.0] * len(
        StepOutput._fields
    )


def test_shifting_all_positions_changes_nothing_beyond_rounding(model: WorldModel) -> None:
    here = step_together(model)
    for shift in (1, 1000, 1_000_000):
        assert max(differences(model, here, step_together(model, first_position=shift))) < ROUNDING


def test_positions_within_a_path_do_matter() -> None:
    rotary = RotaryEmbedding(head_dim=32)
    x = torch.randn(2, 1, 32, generator=Generator().manual_seed(0))  # [tokens, heads, head_dim]
    cosines, sines = rotary.angles(torch.tensor([5, 6]))
    rotated = rotary.rotate(x, cosines, sines)
    assert torch.allclose(rotated.norm(dim=-1), x.norm(dim=-1))
    one_apart = (rotated[0, 0] * rotated[1, 0]).sum()
    assert not torch.isclose(one_apart, (x[0, 0] * x[1, 0]).sum())


def test_window_lengths_run_1_3_5_5_5(model: WorldModel) -> None:
    lengths = [len(replay_path(model, torch.zeros(4), [0] * steps).cache) for steps in range(6)]
    assert lengths == [1, 3, 5, 5, 5, 5]


def test_dropping_leaves_the_newest_tokens_as_they_were(model: WorldModel) -> None:
    config = model.config
    dropping = replay_path(model, torch.zeros(4), [0, 1, 1]).cache
    keeping = ReplayCache(config.num_layers, limit=100, drop=2)
    model.initial(torch.zeros(1, 4), keeping, torch.tensor([0]))
    for step, action in enumerate([0, 1, 1]):
        model.recurrent(torch.tensor([action]), keeping, torch.tensor([1 + 2 * step]))
    for dropped, kept in zip(dropping.keys_values(), keeping.keys_values(), strict=True):
        assert dropped.shape == (config.num_layers, config.num_heads, 5, config.head_dim)
        assert torch.equal(dropped, kept[:, :, 2:])


def test_an_empty_cache_has_no_keys_and_an_impossible_rule_is_refused() -> None:
    with pytest.raises(ValueError, match="no tokens"):
        ReplayCache(2, limit=7, drop=2).keys_values()
    with pytest.raises(ValueError, match="drop"):
        ReplayCache(2, limit=7, drop=7)


def test_the_committed_weights_load_and_say_how_they_came_about(model: WorldModel) -> None:
    assert DEFAULT_WEIGHTS.stat().st_size < 2_000_000
    assert not model.training
    assert all(not parameter.requires_grad and parameter.dtype == torch.float32 for parameter in model.parameters())
    origin = json.loads(torch.load(DEFAULT_WEIGHTS, weights_only=True)["origin"])
    assert origin["command"].startswith("python -m examples.cartpole.train")
    assert origin["seed"] == 0
    assert {"python", "torch", "gymnasium"} <= set(origin["versions"])
    assert origin["figures"]["policy_mean_return"] >= 475


def test_the_policy_alone_balances_whole_episodes(model: WorldModel) -> None:
    assert sum(policy_returns(model, episodes=4, seed=11)) / 4 >= 475


def test_predictions_on_real_episodes_stay_within_the_stated_bounds(model: WorldModel, real: Transitions) -> None:
    errors = prediction_errors(model, real, Generator().manual_seed(0), segments=500, length=10)
    for steps, observation, termination in BOUNDS:
        assert errors[f"observation_{steps}"] < observation
        assert errors[f"termination_{steps}"] < termination
        assert errors[f"reward_{steps}"] < 0.2


def test_the_same_seed_trains_the_same_parameters(tmp_path_factory: pytest.TempPathFactory) -> None:
    settings = TrainSettings(
        envs=2,
        disturbed_steps=60,
        policy=PolicySettings(rounds=2, epochs=2),
        unroll=UnrollSettings(updates=3, refresh=2, batch=8, length=3, warm_up=1),
    )
    files = []
    for name in ("first", "second"):
        path = tmp_path_factory.mktemp(name) / "weights.pt"
        save_model(train(5, settings), path, {"seed": 5, "command": "a test"})
        files.append(path.read_bytes())
    assert files[0] == files[1]
    other = train(6, replace(settings, disturbed_steps=40))
    assert not torch.equal(other.action_embedding.weight, load_model(path).action_embedding.weight)


def test_an_episode_that_ran_out_of_time_still_has_a_future() -> None:
    transitions = two_steps(terminated=False)
    value = torch.zeros(2, 1)
    next_value = torch.tensor([[0.0], [10.0]])
    earned = advantages(transitions, value, next_value, discount=0.5, decay=1.0)
    assert earned.flatten().tolist() == [1.0 + 0.5 * 6.0, 6.0]
    ended = advantages(two_steps(terminated=True), value, next_value, discount=0.5, decay=1.0)
    assert ended.flatten().tolist() == [1.5, 1.0]


def test_returns_are_learnt_only_where_the_teacher_chose_the_action(model: WorldModel, real: Transitions) -> None:
    targets = make_targets(model, model, real)
    discount = model.config.discount
    inside = targets.own_choice & ~real.ended
    inside[-1] = False
    later = torch.cat((targets.value[1:], targets.value[:1]))
    assert torch.allclose(targets.value[inside], (real.reward + discount * later)[inside])
    lost = targets.own_choice & real.terminated
    assert lost.any()
    assert torch.equal(targets.value[lost], real.reward[lost])


def two_steps(*, terminated: bool) -> Transitions:
    """One environment, two steps with reward 1, the second the last of its episode."""
    last = torch.tensor([[False], [True]])
    observation = torch.zeros(2, 1, 4)
    none = torch.zeros(2, 1, dtype=torch.bool)
    return Transitions(
        observation=observation,
        action=torch.zeros(2, 1, dtype=torch.int64),
        reward=torch.ones(2, 1),
        terminated=last if terminated else none,
        truncated=none if terminated else last,
        next_observation=observation,
    )
