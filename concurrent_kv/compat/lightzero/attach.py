"""`attach` and `detach`: the cache of a released LightZero world model replaced, and put back."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from ..._checks import positive_int
from ...errors import InvalidArgumentError, InvalidTypeError
from ...manager import KVCacheManager
from .attached import replaced_class
from .attachment import Attachment
from .divergence import Divergence
from .kinds import Kind, kind_of
from .main_model import make_class_of_main
from .main_multitask import make_class_of_tasks
from .manager import LightZeroKVCacheManager
from .model import ATTACHMENT, attachment_of, make_class
from .replay import check_replay
from .settings import Answer, Mode, check_manager, env_ids_of, mode_of, scopes_of
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
    replay: float | None = None,
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
        replay: the share of contexts, above 0 and at most 1, that "validate" also computes anew from their tokens, to
            say which cache is wrong. Where the caches differ it is every one. For LightZero 0.2.0.
        arguments: for a manager of its own, as in `KVCacheManager`.

    Raises:
        InvalidTypeError: no such model; says what it lacks. InvalidArgumentError: a setting that cannot work, by name.
            The model then is as it was, attached or not.
    """
    before = attachment_of(world_model)
    kind = kind_of(world_model) if before is None else before.kind
    mode = mode_of(world_model.config, mode)
    if mode == "off":
        detach(world_model)
        return None
    if kind.is_main:
        check_main(world_model, kind, mode)
    if answer not in ("off", "on"):
        raise InvalidArgumentError(f"answer must be 'off' or 'on', got {answer!r}")
    if on_divergence is not None and not callable(on_divergence):
        raise InvalidTypeError(f"on_divergence must be callable, got {on_divergence!r}")
    check_replay(replay)
    if replay is not None and kind.is_main:
        raise InvalidArgumentError(f"replay is for LightZero 0.2.0, and this world model is of {kind.value}")
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
    ids = env_ids_of(env_ids, world_model, scopes_of(world_model) if manager is None else manager.env_num)
    if kind.has_tasks and len(ids) != scopes_of(world_model):
        raise InvalidArgumentError(
            f"env_ids must have one for each of {world_model.env_num} environments of each of {world_model.task_num} "
            f"tasks, got {len(ids)}"
        )
    if manager is not None and not same_weights:
        check_sharing(manager, ids, world_model)
    attachment = Attachment(
        world_model,
        kind,
        mode,
        manager=manager,
        env_ids=ids,
        searches=1 if searches is None else searches,
        answer=answer,
        on_divergence=on_divergence,
        replay=replay,
        arguments=arguments,
    )
    detach(world_model)
    forget_released(world_model, kind)
    attachment.share(world_model)
    clear_unshared_roots(attachment.manager, attachment.env_ids, world_model)
    vars(world_model)[ATTACHMENT] = attachment
    world_model.__class__ = attached_class(type(world_model), kind)
    return attachment


_classes: dict[tuple[type[Any], Kind], type[Any]] = {}


def attached_class(released: type[Any], kind: Kind) -> type[Any]:
    """The class of a world model of class `released` while it is attached; always the same for the same class."""
    made = _classes.get((released, kind))
    if made is None:
        made = make_class(released)
        if kind.is_main:
            made = make_class_of_main(made)
        if kind.has_tasks:
            made = make_class_of_tasks(made)
        made = _classes.setdefault((released, kind), made)
    return made


def check_main(world_model: Any, kind: Kind, mode: Mode) -> None:
    """Refuse what an attachment does not know of the main branch."""
    if getattr(world_model.transformer, "use_register_token", False):
        raise InvalidArgumentError(
            "world_model must have a transformer without register tokens, which are not covered: "
            "task_embed_option other than 'register_task_embed'"
        )
    if kind.has_tasks and mode == "validate":
        raise InvalidArgumentError("mode must be 'off' or 'on' for models of several tasks, got 'validate'")


def detach(world_model: Any) -> None:
    """Give a world model its own cache back, empty. Nothing happens where it has it already. May block."""
    attachment = attachment_of(world_model)
    if attachment is None:
        return
    world_model.__class__ = replaced_class(type(world_model))
    del vars(world_model)[ATTACHMENT]
    forget_released(world_model, attachment.kind)
    attachment.leave(world_model)


def forget_released(world_model: Any, kind: Kind) -> None:
    """Empty a world model's own cache: what it stored before is older than what happens in between."""
    if kind.has_tasks:  # its own clear_caches() reads a setting that it may not have
        for contexts in (
            world_model.past_token_context_recurrent_infer,
            *world_model.past_token_context_init_infer_envs,
        ):
            contexts.clear()
    elif kind.is_main:
        world_model.clear_caches()
        return
    for roots in world_model.past_kv_cache_init_infer_envs:
        roots.clear()
    world_model.past_kv_cache_recurrent_infer.clear()
