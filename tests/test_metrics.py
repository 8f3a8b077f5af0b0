"""The numbers that are published: what they are, that counts only grow, whose they are, and what timing changes."""

from __future__ import annotations

import gc
import threading
from collections import Counter
from pathlib import Path
from typing import Any
from weakref import ref

import pytest

from concurrent_kv import (
    AsyncKVCacheManager,
    InvalidArgumentError,
    InvalidTypeError,
    KVCacheManager,
    KVPool,
    ReentrantCallError,
    Search,
)
from concurrent_kv.aio import AsyncEvaluator
from concurrent_kv.books.stats import PoolStats
from concurrent_kv.evaluation import Evaluator
from concurrent_kv.locks.deadline import Deadline
from concurrent_kv.locks.gate import gate
from concurrent_kv.manager import KVCacheManager as PlainManager
from concurrent_kv.metrics import METRICS, Distribution, Kind, KVMetrics, Subject
from concurrent_kv.metrics.durations import SECONDS, Histogram
from concurrent_kv.metrics.samples import distribution_of
from tests import evaluating
from tests.conftest import MakeManager, MakePool
from tests.metrics_support import evaluate_leaves, new_evaluator, numbers_of, search_once, values_of
from tests.simulated.fixtures import gpu as gpu
from tests.simulated.gpu import SimGPU
from tests.support import HANG_SECONDS, append, config, tokens
from tests.test_manager_streams import manager_on

PAGE = Path(__file__).resolve().parent.parent / "docs" / "metrics.md"
RECUR, INIT, WM = [("cache", role, role) for role in ("recur", "init", "wm")]
COUNTERS = [metric for metric in METRICS if metric.kind is Kind.COUNTER]


# What there is -------------------------------------------------------------------------------------------------------


def test_names_are_in_the_manner_of_prometheus() -> None:
    for metric in METRICS:
        assert metric.prometheus.startswith("concurrent_kv_")
        assert metric.prometheus.endswith("_total") == (metric.kind is Kind.COUNTER)
        assert metric.unit in ("", "seconds", "bytes", "ratio")
        assert metric.about.endswith(".")
        if metric.kind is not Kind.COUNTER and metric.unit:
            assert metric.prometheus.endswith(f"_{metric.unit}")
    assert len({metric.family for metric in METRICS}) == len(METRICS)


def test_the_page_lists_every_metric_with_its_labels() -> None:
    rows = [line.split("|") for line in PAGE.read_text("utf-8").splitlines() if line.startswith("| `concurrent_kv_")]
    said = {row[1].strip(" `"): (row[2].strip(), tuple(row[3].replace("`", "").split(","))) for row in rows}
    said = {name: (kind, tuple(each.strip() for each in labels)) for name, (kind, labels) in said.items()}
    assert said == {metric.prometheus: (metric.kind.value, metric.labels) for metric in METRICS}


def test_every_count_of_a_pool_is_published() -> None:
    counted = {name for name in vars(PoolStats()) if name.endswith("_count")}
    stats = PoolStats(**{name: 2**place for place, name in enumerate(sorted(counted))})
    read = [m.read(stats) for m in METRICS if m.subject is not Subject.EVALUATOR and m.kind is Kind.COUNTER and m.read]
    for place, name in enumerate(sorted(counted)):
        found = [value for value in read if int(value) & 2**place]
        assert found, name


def test_the_numbers_are_those_of_the_statistics(make_manager: MakeManager) -> None:
    manager = make_manager(name="cache")
    metrics = KVMetrics(manager)
    search_once(manager)
    found = values_of(metrics)
    assert found["concurrent_kv_queries_total", INIT] == found["concurrent_kv_hits_total", INIT] == 1
    assert found["concurrent_kv_queries_total", RECUR] == 2
    assert found["concurrent_kv_hits_total", RECUR] == 1
    assert found["concurrent_kv_inserts_total", RECUR] == 2
    assert found["concurrent_kv_entries", INIT] == 1
    assert found["concurrent_kv_slots", INIT] == 2
    assert found["concurrent_kv_entries_usage_ratio", INIT] == 1 / 32
    assert found["concurrent_kv_max_entries", WM] == 2
    with manager.search([0]) as search:
        search.gather(["root"], [0]).close()
        found = values_of(metrics)
        assert found["concurrent_kv_open_searches", RECUR] == 1
        assert found["concurrent_kv_reserved_entries", RECUR] == 5


