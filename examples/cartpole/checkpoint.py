"""A job that was killed goes on where it was: what each environment has played, and its roots, in a folder.

For each environment there are two files, each written beside its name and renamed: its roots as a snapshot, and what it
has played, as JSON. A root that is not there is computed anew.
"""

from __future__ import annotations

import json
import os
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from concurrent_kv import SnapshotError
from concurrent_kv.cluster import SearchContext
from examples.cartpole.episode import Episode

__all__ = ["Checkpoint", "Played", "load_roots", "save_roots"]


class PositionCodec:
    """Side data of roots, the position of the next token, as bytes."""

    @staticmethod
    def encode(side: Any) -> bytes:
        """As text."""
        return str(int(side)).encode()

    @staticmethod
    def decode(data: bytes) -> Any:
        """What was encoded."""
        return int(data)


def save_roots(context: SearchContext, path: str) -> int:
    """A planner that saves the roots of its environment; returns how many."""
    return context.manager.init_pools[context.local_id].save(path, side=PositionCodec()).entries


def load_roots(context: SearchContext, path: str) -> int:
    """A planner that loads them where they were saved; returns how many. Without a file, or a sound one, none."""
    try:
        return context.manager.init_pools[context.local_id].load(path, side=PositionCodec()).entries
    except (FileNotFoundError, SnapshotError):
        return 0


@dataclass
class Played:
    """What an environment has played: finished episodes by index, and the actions of the one that goes on."""

    returns: dict[int, float] = field(default_factory=dict)
    actions: dict[int, list[int]] = field(default_factory=dict)
    index: int | None = None
    so_far: list[int] = field(default_factory=list)


class Checkpoint:
    """What the environments of one player have played, and their roots.

    Args:
        folder: where the files are; made if it is not there.
        player: whose environments they are.
        every: steps of an environment between two checkpoints of it.
        run: runs one of the planners above for an environment: `run(env_id, planner, path)`.
    """

    def __init__(
        self, folder: Path, player: int, *, every: int, run: Callable[[int, Any, str], Awaitable[int]]
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._player = player
        self._every = every
        self._run = run
        self._played: dict[int, Played] = {}
        self.restored_roots = 0

    def _path(self, env_id: int, ending: str) -> Path:
        return self._folder / f"player{self._player}-env{env_id}.{ending}"

    def played(self, env_id: int) -> Played:
        """What an environment has played, as it was last written."""
        if env_id not in self._played:
            found = Played()
            path = self._path(env_id, "json")
            if path.exists():
                raw = json.loads(path.read_text("utf-8"))
                found = Played(
                    {int(index): earned for index, earned in raw["returns"].items()},
                    {int(index): actions for index, actions in raw["actions"].items()},
                    raw["index"],
                    raw["so_far"],
                )
            self._played[env_id] = found
        return self._played[env_id]

    async def restore(self, env_id: int) -> None:
        """Load an environment's roots."""
        self.restored_roots += await self._run(env_id, load_roots, str(self._path(env_id, "safetensors")))

    async def step(self, episode: Episode) -> None:
        """Note a step; every so many, write down what there is."""
        played = self.played(episode.env_id)
        played.index, played.so_far = episode.index, episode.actions
        if episode.time % self._every == 0:
            await self._write(episode.env_id)

    async def end(self, episode: Episode, earned: float) -> None:
        """Note that an episode is over."""
        played = self.played(episode.env_id)
        played.returns[episode.index], played.actions[episode.index] = earned, episode.actions
        played.index, played.so_far = None, []
        await self._write(episode.env_id)

    async def _write(self, env_id: int) -> None:
        # The roots first: older ones than the JSON tells of would be recomputed, newer ones are of steps to come.
        await self._run(env_id, save_roots, str(self._path(env_id, "safetensors")))
        path = self._path(env_id, "json")
        beside = path.with_suffix(".partial")
        with beside.open("w", encoding="utf-8") as file:
            json.dump(asdict(self._played[env_id]), file)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
