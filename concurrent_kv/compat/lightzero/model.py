"""The released `WorldModel` with its cache replaced: the subclass that `attach` makes of its class."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import numpy as np
import torch

from ...errors import InvalidArgumentError
from .attachment import Attachment
from .containers import LightZeroKeysValues
from .contexts import (
    commit_nodes,
    generate_contexts,
    node_contexts,
    root_contexts,
    start_positions_of_reanalysis,
    store_roots,
)
from .views import init_views, recur_view

__all__ = ["ATTACHMENT", "attached_class", "attachment_of"]

ATTACHMENT = "_concurrent_kv"  # the attribute of an attached model

OF_A_SEARCH = (
    "latent_state",
    "keys_values_wm",
    "keys_values_wm_single_env",
    "keys_values_wm_list",
    "keys_values_wm_size_list",
    "keys_values_wm_size_list_current",
    "reanalyze_phase",
)


def attachment_of(world_model: Any) -> Attachment | None:
    """The attachment of an attached world model, None of any other."""
    found = getattr(world_model, "__dict__", {}).get(ATTACHMENT)
    return found if isinstance(found, Attachment) else None


def _of_the_search(name: str) -> property:
    """An attribute of the model that each thread has for itself; the released value waits in the model's dict."""

    def get(self: Any) -> Any:
        return getattr(self.__dict__[ATTACHMENT].session, name)

    def put(self: Any, value: Any) -> None:
        setattr(self.__dict__[ATTACHMENT].session, name, value)

    def delete(self: Any) -> None:
        delattr(self.__dict__[ATTACHMENT].session, name)

    return property(get, put, delete)


_classes: dict[type[Any], type[Any]] = {}


def attached_class(released: type[Any]) -> type[Any]:
    """The class of a world model of class `released` while it is attached; always the same for the same class."""
    made = _classes.get(released)
    return _classes.setdefault(released, _make_class(released)) if made is None else made


def _make_class(released: type[Any]) -> type[Any]:
    class Attached(released):  # type: ignore[misc]
        """See `concurrent_kv.compat.lightzero.attach`."""

        def retrieve_or_generate_kvcache(
            self, latent_state: Any, ready_env_num: int, simulation_index: int = 0, start_pos: Any = 0
        ) -> list[int]:
            """The parents' contexts as one batch, which the model runs on; returns each row's length."""
            kv: Attachment = self.__dict__[ATTACHMENT]
            if self.reanalyze_phase:
                positions = start_positions_of_reanalysis(start_pos, ready_env_num)
                return generate_contexts(self, kv, latent_state, ready_env_num, positions)
            _check_rows(kv, ready_env_num)
            return node_contexts(self, kv, latent_state, ready_env_num, start_pos)

        def trim_and_pad_kv_cache(self, is_init_infer: bool = True) -> list[int]:
            """Nothing is left to do: contexts are gathered into the model's layout. Validation compares them here."""
            kv: Attachment = self.__dict__[ATTACHMENT]
            if kv.validation is not None:
                kv.validation.retrieved()
            return kv.session.keys_values_wm_size_list

        def update_cache_context(
            self,
            latent_state: torch.Tensor,
            is_init_infer: bool = True,
            simulation_index: int = 0,
            search_depth: Any = (),
            valid_context_lengths: Any = None,
        ) -> None:
            """Store what the model appended, under the states that it led to."""
            kv: Attachment = self.__dict__[ATTACHMENT]
            if is_init_infer:
                store_roots(self, kv, latent_state)
            else:
                commit_nodes(self, kv, latent_state)

        @torch.no_grad()
        def wm_forward_for_initial_infererence(
            self,
            last_obs_embeddings: torch.Tensor,
            batch_action: Any = None,
            current_obs_embeddings: torch.Tensor | None = None,
            start_pos: Any = 0,
        ) -> Any:
            """The roots of the next search; where targets are computed, what the released class does."""
            if current_obs_embeddings is None:
                return super().wm_forward_for_initial_infererence(last_obs_embeddings, batch_action, None, start_pos)
            kv: Attachment = self.__dict__[ATTACHMENT]
            _check_rows(kv, max(current_obs_embeddings.shape[0], last_obs_embeddings.shape[0]))
            arguments = (last_obs_embeddings, batch_action, current_obs_embeddings, start_pos)
            if kv.validation is not None:
                return kv.validation.root(self, kv, partial(_roots, self, kv), arguments)
            return _roots(self, kv, *arguments)

        @torch.no_grad()
        def forward_recurrent_inference(
            self, state_action_history: Any, simulation_index: int = 0, search_depth: Any = (), start_pos: Any = 0
        ) -> Any:
            """What the released class does, on our contexts; in validation, on both."""
            kv: Attachment = self.__dict__[ATTACHMENT]
            own = super().forward_recurrent_inference
            arguments = (state_action_history, simulation_index, search_depth, start_pos)
            return own(*arguments) if kv.validation is None else kv.validation.step(self, kv, own, arguments)

        def clear_caches(self) -> None:
            """Clear every pool, and end the calling thread's search."""
            self.__dict__[ATTACHMENT].clear()

        @property
        def past_kv_cache_recurrent_infer(self) -> Any:
            """The nodes of the calling thread's search, by key."""
            return recur_view(self.__dict__[ATTACHMENT])

        @property
        def past_kv_cache_init_infer_envs(self) -> Any:
            """Each environment's roots, by key."""
            return init_views(self.__dict__[ATTACHMENT])

        def __deepcopy__(self, memo: dict[int, Any]) -> Any:
            """Attached as this one is, with pools of its own: its weights go their own way."""
            made: Any = object.__new__(type(self))
            memo[id(self)] = made
            vars(made).update(copy.deepcopy(vars(self), memo))
            return made

        def __copy__(self) -> Any:
            """A model of the released class with the same weights: two models do not share a search."""
            made: Any = object.__new__(released)
            vars(made).update(vars(self))
            del vars(made)[ATTACHMENT]
            made._initialize_cache_structures()
            return made

    for name in OF_A_SEARCH:
        setattr(Attached, name, _of_the_search(name))
    Attached.__name__ = Attached.__qualname__ = released.__name__
    Attached.__module__ = released.__module__
    return Attached


