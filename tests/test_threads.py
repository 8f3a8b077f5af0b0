"""Real threads: every read whole, its own and possible, whatever else goes on; waits bounded; nothing lost."""

from __future__ import annotations

import random
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch

from concurrent_kv import (
    Batch,
    ClosedError,
    DropOldest,
    KeyNotFoundError,
    KeysValues,
    KVCacheManager,
    KVPool,
    Search,
    SearchEndedError,
)
from tests.threading_support import (
    JOIN_SECONDS,
    LAYOUT,
    VERSIONS,
    WINDOW,
    coded,
    filled,
    run_threads,
    value_of,
    version_of,
)

pytestmark = pytest.mark.usefixtures("loops")

SEEDS = (1, 2)
ROOM = DropOldest(WINDOW, 2)
every_policy = pytest.mark.parametrize("policy", ["fifo", "lru", "priority", "clock", "s3fifo"])


@pytest.fixture(autouse=True)
def _threads_change_places_all_the_time() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.fixture
def pools() -> Iterator[Callable[..., KVPool]]:
    made: list[KVPool] = []

    def make(max_entries: int, **options: object) -> KVPool:
        made.append(KVPool(LAYOUT, max_entries, **{"shards": 3, "wait_timeout": JOIN_SECONDS, **options}))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for pool in made:
        pool.check_integrity()
        pool.close()


@pytest.fixture
def manager() -> Iterator[KVCacheManager]:
    config = {
        "num_layers": LAYOUT.num_layers,
        "num_heads": LAYOUT.num_heads,
        "embed_dim": LAYOUT.num_heads * LAYOUT.head_dim,
        "context_length": WINDOW,
        "num_simulations": 20,
        "max_cache_size": 130,
        "device": "cpu",
    }
    made = KVCacheManager(config, 3, init_entries=4, wait_timeout=JOIN_SECONDS, shards=4, writers=16)
    yield made
    made.check_integrity()
    made.close()
    made.check_integrity()


# --- what each thread does -------------------------------------------------------------------------------------------


class Reader:
    """Reads keys in every way there is; the versions it sees of a key, each from one writer, never go back."""

    def __init__(self, pool: KVPool, keys: range, seed: int, operations: int = 600) -> None:
        self.pool, self.keys, self.operations = pool, keys, operations
        self.random = random.Random(seed)
        self.latest = dict.fromkeys(keys, 0)

    def __call__(self) -> None:
        ways = [self.get, self.peek, self.pin, self.gather]
        for _ in range(self.operations):
            self.random.choice(ways)()

    def saw(self, key: int, version: int) -> None:
        assert version >= self.latest[key], f"version {version} of {key} after {self.latest[key]}"
        self.latest[key] = version

    def get(self) -> None:
        key = self.random.choice(self.keys)
        kv = self.pool.get(key)
        if kv is not None:
            self.saw(key, version_of(key, kv))

    def peek(self) -> None:
        key = self.random.choice(self.keys)
        kv = self.pool.peek(key)
        if kv is not None:
            self.saw(key, version_of(key, kv))

    def pin(self) -> None:
        key = self.random.choice(self.keys)
        try:
            pin = self.pool.pin(key)
        except KeyNotFoundError:
            return
        with pin:
            version = version_of(key, pin.get())
            assert pin.side == version
            self.saw(key, version)
            assert version_of(key, pin.get()) == version

    def gather(self) -> None:
        keys = [self.random.choice(self.keys) for _ in range(3)]
        with self.pool.gather(keys, room=0) as batch:
            for row, key in enumerate(keys):
                if batch.hits[row]:
                    version = version_of(key, row_of(batch, row))
                    assert batch.side[row] == version
                    self.saw(key, version)


def row_of(batch: Batch, row: int) -> KeysValues:
    """The gathered tokens of one row, as a read has them."""
    columns = slice(batch.start - batch.gathered(row), batch.start)
    return KeysValues.from_packed(batch.data[:, row : row + 1, :, columns])


