"""A search: a scope of its own in which parents are gathered and children committed, kept whole until it closes."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from enum import Enum
from functools import partial
from typing import Literal, TypeVar
from weakref import ref

import torch
from torch import Tensor

from .._checks import UNORDERED, check_env_ids, check_keys, check_priorities, hash_of, positive_int
from ..books.allocation import default_tokens
from ..books.ledger import wake
from ..books.records import Budget, Entry, Hold
from ..errors import ClosedError, InvalidArgumentError, InvalidTypeError, KeyNotFoundError, SearchEndedError, shown
from ..locks.deadline import Deadline
from ..locks.gate import gate
from ..model.overflow import Overflow
from ..never_copied import is_owned_elsewhere
from ..pool.batch import Batch
from ..pool.clearing import discard, take_out
from ..pool.committing import commit_batch, open_batch
from ..pool.handle import Handle
from ..pool.joint import Part, open_part
from ..pool.pool import KVPool
from ..pool.room import reserve_budget
from ..pool.storage import KVStorage
from ..pool.tier import release_both
from ..pool.writing import generation_for, write
from .promoting import plan_promotion
from .reading import adopt, adopted, adopted_below, disown, own, own_or_adopted, retain_here, retain_roots
from .recording import RecordingState
from .state import RootKey, SearchState
from .tree import SearchTree, tree_of

__all__ = ["LookupOrder", "Search", "gather_part_of_search", "storage_of"]

LookupOrder = Literal["own_first", "init_first"]

CLOSED = "the search was closed; open another with manager.search()"  # why it has ended


B = TypeVar("B", bound=Batch)


class _Same(Enum):
    """Stands for "as it is in the search", where None is a value like any other."""

    KEY = "the same key"
    SIDE = "the same side data"


SAME_KEY, SAME_SIDE = _Same.KEY, _Same.SIDE


class Search(Handle):
    """An open search over some environments; made by `KVCacheManager.search`. Several threads may use it.

    Its entries, and the roots that it gathered from the init pools, stay until it closes, whatever is cleared or
    written elsewhere; other searches never see them. Leaving its `with` releases everything, also after an exception.

    Attributes:
        env_ids: the environments it is for.
    """

    _internal = frozenset(("abandon", "close_on_loop", "is_over"))

    instead_of_copy = "share the one object between threads, or open another with manager.search()"

    def __init__(
        self, state: SearchState, env_ids: tuple[Hashable, ...], order: LookupOrder, overflow: Overflow
    ) -> None:
        self.env_ids = env_ids
        self._known_envs = frozenset(env_ids)
        self._checked_envs: Sequence[Hashable] = env_ids  # the last tuple or range of them that was checked
        # Made here: a finaliser may get no memory.
        self._end_later = partial(state.end, "the search was dropped without being closed")
        self._state = state
        state.roots_hold.owner = state.below_hold.owner = ref(self)
        self._order = order
        self._overflow = overflow

    # Reading -------------------------------------------------------------------------------------------------------

    def gather(
        self,
        keys: Sequence[Hashable],
        env_ids: Sequence[Hashable],
        *,
        order: LookupOrder | None = None,
        room: int | None = None,
        out: Tensor | None = None,
        timeout: float | None = None,
        stream: torch.Stream | None = None,
    ) -> Batch:
        """Read the parents of the next children into one padded batch. May block.

        Args:
            keys: one for each row.
            env_ids: the environment of each row, in whose init pool its root may be.
            order: "own_first" looks among the search's entries before the init pools, "init_first" the other way
                round; the search's own if left out. Roots adopted before come before either's init pools.
            room: free columns after the longest row; up to the window if left out.
            out: the buffer to gather into, the caller's: contiguous `[2 * layers, batch, heads, columns, head_dim]`.
                Its columns after the newest tokens become zeros or stay as they are.
            stream: see `KVPool.gather`.

        Returns a batch whose `hits` say which rows were found; `fill` the others, then `commit`.

        Raises:
            InvalidArgumentError: lengths differ, an environment is not of this search, too much room, an unfit `out`.
            SearchEndedError: the search is closed, or was ended by a version bump or by closing the pool.
            WaitTimeoutError: a shard was not free in time.
        """
        state = self._state
        storage = state.storage
        if stream is not None:
            with storage.clock.using(stream):
                return self.gather(keys, env_ids, order=order, room=room, out=out, timeout=timeout)
        deadline = storage.enter(timeout)
        keys = check_keys(keys)
        if env_ids is not self._checked_envs:
            env_ids = self._check_envs(env_ids)
        if len(env_ids) != len(keys):
            raise InvalidArgumentError(f"env_ids must have one id for each of {len(keys)} keys, got {len(env_ids)}")
        own_first = (self._order if order is None else check_order(order)) == "own_first"
        return self._gather(keys, env_ids, own_first, room, out, deadline, open_batch)

    def _gather(
        self,
        keys: list[Hashable],
        env_ids: Sequence[Hashable],
        own_first: bool,
        room: int | None,
        out: Tensor | None,
        deadline: Deadline,
        opened: Callable[..., B],
        counts: bool = True,
    ) -> B:
        """As `gather`, of checked arguments; `opened` makes the batch of what was found, which is counted or not."""
        state, ledger = self._state, self._state.ledger
        new_roots: list[Entry] = []
        generation = state.scope.generation
        hold, of_roots = Hold("batch", []), None
        found: list[Entry | None] = [None] * len(keys)
        new: dict[RootKey, Entry] = {}
        lower = None if state.storage.tier is None else Hold("read", [])
        try:
            if own_first:
                retain_here(state, found, keys, env_ids, own_or_adopted, hold, deadline, lower)
                if None in found:
                    of_roots = Hold("read", [])
                    new = retain_roots(state, found, keys, env_ids, of_roots, deadline, lower)
            else:
                retain_here(state, found, keys, env_ids, adopted, hold, deadline, lower)
                of_roots = Hold("read", [])
                new = retain_roots(state, found, keys, env_ids, of_roots, deadline, lower)
                retain_here(state, found, keys, env_ids, own, hold, deadline)
            if new and of_roots is not None:
                new_roots = adopt(state, new, found, hold, deadline, lower)
                state.storage.ledger.release(of_roots)
            batch = opened(state, state.scope, generation, hold, found, room, out)
            if lower is not None:
                release_both(lower)
            # Only now, as a gather that fails must leave the search as it was.
            with gate.lock, ledger.mutex:
                state.track(batch, counts)
            return batch
        except BaseException:
            if lower is not None:
                ledger.abandoned.append(lower)
            for owner, held in ((ledger, hold), (state.storage.ledger, of_roots)):
                if held is None:
                    continue
                try:
                    owner.release(held)
                except BaseException:
                    owner.abandoned.append(held)
            if new_roots:
                try:
                    disown(state, new_roots, deadline)
                except BaseException:
                    ledger.abandoned.append(partial(disown, state, new_roots))
            raise

    def contains(self, key: Hashable, *, timeout: float | None = None) -> bool:
        """Whether `key` is one of the search's own entries. May block."""
        hash_of(key)
        state = self._state
        deadline = state.storage.enter(timeout)
        with gate.lock, state.locks.read(state.scope.shards, deadline):
            if key in state.own:
                return True
            state.check_open()  # under the shard: its end may have swept the key
            return False

    def __contains__(self, key: Hashable) -> bool:
        """As `contains`."""
        return self.contains(key)

    def keys(self, *, timeout: float | None = None) -> list[Hashable]:
        """The keys of the search's own entries, oldest first; a list of its own. May block."""
        state = self._state
        deadline = state.storage.enter(timeout)
        with gate.lock, state.locks.read(state.scope.shards, deadline):
            state.check_open()
            items = state.own.listed()
        return [key for key, _ in items]

    def __iter__(self) -> Iterator[Hashable]:
        """Over `keys()` as they are now. May block, before the first."""
        return iter(self.keys())

    def __len__(self) -> int:
        """Number of the search's own entries. Never blocks."""
        return len(self._state.own)

    @property
    def held(self) -> int:
        """Number of entries that it keeps alive: its own and its adopted roots. Never blocks."""
        return len(self._state.own) + len(self._state.roots) + len(self._state.roots_below)

    @property
    def tokens_in_use(self) -> int:
        """Slots that its own entries take, those that they share counted once; its roots' are not. Never blocks."""
        return self._state.slots_in_use

    def tree(self, *, timeout: float | None = None) -> SearchTree:
        """What it holds as a tree: whose child each entry is, its own and its shared tokens, its age. May block.

        Raises:
            InvalidArgumentError: the search was opened without `record_tree=True`.
        """
        state = self._state
        deadline = state.storage.enter(timeout)
        if not isinstance(state, RecordingState):
            raise InvalidArgumentError("record_tree must be True in manager.search() for a search that tells its tree")
        with gate.lock, state.locks.read(state.scope.shards, deadline):
            state.check_open()
            with gate.lock, state.ledger.mutex:
                recorded = state.recorded()
        return tree_of(recorded, time.monotonic())

    # Writing -------------------------------------------------------------------------------------------------------

    def commit(
        self,
        keys: Sequence[Hashable],
        batch: Batch,
        *,
        rows: Sequence[int] | None = None,
        lengths: Sequence[int] | None = None,
        overflow: Overflow | None = None,
        sides: Sequence[object] | None = None,
        timeout: float | None = None,
        stream: torch.Stream | None = None,
    ) -> None:
        """Store what the model appended to a batch as entries of this search, sharing the slots of their parents.

        Args:
            keys: one for each committed row; a key that comes twice gets the last of its rows.
            batch: an open batch of this search's `gather`. It closes when every row has been committed.
            rows: which rows, in the order of `keys`; all that are left if not given.
            lengths: new tokens of each row, where some ended early; see `KVPool.commit`.
            overflow: what happens to rows that outgrow the window; the search's own policy if left out, and an error
                where that has none.
            sides: side data, one item for each row.
            stream: see `KVPool.commit`.

        Raises:
            CapacityError: the search needs more than it reserved, and the pool has no more; names what would do.
            WindowOverflowError: a row grew too long. SearchEndedError: the search has ended.
            ClosedError: the batch is closed. InvalidArgumentError: see `KVPool.commit`.
            WaitTimeoutError: the search's shard was not free in time.
        """
        state = self._state
        if stream is not None:
            with state.storage.clock.using(stream):
                return self.commit(
                    keys, batch, rows=rows, lengths=lengths, overflow=overflow, sides=sides, timeout=timeout
                )
        deadline = state.storage.enter(timeout)
        if getattr(batch, "scope", state.scope) is not state.scope:
            state.check_open()
            raise InvalidArgumentError("batch was gathered by another search or pool, and cannot be committed here")
        checked = self._overflow if overflow is None else state.storage.checked_overflow(overflow)
        commit_batch(state, batch, keys, rows, lengths, checked, sides, None, deadline)

    def release(self, keys: Iterable[Hashable], *, timeout: float | None = None) -> None:
        """Remove some of the search's own entries; their room can be used again at once. May block.

        A key that is none of theirs names the roots of that key that were adopted, of whichever environment. They are
        let go of, as by `keep`: of several trees that share a search, one can end by itself.

        Raises:
            KeyNotFoundError: a key is not one of the search's entries, nor of its roots; nothing is released then.
        """
        state = self._state
        going = set(check_keys(keys, ordered=False))
        deadline = state.storage.enter(timeout)
        ledger, dead, parted = state.ledger, list[Entry](), list[Entry]()
        with gate.lock, state.locks.write(state.scope.shards, deadline):
            deadline.check(state.name)
            state.check_open()
            # Every key that is looked at is looked at before anything goes.
            found, before = state.own.find_each(going), state.roots
            roots, leaving, missing = state.parted_from_roots(going, found)
            missing = state.not_below(missing)
            if not missing:
                roots_alone = going - state.owned(going, found)
                parted = state.part_below(roots_alone.__contains__)
                waiters = take_out(state, state.own, found, dead)
                if leaving:
                    with gate.lock, ledger.mutex:
                        dead += state.part_with(leaving, roots)
                        waiters += ledger.take_waiters()
        if missing:
            raise KeyNotFoundError(
                f"the search has no entry and no root for {shown(missing[0])} ({len(missing)} keys missing)"
            )
        wake(waiters)
        del dead, before, leaving, found, parted

    def discard(self, key: Hashable) -> None:
        """Have the next operation release the search's own entry of `key`, if it has one; see `KVPool.discard`."""
        self._state.storage.check_process()
        hash_of(key)
        discard(self._state, self._state.scope, key)

    def keep(self, keys: Iterable[Hashable], *, timeout: float | None = None) -> int:
        """Release everything but `keys`, adopted roots included: the subtree that stays when the root moves on.

        What stays keeps the slots that it shares with what goes: those of entries in `tokens_in_use`, those of roots
        in the manager's headroom.

        Returns the number of own entries released. May block.

        Raises:
            KeyNotFoundError: a key is not one of the search's entries, nor of its roots; nothing is released then.
        """
        state = self._state
        deadline = state.storage.enter(timeout)
        staying = set(check_keys(keys, minimum=0, ordered=False))
        ledger = state.ledger
        dead: list[Entry] = []
        parted: list[Entry] = []
        waiters: list[object] = []
        # One hold for both: a time-out or a cancellation comes before all of it or not at all.
        with gate.lock, state.locks.write(state.scope.shards, deadline):
            deadline.check(state.name)
            state.check_open()
            before = state.roots
            # Every key that is looked at is looked at before anything goes.
            found = state.own.find_each(staying)
            _, _, missing = state.parted_from_roots(staying, found)
            missing = state.not_below(missing)
            going = state.own_beside(found)
            roots, leaving = state.parted_roots(staying)
            if not missing:
                parted = state.part_below(lambda key: key not in staying)
                waiters = take_out(state, state.own, going, dead)
                with gate.lock, ledger.mutex:
                    dead += state.part_with(leaving, roots)
                    waiters += ledger.take_waiters()
        if missing:
            raise KeyNotFoundError(
                f"the search has no entry and no root for {shown(missing[0])} to keep ({len(missing)} keys missing); "
                "nothing was released"
            )
        wake(waiters)
        number = len(going)
        del dead, before, leaving, going, found, parted
        return number

    def promote(
        self,
        key: Hashable,
        env_id: Hashable,
        *,
        as_key: Hashable = SAME_KEY,
        side: object = SAME_SIDE,
        priority: float = 0.0,
        timeout: float | None = None,
    ) -> bool:
        """Store one of the search's entries in an environment's init pool too. May block.

        Costs what gathering it costs: it is copied, but for what it shares with a root of the search.

        Args:
            key: one of the search's own entries, or a root it adopted.
            env_id: the environment whose init pool gets it.
            as_key: its key there; the same if left out.
            side: its side data there; the entry's own if left out.

        Returns True, or False with nothing stored if the init pool was cleared meanwhile.

        Raises:
            KeyNotFoundError: the search has no such entry.
            InvalidArgumentError: an environment that is not of this search.
        """
        state = self._state
        storage = state.storage
        deadline = storage.enter(timeout)
        hash_of(key)
        (env_id,) = self._check_envs([env_id], "env_id")
        init_pool = state.init_pools[env_id]
        target = init_pool.default_scope
        generation = generation_for(target, deadline)
        if generation.version != state.versions[env_id]:
            raise SearchEndedError(
                f"{init_pool.name}: the weights version was bumped since this search was opened; open a new search"
            )
        check_priorities([priority], 1)
        new_key = key if as_key is SAME_KEY else as_key
        hash_of(new_key, "as_key")
        hold, lower = Hold("commit", []), Hold("commit", [])
        ledger = state.ledger
        entry: Entry | None = None
        try:
            with gate.lock, state.locks.read(state.scope.shards, deadline):
                state.check_open()
                entry = state.own.get(key) or state.roots.get((env_id, key))
                if entry is not None:
                    with gate.lock, ledger.mutex:
                        ledger.extend(hold, [entry])
                elif state.roots_below:
                    in_tier: list[Entry | None] = [None]
                    adopted_below(state, in_tier, [key], [env_id], lower)
                    (entry,) = in_tier
            if entry is None:
                raise KeyNotFoundError(
                    f"the search has no entry for {shown(key)} to promote, and gathered no root of that key in "
                    f"environment {shown(env_id)}"
                )
            as_stored = entry.side if side is SAME_SIDE else side
            plan = plan_promotion(state, entry, new_key, as_stored, priority)
            return write(init_pool, target, generation, plan, deadline)
        finally:
            del entry
            try:
                release_both(hold, lower)
            except BaseException:
                ledger.abandoned += (hold, lower)
                raise

    # Life ----------------------------------------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        """Whether it was closed, or ended from outside."""
        return self._state.scope.ended is not None

    @property
    def is_over(self) -> bool:
        """Whether it has ended and nothing of it is left. Never blocks."""
        return self._state.finished

    def close(self, *, timeout: float | None = None) -> None:
        """Release every entry, root, open batch and reservation. May block; nothing happens the second time.

        Inside a critical section of the calling thread (in a finaliser, say) it is left to the next operation.
        """
        # No closure anywhere here: where there is no memory for its cells, CPython 3.11 loses what was to be in them.
        if not self._is_left():
            self._state.end(CLOSED, self._state.storage.enter_quietly(timeout))

    def close_on_loop(self, seconds: float) -> None:
        """As `close`, for a task, on its event loop's own thread; what others left is not done first, as there.

        Raises:
            WaitTimeoutError: the search's shard was not free in `seconds`, or there is more to let go of than a loop
                has time for: nothing has happened, and it is a worker's to close it.
        """
        self._state.storage.check_process()
        if not self._is_left():
            self._state.end(CLOSED, Deadline(seconds))

    def _is_left(self) -> bool:
        """Whether there is nothing to end here: it has ended, or is left to the next operation."""
        if not self._state.finished and gate.is_inside:
            self.abandon()
            return True
        return self._state.finished

    def _check_envs(self, env_ids: Sequence[Hashable], name: str = "env_ids") -> Sequence[Hashable]:
        if isinstance(env_ids, UNORDERED):
            raise InvalidTypeError(f"{name} must be a sequence, one for each row, got {shown(env_ids)}")
        checked = check_env_ids(env_ids, name)
        if not self._known_envs.issuperset(checked):
            unknown = [env_id for env_id in checked if env_id not in self._known_envs]
            raise InvalidArgumentError(
                f"{name} must be among the search's {shown(self.env_ids)}, got {shown(unknown[0])}"
            )
        if checked is env_ids or type(env_ids) is range:  # it will be the same
            self._checked_envs = env_ids
        return checked

    def abandon(self) -> None:
        """Leave it to the next operation to close this. Takes no lock: finalisers come here, at any point."""
        state = getattr(self, "_state", None)
        if state is not None and not state.finished:
            state.storage.ledger.abandon(self._end_later)

    def __del__(self) -> None:
        state = getattr(self, "_state", None)
        if state is not None and not is_owned_elsewhere(state.roots_hold.owner, self):
            self.abandon()

    def __repr__(self) -> str:
        return f"<Search over {shown(self.env_ids)}: {self._state.scope.ended or f'{len(self)} entries'}>"


