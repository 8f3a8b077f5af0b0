"""What callers saw, and whether a plain dict could have shown it to them (linearizability, by trying every order)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from .scheduler import BrokenPromiseError

__all__ = ["Call", "Kind", "Value", "check_linearizable"]

Value = tuple[int, ...]  # the labels of an entry's tokens, oldest first
State = dict[int, Value]


class Kind(Enum):
    READ = "read"
    WRITE = "write"
    POP = "pop"
    CLEAR = "clear"


@dataclass(eq=False)
class Call:
    """One operation on a pool, from the caller's side. Times are positions in one order of all beginnings and ends."""

    kind: Kind
    keys: tuple[int, ...]
    writes: tuple[Value, ...]  # of a write: one for each key
    began: int
    ended: int = -1  # -1: never, it raised what a program expects, and left nothing
    seen: tuple[Value | None, ...] = ()  # of a read or pop: one for each key
    stored: bool = False  # of a write: what it returned
    since: int = -1  # of a write: when its epoch was read; its beginning, or that of its gather

    def overlaps(self, since: int, until: int) -> bool:
        return self.began < until and (self.ended > since or self.ended < 0)

    def __str__(self) -> str:
        result: object = self.stored if self.kind is Kind.WRITE else self.seen
        return f"{self.kind.value}{self.keys}{self.writes or ''} -> {result} [{self.began}..{self.ended}]"


def check_linearizable(calls: Sequence[Call], before: State, *, evicting: bool) -> None:
    """Find an order of the calls, true to who ended before whom began, in which a dict answers as the pool did.

    Args:
        calls: all of them, those that read the final state included.
        before: what was stored when the first call began.
        evicting: whether entries may have been evicted at any time: a miss then proves nothing, a hit still does.

    Raises:
        BrokenPromiseError: there is no such order, or a write says that it was cleared away and nothing was cleared.
    """
    finished = [call for call in calls if call.ended >= 0]
    clears = [other for other in calls if other.kind is Kind.CLEAR]
    for call in finished:
        if call.kind is Kind.WRITE and not call.stored:
            if not any(clear.overlaps(call.since, call.ended) for clear in clears):
                raise BrokenPromiseError(f"{call} was not stored, and nothing was cleared meanwhile")
        elif call.kind is Kind.WRITE and any(call.since < clear.began < clear.ended < call.began for clear in clears):
            raise BrokenPromiseError(f"{call} was stored, and its scope was cleared between its gather and its commit")
    if not _order_exists(tuple(finished), before, evicting, set()):
        raise BrokenPromiseError("no order of these calls explains them: " + "; ".join(map(str, finished)))


def _order_exists(
    left: tuple[Call, ...], state: State, evicting: bool, failed: set[tuple[tuple[int, ...], tuple[object, ...]]]
) -> bool:
    if not left:
        return True
    known = (tuple(id(call) for call in left), tuple(sorted(state.items())))
    if known in failed:
        return False
    first_end = min(call.ended for call in left)
    for position, call in enumerate(left):
        if call.began < first_end:
            after = _after(call, state, evicting)
            if after is not None and _order_exists(left[:position] + left[position + 1 :], after, evicting, failed):
                return True
    failed.add(known)
    return False


def _after(call: Call, state: State, evicting: bool) -> State | None:
    """The dict after a call that did what `call` did; None if a dict would have answered otherwise."""
    if call.kind is Kind.CLEAR:
        return {}
    if call.kind is Kind.WRITE:
        return {**state, **dict(zip(call.keys, call.writes, strict=True))} if call.stored else state
    for key, value in zip(call.keys, call.seen, strict=True):
        if value != state.get(key) and not (value is None and evicting):
            return None
    if call.kind is Kind.POP:
        return {key: value for key, value in state.items() if key not in call.keys}
    return state
