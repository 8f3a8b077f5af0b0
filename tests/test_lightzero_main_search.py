"""The main branch's world model beside itself on our cache: the same inputs step by step, and every output equal."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from concurrent_kv import CapacityError, InvalidArgumentError
from concurrent_kv.compat.lightzero import Attachment, LightZeroKVCacheManager, attach, attachment_of, detach
from tests.lightzero_checkout import CHECKOUT
from tests.lightzero_main_stub import StubWorldModel
from tests.lightzero_main_support import NEEDS_CHECKOUT, SOURCES, make_main_model
from tests.support import HANG_SECONDS

ENV_NUM = 4
MODES: dict[str, dict[str, Any]] = {
    "absolute": {},
    "rotary": {"rotary_emb": True},
    "reset": {"exact_kv_window_reset": True},
    "rotary-reset": {"exact_kv_window_reset": True, "rotary_emb": True},
    "rebuilt": {"rebuild_kv_window_from_tokens": True},
}


class Walk:
    """Searches over episodes that begin and end in each environment at its own time, the same for every model."""

    def __init__(self, models: list[Any], seed: int = 0) -> None:
        self.models = models
        self.random = np.random.default_rng(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.size = 4 if hasattr(models[0], "tokenizer") else models[0].embed_dim
        self.last = self._observe()
        self.actions = np.full(ENV_NUM, -1)
        self.steps = np.zeros(ENV_NUM, dtype=np.int64)
        self.lengths: set[tuple[int, ...]] = set()
        self.roots = 0  # rows of them

    def _observe(self) -> Tensor:
        return torch.randn(ENV_NUM, self.size, generator=self.generator)

    def root(self, ready: list[int]) -> None:
        """A new search of some environments."""
        current = self._observe()
        self.ready = ready
        self.roots += len(ready)
        asked = {
            "obs": self.last[ready],
            "action": list(self.actions[ready]),
            "current_obs": current[ready],
            "ready_env_id": np.array(ready),
        }
        answers = [model.forward_initial_inference(dict(asked), self.steps[ready]) for model in self.models]
        self._compare(answers)
        self.nodes, self.depths = [answers[0][1].numpy()], [np.zeros(len(ready), dtype=np.int64)]
        self.last = self.last.clone()
        self.last[ready] = current[ready]
        self.actions[ready] = self.random.integers(0, 2, len(ready))

    def simulate(self) -> None:
        """One simulated step, each environment from a node of its own tree."""
        rows = range(len(self.ready))
        parents = self.random.integers(0, len(self.nodes), len(self.ready))
        states = np.stack([self.nodes[parents[row]][row] for row in rows])
        depths = np.array([self.depths[parents[row]][row] for row in rows])
        actions = torch.from_numpy(self.random.integers(0, 2, len(self.ready)))
        number = len(self.nodes) - 1
        answers = [
            model.forward_recurrent_inference([(states, actions)], number, depths.tolist(), self.steps[self.ready])
            for model in self.models
        ]
        self._compare(answers)
        lengths = [list(model.keys_values_wm_size_list) for model in self.models]
        assert all(each == lengths[0] for each in lengths)
        self.lengths.add(tuple(lengths[0]))
        self.nodes.append(answers[0][1].numpy())
        self.depths.append(depths + 1)

    def _compare(self, answers: list[tuple[Any, ...]]) -> None:
        for other in answers[1:]:
            for theirs, ours in zip(answers[0], other, strict=True):
                assert (theirs is None) == (ours is None)
                assert theirs is None or torch.equal(theirs, ours)

    def act(self) -> None:
        """The environments that were searched step on."""
        self.steps[self.ready] += 1

    def end(self, env_id: int) -> None:
        """An episode ends: the policy clears the environment, and its next root begins anew."""
        for model in self.models:
            if model.use_new_cache_manager:
                model.kv_cache_manager.init_pools[env_id].clear()
            else:
                model.past_kv_cache_init_infer_envs[env_id].clear()
            model.past_token_context_init_infer_envs[env_id].clear()
        self.actions[env_id], self.steps[env_id] = -1, 0

    def play(self, moves: int, simulations: int) -> None:
        """Searches of all environments, then of all that are drawn; and an episode ends at every third."""
        for move in range(moves):
            drawn = np.flatnonzero(self.random.random(ENV_NUM) < 0.7).tolist()
            self.root(list(range(ENV_NUM)) if move % 2 == 0 or not drawn else drawn)
            for _ in range(simulations):
                self.simulate()
            self.act()
            if move % 3 == 2:
                self.end(int(self.random.integers(0, ENV_NUM)))


COUNTED = ("hit_count", "total_query_count", "root_hit_cnt", "root_total_query_cnt")
PADDED = (
    "kv_padding_total_batches",
    "kv_padding_unequal_batches",
    "kv_padding_total_samples",
    "kv_padding_padded_samples",
    "kv_padding_token_count",
    "kv_padding_max_tokens",
    "exact_kv_reset_batches",
    "exact_kv_reset_samples",
)


def attached(model: Any, **arguments: Any) -> Any:
    """An attached copy of a model."""
    made = copy.deepcopy(model)
    assert isinstance(attach(made, "on", **arguments), Attachment)
    return made


def check(models: list[Any]) -> None:
    """All found and padded the same, and the books of those that are attached add up."""
    for model in models[1:]:
        for name in (*COUNTED, *PADDED):
            assert getattr(model, name) == getattr(models[0], name), name
    for model in models:
        kv = attachment_of(model)
        if kv is not None:
            kv.session.close()
            kv.manager.check_integrity()
            detach(model)


@pytest.fixture(params=SOURCES)
def source(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def models(source: str) -> Iterator[list[Any]]:
    """A model with its legacy cache, and an attached copy."""
    model = make_main_model(source)
    made = [model, attached(model)]
    yield made
    check(made)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("is_managed", [False, True], ids=["legacy", "managed"])
@pytest.mark.parametrize("mode", MODES)
def test_every_output_is_equal_while_episodes_begin_and_end_at_different_times(
    source: str, mode: str, is_managed: bool
) -> None:
    model = make_main_model(source, use_new_cache_manager=is_managed, **MODES[mode])
    models = [model, attached(model)]
    walk = Walk(models)
    walk.play(moves=12, simulations=20)
    assert any(len(set(lengths)) == 3 for lengths in walk.lengths)  # 1, 3 and 5 tokens in one batch
    assert {len(lengths) for lengths in walk.lengths} >= {2, 4}
    assert model.hit_count == model.total_query_count
    check(models)


def test_environments_are_those_of_ready_env_id_whatever_their_rows(models: list[Any]) -> None:
    walk = Walk(models)
    for ready in ([0, 1, 2, 3], [3, 1], [2], [1, 2, 3], [0, 3]):
        walk.root(ready)
        walk.simulate()
        walk.act()
    assert models[1].root_total_query_cnt == 2 + 1 + 3 + 2
    if isinstance(models[1], StubWorldModel):  # LightZero's encoder rounds otherwise in batches of other sizes
        assert models[1].root_hit_cnt == 2 + 1 + 3 + 2


def test_a_search_keeps_the_roots_of_every_part_of_a_mixed_batch_and_no_others(source: str) -> None:
    model = attached(make_main_model(source))
    kv = attachment_of(model)
    assert kv is not None
    walk = Walk([model])
    for move in range(5):
        if move:
            walk.end(move % ENV_NUM)  # one environment begins, the others go on
        walk.root(list(range(ENV_NUM)))
        walk.simulate()
        assert kv.session.search is not None
        assert kv.session.search.held == 2 * ENV_NUM  # roots and nodes
        walk.act()
    walk.end(0)
    walk.root(list(range(ENV_NUM)))
    kv.manager.clear_init_caches()  # as another thread's clear_caches() does
    before = model.hit_count
    walk.simulate()
    assert model.hit_count == before + ENV_NUM
    check([model])


def test_an_environment_that_the_model_does_not_have_is_an_error_that_names_it(models: list[Any]) -> None:
    walk = Walk([models[1]])
    walk.root([0, 1])
    for ready, message in (
        ([0, 4], r"ready_env_id must be among the model's 0 to 3, got \[0, 4\]"),
        ([-1, 0], "among"),
    ):
        with pytest.raises(InvalidArgumentError, match=message):
            models[1].forward_initial_inference(
                {"obs": walk.last[:2], "action": [0, 0], "current_obs": walk.last[:2], "ready_env_id": ready}, [0, 0]
            )


def test_a_root_that_was_never_stored_is_computed_from_its_state_alone(models: list[Any]) -> None:
    walk = Walk(models)
    for move in range(6):
        walk.root(list(range(ENV_NUM)))
        for _ in range(6):
            walk.simulate()
        walk.act()
        walk.last[move % ENV_NUM] += 1
    assert models[1].root_hit_cnt == models[1].root_total_query_cnt - 5


@pytest.mark.parametrize("is_managed", [False, True], ids=["legacy", "managed"])
def test_clearing_everything_begins_anew_in_both(source: str, is_managed: bool) -> None:
    model = make_main_model(source, use_new_cache_manager=is_managed)
    models = [model, attached(model)]
    walk = Walk(models)
    for _ in range(2):
        walk.play(moves=3, simulations=4)
        for each in models:
            each.clear_caches()
    assert model.root_hit_cnt < model.root_total_query_cnt
    check(models)


def test_windows_that_are_rebuilt_have_room_from_the_start_of_a_search(source: str) -> None:
    model = make_main_model(source, rebuild_kv_window_from_tokens=True)
    nodes = ENV_NUM * (model.num_simulations + 1)
    attach(model, "on", recur_slots=3 * nodes)  # enough where nodes share their parents
    with pytest.raises(CapacityError, match="recur_slots"):
        Walk([model]).root(list(range(ENV_NUM)))
    detach(model)


def test_what_a_policy_does_with_the_manager_it_does_with_an_attached_models(source: str) -> None:
    model = attached(make_main_model(source, use_new_cache_manager=True))
    walk = Walk([model])
    walk.root([0, 1])
    walk.simulate()
    view = model.kv_cache_manager
    assert [len(pool) for pool in view.init_pools] == [1, 1, 0, 0]
    assert len(view.recur_pool) == 2
    assert view.get_stats_summary()["recur_pool"].startswith("CacheStats(hits=")
    view.clear_recur_cache()
    assert len(view.recur_pool) == 0
    view.init_pools[1].clear()
    assert [len(pool) for pool in view.init_pools] == [1, 0, 0, 0]
    view.clear_all()
    assert [len(pool) for pool in view.init_pools] == [0, 0, 0, 0]
    with pytest.raises(AttributeError, match=r"no set_init_cache: .*attachment_of"):
        view.set_init_cache(0, 1, None)
    check([model])


@pytest.mark.parametrize("is_managed", [False, True], ids=["legacy", "managed"])
def test_a_target_model_is_a_copy_with_a_manager_of_its_own(source: str, is_managed: bool) -> None:
    model = make_main_model(source, use_new_cache_manager=is_managed)
    models = [model, attached(model)]
    walk = Walk(models)
    walk.play(moves=2, simulations=3)
    target = copy.deepcopy(models[1])
    theirs, mine = attachment_of(models[1]), attachment_of(target)
    assert theirs is not None
    assert mine is not None
    assert mine.manager is not theirs.manager
    assert sum(len(pool) for pool in mine.manager.init_pools) == 0
    walk.play(moves=2, simulations=3)
    anew = copy.deepcopy(model)
    anew.clear_caches()
    Walk([anew, target]).play(moves=4, simulations=6)
    check(models)
    detach(target)


def test_a_model_that_holds_our_manager_by_the_one_import_searches_alike_attached_or_not(source: str) -> None:
    model = make_main_model(source, manager=LightZeroKVCacheManager, use_new_cache_manager=True)
    models = [model, attached(model)]
    Walk(models).play(moves=6, simulations=6)
    assert all(len(pool) == 0 for pool in models[1].__dict__["kv_cache_manager"].init_pools)
    managers = [each.__dict__["kv_cache_manager"].manager for each in models]
    check(models)
    for manager in managers:
        manager.check_integrity()
        manager.close()


@pytest.mark.parametrize("is_managed", [False, True], ids=["legacy", "managed"])
def test_a_detached_model_is_the_main_branchs_again(source: str, is_managed: bool) -> None:
    model = make_main_model(source, use_new_cache_manager=is_managed)
    released, other = type(model), copy.deepcopy(model)
    attach(model, "on")
    Walk([model]).play(moves=2, simulations=3)
    attach(model, "on")  # anew
    detach(model)
    assert type(model) is released
    assert attachment_of(model) is None
    Walk([model, other]).play(moves=4, simulations=4)


@pytest.mark.parametrize("is_managed", [False, True], ids=["legacy", "managed"])
def test_what_a_model_stored_before_it_was_attached_is_gone_when_it_is_detached(source: str, is_managed: bool) -> None:
    model = make_main_model(source, use_new_cache_manager=is_managed)
    Walk([model]).play(moves=1, simulations=2)
    roots = model.kv_cache_manager.init_pools if is_managed else model.past_kv_cache_init_infer_envs
    assert any(map(len, roots))
    attach(model, "on")
    detach(model)
    assert not any(map(len, roots))


def test_a_node_is_found_in_its_own_environment_alone(models: list[Any]) -> None:
    walk = Walk([models[1]])
    walk.root(list(range(ENV_NUM)))
    walk.simulate()
    walk.nodes[1] = walk.nodes[1][[1, 0, 2, 3]]
    before = models[1].hit_count
    walk.random = np.random.default_rng(1)
    states, ready = walk.nodes[1], np.zeros(ENV_NUM, dtype=np.int64)
    models[1].forward_recurrent_inference([(states, torch.zeros(ENV_NUM, dtype=torch.int64))], 1, [1] * ENV_NUM, ready)
    assert models[1].hit_count == before + 2
    models[0].__dict__.update({name: getattr(models[1], name) for name in (*COUNTED, *PADDED)})


def test_two_threads_search_with_one_attached_model_each_in_environments_of_its_own_order(source: str) -> None:
    model = make_main_model(source)
    shared = attached(model, searches=2)
    others = [copy.deepcopy(model) for _ in range(2)]
    errors: list[BaseException] = []
    barrier = threading.Barrier(2)

    def search(number: int) -> None:
        try:
            walk = Walk([others[number], shared], seed=number)
            for move in range(6):
                barrier.wait(HANG_SECONDS)
                walk.root([0, 1, 2, 3] if move % 2 == 0 else [[3, 1], [2]][number])
                for _ in range(8):
                    walk.simulate()
                walk.act()
            kv = attachment_of(shared)
            assert kv is not None
            kv.session.close()
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=search, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG_SECONDS)
    if errors:
        raise errors[0]
    assert shared.hit_count == shared.total_query_count == 2 * others[0].hit_count - 3 * 8  # of one row less in the one
    kv = attachment_of(shared)
    assert kv is not None
    kv.manager.check_integrity()
    detach(shared)


# Reanalysis, with what only LightZero itself has ----------------------------------------------------------------------


@pytest.mark.skipif(CHECKOUT is None, reason=NEEDS_CHECKOUT)
@pytest.mark.parametrize("mode", ["absolute", "rotary", "rebuilt"])
@pytest.mark.parametrize("is_managed", [False, True], ids=["legacy", "managed"])
def test_outputs_of_reanalysis_from_seeded_roots_are_equal_and_so_is_what_is_found(mode: str, is_managed: bool) -> None:
    model = make_main_model("checkout", use_new_cache_manager=is_managed, **MODES[mode])
    models = [model, attached(model)]
    random, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    for chunk in range(3):
        lengths = random.choice([1, 3, 5], ENV_NUM)
        contexts = [torch.randn(length, model.embed_dim, generator=generator) for length in lengths]
        roots = np.stack([context[-1:].numpy() for context in contexts])
        positions = random.integers(0, 50, ENV_NUM)
        for each in models:
            each.reanalyze_phase, each.latent_state = True, None
            each.clear_caches()
        logits = [each.seed_reanalysis_root_caches(roots, contexts) for each in models]
        assert logits[0] == logits[1]
        nodes, depths = [roots], [np.zeros(ENV_NUM, dtype=np.int64)]
        for simulation in range(12):
            parents = random.integers(0, len(nodes), ENV_NUM)
            states = np.stack([nodes[parent][row] for row, parent in enumerate(parents)])
            depth = np.array([depths[parent][row] for row, parent in enumerate(parents)])
            actions = torch.from_numpy(random.integers(0, 2, ENV_NUM))
            asked = ([(states, actions)], simulation, depth.tolist(), positions)
            answers = [each.forward_recurrent_inference(*asked) for each in models]
            for theirs, ours in zip(*answers, strict=True):
                assert torch.equal(theirs, ours)
            nodes.append(answers[0][1].numpy())
            depths.append(depth + 1)
        for each in models:
            each.reanalyze_phase = False
        found = [(each.reanalysis_root_seed_count, each.reanalysis_root_seed_hit_count) for each in models]
        assert found[0] == found[1]
        assert found[0][0] == (chunk + 1) * ENV_NUM
        assert found[0][1] > 0
    assert model.hit_count == model.total_query_count
    check(models)


@pytest.mark.skipif(CHECKOUT is None, reason=NEEDS_CHECKOUT)
@pytest.mark.parametrize("mode", ["absolute", "rotary", "rebuilt"])
def test_outputs_of_more_rows_than_environments_are_equal_and_leave_no_entries(mode: str) -> None:
    model = make_main_model("checkout", **MODES[mode])
    models = [model, attached(model)]
    random, rows = np.random.default_rng(0), ENV_NUM + 2
    states = torch.randn(rows, 1, model.embed_dim, generator=torch.Generator().manual_seed(0)).numpy()
    positions = random.integers(0, 50, rows)
    for each in models:
        each.reanalyze_phase, each.latent_state = True, None
    for simulation in range(5):
        asked = ([(states, torch.from_numpy(random.integers(0, 2, rows)))], simulation, [simulation] * rows, positions)
        answers = [each.forward_recurrent_inference(*asked) for each in models]
        for theirs, ours in zip(*answers, strict=True):
            assert torch.equal(theirs, ours)
        states = answers[0][1].numpy()
    for each in models:
        each.reanalyze_phase = False
    kv = attachment_of(models[1])
    assert kv is not None
    assert kv.manager.get_stats_summary().total.entries == 0
    check(models)


@pytest.mark.skipif(CHECKOUT is None, reason=NEEDS_CHECKOUT)
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("name", ["cartpole", "lunarlander", "atari", "dmc"])
def test_a_thousand_simulated_steps_in_the_shapes_of_lightzeros_configurations_are_equal(name: str) -> None:
    from tests.lightzero_support import SHAPES, assert_same_outputs, make_world_model
    from tests.lightzero_support import Walk as WalkOfRows

    shape = SHAPES[name]
    model = make_world_model(shape)
    models = [model, attached(model)]
    walk, steps = WalkOfRows(shape, shape.env_num), 0
    while steps < 1000:
        walk.new_episode()
        for _ in range(10):
            assert_same_outputs(walk.root(models))
            for _ in range(shape.num_simulations):
                assert_same_outputs(walk.simulate(models))
            steps += shape.num_simulations
            walk.act()
    assert model.hit_count == steps * shape.env_num
    check(models)
