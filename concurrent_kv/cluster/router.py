"""`Router`: which hosts a cluster has, which environment is where, which weights are the newest; one event loop's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Hashable, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from ..errors import ClosedError, InvalidArgumentError, WaitTimeoutError, shown
from .errors import HostLostError, NoAnswerError, NoHostError, NotHereError
from .requests import ClusterStats, HostStats, Roots

__all__ = ["Launcher", "Link", "Route", "Router"]

PING_SECONDS = 5.0  # after which a host that a caller has lost counts as lost
MARGIN_SECONDS = 5.0  # that an answer may be late after a host has kept its own bound


class Link(Protocol):
    """A way to a host."""

    async def ask(self, method: str, *args: Any, seconds: float) -> Any:
        """What the host's method returns or raises.

        Raises:
            HostLostError: the host is gone; it may have worked on this.
            NoAnswerError: no answer came in so many seconds.
        """
        ...


class Launcher(Protocol):
    """Makes and ends hosts."""

    async def start(
        self, name: str, env_ids: Iterable[Hashable], weights: Any, version: int, *, seconds: float
    ) -> Link:
        """A new host that serves. Raises `HostLostError` where it does not in time, and what `setup` raises."""
        ...

    async def end(self, link: Link) -> None:
        """End a host, whatever it does just now; nothing if it is gone. Raises nothing."""
        ...

    def hold(self, weights: Any) -> Any:
        """Weights as they are given to hosts from now on, kept by this launcher."""
        ...


class Route(NamedTuple):
    """Where an environment is."""

    host: str
    incarnation: int  # of the host: how often it was made again
    link: Link


@dataclass(eq=False)
class _Member:
    """A host as the router knows it. Its lock is held by whoever makes it again or loads its weights."""

    name: str
    link: Link
    places: int
    version: int
    incarnation: int = 0
    env_ids: dict[Hashable, None] = field(default_factory=dict)  # in the order in which they came
    is_draining: bool = False
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def room(self) -> int:
        """Environments that it could have beside those that it has."""
        return 0 if self.is_draining else self.places - len(self.env_ids)


@dataclass(eq=False)
class _EnvLock:
    """Kept as long as a task has it or waits for it: with a second lock two of them would move one environment."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    users: int = 0


