"""The allocator of token slots: free runs in the order of their release, and reservations.

Slot 0 is never handed out: it is all zeros and serves the padding. Every method is called with the ledger's mutex held.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
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

__all__ = ["Reservation", "SlotAllocator", "Taken"]

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


def _runs_of(slots: SlotArray, ticks: Ticks) -> list[Run]:
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


def _mark(array: npt.NDArray[np.int32], slots: Slots, number: int) -> None:
    if native is not None:
        native.mark(array, slots, number)
    elif isinstance(slots, range):
        array[slots.start : slots.stop] = number
    else:
        array[slots] = number


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


class Reservation:
    """Slots set aside for one owner (a search): no other can take them, and what it frees comes back to it.

    Attributes:
        number: 0 until slots are reserved for it.
        size: slots set aside in all.
        left: of these, not yet taken; below 0 while handles keep slots of entries that it has replaced beyond its size.
    """

    def __init__(self) -> None:
        self.number = self.size = self.left = 0


class SlotAllocator:
    """Which slots are free, and for which search some are reserved.

    Args:
        num_slots: usable slots, numbered 1 to `num_slots`.
    """

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.free_count = num_slots
        self.reserved_count = 0  # of the free ones
        self._runs: deque[Run] = deque([(range(1, num_slots + 1), NO_TICKS)])
        self._owner: npt.NDArray[np.int32] = np.zeros(num_slots + 1, dtype=np.int32)
        self._reservations: dict[int, Reservation] = {}
        self._last_reservation = 0
        # Ticks of entries that died while others still named some of their slots: those may be freed at any time.
        self._residual: Ticks = NO_TICKS

    @property
    def available(self) -> int:
        """Free slots that are not reserved."""
        return self.free_count - self.reserved_count

    @property
    def in_use(self) -> int:
        """Slots that are not free."""
        return self.num_slots - self.free_count

    def allocate(self, count: int, reservation: Reservation | None = None) -> Taken | None:
        """`count` slots, or None with nothing changed."""
        own = 0 if reservation is None else max(0, min(count, reservation.left))
        if count - own > self.free_count - self.reserved_count:
            return None
        run = self._take(count)
        if run is None:
            return None
        slots, ticks = run
        try:
            if type(slots) is not range and count:
                slots = _as_range(slots) or slots
            if own < count:
                _mark(self._owner, slots, 0)
            if reservation is not None and own:
                # Only these come back to the reservation when freed; the rest is lent by the pool.
                paid = slots if own == count else slots[:own]
                _mark(self._owner, paid, reservation.number)
        except BaseException:
            self._runs.appendleft((slots, ticks))
            raise
        self.free_count -= count
        if reservation is not None and own:
            reservation.left -= own
            self.reserved_count -= own
        return Taken(slots, ticks)

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
        if self._residual:
            ticks = merge(ticks, self._residual)
        self._free(slots, ticks)
        if ticks and others_left:
            self._residual = ticks

    def give_back(self, slots: Slots, ticks: Ticks) -> None:
        """Free allocated slots that no entry came to name; all of them, or none where it raises."""
        self._free(as_array(slots), ticks)

    def _free(self, slots: SlotArray, ticks: Ticks) -> None:
        """All of them, or none where it raises: what may fail comes first."""
        if not len(slots):
            return
        runs = _runs_of(slots, ticks)
        joined = _joined(self._runs[-1], runs[0]) if self._runs else None
        returns = self._returns(slots) if self._reservations else ()
        # No call of a function from here on.
        if joined is not None:
            self._runs[-1] = joined
            del runs[0]
        self._runs.extend(runs)
        self.free_count += len(slots)
        for reservation, count in returns:
            debt = -reservation.left if reservation.left < 0 else 0
            reservation.left += count
            self.reserved_count += count - debt if count > debt else 0

    def _returns(self, slots: SlotArray) -> list[tuple[Reservation, int]]:
        """Which reservations get how many of some slots back."""
        if native is not None:
            return native.owners_of(self._owner, slots, self._reservations)  # type: ignore[no-any-return]
        numbers, counts = [column.tolist() for column in np.unique(self._owner[slots], return_counts=True)]
        known = [self._reservations.get(number) for number in numbers]
        return [(owner, count) for owner, count in zip(known, counts, strict=True) if owner is not None]

    def reserve(self, reservation: Reservation, count: int) -> bool:
        """Set `count` free slots aside for a new reservation; False with nothing changed where there are not enough."""
        if count > self.available:
            return False
        self._last_reservation += 1
        reservation.number = self._last_reservation
        reservation.size = reservation.left = count
        self._reservations[reservation.number] = reservation
        self.reserved_count += count
        return True

    def extend(self, reservation: Reservation, count: int) -> bool:
        """Set `count` more slots aside for `reservation`; False with nothing changed where there are not enough."""
        if count > self.available:
            return False
        debt = -reservation.left if reservation.left < 0 else 0
        reservation.size += count
        reservation.left += count
        self.reserved_count += count - debt if count > debt else 0
        return True

    def charge(self, reservation: Reservation, slots: Slots) -> None:
        """Let a reservation pay for slots that were lent to its owner; it may be in debt until it gets others back."""
        _mark(self._owner, slots, reservation.number)
        # No call of a function from here on.
        before = reservation.left if reservation.left > 0 else 0
        reservation.left -= len(slots)
        self.reserved_count -= before - reservation.left if reservation.left > 0 else before

    def discharge(self, reservation: Reservation, slots: SlotArray) -> None:
        """Give a reservation back what it paid for slots that another pool pays for now, as far as slots are free."""
        debt = max(0, -reservation.left)
        own = slots[self._owner[slots] == reservation.number][: max(0, self.available) + debt]
        self._owner[own] = 0
        if reservation.number in self._reservations:
            reservation.left += len(own)
            self.reserved_count += max(0, len(own) - debt)

    def cancel(self, reservation: Reservation) -> int:
        """End a reservation; what its owner holds stays as it is, and goes back to all pools when freed.

        Returns its size; 0 the second time.
        """
        # No call in here, so that no asynchronous exception parts what belongs together.
        if reservation.number not in self._reservations:
            return 0
        del self._reservations[reservation.number]
        self.reserved_count -= reservation.left if reservation.left > 0 else 0
        size = reservation.size
        reservation.size = reservation.left = 0
        return size

    def keep_reservations(self, known: Sequence[Reservation]) -> None:
        """Cancel every reservation that is not among `known`."""
        for reservation in list(self._reservations.values()):
            if reservation not in known:
                self.cancel(reservation)

    def free_slots(self) -> SlotArray:
        """Every free slot, in the order of release."""
        if not self._runs:
            return np.empty(0, dtype=np.int64)
        return np.concatenate([as_array(slots) for slots, _ in self._runs])

    def rebuild(self, named: npt.NDArray[np.bool_], ticks: Ticks) -> int:
        """Free every slot that no entry names, as found by a full recount; returns the slots that this gave back."""
        before = self.free_count
        free = np.flatnonzero(~named[1:]).astype(np.int64) + 1
        self._runs = deque([(_as_range(free) or free, ticks)] if len(free) else [])
        self.free_count = len(free)
        for reservation in self._reservations.values():
            reservation.left = reservation.size - self._taken(reservation, named)
        self.reserved_count = sum(max(0, reservation.left) for reservation in self._reservations.values())
        return self.free_count - before

    def _taken(self, reservation: Reservation, named: npt.NDArray[np.bool_]) -> int:
        return int(np.count_nonzero((self._owner == reservation.number) & named))

    def problems(self, named: npt.NDArray[np.bool_]) -> list[str]:
        """What contradicts a recount of the slots that entries name."""
        found: list[str] = []
        free = self.free_slots()
        if len(free) != self.free_count:
            found.append(f"free count {self.free_count} but {len(free)} slots in the free runs")
        if len(np.unique(free)) != len(free):
            found.append("a slot is free twice")
        if len(free) and (free.min() < 1 or free.max() > self.num_slots):
            found.append("a free slot is out of range")
        used = int(np.count_nonzero(named[1:]))
        if used + len(free) != self.num_slots:
            found.append(f"{len(free)} free + {used} referenced slots != {self.num_slots}")
        if len(free) and named[free].any():
            found.append("a free slot is referenced by an entry")
        reserved = sum(max(0, reservation.left) for reservation in self._reservations.values())
        if reserved != self.reserved_count:
            found.append(f"reserved count {self.reserved_count} but reservations add up to {reserved}")
        found += [
            f"reservation {reservation.number} of {reservation.size} slots, with {reservation.left} left, does not add "
            f"up: {self._taken(reservation, named)} of its slots are in use"
            for reservation in self._reservations.values()
            if reservation.left + self._taken(reservation, named) != reservation.size
        ]
        if self.reserved_count > self.free_count:
            found.append(f"{self.reserved_count} slots reserved but only {self.free_count} free")
        return found
