"""`PaddedRows`: tokens of many entries in one padded buffer, as a model reads it and appends to it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from functools import partial

import anyio.lowlevel
import anyio.to_thread
import numpy as np
from torch import Tensor

from .._checks import positive_int
from ..books.records import Entry
from ..device.appends import ALL_LAYERS, HostMemory, append_in, host_memory
from ..device.modes import plain_torch_state, writing_to
from ..device.moving import upload
from ..device.stream_uses import StreamUses
from ..device.streams import NO_TICKS
from ..device.tensor_checks import check_tensor
from ..errors import InvalidArgumentError, WaitTimeoutError, WindowOverflowError
from .handle import Handle
from .storage import KVStorage

__all__ = ["PaddedRows"]


class PaddedRows(Handle):
    """Rows of tokens, left-padded with zeros to the longest; the valid tokens of every row end at the same column.

    Free room for new tokens follows. Each layer's K and V are contiguous `[batch, heads, columns, head_dim]`. One
    thread at a time may use it.

    On a GPU the tokens come in the order of the stream that gathered them. What goes through the methods here is
    ordered by itself, on whatever stream; before the tensors are used on another stream than the one they were used on
    last, that stream has to `wait`.

    Attributes:
        data: the buffer `[2 * layers, batch, heads, columns, head_dim]`: all layers' keys, then all layers' values.
        entries: what each row was gathered from; None for a miss.
    """

    _internal = frozenset(("check_open", "memory", "use_here"))

    _how_to_drop = "commit with"  # the beginning of advice

    # Set by what makes it: a call more would be felt in every gather.
    data: Tensor
    entries: Sequence[Entry | None]
    _storage: KVStorage
    _uses: StreamUses | None  # None on a CPU
    _layers: int
    _start: int
    _ends: list[int]
    _gathered: list[int]
    # Made when they are asked for: not every model does.
    _parts: tuple[Tensor, ...] = ()  # see `_parts_to`
    _hits: tuple[bool, ...] | None = None
    _side: tuple[object, ...] | None = None
    _padding: Tensor | None = None
    memory: HostMemory | None = None  # of the buffer; looked at by the first append

    @abstractmethod
    def check_open(self) -> None:
        """Raise `ClosedError` if it is closed."""

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
        """Tokens of each row, appended ones included: the position of its next one. 0 for a miss that has none yet.

        A commit with `lengths=` says that fewer of the appended ones are valid, and that those appended to a miss are.
        """
        new = self.end - self._start
        return tuple([length + new for length in self._gathered] if new else self._gathered)

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

        Returns the layer's keys and values up to and including them, `[batch, heads, columns, head_dim]` (views). What
        is written is a copy without its gradient: none flows back through what is returned.

        Raises:
            WindowOverflowError: no room is left for them.
            InvalidArgumentError: wrong shape, or no such layer.
            ClosedError: the batch is closed; SearchEndedError: by the end of its search, which a `JointBatch` outlasts.
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
        (views). No gradient flows back through them, as with `append`.

        Raises:
            WindowOverflowError: no room is left for them.
            InvalidArgumentError: wrong shape, or some layers have more new tokens than others.
            ClosedError, SearchEndedError: as from `append`.
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
        if self.memory is None:
            self.memory = host_memory(self.data)
        tokens = append_in(self.memory, layer, end, keys, values)
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
            ClosedError, SearchEndedError: as from `append`.
        """
        self.check_open()
        tokens = positive_int("tokens", tokens)
        if self._uses is not None:
            self.use_here()
        ends = self._ends
        self._check_room(max(ends), tokens)
        are_equal = ends.count(ends[0]) == len(ends)
        self._ends = [ends[0] + tokens] * len(ends) if are_equal else [end + tokens for end in ends]

    def crop(self, tokens: int) -> None:
        """Take back the newest `tokens` columns of every layer; the next tokens go in their place.

        Raises:
            InvalidArgumentError: fewer were appended to some layer.
            ClosedError, SearchEndedError: as from `append`.
        """
        self.check_open()
        tokens = positive_int("tokens", tokens, minimum=0)
        if tokens > self.end - self._start:
            raise InvalidArgumentError(
                f"tokens must be at most the {self.end - self._start} that were appended to every layer, got {tokens}"
            )
        self._ends = [end - tokens for end in self._ends]

    def layer_end(self, layer: int) -> int:
        """The column after the newest token of one layer: within a model's step some layers are ahead of others."""
        return self._ends[self._layer_number(layer)]

    def _check_room(self, end: int, tokens: int) -> int:
        columns = self.data.shape[3]
        if end + tokens <= columns:
            return end + tokens
        new = end + tokens - self._start  # of each row, in all
        raise WindowOverflowError(
            f"{tokens} new tokens do not fit: {end} of the batch's {columns} columns are taken; {self._advice(new)}"
        )

    def _advice(self, new: int) -> str:
        """What would do where rows get `new` tokens, which there is no room for."""
        longest, window = max(self._gathered), self._storage.layout.max_tokens
        if new > window:
            return f"the window is {window} tokens"
        if longest + new <= window:
            return f"{self._how_to_get(new)}, which the window of {window} allows"
        return (
            f"the longest row has {longest} of the window's {window} tokens; {self._how_to_drop} an overflow policy "
            f"of limit={window + 1 - new} or less (and step={new}, to have that checked), which leaves room for steps "
            f"of {new}"
        )

    def _how_to_get(self, room: int) -> str:
        return f"gather with room={room}"

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
            ClosedError, SearchEndedError: as from `append`.
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
