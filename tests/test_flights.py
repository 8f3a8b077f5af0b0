"""`get_or_compute` and `try_claim` for threads: one computation of each missing key, and nobody left waiting.

How a computation ends, whoever computes and whoever waits: test_flight_matrix.py.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial

import pytest
import torch

from concurrent_kv import (
    ClosedError,
    InvalidArgumentError,
    InvalidTypeError,
    KeysValues,
    KVCacheManager,
    KVPool,
    RecursiveComputationError,
    WaitTimeoutError,
)
from tests.conftest import MakePool
from tests.flight_support import Computation, counted_waiters
from tests.support import assert_same, tokens
from tests.threading_support import JOIN_SECONDS, Background

WAITERS = 6


def missed_together(pool: KVPool, computation: Computation) -> list[KeysValues | BaseException]:
    """What one computing thread and the ones that wait for it get; the first answer is the computing one's."""

    def ask() -> KeysValues | BaseException:
        try:
            return pool.get_or_compute("key", computation)
        except BaseException as error:
            return error

    with counted_waiters() as waiters:
        threads = [Background(ask)]
        assert computation.gate.entered.wait(JOIN_SECONDS)
        threads += [Background(ask) for _ in range(WAITERS)]
        waiters.wait_for(WAITERS)
        computation.gate.opened.set()
        return [thread.result() for thread in threads]


def kv_of(answer: KeysValues | BaseException) -> KeysValues:
    assert isinstance(answer, KeysValues), repr(answer)
    return answer


# --- one computation ------------------------------------------------------------------------------------------------


def test_what_everyone_gets_is_their_own(pool: KVPool) -> None:
    answers = [kv_of(answer) for answer in missed_together(pool, Computation())]
    answers[0].keys.fill_(-1)
    answers[1].values.fill_(-2)
    for answer in answers[2:]:
        assert_same(answer, tokens(1, 3))
    assert_same(pool.get("key"), tokens(1, 3))


def test_what_compute_returned_can_be_written_to_afterwards(pool: KVPool) -> None:
    made = tokens(1, 3)
    got = pool.get_or_compute("key", lambda: made)
    made.keys.fill_(-1)
    assert_same(got, tokens(1, 3))
    assert_same(pool.get("key"), tokens(1, 3))


def test_a_stored_key_is_not_computed(pool: KVPool) -> None:
    pool.put("key", tokens(7, 2))
    computation = Computation(opened=True)
    assert_same(pool.get_or_compute("key", computation), tokens(7, 2))
    assert computation.runs == 0


def test_a_key_stored_between_the_lookup_and_the_claim_is_not_computed(
    pool: KVPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    get = KVPool.get

    def missed_too_early(self: KVPool, key: str, **options: object) -> None:
        assert get(self, key) is None
        self.put(key, tokens(7, 2))

    computation = Computation(opened=True)
    with monkeypatch.context() as patch:
        patch.setattr(KVPool, "get", missed_too_early)
        assert_same(pool.get_or_compute("key", computation), tokens(7, 2))
    assert computation.runs == 0


def test_side_data_and_scope_are_those_of_the_one_who_computes(pool: KVPool) -> None:
    scope = pool.scope("scope")
    pool.get_or_compute("key", lambda: tokens(1, 2), side="side", scope=scope)
    assert pool.side("key", scope=scope) == "side"
    assert pool.get("key") is None


def test_waiters_get_the_result_though_its_entry_was_evicted_before_they_woke(make_pool: MakePool) -> None:
    pool = make_pool(1)
    claim = pool.try_claim("key")
    with counted_waiters() as waiters:
        waiting = Background(lambda: pool.get_or_compute("key", Computation(opened=True)))
        waiters.wait_for(1)
        pass_on = claim.pass_on

        def evicted_first(kv: KeysValues) -> None:
            pool.put("other", tokens(2, 8))
            assert pool.get("key") is None
            pass_on(kv)

        claim.pass_on = evicted_first  # type: ignore[method-assign]
        assert claim.fulfil(tokens(9, 3))
    assert_same(waiting.result(), tokens(9, 3))


@pytest.mark.parametrize("change", [KVPool.clear, KVPool.bump_version])
def test_who_misses_after_a_clear_or_a_bump_does_not_wait_for_the_older_computation(
    pool: KVPool, change: Callable[[KVPool], None]
) -> None:
    older = Computation()
    first = Background(lambda: pool.get_or_compute("key", older))
    assert older.gate.entered.wait(JOIN_SECONDS)
    change(pool)
    assert_same(pool.get_or_compute("key", lambda: tokens(9, 2)), tokens(9, 2))
    older.gate.opened.set()
    assert_same(first.result(), tokens(1, 3))
    assert_same(pool.get("key"), tokens(9, 2))


# --- computations that fail -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("made", "error"),
    [
        (KeysValues(torch.zeros(1, 1, 1, 1, 1), torch.zeros(1, 1, 1, 1, 1)), InvalidArgumentError),
        (None, InvalidTypeError),
    ],
)
def test_all_hear_that_the_result_cannot_be_stored(pool: KVPool, made: object, error: type[Exception]) -> None:
    class Unfit(Computation):
        def __call__(self) -> KeysValues:
            super().__call__()
            return made  # type: ignore[return-value]

    answers = missed_together(pool, Unfit())
    assert all(isinstance(answer, error) for answer in answers), answers
    assert pool.get("key") is None


def test_an_async_compute_is_refused_by_the_sync_pool(pool: KVPool) -> None:
    async def compute() -> KeysValues:
        return tokens(1, 2)

    with pytest.raises(InvalidTypeError, match="async"):
        pool.get_or_compute("key", compute)  # type: ignore[arg-type]


