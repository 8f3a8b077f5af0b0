"""`RayCluster` on a real local cluster: routes, versions, errors, actors that are killed, stalled and moved from."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

pytest.importorskip("ray", reason="needs Ray: make ray")

import ray
from ray.cluster_utils import Cluster as Machines
from ray.exceptions import RayActorError

from concurrent_kv import InvalidArgumentError, WaitTimeoutError
from concurrent_kv.cluster import HostLostError, NoHostError, PlannerError, QueueFullError
from concurrent_kv.ray import RayCluster
from tests.cluster_support import (
    STEPS,
    Found,
    Learner,
    LoadError,
    OddError,
    Player,
    always_dying,
    counted_and_raising,
    counted_with_a_result_that_cannot_be_made,
    dying,
    exiting,
    expected,
    failing,
    grow_until,
    plan,
    search_in_a_task,
    setup,
    store_what_cannot_travel,
    touching,
    until_there,
    waiting,
)
from tests.support import HANG_SECONDS
from tests.test_cluster import until

ENVS = 64  # that an actor has room for
NAME = "whole numbers"


@pytest.fixture(scope="session")
def machines() -> Iterator[Any]:
    """One machine; a test may add others."""
    made = Machines(
        initialize_head=True,
        head_node_args={"num_cpus": 8, "object_store_memory": 100 * 2**20, "include_dashboard": False},
    )
    ray.init(address=made.address, logging_level="ERROR", log_to_driver=False)
    yield made
    ray.shutdown()
    made.shutdown()


@pytest.fixture(scope="session")
def address(machines: Any) -> str:
    found: str = machines.address
    return found


@pytest.fixture(scope="session")
def shared(address: str) -> Iterator[RayCluster]:
    made = RayCluster(setup(ENVS), actors=2, name=NAME, timeout=HANG_SECONDS)
    yield made
    made.close()


@pytest.fixture
def cluster(shared: RayCluster) -> Iterator[RayCluster]:
    """Two hosts without environments; whatever a test has done to them, they are sound afterwards."""
    yield shared
    for env in shared.environments():
        shared.forget(env)
    shared.check_integrity()


def test_each_environment_has_one_actor_and_stays_there(cluster: RayCluster) -> None:
    first = {env: cluster.search(env, plan) for env in range(6)}
    again = {env: cluster.search(env, plan) for env in range(6)}
    assert {env: found.host for env, found in first.items()} == cluster.environments()
    assert len({found.pid for found in first.values()} | {os.getpid()}) == 3
    for env, found in again.items():
        assert found.values == first[env].values == expected(env, found.weights)
        assert (found.pid, found.local_id) == (first[env].pid, first[env].local_id)
        assert (first[env].root_was_there, found.root_was_there) == (False, True)


@pytest.mark.parametrize("step", STEPS)
def test_an_actor_killed_at_a_step_is_made_again_and_its_search_is_answered_once(
    cluster: RayCluster, tmp_path: Path, step: str
) -> None:
    before = {env: cluster.search(env, plan) for env in range(4)}
    made_again = cluster.stats(timeout=HANG_SECONDS).made_again
    host = before[0].host
    found = cluster.search(0, dying, step, tmp_path / "killed")
    assert (tmp_path / "killed").exists()
    assert found.values == expected(0, found.weights)
    assert (found.host, found.root_was_there) == (host, False)
    assert found.pid != before[0].pid
    after = {env: cluster.search(env, plan) for env in range(1, 4)}
    for env, each in after.items():
        assert each.values == before[env].values
        assert each.host == before[env].host
        assert each.root_was_there == (each.host != host)  # a miss, and computed anew
    now = cluster.stats(timeout=HANG_SECONDS).made_again
    assert {name: count - made_again[name] for name, count in now.items() if count != made_again[name]} == {host: 1}


def test_a_search_that_kills_its_actor_each_time_is_a_typed_error(cluster: RayCluster) -> None:
    host = cluster.search(0, plan).host
    with pytest.raises(HostLostError, match=r"lost during the search of 0, 2 time\(s\)") as caught:
        cluster.search(0, always_dying, retries=1)
    assert (caught.value.host, caught.value.attempts) == (host, 2)
    assert cluster.search(0, plan).values == expected(0, cluster.search(1, plan).weights)


def test_a_planner_that_must_not_run_twice_does_not(cluster: RayCluster, tmp_path: Path) -> None:
    cluster.search(0, plan)
    with pytest.raises(HostLostError) as caught:
        cluster.search(0, dying, "start", tmp_path / "killed", retries=0)
    assert caught.value.attempts == 1
    found = cluster.search(0, plan)  # the host is made again, whoever asks next
    assert found.values == expected(0, found.weights)


def test_entries_that_cannot_travel_stay_where_they_are(cluster: RayCluster) -> None:
    before = cluster.search(0, plan)
    cluster.search(0, store_what_cannot_travel)
    target = next(host for host in cluster.stats(timeout=HANG_SECONDS).hosts if host != before.host)
    with pytest.raises(TypeError, match="pickle"):
        cluster.move(0, target)
    after = cluster.search(0, plan)
    assert (after.host, after.values, after.root_was_there) == (before.host, before.values, False)


def test_errors_keep_their_type_and_fields(cluster: RayCluster) -> None:
    with pytest.raises(OddError, match="odd: 7") as caught:
        cluster.search(0, failing, 7)
    assert caught.value.code == 7
    assert "in failing" in str(caught.value.__cause__)
    with pytest.raises(PlannerError, match="SystemExit: 3"):
        cluster.search(0, exiting)
    with pytest.raises(TypeError, match="pickle") as of_result:
        cluster.search(0, lambda context: threading.Lock())
    assert type(of_result.value) is TypeError
    with pytest.raises(TypeError, match="pickle"):
        cluster.search(0, plan, threading.Lock())
    with pytest.raises(InvalidArgumentError, match="host must be one of"):
        cluster.move(0, "nowhere")


def test_what_cannot_be_unpickled_here_is_said_and_its_planner_does_not_run_again(
    cluster: RayCluster, tmp_path: Path
) -> None:
    with pytest.raises(PlannerError, match="LookupError: not made here"):
        cluster.search(0, counted_with_a_result_that_cannot_be_made, tmp_path / "ran")
    assert (tmp_path / "ran").read_text() == "x"


def test_a_planners_loss_of_another_clusters_host_is_its_own(cluster: RayCluster, tmp_path: Path) -> None:
    with pytest.raises(HostLostError, match=r"^of another$") as caught:
        cluster.search(0, counted_and_raising, tmp_path / "ran", HostLostError("of another", host="there", attempts=7))
    assert (caught.value.host, caught.value.attempts) == ("there", 7)
    assert "in counted_and_raising" in str(caught.value.__cause__)
    assert (tmp_path / "ran").read_text() == "x"


@pytest.mark.parametrize("name", [object(), float("nan")])
def test_a_name_that_no_other_process_would_know_is_refused_and_takes_no_place(
    cluster: RayCluster, name: object
) -> None:
    with pytest.raises(InvalidArgumentError, match="env_id must equal its copy"):
        cluster.search(name, plan)
    assert cluster.environments() == {}


def test_after_a_load_every_actor_has_the_version_also_one_that_is_made_again(
    cluster: RayCluster, tmp_path: Path
) -> None:
    earlier = {env: cluster.search(env, plan) for env in range(4)}
    version = cluster.load_weights(ray.put(11))
    assert version == earlier[0].version + 1
    for env in range(4):
        found = cluster.search(env, plan)
        assert (found.version, found.weights, found.values) == (version, 11, expected(env, 11))
        assert not found.root_was_there
    found = cluster.search(0, dying, "start", tmp_path / "killed")
    assert (found.version, found.values) == (version, expected(0, 11))
    with pytest.raises(LoadError, match="negative -3") as caught:
        cluster.load_weights(-3)
    assert caught.value.number == -3
    assert {cluster.search(env, plan).values for env in range(4)} == {expected(env, 11) for env in range(4)}
    assert {stats.version for stats in cluster.stats(timeout=HANG_SECONDS).hosts.values() if stats} == {version}


def test_weights_of_a_learner_that_is_gone_are_its_loss_and_not_the_clusters(cluster: RayCluster) -> None:
    before = cluster.load_weights(7)
    learner = ray.remote(num_cpus=0)(Learner).remote()
    assert cluster.load_weights(learner.weights.remote()) == before + 1
    with pytest.raises(RayActorError, match="Learner"):
        cluster.load_weights(learner.die.remote())
    found = cluster.search(0, plan)
    assert (found.version, found.values) == (before + 1, expected(0, 13))


def test_a_search_that_a_load_ends_is_run_again(cluster: RayCluster, tmp_path: Path) -> None:
    search = cluster.submit(3, grow_until, tmp_path / "begun", tmp_path / "go on")
    until_there(tmp_path / "begun")
    with ThreadPoolExecutor(1) as threads:
        loading = threads.submit(cluster.load_weights, 9)
        until(lambda: cluster.stats(timeout=HANG_SECONDS).total.cache.reserved_entries == 0)
        (tmp_path / "go on").touch()
        version = loading.result(HANG_SECONDS)
    found = search.result(HANG_SECONDS)
    assert (found.version, found.values) == (version, expected(3, 9))


def test_a_stalled_actor_stops_no_other_and_is_made_again_by_the_next_load(cluster: RayCluster) -> None:
    found = {env: cluster.search(env, plan) for env in range(4)}
    stalled = found[0]
    other = next(each for each in found.values() if each.pid != stalled.pid)
    other_env = next(env for env, each in found.items() if each is other)
    os.kill(stalled.pid, signal.SIGSTOP)
    try:
        with pytest.raises(WaitTimeoutError, match=stalled.host):
            cluster.search(0, plan, timeout=0.5)
        for _ in range(5):
            assert cluster.search(other_env, plan).pid == other.pid
        stats = cluster.stats(timeout=0.5)
        assert {name for name, each in stats.hosts.items() if each is None} == {stalled.host}
        version = cluster.load_weights(6, timeout=2.0)
    finally:
        if psutil.pid_exists(stalled.pid):
            os.kill(stalled.pid, signal.SIGCONT)
    after = cluster.search(0, plan)
    assert after.pid != stalled.pid
    assert (after.host, after.version, after.values) == (stalled.host, version, expected(0, 6))


def test_a_full_actor_refuses_with_its_limit(address: str, tmp_path: Path) -> None:
    with RayCluster(setup(2), threads=1, max_waiting=2, timeout=HANG_SECONDS) as small:
        futures = [small.submit(0, waiting, tmp_path / "begun", tmp_path / "go on")]
        until_there(tmp_path / "begun")
        futures += [small.submit(0, plan) for _ in range(2)]
        until(lambda: small.stats(timeout=HANG_SECONDS).total.waiting == 2)
        with pytest.raises(QueueFullError, match="max_waiting") as caught:
            small.search(0, plan)
        assert (caught.value.host, caught.value.limit) == ("host-0", 2)
        (tmp_path / "go on").touch()
        assert all(future.result(HANG_SECONDS).values == expected(0) for future in futures)
        small.search(1, plan)
        with pytest.raises(NoHostError):
            small.search(2, plan)


def test_a_search_that_is_cancelled_before_it_begins_is_not_run(cluster: RayCluster, tmp_path: Path) -> None:
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


# Handles -------------------------------------------------------------------------------------------------------------


PLAIN_PROCESS = f"""
import sys
import ray
from concurrent_kv.ray import RayCluster
from tests.cluster_support import plan
ray.init(address=sys.argv[1], logging_level="ERROR", log_to_driver=False)
from concurrent_kv.cluster import HostLostError
handle = RayCluster.connect({NAME!r})
found = handle.search(2, plan)
ray.shutdown()
try:
    handle.search(2, plan)
