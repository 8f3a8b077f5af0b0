"""`SizeArguments`: what the arguments are called that a pool got its size by; for errors that say what would do."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["SizeArguments"]


@dataclass(frozen=True)
class SizeArguments:
    """The arguments of the pool's maker, and what stands in them.

    Attributes:
        entries: the argument that is a number of entries.
        slots: the argument that is a number of slots, times `per_slot`; None where it is the number of entries, each of
            which brings `window` slots.
        per_slot: what `slots` counts for each slot: 1, or bytes.
        window: slots of an entry that fills the window.
    """

    entries: str = "max_entries"
    slots: str | None = "max_slots"
    per_slot: int = 1
    window: int = 1

    def that_hold(self, entries: int, slots: int, *, max_entries: int, max_slots: int) -> str:
        """What would do for so much, of a pool of `max_entries` and `max_slots`: the arguments that have to grow."""
        if self.slots is None:
            return f"{self.entries}={max(entries, -(-slots // self.window), max_entries)}"
        grown = []
        if entries > max_entries:
            grown.append(f"{self.entries}={entries}")
        if slots > max_slots:
            grown.append(f"{self.slots}={slots * self.per_slot}")
        return " and ".join(grown)
