"""Bad calls of pools, batches and what is put into them: the exact error, the argument named, nothing changed."""

from __future__ import annotations

import math

import pytest
import torch

from concurrent_kv import (
    CapacityError,
    ClosedError,
    KeyNotFoundError,
    KeysValues,
    KVPool,
    WindowOverflowError,
)
from concurrent_kv import InvalidArgumentError as Value
from concurrent_kv import InvalidTypeError as Type
from concurrent_kv.model.overflow import DropAndCorrect, DropOldest, RaiseOnOverflow
from tests.bad_calls import META, SHAPE, Bad, Stage, check, table, with_each
from tests.support import LAYOUT, WINDOW, layout, stacked, tokens

TIMEOUTS = {
    "negative": (Value, -1.0),
    "nan": (Value, math.nan),
    "infinite": (Value, math.inf),
    "text": (Type, "1"),
    "bool": (Type, True),
}
UNHASHABLE = {"list": (Type, []), "dict": (Type, {}), "nested": (Type, ("a", [1])), "set": (Type, {1})}
PRIORITIES = {"nan": (Value, math.nan), "text": (Type, "high"), "none": (Type, None), "bool": (Type, True)}
KEYS = {
    "text": (Type, "ab"),
    "bytes": (Type, b"ab"),
    "number": (Type, 5),
    "none": (Type, None),
    "empty": (Value, []),
    "unhashable": (Type, ["a", []]),
    "set": (Type, {"a", "b"}),
}
ROOMS = {"negative": (Value, -1), "too large": (Value, 6), "float": (Type, 1.5), "text": (Type, "2")}
KVS = {
    "none": (Type, None),
    "tensor": (Type, torch.zeros(2, 1, 2, 3, 3)),
    "two rows": (Value, stacked(tokens(1, 2), tokens(2, 2))),
    "layers": (Value, tokens(1, 2, layout=layout(num_layers=3))),
    "heads": (Value, tokens(1, 2, layout=layout(num_heads=1))),
    "head_dim": (Value, tokens(1, 2, layout=layout(head_dim=4))),
    "dtype": (Value, tokens(1, 2, layout=layout(dtype=torch.float16))),
    "device": (Value, META),
    "empty": (Value, KeysValues(torch.zeros(2, 1, 2, 3, 3), torch.zeros(2, 1, 2, 3, 3), [0])),
    "too long": (Value, tokens(1, WINDOW + 1)),
}
OUTS = {
    "list": (Type, [0.0]),
    "rows": (Value, torch.zeros(4, 3, 2, WINDOW, 3)),
    "layers": (Value, torch.zeros(2, 2, 2, WINDOW, 3)),
    "dimensions": (Value, torch.zeros(4, 2, 2, WINDOW)),
    "too short": (Value, torch.zeros(4, 2, 2, 4, 3)),
    "beyond the window": (Value, torch.zeros(4, 2, 2, WINDOW + 1, 3)),
    "dtype": (Value, torch.zeros(SHAPE, dtype=torch.float64)),
    "device": (Value, torch.zeros(SHAPE, device="meta")),
    "strides": (Value, torch.zeros(4, 2, 2, 3, WINDOW).transpose(3, 4)),
    "gradients": (Value, torch.zeros(SHAPE, requires_grad=True)),
}
SIDES = {
    "too few": (Value, ["A"]),
    "too many": (Value, ["A", "B", "C"]),
    "number": (Type, 5),
    "text": (Type, "AB"),
    "set": (Type, {"A", "B"}),
    "dict": (Type, {"a": "A", "b": "B"}),
}
NEW = torch.zeros(2, 2, 1, 3)
APPENDED = {
    "list": (Type, [0.0]),
    "rows": (Value, torch.zeros(1, 2, 1, 3)),
    "heads": (Value, torch.zeros(2, 1, 1, 3)),
    "dimensions": (Value, torch.zeros(2, 2, 3)),
    "dtype": (Value, NEW.to(torch.float64)),
    "device": (Value, NEW.to("meta")),
}
SMALL = layout(num_heads=1)

