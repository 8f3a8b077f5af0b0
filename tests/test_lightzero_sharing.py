"""Attached world models that share a manager: whose roots may meet, and who hears that a context was lost."""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lzero", reason="needs LightZero 0.2.0: make lightzero")

from concurrent_kv import InvalidArgumentError, KVCacheManager
from concurrent_kv.compat.lightzero import Attachment, LightZeroKVCacheManager, attach, attachment_of, detach
from tests.lightzero_support import PATIENCE, SHAPES, Walk, assert_same_outputs, make_world_model

ENV_NUM = 2
ROOT = Path(__file__).resolve().parents[1]
SHAPE = replace(SHAPES["cartpole"], env_num=ENV_NUM)
LOST = "contexts begin anew"


@pytest.fixture
def pools() -> KVCacheManager:
    return LightZeroKVCacheManager(make_world_model(SHAPE).config, 2 * ENV_NUM).manager


def shift_transformer(model: Any) -> None:
    """Change weights without changing the latent states of what is observed."""
    for parameter in model.transformer.parameters():
        parameter.data += 0.1


# Weights --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("env_ids", [None, [1, 2]])
def test_models_of_different_weights_are_refused_the_same_environments(pools: KVCacheManager, env_ids: Any) -> None:
    one = make_world_model(SHAPE)
    other = copy.deepcopy(one)
    shift_transformer(other)
    attach(one, "on", manager=pools)
    with pytest.raises(InvalidArgumentError, match=r"env_ids \[(0, )?1\] .* other weights.*same_weights"):
        attach(other, "on", manager=pools, env_ids=env_ids)
    assert attachment_of(other) is None
    attach(other, "on", manager=pools, env_ids=[2, 3])
    walk = Walk(SHAPE, ENV_NUM)
    walk.root([one, other])
    walk.act()
    walk.root([one, other])
    for model in (one, other):
        assert model.root_hit_cnt == ENV_NUM
        detach(model)
    pools.check_integrity()


def test_models_of_different_weights_are_refused_an_attachments_own_manager() -> None:
    one, other = make_world_model(SHAPE), make_world_model(SHAPE, seed=1)
    attachment = attach(one, "on")
    assert isinstance(attachment, Attachment)
    with pytest.raises(InvalidArgumentError, match="other weights"):
        attach(other, "on", manager=attachment.manager)
    copied = attachment_of(copy.deepcopy(one))  # and of a copy's, whose model is gone
    assert copied is not None
    gc.collect()
    attach(other, "on", manager=copied.manager)
    for model in (one, other):
        detach(model)


def share_memory(one: Any) -> Any:
    return copy.copy(one)


def share_parameters(one: Any) -> Any:
    other = make_world_model(SHAPE, seed=1)
    for mine, theirs in zip(other.parameters(), one.parameters(), strict=True):
        mine.data = theirs.data
    for mine, theirs in zip(other.buffers(), one.buffers(), strict=True):
        mine.data = theirs.data
    return other


@pytest.mark.parametrize("share", [share_memory, share_parameters])
def test_models_that_share_their_weights_share_roots(pools: KVCacheManager, share: Callable[[Any], Any]) -> None:
    one = make_world_model(SHAPE)
    other, walk = share(one), Walk(SHAPE, ENV_NUM)
    attach(one, "on", manager=pools)
    walk.root([one])
    attach(other, "on", manager=pools)  # takes nothing from the one that is there
    walk.act()
    walk.root([other])
    assert other.root_hit_cnt == ENV_NUM
    for model in (one, other):
        detach(model)


def test_models_that_are_said_to_have_the_same_weights_share_roots(pools: KVCacheManager) -> None:
    one = make_world_model(SHAPE)
    other, walk = copy.deepcopy(one), Walk(SHAPE, ENV_NUM)
    attach(one, "on", manager=pools)
    walk.root([one])
    attach(other, "on", manager=pools, same_weights=True)
    walk.act()
    walk.root([other])
    assert other.root_hit_cnt == ENV_NUM
    for model in (one, other):
        detach(model)


@pytest.mark.parametrize("goes", [detach, lambda model: attach(model, "off"), lambda model: attach(model, "on")])
def test_the_environments_of_a_model_that_went_are_free(pools: KVCacheManager, goes: Callable[[Any], Any]) -> None:
    one, other = make_world_model(SHAPE), make_world_model(SHAPE, seed=1)
    attach(one, "on", manager=pools)
    goes(one)
    attach(other, "on", manager=pools)
    for model in (one, other):
        detach(model)


def test_the_environments_of_a_model_that_was_dropped_are_free(pools: KVCacheManager) -> None:
    attach(make_world_model(SHAPE), "on", manager=pools)
    gc.collect()
    other = make_world_model(SHAPE, seed=1)
    attach(other, "on", manager=pools)
    detach(other)