def write_versions(pool: KVPool, keys: range, seed: int, operations: int = 400) -> None:
    """The only writer of `keys`: each write has the next version."""
    pick = random.Random(seed)
    for version in range(1, operations + 1):
        pool.put(key := pick.choice(keys), coded(key, version), side=version, priority=float(pick.randrange(3)))


def disturb(pool: KVPool, keys: range, seed: int, operations: int = 200) -> None:
    """Clears, bumps and pops."""
    pick = random.Random(seed)
    for _ in range(operations):
        what = pick.randrange(8)
        if what == 0:
            pool.clear()
        elif what == 1:
            pool.bump_version()
        else:
            key = pick.choice(keys)
            kv = pool.pop(key)
            if kv is not None:
                version_of(key, kv)


# --- one pool --------------------------------------------------------------------------------------------------------


@every_policy
@pytest.mark.parametrize("seed", SEEDS)
def test_a_read_is_whole_and_its_own_and_never_older_than_one_before(
    pools: Callable[..., KVPool], policy: str, seed: int
) -> None:
    pool = pools(4, max_slots=3 * WINDOW, policy=policy)
    keys = range(8)
    run_threads(
        *(partial(write_versions, pool, keys[part::2], seed + part) for part in range(2)),
        *(Reader(pool, keys, seed + part) for part in range(3)),
        partial(disturb, pool, keys, seed),
    )


