"""`ModelCall`: leaves of any searches and pools gathered together, given to a model once, and committed."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from time import perf_counter
from typing import Any

from torch import Tensor

from .._checks import hash_of
from ..device.buffers import new_buffer
from ..device.streams import NO_TICKS, Ticks
from ..errors import (
    ClosedError,
    InvalidArgumentError,
    InvalidTypeError,
    KeyNotFoundError,
    WaitTimeoutError,
    WindowOverflowError,
    shown,
)
from ..model.overflow import Overflow
from ..pool.joint import JointBatch, Part, open_together
from ..pool.pool import KVPool, gather_part_of_pool
from ..pool.storage import KVStorage
from ..search.search import Search, gather_part_of_search, storage_of
from .leaves import NO_PARENT, Evaluated, Leaf, Model
from .queue import Group
from .stats import CallTimes
from .tickets import Row, Walker

__all__ = ["ModelCall"]

# Tokens of the calls and of walks led on, of whichever evaluators, that the current context was entered in.
calls_here: ContextVar[tuple[object, ...]] = ContextVar("concurrent_kv calls of models", default=())


class ModelCall:
    """How an evaluator's calls are made, and walks led on. Several threads may do so at the same time.

    Args:
        storage: what the leaves' searches and pools are over.
        model: see `Evaluator`.
        room: columns that it appends to, at most.
        overflow: what happens to rows of pools that outgrow the window.
        row_sizes: of batches, in ascending order; each is padded to the next. As long as the leaves are where there are
            none.
    """

    def __init__(
        self,
        storage: KVStorage,
        model: Model[Any, Any],
        *,
        room: int | None,
        overflow: Overflow | None,
        row_sizes: Sequence[int],
    ) -> None:
        self.storage = storage
        self._model = model
        self._room = room
        self._longest = storage.layout.max_tokens - (room or 1)  # that a parent may be: one token is always appended
        self._overflow = overflow
        self._row_sizes = row_sizes
        self._fixed: dict[int, list[tuple[Tensor, Ticks]]] = {size: [] for size in row_sizes}  # that no call uses now
        self._under_way: set[object] = set()  # tokens of what is done now

    @property
    def is_made_here(self) -> bool:
        """Whether a call that is under way asks, or a walk that is led on, or what they have made in their context."""
        return any(token in self._under_way for token in calls_here.get())

    def check_leaf(self, leaf: object) -> None:
        """Raises if something is no leaf that can be handed in."""
        if not isinstance(leaf, Leaf):
            raise InvalidTypeError(f"leaves must be of type Leaf, got {type(leaf).__name__}")
        store = leaf.store
        if not isinstance(store, (Search, KVPool)):
            raise InvalidTypeError(
                f"leaf.store must be a Search or a KVPool (a facade's `sync`), got {type(store).__name__}"
            )
        if (storage_of(store) if isinstance(store, Search) else store.storage) is not self.storage:
            raise InvalidArgumentError("leaf.store must be of the evaluator's manager, and is of another")
        hash_of(leaf.parent, "leaf.parent")
        hash_of(leaf.child, "leaf.child")

    def work(self, group: Group, times: CallTimes) -> int:
        """Lead the walks of a group on, or call the model for its rows; returns how many the model had.

        What is raised here but not by an `Exception` leaves some as they were.
        """
        token, before = object(), calls_here.get()
        try:
            self._under_way.add(token)
            calls_here.set((*before, token))
            if group.walkers:
                self._lead_on(group.walkers, times)
                return 0
            return self._run(group.rows, times)
        finally:
            calls_here.set(before)
            self._under_way.discard(token)

    def _lead_on(self, walkers: Sequence[Walker], times: CallTimes) -> None:
        began = perf_counter()
        for walker in walkers:
            walker.lead_on(self.check_leaf)
        times.walk = perf_counter() - began

    def _run(self, rows: Sequence[Row], times: CallTimes, *, counts: bool = True) -> int:
        """Call the model for rows; where what it appends does not fit, for some of them after the others."""
        number, apart = self._run_together(rows, times, counts)
        for some in apart:
            of_call = CallTimes()
            times.further.append((self._run(some, of_call, counts=False), of_call))
        return number

    def _run_together(self, rows: Sequence[Row], times: CallTimes, counts: bool) -> tuple[int, list[list[Row]]]:
        """Gather, call the model, and commit; returns how many rows it had, and those that are to be called apart.

        `counts`: whether the rows are asked for the first time.
        """
        began = perf_counter()
        found: list[tuple[Part, list[Row]]] = []
        try:
            for part_rows in _by_store(rows):
                self._gather(part_rows, found, counts)
            if not found:
                return 0, []
            going, refused = [row for _, of_part in found for row in of_part], 0
            try:
                with self._opened([part for part, _ in found], len(going)) as joint:
                    gathered = perf_counter()
                    times.gather += gathered - began
                    try:
                        evaluated = self._model(joint, [row.leaf.inputs for row in going])
                    except Exception:
                        refused = joint.refused
                        raise
                    _check(evaluated, len(going))
                    joint.settle()
                    modelled = perf_counter()
                    times.model += modelled - gathered
                    first = 0
                    for part, of_part in found:
                        self._commit(part, of_part, evaluated, first)
                        first += len(of_part)
                    times.commit += perf_counter() - modelled
            except Exception as error:
                if refused and len(going) > 1:
                    return len(going), self._apart(found, refused)
                for row in going:
                    if not row.settled:
                        row.fail_with_others(error)
            return len(going), []
        finally:
            for part, _ in found:
                part.close()

    def _apart(self, found: list[tuple[Part, list[Row]]], wanted: int) -> list[list[Row]]:
        """Those rows that leave room for `wanted` new tokens, and the others; in halves where that parts none."""
        with_lengths = [(part.gathered(number), row) for part, rows in found for number, row in enumerate(rows)]
        with_lengths.sort(key=lambda each: each[0])
        lengths, rows = [length for length, _ in with_lengths], [row for _, row in with_lengths]
        number = bisect_right(lengths, self.storage.layout.max_tokens - wanted)
        # With `room`, rows of any length were refused more than that.
        at = number if self._room is None and 0 < number < len(rows) else len(rows) // 2
        return [rows[:at], rows[at:]]

    def _gather(self, rows: list[Row], found: list[tuple[Part, list[Row]]], counts: bool) -> None:
        """Find and keep the parents of rows of one store; those that have none, or no room for more, hear so."""
        while rows:
            try:
                part = _part_of(rows, counts)
            except Exception as error:
                for row in _alone(rows, error):
                    self._gather([row], found, counts)
                return
            counts = False
            try:
                if rows[0].leaf.parent is NO_PARENT or (all(part.hits) and max(part.lengths) <= self._longest):
                    found.append((part, rows))
                    return
                hits, lengths = part.hits, part.lengths
            except BaseException:
                part.close()
                raise
            part.close()
            going = []
            for row, hit, length in zip(rows, hits, lengths, strict=True):
                if not hit:
                    row.fail(
                        KeyNotFoundError(
                            f"there is no entry for the parent {shown(row.leaf.parent)} of this leaf: store it first, "
                            "or again where it was evicted, or the weights were bumped since; or say NO_PARENT where "
                            "the model gets all of its tokens"
                        )
                    )
                elif length > self._longest:
                    row.fail(self._too_long(row, length))
                else:
                    going.append(row)
            rows = going

    def _too_long(self, row: Row, length: int) -> WindowOverflowError:
        window = self.storage.layout.max_tokens
        where = "the search, manager.search(overflow=...)," if isinstance(row.leaf.store, Search) else "the evaluator"
        return WindowOverflowError(
            f"the parent {shown(row.leaf.parent)} of this leaf has {length} of the window's {window} tokens, and the "
            f"evaluator wants room for {window - self._longest} more; give {where} an overflow policy of "
            f"limit={self._longest + 1} or less"
        )

    @contextmanager
    def _opened(self, parts: list[Part], count: int) -> Iterator[JointBatch]:
        """The parts' batch while the model and the commits use it."""
        size = next((size for size in self._row_sizes if size >= count), 0)
        if not size:
            with open_together(self.storage, parts, room=self._room) as joint:
                yield joint
            return
        free = self._fixed[size]
        try:
            data, ready = free.pop()
        except IndexError:  # every one of them is in use
            data, ready = new_buffer(self.storage.layout, size, self.storage.layout.max_tokens), NO_TICKS
        uses = None
        try:
            with open_together(self.storage, parts, room=self._room, rows=size, out=data, ready=ready) as joint:
                uses = joint.uses
                yield joint
        finally:
            after = ready if uses is None else uses.finish(data)
            if after is not None:  # or it is used by a graph that is captured just now
                free.append((data.detach(), after))

    def _commit(self, part: Part, rows: list[Row], evaluated: Evaluated[Any], first: int) -> None:
        """Store the rows of a part together or, where that cannot be, each that can be."""
        span = slice(first, first + len(rows))
        outputs = evaluated.outputs[span]
        sides = None if evaluated.sides is None else evaluated.sides[span]
        lengths = None if evaluated.lengths is None else evaluated.lengths[span]
        new = part.end - part.start
        if lengths is None and new and rows[0].leaf.parent is NO_PARENT:
            lengths = [new] * len(rows)
        store = rows[0].leaf.store
        overflow = self._overflow if isinstance(store, KVPool) else None
        commit = partial(store.commit, batch=part, overflow=overflow)
        try:
            stored = commit([row.leaf.child for row in rows], sides=sides, lengths=lengths)
        except Exception as error:
            alone = _alone(rows, error)
        else:
            alone = []
            for row, output in zip(rows, outputs, strict=True):
                _settle(row, output, part, stored)
        for number, row in enumerate(alone):
            try:
                stored = commit(
                    [row.leaf.child],
                    rows=[number],
                    sides=None if sides is None else [sides[number]],
                    lengths=None if lengths is None else [lengths[number]],
                )
            except Exception as error:
                row.fail(error)
            else:
                _settle(row, outputs[number], part, stored)


