"""The main branch's own cache beside ours: its legacy one or its manager, with what explains its differences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ...model.hashing import hash_states
from .released import ReleasedCache, packed_row

__all__ = ["ReleasedCacheOfMain"]


class ReleasedCacheOfMain(ReleasedCache):
    """As `ReleasedCache`, of the main branch: rows are environments by `current_infer_env_ids`, keys are numbers."""

    def __init__(self, world_model: Any, released: type[Any], retrieved: Callable[[], None]) -> None:
        cache = self

        class Observed(released):  # type: ignore[misc]
            def trim_and_pad_kv_cache(self, is_init_infer: bool = True) -> list[int]:
                sizes: list[int] = super().trim_and_pad_kv_cache(is_init_infer)
                retrieved()
                return sizes

            def update_cache_context(self, latent_state: Tensor, is_init_infer: bool = True, **others: Any) -> None:
                super().update_cache_context(latent_state, is_init_infer=is_init_infer, **others)
                env_ids = others.get("env_ids") if is_init_infer else self.current_infer_env_ids
                for row, hashed in enumerate(hash_states(latent_state)):
                    env_id = row if env_ids is None or row >= len(env_ids) else int(env_ids[row])
                    if is_init_infer:
                        cache.role_of_root[env_id, hashed] = cache.role
                    else:
                        cache.env_of_node[hashed] = env_id

        self.model = Observed.__new__(Observed)
        object.__setattr__(self.model, "__dict__", vars(world_model))
        self.role = ""
        self.role_of_root: dict[tuple[int, str], str] = {}  # (environment, key): the role that stored it last
        self.env_of_node: dict[str, int] = {}  # key: the environment that stored it last
        self.roots_cleared_by: dict[int, str] = {}  # environment: the role that cleared its roots last

    def _env(self, row: int) -> int:
        ready = self.model.current_infer_env_ids
        return row if ready is None or row >= len(ready) else int(ready[row])

    def _root(self, env_id: int, key: str) -> Any:
        number = int(key, 16)
        if self.model.use_new_cache_manager:
            return self.model.kv_cache_manager.init_pools[env_id].get(number)
        slot = self.model.past_kv_cache_init_infer_envs[env_id].get(number)
        return None if slot is None else self.model.shared_pool_init_infer[env_id][slot]

    def _node(self, key: str) -> Any:
        number = int(key, 16)
        if self.model.use_new_cache_manager:
            return self.model.kv_cache_manager.recur_pool.get(number)
        slot = self.model.past_kv_cache_recurrent_infer.get(number)
        return None if slot is None else self.model.shared_pool_recur_infer[slot]

    def stored_root(self, row: int, key: str) -> Tensor | None:
        """The root of `key` of a row's environment, `[2 * layers, heads, tokens, head_dim]`."""
        found = self._root(self._env(row), key)
        return None if found is None else packed_row(found)

    def stored_node(self, row: int, key: str) -> Tensor | None:
        """The node of `key`, if it is that of a row's environment: `[2 * layers, heads, tokens, head_dim]`."""
        found = self._node(key) if self.env_of_node.get(key) == self._env(row) else None
        return None if found is None else packed_row(found)

    def clear_nodes(self) -> None:
        """As the model does when a search begins."""
        if self.model.use_new_cache_manager:
            self.model.kv_cache_manager.recur_pool.clear()
        else:
            self.model.past_kv_cache_recurrent_infer.clear()

    def clear_roots(self, row: int, role: str) -> None:
        """As the policy does for an environment whose episode has ended."""
        if self.model.use_new_cache_manager:
            self.model.kv_cache_manager.init_pools[row].clear()
        else:
            self.model.past_kv_cache_init_infer_envs[row].clear()
        self.roots_cleared_by[row] = role

    def why_root(self, row: int, key: str) -> str | None:
        """The defect that explains a wrong context of the root of `key`."""
        env_id = self._env(row)
        if self._root(env_id, key) is None:
            is_of_another_role = self.roots_cleared_by.get(env_id, self.role) != self.role
        else:
            is_of_another_role = self.role_of_root.get((env_id, key), self.role) != self.role
        return "roles collide" if is_of_another_role else None

    def why_node(self, row: int, key: str, *, is_own_node: bool) -> str | None:
        """The defect that explains a wrong context of the node of `key`."""
        env_id = self._env(row)
        if self._root(env_id, key) is not None:
            return "root shadows node" if is_own_node else self.why_root(row, key)
        if self._node(key) is None:
            return None
        return "environments collide" if self.env_of_node.get(key, env_id) != env_id else None

    def forgot(self, row: int, key: str) -> bool:
        """Whether it has neither a root nor a node of `key`."""
        return self._root(self._env(row), key) is None and self._node(key) is None

    def lacks(self, row: int, key: str) -> bool:
        """Nothing raises: what is not stored is computed."""
        return False
