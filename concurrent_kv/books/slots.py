"""The allocator of token slots: free runs in the order of their release.

A storage has one, and each open search another, of the slots that it has reserved: they were parted from the storage's,
and join it again. Slot 0 is never handed out: it is all zeros and serves the padding. Every method is called with the
mutex of its ledger held.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import pairwise, repeat
from typing import NamedTuple

import numpy as np

# What np.unique imports at its first call: that would be milliseconds under the mutex, and an import that is cut off by
# an asynchronous exception leaves CPython's import lock taken.
import numpy.ma
import numpy.typing as npt

from ..device.slot_numbers import SlotArray, Slots, as_array
from ..device.streams import NO_TICKS, Ticks, merge
from ..native import native

__all__ = ["Run", "SlotAllocator", "Taken", "runs_of"]

RUNS_LOOKED_AT = 8  # for slots that follow each other; short runs further back come to the front in their turn
FEW = 64  # slots that Python sorts sooner than numpy is called
MOST_PIECES = 16  # runs that slots freed together are kept as; in more pieces, they are one run with gaps


class Taken(NamedTuple):
    """Slots that were free until now."""

    slots: Slots
    ticks: Ticks  # their next writer has to wait for


Run = tuple[Slots, Ticks]  # free slots that were freed together


def _as_range(slots: SlotArray) -> range | None:
    """Some slots in ascending order as a range, where they are one."""
    first, last = int(slots[0]), int(slots[-1])
    consecutive = last - first == len(slots) - 1 and (slots[1:] > slots[:-1]).all()
    return range(first, last + 1) if consecutive else None


def runs_of(slots: SlotArray, ticks: Ticks) -> list[Run]:
    """Slots as runs, in ascending order."""
    found = None if native is None else native.in_runs(slots, MOST_PIECES)
    if found is not None:
        pieces = found if type(found) is list else [np.frombuffer(found, dtype=np.int64)]
        return list(zip(pieces, repeat(ticks)))
    if len(slots) <= FEW:
        numbers = sorted(slots.tolist())
        if numbers[-1] - numbers[0] == len(numbers) - 1:
            return [(range(numbers[0], numbers[-1] + 1), ticks)]
    slots = np.sort(slots)
    gaps = np.flatnonzero(slots[1:] - slots[:-1] != 1) + 1
    if len(gaps) >= MOST_PIECES:
        return [(slots, ticks)]
    edges = [0, *gaps.tolist(), len(slots)]
    return [(range(int(slots[first]), int(slots[last - 1]) + 1), ticks) for first, last in pairwise(edges)]


def _merged(runs: list[Run]) -> Run:
    """One run of several."""
    ticks: Ticks = NO_TICKS
    for _, used in runs:
        ticks = merge(ticks, used)
    return np.concatenate([np.empty(0, dtype=np.int64), *(as_array(slots) for slots, _ in runs)]), ticks


class SlotAllocator:
    """Which slots are free, of those that it has.

    Args:
        num_slots: it has slots 1 to `num_slots`.

    Attributes:
        size: how many it has, free or not.
        free_count: how many of these are free.
        residual: ticks of entries that died while others still named some of their slots, which may be freed any time.
    """

    def __init__(self, num_slots: int) -> None:
        self.size = self.free_count = num_slots
        # What has joined it; None where some of its first slots, or of these, are another's by now.
        self._joined: list[Slots] | None = None if num_slots else []
        self._runs: deque[Run] = deque([(range(1, num_slots + 1), NO_TICKS)] if num_slots else [])
        self.residual: Ticks = NO_TICKS

    @property
    def in_use(self) -> int:
        """Slots that are not free."""
        return self.size - self.free_count

    def allocate(self, count: int) -> Taken | None:
        """`count` slots, or None with nothing changed."""
        left, runs = self.free_count - count, self._runs
        if left < 0:
            return None
        if runs and type(runs[0][0]) is range and len(runs[0][0]) > count:  # nearly always: a call less
            front, ticks = runs[0]
            taken, more = Taken(front[:count], ticks), (front[count:], ticks)
            # Nothing that needs memory from here on.
            runs[0], self.free_count = more, left
            return taken
        first, whole, mine, rest = self._front(count)
        if first < 0:
            return None
        slots, ticks = mine[0] if len(mine) == 1 else _merged(mine)
        if type(slots) is not range and count:
            slots = _as_range(slots) or slots
        taken, popped = Taken(slots, ticks), iter(mine[:whole])
        # Nothing that needs memory from here on.
        if whole or rest is None:
            self._take_off(first, popped, rest)
        else:
            self._runs[first] = rest
        self.free_count = left
        return taken

    def part(self, count: int) -> list[Run] | None:
        """`count` free slots that it has no longer, for another allocator; or None with nothing changed."""
        if count > self.free_count:
            return None
        if not count:
            return []
        first, whole, parted, rest = self._front(count)
        if first < 0:
            return None
        size, left, popped = self.size - count, self.free_count - count, iter(parted[:whole])
        # Nothing that needs memory from here on.
        self._take_off(first, popped, rest)
        self.size, self.free_count, self._joined = size, left, None
        return parted

    def add(self, runs: Sequence[Run]) -> None:
        """Have free slots that another allocator has no longer; all of them, or none where it raises."""
        count = sum([len(slots) for slots, _ in runs])
        whole = None if self._joined is None else self._joined + [slots for slots, _ in runs]
        size, left = self.size + count, self.free_count + count
        self._append(runs)
        # Nothing that needs memory from here on.
        self.size, self.free_count, self._joined = size, left, whole

    def whole_runs(self) -> list[Slots] | None:
        """All slots that it has as they came; None where that is not known."""
        return self._joined

    def every_use(self) -> Ticks:
        """What the writers of its free slots have to wait for, and of those that it was said nothing of yet."""
        ticks = self.residual
        for _, used in self._runs:
            ticks = merge(ticks, used)
        return ticks

    def _front(self, count: int) -> tuple[int, int, list[Run], Run | None]:
        """Where `count` slots are: the oldest run of as many among the first few, or else the front of all runs.

        Returns the place of the first run, how many go whole, the slots, and what stays of the run after those. The
        place is below 0 where there are fewer than are counted: a thread was cut off, and what it had is for repair.
        """
        runs = self._runs
        for place in range(min(len(runs), RUNS_LOOKED_AT)):
            slots, ticks = run = runs[place]
            if len(slots) > count:
                return place, 0, [(slots[:count], ticks)], (slots[count:], ticks)
            if len(slots) == count:
                return place, 1, [run], None
        mine: list[Run] = []
        left = count
        for slots, ticks in runs:
            if len(slots) > left:
                mine.append((slots[:left], ticks))
                return 0, len(mine) - 1, mine, (slots[left:], ticks)
            mine.append((slots, ticks))
            left -= len(slots)
            if not left:
                break
        return -1 if left else 0, len(mine), mine, None

    def _take_off(self, first: int, popped: Iterator[Run], rest: Run | None) -> None:
        """Take runs off, from that at the place `first` on, one for each of `popped`; `rest` stays of the next.

        Needs no memory, and so deletes nothing inside of the queue. Where `first` is not 0, at most one is taken.
        """
        runs = self._runs
        for _ in popped:
            while first:
                runs[first] = runs[first - 1]
                first -= 1
            runs.popleft()
        if rest is not None:
            runs[first] = rest

    def _append(self, new: Sequence[Run]) -> None:
        """Put runs behind the others; all of them, or none where it raises."""
        if not new:
            return
        runs = self._runs
        last, joined = runs[-1] if runs else None, None
        if last is not None:
            # One run of two that lie side by side and were used by the same streams.
            (one, ticks), (other, other_ticks) = last, new[0]
            if type(one) is range and type(other) is range and ticks.keys() == other_ticks.keys():
                if other.start == one.stop:
                    joined = range(one.start, other.stop), merge(ticks, other_ticks)
                elif one.start == other.stop:
                    joined = range(other.start, one.stop), merge(ticks, other_ticks)
        more = new if joined is None else new[1:]
        at = -1 - len(more)
        try:
            runs += more
        except BaseException:
            while runs and runs[-1] is not last:
                runs.pop()
            raise
        if joined is not None:
            runs[at] = joined

    def release(self, slots: SlotArray, ticks: Ticks, *, others_left: bool) -> None:
        """Free slots that no entry names any more; `ticks` are the uses of the entries that named them last.

        `others_left` says that those entries had other slots too, which are still named. All of it, or nothing where
        it raises.
        """
        if self.residual:
            ticks = merge(ticks, self.residual)
        if len(slots):
            left = self.free_count + len(slots)
            self._append(runs_of(slots, ticks))
            self.free_count = left
        if ticks and others_left:
            self.residual = ticks

    def give_back(self, slots: Slots, ticks: Ticks) -> None:
        """Free allocated slots that no entry came to name; all of them, or none where it raises."""
        self.release(as_array(slots), ticks, others_left=False)

    def free_slots(self) -> SlotArray:
        """Every free slot, in the order of release."""
        if not self._runs:
            return np.empty(0, dtype=np.int64)
        return np.concatenate([as_array(slots) for slots, _ in self._runs])

    def rebuild(self, has: npt.NDArray[np.bool_], named: npt.NDArray[np.bool_], ticks: Ticks) -> int:
        """Have these slots, of which entries name some, as a full recount finds it: the others are free.

        Returns how many more are free than before.
        """
        before = self.free_count
        free = np.flatnonzero(has & ~named).astype(np.int64)
        self._runs = deque([(_as_range(free) or free, ticks)] if len(free) else [])
        self._joined = None
        self.size, self.free_count = int(np.count_nonzero(has)), len(free)
        return self.free_count - before

    def problems(self, named: npt.NDArray[np.bool_]) -> list[str]:
        """What contradicts a recount of the slots that it has and entries name."""
        found: list[str] = []
        free = self.free_slots()
        if len(free) != self.free_count:
            found.append(f"free count {self.free_count} but {len(free)} slots in the free runs")
        if len(np.unique(free)) != len(free):
            found.append("a slot is free twice")
        if len(free) and (free.min() < 1 or free.max() >= len(named)):
            found.append("a free slot is out of range")
        used = int(np.count_nonzero(named[1:]))
        if used + len(free) != self.size:
            found.append(f"{len(free)} free + {used} referenced slots != {self.size}")
        if len(free) and named[free[free < len(named)]].any():
            found.append("a free slot is referenced by an entry")
        return found
