"""The parts that need no torch, without it, by many threads at once; on a free-threaded build they really run at once.

`make test-freethreaded` runs this file alone, where torch is not installed.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import threading
from collections.abc import Callable, Iterator
from functools import partial
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from concurrent_kv.books.eviction.registry import POLICIES, make_policy
from concurrent_kv.books.index import Index
from concurrent_kv.books.ledger import Ledger
from concurrent_kv.books.records import Account, Entry, Hold, Place, Scope
from concurrent_kv.books.slots import SlotAllocator
from concurrent_kv.device.streams import NO_TICKS
from concurrent_kv.errors import CapacityError, WaitTimeoutError
from concurrent_kv.flights.table import Claim, FlightState, FlightTable
from concurrent_kv.locks.deadline import Deadline
from concurrent_kv.locks.numbers import Numbers
from concurrent_kv.locks.sharded import ShardedRWLock
from concurrent_kv.locks.shards import ShardLocks, new_locks
from concurrent_kv.native import native
from concurrent_kv.pool.room import reserve_budget

THREADS = 6
ROUNDS = 300
BOUND_SECONDS = 120.0  # as `HANG_SECONDS` of tests.support, which imports torch

PARTS = """
class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError("No module named 'torch'", name="torch")

import sys
sys.meta_path.insert(0, NoTorch())
for part in ("books.index", "books.integrity", "books.candidates", "books.ledger", "books.records", "books.slots",
             "books.stats", "device.streams", "errors", "eviction", "flights", "locks", "pool.clearing", "pool.room"):
    __import__("concurrent_kv." + part)
assert "torch" not in sys.modules
try:
    from concurrent_kv import KVPool
except ImportError as error:
    print(error)
"""


def test_the_parts_that_need_no_torch_are_imported_without_it() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PARTS], capture_output=True, text=True, timeout=BOUND_SECONDS, check=True
    )
    assert done.stdout.startswith("concurrent_kv.KVPool needs torch")


def test_nothing_that_is_imported_turns_the_gil_of_a_free_threaded_build_on() -> None:
    has_gil = getattr(sys, "_is_gil_enabled", lambda: True)()
    assert has_gil == (not sysconfig.get_config_var("Py_GIL_DISABLED"))


def together(work: Callable[[int], object], threads: int = THREADS) -> None:
    """Run `work(number)` in so many threads at once; raises the first error of any."""
    errors: list[BaseException] = []
    barrier = threading.Barrier(threads)

    def run(number: int) -> None:
        try:
            barrier.wait(BOUND_SECONDS)
            work(number)
        except BaseException as error:
            errors.append(error)

    running = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join(BOUND_SECONDS)
    if errors:
        raise errors[0]
    assert not any(thread.is_alive() for thread in running), "a thread hangs"


@pytest.fixture(autouse=True)
def eager_switching() -> Iterator[None]:
    """Where there is a GIL, threads take turns so often that their work overlaps."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


# Numbers, locks, index -----------------------------------------------------------------------------------------------


def test_no_number_is_given_twice() -> None:
    numbers, taken = Numbers(), [list[int]() for _ in range(THREADS)]
    together(lambda mine: taken[mine].extend(next(numbers) for _ in range(2000)))
    assert sorted(number for each in taken for number in each) == list(range(THREADS * 2000))


@pytest.fixture(params=["Python", "compiled"])
def sharded(request: pytest.FixtureRequest) -> Callable[[int], ShardLocks]:
    """Makes locks of so many shards."""
    if request.param == "Python":
        return partial(ShardedRWLock, name="locks")
    if native is None:
        pytest.skip("the package was built without compiled locks")
    return partial(new_locks, name="locks")


def test_writers_exclude_everybody_and_readers_only_writers(sharded: Callable[[int], ShardLocks]) -> None:
    locks = sharded(3)
    readers, writers = [0] * 3, [0] * 3
    counting = threading.Lock()

    def work(mine: int) -> None:
        rng = Random(mine)
        for _ in range(ROUNDS):
            write = rng.random() < 0.3
            shards = sorted(rng.sample(range(3), rng.randint(1, 3)))
            inside = writers if write else readers
            with (locks.write if write else locks.read)(shards, Deadline(BOUND_SECONDS)):
                with counting:
                    for shard in shards:
                        inside[shard] += 1
                        assert writers[shard] <= 1
                        assert not (writers[shard] and readers[shard])
                with counting:
                    for shard in shards:
                        inside[shard] -= 1

    together(work)
    assert not locks.held


