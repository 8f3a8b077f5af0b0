"""What runs in processes of its own: an actor with a host, and the actor of the router, which makes those."""

from __future__ import annotations

import asyncio
from collections.abc import Hashable, Iterable, Mapping
from contextlib import suppress
from typing import Any

import ray
from ray import cloudpickle
from ray.exceptions import RayActorError, RayError, RaySystemError, RayTaskError

from ..cluster.answers import Answer, Pickler
from ..cluster.cluster import in_time
from ..cluster.errors import HostLostError, NoAnswerError, PlannerError
from ..cluster.host import Host, answer_of
from ..cluster.requests import Setup
from ..cluster.router import Link, Router

__all__ = ["ActorLink", "HostActor", "RouterActor"]

# An actor with coroutines has so many calls at once, and the rest waits where the host's bound does not count it. So it
# is more than wait at a host, which refuses what is too much.
SPARE_CALLS = 1000

PICKLER = Pickler(cloudpickle.dumps, cloudpickle.loads)


class HostActor:
    """A process with a host."""

    def __init__(
        self,
        name: str,
        setup: Setup,
        options: Mapping[str, Any],
        env_ids: Iterable[Hashable],
        weights: Any,
        version: int,
    ) -> None:
        self._host: Host | None = None
        self._failed: Exception | None = None
        try:
            self._host = Host(name, setup, env_ids=env_ids, weights=weights, version=version, **options)
        except Exception as error:  # heard by who asks whether it serves, with its type
            self._failed = error

    async def ask(self, method: str, *args: Any) -> Answer:
        """What a method of the host returns or raises."""
        return await Answer.of(self._ask(method, *args), PICKLER)

    async def _ask(self, method: str, *args: Any) -> Any:
        if self._host is None:
            assert self._failed is not None
            raise self._failed
        return await answer_of(self._host, method, *args)


class RouterActor:
    """The process that has a cluster's router. Hosts end with it."""

    def __init__(
        self,
        setup: Setup,
        options: Mapping[str, Any],
        actor_options: Mapping[str, Any],
        start_seconds: float,
    ) -> None:
        self._router = Router(_Launcher(setup, options, actor_options), start_seconds=start_seconds)

    async def ask(self, method: str, *args: Any) -> Answer:
        """What a method of the router returns or raises."""
        return await Answer.of(getattr(self._router, method)(*args), PICKLER)


class ActorLink:
    """A way to one of these actors, from any process of the cluster."""

    def __init__(self, actor: Any, name: str) -> None:
        self.actor = actor
        self.name = name

    async def ask(self, method: str, *args: Any, seconds: float) -> Any:
        """What the method returns or raises; an argument that is an `ObjectRef` arrives as what it stands for.

        Raises:
            HostLostError: the actor is gone, or cannot be reached. NoAnswerError: no answer came in time.
        """
        if not ray.is_initialized():  # Ray would start anew, for an actor that it does not know
            raise HostLostError(f"{self.name} is out of reach: Ray was shut down in this process", host=self.name)
        try:
            ref = self.actor.ask.remote(method, *args)
            answer: Answer = await in_time(asyncio.wrap_future(ref.future()), seconds, self.name)
        except asyncio.CancelledError:
            if method == "submit":  # whatever else is asked for goes on
                with suppress(Exception):
                    ray.cancel(ref)
            raise
        except RayTaskError as error:  # first: where the maker of an argument is gone, it is a RayActorError too
            # Not of the method, whose errors are answers: an argument or a result that could not be had, or pickled.
            cause = getattr(error, "cause", None)
            raise (cause if isinstance(cause, Exception) else error) from None
        except RayActorError as error:
            raise HostLostError(f"{self.name} is gone: {_first_line(error)}", host=self.name) from None
        except RaySystemError as error:
            cause = getattr(error, "client_exc", None)
            if not isinstance(cause, Exception):
                raise HostLostError(f"{self.name} could not be asked: {_first_line(error)}", host=self.name) from None
            # It was answered: asked again, a planner would run again, to no other end.
            kind = type(cause).__name__
            raise PlannerError(
                f"what {self.name} answered cannot be unpickled here: {kind}: {cause}", kind=kind
            ) from cause
        except RayError as error:  # what it was asked with, or what it answered, is lost with a machine
            raise HostLostError(f"{self.name} could not be asked: {_first_line(error)}", host=self.name) from None
        return answer.result(PICKLER)


class _Launcher:
    """Makes the actors of hosts."""

    def __init__(self, setup: Setup, options: Mapping[str, Any], actor_options: Mapping[str, Any]) -> None:
        self._setup = setup
        self._options = dict(options)
        most = self._options.get("max_waiting", 256) + self._options.get("threads", 4) + SPARE_CALLS
        # Not made again by Ray, which would not know its environments: the router does that.
        self._actor = ray.remote(HostActor).options(**{**actor_options, "max_restarts": 0, "max_concurrency": most})

    async def start(
        self, name: str, env_ids: Iterable[Hashable], weights: Any, version: int, *, seconds: float
    ) -> Link:
        actor = self._actor.remote(name, self._setup, self._options, tuple(env_ids), weights, version)
        link = ActorLink(actor, name)
        try:
            await link.ask("stats", seconds=seconds)
        except NoAnswerError:
            await self.end(link)
            raise HostLostError(
                f"{name} did not serve within start_timeout={seconds:g} s; are there resources for one more actor?",
                host=name,
            ) from None
        except BaseException:
            await self.end(link)
            raise
        return link

    async def end(self, link: Link) -> None:
        assert isinstance(link, ActorLink)
        with suppress(Exception):
            await asyncio.to_thread(ray.kill, link.actor)

    def hold(self, weights: Any) -> Any:
        # Of this process: whoever gave them may be gone when a host is made again.
        return ray.put(weights)


def _first_line(error: BaseException) -> str:
    return str(error).strip()
