"""What code around an attached world model may do with it: assign the cache's attributes, copy it, save it."""

from __future__ import annotations

import copy
import io
import pickle
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("lzero", reason="needs LightZero 0.2.0: make lightzero")

from concurrent_kv import InvalidArgumentError, InvalidTypeError
from concurrent_kv.compat.lightzero import Attachment, attach, attachment_of, detach, from_lightzero
from concurrent_kv.compat.lightzero.model import OF_THE_RINGS
from tests.lightzero_support import SHAPES, Walk, assert_same_outputs, make_world_model

ENV_NUM = 2
SHAPE = replace(SHAPES["cartpole"], env_num=ENV_NUM)


@pytest.fixture(params=["validate", "on"])
def model(request: pytest.FixtureRequest) -> Iterator[Any]:
    made = make_world_model(SHAPE)
    attach(made, request.param)
    yield made
    detach(made)


@pytest.fixture
def walk(model: Any) -> Walk:
    """A search that is under way."""
    made = Walk(SHAPE, ENV_NUM)
    made.root([model])
    made.simulate([model])
    return made


# Assignments ----------------------------------------------------------------------------------------------------------


def test_emptying_the_nodes_by_assignment_clears_them(model: Any, walk: Walk) -> None:
    assert len(model.past_kv_cache_recurrent_infer) == ENV_NUM
    model.past_kv_cache_recurrent_infer = defaultdict(dict)
    assert len(model.past_kv_cache_recurrent_infer) == 0
    assert [len(roots) for roots in model.past_kv_cache_init_infer_envs] == [1] * ENV_NUM
    before = model.hit_count
    walk.simulate([model], parents=[0] * ENV_NUM)
    assert model.hit_count == before + ENV_NUM


def test_emptying_the_roots_by_assignment_clears_them(model: Any, walk: Walk) -> None:
    model.past_kv_cache_init_infer_envs = [{} for _ in range(ENV_NUM)]
    assert [len(roots) for roots in model.past_kv_cache_init_infer_envs] == [0] * ENV_NUM
    walk.act()
    walk.root([model])
    assert model.root_hit_cnt == 0


def test_making_the_cache_structures_anew_clears_as_it_does_in_the_released_model(model: Any, walk: Walk) -> None:
    released = copy.deepcopy(model)
    detach(released)
    for each in (released, model):
        each._initialize_cache_structures()
        each._initialize_transformer_keys_values()
    walk.new_episode()
    for _ in range(2):
        assert_same_outputs(walk.root([released, model]))
        for _ in range(4):
            assert_same_outputs(walk.simulate([released, model]))
        walk.act()


@pytest.mark.parametrize("name", ["past_kv_cache_recurrent_infer", "past_kv_cache_init_infer_envs", *OF_THE_RINGS])
def test_assigning_anything_else_is_an_error_that_says_what_would_do(model: Any, walk: Walk, name: str) -> None:
    with pytest.raises(InvalidArgumentError, match=rf"{name}.*set_init_cache"):
        setattr(model, name, [{"key": 1}])
    walk.simulate([model], parents=[1] * ENV_NUM)
    assert model.hit_count == model.total_query_count
    detach(model)
    setattr(model, name, getattr(model, name))  # the released one's is an attribute like any other


@pytest.mark.parametrize("ring", ["recur", "init_envs"])
def test_copying_to_a_ring_that_is_not_there_is_an_error_that_says_what_would_do(model: Any, ring: str) -> None:
    kv = model.transformer.generate_empty_keys_values(n=1, max_tokens=8)
    with pytest.raises(InvalidArgumentError, match="set_init_cache"):
        getattr(model, f"custom_copy_kv_cache_to_shared_{ring}")(*[kv, 0][: 1 + (ring == "init_envs")])


def test_a_copy_to_the_world_model_ring_is_private(model: Any) -> None:
    kv = model.transformer.generate_empty_keys_values(n=1, max_tokens=8)
    for layer in kv._keys_values:
        layer.update(torch.ones(1, 2, 3, 32), torch.ones(1, 2, 3, 32))
    copies = [model.custom_copy_kv_cache_to_shared_wm(kv) for _ in range(ENV_NUM + 1)]
    kv[0]._k_cache._cache += 1
    for made in copies:
        assert made.size == 3
        assert torch.equal(from_lightzero(made).keys, torch.ones(2, 1, 2, 3, 32))


# Copies and files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("save", [pickle.dumps, lambda model: torch.save(model, io.BytesIO())])
def test_pickling_is_an_error_that_says_what_would_do(model: Any, save: Callable[[Any], Any], walk: Walk) -> None:
    with pytest.raises(InvalidTypeError, match="state_dict"):
        save(model)
    walk.simulate([model])
    assert model.hit_count == model.total_query_count


def test_the_state_goes_through_a_file_in_either_direction(model: Any, walk: Walk) -> None:
    released = make_world_model(SHAPE, seed=1)
    assert list(released.state_dict()) == list(model.state_dict())
    for source, target in ((model, released), (released, model)):
        with torch.no_grad():
            for number, parameter in enumerate(source.parameters()):
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) * 0.01)
        file = io.BytesIO()
        torch.save(source.state_dict(), file)
        file.seek(0)
        target.load_state_dict(torch.load(file))
        for each in (released, model):
            each.clear_caches()
        walk.new_episode()
        assert_same_outputs(walk.root([released, model]))
        assert_same_outputs(walk.simulate([released, model]))


def test_a_deep_copy_in_the_middle_of_a_search_begins_with_nothing_and_answers_the_same(model: Any, walk: Walk) -> None:
    copied = copy.deepcopy(model)
    before, after = attachment_of(model), attachment_of(copied)
    assert isinstance(before, Attachment)
    assert isinstance(after, Attachment)
    assert type(copied) is type(model)
    assert (after.mode, after.env_ids) == (before.mode, before.env_ids)
    assert after.manager is not before.manager
    assert len(copied.past_kv_cache_recurrent_infer) == 0
    walk.simulate([model], parents=[1] * ENV_NUM)
    walk.new_episode()
    assert_same_outputs(walk.root([model, copied]))
    assert_same_outputs(walk.simulate([model, copied]))
    assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in copied.parameters()}
    detach(copied)
    assert attachment_of(model) is before
    walk.simulate([model])
