"""`Attachment`: what joins a world model to a manager; the model has it as an attribute while it is attached."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from ..._checks import check_env_ids
from ...books.allocation import default_tokens
from ...device.layout import KVLayout
from ...errors import InvalidArgumentError, WrongProcessError
from ...internal import ShowsPublic
from ...locks.gate import gate
from ...manager import KVCacheManager
from ...model.overflow import Overflow
from .divergence import Divergence, ValidationReport
from .kinds import Kind
from .session import SearchSession
from .settings import Answer, Mode, layout_of, manager_config, overflow_of, rebuilds, shares_parents
from .sharing import SHARERS, clear_pools
from .validation import Validation

__all__ = ["Attachment"]

logger = logging.getLogger("concurrent_kv")

ROOTS_OF_A_SEARCH = 16  # kept of each environment for every search at a time
TOKENS_OF_A_NODE = 3  # its two new ones and, where its parent was lost, the parent's own state


class Role:
    """One use of a world model, with roots of its own: a manager, and every thread's search of it."""

    def __init__(self, manager: KVCacheManager, session: SearchSession, *, owns_manager: bool) -> None:
        self.manager = manager
        self.session = session
        self.owns_manager = owns_manager


class _Current(threading.local):
    name: str = "default"


class Attachment(metaclass=ShowsPublic):
    """A world model's place in a manager, or in one for each of its roles.

    Attributes:
        kind: what the world model is.
        mode: "validate" or "on".
        layout: the shapes of its K/V.
        env_ids: the manager's environment of each row of the model's batches.
        validation: in mode "validate", what runs both caches.
    """

    _internal = frozenset(
        (
            "clear_roots",
            "count",
            "forget_nodes",
            "leave",
            "note_misses",
            "note_moved_rows",
            "overflow",
            "owns",
            "share",
            "users",
        )
    )

    def __init__(
        self,
        world_model: Any,
        kind: Kind,
        mode: Mode,
        *,
        manager: KVCacheManager | None,
        env_ids: tuple[int, ...],
        searches: int,
        answer: Answer,
        on_divergence: Callable[[Divergence], None] | None,
        replay: float | None,
        arguments: dict[str, Any],
    ) -> None:
        self.kind = kind
        self.mode = mode
        self.layout: KVLayout = layout_of(world_model)
        window = self.layout.max_tokens
        if window < 4 or window % 2:
            raise InvalidArgumentError(
                "context_length must be an even number of at least 4 (two tokens a step, and a step beside the new "
                f"one), got {window}"
            )
        # What validation copies over is stored whole.
        self._shares = shares_parents(world_model, self.layout) and mode == "on"
        self._config = manager_config(world_model, searches)
        # Searches of several threads store their roots in the same pools: one's must outlast the others'.
        self._arguments = {"init_entries": ROOTS_OF_A_SEARCH * searches, **arguments}
        self._on_divergence, self._replay = on_divergence, replay
        self.env_ids = env_ids
        self._tasks = world_model.task_num if kind.has_tasks else 1  # one task's environments are searched at a time
        self.validation = Validation(answer, on_divergence, replay) if mode == "validate" else None
        self._overflow: tuple[Any, Overflow] | None = None
        self._start(manager)

    def _start(self, manager: KVCacheManager | None) -> None:
        self._lock = threading.Lock()
        self._users: weakref.WeakSet[Any] = weakref.WeakSet()
        self._has_warned = False
        self._has_warned_of_rows = False
        self._current = _Current()
        self._roles: dict[str, Role] = {self._current.name: self._make_role(manager)}

    def _make_role(self, manager: KVCacheManager | None) -> Role:
        owned = manager is None
        if manager is None:
            nodes, window = self._config["max_cache_size"] // self._tasks, self.layout.max_tokens
            # Nodes that share nothing may each fill a window, however long it is.
            slots = default_tokens(nodes, window) if self._shares else nodes * window
            arguments = {"recur_slots": slots, **self._arguments}
            manager = KVCacheManager(self._config, self._config["env_num"], **arguments)
        tokens = TOKENS_OF_A_NODE if self._shares else self.layout.max_tokens
        SHARERS.add(manager, self)
        return Role(
            manager, SearchSession(manager, self.env_ids, tokens, len(self.env_ids) // self._tasks), owns_manager=owned
        )

    # Of the calling thread -------------------------------------------------------------------------------------------

    @property
    def session(self) -> SearchSession:
        """The calling thread's search, in its role."""
        return self._roles[self._current.name].session

    @property
    def manager(self) -> KVCacheManager:
        """Whose pools hold the entries of the calling thread's role. Several world models may share one."""
        return self._roles[self._current.name].manager

    @property
    def role_name(self) -> str:
        """The calling thread's role."""
        return self._current.name

    @contextmanager
    def role(self, name: str) -> Iterator[None]:
        """Search in another role within the `with`, in the calling thread: with other roots, in a manager of its own.

        For an evaluator that uses the collector's model: equal observations then do not meet.
        """
        with gate.lock, self._lock:
            is_known, owns_manager = name in self._roles, self._roles[_Current.name].owns_manager
        if not is_known:
            if not owns_manager:
                raise InvalidArgumentError("role() needs managers of its own: attach without manager=")
            made = self._make_role(None)  # not under the lock: it makes pools
            with gate.lock, self._lock:
                is_first = self._roles.setdefault(name, made) is made
            if not is_first:
                made.manager.close()
        before, self._current.name = self._current.name, name
        try:
            yield
        finally:
            self._current.name = before

    @contextmanager
    def environments(self, ids: Iterable[int]) -> Iterator[None]:
        """Say which of the model's environments the rows of its batches are, for the calling thread's calls within.

        For batches that lack some: without it the first row is environment 0, as in LightZero 0.2.0, whatever has
        finished. A move and its whole search belong within. After `install()`, LightZero's own policies say it.

        Raises:
            InvalidArgumentError: one that the model does not have, or one twice; the main branch's model, which is
                told by `ready_env_id`.
        """
        if self.kind.is_main:
            raise InvalidArgumentError(
                "environments() is for LightZero 0.2.0: say ready_env_id= to a model of the main branch"
            )
        said, known = check_env_ids(ids), range(len(self.env_ids))
        rows = [known.index(env_id) for env_id in said if env_id in known]  # type: ignore[arg-type]
        if not said or len(set(rows)) < len(said):
            raise InvalidArgumentError(
                f"ids must be different ones of the model's environments, 0 to {known[-1]} (its env_num), got {said}"
            )
        session = self.session
        before, session.current_infer_env_ids = session.current_infer_env_ids, rows
        try:
            yield
        finally:
            session.current_infer_env_ids = before

    # Of the model ----------------------------------------------------------------------------------------------------

    def overflow(self, world_model: Any) -> Overflow:
        """What becomes of a full window. Follows the model's position differences when they are computed anew."""
        is_corrected = not (world_model.config.rotary_emb or rebuilds(world_model))
        source = world_model.pos_emb_diff_k if is_corrected else None
        known = self._overflow
        if known is None or known[0] is not source:
            known = self._overflow = (source, overflow_of(world_model, self.layout))
        return known[1]

    def count(self, world_model: Any, **counts: int) -> None:
        """Add to the model's own counters."""
        with gate.lock, self._lock:
            _add(vars(world_model), counts)

    def note_misses(self, missing: int, rows: int) -> None:
        """Warn, once, that of so many states searched from some contexts were not found, and so begin anew."""
        if self._has_warned:
            return
        self._has_warned = True
        logger.warning(
            "%s: %d of the %d states searched from are neither nodes of this thread's search nor its roots, so their "
            "contexts begin anew. Searches that take turns in one thread do this, or go on in another thread, or after "
            "clear_caches() or attach(): give each a thread, a role, or a copy of the model that is attached by "
            "itself. (Said once.)",
            self.manager.name,
            missing,
            rows,
        )

    def note_moved_rows(self) -> None:
        """Warn, once, of roots that are stored for other environments than those of their rows."""
        if self._has_warned_of_rows:
            return
        self._has_warned_of_rows = True
        logger.warning(
            "%s: a root was looked up for one environment and is stored for another, so the rows of this batch are "
            "others than before, as when an environment has finished: install() before LightZero makes its policy, or "
            "make the calls of a move within attachment.environments(ids). (Said once.)",
            self.manager.name,
        )

    @property
    def report(self) -> ValidationReport | None:
        """What validation compared so far; None in another mode."""
        return None if self.validation is None else self.validation.report

    # Clears and end --------------------------------------------------------------------------------------------------

    def forget_nodes(self) -> None:
        """Release the nodes of the calling thread's search. May block."""
        self.session.forget_nodes()
        if self.validation is not None:
            self.validation.clear_nodes(self.role_name)

    def clear_roots(self, row: int) -> None:
        """Remove the roots of one of the model's environments. May block."""
        self.manager.init_pools[self.env_ids[row]].clear()
        if self.validation is not None:
            self.validation.clear_roots(row, self.env_ids[row], self.role_name)

    def clear(self) -> None:
        """Clear the pools of every role, and end the calling thread's searches. May block.

        In a manager that was given, the roots of models that have other weights stay.
        """
        for role in self._all_roles():
            role.session.close()
            role.session.keys_values_wm_list = []
            clear_pools(role.manager, self)
        if self.validation is not None:
            self.validation.clear_nodes(self.role_name)
            for row in range(len(self.env_ids)):
                self.validation.clear_roots(row, self.env_ids[row], self.role_name)

    def share(self, *world_models: Any) -> None:
        """Stay open until the last of these is detached."""
        with gate.lock, self._lock:
            self._users.update(world_models)

    def users(self) -> list[Any]:
        """The world models that are attached by this: one, and its shallow copies."""
        with gate.lock, self._lock:
            return list(self._users)

    def leave(self, world_model: Any) -> None:
        """One that is detached: `close` if no other world model shares the attachment. May block."""
        with gate.lock, self._lock:
            self._users.discard(world_model)
            is_shared = len(self._users) > 0
        if not is_shared:
            self.close()

    def owns(self, manager: KVCacheManager) -> bool:
        """Whether a manager was made for this attachment, and is closed with it."""
        return any(role.owns_manager and role.manager is manager for role in self._all_roles())

    def close(self) -> None:
        """End the calling thread's searches; close the managers that were made for this attachment. May block."""
        for role in self._all_roles():
            # In a forked child there is nothing to give back: all of it is the parent's.
            with suppress(WrongProcessError):
                role.session.close()
                if role.owns_manager:
                    role.manager.close()

    def _all_roles(self) -> list[Role]:
        with gate.lock, self._lock:
            return list(self._roles.values())

    def __deepcopy__(self, memo: dict[int, Any]) -> Attachment:
        # A copied model gets weights, and so entries, of its own.
        made = object.__new__(Attachment)
        made.__dict__.update(self.__dict__)
        made.env_ids = tuple(range(self._config["env_num"]))
        if self.validation is not None:
            made.validation = Validation(self.validation.answer, self._on_divergence, self._replay)
        made._start(None)
        memo[id(self)] = made
        return made


def _add(attributes: dict[str, Any], counts: dict[str, int]) -> None:
    for name, number in counts.items():
        attributes[name] += number
