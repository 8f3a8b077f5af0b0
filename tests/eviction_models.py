"""Plain list models of the eviction policies, and a machine that drives a policy and its model together."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from concurrent_kv.eviction import FIFO, LRU, S3FIFO, Clock, EvictionPolicy, Priority

POLICIES: dict[str, type[EvictionPolicy[Any]]] = {
    "fifo": FIFO,
    "lru": LRU,
    "priority": Priority,
    "clock": Clock,
    "s3fifo": S3FIFO,
}
every_policy = pytest.mark.parametrize("policy_class", POLICIES.values(), ids=POLICIES.keys())


@dataclass(frozen=True, eq=False)
class Entry:
    """An entry as the pool has them: hashed by identity."""

    fingerprint: int = 0
    priority: float = 0.0


# --- the order of victims: each policy against a list that says it plainly --------------------------------------------


@dataclass
class ListModel:
    """A list, oldest first. The models say what they do differently."""

    capacity: int
    entries: list[Entry] = field(default_factory=list)

    def add(self, entry: Entry) -> None:
        self.entries.append(entry)

    def touch(self, entry: Entry) -> None:
        pass

    def remove(self, entry: Entry) -> None:
        if entry in self.entries:
            self.entries.remove(entry)

    def pop_victim(self) -> Entry | None:
        return self.entries.pop(0) if self.entries else None

    def give_back(self, entry: Entry) -> None:
        self.entries.insert(0, entry)

    def clear(self) -> None:
        self.entries.clear()

    def held(self) -> list[Entry]:
        return self.entries


@dataclass
class FIFOModel(ListModel):
    """What is given back has the age that it had; what was forgotten meanwhile is older than all."""

    ages: dict[Entry, int] = field(default_factory=dict)
    youngest: int = 0
    oldest: int = 0

    def add(self, entry: Entry) -> None:
        self.youngest += 1
        self.ages[entry] = self.youngest
        self.entries.append(entry)

    def remove(self, entry: Entry) -> None:
        super().remove(entry)
        self.ages.pop(entry, None)

    def give_back(self, entry: Entry) -> None:
        if entry not in self.ages:
            self.oldest -= 1
            self.ages[entry] = self.oldest
        self.entries = sorted([*self.entries, entry], key=self.ages.__getitem__)

    def clear(self) -> None:
        super().clear()
        self.ages.clear()


class LRUModel(FIFOModel):
    def touch(self, entry: Entry) -> None:
        if entry in self.entries:
            self.entries.remove(entry)
            self.add(entry)


class PriorityModel(ListModel):
    def pop_victim(self) -> Entry | None:
        if not self.entries:
            return None
        victim = min(self.entries, key=lambda entry: entry.priority)  # the first, that is the oldest, among equals
        self.entries.remove(victim)
        return victim


@dataclass
class ClockModel(ListModel):
    """A dial: entries keep their places, the hand moves."""

    hand: int = 0
    credit: dict[Entry, int] = field(default_factory=dict)

    def add(self, entry: Entry) -> None:
        self.entries.insert(self.hand, entry)  # just behind the hand, where it comes by last
        self.hand += 1
        self.credit[entry] = 0

    def touch(self, entry: Entry) -> None:
        if entry in self.entries:
            self.credit[entry] = min(self.credit[entry] + 1, 3)

    def remove(self, entry: Entry) -> None:
        if entry in self.entries:
            place = self.entries.index(entry)
            del self.entries[place]
            self.hand -= place < self.hand

    def pop_victim(self) -> Entry | None:
        while self.entries:
            self.hand %= len(self.entries)
            entry = self.entries[self.hand]
            if self.credit[entry] == 0:
                return self.entries.pop(self.hand)
            self.credit[entry] -= 1
            self.hand += 1
        return None

    def give_back(self, entry: Entry) -> None:
        self.entries.insert(self.hand, entry)
        self.credit[entry] = 0

    def clear(self) -> None:
        self.entries.clear()
        self.hand = 0


@dataclass
class S3FIFOModel(ListModel):
    """The paper's two eviction procedures, one victim a call; `entries` is the small queue."""

    main: list[Entry] = field(default_factory=list)
    ghost: list[int] = field(default_factory=list)
    hits: dict[Entry, int] = field(default_factory=dict)

    def add(self, entry: Entry) -> None:
        (self.main if entry.fingerprint in self.ghost else self.entries).append(entry)
        self.ghost = [fingerprint for fingerprint in self.ghost if fingerprint != entry.fingerprint]
        self.hits[entry] = 0

    def touch(self, entry: Entry) -> None:
        if entry in self.held():
            self.hits[entry] = min(self.hits[entry] + 1, 3)

    def remove(self, entry: Entry) -> None:
        self.entries = [other for other in self.entries if other is not entry]
        self.main = [other for other in self.main if other is not entry]

    def small_is_large_enough(self) -> bool:
        return len(self.entries) >= (len(self.entries) + len(self.main)) / 10

    def pop_victim(self) -> Entry | None:
        while self.held():
            victim = self.evict_small() if self.small_is_large_enough() else self.evict_main()
            if victim is not None:
                return victim
        return None

    def evict_small(self) -> Entry | None:
        entry = self.entries.pop(0)
        if self.hits[entry] > 1:
            self.hits[entry] = 0
            self.main.append(entry)
            return None
        limit = self.capacity - self.capacity // 10
        if entry.fingerprint not in self.ghost:
            self.ghost = [*self.ghost, entry.fingerprint][-limit:]
        return entry

    def evict_main(self) -> Entry | None:
        entry = self.main.pop(0)
        if self.hits[entry] == 0:
            return entry
        self.hits[entry] -= 1
        self.main.append(entry)
        return None

    def give_back(self, entry: Entry) -> None:
        self.ghost = [fingerprint for fingerprint in self.ghost if fingerprint != entry.fingerprint]
        (self.entries if self.small_is_large_enough() else self.main).insert(0, entry)
        self.hits[entry] = 0

    def clear(self) -> None:
        self.entries, self.main, self.ghost = [], [], []

    def held(self) -> list[Entry]:
        return self.entries + self.main


