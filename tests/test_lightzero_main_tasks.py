"""The main branch's world model of several tasks beside itself on our cache: every output equal, and no tasks mixed."""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from concurrent_kv import InvalidArgumentError
from concurrent_kv.compat.lightzero import Attachment, attach, attachment_of, detach, install, uninstall
from concurrent_kv.compat.lightzero.kinds import Kind, kind_of
from tests.lightzero_checkout import CHECKOUT
from tests.lightzero_main_support import NEEDS_CHECKOUT

pytestmark = pytest.mark.skipif(CHECKOUT is None, reason=NEEDS_CHECKOUT)

ENV_NUM, TASKS = 3, 2
OPTIONS: dict[str, dict[str, Any]] = {
    "none": {"use_task_embed": False, "task_embed_option": None},
    "added": {"use_task_embed": True, "task_embed_option": "add_task_embed"},
    "concatenated": {"use_task_embed": True, "task_embed_option": "concat_task_embed"},
    "rebuilt": {"use_task_embed": True, "task_embed_option": "add_task_embed", "rebuild_kv_window_from_tokens": True},
}


def make_model(**changes: Any) -> Any:
    """A `WorldModelMT` of two tasks with three environments each, in evaluation mode."""
    from easydict import EasyDict
    from lzero.model.unizero_model_multitask import UniZeroMTModel
    from lzero.model.unizero_world_models.world_model_multitask import WorldModelMT
    from lzero.policy.unizero import UniZeroPolicy

    config = EasyDict(UniZeroPolicy.config["model"]["world_model_cfg"])
    config.update(
        num_layers=2,
        num_heads=2,
        embed_dim=64,
        context_length=8,
        max_blocks=10,
        max_tokens=20,
        env_num=ENV_NUM,
        task_num=TASKS,
        action_space_size=18,
        num_simulations=12,
        obs_type="image",
        encoder_type="resnet",
        device="cpu",
        task_embed_dim=32,
        share_head=False,
    )
    config.update(OPTIONS["none"] | changes)
    # At the commit that this was written for, its constructor reads two settings before it has them.
    for name in ("exact_kv_window_reset", "rebuild_kv_window_from_tokens"):
        setattr(WorldModelMT, name, config.get(name, False))
    torch.manual_seed(0)
    with contextlib.redirect_stdout(io.StringIO()):
        model = UniZeroMTModel(
            observation_shape=(3, 64, 64),
            num_res_blocks=1,
            num_channels=4,
            norm_type="LN",
            world_model_cfg=config,
            task_num=TASKS,
        ).world_model.eval()
    for name in ("exact_kv_window_reset", "rebuild_kv_window_from_tokens"):
        setattr(model, name, config.get(name, False))
        delattr(WorldModelMT, name)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3)
    model.precompute_pos_emb_diff_kv()
    return model


