"""A pool with a tier against a dict: what is read, what is missed for good, and that each token is there once.

In a tier that is large enough nothing is ever missed. In a small one an entry may go, and then stays away until it is
written again.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import note
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from concurrent_kv import CapacityError, DropOldest, KeyNotFoundError, KVPool, Pin, Scope, WaitTimeoutError
from concurrent_kv.books.records import Entry
from tests.pool_model import LAYOUT, OpenBatch, Record, TokenSource, kv_of, run_machine, same
from tests.tiers_support import TIERS, host_tier, tiers_of

pytestmark = pytest.mark.usefixtures("loops")

WINDOW = LAYOUT.max_tokens
LARGE = 64  # windows: more than all keys of all scopes
keys = st.integers(0, 4)
scopes = st.sampled_from(["default", "default", "other"])
lengths = st.integers(1, WINDOW)


class TierMachine(RuleBasedStateMachine):
    policy: ClassVar[str]
    windows: ClassVar[int]

    @initialize(entries=st.integers(1, 3), slots=st.integers(WINDOW, 12), shards=st.integers(1, 3))
    def open_pool(self, entries: int, slots: int, shards: int) -> None:
        tier = host_tier(self.windows, LAYOUT)
        self.pool = KVPool(
            LAYOUT, entries, max_slots=slots, policy=self.policy, shards=shards, wait_timeout=0.0, tier=tier
        )
        self.scopes: dict[str, Scope] = {"default": self.pool.default_scope, "other": self.pool.scope("other")}
        self.model: dict[tuple[str, int], Record] = {}
        self.source = TokenSource()
        self.generations = {"default": 0, "other": 0}
        self.pins: list[tuple[Pin, Record]] = []
        self.batches: list[OpenBatch] = []

    # What is where ---------------------------------------------------------------------------------------------------

    def entries(self, *, below: bool) -> dict[tuple[str, int], Entry]:
        found = {}
        for name, scope in self.scopes.items():
            of = scope.below if below else scope
            assert of is not None
            found.update({(name, entry.key): entry for part in of.entries for entry in part.values()})
        return found  # type: ignore[return-value]

    def here(self) -> set[tuple[str, int]]:
        return set(self.entries(below=False)) | set(self.entries(below=True))

    def forget_gone(self) -> None:
        """What is missed once is missed for good; what is pinned is not."""
        pinned = [record for _, record in self.pins]
        for where in set(self.model) - self.here():
            assert self.windows < LARGE or self.pool.stats().tier_drop_count, f"{where} was lost"
            assert self.model[where] not in pinned
            del self.model[where]

    # Rules -----------------------------------------------------------------------------------------------------------

    @rule(key=keys, scope=scopes, length=lengths, side=st.integers(), priority=st.sampled_from([0.0, 1.0]))
    def put(self, key: int, scope: str, length: int, side: int, priority: float) -> None:
        record = Record(key, scope, self.source.fresh(length), side, priority)
        try:
            kv = kv_of(record.tokens)
            assert self.pool.put(key, kv, side=side, priority=priority, scope=self.scopes[scope])
        except WaitTimeoutError:
            return
        self.model[scope, key] = record

    @rule(key=keys, scope=scopes)
    def get(self, key: int, scope: str) -> None:
        record = self.model.get((scope, key))
        assert same(self.pool.get(key, scope=self.scopes[scope]), None if record is None else record.tokens)

    @rule(key=keys, scope=scopes)
    def pop(self, key: int, scope: str) -> None:
        record = self.model.pop((scope, key), None)
        assert same(self.pool.pop(key, scope=self.scopes[scope]), None if record is None else record.tokens)

    @rule(key=keys, scope=scopes)
    def discard(self, key: int, scope: str) -> None:
        self.pool.discard(key, scope=self.scopes[scope])
        self.model.pop((scope, key), None)

    @precondition(lambda self: len(self.pins) < 2)
    @rule(key=keys, scope=scopes)
    def pin(self, key: int, scope: str) -> None:
        record = self.model.get((scope, key))
        if record is None:
            with pytest.raises(KeyNotFoundError):
                self.pool.pin(key, scope=self.scopes[scope])
        else:
            self.pins.append((self.pool.pin(key, scope=self.scopes[scope]), record))

    @precondition(lambda self: self.pins)
    @rule()
    def unpin(self) -> None:
        pin, record = self.pins.pop(0)
        assert same(pin.get(), record.tokens)
        pin.close()

    @precondition(lambda self: len(self.batches) < 2)
    @rule(wanted=st.lists(keys, min_size=1, max_size=3), scope=scopes)
    def gather(self, wanted: list[int], scope: str) -> None:
        records = [self.model.get((scope, key)) for key in wanted]
        batch = self.pool.gather(wanted, scope=self.scopes[scope])
        assert batch.hits == tuple(record is not None for record in records)
        assert batch.side == tuple(None if record is None else record.side for record in records)
        self.batches.append(OpenBatch(batch, scope, self.generations[scope], records))

    @precondition(lambda self: self.batches)
    @rule(tokens=st.integers(1, 2), children=st.lists(keys, min_size=3, max_size=3, unique=True))
    def append_and_commit(self, tokens: int, children: list[int]) -> None:
        opened = self.batches.pop(0)
        scope, batch = opened.scope, opened.batch
        opened.check_data()
        rows = [row for row, record in enumerate(opened.records) if record is not None]
        self.source.append(opened, min(tokens, batch.room))
        if not rows or not opened.appended[0]:
            batch.close()
            return
        made = [Record(children[row], scope, (), object()) for row in rows]
        overflow = DropOldest(WINDOW, 2)
        for row, child in zip(rows, made, strict=True):
            if not batch.table_rows[row]:  # it was read from the tier
                values = [token.value for token in opened.tokens(row)] + opened.appended[row]
                child.tokens = self.source.holding(values[2:] if len(values) >= WINDOW else values)
            else:
                assert self.source.grow(opened, row, child, overflow) is not None
        stale = opened.generation != self.generations[scope]
        try:
            names, sides = [child.key for child in made], [child.side for child in made]
            stored = self.pool.commit(names, batch, rows=rows, overflow=overflow, sides=sides)
            assert stored is not stale
            if stored:
                self.model.update({(scope, child.key): child for child in made})  # type: ignore[misc]
        except (WaitTimeoutError, CapacityError):
            note("no room")
        batch.close()

    @rule(scope=st.sampled_from(["default", "other", None]))
    def clear(self, scope: str | None) -> None:
        self.pool.clear(None if scope is None else self.scopes[scope])
        self.renewed(list(self.scopes) if scope is None else [scope])

    @rule()
    def bump_version(self) -> None:
        self.pool.bump_version()
        self.renewed(list(self.scopes))

    def renewed(self, names: list[str]) -> None:
        for name in names:
            self.generations[name] += 1
        self.model = {where: record for where, record in self.model.items() if where[0] not in names}

    @rule()
    def drop_and_open_other(self) -> None:
        self.pool.drop_scope("other")
        self.scopes["other"] = self.pool.scope("other")
        self.renewed(["other"])
        for opened in [opened for opened in self.batches if opened.scope == "other"]:
            opened.batch.close()
            self.batches.remove(opened)

    @rule()
    def repair(self) -> None:
        assert self.pool.repair() == (0, 0, 0)

    # What holds after every step -------------------------------------------------------------------------------------

    @invariant()
    def contents_are_the_models(self) -> None:
        self.pool.storage.drain_abandoned(self.pool.storage.enter())
        self.forget_gone()
        assert self.here() == set(self.model)
        assert not set(self.entries(below=False)) & set(self.entries(below=True))
        for (name, key), record in self.model.items():
            assert same(self.pool.peek(key, scope=self.scopes[name]), record.tokens)
            assert self.pool.side(key, scope=self.scopes[name]) == record.side
        assert {*self.pool.keys()} == {key for name, key in self.model if name == "default"}
        assert len(self.pool) == len(self.model)

    @invariant()
    def handles_keep_what_they_read(self) -> None:
        for pin, record in self.pins:
            assert same(pin.get(), record.tokens)
        for opened in self.batches:
            opened.check_data()

    @invariant()
    def each_token_is_there_once(self) -> None:
        self.pool.check_integrity()
        stats, below = self.pool.stats(), self.pool.tier_stats()
        assert below is not None
        for is_below, slots in ((False, stats.slots_in_use), (True, below.slots_in_use)):
            assert slots == len({token for where in self.entries(below=is_below) for token in self.model[where].tokens})
        assert stats.eviction_count == stats.move_down_count + stats.tier_drop_count
        assert below.entries == stats.move_down_count - below.eviction_count - below.removal_count


@pytest.mark.parametrize("policy", ["fifo", "lru", "priority", "s3fifo"])
@pytest.mark.parametrize("windows", [2, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("kind", TIERS)
def test_a_pool_with_a_tier_reads_as_a_dict_does(policy: str, windows: int, kind: str, tmp_path: Path) -> None:
    machine = type("TierMachineOf", (TierMachine,), {"policy": policy, "windows": windows})
    with tiers_of(kind, tmp_path):
        run_machine(machine, examples=40, steps=30)
