"""The released world model beside itself on our cache: the same inputs step by step, and every output equal.

In the shapes of LightZero's configurations, with weights that are not zero.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("lzero", reason="needs LightZero 0.2.0: make lightzero")

from concurrent_kv.compat.lightzero import Attachment, attach, attachment_of, detach, settings
from concurrent_kv.model.overflow import DropAndCorrect, DropOldest
from tests.lightzero_support import PATIENCE, SHAPES, Shape, Walk, assert_same_outputs, make_world_model

STEPS = 1000  # simulated steps of each shape, at least
MOVES = 10  # of an episode


class Both:
    """A released model as it is, and a copy of it that is attached."""

    def __init__(self, shape: Shape, **changes: Any) -> None:
        self.off = make_world_model(shape, **changes)
        self.on = copy.deepcopy(self.off)
        self.attachment = attach(self.on, "on")
        assert isinstance(self.attachment, Attachment)
        self.models = [self.off, self.on]
        self.lengths: set[tuple[int, ...]] = set()

    def root(self, walk: Walk, current: torch.Tensor | None = None) -> None:
        is_first = not walk.timestep.any()
        assert_same_outputs(walk.root(self.models, current))
        if not is_first:  # an episode's first step retrieves nothing
            self.lengths.add(tuple(self.on.keys_values_wm_size_list))

    def simulate(self, walk: Walk) -> None:
        assert_same_outputs(walk.simulate(self.models))
        assert self.off.keys_values_wm_size_list == self.on.keys_values_wm_size_list
        self.lengths.add(tuple(self.on.keys_values_wm_size_list))

    def check(self) -> None:
        """Both found the same, everything was found, and the books of ours add up."""
        for name in ("hit_count", "total_query_count", "root_hit_cnt", "root_total_query_cnt"):
            assert getattr(self.off, name) == getattr(self.on, name), name
        assert isinstance(self.attachment, Attachment)
        self.attachment.manager.check_integrity()


def play(both: Both, walk: Walk, *, moves: int, simulations: int) -> None:
    """Searches of an episode, each over so many simulations."""
    for _ in range(moves):
        both.root(walk)
        for _ in range(simulations):
            both.simulate(walk)
        walk.act()


def both_of(shape: Shape, **changes: Any) -> Iterator[Both]:
    both = Both(shape, **changes)
    yield both
    both.check()
    detach(both.on)


@pytest.fixture
def small() -> Iterator[Both]:
    """Four environments with `cartpole`'s model."""
    yield from both_of(replace(SHAPES["cartpole"], env_num=4))


@pytest.mark.timeout(2 * PATIENCE)
@pytest.mark.parametrize("name", SHAPES)
def test_every_output_of_a_thousand_simulated_steps_is_equal(name: str) -> None:
    shape = SHAPES[name]
    for both in both_of(shape):
        walk = Walk(shape, shape.env_num)
        steps = 0
        while steps < STEPS:
            walk.new_episode()
            play(both, walk, moves=MOVES, simulations=shape.num_simulations)
            steps += MOVES * shape.num_simulations
        window = shape.context_length
        assert both.on.hit_count == steps * shape.env_num
        assert max(map(max, both.lengths)) == window - 3  # windows overflowed at every step from here on
        if window > 4:
            assert any(len(set(lengths)) == 3 for lengths in both.lengths)  # 1, 3 and 5 tokens in one batch


@pytest.mark.parametrize("rotary_emb", [True, False], ids=["rotary", "absolute"])
@pytest.mark.parametrize("continuous", [False, True], ids=["discrete", "continuous"])
@pytest.mark.parametrize("observation", [4, (3, 64, 64)], ids=["vector", "image"])
def test_outputs_are_equal_for_positions_actions_and_observations_of_each_kind(
    rotary_emb: bool, continuous: bool, observation: Any
) -> None:
    shape = replace(
        SHAPES["cartpole"], rotary_emb=rotary_emb, continuous=continuous, observation=observation, env_num=3
    )
    for both in both_of(shape):
        play(both, Walk(shape, 3), moves=4, simulations=12)


