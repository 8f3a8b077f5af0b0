"""The released `WorldModel` with its cache replaced: the subclass that `attach` makes of its class."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import numpy as np
import torch

from ...errors import InvalidArgumentError, InvalidTypeError
from .attachment import Attachment
from .containers import LightZeroKeysValues, from_lightzero, to_lightzero
from .contexts import (
    commit_nodes,
    generate_contexts,
    node_contexts,
    root_contexts,
    start_positions_of_reanalysis,
    store_roots,
)
from .views import init_views, recur_view

__all__ = ["ATTACHMENT", "attachment_of", "check_rows", "make_class", "of_the_search"]

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


# What the released cache is made of: kept while the model is attached, and in mode "on" read by nothing.
OF_THE_RINGS = (
    "shared_pool_recur_infer",
    "shared_pool_init_infer",
    "shared_pool_wm",
    "shared_pool_index",
    "shared_pool_index_init_envs",
    "shared_pool_index_wm",
    "shared_pool_size",
    "shared_pool_size_init",
    "shared_pool_size_wm",
)

STORE_INSTEAD = (
    "store roots with attachment_of(world_model).manager.set_init_cache(env_id, (env_id, key), kv), or detach first"
)


def attachment_of(world_model: Any) -> Attachment | None:
    """The attachment of an attached world model, None of any other."""
    found = getattr(world_model, "__dict__", {}).get(ATTACHMENT)
    return found if isinstance(found, Attachment) else None


def of_the_search(name: str) -> property:
    """An attribute of the model that each thread has for itself; the released value waits in the model's dict."""

    def get(self: Any) -> Any:
        return getattr(self.__dict__[ATTACHMENT].session, name)

    def put(self: Any, value: Any) -> None:
        setattr(self.__dict__[ATTACHMENT].session, name, value)

    def delete(self: Any) -> None:
        delattr(self.__dict__[ATTACHMENT].session, name)

    return property(get, put, delete)


def _of_the_rings(name: str) -> property:
    """An attribute of the released cache: to look at only, as nothing would follow from another value."""

    def get(self: Any) -> Any:
        return self.__dict__[name]

    def put(self: Any, value: Any) -> None:
        raise InvalidArgumentError(f"{name} is not used while the world model is attached: {STORE_INSTEAD}")

    return property(get, put)


