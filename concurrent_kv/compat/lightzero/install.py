"""`install`: every `WorldModel` that LightZero makes from now on attaches itself as its configuration says."""

from __future__ import annotations

from contextlib import suppress
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

    classes = [WorldModel]
    is_main = check_class(WorldModel).is_main
    if is_main:
        with suppress(ImportError):  # then nothing is made of it either
            from lzero.model.unizero_world_models.world_model_multitask import WorldModelMT

            check_class(WorldModelMT)
            classes.append(WorldModelMT)
    uninstall()
    for world_model_class in classes:
        original = world_model_class.__init__
        _original_inits[world_model_class] = original
        world_model_class.__init__ = _attaching(world_model_class, original, arguments)
    if not is_main:
        tell_environments()


def _attaching(world_model_class: type[Any], original: Any, arguments: dict[str, Any]) -> Any:
    """The `__init__` of a class of world models that attaches what it has made."""

    @wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        # A model for several tasks calls its base class's own, and is not ready then.
        is_ready = not check_class(type(self)).has_tasks or check_class(world_model_class).has_tasks
        if is_ready and mode_of(self.config) != "off":
            attach(self, **arguments)

    return init


def uninstall() -> None:
    """World models made from now on stay as released, and policies too; those that are attached stay attached."""
    while _original_inits:
        world_model_class, original = _original_inits.popitem()
        world_model_class.__init__ = original
    restore_policies()
