"""The records of the books: `Entry`, one cached sequence, `Scope`, its namespace, `Account`, who pays (a `Budget` for a
search), and `Hold`.

An entry's life: made (in flight, unknown to anyone), published (its scope's index names it), removed from the index
(replaced, evicted, popped, released or swept by a clear), dead when the last hold lets go; then its slots are free.

                     +-- HELD by the pool's policy <---+-----------------------+
    published -------+         | popped as victim      | unpinned              | its last token is its own again
                     |         v                       |                       |
                     |      CLAIMED -- is pinned --> PINNED                    |
                     |         +------ slots are short and it would free none --> SHARED
                     +-- EXEMPT: belongs to a search, is never a victim
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from copy import copy
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol
from weakref import ref

from ..device.slot_numbers import Slots
from ..device.streams import NO_TICKS, Ticks
from ..errors import CapacityError, ClosedError, SearchEndedError
from ..locks.deadline import Deadline
from ..locks.numbers import Numbers
from ..never_copied import NeverCopied
from .eviction import EvictionPolicy
from .index import Index
from .size_arguments import SizeArguments
from .stats import Counters
from .tables import Tables, Uses, new_uses
from .turns import Turns

if TYPE_CHECKING:
    from ..device.positions import Correction
    from .slots import Run

__all__ = [
    "CLAIMED",
    "EXEMPT",
    "HELD",
    "NO_PLACE",
    "PINNED",
    "SHARED",
    "Account",
    "Budget",
    "Entry",
    "Generation",
    "Grant",
    "Hold",
    "Located",
    "Place",
    "Scope",
    "Scopes",
    "locate_each",
    "parts_below",
]


class Generation(NamedTuple):
    """The epoch and weights version of a scope. Compared by identity: each clear and bump makes a new one."""

    epoch: int
    version: int


class Place(IntEnum):
    """Where an entry stands with its pool's eviction policy."""

    NONE = 0
    HELD = 1
    CLAIMED = 2
    PINNED = 3
    SHARED = 4
    EXEMPT = 5


# Looked up once: a member of an enum is found by a call of Python's in CPython 3.11, which may fail.
NO_PLACE: Final = Place.NONE
HELD: Final = Place.HELD
CLAIMED: Final = Place.CLAIMED
PINNED: Final = Place.PINNED
SHARED: Final = Place.SHARED
EXEMPT: Final = Place.EXEMPT


class Mover:
    """What an entry is, whether it is in its pool or in the tier beneath it.

    Attributes:
        line: one object for all the entries that one write has been as it moved; not set before its first move.
    """

    __slots__ = ("line",)

    line: object


class Entry(Mover):
    """An immutable record, reference-counted as a whole. `refs`, `pins`, `place`, `ticks` belong to the mutex.

    Attributes:
        key, scope, generation: what it was stored as.
        index_key: the equal key object of the key's first write.
        key_hash: that of the key when it was stored.
        row: its row in the ledger's slot tables.
        length: tokens.
        tail: slot of its last token.
        side: the caller's side data.
        priority: what policies look at, beside `fingerprint`.
        correction: the differences its tokens need on reading, where some were moved lazily.
        refs: the index (1 while published) and every hold.
        pins: holds that also forbid eviction.
        written: stream ticks of the writes of its slots.
        ticks: stream ticks of every use of its slots, writes and reads.
    """

    __slots__ = (
        "correction",
        "generation",
        "index_key",
        "key",
        "key_hash",
        "length",
        "pins",
        "place",
        "priority",
        "refs",
        "row",
        "scope",
        "side",
        "tail",
        "ticks",
        "written",
    )

    def __init__(
        self,
        key: Hashable,
        scope: Scope,
        generation: Generation,
        length: int,
        side: object = None,
        priority: float = 0.0,
        key_hash: int | None = None,
        correction: Correction = None,
        written: Ticks = NO_TICKS,
    ) -> None:
        self.key = key
        self.index_key = key
        self.scope = scope
        self.generation = generation
        self.length = length
        self.side = side
        self.priority = priority
        self.key_hash = hash(key) if key_hash is None else key_hash
        self.correction = correction
        self.row = -1
        self.tail = 0
        self.refs = 0
        self.pins = 0
        self.place = NO_PLACE
        self.written = written
        self.ticks = written

    @property
    def fingerprint(self) -> int:
        """Stands for its key in its scope, also after it is gone."""
        return hash((self.scope.number, self.key_hash))


_scope_numbers = Numbers.of_process(1)


