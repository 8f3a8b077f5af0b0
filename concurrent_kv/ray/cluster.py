"""`RayCluster`: the hosts are Ray actors."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from contextlib import suppress
from typing import Any

import ray
from ray import cloudpickle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from .._checks import positive_int
from ..cluster.cluster import Cluster
from ..cluster.errors import HostLostError, NoAnswerError
from ..cluster.requests import Setup
from ..errors import InvalidArgumentError, shown
from .actors import ActorLink, RouterActor

__all__ = ["RayCluster"]

NAMESPACE = "concurrent_kv"
ROUTER_CALLS = 10_000  # at once; they wait for hosts


class RayCluster(Cluster):
    """A cluster whose hosts are Ray actors, one process each, on whichever machines Ray has.

    Ray is initialised already. The object can be pickled into tasks and actors; a plain process that has called
    `ray.init(address=...)` takes `RayCluster.connect(name)`. It ends when its maker closes it, or ends.

    Args:
        setup: makes a host's parts, in the process of its actor. Picklable, as planners are.
        actors: how many hosts.
        threads: searches that run side by side at a host.
        max_waiting: requests that may wait at a host.
        actor_options: of each host's actor, as `ray.remote` has them: `{"num_gpus": 1}`, say. One CPU each if left out.
        name: for `connect`.
        timeout, retries, start_timeout: see `Cluster`.
    """

    def __init__(
        self,
        setup: Setup,
        *,
        actors: int = 1,
        threads: int = 4,
        max_waiting: int = 256,
        actor_options: Mapping[str, Any] | None = None,
        name: str | None = None,
        timeout: float = 60.0,
        retries: int = 3,
        start_timeout: float = 120.0,
    ) -> None:
        super().__init__(timeout=timeout, retries=retries, start_timeout=start_timeout)
        positive_int("actors", actors)
        _check_initialized()
        # Where its maker is, with whom it ends anyway; softly, it was found on machines that went before.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        named = {} if name is None else {"name": name, "namespace": NAMESPACE}
        router = (
            ray.remote(RouterActor)
            .options(num_cpus=0, max_concurrency=ROUTER_CALLS, scheduling_strategy=here, **named)
            .remote(
                setup,
                {"threads": positive_int("threads", threads), "max_waiting": positive_int("max_waiting", max_waiting)},
                {"num_cpus": 1, **(actor_options or {})},
                self.start_timeout,
            )
        )
        self._router = ActorLink(router, "the router")
        try:
            self._call("add_hosts", actors, waits=self.timeout + self.start_timeout)
        except BaseException:
            self.close()
            raise

    @classmethod
    def connect(cls, name: str, *, timeout: float = 60.0, retries: int = 3) -> RayCluster:
        """The cluster that was made under this name, from any process that Ray is initialised in. May block.

        Raises:
            InvalidArgumentError: there is none of that name.
        """
        _check_initialized()
        try:
            router = ray.get_actor(name, namespace=NAMESPACE)
        except ValueError as error:
            raise InvalidArgumentError(f"name must be that of a RayCluster that is open, got {name!r}") from error
        return _attached(ActorLink(router, "the router"), timeout, retries, 120.0)

    async def _ask_router(self, method: str, *args: Any, seconds: float) -> Any:
        return await self._router.ask(method, *args, seconds=seconds)

    def _check_name(self, env_id: Hashable) -> None:
        if env_id in self._routes:
            return
        copied = cloudpickle.loads(cloudpickle.dumps(env_id))
        if hash(copied) != hash(env_id) or copied != env_id:
            raise InvalidArgumentError(
                f"env_id must equal its copy in another process, by which it is found there, got {shown(env_id)}: "
                "a number, a string, a tuple of such, or a frozen dataclass would do"
            )

    def close(self) -> None:
        """End every host, whoever else uses the cluster; their calls hear `HostLostError` of the router. May block."""
        with suppress(HostLostError, NoAnswerError):  # hosts end with the router, too
            self._call("close", waits=self.timeout)
        with suppress(Exception):
            _check_initialized()
            ray.kill(self._router.actor)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _attached, (self._router, self.timeout, self.retries, self.start_timeout)


def _attached(router: ActorLink, timeout: float, retries: int, start_timeout: float) -> RayCluster:
    cluster = RayCluster.__new__(RayCluster)
    Cluster.__init__(cluster, timeout=timeout, retries=retries, start_timeout=start_timeout)
    cluster._router = router
    return cluster


def _check_initialized() -> None:
    if not ray.is_initialized():
        raise InvalidArgumentError("Ray must be initialised before a RayCluster is made: ray.init()")
