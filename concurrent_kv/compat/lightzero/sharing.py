"""Which attached world models use which environments of a manager: models of different weights must not meet in one."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from ...errors import InvalidArgumentError
from ...locks.gate import gate
from ...manager import KVCacheManager
from .attached import Attached

__all__ = ["SHARERS", "Sharers", "check_sharing", "clear_pools", "clear_unshared_roots", "same_weights"]


class Sharers:
    """The attachments of every manager, until they are dropped; those of detached models have no users. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._of: WeakKeyDictionary[KVCacheManager, WeakSet[Attached]] = WeakKeyDictionary()

    def add(self, manager: KVCacheManager, attachment: Attached) -> None:
        """From here on `attachment` uses `manager`."""
        with gate.lock, self._lock:
            self._of.setdefault(manager, WeakSet()).add(attachment)

    def others(self, manager: KVCacheManager, world_model: Any) -> list[tuple[Attached, list[Any]]]:
        """The attachments of a manager that other world models than this one are attached by, and those models."""
        with gate.lock, self._lock:
            attachments = list(self._of.get(manager, ()))
        found = [
            (attachment, [user for user in attachment.users() if user is not world_model]) for attachment in attachments
        ]
        return [(attachment, users) for attachment, users in found if users]


SHARERS = Sharers()


def same_weights(one: Any, other: Any) -> bool:
    """Whether two models have the same memory for every parameter and buffer, so that training changes both."""
    return _weights(one) == _weights(other)


def _weights(model: Any) -> list[tuple[int, Any]]:
    tensors = [*model.parameters(), *model.buffers()]
    return [(tensor.data_ptr(), tensor.shape) for tensor in tensors]


def check_sharing(manager: KVCacheManager, env_ids: Iterable[int], world_model: Any) -> None:
    """Whether a model may use environments of a manager beside the models that are attached to it.

    Raises:
        InvalidArgumentError: another model with weights of its own uses one of them.
    """
    ids = set(env_ids)
    for attachment, users in SHARERS.others(manager, world_model):
        common = sorted(ids.intersection(attachment.env_ids))
        if common and not all(same_weights(user, world_model) for user in users):
            raise InvalidArgumentError(
                f"env_ids {common} of {manager.name} belong to an attached world model with other weights, and their "
                "roots would meet: give each model env_ids of its own, or say same_weights=True"
            )


def clear_unshared_roots(manager: KVCacheManager, env_ids: Iterable[int], world_model: Any) -> None:
    """Clear the init pools of those environments that no other attached model uses. May block."""
    used = {env_id for attachment, _ in SHARERS.others(manager, world_model) for env_id in attachment.env_ids}
    for env_id in env_ids:
        if env_id not in used:
            manager.init_pools[env_id].clear()


def clear_pools(manager: KVCacheManager, attachment: Attached) -> None:
    """Clear all that an attached model, and the models that share its weights, may have stored. May block.

    The roots of models of other weights stay: what made this model's entries stale did nothing to theirs.
    """
    users = attachment.users()
    kept: set[int] = set()
    for other, others in SHARERS.others(manager, None):
        if other is not attachment and not any(same_weights(one, another) for one in users for another in others):
            kept.update(other.env_ids)
    kept.difference_update(attachment.env_ids)
    if not kept:
        manager.clear_all()
        return
    for env_id, pool in enumerate(manager.init_pools):
        if env_id not in kept:
            pool.clear()
    manager.clear_recur_cache()
    manager.wm_pool.clear()
