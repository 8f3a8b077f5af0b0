"""What `attach` refuses, and that a refusal leaves the model as it was."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("lzero", reason="needs LightZero 0.2.0: make lightzero")

from concurrent_kv import ClosedError, InvalidArgumentError, InvalidTypeError, KVCacheManager
from concurrent_kv.compat.lightzero import Attachment, attach, attachment_of, detach
from concurrent_kv.native import native
from tests.lightzero_support import SHAPES, Walk, make_world_model

ENV_NUM = 2
SHAPE = replace(SHAPES["cartpole"], env_num=ENV_NUM)
SIZES = {"num_layers": 2, "num_heads": 2, "embed_dim": 64, "context_length": 8, "num_simulations": 25, "device": "cpu"}


def manager(env_num: int = ENV_NUM, **changes: Any) -> KVCacheManager:
    """A manager for the model's shapes, but for `changes`."""
    return KVCacheManager({**SIZES, "max_cache_size": 26 * env_num, **changes}, env_num)


def closed() -> KVCacheManager:
    made = manager()
    made.close()
    return made


@pytest.fixture
def model() -> Iterator[Any]:
    made = make_world_model(SHAPE)
    yield made
    detach(made)


REFUSED: dict[str, tuple[Callable[[], dict[str, Any]], type[Exception], str]] = {
    "no mode": (lambda: {"mode": "ON"}, InvalidArgumentError, "mode must be"),
    "one environment twice": (lambda: {"env_ids": [0, 0]}, InvalidArgumentError, "env_ids must be different ints"),
    "another environment": (lambda: {"env_ids": [1, 2]}, InvalidArgumentError, r"0 to 1.*got \(1, 2\)"),
    "no environment": (lambda: {"env_ids": []}, InvalidArgumentError, r"env_ids .* got \(\)"),
    "a number for a list": (lambda: {"env_ids": 0}, InvalidTypeError, "env_ids must be a sequence"),
    "a float": (lambda: {"env_ids": [0.0, 1.0]}, InvalidTypeError, "env_ids must be different ints"),
    "no manager": (lambda: {"manager": "pools"}, InvalidTypeError, "manager must be a KVCacheManager"),
    "too few environments": (lambda: {"manager": manager(1)}, InvalidArgumentError, r"0 to 0.*env_num"),
    "other shapes": (lambda: {"manager": manager(context_length=10)}, InvalidArgumentError, "max_tokens=10"),
    "smaller searches": (lambda: {"manager": manager(num_simulations=9)}, InvalidArgumentError, "num_simulations, 25"),
    "a closed manager": (lambda: {"manager": closed()}, ClosedError, "closed"),
    "searches of a manager": (
        lambda: {"manager": manager(), "searches": 2},
        InvalidArgumentError,
        "searches cannot be",
    ),
    "one search of a manager": (
        lambda: {"manager": manager(), "searches": 1},
        InvalidArgumentError,
        "searches cannot be",
    ),
    "settings of a manager": (
        lambda: {"manager": manager(), "searches": 2, "init_entries": 9, "policy": "lru"},
        InvalidArgumentError,
        "searches, init_entries, policy cannot be given beside manager",
    ),
    "no answer": (lambda: {"answer": "both"}, InvalidArgumentError, "answer must be"),
    "no callback": (lambda: {"on_divergence": 3}, InvalidTypeError, "on_divergence must be callable"),
    "too few slots": (lambda: {"recur_slots": 5}, InvalidArgumentError, "recur_slots must be at least 8"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_by_name_and_leaves_the_model_attached_as_it_was(model: Any, case: str) -> None:
    arguments, error, message = REFUSED[case]
    before = attach(model, "on")
    walk = Walk(SHAPE, ENV_NUM)
    walk.root([model])
    with pytest.raises(error, match=message):
        attach(model, **{"mode": "on", **arguments()})
    assert attachment_of(model) is before
    walk.simulate([model])
    assert model.hit_count == ENV_NUM


def test_a_model_around_a_world_model_is_refused_with_what_to_pass_instead(model: Any) -> None:
    around = torch.nn.Module()
    around.world_model = model
    with pytest.raises(InvalidTypeError, match=r"got Module: pass its \.world_model"):
        attach(around, "on")


def test_an_attachments_own_manager_is_refused_for_the_next_one_as_it_is_closed(model: Any) -> None:
    before = attach(model, "on")
    assert isinstance(before, Attachment)
    with pytest.raises(InvalidArgumentError, match="closed with it"):
        attach(model, "validate", manager=before.manager)
    assert attachment_of(model) is before


def test_a_manager_that_was_given_outlives_the_attachment(model: Any) -> None:
    pools = manager(4)
    for ids in ([0, 1], [3, 2]):
        attach(model, "on", manager=pools, env_ids=ids)
        Walk(SHAPE, ENV_NUM).root([model])
    detach(model)
    assert [len(pool) for pool in pools.init_pools] == [1, 1, 1, 1]
    pools.check_integrity()


# Copies and searches under way ----------------------------------------------------------------------------------------


def test_a_shallow_copy_of_an_attached_model_leaves_its_attachment_open_when_it_goes(model: Any) -> None:
    attachment = attach(model, "on")
    walk = Walk(SHAPE, ENV_NUM)
    walk.root([model])
    for mode in ("off", "on"):
        other = copy.copy(model)
        assert attachment_of(other) is attachment
        attach(other, mode)
        walk.simulate([model])
    assert model.hit_count == 2 * ENV_NUM
    detach(other)


@pytest.mark.parametrize("is_first_gone", [True, False])
def test_the_last_of_shallow_copies_closes_what_they_shared(model: Any, is_first_gone: bool) -> None:
    attachment = attach(model, "on")
    assert isinstance(attachment, Attachment)
    other = copy.copy(model)
    first, last = (model, other) if is_first_gone else (other, model)
    detach(first)
    Walk(SHAPE, ENV_NUM).root([last])
    detach(last)
    with pytest.raises(ClosedError):
        attachment.manager.init_pools[0].get("key")


def test_a_shallow_copy_that_was_dropped_does_not_keep_the_attachment_open(model: Any) -> None:
    attachment = attach(model, "on")
    assert isinstance(attachment, Attachment)
    copy.copy(model)
    gc.collect()
    detach(model)
    with pytest.raises(ClosedError):
        attachment.manager.init_pools[0].get("key")


@pytest.mark.parametrize("mode", ["validate", "on"])
def test_a_search_that_began_before_the_model_was_attached_goes_on_with_the_states_alone(model: Any, mode: Any) -> None:
    walk = Walk(SHAPE, ENV_NUM)
    walk.root([model])
    walk.simulate([model])
    attachment = attach(model, mode, answer="on")
    assert isinstance(attachment, Attachment)
    before = model.hit_count
    walk.simulate([model])
    assert model.hit_count == before
    assert model.keys_values_wm_size_list == [1] * ENV_NUM
    walk.simulate([model], parents=[2] * ENV_NUM)  # what it stored since then is found
    assert model.hit_count == before + ENV_NUM
    if attachment.report is not None:
        assert set(attachment.report.defects) == {"miss raises"}
        assert attachment.report.unexplained == 0


# Room -----------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(native is None, reason="needs the compiled module, which corrects what is read")
@pytest.mark.parametrize("rotary_emb", [False, True])
def test_nodes_of_full_windows_fit_three_slots_each(rotary_emb: bool) -> None:
    shape = replace(SHAPE, rotary_emb=rotary_emb)
    nodes = ENV_NUM * (shape.num_simulations + 1)
    made = make_world_model(shape)
    attachment = attach(made, "on", recur_slots=3 * nodes, wait_timeout=1.0)
    assert isinstance(attachment, Attachment)
    walk = Walk(shape, ENV_NUM)
    for _ in range(5):  # the window of 8 is full at the fourth
        walk.root([made])
        for _ in range(shape.num_simulations):
            walk.simulate([made])
    stats = attachment.manager.recur_pool.stats()
    assert stats.entries == ENV_NUM * shape.num_simulations
    assert stats.slots_in_use <= 3 * stats.entries
    attachment.manager.check_integrity()
    detach(made)
