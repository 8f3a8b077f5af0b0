"""Several threads search with released world models: each answers as it would alone."""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("lzero", reason="needs LightZero 0.2.0: make lightzero")

from concurrent_kv import CapacityError, InvalidArgumentError, SearchEndedError
from concurrent_kv.compat.lightzero import Attachment, attach, attachment_of, detach
from tests.lightzero_support import PATIENCE, SHAPES, Walk, make_world_model

THREADS, ENV_NUM, MOVES, SIMULATIONS = 4, 2, 4, 12

Outputs = list[tuple[Tensor | None, ...]]


def walk_alone(
    model: Any, shape: Any, seed: int, *, between: Callable[[], Any] = lambda: None, rows: int = ENV_NUM
) -> Outputs:
    """All outputs of a walk, which depends on `seed` alone; `between` runs between its steps."""
    walk = Walk(shape, rows, seed)
    outputs: Outputs = []
    for _ in range(MOVES):
        outputs += walk.root([model])
        for _ in range(SIMULATIONS):
            between()
            outputs += walk.simulate([model])
        walk.act()
    return outputs


def walk_between(model: Any, shape: Any, seed: int, between: Callable[[], Any]) -> Outputs:
    return walk_alone(model, shape, seed, between=between)


def assert_equal(ours: Outputs, alone: Outputs) -> None:
    assert len(ours) == len(alone)
    for our, their in zip(ours, alone, strict=True):
        for one, other in zip(our, their, strict=True):
            assert one is other is None or torch.equal(one, other)  # type: ignore[arg-type]


def in_threads(walks: Sequence[Callable[[Callable[[], Any]], Outputs]]) -> list[Outputs]:
    """Run all walks at the same time, one step of each before the next of any."""
    turn = threading.Barrier(len(walks), timeout=PATIENCE)
    with ThreadPoolExecutor(len(walks)) as threads:
        running = [threads.submit(walk, turn.wait) for walk in walks]
        return [walk.result(timeout=PATIENCE) for walk in running]


@pytest.mark.parametrize("name", ["cartpole", "lunarlander"])
def test_threads_with_a_model_each_share_the_pools(name: str) -> None:
    shape = replace(SHAPES[name], env_num=THREADS * ENV_NUM, embed_dim=64, num_heads=2)
    released = make_world_model(shape)
    alone = [walk_alone(copy.deepcopy(released), shape, seed) for seed in range(THREADS)]
    first = copy.copy(released)
    attachment = attach(first, "on", env_ids=range(ENV_NUM))
    assert isinstance(attachment, Attachment)
    models = [first]
    for thread in range(1, THREADS):
        models.append(copy.copy(released))  # the same weights
        env_ids = range(thread * ENV_NUM, (thread + 1) * ENV_NUM)
        attach(models[-1], "on", manager=attachment.manager, env_ids=env_ids)
    walks = [partial(walk_between, model, shape, seed) for seed, model in enumerate(models)]
    for ours, theirs in zip(in_threads(walks), alone, strict=True):
        assert_equal(ours, theirs)
    attachment.manager.check_integrity()
    for model in reversed(models):
        detach(model)


@pytest.mark.parametrize("name", ["cartpole", "lunarlander"])
def test_threads_share_one_model(name: str) -> None:
    shape = replace(SHAPES[name], env_num=ENV_NUM, embed_dim=64, num_heads=2)
    released = make_world_model(shape)
    alone = [walk_alone(copy.deepcopy(released), shape, seed) for seed in range(THREADS)]
    attachment = attach(released, "on", searches=THREADS)
    assert isinstance(attachment, Attachment)
    walks = [partial(walk_between, released, shape, seed) for seed in range(THREADS)]
    for ours, theirs in zip(in_threads(walks), alone, strict=True):
        assert_equal(ours, theirs)
    attachment.manager.check_integrity()
    assert released.total_query_count == THREADS * MOVES * SIMULATIONS * ENV_NUM
    detach(released)


@pytest.mark.parametrize("simulations_before", [0, 3])
def test_a_search_goes_on_when_another_thread_clears_the_caches(simulations_before: int) -> None:
    shape = replace(SHAPES["cartpole"], env_num=ENV_NUM)
    released = make_world_model(shape)
    walk = Walk(shape, ENV_NUM)
    alone = copy.deepcopy(released)
    attachment = attach(released, "on")
    assert isinstance(attachment, Attachment)
    walk.root([alone, released])
    for _ in range(simulations_before):
        walk.simulate([alone, released])
    clearing = threading.Thread(target=released.clear_caches)
    clearing.start()
    clearing.join(PATIENCE)
    for _ in range(SIMULATIONS):
        theirs, ours = walk.simulate([alone, released])
        assert_equal([ours], [theirs])
    assert released.hit_count == released.total_query_count
    detach(released)