SHARDS = {
    "empty": (Value, ()),
    "repeated": (Value, (0, 0)),
    "descending": (Value, (1, 0)),
    "negative": (Value, (-1,)),
    "beyond": (Value, (0, 1_000)),
    "bool": (Type, (True,)),
    "text": (Type, "01"),
    "number": (Type, 3),
}

POOL = [
    *with_each("shards", "scope_shards", SHARDS, lambda s, shards: KVPool(LAYOUT, 4, scope_shards=shards)),
    *with_each("put key", "key", UNHASHABLE, lambda s, key: s.pool.put(key, tokens(1, 2))),
    *with_each("get key", "key", UNHASHABLE, lambda s, key: s.pool.get(key)),
    *with_each("peek key", "key", UNHASHABLE, lambda s, key: s.pool.peek(key)),
    *with_each("pop key", "key", UNHASHABLE, lambda s, key: s.pool.pop(key)),
    *with_each("side key", "key", UNHASHABLE, lambda s, key: s.pool.side(key)),
    *with_each("pin key", "key", UNHASHABLE, lambda s, key: s.pool.pin(key)),
    *with_each("in key", "key", UNHASHABLE, lambda s, key: key in s.pool),
    *with_each("scope name", "name", UNHASHABLE, lambda s, name: s.pool.scope(name)),
    *with_each("put kv", "kv", KVS, lambda s, kv: s.pool.put("x", kv)),
    *with_each("replace kv", "kv", KVS, lambda s, kv: s.pool.put("a", kv)),
    *with_each("put priority", "priority", PRIORITIES, lambda s, p: s.pool.put("x", tokens(1, 2), priority=p)),
    *with_each("put timeout", "timeout", TIMEOUTS, lambda s, t: s.pool.put("x", tokens(1, 2), timeout=t)),
    *with_each("get timeout", "timeout", TIMEOUTS, lambda s, t: s.pool.get("a", timeout=t)),
    *with_each("pop timeout", "timeout", TIMEOUTS, lambda s, t: s.pool.pop("a", timeout=t)),
    *with_each("pin timeout", "timeout", TIMEOUTS, lambda s, t: s.pool.pin("a", timeout=t)),
    *with_each("clear timeout", "timeout", TIMEOUTS, lambda s, t: s.pool.clear(timeout=t)),
    *with_each("bump timeout", "timeout", TIMEOUTS, lambda s, t: s.pool.bump_version(timeout=t)),
    *with_each("close timeout", "timeout", TIMEOUTS, lambda s, t: s.pool.close(timeout=t)),
    Bad("more slots than have a number", lambda s: KVPool(LAYOUT, 2**31), Value, "num_slots"),
    Bad("pin missing", lambda s: s.pool.pin("x"), KeyNotFoundError, "'x'"),
    Bad("put scope of another pool", lambda s: s.pool.put("x", tokens(1, 2), scope=s.other.scope("s")), Value, "scope"),
    Bad("put scope by name", lambda s: s.pool.put("x", tokens(1, 2), scope="pool"), Type, "scope"),  # type: ignore[arg-type]
    Bad("get scope of another pool", lambda s: s.pool.get("a", scope=s.other.default_scope), Value, "scope"),
    Bad("clear scope of another pool", lambda s: s.pool.clear(s.other.default_scope), Value, "scope"),
    Bad("clear scope by name", lambda s: s.pool.clear("pool"), Type, "scope"),  # type: ignore[arg-type]
    Bad("put on a closed pool", lambda s: s.closed.put("x", tokens(1, 2)), ClosedError, "closed"),
    Bad("get to nowhere", lambda s: s.pool.get("a", to="nowhere"), Value, "to must name a torch device"),
    Bad("get on a closed pool", lambda s: s.closed.get("x"), ClosedError, "closed"),
    Bad("get_or_compute key", lambda s: s.pool.get_or_compute([], lambda: tokens(1, 2)), Type, "key"),  # type: ignore[arg-type]
    Bad("get_or_compute compute", lambda s: s.pool.get_or_compute("x", 5), Type, "compute"),  # type: ignore[arg-type]
    Bad("get_or_compute result", lambda s: s.pool.get_or_compute("x", lambda: None), Type, "kv"),  # type: ignore[arg-type,return-value]
]

