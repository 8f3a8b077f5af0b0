"""Trees of text: what each node is, what is stored, and what threads and tasks may do with them at once."""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

import anyio
import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers: make transformers")

from transformers import GenerationConfig

from concurrent_kv import (
    CapacityError,
    InvalidArgumentError,
    InvalidTypeError,
    KeyNotFoundError,
    SearchEndedError,
    WaitTimeoutError,
    WindowOverflowError,
)
from concurrent_kv.compat.transformers import TextNode, TextTree, TextTrees, UnsupportedModelError
from tests.support import HANG_SECONDS
from tests.text_support import VOCABULARY, assert_is_what_the_model_says, check_and_close, language_model, words

NEW = 5
SAMPLING = {"max_new_tokens": NEW, "do_sample": True}
PROMPT = words(random.Random(9), 6)
END = 5  # ends a text, where one may end


@pytest.fixture
def make() -> Iterator[Callable[..., TextTrees]]:
    made: list[TextTrees] = []

    def trees(family: str = "llama", *, model: Any = None, **options: Any) -> TextTrees:
        sizes = {"max_tokens": 64, "nodes": 60, "generation": SAMPLING}
        made.append(TextTrees(model or language_model(family), **{**sizes, **options}))
        return made[-1]

    torch.manual_seed(2)
    yield trees
    check_and_close(made)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma4_text", "deepseek_v3", "falcon_h1", "mamba"])
def test_every_node_goes_on_from_its_own_text(make: Callable[..., TextTrees], family: str) -> None:
    trees, draw = make(family, generation={**SAMPLING, "eos_token_id": END}), random.Random(1)
    with trees.tree(PROMPT) as tree:
        for _ in range(5):
            grown = tree.expand(draw.sample(tree.leaves, min(3, len(tree.leaves))), samples=2)
            assert all(1 <= len(node.ids) <= NEW and node.depth == len(node.path) - 1 for node in grown)
            for node in grown:
                assert_is_what_the_model_says(node)
                assert node.has_ended == (node.ids[-1] == END)
        given = tree.add(tree.leaves[0], words(draw, 4))
        for node in tree.expand(given, samples=2):
            assert_is_what_the_model_says(node)


def test_what_texts_share_is_stored_once(make: Callable[..., TextTrees]) -> None:
    with make().tree(PROMPT) as tree:
        for _ in range(3):
            tree.expand(tree.leaves, samples=2)
        assert len(tree.nodes) == 1 + 2 + 4 + 8
        # Of each text all but the last token: a node's are its parent's last one, and its own but for the last.
        assert tree.tokens_stored == len(PROMPT) - 1 + (2 + 4 + 8) * NEW
        assert sum(len(node.all_ids) for node in tree.nodes) > 2 * tree.tokens_stored


@pytest.mark.parametrize("family", ["llama", "falcon_h1"])
def test_a_text_of_one_token_is_given_to_the_model_once(make: Callable[..., TextTrees], family: str) -> None:
    trees = make(family)
    with trees.tree([3]) as tree:
        assert tree.tokens_stored == 0
        grown = tree.expand(tree.root, 2)
        added = tree.add(tree.root, [4, 7])
        for node in [*grown, *tree.expand(added, 2)]:
            assert_is_what_the_model_says(node)
        tree.promote(added, "kept")
        with pytest.raises(InvalidArgumentError, match="more than one token to be promoted"):
            tree.promote(tree.root, "root")
    with trees.promoted_tree("kept") as tree:
        assert tree.root.all_ids == [3, 4, 7]
        for node in tree.expand(tree.root, 2):
            assert_is_what_the_model_says(node)


@pytest.mark.parametrize("family", ["llama", "falcon_h1"])
def test_a_promoted_text_outlives_its_tree_and_the_model_is_given_nothing_for_it(
    make: Callable[..., TextTrees], family: str
) -> None:
    trees = make(family)
    with trees.tree(PROMPT) as tree:
        node = tree.expand(tree.expand(tree.root)[0])[0]
        tree.promote(node, ("best", 1))
        ids = node.all_ids
    calls = trees.stats().calls
    with trees.promoted_tree(("best", 1)) as tree:
        assert (tree.root.all_ids, tree.tokens_stored, trees.stats().calls) == (ids, 0, calls)
        for node in tree.expand(tree.root, 2):
            assert_is_what_the_model_says(node)
    trees.weights_changed()
    with pytest.raises(KeyNotFoundError, match="promoted under"):
        trees.promoted_tree(("best", 1))