class Scope(NeverCopied):
    """A namespace of keys with a life of its own, and its part of the index.

    Args:
        account: who pays for its entries, unless they have a `budget`.
        name: what it is called in messages and statistics.
        shards: the lock shards that guard its keys, in ascending order; a key's shard is `shards[hash % len]`.
        budget: what a search reserved: its entries are paid from it, and are never victims.

    `ended` says why nothing can be stored in it any more (its search is over, or it was dropped); set under its shards'
    write locks.

    Attributes:
        below: of a pool's scope, what the tier beneath the pool has of it, if there is a tier; of the same shards.
        above: of what a tier has, the pool's scope that it belongs to.
    """

    _internal = frozenset(
        (
            "above",
            "account",
            "below",
            "budget",
            "ended",
            "entries",
            "generation",
            "locate",
            "number",
            "part_of",
            "renew",
            "shards",
            "why_ended",
        )
    )

    __slots__ = (
        "above",
        "account",
        "below",
        "budget",
        "ended",
        "entries",
        "generation",
        "name",
        "number",
        "shards",
    )

    instead_of_copy = "pass its name, and ask the pool for it with scope(name)"

    def __init__(
        self, account: Account, name: Hashable, shards: tuple[int, ...], *, budget: Budget | None = None
    ) -> None:
        self.account = account
        self.name = name
        self.number = next(_scope_numbers)
        self.shards = shards
        self.budget = budget
        self.ended: str | None = None
        self.generation = Generation(0, 0)
        self.below: Scope | None = None
        self.above: Scope | None = None
        # One part for each shard, guarded by that shard's lock.
        self.entries: tuple[Index[Entry], ...] = tuple(Index() for _ in shards)

    @property
    def epoch(self) -> int:
        """Number of clears so far."""
        return self.generation.epoch

    @property
    def version(self) -> int:
        """Weights version."""
        return self.generation.version

    def renew(self, generation: Generation) -> None:
        """Begin a new generation, here and in what a tier has of it. The storage's mutex held."""
        self.generation = generation
        if self.below is not None:
            self.below.generation = generation

    def why_ended(self) -> ClosedError | None:
        """What is raised where it is used after its end; None before that."""
        if self.ended is None:
            return None
        return ClosedError(self.ended) if self.budget is None else SearchEndedError(self.ended)

    def part_of(self, key_hash: int) -> int:
        """Which of the scope's parts holds keys of this hash."""
        return key_hash % len(self.shards)

    def locate(self, hashes: Sequence[int]) -> Located:
        """Where keys of these hashes belong."""
        shards, entries, keys = self.shards, self.entries, len(hashes)
        if len(shards) == 1:
            return Located([self] * keys, [entries[0]] * keys, shards)
        if keys == 1:
            number = hashes[0] % len(shards)
            return Located([self], [entries[number]], (shards[number],))
        numbers = [key_hash % len(shards) for key_hash in hashes]
        of_all = set(map(shards.__getitem__, numbers))
        return Located([self] * keys, list(map(entries.__getitem__, numbers)), tuple(sorted(of_all)))

    def __repr__(self) -> str:
        return f"<Scope {self.name!r} epoch={self.epoch} version={self.version}>"


class Scopes:
    """Several scopes of one account that one write stores into: what the write asks of a scope.

    Args:
        scopes: of some of the entries each, in the order of their shards all alike.
        scope_of: which of them, of each key.
        renewal: epochs and weights version to begin with the write, so that all else in the account is older; None
            where nothing ends.

    Attributes:
        coming: the generation of each scope's entries.
    """

    budget = None

    def __init__(self, scopes: list[Scope], scope_of: list[int], renewal: tuple[int, int] | None = None) -> None:
        self.account = scopes[0].account
        self.shards = scopes[0].shards
        self.below = scopes[0].below  # all have one, or none
        self.scopes = scopes
        self._scope_of = scope_of
        self._renewal = renewal
        self._present = [scope.generation for scope in scopes]
        self.coming = [generation if renewal is None else self._next(generation) for generation in self._present]

    def _next(self, generation: Generation) -> Generation:
        assert self._renewal is not None
        epochs, version = self._renewal
        return Generation(generation.epoch + epochs, version)

    @property
    def generation(self) -> Generation:
        """That of the first scope as long as none of them has another than at first; then one that no scope has."""
        for scope, present in zip(self.scopes, self._present, strict=True):
            if scope.generation is not present:
                return Generation(scope.epoch, scope.version)
        return self._present[0]

    @property
    def ended(self) -> str | None:
        """Why one of them has ended."""
        return next((scope.ended for scope in self.scopes if scope.ended is not None), None)

    def why_ended(self) -> ClosedError | None:
        """As of a scope."""
        ended = self.ended
        return None if ended is None else ClosedError(ended)

    def of_keys(self) -> list[Scope]:
        """That of each key."""
        return [self.scopes[number] for number in self._scope_of]

    def generations(self) -> list[Generation]:
        """That of each key's entry."""
        return [self.coming[number] for number in self._scope_of]

    def locate(self, hashes: Sequence[int]) -> Located:
        """Where the keys belong, whose hashes these are."""
        return locate_each(self.of_keys(), hashes)

    def renew(self) -> None:
        """Begin the coming generations, and the next ones in every other scope of the account. Mutex held.

        In the hold that publishes the write: what it stores is then all that is current.
        """
        if self._renewal is None:
            return
        own = {*self.scopes}
        others = [(scope, self._next(scope.generation)) for scope in self.account.scopes.values() if scope not in own]
        for scope, generation in (*zip(self.scopes, self.coming, strict=True), *others):
            scope.renew(generation)


