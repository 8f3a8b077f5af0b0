"""Tiny random language models of many families, and trees over them. Nothing is downloaded.

Needs transformers: `make transformers`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Hashable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="needs transformers: make transformers")

from transformers import AutoConfig, AutoModelForCausalLM

from concurrent_kv import KVPool
from concurrent_kv.compat.transformers import BatchCache, CacheLayout, TextNode, TextStore, TextTrees

torch.set_num_threads(1)  # more only get in each other's way: the matrices are small

VOCABULARY = 97
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
LATENT: dict[str, Any] = {
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "head_dim": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 32,
    "num_key_value_heads": 4,
}
# What a family's configuration has instead of, or beside, SIZES.
PLAIN: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": 8},
    "gemma2": {"sliding_window": 8},
    "gemma3_text": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256},
    "gpt_neox": {},
    "mixtral": {"num_local_experts": 4},
    "phi3": {},
}
RECORDS: dict[str, dict[str, Any]] = {
    "deepseek_v3": LATENT,
    "deepseek_v32": {**LATENT, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 64},
    "gemma4_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "sliding_window": 8,
        "global_head_dim": 32,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCABULARY,
        "num_kv_shared_layers": 2,
        "num_global_key_value_heads": 1,
    },
}
STATES: dict[str, dict[str, Any]] = {
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8},
    "jamba": {
        "num_hidden_layers": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "num_experts": 2,
        "use_mamba_kernels": False,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
    },
    "mamba": {"state_size": 8},
    "qwen3_5_text": {
        "num_hidden_layers": 4,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
}
# Layers that slide, by what else a model has: all of them slide; some of them, of the same shape or another; chunks.
WINDOW = 8
SLIDING: dict[str, dict[str, Any]] = {
    "mistral": PLAIN["mistral"],
    "starcoder2": {"sliding_window": WINDOW},
    "gemma2": PLAIN["gemma2"],
    "gemma3_text": PLAIN["gemma3_text"],
    "gemma4_text": RECORDS["gemma4_text"],
    "cohere2": {"sliding_window": WINDOW, "num_hidden_layers": 4},
    "gpt_oss": {
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention"],
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    },
    "llama4_text": {
        "attention_chunk_size": WINDOW,
        "num_hidden_layers": 4,
        "layer_types": ["chunked_attention"] * 3 + ["full_attention"],
        "no_rope_layers": [1, 1, 1, 0],
        "num_local_experts": 2,
        "intermediate_size_mlp": 96,
    },
}
# Their layers begin anew where several tokens follow on a state, in transformers' own cache as here: to these a tree
# gives one token after the other, as `generate()` does.
ONE_BY_ONE = ("jamba", "mamba")
FAMILIES = {**PLAIN, **RECORDS, **STATES}
KNOWN = {**FAMILIES, **SLIDING}


def configuration(family: str, **changes: Any) -> Any:
    """A tiny configuration of a family."""
    known = {} if family == "gpt2" else SIZES
    return AutoConfig.for_model(family, **{**known, "vocab_size": VOCABULARY, **KNOWN[family], **changes})


def language_model(
    family: str, *, dtype: torch.dtype = torch.float32, attention: str | None = None, **changes: Any
) -> Any:
    """A tiny model of a family with random weights, always the same ones. Its attention is sdpa where it can be."""
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(
        configuration(family, **changes),
        dtype=dtype,
        **({} if attention is None else {"attn_implementation": attention}),
    )
    made.generation_config.eos_token_id = None  # texts end where a test says so
    made.generation_config.pad_token_id = 0
    return made.eval()


class Forest:
    """Texts in a pool, by key, and what the model says of them from scratch; with `step`, in two where layers slide."""

    def __init__(self, model: Any, *, max_tokens: int = 64, entries: int = 200, step: int | None = None) -> None:
        self.model = model
        self.fits = CacheLayout.of(model, max_tokens=max_tokens, step=step)
        self.pool = KVPool(self.fits.layout, entries)
        self.window = None if self.fits.window is None else KVPool(self.fits.window.layout, entries)
        self.store = TextStore(self.fits, self.pool, self.window)
        self.texts: dict[Hashable, list[int]] = {}  # what the model was given of each

    def gathered(self, parents: Sequence[Hashable], *, room: int = 24) -> BatchCache:
        """The rows of some texts (of those that there are not, none)."""
        return BatchCache(self.store.gather(parents, room=room), self.fits)

    def grow(
        self, parents: Sequence[Hashable], new: Sequence[list[int]], keys: Sequence[Hashable], *, room: int = 24
    ) -> Tensor:
        """Give the model each parent with new tokens, and store that; returns the logits `[rows, tokens, words]`."""
        cache = self.gathered(parents, room=room)
        with torch.no_grad():
            logits: Tensor = self.model(**cache.model_inputs(new)).logits
        lengths = [len(tokens) for tokens in new]
        cache.commit(self.store, keys, lengths=lengths, new_tokens=max(lengths))
        for parent, tokens, key in zip(parents, new, keys, strict=True):
            self.texts[key] = self.texts.get(parent, []) + tokens
        return logits

    def from_scratch(self, ids: Sequence[int]) -> Tensor:
        """Logits `[tokens, words]` of a text by itself, without a cache."""
        with torch.no_grad():
            found: Tensor = self.model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]
        return found

    def difference(self, logits: Tensor, new: Sequence[list[int]], keys: Sequence[Hashable]) -> float:
        """The largest one between what was said of new tokens and what is said from scratch."""
        return max(
            float((logits[row, : len(tokens)] - self.from_scratch(self.texts[key])[-len(tokens) :]).abs().max())
            for row, (tokens, key) in enumerate(zip(new, keys, strict=True))
        )

    def check(self) -> None:
        """Its books are right, and nothing is held."""
        for pool in (self.pool, self.window):
            assert pool is None or pool.check_integrity().handles == 0


def words(draw: random.Random, number: int) -> list[int]:
    """Tokens, none of which pads."""
    return [draw.randrange(1, VOCABULARY) for _ in range(number)]


def assert_is_what_the_model_says(node: TextNode) -> None:
    """Its log-probability is that of a run from scratch: its keys and values were those of its own text."""
    ids, own = node.all_ids, len(node.ids)
    with torch.no_grad():
        logits = node.tree.trees.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
    of_tokens = [float(logits[at - 1, ids[at]]) for at in range(len(ids) - own, len(ids))]
    assert math.isclose(node.logprob, sum(of_tokens), abs_tol=1e-4)


def check_and_close(made: Sequence[TextTrees]) -> None:
    """Nobody has a handle of these any more."""
    for trees in made:
        for manager in (trees.manager, trees.window_manager):
            assert manager is None or manager.check_integrity().handles == 0
        trees.close()
