"""Each guard of the flights and of the facade taken out: what the guard makes harmless then goes wrong, every time."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from concurrent_kv import (
    AsyncKVPool,
    ClosedError,
    IntegrityError,
    KeysValues,
    KVPool,
    RecursiveComputationError,
    WaitTimeoutError,
    loading,
)
from concurrent_kv.aio import cell, offload
from concurrent_kv.flights import Claim, Flight, FlightState, FlightTable, wait_in_thread
from concurrent_kv.locks import Deadline
from tests.async_support import join_workers, run_on, shards_held
from tests.flight_support import Computation, counted_waiters
from tests.support import LAYOUT, tokens
from tests.threading_support import JOIN_SECONDS, Background, Gate

Removal = Callable[[pytest.MonkeyPatch], None]


def seen_by(scenario: Callable[[], object]) -> object:
    try:
        return scenario()
    except (IntegrityError, WaitTimeoutError, RecursiveComputationError, ClosedError) as error:
        return type(error)


def shown_by(scenario: Callable[[], object], promised: object, guard_off: Removal) -> None:
    """The promise holds with the guard, and is broken without it."""
    assert seen_by(scenario) == promised
    with pytest.MonkeyPatch.context() as patch:
        guard_off(patch)
        assert seen_by(scenario) != promised, "without its guard the promise should have been broken"
    join_workers()


def new_pool() -> KVPool:
    return KVPool(LAYOUT, 4, wait_timeout=0.5)


# --- flights --------------------------------------------------------------------------------------------------------


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
        old = self._flights.get((scope.number, key, generation))
        if old is None:
            return join(self, scope, key, generation, claim)
        claim.mine, claim.flight = False, old
        return False

    patch.setattr(FlightTable, "join", keep)
    patch.setattr(loading, "outcome", lambda *arguments: (_ for _ in ()).throw(WaitTimeoutError("for ever")))


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
    def put(scope: Any, key: Any, generation: Any, side: Any, priority: Any, kv: Any, timeout: Any = None) -> bool:
        return bool(scope.pool.put(key, kv, side=side, priority=priority, scope=scope))

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


# --- the facade -----------------------------------------------------------------------------------------------------


def handles_after_a_cancelled_gather() -> object:
    """asyncio's own `cancel()` while the worker gathers."""
    pool = new_pool()
    pool.put("key", tokens(1, 2))
    aio = AsyncKVPool(pool, inline_bytes=0)
    gate = Gate()
    gather = pool.storage.tensor.gather
    kept: list[object] = []  # as a traceback somewhere would

    def held_up(*arguments: Any) -> Any:
        gate.pass_through()
        return gather(*arguments)

    def gathered(*arguments: Any, **options: Any) -> Any:
        kept.append(sync_gather(*arguments, **options))
        return kept[-1]

    sync_gather = pool.gather
    pool.storage.tensor.gather = held_up  # type: ignore[method-assign, assignment]
    pool.gather = gathered  # type: ignore[method-assign]

    async def main() -> None:
        task = asyncio.ensure_future(aio.gather(["key"]))
        await asyncio.to_thread(gate.entered.wait, JOIN_SECONDS)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        gate.opened.set()

    asyncio.run(main())
    join_workers()
    return pool.check_integrity().handles


def without_undoing(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(cell.Cell, "__init__", _cell_without_undo(cell.Cell.__init__))


def _cell_without_undo(init: Any) -> Any:
    return lambda self, undo: init(self, None)


def test_a_worker_that_did_not_undo_what_nobody_takes_would_leak_a_handle() -> None:
    shown_by(handles_after_a_cancelled_gather, 0, without_undoing)


def what_a_cancelled_put_leaves() -> object:
    """asyncio's own `cancel()` while the worker waits for its shard."""
    pool = KVPool(LAYOUT, 4, wait_timeout=JOIN_SECONDS)
    aio = AsyncKVPool(pool, inline_bytes=0)
    begun = threading.Event()
    read = pool.storage.locks.read

    def seen(*arguments: Any) -> Any:
        begun.set()
        return read(*arguments)

    pool.storage.locks.read = seen  # type: ignore[method-assign, assignment]

    async def main() -> None:
        with shards_held(pool) as let_go:
            task = asyncio.ensure_future(aio.put("key", tokens(1, 2)))
            while not begun.is_set():
                await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            let_go()

    asyncio.run(main())
    join_workers()
    return pool.contains("key")


def without_revoking(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Deadline, "check", lambda self, name: None)


def test_a_put_that_was_not_revoked_would_take_effect_after_its_task_was_cancelled() -> None:
    shown_by(what_a_cancelled_put_leaves, False, without_revoking)


def whether_a_pool_is_closed_that_a_cancelled_task_left() -> object:
    pool = new_pool()
    aio = AsyncKVPool(pool)

    async def main() -> bool:
        with anyio.CancelScope() as scope:
            async with aio:
                scope.cancel()
                await anyio.lowlevel.checkpoint()
        return pool.closed

    return run_on("trio", main)


def ending_like_any_operation(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(offload.Offload, "to_the_end", offload.Offload.in_worker)


def test_an_end_that_is_cancelled_like_any_operation_would_not_be_reached() -> None:
    shown_by(whether_a_pool_is_closed_that_a_cancelled_task_left, True, ending_like_any_operation)
