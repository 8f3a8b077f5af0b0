"""Rows of a batch and the environments that they are: LightZero 0.2.0 takes the one for the other."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("lzero", reason="needs LightZero 0.2.0: make lightzero")

from concurrent_kv import InvalidArgumentError, InvalidTypeError
from concurrent_kv.compat.lightzero import Attachment, ValidationReport, attach, attachment_of, detach
from tests.lightzero_support import (
    SHAPES,
    Shape,
    Token,
    assert_same_outputs,
    contexts_of,
    make_world_model,
    recomputed,
)

THREE = replace(SHAPES["cartpole"], env_num=3)
EIGHT = replace(SHAPES["cartpole"], env_num=8)
CONTINUOUS = replace(SHAPES["dmc"], env_num=3, embed_dim=64, num_heads=2, context_length=8)
ROUNDING = 1e-5  # between batches of different sizes


class Game:
    """Environments that a world model plays in, each with all that it has seen and done since its episode began."""

    def __init__(self, shape: Shape, seed: int = 0) -> None:
        self.shape = shape
        self.generator = torch.Generator().manual_seed(seed)
        self.observed: dict[int, list[Tensor]] = {}
        self.acted: dict[int, list[Any]] = {}

    def begin(self, *environments: int) -> None:
        """New episodes."""
        for env_id in environments:
            self.observed[env_id], self.acted[env_id] = [self._observe()], []

    def act(self, *environments: int) -> None:
        """One step."""
        for env_id in environments:
            self.acted[env_id].append(self._action())
            self.observed[env_id].append(self._observe())

    def _observe(self) -> Tensor:
        return torch.randn(self.shape.observation, generator=self.generator)

    def _action(self) -> Any:
        if self.shape.continuous:
            return torch.rand(self.shape.action_space_size, generator=self.generator).numpy() * 2 - 1
        return int(torch.randint(self.shape.action_space_size, (), generator=self.generator))

    def asked(self, environments: Sequence[int], previous: Sequence[int] | None = None) -> tuple[dict[str, Any], Any]:
        """What a world model is asked for the next roots; with the previous roots of the environments `previous`."""
        before = environments if previous is None else previous
        # Of an environment that has finished in between, what was seen and done before.
        last, actions = [], []
        for env_id in before:
            goes_on = len(self.observed[env_id]) > 1
            last.append(self.observed[env_id][-2] if goes_on else torch.zeros_like(self.observed[env_id][0]))
            actions.append(self.acted[env_id][-1] if goes_on else -1)
        current = torch.stack([self.observed[env_id][-1] for env_id in environments])
        times = np.array([len(self.acted[env_id]) for env_id in environments])
        return {"obs": torch.stack(last), "action": actions, "current_obs": current}, times

    def truth(self, model: Any, env_id: int, steps: int) -> Tensor:
        """K and V of an environment's last so many steps, computed from nothing."""
        states = model.tokenizer.encode_to_obs_embeddings(torch.stack(self.observed[env_id]))
        first = len(states) - 1 - steps
        tokens: list[Token] = [("obs_embeddings", states[first], first)]
        for step in range(first, len(states) - 1):
            action = self.acted[env_id][step]
            tokens += [("act_tokens", action, step + 1), ("obs_embeddings", states[step + 1], step + 1)]
        return recomputed(model, tokens)


@pytest.fixture
def games() -> Iterator[dict[str, Any]]:
    """The world models of a test, detached and looked through at its end."""
    made: dict[str, Any] = {}
    yield made
    for model in made.values():
        attachment = attachment_of(model)
        if attachment is not None:
            attachment.manager.check_integrity()
            detach(model)


def move(model: Any, game: Game, environments: Sequence[int], *, said: bool, previous: Any = None) -> Any:
    """New roots of some environments, and one simulated step of each; what the root's call answers."""
    attachment = attachment_of(model)
    with attachment.environments(environments) if said and attachment is not None else nullcontext():
        observed, times = game.asked(environments, previous)
        answered = model.forward_initial_inference(observed, times)
        size = game.shape.action_space_size
        rows = len(environments)
        actions = torch.zeros(rows, size) if game.shape.continuous else torch.zeros(rows, dtype=torch.long)
        states = answered[1].numpy()
        before = model.hit_count
        model.forward_recurrent_inference([(states, actions)], 0, [0] * rows, times)
        if attachment is not None and attachment.mode == "on":
            assert model.hit_count - before == rows
    return answered