class Router:
    """All of its methods are run by one event loop, which is what makes a change of the routes one step.

    Args:
        launcher: makes hosts.
        start_seconds: that a host may take until it serves.
    """

    def __init__(self, launcher: Launcher, *, start_seconds: float) -> None:
        self._launcher = launcher
        self._start_seconds = start_seconds
        self._members: dict[str, _Member] = {}
        self._routes: dict[Hashable, _Member] = {}
        self._env_locks: dict[Hashable, _EnvLock] = {}  # held while an environment comes, moves or goes
        self._changes = asyncio.Lock()  # loads of weights, moves, hosts that come and go: one after the other
        self._version = 0
        self._weights: Any = None
        self._named = 0
        self._closed = False

    # Routes ----------------------------------------------------------------------------------------------------------

    async def route(self, env_id: Hashable) -> Route:
        """Where an environment is; from now on, if it was nowhere: at the host that has fewest.

        Raises:
            NoHostError: every host is full, or none takes new ones.
        """
        self._check_open()
        async with self._alone_with(env_id):
            member = self._routes.get(env_id)
            if member is None:
                member = self._emptiest()
                self._routes[env_id] = member
                member.env_ids[env_id] = None
                try:
                    await self._admit(member, env_id, None)
                except BaseException:  # it is nowhere
                    del self._routes[env_id], member.env_ids[env_id]
                    raise
        return Route(member.name, member.incarnation, member.link)

    @asynccontextmanager
    async def _alone_with(self, env_id: Hashable) -> AsyncIterator[None]:
        entry = self._env_locks.setdefault(env_id, _EnvLock())
        entry.users += 1
        try:
            async with entry.lock:
                yield
        finally:
            entry.users -= 1
            if not entry.users:
                del self._env_locks[env_id]

    def _emptiest(self, *, but: _Member | None = None) -> _Member:
        having = [each for each in self._members.values() if each is not but and each.room > 0]
        if not having:
            raise NoHostError(
                f"none of {len(self._members)} hosts has room for one more environment: each has as many as its "
                "manager's env_num, or is being drained; add_host(), or forget() environments that have ended"
            )
        return min(having, key=lambda each: len(each.env_ids))

    async def _admit(self, member: _Member, env_id: Hashable, roots: Roots | None) -> None:
        """Have a host take an environment that is among its `env_ids`: where it is made again, it has it anyway."""
        incarnation = member.incarnation
        try:
            await member.link.ask("admit", env_id, roots, seconds=self._start_seconds)
        except (HostLostError, WaitTimeoutError):
            await self._make_again(member, incarnation)

    async def forget(self, env_id: Hashable, timeout: float) -> None:
        """Let go of an environment that has ended, with its entries. Nothing if it is nowhere.

        Raises:
            WaitTimeoutError: a search of it did not end within `timeout`; it stays.
        """
        self._check_open()
        async with self._changes, self._alone_with(env_id):
            member = self._routes.get(env_id)
            if member is not None:
                incarnation, lost = member.incarnation, False
                try:
                    await member.link.ask("discard", env_id, timeout, seconds=timeout + MARGIN_SECONDS)
                except (HostLostError, NoAnswerError):
                    lost = True
                del self._routes[env_id], member.env_ids[env_id]
                if lost:  # it has it no more when it is made again
                    await self._make_again(member, incarnation)

    async def move(self, env_id: Hashable, host: str, timeout: float) -> None:
        """Have another host keep an environment, with its entries. Waits for its search to end.

        Raises:
            WaitTimeoutError: its search did not end within `timeout`; it stays where it is.
            NoHostError: that host is full or is being drained. InvalidArgumentError: there is no such host.
        """
        self._check_open()
        target = self._member(host)
        async with self._changes:
            await self._move(env_id, target, timeout)

    async def _move(self, env_id: Hashable, target: _Member, timeout: float) -> None:
        async with self._alone_with(env_id):
            source = self._routes.get(env_id)
            if source is target:
                return
            if target.room <= 0:
                raise NoHostError(f"{target.name} has no room for {shown(env_id)}: it is full, or is being drained")
            roots, lost, incarnation = None, False, 0
            if source is not None:
                incarnation = source.incarnation
                try:
                    roots = await source.link.ask("release", env_id, timeout, seconds=timeout + MARGIN_SECONDS)
                except (HostLostError, NoAnswerError):  # what it still has of it ends with it
                    lost = True
                except NotHereError:
                    pass
                except WaitTimeoutError:
                    raise
                except Exception:  # its entries cannot travel: it stays where it was
                    await self._admit(source, env_id, None)
                    raise
                del source.env_ids[env_id]
            self._routes[env_id] = target
            target.env_ids[env_id] = None
            await self._admit(target, env_id, roots)
        if lost and source is not None:
            await self._make_again(source, incarnation)

    # Hosts -----------------------------------------------------------------------------------------------------------

    async def add_hosts(self, count: int) -> list[str]:
        """The names of so many hosts more. They get environments that are new, or moved to them."""
        self._check_open()
        names = [f"host-{number}" for number in range(self._named, self._named + count)]
        self._named += count

        async def new(name: str) -> _Member:
            link = await self._start(name, ())
            places = await link.ask("has_places", seconds=self._start_seconds)
            return _Member(name, link, places, self._version)

        async with self._changes:  # no weights are loaded meanwhile
            made = await asyncio.gather(*map(new, names), return_exceptions=True)
            for each in made:
                if isinstance(each, _Member):
                    if self._closed:  # meanwhile: nobody else would end it
                        await self._launcher.end(each.link)
                    else:
                        self._members[each.name] = each
            self._check_open()
        for each in made:
            if isinstance(each, BaseException):
                raise each
        return names

    async def drain(self, host: str, timeout: float) -> None:
        """Move every environment of a host to the others; it gets no new ones from now on.

        Raises:
            NoHostError: the others have no room for all. WaitTimeoutError: a search did not end within `timeout`.
            What is moved already stays moved, and another drain goes on.
        """
        self._check_open()
        member = self._member(host)
        async with self._changes:
            await self._drain(member, timeout)

    async def _drain(self, member: _Member, timeout: float) -> None:
        member.is_draining = True
        for env_id in tuple(member.env_ids):
            await self._move(env_id, self._emptiest(but=member), timeout)

    async def remove_host(self, host: str, timeout: float) -> None:
        """Drain a host, then end it. Raises as `drain` does."""
        self._check_open()
        member = self._member(host)
        async with self._changes:
            await self._drain(member, timeout)
            async with member.lock:
                del self._members[host]
                await self._launcher.end(member.link)

    async def lost(self, host: str, incarnation: int) -> None:
        """A caller has lost a host: make it again, unless it was already, or answers.

        Raises:
            HostLostError: it could not be made again.
        """
        self._check_open()
        member = self._members.get(host)
        if member is None or member.incarnation != incarnation:
            return
        try:
            await member.link.ask("stats", seconds=PING_SECONDS)
        except (HostLostError, WaitTimeoutError):
            await self._make_again(member, incarnation)

    async def _make_again(self, member: _Member, incarnation: int) -> None:
        async with member.lock:
            if member.incarnation == incarnation:
                await self._replace(member)

    async def _replace(self, member: _Member) -> None:
        """Its lock is held. Environments stay, their entries are misses."""
        if self._members.get(member.name) is not member:
            return
        await self._launcher.end(member.link)
        version, env_ids = self._version, tuple(member.env_ids)
        member.link = await self._start(member.name, env_ids)
        member.incarnation += 1
        member.version = version
        changed = member.env_ids.keys() ^ set(env_ids)  # while it was started
        for env_id in changed:
            with suppress(HostLostError, WaitTimeoutError, NotHereError):
                if env_id in member.env_ids:
                    await member.link.ask("admit", env_id, None, seconds=PING_SECONDS)
                else:
                    await member.link.ask("discard", env_id, PING_SECONDS, seconds=PING_SECONDS)

    async def _start(self, name: str, env_ids: Iterable[Hashable]) -> Link:
        link = await self._launcher.start(name, env_ids, self._weights, self._version, seconds=self._start_seconds)
        if self._closed:
            await self._launcher.end(link)
            self._check_open()
        return link

    # Weights ---------------------------------------------------------------------------------------------------------

    async def load_weights(self, weights: Any, timeout: float) -> int:
        """Have every host load weights, and return their version, one more than the last.

        One host tries them first: what its `load` raises is raised, and nothing else changes. A host that does not
        come to rest within `timeout`, or is lost, is made again with the new weights.
        """
        self._check_open()
        async with self._changes:
            held, version = self._launcher.hold(weights), self._version + 1
            await self._try(held, version, timeout)
            self._weights, self._version = held, version
            results = await asyncio.gather(
                *(self._bring_up(member, timeout) for member in self._members.values()), return_exceptions=True
            )
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return version

    async def _try(self, weights: Any, version: int, timeout: float) -> None:
        """Load them into one host."""
        members = list(self._members.values())
        # The first once more at the end, as it may have been made again, idle.
        for number, member in enumerate([*members, *members[:1]]):
            async with member.lock:
                try:
                    await member.link.ask("load_weights", weights, version, timeout, seconds=timeout + MARGIN_SECONDS)
                except (HostLostError, WaitTimeoutError):
                    await self._replace(member)
                    if number == len(members):
                        raise
                except Exception:
                    await self._replace(member)  # which may have loaded them in part
                    raise
                else:
                    member.version = version
                    return

    async def _bring_up(self, member: _Member, timeout: float) -> None:
        async with member.lock:
            if member.version == self._version:
                return
            try:
                await member.link.ask(
                    "load_weights", self._weights, self._version, timeout, seconds=timeout + MARGIN_SECONDS
                )
                member.version = self._version
            except Exception:
                await self._replace(member)

    # State -----------------------------------------------------------------------------------------------------------

    async def stats(self, timeout: float) -> ClusterStats:
        """Every host's, as far as they answer within `timeout`."""
        self._check_open()
        members = list(self._members.values())

        async def of(member: _Member) -> HostStats | None:
            try:
                stats: HostStats = await member.link.ask("stats", seconds=timeout)
            except (HostLostError, WaitTimeoutError):
                return None
            return stats

        found = await asyncio.gather(*map(of, members))
        return ClusterStats(
            self._version,
            {member.name: stats for member, stats in zip(members, found, strict=True)},
            {member.name: member.incarnation for member in members},
        )

    async def environments(self) -> dict[Hashable, str]:
        """The host of each environment."""
        self._check_open()
        return {env_id: member.name for env_id, member in self._routes.items()}

    async def check_integrity(self, timeout: float) -> dict[str, str]:
        """What every host's manager reports of itself."""
        self._check_open()
        members = list(self._members.values())
        reports = await asyncio.gather(*(each.link.ask("check_integrity", seconds=timeout) for each in members))
        return {member.name: report for member, report in zip(members, reports, strict=True)}

    async def close(self) -> None:
        """End every host."""
        if not self._closed:
            self._closed = True
            members = tuple(self._members.values())
            self._members.clear()
            self._routes.clear()
            for member in members:
                await self._launcher.end(member.link)

    def _member(self, host: str) -> _Member:
        member = self._members.get(host)
        if member is None:
            raise InvalidArgumentError(f"host must be one of {', '.join(self._members)}, got {shown(host)}")
        return member

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the cluster was closed")
