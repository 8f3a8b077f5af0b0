"""`LocalCluster`: routes, turns, versions, errors, moves and hosts that end; without Ray, the same code as with it."""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
import gc
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from concurrent_kv import (
    ClosedError,
    InvalidArgumentError,
    InvalidTypeError,
    KeysValues,
    SearchEndedError,
    WaitTimeoutError,
)
from concurrent_kv.cluster import (
    Host,
    HostLostError,
    HostParts,
    LocalCluster,
    NoAnswerError,
    NoHostError,
    NotHereError,
    PlannerError,
    QueueFullError,
)
from concurrent_kv.cluster.requests import Request
from tests.cluster_support import (
    LoadError,
    OddError,
    counted_and_raising,
    envs_of,
    exiting,
    expected,
    failing,
    grow_until,
    plan,
    plan_between_loads,
    refusing,
    setup,
    touching,
    until_there,
    waiting,
)
from tests.evaluating import HEAD_DIM, HEADS, LAYERS
from tests.support import HANG_SECONDS


@pytest.fixture
def make() -> Iterator[Callable[..., LocalCluster]]:
    made: list[LocalCluster] = []

    def cluster(**options: Any) -> LocalCluster:
        made.append(LocalCluster(options.pop("setup", setup()), **{"timeout": HANG_SECONDS, **options}))
        return made[-1]

    yield cluster
    for each in made:
        try:
            each.check_integrity()
        except ClosedError:
            continue
        each.close()


def test_each_environment_has_one_host_and_stays_there(make: Callable[..., LocalCluster]) -> None:
    cluster = make(hosts=2)
    first = {env: cluster.search(env, plan) for env in range(8)}
    again = {env: cluster.search(env, plan) for env in range(8)}
    assert {env: found.host for env, found in first.items()} == cluster.environments()
    assert [found.values for found in first.values()] == [expected(env) for env in range(8)]
    for env, found in again.items():
        assert (found.host, found.local_id) == (first[env].host, first[env].local_id)
        assert (first[env].root_was_there, found.root_was_there) == (False, True)
    assert sorted(stats.environments for stats in cluster.stats().hosts.values() if stats) == [4, 4]


def test_an_environment_beyond_the_room_of_all_hosts_is_refused_until_one_is_forgotten(
    make: Callable[..., LocalCluster],
) -> None:
    cluster = make(setup=setup(2))
    for env in range(2):
        cluster.search(env, plan)
    with pytest.raises(NoHostError, match="add_host"):
        cluster.search(2, plan)
    cluster.forget(0)
    assert cluster.search(2, plan).values == expected(2)
    assert cluster.search(2, plan, 4).root_was_there is not False
    cluster.add_host()
    assert not cluster.search(0, plan).root_was_there


def test_a_planners_error_keeps_its_type_and_fields(make: Callable[..., LocalCluster]) -> None:
    cluster = make()
    with pytest.raises(OddError, match="odd: 7") as caught:
        cluster.search(0, failing, 7)
    assert caught.value.code == 7
    with pytest.raises(TimeoutError, match="of the planner's own") as of_planner:
        cluster.search(0, refusing)
    assert type(of_planner.value) is TimeoutError
    with pytest.raises(PlannerError, match="SystemExit: 3"):
        cluster.search(0, exiting)
    assert cluster.search(0, plan).values == expected(0)


@pytest.mark.parametrize("error", [NotHereError("of another"), HostLostError("of another", host="there", attempts=7)])
def test_what_a_planner_raises_is_not_taken_for_its_hosts(
    make: Callable[..., LocalCluster], tmp_path: Path, error: Exception
) -> None:
    cluster = make()
    with pytest.raises(type(error), match=r"^of another$") as caught:
        cluster.search(0, counted_and_raising, tmp_path / "ran", error, retries=3)
    assert vars(caught.value) == vars(error)
    assert (tmp_path / "ran").read_text() == "x"


@pytest.mark.parametrize("error", [StopIteration(3), concurrent.futures.CancelledError("word")])
def test_an_error_that_no_task_can_raise_is_heard_in_words(
    make: Callable[..., LocalCluster], tmp_path: Path, error: Exception
) -> None:
    cluster = make()
    with pytest.raises(PlannerError, match=type(error).__name__) as caught:
        cluster.search(0, counted_and_raising, tmp_path / "ran", error)
    assert caught.value.kind == type(error).__name__


