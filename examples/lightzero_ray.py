"""LightZero 0.2.0 trains UniZero on CartPole: its collectors in Ray actors, each on this cache; weights are broadcast.

    make train-lightzero-ray ARGS="--collectors 2 --rounds 20"

An actor has LightZero's policy, whose world model is attached, its collector, and environments. To the cluster a whole
collection is one search: the cluster finds the actor, makes one that is lost again with the newest weights, and runs a
collection again that new weights came upon. LightZero's learner is in an actor of its own.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any, NamedTuple

import ray
from ding.config import compile_config
from ding.envs import create_env_manager, get_vec_env_setting
from ding.policy import create_policy
from ding.utils import set_pkg_seed
from ding.worker import BaseLearner
from lzero.entry.utils import calculate_update_per_collect
from lzero.mcts import UniZeroGameBuffer
from lzero.policy import visit_count_temperature
from lzero.worker import MuZeroCollector
from zoo.classic_control.cartpole.config.cartpole_unizero_config import create_config, main_config

from concurrent_kv import SearchEndedError
from concurrent_kv.cluster import Cluster, HostParts, SearchContext
from concurrent_kv.compat.lightzero import attachment_of, install
from concurrent_kv.ray import RayCluster

SECONDS = 600.0  # that a collection, or training on what a round collected, may take


@dataclass(frozen=True)
class Settings:
    """What is not as in LightZero's configuration of CartPole.

    Attributes:
        folder: of logs and checkpoints.
        environments: of each collector; a collection is an episode of each.
        batch_size: of an update, in transitions.
        validate: whether actors run LightZero's own cache beside this one, and compare.
        seed: of the learner. Each collector draws its own from the system.
    """

    folder: str
    environments: int = 8
    batch_size: int = 64
    validate: bool = False
    seed: int = 0


def configuration(settings: Settings, *, attached: bool) -> Any:
    """LightZero's own, compiled. Once `install()` was called, a world model that it makes may be attached."""
    main, create = deepcopy(main_config), deepcopy(create_config)
    number, on_cpu = settings.environments, {"cuda": False, "device": "cpu"}
    main.env.update(collector_env_num=number)
    main.policy.update(collector_env_num=number, n_episode=number, batch_size=settings.batch_size, **on_cpu)
    main.policy.model.world_model_cfg.update(
        device="cpu",
        env_num=max(number, main.env.evaluator_env_num),
        collector_env_num=number,
        use_new_cache_manager=attached,
        cache_validation_mode=attached and settings.validate,
    )
    create.env_manager.type = "base"
    return compile_config(main, seed=settings.seed, auto=True, create_cfg=create, save_cfg=False)


# In the actor of a collector ------------------------------------------------------------------------------------------


class Collector:
    """LightZero's collector, with its policy and environments."""

    def __init__(self, settings: Settings) -> None:
        install()  # before the policy is made
        self.config = configuration(settings, attached=True)
        self.policy = create_policy(self.config.policy, enable_field=["learn", "collect"])
        self.attachment: Any = attachment_of(self.policy._collect_model.world_model)
        make, configs, _ = get_vec_env_setting(self.config.env)
        self._acting = self.policy.collect_mode._replace(forward=self._act)
        self._version = 0  # of the manager, as the collection began
        self.collector = MuZeroCollector(
            env=create_env_manager(self.config.env.manager, [partial(make, cfg=each) for each in configs]),
            policy=self._acting,
            exp_name=os.path.join(os.path.relpath(settings.folder), f"collector-{os.getpid()}"),
            policy_config=self.config.policy,
        )

    def load(self, weights: Any) -> None:
        """Take new weights in, as LightZero does after training. No collection is under way."""
        self.policy.collect_mode.load_state_dict(weights)
        self.policy.recompute_pos_emb_diff_and_clear_cache()

    def collect(self, train_iter: int) -> Any:
        """An episode of each environment, as LightZero's replay buffer takes them."""
        self._version = self.attachment.manager.version
        # A collection that was ended has left episodes half played, and others in the collector.
        self.collector.reset_env()
        self.collector.reset(self._acting)
        policy = self.config.policy
        temperature = visit_count_temperature(
            policy.manual_temperature_decay,
            policy.fixed_temperature_value,
            policy.threshold_training_steps_for_final_temperature,
            trained_steps=train_iter,
        )
        return self.collector.collect(train_iter=train_iter, policy_kwargs={"temperature": temperature, "epsilon": 0.0})

    def _act(self, *args: Any, **kwargs: Any) -> Any:
        # New weights that come between two moves end no search, and would wait for the end of the collection.
        if self.attachment.manager.version != self._version:
            raise SearchEndedError("new weights came between two moves of the collection")
        return self.policy.collect_mode.forward(*args, **kwargs)


def setup(settings: Settings) -> HostParts:
    """What an actor has."""
    collector = Collector(settings)
    return HostParts(collector.attachment.manager, model=collector, load=collector.load)


class Collected(NamedTuple):
    """What a collection returns: all of it is of one version of the weights."""

    version: int
    host: str
    episodes: int
    steps: int
    data: Any  # segments, and what the replay buffer has to know of each


def collect(context: SearchContext, train_iter: int) -> Collected:
    """A collection, as the cluster's planner."""
    collector: Collector = context.model
    data = collector.collect(train_iter)
    episodes, steps = collector.config.policy.n_episode, collector.collector.envstep
    return Collected(context.version, context.host, episodes, steps, data)


