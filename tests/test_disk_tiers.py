"""The file behind a tier's memory: what is paged out is read right whatever other threads do, and leaves nothing.

What is promised of any tier is tested of this kind too, in `test_tiers.py` and its like.
"""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from concurrent_kv import (
    AsyncKVCacheManager,
    AsyncKVPool,
    DiskTier,
    HostTier,
    InvalidArgumentError,
    InvalidTypeError,
    KVCacheManager,
    KVLayout,
    KVPool,
    TierStats,
)
from concurrent_kv.books.tables import slots_of_row
from concurrent_kv.device.host_slots import HostSlots
from concurrent_kv.device.paged_slots import PagedSlots
from concurrent_kv.device.slot_file import SlotFile
from concurrent_kv.device.streams import StreamClock
from concurrent_kv.device.tensors import SlotTensor
from concurrent_kv.errors import ClosedError
from concurrent_kv.pool.tier import Tier
from tests.support import HANG_SECONDS, LAYOUT, WINDOW, append, assert_same, config, packed, row_of, tokens
from tests.threading_support import Background, Gate

BYTES = LAYOUT.bytes_per_entry


def make_pool(folder: Path, entries: int = 1, memory: int = 1, **options: Any) -> KVPool:
    tier = HostTier(memory * BYTES, behind=DiskTier(folder, 64 * BYTES))
    return KVPool(LAYOUT, entries, tier=tier, wait_timeout=HANG_SECONDS, **options)


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[KVPool]:
    """Of one entry, "c", over a tier with room for one in memory, "b", and "a" in its file; all fill the window."""
    made = make_pool(tmp_path)
    for number, key in enumerate("abc"):
        made.put(key, tokens(number, WINDOW))
    assert counts(made) == (WINDOW, 0)
    yield made
    made.check_integrity()
    made.close()


def tier_stats(pool: KVPool) -> TierStats:
    found = pool.tier_stats()
    assert found is not None
    return found


def counts(pool: KVPool) -> tuple[int, int]:
    """Slots that were written to the file, and read from it."""
    stats = tier_stats(pool)
    return stats.disk_written_count, stats.disk_read_count


def slots_of(pool: KVPool) -> PagedSlots:
    tier = pool.storage.tier
    assert isinstance(tier, Tier)
    assert isinstance(tier.host, PagedSlots)
    return tier.host


class HeldUp:
    """A call in a thread of its own, held up before its first call of a method until its result is asked for."""

    def __init__(self, patch: pytest.MonkeyPatch, owner: type, name: str, call: Callable[[], Any]) -> None:
        self._gate = gate = Gate()
        original = getattr(owner, name)
        threads: list[int] = []

        def held(*arguments: Any) -> Any:
            if threading.get_ident() in threads:
                threads.clear()
                gate.pass_through()
            return original(*arguments)

        def run() -> Any:
            threads.append(threading.get_ident())
            return call()

        patch.setattr(owner, name, held)
        self._call = Background(run)
        assert gate.entered.wait(HANG_SECONDS)

    def result(self) -> Any:
        self._gate.opened.set()
        return self._call.result()


# What is read --------------------------------------------------------------------------------------------------------


def test_what_has_no_room_in_memory_is_read_from_the_file(pool: KVPool) -> None:
    assert_same(pool.get("a"), tokens(0, WINDOW))
    assert counts(pool) == (WINDOW, WINDOW)
    assert_same(pool.get("b"), tokens(1, WINDOW))
    assert counts(pool) == (WINDOW, WINDOW)
    assert tier_stats(pool).memory_slots == WINDOW


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_of_which_a_part_is_in_the_file_are_whole(tmp_path: Path, dtype: torch.dtype) -> None:
    layout = KVLayout(2, 3, 4, 8, dtype=dtype)
    tier = HostTier(layout.bytes_per_entry, behind=DiskTier(tmp_path, 20 * layout.bytes_per_entry))
    pool = KVPool(layout, 1, tier=tier)
    for number in range(6):  # of 3 tokens, or 6: parts of some are paged out for others
        pool.put(number, tokens(number, 3 + 3 * (number % 2), layout=layout))
    in_part = 0
    for number in range(5):
        there = slots_of(pool)._frames_in(slots_in_tier(pool, number)) > 0
        in_part += 0 < there.sum() < len(there)
        assert_same(pool.get(number), tokens(number, 3 + 3 * (number % 2), layout=layout))
    assert in_part, "no entry was in both"
    pool.close()


