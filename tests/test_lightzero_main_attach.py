"""`attach` and `install` know LightZero's main branch, and refuse what they do not know by what it lacks."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from concurrent_kv import InvalidArgumentError, InvalidTypeError
from concurrent_kv.compat.lightzero import attach, attachment_of, detach, install, uninstall
from concurrent_kv.compat.lightzero.kinds import Kind, check_class, kind_of
from tests.lightzero_checkout import CHECKOUT
from tests.lightzero_main_stub import StubWorldModel, stub_config
from tests.lightzero_main_support import NEEDS_CHECKOUT, SOURCES, make_main_model


@pytest.mark.parametrize("source", SOURCES)
def test_a_world_model_of_the_main_branch_is_known_by_its_cache(source: str) -> None:
    assert kind_of(make_main_model(source)) is Kind.MAIN_LEGACY
    managed = make_main_model(source, use_new_cache_manager=True)
    assert kind_of(managed) is Kind.MAIN_MANAGED
    assert check_class(type(managed)).is_main


def test_a_world_model_of_0_2_0_is_known() -> None:
    lzero = pytest.importorskip("lzero", reason="needs LightZero 0.2.0: make lightzero")
    from tests.lightzero_support import SHAPES, is_main, make_world_model

    if is_main():
        pytest.skip(f"{lzero.__file__} is a checkout of the main branch")
    assert kind_of(make_world_model(SHAPES["cartpole"])) is Kind.RELEASED


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(
    ("name", "is_managed"),
    [
        ("past_kv_cache_init_infer_envs", False),
        ("past_kv_cache_recurrent_infer", False),
        ("kv_cache_manager", True),
        ("current_infer_env_ids", False),
        ("context_length", True),
    ],
)
def test_a_model_that_lacks_an_attribute_is_refused_by_its_name_and_left_alone(
    source: str, name: str, is_managed: bool
) -> None:
    model = make_main_model(source, use_new_cache_manager=is_managed)
    released = type(model)
    delattr(model, name)
    for mode in ("off", "validate", "on"):
        with pytest.raises(InvalidTypeError, match=rf"main branch with its .* has no {name}$"):
            attach(model, mode)
    assert type(model) is released
    assert attachment_of(model) is None


@pytest.mark.parametrize("source", SOURCES)
def test_a_manager_that_lacks_a_method_is_refused_by_its_name(source: str) -> None:
    model = make_main_model(source, use_new_cache_manager=True)
    model.kv_cache_manager = SimpleNamespace(init_pools=[], clear_all=None)
    with pytest.raises(InvalidTypeError, match=r"no kv_cache_manager\.get_init_cache\(\), kv_cache_manager\.set_init"):
        attach(model, "on")


class WithoutEnvironments(StubWorldModel):
    """As the main branch was before it knew true environment ids."""

    def update_cache_context(  # type: ignore[override]
        self, latent_state: Any, is_init_infer: bool = True, valid_context_lengths: Any = None
    ) -> None:
        raise NotImplementedError


class OfSeveralTasks(StubWorldModel):
    """As the main branch's `WorldModelMT`."""

    def wm_forward_for_initial_inference(self) -> None:
        raise NotImplementedError


def test_a_class_whose_method_lacks_a_parameter_is_refused_by_both() -> None:
    with pytest.raises(
        InvalidTypeError, match=r"got WithoutEnvironments, which has no update_cache_context\(env_ids=\)"
    ):
        attach(WithoutEnvironments(stub_config()), "on")


def test_a_model_of_several_tasks_is_refused_by_what_it_lacks() -> None:
    with pytest.raises(InvalidTypeError, match=r"got OfSeveralTasks, which has no retrieve_.*\(task_id=\), "):
        attach(OfSeveralTasks(stub_config()), "on")


@pytest.mark.skipif(CHECKOUT is None, reason=NEEDS_CHECKOUT)
def test_the_main_branchs_classes_for_several_tasks_and_for_ppo_are_known() -> None:
    from lzero.model.unizero_world_models.ppo_world_model import PPOWorldModel
    from lzero.model.unizero_world_models.world_model_multitask import WorldModelMT

    assert check_class(WorldModelMT) is Kind.MAIN_OF_TASKS
    assert check_class(PPOWorldModel) is Kind.MAIN_LEGACY


def test_something_else_is_refused_by_what_it_lacks() -> None:
    with pytest.raises(InvalidTypeError, match=r"got Linear, which has no retrieve_or_generate_kvcache\(\), trim_and"):
        attach(torch.nn.Linear(1, 1), "off")


# install --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The module that LightZero's world model is imported from, in a LightZero that is nothing else."""
    path = "lzero.model.unizero_world_models.world_model"
    parents = path.split(".")
    for number in range(1, len(parents) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parents[:number]), ModuleType(parents[number - 1]))
    yield sys.modules[path]
    uninstall()


def test_install_refuses_a_lightzero_that_it_does_not_know_by_what_it_lacks(installed: Any) -> None:
    installed.WorldModel = WithoutEnvironments
    before = WithoutEnvironments.__init__
    with pytest.raises(InvalidTypeError, match=r"update_cache_context\(env_ids=\)"):
        install()
    assert WithoutEnvironments.__init__ is before


@pytest.mark.parametrize("source", SOURCES)
def test_off_leaves_the_model_as_it_was(source: str) -> None:
    model = make_main_model(source)
    released = type(model)
    assert attach(model, "off") is None
    assert type(model) is released


def test_register_tokens_are_refused() -> None:
    model: Any = StubWorldModel(stub_config())
    model.transformer.use_register_token = True
    with pytest.raises(InvalidArgumentError, match="without register tokens"):
        attach(model, "on")


def test_a_model_that_is_made_after_install_is_attached_as_its_configuration_says(installed: Any) -> None:
    class Fresh(StubWorldModel):
        pass

    installed.WorldModel = Fresh
    install()
    assert attachment_of(Fresh(stub_config())) is None
    made = Fresh(stub_config(use_new_cache_manager=True))
    kv = attachment_of(made)
    assert kv is not None
    assert kv.kind is Kind.MAIN_MANAGED
    uninstall()
    assert attachment_of(Fresh(stub_config(use_new_cache_manager=True))) is None
    kv.manager.check_integrity()
    detach(made)
