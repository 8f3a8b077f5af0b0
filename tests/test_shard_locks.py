"""Shard locks of both kinds: who waits goes first, who gives up holds up no one, and nothing is kept after an error."""

from __future__ import annotations

import gc
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import pytest

from concurrent_kv import WaitTimeoutError
from concurrent_kv.locks import contention
from concurrent_kv.locks.deadline import Caller, Deadline, caller
from concurrent_kv.locks.shards import ShardLocks, new_locks
from concurrent_kv.native import native
from tests.interrupting import cut_at
from tests.support import LOOPS, loops_of
from tests.threading_support import JOIN_SECONDS, Background

compiled = pytest.mark.skipif(native is None, reason="the package was built without compiled locks")
LONG = partial(Deadline, JOIN_SECONDS)
AT_ONCE = partial(Deadline, 0.0)


@pytest.fixture(params=LOOPS)
def locks(request: pytest.FixtureRequest) -> ShardLocks:
    with loops_of(request.param):
        return new_locks(4, name="pool")


class Waiting(Background):
    """A thread that waits for shards, and then notes its name and lets go."""

    def __init__(self, locks: ShardLocks, kind: str, name: str, noted: list[str], shards: Any = (0,)) -> None:
        before = locks.held

        def work() -> None:
            with getattr(locks, kind)(shards, LONG()):
                noted.append(name)

        super().__init__(work)
        until(lambda: locks.held > before)
        # A turn more, in which it joins the queue or has told that it found the shard busy.
        until(lambda: is_refused(locks, "write"))


def until(condition: Callable[[], bool]) -> None:
    end = threading.Event()
    for _ in range(int(JOIN_SECONDS * 1000)):
        if condition():
            return
        end.wait(0.001)
    raise AssertionError("it does not happen")


def is_refused(locks: ShardLocks, kind: str, shards: Any = (0,)) -> bool:
    try:
        with getattr(locks, kind)(shards, AT_ONCE()):
            return False
    except WaitTimeoutError:
        return True


def check_free(locks: ShardLocks) -> None:
    """All of it can be had for writing at once, and nothing is counted as held."""
    with locks.write(range(locks.count), AT_ONCE()):
        pass
    assert locks.held == 0


@contextmanager
def held(locks: ShardLocks, kind: str, shards: Any = (0,)) -> Iterator[None]:
    with getattr(locks, kind)(shards, AT_ONCE()):
        yield


def test_a_storage_has_compiled_locks_where_there_are_some() -> None:
    assert (type(new_locks(1, name="pool")).__module__ == "concurrent_kv._native") is (native is not None)


def test_a_scheduler_s_locks_are_used_where_it_has_some() -> None:
    made: list[Any] = []

    def make() -> Any:
        made.append(threading.Lock())
        return made[-1]

    with new_locks(1, name="pool", lock_factory=make).write((0,), AT_ONCE()):
        assert any(lock.locked() for lock in made)


@compiled
def test_compiled_locks_let_those_that_wait_in_one_after_the_other_as_they_asked_and_readers_together() -> None:
    locks = native.ShardLocks(1, contention.Contention("pool"))
    noted: list[str] = []
    with ExitStack() as stack, held(locks, "write"):
        for name in "abcdef":
            stack.callback(Waiting(locks, "write" if name in "ad" else "read", name, noted).result)
        assert noted == []
    assert noted[0] == "a"
    assert set(noted[1:3]) == {"b", "c"}
    assert noted[3] == "d"
    assert set(noted[4:]) == {"e", "f"}
    check_free(locks)


def test_a_reader_that_comes_after_a_waiting_writer_waits_and_is_let_in_when_that_gives_up(locks: ShardLocks) -> None:
    noted: list[str] = []
    with held(locks, "read"):
        leaving = Caller()

        def write_in_vain() -> None:
            caller.set(leaving)
            with pytest.raises(WaitTimeoutError), locks.write((0,), LONG()):
                pass

        writer = Background(write_in_vain)
        until(lambda: is_refused(locks, "read"))
        reader = Waiting(locks, "read", "reader", noted)
        assert noted == []
        leaving.left = True  # it looks now and then
        writer.result()
        reader.result()
        assert noted == ["reader"]
    check_free(locks)


@pytest.mark.parametrize("kind", ["read", "write"])
def test_who_has_some_of_its_shards_and_waits_in_vain_for_another_keeps_none(locks: ShardLocks, kind: str) -> None:
    with held(locks, "write", (2,)):
        assert is_refused(locks, kind, (0, 1, 2, 3))
        for shard in (0, 1, 3):
            assert not is_refused(locks, "write", (shard,))
    check_free(locks)


