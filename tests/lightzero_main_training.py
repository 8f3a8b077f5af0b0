"""The main branch's own training, shortened to seconds on a CPU: its configurations, its policies, its entry points.

    python -m tests.lightzero_main_training WHAT CACHE OUTPUT_FOLDER      (LIGHTZERO names a checkout)

CartPole, drawn: the main branch's UniZero can be made for images alone. WHAT is one of `TRAININGS`: in whole episodes,
with rotary positions and its usual reanalysis; or in segments, with windows rebuilt from raw tokens and reanalysis from
seeded roots. CACHE is one of `CACHES`: "own" is its manager, "import" ours through the one import, and the other
three are modes of `install()`. Prints one line of JSON at the end: what the caches did, and in "validate" what
was compared.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import numpy as np
import torch

from tests import lightzero_checkout
from tests.lightzero_training import account

CACHES = ("off", "validate", "on", "own", "import")
TRAININGS = ("episodes", "segments")
COLLECTORS, EVALUATORS, SIMULATIONS = 3, 2, 10
SIZE = 64  # of an image: the least that the main branch's encoder takes


def drawn(numbers: Any) -> np.ndarray[Any, Any]:
    """CartPole's four numbers as an image [3, 64, 64]: the cart, the pole, and how fast they are."""
    place, speed, angle, turn = (float(number) for number in numbers)
    image = np.zeros((3, SIZE, SIZE), dtype=np.float32)
    cart = int(np.clip((place / 4.8 + 1) * SIZE / 2, 4, SIZE - 5))
    image[0, 44:48, cart - 4 : cart + 5] = 1.0
    for step in range(40):
        column = int(np.clip(cart + step * np.sin(angle), 0, SIZE - 1))
        image[1, 44 - int(step * np.cos(angle)), column] = 1.0
    image[2, :32], image[2, 32:] = np.tanh(speed), np.tanh(turn)
    return image


def register_drawn_cartpole() -> None:
    """Make the main branch's CartPole, drawn, an environment of the type "cartpole_drawn"."""
    import gym
    from ding.utils import ENV_REGISTRY
    from zoo.classic_control.cartpole.envs.cartpole_lightzero_env import CartPoleEnv

    @ENV_REGISTRY.register("cartpole_drawn")
    class DrawnCartPole(CartPoleEnv):  # type: ignore[misc]
        def __init__(self, cfg: Any) -> None:
            super().__init__(cfg)
            self._observation_space = gym.spaces.Box(-1.0, 1.0, (3, SIZE, SIZE), dtype=np.float32)

        def reset(self) -> Any:
            begun = super().reset()
            return begun | {"observation": drawn(begun["observation"])}

        def step(self, action: Any) -> Any:
            taken = super().step(action)
            return taken._replace(obs=taken.obs | {"observation": drawn(taken.obs["observation"])})


def configuration(what: str, folder: str, is_managed: bool, is_validated: bool) -> tuple[Any, Any]:
    """The main branch's configuration, with less of everything, and the keys that choose the cache."""
    from zoo.classic_control.cartpole.config.cartpole_unizero_config import create_config, main_config

    register_drawn_cartpole()
    create_config.env.update(type="cartpole_drawn", import_names=[])
    policy: dict[str, Any] = {"reanalyze_ratio": 0.25, "game_segment_length": 20, "use_augmentation": False}
    world_model: dict[str, Any] = {"obs_type": "image", "latent_recon_loss_weight": 0.0, "perceptual_loss_weight": 0.0}
    if what == "segments":
        policy |= {"num_segments": COLLECTORS, "contextual_reanalysis": True, "bootstrap_value_context": True}
        # Not at the first training: its target model searches there before it has seen an observation, and fails.
        policy |= {"buffer_reanalyze_freq": 1 / 2, "reanalyze_batch_size": 8, "reanalyze_partition": 0.75}
        world_model |= {"rebuild_kv_window_from_tokens": True, "rotary_emb": False}
    counts = {"collector_env_num": COLLECTORS, "evaluator_env_num": EVALUATORS}
    main_config.exp_name = folder
    main_config.env.update(n_evaluator_episode=EVALUATORS, **counts)
    main_config.policy.update(
        cuda=False,
        batch_size=8,
        update_per_collect=2,
        n_episode=COLLECTORS,
        num_simulations=SIMULATIONS,
        collect_num_simulations=SIMULATIONS,
        eval_num_simulations=SIMULATIONS,
        **counts,
        **policy,
    )
    main_config.policy.model.update(
        observation_shape=(3, SIZE, SIZE), model_type="conv", num_res_blocks=1, num_channels=8
    )
    main_config.policy.model.world_model_cfg.update(
        device="cpu",
        env_num=max(COLLECTORS, EVALUATORS),
        num_simulations=SIMULATIONS,
        use_new_cache_manager=is_managed,
        cache_validation_mode=is_validated,
        **counts,
        **world_model,
    )
    create_config.env_manager.type = "base"
    return main_config, create_config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=TRAININGS)
    parser.add_argument("cache", choices=CACHES)
    parser.add_argument("folder")
    options = parser.parse_args()
    assert lightzero_checkout.CHECKOUT is not None, "LIGHTZERO must name a checkout"

    torch.set_num_threads(1)
    cache = options.cache
    if cache == "import":
        lightzero_checkout.use_cache("ours")
    elif cache != "own":
        from concurrent_kv.compat.lightzero import install

        install()
    is_managed = cache != "off"
    main_config, create_config = configuration(options.what, options.folder, is_managed, cache == "validate")
    from lzero.entry import train_unizero, train_unizero_segment

    train = train_unizero_segment if options.what == "segments" else train_unizero
    policy = train([main_config, create_config], seed=0, max_train_iter=6, max_env_step=300)
    result: dict[str, Any] = {"cache": cache}
    for name in ("model", "target"):
        model = getattr(policy, f"_{'collect' if name == 'model' else name}_model").world_model
        result[name] = account(model)
        result[name] |= {
            count: getattr(model, count, 0)
            for count in ("root_total_query_cnt", "reanalysis_root_seed_count", "reanalysis_root_seed_hit_count")
        }
        if cache in ("own", "import"):
            result[name]["manager"] = type(model.kv_cache_manager).__name__
        if cache == "import":
            model.kv_cache_manager.manager.check_integrity()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
