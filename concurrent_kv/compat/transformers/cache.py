"""`BatchCache`: a batch of gathered rows as the cache of a transformers model."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable, Sequence
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DummyLayer, LinearAttentionLayer

from ..._checks import positive_int
from ...device.layout import KVLayout
from ...device.modes import writing_to
from ...device.moving import upload
from ...errors import InvalidArgumentError, InvalidTypeError, WindowOverflowError, shown
from ...pool.batch import Batch
from ...pool.padded_rows import PaddedRows
from ...pool.pool import KVPool
from ...search.search import Search
from .layouts import CacheLayout, LayerKind, Place, UnsupportedModelError, WindowLayout
from .states import TextState, of_layers, to_layers
from .stores import TextRows, TextStore
from .windows import side_of

__all__ = ["BatchCache"]


class BatchCache(Cache):  # type: ignore[misc]
    """What a model of transformers takes as `cache=`: what it caches goes to a batch, and comes from there.

    For forwards that users write, and for `generate()`: greedy, sampling, beams, assisted and prompt lookup. Afterwards
    `commit` stores the rows, as that of a pool or a search does. One call of the model at a time may use it.

    `generate()` leaves a text without keys and values of its last token, which the model was not given yet: a row goes
    on with that token.

    Args:
        batch: of a gather from pools of `fits.layout`, or what an evaluator hands to its model; of a `TextStore`'s
            where `fits.window` says that layers that slide have a pool of their own.
        fits: the model's `CacheLayout`; not needed where all of its layers keep keys and values of one shape.

    Raises:
        InvalidArgumentError: the batch is of another layout, or its window not of the same rows; or some rows have
            states and some have none.
    """

    def __init__(self, batch: PaddedRows | TextRows, fits: CacheLayout | None = None) -> None:
        rows = batch if isinstance(batch, TextRows) else TextRows(batch, None)
        self.rows, self.batch, self.window = rows, rows.full, rows.window
        batch, window = rows.full, rows.window
        self._made: tuple[Tensor, Tensor, Tensor] | None = None  # see `_columns`, and the padding that it was made of
        self._has_gaps = False  # rows were given different numbers of tokens: only a commit puts them in order
        self._full = _Rows(batch)
        self._sliding: _Rows | None = None
        if fits is None:
            layers: list[Any] = [_BatchLayer(self, self._full, number) for number in range(batch.keys.shape[0])]
        else:
            _check_fits("batch", batch, fits.layout)
            if fits.window is not None:
                self._sliding = _rows_of_window(batch, window, fits.window)
            layers = [_layer(self, fits, number) for number in range(len(fits.kinds))]
        if self._sliding is None and window is not None:
            raise InvalidArgumentError("window must be None where no layers have a pool of their own (fits.window)")
        super().__init__(layers=layers)
        self._stateful = [layer for layer in layers if isinstance(layer, LinearAttentionLayer)]
        self._keeps_tokens = any(isinstance(layer, _TokenLayer) for layer in layers)
        self._all_slide = self._sliding is not None and not any(
            isinstance(layer, _TokenLayer) and layer.rows is self._full for layer in layers
        )
        if self._stateful:
            to_layers([side_of(side) for side in batch.side], self._stateful)

    # What goes in --------------------------------------------------------------------------------------------------

    def model_inputs(
        self, input_ids: Tensor | Sequence[Sequence[int]], *, expand: int = 1, pad_token_id: int = 0
    ) -> dict[str, Any]:
        """What a forward of the model, or `generate()`, takes to go on from the batch's rows.

        `model(**cache.model_inputs(ids))`, `model.generate(**cache.model_inputs(ids), max_new_tokens=16)`.

        Args:
            input_ids: the new tokens of each row, `[rows, tokens]`, or a sequence for each. Where some have fewer, they
                are padded at the end: commit with `lengths=` before more is appended.
            expand: of how many rows of the batch, one after the other, each is given once: `generate()` multiplies its
                inputs by `num_beams` or `num_return_sequences`, but not the cache. Gather each parent as often.
            pad_token_id: a token that pads.

        Returns `input_ids` `[rows, tokens]`, `attention_mask` `[rows, columns and tokens]` (1 where a row has a token),
        `position_ids` `[rows, tokens]`, `cache` and `use_cache`.

        Raises:
            InvalidArgumentError: no token for a row, or not as many rows as the batch has; or a forward of this batch
                was cut off in the middle.
            UnsupportedModelError: rows of different numbers of tokens, for a model whose texts have states.
            ClosedError: the batch is closed.
        """
        batch = self.batch
        batch.check_open()
        if self._has_gaps:
            raise InvalidArgumentError(
                "input_ids cannot follow rows of different numbers of new tokens: commit them, and gather again"
            )
        self._check_even()
        expand = positive_int("expand", expand)
        if isinstance(input_ids, Tensor):
            lengths = [input_ids.shape[1] if input_ids.dim() == 2 else 0] * len(input_ids)
        else:
            lengths = [len(row) for row in input_ids]
        if len(lengths) * expand != batch.batch_size or 0 in lengths:
            raise InvalidArgumentError(
                f"input_ids must have at least one token for each of {batch.batch_size // expand} rows "
                f"(the batch's {batch.batch_size} by expand={expand}), got {shown(lengths)} tokens"
            )
        new, start, device = max(lengths), batch.end if self._keeps_tokens else 0, batch.data.device
        self._check_room(new)
        is_there, positions = self._columns()
        is_there, positions = is_there[::expand, : start + new], positions[::expand, batch.end : batch.end + new]
        if min(lengths) < new:
            if self._stateful:
                raise UnsupportedModelError(
                    f"input_ids must have as many tokens in every row: a state goes on with each, got {lengths}"
                )
            self._has_gaps = True
            length = upload(np.array(lengths, dtype=np.int64), device)[:, None]
            is_there = is_there * (torch.arange(start + new, device=device) < start + length)
            # Past a row's end the last one's once more: models with a table of positions look them all up.
            positions = torch.minimum(positions, positions[:, :1] + length - 1)
        if not isinstance(input_ids, Tensor):
            padded = [[*row, *[pad_token_id] * (new - length)] for row, length in zip(input_ids, lengths, strict=True)]
            input_ids = torch.tensor(padded, dtype=torch.long, device=device)
        return {
            "input_ids": input_ids.to(device),
            "attention_mask": is_there,
            "position_ids": positions,
            "cache": self,
            "use_cache": True,
        }

    def _columns(self) -> tuple[Tensor, Tensor]:
        """Of the buffer's columns, int64 `[rows, columns]`: whether each row has them, and its positions there.

        Where there are states alone, nothing of the tokens before is there to be masked.
        """
        padding = self.batch.padding
        if self._made is None or self._made[2] is not padding:
            columns = torch.arange(self.batch.data.shape[3], device=padding.device)
            of_rows = columns - padding[:, None]
            is_there = of_rows >= 0 if self._keeps_tokens else torch.ones_like(of_rows)
            self._made = is_there.long(), of_rows.clamp(min=0), padding
        is_there, positions, _ = self._made
        return is_there, positions

    def _check_even(self) -> None:
        """Raise where a forward was cut off when some layers had its tokens: others would go on from fewer."""
        ends = {layer.get_seq_length() for layer in self.layers if isinstance(layer, _TokenLayer)}
        if len(ends) > 1:
            raise InvalidArgumentError(
                "the batch cannot be used any more: a forward was cut off when some layers had its tokens and others "
                "had not; gather again"
            )

    def _check_room(self, tokens: int) -> None:
        room = self.batch.room if self.window is None else min(self.batch.room, self.window.room)
        if tokens > room:
            raise WindowOverflowError(
                f"input_ids has {tokens} tokens for a row, and the batch has room for {room}: gather with "
                f"room={tokens + self.batch.end - self.batch.start}, if the window of the pool allows it"
            )

    # What is stored ------------------------------------------------------------------------------------------------

    @property
    def side(self) -> tuple[object, ...]:
        """The side data that each row was committed with."""
        sides = [side_of(side) for side in self.batch.side]
        return tuple([side.side if isinstance(side, TextState) else side for side in sides])

    def sides(self, sides: Sequence[object] | None = None) -> list[object] | None:
        """Side data to commit with: `sides`, where texts have states, those as the model has left them, and where they
        have an entry for layers that slide, the write that both are of.

        What is committed by other means than `commit` (an evaluator's `Evaluated`, say) takes them from here.
        """
        return self.rows.sides(self._with_states(sides))

    def _with_states(self, sides: Sequence[object] | None) -> list[object] | None:
        if not self._stateful and self.window is None:
            return None if sides is None else list(sides)
        of_rows: list[object] = [None] * self.batch.batch_size if sides is None else list(sides)
        if len(of_rows) != self.batch.batch_size:
            raise InvalidArgumentError(
                f"sides must have one item for each of {self.batch.batch_size} rows, got {len(of_rows)}"
            )
        return of_layers(of_rows, self._stateful) if self._stateful else of_rows

    def commit(
        self,
        store: Search | KVPool | TextStore,
        keys: Sequence[Hashable],
        *,
        lengths: Sequence[int] | None = None,
        sides: Sequence[object] | None = None,
        new_tokens: int | None = None,
    ) -> None:
        """Store every row under its key; see `Search.commit` and `KVPool.commit`. May block.

        Args:
            store: what the batch was gathered from.
            keys: one for each row.
            lengths: of the tokens that the model was given since the gather, how many each row has; all if left out.
            sides: side data, one item for each row.
            new_tokens: how many tokens the model was given, for models that keep states alone.

        Raises:
            UnsupportedModelError: some of the tokens only, for a model whose texts have states.
            InvalidArgumentError, CapacityError, ClosedError, WaitTimeoutError: as `store.commit`; the first also where
                a forward of the batch was cut off in the middle.
        """
        batch = self.batch
        if not isinstance(batch, Batch):
            raise InvalidTypeError(f"batch must be a Batch to be committed here, got {type(batch).__name__}")
        self._check_even()
        if not self._keeps_tokens:
            new_tokens = positive_int("new_tokens", new_tokens)
            batch.crop(batch.end - batch.start)  # what an attempt that failed has stated
            batch.advance(new_tokens)
        new = batch.end - batch.start
        if lengths is None:
            lengths = [new] * batch.batch_size
        elif self._stateful and any(length != new for length in lengths):
            raise UnsupportedModelError(
                f"lengths must be the {new} tokens that the model was given, as a state belongs to all of them, got "
                f"{shown(lengths)}"
            )
        sides = self._with_states(sides)
        if isinstance(store, TextStore):
            store.commit(keys, self.rows, lengths=lengths, sides=sides)
        elif self.window is None:
            store.commit(keys, batch, lengths=lengths, sides=sides)
        else:
            raise InvalidArgumentError(
                f"store must be the TextStore that the rows are of (layers that slide have a store of their own), got "
                f"{shown(store)}"
            )

    # What transformers asks for --------------------------------------------------------------------------------------

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Have each row go on from row `beam_idx[row]`; see `Batch.reorder`."""
        if not isinstance(self.batch, Batch):
            raise InvalidArgumentError("beams need a batch of their own: gather it, and do not hand it to an evaluator")
        self.batch.reorder(beam_idx.tolist())
        if isinstance(self.window, Batch):
            self.window.reorder(beam_idx.tolist())
        for layer in self._stateful:
            LinearAttentionLayer.reorder_cache(layer, beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the newest tokens, `-tokens_to_remove` of them; see `Batch.crop`.

        Raises:
            UnsupportedModelError: the model's texts have states, which cannot go back.
        """
        if self._stateful and tokens_to_remove:
            raise UnsupportedModelError("a state cannot be cropped: it goes on with every token")
        for rows in (self._full, self._sliding):
            if rows is not None:
                rows.batch.crop(-tokens_to_remove)
                for layer in rows.records:
                    layer.end = layer.index_end = rows.batch.end

    @property
    def is_croppable(self) -> bool:
        """Whether tokens can be taken back."""
        return not self._stateful

    @property
    def is_compileable(self) -> bool:
        """False: `generate()` compiles nothing for it, as the next batch has other memory."""
        return False

    def reset(self) -> NoReturn:
        """Refused: what was gathered stays."""
        raise InvalidArgumentError("the rows of a batch cannot be reset: gather once more")

    def batch_repeat_interleave(self, repeats: int) -> NoReturn:
        """Refused: a batch has the rows that it was gathered with."""
        raise InvalidArgumentError(f"the rows of a batch cannot be repeated: gather each key {repeats} times")

    def batch_select_indices(self, indices: Tensor) -> NoReturn:
        """Refused: a batch has the rows that it was gathered with."""
        raise InvalidArgumentError("the rows of a batch cannot be left out: gather the keys that are wanted")

    @property
    def batch_size(self) -> int:
        """Number of rows."""
        return self.batch.batch_size

    def advanced(self, rows: _Rows) -> None:
        """A layer was given tokens: once all were, the batch has them."""
        if rows.records:
            end = min([layer.end for layer in rows.records])
            if end > rows.batch.end:
                rows.batch.advance(end - rows.batch.end)
        if self._all_slide:  # no layer gives the batch any, which counts them
            new = rows.batch.end - rows.batch.start - (self.batch.end - self.batch.start)
            if new > 0:
                self.batch.advance(new)

    def __repr__(self) -> str:
        return f"BatchCache({self.batch!r})"


class _Rows:
    """The rows of a batch, and where they stand among the columns that a model counts.

    Args:
        batch: these rows.
        tokens: of a row, that a new token sees; None: all.
        first: the model's column of the batch's first.
    """

    def __init__(self, batch: PaddedRows, tokens: int | None = None, first: int = 0) -> None:
        self.batch, self.tokens, self.first = batch, tokens, first
        self.records: list[_RecordLayer] = []

    def first_seen(self, end: int) -> int:
        """The first of the batch's columns that tokens from `end` on see."""
        return 0 if self.tokens is None else max(0, end - self.tokens)


def _rows_of_window(batch: PaddedRows, window: PaddedRows | None, fits: WindowLayout) -> _Rows:
    if window is None:
        raise InvalidArgumentError(
            "window must be what layers that slide keep of the rows (fits.window): see TextStore, or leave out step= "
            "of CacheLayout.of for these layers to keep all tokens with the others"
        )
    _check_fits("window", window, fits.layout)
    expected = tuple([min(length, fits.tokens) for length in batch.lengths])
    if window.lengths != expected:
        raise InvalidArgumentError(
            f"window must have the newest {fits.tokens} tokens of batch's rows, {shown(expected)}, got "
            f"{shown(window.lengths)}"
        )
    return _Rows(window, fits.tokens, batch.start - window.start)


def _check_fits(name: str, batch: PaddedRows, layout: KVLayout) -> None:
    planes, _, heads, _, width = batch.data.shape
    if (planes, heads, width) != (2 * layout.num_layers, layout.num_heads, layout.head_dim):
        raise InvalidArgumentError(f"{name} must be of pools of {layout}, got buffers {tuple(batch.data.shape)}")


def _layer(cache: BatchCache, fits: CacheLayout, number: int) -> Any:
    kind, rows = fits.kinds[number], cache._full
    layer, places = fits.layers[number], fits.places[number] if fits.places else ()
    if cache._sliding is not None and fits.window is not None and kind.can_drop:
        rows, layer = cache._sliding, fits.window.layers[number]
        places = fits.window.places[number] if fits.window.places else ()
    if layer is not None:
        return _BatchLayer(cache, rows, layer)
    if not kind.states:
        return _RecordLayer(cache, rows, places) if kind.parts else DummyLayer()
    if not kind.parts:
        return _StateLayer(kind)
    return _MixedLayer(cache, rows, kind, places)


class _TokenLayer(CacheLayerMixin):  # type: ignore[misc]
    """A layer that knows tokens of every row: all of them, or those in its window, which the model masks by itself."""

    is_croppable = True
    supports_early_init = False
    rows: _Rows
    _cache: BatchCache

    @property
    def is_sliding(self) -> bool:
        """Whether masks for layers that slide are as wide as this one says."""
        return self.rows.tokens is not None

    @abstractmethod
    def end_here(self) -> int:
        """The column of its batch after its newest token."""

    def lazy_initialization(self, *args: object, **kwargs: object) -> None:
        """Nothing: the batch is there."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        end = self.end_here()
        first = self.rows.first_seen(end)
        return end + query_length - first, self.rows.first + first

    def get_seq_length(self) -> int:
        return self.rows.first + self.end_here()

    def get_max_length(self) -> int:
        return self._cache.batch.end + self._cache.batch.room


class _BatchLayer(_TokenLayer):
    """One of the batch's own layers."""

    def __init__(self, cache: BatchCache, rows: _Rows, number: int) -> None:
        super().__init__()
        self._cache, self.rows, self._number = cache, rows, number
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        rows = self.rows
        if rows.tokens is None:
            return rows.batch.append(self._number, key_states, value_states)
        first = rows.first_seen(self.end_here())
        keys, values = rows.batch.append(self._number, key_states, value_states)
        self._cache.advanced(rows)
        return keys[:, :, first:], values[:, :, first:]

    def end_here(self) -> int:
        return self.rows.batch.layer_end(self._number)


class _RecordLayer(_TokenLayer):
    """A layer whose parts stand in the records of tokens."""

    def __init__(self, cache: BatchCache, rows: _Rows, places: tuple[Place, ...]) -> None:
        super().__init__()
        self._cache, self.rows, self._places = cache, rows, places
        self.end = self.index_end = rows.batch.end
        self.is_initialized = self.is_indexer_initialized = True
        self.indexer_position_ids = None
        rows.records.append(self)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        first, end = self.rows.first_seen(self.end), self.end + key_states.shape[2]
        keys = self._write(self._places[0], key_states, end)
        values = self._write(self._places[1], value_states, end)
        self.end = end
        self._cache.advanced(self.rows)
        return (keys[:, :, first:], values[:, :, first:]) if first else (keys, values)

    def update_indexer(self, indexer_key_states: Tensor) -> Tensor:
        """New keys `[batch, tokens, width]` of an indexer; they may come before or after the layer's own."""
        new = indexer_key_states.unsqueeze(1)
        self.index_end += new.shape[2]
        return self._write(self._places[2], new, self.index_end).squeeze(1)

    def end_here(self) -> int:
        return self.end

    def _write(self, place: Place, new: Tensor, end: int) -> Tensor:
        """Put `[batch, heads, tokens, width]` before column `end`; returns all of it, a view."""
        batch = self.rows.batch
        batch.check_open()
        data = batch.data
        rows, heads, tokens, width = new.shape
        if (rows, heads, width) != (data.shape[1], place.heads, place.width) or new.dtype != data.dtype:
            raise InvalidArgumentError(
                f"keys and values must have the shape [batch={data.shape[1]}, heads={place.heads}, tokens, "
                f"width={place.width}] and be {data.dtype}, got {tuple(new.shape)} and {new.dtype}"
            )
        if end > data.shape[3]:
            raise WindowOverflowError(
                f"{tokens} new tokens do not fit: {end - tokens} of the batch's {data.shape[3]} columns are taken; "
                "gather with more room=, up to the window"
            )
        batch.use_here(new)
        of_token = data[place.plane, :, 0, :end, place.first : place.first + heads * width]
        found: Tensor = of_token.view(*of_token.shape[:2], heads, width).transpose(1, 2)
        with writing_to(data):
            found[:, :, end - tokens :].copy_(new)
        return found


class _StateLayer(LinearAttentionLayer):  # type: ignore[misc]
    """A layer that keeps states of the text, and nothing of its tokens."""

    def __init__(self, kind: LayerKind) -> None:
        super().__init__(number_of_states=kind.states)


class _MixedLayer(LinearAttentionLayer, _RecordLayer):  # type: ignore[misc]
    """A layer that keeps both."""

    is_compileable = False

    def __init__(self, cache: BatchCache, rows: _Rows, kind: LayerKind, places: tuple[Place, ...]) -> None:
        _RecordLayer.__init__(self, cache, rows, places)
        LinearAttentionLayer.__init__(self, number_of_states=kind.states)

    def get_max_length(self) -> int:
        return _RecordLayer.get_max_length(self)