except HostLostError as error:
    assert "was shut down" in str(error)
else:
    raise AssertionError
assert not ray.is_initialized()
print(found.pid, *found.values)
"""


def test_a_handle_works_in_a_task_an_actor_and_a_plain_process(cluster: RayCluster, address: str) -> None:
    here = {env: cluster.search(env, plan) for env in range(3)}
    task = ray.remote(num_cpus=0)(search_in_a_task).remote(cluster, 0)
    player = ray.remote(num_cpus=0)(Player).remote(cluster, 1)
    assert ray.get(task, timeout=HANG_SECONDS).pid == here[0].pid
    in_actor = ray.get(player.search.remote(), timeout=HANG_SECONDS)
    assert (in_actor.pid, in_actor.root_was_there) == (here[1].pid, True)
    done = subprocess.run(
        [sys.executable, "-c", PLAIN_PROCESS, address], capture_output=True, text=True, timeout=HANG_SECONDS, check=True
    )
    assert [int(word) for word in done.stdout.split()] == [here[2].pid, *here[2].values]
    with pytest.raises(InvalidArgumentError, match="name must be that of a RayCluster"):
        RayCluster.connect("another")


def test_a_handle_looks_again_for_what_another_has_moved(cluster: RayCluster) -> None:
    other: RayCluster = pickle.loads(pickle.dumps(cluster))
    before = other.search(0, plan)
    target = next(host for host in cluster.stats(timeout=HANG_SECONDS).hosts if host != before.host)
    cluster.move(0, target)
    after = other.search(0, plan)
    assert (after.host, after.root_was_there, after.values) == (target, True, before.values)


# Machines ------------------------------------------------------------------------------------------------------------


def test_environments_of_a_machine_that_is_removed_go_on_at_another(machines: Any) -> None:
    def machine() -> Any:
        return machines.add_node(num_cpus=0, resources={"device": 2}, object_store_memory=80 * 2**20)

    gone = machine()
    options = {"num_cpus": 0, "resources": {"device": 1}}
    with RayCluster(setup(4), actors=2, actor_options=options, timeout=HANG_SECONDS) as there:
        version = there.load_weights(5)
        before = {env: there.search(env, plan) for env in range(4)}
        machines.remove_node(gone)
        machine()
        after = {env: there.search(env, plan) for env in range(4)}
        for env, found in after.items():
            assert (found.host, found.version, found.values) == (before[env].host, version, before[env].values)
            assert not found.root_was_there
        assert {found.pid for found in after.values()}.isdisjoint(found.pid for found in before.values())
        there.check_integrity()


# Many ----------------------------------------------------------------------------------------------------------------


def test_200_environments_on_4_actors_and_the_memory_of_their_processes(cluster: RayCluster) -> None:
    added = [cluster.add_host(), cluster.add_host()]
    play_all(cluster, rounds=1)
    pids = {found.pid for found in play_all(cluster, rounds=1)}
    assert len(pids) == 4
    assert (
        sorted(stats.environments for stats in cluster.stats(timeout=HANG_SECONDS).hosts.values() if stats) == [50] * 4
    )
    before = resident(pids)
    found = play_all(cluster, rounds=3)
    assert all(each.root_was_there for each in found)
    assert {each.pid for each in found} == pids
    grown = resident(pids) - before
    assert grown < 40 * 2**20, f"the processes of the actors have grown by {grown} bytes"
    for env in range(60, 200):
        cluster.forget(env)
    with ThreadPoolExecutor(2) as threads:  # who drains goes on while others search
        removing = [threads.submit(cluster.remove_host, host) for host in added]
        play_all(cluster, rounds=1, envs=60)
        for each in removing:
            each.result(HANG_SECONDS)
    assert set(cluster.environments().values()) == set(cluster.stats(timeout=HANG_SECONDS).hosts)
    assert len(cluster.environments()) == 60


def play_all(cluster: RayCluster, *, rounds: int, envs: int = 200) -> list[Found]:
    found: list[Found] = []
    for _ in range(rounds):
        futures = [cluster.submit(env, plan) for env in range(envs)]
        results = [future.result(HANG_SECONDS) for future in futures]
        assert [each.values for each in results] == [expected(env, results[0].weights) for env in range(envs)]
        found += results
    return found


def resident(pids: set[int]) -> int:
    return sum(psutil.Process(pid).memory_info().rss for pid in pids)


if __name__ == "__main__":  # python -m tests.test_ray_cluster MINUTES: memory over a longer time
    ray.init(num_cpus=8, object_store_memory=100 * 2**20, include_dashboard=False, logging_level="ERROR")
    with RayCluster(setup(ENVS), actors=4, timeout=HANG_SECONDS) as long:
        processes, ends = {found.pid for found in play_all(long, rounds=2)}, time.monotonic() + 60 * float(sys.argv[1])
        while time.monotonic() < ends:
            until_next, searches = time.monotonic() + 15, 0
            while time.monotonic() < until_next:
                searches += len(play_all(long, rounds=1))
                long.load_weights(searches)
            print(
                f"{searches} searches, actors {resident(processes) / 2**20:.1f} MiB, "
                f"this process {resident({os.getpid()}) / 2**20:.1f} MiB",
                flush=True,
            )
    ray.shutdown()