MANY = [
    *with_each("keys", "keys", KEYS, lambda s, keys: s.pool.put_many(keys, stacked(tokens(1, 2), tokens(2, 2)))),
    *with_each("sides", "sides", SIDES, lambda s, v: s.pool.put_many([1, 2], stacked(*[tokens(1, 2)] * 2), sides=v)),
    *with_each(
        "priorities",
        "priorit",
        {
            "too few": (Value, [1.0]),
            "nan": (Value, [1.0, math.nan]),
            "text": (Type, [1.0, "x"]),
            "number": (Type, 5.0),
        },
        lambda s, v: s.pool.put_many([1, 2], stacked(*[tokens(1, 2)] * 2), priorities=v),
    ),
    Bad("fewer rows than keys", lambda s: s.pool.put_many([1, 2, 3], stacked(*[tokens(1, 2)] * 2)), Value, "3 rows"),
    Bad(
        "more rows than the pool holds",
        lambda s: s.pool.put_many(range(5), stacked(*[tokens(1, 2)] * 5)),
        CapacityError,
        "5 entries",
    ),
]

GATHER = [
    *with_each("keys", "keys", KEYS, lambda s, keys: s.pool.gather(keys)),
    *with_each("room", "room", ROOMS, lambda s, room: s.pool.gather(["a", "a"], room=room)),
    *with_each("out", "out", OUTS, lambda s, out: s.pool.gather(["a", "b"], out=out)),
    *with_each("timeout", "timeout", TIMEOUTS, lambda s, t: s.pool.gather(["a"], timeout=t)),
    Bad("scope", lambda s: s.pool.gather(["a"], scope=s.other.default_scope), Value, "scope"),
    Bad("closed", lambda s: s.closed.gather(["a"]), ClosedError, "closed"),
]

BATCH = [
    *with_each(
        "append layer",
        "layer",
        {"negative": (Value, -1), "too large": (Value, 2), "text": (Type, "0"), "float": (Type, 0.5)},
        lambda s, layer: s.batch.append(layer, NEW, NEW),
    ),
    *with_each("append keys", "keys", APPENDED, lambda s, keys: s.batch.append(0, keys, NEW)),
    *with_each("append values", "values", APPENDED, lambda s, values: s.batch.append(0, NEW, values)),
    Bad(
        "append too many tokens",
        lambda s: s.batch.append(0, torch.zeros(2, 2, 6, 3), torch.zeros(2, 2, 6, 3)),
        WindowOverflowError,
        "6 new tokens",
    ),
    *with_each(
        "advance tokens",
        "tokens",
        {
            "zero": (Value, 0),
            "negative": (Value, -1),
            "float": (Type, 1.0),
            "text": (Type, "1"),
            "too many": (WindowOverflowError, 6),
        },
        lambda s, n: s.batch.advance(n),
    ),
    *with_each(
        "fill row",
        "row",
        {
            "negative": (Value, -1),
            "too large": (Value, 2),
            "hit": (Value, 0),
            "text": (Type, "1"),
            "bool": (Type, True),
        },
        lambda s, row: s.batch.fill(row, tokens(1, 2)),
    ),
    *with_each("fill kv", "kv", KVS, lambda s, kv: s.batch.fill(1, kv)),
    Bad("fill after append", lambda s: s.ready.fill(2, tokens(1, 2)), Value, "before tokens are appended"),
    Bad("append to a closed batch", lambda s: s.done.append(0, NEW[:1], NEW[:1]), ClosedError, "batch is closed"),
    Bad("layer of a batch", lambda s: s.batch.layer(2), Value, "layer"),
]


def other_difference() -> DropAndCorrect:
    return DropAndCorrect(WINDOW - 1, 2, torch.zeros(2, 2, 1, WINDOW - 3, 3), SMALL)


