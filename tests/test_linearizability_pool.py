"""Ten thousand short histories of real threads and tasks on a pool, each linearizable; and pools whose guards are gone.

Each history is looked at key by key, and with all its keys together: a batch is there all at once, a clear is seen of
every key by itself. Where the pool is too small for its keys, a miss proves nothing but that the key is gone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest

from concurrent_kv import IntegrityError, KVPool
from concurrent_kv.books.ledger import Ledger
from concurrent_kv.books.records import Entry, Hold, Scope
from concurrent_kv.locks.deadline import Deadline
from concurrent_kv.locks.shards import ShardLocks
from concurrent_kv.pool import clearing
from stress.content import BrokenPromiseError
from stress.histories.campaign import histories_of_both, histories_of_searches, histories_of_tasks, histories_of_threads
from stress.histories.programs import Shape
from stress.histories.recording import new_pool
from tests.support import LOCKS, LOOPS, loops_of

ROOMY = Shape(capacity=64)
TIGHT = Shape(capacity=2)
SHAPES = [pytest.param(ROOMY, id="roomy"), pytest.param(TIGHT, id="evicting")]
BACKENDS = ["asyncio", "trio"]


@pytest.mark.parametrize("policy", ["fifo", "lru", "clock"])
@pytest.mark.parametrize("shape", SHAPES)
def test_histories_of_threads_are_linearizable(shape: Shape, policy: str) -> None:
    assert histories_of_threads(900, shape, seed=1, pool=new_pool(shape, policy=policy)) == 900 * 12


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", LOOPS)
def test_histories_of_many_threads_on_one_shard_are_linearizable(shape: Shape, kind: str) -> None:
    with loops_of(kind):
        assert histories_of_threads(400, shape, processes=4, seed=2, pool=new_pool(shape, shards=1)) == 400 * 16


@pytest.mark.parametrize("inline", [True, False], ids=["inline", "workers"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_histories_of_tasks_are_linearizable(shape: Shape, backend: str, inline: bool) -> None:
    assert histories_of_tasks(250, shape, backend=backend, inline=inline, seed=3) == 250 * 12


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_histories_of_threads_and_tasks_together_are_linearizable(shape: Shape, backend: str) -> None:
    assert histories_of_both(450, shape, backend=backend, seed=4) == 450 * 16


def test_histories_of_threads_that_share_a_search_are_linearizable() -> None:
    assert histories_of_searches(600, seed=6) == 600 * 12


# Guards taken out -----------------------------------------------------------------------------------------------------

Removal = Callable[[pytest.MonkeyPatch], None]


def without_shard_locks(patch: pytest.MonkeyPatch) -> None:
    def unlocked(self: ShardLocks, shards: Sequence[int], deadline: Deadline) -> AbstractContextManager[None]:
        return nullcontext()

    for kind in LOCKS:
        patch.setattr(kind, "read", unlocked)
        patch.setattr(kind, "write", unlocked)


def without_retaining_what_is_read(patch: pytest.MonkeyPatch) -> None:
    extend = Ledger.extend

    def register_only(self: Ledger, hold: Hold, entries: list[Entry]) -> None:
        extend(self, hold, [] if hold.what in ("read", "batch") else entries)

    patch.setattr(Ledger, "extend", register_only)


def without_looking_who_popped_first(patch: pytest.MonkeyPatch) -> None:
    remove = clearing.remove

    def removed(pool: KVPool, scope: Scope, entry: Entry, deadline: Deadline) -> bool:
        remove(pool, scope, entry, deadline)
        return True

    patch.setattr("concurrent_kv.pool.pool.remove", removed)


def without_the_end_of_clear(patch: pytest.MonkeyPatch) -> None:
    """A clear that leaves older entries, for reads that do not look at the epoch."""

    def renew(self: Any, deadline: Deadline, scopes: Sequence[Scope] | None = None) -> None:
        pass

    patch.setattr(KVPool, "renew", renew)


@pytest.mark.parametrize(
    "guard_off",
    [
        without_shard_locks,
        without_retaining_what_is_read,
        without_looking_who_popped_first,
        without_the_end_of_clear,
    ],
)
@pytest.mark.usefixtures("torch_loops")  # compiled ones may refuse what is gone before a history shows it
def test_histories_show_that_a_guard_is_gone(guard_off: Removal, monkeypatch: pytest.MonkeyPatch) -> None:
    guard_off(monkeypatch)
    # The tables refuse a row that is free, or that was not counted in; a dict, to change under who goes through it.
    with pytest.raises((BrokenPromiseError, IntegrityError, IndexError, ValueError, RuntimeError)):
        histories_of_threads(3000, ROOMY, seed=5, pool=new_pool(ROOMY, shards=4))
