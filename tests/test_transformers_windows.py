"""Layers with a sliding window keep the tokens in it and no more, in a store of their own; texts are what they were."""

from __future__ import annotations

import gc
import random
import threading
from collections.abc import Callable, Hashable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers: make transformers")

from transformers import AutoConfig

from concurrent_kv import (
    CapacityError,
    InvalidArgumentError,
    InvalidTypeError,
    KeyNotFoundError,
    KVPool,
    SearchEndedError,
    WaitTimeoutError,
    WindowOverflowError,
)
from concurrent_kv.compat.transformers import BatchCache, CacheLayout, TextNode, TextRows, TextStore, TextTrees
from concurrent_kv.compat.transformers.windows import commit_window
from concurrent_kv.manager import KVCacheManager
from concurrent_kv.model.config import ManagerConfig
from tests.support import HANG_SECONDS
from tests.test_evaluator import wait_until
from tests.text_support import (
    SLIDING,
    WINDOW,
    Forest,
    assert_is_what_the_model_says,
    check_and_close,
    configuration,
    language_model,
    words,
)

KEPT = WINDOW - 1  # tokens of a text that its next token sees
BOUND = {torch.float32: 5e-6, torch.bfloat16: 0.06}  # see test_transformers_families.py
STEP = 12
ALL_SLIDE = ("mistral", "starcoder2")


def layout_for(model: Any, **options: Any) -> Any:
    return CacheLayout.of(model, **options)


def forest(family: str = "gemma3_text", **options: Any) -> Any:
    model = language_model(family, **{name: options.pop(name) for name in ("attention", "dtype") if name in options})
    return Forest(model, **{"max_tokens": 120, "step": STEP, **options})


def random_tree(grown: Forest, seed: int, steps: int) -> float:
    """Nodes that branch before and after the edge of a window, of unequal rows; the largest difference from scratch."""
    draw, worst, numbers = random.Random(seed), 0.0, iter(range(1000))
    new = [words(draw, STEP), words(draw, 3), words(draw, 1)]
    logits = grown.grow(["none"] * 3, new, keys := [next(numbers) for _ in new], room=STEP)
    worst = max(worst, grown.difference(logits, new, keys))
    for step in range(steps):
        parents: list[Hashable] = [draw.choice([*grown.texts]) for _ in range(3)]
        if step % 2:  # one that is long, and one that is new
            parents += [max(grown.texts, key=lambda key: len(grown.texts[key])), f"none {step}"]
        new = [words(draw, draw.randrange(1, STEP + 1)) for _ in parents]
        logits = grown.grow(parents, new, keys := [next(numbers) for _ in parents], room=STEP)
        worst = max(worst, grown.difference(logits, new, keys))
    return worst


def attentions(family: str) -> list[str]:
    return ["eager"] if family in ("gemma2", "gpt_oss") else ["eager", "sdpa"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("family", "attention"), [(family, attention) for family in SLIDING for attention in attentions(family)]
)
def test_a_tree_says_what_a_run_from_scratch_says(family: str, attention: str, dtype: torch.dtype) -> None:
    grown = forest(family, attention=attention, dtype=dtype)
    assert random_tree(grown, 1, 10) < BOUND[dtype]
    assert max(map(len, grown.texts.values())) > 5 * WINDOW
    with grown.window.gather([*grown.texts], room=0) as window, grown.pool.gather([*grown.texts], room=0) as full:
        assert full.lengths == tuple(map(len, grown.texts.values()))
        assert window.lengths == tuple([min(KEPT, length) for length in full.lengths])
    assert grown.window.stats().slots_in_use < grown.pool.stats().slots_in_use
    grown.check()


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3_text"])
def test_with_a_token_less_it_would_say_something_else(family: str) -> None:
    """What the bound is worth, and that no token is kept that is not needed."""
    grown, draw = forest(family), random.Random(3)
    window = replace(grown.fits.window, tokens=KEPT - 1)
    grown.fits = grown.store.fits = replace(grown.fits, window=window)
    grown.grow(["none"], [words(draw, STEP)], ["a"], room=STEP)
    new = [words(draw, 4)]
    assert grown.difference(grown.grow(["a"], new, ["b"], room=STEP), new, ["b"]) > 1000 * BOUND[torch.float32]
    grown.check()


