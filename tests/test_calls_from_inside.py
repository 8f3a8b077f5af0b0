"""Calls from inside the library's own critical sections: finalisers, signal handlers, keys and policies work or raise.

Nothing keeps Python from running them there. What must not happen is that they wait for their own thread.
"""

from __future__ import annotations

import ast
import gc
import pathlib
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import anyio
import pytest

import concurrent_kv
from concurrent_kv import (
    AsyncKVPool,
    ClosedError,
    InvalidTypeError,
    KVCacheManager,
    KVPool,
    PoolStats,
    ReentrantCallError,
    Search,
)
from concurrent_kv.aio import OffloadStats
from concurrent_kv.evaluation import Evaluator, Leaf
from concurrent_kv.eviction import FIFO
from concurrent_kv.locks.gate import _CompiledGate, _LockOfThread, gate
from concurrent_kv.locks.signal import Signal
from tests.native_support import needs_native
from tests.support import LAYOUT, append, assert_same, config, tokens
from tests.threading_support import JOIN_SECONDS, Background, run_threads

PACKAGE = pathlib.Path(concurrent_kv.__file__).parent


@pytest.fixture
def pool() -> Iterator[KVPool]:
    made = KVPool(LAYOUT, max_entries=4, wait_timeout=5.0)
    made.put("old", tokens(1, 3))
    yield made
    made.check_integrity()
    made.close()


@pytest.fixture
def manager() -> Iterator[KVCacheManager]:
    made = KVCacheManager(config(), env_num=2, wait_timeout=5.0)
    made.set_init_cache(0, "root", tokens(1, 3))
    yield made
    made.check_integrity()
    made.close()


@contextmanager
def inside_the_mutex(pool: KVPool) -> Iterator[None]:
    with gate.lock, pool.storage.ledger.mutex:
        yield


@contextmanager
def inside_a_shard(pool: KVPool) -> Iterator[None]:
    deadline = pool.storage.enter()
    with gate.lock, pool.storage.locks.write(range(pool.storage.locks.count), deadline):
        yield


@contextmanager
def inside_a_leaf(pool: KVPool) -> Iterator[None]:
    with gate.lock, pool.storage.tensor.buffers._lock:
        yield


@contextmanager
def inside_the_counters(pool: KVPool) -> Iterator[None]:
    with gate.lock, pool.storage.locks.contention._lock:
        yield


@contextmanager
def inside_the_flights(pool: KVPool) -> Iterator[None]:
    with gate.lock, pool.flights._lock:
        yield


INSIDE = (inside_the_mutex, inside_a_shard, inside_a_leaf, inside_the_counters, inside_the_flights)


def from_inside(inside: Callable[[Any], Any], pool: Any, call: Callable[[], object]) -> object:
    """What `call` returns, or the `ReentrantCallError` it raises, from inside a critical section of its thread."""

    def run() -> object:
        with inside(pool):
            try:
                return call()
            except ReentrantCallError as error:
                return error

    return Background(run).result()


# Every public call ---------------------------------------------------------------------------------------------------


CALLS: dict[str, tuple[Any, ...]] = {
    "bump_version": (),
    "check_integrity": (),
    "clear": (),
    "close": (),
    "contains": ("old",),
    "count_misses": (1,),
    "drop_scope": ("other",),
    "gather": (["old"],),
    "get": ("old",),
    "get_or_compute": ("old", lambda: tokens(1, 3)),
    "keys": (),
    "load": ("never.snapshot",),
    "peek": ("old",),
    "pin": ("old",),
    "pop": ("old",),
    "put": ("new", tokens(2, 3)),
    "put_many": (["new"], tokens(2, 3)),
    "repair": (),
    "reset_stats": (),
    "save": ("never.snapshot",),
    "scope": ("other",),
    "scopes": (),
    "side": ("old",),
    "try_claim": ("other",),
}


@pytest.mark.parametrize("inside", INSIDE)
@pytest.mark.parametrize("name", sorted(CALLS))
def test_what_would_take_a_lock_raises_at_once_and_says_what_to_call(
    pool: KVPool, inside: Callable[[KVPool], Any], name: str
) -> None:
    error = from_inside(inside, pool, lambda: getattr(pool, name)(*CALLS[name]))
    assert isinstance(error, ReentrantCallError), error
    assert pool.name in str(error)
    assert "discard" in str(error)
    assert_same(pool.get("old"), tokens(1, 3))