def test_searches_of_one_environment_run_one_at_a_time_in_their_order(make: Callable[..., LocalCluster]) -> None:
    cluster = make(threads=4)
    running, order = threading.Semaphore(1), []

    def note(context: Any, number: int) -> None:
        assert running.acquire(blocking=False), "two at once"
        order.append(number)
        running.release()

    cluster.search("env", note, 0)  # has found its host
    for future in [cluster.submit("env", note, number) for number in range(1, 40)]:
        future.result(HANG_SECONDS)
    assert order == list(range(40))


def test_environments_that_wait_take_turns(make: Callable[..., LocalCluster], tmp_path: Path) -> None:
    cluster = make(threads=1)
    order: list[tuple[str, int]] = []

    def note(context: Any, number: int) -> None:
        order.append((context.env_id, number))

    blocked = cluster.submit(0, waiting, tmp_path / "begun", tmp_path / "go on")
    until_there(tmp_path / "begun")
    futures = [cluster.submit("greedy", note, number) for number in range(10)]
    cluster.stats()  # which comes after what was handed in
    futures.append(cluster.submit("modest", note, 0))
    until(lambda: cluster.stats().total.waiting == 11)
    (tmp_path / "go on").touch()
    for future in [blocked, *futures]:
        future.result(HANG_SECONDS)
    assert order.index(("modest", 0)) <= 1


def until(condition: Callable[[], bool]) -> None:
    """Look again until something is so; within bounds."""
    wait = threading.Event()
    for _ in range(int(HANG_SECONDS / 0.01)):
        if condition():
            return
        wait.wait(0.01)
    raise AssertionError("it was not so in time")


def test_a_full_queue_refuses_and_does_not_stop_other_hosts(make: Callable[..., LocalCluster], tmp_path: Path) -> None:
    cluster = make(hosts=2, threads=1, max_waiting=2)
    hosts = {env: cluster.search(env, plan).host for env in range(4)}
    slow, other = 0, next(env for env in range(4) if hosts[env] != hosts[0])
    futures = [cluster.submit(slow, waiting, tmp_path / "begun", tmp_path / "go on")]
    until_there(tmp_path / "begun")
    futures += [cluster.submit(slow, plan) for _ in range(2)]
    until(lambda: cluster.stats().total.waiting == 2)
    with pytest.raises(QueueFullError, match="max_waiting") as caught:
        cluster.search(slow, plan)
    assert (caught.value.host, caught.value.limit) == (hosts[slow], 2)
    assert cluster.search(other, plan).values == expected(other)
    (tmp_path / "go on").touch()
    assert all(future.result(HANG_SECONDS).values == expected(slow) for future in futures)


def test_an_environment_that_floods_its_host_does_not_have_others_refused(
    make: Callable[..., LocalCluster], tmp_path: Path
) -> None:
    cluster = make(threads=1, max_waiting=2)
    futures = [cluster.submit("greedy", waiting_of_another, tmp_path / "begun", tmp_path / "go on")]
    until_there(tmp_path / "begun")
    futures += [cluster.submit("greedy", number_of, number) for number in range(2)]
    until(lambda: cluster.stats().total.waiting == 2)
    with pytest.raises(QueueFullError):
        cluster.search("greedy", number_of, 2)
    futures += [cluster.submit("modest", number_of, 7)]
    until(lambda: cluster.stats().total.waiting == 3)
    with pytest.raises(QueueFullError):
        cluster.search("modest", number_of, 8)
    (tmp_path / "go on").touch()
    assert [future.result(HANG_SECONDS) for future in futures] == [None, 0, 1, 7]
    assert cluster.stats().total.refused == 2


def waiting_of_another(context: Any, begun: Path, go_on: Path) -> None:
    begun.touch()
    until_there(go_on)


def number_of(context: Any, number: int) -> int:
    return number


