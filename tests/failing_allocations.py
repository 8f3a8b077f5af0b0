"""Allocations that fail inside C: in CPython's own code, in numpy's and torch's bindings, in the compiled module.

`python -m tests.failing_allocations` fails each allocation of every operation in turn, and says what is lost (minutes);
`--sample 80` so many of each, `search commit` those operations alone, `--in-a-row 3` so many at once.
`CONCURRENT_KV_NATIVE=0` chooses the loops in Python, as everywhere.

CPython's own test module makes the allocation of a number fail, in whatever thread: these operations run in one. What
torch and numpy ask the system for themselves, the numbers of a tensor or of an array, is not counted.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import pathlib
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import torch

from concurrent_kv import KeysValues, KVCacheError, KVCacheManager
from concurrent_kv.evaluation import Evaluated, Evaluator, Leaf
from concurrent_kv.eviction import FIFO
from tests import failing_calls
from tests.failing_calls import Operation, check_whole, prepare, tokens
from tests.support import WINDOW, append, assert_same, config, stacked

try:
    import _testcapi  # type: ignore[import-not-found,unused-ignore]
except ImportError:  # an interpreter without its own test modules
    _testcapi = None

CAN_FAIL = _testcapi is not None

HANG_SECONDS = 60.0
MOST = 1 << 17  # allocations of an operation, never as many
COUNTED = list(range(MOST))  # made before: a loop over it allocates nothing
SPARE_TUPLES = 300
CROWD = 600  # entries
# What CPython, numpy and torch say of a failed allocation, here and there, instead of `MemoryError`.
OTHER_WORDS = ("can't allocate lock", "setting an array element", "failed to unpack the object", "increment_version")
TORCH = str(pathlib.Path(torch.__file__).parent)


def says_nothing(unraisable: object) -> None:
    """A hook for what finalisers raise."""


def begin() -> None:
    """What CPython keeps of dead objects is gone, so that each object is allocated; but for tuples of three.

    It makes one of these to leave the `with` of a lock of its own, and leaves that locked where it gets none.
    """
    gc.collect()
    gc.disable()
    spare = [(number, number, number) for number in range(SPARE_TUPLES)]
    del spare


def run_failing(operation: Operation, manager: KVCacheManager, number: int, in_a_row: int = 1) -> BaseException | None:
    """Run an operation whose `number`-th allocation fails, and the `in_a_row` - 1 after it; returns what it raises."""
    hook, sys.unraisablehook = sys.unraisablehook, says_nothing
    begin()
    _testcapi.set_nomemory(number - 1, number - 1 + in_a_row)
    try:
        operation(manager)
    except BaseException as error:
        _testcapi.remove_mem_hooks()
        return error
    finally:
        _testcapi.remove_mem_hooks()
        gc.enable()
        sys.unraisablehook = hook
    return None


def allocations_of(operation: Operation, **arguments: Any) -> int:
    """How many allocations one run makes: so many fewer are left of all that succeed."""
    manager, left, make, counted = make_manager(**arguments), 0, object, COUNTED
    prepare_trial(manager)
    begin()
    _testcapi.set_nomemory(MOST // 2, 0)
    try:
        operation(manager)
        for left in counted:  # noqa: B007
            make()
    except MemoryError:
        _testcapi.remove_mem_hooks()
    finally:
        _testcapi.remove_mem_hooks()
        gc.enable()
    return MOST // 2 - left


def make_manager(**arguments: Any) -> KVCacheManager:
    """As in `failing_calls`, or of other arguments."""
    return KVCacheManager(config(), 1, **{"wm_entries": 3, "shards": 2, "wait_timeout": 0.5, **arguments})


def prepare_trial(manager: KVCacheManager) -> None:
    """As `prepare`; and a pool for that many gets entries in numbers for which CPython has no object ready."""
    if manager.wm_pool.account.max_entries == CROWD:
        kv = KeysValues.from_packed(torch.zeros(4, CROWD - 2, 2, 1, 3))
        manager.wm_pool.put_many([("crowd", number) for number in range(CROWD - 2)], kv)
    prepare(manager, clear=False)


# Operations beside those of `failing_calls` --------------------------------------------------------------------------


def peek(manager: KVCacheManager) -> None:
    pool = manager.wm_pool
    pool.peek("key")
    pool.peek("missing")
    pool.get("missing")


def discard(manager: KVCacheManager) -> None:
    manager.wm_pool.discard("key")
    manager.wm_pool.get("other")


def scopes(manager: KVCacheManager) -> None:
    pool = manager.wm_pool
    scope = pool.scope("elsewhere")
    pool.put("key", tokens(7, 3), scope=scope)
    pool.drop_scope(scope)


def evict(manager: KVCacheManager) -> None:
    pool = manager.wm_pool
    pool.get("key")
    pool.get("other")
    for number in range(4):
        pool.put(("new", number), tokens(7, WINDOW))


def collide(manager: KVCacheManager) -> None:
    """Keys of one hash."""
    pool = manager.wm_pool
    pool.put(-1, tokens(7, 3))
    pool.put_many([-2, "key"], stacked(tokens(7, 3), tokens(7, 3)))
    pool.pop(-2)
    pool.pop(-1)


def hold_often(manager: KVCacheManager) -> None:
    """References in numbers for which CPython has no object ready."""
    with manager.wm_pool.gather(["key"] * 150), manager.wm_pool.gather(["key"] * 150):
        pass


def pin_often(manager: KVCacheManager) -> None:
    """More handles than the books have room for at first."""
    pins = [manager.wm_pool.pin("key") for _ in range(12)]
    for pin in pins:
        pin.close()


def claim_fails(manager: KVCacheManager) -> None:
    with manager.wm_pool.try_claim("new") as mine:
        mine.fail(ValueError("no result"))


def abandon(manager: KVCacheManager) -> None:
    manager.wm_pool.try_claim("new")
    len(manager.wm_pool.flights)


def grow(manager: KVCacheManager) -> None:
    """Children that share their parents' slots, of which the older go one by one."""
    pool = manager.wm_pool
    for number in range(3):
        with pool.gather(["other"], room=2) as batch:
            append(batch, [number])
            pool.commit([("child", number)], batch)
    with pool.gather([("child", 2)], room=0) as batch:
        pool.commit(["twin"], batch, lengths=[0])