def test_slots_that_entries_share_are_of_the_manager(make_manager: MakeManager) -> None:
    manager = make_manager(name="cache")
    manager.set_init_cache(0, "root", tokens(1, 2))
    with manager.search([0]) as search:
        with search.gather(["root"], [0]) as batch:
            append(batch, [2], 1)
            search.commit(["child"], batch)
        assert values_of(KVMetrics(manager))["concurrent_kv_shared_slots", ("cache",)] == 2


def test_the_weights_version_is_published_as_it_grows_and_outlives_a_close(make_manager: MakeManager) -> None:
    manager = make_manager(env_num=2, name="cache")
    metrics, name = KVMetrics(manager), "concurrent_kv_weights_version"
    assert [values_of(metrics)[name, pool] for pool in (INIT, RECUR, WM)] == [0, 0, 0]
    manager.bump_version()
    assert [values_of(metrics)[name, pool] for pool in (INIT, RECUR, WM)] == [1, 1, 1]
    manager.init_pools[1].bump_version()
    assert [values_of(metrics)[name, pool] for pool in (INIT, RECUR, WM)] == [2, 1, 1]
    each = values_of(KVMetrics(manager, by_environment=True))
    assert [each[name, ("cache", f"init[{env}]", "init")] for env in range(2)] == [1, 2]
    manager.reset_stats()
    manager.close()
    assert values_of(metrics)[name, RECUR] == 1


def test_operations_that_wait_for_room_are_seen_as_long_as_they_wait(make_manager: MakeManager) -> None:
    manager = make_manager(settings=config(max_cache_size=10), name="cache")
    metrics, began, over = KVMetrics(manager), threading.Event(), threading.Event()

    def second() -> None:
        began.set()
        manager.search([0], entries=10, tokens=80).close()
        over.set()

    with manager.search([0], entries=10, tokens=80):
        thread = threading.Thread(target=second, daemon=True)
        thread.start()
        assert began.wait(HANG_SECONDS)
        looked = threading.Event()
        while not values_of(metrics)["concurrent_kv_waiters", RECUR]:
            assert not looked.wait(0.001)
        assert not over.is_set()
    assert over.wait(HANG_SECONDS)
    thread.join(HANG_SECONDS)
    assert values_of(metrics)["concurrent_kv_waiters", RECUR] == 0


def test_environments_are_one_sum_unless_asked_for(make_manager: MakeManager) -> None:
    manager = make_manager(env_num=3, name="cache")
    for env in range(3):
        search_once(manager, env)
    summed = numbers_of(KVMetrics(manager))
    each = numbers_of(KVMetrics(manager, by_environment=True))
    of_each = {key: value for key, value in each.items() if key[1][-1] == "init"}
    assert {labels[1] for _, labels in of_each} == {"init[0]", "init[1]", "init[2]"}
    for (name, labels), value in summed.items():
        if labels == INIT and not name.endswith(("_ratio", "_version")):
            assert value == sum(found for (other, _), found in of_each.items() if other == name), name
    assert not any("[" in label for _, labels in summed for label in labels)


def test_many_environments_cost_no_series(make_manager: MakeManager) -> None:
    few, many = (len(KVMetrics(make_manager(envs, settings=config(max_cache_size=150))).read()) for envs in (1, 30))
    assert few == many


def test_a_pool_by_itself_and_pools_that_share_a_storage_are_told_apart(make_pool: MakePool) -> None:
    first = make_pool(name="first", headroom_tokens=64)
    first.put("key", tokens(1, 2))
    found = values_of(KVMetrics(first))
    assert found["concurrent_kv_entries", ("first", "first", "alone")] == 1
    assert found["concurrent_kv_lock_waits_total", ("first",)] == 0


def test_what_several_sources_have_in_common_is_there_once(make_manager: MakeManager) -> None:
    manager = make_manager(name="cache")
    samples = KVMetrics(manager, manager.wm_pool, manager.recur_pool).read()
    assert len({(sample.metric, sample.labels) for sample in samples}) == len(samples)
    assert sum(sample.metric.name == "lock_waits" for sample in samples) == 1


# Counts only grow ----------------------------------------------------------------------------------------------------


def test_counts_only_grow_whatever_is_reset_and_however_little_is_counted_between(make_manager: MakeManager) -> None:
    manager = make_manager(name="cache")
    metrics, expected = KVMetrics(manager), Counter[tuple[str, tuple[str, ...]]]()
    search_once(manager)
    before = numbers_of(metrics)
    for _ in range(3):
        manager.reset_stats()
        search_once(manager)
        manager.reset_stats()  # before anything has read it
    after = numbers_of(metrics)
    for metric in COUNTERS:
        for key, value in before.items():
            if key[0] == metric.prometheus:
                expected[key] = int(value)
                assert after[key] >= value, key
    key = ("concurrent_kv_queries_total", RECUR)
    assert after[key] == 4 * expected[key] == 8
    assert manager.get_stats_summary().total.request_count == 0


