"""`CacheLayout`: what a transformers model keeps for each token and for each text, and where in a pool that stands.

What a model hands to its cache is not read from its configuration, but seen: the model is built without memory for its
weights, and given two tokens.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import (
    Cache,
    DummyLayer,
    DynamicCache,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from ..._checks import positive_int
from ...device.layout import SUPPORTED_DTYPES, KVLayout
from ...errors import InvalidArgumentError, InvalidTypeError

__all__ = ["CacheLayout", "LayerKind", "Place", "UnsupportedModelError", "WindowLayout", "layout_of"]

logger = logging.getLogger("concurrent_kv")

KNOWN = (
    DummyLayer,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)
ALIGNED = 8  # numbers: a token's memory is a multiple of 16 bytes in every dtype
SMALL = 700_000_000  # parameters of a model that is built in memory where it cannot be built without


class UnsupportedModelError(InvalidArgumentError):
    """A model that caches what no layout holds, or whose cache cannot do what is asked; the message says what."""


class Part(NamedTuple):
    """Numbers that a layer keeps for each token: keys, values, or the keys of an indexer."""

    heads: int
    width: int

    @property
    def numbers(self) -> int:
        """Of a token."""
        return self.heads * self.width


class LayerKind(NamedTuple):
    """What one of the model's layers keeps."""

    parts: tuple[Part, ...]  # of each token: keys, values and, where there is one, an indexer's keys
    states: int  # convolutions' and recurrent states of each text, by number
    window: int | None = None  # tokens that one attends to, itself included, in a layer that slides; None: all

    @property
    def is_plain(self) -> bool:
        """Whether it keeps keys and values of one shape and nothing else."""
        return len(self.parts) == 2 and self.parts[0] == self.parts[1] and not self.states

    @property
    def can_drop(self) -> bool:
        """Whether it needs no more of a text than the tokens in its window."""
        return bool(self.parts) and not self.states and self.window is not None and self.window > 1


class Place(NamedTuple):
    """Where a part stands in the record of a token."""

    plane: int
    first: int
    heads: int
    width: int


# Their configurations name a sliding window, and their forwards attend to all tokens.
UNMASKED = frozenset(("moshi",))


@dataclass(frozen=True)
class WindowLayout:
    """How what layers with a sliding window keep stands in a pool of their own: of each text its newest tokens.

    Attributes:
        layout: of these pools; its `max_tokens` are those of the window and of a step.
        tokens: that are kept of a text: all in the window of its next token, but for that one. Where the windows of
            layers differ it is the longest one's.
        layers, places: as those of `CacheLayout`, for these layers.
    """

    layout: KVLayout
    tokens: int
    layers: tuple[int | None, ...]
    places: tuple[tuple[Place, ...], ...]


