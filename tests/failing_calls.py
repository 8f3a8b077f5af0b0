"""Calls that fail: a `MemoryError` in place of one call of a package's function, a `RecursionError` at some depth.

`python -m tests.failing_calls` runs every operation at every place, and says what is lost.
"""

from __future__ import annotations

import functools
import gc
import pathlib
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from types import CodeType, FrameType
from typing import Any

import concurrent_kv
from concurrent_kv import KVCacheError, KVCacheManager
from tests.support import WINDOW, append, assert_same, config, stacked
from tests.support import tokens as new_tokens

ROOT = pathlib.Path(concurrent_kv.__file__).parent
# Not the locks, which heal by themselves, and what is there for failures alone, and cannot fail.
UNHARMED = {"__del__", "abandon", "is_owned_elsewhere", "give_up", "_open_empty", "_note_fork"}
FILES = {str(path) for folder in ("books", "flights", "pool", "search", "") for path in (ROOT / folder).glob("*.py")}
DEEPEST = 60  # frames that an operation needs at most

Operation = Callable[[KVCacheManager], object]
tokens = functools.cache(new_tokens)  # made once: what may fail is the operation


def replace(manager: KVCacheManager) -> None:
    manager.wm_pool.put("key", tokens(7, 3), side="side")


def insert_many(manager: KVCacheManager) -> None:
    manager.wm_pool.put_many(["new", "newer"], stacked(tokens(7, WINDOW), tokens(8, WINDOW)))


def commit(manager: KVCacheManager) -> None:
    pool = manager.wm_pool
    with pool.gather(["other", "missing"]) as batch:
        batch.fill(1, tokens(7, 2))
        append(batch, [8, 9])
        pool.commit(["child", "key"], batch)


def read(manager: KVCacheManager) -> None:
    pool = manager.wm_pool
    pool.get("key")
    pool.side("other")
    pool.contains("key")
    pool.keys()
    with pool.gather(["key", "missing"]):
        pass


def pin_and_pop(manager: KVCacheManager) -> None:
    pool = manager.wm_pool
    with pool.pin("key") as pin:
        pool.put_many(["new", "newer"], stacked(tokens(7, WINDOW), tokens(8, WINDOW)))
        pool.pop("key")
        pin.get()


def clear(manager: KVCacheManager) -> None:
    manager.wm_pool.clear(manager.wm_pool.scope("elsewhere"))
    manager.wm_pool.clear()


def bump(manager: KVCacheManager) -> None:
    manager.bump_version()


def compute(manager: KVCacheManager) -> None:
    manager.wm_pool.get_or_compute("new", lambda: tokens(7, 3))


def fulfil(manager: KVCacheManager) -> None:
    with manager.wm_pool.try_claim("new") as mine:
        mine.fulfil(tokens(7, 3))


def drop(manager: KVCacheManager) -> None:
    pool = manager.wm_pool
    pool.pin("key")
    pool.gather(["key", "other"])
    pool.get("other")


def open_search(manager: KVCacheManager) -> None:
    manager.set_recur_cache("plain", tokens(3, 4))
    with manager.search([0]):
        pass


def search(manager: KVCacheManager) -> None:
    with manager.search([0], entries=6, tokens=30) as search:
        with search.gather(["root", "root"], [0, 0]) as batch:
            append(batch, [7, 8])
            search.commit(["child", "other"], batch)
        with search.gather(["child", "other"], [0, 0]) as batch:
            append(batch, [5, 6])
            search.commit(["child", "grandchild"], batch)
        search.promote("child", 0, as_key="moved")
        search.release(["other"])
        search.keep(["child"])


def outgrown_search(manager: KVCacheManager) -> None:
    """What it has beyond its reservation, for good and until what it replaces is let go of; and roots that go."""
    with manager.search([0], entries=1, tokens=2) as search:
        for key in ("child", "other"):
            with search.gather(["root"], [0]) as batch:
                append(batch, [7])
                search.commit([key], batch)
        with search.gather(["child"], [0]), search.gather(["root"], [0]) as batch:
            append(batch, [8])
            search.commit(["child"], batch)
        search.keep(["child"])
        search.release(["child"])


def dropped_search(manager: KVCacheManager) -> None:
    search = manager.search([0])
    search.gather(["root"], [0])
    del search
    manager.get_init_cache(0, "root")


def statistics(manager: KVCacheManager) -> None:
    manager.get_stats_summary()
    manager.wm_pool.stats()
    len(manager.wm_pool)


OPERATIONS: tuple[Operation, ...] = (
    *(replace, insert_many, commit, read, pin_and_pop, clear, bump, compute, fulfil, drop, open_search, search),
    *(outgrown_search, dropped_search, statistics),
)


