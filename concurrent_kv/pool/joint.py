"""`JointBatch`: rows of several searches and pools in one buffer, for one call of a model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from ..books.entries import Described, describe
from ..books.ledger import Ledger, wake
from ..books.records import Entry, Generation, Hold, Scope
from ..device.appends import HostMemory
from ..device.stream_uses import StreamUses
from ..device.streams import NO_TICKS, Ticks
from ..errors import ClosedError, InvalidArgumentError, WindowOverflowError
from ..locks.gate import gate
from .batch import Batch
from .padded_rows import PaddedRows
from .reading import fill_rows, gather_together, in_pools
from .storage import Domain, KVStorage

__all__ = ["JointBatch", "Part", "open_part", "open_together"]


class Part(Batch):
    """Rows of one search or pool in a buffer that others have rows in, too.

    What it reads stays until it is closed, however its search ends meanwhile: a copy for all is not cut off for one.
    """

    _in_use = False
    tier_rows: list[tuple[int, Tensor]]  # the tokens of rows that are in the tier

    def begin(self) -> Part:
        """Keep what it reads; before its search knows of it, which could end it."""
        ledger = self._ledger
        # Made here: a finaliser may get no memory.
        self._end_later = partial(ledger.again, [partial(ledger.end_use, self.hold, release=True)])
        with gate.lock, ledger.mutex:
            self._in_use = ledger.use(self.hold)
        return self

    @property
    def ledger(self) -> Ledger:
        """The books of its entries."""
        return self._ledger

    @property
    def is_outdated(self) -> bool:
        """Whether the weights version of its pool was bumped since the gather. (A search has ended then.)"""
        return self.scope.version != self.generation.version

    @property
    def gathered_entries(self) -> list[Entry | None]:
        """Its entries but those in the tier."""
        return in_pools(self.entries) if self.tier_rows else list(self.entries)

    @property
    def described(self) -> Described:
        """What `describe` said of its entries."""
        return self.table_rows, self._gathered, self.corrections, self.others

    def place(self, data: Tensor, first_row: int, start: int, uses: StreamUses | None) -> None:
        """Its rows were copied into a buffer from `first_row` on, and end before column `start`."""
        self.data, self.first_row, self._start, self._uses = data, first_row, start, uses

    def settle(self, ends: list[int], memory: HostMemory | None = None) -> None:
        """New tokens were appended to the buffer, of that `memory`; `ends` of each layer."""
        self._ends, self.memory = ends, memory

    def close(self) -> None:
        """Let go of what it reads. Never blocks; nothing happens the second time."""
        if not self._in_use:
            super().close()
            return
        with gate.lock, self._ledger.mutex:
            # First: what is cut off after this is lost until repair, and not let go of twice.
            self._in_use = False
            dead = self._ledger.end_use(self.hold, release=True)
            waiters = self._ledger.take_waiters()
        wake(waiters)
        del dead

    def abandon(self) -> None:
        """As `Batch.abandon`."""
        if not self._in_use:
            super().abandon()
            return
        self._in_use = False
        self._ledger.abandon(self._end_later)

    def __del__(self) -> None:
        if self._in_use:
            self.abandon()
        else:
            super().__del__()


def open_part(
    domain: Domain, scope: Scope, generation: Generation, hold: Hold, entries: list[Entry | None], *_: object
) -> Part:
    """As `open_batch`, of rows that `open_together` copies: a batch without a buffer yet."""
    described = describe(entries, scope)
    tier = domain.storage.tier
    tier_rows = [] if tier is None else tier.read_rows(entries, described)
    nowhere = domain.storage.tensor.data
    part = Part(domain, scope, generation, hold, entries, described, nowhere, 0, False)
    part.tier_rows = tier_rows
    return part.begin()


class JointBatch(PaddedRows):
    """Rows that were gathered from several places at once. A model uses it as any batch; its parts are committed.

    It stays open until its call is over, whichever of its searches ends meanwhile: a model can go on, and callers whose
    search has ended hear so afterwards. Closing it closes its parts, and gives the buffer back.

    Attributes:
        parts: batches over the same buffer, one after the other, each of one search or pool.
        refused: new tokens of each row, in all, that a model wanted last and there was no room for; 0 if none were.
    """

    _internal = frozenset(("pad", "refused", "settle", "uses"))

    _how_to_drop = "give manager.search(overflow=), or Evaluator(overflow=) for leaves of pools,"

    refused = 0

    instead_of_copy = "evaluate the leaves once more, or clone its `data`"

    def __init__(
        self, storage: KVStorage, parts: Sequence[Part], data: Tensor, start: int, *, owns_buffer: bool
    ) -> None:
        self.parts = parts
        self.data = data
        self.entries: list[Entry | None] = [entry for part in parts for entry in part.entries]
        self._storage = storage
        self._uses: StreamUses | None = None
        self._layers = storage.layout.num_layers
        self._start = start
        self._ends = [start] * self._layers
        self._gathered = [length for part in parts for length in part.lengths]
        self._owns_buffer = owns_buffer
        self._closed = False

    def pad(self, rows: int) -> None:
        """Note rows that are padding, after all parts'."""
        self.entries += [None] * rows
        self._gathered += [0] * rows

    def settle(self) -> None:
        """Have the parts know what was appended: before they are committed."""
        for part in self.parts:
            part.settle(self._ends, self.memory)

    @property
    def uses(self) -> StreamUses | None:
        """Who uses the buffer, on a GPU; the parts' commits are ordered by the same."""
        return self._uses

    @uses.setter
    def uses(self, uses: StreamUses | None) -> None:
        self._uses = uses

    def _check_room(self, end: int, tokens: int) -> int:
        try:
            return super()._check_room(end, tokens)
        except WindowOverflowError:
            self.refused = end + tokens - self._start
            raise

    def _how_to_get(self, room: int) -> str:
        return f"make the Evaluator with room={room}, or without room="

    @property
    def closed(self) -> bool:
        """Whether its call is over."""
        return self._closed

    def check_open(self) -> None:
        """Raise `ClosedError` if it is closed."""
        self._storage.check_process()
        if self._closed:
            raise ClosedError("this batch is closed: its evaluation is over")

    def close(self) -> None:
        """Let go of what its parts keep, and of the buffer. Never blocks; nothing happens the second time."""
        if self._closed:
            return
        self._closed = True
        for part in self.parts:
            part.close()
        if self._owns_buffer:
            ready = NO_TICKS if self._uses is None else self._uses.finish(self.data)
            if ready is not None:
                self._storage.tensor.buffers.give_back(self.data, ready)

    def __repr__(self) -> str:
        return f"<JointBatch of {len(self.entries)} rows in {len(self.parts)} parts>"


