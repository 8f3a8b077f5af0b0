"""The main branch's `WorldModelMT` with its cache replaced: tasks instead of positions, each with rows of its own."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ...errors import InvalidArgumentError
from .attachment import Attachment
from .containers import LightZeroKeysValues
from .contexts import generate_contexts, node_contexts, run_on, state_alone
from .main_contexts import take_tokens
from .main_model import begins_of
from .model import ATTACHMENT
from .views import Entries, KeyIndex, init_views

__all__ = ["make_class_of_tasks"]


def make_class_of_tasks(base: type[Any]) -> type[Any]:
    """Of the attached class of a `WorldModelMT` as one of the main branch, the one that knows tasks."""

    class AttachedOfTasks(base):  # type: ignore[misc]
        """See `concurrent_kv.compat.lightzero.attach`."""

        _is_attached = True

        @torch.no_grad()
        def wm_forward_for_initial_inference(
            self,
            last_obs_embeddings: torch.Tensor,
            batch_action: Any = None,
            current_obs_embeddings: torch.Tensor | None = None,
            task_id: int = 0,
        ) -> Any:
            """The roots of a task's next search; where targets are computed, what the replaced class does."""
            if current_obs_embeddings is None:
                return super().wm_forward_for_initial_inference(last_obs_embeddings, batch_action, None, task_id)
            kv: Attachment = self.__dict__[ATTACHMENT]
            _choose(self, kv, task_id, max(current_obs_embeddings.shape[0], last_obs_embeddings.shape[0]))
            kv.session.begin()
            return _roots(self, kv, last_obs_embeddings, batch_action, current_obs_embeddings, task_id)

        def forward_recurrent_inference(
            self,
            state_action_history: Any,
            simulation_index: int = 0,
            latent_state_index_in_search_path: Any = (),
            task_id: int = 0,
        ) -> Any:
            """What the replaced class does, on our contexts."""
            return super().forward_recurrent_inference(
                state_action_history, simulation_index, latent_state_index_in_search_path, task_id
            )

        def retrieve_or_generate_kvcache(
            self, latent_state: Any, ready_env_num: int, simulation_index: int = 0, task_id: int = 0
        ) -> list[int]:
            """The parents' contexts as one batch, which the model runs on; returns each row's length."""
            kv: Attachment = self.__dict__[ATTACHMENT]
            is_looked_up = not self.reanalyze_phase
            if is_looked_up:
                _choose(self, kv, task_id, ready_env_num)
                lengths = node_contexts(self, kv, latent_state, ready_env_num, lambda row: task_id)
            else:
                lengths = generate_contexts(self, kv, latent_state, ready_env_num, [task_id] * ready_env_num)
            if self.rebuild_kv_window_from_tokens:
                states = torch.as_tensor(np.asarray(latent_state), device=self.device)
                states = self._observation_tokens_without_position(states)
                if is_looked_up:
                    take_tokens(self, kv, states)
                else:
                    self.keys_values_wm_token_context_list = [state.detach() for state in states]
            return lengths

        def update_cache_context(
            self,
            latent_state: torch.Tensor,
            is_init_infer: bool = True,
            simulation_index: int = 0,
            latent_state_index_in_search_path: Any = (),
            valid_context_lengths: Any = None,
        ) -> None:
            """Store what the model appended, under the states that it led to."""
            env_ids = self.__dict__[ATTACHMENT].session.current_infer_env_ids
            super().update_cache_context(
                latent_state, is_init_infer, valid_context_lengths=valid_context_lengths, env_ids=env_ids
            )

        @property
        def past_kv_cache_init_infer_envs(self) -> Any:
            """The roots of each row, of all tasks, by key. Assigning empty ones clears them all."""
            views, rows = init_views(self.__dict__[ATTACHMENT]), self.env_num
            return [_of_all_tasks(views[row::rows]) for row in range(rows)]

        @past_kv_cache_init_infer_envs.setter
        def past_kv_cache_init_infer_envs(self, roots: Any) -> None:
            base.past_kv_cache_init_infer_envs.fset(self, roots)

    AttachedOfTasks.__name__ = AttachedOfTasks.__qualname__ = base.__name__
    AttachedOfTasks.__module__ = base.__module__
    return AttachedOfTasks