def test_a_promoted_text_is_taken_for_no_node_whatever_its_name(make: Callable[..., TextTrees]) -> None:
    with make().tree(PROMPT) as tree:
        one, other = tree.expand(tree.root, 2)
        tree.promote(one, other.key)
        tree.release(other)
        with pytest.raises(KeyNotFoundError):
            tree.expand(other)


@pytest.mark.parametrize("family", ["llama", "mamba", "jamba", "qwen3_5_text"])
def test_a_long_prompt_is_what_it_is_at_once(make: Callable[..., TextTrees], family: str) -> None:
    trees = make(family, prefill_tokens=3)
    with trees.tree(PROMPT * 3) as tree:
        for node in tree.expand(tree.root, 2):
            assert_is_what_the_model_says(node)


def test_a_promoted_tree_has_its_text_whatever_is_promoted_under_the_name(make: Callable[..., TextTrees]) -> None:
    trees = make(trees=2, promoted=1)
    with trees.tree(PROMPT) as tree:
        one, other = tree.expand(tree.root, 2)
        tree.promote(one, "best")
        with trees.promoted_tree("best") as promoted:
            tree.promote(other, "best")
            assert promoted.root.all_ids == one.all_ids
            for node in promoted.expand(promoted.root, 2):
                assert_is_what_the_model_says(node)


def test_a_node_that_was_kept_is_the_root_and_what_was_released_cannot_be_kept(make: Callable[..., TextTrees]) -> None:
    with make().tree(PROMPT) as tree:
        first, second = tree.expand(tree.root, 2)
        below = tree.expand(first)[0]
        tree.keep(first)
        with pytest.raises(InvalidArgumentError, match="below its root"):
            tree.release(first)
        assert (second.released, first.released, below.released) == (True, False, False)
        assert first.path[0].children == []  # who keeps the root keeps no more of what was let go of than its path
        tree.release(below)
        with pytest.raises(KeyNotFoundError, match="was released"):
            tree.keep(below)
        tree.release([])
        assert_is_what_the_model_says(tree.expand(first)[0])


def test_what_is_released_gives_its_room_back_and_the_rest_stays(make: Callable[..., TextTrees]) -> None:
    with make().tree(PROMPT) as tree:
        first, second = tree.expand(tree.root, 2)
        below = tree.expand(first, 2)
        stored = tree.tokens_stored
        tree.release(first)
        assert tree.tokens_stored == stored - 3 * NEW
        assert tree.nodes == [tree.root, second]
        with pytest.raises(KeyNotFoundError):
            tree.expand(below[0])
        with pytest.raises(KeyNotFoundError, match="was released"):
            tree.add(below[0], [1])
        with pytest.raises(InvalidArgumentError, match="below its root"):
            tree.release(tree.root)
        third = tree.expand(second)[0]
        tree.keep(second)
        assert (tree.root, tree.nodes) == (second, [second, third])
        for node in tree.expand(second, 2):
            assert_is_what_the_model_says(node)


