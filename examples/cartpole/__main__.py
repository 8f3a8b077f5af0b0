"""Play CartPole-v1 with a tree search over a world model, all K and V in one cache that the threads share."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path

import torch
from rich.console import Console

from concurrent_kv.books.eviction.registry import POLICIES
from examples.cartpole.job import JobSettings, Watch, run_job, usual_groups
from examples.cartpole.model import load_model
from examples.cartpole.play import PlaySettings
from examples.cartpole.report import as_json, closing_table, cluster_json, cluster_table, live_figures, live_hosts
from reporting.arguments import file_to_write, port
from reporting.tables import console_of, origin

NO_CACHE_STEPS = 25
CHECKPOINT_STEPS = 10
SCALING_STEPS, TURNS = 20, 5
ACTORS = 2
INTERRUPTED = 130  # as a shell reports SIGINT
DEFAULT = "default: %(default)s"


def main(arguments: Sequence[str] | None = None) -> int:
    """Play, show, check. 0 if the cache's books balance, nothing of a search was evicted and no row was wrong."""
    options = _parser().parse_args(arguments)
    console = console_of()
    errors = console_of(stderr=True)
    torch.set_num_threads(1)  # the parallelism is that of the searches
    threads = 0 if options.loops_only else options.threads
    groups = options.groups or min(usual_groups(threads), options.envs)
    if groups > max(1, threads) or groups > options.envs:
        errors.print(f"--groups {groups}: there are {threads} threads and {options.envs} environments to share out")
        return 2
    settings = JobSettings(
        play=PlaySettings(
            envs=options.envs,
            threads=threads,
            workers_per_tree=options.workers_per_tree,
            simulations=options.simulations,
            episodes=options.episodes,
            seed=options.seed,
            groups=groups,
            max_rows=options.max_rows,
            max_steps=options.max_steps,
        ),
        backend=options.backend,
        policy=options.policy,
        verify=options.verify,
        steps_without_cache=options.no_cache_steps,
    )
    if options.ray:
        return _play_on_ray(settings, options, console, errors)
    for name, given in (("--checkpoint", options.checkpoint), ("--actors", options.actors)):
        if given is not None:
            errors.print(f"{name} goes with --ray")
            return 2
    if options.plot is not None and not options.scaling:
        errors.print("--plot goes with --scaling")
        return 2
    watch = live_figures(console) if options.progress else None
    with ExitStack() as stack:
        if options.metrics is not None:
            from examples.cartpole.serving import serving  # what serves is not needed to play

            try:
                url, watch = stack.enter_context(serving(options.metrics, watch))
            except OSError as error:
                errors.print(f"--metrics {options.metrics}: {error}", markup=False)
                return 2
            console.print(f"metrics: {url}", highlight=False)
        if options.scaling:
            return _scale(settings, options, console, watch)
        return _play(settings, options, console, watch)


def _play(settings: JobSettings, options: argparse.Namespace, console: Console, watch: Watch | None) -> int:
    errors = console_of(stderr=True)
    try:
        report = run_job(load_model(), settings, watch)
    except BaseException as error:
        if not _is_interrupt(error):
            raise
        errors.print("interrupted")
        return INTERRUPTED
    console.print(closing_table(report), origin())
    if options.json is not None:
        options.json.write_text(json.dumps(as_json(report), indent=2) + "\n", "utf-8")
    return _say(report.failures(), errors)


def _say(failures: list[str], errors: Console) -> int:
    for failure in failures:
        errors.print(f"FAILED: {failure}", style="bold red", markup=False, highlight=False)
    return 1 if failures else 0


def _play_on_ray(settings: JobSettings, options: argparse.Namespace, console: Console, errors: Console) -> int:
    if options.workers_per_tree > 1 or options.loops_only or options.scaling:
        errors.print("--ray goes without --workers-per-tree, --loops-only and --scaling")
        return 2
    try:
        from examples.cartpole.on_ray import run_on_ray  # here: without --ray, Ray is not needed
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        errors.print("--ray needs the extra `ray`: make play-ray has it")
        return 2
    watch = live_hosts(console) if options.progress else nullcontext
    try:
        report = run_on_ray(
            settings,
            actors=options.actors or ACTORS,
            watch=watch,
            kept=None if options.checkpoint is None else (options.checkpoint.resolve(), options.checkpoint_steps),
            metrics=options.metrics,
            say=lambda text: console.print(text, highlight=False),
        )
    except KeyboardInterrupt:
        errors.print("interrupted")
        return INTERRUPTED
    console.print(cluster_table(report), origin())
    if options.json is not None:
        options.json.write_text(json.dumps(cluster_json(report), indent=2) + "\n", "utf-8")
    return _say(report.failures(), errors)


