"""What the main branch stores otherwise than 0.2.0: rows of their own lengths, windows that were computed anew, tokens.

Each row's raw tokens, which such a window is computed from, are side data of its entry.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...model.kv import KeysValues
from .attached import Attached
from .containers import LightZeroKeysValues, from_lightzero
from .contexts import LOST, within_window
from .settings import rebuilds

__all__ = ["commit_nodes_of_main", "store_roots_of_main", "take_tokens"]


def take_tokens(world_model: Any, kv: Attached, states: Any) -> None:
    """Make the raw tokens of the batch that was gathered the model's; those of a state alone where it was not found."""
    batch = kv.session.batch
    assert batch is not None
    tokens = []
    for row, side in enumerate(batch.side):
        if side is None:
            state = torch.as_tensor(states[row], device=world_model.device)
            side = state.detach().reshape(-1, world_model.embed_dim)
        tokens.append(side)
    kv.session.keys_values_wm_token_context_list = tokens


def store_roots_of_main(
    world_model: Any, kv: Attached, latent_state: Tensor, lengths: Sequence[int] | None, env_ids: Sequence[int] | None
) -> None:
    """Store the model's `keys_values_wm` as roots of some of its environments, each row's own tokens alone."""
    session = kv.session
    contexts = session.keys_values_wm
    # Where roots are seeded, the batch is LightZero's own container.
    packed = contexts.packed if isinstance(contexts, LightZeroKeysValues) else from_lightzero(contexts).packed
    assert packed is not None
    size, rows = contexts.size, latent_state.shape[0]
    lengths = [size] * rows if lengths is None else [int(length) for length in lengths]
    envs = session.envs_of(range(rows) if env_ids is None else [int(env_id) for env_id in env_ids])
    session.close_batch()
    resets = _resets(world_model, latent_state, lengths)
    stored = []
    with torch.no_grad():
        if not resets.offsets and min(lengths) == size:
            whole = within_window(packed, size, kv.overflow(world_model))
            stored = [whole[:, row : row + 1] for row in range(rows)]
        else:
            for row, length in enumerate(lengths):
                own = packed[:, row : row + 1, :, size - length : size]
                is_reset = row in resets.offsets
                stored.append(_row(resets, row) if is_reset else within_window(own, length, kv.overflow(world_model)))
    keys = session.keys_of(latent_state, envs)
    for key, row_of_it, side in zip(keys, stored, _sides(world_model, kv, resets, rows), strict=True):
        session.manager.set_init_cache(key[0], key, KeysValues.from_packed(row_of_it), side=side)
    session.adopt_roots(keys)


def commit_nodes_of_main(world_model: Any, kv: Attached, latent_state: Tensor) -> None:
    """Store what the model appended as the contexts of its new nodes; whole where the window was computed anew."""
    session = kv.session
    batch, search = session.batch, session.search
    if batch is None or search is None:
        return  # contexts that were not gathered: more rows than environments, of which nothing is looked up
    rows = latent_state.shape[0]
    batch.advance(session.keys_values_wm.size - batch.start)
    keys = session.keys_of(latent_state)
    resets = _resets(world_model, latent_state, session.keys_values_wm_size_list_current)
    sides = _sides(world_model, kv, resets, rows)
    over = sorted(resets.offsets)
    shared = [row for row in range(rows) if row not in resets.offsets]
    if shared:
        search.commit(
            [keys[row] for row in shared],
            batch,
            rows=shared if over else None,
            overflow=kv.overflow(world_model),
            sides=[sides[row] for row in shared],
        )
    session.close_batch()
    if not over:
        return
    # What is found nowhere shares nothing: its row is what is written into it.
    with search.gather([LOST] * len(over), [keys[row][0] for row in over]) as anew:
        length = resets.cache.size
        for number, row in enumerate(over):
            anew.data[:, number, :, :length] = _row(resets, row)[:, 0]
        anew.advance(length)
        lengths = [length] * len(over)
        search.commit([keys[row] for row in over], anew, lengths=lengths, sides=[sides[row] for row in over])


class Resets(NamedTuple):
    """As the model's own of that name: which rows' windows it computed anew, in `cache`, and from which tokens."""

    cache: Any
    offsets: Mapping[int, int]
    retained_contexts: Mapping[int, Tensor]


NO_RESETS = Resets(None, {}, {})


def _resets(world_model: Any, latent_state: Tensor, lengths: Sequence[int]) -> Any:
    """The windows that the model computes anew, where it is one that does."""
    if not rebuilds(world_model):
        return NO_RESETS
    return world_model._prepare_exact_cache_resets(latent_state, lengths)


def _row(resets: Any, row: int) -> Tensor:
    """One of those windows, `[2 * layers, 1, heads, tokens, head_dim]`."""
    number, layers = resets.offsets[row], resets.cache._keys_values
    caches = [layer._k_cache for layer in layers] + [layer._v_cache for layer in layers]
    return torch.stack([cache._cache[number : number + 1, :, : cache._size] for cache in caches])


def _sides(world_model: Any, kv: Attached, resets: Any, rows: int) -> list[Tensor | None]:
    """The raw tokens of each row, where the model keeps them."""
    if not world_model.rebuild_kv_window_from_tokens:
        return [None] * rows
    tokens = kv.session.keys_values_wm_token_context_list
    return [resets.retained_contexts.get(row, tokens[row]).detach().clone() for row in range(rows)]
