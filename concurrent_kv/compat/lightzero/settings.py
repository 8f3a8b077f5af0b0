"""What an attachment reads from a world model and its configuration: the mode, the shapes, the overflow policy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch

from ..._checks import check_env_ids
from ...device.layout import KVLayout
from ...device.positions import PositionSteps
from ...errors import InvalidArgumentError, InvalidTypeError
from ...manager import KVCacheManager
from ...model.overflow import DropAndCorrect, DropLazily, DropOldest, Overflow, RaiseOnOverflow
from ...native import native

__all__ = [
    "Answer",
    "Mode",
    "check_manager",
    "env_ids_of",
    "layout_of",
    "manager_config",
    "mode_of",
    "overflow_of",
    "rebuilds",
    "scopes_of",
    "setting",
    "shares_parents",
]

Mode = Literal["off", "validate", "on"]
Answer = Literal["off", "on"]  # whose answers validation gives

LONGEST_CORRECTED_ON_READING = 48  # tokens of the window: the longest measured; longer ones add more and save less
DROPPED = 2  # tokens that LightZero drops when the window is full: the oldest step's observation and action


def setting(config: Any, name: str, default: Any = None) -> Any:
    """A setting of an EasyDict, a dict, a dataclass or any object; `default` where it has none."""
    return config.get(name, default) if isinstance(config, Mapping) else getattr(config, name, default)


def mode_of(config: Any, mode: Mode | None = None) -> Mode:
    """`mode`, or where it is None what the configuration says.

    `use_new_cache_manager` absent or False is "off"; True is "on", or with `cache_validation_mode` True "validate".

    Raises:
        InvalidArgumentError: no such mode. InvalidTypeError: a key of the configuration is a str.
    """
    if mode is None:
        if not _flag(config, "use_new_cache_manager"):
            return "off"
        return "validate" if _flag(config, "cache_validation_mode") else "on"
    if mode not in ("off", "validate", "on"):
        raise InvalidArgumentError(f"mode must be 'off', 'validate' or 'on', got {mode!r}")
    return mode


def _flag(config: Any, name: str) -> bool:
    value = setting(config, name, False)
    if isinstance(value, str):  # "False" would be true
        raise InvalidTypeError(f"{name} must be True or False, got {value!r}")
    return bool(value)


def layout_of(world_model: Any) -> KVLayout:
    """The shapes of a world model's K/V, on its device and in its dtype."""
    weight = world_model.transformer.ln_f.weight
    return KVLayout(
        num_layers=world_model.num_layers,
        num_heads=world_model.num_heads,
        head_dim=world_model.embed_dim // world_model.num_heads,
        max_tokens=world_model.context_length,
        # LightZero's own caches are made in the default dtype, whatever the weights'.
        dtype=torch.get_default_dtype(),
        device=weight.device,
    )


def scopes_of(world_model: Any) -> int:
    """How many environments a world model tells apart: each of its own once for each of its tasks, if it has tasks."""
    has_tasks = hasattr(world_model, "wm_forward_for_initial_inference")
    return int(world_model.env_num * (world_model.task_num if has_tasks else 1))


def manager_config(world_model: Any, searches: int) -> dict[str, Any]:
    """The configuration of a manager with a world model's shapes, environments and simulations, for so many searches
    at a time.
    """
    layout = layout_of(world_model)
    scopes, num_simulations = scopes_of(world_model), world_model.num_simulations
    return {
        "num_layers": layout.num_layers,
        "num_heads": layout.num_heads,
        "embed_dim": layout.num_heads * layout.head_dim,
        "context_length": layout.max_tokens,
        "env_num": scopes,
        "num_simulations": num_simulations,
        # LightZero's own recurrent ring is sized by its searches, not by its setting of this name.
        "max_cache_size": searches * scopes * (num_simulations + 1),
        "dtype": layout.dtype,
        "device": layout.device,
    }


def shares_parents(world_model: Any, layout: KVLayout) -> bool:
    """Whether nodes share what they keep of their parents when the window is full.

    Where the main branch computes a full window anew from its tokens, none of it is shared. With rotary positions
    nothing changes. With absolute ones it is corrected: by compiled code whenever it is read,
    which takes less than to store it anew; for long windows, on a GPU or without that code, once for each node.
    """
    if rebuilds(world_model):
        return not world_model.rebuild_kv_window_from_tokens
    if world_model.config.rotary_emb:
        return True
    compiled = native is not None and layout.device.type == "cpu" and layout.dtype is torch.float32
    return compiled and layout.max_tokens <= LONGEST_CORRECTED_ON_READING


def rebuilds(world_model: Any) -> bool:
    """Whether a full window is computed anew: settings of the main branch's."""
    return bool(
        getattr(world_model, "exact_kv_window_reset", False)
        or getattr(world_model, "rebuild_kv_window_from_tokens", False)
    )


def overflow_of(world_model: Any, layout: KVLayout) -> Overflow:
    """What `update_cache_context` does with a full window: two tokens go when one column is left.

    With absolute positions the difference is the model's own, `pos_emb_diff_k` and `pos_emb_diff_v`. A window that the
    model computes anew never overflows: it is stored as another.
    """
    limit = layout.max_tokens - 1
    if rebuilds(world_model):
        return RaiseOnOverflow(limit)
    if world_model.config.rotary_emb:
        return DropOldest(limit, DROPPED)
    moved = (DROPPED, limit)
    difference = torch.stack(
        [
            torch.cat([world_model.pos_emb_diff_k[layer][moved], world_model.pos_emb_diff_v[layer][moved]])
            for layer in range(layout.num_layers)
        ]
    )
    if shares_parents(world_model, layout):
        return DropLazily(limit, DROPPED, PositionSteps(layout, DROPPED, difference))
    return DropAndCorrect(limit, DROPPED, difference, layout)


def env_ids_of(env_ids: Iterable[int] | None, world_model: Any, env_num: int) -> tuple[int, ...]:
    """The manager's environment of each row of a world model's batches, of a manager with `env_num` of them.

    A model for several tasks has all rows of the first task, then those of the next.

    Raises:
        InvalidArgumentError, InvalidTypeError: one that the manager does not have, or one twice.
    """
    ids = check_env_ids(range(scopes_of(world_model)) if env_ids is None else env_ids)
    stated = f"env_ids must be different ints from 0 to {env_num - 1}, the manager's environments, got {ids}"
    if not all(isinstance(env_id, int) and not isinstance(env_id, bool) for env_id in ids):
        raise InvalidTypeError(stated)
    if not ids or len(set(ids)) < len(ids) or not set(ids) <= set(range(env_num)):
        raise InvalidArgumentError(stated + ("" if env_ids is not None else ", the world model's env_num"))
    return ids  # type: ignore[return-value]


def check_manager(manager: Any, world_model: Any) -> None:
    """Whether searches of a world model fit a manager.

    Raises:
        InvalidTypeError: it is no `KVCacheManager`. InvalidArgumentError: other shapes, or smaller searches.
        ClosedError: it is closed.
    """
    if not isinstance(manager, KVCacheManager):
        raise InvalidTypeError(f"manager must be a KVCacheManager or a LightZeroKVCacheManager, got {manager!r}")
    manager.storage.enter()
    layout, simulations = layout_of(world_model), world_model.num_simulations
    if manager.layout != layout:
        raise InvalidArgumentError(f"manager must be made for the world model's {layout}, got {manager.layout}")
    if manager.config.num_simulations < simulations:
        raise InvalidArgumentError(
            f"manager must be made for the world model's num_simulations, {simulations}, or more, "
            f"got {manager.config.num_simulations}"
        )
