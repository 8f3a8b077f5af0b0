"""What owns something is neither copied nor pickled, and says so; what was made of its attributes closes nothing."""

from __future__ import annotations

import copy
import gc
import pickle
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from concurrent_kv import AsyncKVCacheManager, AsyncKVPool, InvalidTypeError, KVCacheManager, KVPool
from concurrent_kv.aio import AsyncEvaluator
from concurrent_kv.books.eviction import EvictionPolicy
from concurrent_kv.books.eviction.registry import POLICIES
from concurrent_kv.cluster import Host, HostParts, LocalCluster
from concurrent_kv.evaluation import Evaluated, Evaluator
from concurrent_kv.never_copied import NeverCopied
from concurrent_kv.pool.handle import Handle
from concurrent_kv.pool.joint import JointBatch, open_together
from concurrent_kv.pool.pool import gather_part_of_pool
from tests.conftest import MakePool
from tests.support import LAYOUT, tokens

WAYS: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    **{f"pickle {protocol}": lambda value, protocol=protocol: pickle.dumps(value, protocol) for protocol in range(6)},  # type: ignore[misc]
}


def no_model(batch: JointBatch, inputs: Sequence[Any]) -> Evaluated[Any]:
    raise NotImplementedError


def setup() -> HostParts:
    sizes = {"num_layers": 1, "num_heads": 1, "embed_dim": 2, "context_length": 4, "num_simulations": 2}
    made = KVCacheManager(sizes | {"max_cache_size": 10, "device": "cpu"}, 1)
    return HostParts(made, Evaluator(made, no_model), None)


OWNERS: dict[str, Callable[[KVPool, KVCacheManager], Any]] = {
    "Batch": lambda pool, manager: pool.gather(["a"]),
    "Pin": lambda pool, manager: pool.pin("a"),
    "Claim": lambda pool, manager: pool.try_claim("missing"),
    "Search": lambda pool, manager: manager.search([0]),
    "KVPool": lambda pool, manager: pool,
    "KVStorage": lambda pool, manager: pool.storage,
    "Scope": lambda pool, manager: pool.scope("another"),
    "KVCacheManager": lambda pool, manager: manager,
    "Host": lambda pool, manager: Host("h", setup, threads=1),
    "LocalCluster": lambda pool, manager: LocalCluster(setup, threads=1),
    "AsyncKVPool": lambda pool, manager: AsyncKVPool(pool),
    "AsyncKVCacheManager": lambda pool, manager: AsyncKVCacheManager(manager),
    "AsyncSearch": lambda pool, manager: AsyncKVCacheManager(manager).search([0]),
    "Part": lambda pool, manager: gather_part_of_pool(pool, ["a"], 1),
    "JointBatch": lambda pool, manager: open_together(pool.storage, [gather_part_of_pool(pool, ["a"], 1)]),
    "Evaluator": lambda pool, manager: Evaluator(manager, no_model),
    "EvaluatorWorker": lambda pool, manager: Evaluator(manager, no_model).worker(),
    "AsyncEvaluator": lambda pool, manager: AsyncEvaluator(Evaluator(manager, no_model)),
    "AsyncEvaluatorWorker": lambda pool, manager: AsyncEvaluator(Evaluator(manager, no_model)).worker(),
}
HANDLES = ("Batch", "Pin", "Claim", "Search")


def is_open(owner: Any) -> bool:
    """Whether a handle of `HANDLES` has not been closed."""
    if hasattr(owner, "over"):
        return not owner.over
    return not (owner.closed if hasattr(owner, "closed") else owner._hold.released)


def test_every_class_that_owns_something_is_in_the_table() -> None:
    def below(kind: type[Any]) -> set[type[Any]]:
        return {kind}.union(*map(below, kind.__subclasses__()))

    abstract = {"Cluster", "NeverCopied", "Handle", "PoolCore", "PaddedRows", "Worker"}
    owners = {kind.__name__ for kind in below(NeverCopied) if kind.__module__.startswith("concurrent_kv.")}
    assert owners - abstract == set(OWNERS)
    assert issubclass(Handle, NeverCopied)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("name", OWNERS)
