"""Errors, statistics and tokens that leave their process, or are copied, arrive whole."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import json
import pickle
import pkgutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from types import ModuleType
from typing import Any

import pytest
import torch

import concurrent_kv
from concurrent_kv import (
    CapacityError,
    IntegrityError,
    KeysValues,
    KVCacheError,
    KVCacheManager,
    PoolStats,
    SearchEndedError,
    StatsSummary,
)
from concurrent_kv.aio import OffloadStats
from tests.conftest import MakePool
from tests.support import assert_same, config, layout, packed, stacked, tokens

BOUND_SECONDS = 60.0

WAYS: dict[str, Callable[[Any], Any]] = {
    **{
        f"pickle {protocol}": lambda value, protocol=protocol: pickle.loads(pickle.dumps(value, protocol))  # type: ignore[misc]
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1)
    },
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
}
travels = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


def modules() -> list[ModuleType]:
    """Every module of the package that can be imported here."""
    found = [concurrent_kv]
    for module in pkgutil.walk_packages(concurrent_kv.__path__, "concurrent_kv."):
        if module.name.endswith("__main__"):  # a program, which nobody imports
            continue
        try:
            found.append(importlib.import_module(module.name))
        except ModuleNotFoundError as error:
            if error.name is None or error.name.startswith("concurrent_kv"):
                raise  # of what is not installed here, LightZero, no more is asked
    return found


ENVELOPES = {"PlannersOwnError"}  # around another error on its way; nobody hears them
ERRORS = sorted(
    {
        value
        for module in modules()
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, BaseException) and value.__module__.startswith("concurrent_kv")
        if value.__name__ not in ENVELOPES
    },
    key=lambda kind: kind.__name__,
)


def made(kind: type[BaseException]) -> BaseException:
    """An error as the package raises it."""
    if issubclass(kind, CapacityError):
        return kind("too many", required_entries=3, required_slots=24)
    if issubclass(kind, IntegrityError):
        return kind(("one count is wrong", "another too"))
    return kind("what went wrong")


def test_every_exception_class_of_the_package_derives_from_its_base() -> None:
    assert len(ERRORS) >= len(concurrent_kv.errors.__all__)
    assert all(issubclass(kind, KVCacheError) for kind in ERRORS)


@travels
@pytest.mark.parametrize("kind", ERRORS)
def test_an_error_keeps_its_type_message_and_fields(kind: type[BaseException], way: Callable[[Any], Any]) -> None:
    error = made(kind)
    error.note = ["of the user's"]  # type: ignore[attr-defined]
    arrived = way(error)
    assert arrived is not error
    assert type(arrived) is kind
    assert str(arrived) == str(error)
    assert arrived.args == error.args
    assert vars(arrived) == vars(error)


@travels
def test_the_error_of_a_user_that_derives_from_ours_keeps_its_own_fields(way: Callable[[Any], Any]) -> None:
    arrived = way(UsersError(7))
    assert (type(arrived), arrived.code, str(arrived)) == (UsersError, 7, "ended with the code 7")


class UsersError(SearchEndedError):
    def __init__(self, code: int) -> None:
        super().__init__(f"ended with the code {code}")
        self.code = code


@travels
def test_an_error_as_the_system_raises_it_keeps_its_number(way: Callable[[Any], Any]) -> None:
    arrived = way(concurrent_kv.WaitTimeoutError(110, "timed out", "a file"))
    assert (arrived.errno, arrived.strerror, arrived.filename) == (110, "timed out", "a file")


def fails(required: int) -> None:
    raise CapacityError("too many", required_entries=required, required_slots=24)


def test_a_process_pool_outlives_an_error_of_the_package_and_passes_it_on() -> None:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as workers:
        for required in (3, 4):
            with pytest.raises(CapacityError, match="too many") as caught:
                workers.submit(fails, required).result(BOUND_SECONDS)
            assert caught.value.required_entries == required


# Statistics ----------------------------------------------------------------------------------------------------------


def summary_of(manager: KVCacheManager) -> StatsSummary:
    manager.set_wm_cache("a", tokens(1, 3))
    assert manager.get_wm_cache("a") is not None
    return manager.get_stats_summary()


@travels
def test_a_summary_of_statistics_arrives_equal_with_an_equal_hash(
    way: Callable[[Any], Any], manager: KVCacheManager
) -> None:
    earlier = manager.get_stats_summary()
    for summary in (summary_of(manager), summary_of(manager) - earlier):
        arrived = way(summary)
        assert arrived == summary
        assert hash(arrived) == hash(summary)
        assert arrived.total.hit_count == summary.total.hit_count >= 1
        assert arrived - summary == summary - summary


def test_a_summary_of_statistics_becomes_plain_data(manager: KVCacheManager) -> None:
    summary = summary_of(manager)
    data = dataclasses.asdict(summary)
    assert data["pools"]["wm"] == dataclasses.asdict(summary.pools["wm"])
    assert json.loads(json.dumps(data)) == data
    assert dataclasses.replace(summary, stats_enabled=False).pools == summary.pools


def test_the_pools_of_a_summary_cannot_be_changed_nor_follow_a_dict_that_is() -> None:
    given = {"wm": PoolStats(hit_count=1)}
    summary = StatsSummary(given)
    given["wm"] = PoolStats()
    assert summary.pools["wm"].hit_count == 1
    pools: Any = summary.pools
    for change in (
        lambda: pools.update(wm=PoolStats()),
        lambda: pools.__setitem__("wm", PoolStats()),
        lambda: pools.__delitem__("wm"),
        lambda: pools.__ior__(given),
        lambda: pools.setdefault("x", PoolStats()),
        lambda: pools.pop("wm"),
        pools.popitem,
        pools.clear,
    ):
        with pytest.raises(TypeError, match="cannot be changed"):
            change()
    assert summary == StatsSummary({"wm": PoolStats(hit_count=1)})


@travels
def test_every_other_report_and_setting_arrives_equal(way: Callable[[Any], Any], manager: KVCacheManager) -> None:
    reports = [PoolStats(hit_count=2), OffloadStats(1, 2), manager.check_integrity(), manager.repair(), layout()]
    reports += [manager.config, concurrent_kv.DropOldest(7, 2), concurrent_kv.RaiseOnOverflow(7)]
    for report in reports:
        arrived = way(report)
        assert arrived == report
        assert hash(arrived) == hash(report)
    assert dataclasses.asdict(layout())["device"] == torch.device("cpu")
    assert dataclasses.asdict(manager.config)["layout"]["max_tokens"] == config()["context_length"]


# Tokens --------------------------------------------------------------------------------------------------------------


@travels
def test_tokens_arrive_bit_for_bit_with_their_lengths(way: Callable[[Any], Any]) -> None:
    rows = stacked(tokens(1, 3), tokens(2, 5))
    for kv in (rows, rows.row(0), KeysValues(rows.keys.clone(), rows.values.clone(), rows.lengths)):
        assert_same(way(kv), kv)


@travels
def test_tokens_with_gradients_arrive_too(way: Callable[[Any], Any]) -> None:
    leaf = torch.ones(4, 1, 2, 3, 3, requires_grad=True)
    kv = KeysValues.from_packed(leaf * 2)
    assert_same(way(kv), kv)


def test_a_row_of_many_is_pickled_without_the_others() -> None:
    many = stacked(*[tokens(number, 4) for number in range(100)])
    one = many.row(7)
    assert len(pickle.dumps(one)) < len(pickle.dumps(packed(tokens(7, 4)))) + 1000


def test_a_copy_shares_the_tensors_and_a_deep_copy_has_its_own(make_pool: MakePool) -> None:
    pool = make_pool()
    pool.put("a", tokens(1, 3))
    found = pool.get("a")
    assert found is not None
    shallow, deep = copy.copy(found), copy.deepcopy(found)
    assert shallow.packed is found.packed
    found.keys.zero_()
    assert not shallow.keys.any()
    assert_same(deep, tokens(1, 3))