def test_a_priority_that_cannot_work_is_only_the_callers_own_error(pool: KVPool) -> None:
    computation = Computation()
    with pytest.raises(InvalidTypeError, match="priority"):
        pool.get_or_compute("key", computation, priority="high")  # type: ignore[arg-type]
    assert len(pool.flights) == 0


def test_waiting_for_a_computation_is_bounded_and_names_pool_and_key(make_pool: MakePool) -> None:
    pool = make_pool(name="roots")
    claim = pool.try_claim("key")
    with pytest.raises(WaitTimeoutError, match=r"roots: the computation of 'key' .* within 0\.01 s"):
        pool.get_or_compute("key", Computation(opened=True), timeout=0.01)
    assert claim.flight.wakers == []
    claim.abandon()


# --- computations that compute --------------------------------------------------------------------------------------


def test_a_computation_that_asks_for_its_own_key_hears_so_at_once(pool: KVPool) -> None:
    with pytest.raises(RecursiveComputationError, match="'key'"):
        pool.get_or_compute("key", lambda: pool.get_or_compute("key", Computation(opened=True)))
    with pytest.raises(RecursiveComputationError):
        pool.get_or_compute("key", lambda: tokens(1 if pool.try_claim("key").mine else 2, 2))
    assert_same(pool.get_or_compute("key", lambda: tokens(3, 2)), tokens(3, 2))


def test_a_computation_may_ask_for_other_keys_and_write(pool: KVPool) -> None:
    def child() -> KeysValues:
        parent = pool.get_or_compute("parent", lambda: tokens(1, 2))
        pool.put("note", parent)
        return tokens(2, 3)

    assert_same(pool.get_or_compute("child", child), tokens(2, 3))
    assert_same(pool.get("parent"), tokens(1, 2))
    assert_same(pool.get("note"), tokens(1, 2))


def test_a_computation_may_use_another_pools_equal_key(make_pool: MakePool) -> None:
    first, second = make_pool(), make_pool()
    got = first.get_or_compute("key", lambda: second.get_or_compute("key", lambda: tokens(1, 2)))
    assert_same(got, tokens(1, 2))


# --- claims ---------------------------------------------------------------------------------------------------------


def test_a_claim_says_who_computes(pool: KVPool) -> None:
    mine = pool.try_claim("key")
    theirs = Background(lambda: pool.try_claim("key")).result()
    assert mine.mine
    assert not theirs.mine
    assert not theirs.over
    assert pool.try_claim("other").mine
    mine.abandon()
    assert theirs.over


def test_a_fulfilled_claim_is_stored_and_passed_on(pool: KVPool) -> None:
    claim = pool.try_claim("key", side="side")
    with counted_waiters() as waiters:
        waiting = Background(lambda: pool.get_or_compute("key", Computation(opened=True)))
        waiters.wait_for(1)
        assert claim.fulfil(tokens(4, 3))
    assert_same(waiting.result(), tokens(4, 3))
    assert pool.side("key") == "side"
    assert claim.over


def test_a_claim_fulfilled_after_a_clear_says_that_nothing_was_kept(pool: KVPool) -> None:
    claim = pool.try_claim("key")
    pool.clear()
    assert not claim.fulfil(tokens(4, 3))
    assert pool.get("key") is None


def test_dropped_claims_are_not_remembered(pool: KVPool) -> None:
    for number in range(20):
        assert pool.try_claim(number).mine
    gc.collect()
    assert len(pool.flights) == 0


def test_a_claim_that_is_over_or_somebody_elses_can_do_nothing_more(pool: KVPool) -> None:
    claim = pool.try_claim("key")
    theirs = pool.try_claim("key")
    theirs.abandon()
    assert not claim.over
    for act in (lambda: theirs.fulfil(tokens(1, 2)), lambda: theirs.fail(ValueError())):
        with pytest.raises(ClosedError, match="another caller"):
            act()
    claim.fulfil(tokens(1, 2))
    for act in (lambda: claim.fulfil(tokens(2, 2)), lambda: claim.fail(ValueError())):
        with pytest.raises(ClosedError, match="over"):
            act()
    claim.abandon()
    assert_same(pool.get("key"), tokens(1, 2))


def test_a_claim_whose_result_could_not_be_stored_is_still_open(pool: KVPool) -> None:
    with pool.try_claim("key") as claim:
        with pytest.raises(InvalidTypeError):
            claim.fulfil(None)  # type: ignore[arg-type]
        assert not claim.over
        assert claim.fulfil(tokens(2, 2))
    assert_same(pool.get("key"), tokens(2, 2))


def test_inside_a_claims_computing_its_key_cannot_be_asked_for(pool: KVPool) -> None:
    with pool.try_claim("key") as claim, claim.computing(), pytest.raises(RecursiveComputationError):
        pool.get_or_compute("key", Computation(opened=True))


def test_closing_the_pool_ends_claims(pool: KVPool) -> None:
    claim = pool.try_claim("key")
    pool.close()
    assert claim.over
    with pytest.raises(ClosedError):
        claim.fulfil(tokens(1, 2))
    with pytest.raises(ClosedError):
        pool.get_or_compute("key", Computation(opened=True))
    with pytest.raises(ClosedError):
        pool.try_claim("key")


def test_closing_a_manager_wakes_who_waits_in_any_of_its_pools(manager: KVCacheManager) -> None:
    pools = [*manager.init_pools, manager.recur_pool, manager.wm_pool]
    claims = [pool.try_claim("key") for pool in pools]
    with counted_waiters() as waiters:
        waiting = [Background(partial(pool.get_or_compute, "key", Computation(opened=True))) for pool in pools]
        waiters.wait_for(len(pools))
        manager.close()
    for claim, waiter in zip(claims, waiting, strict=True):
        assert claim.over
        with pytest.raises(ClosedError):
            waiter.result()
