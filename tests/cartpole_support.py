"""What the tests of the main job share: short games, and a player without a game."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import anyio
import pytest
import torch

from examples.cartpole.episode import Episode
from examples.cartpole.model import WorldModel
from examples.cartpole.play import PlaySettings
from examples.cartpole.search import TreeSearch, new_manager
from examples.cartpole.tree import Evaluation
from examples.cartpole.workers import in_threads, on_the_loop

SHORT = PlaySettings(envs=4, threads=2, simulations=8, episodes=5, max_steps=7)
ALONE = replace(SHORT, max_rows=1)
SHORT_ARGUMENTS = [
    *("--envs", "4", "--threads", "2", "--simulations", "8", "--episodes", "5", "--max-steps", "7"),
    *("--no-cache-steps", "0", "--no-progress"),
]
ROWS_OF_SHORT = 5 * (7 * 8 + 6)  # of each episode: the parents of all leaves, and the last roots

both_backends = pytest.mark.parametrize("backend", ["asyncio", "trio"])
threads_and_loop = pytest.mark.parametrize("threads", [2, 0], ids=["threads", "loop"])


@contextmanager
def one_torch_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Player:
    """Episodes whose observations depend on the actions only, and the searches that choose these."""

    def __init__(
        self,
        model: WorldModel,
        *,
        envs: int,
        simulations: int,
        workers: int = 1,
        threads: int = 0,
        max_rows: int = 64,
        kind: type[TreeSearch] = TreeSearch,
        check: Any = None,
    ) -> None:
        self.manager = new_manager(model, envs=envs, simulations=simulations, workers_per_tree=workers)
        self.search = kind(
            model, self.manager, range(envs), simulations=simulations, workers_per_tree=workers, check=check
        )
        self.evaluator = self.search.evaluator(max_rows=max_rows)
        self.threads = threads
        tilts = torch.linspace(-0.1, 0.1, envs)
        self.episodes = [Episode(i, i, [torch.tensor([0.0, 0.0, float(tilts[i]), 0.0])]) for i in range(envs)]

    def act(self, count: int | None = None) -> list[int]:
        """One step of the first episodes, all if no number is given."""
        actions: dict[int, int] = {}
        episodes = self.episodes[:count]

        async def decide(episode: Episode, run: Any) -> None:
            actions[episode.index] = await self.search.decide(episode, run)

        async def decide_all() -> None:
            workers = [lambda: nullcontext(self.evaluator)] * self.threads
            running = in_threads(workers, walks_per_thread=2) if workers else on_the_loop(self.evaluator)
            async with running as run, anyio.create_task_group() as tasks:
                for episode in episodes:
                    tasks.start_soon(decide, episode, run)

        anyio.run(decide_all)
        for episode in episodes:
            action = actions[episode.index]
            episode.actions.append(action)
            episode.observations.append(episode.observations[-1] + 0.01 * (2 * action - 1))
        return [actions[episode.index] for episode in episodes]

    def end(self) -> None:
        """Nothing of the search is left, and the books balance."""
        stats = self.manager.get_stats_summary()
        assert stats.pools["recur"].entries == 0
        self.manager.check_integrity()
        self.search.close()
        self.manager.check_integrity()
        self.manager.close()


def assert_close(left: Sequence[Evaluation], right: Sequence[Evaluation], *, roots: Sequence[bool]) -> None:
    """Evaluations agree, but for the step that led to a root, which is nobody's."""
    for one, other, is_root in zip(left, right, roots, strict=True):
        assert one.value == pytest.approx(other.value, rel=1e-4, abs=1e-3)
        assert one.priors == pytest.approx(other.priors, rel=1e-3, abs=1e-5)
        if not is_root:
            assert one.reward == pytest.approx(other.reward, abs=1e-4)
            assert one.termination == pytest.approx(other.termination, rel=1e-3, abs=1e-5)