class OneFailure:
    """Runs an operation of which the `number`-th call of a package's function raises `MemoryError` instead."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.seen = 0
        self.failed: CodeType | None = None

    def profile(self, frame: FrameType, event: str, argument: object) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename in FILES and code.co_name not in UNHARMED and self.failed is None:
            self.seen += 1
            if self.seen == self.number:
                self.failed = code
                raise MemoryError

    def run(self, operation: Operation, manager: KVCacheManager) -> None:
        before, sys.unraisablehook = sys.unraisablehook, lambda args: None
        sys.setprofile(self.profile)
        try:
            operation(manager)
        except (MemoryError, KVCacheError):
            pass
        finally:
            sys.setprofile(None)
            sys.unraisablehook = before


def depth() -> int:
    """Frames on the stack."""
    frame: FrameType | None = sys._getframe()
    number = 0
    while frame is not None:
        frame, number = frame.f_back, number + 1
    return number


def run_with_frames(frames: int, operation: Operation, manager: KVCacheManager) -> bool:
    """Run an operation that has so many frames left; whether they were enough."""
    before = sys.getrecursionlimit()
    hook, sys.unraisablehook = sys.unraisablehook, lambda args: None
    now = depth()
    try:
        for more in range(10):  # the interpreter counts some calls that are no frames
            with suppress(RecursionError):
                sys.setrecursionlimit(now + more + frames)
                break
        operation(manager)
    except (RecursionError, KVCacheError):
        return False
    finally:
        sys.setrecursionlimit(before)
        sys.unraisablehook = hook
    return True


def prepare(manager: KVCacheManager, *, clear: bool = True) -> None:
    """What every operation finds."""
    if clear:
        manager.clear_all()
    manager.wm_pool.put("key", tokens(1, WINDOW))
    manager.wm_pool.put("other", tokens(2, 4))
    manager.set_init_cache(0, "root", tokens(1, 3))


def check_whole(manager: KVCacheManager) -> None:
    """Nothing is lost, without any repair: the books are right, no handle is left, and all room can be had at once."""
    gc.collect()
    for _ in range(2):  # what was left by the first is done by the second
        manager.wm_pool.get("none")
    report = manager.check_integrity()
    assert report.handles == 0, f"{report.handles} handles are left: {manager.storage.ledger.holds}"
    pool = manager.wm_pool
    assert len(pool.flights) == 0, "a computation is left"
    assert not manager.recur_pool.searches, "a search is left"
    assert manager.recur_pool.stats().reserved_slots == 0
    for key in range(3):
        assert pool.put(("check", key), tokens(key, WINDOW), timeout=0.0)
        assert_same(pool.get(("check", key)), tokens(key, WINDOW))
    for key in range(3):
        assert pool.pop(("check", key)) is not None
    with manager.search([0], timeout=0.0):
        pass
    manager.check_integrity()


def make_manager() -> KVCacheManager:
    return KVCacheManager(config(), 1, wm_entries=3, shards=2, wait_timeout=0.5)


def failures(operation: Operation, numbers: Iterator[int], manager: KVCacheManager) -> Iterator[OneFailure]:
    """Each of these calls fails in its turn; ends where the operation has no so many."""
    for number in numbers:
        prepare(manager)
        failure = OneFailure(number)
        failure.run(operation, manager)
        yield failure
        if failure.failed is None:
            return


def main() -> None:
    gc.freeze()
    chosen = sys.argv[1:]
    for operation in OPERATIONS:
        if chosen and operation.__name__ not in chosen:
            continue
        found: dict[str, Any] = {}
        number = places = 0
        while True:
            number += 1
            manager = make_manager()
            prepare(manager)
            failure = OneFailure(number)
            try:
                failure.run(operation, manager)
                check_whole(manager)
            except BaseException as error:
                name = failure.failed.co_qualname if failure.failed else "none"
                found.setdefault(f"{name}: {type(error).__name__} {str(error)[:100]}", []).append(number)
            places += 1
            if failure.failed is None:
                break
        print(operation.__name__, places, "calls;", len(found), "kinds lost")
        for what, numbers in found.items():
            print("    ", what, numbers[:4])
        for frames in range(1, DEEPEST):
            manager = make_manager()
            prepare(manager)
            try:
                enough = run_with_frames(frames, operation, manager)
                check_whole(manager)
            except BaseException as error:
                print("    ", frames, "frames:", type(error).__name__, str(error)[:150])
                enough = False
            if enough:
                break


if __name__ == "__main__":
    main()
