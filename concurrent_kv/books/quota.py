"""Quotas: what a pool may hold, in entries and in slots, and what a search has set aside of it.

Every method is called with the ledger's mutex held.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ..errors import CapacityError
from .size_arguments import SizeArguments
from .slots import Reservation
from .tables import Tables, Uses, new_uses
from .turns import Turns

__all__ = ["Budget", "Quota"]


class Quota:
    """Entries and slots of one pool: stored, about to be stored, and reserved by searches.

    A slot that several entries of the pool share counts once. Entries of searches do not count here: their search
    reserved room for them when it opened.

    Args:
        tables: where the slots of its entries are listed.

    Attributes:
        arguments: what its size was given by.
        uses: of its entries' rows.
    """

    def __init__(self, max_entries: int, max_slots: int, tables: Tables) -> None:
        self.arguments = SizeArguments()
        self.max_entries = max_entries
        self.max_slots = max_slots
        self.entries = 0
        self.uses: Uses = new_uses(tables)
        self.pending_entries = 0
        self.pending_slots = 0
        self.reserved_entries = 0
        self.reserved_slots = 0
        self.turns = Turns()

    @property
    def slots(self) -> int:
        """Slots of its entries."""
        return self.uses.used

    def fits(self, entries: int, slots: int) -> bool:
        """Whether so much more can be stored without evicting."""
        return (
            entries <= self.max_entries - self.entries - self.pending_entries - self.reserved_entries
            and slots <= self.max_slots - self.uses.used - self.pending_slots - self.reserved_slots
        )

    def can_ever_fit(self, entries: int, slots: int) -> bool:
        """Whether so much more fits once everything that is not reserved is evicted."""
        return entries <= self.max_entries - self.reserved_entries and slots <= self.max_slots - self.reserved_slots

    def check_size(self, name: str, entries: int, slots: int) -> None:
        """Raise `CapacityError` if so much can never be stored at once in the pool called `name`."""
        if entries > self.max_entries or slots > self.max_slots:
            raise CapacityError(
                f"{name} holds at most {self.max_entries} entries and {self.max_slots} slots, and {entries} entries "
                f"with {slots} slots were to be stored at once; {self.that_holds(entries, slots)} would do, or fewer "
                "at a time",
                required_entries=entries,
                required_slots=slots,
            )

    def that_holds(self, entries: int, slots: int) -> str:
        """The arguments with which a pool holds so much, of those that have to grow."""
        return self.arguments.that_hold(entries, slots, max_entries=self.max_entries, max_slots=self.max_slots)

    def excess(self) -> tuple[int, int]:
        """Entries and slots by which everything counted, pending and reserved exceeds the quota."""
        return (
            max(0, self.entries + self.pending_entries + self.reserved_entries - self.max_entries),
            max(0, self.uses.used + self.pending_slots + self.reserved_slots - self.max_slots),
        )


@dataclass(eq=False)
class Budget:
    """What an open search has set aside of its pool's quota, and of the storage's slots."""

    quota: Quota
    reservation: Reservation
    max_entries: int
    entries: int = 0
    promoted_to: set[Quota] = field(default_factory=set)  # quotas of init pools that may pay for its slots too
    ended: str | None = None  # why the search is over; nothing can be taken from its budget then

    def missing(self, entries: int, slots: int) -> tuple[int, int]:
        """Entries and slots by which a request exceeds what is left."""
        entries += self.entries - self.max_entries
        slots -= self.reservation.left
        return (entries if entries > 0 else 0, slots if slots > 0 else 0)
