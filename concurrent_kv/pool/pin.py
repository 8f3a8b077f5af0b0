"""`Pin`: a handle that keeps one entry from being evicted."""

from __future__ import annotations

from weakref import ref

import torch

from ..books.ledger import Ledger
from ..books.records import Entry, Hold
from ..errors import ClosedError
from ..locks.gate import gate
from ..model.kv import KeysValues
from ..never_copied import is_owned_elsewhere
from .handle import Handle
from .reading import copy_out
from .storage import PoolState

__all__ = ["Pin"]


class Pin(Handle):
    """Keeps what it pinned alive, and from being evicted, until it is closed by leaving its `with` or dropped.

    Attributes:
        side: the side data of the pinned entry.
        length: its tokens.
    """

    _internal = frozenset(("abandon",))

    instead_of_copy = "pin the key once more, or take a copy of its tokens with get()"

    def __init__(self, pool: PoolState, entry: Entry, hold: Hold, ledger: Ledger | None = None) -> None:
        self._pool = pool
        self._ledger = ledger or pool.ledger
        self._storage = pool.storage
        self._entry = entry
        self._hold = hold
        hold.owner = ref(self)
        self.side = entry.side
        self.length = entry.length

    def get(self, *, to: torch.device | str | None = None, stream: torch.Stream | None = None) -> KeysValues:
        """A private copy of what was pinned, whatever has happened to its key since.

        Args:
            to, stream: see `KVPool.get`.

        Raises:
            ClosedError: the pin or the pool is closed.
        """
        self._storage.enter(None, self._pool.account)
        if self._hold.released:
            raise ClosedError("this pin is closed")
        with self._storage.clock.using(stream):
            return copy_out(self._pool, self._entry, to)

    def close(self) -> None:
        """Let the entry go. Nothing happens the second time.

        Inside a critical section of the calling thread (in a finaliser, say) it is left to the next operation.
        """
        self._storage.check_process()
        if gate.is_inside:
            self.abandon()
        else:
            self._ledger.release(self._hold)

    def abandon(self) -> None:
        """Leave it to the next operation to close this. Takes no lock: finalisers come here, at any point."""
        hold = getattr(self, "_hold", None)
        if hold is not None and not hold.released:
            self._ledger.abandon(hold)

    def __del__(self) -> None:
        hold = getattr(self, "_hold", None)
        if hold is not None and not is_owned_elsewhere(hold.owner, self):
            self.abandon()