def test_a_search_that_a_version_bump_ended_says_so_and_the_next_one_begins_anew() -> None:
    shape = replace(SHAPES["cartpole"], env_num=ENV_NUM)
    model, walk = make_world_model(shape), Walk(SHAPES["cartpole"], ENV_NUM)
    attachment = attach(model, "on")
    assert isinstance(attachment, Attachment)
    walk.root([model])
    walk.simulate([model])
    attachment.manager.bump_version()
    with pytest.raises(SearchEndedError, match="version"):
        walk.simulate([model])
    walk.act()
    walk.root([model])
    walk.simulate([model])
    assert model.root_hit_cnt == 0
    detach(model)


def test_the_reanalyze_phase_of_one_thread_is_not_that_of_another() -> None:
    shape = replace(SHAPES["cartpole"], env_num=ENV_NUM)
    model = make_world_model(shape)
    attach(model, "on")
    model.reanalyze_phase = True
    seen: list[bool] = []
    reading = threading.Thread(target=lambda: seen.append(model.reanalyze_phase))
    reading.start()
    reading.join(PATIENCE)
    assert seen == [False]
    assert model.reanalyze_phase
    detach(model)
    assert not model.reanalyze_phase


def test_more_threads_than_stated_hear_which_capacity_would_do() -> None:
    shape = replace(SHAPES["cartpole"], env_num=ENV_NUM)
    model = make_world_model(shape)
    attach(model, "on", searches=1, wait_timeout=0.1)
    walk_alone(model, shape, 0)
    with ThreadPoolExecutor(1) as other, pytest.raises(CapacityError, match="would do"):
        other.submit(walk_alone, model, shape, 1).result(timeout=PATIENCE)
    detach(model)


def test_a_thread_that_ended_gives_its_search_back() -> None:
    shape = replace(SHAPES["cartpole"], env_num=ENV_NUM)
    model = make_world_model(shape)
    attachment = attach(model, "on", searches=1, wait_timeout=PATIENCE)
    assert isinstance(attachment, Attachment)
    for seed in range(3):
        thread = threading.Thread(target=walk_alone, args=(model, shape, seed))
        thread.start()
        thread.join(PATIENCE)
    walk_alone(model, shape, 3)
    assert attachment.manager.get_stats_summary().pools["recur"].entries <= (SIMULATIONS + 1) * ENV_NUM
    attachment.manager.check_integrity()
    detach(model)


def test_a_root_outlasts_the_roots_that_other_threads_store_meanwhile() -> None:
    shape = replace(SHAPES["cartpole"], env_num=ENV_NUM)
    model = make_world_model(shape)
    attach(model, "on", searches=2)
    mine, others = Walk(shape, ENV_NUM, 0), Walk(shape, ENV_NUM, 1)
    mine.root([model])
    mine.act()
    with ThreadPoolExecutor(1) as other:
        for _ in range(31):  # with mine, 16 for each of two searches
            others.new_episode()
            other.submit(others.root, [model]).result(timeout=PATIENCE)
    mine.root([model])
    assert model.root_hit_cnt == ENV_NUM
    detach(model)


def test_a_copied_model_has_entries_of_its_own() -> None:
    shape = replace(SHAPES["cartpole"], env_num=ENV_NUM)
    model = make_world_model(shape)
    attachment = attach(model, "on")
    walk_alone(model, shape, 0)
    other = copy.deepcopy(model)
    copied = attachment_of(other)
    assert isinstance(attachment, Attachment)
    assert isinstance(copied, Attachment)
    assert copied.manager is not attachment.manager
    assert copied.manager.get_stats_summary().total.entries == 0
    assert_equal(walk_alone(other, shape, 1), walk_alone(model, shape, 1))
    for attached in (model, other):
        detach(attached)


def test_attaching_in_a_way_that_cannot_work_leaves_the_model_as_it_was() -> None:
    shape = replace(SHAPES["cartpole"], env_num=ENV_NUM)
    model, walk = make_world_model(shape), Walk(shape, ENV_NUM)
    attachment = attach(model, "on")
    walk.root([model])
    for settings in ({"mode": "both"}, {"searches": 0}, {"answer": "both"}, {"init_entries": 0}):
        with pytest.raises(InvalidArgumentError, match=next(iter(settings))):
            attach(model, **{"mode": "on", **settings})  # type: ignore[arg-type]
    assert attachment_of(model) is attachment
    walk.simulate([model])
    assert model.hit_count == ENV_NUM
    detach(model)


def test_counts_of_threads_add_up() -> None:
    shape = replace(SHAPES["cartpole"], env_num=ENV_NUM)
    model = make_world_model(shape)
    attachment = attach(model, "on")
    assert isinstance(attachment, Attachment)
    both_inside = threading.Barrier(2, timeout=0.5)

    class Slow(int):
        """Adds only after another thread is adding too, or after half a second alone."""

        def __add__(self, other: int) -> int:
            with contextlib.suppress(threading.BrokenBarrierError):
                both_inside.wait()
            return int(self) + other

    model.hit_count = Slow(0)
    with ThreadPoolExecutor(2) as threads:
        counting = [threads.submit(attachment.count, model, hit_count=1) for _ in range(2)]
        for done in counting:
            done.result(timeout=PATIENCE)
    assert model.hit_count == 2
    detach(model)