def test_requests_that_no_caller_waits_for_make_room_and_are_not_run(
    make: Callable[..., LocalCluster], tmp_path: Path
) -> None:
    cluster = make(threads=1, max_waiting=2)
    ran = []
    blocked = cluster.submit(0, waiting, tmp_path / "begun", tmp_path / "go on")
    until_there(tmp_path / "begun")
    for _ in range(2):
        with pytest.raises(WaitTimeoutError):
            cluster.search(1, lambda context: ran.append(1), timeout=0.05)
    fine = cluster.submit(1, plan)
    until(lambda: cluster.stats().total.waiting == 1)
    (tmp_path / "go on").touch()
    assert fine.result(HANG_SECONDS).values == expected(1)
    assert blocked.result(HANG_SECONDS).values == expected(0)
    assert not ran


def test_a_search_that_is_cancelled_before_it_begins_is_not_run(
    make: Callable[..., LocalCluster], tmp_path: Path
) -> None:
    cluster = make()
    blocked = cluster.submit(0, waiting, tmp_path / "begun", tmp_path / "go on")
    until_there(tmp_path / "begun")
    cancelled = cluster.submit(0, touching, tmp_path / "ran")
    until(lambda: cluster.stats(timeout=HANG_SECONDS).total.waiting == 1)
    assert cancelled.cancel()
    until(lambda: cluster.stats(timeout=HANG_SECONDS).total.waiting == 0)
    (tmp_path / "go on").touch()
    blocked.result(HANG_SECONDS)
    cluster.search(0, plan)
    assert not (tmp_path / "ran").exists()


# Weights -------------------------------------------------------------------------------------------------------------


def test_after_a_load_every_host_has_the_version_and_every_entry_is_a_miss(make: Callable[..., LocalCluster]) -> None:
    cluster = make(hosts=2)
    for env in range(4):
        assert cluster.search(env, plan).version == 0
    assert cluster.load_weights(5) == 1
    added = cluster.add_host()
    for env in range(5):
        found = cluster.search(env, plan)
        assert (found.version, found.weights, found.values) == (1, 5, expected(env, 5))
        assert not found.root_was_there
    assert {stats.version for stats in cluster.stats().hosts.values() if stats} == {1}
    assert list(envs_of(cluster.environments(), added)) == [4]


def test_a_search_that_a_load_ends_is_run_again_with_the_new_weights(
    make: Callable[..., LocalCluster], tmp_path: Path
) -> None:
    cluster = make()
    search = cluster.submit(3, grow_until, tmp_path / "begun", tmp_path / "go on")
    until_there(tmp_path / "begun")
    loaded: list[int] = []
    loading = threading.Thread(target=lambda: loaded.append(cluster.load_weights(9)))
    loading.start()
    until(lambda: cluster.stats().total.cache.reserved_entries == 0)  # the search was ended
    (tmp_path / "go on").touch()
    loading.join(HANG_SECONDS)
    found = search.result(HANG_SECONDS)
    assert loaded == [1]
    assert (found.version, found.values) == (1, expected(3, 9))
    assert cluster.stats().total.reruns == 1


def test_a_planner_that_must_not_run_twice_is_not_run_again_by_a_load(
    make: Callable[..., LocalCluster], tmp_path: Path
) -> None:
    cluster = make()
    search = cluster.submit(3, grow_until, tmp_path / "begun", tmp_path / "go on", retries=0)
    until_there(tmp_path / "begun")
    loading = threading.Thread(target=lambda: cluster.load_weights(9))
    loading.start()
    until(lambda: cluster.stats().total.cache.reserved_entries == 0)  # the search was ended
    (tmp_path / "go on").touch()
    loading.join(HANG_SECONDS)
    with pytest.raises(SearchEndedError):
        search.result(HANG_SECONDS)
    assert cluster.stats().total.reruns == 0


def test_a_host_that_is_added_has_the_weights_as_they_were_when_they_were_loaded(
    make: Callable[..., LocalCluster],
) -> None:
    def with_a_tensor() -> HostParts:
        parts = setup()()
        return dataclasses.replace(parts, load=lambda weights: parts.model.load_state_dict(int(weights)))

    cluster = make(setup=with_a_tensor)
    weights = torch.tensor(5)
    cluster.load_weights(weights)
    cluster.search(0, plan)
    weights += 1  # training goes on
    cluster.add_host()
    found = cluster.search(1, plan)
    assert (found.host, found.version, found.weights) == ("host-1", 1, 5)


