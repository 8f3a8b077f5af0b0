"""What the tests with real threads share: threads that are always joined, copies that can be held up, coded entries."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from concurrent_kv import KeysValues, KVLayout, KVPool, KVStorage
from concurrent_kv.device.tensors import SlotTensor
from concurrent_kv.locks.deadline import Deadline
from concurrent_kv.locks.sharded import ShardedRWLock
from tests.support import HANG_SECONDS

LAYOUT = KVLayout(num_layers=2, num_heads=1, head_dim=4, max_tokens=4)
WINDOW = LAYOUT.max_tokens
JOIN_SECONDS = HANG_SECONDS  # only ever waited out by a test that fails
VERSIONS = 1024  # of one key


def run_threads(*work: Callable[[], None]) -> None:
    """Run all at once, join all, and raise the first error of any; a thread that hangs is an error."""
    errors: list[BaseException] = []
    barrier = threading.Barrier(len(work))

    def run(task: Callable[[], None]) -> None:
        try:
            barrier.wait(JOIN_SECONDS)
            task()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(task,), daemon=True) for task in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(JOIN_SECONDS)
    if errors:
        raise errors[0]
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"


class Background:
    """A call in a thread of its own; `result()` joins it, and raises what it raised."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self._outcome: list[Any] = []
        self._error: BaseException | None = None

        def run() -> None:
            try:
                self._outcome.append(call())
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()

    def result(self) -> Any:
        self._thread.join(JOIN_SECONDS)
        assert not self._thread.is_alive(), "the call hangs"
        if self._error is not None:
            raise self._error
        return self._outcome[0]


class Gate:
    """Where threads can be held up: `entered` says that one has come, `opened` lets it go on."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.opened = threading.Event()

    def pass_through(self) -> None:
        self.entered.set()
        assert self.opened.wait(JOIN_SECONDS), "nobody opened the gate"


class GatedTensor(SlotTensor):
    """Slots whose next copy of a kind can be held up at a gate; later ones pass by."""

    def __init__(self, layout: KVLayout, num_slots: int) -> None:
        super().__init__(layout, num_slots)
        self._gates: dict[str, Gate] = {}

    @contextmanager
    def hold_up(self, kind: str) -> Iterator[Gate]:
        """Hold up the next "gather" or "scatter"; the end of the `with` lets it go on."""
        gate = self._gates[kind] = Gate()
        try:
            yield gate
        finally:
            gate.opened.set()

    def _pass(self, kind: str) -> None:
        gate = self._gates.pop(kind, None)
        if gate is not None:
            gate.pass_through()

    def gather(self, *arguments: Any, **options: Any) -> Any:
        self._pass("gather")
        return super().gather(*arguments, **options)

    def scatter(self, *arguments: Any, **options: Any) -> Any:
        self._pass("scatter")
        return super().scatter(*arguments, **options)


class GatedLocks(ShardedRWLock):
    """Shards whose next write lock can be held up before it is taken."""

    gate: Gate | None = None

    def write(self, shards: Any, deadline: Deadline) -> Any:
        gate, self.gate = self.gate, None
        if gate is not None:
            gate.pass_through()
        return super().write(shards, deadline)


class SeenEvent(threading.Event):
    """An event that tells when somebody begins to wait for it."""

    somebody_waits: threading.Event

    def wait(self, timeout: float | None = None) -> bool:
        self.somebody_waits.set()
        return super().wait(timeout)


class GatedPool(KVPool):
    """A pool of few slots over gated parts, and an event that is set when somebody waits for room."""

    def __init__(self, max_entries: int = 4, *, headroom: int = WINDOW, wait_timeout: float = 20.0, **options: Any):
        self.waits = threading.Event()
        event = type("Event", (SeenEvent,), {"somebody_waits": self.waits})
        max_slots = options.pop("max_slots", max_entries * WINDOW)
        self.gated = GatedTensor(LAYOUT, max_slots + headroom)
        self.gated_locks = GatedLocks(options.pop("shards", 1), name="pool")
        storage = KVStorage(
            LAYOUT,
            max_slots,
            headroom_slots=headroom,
            wait_timeout=wait_timeout,
            name="pool",
            tensor=self.gated,
            locks=self.gated_locks,
            event_factory=event,
        )
        super().__init__(LAYOUT, max_entries, max_slots=max_slots, storage=storage, **options)


def filled(value: float, length: int = WINDOW) -> KeysValues:
    """One row of `length` tokens, every number of them `value`."""
    return KeysValues.from_packed(torch.full((2 * LAYOUT.num_layers, 1, LAYOUT.num_heads, length, 4), float(value)))


def value_of(kv: KeysValues | None) -> float | None:
    """The one number that a row is filled with; None for a miss. More than one is a torn or foreign read."""
    if kv is None:
        return None
    numbers: set[float] = set(torch.cat([kv.keys, kv.values]).flatten().tolist())
    assert len(numbers) == 1, f"a row that was filled with one number has {sorted(numbers)}"
    return numbers.pop()


def coded(key: int, version: int) -> KeysValues:
    """What a writer stores as version `version` of `key`: the numbers and the length say which."""
    return filled(key * VERSIONS + version, 1 + version % WINDOW)


def version_of(key: int, kv: KeysValues) -> int:
    """The version of an entry that `coded` made; an assertion fails unless it is whole and that key's."""
    value = value_of(kv)
    assert value is not None
    owner, version = divmod(int(value), VERSIONS)
    assert owner == key, f"asked for {key}, got version {version} of {owner}"
    assert kv.lengths == (1 + version % WINDOW,)
    return version


def keys_of(pool: KVPool, keys: range) -> list[Hashable]:
    """Which of `keys` the pool has."""
    return [key for key in keys if key in pool]