@dataclass(frozen=True)
class CacheLayout:
    """How what a model caches stands in a pool.

    Where all layers keep keys and values of one shape, as in a pool for any model: `layers` names the pool's layer of
    each of the model's. Otherwise a token is one record, half of it in the pool's keys and half in its values: `places`
    says where each layer's part stands in it. What a layer keeps for a text as a whole (the state of a convolution or a
    recurrence) goes with an entry's side data: copied, never shared, and not counted in the pool's slots.

    Attributes:
        layout: of the pools.
        kinds: what each of the model's layers keeps.
        layers: the pool's layer of each; None for one that keeps nothing, and for all where a token is a record.
        places: of each layer's parts in a record; empty where a token is none.
        window: of the layers that slide, where they have a pool of their own; None where all layers keep all tokens.
            `layout` is that of the other layers then; where there are none, its tokens are counted and hold nothing.
    """

    layout: KVLayout
    kinds: tuple[LayerKind, ...]
    layers: tuple[int | None, ...]
    places: tuple[tuple[Place, ...], ...]
    window: WindowLayout | None = None

    @property
    def has_states(self) -> bool:
        """Whether texts have states, which cannot be cropped and belong to a text's whole length only."""
        return any(kind.states for kind in self.kinds)

    @property
    def bytes_kept(self) -> int:
        """Bytes of a token as the model hands it over; the layouts' are more where a record's halves are not even."""
        return sum(part.numbers for kind in self.kinds for part in kind.parts) * self.layout.dtype.itemsize

    @classmethod
    def of(
        cls,
        model: PreTrainedModel | PreTrainedConfig,
        *,
        max_tokens: int,
        step: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> CacheLayout:
        """That of a causal language model of transformers. Takes a moment: it builds the model once more, unfilled.

        Args:
            model: the model, or its configuration.
            max_tokens: the window: the most tokens of an entry.
            step: the most tokens that a text is given between a gather and a commit. Where it is stated, and
                `max_tokens` are more than a sliding window and a step, layers that slide get a pool of their own.
            dtype: of what is cached; the model's if left out, that of a configuration's `dtype`, or float32.
            device: of the pools; the model's if left out, the CPU for a configuration.

        Raises:
            UnsupportedModelError: the model caches what does not fit; why.
            InvalidTypeError: `model` is neither.
            InvalidArgumentError: an impossible size or dtype; or a configuration alone does not tell, and the model
                would.
        """
        if isinstance(model, PreTrainedModel):
            found = model.dtype, model.device
        elif isinstance(model, PreTrainedConfig):
            found = model.dtype or torch.float32, torch.device("cpu")
        else:
            raise InvalidTypeError(f"model must be a PreTrainedModel or a PreTrainedConfig, got {type(model).__name__}")
        max_tokens = positive_int("max_tokens", max_tokens)
        dtype = found[0] if dtype is None else dtype
        if dtype not in SUPPORTED_DTYPES:
            raise InvalidArgumentError(f"dtype must be one of {SUPPORTED_DTYPES}, got {dtype}")
        where: Any = found[1] if device is None else device
        kinds = _seen(model)
        config = model.config if isinstance(model, PreTrainedModel) else model
        can_drop = step is not None and not any(kind.states for kind in kinds) and config.model_type not in UNMASKED
        kept = 0 if not can_drop else max([kind.window or 1 for kind in kinds if kind.can_drop], default=1) - 1
        columns = kept + (0 if step is None else positive_int("step", step))
        if not kept or columns >= max_tokens:
            sizes, layers, places = _placed(kinds)
            return cls(KVLayout(*sizes, max_tokens, dtype, where), kinds, layers, places)
        nothing = LayerKind((), 0)
        sizes, layers, places = _placed([nothing if kind.can_drop else kind for kind in kinds])
        window_sizes, window_layers, window_places = _placed([kind if kind.can_drop else nothing for kind in kinds])
        window = WindowLayout(KVLayout(*window_sizes, columns, dtype, where), kept, window_layers, window_places)
        return cls(KVLayout(*sizes, max_tokens, dtype, where), kinds, layers, places, window)


def layout_of(
    model: PreTrainedModel | PreTrainedConfig,
    *,
    max_tokens: int,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> KVLayout:
    """The layout of pools for a causal language model of transformers: `CacheLayout.of(...).layout`, see there."""
    return CacheLayout.of(model, max_tokens=max_tokens, dtype=dtype, device=device).layout


Placed = tuple[tuple[int, int, int], tuple[int | None, ...], tuple[tuple[Place, ...], ...]]


def _placed(kinds: Sequence[LayerKind]) -> Placed:
    """Layers, heads and width of a layout for what layers keep, and their `CacheLayout.layers` and `places`."""
    kept, has_states = [kind for kind in kinds if kind.parts], any(kind.states for kind in kinds)
    if kept and all(kind.parts == kept[0].parts and kind.is_plain for kind in kept) and not has_states:
        numbers = iter(range(len(kept)))
        return (len(kept), *kept[0].parts[0]), tuple([next(numbers) if kind.parts else None for kind in kinds]), ()
    width, places = _records(kinds)
    return (1, 1, width), (None,) * len(kinds), places


def _records(kinds: Sequence[LayerKind]) -> tuple[int, tuple[tuple[Place, ...], ...]]:
    """Where each part stands in a record of two halves of one width, as even as can be: the largest first."""
    ends = [0, 0]
    parts = [(part, layer, number) for layer, kind in enumerate(kinds) for number, part in enumerate(kind.parts)]
    placed: dict[tuple[int, int], Place] = {}
    for part, layer, number in sorted(parts, key=lambda each: -each[0].numbers):
        plane = int(ends[1] < ends[0])
        placed[layer, number] = Place(plane, ends[plane], *part)
        ends[plane] += part.numbers
    width = -(-max(*ends, 1) // ALIGNED) * ALIGNED
    return width, tuple(
        [tuple([placed[layer, number] for number in range(len(kind.parts))]) for layer, kind in enumerate(kinds)]
    )


def _kinds(seen: Cache, name: str) -> tuple[LayerKind, ...]:
    kinds = tuple([_kind_of(layer, name) for layer in seen.layers])
    if not any(kind.parts or kind.states for kind in kinds):
        raise UnsupportedModelError(f"{name} keeps nothing in its cache")
    return kinds


def _kind_of(layer: Any, name: str) -> LayerKind:
    if type(layer) not in KNOWN:
        raise UnsupportedModelError(
            f"{name} has a cache of its own kind, {type(layer).__name__}, which no layout holds"
        )
    parts, states = list[Part](), 0
    keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
    if keys is not None and values is not None:
        parts = [Part(keys.shape[1], keys.shape[3]), Part(values.shape[1], values.shape[3])]
    if getattr(layer, "indexer_keys", None) is not None:
        if getattr(layer, "indexer_position_ids", None) is not None:
            raise UnsupportedModelError(f"{name} keeps positions of its indexer, which no layout holds")
        parts.append(Part(1, layer.indexer_keys.shape[2]))
    if isinstance(layer, LinearAttentionLayer):
        states = layer.number_of_states
    return LayerKind(tuple(parts), states, getattr(layer, "sliding_window", None))


def _seen(model: PreTrainedModel | PreTrainedConfig) -> tuple[LayerKind, ...]:
    """What each layer of a model keeps."""
    config = model if isinstance(model, PreTrainedConfig) else model.config
    name = config.model_type
    ways: list[Callable[[], Cache]] = [partial(_cache_unfilled, config), partial(_cache_unfilled, config, "eager")]
    if isinstance(model, PreTrainedModel):
        ways.append(partial(_cache_of, model, model.device))
    else:
        ways.append(partial(_cache_of_small, config))
    errors: list[Exception] = []
    for way in ways:
        try:
            with torch.no_grad():
                seen = way()
        except Exception as error:
            errors.append(error)
        else:
            return _kinds(seen, name)
    if isinstance(model, PreTrainedModel):
        raise errors[-1]
    try:
        kinds = _read(config)
    except UnsupportedModelError:
        raise
    except Exception:
        raise InvalidArgumentError(
            f"model must be the model itself where its configuration does not tell what it caches, got the "
            f"configuration of {name} (run without weights it raises {type(errors[0]).__name__}: {errors[0]})"
        ) from errors[0]
    logger.warning(
        "%s cannot be run from this configuration alone (%s: %s): what it caches is read from it, and was not seen",
        name,
        type(errors[0]).__name__,
        errors[0],
    )
    return kinds


def _cache_unfilled(config: PreTrainedConfig, attention: str | None = None) -> Cache:
    """As `_cache_of`, of a model without memory for its weights."""
    with torch.device("meta"):
        # In bfloat16, as grouped products of experts know nothing else there. The configuration is written to.
        options = {} if attention is None else {"attn_implementation": attention}
        built = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.bfloat16, **options)
        return _cache_of(built, torch.device("meta"))


def _cache_of_small(config: PreTrainedConfig) -> Cache:
    """As `_cache_of`, of a model that looks at its numbers, and is small enough to have some."""
    with torch.device("meta"):
        numbers = sum(p.numel() for p in AutoModelForCausalLM.from_config(copy.deepcopy(config)).parameters())
    if numbers > SMALL:
        raise InvalidArgumentError(f"model must be small to be built in memory, got {numbers} parameters")
    return _cache_of(AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32), torch.device("cpu"))


def _cache_of(model: Any, device: torch.device) -> Cache:
    """A model's cache after two tokens."""
    cache, was_training = DynamicCache(config=model.config), model.training
    model.eval()
    try:
        model(input_ids=torch.ones(1, 2, dtype=torch.long, device=device), cache=cache, use_cache=True)
    finally:
        model.train(was_training)
    return cache


def _read(config: PreTrainedConfig) -> tuple[LayerKind, ...]:
    """What each layer keeps by the names that most configurations use, where the model cannot be asked."""
    if not MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]._supports_default_dynamic_cache():
        raise UnsupportedModelError(f"{config.model_type} has a cache of its own kind, which no layout holds")
    text = config.get_text_config(decoder=True)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    parts = (Part(heads, width), Part(heads, width))
    if getattr(text, "kv_lora_rank", None):  # latent attention: what is compressed, and the rotated key beside it
        parts = (Part(1, text.kv_lora_rank), Part(1, text.qk_rope_head_dim))

    def kind_of(layer: Any) -> LayerKind:
        has_keys = isinstance(layer, DynamicLayer)
        has_states = isinstance(layer, LinearAttentionLayer)
        window = getattr(layer, "sliding_window", None)
        return LayerKind(parts if has_keys else (), layer.number_of_states if has_states else 0, window)

    return tuple([kind_of(layer) for layer in DynamicCache(config=text).layers])