@pytest.mark.parametrize("change", ["keep", "release"])
def test_trees_change_at_once_and_each_lets_go_of_its_own(
    make: Callable[..., TextTrees], change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread prunes while the first one, which holds no lock then, lets go of its entries."""
    with make().tree(PROMPT) as tree:
        first, second = tree.expand(tree.root, 2)
        below = tree.expand(first, 2)
        release = tree._search.release

        def overtaken(keys: Any, **options: Any) -> None:
            monkeypatch.undo()
            thread = threading.Thread(target=lambda: tree.keep(second) if change == "keep" else tree.release(first))
            thread.start()
            thread.join(HANG_SECONDS)
            release(keys, **options)

        monkeypatch.setattr(tree._search, "release", overtaken)
        tree.release(below[0] if change == "release" else first)
        assert first.released
        assert all(node.released for node in below)
        assert tree.nodes == ([second] if change == "keep" else [tree.root, second])
        assert len(tree._search) == (1 if change == "keep" else 2)


@pytest.mark.parametrize("change", ["keep", "release"])
def test_what_could_not_be_let_go_of_is_in_the_tree_as_before(
    make: Callable[..., TextTrees], change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*args: Any, **options: Any) -> None:
        raise WaitTimeoutError("too late")

    with make().tree(PROMPT) as tree:
        first, second = tree.expand(tree.root, 2)
        tree.expand(first, 2)
        before = {node.key for node in tree.nodes}
        with monkeypatch.context() as patch:
            patch.setattr(tree._search, "release", refused)
            with pytest.raises(WaitTimeoutError):
                tree.keep(second) if change == "keep" else tree.release(first)
        assert {node.key for node in tree.nodes} == before
        assert tree.root.parent is None
        assert not any(node.released for node in tree.nodes)
        for node in tree.expand([first, second]):
            assert_is_what_the_model_says(node)


def test_a_tree_that_is_full_says_so_and_goes_on(make: Callable[..., TextTrees]) -> None:
    with make(nodes=6).tree(PROMPT) as tree:
        grown = tree.expand(tree.root, 5)  # and the root
        with pytest.raises(CapacityError, match="make TextTrees with at least nodes="):
            tree.expand(tree.root, 2)
        assert len(tree.nodes) == 6
        tree.release(grown[:2])
        assert len(tree.expand(tree.root, 2)) == 2


def test_of_an_expansion_that_fails_in_part_nothing_stays(make: Callable[..., TextTrees]) -> None:
    trees = make(nodes=5, max_rows=1)  # a call for each node
    with trees.tree(PROMPT) as tree:
        for _ in range(3):
            with pytest.raises(CapacityError):
                tree.expand(tree.root, 9)
        assert len(tree.expand(tree.root, 4)) == 4
        assert tree.tokens_stored == len(PROMPT) - 1 + 4 * NEW


def test_room_that_is_wanting_is_named_as_the_arguments_are(make: Callable[..., TextTrees]) -> None:
    trees = make(max_tokens=len(PROMPT) + NEW)
    with trees.tree(PROMPT) as tree:
        with pytest.raises(CapacityError, match="more than trees=1"):
            trees.tree(PROMPT)
        (node,) = tree.expand(tree.root)
        with pytest.raises(WindowOverflowError, match="more than max_tokens=11"):
            tree.expand(node)


def test_nodes_that_cannot_be_expanded_are_named(make: Callable[..., TextTrees]) -> None:
    trees = make(trees=2, generation={**SAMPLING, "eos_token_id": [*range(VOCABULARY)]})
    with trees.tree(PROMPT) as tree, trees.tree(PROMPT) as other:
        (ended,) = tree.expand(tree.root)
        assert (len(ended.ids), ended.has_ended, tree.leaves) == (1, True, [])
        with pytest.raises(InvalidArgumentError, match="have not ended"):
            tree.expand(ended)
        with pytest.raises(InvalidArgumentError, match="of this tree"):
            other.expand(tree.root)
        with pytest.raises(InvalidArgumentError, match="of this tree"):
            other.keep(tree.root)
        with pytest.raises(InvalidArgumentError, match="samples"):
            tree.expand(tree.root, 0)
        with pytest.raises(InvalidArgumentError, match="at least one token"):
            tree.add(tree.root, [])
    for prompt in ([], words(random.Random(1), 60)):
        with pytest.raises(InvalidArgumentError, match="prompt must have at"):
            trees.tree(prompt)
    with pytest.raises(InvalidArgumentError, match="tokenizer must be given"):
        trees.tree("text")
    tree = trees.tree(PROMPT)
    trees.weights_changed()
    with pytest.raises(SearchEndedError):
        tree.expand(tree.root)
    tree.close()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"generation": {"num_beams": 2}}, InvalidArgumentError, "num_beams=1"),
        ({"generation": {"num_return_sequences": 2}}, InvalidArgumentError, "num_return_sequences=1"),
        ({"generation": {"max_length": 20}}, InvalidArgumentError, "max_new_tokens instead of max_length"),
        ({"generation": {"max_new_tokens": 64}}, InvalidArgumentError, "room for a prompt in max_tokens=64"),
        ({"nodes": 0}, InvalidArgumentError, "nodes"),
        ({"max_tokens": 3}, InvalidArgumentError, "room"),
    ],
)
def test_settings_that_cannot_work_are_named(options: dict[str, Any], error: type[Exception], message: str) -> None:
    sizes = {"max_tokens": 64, "nodes": 60, "generation": SAMPLING}
    with pytest.raises(error, match=message):
        TextTrees(language_model("llama"), **{**sizes, **options})
    with pytest.raises(InvalidTypeError, match="model must be a PreTrainedModel"):
        TextTrees(object(), max_tokens=8, nodes=8)
    with pytest.raises(InvalidArgumentError, match="evaluation mode"):
        TextTrees(language_model("llama").train(), max_tokens=8, nodes=8)


def test_a_generation_config_is_taken_as_it_is_and_left_so(make: Callable[..., TextTrees]) -> None:
    given = GenerationConfig(max_new_tokens=3, do_sample=False)
    before = given.to_dict()
    trees = make(generation=given, logprobs=False)
    with trees.tree(PROMPT) as tree:
        one, other = tree.expand(tree.root, 2)
        assert (len(one.ids), one.ids, math.isnan(one.logprob)) == (3, other.ids, True)
    assert given.to_dict() == before


@pytest.mark.parametrize("given", [GenerationConfig(**SAMPLING), SAMPLING])
def test_where_texts_end_is_what_the_model_says_if_nothing_else_is_given(
    make: Callable[..., TextTrees], given: Any
) -> None:
    model = language_model("llama")
    model.generation_config.eos_token_id = [*range(5, 60)]
    trees = make(model=model, generation=given)
    with trees.tree(PROMPT) as tree:
        grown = tree.expand(tree.root, 8)
        assert any(node.has_ended for node in grown)
        for node in grown:
            assert not {*node.ids[:-1]} & {*range(5, 60)}
            assert node.has_ended == (node.ids[-1] in range(5, 60))
            assert_is_what_the_model_says(node)
    trees = make(model=model, generation={**SAMPLING, "eos_token_id": None})
    with trees.tree(PROMPT) as tree:
        assert all(len(node.ids) == NEW and not node.has_ended for node in tree.expand(tree.root, 8))


def test_a_model_that_asks_for_another_cache_or_none_has_this_one(make: Callable[..., TextTrees]) -> None:
    model = language_model("llama")
    model.config.use_cache = model.generation_config.use_cache = False
    model.generation_config.cache_implementation = "static"
    model.generation_config.max_length = 20
    for given in (SAMPLING, GenerationConfig(**SAMPLING, use_cache=False)):
        with make(model=model, generation=given).tree(PROMPT) as tree:
            for node in tree.expand(tree.root, 2):
                assert_is_what_the_model_says(node)


class Letters:
    """A tokenizer that begins texts with a token of its own, and returns tensors."""

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.tensor([[1] * add_special_tokens + [ord(letter) % 90 for letter in text]])}


def test_a_text_that_is_added_goes_on_and_does_not_begin(make: Callable[..., TextTrees]) -> None:
    trees = make(tokenizer=Letters())
    with trees.tree("ab") as tree:
        assert tree.root.ids == (1, 7, 8)
        assert tree.add(tree.root, "cd").all_ids == [1, 7, 8, 9, 10]
    with pytest.raises(InvalidArgumentError, match="tokens of one text"):
        trees.tree(torch.tensor([[1, 2], [3, 4]]))


def test_a_forward_of_ones_own_takes_the_place_of_generate(make: Callable[..., TextTrees]) -> None:
    def most_likely(cache: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        logits = trees.model(**inputs).logits[:, -1].log_softmax(-1)
        found = logits.max(-1)
        return torch.cat([inputs["input_ids"], found.indices[:, None]], 1), found.values[:, None]

    trees = make(generation={"max_new_tokens": 1}, forward=most_likely)
    with trees.tree(PROMPT) as tree:
        node = tree.expand(tree.expand(tree.root)[0])[0]
        assert_is_what_the_model_says(node)


@pytest.mark.parametrize("family", ["llama", "deepseek_v3", "mamba"])
def test_a_node_ends_where_node_ends_say_and_its_text_goes_on(make: Callable[..., TextTrees], family: str) -> None:
    stops = [*range(10, 50)]
    of_states = {"max_rows": 1} if family == "mamba" else {}
    trees = make(family, generation={**SAMPLING, "eos_token_id": END}, node_ends=stops, **of_states)
    with trees.tree(PROMPT) as tree:
        for _ in range(4):
            tree.expand(tree.leaves[:4], samples=2)
        grown = tree.nodes[1:]
        for node in grown:
            assert_is_what_the_model_says(node)
            assert not {*node.ids[:-1]} & {*stops, END}
            assert len(node.ids) == NEW or node.ids[-1] in stops or node.has_ended
            assert node.has_ended == (node.ids[-1] == END)
        assert any(node.ids[-1] in stops and node.children for node in grown)


def test_states_go_on_past_the_end_of_a_node_in_a_row_beside_others(make: Callable[..., TextTrees]) -> None:
    with pytest.raises(UnsupportedModelError, match="max_rows must be 1 with node_ends"):
        make("mamba", node_ends=[3])


@pytest.mark.parametrize("family", ["llama", "falcon_h1", "mamba"])
def test_a_text_that_ended_goes_on_with_what_is_added_or_says_why_not(
    make: Callable[..., TextTrees], family: str
) -> None:
    generation = {**SAMPLING, "eos_token_id": [*range(5, 40)]}
    with make(family, generation=generation).tree(PROMPT) as tree:
        grown = tree.expand(tree.root, 8)
        assert any(node.is_passed for node in grown) == (family != "llama")
        for node in grown:
            if node.is_passed:
                for refused in (lambda node=node: tree.promote(node, "kept"), lambda node=node: tree.add(node, [1, 2])):
                    with pytest.raises(UnsupportedModelError, match="max_rows=1"):
                        refused()
            else:
                assert_is_what_the_model_says(tree.expand(tree.add(node, [1, 2]))[0])
    with make(family, generation=generation, max_rows=1).tree(PROMPT) as tree:
        for node in tree.expand(tree.root, 4):
            assert_is_what_the_model_says(tree.expand(tree.add(node, [1, 2]))[0])


# Together ------------------------------------------------------------------------------------------------------------


def grow_at_random(tree: TextTree, seed: int, steps: int) -> list[TextNode]:
    draw, grown = random.Random(seed), [tree.root]
    for _ in range(steps):
        grown += tree.expand(draw.choice(grown[-3:]), samples=draw.randrange(1, 3))
    return grown[1:]


@pytest.mark.parametrize("own_thread", [False, True])
@pytest.mark.parametrize("kinds", [("threads",), ("asyncio", "trio"), ("threads", "asyncio")])
@pytest.mark.parametrize(("family", "has_windows"), [("llama", False), ("gemma3_text", True)])
def test_threads_and_tasks_grow_trees_at_once(
    make: Callable[..., TextTrees], family: str, has_windows: bool, kinds: tuple[str, ...], own_thread: bool
) -> None:
    trees = make(family, trees=3, nodes=80, own_thread=own_thread, prefill_tokens=9)
    assert (trees.window_manager is not None) == has_windows
    grown: list[TextNode] = []
    errors: list[BaseException] = []

    def noting_errors(work: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            try:
                work()
            except BaseException as error:
                errors.append(error)

        return run

    async def tasks(of: list[TextTree]) -> None:
        async def grow(tree: TextTree, seed: int) -> None:
            draw, own = random.Random(seed), [tree.root]
            for _ in range(6):
                own += await tree.aexpand(draw.choice(own[-3:]), samples=draw.randrange(1, 3))
            grown.extend(own[1:])

        with anyio.fail_after(HANG_SECONDS):
            async with anyio.create_task_group() as group:
                for number, tree in enumerate(of * 2):
                    group.start_soon(grow, tree, number)

    with trees.tree(PROMPT) as one, trees.tree(PROMPT[:3]) as two, trees.tree([1]) as three:
        all_trees, works = [one, two, three], list[Callable[[], object]]()
        for kind in kinds:
            if kind == "threads":
                works += [
                    lambda tree=tree, seed=seed: grown.extend(grow_at_random(tree, seed, 6))  # type: ignore[misc]
                    for seed, tree in enumerate(all_trees)
                ]
            else:
                works.append(lambda kind=kind: anyio.run(tasks, all_trees, backend=kind))  # type: ignore[misc]
        threads = [threading.Thread(target=noting_errors(work), daemon=True) for work in works]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(HANG_SECONDS)
            assert not thread.is_alive()
        assert errors == []
        assert len({id(node) for node in grown}) == len(grown) == sum(len(tree.nodes) - 1 for tree in all_trees)
        for node in grown:
            assert_is_what_the_model_says(node)


def test_a_task_that_is_cancelled_leaves_the_tree_usable(make: Callable[..., TextTrees]) -> None:
    trees = make()
    began, go_on = threading.Event(), threading.Event()
    whole = trees.model.generate

    def slow(*args: Any, **options: Any) -> Any:
        began.set()
        assert go_on.wait(HANG_SECONDS)
        return whole(*args, **options)

    async def main(tree: TextTree) -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(tree.aexpand, tree.root)
            await anyio.to_thread.run_sync(began.wait, HANG_SECONDS)
            group.cancel_scope.cancel()
            go_on.set()

    trees.model.generate = slow
    with trees.tree(PROMPT) as tree:
        anyio.run(main, tree)
        for node in tree.expand(tree.root, 2):
            assert_is_what_the_model_says(node)


def test_expansions_that_nobody_waits_for_any_more_leave_nothing(make: Callable[..., TextTrees]) -> None:
    trees = make(nodes=6, own_thread=True)
    began, go_on = threading.Event(), threading.Event()
    whole = trees.model.generate

    def slow(*args: Any, **options: Any) -> Any:
        began.set()
        assert go_on.wait(HANG_SECONDS)
        return whole(*args, **options)

    with trees.tree(PROMPT) as tree:
        for _ in range(10):
            began.clear()
            go_on.clear()
            trees.model.generate = slow
            with pytest.raises(WaitTimeoutError):
                tree.expand(tree.root, 3, timeout=0.01)
            trees.model.generate = whole
            go_on.set()
            for node in tree.expand(tree.root, 3):
                assert_is_what_the_model_says(node)
            tree.release(tree.root.children)
        tree.expand(tree.root)
        assert tree.tokens_stored == len(PROMPT) - 1 + NEW


def while_it_is_made(tree: TextTree, node: TextNode, act: Callable[[], None]) -> list[TextNode]:
    """Expand a node; `act` once the new node is stored, and before it is one of the tree's."""
    whole = tree.trees.evaluator.evaluate_many

    def evaluate(*args: Any, **options: Any) -> Any:
        made = whole(*args, **options)
        act()
        return made

    tree.trees.evaluator.evaluate_many = evaluate  # type: ignore[method-assign]
    try:
        return tree.expand(node)
    finally:
        tree.trees.evaluator.evaluate_many = whole  # type: ignore[method-assign]


def test_what_is_made_below_a_node_stays_when_that_is_kept(make: Callable[..., TextTrees]) -> None:
    with make().tree(PROMPT) as tree:
        first, second = tree.expand(tree.root, 2)
        (made,) = while_it_is_made(tree, first, lambda: tree.keep(first))
        assert tree.nodes == [first, made]
        assert_is_what_the_model_says(tree.expand(made)[0])
        assert second.released


@pytest.mark.parametrize("act", [TextTree.release, lambda tree, node: tree.keep(node.parent.children[1])])
def test_what_is_made_below_a_node_goes_with_it(
    make: Callable[..., TextTrees], act: Callable[[TextTree, TextNode], None]
) -> None:
    with make().tree(PROMPT) as tree:
        first, second = tree.expand(tree.root, 2)
        with pytest.raises(KeyNotFoundError, match="was released while it was continued"):
            while_it_is_made(tree, first, lambda: act(tree, first))
        assert tree.leaves == [second]
        tree.expand(second)
        assert tree.tokens_stored == len(PROMPT) - 1 + 2 * NEW  # what was made has gone
