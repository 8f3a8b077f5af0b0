"""`AsyncSearch`: a search for tasks."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from types import TracebackType

from torch import Tensor

from ..arguments import check_keys
from ..batch import Batch
from ..errors import ClosedError, WaitTimeoutError
from ..overflow import Overflow
from ..search import SAME_KEY, SAME_SIDE, LookupOrder, Search
from .offload import Offload

__all__ = ["AsyncSearch"]


class AsyncSearch:
    """A `Search` for tasks: `async with manager.search(...) as search`. Opens when it is entered, once."""

    def __init__(self, open_search: Callable[..., Search], offload: Offload, timeout: float | None) -> None:
        self._open = open_search
        self._offload = offload
        self._timeout = timeout
        self._search: Search | None = None

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
    ) -> Batch:
        """See `Search.gather`. After asyncio's own `cancel()`, `out` may still be written to for a moment."""
        keys = check_keys(keys)
        return await self._offload.run(
            self.sync.gather,
            keys,
            env_ids,
            copied_bytes=len(keys) * self._offload.storage.layout.bytes_per_entry,
            undo=Batch.close,
            order=order,
            room=room,
            out=out,
            timeout=timeout,
        )

    async def commit(
        self,
        keys: Sequence[Hashable],
        batch: Batch,
        *,
        rows: Sequence[int] | None = None,
        overflow: Overflow | None = None,
        sides: Sequence[object] | None = None,
        timeout: float | None = None,
    ) -> None:
        """See `Search.commit`."""
        keys = check_keys(keys)
        await self._offload.run(
            self.sync.commit,
            keys,
            batch,
            copied_bytes=len(keys) * self._offload.storage.layout.bytes_per_entry,
            rows=rows,
            overflow=overflow,
            sides=sides,
            timeout=timeout,
        )

    async def release(self, keys: Iterable[Hashable], *, timeout: float | None = None) -> None:
        """See `Search.release`."""
        await self._offload.run(self.sync.release, check_keys(keys), timeout=timeout)

    async def keep(self, keys: Iterable[Hashable], *, timeout: float | None = None) -> int:
        """See `Search.keep`."""
        return await self._offload.run(self.sync.keep, check_keys(keys, minimum=0), timeout=timeout)

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
        return await self._offload.run(
            self.sync.promote, key, env_id, as_key=as_key, side=side, priority=priority, timeout=timeout
        )

    async def contains(self, key: Hashable) -> bool:
        """Whether `key` is one of the search's own entries; `in` cannot be awaited. Always in a worker thread."""
        return await self._offload.in_worker(partial(self.sync.__contains__, key))

    @property
    def closed(self) -> bool:
        """See `Search.closed`."""
        return self.sync.closed

    def __len__(self) -> int:
        return len(self.sync)

    async def close(self, *, timeout: float | None = None) -> None:
        """See `Search.close`; finished also when the task is cancelled meanwhile."""
        await self._offload.to_the_end(partial(self.sync.close, timeout=timeout))

    async def __aenter__(self) -> AsyncSearch:
        if self._search is not None:
            raise ClosedError("this search was entered before: open another with manager.search()")
        self._search = await self._offload.run(self._open, undo=_close_unused, timeout=self._timeout)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


def _close_unused(search: Search) -> None:
    """Close a search that nobody will use, perhaps on a loop's thread: what is busy just now, the next call closes."""
    with suppress(WaitTimeoutError):
        search.close(timeout=0.0)