def test_readers_are_inside_together(sharded: Callable[[int], ShardLocks]) -> None:
    locks, inside = sharded(1), threading.Barrier(THREADS)

    def work(mine: int) -> None:
        with locks.read((0,), Deadline(BOUND_SECONDS)):
            inside.wait(BOUND_SECONDS)

    together(work)


def test_a_deadline_is_kept_while_others_hold_the_lock(sharded: Callable[[int], ShardLocks]) -> None:
    locks = sharded(1)
    with locks.write((0,), Deadline(BOUND_SECONDS)):

        def work(mine: int) -> None:
            with (
                pytest.raises(WaitTimeoutError, match="shard 0 was not free"),
                locks.read((0,), Deadline(0.01)),
            ):
                pass

        together(work)
    assert locks.contention.read()[0] == THREADS


def test_an_index_under_its_shards_loses_nothing(sharded: Callable[[int], ShardLocks]) -> None:
    locks, parts = sharded(4), [Index[Entry]() for _ in range(4)]
    scope = StubPool(1, 8).scope("scope")
    kept: list[dict[int, Entry]] = [{} for _ in range(THREADS)]

    def work(mine: int) -> None:
        rng = Random(mine)
        for _ in range(ROUNDS):
            key = mine + THREADS * rng.randrange(20)
            part = parts[key % 4]
            with locks.write((key % 4,), Deadline(BOUND_SECONDS)):
                if key in part and rng.random() < 0.5:
                    assert part.pop(key) == kept[mine].pop(key)
                else:
                    kept[mine][key] = entry = Entry(key, scope, scope.generation, 1)
                    part.put(entry)
            other = rng.randrange(20 * THREADS)
            with locks.read((other % 4,), Deadline(BOUND_SECONDS)):
                assert (parts[other % 4].get(other) is not None) == (other in parts[other % 4])

    together(work)
    assert {key: value for part in parts for key, value in part.items()} == {
        key: value for each in kept for key, value in each.items()
    }


# Slots, ledger, policies ---------------------------------------------------------------------------------------------


def test_slots_are_given_to_one_at_a_time_and_none_is_lost() -> None:
    slots, mutex = SlotAllocator(64), threading.Lock()
    owner = np.zeros(65, dtype=np.int64)

    def work(mine: int) -> None:
        rng = Random(mine)
        for _ in range(ROUNDS):
            with mutex:
                taken = slots.allocate(rng.randint(1, 8))
            if taken is None:
                continue
            assert not owner[taken[0]].any()
            owner[taken[0]] = mine + 1
            assert (owner[taken[0]] == mine + 1).all()
            owner[taken[0]] = 0
            with mutex:
                slots.give_back(taken[0], NO_TICKS)

    together(work)
    assert slots.free_count == 64
    assert not slots.problems(np.zeros(65, dtype=np.bool_))


class StubPool:
    """What the bookkeeping looks at of a pool: an account, and a storage without a tensor."""

    def __init__(self, entries: int, slots: int, policy: str = "fifo") -> None:
        self.name = "stub"
        self.closed = False
        ledger = self.ledger = Ledger(slots, 4)
        self.locks = ShardedRWLock(2, name="stub")
        self.account = Account("stub", entries, slots, ledger.tables, make_policy(policy, capacity=entries))
        self.policy, self.counters = self.account.policy, self.account.counters
        self.storage: Any = SimpleNamespace(
            ledger=ledger,
            locks=self.locks,
            closed=False,
            drain_abandoned=lambda deadline: None,
        )

    def check_open(self) -> None:
        assert not self.closed

    def scope(self, name: str, budget: Any = None) -> Scope:
        return Scope(self.account, name, (0,) if budget else (0, 1), budget=budget)