@pytest.mark.parametrize("inside", INSIDE)
def test_what_needs_no_lock_works(pool: KVPool, inside: Callable[[KVPool], Any]) -> None:
    calls: tuple[Callable[[], object], ...] = (
        lambda: len(pool),
        pool.stats,
        pool.tier_stats,
        lambda: pool.closed,
        lambda: repr(pool),
        pool.allocation,
        pool.storage.locks.contention.read,
        pool.lifetime_stats,
        lambda: len(pool.flights),
        AsyncKVPool(pool).offload_stats,
    )
    found = [from_inside(inside, pool, call) for call in calls]
    assert not [each for each in found if isinstance(each, Exception)]
    assert found[0] == 1
    stats = found[1]
    assert isinstance(stats, PoolStats)
    assert stats.entries == 1
    assert isinstance(found[-1], OffloadStats)


@pytest.mark.parametrize("inside", INSIDE)
def test_every_public_method_is_known_to_these_tests(inside: Callable[[KVPool], Any]) -> None:
    methods = {name for name in type.__dir__(KVPool) if not name.startswith("_") and callable(getattr(KVPool, name))}
    need_no_lock = {
        "allocation",
        "allocation_for",
        "discard",
        "lifetime_stats",
        "stats",
        "tier_stats",
        "commit",
    }  # a commit: below, it needs a batch
    internal = {"check_open", "end_searches", "lifetime_now", "registered_scopes", "renew", "stats_now"}
    assert methods - need_no_lock - internal == set(CALLS)


@pytest.mark.parametrize("inside", INSIDE)
def test_the_calls_of_a_manager_raise_or_work(manager: KVCacheManager, inside: Callable[[KVPool], Any]) -> None:
    pool = manager.recur_pool
    raising: tuple[Callable[[], object], ...] = (
        lambda: manager.search([0]),
        lambda: manager.set_recur_cache("key", tokens(1, 2)),
        lambda: manager.get_init_cache(0, "root"),
        lambda: manager.hierarchical_get(0, "root"),
        manager.clear_all,
        manager.bump_version,
        manager.close,
        manager.storage.close,
        manager.reset_stats,
        manager.check_integrity,
        manager.repair,
        lambda: manager.save("never.snapshot"),
        lambda: manager.load("never.snapshot"),
    )
    for call in raising:
        assert isinstance(from_inside(inside, pool, call), ReentrantCallError)
    assert not isinstance(from_inside(inside, pool, manager.get_stats_summary), Exception)
    assert not isinstance(from_inside(inside, pool, lambda: repr(manager)), Exception)
    assert manager.get_init_cache(0, "root") is not None


@pytest.mark.parametrize("inside", INSIDE)
def test_the_calls_of_a_search_raise_or_work(manager: KVCacheManager, inside: Callable[[KVPool], Any]) -> None:
    pool = manager.recur_pool
    with manager.search([0]) as search:
        batch = search.gather(["root"], [0])
        append(batch, [2])
        raising: tuple[Callable[[], object], ...] = (
            lambda: search.gather(["root"], [0]),
            lambda: search.commit(["child"], batch),
            lambda: search.release(["child"]),
            lambda: search.keep([]),
            lambda: search.promote("root", 0),
            lambda: search.contains("child"),
            search.keys,
        )
        for call in raising:
            assert isinstance(from_inside(inside, pool, call), ReentrantCallError)
        for works in (lambda: len(search), lambda: search.closed, lambda: repr(search), lambda: repr(batch)):
            assert not isinstance(from_inside(inside, pool, works), Exception)
        search.commit(["child"], batch)
        assert search.keys() == ["child"]


@contextmanager
def inside_the_leaves(evaluator: Evaluator[Any, Any]) -> Iterator[None]:
    with gate.lock, evaluator.queue._lock:
        yield


@pytest.mark.parametrize("own_thread", [False, True])
def test_the_calls_of_an_evaluator_raise_work_or_leave_a_note(manager: KVCacheManager, own_thread: bool) -> None:
    nonsense: Any = {}.get
    made: Any = Evaluator(manager, nonsense, max_wait_seconds=JOIN_SECONDS, own_thread=own_thread)
    others, leaving = made.worker(), made.worker()
    with manager.search([0]) as search:
        leaf = Leaf(search, "root", "child", None, 0)
        raising: tuple[Callable[[], object], ...] = (
            made.worker,
            lambda: made.evaluate(leaf),
            lambda: made.evaluate_many([leaf]),
            lambda: made.run(each for each in [leaf]),
            lambda: others.evaluate(leaf),
        )
        for call in raising:
            assert isinstance(from_inside(inside_the_leaves, made, call), ReentrantCallError)
        waits = Background(lambda: others.evaluate(leaf))
        while not made.queue.waiting_rows:
            pass
        for works in (made.stats, lambda: made.closed, lambda: made.queue.waiting_rows):
            assert not isinstance(from_inside(inside_the_leaves, made, works), Exception)
        # All workers wait, now that one has left: the model is called, and answers nonsense.
        assert from_inside(inside_the_leaves, made, leaving.close) is None
        with pytest.raises(InvalidTypeError, match="must return an Evaluated"):
            waits.result()
        another = made.worker()
        waits = Background(lambda: others.evaluate(leaf))
        while not made.queue.waiting_rows:
            pass
        assert from_inside(inside_the_leaves, made, made.close) is None
        with pytest.raises(ClosedError):
            waits.result()
        another.close()