def test_a_planner_whose_root_a_load_made_a_miss_is_run_again(
    make: Callable[..., LocalCluster], tmp_path: Path
) -> None:
    cluster = make()
    search = cluster.submit(3, plan_between_loads, tmp_path / "begun", tmp_path / "go on")
    until_there(tmp_path / "begun")
    loading = threading.Thread(target=lambda: cluster.load_weights(9))
    loading.start()
    until(lambda: cluster.stats().total.cache.entries == 0)  # the version was bumped
    (tmp_path / "go on").touch()
    loading.join(HANG_SECONDS)
    found = search.result(HANG_SECONDS)
    assert (found.version, found.values) == (1, expected(3, 9))


def test_what_a_planner_still_stores_during_a_load_is_a_miss_afterwards(
    make: Callable[..., LocalCluster], tmp_path: Path
) -> None:
    cluster = make()
    search = cluster.submit(3, store_late, tmp_path / "begun", tmp_path / "go on")
    until_there(tmp_path / "begun")
    loading = threading.Thread(target=lambda: cluster.load_weights(9))
    loading.start()
    until(lambda: cluster.stats().total.cache.reserved_entries == 0)  # the version was bumped
    (tmp_path / "go on").touch()
    loading.join(HANG_SECONDS)
    assert search.result(HANG_SECONDS)  # it was stored
    assert not cluster.search(3, plan).root_was_there


def store_late(context: Any, begun: Path, go_on: Path) -> bool:
    with context.manager.search([context.local_id]):
        begun.touch()
        until_there(go_on)
    row = KeysValues.from_packed(torch.ones(2 * LAYERS, 1, HEADS, 1, HEAD_DIM))
    stored: bool = context.manager.set_init_cache(context.local_id, ("root", 3), row, side=("of", 3))
    return stored


def test_weights_that_a_host_refuses_change_nothing(make: Callable[..., LocalCluster]) -> None:
    cluster = make(hosts=2)
    cluster.load_weights(5)
    for _ in range(3):
        with pytest.raises(LoadError, match="negative -1") as caught:
            cluster.load_weights(-1)
        assert caught.value.number == -1
        for env in range(4):
            found = cluster.search(env, plan)
            assert (found.version, found.values) == (1, expected(env, 5))


def test_a_host_whose_planner_does_not_end_in_time_is_made_again_with_the_new_weights(
    make: Callable[..., LocalCluster], tmp_path: Path
) -> None:
    cluster = make(retries=0)
    stuck = cluster.submit(0, waiting, tmp_path / "begun", tmp_path / "go on")
    until_there(tmp_path / "begun")
    assert cluster.load_weights(4, timeout=0.1) == 1
    found = cluster.search(0, plan)
    assert (found.version, found.values) == (1, expected(0, 4))
    assert cluster.stats().made_again == {"host-0": 1}
    (tmp_path / "go on").touch()
    with pytest.raises(HostLostError) as caught:
        stuck.result(HANG_SECONDS)
    assert (caught.value.host, caught.value.attempts) == ("host-0", 1)


# Moves ---------------------------------------------------------------------------------------------------------------


def other_than(host: str) -> str:
    return {"host-0": "host-1", "host-1": "host-0"}[host]


def test_a_moved_environment_has_its_roots_and_their_side_data_at_the_other_host(
    make: Callable[..., LocalCluster],
) -> None:
    cluster = make(hosts=2)
    before = cluster.search(1, plan)
    cluster.move(1, other_than(before.host))
    after = cluster.search(1, plan)
    assert after.host == other_than(before.host)
    assert after.root_was_there
    assert after.values == before.values
    with pytest.raises(InvalidArgumentError, match="host-0, host-1"):
        cluster.move(1, "host-7")


