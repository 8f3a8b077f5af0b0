"""`Faults`: what goes wrong on purpose in one run."""

from __future__ import annotations

import asyncio
import os
import threading
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Mapping
from contextlib import AbstractContextManager, nullcontext
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import anyio
import torch

from concurrent_kv import KeysValues
from stress.faults.copies import disturb_copies
from stress.faults.errors import LoaderError, marked
from stress.faults.finalisers import CallsFromInside
from stress.faults.forks import fork_now_and_then
from stress.faults.interrupts import Exposure, Interrupter
from stress.faults.pools import Doomed, Tiny

if TYPE_CHECKING:
    from stress.actors import Actor
    from stress.gate import Gate
    from stress.world import World

__all__ = ["FAULTS", "Faults", "parse_faults"]

FAULTS: Mapping[str, str] = MappingProxyType(
    {
        "copies": "copies that fail in the middle: memory is short, a tensor is on the wrong device",
        "slow": "copies that take milliseconds",
        "loaders": "computations that raise, give a wrong shape, or never end until they are cancelled",
        "cancel": "tasks cancelled at any point, by scopes and by asyncio's own cancel()",
        "abandon": "searches and claims that are dropped unclosed",
        "endings": "threads that end with what they hold while others wait for it",
        "interrupts": "asynchronous exceptions at any point of a thread's operation; Ctrl-C in the main thread's",
        "close": "a pool that is closed while all threads and tasks use it",
        "tiny": "a pool of one entry",
        "collisions": "keys that all have one hash",
        "fork": "forks while the pools are in use",
        "finalisers": "a collector that runs at every allocation; finalisers and signal handlers that call pools",
    }
)
ENDING, TINY, DOOMED = "ending thread", "tiny pool", "doomed pool"
# CPython may raise in a thread that is being started instead of the one that starts it, before it has begun. And the
# one entry of the tiny pool, once lost, is missed by all actors until the next quiet moment.
NOT_INTERRUPTED = {ENDING, TINY}
CANCELLED, WRONG_LOADER = 0.05, 0.1  # shares of the operations of tasks, and of the computations
LONGEST_SECONDS = 0.005  # until a cancellation
HANGING_SECONDS = 0.05  # how long a computation hangs until its caller is cancelled


def parse_faults(text: str) -> frozenset[str]:
    """`copies,cancel` as names; "all" and "none" are those.

    Raises:
        ValueError: an unknown name.
    """
    if text == "all":
        return frozenset(FAULTS) if hasattr(os, "fork") else frozenset(FAULTS) - {"fork"}
    names = frozenset(name.strip() for name in text.split(",")) - {"none", ""}
    if unknown := names - set(FAULTS):
        raise ValueError(f"{sorted(unknown)[0]!r} is none of {', '.join(FAULTS)}, all")
    return names