class Located(NamedTuple):
    """Where some keys belong.

    Attributes:
        scopes: of each key.
        parts: of each key, the part of its scope's index.
        shards: those of all these parts, ascending and without repeats.
    """

    scopes: list[Scope]
    parts: list[Index[Entry]]
    shards: tuple[int, ...]


def locate_each(scopes: list[Scope], hashes: Sequence[int]) -> Located:
    """Where keys of these hashes belong, each in a scope of its own."""
    of_each = [(scope, key_hash % len(scope.shards)) for scope, key_hash in zip(scopes, hashes, strict=True)]
    shards = {scope.shards[number] for scope, number in of_each}
    return Located(scopes, [scope.entries[number] for scope, number in of_each], tuple(sorted(shards)))


def parts_below(scopes: list[Scope], hashes: Sequence[int]) -> list[Index[Entry]]:
    """The part of the tier's index that each key belongs to, of scopes that have one below."""
    belows = [scope.below for scope in scopes if scope.below is not None]
    return [below.entries[below.part_of(key_hash)] for below, key_hash in zip(belows, hashes, strict=True)]


class Account:
    """Who pays for room: the entries and slots of one pool, its candidates for eviction, its counters, and its scopes.

    It counts what is stored, about to be stored (pending), and reserved by searches. A slot that several entries of the
    pool share counts once. Entries of searches do not count here: their search reserved room for them when it opened.
    Under the storage's mutex, but for `closed`, which is read without it.

    Args:
        tables: where the slots of its entries are listed.

    Attributes:
        arguments: what its size was given by.
        uses: of its entries' rows.
        before: what it had counted by the last reset.
        budgets: of open searches, set aside of it.
        guests: budgets of open searches that have adopted roots of it.
        scopes: by name, without those of searches.
    """

    def __init__(
        self,
        name: str,
        max_entries: int,
        max_slots: int,
        tables: Tables,
        policy: EvictionPolicy[Entry],
        arguments: SizeArguments | None = None,
    ) -> None:
        self.name = name
        self.max_entries = max_entries
        self.max_slots = max_slots
        self.arguments = arguments or SizeArguments()
        self.entries = 0
        self.uses: Uses = new_uses(tables)
        self.pending_entries = 0
        self.pending_slots = 0
        self.reserved_entries = 0
        self.reserved_slots = 0
        self.turns = Turns()
        self.policy = policy
        self.counters = Counters()
        self.before = Counters()
        self.closed = False
        self.budgets: set[Budget] = set()
        self.guests: set[Budget] = set()
        self.scopes: dict[Hashable, Scope] = {}

    def count(self) -> Counters:
        """What it has counted, and open searches for it. Mutex held; the searches' numbers are read without theirs."""
        counted = copy(self.counters)
        self._add_searches(counted, 1)
        return counted

    def count_of_lifetime(self) -> Counters:
        """As `count`, likewise, whatever was reset."""
        counted = self.count()
        counted.add(self.before)
        return counted

    def count_from_zero(self) -> None:
        """Start counting anew. What open searches have counted is taken off, and so stays theirs. Mutex held."""
        of_searches = Counters()  # looked at once: they go on counting, and what came between two looks would be lost
        self._add_searches(of_searches, 1)
        before, counters = copy(self.counters), type(self.counters)()
        before.add(of_searches)
        before.add(self.before)
        counters.add(of_searches, -1)
        self.before, self.counters = before, counters

    def _add_searches(self, counters: Counters, times: int) -> None:
        for budget in self.budgets.copy():  # in one call: where a finaliser asks, no lock is held
            counters.add(budget.counters, times)
        for budget in self.guests.copy():
            counters.hit_count += times * budget.root_hits.get(self, 0)

    @property
    def slots(self) -> int:
        """Slots of its entries."""
        return self.uses.used

    def fits(self, entries: int, slots: int) -> bool:
        """Whether so much more can be stored without evicting."""
        return (
            entries <= self.max_entries - self.entries - self.pending_entries - self.reserved_entries
            and slots <= self.max_slots - self.uses.used - self.pending_slots - self.reserved_slots
        )

    def can_ever_fit(self, entries: int, slots: int) -> bool:
        """Whether so much more fits once everything that is not reserved is evicted."""
        return entries <= self.max_entries - self.reserved_entries and slots <= self.max_slots - self.reserved_slots

    def check_size(self, name: str, entries: int, slots: int) -> None:
        """Raise `CapacityError` if so much can never be stored at once in the pool called `name`."""
        if entries > self.max_entries or slots > self.max_slots:
            raise CapacityError(
                f"{name} holds at most {self.max_entries} entries and {self.max_slots} slots, and {entries} entries "
                f"with {slots} slots were to be stored at once; {self.that_holds(entries, slots)} would do, or fewer "
                "at a time",
                required_entries=entries,
                required_slots=slots,
            )

    def that_holds(self, entries: int, slots: int) -> str:
        """The arguments with which a pool holds so much, of those that have to grow."""
        return self.arguments.that_hold(entries, slots, max_entries=self.max_entries, max_slots=self.max_slots)

    def __repr__(self) -> str:
        return f"<Account {self.name!r}>"


