"""What tests have the actors of `examples/lightzero_ray.py` do.

Needs LightZero and Ray: import it behind `pytest.importorskip`.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from concurrent_kv.cluster import SearchContext
from examples.lightzero_ray import Collected, collect
from tests.cluster_support import until_there


def weights_of(context: SearchContext) -> tuple[int, Any]:
    return context.version, context.model.policy.collect_mode.state_dict()["model"]


def lookups_of(context: SearchContext) -> tuple[int, int]:
    """States that were searched from, and those of them whose contexts were found."""
    world_model = context.model.policy._collect_model.world_model
    return world_model.total_query_count, world_model.hit_count


def disturbed(
    context: SearchContext, train_iter: int, place: str, happening: Callable[[], object], marker: Path
) -> Collected:
    """A collection to which something happens, the first time, when one of its episodes has ended already."""
    collector = context.model.collector
    tree = context.model.policy._mcts_collect
    step, search, moves = collector._env.step, tree.search, 0

    def at(reached: str) -> None:
        if reached == place and moves == 5 and not marker.exists():
            assert len(collector.game_segment_pool) == 1
            marker.touch()
            happening()

    def stepping(actions: Any) -> Any:
        nonlocal moves
        moves += 1
        if moves == 3 and not marker.exists():
            collector._env._envs[0]._env.unwrapped.state = (10.0, 0.0, 0.0, 0.0)  # off the track
        at("between two moves")
        return step(actions)

    def searching(*args: Any) -> Any:
        at("in a search")
        return search(*args)

    with mock.patch.object(collector._env, "step", stepping), mock.patch.object(tree, "search", searching):
        return collect(context, train_iter)


def wait_for(begun: Path, go_on: Path) -> None:
    begun.touch()
    until_there(go_on)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
