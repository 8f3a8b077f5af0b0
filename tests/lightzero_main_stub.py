"""A small world model with the interface of LightZero's main branch, for where no checkout of it is at hand.

Written for these tests: a transformer that really attends to its K/V, and a world model that keeps contexts for each
environment, in a cache of its own or in a manager with the interface of the main branch's. Names are LightZero's.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from concurrent_kv import hash_state

__all__ = ["StubManager", "StubWorldModel", "stub_config"]


def stub_config(**changes: Any) -> SimpleNamespace:
    """Settings of a world model of two layers in a window of 8 tokens."""
    settings = {
        "num_layers": 2,
        "num_heads": 2,
        "embed_dim": 16,
        "context_length": 8,
        "max_tokens": 20,
        "env_num": 4,
        "num_simulations": 25,
        "action_space_size": 3,
        "rotary_emb": False,
        "device": "cpu",
        "use_new_cache_manager": False,
    }
    return SimpleNamespace(**settings | changes)


class Cache:
    def __init__(self, rows: int, heads: int, room: int, head_dim: int) -> None:
        self._cache = torch.zeros(rows, heads, room, head_dim)
        self._size = 0

    def get(self) -> Tensor:
        return self._cache[:, :, : self._size]

    def update(self, x: Tensor) -> None:
        self._cache[:, :, self._size : self._size + x.shape[2]] = x
        self._size += x.shape[2]


class LayerCache:
    def __init__(self, *sizes: int) -> None:
        self._k_cache, self._v_cache = Cache(*sizes), Cache(*sizes)

    def get(self) -> tuple[Tensor, Tensor]:
        return self._k_cache.get(), self._v_cache.get()

    def update(self, k: Tensor, v: Tensor) -> None:
        self._k_cache.update(k)
        self._v_cache.update(v)


class KeysValues:
    def __init__(self, rows: int, config: Any) -> None:
        sizes = (rows, config.num_heads, config.context_length, config.embed_dim // config.num_heads)
        self._config = config
        self._keys_values = tuple(LayerCache(*sizes) for _ in range(config.num_layers))

    def __getitem__(self, layer: int) -> LayerCache:
        return self._keys_values[layer]

    def __len__(self) -> int:
        return len(self._keys_values)

    @property
    def size(self) -> int:
        return self._keys_values[0]._k_cache._size

    def clone(self) -> KeysValues:
        made = KeysValues(self._keys_values[0]._k_cache._cache.shape[0], self._config)
        for mine, other in zip(caches_of(made), caches_of(self), strict=True):
            mine._cache.copy_(other._cache)
            mine._size = other._size
        return made

    def row(self, row: int, length: int) -> KeysValues:
        """The last `length` tokens of one row, left-aligned."""
        made = KeysValues(1, self._config)
        for mine, other in zip(caches_of(made), caches_of(self), strict=True):
            mine.update(other._cache[row : row + 1, :, other._size - length : other._size])
        return made


def caches_of(kv: Any) -> list[Any]:
    """Of a container of the stub's, or of the manager's that it uses."""
    return [layer._k_cache for layer in kv._keys_values] + [layer._v_cache for layer in kv._keys_values]


class Attention(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.norm = nn.LayerNorm(config.embed_dim)
        self.query, self.key, self.value, self.proj = (nn.Linear(config.embed_dim, config.embed_dim) for _ in range(4))

    def forward(self, x: Tensor, cache: LayerCache | None, lengths: Any) -> Tensor:
        rows, new, dim = x.shape
        normal = self.norm(x)
        q, k, v = (
            each(normal).view(rows, new, self.num_heads, -1).transpose(1, 2)
            for each in (self.query, self.key, self.value)
        )
        past = 0 if cache is None else cache._k_cache._size
        if cache is not None:
            cache.update(k, v)
            k, v = cache.get()
        mask = torch.ones(rows, new, past + new).tril(past)
        if lengths is not None:
            padding = past - torch.as_tensor(lengths).reshape(-1)
            mask = mask * (torch.arange(past + new) >= padding[:, None])[:, None]
        weights = (q @ k.transpose(-2, -1)).masked_fill(mask[:, None] == 0, float("-inf")).softmax(-1)
        attended: Tensor = self.proj((weights @ v).transpose(1, 2).reshape(rows, new, dim))
        return x + attended


class Transformer(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(Attention(config) for _ in range(config.num_layers))
        self.ln_f = nn.LayerNorm(config.embed_dim)

    def generate_empty_keys_values(self, n: int, max_tokens: int) -> KeysValues:
        assert max_tokens == self.config.context_length
        return KeysValues(n, self.config)

    def forward(
        self, x: Tensor, past_keys_values: Any = None, valid_context_lengths: Any = None, start_pos: Any = 0
    ) -> Tensor:
        if start_pos is not None:  # positions that stay in K and V, as rotary ones do
            first = torch.as_tensor(start_pos, dtype=torch.float32).reshape(-1, 1)
            position = first + torch.arange(x.shape[1])
            x = x + torch.sin(position[:, :, None] * torch.arange(1, x.shape[2] + 1) * 0.1)
        for layer, block in enumerate(self.blocks):
            x = block(x, None if past_keys_values is None else past_keys_values[layer], valid_context_lengths)
        normal: Tensor = self.ln_f(x)
        return normal


class StubManager:
    """Dictionaries with the interface of the main branch's `KVCacheManager`."""

    class Pool:
        def __init__(self) -> None:
            self._key_to_index: dict[Any, int] = {}
            self._entries: dict[Any, Any] = {}

        def get(self, cache_key: Any) -> Any:
            return self._entries.get(cache_key)

        def set(self, cache_key: Any, kv_cache: Any) -> int:
            self._entries[cache_key] = kv_cache.clone()
            return self._key_to_index.setdefault(cache_key, len(self._key_to_index))

        def clear(self) -> None:
            self._entries.clear()
            self._key_to_index.clear()

        def __len__(self) -> int:
            return len(self._entries)

    def __init__(self, config: Any, env_num: int, enable_stats: bool = True, **frequencies: int) -> None:
        self.init_pools = [self.Pool() for _ in range(env_num)]
        self.recur_pool = self.Pool()
        self.keys_values_wm_list: list[Any] = []
        self.keys_values_wm_size_list: list[int] = []

    def get_init_cache(self, env_id: int, cache_key: Any) -> Any:
        return self.init_pools[env_id].get(cache_key)

    def set_init_cache(self, env_id: int, cache_key: Any, kv_cache: Any) -> int:
        return self.init_pools[env_id].set(cache_key, kv_cache)

    def get_recur_cache(self, cache_key: Any) -> Any:
        return self.recur_pool.get(cache_key)

    def set_recur_cache(self, cache_key: Any, kv_cache: Any) -> int:
        return self.recur_pool.set(cache_key, kv_cache)

    def hierarchical_get(self, env_id: int, cache_key: Any) -> Any:
        found = self.get_init_cache(env_id, cache_key)
        return self.get_recur_cache(cache_key) if found is None else found

    def clear_recur_cache(self) -> None:
        self.recur_pool.clear()

    def clear_all(self) -> None:
        for pool in (*self.init_pools, self.recur_pool):
            pool.clear()

    def get_stats_summary(self) -> dict[str, Any]:
        return {"stats_enabled": False}


