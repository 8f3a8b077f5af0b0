"""`Router` over hosts that can be gone or silent at any call: what it makes again, how often, and with what."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Hashable, Iterable
from typing import Any

import pytest

from concurrent_kv import ClosedError, InvalidArgumentError
from concurrent_kv.cluster import Host, HostLostError, NoAnswerError, NoHostError
from concurrent_kv.cluster.host import answer_of
from concurrent_kv.cluster.requests import Request
from concurrent_kv.cluster.router import Router
from tests.cluster_support import LoadError, expected, plan, setup
from tests.support import HANG_SECONDS


class FaultyLink:
    """Before a call, `faults` may say that the host is gone, or silent, which is after the call."""

    def __init__(self, host: Host, faults: dict[tuple[str, str], str]) -> None:
        self.host, self.faults = host, faults
        self.gone = False
        self.asked: list[str] = []
        self.before: asyncio.Event | None = None

    async def ask(self, method: str, *args: Any, seconds: float) -> Any:
        self.asked.append(method)
        if self.before is not None:
            await self.before.wait()
        fault = self.faults.pop((self.host.name, method), None)
        self.gone = self.gone or fault == "gone"
        await asyncio.sleep(0)
        if fault == "full":
            raise NoHostError(f"{self.host.name} is full")
        if self.gone:
            raise HostLostError(f"{self.host.name} is gone", host=self.host.name)
        result = await answer_of(self.host, method, *args)
        if fault == "silent":
            raise NoAnswerError(f"{self.host.name} had not answered")
        return result


class Launcher:
    def __init__(self) -> None:
        self.faults: dict[tuple[str, str], str] = {}
        self.started: list[tuple[str, int]] = []
        self.links: list[FaultyLink] = []
        self.broken = False

    async def start(
        self, name: str, env_ids: Iterable[Hashable], weights: Any, version: int, *, seconds: float
    ) -> FaultyLink:
        self.started.append((name, version))
        await asyncio.sleep(0)  # as any that takes time: others go on
        if self.broken:
            raise LoadError(1, "no device")
        host = Host(name, setup(4), env_ids=env_ids, weights=weights, version=version)
        self.links.append(FaultyLink(host, self.faults))
        return self.links[-1]

    async def end(self, link: Any) -> None:
        await asyncio.sleep(0)
        link.gone = True
        link.host.close()

    def hold(self, weights: Any) -> Any:
        return weights


def run(play: Callable[[Router, Launcher], Coroutine[Any, Any, None]], hosts: int = 2) -> None:
    """With a router of so many hosts; then every host that serves is sound."""

    async def all_of_it() -> None:
        launcher = Launcher()
        router = Router(launcher, start_seconds=HANG_SECONDS)
        await router.add_hosts(hosts)
        await play(router, launcher)
        await router.check_integrity(HANG_SECONDS)
        await router.close()
        assert all(link.gone for link in launcher.links)

    asyncio.run(asyncio.wait_for(all_of_it(), HANG_SECONDS))


async def search(router: Router, env: int) -> Any:
    route = await router.route(env)
    request = Request(env, plan, (), HANG_SECONDS)
    return await route.link.ask("submit", request, seconds=HANG_SECONDS)


def test_a_host_that_many_callers_lose_at_once_is_made_again_once() -> None:
    async def play(router: Router, launcher: Launcher) -> None:
        route = await router.route(0)
        launcher.links[0].gone = True
        await asyncio.gather(*(router.lost(route.host, route.incarnation) for _ in range(20)))
        assert launcher.started.count((route.host, 0)) == 2
        await router.lost(route.host, route.incarnation)  # one that comes late
        assert len(launcher.started) == 3
        assert (await search(router, 0)).values == expected(0)

    run(play)


def test_a_host_that_answers_is_not_made_again() -> None:
    async def play(router: Router, launcher: Launcher) -> None:
        route = await router.route(0)
        await router.lost(route.host, route.incarnation)
        await router.lost("host-9", 0)
        assert len(launcher.started) == 2

    run(play)


def test_a_host_that_cannot_be_made_again_now_can_be_later() -> None:
    async def play(router: Router, launcher: Launcher) -> None:
        route = await router.route(0)
        launcher.links[0].gone = launcher.broken = True
        for _ in range(2):
            with pytest.raises(LoadError, match="no device"):
                await router.lost(route.host, route.incarnation)
        launcher.broken = False
        await router.lost(route.host, route.incarnation)
        assert (await search(router, 0)).values == expected(0)

    run(play)


def test_an_environment_that_its_host_refuses_is_nowhere() -> None:
    async def play(router: Router, launcher: Launcher) -> None:
        launcher.faults[("host-0", "admit")] = "full"
        with pytest.raises(NoHostError):
            await router.route(0)
        assert await router.environments() == {}
        assert (await search(router, 0)).values == expected(0)

    run(play)


@pytest.mark.parametrize("fault", ["gone", "silent"])
@pytest.mark.parametrize("at", ["release", "admit"])
def test_a_move_that_loses_a_host_ends_with_the_environment_at_the_other(at: str, fault: str) -> None:
    async def play(router: Router, launcher: Launcher) -> None:
        await search(router, 0)
        lost = "host-0" if at == "release" else "host-1"
        launcher.faults[(lost, at)] = fault
        await router.move(0, "host-1", HANG_SECONDS)
        found = await search(router, 0)
        assert (found.host, found.root_was_there, found.values) == ("host-1", False, expected(0))
        assert launcher.started.count((lost, 0)) == 2
        assert (await search(router, 1)).values == expected(1)
        await router.move(0, "host-0", HANG_SECONDS)  # where it is known no more
        assert (await search(router, 0)).root_was_there

    run(play)


@pytest.mark.parametrize("fault", ["gone", "silent"])
def test_an_environment_is_there_though_its_host_was_lost_when_it_came_or_is_let_go_of(fault: str) -> None:
    async def play(router: Router, launcher: Launcher) -> None:
        launcher.faults[("host-0", "admit")] = fault
        assert (await search(router, 0)).values == expected(0)
        launcher.faults[("host-0", "discard")] = fault
        await router.forget(0, HANG_SECONDS)
        assert await router.environments() == {}
        assert launcher.started.count(("host-0", 0)) == 3
        assert not (await search(router, 0)).root_was_there

    run(play)


@pytest.mark.parametrize("fault", ["gone", "silent"])
@pytest.mark.parametrize("host", ["host-0", "host-1"])
def test_a_load_that_loses_a_host_leaves_every_host_with_the_new_weights(host: str, fault: str) -> None:
    async def play(router: Router, launcher: Launcher) -> None:
        for env in range(4):
            await search(router, env)
        launcher.faults[(host, "load_weights")] = fault
        assert await router.load_weights(5, HANG_SECONDS) == 1
        found = [await search(router, env) for env in range(4)]
        assert {(each.version, each.weights) for each in found} == {(1, 5)}
        assert [each.values for each in found] == [expected(env, 5) for env in range(4)]

    run(play)


def test_tasks_that_wait_for_one_environment_have_one_lock_though_it_is_forgotten() -> None:
    async def play(router: Router, launcher: Launcher) -> None:
        await search(router, 0)
        forgotten = asyncio.ensure_future(router.forget(0, HANG_SECONDS))
        await asyncio.sleep(0)
        asks = [asyncio.ensure_future(search(router, 0))]
        await forgotten
        # It comes back now; whoever asks next finds it there, and not on its way.
        asks += [asyncio.ensure_future(search(router, 0)) for _ in range(3)]
        assert {found.values for found in await asyncio.gather(*asks)} == {expected(0)}
        assert [stats.environments for stats in (await router.stats(HANG_SECONDS)).hosts.values() if stats] == [1, 0]

    run(play)


def test_a_host_that_comes_while_the_cluster_is_closed_is_ended() -> None:
    async def play() -> None:
        launcher = Launcher()
        router = Router(launcher, start_seconds=HANG_SECONDS)
        await router.add_hosts(2)
        coming = asyncio.ensure_future(router.add_hosts(1))
        while len(launcher.links) < 3:
            await asyncio.sleep(0)
        launcher.links[2].before = asyncio.Event()
        closing = asyncio.ensure_future(router.close())
        await asyncio.sleep(0)
        launcher.links[2].before.set()
        await closing
        with pytest.raises(ClosedError):
            await coming
        assert all(link.gone for link in launcher.links)

    asyncio.run(asyncio.wait_for(play(), HANG_SECONDS))


def test_each_host_loads_weights_once() -> None:
    async def play(router: Router, launcher: Launcher) -> None:
        await router.load_weights(5, HANG_SECONDS)
        assert [link.asked.count("load_weights") for link in launcher.links] == [1, 1]

    run(play)


def test_a_load_that_loses_the_only_host_is_tried_once_more() -> None:
    async def play(router: Router, launcher: Launcher) -> None:
        launcher.faults[("host-0", "load_weights")] = "gone"
        assert await router.load_weights(5, HANG_SECONDS) == 1
        assert (await search(router, 0)).values == expected(0, 5)

    run(play, hosts=1)


def test_weights_that_one_host_refuses_are_tried_by_no_other() -> None:
    async def play(router: Router, launcher: Launcher) -> None:
        await router.load_weights(3, HANG_SECONDS)
        with pytest.raises(LoadError):
            await router.load_weights(-1, HANG_SECONDS)
        assert launcher.started == [("host-0", 0), ("host-1", 0), ("host-0", 1)]
        assert {(await search(router, env)).values for env in range(4)} == {expected(env, 3) for env in range(4)}

    run(play)


def test_hosts_are_named_in_messages() -> None:
    async def play(router: Router, launcher: Launcher) -> None:
        with pytest.raises(InvalidArgumentError, match="one of host-0, host-1, got 'host-5'"):
            await router.drain("host-5", 1.0)

    run(play)
