"""LightZero 0.2.0's rings: what its released world model keeps its searches' K and V in. Needs `make lightzero`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.peers.contestants.base import Contestant, EntryStore, SearchStore, UnfitError
from benchmarks.peers.shapes import Shape, Trees, difference_of, root_of

__all__ = ["LightZero"]


class RingSearch(SearchStore):
    """The cache path of a released world model, as its recurrent inference walks it, without the model between.

    A node's key is the hash of its latent state, made at each lookup and at each store: here a state of one number for
    each key, as wide as the model's.
    """

    def __init__(self, shape: Shape, trees: Trees, model: Any) -> None:
        self.shape, self._trees, self._model = shape, trees, model
        width = shape.heads * shape.head_dim
        keys = range(trees.rows * (1 + trees.steps))
        self._states = np.repeat(
            np.arange(len(keys), dtype=np.float32)[:, None, None], width, axis=2
        )  # [key, 1, width]
        self._simulation = 0
        if shape.absolute:
            difference, place = difference_of(shape), (shape.dropped, shape.window - 1)
            model.pos_emb_diff_k = [{place: difference[layer : layer + 1]} for layer in range(shape.layers)]
            model.pos_emb_diff_v = [
                {place: difference[shape.layers + layer : shape.layers + layer + 1]} for layer in range(shape.layers)
            ]
        from lzero.model.unizero_world_models.utils import hash_state

        for row in range(trees.rows):
            entry = model.transformer.generate_empty_keys_values(n=1, max_tokens=shape.window)
            root = root_of(shape, row, trees.root_tokens)
            for layer in range(shape.layers):
                for cache, part in ((entry[layer]._k_cache, layer), (entry[layer]._v_cache, shape.layers + layer)):
                    cache._cache.zero_()
                    cache._cache[0, :, : trees.root_tokens] = root[part]
                    cache._size = trees.root_tokens
            index = model.custom_copy_kv_cache_to_shared_init_envs(entry, row)
            model.past_kv_cache_init_infer_envs[row][hash_state(self._states[row])] = index

    def open(self) -> None:
        self._simulation = 0

    @torch.no_grad()
    def gather(self, keys: Sequence[int]) -> None:
        model = self._model
        model.keys_values_wm_list, model.keys_values_wm_size_list = [], []
        states = self._states[keys]
        model.retrieve_or_generate_kvcache(states, len(keys), self._simulation, np.zeros(len(keys), dtype=np.int64))
        model.keys_values_wm_size_list_current = model.trim_and_pad_kv_cache(is_init_infer=False)

    @torch.no_grad()
    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        cache = self._model.keys_values_wm[layer]
        cache.update(keys, values)
        found: tuple[Tensor, Tensor] = cache.get()
        return found

    def tokens(self) -> Tensor:
        pairs = [self._model.keys_values_wm[layer].get() for layer in range(self.shape.layers)]
        return torch.stack([keys for keys, _ in pairs] + [values for _, values in pairs])

    @torch.no_grad()
    def commit(self, keys: Sequence[int]) -> None:
        model, new = self._model, self._trees.step_tokens
        model.keys_values_wm_size_list_current = [size + new for size in model.keys_values_wm_size_list]
        states = torch.from_numpy(self._states[keys])
        model.update_cache_context(states, is_init_infer=False, simulation_index=self._simulation)
        self._simulation += 1

    def close(self) -> None:
        self._model.past_kv_cache_recurrent_infer.clear()
        self._model.keys_values_wm_list.clear()

    def kv_bytes(self) -> int:
        entries = len(self._model.past_kv_cache_recurrent_infer)
        return entries * self.shape.window * self.shape.token_bytes


class LightZero(Contestant):
    name = "lightzero"
    about = "LightZero 0.2.0's rings, through its world model's own methods; hashes of latent states as keys"

    def searches(self, shape: Shape, trees: Trees, count: int = 1, *, apart: bool = False) -> list[SearchStore]:
        if count > 1:
            raise UnfitError("its world model is for one thread")
        if trees.step_tokens != 2 or shape.dropped != 2 or shape.limit != shape.window - 1:
            raise UnfitError("drops two tokens of a window less one, and knows nothing else")
        try:
            import lzero  # noqa: F401
        except ImportError as error:
            raise UnfitError("LightZero is not installed: make lightzero") from error
        from tests.lightzero_support import SHAPES, make_world_model

        sizes = (shape.layers, shape.heads, shape.heads * shape.head_dim, shape.window, not shape.absolute)
        for known in SHAPES.values():
            if sizes == (
                known.num_layers,
                known.num_heads,
                known.embed_dim,
                known.context_length,
                known.rotary_emb,
            ):
                model = make_world_model(replace(known, env_num=trees.rows, num_simulations=trees.steps), device="cpu")
                return [RingSearch(shape, trees, model)]
        raise UnfitError("no world model of this shape is at hand")

    def entries(self, shape: Shape, tokens: int, capacity: int) -> EntryStore:
        raise UnfitError("for searches only")