def test_a_move_waits_for_the_search_and_those_that_wait_follow(
    make: Callable[..., LocalCluster], tmp_path: Path
) -> None:
    cluster = make(hosts=2)
    host = cluster.search(0, plan).host
    running = cluster.submit(0, waiting, tmp_path / "begun", tmp_path / "go on")
    until_there(tmp_path / "begun")
    queued = [cluster.submit(0, plan) for _ in range(3)]
    until(lambda: cluster.stats().total.waiting == 3)
    with pytest.raises(WaitTimeoutError, match="did not end in time"):
        cluster.move(0, other_than(host), timeout=0.05)
    moving = threading.Thread(target=lambda: cluster.move(0, other_than(host)))
    moving.start()
    until(lambda: is_leaving(cluster, host, 0))
    queued.append(cluster.submit(0, plan))
    until(lambda: cluster.stats().total.waiting == 4)
    (tmp_path / "go on").touch()
    moving.join(HANG_SECONDS)
    assert running.result(HANG_SECONDS).host == host
    found = [future.result(HANG_SECONDS) for future in queued]
    assert {(each.host, each.root_was_there) for each in found} == {(other_than(host), True)}


def is_leaving(cluster: Any, host: str, env: int) -> bool:
    return env in cluster._router._members[host].link.host._leaving


def test_no_search_of_an_environment_begins_while_its_entries_are_taken(tmp_path: Path) -> None:
    parts = setup(2)()
    host = Host("host-0", lambda: parts, threads=1, env_ids=(0, 1))
    taking, go_on = threading.Event(), threading.Event()
    pool: Any = parts.manager.init_pools[1]

    def slow_keys() -> list[Any]:
        taking.set()
        assert go_on.wait(HANG_SECONDS)
        return []

    pool.keys = slow_keys
    blocked = host.submit(Request(0, waiting, (tmp_path / "begun", tmp_path / "go on"), HANG_SECONDS))
    until_there(tmp_path / "begun")
    waits = host.submit(Request(1, touching, (tmp_path / "ran",), HANG_SECONDS))
    with ThreadPoolExecutor(1) as threads:
        released = threads.submit(host.release, 1, HANG_SECONDS)
        assert taking.wait(HANG_SECONDS)
        last = host.submit(Request(0, plan, (), HANG_SECONDS))
        (tmp_path / "go on").touch()
        blocked.result(HANG_SECONDS)
        last.result(HANG_SECONDS)  # the thread has looked for its next search
        assert not (tmp_path / "ran").exists()
        go_on.set()
        released.result(HANG_SECONDS)
    with pytest.raises(NotHereError):
        waits.result(HANG_SECONDS)
    host.check_integrity()
    host.close()


def test_a_move_goes_on_where_its_caller_has_stopped_waiting(make: Callable[..., LocalCluster], tmp_path: Path) -> None:
    cluster = make(hosts=2)
    host = cluster.search(0, plan).host
    running = cluster.submit(0, waiting, tmp_path / "begun", tmp_path / "go on")
    until_there(tmp_path / "begun")
    with pytest.raises(NoAnswerError):
        cluster._call("move", 0, other_than(host), HANG_SECONDS, waits=0.05)
    (tmp_path / "go on").touch()
    assert running.result(HANG_SECONDS).host == host
    until(lambda: cluster.environments()[0] == other_than(host))
    found = cluster.search(0, plan)
    assert (found.host, found.root_was_there) == (other_than(host), True)


def test_roots_of_other_weights_are_left_behind() -> None:
    with Host("old", setup()) as old, Host("new", setup(), weights=5, version=1) as new:
        old.admit(0)
        new.admit(1)
        assert old.submit(Request(0, plan, (), HANG_SECONDS)).result(HANG_SECONDS).values == expected(0)
        new.admit(0, old.release(0, HANG_SECONDS))
        found = new.submit(Request(0, plan, (), HANG_SECONDS)).result(HANG_SECONDS)
        assert (found.root_was_there, found.values) == (False, expected(0, 5))


