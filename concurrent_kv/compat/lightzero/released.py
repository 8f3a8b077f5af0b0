"""The released cache beside ours: the same model as it was released, which remembers whose bytes each slot holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...model.hashing import hash_states

__all__ = ["ReleasedCache", "packed_row"]


class ReleasedCache:
    """A world model of the released class over the attributes of an attached one: weights, settings and its own cache.

    What the attached class keeps for each thread is not among these attributes: the two caches never meet.

    Args:
        world_model: the attached model.
        released: its class before it was attached.
        retrieved: called when a batch of contexts was retrieved, before the model runs on it.
    """

    def __init__(self, world_model: Any, released: type[Any], retrieved: Callable[[], None]) -> None:
        cache = self

        class Observed(released):  # type: ignore[misc]
            def trim_and_pad_kv_cache(self, is_init_infer: bool = True) -> list[int]:
                sizes: list[int] = super().trim_and_pad_kv_cache(is_init_infer)
                retrieved()
                return sizes

            def update_cache_context(self, latent_state: Tensor, is_init_infer: bool = True, **others: Any) -> None:
                first = self.shared_pool_index
                roots = list(self.shared_pool_index_init_envs)
                super().update_cache_context(latent_state, is_init_infer=is_init_infer, **others)
                for row, key in enumerate(hash_states(latent_state)):
                    if is_init_infer:
                        cache.root_in[row, roots[row]] = key
                        cache.root_by[row, roots[row]] = cache.role
                    else:
                        cache.node_in[(first + row) % self.shared_pool_size] = (row, key)

        self.model: Any = Observed.__new__(Observed)
        object.__setattr__(self.model, "__dict__", vars(world_model))
        self.root_in: dict[tuple[int, int], str] = {}  # (row, slot) of the roots' rings: the key stored there last
        self.root_by: dict[tuple[int, int], str] = {}  # the role that stored it
        self.roots_cleared_by: dict[int, str] = {}  # row: the role that cleared its roots last
        self.role = ""  # whose call is under way
        self.node_in: dict[int, tuple[int, str]] = {}  # slot of the nodes' ring: row and key stored there last

    # What it holds ---------------------------------------------------------------------------------------------------

    def contexts(self) -> Tensor:
        """The batch that the model is about to run on, `[2 * layers, batch, heads, size, head_dim]`; a copy."""
        layers = self.model.keys_values_wm._keys_values
        size = layers[0]._k_cache._size
        caches = [layer._k_cache for layer in layers] + [layer._v_cache for layer in layers]
        return torch.stack([cache._cache[:, :, :size] for cache in caches])

    def put_contexts(self, packed: Tensor, lengths: list[int]) -> None:
        """Let the model run on these contexts instead."""
        layers = self.model.keys_values_wm._keys_values
        window = self.model.context_length
        room = packed.new_zeros((*packed.shape[:3], window - packed.shape[3], packed.shape[4]))
        full = torch.cat([packed, room], dim=3)
        for number, layer in enumerate(layers):
            layer._k_cache._cache = full[number].clone()
            layer._v_cache._cache = full[len(layers) + number].clone()
            layer._k_cache._size = layer._v_cache._size = packed.shape[3]
        self.model.keys_values_wm_size_list[:] = lengths

    def put_roots(self, keys: list[str], roots: list[Tensor | None]) -> None:
        """Store these roots, as the start of a search would; None is one that has been cleared meanwhile."""
        for row, (key, root) in enumerate(zip(keys, roots, strict=True)):
            if root is None:
                continue
            slot = self.model.custom_copy_kv_cache_to_shared_init_envs(self._single(root), row)
            self.model.past_kv_cache_init_infer_envs[row][key] = slot
            self.root_in[row, slot] = key
            self.root_by[row, slot] = self.role

    def stored_root(self, row: int, key: str) -> Tensor | None:
        """The root stored last in an environment, if it is that of `key`: `[2 * layers, heads, tokens, head_dim]`."""
        slot = self.model.past_kv_cache_init_infer_envs[row].get(key)
        if slot is None or self.root_in[row, slot] != key:
            return None
        return packed_row(self.model.shared_pool_init_infer[row][slot])

    def stored_node(self, row: int, key: str) -> Tensor | None:
        """The node of `key`, if it is that of this row: `[2 * layers, heads, tokens, head_dim]`."""
        slot = self.model.past_kv_cache_recurrent_infer.get(key)
        if slot is None or self.node_in[slot] != (row, key):
            return None
        return packed_row(self.model.shared_pool_recur_infer[slot])

    def put_nodes(self, keys: list[str], nodes: list[Tensor]) -> None:
        """Store these nodes, as the end of a step would."""
        for row, (key, node) in enumerate(zip(keys, nodes, strict=True)):
            slot = self.model.custom_copy_kv_cache_to_shared_recur(self._single(node))
            self.model.past_kv_cache_recurrent_infer[key] = slot
            self.node_in[slot] = (row, key)

    def _single(self, row: Tensor) -> Any:
        """LightZero's container with the tokens of one row, `[2 * layers, heads, tokens, head_dim]`."""
        single = self.model.transformer.generate_empty_keys_values(n=1, max_tokens=self.model.context_length)
        layers, size = len(single), row.shape[2]
        for number, layer in enumerate(single._keys_values):
            layer._k_cache._cache[0, :, :size] = row[number]
            layer._v_cache._cache[0, :, :size] = row[layers + number]
            layer._k_cache._size = layer._v_cache._size = size
        return single

    def clear_nodes(self) -> None:
        """As `past_kv_cache_recurrent_infer.clear()`."""
        self.model.past_kv_cache_recurrent_infer.clear()

    def clear_roots(self, row: int, role: str) -> None:
        """As `past_kv_cache_init_infer_envs[row].clear()`."""
        self.model.past_kv_cache_init_infer_envs[row].clear()
        self.roots_cleared_by[row] = role

    # Why it answers what it does -------------------------------------------------------------------------------------

    def has_root(self, row: int, key: str) -> bool:
        """Whether a row has a root of `key`, right or wrong."""
        return key in self.model.past_kv_cache_init_infer_envs[row]

    def why_missed(self, row: int, key: str, found: str) -> str | None:
        """The defect that explains that the root of `key` is not found, where ours found it under `found`."""
        roots = self.model.past_kv_cache_init_infer_envs
        if key in roots[row] or self.roots_cleared_by.get(row, self.role) != self.role:
            return None
        if found in roots[row]:
            return "roots by rounding"
        return "roots by row" if any(found in of_a_row for of_a_row in roots) else None

    def why_root(self, row: int, key: str) -> str | None:
        """The defect that explains a wrong context of the root of `key`."""
        slot = self.model.past_kv_cache_init_infer_envs[row].get(key)
        if slot is None:
            is_of_another_role = self.roots_cleared_by.get(row, self.role) != self.role
        elif self.root_in[row, slot] != key:
            return "stale root"
        else:
            is_of_another_role = self.root_by[row, slot] != self.role
        return "roles collide" if is_of_another_role else None

    def why_node(self, row: int, key: str, *, is_own_node: bool) -> str | None:
        """The defect that explains a wrong context of the node of `key`.

        `is_own_node`: whether ours found it among the search's nodes.
        """
        slot = self.model.past_kv_cache_init_infer_envs[row].get(key)
        if slot is not None:
            return "root shadows node" if is_own_node and self.root_in[row, slot] == key else self.why_root(row, key)
        slot = self.model.past_kv_cache_recurrent_infer.get(key)
        if slot is None:
            return None
        row_in, key_in = self.node_in[slot]
        if key_in != key:
            return "stale node"
        return "environments collide" if row_in != row else None

    def lacks(self, row: int, key: str) -> bool:
        """Whether looking the node of `key` up raises."""
        return (
            self.model.past_kv_cache_init_infer_envs[row].get(key) is None
            and self.model.past_kv_cache_recurrent_infer.get(key) is None
        )


def packed_row(kv: Any) -> Tensor:
    """One row of LightZero's container, `[2 * layers, heads, tokens, head_dim]`; a copy."""
    layers = kv._keys_values
    caches = [layer._k_cache for layer in layers] + [layer._v_cache for layer in layers]
    return torch.stack([cache._cache[0, :, : cache._size] for cache in caches])
