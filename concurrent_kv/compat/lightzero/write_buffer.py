"""`WriteBuffer`: rows that LightZero's main branch sets one by one, stored by one write for many of them."""

from __future__ import annotations

import threading
from collections.abc import Hashable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...device.buffers import new_buffer
from ...device.modes import plain_torch_state
from ...errors import WaitTimeoutError
from ...locks.deadline import Deadline
from ...locks.gate import gate
from ...model.kv import KeysValues
from ...pool.committing import put_rows
from ...pool.pool import KVPool
from .containers import LightZeroKeysValues

__all__ = ["WriteBuffer"]

PLAIN = (int, str)  # types of keys whose comparison is no code of a user's


class _Turn:
    """A reentrant lock that is waited for no longer than operations of its pool wait for anything.

    Finalisers may call one buffer inside of a call of another's, in two threads crosswise.
    """

    def __init__(self, pool: KVPool) -> None:
        self._lock = threading.RLock()
        self._pool = pool

    def __enter__(self) -> None:
        seconds = self._pool.storage.wait_timeout
        if not self._lock.acquire(timeout=seconds):
            raise WaitTimeoutError(
                f"{self._pool.name}: another thread was setting a row, or storing some, for {seconds:g} s"
            )

    def __exit__(self, *_: object) -> None:
        self._lock.release()


