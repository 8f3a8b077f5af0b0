"""Bad calls of managers and searches, and settings that nothing can be made of: the error, the argument, no change."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from concurrent_kv import (
    CapacityError,
    DropAndCorrect,
    DropLazily,
    DropOldest,
    KeyNotFoundError,
    KeysValues,
    KVCacheManager,
    KVLayout,
    KVPool,
    KVStorage,
    PositionSteps,
    PositionTable,
    RaiseOnOverflow,
    SearchEndedError,
)
from concurrent_kv import InvalidArgumentError as Value
from concurrent_kv import InvalidTypeError as Type
from tests.bad_calls import Bad, check, table, with_each
from tests.support import LAYOUT, WINDOW, config, layout, tokens
from tests.test_bad_input import KEYS, KVS, PRIORITIES, ROOMS, TIMEOUTS, UNHASHABLE

ENVS = {
    "unknown": (Value, 2),
    "negative": (Value, -1),
    "text": (Value, "0"),
    "none": (Value, None),
    "bool": (Value, True),
    "unhashable": (Type, []),
}
ENV_IDS = {
    "none": (Type, None),
    "a number": (Type, 0),
    "empty": (Value, []),
    "unknown": (Value, [2]),
    "repeated": (Value, [0, 0]),
    "unhashable": (Type, [[0]]),
}
SIZES = {"zero": (Value, 0), "negative": (Value, -1), "float": (Type, 1.5), "text": (Type, "4"), "bool": (Type, True)}
ORDERS = {"unknown": (Value, "first"), "number": (Value, 5), "list": (Value, ["own_first"])}
OVERFLOWS = {"text": (Type, "drop"), "number": (Type, 7), "class": (Type, DropOldest)}

MANAGER = [
    *with_each("set_init env_id", "env_id", ENVS, lambda s, e: s.manager.set_init_cache(e, "k", tokens(1, 2))),
    *with_each("get_init env_id", "env_id", ENVS, lambda s, e: s.manager.get_init_cache(e, "k")),
    *with_each("hierarchical env_id", "env_id", ENVS, lambda s, e: s.manager.hierarchical_get(e, "k")),
    *with_each("set_init key", "key", UNHASHABLE, lambda s, k: s.manager.set_init_cache(0, k, tokens(1, 2))),
    *with_each("set_recur key", "key", UNHASHABLE, lambda s, k: s.manager.set_recur_cache(k, tokens(1, 2))),
    *with_each("get_wm key", "key", UNHASHABLE, lambda s, k: s.manager.get_wm_cache(k)),
    *with_each("hierarchical key", "key", UNHASHABLE, lambda s, k: s.manager.hierarchical_get(0, k)),
    *with_each("set_init kv", "kv", KVS, lambda s, kv: s.manager.set_init_cache(0, "k", kv)),
    *with_each("set_recur kv", "kv", KVS, lambda s, kv: s.manager.set_recur_cache("k", kv)),
    *with_each("set_wm kv", "kv", KVS, lambda s, kv: s.manager.set_wm_cache("k", kv)),
    *with_each(
        "set_wm priority",
        "priority",
        PRIORITIES,
        lambda s, p: s.manager.set_wm_cache("k", tokens(1, 2), priority=p),
    ),
    *with_each(
        "hierarchical order",
        "order",
        {"text": (Type, "init"), "empty": (Value, ()), "unknown": (Value, ("init", "x")), "number": (Type, 5)},
        lambda s, order: s.manager.hierarchical_get(0, "k", order=order),
    ),
]

SEARCH = [
    *with_each("env_ids", "env_ids", ENV_IDS, lambda s, env_ids: s.manager.search(env_ids)),
    *with_each("entries", "entries", SIZES, lambda s, n: s.manager.search([0], entries=n)),
    *with_each("tokens", "tokens", SIZES, lambda s, n: s.manager.search([0], tokens=n)),
    *with_each("order", "order", ORDERS, lambda s, order: s.manager.search([0], order=order)),
    *with_each("overflow", "overflow", OVERFLOWS, lambda s, o: s.manager.search([0], overflow=o)),
    *with_each("timeout", "timeout", TIMEOUTS, lambda s, t: s.manager.search([0], timeout=t)),
    Bad("more than there is", lambda s: s.manager.search([0], tokens=1000), CapacityError, "recur_slots=1032 would do"),
    Bad("more than is left", lambda s: s.manager.search([0], tokens=80, timeout=0.0), CapacityError, "recur_slots=112"),
    *with_each("gather keys", "keys", KEYS, lambda s, keys: s.search.gather(keys, [0])),
    *with_each(
        "gather env_ids",
        "env_ids",
        {
            "fewer": (Value, [0]),
            "more": (Value, [0, 0, 0]),
            "not of the search": (Value, [0, 1]),
            "unknown": (Value, [0, 7]),
            "none": (Type, None),
            "a number": (Type, 0),
            "unhashable": (Type, [0, []]),
            "set": (Type, {0}),
        },
        lambda s, env_ids: s.search.gather(["root", "child"], env_ids),
    ),
    *with_each("gather order", "order", ORDERS, lambda s, o: s.search.gather(["root"], [0], order=o)),
    *with_each("gather room", "room", ROOMS, lambda s, r: s.search.gather(["root", "child"], [0, 0], room=r)),
    *with_each("gather timeout", "timeout", TIMEOUTS, lambda s, t: s.search.gather(["root"], [0], timeout=t)),
    *with_each("in", "key", UNHASHABLE, lambda s, key: key in s.search),
]

MORE = [
    Bad("commit of another search's batch", lambda s: s.next.commit(["x", "y"], s.leaf), Value, "another search"),
    Bad("commit of a pool's batch", lambda s: s.search.commit(["x"], s.ready, rows=[0]), Value, "another search"),
    Bad("commit of a pool's closed batch", lambda s: s.search.commit(["x"], s.done), Value, "another search"),
    *with_each(
        "commit batch", "batch", {"none": (Type, None), "number": (Type, 5)}, lambda s, b: s.search.commit([1], b)
    ),
    *with_each("commit overflow", "overflow", OVERFLOWS, lambda s, o: s.search.commit([1, 2], s.leaf, overflow=o)),
    *with_each("commit keys", "keys", KEYS, lambda s, keys: s.search.commit(keys, s.leaf)),
    *with_each("commit timeout", "timeout", TIMEOUTS, lambda s, t: s.search.commit([1, 2], s.leaf, timeout=t)),
    *with_each(
        "release keys",
        "keys",
        {k: v for k, v in KEYS.items() if k not in ("empty", "set")},
        lambda s, keys: s.search.release(keys),
    ),
    Bad("release missing", lambda s: s.search.release(["child", "x"]), KeyNotFoundError, "'x'"),
    *with_each(
        "keep keys",
        "keys",
        {k: v for k, v in KEYS.items() if k not in ("empty", "set")},
        lambda s, keys: s.search.keep(keys),
    ),
    *with_each("keep timeout", "timeout", TIMEOUTS, lambda s, t: s.search.keep(["child"], timeout=t)),
    *with_each("promote key", "key", UNHASHABLE, lambda s, key: s.search.promote(key, 0)),
    *with_each("promote as_key", "as_key", UNHASHABLE, lambda s, key: s.search.promote("child", 0, as_key=key)),
    *with_each(
        "promote env_id",
        "env_id must",
        {**ENVS, "unhashable": (Type, [])},
        lambda s, env_id: s.search.promote("child", env_id),
    ),
    *with_each("promote priority", "priority", PRIORITIES, lambda s, p: s.search.promote("child", 0, priority=p)),
    *with_each("promote timeout", "timeout", TIMEOUTS, lambda s, t: s.search.promote("child", 0, timeout=t)),
    Bad("promote missing", lambda s: s.search.promote("x", 0), KeyNotFoundError, "'x'"),
    Bad("promote to another search's environment", lambda s: s.search.promote("child", 1), Value, "env_id"),
    Bad("gather of an ended search", lambda s: s.ended.gather(["root"], [0]), SearchEndedError, "closed"),
    Bad("commit to an ended search", lambda s: s.ended.commit(["x", "y"], s.leaf), SearchEndedError, "closed"),
    Bad("release of an ended search", lambda s: s.ended.release(["x"]), SearchEndedError, "closed"),
    Bad("keep of an ended search", lambda s: s.ended.keep(["x"]), SearchEndedError, "closed"),
    Bad("promote from an ended search", lambda s: s.ended.promote("x", 0), SearchEndedError, "closed"),
]


@table(MANAGER)
def test_a_bad_call_of_a_manager_changes_nothing(bad: Bad) -> None:
    check(bad)


@table(SEARCH)
def test_a_bad_search_or_gather_changes_nothing(bad: Bad) -> None:
    check(bad)


@table(MORE)
def test_a_bad_call_of_a_search_changes_nothing(bad: Bad) -> None:
    check(bad)


# What cannot be made -------------------------------------------------------------------------------------------------

DIFFERENCE = torch.zeros(2, 2, 2, WINDOW, 3)
KV = torch.zeros(2, 1, 2, 3, 3)


Unmade = tuple[str, Callable[[], object], type[Exception], str]


def sized(make: Callable[[Any], object], name: str) -> list[Unmade]:
    return [(f"{name}={label}", partial(make, value), error, name) for label, (error, value) in SIZES.items()]


def sized_layout(name: str) -> list[Unmade]:
    return sized(lambda value: layout(**{name: value}), name)


def beside_a_storage(**settings: Any) -> KVPool:
    return KVPool(LAYOUT, 1, storage=KVStorage(LAYOUT, WINDOW, headroom_slots=WINDOW), **settings)


UNMADE: list[Unmade] = [
    *sized_layout("num_layers"),
    *sized_layout("num_heads"),
    *sized_layout("head_dim"),
    *sized_layout("max_tokens"),
    ("dtype=int64", lambda: layout(dtype=torch.int64), Value, "dtype"),
    ("dtype=text", lambda: layout(dtype="float32"), Type, "dtype"),
    ("device=unknown", lambda: layout(device="nowhere"), Value, "device"),
    ("device=meta", lambda: layout(device="meta"), Value, "device"),
    *sized(lambda v: KVPool(LAYOUT, v), "max_entries"),
    *sized(lambda v: KVPool(LAYOUT, 4, max_slots=v), "max_slots"),
    *sized(lambda v: KVPool(LAYOUT, 4, max_bytes=v), "max_bytes"),
    *sized(lambda v: KVPool(LAYOUT, 4, shards=v), "shards"),
    *sized(lambda v: KVPool(LAYOUT, 4, writers=v), "writers"),
    *sized(lambda v: KVPool(LAYOUT, 4, writers=v, headroom_tokens=WINDOW), "writers"),
    *sized(lambda v: KVPool(LAYOUT, 4, headroom_tokens=v), "headroom_tokens"),
    ("headroom_tokens below a window", lambda: KVPool(LAYOUT, 4, headroom_tokens=7), Value, "headroom_tokens"),
    ("headroom_tokens beside a storage", lambda: beside_a_storage(headroom_tokens=8), Value, "headroom_tokens"),
    *sized(lambda v: KVPool.allocation_for(LAYOUT, v), "max_entries"),
    *sized(lambda v: KVPool.allocation_for(LAYOUT, 4, max_slots=v), "max_slots"),
    *sized(lambda v: KVPool.allocation_for(LAYOUT, 4, max_bytes=v), "max_bytes"),
    *sized(lambda v: KVPool.allocation_for(LAYOUT, 4, writers=v), "writers"),
    *sized(lambda v: KVPool.allocation_for(LAYOUT, 4, headroom_tokens=v), "headroom_tokens"),
    ("allocation_for layout=none", lambda: KVPool.allocation_for(None, 4), Type, "layout"),  # type: ignore[arg-type]
    ("allocation_for an unknown argument", lambda: KVPool.allocation_for(LAYOUT, 4, slots=8), TypeError, "slots"),
    ("layout=none", lambda: KVPool(None, 4), Type, "layout"),  # type: ignore[arg-type]
    ("max_slots below a window", lambda: KVPool(LAYOUT, 4, max_slots=7), Value, "max_slots=7"),
    ("max_bytes below a window", lambda: KVPool(LAYOUT, 4, max_bytes=100), Value, "max_bytes=100"),
    ("max_slots and max_bytes", lambda: KVPool(LAYOUT, 4, max_slots=8, max_bytes=9999), Value, "not both"),
    ("policy=unknown", lambda: KVPool(LAYOUT, 4, policy="mru"), Value, "policy"),
    ("policy=number", lambda: KVPool(LAYOUT, 4, policy=5), Value, "policy"),  # type: ignore[arg-type]
    ("policy that makes none", lambda: KVPool(LAYOUT, 4, policy=lambda capacity: None), Value, "policy"),  # type: ignore[arg-type]
    ("wait_timeout=negative", lambda: KVPool(LAYOUT, 4, wait_timeout=-1), Value, "wait_timeout"),
    ("wait_timeout=nan", lambda: KVPool(LAYOUT, 4, wait_timeout=math.nan), Value, "wait_timeout"),
    ("wait_timeout=text", lambda: KVPool(LAYOUT, 4, wait_timeout="1"), Type, "wait_timeout"),  # type: ignore[arg-type]
    ("storage=number", lambda: KVPool(LAYOUT, 4, storage=5), Type, "storage"),  # type: ignore[arg-type]
    (
        "storage of another layout",
        lambda: KVPool(LAYOUT, 4, storage=KVStorage(layout(num_heads=1), 32, headroom_slots=8)),
        Value,
        "layout",
    ),
    *sized(lambda v: KVStorage(LAYOUT, v, headroom_slots=0), "num_slots"),
    *sized(lambda v: KVCacheManager(config(), v), "env_num"),
    *sized(lambda v: KVCacheManager(config(), 2, init_entries=v), "init_entries"),
    *sized(lambda v: KVCacheManager(config(), 2, recur_slots=v), "recur_slots"),
    *sized(lambda v: KVCacheManager(config(), 2, wm_entries=v), "wm_entries"),
    *sized(lambda v: KVCacheManager(config(), 2, init_tokens=v), "init_tokens"),
    *sized(lambda v: KVCacheManager(config(), 2, wm_tokens=v), "wm_tokens"),
    *sized(lambda v: KVCacheManager(config(), 2, writers=v), "writers"),
    *sized(lambda v: KVCacheManager(config(), 2, headroom_tokens=v), "headroom_tokens"),
    *sized(lambda v: KVCacheManager.allocation_for(config(), v), "env_num"),
    *sized(lambda v: KVCacheManager.allocation_for(config(), 2, init_entries=v), "init_entries"),
    *sized(lambda v: KVCacheManager.allocation_for(config(), 2, headroom_tokens=v), "headroom_tokens"),
    ("init_tokens below a window", lambda: KVCacheManager(config(), 2, init_tokens=7), Value, "init_tokens"),
    ("wm_tokens below a window", lambda: KVCacheManager(config(), 2, wm_tokens=7), Value, "wm_tokens"),
    ("manager headroom below a window", lambda: KVCacheManager(config(), 2, headroom_tokens=7), Value, "headroom_"),
    ("allocation_for config=none", lambda: KVCacheManager.allocation_for(None, 2), Value, "config"),
    ("allocation_for token=8", lambda: KVCacheManager.allocation_for(config(), 2, token=8), TypeError, "token"),
    *sized(lambda v: KVCacheManager(config(), 2, log_every_clears=v), "log_every_clears"),
    *sized(lambda v: KVCacheManager(config(), 2, log_every_steps=v), "log_every_steps"),
    ("manager config=none", lambda: KVCacheManager(None, 2), Value, "config"),
    ("manager policy=unknown", lambda: KVCacheManager(config(), 2, policy="mru"), Value, "policy"),
    ("manager recur_slots below a window", lambda: KVCacheManager(config(), 2, recur_slots=7), Value, "recur_slots"),
    *[(f"RaiseOnOverflow {n}", c, e, s) for n, c, e, s in sized(lambda v: RaiseOnOverflow(v), "limit")],
    *[(f"DropOldest {n}", c, e, s) for n, c, e, s in sized(lambda v: DropOldest(v, 1), "limit")],
    *[(f"DropOldest {n}", c, e, s) for n, c, e, s in sized(lambda v: DropOldest(7, v), "count")],
    ("count=limit", lambda: DropOldest(5, 5), Value, "count"),
    ("difference=list", lambda: DropAndCorrect(7, 2, [0.0], LAYOUT), Type, "difference"),  # type: ignore[arg-type]
    ("difference=shape", lambda: DropAndCorrect(7, 2, DIFFERENCE[:1], LAYOUT), Value, "difference"),
    ("difference=dtype", lambda: DropAndCorrect(7, 2, DIFFERENCE.double(), LAYOUT), Value, "difference"),
    ("difference=too short", lambda: DropAndCorrect(7, 2, DIFFERENCE[:, :, :, :4], LAYOUT), Value, "difference"),
    ("difference layout", lambda: DropAndCorrect(7, 2, DIFFERENCE, None), Type, "layout"),  # type: ignore[arg-type]
    ("table=none", lambda: DropLazily(7, 2, None), Type, "table"),  # type: ignore[arg-type]
    ("count of steps", lambda: DropLazily(7, 3, PositionSteps(LAYOUT, 2, DIFFERENCE)), Value, "count"),
    ("steps layout", lambda: PositionSteps(None, 2, DIFFERENCE), Type, "layout"),  # type: ignore[arg-type]
    ("steps of nothing", lambda: PositionSteps(LAYOUT, 0, DIFFERENCE), Value, "count"),
    ("steps too short", lambda: PositionSteps(LAYOUT, 2, DIFFERENCE[:, :, :, :0]), Value, "difference"),
    ("table layout", lambda: PositionTable(None, lambda distance: DIFFERENCE), Type, "layout"),  # type: ignore[arg-type]
    ("table of a number", lambda: PositionTable(LAYOUT, 5), Type, "difference_for"),  # type: ignore[arg-type]
    ("table of nothing", lambda: PositionTable(LAYOUT, lambda distance: None), Type, "difference_for(1)"),  # type: ignore[arg-type,return-value]
    ("table too short", lambda: PositionTable(LAYOUT, lambda d: DIFFERENCE[:, :, :, :3]), Value, "difference_for(1)"),
    ("keys=list", lambda: KeysValues([0.0], KV), Type, "keys"),  # type: ignore[arg-type]
    ("values=list", lambda: KeysValues(KV, [0.0]), Type, "values"),  # type: ignore[arg-type]
    ("keys=four dimensions", lambda: KeysValues(KV[0], KV[0]), Value, "keys"),
    ("values=shape", lambda: KeysValues(KV, KV[:1]), Value, "values"),
    ("values=dtype", lambda: KeysValues(KV, KV.double()), Value, "dtype"),
    ("values=device", lambda: KeysValues(KV, KV.to("meta")), Value, "device"),
    ("end=too large", lambda: KeysValues(KV, KV, end=4), Value, "end"),
    ("end=negative", lambda: KeysValues(KV, KV, end=-1), Value, "end"),
    ("end=float", lambda: KeysValues(KV, KV, end=1.0), Type, "end"),  # type: ignore[arg-type]
    ("lengths=too many", lambda: KeysValues(KV, KV, [1, 1]), Value, "lengths"),
    ("lengths=too large", lambda: KeysValues(KV, KV, [4]), Value, "lengths"),
    ("lengths=negative", lambda: KeysValues(KV, KV, [-1]), Value, "lengths"),
    ("lengths=float", lambda: KeysValues(KV, KV, [1.0]), Type, "lengths"),  # type: ignore[list-item]
    ("lengths=a number", lambda: KeysValues(KV, KV, 3), Type, "lengths"),  # type: ignore[arg-type]
    ("packed=list", lambda: KeysValues.from_packed([0.0]), Type, "packed"),  # type: ignore[arg-type]
    ("packed=odd", lambda: KeysValues.from_packed(KV[:1]), Value, "packed"),
    ("single=five dimensions", lambda: KeysValues.single(KV, KV), Value, "keys"),
    ("to=unknown device", lambda: KeysValues(KV, KV).to("nowhere"), Value, "device"),
]


@pytest.mark.parametrize(("make", "error", "says"), [case[1:] for case in UNMADE], ids=[case[0] for case in UNMADE])
def test_what_cannot_be_made_is_an_error_that_names_the_argument(
    make: Callable[[], object], error: type[Exception], says: str
) -> None:
    with pytest.raises(error) as caught:
        make()
    assert type(caught.value) is error
    assert says in str(caught.value)


def test_a_pool_that_could_not_be_made_is_not_known_to_its_storage() -> None:
    with KVPool(LAYOUT, 4) as pool:
        with pytest.raises(Type, match="name"):
            KVPool(LAYOUT, 4, storage=pool.storage, name=[])  # type: ignore[arg-type]
        assert pool.storage.pools == [pool]
        assert isinstance(pool.layout, KVLayout)
        pool.check_integrity()