def slots_in_tier(pool: KVPool, key: object) -> Any:
    scope, tier = pool.default_scope.below, pool.storage.tier
    assert scope is not None
    assert tier is not None
    (row,) = [entry.row for part in scope.entries for entry in part.values() if entry.key == key]
    return slots_of_row(tier.ledger.tables, row)


def test_what_is_read_from_the_file_moves_up_where_there_is_room(pool: KVPool) -> None:
    pool.pop("c")
    assert_same(pool.get("a"), tokens(0, WINDOW))
    assert pool.stats().move_up_count == 1
    before = counts(pool)
    assert_same(pool.get("a"), tokens(0, WINDOW))
    assert counts(pool) == before


def test_a_gather_reads_from_pool_memory_and_file(pool: KVPool) -> None:
    with pool.gather(["a", "b", "c", "nothing"]) as batch:
        assert batch.hits == (True, True, True, False)
        for row in range(3):
            assert_same(row_of(batch, row), tokens(row, WINDOW))


def test_children_of_what_is_in_the_file_own_their_tokens(tmp_path: Path) -> None:
    pool = make_pool(tmp_path)
    for number, key in enumerate("abc"):
        pool.put(key, tokens(number, WINDOW - 1))
    with pool.gather(["a"]) as batch:
        append(batch, [7], 1)
        assert pool.commit(["child"], batch)
    found = pool.get("child")
    assert found is not None
    assert found.lengths == (WINDOW,)
    pool.check_integrity()
    pool.close()


def test_what_was_read_goes_out_after_what_was_not(tmp_path: Path) -> None:
    pool = make_pool(tmp_path, memory=2)
    for number in range(3):
        pool.put(number, tokens(number, WINDOW))  # 0 and 1 are in memory, 2 in the pool
    assert_same(pool.get(0), tokens(0, WINDOW))
    pool.put(3, tokens(3, WINDOW))  # 2 needs memory: 0 was read, 1 was not
    before = counts(pool)[1]
    assert_same(pool.get(0), tokens(0, WINDOW))
    assert counts(pool)[1] == before
    assert_same(pool.get(1), tokens(1, WINDOW))
    assert counts(pool)[1] == before + WINDOW
    pool.close()


# What other threads do -----------------------------------------------------------------------------------------------


