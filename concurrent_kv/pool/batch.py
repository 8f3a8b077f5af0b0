"""`Batch`: many entries read at once into one padded buffer that a model appends to; an open handle."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from weakref import ref

import anyio.lowlevel
import anyio.to_thread
import numpy as np
from torch import Tensor

from .._checks import numbers_or_none, positive_int
from ..books.entries import Described
from ..books.records import Entry, Generation, Hold, Scope
from ..device.appends import ALL_LAYERS, HostMemory, append_in, host_memory
from ..device.modes import plain_torch_state, writing_to
from ..device.moving import upload
from ..device.stream_uses import StreamUses
from ..device.streams import NO_TICKS
from ..device.tensor_checks import check_tensor
from ..errors import ClosedError, InvalidArgumentError, WaitTimeoutError, WindowOverflowError
from ..locks.gate import gate
from ..model.kv import KeysValues, check_fits
from ..never_copied import is_owned_elsewhere
from .handle import Handle
from .storage import Domain

__all__ = ["Batch"]


class Batch(Handle):
    """The result of a gather: K and V of many entries, and the references that a commit needs to share their slots.

    Rows are left-padded with zeros to the longest; the valid tokens of every row end at the same column; free room for
    new tokens follows. Each layer's K and V are contiguous `[batch, heads, columns, head_dim]`.

    A batch is a handle: it keeps its entries alive until every row is committed or it is closed (leaving its `with`
    closes it, and so does the end of its search). Its buffer then goes back to the storage and must not be used any
    more. One thread at a time may use a batch.

    On a GPU the tokens come in the order of the stream that gathered them. What goes through the batch's methods, and
    its commit, is ordered by itself, on whatever stream; before its tensors are used on another stream than the one it
    was used on last, that stream has to `wait`.

    Attributes:
        data: the buffer `[2 * layers, batch, heads, columns, head_dim]`: all layers' keys, then all layers' values.
        scope, generation: where, and as of when, its rows can be committed.
        entries: what each row was gathered from; None for a miss.
        table_rows: the rows of their slot tables in the ledger.
        corrections: what the entries are corrected by on reading.
        others: those of the entries that are of other scopes.
        hold: what keeps them alive.
    """

    instead_of_copy = "gather once more, or clone its `data`"

    # Made when they are asked for: not every model does.
    _parts: tuple[Tensor, ...] = ()  # see `_parts_to`
    _hits: tuple[bool, ...] | None = None
    _side: tuple[object, ...] | None = None
    _padding: Tensor | None = None
    _memory: HostMemory | None = None  # of the buffer

    def __init__(
        self,
        domain: Domain,
        scope: Scope,
        generation: Generation,
        hold: Hold,
        entries: Sequence[Entry | None],
        described: Described,
        data: Tensor,
        start: int,
        *,
        owns_buffer: bool,
        uses: StreamUses | None = None,
    ) -> None:
        self.data = data
        self.scope = scope
        self.generation = generation
        self.entries = entries
        storage = self._storage = domain.storage
        self._ledger, self._buffers = domain.ledger, domain.buffers
        self.hold = hold
        hold.owner = ref(self)
        self._owns_buffer = owns_buffer
        self._uses = uses  # None on a CPU
        self.opened = time.monotonic()  # the place of its commit in the queue for room
        self._start = start
        self._layers = storage.layout.num_layers
        self._ends = [start] * self._layers
        self.table_rows, self._gathered, self.corrections, self.others = described
        self._committed = [False] * len(entries)

    # What a model reads and writes ---------------------------------------------------------------------------------

    @property
    def batch_size(self) -> int:
        """Number of rows."""
        return len(self.entries)

    @property
    def hits(self) -> tuple[bool, ...]:
        """Which rows were found."""
        if self._hits is None:
            entries = self.entries
            all_hit = None not in entries
            self._hits = (True,) * len(entries) if all_hit else tuple([entry is not None for entry in entries])
        return self._hits

    @property
    def side(self) -> tuple[object, ...]:
        """The side data stored with each row's entry; None for misses that were not filled."""
        if self._side is None:
            self._side = tuple(None if entry is None else entry.side for entry in self.entries)
        return self._side

    @property
    def keys(self) -> Tensor:
        """`[layers, batch, heads, columns, head_dim]`, a view of the buffer."""
        return self.data[: self._layers]

    @property
    def values(self) -> Tensor:
        """`[layers, batch, heads, columns, head_dim]`, a view of the buffer."""
        return self.data[self._layers :]

    @property
    def start(self) -> int:
        """The column after the newest gathered token: tokens of the longest row."""
        return self._start

    @property
    def end(self) -> int:
        """The column after the newest token in every layer; the next token goes here."""
        return min(self._ends)

    @property
    def room(self) -> int:
        """Columns left for new tokens."""
        return self.data.shape[3] - self.end

    @property
    def lengths(self) -> tuple[int, ...]:
        """Valid tokens of each row, appended ones included; 0 for a miss that was not filled.

        A commit with `lengths=` says that fewer of the appended ones are valid, and that those appended to a miss are.
        """
        new = self.end - self._start
        return tuple([length + new if length else 0 for length in self._gathered] if new else self._gathered)

    @property
    def padding(self) -> Tensor:
        """Columns of left padding of each row, int64 `[batch]` on the batch's device; a model masks them out."""
        self.use_here()
        if self._padding is None:
            columns = np.array([self._start - length for length in self._gathered], dtype=np.int64)
            with plain_torch_state():
                self._padding = upload(columns, self.data.device)
        self._storage.clock.protect(self._padding)
        return self._padding

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer up to its newest token, `[batch, heads, tokens, head_dim]` each; views."""
        index = self._layer_number(index)
        whole = self.data.narrow(3, 0, self._ends[index])
        return whole[index], whole[self._layers + index]

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write new tokens after each row's newest, in one layer.

        Args:
            layer: which layer.
            keys, values: `[batch, heads, tokens, head_dim]`.

        Returns the layer's keys and values up to and including them, `[batch, heads, columns, head_dim]` (views).

        Raises:
            WindowOverflowError: no room is left for them.
            InvalidArgumentError: wrong shape, or no such layer.
            ClosedError: the batch is closed; SearchEndedError: by the end of its search.
        """
        self.check_open()
        if type(layer) is not int or not 0 <= layer < self._layers:
            layer = self._layer_number(layer)
        end = self._ends[layer] = self._append(layer, self._ends[layer], keys, values)
        parts = self._parts_to(end)
        return parts[layer], parts[self._layers + layer]

    def append_layers(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write new tokens after each row's newest, in all layers at once: two copies, whatever the layers.

        Args:
            keys, values: `[layers, batch, heads, tokens, head_dim]`.

        Returns all layers' keys and values up to and including them, `[layers, batch, heads, columns, head_dim]`
        (views).

        Raises:
            WindowOverflowError: no room is left for them.
            InvalidArgumentError: wrong shape, or some layers have more new tokens than others.
            ClosedError: the batch is closed.
        """
        self.check_open()
        ends = self._ends
        if ends.count(ends[0]) < len(ends):
            raise InvalidArgumentError(
                f"batch has layers with different numbers of new tokens, which end at {ends}: append() to those that "
                "have fewer first"
            )
        end = self._append(ALL_LAYERS, ends[0], keys, values)
        self._ends = [end] * self._layers
        return self.keys.narrow(3, 0, end), self.values.narrow(3, 0, end)

    def _append(self, layer: int, end: int, keys: Tensor, values: Tensor) -> int:
        """Write new tokens of a layer, or of `ALL_LAYERS`, from column `end` on; returns the new end."""
        if self._memory is None:
            self._memory = host_memory(self.data)
        tokens = append_in(self._memory, layer, end, keys, values)
        if tokens:
            return end + tokens
        tokens = self._check_new(keys, values, stacked=layer == ALL_LAYERS)
        new_end = self._check_room(end, tokens)
        if self._uses is not None:
            self.use_here(keys, values)
        if layer == ALL_LAYERS:
            new = self.keys.narrow(3, end, tokens), self.values.narrow(3, end, tokens)
        else:
            new = self.data[layer].narrow(2, end, tokens), self.data[self._layers + layer].narrow(2, end, tokens)
        with writing_to(self.data):
            new[0].copy_(keys)
            new[1].copy_(values)
        return new_end

    def _parts_to(self, end: int) -> tuple[Tensor, ...]:
        """Keys, then values, of each layer up to column `end`."""
        parts = self._parts
        if not parts or parts[0].shape[2] != end:
            data = self.data
            parts = self._parts = (data if data.shape[3] == end else data.narrow(3, 0, end)).unbind(0)
        return parts

    def _check_new(self, keys: Tensor, values: Tensor, *, stacked: bool) -> int:
        """The number of tokens in new keys and values, or an error that says why they do not fit.

        They are of one layer, or `stacked` of all.
        """
        data = self.data
        for name, tensor in (("keys", keys), ("values", values)):
            check_tensor(name, tensor)
            if tensor.dtype != data.dtype or tensor.device != data.device:
                raise InvalidArgumentError(
                    f"{name} must be {data.dtype} on {data.device}, got {tensor.dtype} on {tensor.device}"
                )
        layers = (self._layers,) if stacked else ()
        tokens = keys.shape[-2] if keys.dim() == 4 + len(layers) else -1
        _, batch, heads, _, head_dim = data.shape
        expected = (*layers, batch, heads, tokens, head_dim)
        if keys.shape != expected or values.shape != expected:
            first = f"layers={self._layers}, " if stacked else ""
            raise InvalidArgumentError(
                f"keys and values must have the shape [{first}batch={batch}, heads={heads}, tokens, "
                f"head_dim={head_dim}], got {tuple(keys.shape)} and {tuple(values.shape)}"
            )
        return tokens

    def _layer_number(self, layer: int) -> int:
        number = positive_int("layer", layer, minimum=0)
        if number >= self._layers:
            raise InvalidArgumentError(f"layer must be 0 to {self._layers - 1}, got {layer}")
        return number

    def advance(self, tokens: int) -> None:
        """State that `tokens` columns after `end` were written in place, in every layer, in the current stream.

        Raises:
            WindowOverflowError: the buffer has no such columns.
            ClosedError: the batch is closed; SearchEndedError: by the end of its search.
        """
        self.check_open()
        tokens = positive_int("tokens", tokens)
        if self._uses is not None:
            self.use_here()
        ends = self._ends
        self._check_room(max(ends), tokens)
        are_equal = ends.count(ends[0]) == len(ends)
        self._ends = [ends[0] + tokens] * len(ends) if are_equal else [end + tokens for end in ends]

    def _check_room(self, end: int, tokens: int) -> int:
        columns, window = self.data.shape[3], self._storage.layout.max_tokens
        if end + tokens <= columns:
            return end + tokens
        if end + tokens <= window:
            advice = f"gather with room={end + tokens - self._start}, which the window of {window} allows"
        elif tokens <= window:
            advice = (
                f"the longest row has {self._start} of the window's {window} tokens; commit with an overflow policy "
                f"of limit={window + 1 - tokens} or less (and step={tokens}, to have that checked), which leaves room "
                f"for steps of {tokens}"
            )
        else:
            advice = f"the window is {window} tokens"
        raise WindowOverflowError(
            f"{tokens} new tokens do not fit: {end} of the batch's {columns} columns are taken; {advice}"
        )

    # Misses --------------------------------------------------------------------------------------------------------

    def fill(self, row: int, kv: KeysValues, *, side: object = None) -> None:
        """Give a row that missed its tokens; it is then committed whole.

        Fill before anything is appended. If `kv` is longer than the longest row so far, every row moves right.

        Args:
            row: a row of which `hits` is False.
            kv: one row of 1 to `columns` tokens.
            side: what `side` says of the row from now on.

        Raises:
            InvalidArgumentError: the row hit or was filled before, or `kv` does not fit the layout.
            WindowOverflowError: `kv` is longer than the buffer.
            ClosedError: the batch is closed; SearchEndedError: by the end of its search.
        """
        self.check_open()
        if not 0 <= positive_int("row", row, minimum=0) < self.batch_size:
            raise InvalidArgumentError(f"row must be 0 to {self.batch_size - 1}, got {row}")
        if self._gathered[row]:
            raise InvalidArgumentError(f"row {row} has its tokens already; only rows that missed can be filled")
        if any(end != self._start for end in self._ends):
            raise InvalidArgumentError(f"row {row} must be filled before tokens are appended to the batch")
        self._storage.clock.current()  # before anything is copied, which a capture would take into its graph
        kv = check_fits(kv, self._storage.layout, rows=1)
        length = kv.lengths[0]
        if length > self.data.shape[3]:
            raise WindowOverflowError(f"kv has {length} tokens, the batch {self.data.shape[3]} columns")
        self.use_here(kv.keys, kv.values)
        with plain_torch_state(self.data):
            if length > self._start:
                self._move_right(length - self._start)
            columns = slice(self._start - length, self._start)
            source = kv.row(0)
            self.data[: self._layers, row, :, columns] = source.keys[:, 0].detach()
            self.data[self._layers :, row, :, columns] = source.values[:, 0].detach()
        self._gathered[row] = length
        self._side = (*self.side[:row], side, *self.side[row + 1 :])
        self._padding = None

    def _move_right(self, columns: int) -> None:
        start = self._start
        if start:
            self.data[:, :, :, columns : columns + start] = self.data[:, :, :, :start].clone()
        self.data[:, :, :, :columns] = 0
        self._start = start + columns
        self._ends = [self._start] * self._layers

    # For commits ---------------------------------------------------------------------------------------------------

    def pending_rows(self) -> Sequence[int]:
        """Rows not committed yet; a range where that is all of them."""
        if True not in self._committed:
            return range(len(self._committed))
        return [row for row, committed in enumerate(self._committed) if not committed]

    def check_committable(self, rows: Sequence[int], lengths: Sequence[int] | None = None) -> int | tuple[int, ...]:
        """New tokens of every row, or of each; or an error that says why `rows` cannot be committed.

        `lengths`: how many each of `rows` got, of those appended; all of them if left out. The caller uses the hold.
        """
        ends = self._ends
        if ends.count(ends[0]) < len(ends):
            raise InvalidArgumentError(f"batch has layers with different numbers of new tokens: they end at {ends}")
        new = ends[0] - self._start
        gathered, committed = self._gathered, self._committed
        if lengths is not None:
            return self._check_new_lengths(rows, lengths, new)
        if not new:
            raise InvalidArgumentError("batch has no new tokens: append() or advance() before commit")
        if 0 not in gathered and True not in committed:
            return new
        for row in rows:
            if not gathered[row]:
                raise InvalidArgumentError(
                    f"row {row} missed and was not filled: fill() it, or say in lengths= how many of the appended "
                    "tokens are its whole content"
                )
            self._check_not_committed(row)
        return new

    def _check_new_lengths(self, rows: Sequence[int], lengths: Sequence[int], new: int) -> int | tuple[int, ...]:
        checked = numbers_or_none("lengths", lengths) or []
        if len(checked) != len(rows):
            raise InvalidArgumentError(
                f"lengths must have one number for each of {len(rows)} committed rows, got {len(checked)}"
            )
        for row, length in zip(rows, checked, strict=True):
            if positive_int("lengths", length, minimum=0) > new:
                raise InvalidArgumentError(
                    f"lengths must be at most the {new} tokens appended to every row, got {length} for row {row}"
                )
            if not length and not self._gathered[row]:
                raise InvalidArgumentError(
                    f"lengths must be at least 1 for row {row}, which missed and was not filled, got 0"
                )
            self._check_not_committed(row)
        # As whole numbers of Python's own, in whatever they came: commits of the same lengths have the same shape.
        of_each = tuple([int(length) for length in checked])
        return of_each[0] if of_each.count(of_each[0]) == len(of_each) else of_each

    def _check_not_committed(self, row: int) -> None:
        if self._committed[row]:
            raise InvalidArgumentError(f"row {row} was committed before")

    def gathered(self, row: int) -> int:
        """Tokens that a row had before the new ones."""
        return self._gathered[row]

    def gathered_by(self, rows: Sequence[int]) -> tuple[int, ...]:
        """Tokens that each of `rows` had before the new ones."""
        gathered = self._gathered
        return tuple(
            gathered if len(rows) == len(gathered) and type(rows) is range else [gathered[row] for row in rows]
        )

    def end_commit(self, rows: Sequence[int], ended: bool) -> None:
        """Note commits; `ended`: they ended the batch, whose buffer goes back then."""
        self._storage.check_process()
        committed = self._committed
        if len(rows) == len(committed):
            self._committed = [True] * len(committed)
        else:
            for row in rows:
                committed[row] = True
        if ended:
            self._give_buffer_back()

    # Streams -------------------------------------------------------------------------------------------------------

    def use_here(self, *sources: Tensor) -> None:
        """Order the current stream after every use of the buffer so far; `sources` outlive what it does next."""
        if self._uses is not None:
            self._uses.join(self.data)
            for source in sources:
                self._storage.clock.protect(source)

    def wait(self, stream: object = None) -> None:
        """Order a stream (the current one if left out) after every use of the batch so far; does not block.

        To be called before the batch's tensors are used on another stream than the one it was used on last; that stream
        is counted in, and the buffer's next user is ordered after it.

        Raises:
            InvalidArgumentError, InvalidTypeError: it is no stream of the batch's device.
            StreamCaptureError: it is being captured into a graph, or a stream that used the batch is.
            ClosedError: the batch is closed; SearchEndedError: by the end of its search.
        """
        self.check_open()
        if stream is not None:
            self._storage.clock.check(stream)
        if self._uses is not None:
            self._uses.join(self.data, stream)

    def synchronize(self, timeout: float | None = None) -> None:
        """Block the calling thread until the gathered tokens are there; at once on a CPU.

        Raises:
            WaitTimeoutError: they were not there within `timeout` seconds (those of the storage if left out).
        """
        self._storage.check_process()
        ticks = NO_TICKS if self._uses is None else self._uses.gathered
        seconds = self._storage.wait_timeout if timeout is None else timeout
        if not self._storage.clock.synchronize(ticks, seconds):
            raise WaitTimeoutError(f"the device had not gathered this batch within {seconds:g} s")

    async def ready(self, timeout: float | None = None) -> None:
        """As `synchronize`, without holding the event loop."""
        self._storage.check_process()
        await anyio.lowlevel.checkpoint()
        if self._uses is not None:
            # Abandoned where its task is cancelled: it only looks, and its wait is bounded.
            await anyio.to_thread.run_sync(partial(self.synchronize, timeout), abandon_on_cancel=True)

    # Life ----------------------------------------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        """Whether it was closed, or committed whole, or its search closed."""
        return self.hold.released

    def close(self) -> None:
        """Let the entries go and give the buffer back. Never blocks; nothing happens the second time.

        Inside a critical section of the calling thread (in a finaliser, say) it is left to the next operation.
        """
        if not self.hold.released:
            self._storage.check_process()
            if gate.is_inside:
                self.abandon()
                return
            # Only who ends the hold, and only here, in its user's own thread: a search that closes meanwhile must not
            # hand the buffer on.
            if self._ledger.release(self.hold):
                self._give_buffer_back()

    def _give_buffer_back(self) -> None:
        if self._owns_buffer:
            ready = NO_TICKS if self._uses is None else self._uses.finish(self.data)
            if ready is not None:
                self._buffers.give_back(self.data, ready)

    def check_open(self) -> None:
        """Raise `ClosedError` if it is closed; `SearchEndedError`, which says why, if its search has ended."""
        self._storage.check_process()
        if self.hold.released:
            raise self.why_closed()

    def why_closed(self) -> ClosedError:
        """What is raised where it is used after its end."""
        ended = self.scope.why_ended()
        return ClosedError("this batch is closed: it was committed or closed before") if ended is None else ended

    def abandon(self) -> None:
        """Leave it to the next operation to close this. Takes no lock: finalisers come here, at any point."""
        hold = getattr(self, "hold", None)
        if hold is not None and not hold.released:
            self._ledger.abandon(partial(self._ledger.release_abandoned, hold))

    def __del__(self) -> None:
        hold = getattr(self, "hold", None)
        if hold is not None and not hold.released and not is_owned_elsewhere(hold.owner, self):
            self.abandon()

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"{sum(self.hits)} hits, lengths={self.lengths}, room={self.room}"
        return f"<Batch of {self.batch_size} rows, {state}>"