def test_a_ledgers_counts_are_those_of_its_entries() -> None:
    pool = StubPool(64, 64)
    ledger, scope = pool.storage.ledger, pool.scope("scope")

    def work(mine: int) -> None:
        rng = Random(mine)
        held: list[Hold] = []
        for round_ in range(ROUNDS):
            with ledger.mutex:
                taken = ledger.slots.allocate(2)
                if taken is not None:
                    entry = Entry((mine, round_), scope, scope.generation, 2)
                    ledger.make([entry], [0], [0], [2], taken.slots, np.arange(2))
                    hold = Hold("pin", [])
                    ledger.extend(hold, [entry])
                    ledger.let_go([entry])  # the index's
                    held.append(hold)
            if held and (taken is None or rng.random() < 0.6):
                ledger.release(held.pop(rng.randrange(len(held))))
        for hold in held:
            ledger.release(hold)

    together(work)
    assert not ledger.holds
    assert ledger.slots.free_count == 64
    assert ledger.tables.used == 0
    assert not ledger.slots.problems(np.zeros(65, dtype=np.bool_))


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_a_policy_gives_every_entry_out_once(name: str) -> None:
    pool = StubPool(256, 64, name)
    mutex, scope = threading.Lock(), pool.scope("scope")
    given: list[list[Entry]] = [[] for _ in range(THREADS)]

    def work(mine: int) -> None:
        rng = Random(mine)
        for round_ in range(ROUNDS):
            with mutex:
                entry = Entry((mine, round_), scope, scope.generation, 1, key_hash=hash((mine, round_)))
                entry.place = Place.HELD
                pool.policy.add(entry)
                if rng.random() < 0.5 and pool.policy.observes_hits:
                    pool.policy.touch(entry)
            with mutex:
                if rng.random() < 0.7 and (victim := pool.policy.pop_victim()) is not None:
                    given[mine].append(victim)

    together(work)
    left = list(pool.policy)
    everything = [entry for each in given for entry in each] + left
    assert len(everything) == len(set(everything)) == THREADS * ROUNDS


# Single flight -------------------------------------------------------------------------------------------------------


class Result:
    """Stands for keys and values."""

    keys = values = None


def claim_of(table: FlightTable) -> Claim:
    return Claim(table, lambda kv, timeout=None: True, lambda kv: (kv, NO_TICKS))


def test_one_of_many_computes_and_all_get_its_result() -> None:
    table, scope = FlightTable("flights"), StubPool(4, 16).scope("scope")
    for round_ in range(100):
        computed: list[Result] = []
        seen: list[object] = []

        def work(mine: int, round_: int = round_, computed: list[Result] = computed, seen: list[object] = seen) -> None:
            claim = claim_of(table)
            if table.join(scope, round_, scope.generation, claim):
                result = Result()
                computed.append(result)
                claim.fulfil(result)  # type: ignore[arg-type]
                seen.append(result)
                return
            over = threading.Event()
            if claim.flight.subscribe(over.set):
                assert over.wait(BOUND_SECONDS)
            assert claim.flight.state is FlightState.DONE
            assert claim.ending is not None
            seen.append(claim.ending.result)

        together(work)
        # Who came when the first was over computed anew: nothing is stored here.
        assert 1 <= len(computed) <= THREADS
        assert len(seen) == THREADS
        assert set(map(id, seen)) == set(map(id, computed))
    assert len(table) == 0


def test_an_abandoned_computation_is_taken_over_by_one_at_a_time() -> None:
    table, scope = FlightTable("flights"), StubPool(4, 16).scope("scope")
    computing, most, takeovers = [0], [0], [0]
    counting = threading.Lock()

    def work(mine: int) -> None:
        for round_ in range(100):
            claim = claim_of(table)
            if table.join(scope, "key", scope.generation, claim):
                with counting:
                    computing[0] += 1
                    takeovers[0] += 1
                    most[0] = max(most[0], computing[0])
                with counting:
                    computing[0] -= 1
                if round_ % 3:
                    claim.abandon()
                del claim  # abandons it where that was not done
            else:
                over = threading.Event()
                if claim.flight.subscribe(over.set):
                    assert over.wait(BOUND_SECONDS)

    together(work)
    assert most == [1]
    assert takeovers[0] >= 100
    assert len(table) == 0


# Searches ------------------------------------------------------------------------------------------------------------


def test_searches_reserve_no_more_than_there_is_and_give_all_of_it_back() -> None:
    pool = StubPool(entries=8, slots=32)

    def work(mine: int) -> None:
        rng = Random(mine)
        for _ in range(ROUNDS):
            entries = rng.randint(1, 4)
            try:
                budget = reserve_budget(pool, entries, entries * 4, Deadline(0.0))  # type: ignore[arg-type]
            except CapacityError:
                continue
            assert pool.account.reserved_entries <= 8
            assert budget.runs is not None
            assert sum(len(slots) for slots, _ in budget.runs) == entries * 4
            with pool.ledger.mutex:
                pool.ledger.slots.add(budget.runs)
                pool.account.reserved_entries -= budget.max_entries
                pool.account.reserved_slots -= budget.max_slots

    together(work)
    assert (pool.account.reserved_entries, pool.account.reserved_slots) == (0, 0)
    assert pool.ledger.slots.free_count == pool.ledger.slots.size == 32
