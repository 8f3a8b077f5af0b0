"""Validation: every call of an attached world model runs on both caches, and everything is compared.

The released code runs as it is, on a cache of its own (`ReleasedCache`); so does ours. What each retrieved is compared
before the model runs, the outputs and what each stored afterwards. Where they differ, the state of the one that answers
is copied over to the other, so that the comparison goes on from there.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...model.hashing import hash_states
from ...model.kv import KeysValues
from .attached import Attached, replaced_class
from .contexts import replace_contexts
from .divergence import Divergence, ValidationReport, first_difference
from .main_released import ReleasedCacheOfMain
from .released import ReleasedCache
from .replay import Entry, Replay, Step, is_close, row_of
from .session import SearchSession
from .settings import Answer

__all__ = ["Validation"]

logger = logging.getLogger("concurrent_kv")

COUNTS = ("hit_count", "total_query_count", "root_hit_cnt", "root_total_query_cnt")
COUNTS_OF_MAIN = (
    *("kv_padding_total_batches", "kv_padding_unequal_batches", "kv_padding_total_samples"),
    *("kv_padding_padded_samples", "kv_padding_token_count", "kv_padding_max_tokens"),
    *("exact_kv_reset_batches", "exact_kv_reset_samples"),
    *("reanalysis_root_seed_count", "reanalysis_root_seed_hit_count"),
)


class Validation:
    """Both caches of one attached model. The released one knows no threads: calls take turns.

    Args:
        answer: whose answers the caller gets: "off", the released cache's, or "on", ours.
        on_divergence: called with each difference, in the thread that found it.
        replay: the share of contexts to compute anew from their tokens; none if left out.

    Attributes:
        report: what was compared so far.
    """

    def __init__(
        self, answer: Answer, on_divergence: Callable[[Divergence], None] | None, replay: float | None = None
    ) -> None:
        self.answer = answer
        self.replay = None if replay is None else Replay(replay)
        self.on_divergence = on_divergence
        self.report = ValidationReport()
        self._turn = threading.RLock()
        self._released: ReleasedCache | None = None
        self._cleared_by: tuple[int, str] | None = None  # the thread and role that cleared the released nodes last
        # Of the call under way:
        self._model: Any = None
        self._where = ""
        self._keys: list[str] = []
        self._run_released: Callable[[], Any] = lambda: None
        self._their_outputs: Any = None
        self._states: Any = None  # of the previous roots
        self._has_others = False  # these are not of the environments of the batch
        self._parents: list[Entry] | None = None  # what the model runs on, where that is replayed

    # A call --------------------------------------------------------------------------------------------------------

    def step(self, world_model: Any, kv: Attached, own: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        """One `forward_recurrent_inference`; `own` is the attached model's."""
        with self._turn:
            cache = self._begin(world_model, kv, "node", arguments[0][-1][0])
            self._run_released = lambda: cache.model.forward_recurrent_inference(*arguments)
            outputs = own(*arguments)
            is_stored = not kv.session.reanalyze_phase
            if is_stored:
                self._note_steps(cache, kv, arguments, outputs[1])
            if self._their_outputs is None:
                if is_stored:
                    self._copy_nodes(cache, kv, outputs[1])
                return outputs
            self._compare_outputs(kv, self._their_outputs, outputs)
            if is_stored:
                self._compare_nodes(cache, kv, outputs[1])
            return self._their_outputs if self.answer == "off" else outputs

    def root(
        self,
        world_model: Any,
        kv: Attached,
        own: Callable[..., Any],
        arguments: tuple[Any, ...],
        ours: tuple[Any, ...] | None = None,
    ) -> Any:
        """One `wm_forward_for_initial_infererence` while searching; `own` is the attached model's.

        `ours`: the arguments with the previous roots of the batch's own environments, where `arguments` has others.
        Both caches are asked for those of the one that answers.
        """
        with self._turn:
            if self.replay is not None:
                self.replay.forget_nodes(kv.role_name)  # of the search before
            has_others = ours is not None and ours[0] is not arguments[0]
            if ours is not None and self.answer == "on":
                arguments = ours
            cache = self._begin(world_model, kv, "root", arguments[0])
            self._states, self._has_others = arguments[0], has_others and arguments is not ours
            self._run_released = lambda: cache.model.wm_forward_for_initial_infererence(*arguments)
            outputs = own(*arguments)
            if self._their_outputs is None:
                # An episode's first step retrieves nothing.
                self._their_outputs = self._run_uncounted()
            self._compare_outputs(kv, _fields(self._their_outputs), _fields(outputs))
            self._compare_roots(cache, kv, arguments[2])
            self._note_roots(cache, kv, arguments)
            return self._their_outputs if self.answer == "off" else outputs

    def mixed_root(self, world_model: Any, kv: Attached, own: Callable[[], Any], ours: tuple[Any, ...]) -> Any:
        """As `root`, of a batch that the released code cannot take: our answers are given, and our roots copied."""
        with self._turn:
            cache = self._begin(world_model, kv, "root", ours[0])
            outputs = own()
            self._copy_roots(cache, kv, ours[2])
            return outputs

    def _copy_roots(self, cache: ReleasedCache, kv: Attached, states: Tensor) -> None:
        """Our new roots in the released cache, which cannot compute them."""
        keys = hash_states(states)
        roots = [self._our_root(kv, row, key) for row, key in enumerate(keys)]
        cache.put_roots(keys, roots)
        for row, (key, root) in enumerate(zip(keys, roots, strict=True)):
            self._note(row, "context", defect="mixed batch")
            if self.replay is not None and root is not None:
                self.replay.put_root(cache.role, (kv.session.env_of(row), key), Entry(root))

    def seed(self, world_model: Any, kv: Attached, arguments: tuple[Any, ...]) -> None:
        """One `seed_reanalysis_root_caches` of the main branch, in its own cache: ours has seeded its own."""
        with self._turn:
            cache = self._begin(world_model, kv, "root", np.asarray(arguments[0]))
            self._run_released = lambda: cache.model.seed_reanalysis_root_caches(*arguments)
            self._run_uncounted()

    def _begin(self, world_model: Any, kv: Attached, where: str, states: Any) -> ReleasedCache:
        if self._released is None:
            made = ReleasedCacheOfMain if kv.kind.is_main else ReleasedCache
            self._released = made(world_model, replaced_class(type(world_model)), self._compare_contexts)
        self._model, self._where, self._their_outputs, self._parents = world_model, where, None, None
        self._run_released = lambda: None
        self._keys = hash_states(states)
        self._kv = kv
        self._released.role = kv.role_name
        # Each thread has its own of these; the released code finds them in the model.
        self._released.model.latent_state = None
        self._released.model.reanalyze_phase = kv.session.reanalyze_phase
        self._released.model.current_infer_env_ids = kv.session.current_infer_env_ids
        self.report.calls += 1
        return self._released

    def retrieved(self) -> None:
        """Our contexts are there: run the released code, which compares its own as soon as it has them."""
        cache, rows = self._released, self._kv.session.keys_values_wm_size_list
        assert cache is not None
        if self._where == "node" and not self._kv.session.reanalyze_phase:
            lacking = [row for row in range(len(rows)) if cache.lacks(row, self._keys[row])]
            if lacking:
                self._note_raise(cache, lacking)
                self._parents = self._actual_parents({})
                return
        self._their_outputs = self._run_uncounted()

    def _run_uncounted(self) -> Any:
        attributes = vars(self._model)
        counts = {name: attributes[name] for name in (*COUNTS, *COUNTS_OF_MAIN) if name in attributes}
        try:
            return self._run_released()
        finally:
            attributes.update(counts)

    def _note_raise(self, cache: ReleasedCache, lacking: list[int]) -> None:
        try:
            self._run_uncounted()
        except TypeError:
            mine = self._cleared_by in (None, (threading.get_ident(), cache.role))
            for row in lacking:
                self._note(row, "context", defect="miss raises" if mine else "cleared by another")
        else:
            raise AssertionError("the released code was expected to raise TypeError for a state that it never stored")

    # Comparisons ---------------------------------------------------------------------------------------------------

    def _note(
        self,
        row: int,
        what: str,
        found: tuple[int, int, float] | None = None,
        defect: str | None = None,
        wrong: str | None = None,
    ) -> None:
        layer, token, difference = found or (None, None, None)
        env_id, call = self._kv.session.env_of(row), self.report.calls - 1
        if wrong in ("ours", "both"):
            defect = None  # the released code's own defects leave ours right
        key = self._keys[row]
        divergence = Divergence(call, self._where, what, key, env_id, layer, token, difference, defect, wrong)
        if defect is None:
            if self.report.first_unexplained is None:
                logger.error("%s: %s", self._kv.manager.name, divergence)
        elif defect not in self.report.defects:
            logger.warning("%s: %s", self._kv.manager.name, divergence)
        self.report.add(divergence)
        if self.on_divergence is not None:
            self.on_divergence(divergence)

    def _compare_contexts(self) -> None:
        """Both have retrieved, and the released code is about to run the model."""
        kv, cache = self._kv, self._released
        assert cache is not None
        session = kv.session
        theirs, their_lengths = cache.contexts(), list(cache.model.keys_values_wm_size_list)
        ours = session.keys_values_wm.packed[:, :, :, : session.keys_values_wm.size]
        our_lengths = session.keys_values_wm_size_list
        self.report.contexts += len(their_lengths)
        if self._where == "root" and not kv.kind.is_main:
            self._note_misses(cache, session)
        is_equal = their_lengths == our_lengths and torch.equal(theirs, ours)
        if is_equal and self.replay is None:
            return
        different: dict[int, KeysValues] = {}
        right: dict[int, Entry] = {}
        for row, (length, our_length) in enumerate(zip(their_lengths, our_lengths, strict=True)):
            their_row, our_row = _last(theirs, row, length), _last(ours, row, our_length)
            found = first_difference(their_row, our_row) if length == our_length else None
            differs = length != our_length or found is not None
            wrong = self._replay_row(cache, row, their_row, our_row, right, differs=differs)
            if differs:
                different[row] = KeysValues.from_packed(their_row.unsqueeze(1))
                what = "context" if length == our_length else "length"
                self._note(row, what, found, self._why(cache, row), wrong)
            elif wrong is not None:
                self._note(row, "replay", wrong=wrong)
        if different:
            self._copy_contexts(cache, ours, our_lengths, different)
        if self.replay is not None:
            self._parents = self._actual_parents(right)

    def _copy_contexts(
        self, cache: ReleasedCache, ours: Tensor, our_lengths: list[int], different: dict[int, KeysValues]
    ) -> None:
        """What is answered with becomes the other's."""
        kv, session = self._kv, self._kv.session
        if self.answer == "on":
            cache.put_contexts(ours.clone(), list(our_lengths))
            cache.model.keys_values_wm_token_context_list = list(session.keys_values_wm_token_context_list)
        else:
            replace_contexts(kv, different, as_root=self._where == "root")
            if kv.kind.is_main:
                session.keys_values_wm_token_context_list = list(cache.model.keys_values_wm_token_context_list)

    # Replay --------------------------------------------------------------------------------------------------------

    def _replay_row(
        self,
        cache: ReleasedCache,
        row: int,
        theirs: Tensor,
        ours: Tensor,
        right: dict[int, Entry],
        *,
        differs: bool,
    ) -> str | None:
        """Which of the caches is wrong by a row's tokens; notes in `right` where what is answered with is not."""
        replay, session = self.replay, self._kv.session
        if replay is None or session.reanalyze_phase or session.batch is None:
            return None
        entry = replay.find(cache.role, session.keys[row])
        if entry is None:
            return None  # what was stored by no call that was seen
        right[row] = entry
        if not (differs or replay.draw()):
            return None
        self.report.replayed += 1
        truth = replay.truth_of(cache.model, self._kv, entry)
        are_close = is_close(theirs, truth), is_close(ours, truth)
        if not are_close[0 if self.answer == "off" else 1]:
            del right[row]
        return {(True, True): None, (False, True): "released", (True, False): "ours", (False, False): "both"}[are_close]

    def _actual_parents(self, right: dict[int, Entry]) -> list[Entry] | None:
        """What each row's context was computed from: the tokens behind it, or it is taken as it is."""
        session = self._kv.session
        if self.replay is None or session.reanalyze_phase:
            return None
        contexts = session.keys_values_wm.packed[:, :, :, : session.keys_values_wm.size]
        return [
            right.get(row) or Entry(_last(contexts, row, length))
            for row, length in enumerate(session.keys_values_wm_size_list)
        ]

    def _paddings(self) -> list[int]:
        lengths = self._kv.session.keys_values_wm_size_list
        return [max(lengths) - length for length in lengths]

    def _note_steps(self, cache: ReleasedCache, kv: Attached, arguments: tuple[Any, ...], states: Tensor) -> None:
        """What a simulated step appended to each row."""
        if self.replay is None or self._parents is None:
            return
        history, _, depths, positions = arguments
        actions, paddings = history[-1][1], self._paddings()
        size = -1 if not self._model.continuous_action_space else self._model.action_space_size
        for row, (key, parent) in enumerate(zip(kv.session.keys_of(states), self._parents, strict=True)):
            action = actions.reshape(len(states), -1)[row].reshape(1, size).clone()
            depth = row_of(depths, row) if len(depths) else ()
            step = Step(action, states[row], row_of(positions, row), paddings[row], depth)
            self.replay.put_node(cache.role, key, Entry(None, parent, step))

    def _note_roots(self, cache: ReleasedCache, kv: Attached, arguments: tuple[Any, ...]) -> None:
        """What each root is, computed at once: a chain of roots may be as long as an episode."""
        replay = self.replay
        if replay is None:
            return
        _, batch_action, states, positions = arguments
        model, parents = cache.model, self._parents
        paddings = [] if parents is None else self._paddings()
        for row, key in enumerate(kv.session.keys_of(states)):
            position = row_of(positions, row)
            if parents is None:
                truth = replay.first_root(model, kv, states[row], position)
            else:
                action = torch.from_numpy(np.array(batch_action[row : row + 1])).to(states.device)
                action = action.unsqueeze(1 if model.continuous_action_space else -1)
                step = Step(action, states[row], position, paddings[row], None)
                truth = replay.truth_of(model, kv, Entry(None, parents[row], step))
            replay.put_root(cache.role, key, Entry(truth))

    # Why -----------------------------------------------------------------------------------------------------------

    def _note_misses(self, cache: ReleasedCache, session: SearchSession) -> None:
        """What neither finds as the batch has other rows than before: equal, and wrong in both."""
        assert session.batch is not None
        for row, is_found in enumerate(session.batch.hits):
            is_lost = not is_found and not cache.has_root(row, self._keys[row])
            if is_lost and session.is_elsewhere(row, self._states[row]):
                self._note(row, "miss", defect="roots by row")

    def _why(self, cache: ReleasedCache, row: int) -> str | None:
        session, key = self._kv.session, self._keys[row]
        if session.reanalyze_phase and not self._kv.kind.is_main:
            return None  # nothing is retrieved
        if self._where == "root":
            if self._kv.kind.is_main:
                return cache.why_root(row, key)
            if self._has_others:
                return "roots by row"
            assert session.batch is not None
            missed = cache.why_missed(row, key, session.keys[row][1]) if session.batch.hits[row] else None
            return missed or cache.why_root(row, key)
        is_own = session.search is not None and (session.env_of(row), key) in session.search
        defect = cache.why_node(row, key, is_own_node=is_own)
        if defect is None and is_own and isinstance(cache, ReleasedCacheOfMain) and cache.forgot(row, key):
            # Where 0.2.0 raises, the main branch computes the state alone.
            mine = self._cleared_by in (None, (threading.get_ident(), cache.role))
            return None if mine else "cleared by another"
        return defect

    def _compare_outputs(self, kv: Attached, theirs: tuple[Any, ...], ours: tuple[Any, ...]) -> None:
        self.report.outputs += 1
        for their, our in zip(theirs, ours, strict=True):
            if isinstance(their, Tensor) and not torch.equal(their, our):
                rows = (their != our).flatten(1).any(dim=1).nonzero() if their.shape == our.shape else [[0]]
                self._note(int(rows[0][0]), "output")
                return

    def _compare_nodes(self, cache: ReleasedCache, kv: Attached, latent_state: Tensor) -> None:
        self._keys = hash_states(latent_state)
        for row, our_row in enumerate(self._our_nodes(kv, latent_state)):
            # Where equal states of two environments took one place, the last one's is there; noted when it is read.
            self._compare_entry(row, cache.stored_node(row, self._keys[row]), our_row)

    def _compare_roots(self, cache: ReleasedCache, kv: Attached, latent_state: Tensor) -> None:
        self._keys = hash_states(latent_state)
        for row, key in enumerate(self._keys):
            self._compare_entry(row, cache.stored_root(row, key), self._our_root(kv, row, key))

    def _our_root(self, kv: Attached, row: int, key: str) -> Tensor | None:
        env_id = kv.session.env_of(row)
        found = kv.manager.init_pools[env_id].peek((env_id, key))
        return None if found is None else torch.cat([found.keys, found.values])[:, 0]

    def _compare_entry(self, row: int, theirs: Tensor | None, ours: Tensor | None) -> None:
        if theirs is None:
            return
        self.report.entries += 1
        if ours is None or theirs.shape != ours.shape:
            self._note(row, "entry")
        elif (found := first_difference(theirs, ours)) is not None:
            self._note(row, "entry", found)

    def _our_nodes(self, kv: Attached, latent_state: Tensor) -> list[Tensor]:
        session = kv.session
        keys = session.keys_of(latent_state)
        assert session.search is not None
        with session.search.gather(keys, [env_id for env_id, _ in keys]) as batch:
            return [_last(batch.data[:, :, :, : batch.start], row, batch.lengths[row]) for row in range(len(keys))]

    def _copy_nodes(self, cache: ReleasedCache, kv: Attached, latent_state: Tensor) -> None:
        """Store our nodes in the released cache, which raised before it could store its own."""
        cache.put_nodes(hash_states(latent_state), self._our_nodes(kv, latent_state))

    # Clears --------------------------------------------------------------------------------------------------------

    def clear_nodes(self, role: str) -> None:
        """The released cache's nodes go, as ours did."""
        with self._turn:
            if self.replay is not None:
                self.replay.forget_nodes(role)
            if self._released is not None:
                self._cleared_by = (threading.get_ident(), role)
                self._released.clear_nodes()

    def clear_roots(self, row: int, env_id: int, role: str) -> None:
        """The released cache's roots of one environment go, as ours did."""
        with self._turn:
            if self.replay is not None:
                self.replay.forget_roots(env_id)
            if self._released is not None:
                self._released.clear_roots(row, role)


def _last(packed: Tensor, row: int, length: int) -> Tensor:
    """The last `length` tokens of a row, `[2 * layers, heads, length, head_dim]`; a copy."""
    return packed[:, row, :, packed.shape[3] - length :].clone()


def _fields(outputs: Any) -> tuple[Any, ...]:
    """The tensors of a `WorldModelOutput`."""
    return tuple(vars(outputs).values())