class Faults:
    """The faults of one world, and how often each was made.

    Attributes:
        may_starve: whether slots may be lost until `repair()`.
    """

    def __init__(self, world: World, gate: Gate) -> None:
        self.enabled = world.settings.faults
        self.may_starve = "interrupts" in self.enabled
        # One name for each. No lock: a finaliser or a signal handler of the thread that counts may count meanwhile.
        self._counted: deque[str] = deque()
        self._world = world
        self._interrupter = Interrupter(world.settings.seed, self.count)
        self._exposures = threading.local()
        self.doomed = Doomed(world) if "close" in self.enabled else None
        self.tiny = Tiny(world) if self.enabled & {"tiny", "endings"} else None
        kv = KeysValues.from_packed(torch.zeros(_shape_of_row(world)))
        self._inside = CallsFromInside(world.manager.wm_pool, kv, gate) if "finalisers" in self.enabled else None
        if self.enabled & {"copies", "slow"}:
            disturb_copies(
                world.manager.storage.tensor,
                fail="copies" in self.enabled,
                slow="slow" in self.enabled,
                seed=world.settings.seed,
                count=self.count,
            )

    def count(self, fault: str) -> None:
        """One more of a kind."""
        self._counted.append(fault)

    # Operations that are faults by themselves --------------------------------------------------------------------

    def operations(self) -> dict[str, Callable[[Actor], Coroutine[Any, Any, object]]]:
        """By name."""
        found: dict[str, Callable[[Actor], Coroutine[Any, Any, object]]] = {}
        if self.doomed is not None:
            found[DOOMED] = self.doomed.visit
        if self.tiny is not None:
            found[TINY] = self.tiny.visit
            found[ENDING] = self.tiny.visit_and_end
        return found

    def mix(self) -> dict[str, float]:
        """How often each of them is chosen: about one in twenty operations of a profile."""
        whole = sum(self._world.settings.profile.mix.values())
        weights = {DOOMED: 0.05, TINY: 0.05, ENDING: 0.01 if "endings" in self.enabled else 0.0}
        return {name: whole * weights[name] for name in self.operations()}

    def work(self, over: threading.Event, fail: Callable[[str], None]) -> list[Callable[[], None]]:
        """What has to run in threads of its own until the run is over."""
        found: list[Callable[[], None]] = []
        if "interrupts" in self.enabled:
            found.append(lambda: self._interrupter.work(over))
        if "fork" in self.enabled:
            pool, bound = self._world.manager.wm_pool, self._world.settings.bound_seconds
            found.append(lambda: fork_now_and_then(pool, over, self.count, fail, bound))
        inside = self._inside
        if inside is not None:
            found.append(lambda: inside.work(over, fail))
        return found

    def collecting(self) -> AbstractContextManager[None]:
        """Where finalisers are among the faults: the collector runs at every allocation within the `with`."""
        return nullcontext() if self._inside is None else self._inside.collecting()

    def made(self) -> Counter[str]:
        """How often each was made."""
        heard = deque() if self._inside is None else self._inside.heard
        return Counter([*self._counted.copy(), *heard.copy()])

    # Around operations -------------------------------------------------------------------------------------------

    async def disturb(self, actor: Actor, name: str, work: Coroutine[Any, Any, object]) -> None:
        """Run an operation of an actor, perhaps not to its end."""
        if not actor.access.is_task:
            if "interrupts" in self.enabled and name not in NOT_INTERRUPTED:
                await self._exposure().expose(work)
            else:
                await work
            return
        cancelling = "cancel" in self.enabled and actor.rng.random() < CANCELLED
        delay = actor.rng.random() * LONGEST_SECONDS
        if cancelling and self._world.settings.backend == "asyncio" and actor.rng.random() < 0.5:
            await self._cancel_natively(actor, work, delay)
            return
        with anyio.CancelScope() as scope:
            actor.scope = scope
            if cancelling:
                scope.deadline = anyio.current_time() + delay
            await work
        if scope.cancelled_caught:
            self.count("cancelled")

    async def _cancel_natively(self, actor: Actor, work: Coroutine[Any, Any, object], delay: float) -> None:
        actor.scope = anyio.CancelScope()  # no task is in it: a computation that hangs is ended by the task's own end
        task = asyncio.ensure_future(work)
        handle = asyncio.get_running_loop().call_later(delay, task.cancel)
        try:
            await task
        except asyncio.CancelledError:
            self.count("cancelled natively")
        finally:
            handle.cancel()

    def _exposure(self) -> Exposure:
        exposure: Exposure | None = getattr(self._exposures, "own", None)
        if exposure is None:
            exposure = self._exposures.own = self._interrupter.exposure()
        return exposure

    # Computations ------------------------------------------------------------------------------------------------

    def loader(self, actor: Actor) -> KeysValues | None:
        """What is wrong with a computation: it raises, or gives this; None if nothing is."""
        if "loaders" not in self.enabled or actor.rng.random() >= WRONG_LOADER:
            return None
        self.count("wrong loader")
        if actor.rng.random() < 0.5:
            raise marked(LoaderError("a computation that fails"))
        return self._misshapen()

    async def loader_in_task(self, actor: Actor) -> KeysValues | None:
        """As `loader`; it may also hang until it is cancelled."""
        scope = actor.scope
        if "loaders" in self.enabled and scope is not None and actor.rng.random() < WRONG_LOADER / 3:
            self.count("hanging loader")
            scope.deadline = min(scope.deadline, anyio.current_time() + HANGING_SECONDS)
            with anyio.move_on_after(10 * HANGING_SECONDS):  # where no task is in the scope
                await anyio.sleep_forever()
            raise marked(LoaderError("a computation that hung"))
        return self.loader(actor)

    def _misshapen(self) -> KeysValues:
        return KeysValues.from_packed(torch.zeros(_shape_of_row(self._world, more_heads=1)))

    def close(self) -> None:
        """Close the pools of their own."""
        if self.doomed is not None:
            self.doomed.close()
        if self.tiny is not None:
            self.tiny.pool.close()


def _shape_of_row(world: World, *, more_heads: int = 0) -> tuple[int, ...]:
    """Of one token."""
    layout = world.layout
    return (2 * layout.num_layers, 1, layout.num_heads + more_heads, 1, layout.head_dim)
