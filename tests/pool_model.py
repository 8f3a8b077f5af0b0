"""A plain model of `KVPool`: dicts of records, tokens as identities, and the room an operation needs by counting.

A record is a tuple of tokens; two records share a slot where they have the same token. Everything the pool keeps
incrementally (use counts, quotas, references) is counted afresh here at every question.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, NamedTuple

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from concurrent_kv import Batch, DropAndCorrect, KeysValues, KVLayout, RaiseOnOverflow
from concurrent_kv.model.overflow import Overflow

LAYOUT = KVLayout(num_layers=2, num_heads=2, head_dim=2, max_tokens=5)
STEP = 64  # between two token values; more than the numbers of one token, so that no two tokens share a number

# What is added to a token's value in each place `[2 * layers, 1, heads, 1, head_dim]`: a swapped layer or head shows.
PATTERN = torch.arange(2 * LAYOUT.num_layers * LAYOUT.num_heads * LAYOUT.head_dim, dtype=torch.float32).view(
    2 * LAYOUT.num_layers, 1, LAYOUT.num_heads, 1, LAYOUT.head_dim
)

# What is added to a token that becomes token i when the oldest are dropped: a number that says i.
STEPS = [1000.0 * (position + 1) for position in range(LAYOUT.max_tokens)]
DIFFERENCE = (
    torch.tensor(STEPS)
    .view(1, 1, 1, LAYOUT.max_tokens, 1)
    .expand(LAYOUT.num_layers, 2, LAYOUT.num_heads, LAYOUT.max_tokens, LAYOUT.head_dim)
)


class Token(NamedTuple):
    """A slot by its identity, and the value stored in it."""

    number: int
    value: float


class TokenSource:
    """Tokens that nobody else has."""

    def __init__(self) -> None:
        self._numbers = count(1)

    def fresh(self, length: int) -> tuple[Token, ...]:
        """Slots with values of their own."""
        return tuple(Token(number, float(number * STEP)) for number in (next(self._numbers) for _ in range(length)))

    def append(self, opened: OpenBatch, tokens: int) -> None:
        """Append `tokens` tokens to every row of a batch."""
        if not tokens:
            return
        new = [self.fresh(tokens) for _ in opened.records]
        packed = packed_of(new)
        for layer in range(LAYOUT.num_layers):
            opened.batch.append(layer, packed[layer], packed[LAYOUT.num_layers + layer])
        for row, added in enumerate(new):
            opened.appended[row] += [token.value for token in added]

    def grow(
        self, opened: OpenBatch, row: int, child: Record, overflow: Overflow | None, length: int | None = None
    ) -> tuple[int, bool] | None:
        """Give `child` the tokens that a commit of `row` gives it; None where that is an overflow.

        `length` of the appended ones count, all if left out. Returns how many tokens of the child need slots of their
        own, and whether they were corrected.
        """
        gathered, new = opened.tokens(row), opened.appended[row][:length]
        total = len(gathered) + len(new)
        dropped, eager = 0, False
        if total >= (LAYOUT.max_tokens + 1 if overflow is None else overflow.limit):
            dropped = 0 if overflow is None or isinstance(overflow, RaiseOnOverflow) else overflow.count
            if overflow is None or not dropped or total - dropped >= overflow.limit:
                return None
            eager = isinstance(overflow, DropAndCorrect)
        values = [*(token.value for token in gathered), *new][dropped:]
        if eager:
            values = [value + step for value, step in zip(values, STEPS, strict=False)]
        whole = eager or opened.records[row] is None
        shared = () if whole else gathered[dropped:]
        child.tokens = (*shared, *self.holding(values[len(shared) :]))
        return len(values) - len(shared), eager

    def holding(self, values: Iterable[float]) -> tuple[Token, ...]:
        """Slots of their own with given values."""
        return tuple(Token(next(self._numbers), value) for value in values)


def packed_of(rows: Sequence[Sequence[Token]], columns: int | None = None) -> Tensor:
    """`[2 * layers, rows, heads, columns, head_dim]` of left-padded rows of tokens."""
    columns = max(map(len, rows)) if columns is None else columns
    values = torch.zeros(1, len(rows), 1, columns, 1)
    valid = torch.zeros(1, len(rows), 1, columns, 1)
    for number, row in enumerate(rows):
        for column, token in zip(range(columns - len(row), columns), row, strict=True):
            values[0, number, 0, column, 0] = token.value
            valid[0, number, 0, column, 0] = 1.0
    return (values + PATTERN) * valid


def kv_of(*rows: Sequence[Token]) -> KeysValues:
    """Rows of tokens as they go into a pool."""
    return KeysValues.from_packed(packed_of(rows), [len(row) for row in rows])


def same(kv: KeysValues | None, tokens: Sequence[Token] | None) -> bool:
    """Whether one row holds exactly these tokens."""
    if kv is None or tokens is None:
        return kv is None and tokens is None
    return kv.lengths == (len(tokens),) and torch.equal(torch.cat([kv.keys, kv.values]), packed_of([tokens]))


@dataclass(eq=False)
class Record:
    """What one key stands for; compared by identity, as an entry is."""

    key: Hashable
    scope: str
    tokens: tuple[Token, ...]
    side: object = None
    priority: float = 0.0
    pins: int = 0

    @property
    def tail(self) -> Token:
        return self.tokens[-1]


@dataclass(eq=False)
class OpenBatch:
    """An open batch, and what its rows stand for."""

    batch: Batch
    scope: str
    generation: int
    records: list[Record | None]
    filled: dict[int, tuple[Token, ...]] = field(default_factory=dict)
    committed: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.appended: list[list[float]] = [[] for _ in self.records]

    @property
    def hits(self) -> list[Record]:
        return [record for record in self.records if record is not None]

    def tokens(self, row: int) -> tuple[Token, ...]:
        record = self.records[row]
        return self.filled.get(row, ()) if record is None else record.tokens

    def committable(self, ragged: bool = False) -> list[int]:
        """Rows that can be committed: where `lengths` are said, also those that missed, once something was appended."""
        left = [row for row in range(len(self.records)) if row not in self.committed]
        if ragged:
            return [row for row in left if self.tokens(row) or self.appended[row]]
        return [row for row in left if self.tokens(row) and self.appended[row]]

    def lengths_of(self, rows: Sequence[int]) -> SearchStrategy[list[int]]:
        """Numbers of new tokens that these rows can be committed with."""
        return st.tuples(*[st.integers(0 if self.tokens(row) else 1, len(self.appended[row])) for row in rows]).map(
            list
        )

    def check_data(self) -> None:
        """Its buffer holds what was gathered, filled and appended, and zeros left of that."""
        for row in range(len(self.records)):
            values = [token.value for token in self.tokens(row)]
            values = values + self.appended[row] if values else []
            expected = packed_of([[Token(0, value) for value in values]], self.batch.end)
            # A row that missed and was not filled has zeros up to the new tokens, which nobody looks at.
            columns = self.batch.end if values else self.batch.start
            assert torch.equal(self.batch.data[:, [row], :, :columns], expected[:, :, :, :columns])


def last_of_each(records: Sequence[Record]) -> list[Record]:
    """The last record of each key, in their order."""
    last = {record.key: record for record in records}
    return [record for record in records if last[record.key] is record]


@dataclass
class Room:
    """What a write asks for: the keys, their new records, and how many of their tokens get slots of their own."""

    records: list[Record]
    own: int

    def slots(self) -> int:
        """Slots that the new records name, their own and those that they share."""
        return len({token for record in self.records for token in record.tokens})


class NoRoomError(Exception):
    """The model's word for a pool in which nothing can be evicted any more."""


