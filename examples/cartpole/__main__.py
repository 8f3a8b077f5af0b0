"""Play CartPole-v1 with a tree search over a world model, all K and V in one cache that the threads share."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from math import inf
from pathlib import Path

import torch
from rich.console import Console

from concurrent_kv.books.eviction.registry import POLICIES
from examples.cartpole.job import COMPARED_STEPS, JobSettings, run_job
from examples.cartpole.model import load_model
from examples.cartpole.play import PlaySettings
from examples.cartpole.report import as_json, closing_table, live_figures

INTERRUPTED = 130  # as a shell reports SIGINT
DEFAULT = "default: %(default)s"


def main(arguments: Sequence[str] | None = None) -> int:
    """Play, show, check. 0 if the cache's books balance, nothing of a search was evicted and no row was wrong."""
    options = _parser().parse_args(arguments)
    console = Console()
    errors = Console(stderr=True)
    torch.set_num_threads(1)  # the parallelism is that of the searches
    settings = JobSettings(
        play=PlaySettings(
            envs=options.envs,
            threads=options.threads,
            simulations=options.simulations,
            episodes=options.episodes,
            seed=options.seed,
            combine=options.combine,
            leaf_batch=options.leaf_batch,
            max_steps=options.max_steps,
            batch_size=options.batch_size,
            batch_wait=options.batch_wait,
        ),
        backend=options.backend,
        policy=options.policy,
        verify=options.verify,
        no_cache=options.no_cache,
        loops_only=options.loops_only,
        compare_modes=options.compare_modes,
    )
    try:
        report = run_job(load_model(), settings, live_figures(console) if options.progress else None)
    except BaseException as error:
        if not _is_interrupt(error):
            raise
        errors.print("interrupted")
        return INTERRUPTED
    console.print(closing_table(report))
    if options.json is not None:
        options.json.write_text(json.dumps(as_json(report), indent=2) + "\n", "utf-8")
    failures = report.failures()
    for failure in failures:
        errors.print(f"FAILED: {failure}", style="bold red", markup=False, highlight=False)
    return 1 if failures else 0


def _is_interrupt(error: BaseException) -> bool:
    """Whether it is Ctrl-C, by itself or as task groups wrap it."""
    if isinstance(error, KeyboardInterrupt):
        return True
    # By attribute: the class is built in only from Python 3.11 on.
    errors = getattr(error, "exceptions", ())
    return bool(errors) and all(_is_interrupt(inner) for inner in errors)


def _parser() -> argparse.ArgumentParser:
    defaults = PlaySettings()
    parser = argparse.ArgumentParser(
        prog="python -m examples.cartpole",
        description=__doc__,
    )
    parser.add_argument(
        "--envs", type=_positive, default=defaults.envs, help=f"environments, each a task of its own ({DEFAULT})"
    )
    parser.add_argument("--threads", type=_positive, default=defaults.threads, help=f"threads that search ({DEFAULT})")
    parser.add_argument(
        "--simulations", type=_positive, default=defaults.simulations, help=f"of each search ({DEFAULT})"
    )
    parser.add_argument(
        "--episodes", type=_positive, default=defaults.episodes, help=f"over all environments ({DEFAULT})"
    )
    parser.add_argument(
        "--seed", type=_not_negative, default=defaults.seed, help=f"of episode 0; the next has the next ({DEFAULT})"
    )
    parser.add_argument("--backend", choices=("asyncio", "trio"), default="asyncio", help=f"event loop ({DEFAULT})")
    parser.add_argument(
        "--policy", choices=sorted(POLICIES), default="fifo", help=f"eviction policy of the pools ({DEFAULT})"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument(
        "--verify", action="store_true", help="recompute every gathered row from its path's tokens, and compare"
    )
    parser.add_argument(
        "--no-cache",
        action="store_true",
        help=f"play an episode for each environment, up to {COMPARED_STEPS} steps, again with every leaf's path "
        "replayed from its root instead of looked up, and compare",
    )
    parser.add_argument(
        "--combine",
        action=argparse.BooleanOptionalAction,
        default=defaults.combine,
        help="whether the leaves of all threads are evaluated in one call of the model",
    )
    parser.add_argument(
        "--leaf-batch",
        type=_positive,
        metavar="N",
        help="leaves that a thread evaluates together, at most (all of its trees if left out); with 1 the actions do "
        "not depend on the number of threads",
    )
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument(
        "--loops-only", action="store_true", help="searches are tasks of the environments' event loop, not threads"
    )
    modes.add_argument(
        "--compare-modes", action="store_true", help="play everything again with searches as tasks, and compare"
    )
    parser.add_argument(
        "--batch-size",
        type=_positive,
        metavar="N",
        help="leaves of searches in tasks evaluated together, at most (of all environments if left out)",
    )
    parser.add_argument(
        "--batch-wait",
        type=_seconds,
        default=defaults.batch_wait,
        metavar="SECONDS",
        help=f"how long a leaf of a search in a task waits for others, at most ({DEFAULT})",
    )
    parser.add_argument("--max-steps", type=_positive, metavar="N", help="end episodes after so many steps")
    parser.add_argument("--progress", action=argparse.BooleanOptionalAction, default=True, help="show what is going on")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {number}")
    return number


def _seconds(text: str) -> float:
    number = float(text)
    if not 0 <= number < inf:
        raise argparse.ArgumentTypeError(f"must be a number of seconds, is {text}")
    return number


def _not_negative(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"must not be negative, is {number}")
    return number


if __name__ == "__main__":
    sys.exit(main())
