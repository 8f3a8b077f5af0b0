"""`SearchSession`: what one thread's search keeps between the calls that a world model gets."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...errors import InvalidArgumentError
from ...manager import KVCacheManager
from ...model.hashing import State, hash_states
from ...pool.batch import Batch
from ...search.search import Search
from .containers import LightZeroKeysValues

__all__ = ["NewestRoot", "NodeKey", "SearchSession"]

NodeKey = tuple[int, str]  # environment id, LightZero's hash of the latent state


RTOL, ATOL = 1e-5, 5e-7  # more than encoders round otherwise in batches of two sizes (6.6e-7 where they are largest)


class NewestRoot(NamedTuple):
    """The root that was stored last of an environment."""

    key: NodeKey
    state: Tensor
    length: int


class SearchSession(threading.local):
    """One thread's search over a world model: every attribute has a value for each thread that uses it.

    The released `WorldModel` keeps all of this in attributes of the model, which makes one search at a time of it.

    Attributes:
        tokens_per_node: slots that a node may need, whatever happens.
        rows: environments that are searched at a time: all of them, or those of one task.
        search: this thread's search of the manager, opened when it is first needed.
        batch: the parents of the step under way, until its children are committed.
        keys: what they were looked up by.
        is_split: whether one batch of roots is under way in several parts.
        root_environments: what `current_infer_env_ids` was for the roots of the search under way.
        newest_roots: each environment's newest root, by the manager's number.
        Others are named as in `WorldModel`.
    """

    def __init__(
        self, manager: KVCacheManager, env_ids: tuple[int, ...], tokens_per_node: int, rows: int | None = None
    ) -> None:
        self.manager = manager
        self.rows = len(env_ids) if rows is None else rows
        self.tokens_per_node = tokens_per_node
        self.layout = manager.layout
        self.env_ids = env_ids
        self.search: Search | None = None
        self.batch: Batch | None = None
        self.keys: Sequence[NodeKey] = ()
        self.latent_state: Any = None
        self.keys_values_wm: Any = None
        self.keys_values_wm_single_env: Any = None
        self.keys_values_wm_list: list[Any] = []
        self.keys_values_wm_size_list: list[int] = []
        self.keys_values_wm_size_list_current: list[int] = []
        self.keys_values_wm_token_context_list: list[Any] = []
        self.reanalyze_phase = False
        self.is_split = False
        self.root_environments: Sequence[int] | None = None
        self.newest_roots: dict[int, NewestRoot] = {}
        self._ready: Sequence[int] | None = None
        self._envs = env_ids
        self._roots: Sequence[NodeKey] = ()
        self._buffers: dict[int, LightZeroKeysValues] = {}

    @property
    def current_infer_env_ids(self) -> Sequence[int] | None:
        """The model's own environment of each row of a batch, where that was said; else rows are environments."""
        return self._ready

    @current_infer_env_ids.setter
    def current_infer_env_ids(self, ready: Sequence[int] | None) -> None:
        # Rows that it says nothing about are environments, as LightZero has it.
        self._envs = self.env_ids if ready is None else (*self.envs_of(ready), *self.env_ids[len(ready) :])
        self._ready = ready

    def env_of(self, row: int) -> int:
        """The manager's environment of a row of the batch under way."""
        return self._envs[row % len(self._envs)]

    def envs_of(self, ready: Sequence[int]) -> tuple[int, ...]:
        """The manager's environments of some of the model's own.

        Raises:
            InvalidArgumentError: the model has no such environment.
        """
        known = range(len(self.env_ids))
        if not all(env_id in known for env_id in ready):
            raise InvalidArgumentError(f"ready_env_id must be among the model's 0 to {known[-1]}, got {list(ready)}")
        return tuple([self.env_ids[env_id] for env_id in ready])

    def keys_of(self, latent_states: State, env_ids: Sequence[int] | None = None) -> list[NodeKey]:
        """A key for each row of `[rows, ...]`. Nodes of different environments never share one."""
        return list(zip(self._envs if env_ids is None else env_ids, hash_states(latent_states), strict=False))

    def gather(self, keys: Sequence[NodeKey]) -> Batch:
        """The contexts of `keys`, one for each of the first environments, in this thread's buffer of that size."""
        if self.batch is not None:
            self.close_batch()
        self.keys = keys
        search = self._open() if self.search is None else self.search
        self.batch = search.gather(keys, self._envs[: len(keys)], out=self.buffer(len(keys)).packed)
        return self.batch

    def _open(self) -> Search:
        search = self.search
        if search is None:
            nodes = self.rows * (self.manager.config.num_simulations + 1)
            search = self.search = self.manager.search(self.env_ids, entries=nodes, tokens=nodes * self.tokens_per_node)
        return search

    def adopt_roots(self, keys: Sequence[NodeKey]) -> None:
        """Keep these roots for this thread's search, whatever others clear or store from here on."""
        self._open().gather(keys, [env_id for env_id, _ in keys]).close()
        self._roots = (*self._roots, *keys)

    def root_near(self, env_id: int, state: Tensor) -> NodeKey | None:
        """The key of an environment's newest root, where that is still stored, and of this state but for rounding."""
        newest = self.newest_roots.get(env_id)
        if newest is None or newest.state.shape != state.shape:
            return None
        is_near = torch.allclose(newest.state, state, rtol=RTOL, atol=ATOL)
        return newest.key if is_near and newest.key in self.manager.init_pools[env_id] else None

    def root_lengths(self, states: Tensor) -> list[int]:
        """Tokens of the environments' newest roots, of these states; 1 for what is computed from its state alone."""
        envs = [self.env_of(row) for row in range(len(states))]
        return [
            1 if self.root_near(env_id, state) is None else self.newest_roots[env_id].length
            for env_id, state in zip(envs, states, strict=True)
        ]

    def is_elsewhere(self, row: int, state: Tensor) -> bool:
        """Whether a state that a row's environment has no root of is that of another environment's newest."""
        mine = self.env_of(row)
        return any(self.root_near(env_id, state) is not None for env_id in self.env_ids if env_id != mine)

    def buffer(self, rows: int) -> LightZeroKeysValues:
        """This thread's buffer for batches of `rows` rows: always the same memory, as captured graphs need it."""
        buffer = self._buffers.get(rows)
        if buffer is None:
            buffer = self._buffers[rows] = LightZeroKeysValues.empty(self.layout, rows)
        return buffer

    def forget_nodes(self) -> None:
        """Release every node of this thread's search. Its roots stay, and so does what it reserved."""
        self.close_batch()
        if self.search is not None and not self.search.closed:
            self.search.keep(self._roots)

    def begin(self) -> None:
        """A new search: release the nodes and the roots of the previous one, which may have been ended from outside."""
        self._roots = ()
        self.forget_nodes()
        if self.search is not None and self.search.closed:
            self.search = None

    def close_batch(self) -> None:
        """Let go of the parents of a step that did not end."""
        if self.batch is not None:
            self.batch.close()
            self.batch = None

    def close(self) -> None:
        """End this thread's search, and give its reservation back."""
        self._roots = ()
        self.close_batch()
        if self.search is not None:
            self.search.close()
            self.search = None