Chooser = Callable[["PoolModel", bool], Record]


@dataclass
class PoolModel:
    """Entries by scope and key, the handles on them, and what may be evicted next."""

    policy: str
    max_entries: int
    max_slots: int
    total_slots: int
    index: dict[str, dict[Hashable, Record]] = field(default_factory=lambda: {"default": {}, "other": {}})
    held: list[Record] = field(default_factory=list)  # by handles; a record once for each
    order: list[Record] = field(default_factory=list)  # in the policy, victim first
    pinned: list[Record] = field(default_factory=list)  # were next, but pinned
    shared: dict[Token, list[Record]] = field(default_factory=dict)  # were next, but another names their last token
    evictions: int = 0

    # Counting ------------------------------------------------------------------------------------------------------

    def published(self) -> list[Record]:
        return [record for scope in self.index.values() for record in scope.values()]

    def slots(self, without: Iterable[Record] = (), plus: Iterable[Record] = ()) -> int:
        gone = set(without)
        records = [record for record in self.published() if record not in gone] + list(plus)
        return len({token for record in records for token in record.tokens})

    def names(self) -> Counter[Token]:
        alive = set(self.published()) | set(self.held)
        return Counter(token for record in alive for token in record.tokens)

    def shares_tail(self, record: Record) -> bool:
        return self.names()[record.tail] > 1

    def is_last_sharer(self, record: Record) -> bool:
        """Whether everything else that names its last token only waits for that, too."""
        others = self.shared.get(record.tail, [])
        return len(others) + 1 == self.names()[record.tail] and not any(other.pins for other in others)

    def may_be_last_sharer(self, record: Record) -> bool:
        """Whether everything that names its last token ends there, and can be evicted."""
        alive = set(self.published()) | set(self.held)
        sharers = [other for other in alive if record.tail in other.tokens]
        return all(
            other.tail == record.tail and not other.pins and self.index[other.scope].get(other.key) is other
            for other in sharers
        )

    def fits(self, entries: int, slots: int) -> bool:
        return len(self.published()) + entries <= self.max_entries and self.slots() + slots <= self.max_slots

    # What the policy would do --------------------------------------------------------------------------------------

    def next_victim(self, want_slots: bool) -> Record:
        """The victim under FIFO, LRU or priority, or `NoRoomError`."""
        while True:
            if not self.order:
                if want_slots or not self.shared:
                    raise NoRoomError
                for record in [record for records in self.shared.values() for record in records]:
                    self._give_back(record)
                continue
            victim = min(self.order, key=lambda r: r.priority) if self.policy == "priority" else self.order[0]
            self.order.remove(victim)
            if victim.pins:
                self.pinned.append(victim)
            elif want_slots and self.shares_tail(victim) and not self.is_last_sharer(victim):
                self.shared.setdefault(victim.tail, []).append(victim)
            else:
                return victim

    def _give_back(self, record: Record) -> None:
        self._forget(record)
        self.order.insert(0, record)

    def _forget(self, record: Record) -> None:
        for places in (self.order, self.pinned):
            if record in places:
                places.remove(record)
        if record in self.shared.get(record.tail, ()):
            self.shared[record.tail].remove(record)
            if not self.shared[record.tail]:
                del self.shared[record.tail]

    def _after_death(self, dead: Sequence[Record]) -> None:
        names = self.names()
        for token in [token for record in dead for token in record.tokens]:
            parked = self.shared.get(token)
            if parked and names[token] == len(parked):
                self._give_back(parked[-1])

    def touch(self, record: Record) -> None:
        if self.policy == "lru" and record in self.order:
            self.order.remove(record)
            self.order.append(record)

    # What operations do --------------------------------------------------------------------------------------------

    def remove(self, records: Sequence[Record]) -> None:
        """Take published records out of the index."""
        for record in records:
            del self.index[record.scope][record.key]
            self._forget(record)
        self._after_death([record for record in records if record not in self.held])

    def hold(self, records: Iterable[Record]) -> None:
        self.held += records

    def let_go(self, records: Sequence[Record], *, pinning: bool = False) -> None:
        for record in records:
            self.held.remove(record)
            if pinning:
                record.pins -= 1
                parked = self.shared.get(record.tail, [])
                alone = record in parked and len(parked) == self.names()[record.tail]
                if not record.pins and (record in self.pinned or alone):
                    self._give_back(record)
        alive = set(self.published()) | set(self.held)
        last_first = dict.fromkeys(reversed(records))
        self._after_death([record for record in reversed(list(last_first)) if record not in alive])

    def publish(self, records: Sequence[Record]) -> int:
        """Put records into the index; returns how many replaced another."""
        old = [old for record in records if (old := self.index[record.scope].get(record.key)) is not None]
        for record in old:
            self._forget(record)
        for record in records:
            self.index[record.scope][record.key] = record
        self._after_death([record for record in old if record not in self.held])
        self.order += records
        return len(old)

    # Room ------------------------------------------------------------------------------------------------------------

    def make_room(self, room: Room, choose: Chooser, *, publishes: bool = True) -> None:
        """Evict what a write evicts before it can publish; `NoRoomError` where that is not enough."""

        def evict(want_slots: bool) -> None:
            self.remove([choose(self, want_slots)])
            self.evictions += 1

        old = self.replaced(room)
        freed = self.slots() - self.slots(without=old)
        entries, slots = len(room.records) - len(old), max(0, room.own - freed)
        while not (self.fits(entries, slots) and room.own <= self.total_slots - len(self.names())):
            if not entries and not slots and room.own <= self.total_slots - self.max_slots:
                raise NoRoomError  # a replacement that fits into the headroom waits for its own room, and evicts nobody
            evict(self.fits(entries, 0))
        while publishes and (more := self._exceeds(room)) is not None:
            # What was to be replaced, or shared with, has left the index.
            while not self.fits(*more):
                evict(self.fits(more[0], 0))

    def replaced(self, room: Room) -> list[Record]:
        return [old for record in room.records if (old := self.index[record.scope].get(record.key)) is not None]

    def _exceeds(self, room: Room) -> tuple[int, int] | None:
        """Entries and slots that a write adds, where that is more than the pool holds."""
        old = self.replaced(room)
        entries = len(self.published()) - len(old) + len(room.records)
        slots = self.slots(old, room.records)
        if entries <= self.max_entries and slots <= self.max_slots:
            return None
        return max(0, entries - len(self.published())), max(0, slots - self.slots())

    def copy(self) -> PoolModel:
        return PoolModel(
            self.policy,
            self.max_entries,
            self.max_slots,
            self.total_slots,
            {name: dict(scope) for name, scope in self.index.items()},
            list(self.held),
            list(self.order),
            list(self.pinned),
            {token: list(records) for token, records in self.shared.items()},
        )

    def legal_evictions(
        self, room: Room, gone: set[Record], number: int, fails: bool, publishes: bool
    ) -> tuple[Record, ...] | None:
        """An order of victims, none of them pinned, that evicts `number` entries, `gone` among them; None if none does.

        `gone` are those that the index lacks afterwards; the others were replaced by the write itself. Each victim had
        to be evictable when its turn came, and the last one had to be needed.
        """
        hidden = set() if fails else {record for record in self.replaced(room) if record not in gone}
        orders = self._orders(room, gone | hidden, fails, publishes)
        return next((order for order in orders if set(order) >= gone and len(order) == number), None)

    def _orders(
        self, room: Room, candidates: set[Record], fails: bool, publishes: bool, chosen: tuple[Record, ...] = ()
    ) -> Iterator[tuple[Record, ...]]:
        script = iter(chosen)
        wanted: list[bool] = []

        def choose(model: PoolModel, want_slots: bool) -> Record:
            victim = next(script, None)
            if victim is None:
                wanted.append(want_slots)
                raise NoRoomError
            return victim

        model = self.copy()
        try:
            model.make_room(room, choose, publishes=publishes)
        except NoRoomError:
            if not wanted:
                if fails:
                    yield chosen
                return
        else:
            if not fails:
                yield chosen
            return
        evictable = [
            record
            for record in model.published()
            if not record.pins
            and not (wanted[0] and model.shares_tail(record) and not model.may_be_last_sharer(record))
        ]
        if fails and not evictable:
            yield chosen
        for record in evictable:
            if record in candidates:
                yield from self._orders(room, candidates, fails, publishes, (*chosen, record))


def run_machine(machine: type[RuleBasedStateMachine], examples: int, steps: int) -> None:
    """Run a state machine; one that fails prints its steps and the seed that repeats it."""
    case: Any = machine.TestCase
    case.settings = settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        print_blob=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )
    gc.collect()
    gc.freeze()  # what is here already is no garbage of the machine's, and need not be looked at by each collection
    try:
        case("runTest").runTest()
    finally:
        gc.unfreeze()
