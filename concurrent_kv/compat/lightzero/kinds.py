"""Which LightZero a world model is of: 0.2.0, or the main branch, and which of its kinds there."""

from __future__ import annotations

from enum import Enum
from inspect import Parameter, signature
from typing import Any

from ...errors import InvalidTypeError

__all__ = ["Kind", "check_class", "kind_of"]


class Kind(Enum):
    """A world model, by what it keeps its contexts in; the value is how messages call it."""

    RELEASED = "LightZero 0.2.0"
    MAIN_LEGACY = "LightZero's main branch with its legacy cache"
    MAIN_MANAGED = "LightZero's main branch with its own manager"
    MAIN_OF_TASKS = "LightZero's main branch for several tasks"

    @property
    def is_main(self) -> bool:
        """Whether it is of the main branch."""
        return self is not Kind.RELEASED

    @property
    def has_tasks(self) -> bool:
        """Whether it is for several tasks, whose environments have the same numbers."""
        return self is Kind.MAIN_OF_TASKS


# What an attachment calls or replaces, and the parameters that it relies on.
METHODS = {
    "retrieve_or_generate_kvcache": ("latent_state", "ready_env_num", "simulation_index", "start_pos"),
    "trim_and_pad_kv_cache": ("is_init_infer",),
    "update_cache_context": ("latent_state", "is_init_infer", "valid_context_lengths"),
    "wm_forward_for_initial_infererence": (
        "last_obs_embeddings",
        "batch_action",
        "current_obs_embeddings",
        "start_pos",
    ),
    "forward_recurrent_inference": ("state_action_history", "simulation_index", "search_depth", "start_pos"),
    "forward": ("past_keys_values", "is_init_infer", "start_pos"),
    "clear_caches": (),
}
METHODS_OF_MAIN = METHODS | {
    "update_cache_context": (*METHODS["update_cache_context"], "env_ids"),
    "wm_forward_for_initial_infererence": (*METHODS["wm_forward_for_initial_infererence"], "ready_env_id"),
    "_variable_context_lengths": ("context_lengths",),
    "_prepare_exact_cache_resets": ("latent_state", "effective_sizes"),
}
# `WorldModelMT`: a `WorldModel` by inheritance that spells one method otherwise, and takes tasks instead of positions.
METHODS_OF_TASKS = {
    "retrieve_or_generate_kvcache": ("latent_state", "ready_env_num", "simulation_index", "task_id"),
    "trim_and_pad_kv_cache": ("is_init_infer",),
    "update_cache_context": ("latent_state", "is_init_infer", "valid_context_lengths"),
    "wm_forward_for_initial_inference": ("last_obs_embeddings", "batch_action", "current_obs_embeddings", "task_id"),
    "forward_recurrent_inference": (
        "state_action_history",
        "simulation_index",
        "latent_state_index_in_search_path",
        "task_id",
    ),
    "forward": ("past_keys_values", "is_init_infer", "task_id"),
    "clear_caches": (),
    "_variable_context_lengths": ("context_lengths",),
    "_prepare_exact_cache_resets": ("latent_state", "effective_sizes"),
    "_observation_tokens_without_position": ("obs_embeddings",),
    "_action_tokens_without_position": ("act_tokens", "task_id"),
}
METHODS_OF_THE_MANAGER = {
    "get_init_cache": ("env_id", "cache_key"),
    "set_init_cache": ("env_id", "cache_key", "kv_cache"),
    "hierarchical_get": ("env_id", "cache_key"),
    "get_recur_cache": ("cache_key",),
    "set_recur_cache": ("cache_key", "kv_cache"),
    "clear_recur_cache": (),
    "clear_all": (),
}

ATTRIBUTES = (
    *("config", "transformer", "env_num", "num_layers", "num_heads", "embed_dim", "context_length", "num_simulations"),
    *("hit_count", "total_query_count", "root_hit_cnt", "root_total_query_cnt"),
    *("keys_values_wm", "keys_values_wm_list", "keys_values_wm_size_list", "reanalyze_phase"),
)
OF_THE_LEGACY_CACHE = ("past_kv_cache_recurrent_infer", "past_kv_cache_init_infer_envs", "shared_pool_recur_infer")
OF_MAIN = ("current_infer_env_ids", "exact_kv_window_reset", "rebuild_kv_window_from_tokens")
OF_TASKS = ("task_num", "use_task_embed", "task_embed_option")


def kind_of(world_model: Any) -> Kind:
    """What a world model is that is not attached.

    Raises:
        InvalidTypeError: none of them; says what is missing.
    """
    kind = check_class(type(world_model), getattr(world_model, "world_model", None) is not None)
    names = [*ATTRIBUTES, *(OF_MAIN if kind.is_main else ())]
    if kind.has_tasks:
        names += OF_TASKS
    elif kind.is_main:
        names.append("use_new_cache_manager")
        if getattr(world_model, "use_new_cache_manager", False):
            kind = Kind.MAIN_MANAGED
    is_managed = kind is Kind.MAIN_MANAGED
    names += ["kv_cache_manager"] if is_managed else OF_THE_LEGACY_CACHE
    missing = [name for name in names if not hasattr(world_model, name)]
    if not missing and is_managed:
        manager = world_model.kv_cache_manager
        missing = [f"kv_cache_manager.{name}" for name in _lacking(type(manager), METHODS_OF_THE_MANAGER)]
        missing += ["kv_cache_manager.init_pools"] if not hasattr(manager, "init_pools") else []
    if missing:
        raise InvalidTypeError(
            f"world_model must have what a WorldModel of {kind.value} has, and this {type(world_model).__name__} has "
            f"no {', '.join(missing)}"
        )
    return kind


def check_class(world_model_class: type[Any], is_around: bool = False) -> Kind:
    """What the world models of a class are; the main branch's have either its legacy cache or its own manager.

    Args:
        is_around: its objects have a world model as an attribute, which was meant.

    Raises:
        InvalidTypeError: neither; says what is missing.
    """
    name = world_model_class.__name__
    is_main = any(hasattr(world_model_class, method) for method in METHODS_OF_MAIN.keys() - METHODS.keys())
    kind, methods = (Kind.MAIN_LEGACY, METHODS_OF_MAIN) if is_main else (Kind.RELEASED, METHODS)
    if hasattr(world_model_class, "wm_forward_for_initial_inference"):
        if not is_main:
            raise InvalidTypeError(
                f"world_model must be a WorldModel of one task, got {name}: of models of several tasks those of "
                "LightZero's main branch are covered, and no others"
            )
        kind, methods = Kind.MAIN_OF_TASKS, METHODS_OF_TASKS
    lacking = _lacking(world_model_class, methods)
    if lacking:
        inner = ": pass its .world_model" if is_around else f", which has no {', '.join(lacking)}"
        raise InvalidTypeError(f"world_model must be LightZero's WorldModel, got {name}{inner}")
    return kind


def _lacking(owner: type[Any], methods: dict[str, tuple[str, ...]]) -> list[str]:
    """The methods that a class lacks, and the parameters that those it has lack."""
    lacking: list[str] = []
    for name, parameters in methods.items():
        method = getattr(owner, name, None)
        if method is None:
            lacking.append(f"{name}()")
            continue
        known = signature(method).parameters
        if not any(parameter.kind is Parameter.VAR_KEYWORD for parameter in known.values()):
            lacking += [f"{name}({parameter}=)" for parameter in parameters if parameter not in known]
    return lacking