def _settle(row: Row, output: object, part: Part, stored: bool | None) -> None:
    """Hand a row its output; where nothing was stored as the weights changed meanwhile, it waits for another call.

    The model may have read keys and values of older weights than its own.
    """
    if stored is False and part.is_outdated:
        row.wait_again()
    else:
        row.succeed(output)


def _alone(rows: list[Row], error: Exception) -> list[Row]:
    """The rows that may come through each by itself, where all together raise an error; the others hear it.

    None where a store has ended, which it has for each, or where there was a wait, which none of the others should
    have to wait through once more.
    """
    if len(rows) == 1:
        rows[0].fail(error)
        return []
    if isinstance(error, (ClosedError, WaitTimeoutError)):
        for row in rows:
            row.fail_with_others(error)
        return []
    return rows


def _by_store(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows of each store, those with parents and those without, in order of arrival."""
    found: dict[tuple[int, bool], list[Row]] = {}
    for row in rows:
        found.setdefault((id(row.leaf.store), row.leaf.parent is NO_PARENT), []).append(row)
    return list(found.values())


def _part_of(rows: list[Row], counts: bool) -> Part:
    store = rows[0].leaf.store
    parents = None if rows[0].leaf.parent is NO_PARENT else [row.leaf.parent for row in rows]
    if isinstance(store, Search):
        return gather_part_of_search(store, parents, [row.leaf.env_id for row in rows], counts=counts)
    return gather_part_of_pool(store, parents, len(rows), counts=counts)


def _check(evaluated: object, rows: int) -> None:
    if not isinstance(evaluated, Evaluated):
        raise InvalidTypeError(f"the model must return an Evaluated, got {type(evaluated).__name__}")
    for name in ("outputs", "sides", "lengths"):
        items = getattr(evaluated, name)
        if items is None and name != "outputs":
            continue
        is_sequence = hasattr(items, "__getitem__") and not isinstance(items, (str, bytes, Mapping))
        try:
            count = len(items) if is_sequence else None
        except TypeError:  # a tensor of one number
            count = None
        if count is None:
            raise InvalidTypeError(f"the model must return {name} as a sequence, got {shown(items)}")
        if count != rows:
            raise InvalidArgumentError(f"the model must return {name} of {rows} leaves, got {count}")