def test_each_node_takes_its_own_tokens_and_what_has_left_every_window_takes_none() -> None:
    grown, draw = forest(), random.Random(2)
    grown.grow(["none"], [words(draw, STEP)], ["a"], room=STEP)
    grown.grow(["a"], [words(draw, STEP)], ["b"], room=STEP)
    assert (grown.pool.stats().slots_in_use, grown.window.stats().slots_in_use) == (2 * STEP, 2 * KEPT)
    grown.pool.pop("a")
    grown.window.pop("a")
    assert (grown.pool.stats().slots_in_use, grown.window.stats().slots_in_use) == (2 * STEP, KEPT)
    children: list[Hashable] = [*range(5)]
    grown.grow(["b"] * 5, [words(draw, 3) for _ in children], children, room=STEP)
    assert (grown.pool.stats().slots_in_use, grown.window.stats().slots_in_use) == (2 * STEP + 15, KEPT + 15)
    grown.check()


@pytest.mark.parametrize("family", ["gemma3_text", "mistral"])
@pytest.mark.parametrize("options", [{"do_sample": True, "temperature": 1.5}, {"num_beams": 3, "do_sample": False}, {}])
def test_what_generate_makes_is_that_of_the_whole_text(family: str, options: dict[str, Any]) -> None:
    grown, draw = forest(family), random.Random(5)
    texts = [words(draw, length) for length in (30, 12, 3)]
    for key, text in zip("abc", texts, strict=True):
        for first in range(0, len(text) - 1, STEP):
            grown.grow([key if first else "none"], [text[first : min(first + STEP, len(text) - 1)]], [key], room=STEP)
    options = {"max_new_tokens": 10, "do_sample": False, **options}
    beams = options.get("num_beams", 1)
    cache = grown.gathered([key for key in "abc" for _ in range(beams)], room=STEP)
    torch.manual_seed(1)
    made = grown.model.generate(**cache.model_inputs([text[-1:] for text in texts], expand=beams), **options)
    longest = max(map(len, texts))
    ids = torch.tensor([[0] * (longest - len(text)) + text for text in texts])
    mask = torch.tensor([[0] * (longest - len(text)) + [1] * len(text) for text in texts])
    torch.manual_seed(1)
    whole = grown.model.generate(input_ids=ids, attention_mask=mask, **options)
    assert made[:, 1:].tolist() == whole[:, longest:].tolist()
    if beams == 1:
        lengths = [10, 8, 1]
        cache.commit(grown.store, [*"def"], lengths=lengths)
        for row, (key, text) in enumerate(zip("def", texts, strict=True)):
            grown.texts[key] = text + made[row, 1 : lengths[row]].tolist()
        new = [words(draw, 4) for _ in texts]
        assert grown.difference(grown.grow([*"def"], new, [*"ghi"], room=STEP), new, [*"ghi"]) < BOUND[torch.float32]
    cache.rows.close()
    grown.check()


@pytest.mark.parametrize("family", ["gemma3_text", "mistral"])
def test_drafts_that_are_rejected_are_taken_back_beyond_the_edge_of_a_window(family: str) -> None:
    grown, draw = forest(family, attention="eager", step=40), random.Random(5)
    text, options = words(draw, 30), {"max_new_tokens": 16, "do_sample": False}
    grown.grow(["none"], [text[:-1]], ["a"], room=40)
    ids = torch.tensor([text])
    whole = grown.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)[0, 30:].tolist()
    for drafts in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": language_model("llama", num_hidden_layers=1)}):
        cache = grown.gathered(["a"], room=40)
        made = grown.model.generate(**cache.model_inputs([text[-1:]]), **options, **drafts)
        assert made[0, 1:].tolist() == whole
        cache.commit(grown.store, ["b"], lengths=[len(whole)])
        grown.texts["b"] = text + whole[:-1]
        new = [words(draw, 2)]
        assert grown.difference(grown.grow(["b"], new, ["c"]), new, ["c"]) < BOUND[torch.float32]
    grown.check()


def test_tokens_are_taken_back_until_the_gather_and_no_further() -> None:
    grown, draw = forest("mistral"), random.Random(6)
    grown.grow(["none"], [words(draw, STEP)], ["a"], room=STEP)
    cache, ids = grown.gathered(["a"], room=STEP), words(draw, STEP)
    with torch.no_grad():
        grown.model(**cache.model_inputs([ids]))
        cache.crop(-9)
        logits = grown.model(**cache.model_inputs([words(draw, 5)])).logits
        cache.crop(-5)
        logits = grown.model(**cache.model_inputs([ids[3:8]])).logits
    expected = grown.from_scratch(grown.texts["a"] + ids[:8])[-5:]
    assert float((logits[0] - expected).abs().max()) < BOUND[torch.float32]
    with pytest.raises(InvalidArgumentError, match="at most the 8 that were appended"):
        cache.crop(-9)
    cache.rows.close()
    grown.check()


