"""The example of text trees: its judge, its searches with the weights in the repository, its checks and its picture."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers: make transformers")

from concurrent_kv.compat.transformers import TextTrees
from examples.text_tree.__main__ import main
from examples.text_tree.contest import TOLERANCE, Contest, Settings, new_trees, verify
from examples.text_tree.model import CHARACTERS, load_model
from examples.text_tree.picture import draw
from examples.text_tree.puzzle import (
    LONGEST_STEP,
    LONGEST_TEXT,
    NUMBERS,
    Puzzle,
    after,
    puzzles,
    random_puzzle,
    solution,
    steps_of,
)
from examples.text_tree.search import METHODS, WRONG, Attempt, is_open, unseen

torch.set_num_threads(1)

NODES = 200
EASY = Puzzle((9, 8, 2, 1), 20)  # 9+8, +2, +1 in any order
LEFT = (9, 6, 6, 2)


@pytest.fixture
def trees() -> Iterator[TextTrees]:
    torch.manual_seed(3)
    with new_trees(load_model(), Settings([], nodes=NODES, threads=2)) as made:
        yield made
        assert made.manager.check_integrity().handles == 0


# The judge -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "left"),
    [
        ("9+6=15\n", (15, 6, 2)),
        ("2+9=11\n", (11, 6, 6)),
        ("6/6=1\n", (9, 2, 1)),
        ("6-2=4\n", (9, 6, 4)),
        ("9*6=54\n", (54, 6, 2)),
        ("9+6=16\n", None),  # bad arithmetic
        ("9+9=18\n", None),  # there is one 9
        ("9-7=2\n", None),  # and no 7
        ("6-6=0\n", None),
        ("2-9=-7\n", None),
        ("9/2=4\n", None),
        ("9+6=15", None),  # no line
        ("9+6=15\n\n", None),
        ("09+6=15\n", None),
        ("9+6\n", None),
        ("", None),
    ],
)
def test_a_step_is_right_or_wrong(step: str, left: tuple[int, ...] | None) -> None:
    assert after(LEFT, step) == left


def test_all_steps_that_are_listed_are_right_and_fit_into_a_node() -> None:
    draw_number = random.Random(4)
    for _ in range(200):
        left = tuple(sorted([draw_number.randint(1, 99) for _ in range(3)], reverse=True))
        for step in steps_of(left):
            assert after(left, step) is not None
            assert len(step) <= LONGEST_STEP


def test_a_drawn_puzzle_is_solved_by_its_steps_and_by_trying_all() -> None:
    draw_puzzle = random.Random(5)
    for _ in range(100):
        puzzle, steps = random_puzzle(draw_puzzle)
        found = solution(puzzle)
        assert found is not None
        for solved_by in (steps, found):
            left: tuple[int, ...] | None = puzzle.numbers
            for step in solved_by:
                assert left is not None
                left = after(left, step)
            assert left == (puzzle.target,)
            assert len(solved_by) == NUMBERS - 1
            assert len(puzzle.prompt + "".join(solved_by)) <= LONGEST_TEXT
    assert solution(Puzzle((1, 1, 1, 1), 99)) is None


def test_puzzles_to_search_are_those_that_no_training_sees() -> None:
    drawn = puzzles(30, seed=1)
    assert len({*drawn}) == 30
    assert all(puzzle.is_held_out for puzzle in drawn)
    assert drawn == puzzles(30, seed=1) != puzzles(30, seed=2)


def test_text_and_tokens_are_the_same_thing() -> None:
    ids = CHARACTERS(EASY.prompt)["input_ids"]
    assert CHARACTERS.decode([*ids, 0]) == EASY.prompt
    assert len(ids) == len(EASY.prompt)


# The searches --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_each_method_finds_a_solution(trees: TextTrees, method: str) -> None:
    with trees.tree(EASY.prompt) as tree:
        attempt = Attempt(tree, EASY, NODES)
        METHODS[method](attempt)
        assert attempt.solved is not None
        assert attempt.solved_at is not None
        assert 3 <= attempt.solved_at <= attempt.spent <= NODES
        left: tuple[int, ...] | None = EASY.numbers
        for node in attempt.solved.path[1:]:
            assert left is not None
            left = after(left, node.text)
        assert left == (EASY.target,)


@pytest.mark.parametrize("method", METHODS)
def test_no_method_spends_more_than_it_may(trees: TextTrees, method: str) -> None:
    unsolvable = Puzzle((1, 1, 1, 1), 99)
    for nodes in (1, 7, 20):
        with trees.tree(unsolvable.prompt) as tree:
            attempt = Attempt(tree, unsolvable, nodes)
            METHODS[method](attempt)
            assert attempt.solved is None
            assert len(tree.nodes) - 1 <= attempt.spent <= nodes


def test_what_a_node_has_as_a_child_already_is_released_and_wrong_steps_are_not_gone_on_from(trees: TextTrees) -> None:
    with trees.tree(EASY.prompt) as tree:
        attempt = Attempt(tree, EASY, NODES)
        grown = attempt.grow([tree.root] * 100)
        children = tree.root.children
        assert attempt.spent == tree.root.data.growths == 100 > len(children)
        assert len({child.ids for child in children}) == len(children)
        assert grown == [child for child in children if child.data.left is not None]
        for child in children:
            assert child.data.left == after(EASY.numbers, child.text)
            assert is_open(child) == (child.score > WRONG) == (child.data.left is not None)
        assert math.isclose(unseen(tree.root), 1 - sum(math.exp(child.logprob) for child in children), abs_tol=1e-6)
        stored = len(EASY.prompt) - 1 + sum(len(child.ids) for child in children)
        assert tree.tokens_stored == stored


# The contest ---------------------------------------------------------------------------------------------------------


def test_threads_search_and_every_log_probability_is_what_the_model_says_from_scratch() -> None:
    settings = Settings(puzzles(2, seed=3), nodes=8, threads=3, verify=True)
    model = load_model()
    with new_trees(model, settings) as trees:
        contest = Contest(settings, trees)
        contest.run(model)
        assert len(contest.results) == 2 * len(settings.searches) == 2 * (3 + 4)
        assert all(0 < each.verified <= each.spent for each in contest.results)
        assert max(each.difference for each in contest.results) < TOLERANCE
        for method in METHODS:
            assert [contest.solved(method, budget)[1] for budget in settings.budgets] == [2] * 4
        assert trees.stats().rows_per_call > 1


def test_a_log_probability_that_is_wrong_is_noticed(trees: TextTrees) -> None:
    with trees.tree(EASY.prompt) as tree:
        above = tree.expand(tree.root)[0]
        tree.expand(above, 2)
        assert verify(trees.model, tree)[0] == 3
        above.logprob += 0.01
        assert math.isclose(verify(trees.model, tree)[1], 0.01, abs_tol=1e-4)


def test_the_picture_is_xml_with_a_box_for_each_node(trees: TextTrees) -> None:
    with trees.tree(EASY.prompt) as tree:
        attempt = Attempt(tree, EASY, 30)
        METHODS["best-first"](attempt)
        root = ElementTree.fromstring(draw(attempt, "8 > 7 & more"))
        name = "{http://www.w3.org/2000/svg}"
        boxes = root.findall(f"{name}g")
        assert len(boxes) == len(tree.nodes)
        texts = {text.text for box in boxes for text in box}
        assert EASY.prompt.strip() in texts
        child = tree.root.children[0]
        assert any(text is not None and f"{len(child.ids)} own, {len(EASY.prompt)} shared" in text for text in texts)


def test_the_whole_program_searches_verifies_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "tree.svg"
    sizes, methods = ["--puzzles", "2", "--nodes", "8", "--threads", "2"], ["--methods", "sampling", "mcts"]
    assert main([*sizes, *methods, "--no-progress", "--verify", "--picture", str(picture)]) == 0
    ElementTree.fromstring(picture.read_text("utf-8"))
    said = capsys.readouterr().out
    for words in ("sampling alone", "mcts", "rows a call", "nodes verified"):
        assert words in said
