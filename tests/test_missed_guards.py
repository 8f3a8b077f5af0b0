"""Guards that could be taken out without a test noticing, until these: each is of a place that `make mutants` named."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from concurrent_kv import (
    ClosedError,
    KVCacheManager,
    KVPool,
    ReentrantCallError,
    Search,
    SearchEndedError,
    WaitTimeoutError,
)
from concurrent_kv.books.candidates import Candidates
from concurrent_kv.books.ledger import Ledger
from concurrent_kv.books.records import Entry, Hold, Place
from concurrent_kv.books.slots import SlotAllocator
from concurrent_kv.books.turns import Turn, Turns
from concurrent_kv.device.tensors import SlotTensor
from concurrent_kv.flights.table import FlightState
from concurrent_kv.flights.waiting import outcome
from concurrent_kv.locks.deadline import Caller, Deadline, NotOnLoopError, caller
from concurrent_kv.locks.gate import gate
from concurrent_kv.locks.signal import Signal
from concurrent_kv.pool import room, writing
from concurrent_kv.pool.plan import plan_commit
from concurrent_kv.pool.room import reserve_budget
from concurrent_kv.search.reading import adopt
from tests.conftest import MakeManager, MakePool
from tests.interrupting import Cut
from tests.support import WINDOW, append, tokens
from tests.threading_support import JOIN_SECONDS, Background

pytestmark = pytest.mark.usefixtures("loops")


def cut_once(patch: pytest.MonkeyPatch, owner: type, method: str, of: str) -> None:
    """One call of a method is cut off, of those that a function of this name makes."""
    original: Callable[..., Any] = getattr(owner, method)
    cuts = [Cut()]

    def cut(*arguments: Any, **options: Any) -> Any:
        if cuts and sys._getframe(1).f_code.co_name == of:
            raise cuts.pop()
        return original(*arguments, **options)

    patch.setattr(owner, method, cut)


def test_what_a_failed_write_took_is_given_back_once_where_the_giving_back_is_cut_off(
    pool: KVPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # All is given back when it is cut off, and is left to the next operation all the same.
    def fails(*arguments: Any) -> None:
        raise ArithmeticError

    pool.put("key", tokens(1, 2))
    with monkeypatch.context() as patch:
        patch.setattr(pool.storage.tensor, "scatter", fails)
        cut_once(patch, Ledger, "take_waiters", of="cancel")
        with pytest.raises(ArithmeticError):
            pool.put("new", tokens(2, 3))
    assert pool.storage.ledger.abandoned
    pool.get("key")
    assert not pool.storage.ledger.abandoned
    pool.check_integrity()


def test_repair_leaves_aside_what_is_pinned_and_was_set_aside_for_that(make_pool: MakePool) -> None:
    pool = make_pool(2)
    pool.put("pinned", tokens(1, 2))
    with pool.pin("pinned") as pin:
        pool.put("second", tokens(2, WINDOW))
        pool.put("third", tokens(3, WINDOW))  # the pinned one comes first, and is set aside
        assert pin._entry.place is Place.PINNED
        pool.repair()
        assert pin._entry.place is Place.PINNED
        assert pin._entry not in pool.policy
    assert pin._entry in pool.policy


def test_repair_makes_a_claimed_victim_a_candidate_again_though_it_is_pinned(make_pool: MakePool) -> None:
    pool = make_pool(2)
    pool.put("key", tokens(1, 2))
    with pool.pin("key") as pin:
        # As a thread leaves it that is cut off once it has claimed its victim.
        assert pool.policy.pop_victim() is pin._entry
        pin._entry.place = Place.CLAIMED
        pool.repair()
        pool.check_integrity()


def test_who_waits_in_vain_hears_of_searches_only_where_they_are_in_the_way(make_pool: MakePool) -> None:
    pool = make_pool(1)
    pool.put("key", tokens(1, 2))
    with pool.pin("key"), pytest.raises(WaitTimeoutError, match="nothing can be evicted") as waited:
        pool.put("other", tokens(2, 2), timeout=0.0)
    assert "searches" not in str(waited.value).partition("reserved by searches")[2]


def test_no_more_is_reserved_than_is_free_where_handles_hold_what_left_the_index() -> None:
    allocator = SlotAllocator(4)
    assert allocator.allocate(3) is not None
    assert allocator.part(2) is None
    assert (allocator.size, allocator.free_count) == (4, 1)
    assert allocator.part(1) is not None


@contextmanager
def as_of(task: Caller) -> Iterator[None]:
    token = caller.set(task)
    try:
        yield
    finally:
        caller.reset(token)


def test_who_finds_no_room_on_a_loop_leaves_what_was_dropped_to_a_worker(make_pool: MakePool) -> None:
    pool = make_pool(1)
    pool.put("key", tokens(1, 2))
    released: list[Deadline] = []
    with pool.pin("key"):
        with as_of(Caller(steps_on_loop=64)):
            pool.storage.ledger.abandoned.append(released.append)
            with pytest.raises(NotOnLoopError):
                pool.put("other", tokens(2, 2), timeout=0.0)
        assert not released
    pool.put("other", tokens(2, 2))
    assert len(released) == 1


def test_a_search_keeps_everything_where_its_task_has_left(manager: KVCacheManager) -> None:
    manager.set_init_cache(0, "root", tokens(1, 3))
    with manager.search([0]) as search:
        with search.gather(["root"], [0]) as batch:
            append(batch, [2])
            search.commit(["child"], batch)
        task = Caller()
        task.leave()
        with as_of(task), pytest.raises(WaitTimeoutError, match="cancelled before it took effect"):
            search.keep([])
        assert search.keys() == ["child"]
        assert search.held == 2


def test_of_those_who_came_in_one_moment_the_first_to_wait_is_the_first() -> None:
    turns = Turns()
    first, second, third = Turn(1.0), Turn(1.0), Turn(1.0)
    for turn in (first, second, third):
        turns.join(turn, lambda: None)
    assert [turns.is_first(turn) for turn in (first, second, third)] == [True, False, False]
    turns.leave(first)
    assert [turns.is_first(turn) for turn in (second, third)] == [True, False]


def test_a_search_whose_pool_closes_while_it_opens_is_never_one_of_the_pools(
    make_manager: MakeManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = make_manager()
    pool = manager.recur_pool

    def reserve_and_close(*arguments: Any) -> Any:
        reserved = reserve_budget(*arguments)
        pool.account.closed = True  # as the first step of a close in another thread
        return reserved

    monkeypatch.setattr("concurrent_kv.search.search.reserve_budget", reserve_and_close)
    with pytest.raises(ClosedError):
        manager.search([0])
    assert not pool.searches
    assert not pool.storage.ledger.holds
    assert (pool.stats().reserved_entries, pool.stats().reserved_slots) == (0, 0)


def test_a_commit_that_stores_nothing_wakes_who_waits_for_what_its_batch_kept(
    pool: KVPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool.put("key", tokens(1, 2))
    batch = pool.gather(["key"])
    append(batch, [2])
    waiters: list[Any] = []
    copy = writing._copy

    def copy_what_is_cleared(*arguments: Any) -> Any:
        pool.clear()
        return copy(*arguments)

    def begin_to_wait_then(*arguments: Any) -> None:
        room.cancel(*arguments)
        with gate.lock, pool.storage.ledger.mutex:
            waiters.append(pool.storage.ledger.waiter())

    monkeypatch.setattr(writing, "_copy", copy_what_is_cleared)
    monkeypatch.setattr(writing, "cancel", begin_to_wait_then)
    assert not pool.commit(["child"], batch)
    assert waiters[0].wait(0.0)
    assert batch.closed


def test_what_a_search_lets_go_of_while_it_ends_wakes_who_waits_for_room(manager: KVCacheManager) -> None:
    with manager.search([0]) as search:
        store_child(search)
        ledger = manager.storage.ledger
        with gate.lock, ledger.mutex:
            waiter = ledger.waiter()
    assert waiter.wait(0.0)
    manager.check_integrity()


def store_child(search: Search) -> None:
    with search.gather(["none"], [0]) as batch:
        batch.fill(0, tokens(1, 2))
        append(batch, [2])
        search.commit(["child"], batch)


@pytest.mark.parametrize("key", ["child", "root"])
def test_a_gather_during_which_its_search_ends_opens_no_batch(
    manager: KVCacheManager, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    manager.set_init_cache(0, "root", tokens(2, 2))
    search = manager.search([0])
    store_child(search)
    copy = SlotTensor.gather

    def ends_meanwhile(self: SlotTensor, *arguments: Any, **options: Any) -> Any:
        Background(search.close).result()
        return copy(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(SlotTensor, "gather", ends_meanwhile)
        with pytest.raises(SearchEndedError):
            search.gather([key], [0])
    assert not manager.storage.ledger.holds
    manager.check_integrity()


def test_a_root_that_another_thread_adopted_meanwhile_is_the_root(
    manager: KVCacheManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager.set_init_cache(0, "root", tokens(1, 2))
    with manager.search([0]) as search:

        def another_adopts(*arguments: Any) -> Any:
            monkeypatch.setattr("concurrent_kv.search.search.adopt", adopt)
            manager.set_init_cache(0, "root", tokens(2, 2))
            Background(lambda: search.gather(["root"], [0]).close()).result()
            return adopt(*arguments)

        monkeypatch.setattr("concurrent_kv.search.search.adopt", another_adopts)
        with search.gather(["root"], [0]) as batch:
            assert torch.equal(batch.keys[:, :, :, : batch.end], tokens(2, 2).keys)
        assert search.held == 1
    assert not manager.storage.ledger.holds
    manager.check_integrity()


def test_a_gather_of_a_search_that_has_ended_writes_to_no_buffer(manager: KVCacheManager) -> None:
    manager.set_init_cache(0, "root", tokens(1, 2))
    search = manager.search([0])
    manager.bump_version()
    layout = manager.layout
    out = torch.full((2 * layout.num_layers, 1, layout.num_heads, WINDOW, layout.head_dim), 7.0)
    manager.set_init_cache(0, "root", tokens(1, 2))
    with pytest.raises(SearchEndedError):
        search.gather(["root"], [0], out=out)
    assert bool((out == 7.0).all())


def test_a_search_takes_no_room_of_a_storage_that_is_closed_meanwhile(
    manager: KVCacheManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    with manager.search([0]) as search:
        store_child(search)
        batch = search.gather(["child"], [0])
        append(batch, [3])

        def closed_meanwhile(*arguments: Any) -> Any:
            manager.storage.closed = True
            return plan_commit(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr("concurrent_kv.pool.committing.plan_commit", closed_meanwhile)
            with pytest.raises(ClosedError):
                search.commit(["grandchild"], batch)
        manager.storage.closed = False
        batch.close()
    manager.check_integrity()


def test_no_caller_computes_for_a_pool_whose_flights_are_closed(pool: KVPool) -> None:
    pool.flights.close()
    with pytest.raises(ClosedError):
        pool.try_claim("key")
    assert len(pool.flights) == 0


def test_what_a_search_lets_go_of_last_wakes_who_began_to_wait_since_the_first(
    manager: KVCacheManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager.set_init_cache(0, "root", tokens(1, 3))
    drop_from, waiters = Ledger.drop_from, []

    def begin_to_wait(ledger: Ledger, hold: Hold, entries: list[Entry]) -> list[Entry]:
        waiters.append(ledger.waiter())
        return drop_from(ledger, hold, entries)

    with manager.search([0]) as search:
        search.gather(["root"], [0]).close()
        with monkeypatch.context() as patch:
            patch.setattr(Ledger, "drop_from", begin_to_wait)
            search.keep([])
        assert [waiter.wait(0.0) for waiter in waiters] == [True]


def test_repair_makes_a_candidate_of_what_was_set_aside_for_a_pin_that_is_gone(pool: KVPool) -> None:
    pool.put("key", tokens(1, 2))
    entry = pool.policy.pop_victim()
    assert entry is not None
    entry.place = Place.PINNED  # as a thread leaves it that is cut off while it lets its pin go
    pool.repair()
    assert entry in pool.policy
    pool.check_integrity()


def test_ctrl_c_while_a_handle_lets_go_is_heard_and_the_handle_lets_go_later(
    pool: KVPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool.put("key", tokens(1, 2))
    pin = pool.pin("key")
    with pool.storage.ledger.mutex:
        pool.storage.ledger.waiter()  # of a thread that waits for room
    with monkeypatch.context() as patch:
        cut_once(patch, Ledger, "take_waiters", of="release")
        with pytest.raises(Cut):
            pin.close()
    pool.get("key")
    assert not pool.storage.ledger.holds


def test_ctrl_c_at_the_end_of_a_commit_is_heard_and_the_batch_lets_go_later(
    pool: KVPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool.put("key", tokens(1, 2))
    batch = pool.gather(["key"])
    append(batch, [2])
    with monkeypatch.context() as patch:
        cut_once(patch, Ledger, "end", of="end_use")
        with pytest.raises(Cut):
            pool.commit(["child"], batch)
    assert pool.get("child") is not None
    assert not pool.storage.ledger.holds


def test_who_cannot_evict_its_victim_wakes_those_who_found_none_because_of_it(
    make_pool: MakePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = make_pool(1)
    pool.put("key", tokens(1, 2))
    give_back, waiters = Candidates.give_back, []

    def begin_to_wait(self: Candidates, victim: Entry) -> None:
        waiters.append(pool.storage.ledger.waiter())
        give_back(self, victim)

    with monkeypatch.context() as patch, as_of(Caller(steps_on_loop=0)):
        patch.setattr(Candidates, "give_back", begin_to_wait)
        with pytest.raises(NotOnLoopError):
            pool.put("other", tokens(2, 2))
    assert waiters
    assert waiters[0].wait(0.0)


def test_what_has_left_the_pool_meanwhile_is_no_candidate_again_when_a_failed_write_is_undone_later(
    pool: KVPool,
) -> None:
    pool.put("key", tokens(1, 2))
    with pool.pin("key") as pin:
        pool.pop("key")
        with gate.lock, pool.storage.ledger.mutex:
            pool.storage.ledger.candidates.exchange_back(pool.account, [pin._entry], [])
        assert pin._entry not in pool.policy
        pool.check_integrity()


def test_a_computation_ends_once_with_what_came_first(pool: KVPool) -> None:
    claim, waiting = pool.try_claim("key"), pool.try_claim("key")
    error = ArithmeticError()
    assert pool.flights.settle(claim.flight, FlightState.FAILED, error=error)
    assert not pool.flights.settle(claim.flight, FlightState.CLOSED)
    assert claim.flight.state is FlightState.FAILED
    assert waiting.ending is not None
    assert waiting.ending.error is error


def test_who_waited_in_vain_for_an_orphan_hears_that_it_is_over_and_wakes_the_others(pool: KVPool) -> None:
    claim, woken = pool.try_claim("key"), Signal()
    flight = claim.flight
    assert flight.subscribe(woken.set)
    assert not flight.over_unheard()
    flight.loop_ended = lambda: True
    assert flight.over_unheard()
    assert flight.state is FlightState.ABANDONED
    assert woken.wait(0.0)
    assert pool.try_claim("key").mine


def test_who_waited_for_a_computation_of_a_dropped_scope_does_not_compute_in_its_stead(pool: KVPool) -> None:
    scope = pool.scope("elsewhere")
    computing, waiting = pool.try_claim("key", scope=scope), pool.try_claim("key", scope=scope)
    assert (computing.mine, waiting.mine) == (True, False)
    pool.drop_scope(scope)
    with pytest.raises(ClosedError, match="its scope dropped, while 'key' was being computed"):
        outcome(waiting, pool.storage.clock, pool.name)


def test_a_key_that_calls_its_search_while_it_is_looked_up_hears_so(manager: KVCacheManager) -> None:
    """The gate is entered before the search's shard, which the call would wait for."""
    heard: list[BaseException] = []

    class Calling:
        def __hash__(self) -> int:
            return hash("child")

        def __eq__(self, other: object) -> bool:
            if other is self:
                return True
            try:
                search.release(["child"], timeout=0.0)
            except Exception as error:
                heard.append(error)
            return other == "child"

    with manager.search([0]) as search:
        store_child(search)
        with search.gather([Calling()], [0]) as batch:
            assert batch.hits == (True,)
    assert [type(error) for error in heard] == [ReentrantCallError]
    manager.check_integrity()