@pytest.mark.parametrize("inside", INSIDE)
def test_the_counts_of_a_facade_are_had_inside(pool: KVPool, inside: Callable[[KVPool], Any]) -> None:
    facade = AsyncKVPool(pool)
    assert isinstance(from_inside(inside, pool, facade.offload_stats), OffloadStats)


@pytest.mark.parametrize("inside", INSIDE)
@pytest.mark.parametrize("name", ["clear", "bump_version", "close", "repair", "check_integrity", "get"])
def test_a_loop_that_is_run_inside_hands_nothing_to_a_worker(
    pool: KVPool, inside: Callable[[KVPool], Any], name: str
) -> None:
    facade = AsyncKVPool(pool)
    arguments = ("old",) if name == "get" else ()

    async def call() -> object:
        return await getattr(facade, name)(*arguments)

    assert isinstance(from_inside(inside, pool, lambda: anyio.run(call)), ReentrantCallError)
    assert not pool.closed


@pytest.mark.parametrize("inside", INSIDE)
def test_a_claim_is_neither_fulfilled_nor_failed_inside(pool: KVPool, inside: Callable[[KVPool], Any]) -> None:
    claim = pool.try_claim("new")
    calls: tuple[Callable[[], object], ...] = (
        lambda: claim.fulfil(tokens(1, 2)),
        lambda: claim.pass_on(tokens(1, 2)),
        lambda: claim.fail(ValueError("none")),
    )
    for call in calls:
        assert isinstance(from_inside(inside, pool, call), ReentrantCallError)
    assert not claim.over
    claim.abandon()


def test_a_finaliser_that_runs_while_a_threads_gate_is_made_gets_that_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    plain = threading.RLock
    in_python = _LockOfThread()

    def make() -> Any:
        if not made:  # as if the collector ran in here
            made.append(None)
            made.append(in_python.lock)
        return plain()

    def first_use() -> bool:
        monkeypatch.setattr("concurrent_kv.locks.gate.threading.RLock", make)
        try:
            return in_python.lock is made[1]
        finally:
            monkeypatch.undo()

    assert Background(first_use).result()


def test_another_pool_than_the_one_whose_lock_is_held_raises_too(pool: KVPool) -> None:
    # Two threads, each in one pool with a finaliser that calls the other's, would wait for each other for good.
    other = KVPool(LAYOUT, max_entries=4)
    error = from_inside(inside_the_mutex, pool, lambda: other.get("key"))
    assert isinstance(error, ReentrantCallError)
    other.close()


@pytest.mark.parametrize("kind", [_LockOfThread, pytest.param(_CompiledGate, marks=needs_native)])
def test_a_gate_is_entered_by_each_thread_for_itself_and_as_often_as_it_is_left(kind: Callable[[], Any]) -> None:
    entered = kind()
    with entered.lock, entered.lock:
        assert entered.is_inside
        assert not Background(lambda: entered.is_inside).result()
        with entered.lock:
            pass
        assert entered.is_inside
    assert not entered.is_inside
    with pytest.raises(RuntimeError):
        entered.lock.__exit__(None, None, None)
    assert not entered.is_inside


def test_another_thread_is_not_inside(pool: KVPool) -> None:
    with gate.lock:
        assert Background(lambda: pool.get("old")).result() is not None


# Handles and notes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inside", INSIDE)
def test_a_handle_closed_inside_is_closed_by_the_next_operation(
    manager: KVCacheManager, inside: Callable[[KVPool], Any]
) -> None:
    pool = manager.recur_pool
    pool.put("key", tokens(1, 2))
    pin = pool.pin("key")
    batch = pool.gather(["key"])
    search = manager.search([0])
    claim = pool.try_claim("claimed")
    for close in (pin.close, batch.close, search.close, claim.abandon):
        assert from_inside(inside, pool, close) is None
    pool.get("key")
    assert batch.closed
    assert search.closed
    assert claim.over
    assert manager.check_integrity().handles == 0


