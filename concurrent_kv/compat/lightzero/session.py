"""`SearchSession`: what one thread's search keeps between the calls that a world model gets."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from ...batch import Batch
from ...keys import State, hash_states
from ...layout import KVLayout
from ...manager import KVCacheManager
from ...overflow import DropAndCorrect, Overflow
from ...search import Search
from .containers import LightZeroKeysValues

__all__ = ["NodeKey", "SearchSession"]

NodeKey = tuple[int, str]  # environment id, LightZero's hash of the latent state


def tokens_of_search(nodes: int, layout: KVLayout, overflow: Overflow) -> int:
    """Slots that a search of so many nodes may need, whatever happens."""
    # A node whose parent was lost holds three tokens. Where positions are added, a full window is a copy.
    return nodes * (layout.max_tokens if isinstance(overflow, DropAndCorrect) else 3)


class SearchSession(threading.local):
    """One thread's search over a world model: every attribute has a value for each thread that uses it.

    The released `WorldModel` keeps all of this in attributes of the model, which makes one search at a time of it.

    Attributes:
        search: this thread's search of the manager, opened when it is first needed.
        batch: the parents of the step under way, until its children are committed.
        Others are named as in `WorldModel`.
    """

    latent_state: Any

    def __init__(self, manager: KVCacheManager, env_ids: tuple[int, ...]) -> None:
        self.manager = manager
        self.env_ids = env_ids
        self.search: Search | None = None
        self.batch: Batch | None = None
        self.keys_values_wm: Any = None
        self.keys_values_wm_single_env: Any = None
        self.keys_values_wm_list: list[Any] = []
        self.keys_values_wm_size_list: list[int] = []
        self.keys_values_wm_size_list_current: list[int] = []
        self.reanalyze_phase = False
        self._buffers: dict[int, LightZeroKeysValues] = {}

    def keys_of(self, latent_states: State) -> list[NodeKey]:
        """A key for each row of `[rows, ...]`. Nodes of different environments never share one."""
        return list(zip(self.env_ids, hash_states(latent_states), strict=False))

    def gather(self, keys: Sequence[NodeKey], layout: KVLayout, overflow: Overflow) -> Batch:
        """The contexts of `keys`, one for each of the first environments, in this thread's buffer of that size."""
        self.close_batch()
        search = self.search
        if search is None or search.closed:
            nodes = len(self.env_ids) * (self.manager.config.num_simulations + 1)
            search = self.search = self.manager.search(
                self.env_ids, entries=nodes, tokens=tokens_of_search(nodes, layout, overflow), overflow=overflow
            )
        buffer = self.buffer(layout, len(keys))
        self.batch = search.gather(keys, self.env_ids[: len(keys)], out=buffer.packed)
        return self.batch

    def buffer(self, layout: KVLayout, rows: int) -> LightZeroKeysValues:
        """This thread's buffer for batches of `rows` rows: always the same memory, as captured graphs need it."""
        buffer = self._buffers.get(rows)
        if buffer is None:
            buffer = self._buffers[rows] = LightZeroKeysValues.empty(layout, rows)
        return buffer

    def forget_nodes(self) -> None:
        """Release every node of this thread's search, and the roots that it adopted; its reservation stays."""
        self.close_batch()
        if self.search is not None and not self.search.closed:
            self.search.keep(())

    def close_batch(self) -> None:
        """Let go of the parents of a step that did not end."""
        if self.batch is not None:
            self.batch.close()
            self.batch = None

    def close(self) -> None:
        """End this thread's search, and give its reservation back."""
        self.close_batch()
        if self.search is not None:
            self.search.close()
            self.search = None
