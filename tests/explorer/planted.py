"""Which bugs are planted, and the program that has to notice each.

A planted bug is a function that puts a plausible wrong version in the place of a part of the library.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from . import planted_references, planted_writes

__all__ = ["PLANTED", "Plant"]

Plant = Callable[[pytest.MonkeyPatch], None]

PLANTED: dict[Plant, str] = {
    planted_references.references_released_before_commit_shares_them: "commit|replace its parent",
    planted_references.slots_freed_before_the_readers_copy_is_done: "get|put",
    planted_references.references_taken_after_the_shard_was_let_go: "get|put",
    planted_references.index_reference_dropped_twice: "pop|pop",
    planted_references.victim_not_checked_again_under_its_lock: "replace|evict it",
    planted_references.victim_pinned_meanwhile_evicted_all_the_same: "pin|evict",
    planted_references.epochs_not_compared_by_reads: "get, then get|clear across shards",
    planted_writes.epoch_compared_before_the_lock: "put|clear",
    planted_references.epoch_of_a_commit_read_after_the_gather: "commit|clear",
    planted_references.epoch_of_a_commit_read_at_the_commit: "commit|clear",
    planted_references.swept_before_the_epoch_is_raised: "put|clear",
    planted_writes.batch_published_shard_by_shard: "put many|gather across shards",
    planted_writes.published_before_it_is_copied: "get|put",
    planted_writes.shards_taken_in_the_order_of_the_keys: "put many|put many across shards",
    planted_writes.slots_reserved_one_at_a_time: "put three tokens|put three tokens, four slots",
    planted_writes.waiter_registered_after_the_mutex_was_let_go: "replace|replace other key, full",
    planted_writes.release_that_wakes_nobody: "put|close a batch, slots short",
    planted_writes.reservation_of_a_search_not_respected: "search open|put in its pool",
    planted_writes.search_marked_as_ended_after_its_sweep: "search commit|search close",
}
