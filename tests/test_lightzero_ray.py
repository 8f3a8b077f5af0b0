"""LightZero 0.2.0's CartPole with its collectors in Ray actors, as `examples/lightzero_ray.py` has it."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest

pytest.importorskip("ray", reason="needs Ray beside LightZero: make lightzero-ray")
pytest.importorskip("lzero", reason="needs LightZero 0.2.0: make lightzero-ray")

import ray
import torch

from concurrent_kv.ray import RayCluster
from examples.lightzero_ray import Collected, Learner, Settings, cluster_of, collect, start_ray
from tests.cluster_support import until_there
from tests.lightzero_ray_support import die, disturbed, lookups_of, wait_for, weights_of
from tests.test_cluster import until

COLLECTORS, ENVIRONMENTS = 2, 3
SECONDS = 600.0  # LightZero's import alone may take a minute on a loaded machine
ROOT = Path(__file__).resolve().parent.parent


class Training(NamedTuple):
    cluster: RayCluster
    learner: Any

    def broadcast(self) -> int:
        return self.cluster.load_weights(self.learner.weights.remote())

    def collect(self, train_iter: int = 0) -> list[Collected]:
        futures = [self.cluster.submit(number, collect, train_iter) for number in range(COLLECTORS)]
        return [future.result(SECONDS) for future in futures]

    def train(self, collected: list[Collected]) -> Any:
        return ray.get(self.learner.train.remote(collected), timeout=SECONDS)

    def weights(self) -> Any:
        return ray.get(self.learner.weights.remote(), timeout=SECONDS)["model"]

    def assert_everywhere(self, version: int) -> None:
        """Each actor has this version, and the learner's weights."""
        expected = self.weights()
        for number in range(COLLECTORS):
            found, weights = self.cluster.search(number, weights_of)
            assert found == version
            assert weights.keys() == expected.keys()
            assert all(torch.equal(weights[name], expected[name]) for name in expected)
        assert {each.version for each in self.cluster.stats(timeout=SECONDS).hosts.values() if each} == {version}


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Training]:
    settings = Settings(str(tmp_path_factory.mktemp("lightzero")), ENVIRONMENTS, batch_size=16)
    start_ray(COLLECTORS + 1)
    try:
        learner = ray.remote(Learner).remote(settings)
        with cluster_of(settings, COLLECTORS) as cluster:
            yield Training(cluster, learner)
            cluster.check_integrity()
    finally:
        ray.shutdown()


def assert_whole(collected: Collected, version: int) -> None:
    """A collection of one version, of new episodes alone."""
    segments, metas = collected.data
    assert collected.version == version
    assert len(segments) == len(metas) >= ENVIRONMENTS
    assert sum(segment.timestep_segment[0] == 0 for segment in segments) == ENVIRONMENTS
    assert sum(min(len(segment), segment.game_segment_length) for segment in segments) == collected.steps


def test_rounds_of_collecting_training_and_broadcasting(training: Training) -> None:
    before, train_iter, steps = None, 0, 0
    first = training.cluster.stats(timeout=SECONDS).version
    for number in range(3):
        version = training.broadcast()
        assert version == first + number + 1
        training.assert_everywhere(version)
        asked = [training.cluster.search(number, lookups_of) for number in range(COLLECTORS)]
        collected, more = training.collect(train_iter), training.collect(train_iter)
        assert len({each.host for each in collected}) == COLLECTORS
        for each, (queries, hits) in enumerate(asked):
            assert_whole(collected[each], version)
            assert_whole(more[each], version)
            queries_now, hits_now = training.cluster.search(each, lookups_of)
            assert queries_now - queries == hits_now - hits >= 25 * (collected[each].steps + more[each].steps)
        collected += more
        trained = training.train(collected)
        assert trained.train_iter > train_iter
        assert math.isfinite(trained.loss)
        after = training.weights()
        assert before is None or any(not torch.equal(before[name], after[name]) for name in before)
        before, train_iter = after, trained.train_iter
        steps += sum(each.steps for each in collected)
    assert training.cluster.stats(timeout=SECONDS).total.cache.hit_count >= 25 * steps


@pytest.mark.parametrize("place", ["in a search", "between two moves"])
def test_a_collection_that_new_weights_come_upon_is_run_again_with_them(
    training: Training, tmp_path: Path, place: str
) -> None:
    training.train(training.collect())
    reruns = training.cluster.stats(timeout=SECONDS).total.reruns
    waiting = partial(wait_for, tmp_path / "begun", tmp_path / "go on")
    collecting = training.cluster.submit(0, disturbed, 0, place, waiting, tmp_path / "disturbed")
    until_there(tmp_path / "begun")
    with ThreadPoolExecutor(1) as threads:
        loading = threads.submit(training.broadcast)
        host = training.cluster.environments()[0]
        until(lambda: open_searches_of(training.cluster, host) == 0)  # the load has begun, and has ended them
        (tmp_path / "go on").touch()
        version = loading.result(SECONDS)
    assert_whole(collecting.result(SECONDS), version)
    assert training.cluster.stats(timeout=SECONDS).total.reruns == reruns + 1
    training.assert_everywhere(version)


def open_searches_of(cluster: RayCluster, host: str) -> int:
    stats = cluster.stats(timeout=SECONDS).hosts[host]
    assert stats is not None
    return stats.cache.open_searches


def test_a_collector_that_is_killed_is_made_again_with_the_newest_weights_and_goes_on(
    training: Training, tmp_path: Path
) -> None:
    version = training.broadcast()
    host = training.cluster.environments()[0]
    made_again = training.cluster.stats(timeout=SECONDS).made_again[host]
    other = training.cluster.submit(1, collect, 0)
    collected = training.cluster.search(0, disturbed, 0, "in a search", die, tmp_path / "killed")
    assert (tmp_path / "killed").exists()
    assert collected.host == host
    for each in (collected, other.result(SECONDS)):
        assert_whole(each, version)
    assert training.cluster.stats(timeout=SECONDS).made_again[host] == made_again + 1
    training.assert_everywhere(version)
    training.train([collected])
    later = training.broadcast()
    training.assert_everywhere(later)
    for each in training.collect():
        assert_whole(each, later)


def test_the_example_as_a_person_starts_it_finds_no_difference_from_lightzeros_own_cache(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "examples.lightzero_ray", "--rounds", "2", "--environments", "2", "--validate"]
    done = subprocess.run(
        [*command, "--batch-size", "16", "--folder", str(tmp_path / "kept")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    rounds = re.findall(r"^weights (\d+): (\d+) steps, .* update (\d+), loss (\S+)$", done.stdout, re.MULTILINE)
    assert [int(version) for version, *_ in rounds] == [1, 2]
    steps = sum(int(found) for _, found, *_ in rounds)
    assert 0 < int(rounds[0][2]) < int(rounds[1][2])
    compared = re.search(r"^compared .*: (\d+) contexts, (\d+) unexplained differences$", done.stdout, re.MULTILINE)
    assert compared is not None
    assert int(compared[1]) >= 25 * steps
    assert int(compared[2]) == 0
    assert "run again: 0 collections; made again: 0 actors" in done.stdout
    assert list((tmp_path / "kept" / "ckpt").glob("*.pth.tar"))
