"""From latent states to the batch that the model runs on, and from what the model appended to stored entries."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...device.positions import PositionSteps
from ...model.kv import KeysValues
from ...model.overflow import DropAndCorrect, DropLazily, DropOldest, Overflow
from .attached import Attached
from .containers import LightZeroKeysValues
from .session import NewestRoot, NodeKey, SearchSession

LOST: NodeKey = (-1, "")  # nothing is stored under it

__all__ = [
    "commit_nodes",
    "generate_contexts",
    "node_contexts",
    "replace_contexts",
    "root_contexts",
    "run_on",
    "start_positions_of_reanalysis",
    "state_alone",
    "store_roots",
    "within_window",
]


def node_contexts(
    world_model: Any, kv: Attached, latent_state: Any, rows: int, position_of: Callable[[int], int]
) -> list[int]:
    """Make the parents' contexts the model's `keys_values_wm`; returns each row's length.

    A parent that is neither a node of this search nor a root of its environment gets a context of its own state alone,
    at the position that `position_of` says for its row.
    """
    session = kv.session
    states = latent_state if len(latent_state) == rows else latent_state[:rows]
    batch = session.gather(session.keys_of(states))
    missing = batch.entries.count(None)
    if missing:
        for row, hit in enumerate(batch.hits):
            if not hit:
                batch.fill(row, state_alone(world_model, kv, torch.from_numpy(states[row]), position_of(row)))
        if not session.reanalyze_phase:  # where roots are not stored
            kv.note_misses(missing, rows)
    kv.count(world_model, hit_count=rows - missing, total_query_count=rows)
    run_on(session, rows, batch.start)
    return list(batch.lengths)


def root_contexts(world_model: Any, kv: Attached, last_obs_embeddings: Tensor, rows: int, start_pos: Any) -> list[int]:
    """Make the contexts of the previous roots the model's `keys_values_wm`; returns each row's length."""
    session = kv.session
    keys = session.keys_of(last_obs_embeddings[:rows])
    batch = session.gather(keys)
    hits = batch.hits.count(True)
    if hits < rows and not kv.kind.is_main:
        found = list(batch.hits)
        near = [
            key if is_found else session.root_near(key[0], state) or key
            for key, is_found, state in zip(keys, found, last_obs_embeddings, strict=False)
        ]
        if near != keys:
            batch = session.gather(near)
            hits = batch.hits.count(True)
        if any(
            not is_found and session.is_elsewhere(row, last_obs_embeddings[row])
            for row, is_found in enumerate(batch.hits)
        ):
            kv.note_moved_rows()
    if hits < rows:
        for row, hit in enumerate(batch.hits):
            if not hit:
                batch.fill(row, state_alone(world_model, kv, last_obs_embeddings[row], int(start_pos[row])))
    kv.count(world_model, root_hit_cnt=hits, root_total_query_cnt=rows)
    run_on(session, rows, batch.start)
    return list(batch.lengths)


def generate_contexts(
    world_model: Any, kv: Attached, latent_state: Any, rows: int, start_positions: Sequence[int]
) -> list[int]:
    """As `node_contexts` where nothing is looked up: every row gets a context of its own state alone."""
    contexts = LightZeroKeysValues.empty(kv.layout, rows)
    for row in range(rows):
        alone = state_alone(world_model, kv, torch.from_numpy(latent_state[row]), start_positions[row])
        assert alone.packed is not None
        contexts.packed[:, row, :, :1] = alone.packed[:, 0]
    contexts.set_size(1)
    kv.session.close_batch()
    kv.session.keys_values_wm = contexts
    kv.count(world_model, total_query_count=rows)
    return [1] * rows


def state_alone(world_model: Any, kv: Attached, latent_state: Tensor, start_pos: int) -> KeysValues:
    """K and V of one state without any history, `[tokens, embed_dim]`, as LightZero computes it on a miss.

    `start_pos`: its position; of a model for several tasks its task, which such a model asks instead.
    """
    contexts = LightZeroKeysValues.empty(kv.layout, 1)
    world_model.forward(
        {"obs_embeddings": latent_state.unsqueeze(0).to(kv.layout.device)},
        past_keys_values=contexts,
        is_init_infer=True,
        **{"task_id" if kv.kind.has_tasks else "start_pos": start_pos},
    )
    return KeysValues.from_packed(contexts.packed[:, :, :, : contexts.size])


def run_on(session: SearchSession, rows: int, size: int) -> None:
    """Give the model this thread's buffer, of which the first `size` columns were gathered."""
    contexts = session.buffer(rows)
    contexts.set_size(size)
    session.keys_values_wm = contexts