def test_an_owner_that_is_copied_or_pickled_says_what_would_do(
    name: str, way: Callable[[Any], Any], pool: KVPool, manager: KVCacheManager
) -> None:
    pool.put("a", tokens(1, 3))
    owner = OWNERS[name](pool, manager)
    with pytest.raises(InvalidTypeError, match=re.escape(owner.instead_of_copy)) as caught:
        way(owner)
    assert str(caught.value).startswith(f"{name} must not be copied or pickled: ")
    pool.put("b", tokens(2, 3))
    if name in HANDLES:
        assert is_open(owner)
        assert pool.get("a") is not None
    with owner if name in HANDLES else pool.pin("a"):
        pool.check_integrity()
        manager.check_integrity()


@pytest.mark.parametrize("collected", [False, True], ids=["dropped", "collected"])
@pytest.mark.parametrize("name", HANDLES)
def test_an_object_of_the_same_attributes_closes_nothing_when_it_is_dropped(
    name: str, collected: bool, pool: KVPool, manager: KVCacheManager
) -> None:
    pool.put("a", tokens(1, 3))
    manager.set_wm_cache("a", tokens(1, 3))
    owner = OWNERS[name](pool, manager)
    double: Any = object.__new__(type(owner))
    double.__dict__.update(vars(owner))
    if collected:
        double.itself = double
    del double
    gc.collect()
    assert pool.get("a") is not None  # what a finaliser left would be done by the next operation
    assert manager.get_wm_cache("a") is not None
    assert pool.try_claim("another").mine
    assert is_open(owner)
    if name == "Claim":
        assert not pool.try_claim("missing").mine
        owner.abandon()
    else:
        owner.close()


@pytest.mark.parametrize("name", OWNERS)
def test_an_object_whose_constructor_never_ran_is_dropped_silently(
    name: str, pool: KVPool, manager: KVCacheManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    unraisable: list[Any] = []
    monkeypatch.setattr("sys.unraisablehook", unraisable.append)
    pool.put("a", tokens(1, 3))
    owner = OWNERS[name](pool, manager)
    object.__new__(type(owner))
    gc.collect()
    assert not unraisable


@pytest.mark.parametrize("collected", [False, True], ids=["dropped", "collected"])
@pytest.mark.parametrize("name", HANDLES)
def test_the_original_still_closes_when_it_is_dropped(
    name: str, collected: bool, pool: KVPool, manager: KVCacheManager
) -> None:
    pool.put("a", tokens(1, 3))
    owner = OWNERS[name](pool, manager)
    if collected:
        owner.itself = owner
    del owner
    gc.collect()
    pool.get("a")
    manager.get_wm_cache("a")
    assert pool.check_integrity().handles == 0
    assert manager.check_integrity().handles == 0
    assert pool.try_claim("missing").mine


# Eviction policies, which serve one pool each ------------------------------------------------------------------------


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_is_not_copied_over_the_same_containers(name: str) -> None:
    policy: EvictionPolicy[Any] = POLICIES[name](capacity=4)
    with pytest.raises(InvalidTypeError, match=r"must not be copied with copy\.copy\(\)"):
        copy.copy(policy)


@pytest.mark.parametrize("name", POLICIES)
def test_a_deep_copy_of_an_empty_policy_serves_another_pool(name: str, make_pool: MakePool) -> None:
    policy: EvictionPolicy[Any] = POLICIES[name](capacity=2)
    pools = [make_pool(2, LAYOUT, policy=each) for each in (policy, copy.deepcopy(policy))]
    for pool in pools:
        for key in range(4):
            pool.put(key, tokens(key, 3))
        assert len(pool) == 2
        pool.check_integrity()


def test_a_policy_that_serves_a_pool_is_not_deep_copied(make_pool: MakePool) -> None:
    policy = POLICIES["lru"](capacity=2)
    make_pool(2, LAYOUT, policy=policy).put("a", tokens(1, 3))
    with pytest.raises(InvalidTypeError, match=r"^Scope must not be copied or pickled"):
        copy.deepcopy(policy)