@pytest.mark.parametrize("policy", ["fifo", "s3fifo"])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_child_has_its_parents_tokens_then_its_own_whatever_happens_to_the_parent(
    pools: Callable[..., KVPool], policy: str, seed: int
) -> None:
    pool = pools(6, max_slots=4 * WINDOW, policy=policy)
    parents, children = range(4), range(100, 104)

    def grow(number: int) -> None:
        pick = random.Random(seed + number)
        for version in range(200):
            key = pick.choice(parents)
            with pool.gather([key, pick.choice(children)]) as batch:
                rows = [row for row in range(2) if batch.hits[row]]
                if rows and batch.room:
                    append(batch, code_of(number, version))
                    pool.commit([children[number]] * len(rows), batch, rows=rows, overflow=ROOM)

    def read(number: int) -> None:
        pick = random.Random(seed + number)
        for _ in range(500):
            kv = pool.get(pick.choice(children))
            if kv is not None:
                # One parent's version to begin with, unless it was dropped; then tokens that were appended.
                known = [divmod(int(value), VERSIONS)[0] for value in token_values(kv)]
                roots = [value for value in token_values(kv) if value < CHILD]
                assert len(set(roots)) <= 1
                assert [owner >= CHILD // VERSIONS for owner in known] == sorted(owner >= 100 for owner in known)

    run_threads(
        *(partial(grow, number) for number in range(2)),
        *(partial(read, number) for number in range(2)),
        partial(write_versions, pool, parents, seed),
        partial(disturb, pool, parents, seed, 80),
    )


CHILD = 100 * VERSIONS


def code_of(number: int, version: int) -> float:
    return float((100 + number) * VERSIONS + version)


def append(batch: Batch, value: float, tokens: int = 1) -> None:
    """What a model does: new tokens in every layer, here all of one number."""
    new = torch.full((batch.batch_size, LAYOUT.num_heads, tokens, LAYOUT.head_dim), value)
    for layer in range(LAYOUT.num_layers):
        batch.append(layer, new, new)


def token_values(kv: KeysValues) -> list[float]:
    """The one number of each token; more than one in a token is a torn read."""
    packed = torch.cat([kv.keys, kv.values])
    values: list[float] = []
    for column in range(kv.end):
        numbers: set[float] = set(packed[:, :, :, column].flatten().tolist())
        assert len(numbers) == 1, f"a token that was filled with one number has {sorted(numbers)}"
        values.append(numbers.pop())
    return values


@every_policy
def test_writers_that_replace_keys_of_a_full_pool_evict_nothing_and_make_nothing_miss(
    pools: Callable[..., KVPool], policy: str
) -> None:
    keys = range(8)
    pool = pools(len(keys), policy=policy, writers=4)
    for key in keys:
        pool.put(key, filled(key * VERSIONS))

    def replace(mine: range) -> None:
        for version in range(1, 40):
            for key in mine:
                assert pool.put(key, filled(key * VERSIONS + version))

    def read() -> None:
        for number in range(200):
            value = value_of(pool.get(number % len(keys)))
            assert value is not None
            assert int(value) // VERSIONS == number % len(keys)

    run_threads(*(partial(replace, keys[part::4]) for part in range(4)), read)
    stats = pool.stats()
    assert (stats.eviction_count, stats.miss_count, stats.hit_count, len(pool)) == (0, 0, 200, len(keys))
    assert (stats.insert_count, stats.replace_count) == (len(keys), len(keys) * 39)


def test_every_count_is_exact_under_threads(pools: Callable[..., KVPool]) -> None:
    pool = pools(5, policy="lru")
    seen = [[0, 0, 0] for _ in range(4)]  # hits, misses, pops

    def work(number: int) -> None:
        pick = random.Random(number)
        for version in range(300):
            key = pick.randrange(10)
            pool.put(key, filled(key), priority=version)
            seen[number][pool.get(pick.randrange(10)) is None] += 1
            with pool.gather([pick.randrange(10), pick.randrange(10)], room=0) as batch:
                seen[number][0] += sum(batch.hits)
                seen[number][1] += 2 - sum(batch.hits)
            seen[number][2] += pool.pop(pick.randrange(10)) is not None

    run_threads(*(partial(work, number) for number in range(4)))
    stats = pool.stats()
    hits, misses, pops = (sum(column) for column in zip(*seen, strict=True))
    assert (stats.hit_count, stats.miss_count, stats.request_count) == (hits, misses, 4 * 300 * 3)
    assert stats.insert_count + stats.replace_count == 4 * 300
    assert stats.removal_count == pops
    assert stats.insert_count - stats.eviction_count - stats.removal_count == len(pool)


def test_a_pool_that_closes_under_everything_ends_every_thread_with_a_closed_error(
    pools: Callable[..., KVPool],
) -> None:
    pool = pools(4, max_slots=3 * WINDOW)
    keys = range(6)
    busy = threading.Barrier(5)

    def until_closed(work: Callable[[int], object]) -> None:
        busy.wait(JOIN_SECONDS)
        numbers = iter(range(100_000))
        with pytest.raises(ClosedError):
            deque(map(work, numbers), maxlen=0)
        assert next(numbers, None) is not None, "the pool never closed"

    def gather(number: int) -> None:
        with pool.gather([number % 6, 0]) as batch:
            if any(batch.hits) and batch.room:
                append(batch, float(number))
                rows = [row for row in range(2) if batch.hits[row]]
                pool.commit([(number + row) % 6 for row in rows], batch, rows=rows, overflow=ROOM)

    def close() -> None:
        busy.wait(JOIN_SECONDS)
        for key in keys:
            pool.get(key)
        pool.close()

    run_threads(
        partial(until_closed, lambda number: value_of(pool.get(number % 6))),
        partial(until_closed, lambda number: pool.put(number % 6, filled(number % 6))),
        partial(until_closed, gather),
        partial(until_closed, lambda number: pool.clear() if number % 8 == 0 else pool.pop(number % 6)),
        close,
    )
    assert len(pool) == 0


# --- searches --------------------------------------------------------------------------------------------------------


class Planner:
    """Grows a tree of its own in a search: every node's tokens are known, and gathered again must be the same."""

    def __init__(self, search: Search, env_id: int, number: int, seed: int, simulations: int = 12) -> None:
        self.search, self.env_id, self.number, self.simulations = search, env_id, number, simulations
        self.random = random.Random(seed * 100 + number)
        self.nodes: dict[object, list[float]] = {}

    def __call__(self) -> None:
        for simulation in range(self.simulations):
            parents = [self.random.choice([("root", self.env_id), *self.nodes]) for _ in range(2)]
            batch = self.search.gather(parents, [self.env_id] * 2)
            for row, parent in enumerate(parents):
                if not batch.hits[row]:
                    assert parent not in self.nodes, "an entry of an open search is gone"
                    batch.fill(row, filled(code_of(9, self.number), 2))
            tokens = [token_values(row_of(batch, row)) for row in range(2)]
            for parent, found in zip(parents, tokens, strict=True):
                assert found == self.nodes.get(parent, found), "an entry of an open search has changed"
            value = code_of(self.number, simulation)
            append(batch, value)
            children = [(self.number, simulation, row) for row in range(2)]
            self.search.commit(children, batch, overflow=ROOM)
            for child, found in zip(children, tokens, strict=True):
                grown = [*found, value]
                self.nodes[child] = grown[2:] if len(grown) >= ROOM.limit else grown
            if simulation % 5 == 4:
                self.search.promote(children[0], self.env_id, as_key=("root", self.env_id))


def set_roots(manager: KVCacheManager, seed: int, operations: int = 150) -> None:
    pick = random.Random(seed)
    for version in range(operations):
        env_id = pick.randrange(3)
        manager.set_init_cache(env_id, ("root", env_id), filled(code_of(env_id, version), 1 + version % 3))
        manager.set_recur_cache(pick.randrange(6), filled(version))
        if pick.randrange(6) == 0:
            pick.choice([manager.clear_all, manager.clear_init_caches, manager.clear_recur_cache])()


@pytest.mark.parametrize("seed", SEEDS)
def test_entries_of_a_search_that_several_threads_use_stay_as_they_are_until_it_closes(
    manager: KVCacheManager, seed: int
) -> None:
    with manager.search([0, 1], entries=60, tokens=150) as search:
        planners = [Planner(search, number % 2, number, seed) for number in range(3)]
        run_threads(*planners, partial(set_roots, manager, seed))
        assert len(search) == 3 * 12 * 2
        manager.check_integrity()
    assert manager.recur_pool.stats().reserved_slots == 0


@pytest.mark.parametrize("seed", SEEDS)
def test_searches_that_open_and_close_at_once_never_see_each_others_entries(manager: KVCacheManager, seed: int) -> None:
    def plan(number: int) -> None:
        for turn in range(3):
            with manager.search([number], entries=30, tokens=100, order="init_first") as search:
                planner = Planner(search, number, number, seed + turn, simulations=6)
                planner()
                assert search.keep(list(planner.nodes)[:4]) == 8
                assert len(search) == 4
                assert all(other not in search for other in [(number + 1, 0, 0), (number + 2, 5, 1)])

    run_threads(*(partial(plan, number) for number in range(3)), partial(set_roots, manager, seed))
    assert manager.recur_pool.stats().reserved_entries == 0


@pytest.mark.parametrize("how", ["bump", "close"])
def test_a_search_that_is_ended_from_outside_ends_its_threads_with_a_clear_error(
    manager: KVCacheManager, how: str
) -> None:
    search = manager.search([0, 1], entries=100, tokens=240)
    begun = threading.Barrier(4)

    def plan(number: int) -> None:
        planner = Planner(search, number % 2, number, 1, simulations=1)
        planner()
        begun.wait(JOIN_SECONDS)

        def gather(turn: int) -> None:
            with search.gather([(number, 0, turn % 2)], [number % 2], room=0) as batch:
                assert batch.hits == (True,)

        with pytest.raises(ClosedError) as ended:
            deque(map(gather, range(100_000)), maxlen=0)
        assert isinstance(ended.value, SearchEndedError) or how == "close"

    def end() -> None:
        begun.wait(JOIN_SECONDS)
        if how == "bump":
            manager.bump_version()
        else:
            manager.close()

    run_threads(*(partial(plan, number) for number in range(3)), end)
    assert search.closed
