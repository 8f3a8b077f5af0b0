"""The main branch's `WorldModel` with its cache replaced: what it needs beside what 0.2.0's attached class does."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch

from ...errors import InvalidArgumentError
from .attachment import Attachment
from .containers import LightZeroKeysValues
from .contexts import generate_contexts, node_contexts, root_contexts
from .main_contexts import commit_nodes_of_main, store_roots_of_main, take_tokens
from .manager_view import ManagerView
from .model import ATTACHMENT, check_rows, of_the_search

__all__ = ["begins_of", "make_class_of_main"]

OF_A_SEARCH = ("current_infer_env_ids", "keys_values_wm_token_context_list")


def make_class_of_main(base: type[Any]) -> type[Any]:
    """Of the attached class of a world model of the main branch, the one that knows what is the main branch's own."""

    class AttachedOfMain(base):  # type: ignore[misc]
        """See `concurrent_kv.compat.lightzero.attach`."""

        _is_attached = True

        @torch.no_grad()
        def wm_forward_for_initial_infererence(
            self,
            last_obs_embeddings: torch.Tensor,
            batch_action: Any = None,
            current_obs_embeddings: torch.Tensor | None = None,
            start_pos: Any = 0,
            ready_env_id: Any = None,
        ) -> Any:
            """The roots of the next search; where targets are computed, what the replaced class does."""
            released = super(base, self).wm_forward_for_initial_infererence
            if current_obs_embeddings is None:
                return released(last_obs_embeddings, batch_action, None, start_pos)
            arguments = (last_obs_embeddings, batch_action, current_obs_embeddings, start_pos, ready_env_id)
            kv: Attachment = self.__dict__[ATTACHMENT]
            check_rows(kv, max(current_obs_embeddings.shape[0], last_obs_embeddings.shape[0]))
            if not kv.session.is_split:
                kv.session.begin()
                if _is_mixed(self, batch_action):
                    # The model's own method parts it, and comes back here with each part.
                    kv.session.is_split = True
                    try:
                        return released(*arguments)
                    finally:
                        kv.session.is_split = False
            if kv.validation is not None:
                return kv.validation.root(self, kv, partial(_roots, self, kv), arguments)
            return _roots(self, kv, *arguments)

        def retrieve_or_generate_kvcache(
            self, latent_state: Any, ready_env_num: int, simulation_index: int = 0, start_pos: Any = 0
        ) -> list[int]:
            """The parents' contexts as one batch, which the model runs on; returns each row's length."""
            kv: Attachment = self.__dict__[ATTACHMENT]

            def position_of(row: int) -> int:
                if self.reanalyze_phase:
                    return int(self._reanalysis_root_start_position(start_pos, row, ready_env_num))
                return _position(start_pos, row)

            if self.reanalyze_phase and ready_env_num > self.env_num:
                positions = [position_of(row) for row in range(ready_env_num)]
                lengths = generate_contexts(self, kv, latent_state, ready_env_num, positions)
                states = torch.as_tensor(latent_state, device=self.device)
                self.keys_values_wm_token_context_list = [each.reshape(-1, self.embed_dim) for each in states]
                return lengths
            check_rows(kv, ready_env_num)
            lengths = node_contexts(self, kv, latent_state, ready_env_num, position_of)
            if self.rebuild_kv_window_from_tokens:
                take_tokens(self, kv, latent_state)
            if self.reanalyze_phase:
                _count_seeds(self, kv)
            return lengths

        def trim_and_pad_kv_cache(self, is_init_infer: bool = True) -> list[int]:
            """Contexts are gathered into the model's layout; what they lack of the longest is counted."""
            lengths: list[int] = super().trim_and_pad_kv_cache(is_init_infer)
            longest = max(lengths)
            padding = [longest - length for length in lengths if length < longest]
            kv: Attachment = self.__dict__[ATTACHMENT]
            kv.count(
                self,
                kv_padding_total_batches=1,
                kv_padding_total_samples=len(lengths),
                kv_padding_unequal_batches=int(bool(padding)),
                kv_padding_padded_samples=len(padding),
                kv_padding_token_count=sum(padding),
            )
            attributes = self.__dict__
            attributes["kv_padding_max_tokens"] = max(attributes["kv_padding_max_tokens"], 0, *padding)
            return lengths

        def update_cache_context(
            self,
            latent_state: torch.Tensor,
            is_init_infer: bool = True,
            simulation_index: int = 0,
            search_depth: Any = None,
            valid_context_lengths: Any = None,
            env_ids: Any = None,
        ) -> None:
            """Store what the model appended, under the states that it led to."""
            kv: Attachment = self.__dict__[ATTACHMENT]
            if is_init_infer:
                store_roots_of_main(self, kv, latent_state, valid_context_lengths, env_ids)
            else:
                commit_nodes_of_main(self, kv, latent_state)

        def seed_reanalysis_root_caches(
            self, latent_state_roots: Any, root_token_contexts: Any, task_id: int | None = None
        ) -> Any:
            """What the replaced class does, which stores roots; in validation, in both caches."""
            seeded = super().seed_reanalysis_root_caches(latent_state_roots, root_token_contexts, task_id)
            kv: Attachment = self.__dict__[ATTACHMENT]
            if kv.validation is not None:
                kv.validation.seed(self, kv, (latent_state_roots, root_token_contexts, task_id))
            return seeded

        def clear_caches(self) -> None:
            """Clear every pool, and end the calling thread's search."""
            super().clear_caches()
            self.current_infer_env_ids = None
            self.keys_values_wm_token_context_list = []
            getattr(self, "_reanalysis_seeded_root_keys", set()).clear()

        @property
        def kv_cache_manager(self) -> ManagerView:
            """What LightZero's policies do with the main branch's manager, of the attached pools."""
            return ManagerView(self.__dict__[ATTACHMENT])

        @kv_cache_manager.setter
        def kv_cache_manager(self, manager: Any) -> None:
            raise InvalidArgumentError(
                "kv_cache_manager is not used while the world model is attached: detach first, or attach with manager="
            )

    for name in OF_A_SEARCH:
        setattr(AttachedOfMain, name, of_the_search(name))
    AttachedOfMain.__name__ = AttachedOfMain.__qualname__ = base.__name__
    AttachedOfMain.__module__ = base.__module__
    return AttachedOfMain