def _scale(settings: JobSettings, options: argparse.Namespace, console: Console, watch: Watch | None) -> int:
    # Here: what draws the plot is not needed to play.
    from examples.cartpole.scaling import measure, plot, scaling_table

    steps = options.max_steps or SCALING_STEPS
    result = measure(load_model(), settings, turns=options.turns, steps=steps, watch=watch)
    console.print(scaling_table(result), origin(result.about))
    if options.json is not None:
        options.json.write_text(json.dumps(result.as_json(), indent=2) + "\n", "utf-8")
    if options.plot is not None:
        plot([result.as_json()], options.plot)
    return 0


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
    parser.add_argument("--json", type=file_to_write, metavar="FILE", help="write the figures there")
    parser.add_argument(
        "--verify", action="store_true", help="recompute every gathered row from its path's tokens, and compare"
    )
    parser.add_argument(
        "--no-cache-steps",
        type=_not_negative,
        default=NO_CACHE_STEPS,
        metavar="N",
        help="afterwards, play an episode for each environment, up to so many steps, with every leaf's path replayed "
        f"from its root instead of looked up, and compare ({DEFAULT})",
    )
    parser.add_argument(
        "--workers-per-tree",
        type=_positive,
        default=defaults.workers_per_tree,
        metavar="N",
        help=f"that share the simulations of each tree, with virtual loss ({DEFAULT})",
    )
    parser.add_argument(
        "--groups",
        type=_positive,
        metavar="N",
        help="of threads and environments; the leaves of a group share its calls of the model (if left out: 1 with a "
        "GIL, one for each processor without)",
    )
    parser.add_argument(
        "--max-rows",
        type=_positive,
        metavar="N",
        help="leaves of a call of the model, at most (those of all trees if left out); with 1 the actions do not "
        "depend on the number of threads",
    )
    parser.add_argument(
        "--loops-only", action="store_true", help="no threads: the environments' event loop leads the searches on"
    )
    parser.add_argument(
        "--scaling",
        action="store_true",
        help="instead: 1, 2, 4 and 8 threads, together and each by itself, and the loop alone, in turns; one table "
        f"(of {SCALING_STEPS} steps of each environment, if --max-steps is left out)",
    )
    parser.add_argument(
        "--ray",
        action="store_true",
        help="the searches run in Ray actors, with --threads threads each, and the environments in others",
    )
    parser.add_argument("--actors", type=_positive, metavar="N", help=f"that search, with --ray (default: {ACTORS})")
    parser.add_argument(
        "--checkpoint",
        type=Path,
        metavar="FOLDER",
        help="with --ray: write down what is played, and the roots; a job that was killed goes on from there",
    )
    parser.add_argument(
        "--checkpoint-steps",
        type=_positive,
        default=CHECKPOINT_STEPS,
        metavar="N",
        help=f"steps of an environment between two of its checkpoints ({DEFAULT})",
    )
    parser.add_argument("--turns", type=_positive, default=TURNS, metavar="N", help=f"of --scaling ({DEFAULT})")
    parser.add_argument("--plot", type=file_to_write, metavar="FILE", help="draw the scaling there, as SVG or PNG")
    parser.add_argument("--max-steps", type=_positive, metavar="N", help="end episodes after so many steps")
    parser.add_argument(
        "--metrics",
        type=port,
        metavar="PORT",
        help="serve the cache's numbers to Prometheus there, from this machine; 0: any port that is free",
    )
    parser.add_argument("--progress", action=argparse.BooleanOptionalAction, default=True, help="show what is going on")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {number}")
    return number


def _not_negative(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"must not be negative, is {number}")
    return number


if __name__ == "__main__":
    sys.exit(main())
