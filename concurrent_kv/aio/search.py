"""`AsyncSearch`: a search for tasks."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Hashable, Iterable, Sequence
from functools import partial
from types import TracebackType

import anyio.lowlevel
import torch
from torch import Tensor

from .._checks import check_env_ids, check_seconds, list_or_none, listed, numbers_or_none
from ..errors import ClosedError
from ..model.overflow import Overflow
from ..never_copied import NeverCopied
from ..pool.batch import Batch
from ..search.search import SAME_KEY, SAME_SIDE, LookupOrder, Search
from ..search.tree import SearchTree
from .offload import Offload

__all__ = ["AsyncSearch"]


class AsyncSearch(NeverCopied):
    """A `Search` for tasks: `async with manager.search(...) as search`. Opens when it is entered, once."""

    instead_of_copy = "share the one object between tasks, or open another with manager.search()"

    def __init__(self, open_search: Callable[..., Search], offload: Offload, timeout: float | None) -> None:
        self._open = open_search
        self._offload = offload
        self._timeout = timeout
        self._entry_bytes = offload.storage.layout.bytes_per_entry
        self._search: Search | None = None
        self._entered = False

    @property
    def sync(self) -> Search:
        """The open search, for threads that share it.

        Raises:
            ClosedError: it has not been entered.
        """
        if self._search is None:
            raise ClosedError("this search is not open yet: enter it with `async with`")
        return self._search

    @property
    def env_ids(self) -> tuple[Hashable, ...]:
        """The environments it is for."""
        return self.sync.env_ids

    async def gather(
        self,
        keys: Sequence[Hashable],
        env_ids: Sequence[Hashable],
        *,
        order: LookupOrder | None = None,
        room: int | None = None,
        out: Tensor | None = None,
        timeout: float | None = None,
        stream: torch.Stream | None = None,
    ) -> Batch:
        """See `Search.gather`. After asyncio's own `cancel()`, `out` may still be written to for a moment."""
        keys = listed(keys)
        # As the keys: a copy that nobody can change meanwhile, which the search checks.
        env_ids = tuple(env_ids) if type(env_ids) in (list, tuple) else check_env_ids(env_ids)
        search = self.sync
        return await self._offload.run(
            lambda seconds: search.gather(
                keys, env_ids, order=order, room=room, out=out, timeout=seconds, stream=stream
            ),
            len(keys) * self._entry_bytes,
            len(keys),
            timeout=timeout,
            undo=Batch.abandon,
        )

    async def commit(
        self,
        keys: Sequence[Hashable],
        batch: Batch,
        *,
        rows: Sequence[int] | None = None,
        lengths: Sequence[int] | None = None,
        overflow: Overflow | None = None,
        sides: Sequence[object] | None = None,
        timeout: float | None = None,
        stream: torch.Stream | None = None,
    ) -> None:
        """See `Search.commit`."""
        keys = listed(keys)
        rows, lengths = list_or_none("rows", rows), numbers_or_none("lengths", lengths)
        sides, search = list_or_none("sides", sides), self.sync
        await self._offload.run(
            lambda seconds: search.commit(
                keys,
                batch,
                rows=rows,
                lengths=lengths,
                overflow=overflow,
                sides=sides,
                timeout=seconds,
                stream=stream,
            ),
            len(keys) * self._entry_bytes,
            len(keys),
            timeout=timeout,
        )

    async def release(self, keys: Iterable[Hashable], *, timeout: float | None = None) -> None:
        """See `Search.release`."""
        keys = listed(keys, ordered=False)
        search = self.sync
        await self._offload.run(
            lambda seconds: search.release(keys, timeout=seconds), entries=len(keys), timeout=timeout
        )

    def discard(self, key: Hashable) -> None:
        """See `Search.discard`; it never waits."""
        self.sync.discard(key)

    async def keep(self, keys: Iterable[Hashable], *, timeout: float | None = None) -> int:
        """See `Search.keep`."""
        keys = listed(keys, ordered=False)
        search = self.sync
        return await self._offload.run(
            lambda seconds: search.keep(keys, timeout=seconds), entries=search.held, timeout=timeout
        )

    async def promote(
        self,
        key: Hashable,
        env_id: Hashable,
        *,
        as_key: Hashable = SAME_KEY,
        side: object = SAME_SIDE,
        priority: float = 0.0,
        timeout: float | None = None,
    ) -> bool:
        """See `Search.promote`."""
        search = self.sync
        return await self._offload.run(
            lambda seconds: search.promote(key, env_id, as_key=as_key, side=side, priority=priority, timeout=seconds),
            self._entry_bytes,
            timeout=timeout,
        )

    async def contains(self, key: Hashable, *, timeout: float | None = None) -> bool:
        """See `Search.contains`; `in` cannot be awaited."""
        search = self.sync
        return await self._offload.run(lambda seconds: search.contains(key, timeout=seconds), timeout=timeout)

    async def keys(self, *, timeout: float | None = None) -> list[Hashable]:
        """See `Search.keys`."""
        search = self.sync
        return await self._offload.run(
            lambda seconds: search.keys(timeout=seconds), entries=len(search), timeout=timeout
        )

    async def tree(self, *, timeout: float | None = None) -> SearchTree:
        """See `Search.tree`."""
        search = self.sync
        return await self._offload.run(
            lambda seconds: search.tree(timeout=seconds), entries=search.held, timeout=timeout
        )

    async def __aiter__(self) -> AsyncIterator[Hashable]:
        """See `Search.__iter__`."""
        for key in await self.keys():
            yield key

    @property
    def closed(self) -> bool:
        """See `Search.closed`."""
        return self.sync.closed

    def __len__(self) -> int:
        return len(self.sync)

    async def close(self, *, timeout: float | None = None) -> None:
        """See `Search.close`; finished also when the task is cancelled meanwhile.

        On the loop's own thread, at once, if it is small and its lock is free; eight entries count as one there.
        """
        search = self.sync
        seconds = None if timeout is None else check_seconds("timeout", timeout)
        if search.is_over:
            await anyio.lowlevel.cancel_shielded_checkpoint()
            return
        await self._offload.to_the_end(partial(search.close, timeout=seconds), search.close_on_loop, seconds)

    async def __aenter__(self) -> AsyncSearch:
        if self._entered:
            raise ClosedError("this search was entered before: open another with manager.search()")
        self._entered = True
        self._search = await self._offload.run(
            lambda seconds: self._open(timeout=seconds), timeout=self._timeout, undo=Search.abandon
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