def _roots(
    world_model: Any,
    kv: Attachment,
    last_obs_embeddings: torch.Tensor,
    batch_action: Any,
    current_obs_embeddings: torch.Tensor,
    start_pos: Any,
    ready_env_id: Any,
) -> Any:
    """The model's outputs for roots that all begin an episode, or all follow a previous one; they are stored."""
    rows, session = current_obs_embeddings.shape[0], kv.session
    ready = list(range(rows)) if ready_env_id is None else [int(env_id) for env_id in ready_env_id]
    if len(ready) != rows:
        raise InvalidArgumentError(f"ready_env_id must have one id for each of {rows} observations, got {len(ready)}")
    session.current_infer_env_ids = ready
    observed = {"obs_embeddings": current_obs_embeddings}
    keeps_tokens = world_model.rebuild_kv_window_from_tokens
    if begins_of(world_model, batch_action)[0]:
        contexts = LightZeroKeysValues.empty(kv.layout, rows)
        world_model.keys_values_wm = contexts
        outputs = world_model.forward(observed, past_keys_values=contexts, is_init_infer=True, start_pos=start_pos)
        if keeps_tokens:
            session.keys_values_wm_token_context_list = [each.detach() for each in current_obs_embeddings]
        world_model.update_cache_context(current_obs_embeddings, is_init_infer=True, env_ids=ready)
        return outputs
    positions = [_position(start_pos, row) for row in range(rows)]
    session.keys_values_wm_size_list = root_contexts(world_model, kv, last_obs_embeddings, rows, positions)
    if keeps_tokens:
        take_tokens(world_model, kv, last_obs_embeddings)
    lengths = world_model.trim_and_pad_kv_cache(is_init_infer=True)
    actions = torch.from_numpy(np.array(batch_action[:rows])).to(last_obs_embeddings.device)
    acted = actions.unsqueeze(1 if world_model.continuous_action_space else -1)
    if keeps_tokens:
        world_model._append_inference_token_context(world_model.act_embedding_table(acted.squeeze(1)))
        world_model._append_inference_token_context(current_obs_embeddings)
    for step in ({"act_tokens": acted}, observed):
        session.keys_values_wm_size_list_current = lengths
        outputs = world_model.forward(
            step,
            past_keys_values=session.keys_values_wm,
            is_init_infer=True,
            valid_context_lengths=world_model._variable_context_lengths(lengths),
            start_pos=start_pos[:rows],
        )
        lengths = [length + 1 for length in lengths]
    session.keys_values_wm_size_list_current = lengths
    world_model.update_cache_context(
        current_obs_embeddings, is_init_infer=True, valid_context_lengths=lengths, env_ids=ready
    )
    return outputs


def begins_of(world_model: Any, batch_action: Any) -> list[bool]:
    """Whether each row begins an episode. With continuous actions the first row says it for all, as in LightZero."""
    if world_model.continuous_action_space:
        return [not isinstance(batch_action[0], np.ndarray)]
    return [int(action) == -1 for action in batch_action]


def _is_mixed(world_model: Any, batch_action: Any) -> bool:
    return len(set(begins_of(world_model, batch_action))) > 1


def _position(start_pos: Any, row: int) -> int:
    """The position of a row, of one for all or of one for each."""
    return int(start_pos if np.ndim(start_pos) == 0 else start_pos[row])


def _count_seeds(world_model: Any, kv: Attachment) -> None:
    """Count the seeded roots that were found, each once, as LightZero does."""
    seeds, batch = getattr(world_model, "_reanalysis_seeded_root_keys", None), kv.session.batch
    if not seeds or batch is None:
        return
    ids = kv.env_ids
    for (env_id, hashed), is_found in zip(kv.session.keys, batch.hits, strict=True):
        seed = (ids.index(env_id), int(hashed, 16))
        if is_found and seed in seeds:
            seeds.remove(seed)
            kv.count(world_model, reanalysis_root_seed_hit_count=1)