class Budget:
    """A search's own account, a child of its pool's: what it has set aside of that, and what it counts.

    Under the search's mutex, but for `ended`, which is read without it and written under the storage's, and for the two
    limits, which are part of the parent's reserved numbers and written under both.

    Attributes:
        max_entries, max_slots: what is set aside.
        entries: stored, or about to be.
        counters: what it adds to the parent's until it ends.
        root_hits: how often it found roots that it had adopted, of each init pool's account.
        ended: why the search is over; nothing can be taken from its budget then.
        runs: the slots that were set aside with it.
    """

    def __init__(self, parent: Account, max_entries: int, max_slots: int) -> None:
        self.parent = parent
        self.max_entries = max_entries
        self.max_slots = max_slots
        self.entries = 0
        self.ended: str | None = None
        self.counters = type(parent.counters)()
        self.root_hits: dict[Account, int] = {}
        self.runs: list[Run] | None = None

    def visit(self, roots: list[Entry]) -> None:
        """Note that roots are adopted; the policies of their accounts hear of the hits. The storage's mutex held."""
        for root in roots:
            account = root.scope.account
            account.guests.add(self)
            if root.place is HELD and account.policy.observes_hits:
                account.policy.touch(root)

    def count_roots(self, roots: list[Entry]) -> None:
        """Note hits of adopted roots."""
        for entry in roots:
            account = (entry.scope.above or entry.scope).account
            self.root_hits[account] = self.root_hits.get(account, 0) + 1


@dataclass(slots=True)
class Grant:
    """What a write in flight has taken; given back whole if it fails."""

    entries: int  # pending in the quota (or the budget)
    slots: int
    taken: Slots
    ticks: Ticks
    borrowed: int = 0  # of `taken`, beyond what the search had left: what is replaced makes up for them
    spent: bool = False  # published: an exception after that must not give the slots back


class Releases(Protocol):
    """What releases holds: a ledger."""

    def release_abandoned(self, hold: Hold, deadline: Deadline) -> None:
        """Release a hold that its owner has dropped."""


@dataclass(slots=True, eq=False, repr=False)
class Hold:
    """A registered set of entries kept alive for one owner: an open batch, a pin, a search. Released once.

    `users` are operations under way that need the entries to the end: the last of them lets go of what was released.
    `owner` is the handle; where it is dead and the hold is not released, its finaliser was cut off.
    `ledger` is where it is registered.

    Called, it is released: as it stands, it can be left to the next operation (`Ledger.abandoned`), without memory.
    """

    what: str
    entries: list[Entry]
    pinning: bool = False
    released: bool = False
    users: int = 0
    owner: ref[object] | None = None
    ledger: Releases | None = None

    def __call__(self, deadline: Deadline) -> None:
        """Release it, if it was ever registered."""
        if self.ledger is not None:
            self.ledger.release_abandoned(self, deadline)

    @property
    def is_orphan(self) -> bool:
        """Whether no handle is there to release it. True until one has taken it over, too."""
        return self.owner is None or self.owner() is None
