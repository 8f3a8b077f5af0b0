"""`check_integrity` finds every planted contradiction, and `repair` mends it and says what it returned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest

from concurrent_kv import IntegrityError, KVCacheManager, KVPool
from concurrent_kv.books.records import Entry, Hold, Place
from concurrent_kv.device.slot_numbers import as_array
from tests.conftest import MakePool
from tests.support import LAYOUT, append, assert_same, bits, child_of, config, packed, store, tokens

pytestmark = pytest.mark.usefixtures("loops")


class Books:
    """A manager in mid-use, and the way to its entries."""

    def __init__(self) -> None:
        self.manager = KVCacheManager(config(), 2, wm_entries=4, wait_timeout=1.0)
        self.pool = self.manager.wm_pool
        store(self.pool, ("a", tokens(1, 3)), ("b", tokens(2, 4)))
        batch = self.pool.gather(["a"])
        append(batch, [3])
        self.pool.commit(["c"], batch)
        self.pin = self.pool.pin("c")
        self.manager.set_init_cache(0, "root", tokens(4, 3))
        self.search = self.manager.search([0], entries=4, tokens=16)
        batch = self.search.gather(["root"], [0])
        append(batch, [5])
        self.search.commit(["child"], batch)
        self.batch = self.search.gather(["child"], [0])
        self.ledger = self.manager.storage.ledger

    def entry(self, key: str) -> Entry:
        """The entry of a key of the wm pool."""
        (found,) = (part[key] for part in self.pool.default_scope.entries if key in part)
        return found

    def own(self) -> Entry:
        """The search's own entry."""
        return self.search._state.own["child"]


class Planted(NamedTuple):
    name: str
    plant: Callable[[Books], object]
    says: str


def free_twice(books: Books) -> None:
    slots = books.ledger.slots
    slots._runs.append(slots._runs[-1])


def lose_a_run(books: Books) -> None:
    books.ledger.slots._runs.pop()


def write_slot_0(books: Books) -> None:
    books.manager.storage.tensor.data[:, 0] = 1.0


def forget_in_policy(books: Books) -> None:
    books.pool.policy.remove(books.entry("b"))


def hold_a_foreign_entry(books: Books) -> None:
    books.pool.policy.add(Entry("ghost", books.pool.default_scope, books.pool.default_scope.generation, 1))


def free_a_used_slot(books: Books) -> None:
    slots = books.ledger.slots
    free, ticks = slots._runs.pop()
    wrong = as_array(free).copy()
    wrong[-1] = books.entry("b").tail
    slots._runs.append((wrong, ticks))


def put(target: str, **changes: Any) -> Callable[[Books], None]:
    """Set attributes of the entry of a key."""

    def plant(books: Books) -> None:
        for name, value in changes.items():
            setattr(books.entry(target), name, value)

    return plant


def add(path: str, name: str, number: int = 1) -> Callable[[Books], None]:
    """Add to a number of the books."""

    def plant(books: Books) -> None:
        owner: Any = books
        for part in path.split("."):
            owner = getattr(owner, part)
        setattr(owner, name, getattr(owner, name) + number)

    return plant


def count_a_slot_once_more(books: Books) -> None:
    books.ledger.tables.enter([books.entry("b").row], [1], [0], range(0), np.zeros(0, dtype=np.int64))


def free_a_row_in_use(books: Books) -> None:
    books.ledger.tables.leave([books.entry("b").row])


def count_a_quota_slot_once_more(books: Books) -> None:
    books.pool.account.uses.add([books.entry("b").row])


def leave_a_hold(books: Books) -> None:
    books.ledger.holds.add(Hold("read", [books.entry("b")]))


def lose_a_hold(books: Books) -> None:
    books.ledger.holds.discard(books.pin._hold)


def exchange_rows(books: Books) -> None:
    books.entry("a").row = books.entry("b").row


def lose_from_the_index(books: Books) -> None:
    for part in books.pool.default_scope.entries:
        part.pop("b")


def index_under_another_key(books: Books) -> None:
    for part in books.pool.default_scope.entries:
        if "b" in part:
            part.cells[hash("z")] = part.cells.pop(hash("b"))


