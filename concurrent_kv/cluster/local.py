"""`LocalCluster`: the hosts are in this process."""

from __future__ import annotations

import asyncio
import copy
import weakref
from collections.abc import Hashable, Iterable
from typing import Any

from .._checks import positive_int
from .cluster import Cluster, in_time, started, waited_for
from .errors import HostLostError, NoAnswerError
from .host import Host, answer_of
from .requests import Setup
from .router import Link, Router

__all__ = ["LocalCluster"]


class LocalCluster(Cluster):
    """A cluster whose hosts share this process: the calls of a cluster of processes, without one.

    Args:
        setup: makes a host's parts.
        hosts: how many. More than one where there are several devices.
        threads: searches that run side by side at a host.
        max_waiting: requests that may wait at a host.
        timeout, retries, start_timeout: see `Cluster`.
    """

    def __init__(
        self,
        setup: Setup,
        *,
        hosts: int = 1,
        threads: int = 4,
        max_waiting: int = 256,
        timeout: float = 60.0,
        retries: int = 3,
        start_timeout: float = 120.0,
    ) -> None:
        super().__init__(timeout=timeout, retries=retries, start_timeout=start_timeout)
        positive_int("hosts", hosts)
        self._router = Router(
            _Launcher(setup, positive_int("threads", threads), positive_int("max_waiting", max_waiting)),
            start_seconds=self.start_timeout,
        )
        # Threads of hosts keep those alive, not the cluster.
        weakref.finalize(self, _end, self._router).atexit = False
        try:
            self._call("add_hosts", hosts, waits=self.timeout + self.start_timeout)
        except BaseException:
            self.close()
            raise

    async def _ask_router(self, method: str, *args: Any, seconds: float) -> Any:
        # Not cancelled with who waits for it: a move that is cut off would leave an environment nowhere.
        work = asyncio.ensure_future(getattr(self._router, method)(*args))
        work.add_done_callback(lambda done: done.cancelled() or done.exception())
        return await in_time(asyncio.shield(work), seconds, "the router")

    def close(self) -> None:
        """End every host; searches that run are ended. May block."""
        waited_for(started(self._router.close()))


def _end(router: Router) -> None:
    started(router.close())


class _Launcher:
    def __init__(self, setup: Setup, threads: int, max_waiting: int) -> None:
        self._setup = setup
        self._threads = threads
        self._max_waiting = max_waiting

    async def start(
        self, name: str, env_ids: Iterable[Hashable], weights: Any, version: int, *, seconds: float
    ) -> Link:
        def made() -> Host:
            return Host(
                name,
                self._setup,
                threads=self._threads,
                max_waiting=self._max_waiting,
                env_ids=env_ids,
                weights=weights,
                version=version,
            )

        making = asyncio.ensure_future(asyncio.to_thread(made))
        try:
            return _Link(await in_time(asyncio.shield(making), seconds, f"the setup of {name}"))
        except NoAnswerError as error:
            making.add_done_callback(_closed_when_made)
            raise HostLostError(str(error), host=name) from None

    async def end(self, link: Link) -> None:
        assert isinstance(link, _Link)
        await asyncio.to_thread(link.host.close)

    def hold(self, weights: Any) -> Any:
        return copy.deepcopy(weights)  # a state dict is the tensors that its model goes on training


class _Link:
    def __init__(self, host: Host) -> None:
        self.host = host

    async def ask(self, method: str, *args: Any, seconds: float) -> Any:
        return await in_time(asyncio.ensure_future(answer_of(self.host, method, *args)), seconds, self.host.name)


def _closed_when_made(making: asyncio.Future[Host]) -> None:
    if not making.cancelled() and making.exception() is None:
        making.result().close()
