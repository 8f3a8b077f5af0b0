"""What contexts should be: computed from the tokens that led to them, one row at a time, and from neither cache.

A token's keys and values depend on the batch that it was computed in: LightZero 0.2.0 has no masks, so the padding
before a shorter context counts. What is replayed is therefore a row's own tokens behind as much padding as it had.
"""

from __future__ import annotations

import random
import threading
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import InvalidArgumentError, InvalidTypeError
from ...model.overflow import Overflow
from .attached import Attached
from .containers import LightZeroKeysValues
from .contexts import within_window

__all__ = ["Entry", "Replay", "Step", "check_replay", "is_close", "row_of"]

ROOTS_KNOWN = 1024  # of all environments and roles; older ones are not replayed
RTOL, ATOL = 1e-3, 1e-4  # a row computed alone rounds otherwise than in its batch


def check_replay(replay: Any) -> None:
    """Raise unless this is a share of contexts, or None."""
    if replay is None:
        return
    if not isinstance(replay, int | float) or isinstance(replay, bool):
        raise InvalidTypeError(f"replay must be a number, the share of contexts to compute anew, got {replay!r}")
    if not 0 < replay <= 1:
        raise InvalidArgumentError(f"replay must be above 0 and at most 1, the share of all contexts, got {replay!r}")


@dataclass(frozen=True)
class Step:
    """What was appended to a context.

    Attributes:
        action: as the model takes it, of one row.
        state: the latent state that it led to, `[tokens, embed_dim]`.
        position: of that state in its episode, as the model was told.
        padding: columns before the context in the batch that it was computed in.
        depth: of the parent in its tree; None for a root.
    """

    action: Tensor
    state: Tensor
    position: Any
    padding: int
    depth: Any


@dataclass
class Entry:
    """A context by how it came about: computed already (`truth`), or a step behind its parent."""

    truth: Tensor | None  # [2 * layers, heads, tokens, head_dim]
    parent: Entry | None = None
    step: Step | None = None


class Replay:
    """The tokens behind what one attached model stored, of every role and thread. Calls take turns: see `Validation`.

    Args:
        share: of the contexts that both caches return alike, those that are computed anew.
    """

    def __init__(self, share: float) -> None:
        self.share = share
        self._drawn = random.Random(0)
        self._roots: OrderedDict[tuple[str, Hashable], Entry] = OrderedDict()
        self._of_thread = threading.local()

    def draw(self) -> bool:
        """Whether the next context is one of the sample."""
        return self._drawn.random() < self.share

    # What is stored --------------------------------------------------------------------------------------------------

    def _nodes(self, role: str) -> dict[Hashable, Entry]:
        by_role = vars(self._of_thread).setdefault("by_role", {})
        nodes: dict[Hashable, Entry] = by_role.setdefault(role, {})
        return nodes

    def put_node(self, role: str, key: Hashable, entry: Entry) -> None:
        """A node of the calling thread's search."""
        self._nodes(role)[key] = entry

    def put_root(self, role: str, key: Hashable, entry: Entry) -> None:
        """A root, of the newest `ROOTS_KNOWN`."""
        self._roots[role, key] = entry
        self._roots.move_to_end((role, key))
        if len(self._roots) > ROOTS_KNOWN:
            self._roots.popitem(last=False)

    def find(self, role: str, key: Hashable) -> Entry | None:
        """What a lookup should find: a node of the search before a root."""
        return self._nodes(role).get(key) or self._roots.get((role, key))

    def forget_nodes(self, role: str) -> None:
        """The calling thread's nodes are gone."""
        self._nodes(role).clear()

    def forget_roots(self, env_id: int) -> None:
        """The roots of an environment are gone, in every role."""
        for role_and_key in [each for each in self._roots if each[1][0] == env_id]:  # type: ignore[index]
            del self._roots[role_and_key]

    # What it should be -----------------------------------------------------------------------------------------------

    def truth_of(self, model: Any, kv: Attached, entry: Entry) -> Tensor:
        """The context of an entry, `[2 * layers, heads, tokens, head_dim]`."""
        behind = [entry]
        while behind[-1].truth is None:
            parent = behind[-1].parent
            assert parent is not None
            behind.append(parent)
        context = behind[-1].truth
        assert context is not None
        overflow = kv.overflow(model)
        for each in reversed(behind[:-1]):
            assert each.step is not None
            context = each.truth = _step(model, kv, context, each.step, overflow)
            each.parent = each.step = None
        return context

    def first_root(self, model: Any, kv: Attached, state: Tensor, position: Any) -> Tensor:
        """The context of an episode's first state."""
        contexts = LightZeroKeysValues.empty(kv.layout, 1)
        _append(model, contexts, {"obs_embeddings": state.unsqueeze(0)}, {"is_init_infer": True, "start_pos": position})
        return contexts.packed[:, 0, :, : contexts.size].clone()


def is_close(context: Tensor, truth: Tensor) -> bool:
    """Whether a context is what it should be, but for rounding."""
    return context.shape == truth.shape and torch.allclose(context, truth, rtol=RTOL, atol=ATOL)


def row_of(values: Any, row: int) -> Any:
    """One row's of what is said once for all rows, or once for each."""
    return values if np.ndim(values) == 0 else [values[row]]


def _step(model: Any, kv: Attached, context: Tensor, step: Step, overflow: Overflow) -> Tensor:
    contexts, length = LightZeroKeysValues.empty(kv.layout, 1), context.shape[2]
    size = step.padding + length
    contexts.packed[:, 0, :, : step.padding] = 0
    contexts.packed[:, 0, :, step.padding : size] = context
    contexts.set_size(size)
    told: dict[str, Any] = {"start_pos": step.position, "is_init_infer": step.depth is None}
    if step.depth is not None:
        told["search_depth"] = step.depth
    for number, token in enumerate(({"act_tokens": step.action}, {"obs_embeddings": step.state.unsqueeze(0)})):
        _append(model, contexts, token, told, [length + number])
    if step.depth is None:  # a root is stored with its padding
        return within_window(contexts.packed, contexts.size, overflow)[:, 0].clone()
    own = contexts.packed[:, :, :, step.padding : contexts.size]
    return within_window(own, length + 2, overflow)[:, 0].clone()


def _append(
    model: Any, contexts: Any, token: dict[str, Tensor], told: dict[str, Any], lengths: list[int] | None = None
) -> None:
    # Absolute positions are read from there. The released code sets it anew when its own contexts are together.
    vars(model)["keys_values_wm_size_list_current"] = lengths
    with torch.no_grad():
        model.forward(token, past_keys_values=contexts, **told)