def replaced_root(manager: KVCacheManager) -> None:
    with manager.search([0], entries=6, tokens=30) as search:
        batch = search.gather(["root", "missing"], [0, 0])
        batch.fill(1, tokens(4, 2))
        manager.set_init_cache(0, "root", tokens(2, 3))
        append(batch, [7, 8])
        search.commit(["child", "other"], batch)
        search.discard("other")
        search.promote("root", 0, as_key="moved")


def evaluate(manager: KVCacheManager) -> None:
    def model(batch: Any, inputs: Sequence[int]) -> Evaluated[int]:
        for layer in range(2):
            batch.append(layer, batch.keys[layer, :, :, :1].clone(), batch.values[layer, :, :, :1].clone())
        return Evaluated(outputs=list(inputs))

    evaluator = Evaluator(manager, model, room=1)
    with manager.search([0], entries=4, tokens=20) as search, evaluator.worker() as worker:
        worker.evaluate(Leaf(search, "root", "child", 5, env_id=0))
        worker.evaluate_many(
            [Leaf(search, "child", "grandchild", 6, env_id=0), Leaf(manager.wm_pool, "other", "new", 7)]
        )
    evaluator.close()


OPERATIONS: tuple[Operation, ...] = (
    *failing_calls.OPERATIONS,
    *(peek, discard, scopes, evict, collide, hold_often, pin_often, claim_fails, abandon, grow, replaced_root),
    evaluate,
)
CROWDED: tuple[Operation, ...] = (failing_calls.replace, failing_calls.commit, failing_calls.pin_and_pop, evict)
DROPS: tuple[Operation, ...] = (failing_calls.drop, failing_calls.dropped_search, pin_often)
COMMITS: tuple[Operation, ...] = (failing_calls.commit, evaluate, grow)


class OwnPolicy(FIFO[Any]):
    """A policy of a user's."""


POLICIES: tuple[Any, ...] = ("lru", "priority", "clock", "s3fifo", OwnPolicy)

# What the pool may have under each key.
VALUES: dict[object, list[KeysValues]] = {
    "key": [tokens(1, WINDOW), tokens(7, 3)],
    "other": [tokens(2, 4)],
    "new": [tokens(7, WINDOW), tokens(7, 3)],
    "newer": [tokens(8, WINDOW)],
}