# Two entries of one text ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lost", ["pool", "window"])
def test_a_text_of_which_one_entry_is_missing_is_a_miss(lost: str) -> None:
    grown, draw = forest(), random.Random(7)
    grown.grow(["none"] * 2, [words(draw, 9), words(draw, 5)], ["a", "b"], room=STEP)
    getattr(grown, lost).pop("a")
    cache = grown.gathered(["a", "b"], room=STEP)
    assert cache.batch.hits == cache.window.hits == (False, True)
    cache.rows.close()
    grown.check()


def test_entries_of_different_writes_are_no_text() -> None:
    grown, draw = forest(), random.Random(7)
    first, second = (grown.gathered(["none"], room=STEP) for _ in range(2))
    for cache in (first, second):
        with torch.no_grad():
            grown.model(**cache.model_inputs([words(draw, 9)]))
    # The first writes into the one store, the second into both, then the first into the other.
    grown.pool.commit(["a"], first.batch, lengths=[9], sides=first.sides())
    second.commit(grown.store, ["a"])
    commit_window(grown.window, ["a"], first.window, [9], KEPT, first.rows.writes)
    cache = grown.gathered(["a"], room=STEP)
    assert cache.batch.hits == cache.window.hits == (False,)
    cache.rows.close()
    grown.check()


def test_a_text_that_is_replaced_while_it_is_read_is_the_new_one(monkeypatch: pytest.MonkeyPatch) -> None:
    grown, draw = forest(), random.Random(8)
    grown.grow(["none"], [words(draw, 9)], ["a"], room=STEP)
    gather = grown.window.gather

    def overtaken(*args: Any, **options: Any) -> Any:
        monkeypatch.setattr(grown.window, "gather", gather)
        grown.grow(["none"], [words(draw, 10)], ["a"], room=STEP)
        return gather(*args, **options)

    monkeypatch.setattr(grown.window, "gather", overtaken)
    new = [words(draw, 4)]
    assert grown.difference(grown.grow(["a"], new, ["b"], room=STEP), new, ["b"]) < BOUND[torch.float32]
    assert len(grown.texts["b"]) == 14
    grown.check()


def searches(fits: Any, tokens: int, window_tokens: int) -> Any:
    """Managers, and a store of searches that have all of their tokens."""
    full, window = (
        KVCacheManager(ManagerConfig(layout, 1, 9, 10), 1, recur_slots=number)
        for layout, number in ((fits.layout, tokens), (fits.window.layout, window_tokens))
    )
    return full, window, TextStore(fits, full.search([0], tokens=tokens), window.search([0], tokens=window_tokens))


@pytest.mark.parametrize("short", ["full", "window"])
def test_a_text_that_finds_no_room_in_one_store_is_in_neither(short: str) -> None:
    model, draw = language_model("gemma3_text"), random.Random(9)
    fits = layout_for(model, max_tokens=2 * STEP, step=STEP)
    full, window, store = searches(fits, *((2 * STEP, 100) if short == "full" else (100, KEPT + STEP)))

    def given() -> Any:
        cache = BatchCache(store.gather(["none"], [0], room=STEP), fits)
        with torch.no_grad():
            model(**cache.model_inputs([words(draw, STEP)]))
        return cache

    given().commit(store, ["a"])
    given().commit(store, ["b"])
    cache = given()
    with pytest.raises(CapacityError):
        cache.commit(store, ["c"])
    assert store.full.keys() == store.window.keys() == ["a", "b"]
    if short == "full":  # nothing had changed: once there is room, it is stored
        store.release(["a"])
        cache.commit(store, ["c"])
        assert store.full.keys() == store.window.keys() == ["b", "c"]
        cache.rows = store.gather(["c"], [0], room=0)
        assert (cache.rows.full.lengths, cache.rows.window.lengths) == ((STEP,), (KEPT,))
    cache.rows.close()
    store.close()
    for manager in (full, window):
        assert manager.check_integrity().handles == 0
        manager.close()


def test_of_a_key_that_comes_twice_the_last_row_is_stored_in_both() -> None:
    grown, draw = forest(), random.Random(10)
    new = [words(draw, 12), words(draw, 3), words(draw, 11), words(draw, 12)]  # the first and the last drop as many
    grown.grow(["none"] * 4, new, ["b", "a", "b", "a"], room=STEP)
    cache = grown.gathered(["a", "b"], room=STEP)
    assert (cache.batch.lengths, cache.window.lengths) == ((12, 11), (KEPT, KEPT))
    cache.rows.close()
    grown.check()