@compiled
def test_who_waited_in_vain_keeps_nothing_while_its_hold_lives() -> None:
    locks = native.ShardLocks(2, contention.Contention("pool"))
    with held(locks, "write", (1,)):
        hold = locks.write((0, 1), AT_ONCE())
        with pytest.raises(WaitTimeoutError):
            hold.__enter__()
        assert locks.held == 1
        assert not is_refused(locks, "write", (0,))
    check_free(locks)
    with hold:  # once more
        assert locks.held == 1
    check_free(locks)


@compiled
@pytest.mark.parametrize("kind", ["read", "write"])
def test_who_waits_is_woken_when_it_is_let_in(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contention, "LOOK_SECONDS", 10 * JOIN_SECONDS)  # no look of its own comes in time
    locks, noted = new_locks(1, name="pool"), list[str]()
    with held(locks, "write"):
        waiting = Waiting(locks, kind, "waiting", noted)
    waiting.result()
    assert noted == ["waiting"]


def test_waits_are_counted_and_named(locks: ShardLocks) -> None:
    said = r"pool: shard 1 was not free for reading within 0.01 s"
    with (
        held(locks, "write", (1,)),
        pytest.raises(WaitTimeoutError, match=said),
        locks.read((0, 1), Deadline(0.01)),
    ):
        pass
    count, seconds = locks.contention.read()
    assert count == 1
    assert seconds >= 0.01
    locks.contention.reset()
    assert locks.contention.read() == (0, 0.0)


def test_an_error_inside_lets_go(locks: ShardLocks) -> None:
    with pytest.raises(ArithmeticError), locks.write((0, 3), AT_ONCE()):
        raise ArithmeticError
    check_free(locks)


def test_a_call_that_is_not_entered_holds_nothing(locks: ShardLocks) -> None:
    hold = locks.write((0, 1), AT_ONCE())
    check_free(locks)
    del hold
    check_free(locks)


@compiled
def test_a_compiled_hold_that_dies_without_having_left_lets_go() -> None:
    """CPython 3.13 can leave a `with` so, where an exception is raised at a jump back."""
    locks = native.ShardLocks(2, contention.Contention("pool"))
    hold = locks.write((0, 1), AT_ONCE())
    hold.__enter__()
    assert is_refused(locks, "read")
    del hold
    check_free(locks)


@compiled
def test_a_compiled_hold_that_a_circle_keeps_lets_go_when_that_is_collected() -> None:
    class Naming(Deadline):
        hold: Any

    locks, deadline = native.ShardLocks(1, contention.Contention("pool")), Naming(0.0)
    deadline.hold = locks.write((0,), deadline)
    deadline.hold.__enter__()
    del deadline
    gc.collect()
    check_free(locks)


@pytest.mark.parametrize("kind", ["read", "write"])
def test_a_hold_is_entered_once_and_left_once(locks: ShardLocks, kind: str) -> None:
    hold = getattr(locks, kind)((0, 1), AT_ONCE())
    hold.__exit__(None, None, None)
    assert locks.held == 0
    with hold:
        with pytest.raises(RuntimeError, match="held already"):
            hold.__enter__()
        assert is_refused(locks, "write", (1,))
    hold.__exit__(None, None, None)
    check_free(locks)


def test_a_hold_that_waits_in_another_thread_is_neither_entered_nor_left(locks: ShardLocks) -> None:
    hold, noted = locks.write((0, 1), LONG()), list[str]()

    def wait() -> None:
        with hold:
            noted.append("inside")

    with held(locks, "write", (1,)):
        waiting = Background(wait)
        until(lambda: is_refused(locks, "read", (0,)))
        with pytest.raises(RuntimeError, match="held already"):
            hold.__enter__()
        with pytest.raises(RuntimeError, match="still waited for"):
            hold.__exit__(None, None, None)
        assert noted == []
    waiting.result()
    assert noted == ["inside"]
    check_free(locks)


@compiled
def test_a_compiled_hold_that_does_not_wait_says_so_at_once() -> None:
    locks = native.ShardLocks(1, contention.Contention("pool"))
    with held(locks, "write"):
        hold = locks.write((0,), AT_ONCE())
        with pytest.raises(WaitTimeoutError):
            hold.__enter__()
        assert hold.wait(10 * JOIN_SECONDS)