def storage_of(search: Search) -> KVStorage:
    """The storage that its pools share."""
    return search._state.storage


def gather_part_of_search(
    search: Search, keys: Sequence[Hashable] | None, env_ids: Sequence[Hashable], *, counts: bool = True
) -> Part:
    """As `Search.gather`, of rows that are copied together with others'; rows that miss where there are no keys.

    `counts`: as of `gather_part_of_pool`.
    """
    state = search._state
    deadline = state.storage.enter(None)
    if keys is not None:
        order, env_ids = search._order == "own_first", search._check_envs(env_ids)
        return search._gather(check_keys(keys), env_ids, order, None, None, deadline, open_part, counts)
    hold, scope = Hold("batch", []), state.scope
    try:
        with gate.lock, state.ledger.mutex:
            state.check_open()
            state.ledger.extend(hold, [])
        return open_part(state, scope, scope.generation, hold, [None] * len(env_ids))
    except BaseException:
        state.ledger.abandoned.append(hold)
        raise


def check_order(order: object) -> LookupOrder:
    """`order` if it names a lookup order."""
    if order == "own_first":
        return "own_first"
    if order == "init_first":
        return "init_first"
    raise InvalidArgumentError(f"order must be 'own_first' or 'init_first', got {shown(order)}")


def open_search(
    pool: KVPool,
    init_pools: Mapping[Hashable, KVPool],
    env_ids: Iterable[Hashable],
    *,
    number: int,
    entries_per_env: int,
    entries: int | None,
    tokens: int | None,
    order: LookupOrder,
    overflow: Overflow | None,
    record_tree: bool = False,
    deadline: Deadline,
) -> Search:
    """Reserve room in `pool` and open a search over `env_ids`; see `KVCacheManager.search`."""
    ids = check_env_ids(env_ids)
    if not ids:
        raise InvalidArgumentError("env_ids must name at least one environment, got none")
    unknown = [env_id for env_id in ids if env_id not in init_pools]
    if unknown:
        raise InvalidArgumentError(
            f"env_ids must be environments of the manager, 0 to {len(init_pools) - 1}, got {shown(unknown[0])}"
        )
    if len(set(ids)) != len(ids):
        raise InvalidArgumentError(f"env_ids must be different, got {shown(ids)}")
    check_order(order)
    checked = pool.storage.checked_overflow(overflow)
    entries = positive_int("entries", entries) if entries is not None else len(ids) * entries_per_env
    tokens = positive_int("tokens", tokens) if tokens is not None else default_tokens(entries, pool.layout.max_tokens)
    budget = reserve_budget(pool, entries, tokens, deadline)
    try:
        kind = RecordingState if record_tree else SearchState
        return _opened(kind, pool, init_pools, ids, number, budget, order, checked)
    except BaseException:
        pool.ledger.abandoned.append(partial(pool.ledger.again, [partial(_give_back, pool, budget)]))
        raise


