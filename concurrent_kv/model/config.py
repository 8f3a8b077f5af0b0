"""`ManagerConfig`: what a manager needs to know, read from an EasyDict, a dict, a dataclass or any object."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .._checks import positive_int
from ..device.layout import KVLayout
from ..errors import InvalidArgumentError, shown

__all__ = ["ManagerConfig"]

_MISSING = object()


def _read(config: object, name: str, default: object = _MISSING) -> object:
    value = config.get(name, _MISSING) if isinstance(config, Mapping) else getattr(config, name, _MISSING)
    if value is _MISSING:
        value = default
    if value is _MISSING:
        raise InvalidArgumentError(f"config must have {name!r}, and {type(config).__name__} has none")
    return value


def _check_env_num(env_num: object, stated: object) -> int:
    """`env_num` as an int, or an error: it is no number of environments, or not the one that a configuration states."""
    number = positive_int("env_num", env_num)
    if stated != number:
        raise InvalidArgumentError(f"env_num must agree with config.env_num={shown(stated)}, got {number}")
    return number


@dataclass(frozen=True)
class ManagerConfig:
    """A model's shapes and a search's size, checked.

    Attributes:
        layout: from `num_layers`, `num_heads`, `embed_dim`, `context_length` (the window in tokens), `device` and,
            where the configuration has it, `dtype` (float32 otherwise).
        env_num: environments.
        num_simulations: simulations of one search.
        max_cache_size: entries of the recurrent pool.
    """

    layout: KVLayout
    env_num: int
    num_simulations: int
    max_cache_size: int

    @classmethod
    def read(cls, config: object, env_num: int) -> ManagerConfig:
        """Read and check a configuration; a `ManagerConfig` (a manager's `config`) is taken as it is.

        Raises:
            InvalidArgumentError, InvalidTypeError: a setting is missing, impossible, or contradicts another; by name.
        """
        if isinstance(config, cls):
            _check_env_num(env_num, config.env_num)
            return config
        sizes = {
            name: positive_int(f"config.{name}", _read(config, name))
            for name in ("num_layers", "num_heads", "embed_dim", "context_length", "num_simulations", "max_cache_size")
        }
        env_num = _check_env_num(env_num, _read(config, "env_num", env_num))
        if sizes["embed_dim"] % sizes["num_heads"]:
            raise InvalidArgumentError(
                f"config.embed_dim must be a multiple of config.num_heads={sizes['num_heads']}, "
                f"got {sizes['embed_dim']}"
            )
        needed = env_num * (sizes["num_simulations"] + 1)
        if sizes["max_cache_size"] < needed:
            raise InvalidArgumentError(
                f"config.max_cache_size must be at least {needed}, or one search of {sizes['num_simulations']} "
                f"simulations over {env_num} environments does not fit, got {sizes['max_cache_size']}"
            )
        layout = KVLayout(
            num_layers=sizes["num_layers"],
            num_heads=sizes["num_heads"],
            head_dim=sizes["embed_dim"] // sizes["num_heads"],
            max_tokens=sizes["context_length"],
            dtype=_dtype(_read(config, "dtype", torch.float32)),
            device=_read(config, "device"),  # type: ignore[arg-type]
        )
        return cls(layout, env_num, sizes["num_simulations"], sizes["max_cache_size"])


def _dtype(dtype: object) -> torch.dtype:
    """A dtype by itself or by name ("bfloat16")."""
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype.removeprefix("torch."), dtype)
    if not isinstance(dtype, torch.dtype):
        raise InvalidArgumentError(f"config.dtype must be a torch.dtype or the name of one, got {shown(dtype)}")
    return dtype