class Walk:
    """Episodes of one task's environments, the same for every model."""

    def __init__(self, models: list[Any], task: int, seed: int = 0) -> None:
        self.models, self.task = models, task
        self.random = np.random.default_rng(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.last, self.actions = self._observe(), [-1] * ENV_NUM

    def _observe(self) -> Tensor:
        return torch.randn(ENV_NUM, 3, 64, 64, generator=self.generator)

    def root(self) -> None:
        """A new search of the task's environments."""
        current = self._observe()
        asked = {"obs": self.last, "action": self.actions, "current_obs": current}
        answers = [model.forward_initial_inference(dict(asked), task_id=self.task) for model in self.models]
        self._compare(answers)
        self.nodes = [answers[0][1].numpy()]
        self.last, self.actions = current, self.random.integers(0, 18, ENV_NUM).tolist()

    def simulate(self) -> None:
        """One simulated step, each environment from a node of its own tree."""
        parents = self.random.integers(0, len(self.nodes), ENV_NUM)
        states = np.stack([self.nodes[parent][row] for row, parent in enumerate(parents)])
        actions = torch.from_numpy(self.random.integers(0, 18, ENV_NUM))
        asked = ([(states, actions)], len(self.nodes) - 1, [0] * ENV_NUM)
        answers = [model.forward_recurrent_inference(*asked, task_id=self.task) for model in self.models]
        self._compare(answers)
        lengths = [list(model.keys_values_wm_size_list) for model in self.models]
        assert all(each == lengths[0] for each in lengths)
        self.nodes.append(answers[0][1].numpy())

    def _compare(self, answers: list[tuple[Any, ...]]) -> None:
        for other in answers[1:]:
            for theirs, ours in zip(answers[0], other, strict=True):
                assert (theirs is None) == (ours is None)
                assert theirs is None or torch.equal(theirs, ours)

    def end(self) -> None:
        """All of the task's episodes end."""
        for model in self.models:
            for roots in model.past_kv_cache_init_infer_envs:
                roots.clear()
            for contexts in model.past_token_context_init_infer_envs:
                contexts.clear()
        self.actions = [-1] * ENV_NUM


@pytest.fixture(params=OPTIONS)
def models(request: pytest.FixtureRequest) -> Iterator[list[Any]]:
    model = make_model(**OPTIONS[request.param])
    made = copy.deepcopy(model)
    assert isinstance(attach(made, "on"), Attachment)
    yield [model, made]
    kv = attachment_of(made)
    assert kv is not None
    kv.session.close()
    kv.manager.check_integrity()
    detach(made)


COUNTED = ("hit_count", "total_query_count", "root_hit_cnt", "root_total_query_cnt", "kv_padding_total_samples")


def test_outputs_are_equal_while_tasks_take_turns_in_the_midst_of_their_episodes(models: list[Any]) -> None:
    walks = [Walk(models, task, seed=task) for task in range(TASKS)]
    for move in range(8):
        for walk in walks:
            walk.root()
            for _ in range(8):
                walk.simulate()
        if move == 5:
            walks[1].end()
            walks[0].actions = [-1] * ENV_NUM  # the main branch keeps the rows of all tasks together
    for name in COUNTED:
        assert getattr(models[0], name) == getattr(models[1], name), name
    assert models[0].root_hit_cnt == models[0].root_total_query_cnt > 0


def test_equal_states_of_two_tasks_do_not_meet() -> None:
    model = make_model()
    attach(model, "on")
    kv = attachment_of(model)
    assert kv is not None
    walks = [Walk([model], task) for task in range(TASKS)]  # the same observations
    for walk in walks:
        walk.root()
    sizes = [len(pool) for pool in kv.manager.init_pools]
    assert sizes == [1] * (TASKS * ENV_NUM)
    assert [len(roots) for roots in model.past_kv_cache_init_infer_envs] == [TASKS] * ENV_NUM
    model.past_kv_cache_init_infer_envs[1].clear()
    assert [len(pool) for pool in kv.manager.init_pools] == [1, 0, 1] * TASKS
    detach(model)


def test_what_a_model_of_tasks_cannot_have_is_refused_by_name() -> None:
    model = make_model()
    assert kind_of(model) is Kind.MAIN_OF_TASKS
    with pytest.raises(InvalidArgumentError, match="models of several tasks, got 'validate'"):
        attach(model, "validate")
    with pytest.raises(InvalidArgumentError, match="3 environments of each of 2 tasks, got 2"):
        attach(model, "on", env_ids=[0, 1])
    attach(model, "on")
    walk = Walk([model], task=TASKS)
    with pytest.raises(InvalidArgumentError, match="task_id must be from 0 to 1, got 2"):
        walk.root()
    detach(model)


def test_a_model_of_tasks_that_is_made_after_install_is_attached_and_its_copy_too() -> None:
    install()
    try:
        model = make_model(use_new_cache_manager=True)
        assert attachment_of(make_model()) is None
    finally:
        uninstall()
    copied = copy.deepcopy(model)
    for each in (model, copied):
        kv = attachment_of(each)
        assert kv is not None
        assert kv.kind is Kind.MAIN_OF_TASKS
    walk = Walk([model, copied], task=1)
    for _ in range(3):
        walk.root()
        for _ in range(4):
            walk.simulate()
    assert copied.hit_count == copied.total_query_count > 0
    for each in (model, copied):
        detach(each)


def test_in_reanalysis_outputs_are_equal_and_nothing_is_stored(models: list[Any]) -> None:
    states = torch.randn(5, 1, 64, generator=torch.Generator().manual_seed(0)).numpy()
    if models[0].task_embed_option == "concat_task_embed":
        states[..., 32:] = 0.0
    for model in models:
        model.reanalyze_phase, model.latent_state = True, None
    for _ in range(3):
        asked = ([(states, torch.arange(5))], 0, [0] * 5)
        answers = [model.forward_recurrent_inference(*asked, task_id=1) for model in models]
        for theirs, ours in zip(*answers, strict=True):
            assert torch.equal(theirs, ours)
        states = answers[0][1].numpy()
    kv = attachment_of(models[1])
    assert kv is not None
    assert kv.manager.get_stats_summary().total.entries == 0
    for model in models:
        model.reanalyze_phase = False
