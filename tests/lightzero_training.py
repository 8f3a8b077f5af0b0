"""LightZero's own CartPole training with UniZero, shortened to seconds on a CPU: its configuration, its entry point.

    python -m tests.lightzero_training off|validate|on OUTPUT_FOLDER [--reanalyze]

Prints one line of JSON at the end: what the cache did, and in `validate` what was compared.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import torch

from concurrent_kv.compat.lightzero import attachment_of, install

COLLECTORS, EVALUATORS = 2, 1


def configuration(folder: str, mode: str, reanalyze_ratio: float) -> tuple[Any, Any]:
    """LightZero's configuration of the environment, with less of everything, and the two keys that choose the cache."""
    from zoo.classic_control.cartpole.config.cartpole_unizero_config import (
        create_config,
        main_config,
    )

    main_config.exp_name = folder
    main_config.env.update(collector_env_num=COLLECTORS, evaluator_env_num=EVALUATORS, n_evaluator_episode=EVALUATORS)
    main_config.policy.update(
        cuda=False,
        batch_size=16,
        update_per_collect=4,
        collector_env_num=COLLECTORS,
        evaluator_env_num=EVALUATORS,
        n_episode=COLLECTORS,
        reanalyze_ratio=reanalyze_ratio,
    )
    main_config.policy.model.world_model_cfg.update(
        device="cpu",
        env_num=max(COLLECTORS, EVALUATORS),
        collector_env_num=COLLECTORS,
        evaluator_env_num=EVALUATORS,
        use_new_cache_manager=mode != "off",
        cache_validation_mode=mode == "validate",
    )
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("mode", choices=["off", "validate", "on"])
    parser.add_argument("folder")
    parser.add_argument("--reanalyze", action="store_true")
    options = parser.parse_args()

    torch.set_num_threads(1)
    install()
    from lzero.entry import train_unizero

    main_config, create_config = configuration(options.folder, options.mode, 0.25 if options.reanalyze else 0.0)
    policy = train_unizero([main_config, create_config], seed=0, max_train_iter=8, max_env_step=200)
    models = {"model": policy._collect_model.world_model, "target": policy._target_model.world_model}
    result = {"mode": options.mode} | {name: account(model) for name, model in models.items()}
    print(json.dumps(result))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
