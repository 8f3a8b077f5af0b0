"""`KVPool` against a plain dict model, for every policy: contents, room, victims, statistics and integrity."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Sequence
from typing import ClassVar

import pytest
from hypothesis import note
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from concurrent_kv import (
    CapacityError,
    DropAndCorrect,
    DropOldest,
    KeyNotFoundError,
    KVPool,
    Pin,
    RaiseOnOverflow,
    Scope,
    WaitTimeoutError,
    WindowOverflowError,
)
from concurrent_kv.model.overflow import Overflow
from tests.pool_model import (
    DIFFERENCE,
    LAYOUT,
    NoRoomError,
    OpenBatch,
    PoolModel,
    Record,
    Room,
    TokenSource,
    kv_of,
    last_of_each,
    run_machine,
    same,
)

pytestmark = pytest.mark.usefixtures("loops")

WINDOW = LAYOUT.max_tokens
EXACT = ("fifo", "lru", "priority")

OVERFLOWS: dict[str, Overflow | None] = {
    "none": None,
    "raise at 4": RaiseOnOverflow(4),
    "drop 2 at 5": DropOldest(5, 2),
    "drop 1 at 4": DropOldest(4, 1),
    "drop 3 at 4": DropOldest(4, 3),
    "correct 2 at 5": DropAndCorrect(5, 2, DIFFERENCE, LAYOUT),
    "correct 3 at 4": DropAndCorrect(4, 3, DIFFERENCE, LAYOUT),
}

keys = st.integers(0, 4)
scopes = st.sampled_from(["default", "default", "other"])
lengths = st.integers(1, WINDOW)
priorities = st.sampled_from([0.0, 1.0, 2.0])


class PoolMachine(RuleBasedStateMachine):
    policy: ClassVar[str]

    @initialize(max_entries=st.integers(2, 6), max_slots=st.integers(WINDOW, 16), shards=st.integers(1, 3))
    def open_pool(self, max_entries: int, max_slots: int, shards: int) -> None:
        # Waiting for nothing: single-threaded, what does not fit now never will.
        self.pool = KVPool(
            LAYOUT, max_entries, max_slots=max_slots, policy=self.policy, shards=shards, writers=1, wait_timeout=0.0
        )
        self.scopes: dict[str, Scope] = {"default": self.pool.default_scope, "other": self.pool.scope("other")}
        self.model = PoolModel(self.policy, max_entries, max_slots, max_slots + WINDOW)
        self.source = TokenSource()
        self.generations = {"default": 0, "other": 0}
        self.pins: list[tuple[Pin, Record]] = []
        self.batches: list[OpenBatch] = []
        self.counts: Counter[str] = Counter()

    # Writing -------------------------------------------------------------------------------------------------------

    def write(self, room: Room, call: Callable[[], bool], *, stale: bool = False) -> bool:
        """Run a write on the pool and on the model; returns whether it was accepted."""
        model = self.model
        rows = len(room.records)
        if not stale and (rows > model.max_entries or room.slots() > model.max_slots):
            with pytest.raises(CapacityError):
                call()
            return False
        evictions = self.pool.stats().eviction_count
        try:
            stored, failed = call(), False
        except (WaitTimeoutError, CapacityError) as error:
            note(f"no room: {error}")
            stored, failed = False, True
        evictions = self.pool.stats().eviction_count - evictions
        assert stored is not (stale or failed)
        if stale and not evictions:
            failed = False  # it may find out before or after it made room
        else:
            self.evict(room, evictions, failed, publishes=not stale)
        self.counts["eviction"] += evictions
        if failed:
            return False
        if stale:
            self.counts["stale_write"] += rows
            return True
        replaced = model.publish(room.records)
        self.counts["replace"] += replaced
        self.counts["insert"] += rows - replaced
        return True

    def evict(self, room: Room, evictions: int, failed: bool, *, publishes: bool) -> None:
        """Take the victims out of the model: those it names itself, or those seen to be gone, if they are legal."""
        model = self.model
        if self.policy in EXACT:
            before = model.evictions
            try:
                model.make_room(room, PoolModel.next_victim, publishes=publishes)
            except NoRoomError:
                assert failed, "the pool found room where there was none"
            else:
                assert not failed, "the pool found no room where there was some"
            assert model.evictions - before == evictions
            return
        gone = {
            record
            for record in model.published()
            if self.pool.peek(record.key, scope=self.scopes[record.scope]) is None
        }
        order = model.legal_evictions(room, gone, evictions, failed, publishes)
        assert order is not None, f"{evictions} evictions, seen {gone}, were not what the write needed"
        model.remove(order)

    @rule(key=keys, scope=scopes, length=lengths, side=st.integers(), priority=priorities)
    def put(self, key: int, scope: str, length: int, side: int, priority: float) -> None:
        record = Record(key, scope, self.source.fresh(length), side, priority)
        self.write(
            Room([record], length),
            lambda: self.pool.put(key, kv_of(record.tokens), side=side, priority=priority, scope=self.scopes[scope]),
        )

    @rule(rows=st.lists(st.tuples(keys, lengths, priorities), min_size=1, max_size=4), scope=scopes)
    def put_many(self, rows: list[tuple[int, int, float]], scope: str) -> None:
        records = [Record(key, scope, self.source.fresh(length), object(), number) for key, length, number in rows]
        last = last_of_each(records)
        self.write(
            Room(last, sum(len(record.tokens) for record in last)),
            lambda: self.pool.put_many(
                [record.key for record in records],
                kv_of(*[record.tokens for record in records]),
                sides=[record.side for record in records],
                priorities=[record.priority for record in records],
                scope=self.scopes[scope],
            ),
        )

    # Reading -------------------------------------------------------------------------------------------------------

    def lookup(self, key: int, scope: str) -> Record | None:
        return self.model.index[scope].get(key)

    def requested(self, record: Record | None) -> None:
        self.counts["miss" if record is None else "hit"] += 1
        if record is not None:
            self.model.touch(record)

    @rule(key=keys, scope=scopes)
    def get(self, key: int, scope: str) -> None:
        record = self.lookup(key, scope)
        assert same(self.pool.get(key, scope=self.scopes[scope]), None if record is None else record.tokens)
        self.requested(record)

    @rule(key=keys, scope=scopes)
    def pop(self, key: int, scope: str) -> None:
        record = self.lookup(key, scope)
        assert same(self.pool.pop(key, scope=self.scopes[scope]), None if record is None else record.tokens)
        if record is not None:
            self.model.remove([record])
            self.counts["removal"] += 1

    # Handles -------------------------------------------------------------------------------------------------------

    @precondition(lambda self: len(self.pins) < 3)
    @rule(key=keys, scope=scopes)
    def pin(self, key: int, scope: str) -> None:
        record = self.lookup(key, scope)
        if record is None:
            with pytest.raises(KeyNotFoundError):
                self.pool.pin(key, scope=self.scopes[scope])
        else:
            self.pins.append((self.pool.pin(key, scope=self.scopes[scope]), record))
            self.model.hold([record])
            record.pins += 1

    @precondition(lambda self: self.pins)
    @rule(data=st.data(), how=st.sampled_from(["close", "drop"]))
    def unpin(self, data: st.DataObject, how: str) -> None:
        pin, record = self.pins.pop(data.draw(st.integers(0, len(self.pins) - 1)))
        assert same(pin.get(), record.tokens)
        if how == "close":
            pin.close()
        del pin
        gc.collect()  # a traceback of an expected error may have kept it
        self.model.let_go([record], pinning=True)

    @precondition(lambda self: len(self.batches) < 2)
    @rule(wanted=st.lists(keys, min_size=1, max_size=3), scope=scopes, room=st.sampled_from([None, 0, 1]))
    def gather(self, wanted: list[int], scope: str, room: int | None) -> None:
        records = [self.lookup(key, scope) for key in wanted]
        longest = max((len(record.tokens) for record in records if record is not None), default=0)
        room = None if room is None else min(room, WINDOW - longest)
        batch = self.pool.gather(wanted, scope=self.scopes[scope], room=room)
        opened = OpenBatch(batch, scope, self.generations[scope], records)
        for record in records:
            self.requested(record)
        self.model.hold(opened.hits)
        assert batch.hits == tuple(record is not None for record in records)
        assert batch.side == tuple(None if record is None else record.side for record in records)
        assert batch.data.shape[3] == (WINDOW if room is None else max(1, longest + room))
        assert not batch.data[:, [row for row, hit in enumerate(batch.hits) if not hit], :, : batch.end].any()
        self.batches.append(opened)

    @precondition(lambda self: self.batches)
    @rule(data=st.data(), length=lengths)
    def fill(self, data: st.DataObject, length: int) -> None:
        opened = self.any_batch(data)
        missed = [row for row in range(len(opened.records)) if not opened.tokens(row)]
        if missed and not opened.appended[0]:
            tokens = self.source.fresh(min(length, opened.batch.data.shape[3]))
            opened.batch.fill(missed[0], kv_of(tokens))
            opened.filled[missed[0]] = tokens

    @precondition(lambda self: self.batches)
    @rule(data=st.data(), tokens=st.integers(1, 3))
    def append(self, data: st.DataObject, tokens: int) -> None:
        opened = self.any_batch(data)
        self.source.append(opened, min(tokens, opened.batch.room))

    @precondition(lambda self: any(opened.committable(ragged) for opened in self.batches for ragged in (False, True)))
    @rule(data=st.data(), overflow=st.sampled_from(sorted(OVERFLOWS)), priority=priorities)
    def commit(self, data: st.DataObject, overflow: str, priority: float) -> None:
        ready = [(opened, ragged) for opened in self.batches for ragged in (False, True) if opened.committable(ragged)]
        opened, ragged = ready[data.draw(st.integers(0, len(ready) - 1))]
        del ready
        rows = data.draw(st.lists(st.sampled_from(opened.committable(ragged)), min_size=1, max_size=3, unique=True))
        lengths = data.draw(opened.lengths_of(rows)) if ragged else None
        children = [Record(data.draw(keys), opened.scope, (), object(), priority) for _ in rows]

        def call() -> bool:
            return self.pool.commit(
                [child.key for child in children],
                opened.batch,
                rows=rows,
                lengths=lengths,
                overflow=OVERFLOWS[overflow],
                sides=[child.side for child in children],
                priorities=[priority] * len(rows),
            )

        last = last_of_each(children)
        grown = []
        for child in last:
            place = children.index(child)
            length = None if lengths is None else lengths[place]
            grown.append(self.source.grow(opened, rows[place], child, OVERFLOWS[overflow], length))
        own = [size for size in grown if size is not None]
        if len(own) < len(grown):
            with pytest.raises(WindowOverflowError):
                call()
            return
        corrected = [child for child, (_, eager) in zip(last, own, strict=True) if eager]
        published = corrected + [child for child in last if child not in corrected]
        needed = sum(number for number, _ in own)
        stale = opened.generation != self.generations[opened.scope]
        if self.write(Room(published, needed), call, stale=stale):
            opened.committed |= set(rows)
            assert opened.batch.closed is (len(opened.committed) == len(opened.records))
            if opened.batch.closed:
                self.forget_batch(opened)

    @precondition(lambda self: self.batches)
    @rule(data=st.data(), how=st.sampled_from(["close", "drop"]))
    def close_batch(self, data: st.DataObject, how: str) -> None:
        opened = self.any_batch(data)
        if how == "close":
            opened.batch.close()
        self.forget_batch(opened)
        del opened
        gc.collect()  # a traceback of an expected error may have kept it

    def any_batch(self, data: st.DataObject) -> OpenBatch:
        # By number: what was drawn itself would be kept, and could not be dropped.
        return self.batches[data.draw(st.integers(0, len(self.batches) - 1))]

    def forget_batch(self, opened: OpenBatch) -> None:
        self.batches.remove(opened)
        self.model.let_go(opened.hits)

    # Clears --------------------------------------------------------------------------------------------------------

    @rule(scope=st.sampled_from(["default", "other", None]))
    def clear(self, scope: str | None) -> None:
        self.pool.clear(None if scope is None else self.scopes[scope])
        self.counts["clear"] += 1
        self.renewed(list(self.scopes) if scope is None else [scope])

    @rule()
    def bump_version(self) -> None:
        before = self.scopes["other"].version
        self.pool.bump_version()
        assert self.scopes["other"].version == before + 1
        self.renewed(list(self.scopes))

    def renewed(self, names: Sequence[str]) -> None:
        for name in names:
            self.generations[name] += 1
            self.counts["removal"] += len(self.model.index[name])
            self.model.remove(list(self.model.index[name].values()))

    @rule()
    def repair(self) -> None:
        assert self.pool.repair() == (0, 0, 0)

    # What holds after every step -----------------------------------------------------------------------------------

    @invariant()
    def contents_are_the_models(self) -> None:
        for name, scope in self.scopes.items():
            for key in range(5):
                record = self.lookup(key, name)
                assert same(self.pool.peek(key, scope=scope), None if record is None else record.tokens)
                missing = object()
                side = self.pool.side(key, missing, scope=scope)
                assert side is missing if record is None else side == record.side
        assert [key in self.pool for key in range(5)] == [key in self.model.index["default"] for key in range(5)]
        assert len(self.pool) == len(self.model.published())

    @invariant()
    def handles_keep_what_they_read(self) -> None:
        for pin, record in self.pins:
            assert same(pin.get(), record.tokens)
        for opened in self.batches:
            opened.check_data()

    @invariant()
    def books_are_right(self) -> None:
        report = self.pool.check_integrity()
        names = self.model.names()
        assert report.referenced_slots == len(names)
        assert report.free_slots == self.model.total_slots - len(names)
        assert report.handles == len(self.pins) + len(self.batches)
        stats = self.pool.stats()
        assert stats.entries == len(self.model.published())
        assert stats.slots_in_use == self.model.slots()
        assert stats.shared_slots == sum(number > 1 for number in names.values())
        counted = {name: getattr(stats, f"{name}_count") for name in COUNTERS}
        assert counted == {name: self.counts[name] for name in COUNTERS}


COUNTERS = ("hit", "miss", "insert", "replace", "eviction", "removal", "clear", "stale_write")


@pytest.mark.parametrize("policy", ["fifo", "lru", "priority", "clock", "s3fifo"])
def test_a_pool_does_what_a_dict_of_tuples_with_room_for_so_many_would_do(policy: str) -> None:
    run_machine(type("PoolMachine", (PoolMachine,), {"policy": policy}), examples=40, steps=30)


def test_repair_of_a_sound_pool_changes_no_age() -> None:
    pool = KVPool(LAYOUT, 3, wait_timeout=0.0)
    source = TokenSource()
    for key in range(3):
        pool.put(key, kv_of(source.fresh(1)))
    with pool.pin(0):
        pool.put(3, kv_of(source.fresh(1)))  # passes over 0, which is pinned, and evicts 1
        assert pool.repair() == (0, 0, 0)
    pool.put(4, kv_of(source.fresh(1)))
    assert [key for key in range(5) if key in pool] == [2, 3, 4]


def test_a_commit_of_more_tokens_than_the_pool_holds_is_refused_and_evicts_nothing() -> None:
    pool = KVPool(LAYOUT, 6, max_slots=6, wait_timeout=0.0)
    source = TokenSource()
    for key in range(2):
        pool.put(key, kv_of(source.fresh(3)))
    with pool.gather([0, 1]) as batch:
        source.append(OpenBatch(batch, "default", 0, [None, None]), 1)
        with pytest.raises(CapacityError) as refused:  # two children of four tokens each
            pool.commit([2, 3], batch)
    assert refused.value.required_slots == 8
    assert [key for key in range(4) if key in pool] == [0, 1]
