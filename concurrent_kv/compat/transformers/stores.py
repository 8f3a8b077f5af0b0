"""`TextStore`: texts in two pools, or two searches, that are read and written as one."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence

from ...errors import InvalidArgumentError, InvalidTypeError, shown
from ...pool.batch import Batch
from ...pool.handle import Handle
from ...pool.padded_rows import PaddedRows
from ...pool.pool import KVPool
from ...search.search import Search, storage_of
from .layouts import CacheLayout
from .windows import WindowedSide, commit_window, new_write, write_of

__all__ = ["TextRows", "TextStore"]

ATTEMPTS = 3  # to read both entries of a text that is replaced meanwhile


class TextRows(Handle):
    """Rows of texts, for a `BatchCache`; an open handle.

    Attributes:
        full: all of their tokens.
        window: their newest tokens, for layers that slide; None where all layers keep all tokens.
        writes: what each row is stored as; empty without a window.

    Raises:
        InvalidTypeError: one of them is no batch.
    """

    instead_of_copy = "gather once more"

    def __init__(self, full: PaddedRows, window: PaddedRows | None) -> None:
        for batch in (full,) if window is None else (full, window):
            if not isinstance(batch, PaddedRows):
                raise InvalidTypeError(f"batch must be a Batch or a JointBatch, got {type(batch).__name__}")
        self.full, self.window = full, window
        self.writes = [] if window is None else [new_write() for _ in window.entries]

    @property
    def hits(self) -> tuple[bool, ...]:
        """Which rows were found."""
        return self.full.hits

    def sides(self, sides: Sequence[object] | None) -> list[object] | None:
        """Side data, of each row one item, as it is stored with `full`."""
        if self.window is None:
            return None if sides is None else [*sides]
        of_rows = [None] * len(self.writes) if sides is None else sides
        return [WindowedSide(side, write) for side, write in zip(of_rows, self.writes, strict=True)]

    def close(self) -> None:
        """Close both. Never blocks; nothing happens the second time."""
        if self.window is not None:
            self.window.close()
        self.full.close()


class TextStore(Handle):
    """Texts of a model whose layers partly slide: their tokens in one store, those in the window in another.

    `BatchCache(store.gather(keys), fits)` is the cache of a forward, `cache.commit(store, keys)` stores its rows. A
    text is found in both stores or in none: where one of its two entries was evicted, or is of another write, it is a
    miss.

    Args:
        fits: the model's `CacheLayout`, made with `step=`.
        full: of `fits.layout`.
        window: of `fits.window.layout`, of the same class as `full`; None where all layers keep all tokens, and
            `fits.window` is None.

    Raises:
        InvalidArgumentError, InvalidTypeError: stores that do not go together.
    """

    instead_of_copy = "share the one object between threads"

    def __init__(self, fits: CacheLayout, full: KVPool | Search, window: KVPool | Search | None = None) -> None:
        if (window is None) != (fits.window is None):
            raise InvalidArgumentError(
                f"window must be a store of fits.window.layout, or None where fits.window is None, got "
                f"{type(window).__name__} and {fits.window}"
            )
        if window is not None and isinstance(window, Search) != isinstance(full, Search):
            raise InvalidTypeError(
                f"full and window must be two pools or two searches, got {type(full).__name__} and "
                f"{type(window).__name__}"
            )
        of_window = None if fits.window is None else fits.window.layout
        for name, store, layout in (("full", full, fits.layout), ("window", window, of_window)):
            if store is None:
                continue
            if not isinstance(store, (KVPool, Search)):
                raise InvalidTypeError(f"{name} must be a KVPool or a Search, got {type(store).__name__}")
            found = storage_of(store).layout if isinstance(store, Search) else store.layout
            if found != layout:
                raise InvalidArgumentError(f"{name} must be of {layout}, got one of {found}")
        self.fits, self.full, self.window = fits, full, window
        self.window_keys: dict[Hashable, Hashable] = {}  # of texts that have another one in the window's store

    def gather(
        self, keys: Sequence[Hashable], env_ids: Sequence[Hashable] | None = None, *, room: int | None = None
    ) -> TextRows:
        """Read texts for the cache of a forward; see `KVPool.gather` and `Search.gather`. May block.

        Args:
            keys: one for each row; `hits` of the result says which were found.
            env_ids: of searches, the environment of each row.
            room: columns for new tokens, up to `step`; as many as there can be if left out.

        Raises:
            InvalidArgumentError, SearchEndedError, WaitTimeoutError: as the stores' own.
        """
        if self.window is None:
            return TextRows(_gathered(self.full, keys, env_ids, room), None)
        asked, attempts = list(keys), [0] * len(keys)
        while True:
            full = _gathered(self.full, asked, env_ids, room)
            try:
                window = _gathered(self.window, self.in_window(asked), env_ids, room)
                try:
                    apart = [
                        row
                        for row, (hit, side, write) in enumerate(zip(full.hits, full.side, window.side, strict=True))
                        if write_of(side) != write or (hit and write is None)
                    ]
                    if not apart:
                        return TextRows(full, window)
                except BaseException:
                    window.close()
                    raise
                window.close()
            except BaseException:
                full.close()
                raise
            full.close()
            for row in apart:
                attempts[row] += 1
                if not full.hits[row] or attempts[row] == ATTEMPTS:
                    asked[row] = object()  # a key that no text has

    def commit(
        self, keys: Sequence[Hashable], rows: TextRows, *, lengths: Sequence[int], sides: Sequence[object] | None = None
    ) -> None:
        """Store rows of this store's, of which each has `lengths` of the tokens that were appended. May block.

        Where that fails, none of them is in either store. After a `CapacityError` of the first one (`full`), the same
        rows can be committed once there is room.

        Raises:
            InvalidArgumentError, CapacityError, ClosedError, WaitTimeoutError: as the stores' own.
        """
        full, window = rows.full, rows.window
        if not isinstance(full, Batch) or (window is not None and not isinstance(window, Batch)):
            raise InvalidTypeError(f"rows must be of batches to be committed here, got {type(full).__name__}")
        if (window is None) != (self.window is None):
            raise InvalidArgumentError("rows must be what this store has gathered, got those of another kind of store")
        # The store that is short of room first: where it refuses, nothing has changed.
        stored = self.full.commit(keys, full, lengths=lengths, sides=rows.sides(sides))
        if self.window is None or self.fits.window is None or window is None:
            return
        if stored is False:  # it was cleared meanwhile
            window.close()
            return
        try:
            with window:
                commit_window(self.window, keys, window, lengths, self.fits.window.tokens, rows.writes)
        except BaseException:
            self.discard(keys)
            raise

    def release(self, keys: Iterable[Hashable]) -> None:
        """Let go of texts of two searches; see `Search.release`. May block.

        Raises:
            KeyNotFoundError: there is no such text; nothing is released then.
        """
        if not isinstance(self.full, Search):
            raise InvalidTypeError("full and window must be searches for texts to be released, got pools")
        keys = [*keys]
        self.full.release(keys)
        if isinstance(self.window, Search):
            try:
                self.window.release(self.in_window(keys))
            except Exception:  # a shard was not free in time, or there is no memory: the next operation does it
                for key in self.in_window(keys):
                    self.window.discard(key)

    def in_window(self, keys: Iterable[Hashable]) -> list[Hashable]:
        """What texts are called in the window's store."""
        return [self.window_keys.get(key, key) for key in keys]

    def discard(self, keys: Iterable[Hashable]) -> None:
        """Have the next operation remove texts, if they are there. Never blocks."""
        for key in keys:
            self.full.discard(key)
            if self.window is not None:
                self.window.discard(key)

    @property
    def closed(self) -> bool:
        """Whether the first was closed, or ended from outside."""
        return self.full.closed

    def close(self) -> None:
        """Close both. May block; nothing happens the second time."""
        # The window first: who finds room for another tree in the one store finds it in the other.
        if self.window is not None:
            self.window.close()
        self.full.close()

    def __repr__(self) -> str:
        return f"<TextStore over {shown(self.full)} and {shown(self.window)}>"


def _gathered(
    store: KVPool | Search, keys: Sequence[Hashable], env_ids: Sequence[Hashable] | None, room: int | None
) -> Batch:
    if isinstance(store, KVPool):
        return store.gather(keys, room=room)
    if env_ids is None:
        raise InvalidArgumentError("env_ids must be given for searches: the environment of each row")
    return store.gather(keys, env_ids, room=room)