def open_together(
    storage: KVStorage,
    parts: Sequence[Part],
    *,
    room: int | None = None,
    rows: int | None = None,
    out: Tensor | None = None,
    ready: Ticks = NO_TICKS,
) -> JointBatch:
    """Copy the rows of `open_part`s into one buffer, each part's after those of the one before.

    Args:
        room: free columns after the longest row; up to the window if left out.
        rows: of the buffer, where it has more: the last ones are padding.
        out: the buffer `[2 * layers, rows, heads, columns, head_dim]`, contiguous, whose last `room` columns are the
            free ones: the newest tokens end at the same column whatever is gathered.
        ready: earlier uses of `out`.

    Raises:
        InvalidArgumentError: `room` is more than the window has after the longest row.
    """
    clock, layout = storage.clock, storage.layout
    stream = None if clock.backend is None else clock.current()
    described: list[Described] = [part.described for part in parts]
    longest, window = max(max(lengths) for _, lengths, _, _ in described), layout.max_tokens
    room = window - longest if room is None else room
    if longest + room > window:
        raise InvalidArgumentError(
            f"room must be at most {window - longest}: the longest row has {longest} of the window's {window} "
            f"tokens, got {room}"
        )
    count = sum(len(part.entries) for part in parts)
    rows = count if rows is None else rows
    data = out
    if data is None:
        data, ready = storage.tensor.buffers.take(rows, max(1, longest + room))
        if ready:  # used before, perhaps allocated on another stream
            clock.protect(data)
    start = longest if out is None else out.shape[3] - room
    joint = JointBatch(storage, parts, data, start, owns_buffer=out is None)
    sources = [(part.ledger, part.gathered_entries, about) for part, about in zip(parts, described, strict=True)]
    spare = rows - count
    if spare:
        sources.append((storage.ledger, [None] * spare, ([0] * spare, [0] * spare, [None] * spare, [])))
        joint.pad(spare)
    read = gather_together(storage, sources, data, start, ready)
    if storage.tier is not None:
        read = _fill_parts(storage, parts, data, start, read)
    joint.uses = StreamUses(clock, stream, read) if read else None
    first = 0
    for part in parts:
        part.place(data, first, start, joint.uses)
        first += len(part.entries)
    return joint


def _fill_parts(storage: KVStorage, parts: Sequence[Part], data: Tensor, start: int, read: Ticks) -> Ticks:
    """Copy what is in the tier into the rows of each part; returns `read`, and the ticks of it."""
    first = 0
    for part in parts:
        if part.tier_rows:
            read = fill_rows(storage, part.tier_rows, data, start, read, first)
            part.tier_rows = []
        first += len(part.entries)
    return read