def replace_contexts(kv: Attached, rows: Mapping[int, KeysValues], *, as_root: bool) -> None:
    """Let the model run on other contexts in some rows than those that were gathered, and store them so.

    `as_root`: the batch will be stored as roots, which are stored whole.
    """
    session = kv.session
    contexts: LightZeroKeysValues = session.keys_values_wm
    size = contexts.size
    lengths = list(session.keys_values_wm_size_list)
    old = KeysValues.from_packed(contexts.packed[:, :, :, :size].clone(), lengths)
    if session.batch is not None and not as_root:
        # A row that was found shares its parent's tokens when it is committed: it has to be one that was not found.
        hits = session.batch.hits
        keys = [key if hits[row] and row not in rows else LOST for row, key in enumerate(session.keys)]
        batch = session.gather(keys)
        for row, hit in enumerate(batch.hits):
            if not hit:
                batch.fill(row, rows.get(row) or old.row(row))
        contexts.set_size(batch.start)
        session.keys_values_wm_size_list = list(batch.lengths)
        return
    for row, kv_of_row in rows.items():
        lengths[row] = kv_of_row.lengths[0]
    longest = max(lengths)
    contexts.packed[:, :, :, :longest] = 0
    for row, length in enumerate(lengths):
        source = rows.get(row) or old.row(row)
        assert source.packed is not None
        contexts.packed[:, row, :, longest - length : longest] = source.packed[:, 0]
    contexts.set_size(longest)
    session.keys_values_wm_size_list = lengths


def commit_nodes(world_model: Any, kv: Attached, latent_state: Tensor) -> None:
    """Store what the model appended as the contexts of its new nodes, sharing their parents' tokens."""
    session = kv.session
    batch, search = session.batch, session.search
    if batch is None or search is None:
        return  # contexts that were not gathered: the reanalyze phase stores nothing
    batch.advance(session.keys_values_wm.size - batch.start)
    search.commit(session.keys_of(latent_state), batch, overflow=kv.overflow(world_model))
    session.batch = None


def store_roots(world_model: Any, kv: Attached, latent_state: Tensor) -> None:
    """Store the model's `keys_values_wm` as its environments' roots.

    As LightZero stores them: every row has the length of the longest, and a shorter row's padding counts as tokens.
    """
    session = kv.session
    contexts: LightZeroKeysValues = session.keys_values_wm
    session.close_batch()
    with torch.no_grad():
        rows = within_window(contexts.packed, contexts.size, kv.overflow(world_model))
    keys = session.keys_of(latent_state)
    for row, key in enumerate(keys):
        session.manager.set_init_cache(key[0], key, KeysValues.from_packed(rows[:, row : row + 1]))
    session.adopt_roots(keys)
    for key, state in zip(keys, latent_state.detach(), strict=True):
        session.newest_roots[key[0]] = NewestRoot(key, state, rows.shape[3])


def within_window(packed: Tensor, size: int, overflow: Overflow) -> Tensor:
    """The tokens of every row that stay, corrected where positions are absolute."""
    if size < overflow.limit:
        return packed[:, :, :, :size]
    assert isinstance(overflow, DropOldest | DropAndCorrect | DropLazily)
    kept = packed[:, :, :, overflow.count : size]
    if isinstance(overflow, DropOldest):
        return kept
    if isinstance(overflow, DropLazily):
        assert isinstance(overflow.table, PositionSteps)
        difference = overflow.table.packed
    else:
        difference = overflow.packed
    # [2 * layers, tokens, heads, head_dim] to [2 * layers, 1, heads, tokens, head_dim]
    return kept + difference[:, : kept.shape[3]].transpose(1, 2).unsqueeze(1)


def start_positions_of_reanalysis(start_pos: Any, rows: int) -> list[int]:
    """The position of each row, as LightZero lays reanalyzed segments out: one more row after each segment, at 0."""
    segments = np.asarray(start_pos)
    padded = np.concatenate([segments, np.zeros((segments.shape[0], 1), dtype=segments.dtype)], axis=1)
    return [int(position) for position in padded.reshape(-1)[:rows]]
