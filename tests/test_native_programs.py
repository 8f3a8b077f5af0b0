"""Whole programs of a pool and of a search leave the same books and the same bytes, compiled or not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from concurrent_kv import (
    Batch,
    DropAndCorrect,
    DropLazily,
    DropOldest,
    KeysValues,
    KVCacheError,
    KVCacheManager,
    KVPool,
    KVStorage,
    PositionSteps,
    PositionTable,
    RaiseOnOverflow,
)
from concurrent_kv.books.tables import weights_of
from concurrent_kv.model.overflow import Overflow
from tests.native_support import needs_native, without_native
from tests.support import LAYOUT, WINDOW, append, bits, config, ledgers_of, scopes_of, slots_named, stacked, tokens

pytestmark = needs_native

KEYS = 6
WAIT_SECONDS = 0.02  # for room that nobody will make
LOWER = 2.0  # what the model adds to a token for each position that it moves

Step = tuple[str, list[int], int, str]  # what, keys, a number of tokens, the policy of an overflow
Trace = list[object]

DIFFERENCE = torch.full((LAYOUT.num_layers, 2, LAYOUT.num_heads, WINDOW, LAYOUT.head_dim), LOWER)


def lower(distance: int) -> torch.Tensor:
    return DIFFERENCE[:, :, :, : WINDOW - distance] * distance


EAGER: dict[str, Overflow] = {
    "raise": RaiseOnOverflow(WINDOW),
    "drop": DropOldest(WINDOW - 1, 2),
    "correct": DropAndCorrect(WINDOW - 1, 2, DIFFERENCE, LAYOUT),
    "correct most": DropAndCorrect(WINDOW, 5, DIFFERENCE, LAYOUT),
}
LAZY: dict[str, Overflow] = {
    "drop": DropLazily(WINDOW - 1, 2, PositionTable(LAYOUT, lower)),
    "steps": DropLazily(WINDOW - 1, 2, PositionSteps(LAYOUT, 2, 2 * DIFFERENCE)),
    "one step": DropLazily(WINDOW, 1, PositionSteps(LAYOUT, 1, DIFFERENCE)),
    "rotary": DropOldest(WINDOW - 1, 2),
}

keys = st.lists(st.integers(0, KEYS - 1), min_size=1, max_size=4)
commits = [*["commit"] * 6, *["commit some"] * 2, *["commit ragged"] * 3]
names = ["put", "put many", "get", *commits, "pop", "pin", "unpin", "clear"]
search_names = [*commits, "release", "keep", "promote", "root", "reopen"]


def steps_of(kinds: list[str], policies: list[str]) -> st.SearchStrategy[list[Step]]:
    step = st.tuples(st.sampled_from(kinds), keys, st.integers(1, 3), st.sampled_from(policies))
    return st.lists(step, min_size=12, max_size=40)


def books(storage: KVStorage) -> tuple[object, ...]:
    """Every number that the compiled functions write, and the stored bytes of every entry."""
    ledger, data = storage.ledger, storage.tensor.data
    entries = [
        (pool.name, repr(entry.key), slots_named(of_scope, entry), entry.length, entry.refs)
        for pool in storage.pools
        for scope, of_scope in scopes_of(pool)
        for part in scope.entries
        for entry in part.values()
    ]
    slots = range(1, ledger.num_slots + 1)
    ledgers = ledgers_of(storage)
    weights = np.stack([weights_of(each.tables, slots) for each in ledgers])
    named = torch.from_numpy(np.flatnonzero(weights.any(axis=0)) + 1)
    return (
        entries,
        weights.tolist(),
        [weights_of(pool.account.uses, slots).tolist() for pool in storage.pools],
        [(each.tables.used, each.tables.shared, each.slots.size) for each in ledgers],
        [each.slots.free_slots().tolist() for each in ledgers],
        [np.frombuffer(each.tables.positions(slots), dtype=np.int32).tolist() for each in ledgers],
        bits(data[:, named]).tolist(),
        bits(data[:, 0]).count_nonzero().item(),
    )


def seen(kv: KeysValues | None) -> object:
    """What was read, as bytes."""
    if kv is None:
        return None
    return kv.lengths, [bits(kv.keys[:, row, :, kv.end - length :]).tolist() for row, length in enumerate(kv.lengths)]


def with_and_without(program: Callable[[], Trace]) -> None:
    """Both traces of a program must be the same, step by step."""
    compiled = program()
    with pytest.MonkeyPatch.context() as patch:
        without_native(patch)
        plain = program()
    assert len(compiled) == len(plain)
    for number, (one, other) in enumerate(zip(compiled, plain, strict=True)):
        assert one == other, f"step {number} differs"


def appended(batch: Batch, keys: list[int], some: bool) -> tuple[object, list[int], list[int]]:
    """The bytes of a batch, the rows of it to be committed, and their keys: rows of one parent become siblings."""
    hits = [row for row, hit in enumerate(batch.hits) if hit]
    chosen = hits[1:] if some else hits
    data = bits(batch.data[:, hits, :, : batch.end]).tolist()
    return data, chosen, [(keys[0] + 1 + number) % KEYS for number in range(len(chosen))]


def lengths_of(rows: list[int], count: int, ragged: bool) -> list[int] | None:
    """Different numbers of the `count` appended tokens, 0 among them, or None where all rows got all of them."""
    return [(count + row) % (count + 1) for row in rows] if ragged else None


class PoolProgram:
    """Steps on one pool, which has room for a few entries only."""

    def __init__(self, policies: dict[str, Overflow]) -> None:
        self.pool = KVPool(LAYOUT, max_entries=4, wait_timeout=WAIT_SECONDS)
        self.policies = policies
        self.pins: list[Any] = []
        self.value = 0

    def run(self, steps: list[Step]) -> Trace:
        trace: Trace = []
        try:
            self.pool.put(0, tokens(1, 2))
            for step in steps:
                try:
                    result = self.do(*step)
                except KVCacheError as error:
                    result = type(error).__name__
                trace.append((step, result, books(self.pool.storage), repr(self.pool.check_integrity())))
            while self.pins:
                self.pins.pop().close()
            trace.append((books(self.pool.storage), repr(self.pool.check_integrity())))
        finally:
            self.pool.close()
        return trace

    def do(self, what: str, asked: list[int], count: int, policy: str) -> object:
        pool, key = self.pool, asked[0]
        self.value += 1
        match what:
            case "put":
                return pool.put(key, tokens(self.value, count))
            case "put many":
                rows = [tokens(self.value + row, (count + row) % WINDOW + 1) for row in range(len(asked))]
                return pool.put_many(asked, stacked(*rows))
            case "get":
                return seen(pool.get(key))
            case "pop":
                return seen(pool.pop(key))
            case "pin":
                self.pins.append(pool.pin(key))
                return seen(self.pins[-1].get())
            case "unpin":
                return bool(self.pins) and self.pins.pop().close()
            case "clear":
                if self.value % 5 == 0:
                    pool.clear()
                return None
        with pool.gather(asked) as batch:
            append(batch, [self.value + row for row in range(len(asked))], count)
            before, chosen, new = appended(batch, asked, what == "commit some")
            lengths = lengths_of(chosen, count, what == "commit ragged")
            done = pool.commit(new, batch, rows=chosen, lengths=lengths, overflow=self.policies.get(policy))
            return before, batch.lengths, done


class SearchProgram:
    """Steps on a manager's searches, one after the other."""

    def __init__(self, policies: dict[str, Overflow]) -> None:
        self.manager = KVCacheManager(config(num_simulations=3), 2, wait_timeout=WAIT_SECONDS)
        self.policies = policies
        self.search = self.opened()
        self.value = 0

    def opened(self) -> Any:
        return self.manager.search(env_ids=[0, 1], entries=20, tokens=60)

    def run(self, steps: list[Step]) -> Trace:
        trace: Trace = []
        storage = self.manager.storage
        try:
            for env in (0, 1):
                self.manager.set_init_cache(env, 0, tokens(env + 1, 2))
            for step in steps:
                try:
                    result = self.do(*step)
                except KVCacheError as error:
                    result = type(error).__name__
                trace.append((step, result, books(storage), repr(self.manager.check_integrity())))
            self.search.close()
            trace.append((books(storage), repr(self.manager.check_integrity())))
        finally:
            self.search.close()
            self.manager.close()
        return trace

    def do(self, what: str, asked: list[int], count: int, policy: str) -> object:
        search, key, env = self.search, asked[0], count % 2
        self.value += 1
        match what:
            case "release":
                search.release([key])
                return None
            case "keep":
                return search.keep(asked) if self.value % 4 == 0 else None
            case "promote":
                return search.promote(key, env)
            case "root":
                return self.manager.set_init_cache(env, key, tokens(self.value, count))
            case "reopen":
                search.close()
                self.search = self.opened()
                return search.closed
        envs = [(env + row) % 2 for row in range(len(asked))]
        with search.gather(asked, envs) as batch:
            append(batch, [self.value + row for row in range(len(asked))], count)
            before, chosen, new = appended(batch, asked, what == "commit some")
            lengths = lengths_of(chosen, count, what == "commit ragged")
            search.commit(new, batch, rows=chosen, lengths=lengths, overflow=self.policies.get(policy))
            return before, batch.lengths


@settings(max_examples=80, deadline=None)
@given(steps_of(names, ["none", *EAGER]))
def test_programs_of_a_pool_leave_the_same_books_and_bytes_either_way(steps: list[Step]) -> None:
    with_and_without(lambda: PoolProgram(EAGER).run(steps))


@settings(max_examples=40, deadline=None)
@given(steps_of(names, ["none", *LAZY]))
def test_programs_of_a_pool_that_corrects_lazily_leave_the_same_books_and_bytes_either_way(steps: list[Step]) -> None:
    with_and_without(lambda: PoolProgram(LAZY).run(steps))


@settings(max_examples=80, deadline=None)
@given(steps_of(search_names, ["none", *EAGER]))
def test_programs_of_searches_leave_the_same_books_and_bytes_either_way(steps: list[Step]) -> None:
    with_and_without(lambda: SearchProgram(EAGER).run(steps))


@settings(max_examples=60, deadline=None)
@given(steps_of(search_names, ["none", *LAZY]))
def test_programs_of_searches_that_correct_lazily_leave_the_same_books_and_bytes_either_way(steps: list[Step]) -> None:
    with_and_without(lambda: SearchProgram(LAZY).run(steps))
