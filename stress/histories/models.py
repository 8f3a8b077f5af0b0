"""What a pool does when it is used by one caller at a time: the sequential side of linearizability."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from stress.histories.checker import Call

__all__ = ["Pool", "per_key", "split_clears", "unexplained_refusals"]

Stored = tuple[int | None, ...]  # the value of each key, None where there is none

READS = ("get", "gather")
WRITES = ("put", "put_many")


class Pool:
    """The values of a few keys, written and read one or several at once.

    A call's subject is the keys that it concerns, its argument the value that it writes, its result what was read of
    each key, or whether a write was stored. Where entries may be evicted, a miss says that the key is gone since some
    moment before: it stays gone until the next write.
    """

    def __init__(self, keys: int, *, evicting: bool) -> None:
        self.initial: Stored = (None,) * keys
        self.evicting = evicting

    def after(self, state: Stored, call: Call) -> Iterable[Stored]:
        assert isinstance(call.subject, tuple)
        keys: Sequence[int] = call.subject
        if call.action in WRITES:
            return [self._with(state, keys, call.argument) if call.result is not False else state]
        if call.action == "clear":
            return [self._with(state, keys, None)]
        if call.action == "release":
            # It says whether the key was there, and never was evicted from where it can be called.
            there = state[keys[0]] is not None
            return [self._with(state, keys, None)] if call.result in (None, there) else []
        if call.result is None:  # a read or pop that never returned
            return [state, self._with(state, keys, None)] if call.action == "pop" else [state]
        seen = call.result
        assert isinstance(seen, tuple)
        found = self._seen(state, keys, seen)
        if found is None:
            return []
        return [self._with(found, keys, None) if call.action == "pop" else found]

    def _seen(self, state: Stored, keys: Sequence[int], seen: Sequence[int | None]) -> Stored | None:
        """The state of a pool in which a read saw that; None if it cannot have."""
        for key, value in zip(keys, seen, strict=True):
            if value == state[key]:
                continue
            if value is not None or not self.evicting:
                return None
            state = self._with(state, [key], None)
        return state

    @staticmethod
    def _with(state: Stored, keys: Sequence[int], value: object) -> Stored:
        changed = list(state)
        for key in keys:
            changed[key] = value  # type: ignore[call-overload]
        return tuple(changed)


def split_clears(calls: Sequence[Call]) -> list[Call]:
    """A clear as one call for each key: it is atomic for every key, and not for several of them together."""
    found = []
    for call in calls:
        if call.action == "clear":
            assert isinstance(call.subject, tuple)
            found += [_of_key(call, key) for key in call.subject]
        else:
            found.append(call)
    return found


def per_key(calls: Sequence[Call]) -> dict[int, list[Call]]:
    """What each key saw: a call that concerns several is one of each of them."""
    found: dict[int, list[Call]] = {}
    for call in calls:
        assert isinstance(call.subject, tuple)
        for place, key in enumerate(call.subject):
            result = (call.result[place],) if isinstance(call.result, tuple) else call.result
            # The one key of a history of its own is key 0.
            found.setdefault(key, []).append(
                Call(call.process, call.action, (0,), call.argument, result, call.began, call.ended)
            )
    return found


def _of_key(call: Call, key: int) -> Call:
    return Call(call.process, call.action, (key,), call.argument, call.result, call.began, call.ended)


def unexplained_refusals(calls: Sequence[Call]) -> list[Call]:
    """Writes that say their scope was cleared meanwhile, while no clear was under way."""
    clears = [call for call in calls if call.action == "clear"]
    return [
        call
        for call in calls
        if call.action in WRITES
        and call.result is False
        and not any(
            clear.began <= (call.ended or clear.began) and (clear.ended is None or clear.ended >= call.began)
            for clear in clears
        )
    ]
