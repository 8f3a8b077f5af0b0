"""Solve countdown puzzles with a tiny language model: by sampling alone, by beam and best-first search, and by MCTS."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch

from concurrent_kv.compat.transformers import TextTrees
from examples.text_tree.contest import TOLERANCE, Contest, Settings, new_trees
from examples.text_tree.model import load_model
from examples.text_tree.picture import draw
from examples.text_tree.puzzle import puzzles
from examples.text_tree.report import LiveFigures, closing_figures, closing_table, largest_difference
from examples.text_tree.search import METHODS, Attempt
from reporting.arguments import file_to_write
from reporting.progress import watched
from reporting.tables import console_of, origin

PUZZLES = 100
INTERRUPTED = 130  # as a shell reports SIGINT
DEFAULT = "default: %(default)s"


def main(arguments: Sequence[str] | None = None) -> int:
    """Search, show, check. 0 if no log-probability was wrong."""
    options = _parser().parse_args(arguments)
    console, errors = console_of(), console_of(stderr=True)
    torch.set_num_threads(1)  # the matrices are small
    settings = Settings(
        puzzles=puzzles(options.puzzles, options.seed),
        nodes=options.nodes,
        methods=options.methods,
        threads=options.threads,
        seed=options.seed,
        verify=options.verify,
    )
    model = load_model()
    with new_trees(model, settings) as trees:
        contest = Contest(settings, trees)
        try:
            with watched(LiveFigures(contest), console) if options.progress else nullcontext():
                contest.run(model)
        except KeyboardInterrupt:
            errors.print("interrupted")
            return INTERRUPTED
        console.print(closing_table(contest), closing_figures(contest), origin())
        if options.picture is not None:
            _picture(trees, settings, options.picture)
            console.print(f"the tree of a puzzle: {options.picture}", highlight=False)
    if largest_difference(contest) > TOLERANCE:
        errors.print(f"FAILED: a node's log-probability is off by {largest_difference(contest):.2e}", style="bold red")
        return 1
    return 0


def _picture(trees: TextTrees, settings: Settings, path: Path) -> None:
    """Draw the search of the first puzzle by the last method."""
    puzzle, method = settings.puzzles[0], settings.methods[-1]
    with trees.tree(puzzle.prompt) as tree:
        attempt = Attempt(tree, puzzle, settings.nodes)
        METHODS[method](attempt)
        stored, named = tree.tokens_stored, sum(len(node.all_ids) for node in tree.nodes)
        title = f"{method}: {attempt.spent} nodes spent; {stored} tokens stored of {named} named"
        path.write_text(draw(attempt, title), "utf-8")


def _parser() -> argparse.ArgumentParser:
    defaults = Settings([])
    parser = argparse.ArgumentParser(prog="python -m examples.text_tree", description=__doc__)
    parser.add_argument("--puzzles", type=_positive, default=PUZZLES, help=f"that are searched ({DEFAULT})")
    parser.add_argument(
        "--nodes", type=_positive, default=defaults.nodes, help=f"that may be spent on a puzzle ({DEFAULT})"
    )
    parser.add_argument(
        "--methods", nargs="+", choices=tuple(METHODS), default=defaults.methods, help="which (all if left out)"
    )
    parser.add_argument("--threads", type=_positive, default=defaults.threads, help=f"that search ({DEFAULT})")
    parser.add_argument(
        "--seed",
        type=int,
        default=defaults.seed,
        help=f"of the puzzles and of what is sampled; with --threads 1 the same one gives the same tree ({DEFAULT})",
    )
    parser.add_argument(
        "--verify", action="store_true", help="compute every node's log-probability from scratch, and compare"
    )
    parser.add_argument(
        "--picture", type=file_to_write, metavar="FILE", help="draw a tree of the last method there, as SVG"
    )
    parser.add_argument("--progress", action=argparse.BooleanOptionalAction, default=True, help="show what is going on")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {number}")
    return number


if __name__ == "__main__":
    sys.exit(main())