def test_what_a_clear_has_overtaken_is_stored_in_neither() -> None:
    grown, draw = forest(), random.Random(12)
    cache = grown.gathered(["none"], room=STEP)
    with torch.no_grad():
        grown.model(**cache.model_inputs([words(draw, 9)]))
    grown.pool.clear()
    cache.commit(grown.store, ["a"])
    assert len(grown.pool) == len(grown.window) == 0
    grown.check()


def test_an_entry_that_never_had_another_one_is_no_text() -> None:
    grown = forest()
    with grown.pool.gather(["none"], room=STEP) as batch:
        batch.advance(9)
        grown.pool.commit(["a"], batch, lengths=[9])
    with grown.store.gather(["a"]) as rows:
        assert rows.hits == (False,)
    grown.check()


# What goes together --------------------------------------------------------------------------------------------------


def test_there_is_no_other_pool_where_it_would_hold_as_much() -> None:
    asked = configuration("gemma3_text")
    assert layout_for(asked, max_tokens=120).window is None
    assert layout_for(asked, max_tokens=KEPT + STEP, step=STEP).window is None
    assert layout_for(asked, max_tokens=KEPT + STEP + 1, step=STEP).window.layout.max_tokens == KEPT + STEP
    assert layout_for(configuration("llama"), max_tokens=120, step=STEP).window is None
    # A state belongs to all that the model was given: such a prompt is not given in steps.
    has_states = layout_for(AutoConfig.for_model("recurrent_gemma"), max_tokens=5000, step=STEP)
    assert has_states.has_states
    assert any(kind.window for kind in has_states.kinds)
    assert has_states.window is None
    with pytest.raises(InvalidArgumentError, match="step"):
        layout_for(asked, max_tokens=120, step=0)


@pytest.mark.parametrize("family", SLIDING)
def test_each_layer_has_a_place_in_one_of_both(family: str) -> None:
    fits = layout_for(configuration(family), max_tokens=120, step=STEP)
    whole = layout_for(configuration(family), max_tokens=120)
    for number, kind in enumerate(fits.kinds):
        homes = [
            where
            for where in (fits, fits.window)
            if where.layers[number] is not None or (where.places and where.places[number])
        ]
        assert homes == ([] if not kind.parts else [fits if kind.window is None else fits.window])
    per_token = fits.layout.bytes_per_token + fits.window.layout.bytes_per_token
    nothing = 16 * fits.layout.dtype.itemsize if family in ALL_SLIDE else 0
    assert per_token - nothing == fits.bytes_kept <= whole.layout.bytes_per_token


def test_stores_and_batches_that_do_not_go_together_are_named() -> None:
    grown, draw = forest(), random.Random(11)
    fits, whole = grown.fits, layout_for(grown.model, max_tokens=120)
    full, window, store = searches(fits, 120, 100)
    with pytest.raises(InvalidArgumentError, match=r"window must be a store of fits\.window\.layout"):
        TextStore(fits, grown.pool)
    with pytest.raises(InvalidArgumentError, match=r"window must be a store of fits\.window\.layout"):
        TextStore(whole, KVPool(whole.layout, 2), grown.window)
    with pytest.raises(InvalidTypeError, match="two pools or two searches"):
        TextStore(fits, grown.pool, store.window)
    with pytest.raises(InvalidArgumentError, match="full must be of"):
        TextStore(fits, KVPool(whole.layout, 2), grown.window)
    with pytest.raises(InvalidTypeError, match="full must be a KVPool or a Search, got str"):
        TextStore(fits, "full", grown.window)  # type: ignore[arg-type]
    no_rows: Any = "rows"
    with store.full.gather(["a"], [0], room=1) as rows:
        for refused in (
            partial(BatchCache, no_rows),
            partial(TextRows, no_rows, rows),
            partial(TextRows, rows, no_rows),
        ):
            with pytest.raises(InvalidTypeError, match="batch must be a Batch or a JointBatch, got str"):
                refused()
    with pytest.raises(InvalidArgumentError, match="env_ids must be given"):
        store.gather(["a"])
    with pytest.raises(InvalidTypeError, match="must be searches"):
        grown.store.release(["a"])
    grown.grow(["none"] * 2, [words(draw, 3), words(draw, 9)], ["a", "b"], room=STEP)
    with grown.pool.gather(["a", "b"], room=STEP) as rows, grown.window.gather(["b", "a"], room=STEP) as others:
        with pytest.raises(InvalidArgumentError, match="window must be what layers that slide keep"):
            BatchCache(rows, fits)
        with pytest.raises(InvalidArgumentError, match=r"newest 7 tokens of batch's rows, \(3, 7\), got \(7, 3\)"):
            BatchCache(TextRows(rows, others), fits)
        with pytest.raises(InvalidArgumentError, match="window must be of pools of"):
            BatchCache(TextRows(rows, others), replace(fits, window=replace(fits.window, layout=whole.layout)))
        with pytest.raises(InvalidArgumentError, match="window must be None"):
            BatchCache(TextRows(rows, others), replace(fits, window=None))
        with pytest.raises(InvalidArgumentError, match="rows must be what this store has gathered"):
            grown.store.commit(["c", "d"], TextRows(rows, None), lengths=[1, 1])
    cache = grown.gathered(["b"], room=None)
    with pytest.raises(WindowOverflowError, match=f"input_ids has {STEP + 1} tokens"):
        cache.model_inputs([words(draw, STEP + 1)])
    with torch.no_grad():
        grown.model(**cache.model_inputs([words(draw, 1)]))
    with pytest.raises(InvalidArgumentError, match="store must be the TextStore"):
        cache.commit(grown.pool, ["c"])
    cache.rows.close()
    store.close()
    grown.check()
    full.close()
    window.close()