COMMIT = [
    *with_each("keys", "keys", KEYS, lambda s, keys: s.pool.commit(keys, s.ready, rows=[0, 1])),
    Bad("fewer keys than rows", lambda s: s.pool.commit(["x"], s.ready, rows=[0, 1]), Value, "keys"),
    Bad("more keys than rows", lambda s: s.pool.commit(["x", "y"], s.ready, rows=[0]), Value, "keys"),
    *with_each(
        "rows",
        "row",
        {
            "negative": (Value, [0, -1]),
            "too large": (Value, [0, 3]),
            "repeated": (Value, [1, 1]),
            "text": (Type, ["0", "1"]),
            "a number": (Type, 5),
            "missed": (Value, [0, 2]),
        },
        lambda s, rows: s.pool.commit(["x", "y"], s.ready, rows=rows),
    ),
    *with_each(
        "overflow",
        "overflow",
        {
            "text": (Type, "drop"),
            "number": (Type, 2),
            "class": (Type, DropOldest),
            "limit beyond the window": (Value, DropOldest(WINDOW + 1, 2)),
            "for another layout": (Value, other_difference()),
        },
        lambda s, overflow: s.pool.commit(["x", "y"], s.ready, rows=[0, 1], overflow=overflow),
    ),
    Bad(
        "overflow that raises",
        lambda s: s.pool.commit(["x", "y"], s.ready, rows=[0, 1], overflow=RaiseOnOverflow(7)),
        WindowOverflowError,
        "rows reach 7 tokens",
    ),
    *with_each("sides", "sides", SIDES, lambda s, sides: s.pool.commit([1, 2], s.ready, rows=[0, 1], sides=sides)),
    *with_each(
        "priorities",
        "priorit",
        {"nan": (Value, [0.0, math.nan]), "too few": (Value, [0.0]), "number": (Type, 5.0)},
        lambda s, p: s.pool.commit([1, 2], s.ready, rows=[0, 1], priorities=p),
    ),
    *with_each("timeout", "timeout", TIMEOUTS, lambda s, t: s.pool.commit(["x"], s.ready, rows=[0], timeout=t)),
    *with_each("batch", "batch", {"none": (Type, None), "text": (Type, "b")}, lambda s, b: s.pool.commit(["x"], b)),
    Bad("batch of another pool", lambda s: s.pool.commit(["x"], s.foreign), Value, "batch was gathered for other"),
    Bad("batch of a search", lambda s: s.pool.commit(["x"], s.leaf), Value, "batch was gathered for"),
    Bad("without appended tokens", lambda s: s.pool.commit(["x"], s.batch, rows=[0]), Value, "no new tokens"),
    Bad("layers with unequal appends", lambda s: s.pool.commit(["x"], s.uneven), Value, "different numbers"),
    Bad("twice", lambda s: s.pool.commit(["x"], s.done), ClosedError, "batch is closed"),
    Bad("missed row", lambda s: s.pool.commit(["x"], s.ready, rows=[2]), Value, "row 2 missed"),
]


@table(POOL)
def test_a_bad_call_of_a_pool_changes_nothing(bad: Bad) -> None:
    check(bad)


@table(MANY)
def test_a_bad_put_many_changes_nothing(bad: Bad) -> None:
    check(bad)


@table(GATHER)
def test_a_bad_gather_changes_nothing(bad: Bad) -> None:
    check(bad)


@table(BATCH)
def test_a_bad_call_of_a_batch_changes_nothing(bad: Bad) -> None:
    check(bad)


@table(COMMIT)
def test_a_bad_commit_changes_nothing(bad: Bad) -> None:
    check(bad)


def test_a_row_cannot_be_committed_twice() -> None:
    stage = Stage()
    stage.pool.commit(["once"], stage.ready, rows=[0])
    before = stage.state()
    with pytest.raises(Value, match="row 0 was committed before"):
        stage.pool.commit(["x"], stage.ready, rows=[0])
    assert stage.state() == before
    stage.close()