def begun(shape: Shape, model: Any) -> Game:
    """A game of two moves in all environments; then all have stepped on."""
    game, all_of_them = Game(shape), range(shape.env_num)
    game.begin(*all_of_them)
    for _ in range(2):
        move(model, game, all_of_them, said=False)
        game.act(*all_of_them)
    return game


def assert_true_contexts(model: Any, game: Game, environments: Sequence[int], answered: Any, steps: int) -> None:
    """The roots that were just stored are what is computed from the environments' own last steps."""
    attachment = attachment_of(model)
    assert attachment is not None
    with attachment.environments(environments):
        times = [len(game.acted[env_id]) for env_id in environments]
        found = contexts_of(model, answered[1].numpy(), times)
    for context, env_id in zip(found, environments, strict=True):
        truth = game.truth(model, env_id, steps)
        assert context.shape == truth.shape
        assert torch.allclose(context, truth, atol=ROUNDING)


def report_of(model: Any) -> ValidationReport:
    attachment = attachment_of(model)
    assert attachment is not None
    assert attachment.report is not None
    return attachment.report


# An environment finishes, and the others' rows move up ----------------------------------------------------------------


@pytest.mark.parametrize("shape", [THREE, EIGHT, CONTINUOUS], ids=["of three", "of eight", "continuous"])
def test_the_others_keep_their_roots_when_an_environment_finishes(shape: Shape, games: dict[str, Any]) -> None:
    theirs = games["theirs"] = make_world_model(shape)
    ours = games["ours"] = copy.deepcopy(theirs)
    attach(ours, "on")
    game, _ = begun(shape, ours), begun(shape, theirs)
    left = range(1, shape.env_num)
    before = ours.root_hit_cnt, theirs.root_hit_cnt
    answered = move(ours, game, left, said=True)
    assert ours.root_hit_cnt - before[0] == len(left)
    assert_true_contexts(ours, game, left, answered, steps=2)
    answered_by_theirs = move(theirs, game, left, said=False)
    assert theirs.root_hit_cnt - before[1] == 0
    assert (answered[4] - answered_by_theirs[4]).abs().max() > 1e-3  # the logits of the values


@pytest.mark.parametrize("said", [True, False])
@pytest.mark.parametrize("answer", ["off", "on"])
@pytest.mark.parametrize("shape", [THREE, EIGHT], ids=["of three", "of eight"])
def test_roots_that_are_lost_with_their_rows_are_named(
    shape: Shape, answer: Any, said: bool, games: dict[str, Any]
) -> None:
    released = games["released"] = make_world_model(shape)
    model = games["validated"] = copy.deepcopy(released)
    attach(model, "validate", answer=answer)
    game, left = begun(shape, model), range(1, shape.env_num)
    begun(shape, released)
    assert report_of(model).first is None
    answered = move(model, game, left, said=said)
    report = report_of(model)
    assert report.defects == {"roots by row": len(left)}
    assert report.unexplained == 0
    assert report.first is not None
    assert (report.first.what, report.first.where) == ("length" if said else "miss", "root")
    if said and answer == "on":
        assert_true_contexts(model, game, left, answered, steps=2)
    else:
        assert_same_outputs([move(released, game, left, said=False), answered])
    game.act(*left)
    move(model, game, left, said=said)
    assert report.defects == {"roots by row": len(left)}  # the rows are the same from here on


def test_roots_that_were_cleared_are_lost_by_no_defect(games: dict[str, Any]) -> None:
    model = games["validated"] = make_world_model(THREE)
    attach(model, "validate")
    game = begun(THREE, model)
    model.clear_caches()
    move(model, game, [1, 2], said=False)
    assert report_of(model).first is None


