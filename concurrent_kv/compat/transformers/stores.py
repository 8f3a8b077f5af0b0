"""`TextStore`: texts in two pools, or two searches, that are read and written as one."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence

from ...errors import InvalidArgumentError, InvalidTypeError, shown
from ...pool.batch import Batch
from ...pool.pool import KVPool
from ...search.search import Search, storage_of
from .cache import BatchCache
from .layouts import CacheLayout
from .windows import commit_window, write_of

__all__ = ["TextStore"]

ATTEMPTS = 3  # to read both entries of a text that is replaced meanwhile


class TextStore:
    """Texts of a model whose layers partly slide: their tokens in one store, those in the window in another.

    `store.gather(keys)` gives the `BatchCache` of a forward, `cache.commit(store, keys)` stores its rows. A text is
    found in both stores or in none: where one of its two entries was evicted, or is of another write, it is a miss.

    Args:
        fits: the model's `CacheLayout`, made with `step=`.
        full: of `fits.layout`.
        window: of `fits.window.layout`, of the same class as `full`; None where all layers keep all tokens, and
            `fits.window` is None.

    Raises:
        InvalidArgumentError, InvalidTypeError: stores that do not go together.
    """

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
    ) -> BatchCache:
        """Read texts into the cache of a forward; see `KVPool.gather` and `Search.gather`. May block.

        Args:
            keys: one for each row; `cache.batch.hits` says which were found.
            env_ids: of searches, the environment of each row.
            room: columns for new tokens, up to `step`; as many as there can be if left out.

        Raises:
            InvalidArgumentError, SearchEndedError, WaitTimeoutError: as the stores' own.
        """
        if self.window is None:
            return BatchCache(_gathered(self.full, keys, env_ids, room), self.fits)
        asked, attempts = list(keys), [0] * len(keys)
        while True:
            full = _gathered(self.full, asked, env_ids, room)
            try:
                window = _gathered(self.window, self.in_window(asked), env_ids, room)
                try:
                    apart = [
                        row
                        for row, (side, write) in enumerate(zip(full.side, window.side, strict=True))
                        if write_of(side) != write
                    ]
                    if not apart:
                        return BatchCache(full, self.fits, window=window)
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

    def store(
        self,
        keys: Sequence[Hashable],
        cache: BatchCache,
        lengths: Sequence[int],
        sides: Sequence[object] | None,
    ) -> None:
        """Store the rows of a cache: what `BatchCache.commit` does with this. May block."""
        batch = cache.batch
        assert isinstance(batch, Batch)
        if self.window is None or self.fits.window is None:
            self.full.commit(keys, batch, lengths=lengths, sides=sides)
            return
        window = cache.window
        if not isinstance(window, Batch):
            raise InvalidArgumentError("cache must be what this store has gathered, got one without a window's rows")
        # The store that is short of room first: where it refuses, nothing has changed.
        if self.full.commit(keys, batch, lengths=lengths, sides=sides) is False:
            window.close()  # it was cleared meanwhile
            return
        try:
            commit_window(self.window, keys, window, lengths, self.fits.window.tokens, cache.writes)
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
