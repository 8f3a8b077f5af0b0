"""Each guard of how flights end, and of their locks and waits, taken out: then somebody waits, or hears wrong."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest

from concurrent_kv import ClosedError, KeysValues, KVCacheManager, KVPool, WaitTimeoutError
from concurrent_kv.books.records import Generation
from concurrent_kv.flights.table import Claim, Flight, FlightKey, FlightState, FlightTable
from concurrent_kv.locks.deadline import Deadline
from tests.async_support import shards_held
from tests.flight_support import counted_waiters
from tests.guards import Removal, patience, shown_by
from tests.support import LAYOUT, config, tokens
from tests.threading_support import Background


def new_pool() -> KVPool:
    return KVPool(LAYOUT, 4, wait_timeout=patience())


# --- how a flight ends ------------------------------------------------------------------------------------------------


def what_a_waiter_gets_when(end: Callable[[KVPool, list[Claim]], object]) -> object:
    pool = KVPool(LAYOUT, 4, wait_timeout=patience())
    claims = [pool.try_claim("key")]
    with counted_waiters() as waiters:
        waiting = Background(lambda: pool.get_or_compute("key", lambda: tokens(9, 2)).lengths)
        waiters.wait_for(1)
        end(pool, claims)
    return waiting.result()


def is_abandoned(pool: KVPool, claims: list[Claim]) -> None:
    claims[0].abandon()


def is_dropped(pool: KVPool, claims: list[Claim]) -> None:
    claims.clear()
    gc.collect()


def is_fulfilled(pool: KVPool, claims: list[Claim]) -> None:
    claims[0].fulfil(tokens(1, 2))


def finds_the_pool_closed(pool: KVPool, claims: list[Claim]) -> None:
    pool.close()


def waking_nobody(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Flight, "wake", lambda self: None)


def closing_without_the_flights(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(FlightTable, "close", lambda self: None)


@pytest.mark.parametrize(
    ("end", "promised", "guard_off"),
    [
        (is_abandoned, (2,), waking_nobody),
        (is_dropped, (2,), waking_nobody),
        (is_fulfilled, (2,), waking_nobody),
        (finds_the_pool_closed, ClosedError, waking_nobody),
        (finds_the_pool_closed, ClosedError, closing_without_the_flights),
    ],
)
def test_a_flight_that_ended_without_waking_anybody_would_let_them_wait(
    end: Callable[[KVPool, list[Claim]], object], promised: object, guard_off: Removal
) -> None:
    shown_by(lambda: what_a_waiter_gets_when(end), promised, guard_off)


def what_comes_of_a_key_whose_computing_thread_was_killed() -> object:
    pool = KVPool(LAYOUT, 4, wait_timeout=patience())

    def killed() -> KeysValues:
        raise SystemExit

    try:
        pool.get_or_compute("key", killed)
    except SystemExit as error:
        kept = error  # as whoever looks at an error keeps its traceback
    answer = pool.get_or_compute("key", lambda: tokens(1, 2)).lengths
    return answer, type(kept)


def without_letting_go_at_the_end_of_a_with(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Claim, "__exit__", lambda self, *error: None)


def test_a_claim_that_its_with_does_not_let_go_would_live_as_long_as_the_traceback() -> None:
    shown_by(
        what_comes_of_a_key_whose_computing_thread_was_killed,
        ((2,), SystemExit),
        without_letting_go_at_the_end_of_a_with,
    )


def answer_after_one_that_failed() -> object:
    pool = new_pool()

    def broken() -> KeysValues:
        raise LookupError

    with pytest.raises(LookupError):
        pool.get_or_compute("key", broken)
    try:
        return pool.get_or_compute("key", lambda: tokens(1, 2)).lengths
    except LookupError as error:
        return error


def remembering_errors(patch: pytest.MonkeyPatch) -> None:
    join = FlightTable.join
    failed: dict[object, Flight] = {}

    def settle(self: FlightTable, flight: Flight, state: FlightState, **outcome: Any) -> bool:
        assert flight.ending is not None
        flight.state, flight.ending.error = state, outcome["error"]
        failed[flight.key.place] = flight
        return True

    def joined(self: FlightTable, scope: Any, key: Any, generation: Any, claim: Claim) -> bool:
        old = failed.get(FlightKey(scope.number, key, generation).place)
        if old is None:
            return join(self, scope, key, generation, claim)
        claim.mine, claim.flight, claim.ending = False, old, old.ending
        return False

    patch.setattr(FlightTable, "settle", settle)
    patch.setattr(FlightTable, "join", joined)


def test_an_error_that_was_remembered_would_be_heard_by_who_could_compute() -> None:
    shown_by(answer_after_one_that_failed, (2,), remembering_errors)


def who_computes_after_a_clear() -> object:
    """The older computation is in the air: who misses after the clear is the one to compute, and does not wait."""
    pool = new_pool()
    claims = [pool.try_claim("key")]
    for change in (pool.clear, pool.bump_version):
        change()
        claims.append(pool.try_claim("key"))
    return [claim.mine for claim in claims]


def flights_by_key_alone(patch: pytest.MonkeyPatch) -> None:
    join, always = FlightTable.join, Generation(0, 0)
    patch.setattr(
        FlightTable, "join", lambda self, scope, key, generation, claim: join(self, scope, key, always, claim)
    )


def test_flights_by_key_alone_would_give_the_result_of_before_a_clear_to_who_came_after() -> None:
    shown_by(who_computes_after_a_clear, [True, True, True], flights_by_key_alone)


# --- locks and waits --------------------------------------------------------------------------------------------------


def locks_held_while_somebody_is_woken() -> object:
    held: list[str] = []
    for end in (is_abandoned, is_dropped, is_fulfilled, finds_the_pool_closed):
        pool = new_pool()
        claims = [pool.try_claim("key")]
        flights, ledger = pool.flights, pool.storage.ledger

        def waker(flights: FlightTable = flights, ledger: Any = ledger, end: Any = end, pool: KVPool = pool) -> None:
            locks = pool.storage.locks
            held.extend(
                f"{end.__name__}: {name}"
                for name, lock in (("flights", flights._lock), ("mutex", ledger.mutex))
                if lock.locked()
            )
            with locks.write(range(locks.count), Deadline(patience())):
                pass

        claims[0].flight.subscribe(waker)
        end(pool, claims)
    return held


def waking_inside_the_lock(patch: pytest.MonkeyPatch) -> None:
    def settle(self: FlightTable, flight: Flight, state: FlightState, **outcome: Any) -> bool:
        with self._lock:
            flight.state = state
            flight.wake()
        return True

    patch.setattr(FlightTable, "settle", settle)


def test_wakers_called_under_a_lock_would_run_the_loops_code_under_it() -> None:
    shown_by(locks_held_while_somebody_is_woken, [], waking_inside_the_lock)


def wakers_of_those_who_no_longer_wait() -> object:
    pool = new_pool()
    claim = pool.try_claim("key")
    for _ in range(5):
        with pytest.raises(WaitTimeoutError):
            pool.get_or_compute("key", lambda: tokens(1, 2), timeout=0.001)
    return len(claim.flight.wakers)


def keeping_every_waker(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Flight, "unsubscribe", lambda self, waker: None)


def test_wakers_that_are_never_taken_back_would_add_up() -> None:
    shown_by(wakers_of_those_who_no_longer_wait, 0, keeping_every_waker)


def whether_a_claim_waits_for_a_shard() -> object:
    """Something dropped unclosed needs a shard to be released, and the shard is held."""
    manager = KVCacheManager(config(), 1, wait_timeout=patience())
    search = [manager.search([0], entries=2)]
    with shards_held(manager.recur_pool):
        search.clear()
        gc.collect()
        before = manager.storage.locks.contention.read()[0]
        assert manager.recur_pool.try_claim("key").mine
        return manager.storage.locks.contention.read()[0] > before


def entering_like_any_operation(patch: pytest.MonkeyPatch) -> None:
    try_claim = KVPool.try_claim

    def entered(self: KVPool, key: Any) -> Claim:
        self.storage.enter(None, self.account)
        return try_claim(self, key)

    patch.setattr(KVPool, "try_claim", entered)


def test_a_claim_that_entered_like_any_operation_would_wait() -> None:
    shown_by(whether_a_claim_waits_for_a_shard, False, entering_like_any_operation)
