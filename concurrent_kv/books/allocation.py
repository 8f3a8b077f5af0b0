"""`Allocation`: what a pool or a manager allocates; and the sizes, in tokens, that stand where its user states none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby

from .._checks import positive_int

__all__ = ["SHORT_WINDOW", "Allocation", "default_tokens", "headroom_of"]

SHORT_WINDOW = 1024  # tokens: where sizes are left out, nothing is a multiple of a window that is longer than this


def default_tokens(entries: int, window: int) -> int:
    """Tokens set aside for so many entries where no number is stated.

    Full windows, or 1,024 tokens for each entry where the window is longer; one window at least.
    """
    return max(window, entries * min(window, SHORT_WINDOW))


def headroom_of(
    headroom_tokens: int | None, writers: int | None, window: int, *, usual_writers: int, roots: int = 0
) -> int:
    """Slots beyond the quotas, as stated; else a window for each writer, and in short windows for each of `roots`.

    Args:
        usual_writers: where `writers` is left out too; one if the window is long.
        roots: entries that searches may keep after they were replaced.

    Raises:
        InvalidArgumentError, InvalidTypeError: `writers` is below 1, or `headroom_tokens` below a window; by name.
    """
    is_short = window <= SHORT_WINDOW
    if writers is None:
        writers = usual_writers if is_short else 1
    windows = positive_int("writers", writers) + (roots if is_short else 0)
    if headroom_tokens is None:
        return windows * window
    # An entry of the longest length must be replaceable.
    return positive_int("headroom_tokens", headroom_tokens, minimum=window)


@dataclass(frozen=True)
class Allocation:
    """What a pool or a manager allocates: before it is made by `allocation_for()`, afterwards by `allocation()`.

    `str()` shows it, a line for each pool.

    Attributes:
        entries: entries that each pool holds at most: "pool", or by role "init[0]", "init[1]", ..., "recur", "wm".
        slots: slots (tokens) that each pool holds at most, by the same names.
        headroom_slots: slots beyond these quotas.
        total_slots: slots of the storage that is made: the quotas and the headroom. 0 for a pool over a storage that is
            there already, as that pool allocates none.
        bytes_per_slot: bytes of one slot: keys and values of one token over all layers.
        tier_bytes: bytes of host memory of the tier beneath; 0 without one.
        disk_bytes: bytes that the file behind it takes; 0 without one.
        search_tokens: slots that a search over all environments reserves if its `tokens` is left out; None for a pool.
    """

    entries: Mapping[str, int]
    slots: Mapping[str, int]
    headroom_slots: int
    total_slots: int
    bytes_per_slot: int
    search_tokens: int | None = None
    tier_bytes: int = 0
    disk_bytes: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor of slots, the zero slot (which serves all padding) included."""
        return (self.total_slots + 1) * self.bytes_per_slot if self.total_slots else 0

    def __str__(self) -> str:
        lines = []
        for (_, entries, slots), group in groupby(self.slots, self._kind_of):
            roles = list(group)
            names, each = (roles[0], "") if len(roles) == 1 else (f"{roles[0]} to {roles[-1]}", " each")
            lines.append(f"{names}: {entries:,} entries, {slots:,} slots{each}")
        if self.total_slots:
            lines.append(f"headroom: {self.headroom_slots:,} slots")
            lines.append(f"storage: {self.total_slots:,} slots and the zero slot, {self.nbytes:,} bytes")
        else:
            lines.append("storage: the one given; no slots of its own")
        if self.tier_bytes:
            lines.append(f"tier: {self.tier_bytes:,} bytes of host memory")
        if self.disk_bytes:
            lines.append(f"behind it: a file of {self.disk_bytes:,} bytes")
        if self.search_tokens is not None:
            lines.append(f"a search over all environments: {self.search_tokens:,} slots, if its tokens is left out")
        return "\n".join(lines)

    def _kind_of(self, role: str) -> tuple[str, int, int]:
        return role.partition("[")[0], self.entries[role], self.slots[role]
