"""Claims on missing keys: what a pool does when one is fulfilled or fails."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager, suppress
from functools import partial

from .._checks import check_priorities
from ..books.records import Generation, Scope
from ..device.modes import plain_torch_state
from ..device.streams import Ticks
from ..errors import ClosedError
from ..flights.table import Claim
from ..model.kv import KeysValues, check_fits
from .plan import plan_put
from .storage import KVStorage, PoolState
from .writing import write

__all__ = ["claim", "heard_by_all"]


def claim(
    pool: PoolState, scope: Scope, key: Hashable, generation: Generation, side: object, priority: float
) -> tuple[Claim, bool]:
    """Join the flight of a key; and whether the caller is the one to compute."""
    (priority,) = check_priorities([priority], 1)
    store = partial(_store, pool, scope, key, generation, side, priority)
    joined = Claim(pool.flights, store, partial(_private_copy, pool.storage))
    return joined, pool.flights.join(scope, key, generation, joined)


def _private_copy(storage: KVStorage, kv: KeysValues) -> tuple[KeysValues, Ticks]:
    """A copy of one row on the storage's device that no other caller has, and the ticks of its making."""
    stream = storage.clock.current()
    row = check_fits(kv, storage.layout, rows=1).row(0)
    with plain_torch_state():
        copied = row.copy(storage.layout.device)
    return copied, storage.clock.stamp(stream)


def _store(
    pool: PoolState,
    scope: Scope,
    key: Hashable,
    generation: Generation,
    side: object,
    priority: float,
    kv: KeysValues,
    timeout: float | None = None,
) -> bool:
    """Put a result in the generation that it was claimed in: after a clear, it is not kept."""
    deadline = pool.storage.enter(timeout, pool.account)
    pool.storage.clock.current()  # before anything is copied, which a capture would take into its graph
    plan = plan_put(pool.storage, [key], check_fits(kv, pool.layout, rows=1), [0], [side], [priority])
    return write(pool, scope, generation, plan, deadline)


@contextmanager
def heard_by_all(joined: Claim) -> Iterator[None]:
    """Ends the flight with an error that leaves the `with`."""
    try:
        yield
    except Exception as error:
        with suppress(ClosedError):  # it is over: no caller waits for it any more
            joined.fail(error)
        raise
