"""Logits of every node of a random tree equal a run from scratch, for models of many families."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers: make transformers")

from transformers import AutoConfig

from concurrent_kv import InvalidArgumentError, KVCacheManager, WindowOverflowError
from concurrent_kv.compat.transformers import BatchCache, CacheLayout, UnsupportedModelError, layout_of
from tests.text_support import (
    FAMILIES,
    ONE_BY_ONE,
    PLAIN,
    RECORDS,
    STATES,
    Forest,
    configuration,
    language_model,
    words,
)

# Absolute, of logits around 1. Measured: 4e-7, and 2e-6 with four layers; bfloat16 keeps 8 bits, of which other sums
# lose up to 3.
BOUND = {torch.float32: 5e-6, torch.bfloat16: 0.06}


def random_tree(forest: Forest, family: str, seed: int, steps: int) -> float:
    """Grow one, with rows of unequal length where the model can; returns the largest difference from scratch."""
    draw, worst, numbers = random.Random(seed), 0.0, iter(range(1000))
    equal = forest.fits.has_states
    first = words(draw, 5), words(draw, 5 if equal else 9), words(draw, 5 if equal else 2)
    logits = forest.grow(["nothing"] * 3, first, keys := [next(numbers) for _ in first])
    worst = max(worst, forest.difference(logits, first, keys))
    for _ in range(steps):
        parents = [draw.choice([*forest.texts]) for _ in range(draw.randrange(1, 6))]
        most = 1 if family in ONE_BY_ONE else draw.randrange(1, 6)
        new = [words(draw, most if equal else draw.randrange(1, most + 1)) for _ in parents]
        logits = forest.grow(parents, new, keys := [next(numbers) for _ in parents])
        worst = max(worst, forest.difference(logits, new, keys))
    return worst


@pytest.mark.parametrize("attention", [None, "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_tree_says_what_a_run_from_scratch_says(family: str, attention: str | None) -> None:
    forest = Forest(language_model(family, attention=attention))
    assert bool(forest.fits.places) == (family not in PLAIN)
    assert forest.fits.has_states == (family in STATES)
    assert random_tree(forest, family, 1, 8) < BOUND[torch.float32]
    forest.check()


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt2", "deepseek_v3", "falcon_h1"])
def test_a_tree_in_bfloat16_says_so_but_for_its_rounding(family: str) -> None:
    forest = Forest(language_model(family, dtype=torch.bfloat16))
    assert forest.fits.layout.dtype is torch.bfloat16
    assert random_tree(forest, family, 2, 4) < BOUND[torch.bfloat16]
    forest.check()


@pytest.mark.parametrize("family", ["llama", "gpt2", "deepseek_v3"])
def test_without_the_mask_it_would_say_something_else(family: str) -> None:
    """What the bound is worth."""
    forest, draw = Forest(language_model(family)), random.Random(3)
    forest.grow(["", ""], [words(draw, 9), words(draw, 2)], ["long", "short"])
    cache, new = forest.gathered(["long", "short"]), [words(draw, 1), words(draw, 1)]
    with torch.no_grad(), cache.batch:
        inputs = cache.model_inputs(new)
        del inputs["attention_mask"]
        logits = forest.model(**inputs).logits
    expected = forest.from_scratch(forest.texts["short"] + new[1])[-1]
    assert float((logits[1, -1] - expected).abs().max()) > 1000 * BOUND[torch.float32]
    forest.check()


@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])
def test_texts_that_outgrow_the_window_are_refused_and_the_pool_is_as_it_was(family: str) -> None:
    forest, draw = Forest(language_model(family), max_tokens=12), random.Random(4)
    with forest.pool.gather(["a"]) as batch:
        cache = BatchCache(batch, forest.fits)
        with pytest.raises(WindowOverflowError, match="room for 12: gather with room=13"):
            cache.model_inputs([words(draw, 13)])
        inputs = cache.model_inputs([words(draw, 12)]) | {"input_ids": torch.ones(1, 13, dtype=torch.long)}
        del inputs["attention_mask"], inputs["position_ids"]  # whatever a user does
        with pytest.raises(WindowOverflowError, match="13 new tokens do not fit"), torch.no_grad():
            forest.model(**inputs)
    assert len(forest.pool) == 0
    forest.check()


# Layouts -------------------------------------------------------------------------------------------------------------


def test_grouped_queries_and_a_width_of_their_own_are_laid_out_as_the_model_has_them() -> None:
    made = layout_of(configuration("qwen2", hidden_size=56, num_attention_heads=14, head_dim=4), max_tokens=32)
    assert (made.num_layers, made.num_heads, made.head_dim, made.max_tokens) == (2, 2, 4, 32)
    model = language_model("llama", dtype=torch.bfloat16)
    assert layout_of(model, max_tokens=8) == layout_of(model.config, max_tokens=8, dtype=torch.bfloat16)
    assert layout_of(model, max_tokens=8, dtype=torch.float32).dtype is torch.float32


def test_a_configuration_is_left_as_it_was() -> None:
    asked = configuration("llama")
    before = asked.to_dict()
    CacheLayout.of(asked, max_tokens=8)
    assert asked.to_dict() == before


@pytest.mark.parametrize("family", [*RECORDS, *STATES])
def test_a_record_has_room_for_what_the_model_keeps_and_hardly_more(family: str) -> None:
    fits = CacheLayout.of(configuration(family), max_tokens=8)
    taken = [set[tuple[int, int]]() for _ in fits.places]
    for number, places in enumerate(fits.places):
        for place in places:
            assert place.first + place.heads * place.width <= fits.layout.head_dim
            taken[number] |= {(place.plane, place.first + at) for at in range(place.heads * place.width)}
    assert sum(map(len, taken)) == len(set().union(*taken)) == fits.bytes_kept // fits.layout.dtype.itemsize
    if family != "mamba":  # which keeps nothing of a token
        assert fits.layout.bytes_per_token <= 1.35 * fits.bytes_kept  # of two layers; of many less


@pytest.mark.parametrize(
    ("family", "reason"),
    [("openai-gpt", "keeps nothing"), ("deepseek_v4", "cache of its own kind"), ("reformer", "cache of its own kind")],
)
def test_models_that_cannot_be_held_are_refused_with_the_reason(family: str, reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        layout_of(AutoConfig.for_model(family), max_tokens=8)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [({"max_tokens": 0}, "max_tokens"), ({"max_tokens": 8, "dtype": torch.int8}, "dtype must be one of")],
)
def test_sizes_that_cannot_work_are_named(arguments: dict[str, Any], error: str) -> None:
    with pytest.raises(InvalidArgumentError, match=error):
        layout_of(configuration("llama"), **arguments)
    with pytest.raises(TypeError, match="model must be"):
        layout_of(object(), max_tokens=8)


def test_a_batch_of_another_layout_is_refused() -> None:
    llama, gemma = Forest(language_model("llama")), CacheLayout.of(configuration("gemma4_text"), max_tokens=64)
    with llama.pool.gather(["a"]) as batch, pytest.raises(InvalidArgumentError, match="batch must be of pools of"):
        BatchCache(batch, gemma)
    llama.check()


def test_a_manager_takes_the_configuration_of_a_model() -> None:
    asked = configuration("qwen2", num_simulations=8)
    manager = KVCacheManager(config=asked, env_num=2)
    assert manager.layout == layout_of(asked, max_tokens=asked.max_position_embeddings)
    assert manager.config.num_simulations == 8
    manager.close()