def test_a_key_whose_comparison_takes_its_time_holds_up_no_other_computation(pool: KVPool) -> None:
    """The table of computations compares keys where it holds no lock."""
    entered, go_on = threading.Event(), threading.Event()

    class Slow:
        def __init__(self, waits: bool) -> None:
            self.waits = waits

        def __hash__(self) -> int:
            return 5

        def __eq__(self, other: object) -> bool:
            if self.waits and other is not self:
                entered.set()
                assert go_on.wait(JOIN_SECONDS)
            return self is other

    first, slow = Slow(waits=False), Slow(waits=False)
    claim = pool.try_claim(first)
    first.waits = True  # a stored key is compared with the one that is asked for
    later = Background(lambda: pool.try_claim(slow))
    assert entered.wait(JOIN_SECONDS)
    with pool.try_claim("other") as other:
        assert other.mine
    assert claim.fulfil(tokens(1, 2))
    assert len(pool.flights) <= 1
    go_on.set()
    with later.result() as of_another_key:
        assert of_another_key.mine
        assert len(pool.flights) == 1  # the first has ended while the keys were compared
    pool.check_integrity()


def test_a_commit_that_a_close_overtakes_hears_so(make_pool: MakePool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not told that its scope was cleared, which the close does too."""
    pool = make_pool(2)
    reserve = room.reserve

    def closed_meanwhile(*arguments: Any) -> Any:
        Background(pool.close).result()
        return reserve(*arguments)

    with pool.gather(["child"]) as batch:
        append(batch, [2])
        monkeypatch.setattr(writing, "reserve", closed_meanwhile)
        with pytest.raises(ClosedError):
            pool.commit(["child"], batch, lengths=[2])


@pytest.mark.parametrize("end", ["pool", "storage", "version"])
def test_nothing_is_stored_once_an_end_has_begun(
    manager: KVCacheManager, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    """The end has set its mark while the tokens were copied, and has come no further."""
    pool, scattered = manager.recur_pool, writing._copy
    with manager.search([0]) as search:
        store_child(search)
        batch = search.gather(["child"], [0])
        append(batch, [3])
        state = search._state

        def begins(*arguments: Any) -> Any:
            if end == "pool":
                pool.account.closed = True
            elif end == "storage":
                manager.storage.closed = True
            else:
                state.budget.ended = "the version was bumped"
            return scattered(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(writing, "_copy", begins)
            if end == "version":
                with pytest.raises(SearchEndedError, match="the version was bumped"):
                    search.commit(["grandchild"], batch)
            else:
                with pytest.raises(ClosedError):
                    pool.put("key", tokens(1, 3))
        pool.account.closed = manager.storage.closed = False
        state.budget.ended = None
        assert "grandchild" not in search
        assert "key" not in pool
        batch.close()
    manager.check_integrity()
