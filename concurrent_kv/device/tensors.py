"""`SlotTensor`: the tensor of token slots, and the two copies that move tokens in and out of it.

Each copy is the same few operator calls whatever the batch and the number of layers: indices say everything. In host
memory it is one call of compiled code instead, where the package was built with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ..errors import ClosedError
from ..native import native
from .appends import HostMemory, host_memory
from .buffers import FreeBuffers
from .layout import KVLayout
from .modes import plain_torch_state
from .moving import joined_on, upload
from .positions import Correction, PositionSteps, PositionTable
from .slot_numbers import Slots, as_array
from .tensor_checks import LARGE_BYTES, address_of

__all__ = ["Block", "SlotTensor", "in_units"]

UNIT = torch.complex128  # the widest type: 16 bytes, copied as they are

Indices = npt.NDArray[np.int64]


DROPS_AT_ONCE = 4  # of which the differences are looked up together: each takes as much memory as the batch


class SlotRows(Protocol):
    """What a gather asks of the tables of the books, which stand above this."""

    def columns(self, rows: list[int], end: int, columns: int) -> Any:
        """int64 slots `[rows, columns]`, each row's newest before column `end`, 0 elsewhere."""


Block: TypeAlias = tuple[slice, slice]  # the rows and the columns of a buffer whose tokens it is, row by row


class _Together:
    """Rows of several tables as those of one."""

    def __init__(self, parts: Sequence[tuple[SlotRows, list[int]]]) -> None:
        self._parts = parts

    def columns(self, rows: list[int], end: int, columns: int) -> Indices:
        """All of them, whatever `rows` says."""
        found = [np.asarray(tables.columns(of_part, end, columns)) for tables, of_part in self._parts]
        return np.concatenate([part.view(np.int64).reshape(-1, columns) for part in found])


def in_units(tokens: Tensor) -> Tensor:
    """Contiguous `[2 * layers, tokens, heads, head_dim]` as `[2 * layers, tokens, units]` of 16 bytes, if possible.

    `index_copy_` moves its numbers one by one: the fewer they are, the sooner it is done.
    """
    flat = tokens.flatten(2)
    return flat if flat.shape[2] * flat.element_size() % UNIT.itemsize else flat.view(UNIT)


