"""The allocator of token slots: free runs in the order of their release.

A storage has one, and each open search another, of the slots that it has reserved: they were parted from the storage's,
and join it again. Slot 0 is never handed out: it is all zeros and serves the padding. Every method is called with the
mutex of its ledger held.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import islice, pairwise, repeat
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


def _joined(first: Run, second: Run) -> Run | None:
    """One run of two that lie side by side and were used by the same streams; None for others."""
    (one, ticks), (other, other_ticks) = first, second
    if type(one) is not range or type(other) is not range or ticks.keys() != other_ticks.keys():
        return None
    if other.start == one.stop:
        return range(one.start, other.stop), merge(ticks, other_ticks)
    if one.start == other.stop:
        return range(other.start, one.stop), merge(ticks, other_ticks)
    return None


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
        if count > self.free_count:
            return None
        run = self._take(count)
        if run is None:
            return None
        slots, ticks = run
        try:
            if type(slots) is not range and count:
                slots = _as_range(slots) or slots
        except BaseException:
            self._runs.appendleft((slots, ticks))
            raise
        self.free_count -= count
        return Taken(slots, ticks)

    def part(self, count: int) -> list[Run] | None:
        """`count` free slots that it has no longer, for another allocator; or None with nothing changed."""
        runs = self._runs
        if count > self.free_count:
            return None
        first = next((place for place, run in enumerate(islice(runs, RUNS_LOOKED_AT)) if len(run[0]) >= count), 0)
        whole, left = 0, count
        for slots, _ in islice(runs, first, None):
            if len(slots) > left:
                break
            whole += 1
            left -= len(slots)
        parted = list(islice(runs, first, first + whole))
        rest = None
        if left:
            if first + whole >= len(runs):  # as in `_take_several`
                return None
            slots, ticks = runs[first + whole]
            parted.append((slots[:left], ticks))
            rest = slots[left:], ticks
        # No call of a Python function from here on.
        if rest is not None:
            runs[first + whole] = rest
        for _ in range(whole):
            del runs[first]
        self.size -= count
        self.free_count -= count
        self._joined = None
        return parted

    def add(self, runs: Sequence[Run]) -> None:
        """Have free slots that another allocator has no longer."""
        count = sum([len(slots) for slots, _ in runs])
        joined = _joined(self._runs[-1], runs[0]) if self._runs and runs else None
        whole = None if self._joined is None else self._joined + [slots for slots, _ in runs]
        # No call of a Python function from here on.
        if joined is not None:
            self._runs[-1] = joined
        self._runs += runs if joined is None else runs[1:]
        self._joined = whole
        self.size += count
        self.free_count += count

    def whole_runs(self) -> list[Slots] | None:
        """All slots that it has as they came; None where that is not known."""
        return self._joined

    def every_use(self) -> Ticks:
        """What the writers of its free slots have to wait for, and of those that it was said nothing of yet."""
        ticks = self.residual
        for _, used in self._runs:
            ticks = merge(ticks, used)
        return ticks

    def _take(self, count: int) -> Run | None:
        """`count` slots off the oldest run of as many among the first few, or else off the front of all runs."""
        runs = self._runs
        for place in range(min(len(runs), RUNS_LOOKED_AT)):
            slots, ticks = run = runs[place]
            if len(slots) > count:
                runs[place] = slots[count:], ticks
                return slots[:count], ticks
            if len(slots) == count:
                del runs[place]
                return run
        return self._take_several(count)

    def _take_several(self, count: int) -> Run | None:
        left = count
        popped: list[Run] = []
        while left > 0:
            if not self._runs:  # fewer than are counted: a thread was cut off in here, and what it had is for repair
                self._runs.extendleft(reversed(popped))
                return None
            run = self._runs.popleft()
            popped.append(run)
            left -= len(run[0])
        try:
            taken: list[SlotArray] = [np.empty(0, dtype=np.int64)]
            ticks: Ticks = NO_TICKS
            for slots, run_ticks in popped:
                taken.append(as_array(slots))
                ticks = merge(ticks, run_ticks)
            joined = np.concatenate(taken)[:count]
        except Exception:
            self._runs.extendleft(reversed(popped))
            raise
        if left < 0:
            slots, run_ticks = popped[-1]
            self._runs.appendleft((slots[left:], run_ticks))
        return joined, ticks

    def release(self, slots: SlotArray, ticks: Ticks, *, others_left: bool) -> None:
        """Free slots that no entry names any more; `ticks` are the uses of the entries that named them last.

        `others_left` says that those entries had other slots too, which are still named. All of it, or nothing where
        it raises.
        """
        if self.residual:
            ticks = merge(ticks, self.residual)
        self._free(slots, ticks)
        if ticks and others_left:
            self.residual = ticks

    def give_back(self, slots: Slots, ticks: Ticks) -> None:
        """Free allocated slots that no entry came to name; all of them, or none where it raises."""
        self._free(as_array(slots), ticks)

    def _free(self, slots: SlotArray, ticks: Ticks) -> None:
        """All of them, or none where it raises: what may fail comes first."""
        if not len(slots):
            return
        runs = runs_of(slots, ticks)
        joined = _joined(self._runs[-1], runs[0]) if self._runs else None
        # No call of a function from here on.
        if joined is not None:
            self._runs[-1] = joined
            del runs[0]
        self._runs += runs
        self.free_count += len(slots)

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