def make_class(released: type[Any]) -> type[Any]:
    """A class for world models of class `released` while they are attached."""

    class Attached(released):  # type: ignore[misc]
        """See `concurrent_kv.compat.lightzero.attach`."""

        _is_attached = True

        def __copy__(self) -> Attached:
            """A shallow copy: weights, attachment and searches are the same until it is attached or detached."""
            made = type(self).__new__(type(self))
            made.__dict__.update(self.__dict__)
            self.__dict__[ATTACHMENT].share(self, made)
            return made

        def __deepcopy__(self, memo: dict[int, Any]) -> Attached:
            """A copy with weights of its own, and with a manager of its own."""
            made = type(self).__new__(type(self))
            memo[id(self)] = made
            made.__setstate__(copy.deepcopy(self.__dict__, memo))
            made.__dict__[ATTACHMENT].share(made)
            return made

        def __reduce_ex__(self, protocol: Any) -> Any:
            raise InvalidTypeError(
                "an attached WorldModel cannot be pickled, as a released one cannot: save its state_dict(), load that "
                "into a new one and attach it"
            )

        def retrieve_or_generate_kvcache(
            self, latent_state: Any, ready_env_num: int, simulation_index: int = 0, start_pos: Any = 0
        ) -> list[int]:
            """The parents' contexts as one batch, which the model runs on; returns each row's length."""
            kv: Attachment = self.__dict__[ATTACHMENT]
            if self.reanalyze_phase:
                positions = start_positions_of_reanalysis(start_pos, ready_env_num)
                return generate_contexts(self, kv, latent_state, ready_env_num, positions)
            check_rows(kv, ready_env_num)
            _check_said(kv, ready_env_num)
            return node_contexts(self, kv, latent_state, ready_env_num, lambda row: int(start_pos[row]))

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
            rows = current_obs_embeddings.shape[0]
            check_rows(kv, max(rows, last_obs_embeddings.shape[0]))
            _check_said(kv, rows)
            last, actions = _in_order(kv, last_obs_embeddings, batch_action, rows)
            begins = _begins(self, actions)
            if not all(begins):
                _check_previous(last.shape[0], len(actions), rows)
            arguments = (last_obs_embeddings, batch_action, current_obs_embeddings, start_pos)
            ours = (last, actions, current_obs_embeddings, start_pos)
            if kv.validation is None:
                return _roots(self, kv, *ours)
            if any(begins[:rows]) and not all(begins):
                return kv.validation.mixed_root(self, kv, partial(_roots, self, kv, *ours), ours)
            return kv.validation.root(self, kv, partial(_roots, self, kv), arguments, ours)

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

        def custom_copy_kv_cache_to_shared_recur(self, src_kv: Any) -> int:
            """Refused: there is no ring to copy to."""
            raise InvalidArgumentError(f"an attached world model has no ring of nodes: {STORE_INSTEAD}")

        def custom_copy_kv_cache_to_shared_init_envs(self, src_kv: Any, env_id: int) -> int:
            """Refused: there is no ring to copy to."""
            raise InvalidArgumentError(f"an attached world model has no rings of roots: {STORE_INSTEAD}")

        def custom_copy_kv_cache_to_shared_wm(self, src_kv: Any) -> LightZeroKeysValues:
            """A copy of one row that nothing else writes to."""
            return to_lightzero(from_lightzero(src_kv), self.__dict__[ATTACHMENT].layout)

        @property
        def past_kv_cache_recurrent_infer(self) -> Any:
            """The nodes of the calling thread's search, by key. Assigning something empty clears them."""
            return recur_view(self.__dict__[ATTACHMENT])

        @past_kv_cache_recurrent_infer.setter
        def past_kv_cache_recurrent_infer(self, nodes: Any) -> None:
            if len(nodes):
                raise InvalidArgumentError(f"past_kv_cache_recurrent_infer can only be emptied: {STORE_INSTEAD}")
            self.past_kv_cache_recurrent_infer.clear()

        @property
        def past_kv_cache_init_infer_envs(self) -> Any:
            """Each environment's roots, by key. Assigning empty ones clears them all."""
            return init_views(self.__dict__[ATTACHMENT])

        @past_kv_cache_init_infer_envs.setter
        def past_kv_cache_init_infer_envs(self, roots: Any) -> None:
            if any(map(len, roots)):
                raise InvalidArgumentError(f"past_kv_cache_init_infer_envs can only be emptied: {STORE_INSTEAD}")
            for view in self.past_kv_cache_init_infer_envs:
                view.clear()

    for name in OF_A_SEARCH:
        setattr(Attached, name, of_the_search(name))
    for name in OF_THE_RINGS:
        setattr(Attached, name, _of_the_rings(name))
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
    """The model's outputs for new roots, which are stored: an episode's first ones, or what follows the previous.

    Where some begin an episode, or are said to be environments of contexts of several lengths, those that are alike are
    a batch of their own.
    """
    session = kv.session
    session.begin()
    said, rows = session.current_infer_env_ids, current_obs_embeddings.shape[0]
    begins = _begins(world_model, batch_action)[:rows]  # where all begin, there may be fewer of them than rows
    alike: list[Any] = begins
    if said is not None and kv.mode == "on" and not all(begins):
        # 0.2.0 has no masks: beside longer contexts, a shorter one's padding would count as tokens, and be stored.
        lengths = session.root_lengths(last_obs_embeddings[:rows])
        alike = [0 if first else length for first, length in zip(begins, lengths, strict=True)]
    session.root_environments = said
    if len(set(alike)) == 1:
        return _roots_alike(
            world_model, kv, last_obs_embeddings, batch_action, current_obs_embeddings, start_pos, begins[0]
        )
    parts = [[row for row in range(rows) if alike[row] == each] for each in sorted(set(alike))]
    made = []
    try:
        for part in parts:
            session.current_infer_env_ids = part if said is None else [said[row] for row in part]
            actions = [batch_action[row] for row in part]
            positions = start_pos if np.ndim(start_pos) == 0 else [start_pos[row] for row in part]
            last, current = last_obs_embeddings[part], current_obs_embeddings[part]
            made.append(_roots_alike(world_model, kv, last, actions, current, positions, begins[part[0]]))
    finally:
        session.current_infer_env_ids = said
    return _joined(parts, made, rows)