def test_what_is_being_paged_out_is_read_from_memory(pool: KVPool, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = HeldUp(monkeypatch, SlotFile, "write", lambda: pool.put("d", tokens(3, WINDOW)))
    assert_same(pool.get("b"), tokens(1, WINDOW))
    assert counts(pool) == (WINDOW, 0)
    writer.result()
    for number, key in enumerate("abcd"):
        assert_same(pool.get(key), tokens(number, WINDOW))


def test_memory_that_a_thread_copies_from_is_not_taken_for_other_tokens(
    pool: KVPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = HeldUp(monkeypatch, HostSlots, "load", lambda: pool.get("b"))
    pool.put("d", tokens(3, WINDOW))  # "c" moves down: there is no memory but what is read
    assert counts(pool) == (2 * WINDOW, 0)  # and nothing was tried with that
    pool.put("e", tokens(4, WINDOW))
    assert_same(reader.result(), tokens(1, WINDOW))
    for number, key in enumerate("abcde"):
        assert_same(pool.get(key), tokens(number, WINDOW))


def test_memory_that_is_read_when_it_was_written_out_stays(pool: KVPool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader came while the bytes went into the file, and copies from memory still."""
    writer = HeldUp(monkeypatch, SlotFile, "write", lambda: pool.put("d", tokens(3, WINDOW)))
    reader = HeldUp(monkeypatch, HostSlots, "load", lambda: pool.get("b"))
    writer.result()  # it has found other room than what is read
    pool.put("e", tokens(4, WINDOW))
    assert_same(reader.result(), tokens(1, WINDOW))
    for number, key in enumerate("abcde"):
        assert_same(pool.get(key), tokens(number, WINDOW))


class Slots:
    """`PagedSlots` of four windows over one of memory, by themselves; and which slots anything names."""

    def __init__(self, folder: Path) -> None:
        self.named = set(range(1, 4 * WINDOW + 1))
        self.tensor = SlotTensor(LAYOUT, 5 * WINDOW)
        clock = StreamClock(None, threading.Lock)
        self.slots = PagedSlots(
            LAYOUT, 4 * WINDOW, WINDOW, str(folder), clock, 1.0, self.are_named, pinned=False, lock=threading.Lock()
        )

    def are_named(self, slots: Any) -> Any:
        return np.isin(slots, [*self.named])

    def store(self, value: int, *runs: range) -> None:
        """Have the first tokens of a value in some slots."""
        slots, rows = in_one(runs), np.zeros(WINDOW, dtype=np.int64)
        source = in_one([range(value * WINDOW + 1, (value + 1) * WINDOW + 1)])
        self.tensor.scatter(packed(tokens(value, WINDOW)), rows, np.arange(WINDOW), source)
        self.slots.store(self.tensor, source[: len(slots)], slots)

    def check(self, value: int, *runs: range) -> None:
        slots = in_one(runs)
        row, _ = self.slots.load(slots)
        assert torch.equal(row, packed(tokens(value, len(slots))))


def in_one(runs: Sequence[range]) -> Any:
    return np.array([slot for run in runs for slot in run], dtype=np.int64)


HALF = WINDOW // 2
FIRST, SECOND = range(1, WINDOW + 1), range(WINDOW + 1, 2 * WINDOW + 1)
HALVES = [range(number * HALF + 1, (number + 1) * HALF + 1) for number in range(8)]


def test_slots_that_were_used_again_while_their_old_tokens_went_out_keep_the_new_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Slots(tmp_path)
    made.store(1, FIRST)
    writer = HeldUp(monkeypatch, SlotFile, "write", lambda: made.store(2, SECOND))
    made.store(3, FIRST)
    writer.result()
    made.check(3, FIRST)
    made.check(2, SECOND)


def test_slots_that_were_used_again_where_nothing_named_them_keep_the_new_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of what was chosen had to be written out; the other half had not, and is stored into meanwhile."""
    made = Slots(tmp_path)
    made.store(1, FIRST)
    made.named -= {*HALVES[0]}
    writer = HeldUp(monkeypatch, SlotFile, "write", lambda: made.store(2, SECOND))
    made.named |= {*HALVES[0]}
    made.store(3, HALVES[0])
    writer.result()
    made.check(3, HALVES[0])
    made.check(2, SECOND)


def test_memory_that_some_of_the_slots_have_is_not_taken_for_the_others(tmp_path: Path) -> None:
    made = Slots(tmp_path)
    made.store(1, HALVES[0])
    made.store(2, HALVES[2])
    made.store(3, HALVES[0], HALVES[3])
    made.check(3, HALVES[0], HALVES[3])
    made.check(2, HALVES[2])


def test_memory_that_some_of_the_slots_have_is_not_taken_while_others_are_paged_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Slots(tmp_path)
    made.store(1, HALVES[0])
    made.store(2, HALVES[2])
    writer = HeldUp(monkeypatch, SlotFile, "write", lambda: made.store(3, HALVES[0], HALVES[3]))
    made.store(4, HALVES[4])
    writer.result()
    made.check(3, HALVES[0], HALVES[3])
    made.check(4, HALVES[4])
    made.check(2, HALVES[2])


def test_tokens_of_slots_that_nothing_names_are_not_paged_out(tmp_path: Path) -> None:
    made = Slots(tmp_path)
    made.store(1, FIRST)
    made.named -= {*FIRST}
    made.store(2, SECOND)
    assert made.slots.written_count == 0
    made.check(2, SECOND)


def test_memory_that_nothing_names_goes_first(tmp_path: Path) -> None:
    made = Slots(tmp_path)
    made.store(1, HALVES[0])
    made.store(2, HALVES[1])
    assert made.slots.may_block_to_store(1)
    made.named -= {*HALVES[1]}
    assert not made.slots.may_block_to_store(HALF)
    made.store(3, HALVES[2])
    assert made.slots.written_count == 0
    made.check(1, HALVES[0])
    made.check(3, HALVES[2])


def test_memory_is_looked_at_all_the_way_round(tmp_path: Path) -> None:
    made = Slots(tmp_path)
    made.store(1, HALVES[0])
    made.named -= {*HALVES[0]}
    assert not made.slots.may_block_to_store(WINDOW)
    assert made.slots.may_block_to_store(WINDOW + 1)


def test_a_thread_that_was_cut_off_between_the_two_arrays_leaves_a_free_frame(tmp_path: Path) -> None:
    made = Slots(tmp_path)
    made.store(1, FIRST)
    made.slots._frame_of[in_one([FIRST])] = 0  # as if the other array alone had been written
    made.store(2, SECOND)
    assert made.slots.written_count == 0
    made.check(2, SECOND)


def test_an_error_that_is_kept_keeps_no_memory(pool: KVPool, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no copy")

    with monkeypatch.context() as patch:
        patch.setattr(HostSlots, "load", fail)
        with pytest.raises(RuntimeError, match="no copy") as kept:
            pool.get("b")
    pool.put("d", tokens(3, WINDOW))
    assert counts(pool) == (2 * WINDOW, 0)
    assert_same(pool.get("c"), tokens(2, WINDOW))
    assert counts(pool) == (2 * WINDOW, 0), "its memory was in use, and the file was written to at once"
    assert kept.value is not None


# Loops ---------------------------------------------------------------------------------------------------------------


def test_what_is_in_the_file_is_read_by_a_worker_and_counted_once(pool: KVPool) -> None:
    facade = AsyncKVPool(pool)

    async def read(key: str, *, inline: bool) -> None:
        before, hits = facade.offload_stats(), pool.stats().hit_count
        found = await facade.get(key)
        assert_same(found, tokens("abc".index(key), WINDOW))
        after = facade.offload_stats()
        assert (after.inline_count > before.inline_count) is inline
        assert (after.worker_count > before.worker_count) is not inline
        assert pool.stats().hit_count == hits + 1

    async def main() -> None:
        await read("c", inline=True)
        await read("b", inline=True)
        await read("a", inline=False)

    asyncio.run(main())


def test_what_would_be_paged_out_is_by_a_worker(pool: KVPool) -> None:
    facade = AsyncKVPool(pool)
    threads: list[int] = []
    original = SlotFile.write

    def write(self: SlotFile, *arguments: Any) -> None:
        threads.append(threading.get_ident())
        original(self, *arguments)

    async def main() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(SlotFile, "write", write)
            await facade.put("d", tokens(3, WINDOW))

    asyncio.run(main())
    assert threads
    assert threading.get_ident() not in threads
    assert pool.stats().eviction_count == 3


def test_a_search_reads_its_roots_from_the_file_in_a_worker_each_time(tmp_path: Path) -> None:
    tier = HostTier(BYTES, behind=DiskTier(tmp_path, 64 * BYTES))
    manager = KVCacheManager(config(), env_num=1, init_entries=1, tier=tier)
    for number in range(4):
        manager.set_init_cache(0, number, tokens(number, WINDOW - 1))
    threads: list[int] = []
    original = SlotFile.read

    def read(self: SlotFile, *arguments: Any) -> Any:
        threads.append(threading.get_ident())
        return original(self, *arguments)

    async def main() -> None:
        facade = AsyncKVCacheManager(manager)
        async with facade.search([0]) as search:
            for _ in range(3):
                batch = await search.gather([0], [0])
                assert_same(row_of(batch, 0), tokens(0, WINDOW - 1))
                batch.close()
            await search.promote(0, 0, as_key="again")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SlotFile, "read", read)
        asyncio.run(main())
    assert len(threads) >= 4
    assert threading.get_ident() not in threads
    manager.check_integrity()
    manager.close()


# The disk ------------------------------------------------------------------------------------------------------------


def fails(number: int) -> Callable[..., Any]:
    def call(*_: object) -> Any:
        raise OSError(number, os.strerror(number))

    return call


def test_a_full_disk_drops_what_has_no_memory_and_says_so(
    pool: KVPool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", fails(errno.ENOSPC))
        pool.put("d", tokens(3, WINDOW))
    assert pool.get("c") is None
    assert pool.stats().tier_drop_count == 1
    assert "No space left" in caplog.text
    for number, key in enumerate("ab"):  # what was to be paged out is where it was
        assert_same(pool.get(key), tokens(number, WINDOW))
    pool.put("e", tokens(4, WINDOW))
    assert_same(pool.get("d"), tokens(3, WINDOW))


def test_what_is_dropped_one_after_the_other_is_said_once(
    pool: KVPool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(os, "pwritev", fails(errno.ENOSPC))
    for number in range(5):
        pool.put(number, tokens(number, WINDOW))
    assert pool.stats().tier_drop_count == 5
    assert len([record for record in caplog.records if "is dropped" in record.message]) == 1


def test_a_device_that_stays_busy_drops_what_has_no_memory_and_fails_no_write(
    pool: KVPool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(StreamClock, "synchronize", lambda *_: False)
        assert pool.put("d", tokens(3, WINDOW))
    assert pool.stats().tier_drop_count == 1
    assert "the device still used the tier's memory" in caplog.text
    for number, key in ((0, "a"), (1, "b"), (3, "d")):
        assert_same(pool.get(key), tokens(number, WINDOW))


def test_a_disk_that_cannot_be_read_is_an_error_and_the_entry_stays(
    pool: KVPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", fails(errno.EIO))
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            pool.get("a")
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            pool.gather(["a", "b"])
        assert_same(pool.get("b"), tokens(1, WINDOW))
        assert counts(pool) == (WINDOW, 0)
    assert_same(pool.get("a"), tokens(0, WINDOW))
    pool.check_integrity()


def test_short_reads_and_writes_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.preadv, os.pwritev
    monkeypatch.setattr(os, "preadv", lambda file, parts, at: read(file, [part[:7] for part in parts], at))
    monkeypatch.setattr(os, "pwritev", lambda file, parts, at: write(file, [part[:5] for part in parts], at))
    pool = make_pool(tmp_path)
    for number in range(4):
        pool.put(number, tokens(number, WINDOW))
    for number in range(4):
        assert_same(pool.get(number), tokens(number, WINDOW))
    pool.close()


def test_a_file_that_is_cut_short_is_an_error(pool: KVPool) -> None:
    os.ftruncate(slots_of(pool)._file._descriptor, 3)
    with pytest.raises(OSError, match="cut short"):
        pool.get("a")


def test_the_file_has_no_name_and_goes_with_its_pool(tmp_path: Path) -> None:
    open_before = len(os.listdir("/proc/self/fd"))
    pool = make_pool(tmp_path)
    for number in range(4):
        pool.put(number, tokens(number, WINDOW))
    assert not list(tmp_path.iterdir())
    assert len(os.listdir("/proc/self/fd")) == open_before + 1
    pool.close()
    assert len(os.listdir("/proc/self/fd")) == open_before
    with pytest.raises(ClosedError):
        pool.get(0)


def test_what_a_forked_child_has_of_a_closed_file_takes_no_room(tmp_path: Path) -> None:
    pool = make_pool(tmp_path)
    childs = os.dup(slots_of(pool)._file._descriptor)
    assert os.fstat(childs).st_blocks * 512 >= 64 * BYTES  # taken from the first
    pool.close()
    assert os.fstat(childs).st_size == 0
    os.close(childs)


def test_a_disk_without_room_for_the_file_is_an_error_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "posix_fallocate", fails(errno.ENOSPC))
    with pytest.raises(OSError, match=r"No space left on device: a tier's file of .* bytes"):
        make_pool(tmp_path)


def test_a_read_under_way_has_its_file_until_it_is_done(pool: KVPool, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = HeldUp(monkeypatch, SlotFile, "read", lambda: pool.get("a"))
    pool.close()
    assert_same(reader.result(), tokens(0, WINDOW))


KILLED = """
import os, signal, sys, torch
from concurrent_kv import DiskTier, HostTier, KeysValues, KVLayout, KVPool
layout = KVLayout(2, 2, 4, 8)
window = layout.bytes_per_entry
pool = KVPool(layout, 1, tier=HostTier(window, behind=DiskTier(sys.argv[1], 64 * window)))
for number in range(int(sys.argv[2])):
    pool.put(number, KeysValues.from_packed(torch.full((4, 1, 2, 8, 4), float(number))))
assert pool.tier_stats().disk_written_count
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("puts", [3, 20])
def test_a_process_that_is_killed_leaves_nothing_and_the_next_one_begins(tmp_path: Path, puts: int) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), str(puts)], timeout=HANG_SECONDS, check=False)
    assert done.returncode == -signal.SIGKILL
    assert not list(tmp_path.iterdir())
    pool = make_pool(tmp_path)
    assert pool.get(0) is None
    pool.put(0, tokens(0, 3))
    assert_same(pool.get(0), tokens(0, 3))
    pool.close()


FULL = """
import resource, sys, torch
from concurrent_kv import DiskTier, HostTier, KeysValues, KVLayout, KVPool
layout = KVLayout(2, 2, 4, 8)
window = layout.bytes_per_entry
pool = KVPool(layout, 1, tier=HostTier(window, behind=DiskTier(sys.argv[1], 64 * window)))
resource.setrlimit(resource.RLIMIT_FSIZE, (8 * window, resource.RLIM_INFINITY))  # a file may be so long, and no longer
for number in range(40):
    pool.put(number, KeysValues.from_packed(torch.full((4, 1, 2, 8, 4), float(number))))
dropped, found = pool.stats().tier_drop_count, 0
assert dropped
for number in range(40):
    kv = pool.get(number)
    if kv is not None:
        found += 1
        assert set(kv.keys.ravel().tolist()) == {float(number)}
assert found == 40 - dropped, (found, dropped)
pool.check_integrity()
pool.close()
print("whole")
"""


def test_a_file_that_may_not_grow_loses_what_it_has_no_room_for_and_nothing_else(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path)], timeout=HANG_SECONDS, check=False, capture_output=True, text=True
    )
    assert done.stdout == "whole\n", done.stderr


# Arguments -----------------------------------------------------------------------------------------------------------


def test_arguments_that_cannot_work_are_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidTypeError, match="path must be a str or a path, got int"):
        DiskTier(7, 100)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError, match="max_bytes"):
        DiskTier(tmp_path, 0)
    with pytest.raises(InvalidTypeError, match="behind must be a DiskTier or None, got str"):
        HostTier(100, behind="/tmp")  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError, match="max_bytes of the DiskTier must be more than the 100"):
        HostTier(100, behind=DiskTier(tmp_path, 100))
    with pytest.raises(InvalidArgumentError, match=r"path must be a folder that can be written to, got '.*nowhere'"):
        KVPool(LAYOUT, 1, tier=HostTier(BYTES, behind=DiskTier(tmp_path / "nowhere", 2 * BYTES)))
    with pytest.raises(InvalidArgumentError, match=r"max_bytes of a tier must be at most [\d,]+, .* got room for"):
        KVPool(LAYOUT, 1, tier=HostTier(BYTES, behind=DiskTier(tmp_path, 1 << 80)))
    with pytest.raises(InvalidTypeError, match=r"tier must be a HostTier or None, got DiskTier; HostTier"):
        KVPool(LAYOUT, 1, tier=DiskTier(tmp_path, 2 * BYTES))  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError, match="room for one window"):
        KVPool(LAYOUT, 1, tier=HostTier(BYTES - 1, behind=DiskTier(tmp_path, 2 * BYTES)))


def test_allocation_says_how_long_the_file_is(tmp_path: Path) -> None:
    tier = HostTier(BYTES, behind=DiskTier(tmp_path, 10 * BYTES + 5))
    found = KVPool.allocation_for(LAYOUT, 1, tier=tier)
    assert found.disk_bytes == 10 * BYTES
    assert f"behind it: a file of {10 * BYTES:,} bytes" in str(found)
    assert KVPool.allocation_for(LAYOUT, 1, tier=HostTier(BYTES)).disk_bytes == 0
