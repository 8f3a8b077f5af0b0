"""Each guard of the flights taken out: what the guard makes harmless then goes wrong, every time."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest

from concurrent_kv import KeysValues, KVPool, RecursiveComputationError, WaitTimeoutError
from concurrent_kv.flights.table import Claim, Flight, FlightKey, FlightState, FlightTable
from concurrent_kv.flights.waiting import wait_in_thread
from concurrent_kv.locks.deadline import Deadline
from concurrent_kv.pool import loading
from tests.flight_support import Computation, counted_waiters
from tests.guards import Removal, patience, shown_by
from tests.support import LAYOUT, tokens
from tests.threading_support import JOIN_SECONDS, Background


def new_pool() -> KVPool:
    return KVPool(LAYOUT, 4, wait_timeout=patience())


def runs_of_a_computation_that_ended_between_lookup_and_claim() -> int:
    pool = new_pool()
    computation = Computation(opened=True)
    looked, go_on = threading.Event(), threading.Event()
    get = pool.get

    def get_and_stop(key: str, **options: Any) -> KeysValues | None:
        found = get(key, **options)
        looked.set()
        assert go_on.wait(JOIN_SECONDS)
        return found

    pool.get = get_and_stop  # type: ignore[method-assign, assignment]
    late = Background(lambda: pool.get_or_compute("key", computation))
    assert looked.wait(JOIN_SECONDS)
    pool.get = get  # type: ignore[method-assign]
    pool.get_or_compute("key", computation)
    go_on.set()
    late.result()
    return computation.runs


def without_looking_again(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(KVPool, "peek", lambda self, key, **options: None)


def test_who_claimed_without_looking_again_would_compute_twice() -> None:
    shown_by(runs_of_a_computation_that_ended_between_lookup_and_claim, 1, without_looking_again)


def how_a_waiter_fares_that_comes_while_the_others_are_woken() -> object:
    pool = new_pool()
    claim = pool.try_claim("key")
    flight, wake = claim.flight, Flight.wake
    late: list[Background] = []

    def and_one_more(self: Flight) -> None:
        wake(self)
        late.append(Background(lambda: wait_in_thread(flight, Deadline(0.2), "pool")))
        waiters.wait_for(1)

    with counted_waiters() as waiters, pytest.MonkeyPatch.context() as patch:
        patch.setattr(Flight, "wake", and_one_more)
        claim.fail(ValueError())
    return late[0].result()


def waking_before_the_state_is_set(patch: pytest.MonkeyPatch) -> None:
    def settle(self: FlightTable, flight: Flight, state: FlightState, **outcome: Any) -> bool:
        flight.wake()
        flight.state = state
        return True

    patch.setattr(FlightTable, "settle", settle)


def test_waking_before_the_state_is_set_would_be_missed_by_who_comes_in_between() -> None:
    shown_by(how_a_waiter_fares_that_comes_while_the_others_are_woken, None, waking_before_the_state_is_set)


def what_a_waiter_gets_that_came_as_the_flight_ended() -> object:
    pool = new_pool()
    claim = pool.try_claim("key")
    subscribe = Flight.subscribe

    def ends_just_before(self: Flight, waker: Callable[[], None]) -> bool:
        claim.fulfil(tokens(1, 2))
        return subscribe(self, waker)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Flight, "subscribe", ends_just_before)
        return pool.get_or_compute("key", lambda: tokens(2, 2)).lengths


def without_looking_at_the_state_after_subscribing(patch: pytest.MonkeyPatch) -> None:
    subscribe = Flight.subscribe

    def always_wait(self: Flight, waker: Callable[[], None]) -> bool:
        subscribe(self, waker)
        return True

    patch.setattr(Flight, "subscribe", always_wait)


def test_a_waiter_that_did_not_look_after_subscribing_would_miss_its_waking() -> None:
    shown_by(what_a_waiter_gets_that_came_as_the_flight_ended, (2,), without_looking_at_the_state_after_subscribing)


def what_is_computed_after_a_claim_was_dropped() -> object:
    pool = new_pool()
    pool.try_claim("key")
    gc.collect()
    return pool.get_or_compute("key", lambda: tokens(1, 2)).lengths


def without_replacing_what_was_abandoned(patch: pytest.MonkeyPatch) -> None:
    join = FlightTable.join

    def keep(self: FlightTable, scope: Any, key: Any, generation: Any, claim: Claim) -> bool:
        there = self._flights.get(FlightKey(scope.number, key, generation).place)
        old = there[0] if there else None
        if old is None:
            return join(self, scope, key, generation, claim)
        claim.mine, claim.flight, claim.ending = False, old, old.ending
        return False

    patch.setattr(FlightTable, "join", keep)
    patch.setattr(
        "concurrent_kv.pool.pool.outcome", lambda *arguments: (_ for _ in ()).throw(WaitTimeoutError("for ever"))
    )


def without_a_finaliser(patch: pytest.MonkeyPatch) -> None:
    patch.delattr(Claim, "__del__")


@pytest.mark.parametrize("guard_off", [without_replacing_what_was_abandoned, without_a_finaliser])
def test_a_dropped_claim_that_nobody_replaced_would_keep_its_key_from_everyone(guard_off: Removal) -> None:
    shown_by(what_is_computed_after_a_claim_was_dropped, (2,), guard_off)


def error_of_a_computation_that_asks_for_its_own_key() -> object:
    pool = new_pool()
    return pool.get_or_compute("key", lambda: pool.get_or_compute("key", lambda: tokens(1, 2)))


def without_knowing_what_is_being_computed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Claim, "computing", lambda self: nullcontext())


def test_a_computation_that_is_not_known_as_such_would_wait_for_itself() -> None:
    shown_by(
        error_of_a_computation_that_asks_for_its_own_key,
        RecursiveComputationError,
        without_knowing_what_is_being_computed,
    )


def what_a_clear_leaves_of_a_computation_in_the_air() -> object:
    pool = new_pool()
    claim = pool.try_claim("key")
    pool.clear()
    return claim.fulfil(tokens(1, 2)), pool.contains("key")


def storing_in_the_generation_of_now(patch: pytest.MonkeyPatch) -> None:
    def put(
        pool: Any, scope: Any, key: Any, generation: Any, side: Any, priority: Any, kv: Any, timeout: Any = None
    ) -> bool:
        return bool(pool.put(key, kv, side=side, priority=priority, scope=scope))

    patch.setattr(loading, "_store", put)


def test_a_result_stored_in_the_generation_of_now_would_bring_back_what_a_clear_has_ended() -> None:
    shown_by(what_a_clear_leaves_of_a_computation_in_the_air, (False, False), storing_in_the_generation_of_now)


def what_everyone_gets() -> object:
    pool = new_pool()
    claim = pool.try_claim("key")
    with counted_waiters() as waiters:
        callers = [Background(lambda: pool.get_or_compute("key", lambda: tokens(2, 2))) for _ in range(2)]
        waiters.wait_for(2)
        claim.fulfil(tokens(1, 2))
        first, second = (caller.result() for caller in callers)
    first.keys.fill_(-1)
    return bool((second.keys == -1).any())


def one_result_for_all(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(KeysValues, "copy", lambda self, device=None: self)


def test_without_copies_everyone_would_write_to_what_the_others_got() -> None:
    shown_by(what_everyone_gets, False, one_result_for_all)


def who_computes_when_a_flight_ends() -> object:
    """Somebody who looks when the flight has just ended finds the entry, or the flight."""
    pool = new_pool()
    claim = pool.try_claim("key")
    found: list[bool] = []
    claim.flight.subscribe(lambda: found.append(pool.contains("key")))
    claim.fulfil(tokens(1, 2))
    return found


def passing_on_before_storing(patch: pytest.MonkeyPatch) -> None:
    def fulfil(self: Claim, kv: KeysValues, *, timeout: float | None = None) -> bool:
        self.pass_on(kv)
        return self._store(kv, timeout=timeout)

    patch.setattr(Claim, "fulfil", fulfil)


def test_a_result_passed_on_before_it_is_stored_would_be_missed_by_who_comes_in_between() -> None:
    shown_by(who_computes_when_a_flight_ends, [True], passing_on_before_storing)


def what_a_waiter_gets_whose_entry_was_evicted_before_it_woke() -> object:
    pool = KVPool(LAYOUT, 1, wait_timeout=patience())
    claim = pool.try_claim("key")
    with counted_waiters() as waiters:
        waiting = Background(lambda: pool.get_or_compute("key", lambda: tokens(9, 3)).lengths)
        waiters.wait_for(1)
        claim.flight.wakers.insert(0, lambda: Background(lambda: pool.put("other", tokens(2, 8))).result())
        claim.fulfil(tokens(1, 2))
    return waiting.result()


def reading_the_pool_instead_of_the_flight(patch: pytest.MonkeyPatch) -> None:
    plain = KVPool.get_or_compute

    def get_or_compute(self: KVPool, key: Any, *arguments: Any) -> Any:
        patch.setattr("concurrent_kv.pool.pool.outcome", lambda *ended: self.get(key))
        return plain(self, key, *arguments)

    patch.setattr(KVPool, "get_or_compute", get_or_compute)


def test_a_result_that_the_flight_does_not_carry_would_be_lost_with_its_entry() -> None:
    shown_by(what_a_waiter_gets_whose_entry_was_evicted_before_it_woke, (2,), reading_the_pool_instead_of_the_flight)