def test_a_reset_while_a_search_is_open_loses_and_repeats_nothing(make_manager: MakeManager) -> None:
    manager = make_manager(name="cache")
    metrics = KVMetrics(manager)
    manager.set_init_cache(0, "root", tokens(1, 2))
    with manager.search([0]) as search:
        search.gather(["root"], [0]).close()
        manager.reset_stats()
        search.gather(["root"], [0]).close()
        assert values_of(metrics)["concurrent_kv_hits_total", INIT] == 2
    assert values_of(metrics)["concurrent_kv_hits_total", INIT] == 2
    assert manager.get_stats_summary().pools["init[0]"].hit_count == 1


def test_no_count_goes_down_while_threads_search_and_statistics_are_reset(make_manager: MakeManager) -> None:
    manager = make_manager(4, name="cache")
    metrics, barrier, errors = KVMetrics(manager), threading.Barrier(5), list[BaseException]()
    searches, over = 30, threading.Event()

    def search(env: int) -> None:
        try:
            barrier.wait(HANG_SECONDS)
            for _ in range(searches):
                search_once(manager, env)
        except BaseException as error:
            errors.append(error)
            raise

    threads = [threading.Thread(target=search, args=(env,)) for env in range(4)]
    for thread in threads:
        thread.start()
    barrier.wait(HANG_SECONDS)
    before: dict[Any, float] = {}
    counted = {metric.prometheus for metric in COUNTERS}
    while not over.is_set():
        if not any(thread.is_alive() for thread in threads):
            over.set()
        now = {key: value for key, value in numbers_of(metrics).items() if key[0] in counted}
        assert not {key for key, value in before.items() if now[key] < value}
        before = now
        manager.reset_stats()
    assert not errors
    assert before["concurrent_kv_queries_total", RECUR] == 2 * 4 * searches
    assert before["concurrent_kv_hits_total", INIT] == 4 * searches
    assert before["concurrent_kv_inserts_total", RECUR] == 2 * 4 * searches


def test_lock_waits_of_before_a_reset_still_count(make_pool: MakePool) -> None:
    pool = make_pool(name="pool", shards=1)
    _wait_for_a_shard(pool)
    pool.reset_stats()
    assert pool.stats().lock_wait_count == 0
    assert values_of(KVMetrics(pool))["concurrent_kv_lock_waits_total", ("pool",)] == 1
    assert values_of(KVMetrics(pool))["concurrent_kv_lock_wait_seconds_total", ("pool",)] > 0


def _wait_for_a_shard(pool: KVPool) -> None:
    """Have one thread wait until another lets go of the only shard."""
    pool.put("key", tokens(1, 2))
    locks, started = pool.storage.locks, threading.Event()

    def read() -> None:
        started.set()
        pool.get("key")

    looked = threading.Event()
    with gate.lock, locks.write((0,), Deadline(HANG_SECONDS)):
        thread = threading.Thread(target=read, daemon=True)
        thread.start()
        assert started.wait(HANG_SECONDS)
        while locks.held < 2:
            assert not looked.wait(0.001)
    thread.join(HANG_SECONDS)


# Whose they are ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("durations", [False, True])
def test_what_is_closed_keeps_its_counts_and_what_is_dropped_has_no_series(durations: bool) -> None:
    manager = KVCacheManager(config(), 1)
    metrics = KVMetrics(manager, durations=durations)
    search_once(manager)
    before = numbers_of(metrics)
    manager.check_integrity()
    manager.close()
    after = numbers_of(metrics)
    for metric in COUNTERS:
        for key in (key for key in before if key[0] == metric.prometheus):
            assert after[key] >= before[key], key
    assert after["concurrent_kv_entries", INIT] == 0
    gone = ref(manager)
    del manager
    gc.collect()
    assert gone() is None
    assert not metrics.read()


def test_it_keeps_nothing_alive_and_a_dropped_search_that_is_timed_ends_at_once(make_manager: MakeManager) -> None:
    manager = make_manager()
    KVMetrics(manager, durations=True)
    search = manager.search([0])
    gc.disable()
    try:
        del search
        manager.init_pools[0].put("key", tokens(1, 2))  # the next operation closes it
        assert not manager.recur_pool.searches
    finally:
        gc.enable()


