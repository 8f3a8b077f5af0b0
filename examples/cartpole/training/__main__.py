"""Train the world model on real CartPole-v1 episodes: `python -m examples.cartpole.training --seed 0 --out FILE`.

The same command gives the same bytes on the same machine with the same versions; another CPU or another torch may round
differently, and then learns other weights as good as these.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import gymnasium
import torch
from rich.logging import RichHandler
from torch import Tensor

from examples.cartpole.model import DEFAULT_WEIGHTS, ModelConfig, WorldModel
from examples.cartpole.training.figures import disturbed_transitions, policy_returns, prediction_errors
from examples.cartpole.training.policy import PolicySettings, best_action, train_policy
from examples.cartpole.training.transitions import Collector, Disturbed, Transitions
from examples.cartpole.training.unroll import UnrollSettings, train_unroll
from reporting.arguments import file_to_write
from reporting.progress import Work
from reporting.tables import console_of

logger = logging.getLogger(__name__)

MEASURED_SEED = 1_000_003  # of the episodes that figures are taken from; no training uses them


@dataclass(frozen=True)
class TrainSettings:
    """Everything, beside the seed, that decides which weights come out."""

    envs: int = 8
    disturbed_steps: int = 6000  # of each environment
    policy: PolicySettings = field(default_factory=PolicySettings)
    unroll: UnrollSettings = field(default_factory=UnrollSettings)


def train(seed: int, settings: TrainSettings) -> WorldModel:
    """Train a model: its policy, then, on all that was seen and on disturbed episodes, the model unrolled."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = WorldModel()
    generator = torch.Generator().manual_seed(seed)
    collector = Collector(settings.envs, seed)
    try:
        transitions = _train_policy(model, collector, generator, settings)
        policy = Disturbed(lambda observation: best_action(model, observation), settings.envs, generator)
        disturbed = collector.collect(policy, settings.disturbed_steps)
    finally:
        collector.close()
    # The collector went on from where the policy's rounds ended, so the joint is no seam.
    transitions = Transitions.joined([transitions, disturbed])
    logger.info("%d transitions, %d ends", transitions.reward.numel(), int(transitions.terminated.sum()))
    _train_unroll(model, transitions, generator, settings)
    return model.eval().requires_grad_(False)


def measure(model: WorldModel) -> dict[str, float]:
    """Figures of a trained model on episodes of their own."""
    returns = policy_returns(model, episodes=20, seed=MEASURED_SEED)
    transitions = disturbed_transitions(model, envs=8, steps=2000, seed=MEASURED_SEED)
    generator = torch.Generator().manual_seed(MEASURED_SEED)
    errors = prediction_errors(model, transitions, generator, segments=4000, length=10)
    chosen = {name: error for name, error in errors.items() if name.rpartition("_")[2] in ("1", "5", "10")}
    return {"policy_mean_return": sum(returns) / len(returns), "policy_worst_return": float(min(returns)), **chosen}


def save_model(model: WorldModel, path: Path, origin: dict[str, object]) -> None:
    """Write the weights, and how they came about as JSON, for `torch.load(path, weights_only=True)`."""
    written = io.BytesIO()  # of a file, torch would write the name into it
    torch.save({"origin": json.dumps(origin, sort_keys=True), "weights": model.state_dict()}, written)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(written.getvalue())


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, measure and save."""
    parser = argparse.ArgumentParser(prog="python -m examples.cartpole.training", description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=file_to_write, default=DEFAULT_WEIGHTS)
    options = parser.parse_args(arguments)
    console = console_of(stderr=True)
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[RichHandler(console=console)])
    torch.set_num_threads(1)  # the order of a sum, and so its rounding, depends on the number of threads
    settings = TrainSettings()
    model = train(options.seed, settings)
    figures = measure(model)
    for name, figure in figures.items():
        logger.info("%s %.4f", name, figure)
    origin = {
        "command": f"python -m examples.cartpole.training --seed {options.seed}",
        "seed": options.seed,
        "model": asdict(ModelConfig()),
        "settings": asdict(settings),
        "figures": figures,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "gymnasium": gymnasium.__version__,
        },
    }
    save_model(model, options.out, origin)
    logger.info("wrote %s", options.out)


def _train_policy(
    model: WorldModel, collector: Collector, generator: torch.Generator, settings: TrainSettings
) -> Transitions:
    with Work("rounds of the policy", settings.policy.rounds) as work:

        def on_round(_round: int, transitions: Transitions) -> None:
            work.part(f"ends a round {int(transitions.terminated.sum())}")

        return train_policy(model, collector, generator, settings.policy, on_round)


def _train_unroll(
    model: WorldModel, transitions: Transitions, generator: torch.Generator, settings: TrainSettings
) -> None:
    with Work("updates of the model", settings.unroll.updates) as work:

        def on_update(_update: int, loss: Tensor) -> None:
            work.part(f"loss {loss.item():.3f}")

        train_unroll(model, transitions, generator, settings.unroll, on_update)


if __name__ == "__main__":
    main()
