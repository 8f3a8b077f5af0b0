"""Validation: both caches run, everything is compared, and what differs is named and copied over."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("lzero", reason="needs LightZero 0.2.0: make lightzero")

from concurrent_kv import DropAndCorrect, DropLazily, InvalidTypeError, KeysValues, PositionSteps
from concurrent_kv.compat.lightzero import (
    DEFECTS,
    Attachment,
    Divergence,
    attach,
    attachment_of,
    detach,
    install,
    settings,
    uninstall,
)
from tests import compare_old_new_cache
from tests.lightzero_support import PATIENCE, SHAPES, Walk, assert_same_outputs, make_world_model

CARTPOLE = replace(SHAPES["cartpole"], env_num=3)
LUNARLANDER = replace(SHAPES["lunarlander"], env_num=3, embed_dim=64, num_heads=2)
SIMULATIONS = 12


def validated(shape: Any, **changes: Any) -> tuple[Any, Attachment]:
    """A model that runs on both caches."""
    model = make_world_model(shape, zero_heads=changes.pop("zero_heads", False))
    attachment = attach(model, "validate", **changes)
    assert isinstance(attachment, Attachment)
    assert attachment.report is not None
    return model, attachment


def search(walk: Walk, models: list[Any], simulations: int = SIMULATIONS) -> list[list[tuple[Any, ...]]]:
    """A search; what each model answered at each step."""
    answers = [walk.root(models)]
    answers += [walk.simulate(models) for _ in range(simulations)]
    walk.act()
    return answers


@pytest.mark.parametrize("answer", ["off", "on"])
@pytest.mark.parametrize("shape", [CARTPOLE, LUNARLANDER], ids=["rotary", "absolute"])
def test_everything_is_compared_and_nothing_differs(shape: Any, answer: str) -> None:
    released = make_world_model(shape)
    model, attachment = validated(shape, answer=answer)
    walk, rows, searches = Walk(shape, shape.env_num), shape.env_num, 4
    for _ in range(searches):
        for step in search(walk, [released, model]):
            assert_same_outputs(step)
    report = attachment.report
    assert report is not None
    steps = searches * SIMULATIONS
    assert report.calls == report.outputs == searches + steps
    assert report.contexts == rows * (steps + searches - 1)  # an episode's first root retrieves nothing
    assert report.entries == rows * (searches + steps)
    assert report.first is None
    assert not report.defects
    for name in ("hit_count", "total_query_count", "root_hit_cnt", "root_total_query_cnt"):
        assert getattr(model, name) == getattr(released, name), name
    attachment.manager.check_integrity()
    detach(model)


@pytest.mark.parametrize("answer", ["off", "on"])
@pytest.mark.parametrize("shape", [CARTPOLE, LUNARLANDER], ids=["rotary", "absolute"])
def test_states_that_collide_are_named_and_the_comparison_goes_on(shape: Any, answer: str) -> None:
    # With heads of zeros, as LightZero begins its training, every node has the same latent state.
    model, attachment = validated(shape, answer=answer, zero_heads=True)
    released = make_world_model(shape, zero_heads=True)
    walk = Walk(shape, shape.env_num)
    for _ in range(3):
        for theirs, ours in search(walk, [released, model]):
            if answer == "off":
                assert_same_outputs([theirs, ours])
    report = attachment.report
    assert report is not None
    assert set(report.defects) == {"environments collide"}
    assert report.unexplained == 0
    detach(model)


@pytest.mark.parametrize("answer", ["off", "on"])
def test_a_root_that_was_overwritten_is_named(answer: str) -> None:
    model, attachment = validated(CARTPOLE, answer=answer)
    walk = Walk(CARTPOLE, CARTPOLE.env_num)
    first = walk._observe()
    walk.root([model], first)
    for _ in range(2):  # the ring of two is full of others now
        search(walk, [model])
    walk.observation = first
    search(walk, [model])
    report = attachment.report
    assert report is not None
    assert report.defects == {"stale root": CARTPOLE.env_num}
    assert report.unexplained == 0
    found = report.first
    assert isinstance(found, Divergence)
    assert found.where == "root"
    assert found.what == "length"  # the overwritten root had one token, what took its place has five
    detach(model)


@pytest.mark.parametrize("answer", ["off", "on"])
@pytest.mark.parametrize("disturb", ["stores", "clears"])
def test_roots_of_another_role_are_named(answer: str, disturb: str) -> None:
    model, attachment = validated(CARTPOLE, answer=answer)
    collecting, evaluating = (Walk(CARTPOLE, CARTPOLE.env_num, seed) for seed in range(2))
    for _ in range(2):
        search(collecting, [model])
    with attachment.role("evaluator"):
        if disturb == "stores":
            evaluating.root([model], collecting.observation)
        else:
            for roots in model.past_kv_cache_init_infer_envs:
                roots.clear()
    search(collecting, [model])
    report = attachment.report
    assert report is not None
    assert report.defects == {"roles collide": CARTPOLE.env_num}
    assert report.unexplained == 0
    detach(model)


def test_nodes_that_another_roles_start_cleared_are_named() -> None:
    model, attachment = validated(CARTPOLE)
    collecting, evaluating = (Walk(CARTPOLE, CARTPOLE.env_num, seed) for seed in range(2))
    collecting.root([model])
    collecting.simulate([model])
    with attachment.role("evaluator"):
        evaluating.root([model])
    collecting.simulate([model], parents=[1] * CARTPOLE.env_num)
    report = attachment.report
    assert report is not None
    assert report.defects == {"cleared by another": CARTPOLE.env_num}
    assert report.unexplained == 0
    detach(model)


def test_a_state_that_was_never_stored_is_named_and_the_comparison_goes_on() -> None:
    model, attachment = validated(CARTPOLE)
    walk = Walk(CARTPOLE, CARTPOLE.env_num)
    search(walk, [model])
    walk.root([model])
    walk.nodes[0] = walk.nodes[0] + 1
    search_on = [walk.simulate([model], parents=[0] * CARTPOLE.env_num) for _ in range(2)]
    search_on += [walk.simulate([model], parents=[1] * CARTPOLE.env_num) for _ in range(2)]
    report = attachment.report
    assert report is not None
    assert report.defects == {"miss raises": 2 * CARTPOLE.env_num}
    assert report.unexplained == 0
    assert report.outputs == report.calls - 2
    detach(model)


def plant_wrong_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our cache corrects the keys of layer 1, token 3 of full windows wrongly, by 0.5."""

    def planted(world_model: Any, layout: Any) -> Any:
        right = original(world_model, layout)
        if isinstance(right, DropLazily):
            assert isinstance(right.table, PositionSteps)
            right.table.packed[1, 3] += 0.5
            return right
        assert isinstance(right, DropAndCorrect)
        difference = right.difference.clone()
        difference[1, 0, :, 3] += 0.5
        return DropAndCorrect(right.limit, right.count, difference, layout)

    original = settings.overflow_of
    monkeypatch.setattr("concurrent_kv.compat.lightzero.attachment.overflow_of", planted)