def _give_back(pool: KVPool, budget: Budget) -> None:
    """Return what was reserved for a search that did not open; nothing happens the second time. Mutex held."""
    account = pool.account
    if budget.max_slots:
        reserved = account.reserved_entries - budget.max_entries, account.reserved_slots - budget.max_slots
        pool.ledger.slots.add(budget.runs or [])
        # No call from here on, so that no asynchronous exception parts what belongs together; nothing needs memory.
        account.reserved_entries, account.reserved_slots = reserved
        budget.max_entries = budget.max_slots = 0


def _opened(
    kind: type[SearchState],
    pool: KVPool,
    init_pools: Mapping[Hashable, KVPool],
    ids: tuple[Hashable, ...],
    number: int,
    budget: Budget,
    order: LookupOrder,
    overflow: Overflow,
) -> Search:
    state = kind(pool, init_pools, number, budget, budget.runs or [])
    # Before it is registered: wherever an exception arrives from then on, the search is dropped, and so closed.
    search = Search(state, ids, order, overflow)
    ledger = pool.ledger
    with gate.lock, ledger.mutex:
        closed = pool.account.closed or pool.storage.closed
        if closed:
            _give_back(pool, budget)
        else:
            ledger.holds.add(state.roots_hold)
            pool.searches.add(state)
            pool.account.budgets.add(budget)
        waiters = ledger.take_waiters() if closed else []
    wake(waiters)
    if closed:
        state.finished = True
        raise ClosedError(f"{pool.name} is closed")
    return search
