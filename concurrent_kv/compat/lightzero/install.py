"""`install`: every `WorldModel` that LightZero makes from now on attaches itself as its configuration says."""

from __future__ import annotations

from functools import wraps
from typing import Any

from .attach import attach
from .kinds import check_class
from .policies import restore_policies, tell_environments
from .settings import mode_of

__all__ = ["install", "uninstall"]

_original_inits: dict[type[Any], Any] = {}


def install(**arguments: Any) -> None:
    """Let `use_new_cache_manager` and `cache_validation_mode` in `world_model_cfg` decide for each new world model.

    Call it once before LightZero makes its policy. A model whose configuration has neither stays as released. Calling
    it again changes the arguments. Imports LightZero.

    The policies of 0.2.0 say from then on which environments a batch is of, and in mode "on" each environment keeps its
    context when another finishes.

    Args:
        arguments: what `attach` gets beside the model, for every model.

    Raises:
        InvalidTypeError: the LightZero that is installed is neither 0.2.0 nor its main branch; says what is missing.
    """
    from lzero.model.unizero_world_models.world_model import WorldModel

    is_main = check_class(WorldModel)
    uninstall()
    original = WorldModel.__init__

    @wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if mode_of(self.config) != "off":
            attach(self, **arguments)

    _original_inits[WorldModel] = original
    WorldModel.__init__ = init
    if not is_main:
        tell_environments()


def uninstall() -> None:
    """World models made from now on stay as released, and policies too; those that are attached stay attached."""
    while _original_inits:
        world_model_class, original = _original_inits.popitem()
        world_model_class.__init__ = original
    restore_policies()