def test_the_comparison_of_old_and_new_ends_with_0_where_nothing_differs(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--only", "cartpole", "heads of zeros", "--searches", "2", "--simulations", "6"]
    assert compare_old_new_cache.main(options) == 0
    printed = capsys.readouterr().out
    assert "cartpole" in printed
    assert "environments collide" in printed


def test_the_comparison_of_old_and_new_ends_with_1_on_a_difference(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plant_wrong_difference(monkeypatch)
    assert compare_old_new_cache.main(["--only", "lunarlander", "--searches", "3", "--simulations", "6"]) == 1
    assert "lunarlander: call" in capsys.readouterr().out


@pytest.mark.parametrize("answer", ["off", "on"])
def test_a_difference_that_no_defect_explains_is_reported_with_its_place(
    answer: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plant_wrong_difference(monkeypatch)
    heard: list[Divergence] = []
    model, attachment = validated(LUNARLANDER, answer=answer, on_divergence=heard.append)
    walk = Walk(LUNARLANDER, LUNARLANDER.env_num)
    walk.root([model])
    for parent in range(4):  # 1, 3 and 5 tokens, then a full window
        walk.simulate([model], parents=[parent] * LUNARLANDER.env_num)
    report = attachment.report
    assert report is not None
    first = report.first_unexplained
    assert first is not None
    assert report.first is first is heard[0]
    assert report.unexplained == len(heard) >= LUNARLANDER.env_num
    # Roots have 1 token, their children 3, and theirs 5; the third simulation's are the first full windows.
    assert (first.call, first.where, first.what, first.env_id) == (3, "node", "entry", 0)
    assert (first.layer, first.token) == (1, 3)
    assert first.difference == pytest.approx(0.5)
    assert (0, first.key) in model.past_kv_cache_recurrent_infer
    assert str(first) in caplog.text
    detach(model)


def test_the_configuration_chooses_the_mode() -> None:
    keys: dict[str, dict[str, Any]] = {
        "off": {},
        "also off": {"use_new_cache_manager": False, "cache_validation_mode": True},
        "validate": {"use_new_cache_manager": True, "cache_validation_mode": True},
        "on": {"use_new_cache_manager": True},
    }
    for name, changes in keys.items():
        model = make_world_model(CARTPOLE, **changes)
        attachment = attach(model)
        assert (attachment is None) == ("off" in name)
        if attachment is not None:
            assert attachment.mode == name
            detach(model)


@pytest.mark.parametrize("name", ["use_new_cache_manager", "cache_validation_mode"])
def test_a_key_of_the_configuration_that_is_text_is_refused_by_name(name: str) -> None:
    keys: dict[str, Any] = {"use_new_cache_manager": True, name: "False"}
    model = make_world_model(CARTPOLE, **keys)
    with pytest.raises(InvalidTypeError, match=f"{name} must be True or False, got 'False'"):
        attach(model)
    assert attachment_of(model) is None


def test_installed_models_attach_themselves_as_their_configuration_says() -> None:
    install(answer="on")
    try:
        plain = make_world_model(CARTPOLE)
        new = make_world_model(CARTPOLE, use_new_cache_manager=True, cache_validation_mode=True)
    finally:
        uninstall()
    later = make_world_model(CARTPOLE, use_new_cache_manager=True)
    assert attachment_of(plain) is None
    assert attachment_of(later) is None
    attachment = attachment_of(new)
    assert attachment is not None
    assert attachment.validation is not None
    assert attachment.validation.answer == "on"
    detach(new)


def test_threads_take_turns_and_each_gets_its_own_answers() -> None:
    # The released cache is one search's at a time: the other's start clears it.
    searches = ([6, 6, 6], [20])  # simulations of each search of each thread: as many steps for both
    released = make_world_model(CARTPOLE)
    model, attachment = validated(CARTPOLE, answer="on", searches=len(searches))
    together = threading.Barrier(len(searches), timeout=PATIENCE)

    def walking(model: Any, seed: int, barrier: threading.Barrier) -> list[tuple[Any, ...]]:
        walk = Walk(CARTPOLE, CARTPOLE.env_num, seed)
        answers = []
        for simulations in searches[seed]:
            barrier.wait()
            answers += walk.root([model])
            for _ in range(simulations):
                barrier.wait()
                answers += walk.simulate([model])
            walk.act()
        return answers

    alone = [walking(copy.deepcopy(released), seed, threading.Barrier(1)) for seed in range(len(searches))]
    with ThreadPoolExecutor(len(searches)) as pool:
        running = [pool.submit(walking, model, seed, together) for seed in range(len(searches))]
        for expected, answers in zip(alone, running, strict=True):
            for pair in zip(expected, answers.result(timeout=PATIENCE), strict=True):
                assert_same_outputs(pair)
    report = attachment.report
    assert report is not None
    assert report.unexplained == 0
    assert set(report.defects) <= set(DEFECTS)
    assert report.defects["cleared by another"] > 0
    detach(model)


def test_a_stored_entry_of_the_released_cache_is_what_is_compared() -> None:
    model, attachment = validated(CARTPOLE)
    walk = Walk(CARTPOLE, CARTPOLE.env_num)
    search(walk, [model])
    for env_id, pool in enumerate(attachment.manager.init_pools):
        roots = vars(model)["past_kv_cache_init_infer_envs"][env_id]
        slots = vars(model)["shared_pool_init_infer"][env_id]
        for key, slot in roots.items():
            theirs = slots[slot]
            ours = pool.peek((env_id, key))
            assert isinstance(ours, KeysValues)
            for number, layer in enumerate(theirs._keys_values):
                assert torch.equal(layer._k_cache.get(), ours.keys[number])
                assert torch.equal(layer._v_cache.get(), ours.values[number])
    detach(model)
