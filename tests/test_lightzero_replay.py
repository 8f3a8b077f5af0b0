"""Validation that computes contexts anew from their tokens: which of the two caches is wrong, and that neither is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("lzero", reason="needs LightZero 0.2.0: make lightzero")

from concurrent_kv import InvalidArgumentError, InvalidTypeError
from concurrent_kv.compat.lightzero import Attachment, Divergence, ValidationReport, attach, attachment_of, detach
from tests.lightzero_main_stub import StubWorldModel, stub_config
from tests.lightzero_support import SHAPES, Walk, make_world_model

CARTPOLE = replace(SHAPES["cartpole"], env_num=3)
LUNARLANDER = replace(SHAPES["lunarlander"], env_num=3, embed_dim=64, num_heads=2)
CONTINUOUS = replace(SHAPES["dmc"], env_num=3, embed_dim=64, num_heads=2, context_length=8)
SHAPES_REPLAYED = {"rotary": CARTPOLE, "absolute": LUNARLANDER, "continuous": CONTINUOUS}
SIMULATIONS = 8


def replayed(shape: Any, share: float = 1.0, **changes: Any) -> tuple[Any, ValidationReport]:
    """A model that runs on both caches, and on the tokens."""
    model = make_world_model(shape, zero_heads=changes.pop("zero_heads", False))
    attachment = attach(model, "validate", replay=share, **changes)
    assert isinstance(attachment, Attachment)
    assert attachment.report is not None
    return model, attachment.report


def search(walk: Walk, model: Any) -> None:
    walk.root([model])
    for _ in range(SIMULATIONS):
        walk.simulate([model])
    walk.act()


def end(model: Any) -> None:
    attachment = attachment_of(model)
    assert attachment is not None
    attachment.manager.check_integrity()
    detach(model)


@pytest.mark.parametrize("answer", ["off", "on"])
@pytest.mark.parametrize("name", SHAPES_REPLAYED)
def test_every_context_is_what_its_tokens_compute_where_nothing_is_wrong(name: str, answer: str) -> None:
    shape = SHAPES_REPLAYED[name]
    model, report = replayed(shape, answer=answer)
    walk = Walk(shape, shape.env_num)
    for number in range(6):  # full windows from the third move on
        if number == 4:
            walk.lose_root(1)  # contexts of unequal lengths; this one is of no tokens that were seen
        search(walk, model)
    assert report.first is None
    assert report.replayed == report.contexts - 1 > 100
    assert not report.wrong
    end(model)


def test_a_search_over_fewer_environments_and_after_a_clear_is_replayed_too() -> None:
    model, report = replayed(CARTPOLE)
    walk = Walk(CARTPOLE, CARTPOLE.env_num)
    for number in range(4):
        if number == 2:
            model.clear_caches()
        if number == 3:
            walk.finish(2)
        search(walk, model)
    assert report.first is None
    assert report.replayed >= report.contexts - 2 * CARTPOLE.env_num
    end(model)


def test_a_root_is_looked_up_among_no_nodes_of_the_search_before() -> None:
    model, report = replayed(CARTPOLE)
    walk = Walk(CARTPOLE, CARTPOLE.env_num)
    search(walk, model)
    state, times = torch.from_numpy(walk.nodes[1]), walk.timestep
    model.wm_forward_for_initial_infererence(state, walk.action, state + 1, times)
    assert report.first is None
    end(model)


@pytest.mark.parametrize("answer", ["off", "on"])
def test_what_the_released_code_could_not_compute_is_replayed_from_what_was_answered(answer: str) -> None:
    shape = replace(CARTPOLE, env_num=1)
    model, report = replayed(shape, answer=answer, zero_heads=True)  # all nodes have the same state: the last counts
    walk = Walk(shape, 1)
    walk.root([model])
    walk.simulate([model], parents=[0])
    walk.nodes[0] = walk.nodes[0] + 1
    walk.simulate([model], parents=[0])
    assert report.defects == {"miss raises": 1}
    before = report.replayed
    walk.simulate([model], parents=[2])
    assert report.replayed == before + 1
    assert report.defects == {"miss raises": 1}
    assert not report.wrong
    end(model)


def test_a_share_is_a_sample_of_the_contexts() -> None:
    model, report = replayed(CARTPOLE, share=0.25)
    walk = Walk(CARTPOLE, CARTPOLE.env_num)
    for _ in range(4):
        search(walk, model)
    assert 0.1 * report.contexts < report.replayed < 0.4 * report.contexts
    end(model)


@pytest.mark.parametrize("answer", ["off", "on"])
def test_without_a_share_nothing_is_replayed(answer: Any) -> None:
    model = make_world_model(CARTPOLE)
    attachment = attach(model, "validate", answer=answer)
    assert isinstance(attachment, Attachment)
    search(Walk(CARTPOLE, CARTPOLE.env_num), model)
    assert attachment.report is not None
    assert attachment.report.replayed == 0
    end(model)


# What is wrong --------------------------------------------------------------------------------------------------------


def damage_ours(model: Any) -> None:
    """Every root that our cache holds is another, in layer 1."""
    attachment = attachment_of(model)
    assert attachment is not None
    for pool in attachment.manager.init_pools:
        for key in list(pool.keys()):
            found = pool.peek(key)
            assert found is not None
            found.keys[1] += 0.5
            pool.put(key, found)


def damage_theirs(model: Any) -> None:
    """Every root that the released cache holds is another, in layer 1."""
    for ring in vars(model)["shared_pool_init_infer"]:
        for slot in ring:
            if slot is not None:
                slot._keys_values[1]._k_cache._cache += 0.5


@pytest.mark.parametrize("answer", ["off", "on"])
@pytest.mark.parametrize(
    ("wrong", "damages"),
    [("ours", [damage_ours]), ("released", [damage_theirs]), ("both", [damage_ours, damage_theirs])],
)
def test_the_cache_that_is_wrong_is_named(
    wrong: str, damages: list[Any], answer: str, caplog: pytest.LogCaptureFixture
) -> None:
    heard: list[Divergence] = []
    model, report = replayed(CARTPOLE, share=1.0, answer=answer, on_divergence=heard.append)
    walk = Walk(CARTPOLE, CARTPOLE.env_num)
    for _ in range(2):
        search(walk, model)
    assert not heard
    for damage in damages:
        damage(model)
    walk.root([model])
    assert report.wrong == {wrong: CARTPOLE.env_num}
    assert report.unexplained == CARTPOLE.env_num
    first = report.first_unexplained
    assert first is heard[0]
    assert (first.where, first.what) == ("root", "replay" if wrong == "both" else "context")
    said = {"ours": "this one is wrong", "released": "the released cache is wrong", "both": "both caches are wrong"}
    assert said[wrong] in caplog.text
    for _ in range(SIMULATIONS):  # from what was answered with: the error is not reported forever
        walk.simulate([model])
    assert report.wrong == {wrong: CARTPOLE.env_num}
    end(model)


@pytest.mark.parametrize("answer", ["off", "on"])
def test_nodes_of_weights_that_are_no_more_are_wrong_in_both(answer: str) -> None:
    model, report = replayed(CARTPOLE, answer=answer)
    walk = Walk(CARTPOLE, CARTPOLE.env_num)
    walk.root([model])
    walk.simulate([model], parents=[0] * CARTPOLE.env_num)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05
    walk.simulate([model], parents=[1] * CARTPOLE.env_num)
    assert report.wrong == {"both": CARTPOLE.env_num}
    end(model)


@pytest.mark.parametrize("answer", ["off", "on"])
def test_what_a_defect_of_the_released_code_explains_is_wrong_in_that_cache(answer: str) -> None:
    model, report = replayed(CARTPOLE, share=1e-9, answer=answer)  # what differs is computed anew in any case
    walk = Walk(CARTPOLE, CARTPOLE.env_num)
    first = walk._observe()
    walk.root([model], first)
    for _ in range(2):  # the ring of two is full of others now
        search(walk, model)
    walk.observation = first
    search(walk, model)
    assert report.defects == {"stale root": CARTPOLE.env_num}
    assert report.wrong == {"released": CARTPOLE.env_num}
    assert report.replayed == CARTPOLE.env_num
    assert report.unexplained == 0
    end(model)


@pytest.mark.parametrize("answer", ["off", "on"])
def test_no_defect_of_the_released_code_explains_what_ours_gets_wrong(answer: str) -> None:
    model, report = replayed(CARTPOLE, answer=answer)
    walk = Walk(CARTPOLE, CARTPOLE.env_num)
    first = walk._observe()
    walk.root([model], first)
    for _ in range(2):
        search(walk, model)
    damage_ours(model)  # and the released cache's root is stale
    walk.observation = first
    walk.root([model])
    assert report.wrong == {"both": CARTPOLE.env_num}
    assert report.unexplained == CARTPOLE.env_num
    assert not report.defects
    end(model)


@pytest.mark.parametrize("answer", ["off", "on"])
def test_colliding_states_are_wrong_in_the_released_cache(answer: str) -> None:
    model, report = replayed(CARTPOLE, answer=answer, zero_heads=True)
    walk = Walk(CARTPOLE, CARTPOLE.env_num)
    for _ in range(3):
        search(walk, model)
    assert set(report.defects) == {"environments collide"}
    assert set(report.wrong) == {"released"}
    assert report.unexplained == 0
    end(model)


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0, -0.1, 1.5, float("nan")])
def test_a_share_that_is_none_is_refused_by_name(share: float) -> None:
    model = make_world_model(CARTPOLE)
    with pytest.raises(InvalidArgumentError, match="replay must be above 0 and at most 1"):
        attach(model, "validate", replay=share)
    assert attachment_of(model) is None


@pytest.mark.parametrize("share", ["all", True, [0.5]])
def test_what_is_no_number_is_refused_by_name(share: Any) -> None:
    model = make_world_model(CARTPOLE)
    with pytest.raises(InvalidTypeError, match="replay must be a number"):
        attach(model, "validate", replay=share)
    assert attachment_of(model) is None


def test_a_model_of_the_main_branch_is_refused_with_what_it_is() -> None:
    model = StubWorldModel(stub_config()).eval()
    with pytest.raises(
        InvalidArgumentError, match=r"replay is for LightZero 0\.2\.0, .* is of LightZero's main branch"
    ):
        attach(model, "validate", replay=0.5)
    assert attachment_of(model) is None
    attachment = attach(model, "on")
    assert isinstance(attachment, Attachment)
    with pytest.raises(InvalidArgumentError, match="say ready_env_id= to a model of the main branch"):
        attachment.environments([0]).__enter__()
    end(model)
