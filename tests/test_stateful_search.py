"""Two open searches of a `KVCacheManager` against a plain model: what each has, sees, reserves, and leaves behind."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from concurrent_kv import (
    CapacityError,
    DropOldest,
    KeyNotFoundError,
    KVCacheManager,
    Search,
    SearchEndedError,
    WaitTimeoutError,
    WindowOverflowError,
)
from concurrent_kv.search.search import LookupOrder
from tests.pool_model import LAYOUT, OpenBatch, Record, Token, TokenSource, kv_of, last_of_each, run_machine, same

pytestmark = pytest.mark.usefixtures("loops")

WINDOW = LAYOUT.max_tokens
ENVS = (0, 1)
CONFIG = {
    "num_layers": LAYOUT.num_layers,
    "num_heads": LAYOUT.num_heads,
    "embed_dim": LAYOUT.num_heads * LAYOUT.head_dim,
    "context_length": WINDOW,
    "num_simulations": 1,
    "max_cache_size": 9,
    "device": "cpu",
}
RECUR_SLOTS = 26
INIT_ENTRIES = 2
OVERFLOW = DropOldest(WINDOW, 2)

keys = st.integers(0, 5)
envs = st.sampled_from(ENVS)
which = st.integers(0, 1)
lengths = st.integers(1, WINDOW)
sizes = st.one_of(st.tuples(st.integers(2, 5), st.integers(4, 14)), st.tuples(st.integers(1, 10), st.integers(1, 27)))
orders = st.sampled_from(["own_first", "init_first"])


@dataclass(eq=False)
class OpenSearch:
    search: Search
    entries: int  # reserved
    slots: int
    own: dict[int, Record] = field(default_factory=dict)
    roots: dict[tuple[int, int], Record] = field(default_factory=dict)
    batches: list[OpenBatch] = field(default_factory=list)
    adopted: list[Record] = field(default_factory=list)  # every root so far
    parted: list[Record] = field(default_factory=list)  # roots that were not kept, and others share tokens with
    paid: set[Token] = field(default_factory=set)  # slots that its reservation pays for, while they are in use


class SearchMachine(RuleBasedStateMachine):
    @initialize(shards=st.integers(1, 3), sizes=st.tuples(sizes, sizes))
    def open_manager(self, shards: int, sizes: tuple[tuple[int, int], tuple[int, int]]) -> None:
        # Headroom for every root and batch that outlives its pool's entry: what is tested here is the reservations.
        self.manager = KVCacheManager(
            CONFIG,
            len(ENVS),
            init_entries=INIT_ENTRIES,
            recur_slots=RECUR_SLOTS,
            shards=shards,
            writers=60,
            wait_timeout=0.0,
        )
        self.recur = self.manager.recur_pool
        self.source = TokenSource()
        self.init: list[dict[int, Record]] = [{} for _ in ENVS]
        self.plain: dict[int, Record] = {}  # ordinary entries of the recurrent pool, oldest write first
        self.searches: list[OpenSearch | None] = [None, None]
        self.ended: list[tuple[Search, OpenBatch | None]] = []
        for env in ENVS:
            record = Record(env, "init", self.source.fresh(env + 1), object())
            assert self.manager.set_init_cache(env, env, kv_of(record.tokens), side=record.side)
            self.init[env][env] = record
        for number, (entries, slots) in enumerate(sizes):
            self.open_search(number, entries, slots, "own_first")

    # The model -----------------------------------------------------------------------------------------------------

    def open_ones(self) -> Iterator[OpenSearch]:
        return (opened for opened in self.searches if opened is not None)

    def alive(self) -> Counter[Token]:
        """How many entries name each token."""
        records = {record for pool in (*self.init, self.plain) for record in pool.values()}
        for opened in self.open_ones():
            records |= {*opened.own.values(), *opened.roots.values(), *opened.parted}
            records |= {record for batch in opened.batches for record in batch.hits}
        return Counter(token for record in records for token in record.tokens)

    def left(self, opened: OpenSearch) -> int:
        """Slots of a search's reservation that are not in use."""
        return opened.slots - len(opened.paid & self.alive().keys())

    def plain_slots(self) -> int:
        return sum(len(record.tokens) for record in self.plain.values())

    def room(self) -> tuple[int, int]:
        """Entries and slots of the recurrent pool that are neither stored nor reserved."""
        reserved_entries = sum(opened.entries for opened in self.open_ones())
        reserved_slots = sum(opened.slots for opened in self.open_ones())
        return (
            self.recur.account.max_entries - len(self.plain) - reserved_entries,
            RECUR_SLOTS - self.plain_slots() - reserved_slots,
        )

    def make_room(self, entries: int, slots: int) -> bool:
        """Drop the oldest ordinary entries until so much fits; False, with nothing dropped, if it never can."""
        free_entries, free_slots = self.room()
        if entries > free_entries + len(self.plain) or slots > free_slots + self.plain_slots():
            return False
        while self.room()[0] < entries or self.room()[1] < slots:
            del self.plain[next(iter(self.plain))]
        return True

    def forget(self, number: int) -> None:
        opened = self.searches[number]
        assert opened is not None
        self.ended.append((opened.search, opened.batches[0] if opened.batches else None))
        self.searches[number] = None

    # Pools ---------------------------------------------------------------------------------------------------------

    @rule(env=envs, key=keys, length=lengths)
    def set_init(self, env: int, key: int, length: int) -> None:
        record = Record(key, "init", self.source.fresh(length), object())
        self.put_init(
            env, record, lambda: self.manager.set_init_cache(env, key, kv_of(record.tokens), side=record.side)
        )

    def put_init(self, env: int, record: Record, call: Callable[[], bool]) -> None:
        """A write into a full init pool evicts one entry, be it a search's root: the search keeps it all the same."""
        pool = self.init[env]
        full = len(pool) == INIT_ENTRIES and record.key not in pool
        assert call()
        if full:
            gone = [old for old in pool.values() if self.manager.init_pools[env].peek(old.key) is None]
            assert len(gone) == 1
            del pool[gone[0].key]  # type: ignore[arg-type]
        pool[record.key] = record  # type: ignore[index]

    @rule(key=keys, length=lengths)
    def set_recur(self, key: int, length: int) -> None:
        record = Record(key, "recur", self.source.fresh(length))
        old = self.plain.get(key)
        freed = 0 if old is None else len(old.tokens)
        # The entry that is replaced counts as room, and may go first as a victim too.
        oldest_first = dict(self.plain)
        self.plain.pop(key, None)
        fits = self.make_room(1, length)
        self.plain = {k: r for k, r in oldest_first.items() if k == key or k in self.plain}
        if fits:
            assert self.manager.set_recur_cache(key, kv_of(record.tokens))
            self.plain.pop(key, None)
            self.plain[key] = record
        else:
            assert freed < length
            with pytest.raises(WaitTimeoutError, match="recur"):
                self.manager.set_recur_cache(key, kv_of(record.tokens))
            self.plain = {k: r for k, r in self.plain.items() if self.recur.peek(k) is not None}

    @rule(what=st.sampled_from(["pop"] * 12 + ["all", "init", "recur", "version"]), env=envs, key=keys)
    def remove(self, what: str, env: int, key: int) -> None:
        if what == "pop":
            record = self.init[env].pop(key, None)
            assert same(self.manager.init_pools[env].pop(key), None if record is None else record.tokens)
            return
        removals = {
            "all": self.manager.clear_all,
            "init": self.manager.clear_init_caches,
            "recur": self.manager.clear_recur_cache,
            "version": self.manager.bump_version,
        }
        removals[what]()
        if what != "recur":
            self.init = [{} for _ in ENVS]
        if what != "init":
            self.plain = {}
        if what == "version":
            for number, opened in enumerate(self.searches):
                if opened is not None:
                    self.forget(number)

    # Searches ------------------------------------------------------------------------------------------------------

    @precondition(lambda self: None in self.searches)
    @rule(size=sizes, order=orders)
    def reopen(self, size: tuple[int, int], order: LookupOrder) -> None:
        self.open_search(self.searches.index(None), *size, order)

    def open_search(self, number: int, entries: int, slots: int, order: LookupOrder) -> None:
        if not self.make_room(entries, slots):
            with pytest.raises(CapacityError) as refused:
                self.manager.search(ENVS, entries=entries, tokens=slots, order=order)
            reserved = [(opened.entries, opened.slots) for opened in self.open_ones()]
            assert refused.value.required_entries == entries + sum(e for e, _ in reserved)
            assert refused.value.required_slots == slots + sum(s for _, s in reserved)
            return
        search = self.manager.search(ENVS, entries=entries, tokens=slots, order=order, overflow=OVERFLOW)
        self.searches[number] = OpenSearch(search, entries, slots)

    @precondition(lambda self: all(self.searches))
    @rule(number=which, how=st.sampled_from([None] * 5 + ["close", "drop", "raise"]))
    def close_search(self, number: int, how: str | None) -> None:
        if how is None:  # searches live long
            return
        opened = self.searches[number]
        assert opened is not None
        if how == "drop":
            self.searches[number] = None
            del opened
            gc.collect()  # a traceback of an expected error may have kept it
            return
        if how == "close":
            opened.search.close()
        else:
            with pytest.raises(ZeroDivisionError), opened.search:
                raise ZeroDivisionError
        self.forget(number)

    def one_open(self, number: int) -> OpenSearch:
        opened = self.searches[number] or self.searches[1 - number]
        assert opened is not None
        return opened

    @precondition(lambda self: any(self.open_ones()))
    @rule(number=which, data=st.data(), length=lengths, tokens=st.integers(1, 2))
    def simulate(self, number: int, data: st.DataObject, length: int, tokens: int) -> None:
        """One step of a search: gather parents, let a model append, commit children."""
        opened = self.one_open(number)
        self.gather(opened, data, None)
        self.expand(opened, opened.batches[-1], data, length, tokens)

    @precondition(lambda self: any(len(opened.batches) < 2 for opened in self.open_ones()))
    @rule(number=which, data=st.data(), order=st.none() | orders)
    def gather_only(self, number: int, data: st.DataObject, order: LookupOrder | None) -> None:
        self.gather(self.one_open(number), data, order)

    def gather(self, opened: OpenSearch, data: st.DataObject, order: LookupOrder | None) -> None:
        if len(opened.batches) > 1:
            self.close(opened, opened.batches[0])
        present = {(env, key) for env in ENVS for key in (*opened.own, *self.init[env])} | set(opened.roots)
        known = st.sampled_from(sorted(present)) if present else st.tuples(envs, keys)
        wanted = data.draw(st.lists(st.one_of(known, known, st.tuples(envs, keys)), min_size=1, max_size=3))
        first = order or opened.search._order
        records: list[Record | None] = []
        adopted = {}
        for env, key in wanted:
            own, root = opened.own.get(key), opened.roots.get((env, key))
            outside = root or self.init[env].get(key)
            record = (own or outside) if first == "own_first" else (outside or own)
            records.append(record)
            if record is not None and root is None and record is outside:
                adopted[env, key] = record
        batch = opened.search.gather([key for _, key in wanted], [env for env, _ in wanted], order=order)
        opened.roots.update(adopted)
        opened.adopted += adopted.values()
        assert batch.hits == tuple(record is not None for record in records)
        assert batch.side == tuple(None if record is None else record.side for record in records)
        opened.batches.append(OpenBatch(batch, "search", 0, records))

    def one_batch(self, number: int) -> tuple[OpenSearch, OpenBatch]:
        ready = [(opened, batch) for opened in self.open_ones() for batch in opened.batches]
        return ready[number % len(ready)]

    @precondition(lambda self: any(opened.batches for opened in self.open_ones()))
    @rule(number=st.integers(0, 3), data=st.data(), length=lengths, tokens=st.integers(0, 2))
    def expand_a_batch(self, number: int, data: st.DataObject, length: int, tokens: int) -> None:
        self.expand(*self.one_batch(number), data, length, tokens)

    def expand(self, opened: OpenSearch, batch: OpenBatch, data: st.DataObject, length: int, tokens: int) -> None:
        ragged = data.draw(st.booleans())
        if not batch.appended[0] and not ragged:
            for row in [row for row in range(len(batch.records)) if not batch.tokens(row)]:
                filled = self.source.fresh(length)
                batch.batch.fill(row, kv_of(filled))
                batch.filled[row] = filled
        self.source.append(batch, min(tokens, batch.batch.room))
        if batch.committable(ragged):
            self.commit(opened, batch, data, ragged)
        elif not batch.batch.room:
            self.close(opened, batch)

    def commit(self, opened: OpenSearch, batch: OpenBatch, data: st.DataObject, ragged: bool) -> None:
        rows = data.draw(st.lists(st.sampled_from(batch.committable(ragged)), min_size=1, max_size=3, unique=True))
        lengths = data.draw(batch.lengths_of(rows)) if ragged else None
        children = [Record(data.draw(keys), "search", (), object()) for _ in rows]

        def call() -> None:
            sides = [child.side for child in children]
            opened.search.commit(
                [child.key for child in children], batch.batch, rows=rows, lengths=lengths, sides=sides
            )

        last_ones = last_of_each(children)
        grown = []
        for child in last_ones:
            place = children.index(child)
            length = None if lengths is None else lengths[place]
            grown.append(self.source.grow(batch, rows[place], child, OVERFLOW, length))
        sizes = [size for size in grown if size is not None]
        if len(sizes) < len(grown):
            with pytest.raises(WindowOverflowError):
                call()
            return
        known = {token for record in batch.hits for token in record.tokens}
        new = [token for child in last_ones for token in child.tokens if token not in known]
        if not self.accepts(opened, last_ones, len(new), call):
            return
        opened.own |= {child.key: child for child in last_ones}  # type: ignore[misc]
        opened.paid |= set(new)  # of more than is left, until what is replaced has gone
        batch.committed |= set(rows)
        assert batch.batch.closed is (len(batch.committed) == len(batch.records))
        if batch.batch.closed:
            self.close(opened, batch)
        self.look_at_parted(opened)

    def accepts(self, opened: OpenSearch, children: list[Record], own: int, call: Callable[[], None]) -> bool:
        """Commit; within its reservation a search never fails, beyond it takes what nobody has reserved."""
        replaced = [old for child in children if (old := opened.own.get(child.key)) is not None]  # type: ignore[call-overload]
        alive = self.alive()
        named = Counter(token for old in replaced for token in old.tokens)
        staying = {token for child in children for token in child.tokens}
        freed = sum(alive[token] == number and token not in staying for token, number in named.items())
        entries = max(0, len(opened.own) + len(children) - opened.entries - len(replaced))
        slots = max(0, own - self.left(opened) - freed) if own else 0  # what is owed is no matter of who needs none
        if self.make_room(entries, slots):
            call()
            opened.entries += entries
            opened.slots += slots
            return True
        with pytest.raises(CapacityError) as refused:
            call()
        assert refused.value.required_entries == opened.entries + entries
        assert refused.value.required_slots == opened.slots + slots
        return False

    @precondition(lambda self: any(opened.batches for opened in self.open_ones()))
    @rule(number=st.integers(0, 3))
    def close_batch(self, number: int) -> None:
        opened, batch = self.one_batch(number)
        self.close(opened, batch)

    @precondition(lambda self: any(opened.own for opened in self.open_ones()))
    @rule(number=which, data=st.data(), unknown=st.booleans())
    def release(self, number: int, data: st.DataObject, unknown: bool) -> None:
        opened = self.one_open(number)
        opened = opened if opened.own else self.one_open(1 - number)
        going = data.draw(st.lists(st.sampled_from(sorted(opened.own)), min_size=1, max_size=2))
        if unknown:
            with pytest.raises(KeyNotFoundError):
                opened.search.release([*going, "unknown"])
            return
        opened.search.release(going)
        for key in set(going):
            del opened.own[key]
        self.look_at_parted(opened)

    @precondition(lambda self: any(opened.own for opened in self.open_ones()))
    @rule(number=which, staying=st.lists(keys, max_size=4))
    def keep(self, number: int, staying: list[int]) -> None:
        opened = self.one_open(number)
        known = {*opened.own, *(key for _, key in opened.roots)}
        if not known.issuperset(staying):
            held = opened.search.held
            with pytest.raises(KeyNotFoundError):
                opened.search.keep(staying)
            assert opened.search.held == held
            return
        released = [key for key in opened.own if key not in staying]
        assert opened.search.keep(staying) == len(released)
        for key in released:
            del opened.own[key]
        opened.parted += [record for root, record in opened.roots.items() if root[1] not in staying]
        opened.roots = {root: record for root, record in opened.roots.items() if root[1] in staying}
        self.look_at_parted(opened)

    def look_at_parted(self, opened: OpenSearch) -> None:
        """Roots that were not kept go whole, as soon as none of the search's shares a token with them."""
        read = [record for batch in opened.batches for record in batch.hits]
        going = [record for record in opened.parted if record not in read]
        while going:
            others = [record for record in opened.parted if record not in going]
            named = {
                t for record in (*opened.own.values(), *opened.roots.values(), *read, *others) for t in record.tokens
            }
            free = [record for record in going if named.isdisjoint(record.tokens)]
            if len(free) == len(going):
                break
            going = free
        opened.parted = [record for record in opened.parted if record not in going]

    @precondition(lambda self: any(self.open_ones()))
    @rule(number=which, data=st.data(), env=envs, new_key=keys)
    def promote(self, number: int, data: st.DataObject, env: int, new_key: int) -> None:
        opened = self.one_open(number)
        known = [*opened.own, *(key for _, key in opened.roots)]
        key = data.draw(st.one_of(st.sampled_from(sorted(known)), keys) if known else keys)
        record = opened.own.get(key) or opened.roots.get((env, key))
        if record is None:
            with pytest.raises(KeyNotFoundError):
                opened.search.promote(key, env, as_key=new_key)
            return
        shared = len(record.tokens)
        if key in opened.own:  # what it shares with a root is shared, the rest is copied
            shared = max((self.shared_with(record, root) for root in opened.adopted), default=0)
        copied = self.source.holding(token.value for token in record.tokens[shared:])
        promoted = Record(new_key, "init", (*record.tokens[:shared], *copied), record.side)
        self.put_init(env, promoted, lambda: opened.search.promote(key, env, as_key=new_key))

    def close(self, opened: OpenSearch, batch: OpenBatch) -> None:
        """What it alone kept goes."""
        batch.batch.close()
        opened.batches.remove(batch)
        self.look_at_parted(opened)

    def shared_with(self, record: Record, root: Record) -> int:
        """How many of a root's newest tokens a record begins with."""
        common = sum(token in root.tokens for token in record.tokens)
        return common if common and record.tokens[:common] == root.tokens[-common:] else 0

    @precondition(lambda self: self.ended)
    @rule()
    def use_an_ended_search(self) -> None:
        search, batch = self.ended.pop()
        with pytest.raises(SearchEndedError):
            search.gather([0], [0])
        if batch is not None:
            assert batch.batch.closed
            with pytest.raises(SearchEndedError):
                search.commit([0], batch.batch, rows=[0])
            batch.batch.close()
        search.close()

    # What holds after every step -----------------------------------------------------------------------------------

    @invariant()
    def searches_have_their_own_entries_and_no_others(self) -> None:
        for opened in self.open_ones():
            assert [key in opened.search for key in range(6)] == [key in opened.own for key in range(6)]
            assert len(opened.search) == len(opened.own)
            if opened.own:
                with opened.search.gather(list(opened.own), [0] * len(opened.own), order="own_first", room=0) as batch:
                    OpenBatch(batch, "search", 0, list(opened.own.values())).check_data()
                    assert batch.side == tuple(record.side for record in opened.own.values())
            for open_batch in opened.batches:
                open_batch.check_data()

    @invariant()
    def pools_have_the_models_entries(self) -> None:
        for key in range(6):
            for env in ENVS:
                record = self.init[env].get(key)
                kv = self.manager.init_pools[env].peek(key)
                assert same(kv, None if record is None else record.tokens)
            plain = self.plain.get(key)
            assert same(self.recur.peek(key), None if plain is None else plain.tokens)

    @invariant()
    def books_are_right(self) -> None:
        report = self.manager.check_integrity()
        assert report.referenced_slots == len(self.alive())
        stats = self.recur.stats()
        assert stats.reserved_entries == sum(opened.entries for opened in self.open_ones())
        assert stats.reserved_slots == sum(opened.slots for opened in self.open_ones())
        assert stats.entries == len(self.plain) + sum(len(opened.own) for opened in self.open_ones())
        slots = sum(opened.slots - self.left(opened) for opened in self.open_ones())
        assert stats.slots_in_use == self.plain_slots() + slots


def test_two_searches_do_what_two_dicts_with_reserved_room_would_do() -> None:
    run_machine(SearchMachine, examples=60, steps=35)