def check_values(manager: KVCacheManager, operation: Operation) -> None:
    """Each entry is what some write has stored, and what was written together is there together, or was not stored."""
    pool = manager.wm_pool
    assert all(cell for part in pool.default_scope.entries for cell in part.cells.values()), "a place is left"
    found = {key: pool.peek(key) for key in pool}
    for key in VALUES.keys() & found.keys() if operation not in COMMITS else ():
        kv = found[key]
        assert kv is not None
        (stored,) = (value for value in VALUES[key] if value.lengths == kv.lengths)
        assert_same(kv, stored)
    if operation is failing_calls.insert_many:
        assert ("new" in found) == ("newer" in found)
    if operation is failing_calls.commit:
        assert ("child" in found) == (pool.peek("key") is None or pool.peek("key").lengths != (WINDOW,))  # type: ignore[union-attr]
    root = manager.get_init_cache(0, "root")
    if root is not None:
        (stored,) = (value for value in (tokens(1, 3), tokens(2, 3)) if torch.equal(value.keys, root.keys))
        assert_same(root, stored)


# Trials --------------------------------------------------------------------------------------------------------------


def is_of_memory(error: BaseException | None) -> bool:
    """Whether an operation may end so: in success, with an error of the package, or what says that memory is short."""
    if error is None or isinstance(error, (MemoryError, KVCacheError, torch.OutOfMemoryError)):
        return True
    if isinstance(error, SystemError):  # of a call that has failed and said nothing: numpy's and torch's do
        return True
    if isinstance(error, (RuntimeError, TypeError, ValueError)) and any(words in str(error) for words in OTHER_WORDS):
        return True
    return traceback.extract_tb(error.__traceback__)[-1].filename.startswith(TORCH)


def close_leaked(manager: KVCacheManager) -> None:
    """Close dropped handles that live on: CPython 3.11 leaks the arguments of a function that fails as it begins."""
    gc.collect()
    for hold in tuple(manager.storage.ledger.holds):
        handle: Any = None if hold.owner is None else hold.owner()
        if handle is not None:
            handle.close()


def trial(operation: Operation, number: int, in_a_row: int = 1, **arguments: Any) -> str | None:
    """What is wrong after the `number`-th allocation of an operation failed; None if nothing is."""
    manager = make_manager(**arguments)
    prepare_trial(manager)
    try:
        error = run_failing(operation, manager, number, in_a_row)
        if error is not None and not is_of_memory(error):
            raise error
        del error
        manager.wm_pool.get("none")
        if operation in DROPS:
            close_leaked(manager)
        check_values(manager, operation)
        check_whole(manager)
    except BaseException as wrong:
        where = traceback.extract_tb(wrong.__traceback__)[-1]
        return f"{type(wrong).__name__} {str(wrong)[:200]} ({pathlib.Path(where.filename).name}:{where.lineno})"
    return None


def look(name: str, operation: Operation, sample: int, in_a_row: int, **arguments: Any) -> bool:
    """Try `sample` allocations of an operation, spread over all; prints what is lost. Whether nothing is."""
    for _ in range(3):  # the first fills caches
        most = allocations_of(operation, **arguments)
    step = max(1, most // sample)
    found: dict[str, list[int]] = {}
    print(f"{name}: {most} allocations", end="", flush=True)
    for number in range(1 + len(name) % step, most + 1, step):
        faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)
        wrong = trial(operation, number, in_a_row, **arguments)
        if wrong is not None:
            found.setdefault(wrong, []).append(number)
    faulthandler.cancel_dump_traceback_later()
    print(f", {len(found)} kinds lost", flush=True)
    for what, numbers in found.items():
        print("    ", what, len(numbers), numbers[:6], flush=True)
    return not found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("operations", nargs="*", help="all if left out")
    parser.add_argument("--sample", type=int, default=MOST, help="allocations of each; all if left out")
    parser.add_argument("--in-a-row", type=int, default=1, help="allocations that fail one after the other")
    options = parser.parse_args()
    if not CAN_FAIL:
        parser.exit(3, "this interpreter has no _testcapi\n")
    faulthandler.enable()
    gc.collect()
    gc.freeze()
    chosen = [each for each in OPERATIONS if not options.operations or each.__name__ in options.operations]
    whole = [look(each.__name__, each, options.sample, options.in_a_row) for each in chosen]
    for policy in POLICIES if evict in chosen else ():
        name = f"evict, {policy if isinstance(policy, str) else policy.__name__}"
        whole.append(look(name, evict, options.sample, options.in_a_row, policy=policy))
    for operation in (each for each in CROWDED if each in chosen):
        name = f"{operation.__name__}, crowded"
        whole.append(look(name, operation, options.sample, options.in_a_row, wm_entries=CROWD))
    sys.exit(not all(whole))


if __name__ == "__main__":
    main()