def test_two_of_one_name_are_refused_while_the_first_is_open(make_manager: MakeManager) -> None:
    first, second = make_manager(name="cache"), make_manager(name="cache")
    metrics = KVMetrics(first)
    with pytest.raises(InvalidArgumentError, match="manager called cache is watched, which is open"):
        metrics.add(second)
    first.close()
    metrics.add(second)
    search_once(second)
    assert values_of(metrics)["concurrent_kv_queries_total", RECUR] == 2


def test_evaluators_are_told_apart_by_number_or_by_name() -> None:
    manager = evaluating.new_manager()
    first, second, third = new_evaluator(manager), new_evaluator(manager), new_evaluator(manager)
    metrics = KVMetrics(first, AsyncEvaluator(second))
    metrics.add(third, name="value")
    evaluate_leaves(manager, second, 3)
    found = values_of(metrics)
    assert [found["concurrent_kv_evaluator_calls_total", ("cache", name)] for name in ("0", "1", "value")] == [0, 1, 0]
    assert found["concurrent_kv_evaluator_call_rows", ("cache", "1")].cumulative[:3] == [(1, 0), (2, 0), (4, 1)]
    assert found["concurrent_kv_evaluator_call_rows", ("cache", "1")].total == 3
    assert found["concurrent_kv_evaluator_busy_seconds_total", ("cache", "1", "model")] > 0
    assert found["concurrent_kv_evaluator_waiting_rows", ("cache", "1")] == 0
    metrics.remove(second)
    assert not [key for key in values_of(metrics) if key[1] == ("cache", "1")]
    with pytest.raises(InvalidArgumentError, match="one that is watched"):
        metrics.remove(second)
    with pytest.raises(InvalidArgumentError, match="not watched yet"):
        metrics.add(third)
    with pytest.raises(InvalidArgumentError, match=r"another evaluator called cache\.value is watched"):
        metrics.add(second, name="value")
    fourth = new_evaluator(manager)
    metrics.add(second)  # the first number that is free
    metrics.add(fourth)
    labels = {key[1] for key in values_of(metrics) if key[0] == "concurrent_kv_evaluator_calls_total"}
    assert labels == {("cache", name) for name in ("0", "1", "2", "value")}
    manager.check_integrity()
    manager.close()


def test_arguments_that_cannot_work_are_named(make_manager: MakeManager) -> None:
    manager = make_manager()
    with pytest.raises(InvalidTypeError, match=r"source must be a manager, a pool or an evaluator .* got str"):
        KVMetrics("manager")  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError, match="name must be left out"):
        KVMetrics().add(manager, name="other")


def test_a_facade_stands_for_what_it_is_of(make_manager: MakeManager) -> None:
    manager = make_manager()
    metrics = KVMetrics(AsyncKVCacheManager(manager))
    with pytest.raises(InvalidArgumentError, match="not watched yet"):
        metrics.add(manager)


# Durations -----------------------------------------------------------------------------------------------------------


def test_a_histogram_counts_exactly_from_many_threads() -> None:
    histogram, barrier = Histogram(), threading.Barrier(4)

    def record() -> None:
        barrier.wait(HANG_SECONDS)
        for _ in range(2000):
            histogram.record(1e-5)
            histogram.record(3.0)

    threads = [threading.Thread(target=record) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG_SECONDS)
    found = histogram.read()
    assert found.count == 16000
    assert found.counts[1] == found.counts[-1] == 8000  # at most 10 us; beyond every bound


def test_a_histogram_changes_under_its_lock() -> None:
    histogram, seen = Histogram(), []

    class Watched(list[int]):
        def __setitem__(self, place: Any, value: Any) -> None:
            seen.append(histogram._lock.locked())
            super().__setitem__(place, value)

    histogram._counts = Watched(histogram._counts)
    histogram.record(1.0)
    assert seen == [True]


def test_inside_a_critical_section_a_histogram_is_read_without_its_lock() -> None:
    histogram, found = Histogram(), list[Distribution]()

    def read() -> None:
        with gate.lock, histogram._lock:  # a finaliser may run here
            found.append(histogram.read())

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(HANG_SECONDS)
    assert len(found) == 1


def test_a_value_on_a_bound_is_in_its_bucket() -> None:
    assert distribution_of({2: 3, 3: 1}, (1, 2, 4)) == Distribution((1, 2, 4), (0, 3, 1, 0), 9.0)
    histogram = Histogram()
    histogram.record(SECONDS[0])
    assert histogram.read().cumulative[0] == (SECONDS[0], 1)