# Trees ---------------------------------------------------------------------------------------------------------------

NEW = 5
PROMPT = words(random.Random(9), 30)


@pytest.fixture
def make() -> Iterator[Callable[..., Any]]:
    made: list[Any] = []

    def trees(family: str = "gemma3_text", **options: Any) -> Any:
        sizes = {"max_tokens": 120, "nodes": 60, "generation": {"max_new_tokens": NEW, "do_sample": True}}
        made.append(TextTrees(language_model(family), **{**sizes, "prefill_tokens": 9, **options}))
        assert made[-1].fits.window is not None
        return made[-1]

    torch.manual_seed(2)
    yield trees
    check_and_close(made)


@pytest.mark.parametrize("family", SLIDING)
def test_every_node_goes_on_from_its_own_text(make: Callable[..., Any], family: str) -> None:
    trees, draw = make(family), random.Random(1)
    for prompt in (PROMPT, [3]):
        with trees.tree(prompt) as tree:
            for _ in range(4):
                for node in tree.expand(draw.sample(tree.leaves, min(3, len(tree.leaves))), samples=2):
                    assert_is_what_the_model_says(node)
            given = tree.add(tree.leaves[0], words(draw, 21))
            for node in tree.expand(given, samples=2):
                assert_is_what_the_model_says(node)
            tree.keep(given)
            for node in tree.expand(tree.leaves, samples=2):
                assert_is_what_the_model_says(node)


def test_a_node_keeps_its_own_tokens_and_the_prompt_its_window_once(make: Callable[..., Any]) -> None:
    with make().tree(PROMPT) as tree:
        for _ in range(3):
            tree.expand(tree.leaves, samples=2)
        assert tree.tokens_stored == len(PROMPT) - 1 + 14 * NEW
        assert tree.window_tokens_stored == KEPT + 14 * NEW
        tree.release(tree.root.children)
        assert (tree.tokens_stored, tree.window_tokens_stored) == (len(PROMPT) - 1, KEPT)


def test_less_is_allocated_where_it_is_stated_and_what_helps_is_named(make: Callable[..., Any]) -> None:
    trees = make(nodes=6, tokens=100, window_tokens=KEPT + 4 * NEW)
    assert make(nodes=6, tokens=100).window_manager.allocation().slots["recur"] == 7 * KEPT
    assert trees.window_manager.allocation().slots["recur"] == KEPT + 4 * NEW
    with trees.tree(PROMPT) as tree:
        tree.expand(tree.root, samples=4)
        stored = tree.tokens_stored, tree.window_tokens_stored
        with pytest.raises(CapacityError, match=rf"sliding window.* window_tokens={KEPT + 5 * NEW}"):
            tree.expand(tree.root)
        assert len(tree.nodes) == 5
        tree.release(tree.root.children[0])
        assert_is_what_the_model_says(tree.expand(tree.root)[0])
        assert (tree.tokens_stored, tree.window_tokens_stored) == stored
        with pytest.raises(CapacityError, match=r"window_tokens="):
            tree.add(tree.root, words(random.Random(1), KEPT))
        assert len(tree._search.keys()) == len(tree._store.window.keys()) == 5
        assert (tree.tokens_stored, tree.window_tokens_stored) == stored
    with pytest.raises(InvalidArgumentError, match=f"window_tokens must be at least {KEPT}"):
        make(window_tokens=KEPT - 1)


