"""`attach` and `detach`: the cache of a released LightZero world model replaced, and put back."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from ..._checks import positive_int
from ...errors import InvalidArgumentError, InvalidTypeError
from ...manager import KVCacheManager
from .attachment import Attachment
from .divergence import Divergence
from .kinds import Kind, kind_of
from .manager import LightZeroKVCacheManager
from .model import ATTACHMENT, attached_class, attachment_of
from .settings import Answer, Mode, check_manager, env_ids_of, mode_of
from .sharing import check_sharing, clear_unshared_roots

__all__ = ["attach", "detach"]


def attach(
    world_model: Any,
    mode: Mode | None = None,
    *,
    manager: KVCacheManager | LightZeroKVCacheManager | None = None,
    env_ids: Iterable[int] | None = None,
    same_weights: bool = False,
    searches: int | None = None,
    answer: Answer = "off",
    on_divergence: Callable[[Divergence], None] | None = None,
    **arguments: Any,
) -> Attachment | None:
    """Replace the cache of a released `WorldModel` (LightZero 0.2.0), in place. Returns None for mode "off".

    Args:
        world_model: the model; an attached one is attached anew.
        mode: "off" leaves LightZero's own cache, "on" replaces it, "validate" runs both and compares. If left out, the
            model's configuration says: `use_new_cache_manager`, and `cache_validation_mode` beside it.
        manager: whose pools to use, made for the model's shapes; one of its own if left out. Models that search in
            several threads at once may share one.
        env_ids: which of the manager's environments the rows of the model's batches are; 0 and up if left out. Their
            init pools are cleared, but for those that another attached model uses.
        same_weights: the model has the values of those that use some of the same `env_ids`, in memory of its own. What
            shares their memory, as a shallow copy does, needs no word.
        searches: threads that search at the same time, for a manager of its own; one if left out.
        answer: whose answers "validate" gives: "off", LightZero's own cache's, or "on".
        on_divergence: called with each difference that "validate" finds; the attachment's `report` counts them.
        arguments: for a manager of its own, as in `KVCacheManager`.

    Raises:
        InvalidTypeError: no such model; says what it lacks. InvalidArgumentError: a setting that cannot work, by name.
            The model then is as it was, attached or not.
    """
    before = attachment_of(world_model)
    kind = kind_of(world_model) if before is None else Kind.RELEASED
    mode = mode_of(world_model.config, mode)
    if mode == "off":
        detach(world_model)
        return None
    if kind.is_main:
        raise InvalidArgumentError(
            f"mode must be 'off' for a world model of {kind.value}, which is not covered yet, got {mode!r}: give it "
            "LightZeroKVCacheManager for its own manager instead"
        )
    if answer not in ("off", "on"):
        raise InvalidArgumentError(f"answer must be 'off' or 'on', got {answer!r}")
    if on_divergence is not None and not callable(on_divergence):
        raise InvalidTypeError(f"on_divergence must be callable, got {on_divergence!r}")
    if searches is not None:
        positive_int("searches", searches)
    if isinstance(manager, LightZeroKVCacheManager):
        manager = manager.manager
    if manager is not None:
        check_manager(manager, world_model)
        beside = [*(["searches"] if searches is not None else []), *arguments]
        if beside:
            raise InvalidArgumentError(f"{', '.join(beside)} cannot be given beside manager, which has its own")
        if before is not None and before.owns(manager) and before.users() == [world_model]:
            raise InvalidArgumentError("manager was made for the world model's attachment, and is closed with it")
    ids = env_ids_of(env_ids, world_model, world_model.env_num if manager is None else manager.env_num)
    if manager is not None and not same_weights:
        check_sharing(manager, ids, world_model)
    attachment = Attachment(
        world_model,
        mode,
        manager=manager,
        env_ids=ids,
        searches=1 if searches is None else searches,
        answer=answer,
        on_divergence=on_divergence,
        arguments=arguments,
    )
    detach(world_model)
    forget_released(world_model)
    attachment.share(world_model)
    clear_unshared_roots(attachment.manager, attachment.env_ids, world_model)
    vars(world_model)[ATTACHMENT] = attachment
    world_model.__class__ = attached_class(type(world_model))
    return attachment


def detach(world_model: Any) -> None:
    """Give a world model its own cache back, empty. Nothing happens where it has it already. May block."""
    attachment = attachment_of(world_model)
    if attachment is None:
        return
    world_model.__class__ = type(world_model).__mro__[1]
    del vars(world_model)[ATTACHMENT]
    forget_released(world_model)
    attachment.leave(world_model)


def forget_released(world_model: Any) -> None:
    """Empty a world model's own cache: what it stored before is older than what happens in between."""
    for roots in world_model.past_kv_cache_init_infer_envs:
        roots.clear()
    world_model.past_kv_cache_recurrent_infer.clear()