def _of_all_tasks(views: list[KeyIndex]) -> KeyIndex:
    """One row's roots, which the main branch keeps together whatever their task."""

    def entries() -> Entries:
        return [item for view in views for item in view.items()]

    def clear() -> None:
        for view in views:
            view.clear()

    return KeyIndex(entries, clear)


def _choose(world_model: Any, kv: Attachment, task_id: int, rows: int) -> None:
    """From here on the rows of the calling thread's batches are environments of a task."""
    env_num = world_model.env_num
    if not 0 <= task_id < world_model.task_num:
        raise InvalidArgumentError(f"task_id must be from 0 to {world_model.task_num - 1}, got {task_id}")
    if rows > env_num:
        raise InvalidArgumentError(
            f"the world model's env_num must be at least the {rows} environments of this batch, got {env_num}"
        )
    first = task_id * env_num
    kv.session.current_infer_env_ids = range(first, first + rows)


def _roots(
    world_model: Any,
    kv: Attachment,
    last_obs_embeddings: torch.Tensor,
    batch_action: Any,
    current_obs_embeddings: torch.Tensor,
    task_id: int,
) -> Any:
    """The model's outputs for the roots of a task, which are stored."""
    rows, session = current_obs_embeddings.shape[0], kv.session
    observed = {"obs_embeddings": current_obs_embeddings}
    keeps_tokens = world_model.rebuild_kv_window_from_tokens
    is_conditioned = world_model.use_task_embed and world_model.task_embed_option in (
        "concat_task_embed",
        "add_task_embed",
    )
    stored_under = world_model.latent_state if is_conditioned else current_obs_embeddings
    if all(begins_of(world_model, batch_action)):
        contexts = LightZeroKeysValues.empty(kv.layout, rows)
        world_model.keys_values_wm = contexts
        outputs = world_model.forward(observed, past_keys_values=contexts, is_init_infer=True, task_id=task_id)
        if keeps_tokens:
            tokens = world_model._observation_tokens_without_position(current_obs_embeddings)
            session.keys_values_wm_token_context_list = [each.detach() for each in tokens]
        world_model.update_cache_context(stored_under, is_init_infer=True)
        return outputs
    # Roots are stored under what the task made of their states, and computed from the states alone where they are lost.
    known_as = world_model._observation_tokens_without_position(last_obs_embeddings[:rows])
    batch = session.gather(session.keys_of(known_as))
    hits = batch.hits.count(True)
    for row, hit in enumerate(batch.hits):
        if not hit:
            batch.fill(row, state_alone(world_model, kv, last_obs_embeddings[row], task_id))
    kv.count(world_model, root_hit_cnt=hits, root_total_query_cnt=rows)
    run_on(session, rows, batch.start)
    session.keys_values_wm_size_list = list(batch.lengths)
    if keeps_tokens:
        take_tokens(world_model, kv, known_as)
    lengths = world_model.trim_and_pad_kv_cache(is_init_infer=True)
    actions = torch.from_numpy(np.array(batch_action[:rows])).to(last_obs_embeddings.device)
    acted = actions.unsqueeze(1 if world_model.continuous_action_space else -1)
    if keeps_tokens:
        world_model._append_inference_token_context(world_model._action_tokens_without_position(acted, task_id))
        world_model._append_inference_token_context(
            world_model._observation_tokens_without_position(current_obs_embeddings)
        )
    for step in ({"act_tokens": acted}, observed):
        session.keys_values_wm_size_list_current = lengths
        outputs = world_model.forward(
            step,
            past_keys_values=session.keys_values_wm,
            is_init_infer=True,
            valid_context_lengths=world_model._variable_context_lengths(lengths),
            task_id=task_id,
        )
        lengths = [length + 1 for length in lengths]
    session.keys_values_wm_size_list_current = lengths
    world_model.update_cache_context(stored_under, is_init_infer=True, valid_context_lengths=lengths)
    return outputs
