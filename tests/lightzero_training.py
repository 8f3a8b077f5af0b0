"""LightZero's own training with UniZero, shortened to seconds on a CPU: its zoo's configurations, its entry point.

    python -m tests.lightzero_training off|validate|on OUTPUT_FOLDER [--of NAME] [--reanalyze] [OPTION ...]

Prints one line of JSON at the end: what the cache did, in `validate` what was compared, and how long it took: as a
whole, on the processor, and of that in simulated steps, in the rest of acting, and in learning.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from functools import wraps
from importlib import import_module
from typing import Any

import torch

from concurrent_kv.compat.lightzero import attachment_of, install

COLLECTORS, EVALUATORS = 2, 1
ZOO = {  # those of LightZero's configurations that need nothing beside what it is installed with
    "cartpole": "zoo.classic_control.cartpole.config.cartpole_unizero_config",
    "pendulum": "zoo.classic_control.pendulum.config.pendulum_cont_disc_unizero_config",
    "pendulum-sampled": "zoo.classic_control.pendulum.config.pendulum_cont_sampled_unizero_config",
}


def configuration(
    name: str, folder: str, mode: str, reanalyze_ratio: float, collectors: int, simulations: int | None
) -> tuple[Any, Any]:
    """One of LightZero's configurations, with less of everything, and the two keys that choose the cache."""
    module = import_module(ZOO[name])
    main_config, create_config = module.main_config, module.create_config
    main_config.exp_name = folder
    main_config.env.update(collector_env_num=collectors, evaluator_env_num=EVALUATORS, n_evaluator_episode=EVALUATORS)
    main_config.policy.update(
        cuda=False,
        batch_size=16,
        update_per_collect=4,
        collector_env_num=collectors,
        evaluator_env_num=EVALUATORS,
        n_episode=collectors,
        reanalyze_ratio=reanalyze_ratio,
    )
    main_config.policy.model.world_model_cfg.update(
        device="cpu",
        env_num=max(collectors, EVALUATORS),
        collector_env_num=collectors,
        evaluator_env_num=EVALUATORS,
        use_new_cache_manager=mode != "off",
        cache_validation_mode=mode == "validate",
    )
    if simulations is not None:
        main_config.policy.num_simulations = simulations
        main_config.policy.model.world_model_cfg.num_simulations = simulations
    create_config.env_manager.type = "base"
    return main_config, create_config


def account(world_model: Any) -> dict[str, Any]:
    """What the cache of a trained model did. Also checks that everything in it adds up."""
    result: dict[str, Any] = {"queries": world_model.total_query_count, "hits": world_model.hit_count}
    attachment = attachment_of(world_model)
    if attachment is None:
        return result
    attachment.session.close()
    result["integrity"] = repr(attachment.manager.check_integrity())
    result["requests"] = attachment.manager.get_stats_summary().total.request_count
    report = attachment.report
    if report is not None:
        result |= {
            "calls": report.calls,
            "contexts": report.contexts,
            "entries": report.entries,
            "defects": report.defects,
            "unexplained": report.unexplained,
            "first_unexplained": str(report.first_unexplained),
        }
    return result


class Spent:
    """Processor seconds of this thread in some methods, but for what is spent in others of them inside."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inside = [0.0]

    def watch(self, owner: type[Any], method: str, part: str) -> None:
        """Count the time of a class's own method to a part."""
        original = vars(owner).get(method)
        if original is None:
            return
        self.seconds.setdefault(part, 0.0)

        @wraps(original)
        def timed(*args: Any, **kwargs: Any) -> Any:
            began, inside = time.thread_time(), len(self._inside)
            self._inside.append(0.0)
            try:
                return original(*args, **kwargs)
            finally:
                took = time.thread_time() - began
                self.seconds[part] += took - self._inside.pop()
                self._inside[inside - 1] += took

        setattr(owner, method, timed)


def watched() -> Spent:
    """Where a run of LightZero's spends its time."""
    from lzero.model.sampled_unizero_model import SampledUniZeroModel
    from lzero.model.unizero_model import UniZeroModel
    from lzero.policy.sampled_unizero import SampledUniZeroPolicy
    from lzero.policy.unizero import UniZeroPolicy

    spent = Spent()
    for model in (UniZeroModel, SampledUniZeroModel):
        spent.watch(model, "recurrent_inference", "simulated steps")
    for policy in (UniZeroPolicy, SampledUniZeroPolicy):
        spent.watch(policy, "_forward_collect", "the rest of acting")
        spent.watch(policy, "_forward_eval", "the rest of acting")
        spent.watch(policy, "_forward_learn", "learning")
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("mode", choices=["off", "validate", "on"])
    parser.add_argument("folder")
    parser.add_argument("--of", choices=list(ZOO), default="cartpole")
    parser.add_argument("--reanalyze", action="store_true")
    parser.add_argument("--steps", type=int, default=200, help="of the environments, at most")
    parser.add_argument("--collectors", type=int, default=COLLECTORS, help="environments to collect from")
    parser.add_argument("--simulations", type=int, help="of a search, instead of the configuration's")
    parser.add_argument("--updates", type=int, default=8, help="of the model, at most")
    options = parser.parse_args()

    torch.set_num_threads(1)
    install()
    from lzero.entry import train_unizero

    ratio = 0.25 if options.reanalyze else 0.0
    numbers = (options.collectors, options.simulations)
    main_config, create_config = configuration(options.of, options.folder, options.mode, ratio, *numbers)
    spent = watched()
    began, began_cpu = time.perf_counter(), time.process_time()
    limits = {"max_train_iter": options.updates, "max_env_step": options.steps}
    policy = train_unizero([main_config, create_config], seed=0, **limits)
    seconds = {
        "whole": time.perf_counter() - began,
        "processor": time.process_time() - began_cpu,
        **spent.seconds,
    }
    models = {"model": policy._collect_model.world_model, "target": policy._target_model.world_model}
    result: dict[str, Any] = {"of": options.of, "mode": options.mode, "seconds": seconds}
    result |= {name: account(model) for name, model in models.items()}
    print(json.dumps(result))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