@pytest.mark.parametrize("inside", INSIDE)
def test_a_discarded_key_is_removed_by_the_next_operation(pool: KVPool, inside: Callable[[KVPool], Any]) -> None:
    assert from_inside(inside, pool, lambda: pool.discard("old")) is None
    assert pool.get("old") is None
    assert len(pool) == 0


def test_a_discard_in_a_scope_that_was_dropped_does_nothing(pool: KVPool) -> None:
    scope = pool.scope("dropped")
    pool.put("old", tokens(5, 2), scope=scope)
    pool.drop_scope(scope)
    pool.discard("old", scope=scope)  # as a finaliser, which may come late
    assert pool.get("old") is not None


def test_an_entry_stored_after_the_discard_stays(pool: KVPool) -> None:
    pool.discard("old")
    pool.discard("new")  # there is none yet
    # As on an event loop's own thread, which leaves the notes to others.
    noted, pool.storage.ledger.abandoned = pool.storage.ledger.abandoned, type(pool.storage.ledger.abandoned)()
    pool.put("old", tokens(5, 2))
    pool.put("new", tokens(6, 2))
    pool.storage.ledger.abandoned = noted
    assert_same(pool.get("old"), tokens(5, 2))
    assert_same(pool.get("new"), tokens(6, 2))
    assert not noted


def test_what_was_discarded_and_cannot_be_compared_any_more_does_not_fail_others(
    pool: KVPool, caplog: pytest.LogCaptureFixture
) -> None:
    class Key:
        broken = False

        def __hash__(self) -> int:
            if self.broken:
                raise ValueError("this key is broken")
            return 5

    key = Key()
    pool.put(key, tokens(3, 2))
    pool.discard(key)
    Key.broken = True
    assert_same(pool.get("old"), tokens(1, 3))
    Key.broken = False
    pool.pop(key)


def test_a_search_releases_what_was_discarded(manager: KVCacheManager) -> None:
    with manager.search([0]) as search:
        batch = search.gather(["root"], [0])
        append(batch, [2])
        search.commit(["child"], batch)
        assert from_inside(inside_the_mutex, manager.recur_pool, lambda: search.discard("child")) is None
        assert search.keys() == []


# Where such calls come from ------------------------------------------------------------------------------------------


class Node:
    """Part of a cycle, which only the collector finds."""

    def __init__(self) -> None:
        self.itself = self


@pytest.mark.parametrize("called", ["pop", "get", "stats", "discard", "len"])
def test_finalisers_that_the_collector_runs_anywhere_never_stop_the_process(called: str) -> None:
    pool = KVPool(LAYOUT, max_entries=16, wait_timeout=JOIN_SECONDS)
    refused = []

    def call(key: int) -> None:
        try:
            if called == "len":
                len(pool)
            elif called == "stats":
                pool.stats()
            else:
                getattr(pool, called)(key)
        except ReentrantCallError as error:
            refused.append(error)

    def work() -> None:
        for key in range(300):
            node = Node()
            weakref.finalize(node, call, key)
            del node
            pool.put(key, tokens(key % 8, 1 + key % 3))

    before = gc.get_threshold()
    gc.set_threshold(1)
    try:
        run_threads(work, work)
    finally:
        gc.set_threshold(*before)
    gc.collect()
    if called in ("stats", "discard", "len"):
        assert not refused
    pool.check_integrity()
    pool.close()


@pytest.mark.skipif(sys.platform == "win32", reason="no thread can send a signal to another on Windows")
@pytest.mark.parametrize("called", ["stats", "get", "discard"])
def test_signal_handlers_that_call_a_pool_never_stop_the_process(pool: KVPool, called: str) -> None:
    main = threading.get_ident()
    handled = 0

    def handle(number: int, frame: object) -> None:
        nonlocal handled
        handled += 1
        with suppress(ReentrantCallError):
            pool.stats() if called == "stats" else getattr(pool, called)("old")

    over = threading.Event()

    def send() -> None:
        while not over.is_set():
            count = handled
            signal.pthread_kill(main, signal.SIGUSR1)
            while handled == count and not over.is_set():
                over.wait(1e-4)

    before = signal.signal(signal.SIGUSR1, handle)
    sender = threading.Thread(target=send, daemon=True)
    try:
        sender.start()
        puts = 0
        while handled < 100:
            pool.put("old" if puts % 2 else puts, tokens(puts % 8, 2))
            puts += 1
    finally:
        over.set()
        sender.join(JOIN_SECONDS)
        signal.signal(signal.SIGUSR1, before)
    pool.put("old", tokens(1, 3))


