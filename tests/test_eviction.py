"""Eviction policies: the order of victims against plain list models, the cost by counting, the contract's corners."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, ClassVar

import pytest
from hypothesis import settings

from concurrent_kv.errors import InvalidArgumentError, InvalidTypeError
from concurrent_kv.eviction import FIFO, LRU, S3FIFO, Clock, EvictionPolicy, Priority, make_policy
from tests.eviction_models import POLICIES, Entry, every_policy, machine_of


@pytest.mark.parametrize("name", POLICIES)
def test_victims_and_holdings_are_those_of_the_list_model_after_any_operations(name: str) -> None:
    machine = machine_of(name)
    machine.TestCase.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
    machine.TestCase("runTest").runTest()


# --- what each policy is for ------------------------------------------------------------------------------------------


def drain(policy: EvictionPolicy[Any]) -> Iterator[Entry]:
    while (victim := policy.pop_victim()) is not None:
        yield victim


@pytest.mark.parametrize("policy_class", [FIFO, LRU, Clock], ids=["fifo", "lru", "clock"])
def test_replacing_a_key_makes_it_the_youngest(policy_class: type[EvictionPolicy[Any]]) -> None:
    policy = policy_class(capacity=3)
    old, other, new = Entry(1), Entry(2), Entry(1)
    for entry in (old, other):
        policy.add(entry)
    policy.remove(old)
    policy.add(new)
    assert list(drain(policy)) == [other, new]


def test_fifo_and_priority_evict_in_the_same_order_whatever_is_hit() -> None:
    for policy in (FIFO[Entry](capacity=3), Priority[Entry](capacity=3)):
        entries = [Entry(), Entry(), Entry()]
        for entry in entries:
            policy.add(entry)
        assert not policy.observes_hits
        policy.touch(entries[0])
        assert list(drain(policy)) == entries


def test_s3fifo_evicts_a_scan_before_the_entries_that_are_hit() -> None:
    policy = S3FIFO[Entry](capacity=20)
    working_set = [Entry(key) for key in range(10)]
    for entry in working_set:
        policy.add(entry)
        policy.touch(entry)
        policy.touch(entry)
    for key in range(100, 200):
        policy.add(Entry(key))
        while len(policy) > policy.capacity:
            policy.pop_victim()
    assert all(entry in policy for entry in working_set)


def test_s3fifo_takes_a_key_that_returns_soon_straight_to_main() -> None:
    policy = S3FIFO[Entry](capacity=20)
    policy.add(Entry(7))
    assert policy.pop_victim() is not None
    returned, fresh = Entry(7), Entry(8)
    policy.add(returned)
    policy.add(fresh)
    assert list(drain(policy)) == [fresh, returned]


# --- the contract's corners -------------------------------------------------------------------------------------------


@every_policy
def test_an_entry_given_back_is_the_next_victim_and_several_come_by_age_or_the_latest_first(
    policy_class: type[EvictionPolicy[Any]],
) -> None:
    rng = random.Random(3)
    policy = policy_class(capacity=50)
    entries = [Entry(key) for key in range(50)]
    for entry in entries:
        policy.add(entry)
        for _ in range(rng.randrange(4)):
            policy.touch(entry)
    for count in (1, 2, 5, 20, 50):
        parked = list(islice(drain(policy), count))
        for entry in parked:
            policy.give_back(entry)
        assert list(islice(drain(policy), count)) == (parked if isinstance(policy, FIFO) else parked[::-1])
        for entry in parked:
            policy.give_back(entry)
    assert sorted(map(id, policy)) == sorted(map(id, entries))


def test_an_entry_given_back_does_not_overtake_one_of_lower_priority() -> None:
    policy = Priority[Entry](capacity=4)
    high, low = Entry(priority=2.0), Entry(priority=1.0)
    policy.add(high)
    assert policy.pop_victim() is high
    policy.add(low)
    policy.give_back(high)
    assert list(drain(policy)) == [low, high]


def test_an_entry_given_back_leaves_no_ghost_of_itself() -> None:
    policy = S3FIFO[Entry](capacity=20)
    entry, replacement, other = Entry(7), Entry(7), Entry(8)
    policy.add(entry)
    assert policy.pop_victim() is entry
    policy.give_back(entry)
    policy.remove(entry)
    policy.add(replacement)
    policy.add(other)
    assert list(drain(policy)) == [replacement, other], "a ghost would have sent the replacement to main"


@every_policy
def test_touching_or_removing_a_parked_entry_does_nothing(policy_class: type[EvictionPolicy[Any]]) -> None:
    policy = policy_class(capacity=2)
    first, second = Entry(1), Entry(2)
    policy.add(first)
    policy.add(second)
    parked = policy.pop_victim()
    assert parked is not None
    policy.touch(parked)
    policy.remove(parked)
    assert parked not in policy
    assert list(policy) == [second]


@every_policy
def test_an_entry_added_or_given_back_twice_is_held_once(policy_class: type[EvictionPolicy[Any]]) -> None:
    policy = policy_class(capacity=2)
    entry = Entry()
    for hold in (policy.add, policy.add, policy.give_back, policy.give_back, policy.add):
        hold(entry)
        assert len(policy) == 1
        assert list(policy) == [entry]
    assert list(drain(policy)) == [entry]


@every_policy
def test_an_entry_added_again_becomes_the_youngest(policy_class: type[EvictionPolicy[Any]]) -> None:
    policy = policy_class(capacity=3)
    first, second, third = Entry(1), Entry(2), Entry(3)
    for entry in (first, second, third, first):
        policy.add(entry)
    assert list(drain(policy)) == [second, third, first]


@every_policy
def test_an_empty_policy_has_no_victim(policy_class: type[EvictionPolicy[Any]]) -> None:
    policy = policy_class(capacity=2)
    assert policy.pop_victim() is None
    policy.add(Entry())
    policy.clear()
    assert policy.pop_victim() is None


# --- cost, by counting ------------------------------------------------------------------------------------------------


class CountedEntry:
    """Every operation of a container on an entry hashes it, so hashes count the steps."""

    hashes: ClassVar[int] = 0

    def __init__(self, fingerprint: int, priority: float) -> None:
        self.fingerprint = fingerprint
        self.priority = priority

    def __hash__(self) -> int:
        CountedEntry.hashes += 1
        return id(self) >> 4

    def __eq__(self, other: object) -> bool:
        return self is other


class CountedPriority(float):
    comparisons: ClassVar[int] = 0

    def __lt__(self, other: float) -> bool:
        CountedPriority.comparisons += 1
        return float.__lt__(self, other)


def hashes_per_operation(
    policy: EvictionPolicy[CountedEntry], priority: Callable[[int], float], operations: int = 20_000
) -> float:
    """Run a full pool of policy.capacity entries through hits, writes, removals and parking."""
    rng = random.Random(11)
    held = [CountedEntry(key, priority(key)) for key in range(policy.capacity)]
    for entry in held:
        policy.add(entry)
    CountedEntry.hashes = 0
    for step in range(operations):
        place = rng.randrange(len(held))
        policy.touch(held[place])
        if step % 3 == 0:
            policy.remove(held[place])
            held[place] = CountedEntry(place, priority(rng.randrange(1 << 30)))
            policy.add(held[place])
        if step % 5 == 0:
            victim = policy.pop_victim()
            assert victim is not None
            policy.give_back(victim)
    return CountedEntry.hashes / operations


@every_policy
def test_the_mean_cost_of_an_operation_does_not_grow_with_the_pool(policy_class: type[EvictionPolicy[Any]]) -> None:
    small, large = (hashes_per_operation(policy_class(capacity=n), lambda key: key % 8) for n in (100, 10_000))
    assert large <= 8
    assert large <= 2 * small + 1


@pytest.mark.parametrize("policy_class", [Clock, S3FIFO], ids=["clock", "s3fifo"])
def test_a_sweep_costs_no_more_than_the_hits_it_takes_back(policy_class: type[EvictionPolicy[Any]]) -> None:
    policy = policy_class(capacity=1000)
    entries = [CountedEntry(key, 0.0) for key in range(1000)]
    for entry in entries:
        policy.add(entry)
        for _ in range(10):
            policy.touch(entry)
    CountedEntry.hashes = 0
    assert sum(1 for _ in drain(policy)) == 1000
    # At most three rounds and the eviction, and for S3-FIFO the move from small to main, at two hashes a step.
    assert CountedEntry.hashes <= 1000 * 5 * 2


def test_levels_of_priority_cost_constant_comparisons_and_distinct_priorities_logarithmic_ones() -> None:
    def comparisons(capacity: int, priority: Callable[[int], float]) -> float:
        CountedPriority.comparisons = 0
        hashes_per_operation(Priority[CountedEntry](capacity=capacity), lambda key: CountedPriority(priority(key)))
        return CountedPriority.comparisons / (20_000 + capacity)

    assert comparisons(10_000, lambda key: key % 4) < 0.1
    assert comparisons(100, float) <= 4 * math.log2(100)
    assert comparisons(10_000, float) <= 4 * math.log2(10_000)


@pytest.mark.parametrize("direction", [1, -1], ids=["rising", "falling"])
def test_distinct_priorities_leave_nothing_behind(direction: int) -> None:
    policy = Priority[Entry](capacity=4)
    for key in range(2000):
        entry = Entry(priority=float(direction * key))
        policy.add(entry)
        if key % 2:
            policy.remove(entry)
        else:
            policy.pop_victim()
        assert len(policy._heap) == len(policy._buckets) <= 20


def test_the_order_of_priorities_survives_the_removal_of_most_entries() -> None:
    rng = random.Random(5)
    policy = Priority[Entry](capacity=500)
    entries = [Entry(priority=rng.random()) for _ in range(500)]
    for entry in entries:
        policy.add(entry)
    for entry in entries[50:]:
        policy.remove(entry)
    assert len(policy._heap) < 200
    assert list(drain(policy)) == sorted(entries[:50], key=lambda entry: entry.priority)


@pytest.mark.parametrize("capacity", [1, 9, 10, 100])
def test_the_ghost_remembers_no_more_keys_than_main_may_hold(capacity: int) -> None:
    policy = S3FIFO[Entry](capacity=capacity)
    for key in range(10 * capacity):
        policy.add(Entry(key))
        policy.pop_victim()
        assert len(policy._ghost) <= policy.ghost_capacity == capacity - capacity // 10
    policy.clear()
    assert not policy._ghost


# --- make_policy ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_is_made_from_its_name_its_class_or_any_factory(name: str) -> None:
    policy_class = POLICIES[name]
    for spec in (name, policy_class, lambda *, capacity: policy_class(capacity=capacity)):
        policy: EvictionPolicy[Entry] = make_policy(spec, 7)
        assert type(policy) is policy_class
        assert policy.capacity == 7
        assert len(policy) == 0


def test_no_policy_named_means_fifo() -> None:
    policy: EvictionPolicy[Entry] = make_policy(None, 3)
    assert type(policy) is FIFO


def test_a_policy_object_is_used_as_it_is() -> None:
    policy = LRU[Entry](capacity=3)
    assert make_policy(policy, 3) is policy


def test_an_unknown_name_is_an_error_that_says_what_would_do() -> None:
    with pytest.raises(InvalidArgumentError) as error:
        make_policy("lfu", 3)
    message = str(error.value)
    assert message.startswith("policy")
    assert "'lfu'" in message
    assert all(repr(name) in message for name in POLICIES)


def test_a_policy_object_in_use_elsewhere_is_an_error() -> None:
    policy = FIFO[Entry](capacity=3)
    policy.add(Entry())
    with pytest.raises(InvalidArgumentError, match=r"^policy .*FIFO holds 1 entries"):
        make_policy(policy, 3)


@pytest.mark.parametrize("spec", [3, object(), ["fifo"], lambda *, capacity: capacity])
def test_what_is_no_policy_is_an_error_that_names_the_argument(spec: Any) -> None:
    with pytest.raises(InvalidArgumentError, match=r"^policy must"):
        make_policy(spec, 3)


@every_policy
@pytest.mark.parametrize("capacity", [0, -1])
def test_a_capacity_below_one_is_an_error(policy_class: type[EvictionPolicy[Any]], capacity: int) -> None:
    with pytest.raises(InvalidArgumentError, match=r"^capacity must be at least 1, got "):
        policy_class(capacity=capacity)


@every_policy
@pytest.mark.parametrize("capacity", [2.0, True, None, "3"])
def test_a_capacity_that_is_no_int_is_an_error(policy_class: type[EvictionPolicy[Any]], capacity: Any) -> None:
    with pytest.raises(InvalidTypeError, match=r"^capacity must be an int"):
        policy_class(capacity=capacity)
