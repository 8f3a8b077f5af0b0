"""`generate()` over gathered rows gives, token for token, what it gives from the whole text."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers: make transformers")

from concurrent_kv import InvalidArgumentError
from concurrent_kv.compat.transformers import UnsupportedModelError
from tests.text_support import FAMILIES, STATES, Forest, language_model, words

NEW = 10


def grown(family: str, lengths: tuple[int, ...] = (7, 12, 3), **changes: Any) -> tuple[Forest, list[list[int]]]:
    """A forest with texts "0", "1", ..., and their tokens, the last of which the model was not given."""
    forest, draw = Forest(language_model(family, **changes)), random.Random(5)
    texts = [words(draw, length) for length in lengths]
    for number, text in enumerate(texts):
        forest.grow([f"no {number}"], [text[:-1]], [str(number)])
    return forest, texts


def expected(forest: Forest, text: list[int], **options: Any) -> list[int]:
    """What follows a text, from scratch."""
    ids = torch.tensor([text])
    found = forest.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    return list(found[0, len(text) :].tolist())


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_from_rows_of_unequal_length(family: str) -> None:
    forest, texts = grown(family, attention="eager")
    options = {"max_new_tokens": NEW, "do_sample": False}
    cache = forest.gathered(["0", "1", "2"])
    with cache.batch:
        made = forest.model.generate(**cache.model_inputs([text[-1:] for text in texts]), **options)
    for row, text in enumerate(texts):
        assert made[row, 1:].tolist() == expected(forest, text, **options), row


@pytest.mark.parametrize("options", [{"do_sample": True, "temperature": 1.5}, {"num_beams": 3, "do_sample": False}])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "deepseek_v3"])
def test_samples_and_beams_are_those_of_the_whole_text(family: str, options: dict[str, Any]) -> None:
    forest, texts = grown(family)
    options = {"max_new_tokens": NEW, **options}
    beams = options.get("num_beams", 1)
    cache = forest.gathered([key for key in "012" for _ in range(beams)])
    with cache.batch:
        torch.manual_seed(1)
        made = forest.model.generate(**cache.model_inputs([text[-1:] for text in texts], expand=beams), **options)
    longest = max(map(len, texts))
    ids = torch.tensor([[0] * (longest - len(text)) + text for text in texts])
    mask = torch.tensor([[0] * (longest - len(text)) + [1] * len(text) for text in texts])
    torch.manual_seed(1)
    whole = forest.model.generate(input_ids=ids, attention_mask=mask, **options)
    assert made[:, 1:].tolist() == whole[:, longest:].tolist()
    forest.check()


@pytest.mark.parametrize("family", ["llama", "deepseek_v3", "deepseek_v32"])
def test_drafts_that_are_rejected_are_taken_back(family: str) -> None:
    forest, texts = grown(family, (9,), attention="eager")
    text, options = texts[0], {"max_new_tokens": 16, "do_sample": False}
    whole = expected(forest, text, **options)
    draft = language_model("llama", num_hidden_layers=1)
    for drafts in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": draft}):
        cache = forest.gathered(["0"], room=40)
        with cache.batch:
            made = forest.model.generate(**cache.model_inputs([text[-1:]]), **options, **drafts)
            assert made[0, 1:].tolist() == whole
            cache.commit(forest.pool, ["end"], lengths=[len(whole)])
        forest.texts["end"] = text + whole[:-1]
        new = [words(random.Random(6), 2)]
        logits = forest.grow(["end"], new, ["after"])
        assert forest.difference(logits, new, ["after"]) < 5e-6
    forest.check()


def test_rows_that_end_early_are_committed_as_long_as_they_are() -> None:
    forest, texts = grown("llama")
    options = {"max_new_tokens": NEW, "do_sample": False}
    wholes = [expected(forest, text, **options) for text in texts]
    end = wholes[0][2]  # the first text ends there, the others wherever they say it too
    cache = forest.gathered(["0", "1", "2"])
    made = forest.model.generate(**cache.model_inputs([text[-1:] for text in texts]), eos_token_id=end, **options)
    lengths = []
    for row, whole in enumerate(wholes):
        length = whole.index(end) + 1 if end in whole else len(whole)
        assert made[row, 1 : 1 + length].tolist() == whole[:length]
        lengths.append(length)
    assert min(lengths) < max(lengths)
    cache.commit(forest.pool, ["a", "b", "c"], lengths=lengths, sides=["side a", "side b", "side c"])
    for key, text, whole, length in zip("abc", texts, wholes, lengths, strict=True):
        forest.texts[key] = text + whole[: length - 1]
    new = [words(random.Random(7), 3) for _ in "abc"]
    logits = forest.grow(["a", "b", "c"], new, ["d", "e", "f"])
    assert forest.difference(logits, new, ["d", "e", "f"]) < 5e-6
    assert forest.gathered(["b"]).side == ("side b",)


@pytest.mark.parametrize("family", STATES)
def test_states_cannot_go_back_nor_end_early_and_say_so(family: str) -> None:
    forest, texts = grown(family, (5, 5))
    cache = forest.gathered(["0", "1"])
    assert not cache.is_croppable
    assert not cache.is_compileable
    with pytest.raises(UnsupportedModelError, match="as many tokens in every row"):
        cache.model_inputs([[1], [1, 2]])
    with torch.no_grad():
        forest.model(**cache.model_inputs([text[-1:] for text in texts]))
    with pytest.raises(UnsupportedModelError, match="cannot be cropped"):
        cache.crop(-1)
    with pytest.raises(UnsupportedModelError, match="lengths must be the 1 tokens"):
        cache.commit(forest.pool, ["a", "b"], lengths=[1, 0], new_tokens=1)
    cache.batch.close()
    with pytest.raises(InvalidArgumentError, match="rows with states, or without"):
        forest.gathered(["0", "nothing"])
    cache = forest.gathered(["0", "1"])
    with torch.no_grad(), cache.batch:
        forest.model(**cache.model_inputs([text[-1:] for text in texts]))
        with pytest.raises(InvalidArgumentError, match="sides must have one item for each of 2 rows, got 1"):
            cache.commit(forest.pool, ["a", "b"], sides=["one"], new_tokens=1)


def test_a_commit_that_failed_is_made_again_with_as_many_tokens() -> None:
    forest, draw = Forest(language_model("mamba")), random.Random(10)
    new = [words(draw, 4)]
    cache = forest.gathered(["nothing"])
    with torch.no_grad():
        forest.model(**cache.model_inputs(new))
    with pytest.raises(UnsupportedModelError, match="lengths must be the 4 tokens"):
        cache.commit(forest.pool, ["a"], lengths=[3], new_tokens=4)
    cache.commit(forest.pool, ["a"], new_tokens=4)
    assert forest.gathered(["a"]).batch.lengths == (4,)


def test_rows_that_changed_places_have_masks_and_positions_of_their_own() -> None:
    forest, texts = grown("llama")
    cache = forest.gathered(["0", "1", "2"])
    cache.model_inputs([[1]] * 3)  # whatever was asked before
    cache.reorder_cache(torch.tensor([2, 0, 1]))
    moved = [texts[2], texts[0], texts[1]]
    with torch.no_grad():
        logits = forest.model(**cache.model_inputs([text[-1:] for text in moved])).logits[:, -1]
    for row, text in enumerate(moved):
        assert float((logits[row] - forest.from_scratch(text)[-1]).abs().max()) < 5e-6
    cache.batch.close()
    forest.check()


def test_a_state_is_a_copy_of_its_own() -> None:
    """Children of one parent go their own ways, and the parent stays what it was."""
    forest, draw = Forest(language_model("falcon_h1")), random.Random(8)
    forest.grow(["", ""], [words(draw, 5), words(draw, 5)], ["a", "b"])
    for key in ("c", "d", "e"):
        new = [words(draw, 2)]
        logits = forest.grow(["a"], new, [key])
        assert forest.difference(logits, new, [key]) < 5e-6
    forest.check()


def test_inputs_that_cannot_work_are_named() -> None:
    forest, _ = grown("llama")
    cache = forest.gathered(["0", "1", "2"])
    for ids, expand in (([[1], [2]], 1), ([[1], [2], []], 1), ([[1], [2]], 2)):
        with pytest.raises(InvalidArgumentError, match="input_ids must have at least one token for each of"):
            cache.model_inputs(ids, expand=expand)
    with torch.device("meta"):  # whatever device is the default
        inputs = cache.model_inputs([[1], [1, 2], [1]])
    assert inputs["input_ids"].tolist() == [[1, 0], [1, 2], [1, 0]]
    with pytest.raises(InvalidArgumentError, match="cannot follow rows of different numbers"):
        cache.model_inputs([[1]] * 3)
    first = torch.tensor([0])
    for refused in (cache.reset, lambda: cache.batch_repeat_interleave(2), lambda: cache.batch_select_indices(first)):
        with pytest.raises(InvalidArgumentError, match="rows of a batch cannot be"):
            refused()
    cache.batch.close()
    forest.check()
