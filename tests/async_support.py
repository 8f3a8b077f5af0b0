"""What the tests of the facade share: every kind of event loop, and storages that say where they were used."""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from typing import Any

import anyio
import pytest

from concurrent_kv import KVLayout, KVPool, KVStorage
from concurrent_kv.aio.offload import Offload
from concurrent_kv.device.tensors import SlotTensor
from concurrent_kv.locks.deadline import Deadline
from concurrent_kv.locks.sharded import ShardedRWLock
from tests.support import LAYOUT, searches_of
from tests.threading_support import JOIN_SECONDS, Background

LOOPS: dict[str, tuple[str, dict[str, Any]]] = {"asyncio": ("asyncio", {}), "trio": ("trio", {})}
if find_spec("uvloop"):  # not on Windows, and not on every free-threaded CPython
    LOOPS["uvloop"] = ("asyncio", {"use_uvloop": True})

# For a module of async tests: each of them on every kind of loop.
ON_EVERY_LOOP = [
    pytest.mark.anyio,
    pytest.mark.parametrize("anyio_backend", list(LOOPS.values()), ids=list(LOOPS)),
]


def run_on(loop: str, work: Callable[..., Awaitable[Any]], *arguments: Any) -> Any:
    """`work(*arguments)` in a new loop of that kind, in the calling thread."""
    backend, options = LOOPS[loop]
    return anyio.run(work, *arguments, backend=backend, backend_options=options)


def join_workers() -> None:
    """Wait until the workers of loops that have ended have ended too."""
    for thread in threading.enumerate():
        if thread.name == "AnyIO worker thread":
            thread.join(JOIN_SECONDS)
            assert not thread.is_alive(), "a worker hangs"


@contextmanager
def shards_held(pool: KVPool) -> Iterator[Callable[[], None]]:
    """Another thread holds every shard, those of searches too, until the `with` ends or what it gives is called."""
    held, over = threading.Event(), threading.Event()

    def hold() -> None:
        with ExitStack() as stack:
            for search in searches_of(pool.storage):
                stack.enter_context(search.locks.write(search.scope.shards, Deadline(JOIN_SECONDS)))
            locks = pool.storage.locks
            with locks.write(range(locks.count), Deadline(JOIN_SECONDS)):
                held.set()
                assert over.wait(JOIN_SECONDS)

    holder = Background(hold)
    assert held.wait(JOIN_SECONDS)
    try:
        yield over.set
    finally:
        over.set()
        holder.result()


@contextmanager
def always_in_workers() -> Iterator[None]:
    """No operation is small enough to run on its loop's thread."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Offload, "_is_small", lambda self, *size: False)
        yield


class SeenTensor(SlotTensor):
    """Slots that note which threads copied."""

    def __init__(self, layout: KVLayout, num_slots: int) -> None:
        super().__init__(layout, num_slots)
        self.copied_in: set[int] = set()

    def gather(self, *arguments: Any, **options: Any) -> Any:
        self.copied_in.add(threading.get_ident())
        return super().gather(*arguments, **options)

    def scatter(self, *arguments: Any, **options: Any) -> Any:
        self.copied_in.add(threading.get_ident())
        return super().scatter(*arguments, **options)


class SeenLocks(ShardedRWLock):
    """Shards that note, by thread, the longest wait that was allowed for one."""

    def __init__(self, count: int, **options: Any) -> None:
        super().__init__(count, **options)
        self.longest_wait: dict[int, float] = {}

    def _acquire(self, shards: Sequence[int], write: bool, deadline: Deadline, *rest: Any) -> bool:
        thread = threading.get_ident()
        self.longest_wait[thread] = max(self.longest_wait.get(thread, 0.0), deadline.left())
        return super()._acquire(shards, write, deadline, *rest)


class SeenPool(KVPool):
    """A pool whose copies and locks say which thread used them."""

    def __init__(self, max_entries: int = 8, layout: KVLayout = LAYOUT) -> None:
        slots, headroom = max_entries * layout.max_tokens, 4 * layout.max_tokens
        self.seen = SeenTensor(layout, slots + headroom)
        self.seen_locks = SeenLocks(2, name="pool")
        storage = KVStorage(
            layout,
            slots,
            headroom_slots=headroom,
            wait_timeout=JOIN_SECONDS,
            name="pool",
            tensor=self.seen,
            locks=self.seen_locks,
        )
        super().__init__(layout, max_entries, storage=storage)