class CallingKey:
    """A key whose comparison calls the pool."""

    def __init__(self, call: Callable[[], object]) -> None:
        self.call = call

    def __hash__(self) -> int:
        return 7

    def __eq__(self, other: object) -> bool:
        self.call()
        return self is other


def test_a_keys_comparison_that_calls_the_pool_hears_so(pool: KVPool) -> None:
    calling = CallingKey(lambda: pool.get("old"))  # the key that is stored compares itself
    pool.put(calling, tokens(1, 2))
    with pytest.raises(ReentrantCallError):
        Background(lambda: pool.get(CallingKey(lambda: None))).result()
    calling.call = pool.stats
    assert Background(lambda: pool.get(CallingKey(lambda: None))).result() is None


def test_a_policy_that_calls_its_pool_hears_so() -> None:
    heard = []

    class Calling(FIFO[Any]):
        def add(self, entry: Any) -> None:
            super().add(entry)
            try:
                made.get("key")
            except ReentrantCallError as error:
                heard.append(error)

    made: KVPool = KVPool(LAYOUT, max_entries=2, policy=Calling(capacity=2))
    Background(lambda: made.put("key", tokens(1, 2))).result()
    assert len(heard) == 1
    made.check_integrity()
    made.close()


# Bounded waits -------------------------------------------------------------------------------------------------------


def test_a_wait_that_is_over_before_it_begins_ends() -> None:
    # `SimpleQueue.get(timeout=)` of CPython 3.10 to 3.12 can block for ever there.
    stop = threading.Event()

    def busy() -> None:
        while not stop.is_set():
            pass

    def wait() -> None:
        for number in range(300):
            assert not Signal().wait(0.0)
            assert not Signal().wait(-1.0)
            assert not Signal().wait(1e-6 * (number % 60))

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    spinning = [threading.Thread(target=busy, daemon=True) for _ in range(2)]
    try:
        for thread in spinning:
            thread.start()
        run_threads(wait)
    finally:
        stop.set()
        sys.setswitchinterval(before)
        for thread in spinning:
            thread.join(JOIN_SECONDS)


def test_a_signal_stays_set_and_may_be_set_by_several_threads() -> None:
    signals = [Signal() for _ in range(200)]

    def set_all() -> None:
        for each in signals:
            each.set()

    def wait_for_all() -> None:
        for each in signals:
            assert each.wait(JOIN_SECONDS)
            assert each.wait(0.0)

    run_threads(set_all, set_all, wait_for_all, wait_for_all)


def test_a_signal_is_set_while_another_waiter_is_on_its_way_out() -> None:
    passed_on = Signal()
    passed_on.set()
    assert passed_on._lock.acquire(timeout=0)  # as the other waiter has it for a moment
    assert passed_on.wait(0.0)


def test_a_search_with_a_short_bound_ends_in_time(manager: KVCacheManager) -> None:
    with manager.search([0, 1]):

        def open_another() -> Search | Exception:
            try:
                return manager.search([0, 1], tokens=1000, timeout=0.0)
            except Exception as error:
                return error

        assert isinstance(Background(open_another).result(), Exception)


# The source ----------------------------------------------------------------------------------------------------------


def sections(tree: ast.AST) -> Iterator[tuple[int, list[str]]]:
    """Line and items of every `with` over a lock."""
    for node in ast.walk(tree):
        if isinstance(node, ast.With):
            items = [ast.unparse(item.context_expr) for item in node.items]
            locks = ("mutex", "_lock", "_replacing", "locks.read(", "locks.write(")
            if any(item.endswith(locks[:3]) or locks[3] in item or locks[4] in item for item in items):
                yield node.lineno, items


def test_every_critical_section_enters_the_gate_first() -> None:
    found = 0
    # A cluster's locks are not the cache's: what is called under them, finalisers included, calls no host.
    above = {PACKAGE / "cluster", PACKAGE / "ray"}
    for path in (path for path in PACKAGE.rglob("*.py") if path.parent not in above):
        for line, items in sections(ast.parse(path.read_text("utf-8"))):
            found += 1
            assert items[0] == "gate.lock", f"{path.name}:{line} takes {items} without having entered the gate"
            # What is called there would find itself inside.
            assert not any("enter(" in item for item in items), f"{path.name}:{line} begins an operation inside"
    assert found > 80