def _roots_alike(
    world_model: Any,
    kv: Attachment,
    last_obs_embeddings: torch.Tensor,
    batch_action: Any,
    current_obs_embeddings: torch.Tensor,
    start_pos: Any,
    is_first: bool,
) -> Any:
    """As `_roots`, of rows that all begin an episode, or all go on."""
    session, rows = kv.session, current_obs_embeddings.shape[0]
    observed = {"obs_embeddings": current_obs_embeddings}
    if is_first:
        contexts = LightZeroKeysValues.empty(kv.layout, rows)
        world_model.keys_values_wm = contexts
        outputs = world_model.forward(observed, past_keys_values=contexts, is_init_infer=True, start_pos=start_pos)
    else:
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


def _joined(parts: list[list[int]], outputs: list[Any], rows: int) -> Any:
    """The outputs of a batch, a `WorldModelOutput`, of those of its parts."""
    joined = {}
    for name, first in vars(outputs[0]).items():
        joined[name] = first
        if isinstance(first, torch.Tensor):
            whole = joined[name] = first.new_empty((rows, *first.shape[1:]))
            for part, output in zip(parts, outputs, strict=True):
                whole[part] = getattr(output, name)
    return type(outputs[0])(**joined)


def _in_order(kv: Attachment, last: torch.Tensor, actions: Any, rows: int) -> tuple[torch.Tensor, Any]:
    """The previous roots' observations and actions, those of the environments of this batch alone, in its order.

    LightZero keeps those of the previous batch: where an environment has finished since then, there are more of them.
    """
    before, now = kv.session.root_environments, kv.session.current_infer_env_ids
    if now is None or last.shape[0] == rows or len(actions) != last.shape[0]:
        return last, actions
    before = range(last.shape[0]) if before is None else before
    if len(before) != last.shape[0] or not set(now) <= set(before):
        return last, actions
    order = [list(before).index(env_id) for env_id in now]
    return last[order], [actions[row] for row in order]


def _check_said(kv: Attachment, rows: int) -> None:
    """Raise where `environments()` says so many environments, and the batch has others."""
    said = kv.session.current_infer_env_ids
    if said is not None and len(said) != rows:
        raise InvalidArgumentError(
            f"environments() must name one environment for each row, got {list(said)} for a batch of {rows}"
        )


def _check_previous(observed: int, acted: int, rows: int) -> None:
    """Raise unless every row of a batch has the observation and the action before it."""
    if min(observed, acted) < rows:
        raise InvalidArgumentError(
            f"obs and action must have a row for each of the {rows} of current_obs, got {observed} and {acted}: for an "
            "environment that begins an episode, zeros and the action -1"
        )


def check_rows(kv: Attachment, rows: int) -> None:
    """Raise unless a batch of so many rows has an environment for each."""
    if rows > len(kv.env_ids):
        raise InvalidArgumentError(
            f"the world model's env_num must be at least the {rows} environments of this batch, and env_ids as many, "
            f"got {len(kv.env_ids)}"
        )


def _begins(world_model: Any, batch_action: Any) -> list[bool]:
    """Whether each row begins an episode: LightZero marks it by an action of -1."""
    if world_model.continuous_action_space:
        return [not isinstance(action, np.ndarray) for action in batch_action]
    return [int(action) == -1 for action in batch_action]
