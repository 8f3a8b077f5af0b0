"""`Attachment`: what joins a world model to a manager; the model has it as an attribute while it is attached."""

from __future__ import annotations

import threading
from typing import Any

from ...errors import InvalidArgumentError
from ...layout import KVLayout
from ...manager import KVCacheManager
from ...overflow import Overflow
from .session import SearchSession
from .settings import Mode, layout_of, manager_config, overflow_of

__all__ = ["Attachment"]


class Attachment:
    """A world model's place in a manager.

    Attributes:
        mode: "validate" or "on".
        manager: whose pools hold its entries; several world models may share one.
        env_ids: the manager's environment of each row of the model's batches.
        layout: the shapes of its K/V.
        session: the calling thread's search.
    """

    def __init__(
        self,
        world_model: Any,
        mode: Mode,
        manager: KVCacheManager | None,
        env_ids: tuple[int, ...] | None,
        searches: int,
        arguments: dict[str, Any],
    ) -> None:
        self.mode = mode
        self.layout: KVLayout = layout_of(world_model)
        if self.layout.max_tokens < 4 or self.layout.max_tokens % 2:
            raise InvalidArgumentError(
                "context_length must be an even number of at least 4 (two tokens a step, and a step beside the new "
                f"one), got {self.layout.max_tokens}"
            )
        self._config = manager_config(world_model, searches)
        self._arguments = arguments
        self.owns_manager = manager is None
        self.manager = self._own_manager() if manager is None else manager
        if self.manager.layout != self.layout:
            raise InvalidArgumentError(
                f"manager must be made for the world model's {self.layout}, got {self.manager.layout}"
            )
        self.env_ids = tuple(range(world_model.env_num)) if env_ids is None else env_ids
        self.session = SearchSession(self.manager, self.env_ids)
        self.counting = threading.Lock()
        self._overflow: tuple[Any, Overflow] | None = None

    def _own_manager(self) -> KVCacheManager:
        slots = self._config["max_cache_size"] * self.layout.max_tokens
        return KVCacheManager(self._config, self._config["env_num"], **{"recur_slots": slots, **self._arguments})

    def overflow(self, world_model: Any) -> Overflow:
        """What becomes of a full window. Follows the model's position differences when they are computed anew."""
        source = None if world_model.config.rotary_emb else world_model.pos_emb_diff_k
        known = self._overflow
        if known is None or known[0] is not source:
            known = self._overflow = (source, overflow_of(world_model, self.layout))
        return known[1]

    def close(self) -> None:
        """End the calling thread's search; close the manager if it was made for this attachment. May block."""
        self.session.close()
        if self.owns_manager:
            self.manager.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> Attachment:
        # A copied model gets weights, and so entries, of its own.
        made = object.__new__(Attachment)
        made.__dict__.update(self.__dict__)
        made.owns_manager = True
        made.manager = made._own_manager()
        made.env_ids = tuple(range(self._config["env_num"]))
        made.session = SearchSession(made.manager, made.env_ids)
        made.counting = threading.Lock()
        memo[id(self)] = made
        return made