@pytest.mark.parametrize("answer", ["off", "on"])
def test_a_root_that_the_encoder_rounds_otherwise_in_a_smaller_batch_is_found_and_named(
    answer: Any, games: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = games["validated"] = make_world_model(THREE)
    attach(model, "validate", answer=answer)
    game, left = begun(THREE, model), [0, 1]  # the last one has finished: rows are the environments as before
    encode = model.tokenizer.encode_to_obs_embeddings
    monkeypatch.setattr(
        model.tokenizer, "encode_to_obs_embeddings", lambda states: encode(states) + (1e-7 if len(states) < 3 else 0)
    )
    answered = move(model, game, left, said=False)
    report = report_of(model)
    assert report.defects == {"roots by rounding": 2}
    assert report.unexplained == 0
    if answer == "on":
        assert_true_contexts(model, game, left, answered, steps=2)


def test_another_state_than_the_last_one_of_an_environment_is_not_taken_for_it(games: dict[str, Any]) -> None:
    ours = games["ours"] = make_world_model(THREE)
    attach(ours, "on")
    game = begun(THREE, ours)
    game.observed[0][-2] = game.observed[0][-2] + 0.1
    before = ours.root_hit_cnt
    move(ours, game, [0, 1], said=True)
    assert ours.root_hit_cnt - before == 1


def test_previous_roots_of_environments_that_have_finished_are_left_out(games: dict[str, Any]) -> None:
    model = games["ours"] = make_world_model(THREE)
    attach(model, "on")
    game, left = begun(THREE, model), [2, 1]
    answered = move(model, game, left, said=True, previous=range(3))
    assert_true_contexts(model, game, left, answered, steps=2)


@pytest.mark.parametrize("answer", ["off", "on"])
def test_previous_roots_of_environments_that_have_finished_are_named(answer: Any, games: dict[str, Any]) -> None:
    released, model = (games.setdefault(name, make_world_model(THREE)) for name in ("released", "validated"))
    attach(model, "validate", answer=answer)
    game, left = begun(THREE, model), [2, 1]
    begun(THREE, released)
    answered = move(model, game, left, said=True, previous=range(3))
    if answer == "on":
        assert_true_contexts(model, game, left, answered, steps=2)
    else:
        assert_same_outputs([move(released, game, left, said=False, previous=range(3)), answered])
    for _ in range(2):
        game.act(*left)
        move(model, game, left, said=True)
    assert report_of(model).unexplained == 0
    assert set(report_of(model).defects) <= {"roots by row", "roots by rounding"}
    assert report_of(model).defects["roots by row"] == 1  # row 1 is environment 1 for both


def test_roots_that_are_looked_up_for_another_environment_are_warned_of_once(
    games: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    ours = games["ours"] = make_world_model(THREE)
    attach(ours, "on")
    game = begun(THREE, ours)
    with caplog.at_level(logging.WARNING, "concurrent_kv"):
        move(ours, game, [0, 1, 2], said=False)
        assert not [record for record in caplog.records if record.name == "concurrent_kv"]
        for _ in range(2):
            game.act(0, 1, 2)
            move(ours, game, [1, 2], said=False)
            game.act(0, 1, 2)
            move(ours, game, [0, 1, 2], said=False)
    (message,) = [record.message for record in caplog.records if record.name == "concurrent_kv"]
    assert "attachment.environments(ids)" in message


def test_the_environments_said_last_for_as_long_as_the_with(games: dict[str, Any]) -> None:
    ours = games["ours"] = make_world_model(THREE)
    attachment = attach(ours, "on")
    assert isinstance(attachment, Attachment)
    with attachment.environments([2, 0]):
        with attachment.environments(np.array([1])):
            assert attachment.session.current_infer_env_ids == [1]
        assert attachment.session.current_infer_env_ids == [2, 0]
    assert attachment.session.current_infer_env_ids is None


@pytest.mark.parametrize("ids", [[0, 0], [3], [-1], [], ["0"], [0.5]])
def test_environments_that_the_model_does_not_have_are_refused_by_name(ids: Any, games: dict[str, Any]) -> None:
    ours = games["ours"] = make_world_model(THREE)
    attachment = attach(ours, "on")
    assert isinstance(attachment, Attachment)
    with pytest.raises(InvalidArgumentError, match="ids must be different ones of the model's environments, 0 to 2"):
        attachment.environments(ids).__enter__()
    with pytest.raises(InvalidTypeError, match="env_ids must be a sequence"):
        attachment.environments(3).__enter__()  # type: ignore[arg-type]


def test_a_batch_of_other_rows_than_environments_were_said_is_refused(games: dict[str, Any]) -> None:
    ours = games["ours"] = make_world_model(THREE)
    attachment = attach(ours, "on")
    assert isinstance(attachment, Attachment)
    game = begun(THREE, ours)
    observed, times = game.asked(range(3))
    with attachment.environments([0, 2]):
        with pytest.raises(InvalidArgumentError, match=r"one environment for each row, got \[0, 2\] for a batch of 3"):
            ours.forward_initial_inference(observed, times)
        states = np.zeros((3, 1, THREE.embed_dim), dtype=np.float32)
        with pytest.raises(InvalidArgumentError, match="one environment for each row"):
            ours.forward_recurrent_inference([(states, torch.zeros(3))], 0, [0, 0, 0], times)


# Some begin an episode, and others go on ------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [THREE, CONTINUOUS], ids=["discrete", "continuous"])
@pytest.mark.parametrize("beginning", [0, 1, 2])
@pytest.mark.parametrize("said", [True, False])
def test_each_row_begins_or_goes_on_by_itself(shape: Shape, beginning: int, said: bool, games: dict[str, Any]) -> None:
    ours = games["ours"] = make_world_model(shape)
    attach(ours, "on")
    game = begun(shape, ours)
    game.begin(beginning)
    before = ours.root_hit_cnt
    answered = move(ours, game, range(3), said=said)
    assert ours.root_hit_cnt - before == 2
    others = [env_id for env_id in range(3) if env_id != beginning]
    attachment = attachment_of(ours)
    assert attachment is not None
    times = [len(game.acted[env_id]) for env_id in range(3)]
    found = contexts_of(ours, answered[1].numpy(), times)
    for env_id, context in enumerate(found):
        truth = game.truth(ours, env_id, 0 if env_id == beginning else 2)
        assert context.shape == truth.shape
        assert torch.allclose(context, truth, atol=ROUNDING)
    # The answers are those of each part by itself.
    alone = games["alone"] = make_world_model(shape)
    attached = attach(alone, "on")
    assert isinstance(attached, Attachment)
    begun(shape, alone)
    for part in (others, [beginning]):
        parted = move(alone, game, part, said=True)
        for whole, of_the_part in zip(answered, parted, strict=True):
            assert torch.allclose(whole[part], of_the_part, atol=ROUNDING)


@pytest.mark.parametrize("answer", ["off", "on"])
def test_a_batch_that_the_released_code_cannot_take_is_named_and_the_comparison_goes_on(
    answer: Any, games: dict[str, Any]
) -> None:
    model, released = make_world_model(THREE), make_world_model(THREE)
    games["validated"] = model
    attach(model, "validate", answer=answer)
    game = begun(THREE, model)
    begun(THREE, released)
    game.begin(0)
    observed, times = game.asked(range(3))
    assert observed["action"][0] == -1 not in observed["action"][1:]
    with pytest.raises(IndexError):
        released.forward_initial_inference(observed, times)
    move(model, game, range(3), said=False)
    report = report_of(model)
    assert report.defects == {"mixed batch": 3}
    assert report.unexplained == 0
    game.act(0, 1, 2)
    contexts = report.contexts
    answered = move(model, game, range(3), said=False)
    assert report.contexts == contexts + 6
    assert report.defects == {"mixed batch": 3}
    if answer == "on":
        assert answered[4].shape[0] == 3


@pytest.mark.parametrize("mode", ["on", "validate"])
@pytest.mark.parametrize("shape", [THREE, CONTINUOUS], ids=["discrete", "continuous"])
def test_where_all_begin_it_is_as_well_how_many_there_were_before(
    mode: Any, shape: Shape, games: dict[str, Any]
) -> None:
    released, model = make_world_model(shape), make_world_model(shape)
    games["ours"] = model
    attach(model, mode)
    game = Game(shape)
    game.begin(0, 1, 2)
    observed, times = game.asked(range(3))
    observed["obs"], observed["action"] = observed["obs"][:1], [-1]  # as an evaluator of one environment leaves it
    assert_same_outputs([each.forward_initial_inference(dict(observed), times) for each in (released, model)])


@pytest.mark.parametrize("mode", ["on", "validate"])
@pytest.mark.parametrize("lacking", ["obs", "action"])
def test_a_batch_that_lacks_what_was_before_is_refused_with_what_would_do(
    mode: Any, lacking: str, games: dict[str, Any]
) -> None:
    model = games["ours"] = make_world_model(THREE)
    attach(model, mode)
    game = begun(THREE, model)
    observed, times = game.asked(range(3))
    observed[lacking] = observed[lacking][1:]
    with pytest.raises(InvalidArgumentError, match=r"obs and action must have a row for each of the 3 .* zeros"):
        model.forward_initial_inference(observed, times)
    move(model, game, range(3), said=False)