def test_what_one_tree_has_no_room_for_is_not_heard_in_another(make: Callable[..., Any]) -> None:
    """Rows of both share a call."""
    trees = make(nodes=6, trees=2, tokens=120, window_tokens=KEPT + 4 * NEW)
    with trees.tree(PROMPT) as full, trees.tree(PROMPT) as other:
        full.expand(full.root, samples=4)
        calls = trees.stats().calls
        leaves, parents = full._leaves(full.root, 1)
        others, their_parents = other._leaves(other.root, 2)
        made = trees.evaluator.evaluate_many([*leaves, *others])
        assert trees.stats().calls == calls + 1
        with pytest.raises(CapacityError, match="window_tokens="), full._making(leaves):
            full._grown(leaves, parents, made[:1])
        for node in other._grown(others, their_parents, made[1:]):
            assert_is_what_the_model_says(node)


def test_a_node_that_is_let_go_of_before_the_call_is_not_missed_by_others(make: Callable[..., Any]) -> None:
    trees = make(trees=2)
    with trees.tree(PROMPT) as tree, trees.tree(PROMPT) as other:
        gone, _ = tree.expand(tree.root, 2)
        (leaf,), _ = tree._leaves(gone, 1)
        others, parents = other._leaves(other.root, 2)
        tree._store.window.release([gone.key])
        made = trees.evaluator.evaluate_many([leaf, *others])
        assert made[0].error is None  # the call reads what its leaf has kept
        for node in other._grown(others, parents, made[1:]):
            assert_is_what_the_model_says(node)
        for refused in (partial(tree.expand, gone), partial(tree.add, gone, [1, 2])):
            with pytest.raises(KeyNotFoundError, match="was released"):
                refused()
        tree._search.discard(leaf.child)


@pytest.mark.parametrize("family", ["gemma3_text", "mistral"])
def test_a_promoted_text_outlives_its_tree(make: Callable[..., Any], family: str) -> None:
    trees = make(family, promoted=2)
    with trees.tree(PROMPT) as tree:
        for node in tree.expand(tree.root, 5):
            tree.promote(node, "best")
        other = tree.expand(tree.root)[0]
        tree.promote(other, "other")
        ids = node.all_ids
    for _ in range(3):
        with trees.promoted_tree("best") as tree:
            assert (tree.root.all_ids, tree.tokens_stored, tree.window_tokens_stored) == (ids, 0, 0)
            grown = tree.expand(tree.root, 2)
            for node in grown:
                assert_is_what_the_model_says(node)
            tree.promote(tree.root, "best")
            tree.keep(grown[0])
            for node in tree.expand(grown[0], 2):
                assert_is_what_the_model_says(node)
    with trees.promoted_tree("other") as tree:
        assert tree.root.all_ids == other.all_ids
    trees.weights_changed()
    with pytest.raises(KeyNotFoundError, match="promoted under"):
        trees.promoted_tree("best")