@dataclass
class Output:
    output_sequence: Any
    logits_observations: Any
    logits_rewards: Any
    logits_ends: Any
    logits_policy: Any
    logits_value: Any


class Resets(NamedTuple):
    cache: Any
    offsets: dict[int, int]
    retained_contexts: dict[int, Tensor]


class StubWorldModel(nn.Module):
    """What an attachment sees of the main branch's `WorldModel`; a batch of roots either all begins or all goes on."""

    manager_class: type[Any] = StubManager

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.num_layers: int = config.num_layers
        self.num_heads: int = config.num_heads
        self.embed_dim: int = config.embed_dim
        self.context_length: int = config.context_length
        self.env_num: int = config.env_num
        self.num_simulations: int = config.num_simulations
        self.exact_kv_window_reset = getattr(config, "exact_kv_window_reset", False)
        self.rebuild_kv_window_from_tokens = getattr(config, "rebuild_kv_window_from_tokens", False)
        self.device = torch.device("cpu")
        self.continuous_action_space = False
        self.transformer = Transformer(config)
        self.act_embedding_table = nn.Embedding(config.action_space_size, config.embed_dim)
        self.pos_emb = nn.Embedding(config.max_tokens, config.embed_dim)
        self.heads = nn.ModuleList(nn.Linear(config.embed_dim, size) for size in (config.embed_dim, 5, 3, 5))
        self.hit_count = self.total_query_count = self.root_hit_cnt = self.root_total_query_cnt = 0
        self.kv_padding_total_batches = self.kv_padding_unequal_batches = self.kv_padding_total_samples = 0
        self.kv_padding_padded_samples = self.kv_padding_token_count = self.kv_padding_max_tokens = 0
        self.exact_kv_reset_batches = self.exact_kv_reset_samples = 0
        self.reanalyze_phase = False
        self.current_infer_env_ids: list[int] | None = None
        self.keys_values_wm: Any = None
        self.use_new_cache_manager = config.use_new_cache_manager
        self.keys_values_wm_list: list[Any] = []
        self.keys_values_wm_size_list: list[int] = []
        if self.use_new_cache_manager:
            self.kv_cache_manager = self.manager_class(config=config, env_num=self.env_num)
        else:
            self.past_kv_cache_recurrent_infer: dict[Any, int] = {}
            self.past_kv_cache_init_infer_envs: list[dict[Any, int]] = [{} for _ in range(self.env_num)]
        self.shared_pool_recur_infer: list[Any] = []
        self.shared_pool_init_infer: list[list[Any]] = [[] for _ in range(self.env_num)]
        self.keys_values_wm_token_context_list: list[Tensor] = []
        self.past_token_context_recurrent_infer: dict[Any, Tensor] = {}
        self.past_token_context_init_infer_envs: list[dict[Any, Tensor]] = [{} for _ in range(self.env_num)]
        self.precompute_pos_emb_diff_kv()

    def precompute_pos_emb_diff_kv(self) -> None:
        end = self.context_length - 1

        def differences(name: str) -> list[dict[Any, Tensor]]:
            made = []
            for block in self.transformer.blocks:
                of_position = getattr(block, name)(self.pos_emb.weight).detach()
                heads = of_position.view(1, -1, self.num_heads, self.embed_dim // self.num_heads).transpose(1, 2)
                made.append({(2, end): heads[:, :, : end - 2] - heads[:, :, 2:end]})
            return made

        self.pos_emb_diff_k, self.pos_emb_diff_v = differences("key"), differences("value")

    # The model -------------------------------------------------------------------------------------------------------

    def forward(
        self,
        obs_embeddings_or_act_tokens: dict[str, Tensor],
        past_keys_values: Any = None,
        kvcache_independent: bool = False,
        is_init_infer: bool = True,
        valid_context_lengths: Any = None,
        start_pos: Any = 0,
        search_depth: Any = None,
    ) -> Output:
        (kind, given), *_ = obs_embeddings_or_act_tokens.items()
        x = self.act_embedding_table(given.reshape(-1, 1)) if kind == "act_tokens" else given
        past = 0 if past_keys_values is None else past_keys_values.size
        first: Any = None
        if self.config.rotary_emb:
            depth = np.zeros(x.shape[0]) if is_init_infer else np.asarray(search_depth) + 1
            first = (np.asarray(start_pos) + depth) * 2 - (kind == "act_tokens")
        else:
            lengths = [past] * x.shape[0] if valid_context_lengths is None else valid_context_lengths
            x = x + self.pos_emb(torch.as_tensor(lengths).reshape(-1, 1) + torch.arange(x.shape[1]))
        hidden = self.transformer(x, past_keys_values, valid_context_lengths, first)
        observation, reward, policy, value = (head(hidden) for head in self.heads)
        return Output(hidden, observation, reward, None, policy, value)

    @staticmethod
    def _variable_context_lengths(context_lengths: list[int]) -> list[int] | None:
        return None if min(context_lengths) == max(context_lengths) else context_lengths

    def _append_inference_token_context(self, tokens: Tensor) -> None:
        new = tokens.reshape(len(self.keys_values_wm_token_context_list), -1, self.embed_dim)
        self.keys_values_wm_token_context_list = [
            torch.cat([before, after])
            for before, after in zip(self.keys_values_wm_token_context_list, new, strict=True)
        ]

    # Roots -----------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def forward_initial_inference(self, obs_act_dict: dict[str, Any], start_pos: Any = 0) -> tuple[Any, ...]:
        current = obs_act_dict["current_obs"].unsqueeze(1)
        self.latent_state = current
        output = self.wm_forward_for_initial_infererence(
            obs_act_dict["obs"].unsqueeze(1),
            obs_act_dict["action"],
            current,
            start_pos,
            obs_act_dict.get("ready_env_id"),
        )
        if self.use_new_cache_manager:
            self.kv_cache_manager.clear_recur_cache()
        else:
            self.past_kv_cache_recurrent_infer.clear()
        self.past_token_context_recurrent_infer.clear()
        return output.output_sequence, current, output.logits_rewards, output.logits_policy, output.logits_value

    @torch.no_grad()
    def wm_forward_for_initial_infererence(
        self,
        last_obs_embeddings: Tensor,
        batch_action: Any = None,
        current_obs_embeddings: Any = None,
        start_pos: Any = 0,
        ready_env_id: Any = None,
    ) -> Any:
        rows = current_obs_embeddings.shape[0]
        env_ids = list(range(rows)) if ready_env_id is None else [int(env_id) for env_id in ready_env_id]
        self.current_infer_env_ids = env_ids
        is_first = [int(action) == -1 for action in batch_action]
        if any(is_first) and not all(is_first):
            merged: dict[int, list[Any]] = {}
            for group in ([r for r in range(rows) if is_first[r]], [r for r in range(rows) if not is_first[r]]):
                output = self.wm_forward_for_initial_infererence(
                    last_obs_embeddings[group],
                    [batch_action[row] for row in group],
                    current_obs_embeddings[group],
                    np.asarray(start_pos)[group],
                    [env_ids[row] for row in group],
                )
                for number, row in enumerate(group):
                    merged[row] = [None if part is None else part[number] for part in vars(output).values()]
            self.current_infer_env_ids = env_ids
            parts = zip(*[merged[row] for row in range(rows)], strict=True)
            return Output(*[None if part[0] is None else torch.stack(part) for part in parts])
        seen = {"obs_embeddings": current_obs_embeddings}
        lengths = None
        if all(is_first):
            self.keys_values_wm = self.transformer.generate_empty_keys_values(rows, self.context_length)
            output = self.forward(seen, past_keys_values=self.keys_values_wm, start_pos=start_pos)
            self.keys_values_wm_token_context_list = [current_obs_embeddings[row] for row in range(rows)]
        else:
            states = [last_obs_embeddings[row] for row in range(rows)]
            found = [self._root(env_id, state) for env_id, state in zip(env_ids, states, strict=True)]
            self.root_total_query_cnt += rows
            self.root_hit_cnt += sum(each is not None for each in found)
            self._fill(found, states, start_pos)
            lengths = self.keys_values_wm_size_list_current = self.trim_and_pad_kv_cache(is_init_infer=True)
            acted = torch.as_tensor(np.array(batch_action))
            if self.rebuild_kv_window_from_tokens:
                self._append_inference_token_context(self.act_embedding_table(acted))
                self._append_inference_token_context(current_obs_embeddings)
            for step in ({"act_tokens": acted}, seen):
                output = self.forward(
                    step,
                    past_keys_values=self.keys_values_wm,
                    valid_context_lengths=self._variable_context_lengths(lengths),
                    start_pos=start_pos,
                )
                lengths = [length + 1 for length in lengths]
            self.keys_values_wm_size_list_current = lengths
        self.update_cache_context(
            current_obs_embeddings, is_init_infer=True, valid_context_lengths=lengths, env_ids=env_ids
        )
        return output

    def _root(self, env_id: int, state: Tensor) -> tuple[Any, Any] | None:
        key = hash_state(state.numpy())
        tokens = self.past_token_context_init_infer_envs[env_id].get(key)
        if self.use_new_cache_manager:
            kv = self.kv_cache_manager.get_init_cache(env_id=env_id, cache_key=key)
            return None if kv is None else (kv, tokens)
        index = self.past_kv_cache_init_infer_envs[env_id].get(key)
        return None if index is None else (self.shared_pool_init_infer[env_id][index], tokens)

    def _node(self, env_id: int, state: Tensor) -> tuple[Any, Any] | None:
        key = hash_state(state.numpy())
        root = self._root(env_id, state)
        if root is not None:
            return root
        tokens = self.past_token_context_recurrent_infer.get(key)
        if self.use_new_cache_manager:
            kv = self.kv_cache_manager.get_recur_cache(cache_key=key)
            return None if kv is None else (kv, tokens)
        index = self.past_kv_cache_recurrent_infer.get(key)
        return None if index is None else (self.shared_pool_recur_infer[index], tokens)

    def _fill(self, found: list[Any], states: list[Tensor], start_pos: Any) -> None:
        """The contexts of a batch, with that of the state alone where none was found."""
        contexts, tokens = [], []
        for row, (each, state) in enumerate(zip(found, states, strict=True)):
            if each is None:
                kv = self.transformer.generate_empty_keys_values(1, self.context_length)
                position = int(np.asarray(start_pos).reshape(-1)[row])
                self.forward({"obs_embeddings": state.unsqueeze(0)}, past_keys_values=kv, start_pos=position)
                each = kv, state.reshape(-1, self.embed_dim)
            contexts.append(each[0].clone())
            tokens.append(each[1])
        self.keys_values_wm_list = contexts
        self.keys_values_wm_size_list = [kv.size for kv in contexts]
        self.keys_values_wm_token_context_list = tokens

    # Nodes -----------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def forward_recurrent_inference(
        self, state_action_history: Any, simulation_index: int = 0, search_depth: Any = None, start_pos: Any = 0
    ) -> tuple[Any, ...]:
        latest_state, action = state_action_history[-1]
        self.keys_values_wm_size_list = self.retrieve_or_generate_kvcache(
            latest_state, latest_state.shape[0], simulation_index, start_pos
        )
        lengths = self.keys_values_wm_size_list_current = self.trim_and_pad_kv_cache(is_init_infer=False)
        token = action.reshape(-1, 1)
        outputs = []
        for kind in ("act_tokens", "obs_embeddings"):
            if self.rebuild_kv_window_from_tokens:
                embedded = self.act_embedding_table(token) if kind == "act_tokens" else token
                self._append_inference_token_context(embedded)
            output = self.forward(
                {kind: token},
                past_keys_values=self.keys_values_wm,
                is_init_infer=False,
                valid_context_lengths=self._variable_context_lengths(lengths),
                start_pos=start_pos,
                search_depth=search_depth,
            )
            lengths = self.keys_values_wm_size_list_current = [length + 1 for length in lengths]
            outputs.append(output)
            token = output.logits_observations
        acted, observed = outputs
        self.latent_state = acted.logits_observations
        self.update_cache_context(self.latent_state, is_init_infer=False, simulation_index=simulation_index)
        return (
            observed.output_sequence,
            self.latent_state,
            acted.logits_rewards,
            observed.logits_policy,
            observed.logits_value,
        )

    @staticmethod
    def _reanalysis_root_start_position(start_pos: Any, root_index: int, root_count: int) -> int:
        return int(np.asarray(start_pos).reshape(-1)[root_index])

    def retrieve_or_generate_kvcache(
        self, latent_state: Any, ready_env_num: int, simulation_index: int = 0, start_pos: Any = 0
    ) -> list[int]:
        states = [torch.from_numpy(latent_state[row]) for row in range(ready_env_num)]
        env_ids = self.current_infer_env_ids or list(range(ready_env_num))
        is_looked_up = not self.reanalyze_phase or ready_env_num <= self.env_num
        found = [self._node(env_ids[row], state) if is_looked_up else None for row, state in enumerate(states)]
        self.total_query_count += ready_env_num
        self.hit_count += sum(each is not None for each in found)
        self._fill(found, states, start_pos)
        return self.keys_values_wm_size_list

    def trim_and_pad_kv_cache(self, is_init_infer: bool = True) -> list[int]:
        lengths = self.keys_values_wm_size_list
        longest = max(lengths)
        padding = [longest - length for length in lengths]
        self.kv_padding_total_batches += 1
        self.kv_padding_total_samples += len(padding)
        self.kv_padding_unequal_batches += any(padding)
        self.kv_padding_padded_samples += sum(map(bool, padding))
        self.kv_padding_token_count += sum(padding)
        self.kv_padding_max_tokens = max(self.kv_padding_max_tokens, *padding)
        batch = self.transformer.generate_empty_keys_values(len(lengths), self.context_length)
        for row, kv in enumerate(self.keys_values_wm_list):
            for mine, other in zip(caches_of(batch), caches_of(kv), strict=True):
                mine._cache[row, :, longest - other._size : longest] = other.get()[0]
                mine._size = longest
        self.keys_values_wm = batch
        return lengths

    def update_cache_context(
        self,
        latent_state: Tensor,
        is_init_infer: bool = True,
        simulation_index: int = 0,
        search_depth: Any = None,
        valid_context_lengths: Any = None,
        env_ids: Any = None,
    ) -> None:
        rows = latent_state.shape[0]
        lengths = valid_context_lengths if is_init_infer else self.keys_values_wm_size_list_current
        lengths = [self.keys_values_wm.size] * rows if lengths is None else lengths
        env_ids = list(range(rows)) if env_ids is None else env_ids
        resets = Resets(None, {}, {})
        if self.exact_kv_window_reset or self.rebuild_kv_window_from_tokens:
            resets = self._prepare_exact_cache_resets(latent_state, lengths)
        end = self.context_length - 1
        for row, length in enumerate(lengths):
            if row in resets.offsets:
                kv = resets.cache.row(resets.offsets[row], resets.cache.size)
            else:
                kv = self.keys_values_wm.row(row, length)
                if length >= end:
                    kv = kv.row(0, length - 2)
                    if not self.config.rotary_emb:
                        for layer in range(self.num_layers):
                            kv[layer]._k_cache.get().add_(self.pos_emb_diff_k[layer][2, end])
                            kv[layer]._v_cache.get().add_(self.pos_emb_diff_v[layer][2, end])
            tokens = None
            if self.rebuild_kv_window_from_tokens:
                tokens = resets.retained_contexts.get(row, self.keys_values_wm_token_context_list[row])
            self._store(env_ids[row] if is_init_infer else None, hash_state(latent_state[row].numpy()), kv, tokens)

    def _store(self, env_id: int | None, key: Any, kv: Any, tokens: Any) -> None:
        """A root of an environment, or where that is None a node."""
        if tokens is not None:
            side = self.past_token_context_recurrent_infer
            (side if env_id is None else self.past_token_context_init_infer_envs[env_id])[key] = tokens
        if self.use_new_cache_manager and env_id is None:
            self.kv_cache_manager.set_recur_cache(cache_key=key, kv_cache=kv)
        elif self.use_new_cache_manager:
            self.kv_cache_manager.set_init_cache(env_id=env_id, cache_key=key, kv_cache=kv)
        elif env_id is None:
            self.past_kv_cache_recurrent_infer[key] = len(self.shared_pool_recur_infer)
            self.shared_pool_recur_infer.append(kv)
        else:
            self.past_kv_cache_init_infer_envs[env_id][key] = len(self.shared_pool_init_infer[env_id])
            self.shared_pool_init_infer[env_id].append(kv)

    def _prepare_exact_cache_resets(self, latent_state: Tensor, effective_sizes: list[int]) -> Resets:
        over = [row for row, size in enumerate(effective_sizes) if size >= self.context_length - 1]
        if not over:
            return Resets(None, {}, {})
        self.exact_kv_reset_batches += 1
        self.exact_kv_reset_samples += len(over)
        kept = self.context_length - 3
        retained = {}
        if self.rebuild_kv_window_from_tokens:
            retained = {row: self.keys_values_wm_token_context_list[row][-kept:] for row in over}
        x = torch.stack([retained[row] for row in over]) if retained else latent_state[over]
        start = 0 if self.config.rotary_emb else None
        if not self.config.rotary_emb:
            x = x + self.pos_emb(torch.arange(x.shape[1]))
        cache = self.transformer.generate_empty_keys_values(len(over), self.context_length)
        self.transformer(x, past_keys_values=cache, start_pos=start)
        return Resets(cache, {row: number for number, row in enumerate(over)}, retained)

    def clear_caches(self) -> None:
        self.current_infer_env_ids = None
        for tokens in (*self.past_token_context_init_infer_envs, self.past_token_context_recurrent_infer):
            tokens.clear()
        self.keys_values_wm_token_context_list.clear()
        if self.use_new_cache_manager:
            self.kv_cache_manager.clear_all()
            return
        for roots in self.past_kv_cache_init_infer_envs:
            roots.clear()
        self.past_kv_cache_recurrent_infer.clear()
        self.keys_values_wm_list.clear()