class WriteBuffer:
    """New rows of a pool, copied when they are set, and stored together: a write's books once for all of them.

    No operation finds them missing: as long as there are any, the ledger's notes name this buffer, and what comes to
    the storage next, by whatever way, has them stored before it does anything. `get` finds them here, and `store`
    is for what reads no notes: counts.

    Only what an immediate write would have stored without replacing or evicting anything waits here, in the order in
    which it was set, and under keys that cannot raise; for everything else `add` says False, with nothing left here.

    Args:
        pool: in host memory, without a tier, whose policy hears of no hits.
        rows: that are stored together, when so many are there.
    """

    def __init__(self, pool: KVPool, rows: int) -> None:
        self._pool = pool
        self._scope = pool.default_scope
        self._most = rows
        layout = pool.layout
        self._shape = torch.Size((1, layout.num_heads, layout.max_tokens, layout.head_dim))
        self._packed: Tensor | None = None  # [2 * layers, rows, heads, window, head_dim]
        # Views of it: of each row, and of each row the keys and values of each layer as in a container.
        self._windows: list[Tensor] = []  # [rows] of [2 * layers, 1, heads, window, head_dim]
        self._places: list[list[Tensor]] = []  # [rows][2 * layers] of [1, heads, window, head_dim]
        # For all that follows. A finaliser may call this inside of a call of its own thread, and finds it `_busy`.
        self._turn = _Turn(pool)
        self._busy = False
        self._rows: dict[Hashable, int] = {}  # the place of each key, in the order in which they were set
        self._tokens = 0  # of each row
        self._generation = self._scope.generation
        self._is_noted = False  # whether a note of this is among the ledger's

    @property
    def is_next(self) -> bool:
        """Whether operations leave notes to do before they look: other than this buffer's, which `get` knows of."""
        return len(self._pool.ledger.abandoned) > self._is_noted

    def get(self, key: Hashable) -> LightZeroKeysValues | None:
        """A private copy of a row that waits, or None."""
        if not self._rows:
            return None
        layout = self._pool.layout
        with self._turn:
            row = self._rows.get(key)
            if row is None or self._generation is not self._scope.generation:
                return None
            found, tokens = new_buffer(layout, 1, layout.max_tokens), self._tokens
            with plain_torch_state():
                found.copy_(self._windows[row])
                found.narrow(3, tokens, layout.max_tokens - tokens).zero_()
        with gate.lock, self._pool.ledger.mutex:
            self._pool.counters.hit_count += 1
        return LightZeroKeysValues.private(found, tokens)

    def add(self, key: Hashable, key_hash: int, kv: Any) -> bool:
        """Note a copy of LightZero's container, one row, under a checked key; False if it is to be stored at once."""
        self._pool.storage.check_call()
        self._pool.check_open()
        fitting = self._buffers_of(kv) if type(key) in PLAIN else None
        with self._turn:
            if self._busy:
                return False
            self._busy = True
            try:
                if fitting is not None and not self._goes_on(fitting[1]):
                    self._store()
                if fitting is None or not self._has_room(key, key_hash, fitting[1]):
                    self._store()
                    return False
                self._note(key, *fitting)
                if len(self._rows) == self._most:
                    self._store()
            finally:
                self._busy = False
        return True

    def store(self) -> None:
        """Store what waits. May block.

        Raises:
            WaitTimeoutError: a shard was not free in time, or this interrupts the calling thread in a call of this.
            WrongProcessError: the process was forked from the one that made the pool.
        """
        self._pool.storage.check_process()
        if not self._rows:
            return
        with self._turn:
            if self._busy:
                raise WaitTimeoutError(f"{self._pool.name}: a row is being set by the thread that this interrupts")
            self._busy = True
            try:
                self._store()
            finally:
                self._busy = False

    def _store_later(self, deadline: Deadline) -> None:
        """The ledger's note.

        What comes by waits for this as long as the storage lets it, whatever its own `timeout`: it must not miss rows.
        """
        with self._turn:
            self._is_noted = False
            try:
                self.store()
            except (WaitTimeoutError, MemoryError, RecursionError, SystemError):
                self._is_noted = True  # it is left there for the next operation
                raise
            except BaseException:
                if self._rows:  # it is not: another is
                    self._leave_note()
                raise

    def _leave_note(self) -> None:
        """Have the next operation store what waits. The turn held."""
        # Each time another object: of two operations that do one of them, each takes off what it has done.
        self._pool.ledger.abandoned.append(partial(self._store_later))
        self._is_noted = True

    def _buffers_of(self, kv: Any) -> tuple[list[Tensor], int] | None:
        """The buffers of a container as the pool has them, all layers' keys before all values, and its tokens.

        None for anything else, which an immediate write converts, or refuses by name.
        """
        layers = getattr(kv, "_keys_values", None)
        if not layers:
            return None
        layout, shape, dtype = self._pool.layout, self._shape, self._pool.layout.dtype
        caches = [layer._k_cache for layer in layers]
        caches += [layer._v_cache for layer in layers]
        buffers, tokens = [cache._cache for cache in caches], caches[0]._size
        if (
            len(buffers) != 2 * layout.num_layers
            or type(tokens) is not int
            or not 1 <= tokens <= layout.max_tokens
            or any(cache._size != tokens for cache in caches)
        ):
            return None
        for buffer in buffers:
            if type(buffer) is not Tensor or buffer.layout is not torch.strided or not buffer.is_cpu:
                return None
            if buffer.dtype is not dtype or buffer.shape != shape:
                return None
        return buffers, tokens

    def _goes_on(self, tokens: int) -> bool:
        """Whether a row of so many can wait with those that do. The turn held."""
        waiting = len(self._rows)  # as many as may wait, where they could not be stored
        fits = tokens == self._tokens and waiting < self._most
        return not waiting or (fits and self._generation is self._scope.generation)

    def _has_room(self, key: Hashable, key_hash: int, tokens: int) -> bool:
        """Whether a row is new, and has room beside those that wait. The turn held."""
        scope, number = self._scope, len(self._rows) + 1
        if key in self._rows:
            return False
        if scope.entries[scope.part_of(key_hash)].get(key, key_hash) is not None:  # as it takes no shard, in Python
            return False
        return self._pool.account.fits(number, number * tokens)

    def _note(self, key: Hashable, buffers: list[Tensor], tokens: int) -> None:
        """Copy a row to its place. The turn held."""
        if self._packed is None:
            layout, (_, *of_row) = self._pool.layout, self._shape
            with plain_torch_state():
                shape = (2 * layout.num_layers, self._most, *of_row)
                packed = torch.empty(shape, dtype=layout.dtype, device=layout.device)
                self._windows = [packed[:, row : row + 1] for row in range(self._most)]
                self._places = [list(window.unbind()) for window in self._windows]
            self._packed = packed
        row = len(self._rows)
        with plain_torch_state():
            torch._foreach_copy_(self._places[row], buffers)
        if not row:
            self._generation, self._tokens = self._scope.generation, tokens
        if not self._is_noted:  # before the row counts: no operation passes it by
            self._leave_note()
        self._rows[key] = row

    def _store(self) -> None:
        """Store what waits, or forget it where its scope was cleared, or its version bumped, since. The turn held."""
        keys, packed, pool = [*self._rows], self._packed, self._pool
        if not keys or packed is None:
            return
        is_closed = pool.account.closed or pool.storage.closed  # as if they had been stored before
        if self._generation is self._scope.generation and not is_closed:
            rows = packed if len(keys) == self._most else packed[:, : len(keys)].contiguous()
            kv = KeysValues.from_packed(rows, end=self._tokens)
            put_rows(pool, self._scope, keys, kv, None, None, Deadline(pool.storage.wait_timeout))
        self._rows = {}