def test_a_text_that_is_promoted_while_its_name_is_read_is_the_new_one(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    trees = make(trees=3, promoted=1)
    with trees.tree(PROMPT) as tree:
        one, other = tree.expand(tree.root, 2)
        tree.promote(one, "best")
        opened = trees.opened

        def overtaken() -> Any:
            store = opened()
            gather = store.window.gather

            def late(*args: Any, **options: Any) -> Any:
                tree.promote(other, "best")
                return gather(*args, **options)

            monkeypatch.setattr(store.window, "gather", late)
            monkeypatch.setattr(trees, "opened", opened)
            return store

        monkeypatch.setattr(trees, "opened", overtaken)
        with trees.promoted_tree("best") as promoted:
            assert promoted.root.all_ids == other.all_ids
            for node in promoted.expand(promoted.root, 2):
                assert_is_what_the_model_says(node)


def test_a_promoted_text_without_its_window_is_gone(make: Callable[..., Any]) -> None:
    trees = make()
    with trees.tree(PROMPT) as tree:
        tree.promote(tree.expand(tree.root)[0], "best")
    trees.window_manager.clear_init_caches()
    with pytest.raises(KeyNotFoundError, match="promoted under"):
        trees.promoted_tree("best")


def test_weights_that_change_end_trees_in_both(make: Callable[..., Any]) -> None:
    trees = make()
    tree = trees.tree(PROMPT)
    node = tree.expand(tree.root)[0]
    trees.weights_changed()
    assert trees.manager.version == trees.window_manager.version == 1
    with pytest.raises(SearchEndedError):
        tree.expand(node)
    tree.close()
    assert tree.closed
    with trees.tree(PROMPT) as tree:
        assert_is_what_the_model_says(tree.expand(tree.root)[0])


def test_a_model_that_raises_leaves_nothing(make: Callable[..., Any]) -> None:
    def fails(*_: Any) -> Any:
        raise ZeroDivisionError

    trees = make()
    with trees.tree(PROMPT) as tree:
        stored = tree.tokens_stored, tree.window_tokens_stored
        whole, trees._forward = trees._forward, fails
        with pytest.raises(ZeroDivisionError):
            tree.expand(tree.root, 2)
        trees._forward = whole
        assert (tree.tokens_stored, tree.window_tokens_stored) == stored
        assert_is_what_the_model_says(tree.expand(tree.root)[0])


def test_a_tree_that_is_closed_gives_its_room_back_in_both(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who finds room for a tree in the one store does not wait for it in the other."""
    trees = make()
    tree, opened = trees.tree(PROMPT), []
    close = tree._store.full.close

    def closes() -> None:
        close()
        opened.append(trees.opened())

    monkeypatch.setattr(tree._store.full, "close", closes)
    tree.close()
    opened[0].close()


def test_what_a_call_stores_for_an_expansion_that_has_ended_goes(make: Callable[..., Any]) -> None:
    trees = make(max_rows=1)
    began, go_on = threading.Event(), threading.Event()
    whole = trees.model.generate

    def slow(*args: Any, **options: Any) -> Any:
        began.set()
        assert go_on.wait(HANG_SECONDS)
        return whole(*args, **options)

    with trees.tree(PROMPT) as tree:
        stored = tree.tokens_stored, tree.window_tokens_stored
        trees.model.generate = slow
        first = threading.Thread(target=tree.expand, args=(tree.root,))
        first.start()
        assert began.wait(HANG_SECONDS)
        with pytest.raises(WaitTimeoutError):
            tree.expand(tree.root, 3, timeout=0.01)  # its leaves wait for the call under way
        trees.model.generate = whole
        go_on.set()
        first.join(HANG_SECONDS)
        tree.release(tree.root.children)
        for node in tree.expand(tree.root, 3):
            assert_is_what_the_model_says(node)
        tree.release(tree.root.children)
        assert (tree.tokens_stored, tree.window_tokens_stored) == stored


def test_what_an_interrupted_call_has_left_is_made_by_the_next(make: Callable[..., Any]) -> None:
    trees = make(trees=3, max_rows=2)
    began, go_on, calls = threading.Event(), threading.Event(), iter(range(10))
    whole = trees._forward

    def forward(*inputs: Any) -> Any:
        call = next(calls)
        if call == 0:
            began.set()
            assert go_on.wait(HANG_SECONDS)
        found = whole(*inputs)
        if call == 1:
            raise KeyboardInterrupt
        return found

    made, interrupted = list[TextNode](), list[Any]()

    def expand(tree: Any) -> None:
        try:
            made.extend(tree.expand(tree.root))
        except KeyboardInterrupt:
            interrupted.append(tree)

    grown = [trees.tree(PROMPT) for _ in range(3)]
    trees._forward = forward
    threads = [threading.Thread(target=expand, args=(tree,)) for tree in grown]
    threads[0].start()
    assert began.wait(HANG_SECONDS)
    for thread in threads[1:]:  # whose leaves share the second call
        thread.start()
    wait_until(lambda: trees.evaluator.queue.waiting_rows == 2)
    go_on.set()
    for thread in threads:
        thread.join(HANG_SECONDS)
    assert (len(made), len(interrupted), next(calls)) == (2, 1, 3)
    gc.collect()  # what the interrupted leaf kept goes with its error, which is in a cycle
    for node in made:
        assert_is_what_the_model_says(node)
    for tree in grown:
        for node in tree.expand(tree.root):
            assert_is_what_the_model_says(node)
        tree.close()


def test_threads_that_replace_texts_never_read_parts_of_two() -> None:
    grown = forest()
    start, failed = threading.Barrier(6), list[BaseException]()

    def write(number: int) -> None:
        draw = random.Random(number)
        for step in range(40):
            rows = grown.store.gather([object()] * 2, room=STEP)
            for batch in (rows.full, rows.window):
                batch.advance(9)
                batch.data[...] = value = number * 100 + step
            grown.store.commit(draw.sample("abc", 2), rows, lengths=[9, 9], sides=[value] * 2)

    def read() -> None:
        for _ in range(80):
            with grown.store.gather([*"abc"], room=0) as rows:
                for row, hit in enumerate(rows.hits):
                    assert hit == rows.window.hits[row]
                    if hit:
                        value = rows.full.side[row].side
                        of_both = [batch.data[:, row, :, batch.start - 1] for batch in (rows.full, rows.window)]
                        assert all(bool((of_one == value).all()) for of_one in of_both)

    def run(work: Callable[..., None], *args: int) -> None:
        try:
            start.wait(HANG_SECONDS)
            work(*args)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(write, number)) for number in range(3)]
    threads += [threading.Thread(target=run, args=(read,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG_SECONDS)
        assert not thread.is_alive()
    assert failed == []
    grown.check()


def test_an_error_that_is_kept_keeps_no_room(make: Callable[..., Any]) -> None:
    """What a leaf has of its parent's window is given up where no call has had it."""
    trees = make()
    with trees.tree(words(random.Random(1), 114)) as tree:
        (node,) = tree.expand(tree.root)
        with pytest.raises(WindowOverflowError) as kept:
            tree.expand(node)
    assert kept.value.__traceback__ is not None
    assert trees.window_manager.check_integrity().handles == 0
    with trees.tree(words(random.Random(1), 20)) as tree:
        assert tree.expand(tree.root)


def test_an_error_of_one_node_that_is_kept_keeps_no_room_of_the_others(make: Callable[..., Any]) -> None:
    trees = make()
    with trees.tree(PROMPT) as tree:
        one, other = tree.expand(tree.root, 2)
        tree.release(other)
        with pytest.raises(KeyNotFoundError) as kept:
            tree.expand([one, other])
    assert kept.value.__traceback__ is not None
    assert trees.window_manager.check_integrity().handles == 0


class SeenLock:
    """A lock that says when a second thread asks for it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.asked = threading.Event()

    def acquire(self, *, timeout: float) -> bool:
        if self._lock.locked():
            self.asked.set()
        return self._lock.acquire(timeout=timeout)

    def release(self) -> None:
        self._lock.release()


def test_texts_that_are_promoted_at_once_displace_no_others(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    trees = make(promoted=3)
    with trees.tree(PROMPT) as tree:
        nodes = tree.expand(tree.root, 5)
        for node, name in zip(nodes, ("oldest", "one", "other"), strict=False):
            tree.promote(node, name)
        lock, search = SeenLock(), tree._store.full
        monkeypatch.setattr(trees, "_promoting", lock)
        second, promote = threading.Thread(target=tree.promote, args=(nodes[4], "other"), daemon=True), search.promote

        def held_up(*args: Any, **options: Any) -> Any:
            monkeypatch.setattr(search, "promote", promote)
            second.start()
            wait_until(lambda: lock.asked.is_set() or not second.is_alive())
            return promote(*args, **options)

        monkeypatch.setattr(search, "promote", held_up)
        tree.promote(nodes[3], "one")
        second.join(HANG_SECONDS)
        assert not second.is_alive()
    for node, name in ((nodes[0], "oldest"), (nodes[3], "one"), (nodes[4], "other")):
        with trees.promoted_tree(name) as tree:
            assert tree.root.all_ids == node.all_ids


@pytest.mark.parametrize(("family", "step"), [("llama", None), ("gemma3_text", STEP), ("mistral", STEP)])
def test_a_forward_that_was_cut_off_is_not_gone_on_from(
    family: str, step: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    grown = Forest(language_model(family), max_tokens=120, step=step)
    grown.grow([None], [words(random.Random(1), 8)], ["a"], room=8)
    cache, (first, *_) = grown.gathered(["a"], room=8), grown.model.model.layers
    ids = words(random.Random(2), 4)

    def out_of_memory(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("no room for a layer")

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(first.mlp, "forward", out_of_memory)  # the first layer has appended, and the second has not
        with pytest.raises(torch.OutOfMemoryError):
            grown.model(**cache.model_inputs([ids]))
    with pytest.raises(InvalidArgumentError, match="gather again"):
        cache.model_inputs([ids])
    with pytest.raises(InvalidArgumentError, match="gather again"):
        cache.commit(grown.store, ["b"])
    cache.rows.close()
    grown.check()


def test_a_model_that_names_a_window_and_attends_to_all_keeps_all() -> None:
    config = AutoConfig.for_model(
        "moshi",
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        ffn_dim=16,
        sliding_window=4,
        max_position_embeddings=64,
    )
    assert CacheLayout.of(config, max_tokens=64, step=4).window is None