def _roots(
    world_model: Any,
    kv: Attachment,
    last_obs_embeddings: torch.Tensor,
    batch_action: Any,
    current_obs_embeddings: torch.Tensor,
    start_pos: Any,
) -> Any:
    """The model's outputs for new roots, which are stored: an episode's first ones, or what follows the previous."""
    kv.session.begin()
    rows = current_obs_embeddings.shape[0]
    observed = {"obs_embeddings": current_obs_embeddings}
    if _is_first_step(world_model, batch_action):
        contexts = LightZeroKeysValues.empty(kv.layout, rows)
        world_model.keys_values_wm = contexts
        outputs = world_model.forward(observed, past_keys_values=contexts, is_init_infer=True, start_pos=start_pos)
    else:
        session = kv.session
        session.keys_values_wm_size_list = root_contexts(world_model, kv, last_obs_embeddings, rows, start_pos)
        session.keys_values_wm_size_list_current = world_model.trim_and_pad_kv_cache(is_init_infer=True)
        actions = torch.from_numpy(np.array(batch_action[:rows])).to(last_obs_embeddings.device)
        acted = {"act_tokens": actions.unsqueeze(1 if world_model.continuous_action_space else -1)}
        for step in (acted, observed):
            outputs = world_model.forward(
                step, past_keys_values=session.keys_values_wm, is_init_infer=True, start_pos=start_pos[:rows]
            )
    world_model.update_cache_context(current_obs_embeddings, is_init_infer=True)
    return outputs


def _check_rows(kv: Attachment, rows: int) -> None:
    if rows > len(kv.env_ids):
        raise InvalidArgumentError(
            f"the world model's env_num must be at least the {rows} environments of this batch, and env_ids as many, "
            f"got {len(kv.env_ids)}"
        )


def _is_first_step(world_model: Any, batch_action: Any) -> bool:
    """Whether an episode begins: LightZero marks it by an action of -1."""
    if world_model.continuous_action_space:
        return not isinstance(batch_action[0], np.ndarray)
    return bool(max(batch_action) == -1)
