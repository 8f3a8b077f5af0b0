"""`get_or_compute` and `try_claim` for threads: a lookup, then one computation for all who missed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING

from .._checks import check_priorities
from ..books.entry import Generation, Scope
from ..device.streams import Ticks
from ..device.tensors import plain_torch_state
from ..errors import ClosedError, InvalidTypeError
from ..flights.table import Claim, FlightState
from ..flights.waiting import outcome, wait_in_thread
from ..locks.deadline import Deadline
from ..model.kv import KeysValues, check_fits
from .plan import plan_put
from .writing import write

if TYPE_CHECKING:
    from .pool import KVPool
    from .storage import KVStorage

__all__ = ["claim", "compute_here", "get_or_compute", "heard_by_all"]


def claim(
    pool: KVPool, scope: Scope, key: Hashable, generation: Generation, side: object, priority: float
) -> tuple[Claim, bool]:
    """Join the flight of a key; and whether the caller is the one to compute."""
    (priority,) = check_priorities([priority], 1)
    store = partial(_store, scope, key, generation, side, priority)
    joined = Claim(pool.flights, store, partial(_private_copy, pool.storage))
    return joined, pool.flights.join(scope, key, generation, joined)


def _private_copy(storage: KVStorage, kv: KeysValues) -> tuple[KeysValues, Ticks]:
    """A copy of one row on the storage's device that nobody else has, and the ticks of its making."""
    stream = storage.clock.current()
    row = check_fits(kv, storage.layout, rows=1).row(0)
    with plain_torch_state():
        copied = row.copy(storage.layout.device)
    return copied, storage.clock.stamp(stream)


def _store(
    scope: Scope,
    key: Hashable,
    generation: Generation,
    side: object,
    priority: float,
    kv: KeysValues,
    timeout: float | None = None,
) -> bool:
    """Put a result in the generation that it was claimed in: after a clear, it is not kept."""
    pool = scope.pool
    deadline = pool.storage.enter(timeout)
    pool.check_open()
    pool.storage.clock.current()  # before anything is copied, which a capture would take into its graph
    plan = plan_put(pool.storage, [key], check_fits(kv, pool.layout, rows=1), [0], [side], [priority])
    return write(pool, scope, generation, plan, deadline)


def get_or_compute(
    pool: KVPool,
    scope: Scope,
    key: Hashable,
    compute: Callable[[], KeysValues],
    deadline: Deadline,
    side: object,
    priority: float,
) -> KeysValues:
    """See `KVPool.get_or_compute`."""
    found = pool.get(key, scope=scope, timeout=deadline.seconds)
    while found is None:
        # Read anew for every attempt: who takes an abandoned computation over computes for the present generation.
        joined, mine = claim(pool, scope, key, scope.generation, side, priority)
        if mine:
            return compute_here(pool, joined, key, scope, compute)
        wait_in_thread(joined.flight, deadline, pool.name)
        if joined.late and joined.flight.state is FlightState.DONE:
            found = pool.peek(key, scope=scope, timeout=deadline.left())
        else:
            found = outcome(joined, pool.storage.clock, pool.name)
    return found


@contextmanager
def heard_by_all(joined: Claim) -> Iterator[None]:
    """Ends the flight with an error that leaves the `with`."""
    try:
        yield
    except Exception as error:
        with suppress(ClosedError):  # it is over: nobody waits for it any more
            joined.fail(error)
        raise


def compute_here(
    pool: KVPool, joined: Claim, key: Hashable, scope: Scope, compute: Callable[[], KeysValues]
) -> KeysValues:
    """Compute a claimed key in the calling thread, and end its flight in whatever way that ends."""
    with joined, joined.computing(), heard_by_all(joined):
        # Another flight may have ended between the caller's lookup and its claim.
        joined.flight.settling = True
        kv = pool.peek(key, scope=scope)
        joined.flight.settling = kv is not None
        if kv is None:
            kv = compute()
            if inspect.isawaitable(kv):
                if inspect.iscoroutine(kv):
                    kv.close()
                raise InvalidTypeError("compute must return a KeysValues, got an awaitable: await the async pool's")
            joined.fulfil(kv)
        else:
            joined.pass_on(kv)
    result = outcome(joined, pool.storage.clock, pool.name)
    assert result is not None, joined.flight.state is FlightState.DONE
    return result