def _add_steps(
    out: npt.NDArray[Any], moved: Indices, positions: Indices, count: int, differences: npt.NDArray[Any]
) -> None:
    """Add what each token is owed for every drop that it has outlived, one after the other.

    Args:
        out: `[2 * layers, batch, heads, columns, head_dim]`.
        moved, positions: `[batch, columns]`, see `SlotTensor.correct`.
        count: tokens that every drop took.
        differences: `[positions, 2 * layers, heads, head_dim]`, of one drop.
    """
    left = (moved // count).ravel()
    # Those that have outlived most drops first: of each drop, those that it concerns are a slice.
    order = np.argsort(-left, kind="stable")[: np.count_nonzero(left > 0)]
    rows, columns = np.divmod(order, out.shape[3])
    tokens = out[:, rows, :, columns]  # [tokens, 2 * layers, heads, head_dim]
    at, left = (positions + moved).ravel()[order], left[order]
    for drop in range(1, int(left.max(initial=0)) + 1):
        concerned = int(np.searchsorted(-left, -drop, side="right"))
        tokens[:concerned] += differences[at[:concerned] - drop * count]
    out[:, rows, :, columns] = tokens


class SlotTensor:
    """Slots for tokens, `[2 * layers, slots, heads, head_dim]`: all layers' keys, then all layers' values.

    Slot 0 is zeros for good and serves all padding. Allocated once.

    Args:
        layout: shapes, dtype and device.
        num_slots: usable slots (1 to `num_slots`).
        compiled: whether compiled code may read and write it; not where streams are simulated.

    Attributes:
        data: `[2 * layers, slots + 1, heads, head_dim]`, until they are given back.
        freed: whether they were.
    """

    def __init__(self, layout: KVLayout, num_slots: int, *, compiled: bool = True) -> None:
        self.layout = layout
        self.num_slots = num_slots
        self.freed = False
        self._on_host = compiled and layout.device.type == "cpu"  # whether its bytes may be written to without torch
        self._native: Any = native if self._on_host else None
        shape = (2 * layout.num_layers, num_slots + 1, layout.num_heads, layout.head_dim)
        with plain_torch_state():
            data = torch.empty(shape, dtype=layout.dtype, device=layout.device)
            if self._native is not None:
                self._native.advise_huge_pages(data.data_ptr(), data.nbytes)
            self.data: Tensor = data.zero_()
        self._shape = (*shape[:3], layout.head_dim * layout.dtype.itemsize)
        self._batch_shape = (shape[0], layout.num_heads, layout.head_dim)  # of a batch, without its rows and columns
        self._large_slots = -(-LARGE_BYTES // layout.bytes_per_token)
        self._heads: Indices = np.arange(layout.num_heads, dtype=np.int64)
        self.buffers = FreeBuffers(layout)

    def __getattr__(self, name: str) -> Any:
        if name == "data":
            raise ClosedError("the storage of this pool was freed by close()")
        raise AttributeError(name)

    @property
    def is_compiled(self) -> bool:
        """Whether compiled code copies."""
        return self._native is not None

    @property
    def nbytes(self) -> int:
        """Bytes of the slots, the zero slot included."""
        return (self.num_slots + 1) * self.layout.bytes_per_token

    def gather(
        self, tables: SlotRows, rows: list[int], end: int, out: Tensor, *, whole: bool = True
    ) -> tuple[Tensor, ...]:
        """Copy the tokens of some rows of the tables into `out`, each row's newest before column `end`.

        `out` is contiguous, `[2 * layers, batch, heads, columns, head_dim]`. Padding becomes zeros; so do the columns
        from `end` on, which may stay as they are unless `whole`. Returns the indices, which have to live until the copy
        is done.
        """
        columns, data = out.shape[3], self.data  # kept: another thread may free it meanwhile
        address = 0 if self._native is None else address_of(out, out.nbytes)
        if address:
            filled = columns if whole else end
            self._native.gather(data.data_ptr(), self._shape, address, len(rows), columns, end, filled, tables, rows)
            if not out.is_inference():
                increment_version(out)
            return ()
        table = tables.columns(rows, end, columns)
        if not isinstance(table, np.ndarray):
            table = np.frombuffer(table, dtype=np.int64).reshape(len(rows), columns)
        index = self._index((table[:, None, :] * self.layout.num_heads + self._heads[:, None]).ravel())
        with plain_torch_state(out):
            torch.index_select(self._by_head(data), 1, index, out=self._by_head(out))
        return (index,)

    def gather_together(
        self, parts: Sequence[tuple[SlotRows, list[int]]], end: int, out: Tensor, *, whole: bool = True
    ) -> tuple[Tensor, ...]:
        """As `gather`, of rows of several tables: those of each after those of the one before."""
        batch, columns = out.shape[1], out.shape[3]
        address = 0 if self._native is None else address_of(out, out.nbytes)
        if address:
            row_bytes = self.layout.num_heads * columns * self._shape[3]
            filled, data = columns if whole else end, self.data  # kept, as in `gather`
            for tables, rows in parts:
                self._native.gather(data.data_ptr(), self._shape, address, batch, columns, end, filled, tables, rows)
                address += len(rows) * row_bytes
            if not out.is_inference():
                increment_version(out)
            return ()
        return self.gather(_Together(parts), [], end, out)

    def gather_stepwise(
        self,
        tables: SlotRows,
        rows: list[int],
        end: int,
        out: Tensor,
        owed: Sequence[Correction],
        steps: PositionSteps,
        *,
        whole: bool = True,
    ) -> bool:
        """As `gather`, and add what the tokens are owed of rows that are owed `steps`; False if compiled code cannot.

        Args:
            owed: what each row is owed.
            steps: what is owed for each drop.
        """
        address = address_of(out) if self._native is not None and out.dtype is torch.float32 else 0
        difference = address_of(steps.rows) if address else 0
        if not difference:
            return False
        columns, data = out.shape[3], self.data
        filled = columns if whole else end
        batch = (address, len(rows), columns, end, filled)
        table = (difference, steps.layout.max_tokens, steps.count)
        of_rows = (tables, rows, owed, steps)
        self._native.gather_stepwise(data.data_ptr(), self._shape, *batch, *of_rows, *table)
        if not out.is_inference():
            increment_version(out)
        return True

    def scatter(
        self,
        source: Tensor,
        rows: Indices,
        columns: Indices,
        slots: Slots,
        difference: Tensor | None = None,
        runs: int = 0,
        block: Block | None = None,
        memory: HostMemory | None = None,
    ) -> tuple[Tensor, ...]:
        """Copy token `columns[i]` of row `rows[i]` of `source` into slot `slots[i]`, for every `i`.

        Args:
            source: contiguous, `[2 * layers, batch, heads, columns, head_dim]`.
            rows, columns: one number for each token.
            slots: as many.
            difference: `[2 * layers, kept, heads, head_dim]`, added to each of the first `runs` runs of `kept` tokens.
            runs: see `difference`.
            block: `rows` and `columns` once more, if they are a block and `slots` are a range;
                a `difference` is then for each of its rows.
            memory: that of `source` when tokens were appended to it, if they were.

        Returns the indices and temporaries, which have to live until the copy is done.
        """
        if self._native is not None and (len(slots) < self._large_slots or torch.get_num_threads() == 1):
            # Its user may have given it other memory since.
            if not memory or memory[0] is not source or source.data_ptr() != memory[2]:
                memory = host_memory(source) if self._is_batch(source) else ()
            added = (0, 0, 1, 0) if difference is None else self._addends(difference, runs)
            if memory and added is not None:
                data, batch = self.data, (memory[2], memory[4], memory[6], *added)  # kept, as in `gather`
                self._native.scatter(data.data_ptr(), self._shape, *batch, rows, columns, slots)
                return ()
        with plain_torch_state():
            source = source.detach()
            if block is None:
                return self._copy_tokens(source, rows, columns, slots, difference, runs)
            # No indices, and no copy on the way.
            self._copy_block(source, block, int(slots[0]), difference)
            return ()

    def _is_batch(self, source: Tensor) -> bool:
        """Whether a tensor has the shape and dtype of a batch."""
        shape = source.shape
        fits = len(shape) == 5 and (shape[0], shape[2], shape[4]) == self._batch_shape
        return fits and source.dtype is self.layout.dtype

    def scatter_parts(
        self, keys: Tensor, values: Tensor, rows: Indices, columns: Indices, slots: Slots, block: Block | None = None
    ) -> tuple[Tensor, ...]:
        """As `scatter`, of keys and values in two tensors of the layout's shape, dtype and device."""
        data = self.data
        plain = self._native is not None and keys.is_contiguous() and values.is_contiguous()
        addresses = (address_of(keys), address_of(values)) if plain else (0, 0)
        if not all(addresses):
            with plain_torch_state():
                joined = joined_on(data.device, [keys.detach(), values.detach()])
            return joined, *self.scatter(joined, rows, columns, slots, block=block)
        planes, number, heads, head_bytes = self._shape
        half, start = (planes // 2, number, heads, head_bytes), data.data_ptr()
        _, batch, _, width, _ = keys.shape
        for address in addresses:
            self._native.scatter(start, half, address, batch, width, 0, 0, 1, 0, rows, columns, slots)
            start += planes // 2 * number * heads * head_bytes
        return ()

    def _addends(self, difference: Tensor, runs: int) -> tuple[int, int, int, int] | None:
        """What compiled code takes for differences; None where it must not look at their memory."""
        kept, heads, head_dim = difference.shape[1:]
        plain = difference.dtype is torch.float32 and difference.is_cpu
        if not plain or difference.stride()[1:] != (heads * head_dim, head_dim, 1):
            return None
        address = address_of(difference)
        return (address, difference.stride(0) * difference.element_size(), kept, runs * kept) if address else None

    def _copy_tokens(
        self, source: Tensor, rows: Indices, columns: Indices, slots: Slots, difference: Tensor | None, runs: int
    ) -> tuple[Tensor, ...]:
        layout, data = self.layout, self.data
        flat = ((rows * layout.num_heads)[:, None] + self._heads) * source.shape[3] + columns[:, None]
        source_index, slot_index = self._index(flat.ravel()), self._index(as_array(slots))
        tokens = torch.index_select(self._by_head(source), 1, source_index)
        tokens = tokens.view(data.shape[0], len(slots), layout.num_heads, layout.head_dim)
        if difference is not None:
            corrected = tokens if runs * difference.shape[1] == len(slots) else tokens[:, : runs * difference.shape[1]]
            corrected = corrected.view(data.shape[0], runs, *difference.shape[1:])
            corrected.add_(difference.unsqueeze(1))
        in_units(data).index_copy_(1, slot_index, in_units(tokens))
        return source_index, slot_index, tokens

    def _copy_block(self, source: Tensor, block: Block, first_slot: int, difference: Tensor | None) -> None:
        data, layout = self.data, self.layout
        of_rows, of_columns = block
        rows, columns = of_rows.stop - of_rows.start, of_columns.stop - of_columns.start
        shape = (data.shape[0], rows, columns, layout.num_heads, layout.head_dim)
        layers, row, head, column, _ = source.stride()
        first = source.storage_offset() + of_rows.start * row + of_columns.start * column
        tokens = source.as_strided(shape, (layers, row, column, head, 1), first)
        layers, slot, head, _ = data.stride()
        into = data.as_strided(shape, (layers, columns * slot, slot, head, 1), first_slot * slot)
        if difference is None:
            into.copy_(tokens)
        else:
            torch.add(tokens, difference.unsqueeze(1), out=into)

    def read_slots(self, slots: Indices) -> Tensor:
        """The tokens of some slots, in host memory: contiguous `[slots, 2 * layers, heads, head_dim]`. Blocks."""
        with plain_torch_state():
            data = self.data
            found = torch.index_select(in_units(data).transpose(0, 1), 0, self._index(slots))
            return found.contiguous().cpu().view(data.dtype).view(len(slots), data.shape[0], *data.shape[2:])

    def write_slots(self, slots: Slots, tokens: Tensor) -> None:
        """Copy tokens in host memory, of any dtype, `[slots, 2 * layers, heads, head_dim]`, into some slots. Blocks."""
        with plain_torch_state():
            planes = tokens.to(self.layout.device, self.layout.dtype).transpose(0, 1)
            if type(slots) is range:
                self.data[:, slots.start : slots.stop].copy_(planes)
            else:
                in_units(self.data).index_copy_(1, self._index(as_array(slots)), in_units(planes.contiguous()))

    def correct(self, out: Tensor, moved: Indices, positions: Indices, table: PositionTable) -> tuple[Tensor, ...]:
        """Add the differences of tokens that moved to a gathered buffer.

        Args:
            out: `[2 * layers, batch, heads, columns, head_dim]`.
            moved: `[batch, columns]`, how far each token stands before the position it was written at.
            positions: `[batch, columns]`, where each token stands now.
        """
        layout = self.layout
        rows = (moved * table.window + positions)[:, None, :] * layout.num_heads + self._heads[None, :, None]
        index = self._index(rows.ravel())
        difference = torch.index_select(table.rows, 1, index)
        self._by_head(out).add_(difference)
        return index, difference

    def correct_stepwise(
        self, out: Tensor, moved: Indices, positions: Indices, steps: PositionSteps
    ) -> tuple[Tensor, ...]:
        """As `correct`, one drop after the other: a sum of differences would be rounded otherwise.

        Returns what has to live until it is done.
        """
        numbers = steps.numbers if self._on_host and address_of(out) else None
        if numbers is not None:
            _add_steps(out.detach().numpy(), moved, positions, steps.count, numbers)
            if not out.is_inference():
                increment_version(out)
            return ()
        heads, nowhere, used = self.layout.num_heads, steps.layout.max_tokens, []
        left, at = moved // steps.count, positions + moved
        drops, most = np.arange(1, DROPS_AT_ONCE + 1)[:, None, None], int(left.max())
        for first in range(0, most, DROPS_AT_ONCE):
            drop = first + drops[: most - first]
            # A token that has outlived fewer gets -0.0 added, which changes none.
            position = np.where(left >= drop, at - drop * steps.count, nowhere)
            index = self._index((position[:, :, None, :] * heads + self._heads[:, None]).ravel())
            differences = torch.index_select(steps.rows, 1, index)
            for difference in differences.chunk(len(drop), 1):
                self._by_head(out).add_(difference)
            used += [index, differences]
        return tuple(used)

    def _by_head(self, tensor: Tensor) -> Tensor:
        """A contiguous tensor as `[2 * layers, rows, head_dim]`: one row for each head of each token."""
        return tensor.view(tensor.shape[0], -1, self.layout.head_dim)

    def _index(self, index: Indices) -> Tensor:
        return upload(index, self.layout.device)

    def free(self) -> None:
        """Give the memory back; copies under way keep theirs until they are done."""
        self.freed = True
        self.__dict__.pop("data", None)
        self.buffers.close()
