"""Validation on LightZero's main branch: both caches run, and differ by what is known alone."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from concurrent_kv.compat.lightzero import Attachment, Divergence, ValidationReport, attach, detach
from tests.lightzero_checkout import CHECKOUT
from tests.lightzero_main_support import NEEDS_CHECKOUT, SOURCES, make_main_model
from tests.test_lightzero_main_search import COUNTED, ENV_NUM, MODES, PADDED, Walk


class Validated:
    """A model of the main branch as it is, and a copy that validates."""

    def __init__(self, model: Any, answer: Any = "off") -> None:
        self.found: list[Divergence] = []
        self.answer = answer
        self.models = [model, copy.deepcopy(model)]
        made = attach(self.models[1], "validate", answer=answer, on_divergence=self.found.append)
        assert isinstance(made, Attachment)
        self.attachment = made

    @property
    def report(self) -> ValidationReport:
        report = self.attachment.report
        assert report is not None
        return report

    def end(self) -> None:
        self.attachment.session.close()
        self.attachment.manager.check_integrity()
        detach(self.models[1])


@pytest.fixture(params=SOURCES)
def source(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("answer", ["off", "on"])
@pytest.mark.parametrize("is_managed", [False, True], ids=["legacy", "managed"])
@pytest.mark.parametrize("mode", MODES)
def test_nothing_differs_while_episodes_begin_and_end_at_different_times(
    source: str, mode: str, is_managed: bool, answer: str
) -> None:
    both = Validated(make_main_model(source, use_new_cache_manager=is_managed, **MODES[mode]), answer)
    walk, model = Walk(both.models), both.models[0]
    walk.play(moves=6, simulations=8)
    assert both.found == []
    report = both.report
    assert report.contexts == model.total_query_count + model.root_total_query_cnt
    assert report.entries == model.total_query_count + walk.roots
    assert report.outputs >= 6 * 8 + 6
    for name in (*COUNTED, *PADDED):
        assert getattr(both.models[0], name) == getattr(both.models[1], name), name
    both.end()


@pytest.fixture(params=["off", "on"])
def colliding(request: pytest.FixtureRequest, source: str) -> Iterator[Validated]:
    """One whose nodes all have the same state, as LightZero's have before they are trained."""
    model = make_main_model(source)
    head = model.heads[0] if hasattr(model, "heads") else model.head_observations
    for parameter in head.parameters():
        parameter.data.zero_()
    both = Validated(model, request.param)
    yield both
    both.end()


def test_nodes_of_environments_that_meet_in_the_main_branchs_pool_are_named(colliding: Validated) -> None:
    walk = Walk(colliding.models if colliding.answer == "off" else colliding.models[1:])
    walk.root(list(range(ENV_NUM)))
    for _ in range(6):
        walk.simulate()
    assert set(colliding.report.defects) == {"environments collide"}
    assert colliding.report.unexplained == 0, colliding.report.first_unexplained
    assert {each.where for each in colliding.found} == {"node"}


@pytest.mark.parametrize("is_managed", [False, True], ids=["legacy", "managed"])
def test_what_is_cleared_is_cleared_in_both(source: str, is_managed: bool) -> None:
    both = Validated(make_main_model(source, use_new_cache_manager=is_managed))
    kept = both.models[1].__dict__  # the main branch's own cache beside ours

    def own() -> list[int]:
        if is_managed:
            manager = kept["kv_cache_manager"]
            return [*map(len, manager.init_pools), len(manager.recur_pool)]
        return [*map(len, kept["past_kv_cache_init_infer_envs"]), len(kept["past_kv_cache_recurrent_infer"])]

    walk = Walk(both.models)
    walk.root(list(range(ENV_NUM)))
    walk.simulate()
    assert own() == [1, 1, 1, 1, 4]
    walk.end(2)
    assert own() == [1, 1, 0, 1, 4]
    walk.root([0, 1])
    assert own() == [2, 2, 0, 1, 0]
    walk.simulate()
    both.models[1].clear_caches()
    assert own() == [0, 0, 0, 0, 0]
    both.end()


def test_nodes_that_another_roles_search_cleared_are_named_and_rows_stay_their_own_environments(source: str) -> None:
    both = Validated(make_main_model(source))
    model = both.models[1]
    collector, evaluator = Walk([model]), Walk([model], seed=1)
    collector.root([0, 1, 2, 3])
    for _ in range(4):
        collector.simulate()
    with both.attachment.role("evaluator"):
        evaluator.root([3, 2])
        evaluator.simulate()
        both.attachment.session.close()
    for _ in range(4):
        collector.simulate()
    assert set(both.report.defects) == {"cleared by another"}
    assert both.report.unexplained == 0, both.report.first_unexplained
    both.end()


def test_a_difference_that_nothing_explains_is_reported_as_such_and_by_its_environment(source: str) -> None:
    both = Validated(make_main_model(source))
    walk = Walk(both.models)
    walk.root(list(range(ENV_NUM)))
    walk.act()
    walk.root([2, 3])
    for model in both.models:  # what its own cache stored of environment 3, which is in the second row now
        for kv in model.__dict__["shared_pool_init_infer"][3]:
            if kv is not None:
                kv._keys_values[1]._k_cache._cache[:, :, 0] += 1
    walk.simulate()
    first = both.report.first
    assert first is not None
    assert (first.where, first.what, first.env_id, first.layer, first.token) == ("node", "context", 3, 1, 0)
    assert both.report.unexplained == len(both.found) > 0
    both.end()


@pytest.mark.skipif(CHECKOUT is None, reason=NEEDS_CHECKOUT)
@pytest.mark.parametrize("mode", ["absolute", "rebuilt"])
@pytest.mark.parametrize("is_managed", [False, True], ids=["legacy", "managed"])
def test_nothing_differs_in_reanalysis_from_seeded_roots(mode: str, is_managed: bool) -> None:
    both = Validated(make_main_model("checkout", use_new_cache_manager=is_managed, **MODES[mode]))
    generator = torch.Generator().manual_seed(0)
    contexts = [torch.randn(length, both.models[0].embed_dim, generator=generator) for length in (1, 3, 5, 3)]
    states, positions = np.stack([context[-1:].numpy() for context in contexts]), np.arange(ENV_NUM)
    for model in both.models:
        model.reanalyze_phase, model.latent_state = True, None
        model.clear_caches()
        model.seed_reanalysis_root_caches(states, contexts)
    for simulation in range(6):
        actions = torch.full((ENV_NUM,), simulation % 2)
        asked = ([(states, actions)], simulation, [simulation] * ENV_NUM, positions)
        answers = [model.forward_recurrent_inference(*asked) for model in both.models]
        for theirs, ours in zip(*answers, strict=True):
            assert torch.equal(theirs, ours)
        states = answers[0][1].numpy()
    assert both.found == []
    assert both.report.contexts == 6 * ENV_NUM
    for name in (*COUNTED, *PADDED, "reanalysis_root_seed_count", "reanalysis_root_seed_hit_count"):
        assert getattr(both.models[0], name) == getattr(both.models[1], name), name
    for model in both.models:
        model.reanalyze_phase = False
    both.end()