@pytest.mark.parametrize("rotary_emb", [True, False], ids=["rotary", "absolute"])
def test_outputs_are_equal_where_some_roots_are_not_found(rotary_emb: bool) -> None:
    shape = replace(SHAPES["cartpole"], rotary_emb=rotary_emb, env_num=4)
    for both in both_of(shape):
        walk = Walk(shape, 4)
        for move in range(8):
            play(both, walk, moves=1, simulations=10)
            walk.lose_root(move % 4)
        assert any(1 in lengths and 5 in lengths for lengths in both.lengths)
        assert 0 < both.on.root_hit_cnt < both.on.root_total_query_cnt


def test_outputs_are_equal_while_environments_finish_at_different_times(small: Both) -> None:
    walk = Walk(SHAPES["cartpole"], 4)
    for _ in range(2):
        walk.new_episode()
        for finishing in (None, 1, 0, 1, None):
            play(small, walk, moves=2, simulations=8)
            if finishing is not None:
                walk.finish(finishing)
        assert walk.rows == 1
    assert {len(lengths) for lengths in small.lengths} == {1, 2, 3, 4}


@pytest.mark.parametrize("rotary_emb", [True, False], ids=["rotary", "absolute"])
def test_outputs_of_the_reanalyze_phase_are_equal_and_leave_no_entries(rotary_emb: bool) -> None:
    shape = replace(SHAPES["cartpole"], rotary_emb=rotary_emb, env_num=2)
    for both in both_of(shape):
        segments, steps = 3, 4  # more rows than environments
        random = np.random.default_rng(0)
        observations = torch.randn(segments * (steps + 1), 4)
        actions = random.integers(0, 2, (segments, steps))
        positions = random.integers(0, 50, (segments, steps))
        for model in both.models:
            model.reanalyze_phase = True
        asked = {"obs": observations, "action": actions, "current_obs": None}
        roots = [model.forward_initial_inference(dict(asked), positions) for model in both.models]
        assert_same_outputs([root[3:] for root in roots])
        states = roots[0][1].numpy()
        for simulation in range(6):
            drawn = torch.from_numpy(random.integers(0, 2, len(states)))
            depths = [simulation] * len(states)
            answers = [
                model.forward_recurrent_inference([(states, drawn)], simulation, depths, positions)
                for model in both.models
            ]
            assert_same_outputs(answers)
            states = answers[0][1].numpy()
        for model in both.models:
            model.reanalyze_phase = False
        assert isinstance(both.attachment, Attachment)
        assert both.attachment.manager.get_stats_summary().total.entries == 0


def test_outputs_are_equal_after_the_weights_were_trained_and_the_caches_cleared() -> None:
    shape = replace(SHAPES["lunarlander"], env_num=2)
    for both in both_of(shape):
        walk = Walk(shape, 2)
        for _ in range(3):
            play(both, walk, moves=3, simulations=6)
            for model in both.models:
                for number, parameter in enumerate(model.parameters()):
                    if parameter.is_floating_point():
                        change = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
                        parameter.data += 0.01 * change
                # As `recompute_pos_emb_diff_and_clear_cache` of the policy does.
                model.precompute_pos_emb_diff_kv()
                model.clear_caches()
        assert both.on.root_hit_cnt == 2 * 3 * 2  # of three roots after a clear, the first follows nothing known


@pytest.mark.parametrize("plant", ["a drop too early", "no position difference"])
def test_the_comparison_notices_a_window_that_is_treated_otherwise(plant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def planted(world_model: Any, layout: Any) -> Any:
        right = original(world_model, layout)
        assert isinstance(right, DropAndCorrect)
        if plant == "a drop too early":
            return DropAndCorrect(right.limit - 2, 2, right.difference, layout)
        return DropOldest(right.limit, 2)

    original = settings.overflow_of
    monkeypatch.setattr("concurrent_kv.compat.lightzero.attachment.overflow_of", planted)
    shape = replace(SHAPES["lunarlander"], env_num=2)
    with pytest.raises(AssertionError):
        play(Both(shape), Walk(shape, 2), moves=3, simulations=8)


def test_a_detached_model_is_the_released_one_again(small: Both) -> None:
    walk = Walk(SHAPES["cartpole"], 4)
    small.root(walk)
    small.simulate(walk)
    released = type(small.off)
    detach(small.on)
    assert type(small.on) is released
    assert attachment_of(small.on) is None
    walk.new_episode()
    play(small, walk, moves=2, simulations=4)
    assert small.on.past_kv_cache_recurrent_infer.keys() == small.off.past_kv_cache_recurrent_infer.keys()
    small.attachment = attach(small.on, "on")
