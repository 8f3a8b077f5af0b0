"""LightZero 0.2.0's policies, which know the environments of a batch's rows: their attached models are told.

The policies keep the previous batch's observations and actions by row, and when an environment finishes they forget
those of all. Here each environment's are kept until that one is reset. The main branch's policies need none of this.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from inspect import signature
from typing import Any

import torch

from .model import attachment_of

__all__ = ["restore_policies", "tell_environments"]

MODEL_OF = {"collect": "_collect_model", "eval": "_eval_model"}
KEPT = "_concurrent_kv_kept"  # an attribute of a policy: by phase and environment, its last observation and action

_originals: dict[tuple[type[Any], str], Any] = {}


def tell_environments() -> None:
    """Let every policy of UniZero say which environments it acts for. Imports LightZero."""
    from lzero.policy.sampled_unizero import SampledUniZeroPolicy
    from lzero.policy.unizero import UniZeroPolicy

    for policy_class in (UniZeroPolicy, SampledUniZeroPolicy):
        for phase in MODEL_OF:
            for name, wrapped in ((f"_forward_{phase}", _forward), (f"_reset_{phase}", _reset)):
                if name in vars(policy_class):
                    original = _originals[policy_class, name] = getattr(policy_class, name)
                    setattr(policy_class, name, wrapped(original, phase))


def restore_policies() -> None:
    """The policies' own methods again."""
    while _originals:
        (policy_class, name), original = _originals.popitem()
        setattr(policy_class, name, original)


def _forward(original: Callable[..., Any], phase: str) -> Callable[..., Any]:
    parameters = signature(original)

    @wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        said = parameters.bind(self, *args, **kwargs).arguments
        data, ready = said["data"], said.get("ready_env_id")
        attachment = attachment_of(getattr(self, MODEL_OF[phase]).world_model)
        if attachment is None or ready is None:
            return original(self, *args, **kwargs)
        with attachment.environments([int(env_id) for env_id in ready]):
            if attachment.mode != "on":  # validation compares what LightZero does with its own
                return original(self, *args, **kwargs)
            kept = _kept(self, phase)
            before = [kept.get(int(env_id), (torch.zeros_like(data[0]), -1)) for env_id in ready]
            self.last_batch_obs = torch.stack([observed for observed, _ in before])
            self.last_batch_action = [action for _, action in before]
            output = original(self, *args, **kwargs)
            for row, env_id in enumerate(ready):
                kept[int(env_id)] = (data[row], output[env_id]["action"])
            return output

    return forward


def _reset(original: Callable[..., Any], phase: str) -> Callable[..., Any]:
    @wraps(original)
    def reset(self: Any, env_id: Any = None, current_steps: Any = None, reset_init_data: bool = True) -> Any:
        kept = _kept(self, phase)
        if reset_init_data:
            for ended in list(kept) if env_id is None else env_id if isinstance(env_id, list) else [env_id]:
                kept.pop(ended, None)
        return original(self, env_id, current_steps, reset_init_data)

    return reset


def _kept(policy: Any, phase: str) -> dict[int, tuple[torch.Tensor, Any]]:
    kept: dict[int, tuple[torch.Tensor, Any]] = vars(policy).setdefault(KEPT, {}).setdefault(phase, {})
    return kept
