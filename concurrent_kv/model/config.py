"""`ManagerConfig`: what a manager needs to know, read from an EasyDict, a dict, a dataclass or any object."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from .._checks import positive_int
from ..device.layout import KVLayout
from ..errors import InvalidArgumentError, shown

__all__ = ["ManagerConfig"]

_MISSING = object()
# What language models' configurations call it, those of Hugging Face's transformers.
OF_LANGUAGE_MODELS = {
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "embed_dim": "hidden_size",
    "context_length": "max_position_embeddings",
}
SIMULATIONS = 64


def _named(config: object, name: str) -> object:
    return config.get(name, _MISSING) if isinstance(config, Mapping) else getattr(config, name, _MISSING)


def _read(config: object, name: str, default: object = _MISSING) -> object:
    value = _named(config, name)
    if value is _MISSING and name in OF_LANGUAGE_MODELS:
        value = _named(config, OF_LANGUAGE_MODELS[name])
    if value is _MISSING:
        value = default
    if value is _MISSING:
        raise InvalidArgumentError(f"config must have {name!r}, and {type(config).__name__} has none")
    return value


def _is_of_language_model(config: object) -> bool:
    return _named(config, "num_layers") is _MISSING and _named(config, "num_hidden_layers") is not _MISSING


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
            where the configuration has it, `dtype` (float32 otherwise). A language model's configuration has
            `num_hidden_layers`, `num_attention_heads`, `hidden_size` and `max_position_embeddings` instead, and perhaps
            `num_key_value_heads` and `head_dim`: then the heads are those of keys and values.
        env_num: environments.
        num_simulations: simulations of one search; 64 where a language model's configuration says nothing.
        max_cache_size: entries of the recurrent pool; there, those of one search over all environments.
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
        return cls._checked(config, env_num, {})

    @classmethod
    def read_for(cls, config: object, env_num: int, num_simulations: int | None) -> ManagerConfig:
        """As `read`, for so many simulations (the configuration's where None) and one search over all environments.

        The configuration need not have `max_cache_size`; what it says is not looked at.
        """
        number = num_simulations
        if number is None and isinstance(config, cls):
            number = config.num_simulations
        if number is None:
            default = SIMULATIONS if _is_of_language_model(config) else _MISSING
            number = positive_int("config.num_simulations", _read(config, "num_simulations", default))
        env_num = positive_int("env_num", env_num)
        entries = env_num * (number + 1)
        if isinstance(config, cls):
            _check_env_num(env_num, config.env_num)
            return replace(config, num_simulations=number, max_cache_size=entries)
        return cls._checked(config, env_num, {"num_simulations": number, "max_cache_size": entries})

    @classmethod
    def _checked(cls, config: object, env_num: int, stated: Mapping[str, int]) -> ManagerConfig:
        """As `read`, of no `ManagerConfig`; what is `stated` counts instead of what it says."""
        env_num = _check_env_num(env_num, _read(config, "env_num", env_num))
        defaults: dict[str, object] = {}
        if _is_of_language_model(config):
            number = positive_int("config.num_simulations", _read(config, "num_simulations", SIMULATIONS))
            defaults = {"num_simulations": number, "max_cache_size": env_num * (number + 1), "device": "cpu"}
        sizes = {
            name: stated.get(name) or positive_int(f"config.{name}", _read(config, name, defaults.get(name, _MISSING)))
            for name in ("num_layers", "num_heads", "context_length", "num_simulations", "max_cache_size")
        }
        heads, width = sizes["num_heads"], _read(config, "head_dim", None)
        if width is None:
            embed_dim = positive_int("config.embed_dim", _read(config, "embed_dim"))
            if embed_dim % heads:
                raise InvalidArgumentError(
                    f"config.embed_dim must be a multiple of config.num_heads={heads}, got {embed_dim}"
                )
            width = embed_dim // heads
        of_keys = _read(config, "num_key_value_heads", None)
        needed = env_num * (sizes["num_simulations"] + 1)
        if sizes["max_cache_size"] < needed:
            raise InvalidArgumentError(
                f"config.max_cache_size must be at least {needed}, or one search of {sizes['num_simulations']} "
                f"simulations over {env_num} environments does not fit, got {sizes['max_cache_size']}"
            )
        layout = KVLayout(
            num_layers=sizes["num_layers"],
            num_heads=heads if of_keys is None else positive_int("config.num_key_value_heads", of_keys),
            head_dim=positive_int("config.head_dim", width),
            max_tokens=sizes["context_length"],
            dtype=_dtype(_read(config, "dtype", None)),
            device=_read(config, "device", defaults.get("device", _MISSING)),  # type: ignore[arg-type]
        )
        return cls(layout, env_num, sizes["num_simulations"], sizes["max_cache_size"])


def _dtype(dtype: object) -> torch.dtype:
    """A dtype by itself or by name ("bfloat16"); float32 where there is none."""
    if dtype is None:
        return torch.float32
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype.removeprefix("torch."), dtype)
    if not isinstance(dtype, torch.dtype):
        raise InvalidArgumentError(f"config.dtype must be a torch.dtype or the name of one, got {shown(dtype)}")
    return dtype