@pytest.mark.parametrize("is_detached", [True, False])
def test_what_was_stored_before_the_weights_changed_is_gone_when_a_model_is_attached_anew(
    pools: KVCacheManager, is_detached: bool
) -> None:
    released = make_world_model(SHAPE)
    model, walk = copy.deepcopy(released), Walk(SHAPE, ENV_NUM)
    attach(model, "on", manager=pools)
    walk.root([model])
    if is_detached:
        detach(model)
    for each in (released, model):
        shift_transformer(each)
    attach(model, "on", manager=pools)
    walk.act()
    assert_same_outputs(walk.root([released, model]))
    assert model.root_hit_cnt == 0
    detach(model)


def test_clearing_the_caches_of_a_model_leaves_the_roots_of_other_weights(pools: KVCacheManager) -> None:
    one = make_world_model(SHAPE)
    other = copy.deepcopy(one)
    sharing = copy.copy(one)
    shift_transformer(other)
    for model, env_ids in ((one, [0]), (sharing, [1]), (other, [2, 3])):
        attach(model, "on", manager=pools, env_ids=env_ids)
    walks = [Walk(SHAPE, 1, 0), Walk(SHAPE, 1, 1), Walk(SHAPE, ENV_NUM, 2)]
    for walk, model in zip(walks, (one, sharing, other), strict=True):
        walk.root([model])
    one.clear_caches()
    assert [len(pool) for pool in pools.init_pools] == [0, 0, 1, 1]
    walks[2].act()
    walks[2].root([other])
    assert other.root_hit_cnt == ENV_NUM
    for model in (one, sharing):
        detach(model)
    other.clear_caches()
    assert [len(pool) for pool in pools.init_pools] == [0] * 4
    detach(other)


def test_a_model_in_a_forked_child_can_be_detached_or_attached_anew() -> None:
    script = """
import copy, os
from tests.lightzero_support import Walk, assert_same_outputs, make_world_model
from tests.test_lightzero_sharing import ENV_NUM, SHAPE
from concurrent_kv.compat.lightzero import attach, detach

released = make_world_model(SHAPE)
models = [copy.deepcopy(released) for _ in range(2)]
for model in models:
    attach(model, "on")
    Walk(SHAPE, ENV_NUM).root([model])
child = os.fork()
if not child:
    detach(models[0])
    attach(models[1], "on")
walk = Walk(SHAPE, ENV_NUM)
assert_same_outputs(walk.root([released, *models]))
assert_same_outputs(walk.simulate([released, *models]))
if not child:
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=PATIENCE, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr


# Contexts that are lost -----------------------------------------------------------------------------------------------


def test_searches_that_take_turns_in_one_thread_are_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    model = make_world_model(SHAPE)
    attach(model, "on")
    one, other = (Walk(SHAPE, ENV_NUM, seed) for seed in range(2))
    for walk in (one, other):
        walk.root([model])
        walk.simulate([model])
    assert LOST not in caplog.text
    for _ in range(2):
        one.simulate([model], parents=[1] * ENV_NUM)
    assert caplog.text.count(LOST) == 1
    assert f"{ENV_NUM} of the {ENV_NUM} states" in caplog.text
    detach(model)


def test_a_search_that_goes_on_in_another_thread_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    model, walk = make_world_model(SHAPE), Walk(SHAPE, ENV_NUM)
    attach(model, "on", searches=2)
    walk.root([model])
    walk.simulate([model])
    going_on = threading.Thread(target=walk.simulate, args=([model], [1] * ENV_NUM))
    going_on.start()
    going_on.join(PATIENCE)
    assert caplog.text.count(LOST) == 1
    detach(model)


def test_searches_that_take_turns_in_roles_lose_nothing(caplog: pytest.LogCaptureFixture) -> None:
    released = make_world_model(SHAPE)
    model, alone = copy.deepcopy(released), [copy.deepcopy(released) for _ in range(2)]
    attachment = attach(model, "on")
    assert isinstance(attachment, Attachment)
    walks = [Walk(SHAPE, ENV_NUM, seed) for seed in range(2)]
    for step in range(4):
        for number, walk in enumerate(walks):
            with attachment.role(("default", "evaluator")[number]):
                models = [alone[number], model]
                assert_same_outputs(walk.simulate(models) if step else walk.root(models)[:2])
    assert LOST not in caplog.text
    assert model.hit_count == model.total_query_count
    detach(model)


def test_a_search_as_it_should_be_warns_of_nothing(caplog: pytest.LogCaptureFixture) -> None:
    model, walk = make_world_model(SHAPE), Walk(SHAPE, ENV_NUM)
    attach(model, "on")
    for move in range(3):
        walk.root([model])
        for _ in range(6):
            walk.simulate([model])
        walk.act()
        if move == 1:
            model.clear_caches()  # between searches, as LightZero does
    assert LOST not in caplog.text
    detach(model)