@compiled
def test_a_shard_that_a_collection_hands_over_just_before_its_wait_begins_is_named() -> None:
    """CPython up to 3.11 may collect, and so run any finaliser, where the wait is about to be called."""
    asked: list[object] = []

    class Asked(contention.Contention):
        def wait_until(self, is_free: Any, shard: int, write: bool, deadline: Deadline) -> None:
            asked.append(shard)
            holder.__exit__(None, None, None)

    locks = native.ShardLocks(2, Asked("pool"))
    holder, waiting = locks.write((1,), AT_ONCE()), locks.read((0, 1), AT_ONCE())
    holder.__enter__()
    enter, threshold = waiting.__enter__, gc.get_threshold()

    def hand_over(phase: str, info: object) -> None:
        if locks.held == 2:
            holder.__exit__(None, None, None)

    gc.callbacks.append(hand_over)
    gc.set_threshold(1)
    try:
        enter()
    finally:
        gc.set_threshold(*threshold)
        gc.callbacks.remove(hand_over)
    waiting.__exit__(None, None, None)
    assert asked == [1]
    check_free(locks)


@compiled
@pytest.mark.parametrize("kind", ["read", "write"])
def test_who_is_cut_off_anywhere_in_its_wait_keeps_nothing(kind: str) -> None:
    """Also where the shard is handed over meanwhile: it may be the last that the wait hears."""
    for free_after in (False, True):
        number = 0
        while True:
            number += 1
            locks = native.ShardLocks(2, contention.Contention("pool"))
            noted: list[str] = []

            def wait() -> None:
                with pytest.raises(WaitTimeoutError), getattr(locks, kind)((0, 1), Deadline(0.01)):  # noqa: B023
                    raise WaitTimeoutError("it was free")

            with ExitStack() as stack:
                with held(locks, "write", (1,)):
                    behind = Background(lambda: take(locks, noted))  # noqa: B023
                    stack.callback(behind.result)
                    if free_after:
                        until(lambda: locks.held == 2)  # noqa: B023
                        break_off = Background(lambda: cut_at(number, wait, {contention.__file__}))  # noqa: B023
                    else:
                        again = cut_at(number, wait, {contention.__file__})
                if free_after:
                    again = break_off.result()
            check_free(locks)
            if not again:
                break
        assert number > 5


def take(locks: ShardLocks, noted: list[str]) -> None:
    with locks.write((0, 1), LONG()):
        noted.append("taken")


@compiled
def test_a_signal_handler_s_error_ends_a_wait() -> None:
    locks = new_locks(1, name="pool")

    def handler(number: int, frame: object) -> None:
        raise ArithmeticError("of the handler")

    before = signal.signal(signal.SIGUSR1, handler)
    inside, over = threading.Event(), threading.Event()

    def hold() -> None:
        with locks.write((0,), AT_ONCE()):
            inside.set()
            assert over.wait(JOIN_SECONDS)

    holder = Background(hold)
    try:
        assert inside.wait(JOIN_SECONDS)
        main = threading.main_thread().ident
        assert main is not None

        def send() -> None:
            until(lambda: locks.held == 2)
            signal.pthread_kill(main, signal.SIGUSR1)

        sender = Background(send)
        with pytest.raises(ArithmeticError, match="of the handler"), locks.read((0,), LONG()):
            pass
        sender.result()
        assert locks.held == 1
    finally:
        signal.signal(signal.SIGUSR1, before)
        over.set()
        holder.result()
    check_free(locks)


@compiled
@pytest.mark.parametrize(
    ("shards", "error"),
    [
        ((-1,), IndexError),
        ((4,), IndexError),
        ((1, 0), ValueError),
        ((1, 1), ValueError),
        (("0",), TypeError),
        (5, TypeError),
        ((2**70,), OverflowError),
    ],
)
def test_compiled_locks_refuse_shards_that_are_none(shards: Any, error: type[Exception]) -> None:
    locks = native.ShardLocks(4, contention.Contention("pool"))
    with pytest.raises(error):
        locks.read(shards, AT_ONCE())
    check_free(locks)


@compiled
def test_compiled_locks_refuse_wrong_calls() -> None:
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        native.ShardLocks(0, contention.Contention("pool"))
    locks = native.ShardLocks(1, contention.Contention("pool"))
    with pytest.raises(TypeError):
        locks.read((0,))
    with pytest.raises(TypeError):
        native.Held()
    hold = locks.write((0,), AT_ONCE())
    with hold:
        with pytest.raises(RuntimeError, match="held already"):
            hold.__enter__()
        assert is_refused(locks, "read")
    with pytest.raises(TypeError):
        hold.wait("soon")
    check_free(locks)


@compiled
def test_a_wait_that_ends_without_the_shard_is_an_error() -> None:
    class Impatient:
        def wait_until(self, *arguments: object) -> None:
            """Returns before `is_free` has said so."""

    locks: Any = native.ShardLocks(1, Impatient())
    with (
        locks.write((0,), AT_ONCE()),
        pytest.raises(RuntimeError, match="before the shard was free"),
        locks.read((0,), AT_ONCE()),
    ):
        pass
    check_free(locks)
