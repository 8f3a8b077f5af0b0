"""Each guard of the protocol taken out: a schedule that the guard makes harmless then goes wrong, every time.

Every scenario runs twice, as it is and with one guard replaced by the plain version of itself, and says what a caller
saw. With the guard it is what was promised; without it is not, or the books no longer add up.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from concurrent_kv import IntegrityError, WaitTimeoutError
from concurrent_kv.books import ledger
from concurrent_kv.books.ledger import Ledger
from concurrent_kv.books.records import Entry, Hold
from concurrent_kv.locks.deadline import Deadline
from concurrent_kv.locks.sharded import ShardedRWLock
from concurrent_kv.pool import pin, reading, room, writing
from concurrent_kv.pool.core import PoolCore
from tests import guards
from tests.threading_support import JOIN_SECONDS, LAYOUT, WINDOW, Background, Gate, GatedPool, filled, value_of

pytestmark = pytest.mark.usefixtures("loops")

Removal = Callable[[pytest.MonkeyPatch], None]


def goes_wrong(scenario: Callable[[], object], promised: object) -> bool:
    """Whether a scenario ends otherwise than promised: another answer, an error, or books that do not add up."""
    try:
        return scenario() != promised
    except (IntegrityError, IndexError, KeyError, WaitTimeoutError, ReentryError):
        return True


def shown_by(scenario: Callable[[], object], promised: object, guard_off: Removal) -> None:
    """The promise holds with the guard, and is broken without it."""
    assert scenario() == promised
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(guards, "_patience", guards.SHORT)
        guard_off(patch)
        assert goes_wrong(scenario, promised), "without its guard the promise should have been broken"


def write_over_every_free_slot(pool: GatedPool, value: float) -> None:
    """Writes until each slot that was free has been written to: slots are used again in the order of their release."""
    for number in range(pool.gated.num_slots // WINDOW):
        pool.put(f"other {number % 2}", filled(value))


# --- reading --------------------------------------------------------------------------------------------------------


def read_while_the_entry_is_popped_and_its_slots_are_written_again() -> float | None:
    pool = GatedPool(3)
    pool.put("key", filled(1))
    with pool.gated.hold_up("gather") as gate:
        read = Background(lambda: pool.get("key"))
        assert gate.entered.wait(JOIN_SECONDS)
        pool.pop("key")
        write_over_every_free_slot(pool, 2)
    value = value_of(read.result())
    pool.check_integrity()
    return value


def without_holding_what_is(what: str) -> Removal:
    def guard_off(patch: pytest.MonkeyPatch) -> None:
        extend = Ledger.extend

        def register_only(self: Ledger, hold: Hold, entries: list[Entry]) -> None:
            extend(self, hold, [] if hold.what == what else entries)

        patch.setattr(Ledger, "extend", register_only)

    return guard_off


def test_a_reader_that_retained_nothing_would_see_what_its_slots_were_used_for_next() -> None:
    shown_by(read_while_the_entry_is_popped_and_its_slots_are_written_again, 1.0, without_holding_what_is("read"))


def child_of_a_parent_that_is_popped_before_the_commit() -> list[float]:
    pool = GatedPool(3)
    pool.put("parent", filled(1, 2))
    batch = pool.gather(["parent"])

    def pop_and_write() -> None:
        pool.pop("parent")
        write_over_every_free_slot(pool, 2)

    Background(pop_and_write).result()
    new = torch.full((1, LAYOUT.num_heads, 1, LAYOUT.head_dim), 3.0)
    for layer in range(LAYOUT.num_layers):
        batch.append(layer, new, new)
    pool.commit(["child"], batch)
    child = pool.get("child")
    pool.check_integrity()
    assert child is not None
    return child.keys[0, 0, 0, :, 0].tolist()


def test_a_batch_that_let_its_parents_go_would_share_slots_of_somebody_else() -> None:
    shown_by(child_of_a_parent_that_is_popped_before_the_commit, [1.0, 1.0, 3.0], without_holding_what_is("batch"))


def child_whose_batch_is_closed_while_it_is_committed() -> list[float]:
    pool = GatedPool(3)
    pool.put("parent", filled(1, 2))
    batch = pool.gather(["parent"])
    new = torch.full((1, LAYOUT.num_heads, 1, LAYOUT.head_dim), 3.0)
    for layer in range(LAYOUT.num_layers):
        batch.append(layer, new, new)
    with pool.gated.hold_up("scatter") as gate:
        commit = Background(lambda: pool.commit(["child"], batch))
        assert gate.entered.wait(JOIN_SECONDS)
        batch.close()
        pool.pop("parent")
        write_over_every_free_slot(pool, 2)
    assert commit.result()
    child = pool.get("child")
    pool.check_integrity()
    assert child is not None
    return child.keys[0, 0, 0, :, 0].tolist()


def without_using_the_hold_of_a_batch(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Ledger, "use", lambda self, hold: not hold.released)

    def end_what_is_released(self: Ledger, hold: Hold, *, release: bool) -> list[Entry]:
        hold.released = hold.released or release
        return self.end(hold) if hold.released else []

    patch.setattr(Ledger, "end_use", end_what_is_released)


def test_a_commit_that_did_not_use_its_batch_would_share_slots_of_somebody_else() -> None:
    promised = [1.0, 1.0, 3.0]
    shown_by(child_whose_batch_is_closed_while_it_is_committed, promised, without_using_the_hold_of_a_batch)


def a_stale_read_after_a_clear() -> float | None:
    pool = GatedPool(2)
    pool.put("key", filled(1))
    held, done = threading.Event(), threading.Event()

    def reads_of_the_shard_go_on() -> None:
        with pool.storage.locks.read((0,), Deadline(JOIN_SECONDS)):
            held.set()
            assert done.wait(JOIN_SECONDS)

    holder = Background(reads_of_the_shard_go_on)
    assert held.wait(JOIN_SECONDS)
    with pytest.raises(WaitTimeoutError):
        pool.clear(timeout=0.01)  # the epoch is over; the sweep could not begin
    done.set()
    holder.result()
    return value_of(pool.get("key"))


def without_comparing_epochs_on_reading(patch: pytest.MonkeyPatch) -> None:
    retain = reading.retain

    def any_generation(
        storage: Any, located: Any, keys: Any, hashes: Any, generations: Any, deadline: Any, **options: Any
    ) -> Any:
        of_each = zip(located.scopes, located.parts, keys, strict=True)
        entries = [(scope, part.get(key)) for scope, part, key in of_each]
        current = {scope: entry.generation for scope, entry in entries if entry}
        return retain(storage, located, keys, hashes, {**generations, **current}, deadline, **options)

    patch.setattr("concurrent_kv.pool.pool.retain", any_generation)


def test_a_reader_that_ignored_epochs_would_see_what_a_clear_has_ended() -> None:
    shown_by(a_stale_read_after_a_clear, None, without_comparing_epochs_on_reading)


# --- eviction -------------------------------------------------------------------------------------------------------


def what_is_left_of_a_victim(before_its_lock: Callable[[GatedPool], object]) -> object:
    """The first victim of a put is claimed; then something happens to it before the evicting thread has its shard."""
    pool = GatedPool(2)
    pool.put("victim", filled(1))
    pool.put("other", filled(2))
    pool.gated_locks.gate = gate = Gate()
    put = Background(lambda: pool.put("new", filled(3)))
    assert gate.entered.wait(JOIN_SECONDS)
    kept = before_its_lock(pool)
    gate.opened.set()
    assert put.result()
    left = value_of(pool.peek("victim"))
    pool.check_integrity()
    del kept
    return left


def evict_unchecked(pool: PoolCore, victim: Entry, deadline: Deadline) -> None:
    """`_evict` as one would write it first."""
    scope = victim.scope
    part = scope.part_of(victim.key_hash)
    with pool.storage.locks.write((scope.shards[part],), deadline), pool.storage.ledger.mutex:
        found = scope.entries[part].pop(victim.key, None)
        if found is not None:
            room.unpublish(pool, [found])
            pool.counters.eviction_count += 1


def without_checking_the_victim_again(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(room, "_evict", evict_unchecked)


def test_an_eviction_that_did_not_look_again_would_evict_what_was_pinned_meanwhile() -> None:
    shown_by(lambda: what_is_left_of_a_victim(lambda pool: pool.pin("victim")), 1.0, without_checking_the_victim_again)


def test_an_eviction_that_did_not_look_again_would_evict_what_replaced_its_victim() -> None:
    shown_by(
        lambda: what_is_left_of_a_victim(lambda pool: pool.put("victim", filled(4))),
        4.0,
        without_checking_the_victim_again,
    )


# --- publication ----------------------------------------------------------------------------------------------------


def what_is_left_of_a_write_that_was_cleared_while_it_copied() -> tuple[object, float | None]:
    pool = GatedPool(2)
    with pool.gated.hold_up("scatter") as gate:
        put = Background(lambda: pool.put("key", filled(1)))
        assert gate.entered.wait(JOIN_SECONDS)
        pool.clear()
    stored = put.result()
    pool.check_integrity()
    return stored, value_of(pool.get("key"))


def without_comparing_epochs(patch: pytest.MonkeyPatch) -> None:
    publish = writing._publish

    def with_the_epoch_of_now(pool: Any, scope: Any, generation: Any, entries: Any, *others: Any) -> Any:
        for entry in entries:
            entry.generation = scope.generation
        return publish(pool, scope, scope.generation, entries, *others)

    patch.setattr(writing, "_publish", with_the_epoch_of_now)


def test_a_write_that_did_not_compare_epochs_would_bring_back_what_a_clear_has_ended() -> None:
    shown_by(what_is_left_of_a_write_that_was_cleared_while_it_copied, (False, None), without_comparing_epochs)


def two_keys_read_while_both_are_written() -> set[tuple[float | None, ...]]:
    """What a gather may see: between the locks of a publication, and after it."""
    pool = GatedPool(4, shards=2, wait_timeout=JOIN_SECONDS)
    first, second = 0, 1  # in different shards
    rows = torch.cat([filled(number).keys for number in (1, 1)], dim=1)
    pool.put_many([first, second], type(filled(0))(rows, rows))
    pool.gated_locks.gate = gate = Gate()
    write = Background(lambda: pool.put_many([first, second], type(filled(0))(rows + 1, rows + 1)))
    assert gate.entered.wait(JOIN_SECONDS)
    seen = set()

    def look() -> None:
        with pool.gather([first, second], room=0) as batch:
            seen.add(tuple(batch.data[0, :, 0, 0, 0].tolist()))

    look()
    between = getattr(pool.gated_locks, "between", None)
    gate.opened.set()
    if between is not None:
        assert between.entered.wait(JOIN_SECONDS)
        look()
        between.opened.set()
    write.result()
    look()
    return seen


def publishing_shard_by_shard(patch: pytest.MonkeyPatch) -> None:
    publish = writing._publish
    gate = Gate()

    def one_at_a_time(
        pool: Any, scope: Any, generation: Any, entries: Any, plan: Any, located: Any, grant: Any, deadline: Any
    ) -> Any:
        if len(entries) < 2 or not pool.gated_locks.gate:
            return publish(pool, scope, generation, entries, plan, located, grant, deadline)
        first, second = [scope.locate([key_hash]) for key_hash in plan.hashes]
        with pool.storage.locks.write(first.shards, deadline), pool.storage.ledger.mutex:
            plan.make(pool.storage.ledger, entries, grant.taken)
            first.parts[0].put(entries[0])
        gate.pass_through()
        with pool.storage.locks.write(second.shards, deadline), pool.storage.ledger.mutex:
            second.parts[0].put(entries[1])
        grant.spent = True
        return None

    patch.setattr(writing, "_publish", one_at_a_time)
    patch.setattr("tests.threading_support.GatedLocks.between", gate, raising=False)


def test_a_batch_published_shard_by_shard_would_be_seen_half() -> None:
    shown_by(two_keys_read_while_both_are_written, {(1.0, 1.0), (2.0, 2.0)}, publishing_shard_by_shard)


# --- locks and waits ------------------------------------------------------------------------------------------------


def read_during_a_copy_into_the_same_shard() -> float | None:
    pool = GatedPool(2)
    pool.put("key", filled(1))
    with pool.gated.hold_up("scatter") as gate:
        put = Background(lambda: pool.put("key", filled(2)))
        assert gate.entered.wait(JOIN_SECONDS)
        try:
            read = value_of(pool.get("key", timeout=guards.patience()))
        finally:
            gate.opened.set()
            put.result()
    return read


def copying_under_the_shards_lock(patch: pytest.MonkeyPatch) -> None:
    hold_up = GatedPool.__init__

    def with_locked_copies(self: GatedPool, *arguments: Any, **options: Any) -> None:
        hold_up(self, *arguments, **options)
        scatter, locks = self.gated.scatter, self.gated_locks

        def locked(*copied: Any, **more: Any) -> Any:
            with ShardedRWLock.write(locks, range(locks.count), Deadline(JOIN_SECONDS)):
                return scatter(*copied, **more)

        self.gated.scatter = locked  # type: ignore[method-assign]

    patch.setattr(GatedPool, "__init__", with_locked_copies)


def test_a_copy_under_a_lock_would_stop_every_reader_of_the_shard() -> None:
    shown_by(read_during_a_copy_into_the_same_shard, 1.0, copying_under_the_shards_lock)


def a_put_that_waits_for_a_pin() -> object:
    pool = GatedPool(1, wait_timeout=guards.patience())
    pool.put("key", filled(1))
    handle = pool.pin("key")
    put = Background(lambda: pool.put("new", filled(2)))
    assert pool.waits.wait(JOIN_SECONDS)
    handle.close()
    return put.result()


def without_waking(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ledger, "wake", lambda waiters: None)


def test_a_release_that_woke_nobody_would_leave_a_writer_waiting_for_room_that_is_there() -> None:
    shown_by(a_put_that_waits_for_a_pin, True, without_waking)


class ReentryError(Exception):
    """The thread has the lock already: a plain lock would wait for ever."""


class NoReentryLock:
    """A plain lock that says so instead of hanging when its own thread takes it again."""

    def __init__(self, lock: Any) -> None:
        self._lock, self._owner = lock, 0

    def __enter__(self) -> None:
        if self._owner == threading.get_ident():
            raise ReentryError
        self._lock.acquire()
        self._owner = threading.get_ident()

    def __exit__(self, *error: object) -> None:
        self._owner = 0
        self._lock.release()


def errors_of_a_pin_that_is_dropped_under_the_mutex() -> list[type[BaseException]]:
    pool = GatedPool(1)
    pool.put("key", filled(1))
    pool.storage.ledger.mutex = NoReentryLock(pool.storage.ledger.mutex)
    handles = [pool.pin("key")]
    errors: list[type[BaseException]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "unraisablehook", lambda error: errors.append(error.exc_type))
        with pool.storage.ledger.mutex:
            handles.clear()
    if not errors:
        assert pool.put("new", filled(2))
        pool.check_integrity()
    return errors


def finalisers_that_release(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(pin.Pin, "__del__", lambda self: self.close())


def test_a_finaliser_that_released_would_wait_for_the_mutex_its_own_thread_holds() -> None:
    shown_by(errors_of_a_pin_that_is_dropped_under_the_mutex, [], finalisers_that_release)
