"""All methods on the same puzzles, several at a time: each in a thread, and the threads share the model's calls."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, NamedTuple

import torch

from concurrent_kv import IntegrityReport
from concurrent_kv.compat.transformers import TextNode, TextTree, TextTrees
from concurrent_kv.evaluation import EvaluatorStats
from examples.text_tree.model import CHARACTERS, PAD, STEP_END
from examples.text_tree.puzzle import LONGEST_STEP, LONGEST_TEXT, Puzzle
from examples.text_tree.search import METHODS, Attempt

TOLERANCE = 1e-3  # between log-probabilities of a token row by row and in batches of other sizes
PLANNED = ("beam",)  # methods that do something else with fewer nodes, rather than the same for less long


@dataclass(frozen=True)
class Settings:
    """What is compared."""

    puzzles: Sequence[Puzzle]
    nodes: int = 64
    methods: Sequence[str] = tuple(METHODS)
    threads: int = 16
    seed: int = 0
    verify: bool = False

    @property
    def budgets(self) -> list[int]:
        """Nodes that may be spent on a puzzle, the fewest first."""
        return [self.nodes // part for part in (8, 4, 2, 1) if self.nodes >= part]

    def searched_with(self, method: str, budget: int) -> int:
        """The nodes of the search that says what a method does with so many."""
        return budget if method in PLANNED else self.nodes

    @property
    def searches(self) -> list[tuple[str, int]]:
        """Methods and their nodes, of all searches that a puzzle gets."""
        every = [
            (method, self.searched_with(method, budget)) for method in self.methods for budget in reversed(self.budgets)
        ]
        return [*dict.fromkeys(every)]


class Result(NamedTuple):
    """What became of one search.

    Attributes:
        nodes: that might be spent.
        spent: those that were.
        solved_at: how many had been spent when there was a solution; None if there was none.
        stored, named: tokens that the tree had in the cache; those of its texts, each text counted by itself.
        verified, difference: nodes whose log-probability was computed from scratch, and the largest difference.
    """

    method: str
    nodes: int
    spent: int
    solved_at: int | None
    stored: int
    named: int
    verified: int = 0
    difference: float = 0.0


@dataclass
class Contest:
    """What is known so far: the thread that runs it adds, the one that shows it reads."""

    settings: Settings
    trees: TextTrees
    results: list[Result] = field(default_factory=list)
    seconds: float = 0.0
    integrity: IntegrityReport | None = None

    def of(self, method: str, budget: int) -> list[Result]:
        """Results that say what a method does with so many nodes."""
        nodes = self.settings.searched_with(method, budget)
        return [each for each in self.results.copy() if (each.method, each.nodes) == (method, nodes)]

    def solved(self, method: str, budget: int) -> tuple[int, int]:
        """How many puzzles were solved with so many nodes, and of how many."""
        results = self.of(method, budget)
        return sum(each.solved_at is not None and each.solved_at <= budget for each in results), len(results)

    def stats(self) -> EvaluatorStats:
        """What the calls of the model cost."""
        return self.trees.stats()

    def run(self, model: Any) -> None:
        """Search all puzzles with all methods."""
        torch.manual_seed(self.settings.seed)
        began = perf_counter()
        with ThreadPoolExecutor(self.settings.threads) as threads:
            jobs = [
                threads.submit(self._search, model, puzzle, method, nodes)
                for puzzle in self.settings.puzzles
                for method, nodes in self.settings.searches
            ]
            try:
                for job in as_completed(jobs):
                    self.results.append(job.result())
                    self.seconds = perf_counter() - began
            finally:  # after an error, or Ctrl-C, those that did not begin are left out
                threads.shutdown(wait=False, cancel_futures=True)
        self.integrity = self.trees.manager.check_integrity()

    def _search(self, model: Any, puzzle: Puzzle, method: str, nodes: int) -> Result:
        with self.trees.tree(puzzle.prompt) as tree:
            attempt = Attempt(tree, puzzle, nodes)
            METHODS[method](attempt)
            named = sum(len(node.all_ids) for node in tree.nodes)
            result = Result(method, nodes, attempt.spent, attempt.solved_at, tree.tokens_stored, named)
            if self.settings.verify:
                verified, difference = verify(model, tree)
                result = result._replace(verified=verified, difference=difference)
            return result


def new_trees(model: Any, settings: Settings) -> TextTrees:
    """Room for a tree in each thread; a node is a line."""
    return TextTrees(
        model,
        max_tokens=LONGEST_TEXT,
        nodes=settings.nodes,
        tokens=LONGEST_TEXT + settings.nodes * LONGEST_STEP,
        trees=settings.threads,
        tokenizer=CHARACTERS,
        generation={"max_new_tokens": LONGEST_STEP, "do_sample": True, "top_k": 0, "pad_token_id": PAD},
        node_ends=[STEP_END],
        max_rows=2 * settings.threads,
    )


@torch.inference_mode()
def verify(model: Any, tree: TextTree) -> tuple[int, float]:
    """Compute the log-probability of all nodes without any cache: how many there are, and the largest difference."""
    ends = [node for node in tree.nodes if not node.children and node.parent is not None]
    if not ends:
        return 0, 0.0
    texts = [node.all_ids for node in ends]
    longest = max(map(len, texts))
    ids = torch.tensor([text + [PAD] * (longest - len(text)) for text in texts])
    logprobs = model(input_ids=ids, use_cache=False).logits[:, :-1].double().log_softmax(-1)
    of_tokens = logprobs.gather(2, ids[:, 1:, None])[..., 0]
    differences = dict[TextNode, float]()
    for row, node in zip(of_tokens.tolist(), ends, strict=True):
        at = len(tree.root.ids) - 1
        for each in node.path[1:]:
            own = sum(row[at : at + len(each.ids)])
            at += len(each.ids)
            differences[each] = max(differences.get(each, 0.0), abs(own - each.logprob))
    return len(differences), max(differences.values())