MENDED = [
    Planted("slot count too high", count_a_slot_once_more, "use counts differ"),
    Planted("slot free twice", free_twice, "free twice"),
    Planted("free slots lost", lose_a_run, "free count"),
    Planted("free count", add("ledger.slots", "free_count"), "free count"),
    Planted("used slot free", free_a_used_slot, "free slot is referenced"),
    Planted("slots of a search", add("search._state.ledger.slots", "size"), "reserved"),
    Planted("slots that a search owes", add("search._state.ledger", "borrowed"), "borrowed"),
    Planted("writes of a search", add("search._state.ledger", "grants"), "under way"),
    Planted("a root that is not held", lambda books: books.search._state.roots_hold.entries.clear(), "root"),
    Planted("references too many", put("b", refs=2), "references"),
    Planted("references too few", put("c", refs=1), "references"),
    Planted("pins", put("c", pins=0), "pins"),
    Planted("quota entries", add("pool.account", "entries"), "counts 4 entries"),
    Planted("quota slot counts", count_a_quota_slot_once_more, "slots"),
    Planted("pending entries", add("pool.account", "pending_entries"), "pending"),
    Planted("pending slots", add("pool.account", "pending_slots"), "pending"),
    Planted("reserved entries of a pool", add("manager.recur_pool.account", "reserved_entries"), "as reserved"),
    Planted("reserved slots of a pool", add("manager.recur_pool.account", "reserved_slots"), "as reserved"),
    Planted("entries of a search", add("search._state.budget", "entries"), "counts 2 entries"),
    Planted("not in the policy", forget_in_policy, "policy"),
    Planted("ghost in the policy", hold_a_foreign_entry, "policy"),
    Planted("place none", put("b", place=Place.NONE), "place"),
    Planted("place claimed", put("b", place=Place.CLAIMED), "CLAIMED"),
    Planted("a hold of an operation left", leave_a_hold, "references"),
    Planted("lost from the index", lose_from_the_index, "free"),
]
FOUND = [
    Planted("slot 0 is not zero", write_slot_0, "slot 0"),
    Planted("a lost hold", lose_a_hold, "pin"),
    Planted("length", put("b", length=5), "tokens"),
    Planted("tail", put("b", tail=1), "tokens"),
    Planted("two entries with one row", exchange_rows, "same row"),
    Planted("a row in use is free", free_a_row_in_use, "its row 0"),
    Planted("an entry under a key that is not its own", index_under_another_key, "'b'"),
]


@pytest.mark.parametrize("planted", [*MENDED, *FOUND], ids=lambda planted: planted.name)
def test_a_planted_contradiction_is_found_and_named(planted: Planted) -> None:
    books = Books()
    books.manager.check_integrity()
    planted.plant(books)
    with pytest.raises(IntegrityError) as caught:
        books.manager.check_integrity()
    assert any(planted.says in problem for problem in caught.value.problems), caught.value.problems


@pytest.mark.parametrize("planted", MENDED, ids=lambda planted: planted.name)
def test_repair_mends_what_can_be_recounted(planted: Planted) -> None:
    books = Books()
    planted.plant(books)
    books.manager.repair()
    books.manager.check_integrity()
    assert_same(books.pool.get("a"), tokens(1, 3))
    assert_same(books.pool.get("c"), child_of(tokens(1, 3), 3))
    with books.search.gather(["child", "root"], [0, 0]) as batch:
        assert batch.lengths == (5, 3)
    append(books.batch, [6])
    books.search.commit(["grandchild"], books.batch)
    books.pin.close()
    books.search.close()
    books.manager.check_integrity()
    books.manager.close()
    books.manager.check_integrity()


def test_a_sound_storage_reports_what_it_counted() -> None:
    books = Books()
    report = books.manager.check_integrity()
    assert report.entries == 5
    assert report.referenced_slots == 3 + 4 + 2 + 3 + 2
    assert report.free_slots + report.referenced_slots == books.ledger.num_slots
    assert report.handles == 3  # the pin, the search's roots, the open batch


def test_repair_of_a_sound_storage_returns_nothing_and_changes_nothing() -> None:
    books = Books()
    before = {key: bits(packed(books.pool.get(key))) for key in "abc"}  # type: ignore[arg-type]
    assert books.manager.repair() == (0, 0, 0)
    books.manager.check_integrity()
    for key, bytes_ in before.items():
        assert bits(packed(books.pool.get(key))).equal(bytes_)  # type: ignore[arg-type]


def test_repair_of_a_sound_storage_keeps_entries_parked_for_sharing_evictable() -> None:
    with KVPool(LAYOUT, 100, max_slots=16) as pool:
        pool.put("parent", tokens(1, 6))
        batch = pool.gather(["parent"])
        append(batch, [2])
        pool.commit(["child"], batch)
        pool.repair()
        for key in range(8):
            pool.put(key, tokens(key, 8), timeout=1.0)
            pool.check_integrity()


def test_every_contradiction_is_listed() -> None:
    books = Books()
    write_slot_0(books)
    books.pool.account.pending_slots += 1
    with pytest.raises(IntegrityError, match="slot 0") as caught:
        books.manager.check_integrity()
    assert len(caught.value.problems) == 2


class OnceComparable:
    """A key that may not be compared any more once it is broken."""

    broken = False

    def __hash__(self) -> int:
        return 7

    def __eq__(self, other: object) -> bool:
        if OnceComparable.broken:
            raise ArithmeticError("compared under the mutex")
        return isinstance(other, OnceComparable)


def test_a_check_compares_no_keys(make_pool: MakePool, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = make_pool()
    for value in (1, 2):  # the index has the key object of the first write, the entry that of the second
        pool.put(OnceComparable(), tokens(value, 2))
    with monkeypatch.context() as patch:
        patch.setattr(OnceComparable, "broken", True)
        assert pool.check_integrity().entries == 1
