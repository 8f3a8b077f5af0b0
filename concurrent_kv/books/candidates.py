"""`Candidates`: which entries may be evicted, and which are set aside for now, of all accounts of a storage.

The order among candidates is an account's policy, which knows nothing of pins, slots or indexes. Every method is called
with the ledger's mutex held. The picture of an entry's places is in `records.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

import numpy as np

from .entries import row_of
from .records import CLAIMED, HELD, PINNED, SHARED, Account, Entry
from .tables import Tables

__all__ = ["Candidates"]


class Candidates:
    """The entries that policies hold, and those parked beside them.

    Args:
        tables: where the slots of entries are listed.

    Attributes:
        shared: entries in place SHARED, by tail slot.
    """

    def __init__(self, tables: Tables) -> None:
        self._tables = tables
        self.shared: dict[int, dict[Entry, None]] = {}
        self._shared_of: dict[Account, dict[Entry, None]] = {}

    # Coming and going ------------------------------------------------------------------------------------------------

    def exchange_back(self, account: Account, leaving: list[Entry], coming: list[Entry]) -> None:
        """Undo what the policy was told of entries that go and others that come, perhaps once more. Mutex held."""
        for entry in coming:
            account.policy.remove(entry)
        for entry in reversed(leaving):
            if entry.place is HELD and entry not in account.policy:
                account.policy.give_back(entry)

    def withdraw(self, entry: Entry) -> None:
        """Forget an entry that left the index, wherever it is: with the policy, given out, or parked. Mutex held."""
        entry.scope.account.policy.remove(entry)
        if entry.place is SHARED:
            self._forget(entry)

    def give_back(self, victim: Entry) -> None:
        """Make a claimed victim a candidate again, if it is still in the index. Mutex held."""
        scope = victim.scope
        if victim.place is CLAIMED and scope.entries[scope.part_of(victim.key_hash)].holds(victim):
            scope.account.policy.give_back(victim)
            victim.place = HELD

    def in_order(self, account: Account, published: list[Entry]) -> list[Entry]:
        """Entries of an account, the next victim first; those that are set aside come before the others. Mutex held."""
        ordered, known = account.policy.in_order(), set(published)
        aside = known.difference(ordered)
        return [entry for entry in published if entry in aside] + [entry for entry in ordered if entry in known]

    # Set aside -------------------------------------------------------------------------------------------------------

    def set_aside(self, victim: Entry, *, want_slots: bool) -> bool:
        """Park a claimed victim that is pinned, or whose eviction would free none of the wanted slots. Mutex held."""
        if victim.pins:
            victim.place = PINNED
        elif want_slots and self.shares_tail(victim) and not self._is_last_sharer(victim):
            self._park(victim)
        else:
            return False
        return True

    def shares_tail(self, entry: Entry) -> bool:
        """Whether another entry names the last token of `entry`, so that evicting it would free no slot. Mutex held."""
        return self._tables.named_elsewhere([entry.row])

    def beside(self, rows: list[int]) -> list[int]:
        """The slots of some rows that entries are parked for, which end in them. Mutex held."""
        named = {slot for row in rows for slot in np.frombuffer(self._tables.slots_of(row), dtype=np.int64).tolist()}
        return [slot for slot in self.shared if slot in named]

    def return_shared(self, account: Account, number: int) -> bool:
        """Give back `number` of what `account` had parked for sharing: an entry is wanted, not a slot. Mutex held.

        False if there is none.
        """
        parked = list(islice(self._shared_of.get(account, ()), number))
        for entry in parked:
            self._unpark(entry)
        return bool(parked)

    def return_unshared(self, tails: list[int]) -> None:
        """Give back an entry parked for each of these slots, if only parked ones still name it. Mutex held."""
        for tail in tails:
            parked = self.shared.get(tail)
            # The last one that is left, or one of several that only wait for each other.
            if parked and not self._are_named_elsewhere(parked):
                self._unpark(next(reversed(parked)))

    def return_unpinned(self, entries: list[Entry]) -> None:
        """Give back those that were parked for a pin that is gone. Mutex held."""
        for entry in entries:
            if entry.pins:
                continue
            parked = self.shared.get(entry.tail, ()) if entry.place is SHARED else ()
            if entry.place is PINNED or (parked and not self._are_named_elsewhere(parked)):
                self._unpark(entry)

    def return_all(self) -> None:
        """Give back what is set aside for sharing without a reason. Mutex held."""
        for siblings in list(self.shared.values()):
            for entry in list(siblings):
                if not self.shares_tail(entry):
                    self._unpark(entry)

    def arrange(self, account: Account, published: list[Entry]) -> None:
        """Put an account's entries where they belong: with the policy, aside, or with a search. All locks held.

        After `forget_parked`, once for each account.
        """
        policy = account.policy
        known = set(published)
        for entry in [entry for entry in policy if entry not in known]:
            policy.remove(entry)
        for entry in published:
            if entry in policy:
                entry.place = HELD
            elif entry.place is SHARED and self.shares_tail(entry) and not self._is_last_sharer(entry):
                self._park(entry)
            elif entry.place is not PINNED or not entry.pins:
                # It was on its way out, or set aside for a reason that is over: it has had its turn, and is next.
                entry.place = HELD
                policy.give_back(entry)

    def forget_parked(self) -> None:
        """Forget what is set aside for sharing; `arrange` parks what has to be. Mutex held."""
        self.shared.clear()
        self._shared_of.clear()

    def _park(self, entry: Entry) -> None:
        """Set a claimed victim aside until its last token is its own again. Mutex held."""
        tail, account = entry.tail, entry.scope.account
        try:
            self.shared.setdefault(tail, {})[entry] = None
            self._shared_of.setdefault(account, {})[entry] = None
        except Exception:
            self._forget(entry)
            raise
        entry.place = SHARED

    def _unpark(self, entry: Entry) -> None:
        """Give a parked entry back to its policy, as the next candidate. Mutex held."""
        entry.scope.account.policy.give_back(entry)
        self._forget(entry)
        entry.place = HELD

    def _forget(self, entry: Entry) -> None:
        """Take an entry off the list of those parked for sharing, if it is there. Mutex held."""
        siblings, of_account = self.shared.get(entry.tail), self._shared_of.get(entry.scope.account)
        # It is in none, or in one, where `_park` was cut off. No call from here on, so that this is not.
        if siblings is not None:
            if entry in siblings:
                del siblings[entry]
            if not siblings:
                del self.shared[entry.tail]
        if of_account is not None and entry in of_account:
            del of_account[entry]

    def _is_last_sharer(self, entry: Entry) -> bool:
        """Whether all others that name the last token of `entry` are parked for it, and none is pinned. Mutex held.

        Each of them would wait for the others to go: that the first of them goes is what frees the token in the end.
        """
        parked = self.shared.get(entry.tail, ())
        rows = [entry.row, *map(row_of, parked)]
        return not self._tables.named_elsewhere(rows) and not any(other.pins for other in parked)

    def _are_named_elsewhere(self, parked: Iterable[Entry]) -> bool:
        """Whether an entry that is not parked names the last token of those parked for it."""
        return self._tables.named_elsewhere(list(map(row_of, parked)))
