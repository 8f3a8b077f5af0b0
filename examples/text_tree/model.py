"""The language model: a Llama of 0.3 million parameters, a character a token."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from examples.text_tree.puzzle import LONGEST_TEXT

DEFAULT_WEIGHTS = Path(__file__).parent / "weights" / "countdown.pt"

SIZES: dict[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "tie_word_embeddings": True,
}


class Characters:
    """A tokenizer, as far as `TextTrees` asks for one. Token 0 pads."""

    alphabet = "0123456789+-*/=> :\n"

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [1 + self.alphabet.index(character) for character in text]}

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        return "".join([self.alphabet[token - 1] for token in ids if token])


CHARACTERS = Characters()
PAD = 0
(STEP_END,) = CHARACTERS("\n")["input_ids"]


def new_model() -> LlamaForCausalLM:
    """One with random weights."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=1 + len(Characters.alphabet),
            max_position_embeddings=LONGEST_TEXT,
            pad_token_id=PAD,
            bos_token_id=None,
            eos_token_id=None,
            **SIZES,
        )
    )


def load_model(path: Path | str = DEFAULT_WEIGHTS) -> LlamaForCausalLM:
    """The trained model from a file of `torch.save`: float32, on the CPU, for evaluation, without gradients."""
    model = new_model()
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True)["weights"])
    return model.eval().requires_grad_(False)