def test_durations_count_what_returned_by_role_and_no_search_of_before(make_manager: MakeManager) -> None:
    manager = make_manager(name="cache")
    early = manager.search([0])
    metrics = KVMetrics(manager, durations=True)
    search_once(manager)
    search_once(manager, 1)
    with early:
        early.gather(["root"], [0]).close()
        with pytest.raises(InvalidArgumentError):
            early.gather(["root"], [1])
    with manager.wm_pool.gather(["none"]) as batch:
        batch.fill(0, tokens(1, 2))
        append(batch, [2], 1)
        manager.wm_pool.commit(["key"], batch)
    with manager.search([0]) as search, pytest.raises(InvalidArgumentError):
        search.gather(["root"], [1])
    found = values_of(metrics)
    assert found["concurrent_kv_gather_duration_seconds", RECUR].count == 4
    assert found["concurrent_kv_commit_duration_seconds", RECUR].count == 4
    assert found["concurrent_kv_gather_duration_seconds", WM].count == 1
    assert found["concurrent_kv_commit_duration_seconds", WM].count == 1
    assert found["concurrent_kv_gather_duration_seconds", INIT].count == 0
    assert found["concurrent_kv_gather_duration_seconds", RECUR].total > 0


def test_an_operation_on_a_stream_that_it_is_given_is_timed_once(gpu: SimGPU) -> None:
    manager = manager_on(gpu)
    metrics = KVMetrics(manager, durations=True)
    with manager.search([0]) as search:
        search.gather(["init"], [0], stream=gpu.stream(2)).close()  # type: ignore[arg-type]
    manager.recur_pool.gather(["recur"], stream=gpu.stream(2)).close()  # type: ignore[arg-type]
    gpu.queues.run_until(lambda: gpu.queues.idle)
    assert values_of(metrics)["concurrent_kv_gather_duration_seconds", RECUR].count == 2
    manager.check_integrity()
    manager.close()


def test_lock_waits_are_timed(make_pool: MakePool) -> None:
    pool = make_pool(name="pool", shards=1)
    metrics = KVMetrics(pool, durations=True)
    _wait_for_a_shard(pool)
    assert values_of(metrics)["concurrent_kv_lock_wait_duration_seconds", ("pool",)].count == 1


def test_parts_of_calls_are_timed_once_a_call() -> None:
    manager = evaluating.new_manager()
    evaluator: Evaluator[int, int] = new_evaluator(manager)
    metrics = KVMetrics(manager, evaluator, durations=True)
    evaluate_leaves(manager, evaluator, 2)
    with manager.search([0]) as search:
        evaluator.run(evaluating.tree_walk(search, 0, 7, steps=1))  # led on, which is no call
    found, stats = values_of(metrics), evaluator.stats()
    assert stats.walk_seconds > 0
    for part in ("gather", "model", "commit"):
        timed = found["concurrent_kv_evaluator_call_duration_seconds", ("cache", "0", part)]
        assert timed.count == stats.calls == 2
        assert timed.total == pytest.approx(getattr(stats, f"{part}_seconds"))
    assert found["concurrent_kv_commit_duration_seconds", RECUR].count == 2
    manager.check_integrity()
    manager.close()


def test_what_is_not_asked_for_keeps_its_classes_and_what_ends_gets_them_back(make_manager: MakeManager) -> None:
    manager = make_manager()
    metrics = KVMetrics(manager)
    contention = manager.storage.locks.contention
    assert (type(manager), type(manager.wm_pool)) == (PlainManager, KVPool)
    plain = type(contention)
    metrics.remove(manager)
    timed = KVMetrics(manager, durations=True)
    kinds: list[Any] = [type(manager), type(manager.wm_pool), type(manager.search([0])), type(contention)]
    assert not {PlainManager, KVPool, Search, plain} & set(kinds)
    assert [kind.__name__ for kind in kinds[:3]] == ["KVCacheManager", "KVPool", "Search"]
    timed.remove(manager)
    assert (type(manager), type(manager.wm_pool), type(contention)) == (PlainManager, KVPool, plain)
    with manager.search([0]) as search:
        assert type(search) is Search


def test_inside_a_critical_section_numbers_can_be_read_and_nothing_can_be_added(make_manager: MakeManager) -> None:
    manager = make_manager()
    metrics = KVMetrics(manager, durations=True)
    with gate.lock, manager.storage.ledger.mutex:
        found = values_of(metrics)
        with pytest.raises(ReentrantCallError):
            manager.search([0])
    assert found["concurrent_kv_entries", WM] == 0