class PolicyMachine(RuleBasedStateMachine):
    """Drives a policy and its model together; victims and holdings must agree at every step."""

    policy_class: ClassVar[type[EvictionPolicy[Any]]]
    model_class: ClassVar[type[ListModel]]
    capacity: ClassVar[int] = 5

    def __init__(self) -> None:
        super().__init__()
        self.policy: EvictionPolicy[Entry] = self.policy_class(capacity=self.capacity)
        self.model = self.model_class(self.capacity)
        self.known: list[Entry] = []
        self.parked: list[Entry] = []

    def any_known(self, data: st.DataObject) -> Entry:
        return data.draw(st.sampled_from(self.known[-12:]))

    @rule(fingerprint=st.integers(0, 8), priority=st.sampled_from([-1.0, 0.0, 0.5, math.inf]), count=st.integers(1, 4))
    def add(self, fingerprint: int, priority: float, count: int) -> None:
        for offset in range(count):
            entry = Entry(fingerprint + offset, priority)
            self.known.append(entry)
            self.policy.add(entry)
            self.model.add(entry)

    @precondition(lambda self: self.known)
    @rule(data=st.data(), times=st.integers(1, 4))
    def touch(self, data: st.DataObject, times: int) -> None:
        entry = self.any_known(data)
        for _ in range(times):
            self.policy.touch(entry)
            self.model.touch(entry)

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        entry = self.any_known(data)
        self.policy.remove(entry)
        self.model.remove(entry)

    @rule(parks=st.booleans())
    def pop_victim(self, parks: bool) -> None:
        victim = self.policy.pop_victim()
        assert victim is self.model.pop_victim()
        if victim is not None and parks:
            self.parked.append(victim)

    @precondition(lambda self: self.parked)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        entry = self.parked.pop(data.draw(st.integers(0, len(self.parked) - 1)))
        self.policy.give_back(entry)
        self.model.give_back(entry)

    @rule()
    def clear(self) -> None:
        self.policy.clear()
        self.model.clear()

    @invariant()
    def holdings_agree(self) -> None:
        held = self.model.held()
        assert len(self.policy) == len(held)
        assert sorted(map(id, self.policy)) == sorted(map(id, held))
        assert all((entry in self.policy) == (entry in held) for entry in self.known)

    def teardown(self) -> None:
        while (victim := self.policy.pop_victim()) is not None:
            assert victim is self.model.pop_victim()
        assert self.model.pop_victim() is None


MODELS = {"fifo": FIFOModel, "lru": LRUModel, "priority": PriorityModel, "clock": ClockModel, "s3fifo": S3FIFOModel}


def machine_of(name: str) -> type[RuleBasedStateMachine]:
    return type(f"{name}_machine", (PolicyMachine,), {"policy_class": POLICIES[name], "model_class": MODELS[name]})
