"""`AsyncSearch`: a search for tasks."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from types import TracebackType

import anyio
from torch import Tensor

from ..batch import Batch
from ..overflow import Overflow
from ..search import LookupOrder, Search
from .offload import CLOSE_SECONDS, Offload

__all__ = ["AsyncSearch"]


class AsyncSearch:
    """A `Search` for tasks: `async with manager.search(...) as search`. Opens when it is entered.

    Attributes:
        sync: the open search, for threads that share it.
    """

    sync: Search

    def __init__(self, open_search: Callable[..., Search], offload: Offload, timeout: float | None) -> None:
        self._open = open_search
        self._offload = offload
        self._timeout = timeout

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
        """See `Search.gather`."""
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
        await self._offload.run(self.sync.release, list(keys), timeout=timeout)

    async def keep(self, keys: Iterable[Hashable], *, timeout: float | None = None) -> int:
        """See `Search.keep`."""
        return await self._offload.run(self.sync.keep, list(keys), timeout=timeout)

    async def promote(
        self,
        key: Hashable,
        env_id: Hashable,
        *,
        as_key: Hashable = None,
        side: object = None,
        priority: float = 0.0,
        timeout: float | None = None,
    ) -> bool:
        """See `Search.promote`."""
        return await self._offload.run(
            self.sync.promote, key, env_id, as_key=as_key, side=side, priority=priority, timeout=timeout
        )

    @property
    def closed(self) -> bool:
        """See `Search.closed`."""
        return self.sync.closed

    def __len__(self) -> int:
        return len(self.sync)

    async def close(self) -> None:
        """See `Search.close`; finished, within bounds, also when the task is cancelled."""
        with anyio.move_on_after(CLOSE_SECONDS, shield=True):
            await self._offload.in_worker(self.sync.close)

    async def __aenter__(self) -> AsyncSearch:
        self.sync = await self._offload.run(self._open, undo=Search.close, timeout=self._timeout)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
