"""`GuardedPolicy`: a policy of the user's, which may raise, forget, or give out what it does not hold."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from .eviction import FIFO, LRU, S3FIFO, Clock, EvictionPolicy, Priority
from .records import Entry

__all__ = ["GuardedPolicy", "guarded"]

logger = logging.getLogger("concurrent_kv")

OWN = (FIFO, LRU, Priority, Clock, S3FIFO)
STRAYS = 8  # of what a policy gives out and does not hold, before the oldest candidate goes in its stead

Note = Callable[[Callable[[Any], None]], None]


class GuardedPolicy(EvictionPolicy[Entry]):
    """Asks a policy of the user's for victims, and knows by itself which entries are candidates.

    `add` and `pop_victim` come before anything has taken effect: what the policy raises there is raised, and where the
    very next call of that method raises too, it is logged. What the other methods raise is logged. An entry that the
    policy lost stays a candidate: where it names no victim, the one that was written first goes. Called under the
    mutex, like any policy; nothing is logged, and nothing that the policy let go of dies, before the next operation.

    Args:
        policy: the user's, empty.
        note: leaves something to be done by the next operation, outside of every lock.
    """

    def __init__(self, policy: EvictionPolicy[Entry], note: Note, name: str) -> None:
        super().__init__(capacity=policy.capacity)
        self.policy = policy
        self.observes_hits = bool(policy.observes_hits)  # type: ignore[misc]
        self._note = note
        self._name = name
        self._held: OrderedDict[Entry, None] = OrderedDict()  # the oldest first
        self._raised: set[str] = set()  # methods whose last call raised

    def add(self, entry: Entry) -> None:
        """See `EvictionPolicy`. Raises what the policy raised, unless its last call raised too."""
        try:
            self.policy.add(entry)
        except Exception as error:
            self._raise_or_log("add", error)
        else:
            self._raised.discard("add")
        self._held[entry] = None
        self._held.move_to_end(entry)

    def touch(self, entry: Entry) -> None:
        """See `EvictionPolicy`."""
        self._tell("touch", self.policy.touch, entry)

    def remove(self, entry: Entry) -> None:
        """See `EvictionPolicy`."""
        self._held.pop(entry, None)
        self._tell("remove", self.policy.remove, entry)

    def pop_victim(self) -> Entry | None:
        """See `EvictionPolicy`. Raises as `add`; gives out one of the candidates, where there are any."""
        if not self._held:
            return None
        for _ in range(STRAYS):
            try:
                victim = self.policy.pop_victim()
            except Exception as error:
                self._raise_or_log("pop_victim", error)
                break
            self._raised.discard("pop_victim")
            if victim is None:
                self._log("pop_victim", "gave out nothing while it should hold entries")
                break
            if type(victim) is Entry and victim in self._held:
                del self._held[victim]
                return victim
            self._log("pop_victim", "gave out what it should not hold", victim)
        victim, _ = self._held.popitem(last=False)
        self._tell("remove", self.policy.remove, victim)
        return victim

    def give_back(self, entry: Entry) -> None:
        """See `EvictionPolicy`."""
        self._held[entry] = None
        self._held.move_to_end(entry, last=False)
        self._tell("give_back", self.policy.give_back, entry)

    def clear(self) -> None:
        """See `EvictionPolicy`."""
        self._held.clear()
        try:
            self.policy.clear()
        except Exception as error:
            self._log("clear", error)

    def _tell(self, method: str, call: Callable[[Entry], None], entry: Entry) -> None:
        try:
            call(entry)
        except Exception as error:
            self._log(method, error)

    def _raise_or_log(self, method: str, error: Exception) -> None:
        if method not in self._raised:
            self._raised.add(method)
            raise error
        self._log(method, error)

    def _log(self, method: str, what: object, *kept: object) -> None:
        """Have the next operation log it: a handler of the user's may do anything. `kept` lives until then."""
        self._note(partial(_write_log, self._name, type(self.policy).__name__, method, what, kept))

    def __contains__(self, entry: object) -> bool:
        return entry in self._held

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)


def _write_log(name: str, policy: str, method: str, what: object, kept: object, deadline: object) -> None:
    error = what if isinstance(what, Exception) else None
    logger.error(
        "%s: its eviction policy %s failed in %s: %s; the entries concerned stay candidates, the oldest first",
        name,
        policy,
        method,
        "it raised" if error is not None else what,
        exc_info=error,
    )


def guarded(policy: EvictionPolicy[Entry], note: Note, name: str) -> EvictionPolicy[Entry]:
    """The policy as it is if it is the package's own, which raises nothing; in a guard otherwise."""
    return policy if type(policy) in OWN else GuardedPolicy(policy, note, name)
