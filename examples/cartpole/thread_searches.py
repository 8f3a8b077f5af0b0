"""Searches in worker threads, each of several trees together; the environments' tasks wait for them."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import anyio

from examples.cartpole.episode import Episode
from examples.cartpole.evaluation import Evaluation
from examples.cartpole.planner import Planner
from examples.cartpole.play import Decide, PlaySettings
from examples.cartpole.roots import Roots
from examples.cartpole.running import InThreads, Runner


class ThreadSearches:
    """Searches trees in threads; roots are looked up and stored by the environments' own tasks.

    Args:
        roots: evaluates them.
        planner: what the threads run.
        settings: how many threads, and how many trees in each.
    """

    def __init__(self, roots: Roots, planner: Planner, settings: PlaySettings) -> None:
        self._roots = roots
        self._planner = planner
        self._settings = settings

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[Decide, None]:
        """While it is entered, searches run."""
        run = InThreads(self._settings.threads)
        queue = _Queue(self._roots, run, self._settings.envs)
        with queue.turns:
            async with anyio.create_task_group() as dispatchers:
                for _ in range(self._settings.threads):
                    dispatchers.start_soon(self._dispatch, queue, run)
                with queue:
                    yield queue.decide

    async def _dispatch(self, queue: _Queue, run: Runner) -> None:
        """Take waiting environments and search their trees together, in a worker thread."""
        while group := await queue.take(self._settings.trees_per_thread):
            actions = await run(self._planner.plan, [turn.episode for turn in group], [turn.root for turn in group])
            for turn, action in zip(group, actions, strict=True):
                turn.action = action
                turn.decided.set()


@dataclass(eq=False)
class _Turn:
    """An environment waiting for its action."""

    episode: Episode
    root: Evaluation
    decided: anyio.Event = field(default_factory=anyio.Event)
    action: int = -1


class _Queue:
    """Environments on their way to a search. Leaving its `with` ends the tasks that take from it."""

    def __init__(self, roots: Roots, run: Runner, envs: int) -> None:
        self._roots = roots
        self._run = run
        self._waiting, self.turns = anyio.create_memory_object_stream[_Turn](envs)
        self._coming = 0  # their roots are being evaluated
        self._taking = anyio.Lock()

    async def decide(self, episode: Episode) -> int:
        """The action of a search from the episode's newest observation."""
        self._coming += 1
        try:
            turn = _Turn(episode, await self._roots.evaluate(episode, self._run))
        finally:
            self._coming -= 1
        self._waiting.send_nowait(turn)  # there is room for all
        await turn.decided.wait()
        return turn.action

    async def take(self, most: int) -> list[_Turn]:
        """The next environments to be searched together; none when there are no more."""
        group: list[_Turn] = []
        # One at a time: two tasks that wait for the same environment would leave one of them waiting for good.
        async with self._taking:
            # Environments whose roots are being evaluated are here soon, and two trees take little longer than one.
            while len(group) < most and (not group or self._coming or self.turns.statistics().current_buffer_used):
                try:
                    group.append(await self.turns.receive())
                except anyio.EndOfStream:
                    break
        return group

    def __enter__(self) -> _Queue:
        return self

    def __exit__(self, *_: object) -> None:
        self._waiting.close()