@pytest.mark.parametrize("way", ["its turn", "room for another", "release"])
def test_who_hears_that_a_search_never_began_finds_the_host_unlocked(way: str, tmp_path: Path) -> None:
    heard = concurrent.futures.Future[bool]()
    begun, go_on = tmp_path / "begun", tmp_path / "go on"
    with Host("host", setup(), threads=1, max_waiting=1, env_ids=(0, 1)) as host, ThreadPoolExecutor(1) as other:

        def callback(late: concurrent.futures.Future[Any]) -> None:
            assert isinstance(late.exception(), NotHereError if way == "release" else WaitTimeoutError)
            try:
                heard.set_result(other.submit(host.stats).result(HANG_SECONDS).environments > 0)
            except BaseException as error:
                heard.set_exception(error)

        running = [host.submit(Request(0, waiting, (begun, go_on), HANG_SECONDS))]
        until_there(begun)
        asked = host.submit(Request(1, plan, (), HANG_SECONDS if way == "release" else 0.0))
        asked.add_done_callback(callback)
        if way == "its turn":
            go_on.touch()
        elif way == "release":
            host.release(1, HANG_SECONDS)
        else:
            running.append(host.submit(Request(1, plan, (), HANG_SECONDS)))
        assert heard.result(2 * HANG_SECONDS)
        go_on.touch()
        for each in running:
            each.result(HANG_SECONDS)
        assert (host.stats().expired, host.stats().waiting) == (int(way != "release"), 0)
        host.check_integrity()


def test_a_drained_host_has_no_environments_and_gets_none(make: Callable[..., LocalCluster]) -> None:
    cluster = make(hosts=2)
    for env in range(4):
        cluster.search(env, plan)
    cluster.drain("host-0")
    assert set(cluster.environments().values()) == {"host-1"}
    assert {cluster.search(env, plan).host for env in range(6)} == {"host-1"}
    assert all(cluster.search(env, plan).root_was_there for env in range(4))
    cluster.remove_host("host-0")
    assert list(cluster.stats().hosts) == ["host-1"]
    with pytest.raises(NoHostError):
        cluster.remove_host("host-1")  # nobody could take its environments
    assert cluster.search(0, plan).root_was_there


# The end -------------------------------------------------------------------------------------------------------------


def test_a_task_awaits_a_search(make: Callable[..., LocalCluster]) -> None:
    cluster = make()

    async def several() -> list[Any]:
        return await asyncio.gather(*(cluster.search_async(env, plan) for env in range(6)))

    assert [found.values for found in asyncio.run(several())] == [expected(env) for env in range(6)]


def test_a_closed_cluster_says_so(make: Callable[..., LocalCluster], tmp_path: Path) -> None:
    cluster = make()
    running = cluster.submit(0, waiting, tmp_path / "begun", tmp_path / "go on")
    until_there(tmp_path / "begun")
    cluster.close()
    cluster.close()
    (tmp_path / "go on").touch()
    with pytest.raises(ClosedError):
        running.result(HANG_SECONDS)
    for call in (lambda: cluster.search(0, plan), cluster.stats, cluster.add_host, lambda: cluster.load_weights(1)):
        with pytest.raises(ClosedError):
            call()


def test_a_cluster_that_nobody_has_any_more_ends_its_hosts() -> None:
    parts = setup()()
    cluster = LocalCluster(lambda: parts, timeout=HANG_SECONDS)
    cluster.search(0, plan)
    del cluster

    def is_closed() -> bool:
        gc.collect()  # the loop's last task may keep it a moment longer
        try:
            parts.manager.check_integrity()
            parts.manager.init_pools[0].put(
                "root", KeysValues.from_packed(torch.ones(2 * LAYERS, 1, HEADS, 1, HEAD_DIM))
            )
        except ClosedError:
            return True
        return False

    until(is_closed)


def test_what_cannot_work_is_said_at_once(make: Callable[..., LocalCluster]) -> None:
    cluster = make()
    with pytest.raises(InvalidTypeError, match="planner must be callable"):
        cluster.submit(0, "plan")  # type: ignore[arg-type]
    with pytest.raises(InvalidTypeError, match="env_id must be hashable"):
        cluster.submit([], plan)  # type: ignore[arg-type]
    with pytest.raises(InvalidTypeError, match="setup must return HostParts"):
        make(setup=lambda: None)
    with pytest.raises(InvalidArgumentError, match="hosts must be at least 1"):
        make(hosts=0)