def compared(context: SearchContext) -> tuple[int, int]:
    """With `validate`: contexts that were compared, and differences that no known defect of LightZero's explains."""
    report = context.model.attachment.report
    return report.contexts, report.unexplained


# In the actor of the learner ------------------------------------------------------------------------------------------


class Trained(NamedTuple):
    """Where training is."""

    train_iter: int  # updates, since the beginning
    loss: float  # of the last update; not a number where there was none


class Learner:
    """LightZero's learner, and its replay buffer."""

    def __init__(self, settings: Settings) -> None:
        self.config = configuration(settings, attached=False)
        set_pkg_seed(settings.seed, use_cuda=False)
        self.policy = create_policy(self.config.policy, enable_field=["learn", "collect"])
        self.buffer = UniZeroGameBuffer(self.config.policy)
        self.learner = BaseLearner(
            self.config.policy.learn.learner, self.policy.learn_mode, exp_name=os.path.relpath(settings.folder)
        )
        self.steps = 0

    def weights(self) -> Any:
        """Those that collectors load."""
        return self.policy.collect_mode.state_dict()

    def train(self, collected: Sequence[Collected]) -> Trained:
        """So many updates as LightZero makes after such a collection."""
        updates, loss = 0, float("nan")
        for each in collected:
            self.steps += each.steps
            self.buffer.push_game_segments(each.data)
            updates += calculate_update_per_collect(self.config, each.data)
        self.buffer.remove_oldest_data_to_fit()
        batch_size = self.config.policy.batch_size
        for _ in range(updates if self.buffer.get_num_of_transitions() > batch_size else 0):
            batch = self.buffer.sample(batch_size, self.policy)
            batch.append(self.learner.train_iter)
            loss = self.learner.train(batch, self.steps)[0]["weighted_total_loss"]
        self.policy.recompute_pos_emb_diff_and_clear_cache()
        return Trained(self.learner.train_iter, loss)

    def save(self) -> None:
        """Write a checkpoint, as LightZero does at the end."""
        self.learner.save_checkpoint()


# In the process that asks ---------------------------------------------------------------------------------------------


def train(cluster: Cluster, learner: Any, *, collectors: int, rounds: int) -> None:
    """Broadcast, collect, train: so many times."""
    train_iter = 0
    for _ in range(rounds):
        version = cluster.load_weights(learner.weights.remote())
        began = perf_counter()
        futures = [cluster.submit(number, collect, train_iter) for number in range(collectors)]
        collected = [future.result() for future in futures]
        seconds = perf_counter() - began
        train_iter, loss = ray.get(learner.train.remote(collected), timeout=SECONDS)
        steps = sum(each.steps for each in collected)
        mean_return = steps / sum(each.episodes for each in collected)  # a step's reward is 1
        print(
            f"weights {version}: {steps} steps, {steps / seconds:.0f} a second, mean return {mean_return:.1f}; "
            f"update {train_iter}, loss {loss:.3f}",
            flush=True,
        )


def start_ray(actors: int) -> None:
    """A Ray on this machine alone, which reports to nobody."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(
        "local",
        num_cpus=actors,
        object_store_memory=100 * 2**20,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
    )


def cluster_of(settings: Settings, collectors: int) -> RayCluster:
    """So many actors that collect."""
    # One thread each: LightZero's collector and its model's search are one thread's.
    return RayCluster(partial(setup, settings), actors=collectors, threads=1, timeout=SECONDS, start_timeout=SECONDS)


def run(settings: Settings, *, collectors: int, rounds: int) -> None:
    """Train, and say what the caches did."""
    start_ray(collectors + 1)
    try:
        learner = ray.remote(num_cpus=1)(Learner).remote(settings)
        with cluster_of(settings, collectors) as cluster:
            train(cluster, learner, collectors=collectors, rounds=rounds)
            ray.get(learner.save.remote(), timeout=SECONDS)
            stats = cluster.stats()
            cache, reruns, made_again = stats.total.cache, stats.total.reruns, sum(stats.made_again.values())
            print(f"found in the caches: {cache.hit_count} of {cache.hit_count + cache.miss_count} contexts asked for")
            print(f"run again: {reruns} collections; made again: {made_again} actors")
            if settings.validate:
                reports = [cluster.search(number, compared) for number in range(collectors)]
                contexts, unexplained = (sum(counts) for counts in zip(*reports, strict=True))
                print(
                    f"compared with LightZero's own cache: {contexts} contexts, {unexplained} unexplained differences"
                )
    finally:
        ray.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--collectors", type=int, default=2, help="actors that collect")
    parser.add_argument("--rounds", type=int, default=5, help="of collecting and training")
    parser.add_argument("--environments", type=int, default=Settings.environments, help="of each collector")
    parser.add_argument("--batch-size", type=int, default=Settings.batch_size, help="transitions of an update")
    parser.add_argument("--validate", action="store_true", help="run LightZero's own cache too, and compare")
    parser.add_argument("--folder", help="for logs and a checkpoint; a temporary one if left out")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        settings = Settings(
            os.path.abspath(options.folder or temporary), options.environments, options.batch_size, options.validate
        )
        run(settings, collectors=options.collectors, rounds=options.rounds)


if __name__ == "__main__":
    main()
