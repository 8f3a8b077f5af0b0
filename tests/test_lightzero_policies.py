"""LightZero 0.2.0's own policies say which environments they act for, and each of those keeps its context."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("lzero", reason="needs LightZero 0.2.0: make lightzero")

from concurrent_kv.compat.lightzero import attachment_of, detach, install, uninstall
from tests.lightzero_support import contexts_of, quietly, recomputed

ENVIRONMENTS = 3
ROUNDING = 1e-5
PHASES = ("collect", "eval")


def make_policy(mode: str, kind: str) -> Any:
    """A policy of LightZero's configuration of CartPole, or of Pendulum with sampled actions; three environments."""
    with quietly():
        from ding.config import compile_config
        from ding.policy import create_policy

        if kind == "discrete":
            from zoo.classic_control.cartpole.config.cartpole_unizero_config import create_config, main_config
        else:
            from zoo.classic_control.pendulum.config.pendulum_cont_sampled_unizero_config import (
                create_config,
                main_config,
            )
        main_config, create_config = copy.deepcopy(main_config), copy.deepcopy(create_config)
        numbers = {"collector_env_num": ENVIRONMENTS, "evaluator_env_num": ENVIRONMENTS}
        main_config.policy.update(cuda=False, num_simulations=4, **numbers)
        main_config.policy.model.world_model_cfg.update(
            device="cpu",
            env_num=ENVIRONMENTS,
            num_simulations=4,
            use_new_cache_manager=mode != "off",
            cache_validation_mode=mode == "validate",
            **numbers,
        )
        torch.manual_seed(0)
        config = compile_config(main_config, seed=0, auto=True, create_cfg=create_config, save_cfg=False)
        config.policy.device = "cpu"
        policy = create_policy(config.policy, enable_field=["learn", "collect", "eval"])
    model = policy._collect_model.world_model
    for parameter in model.parameters():
        if not parameter.any():  # heads of zeros make all states equal
            torch.nn.init.normal_(parameter, std=0.3)
    return policy


@pytest.fixture
def made() -> Iterator[list[Any]]:
    """Policies whose models are detached and looked through at the end."""
    policies: list[Any] = []
    install()
    yield policies
    uninstall()
    for policy in policies:
        for model in (policy._collect_model.world_model, policy._target_model.world_model):
            attachment = attachment_of(model)
            if attachment is not None:
                attachment.manager.check_integrity()
                detach(model)


class Play:
    """What a policy is asked in one phase, and what it saw and did in each environment."""

    def __init__(self, policy: Any, phase: str, kind: str, seed: int = 0) -> None:
        self.policy, self.phase, self.kind = policy, phase, kind
        self.model = policy._collect_model.world_model
        self.generator = torch.Generator().manual_seed(seed)
        self.seen: dict[int, list[Any]] = {}
        self.done: dict[int, list[Any]] = {}

    def move(self, environments: Sequence[int]) -> dict[int, Any]:
        """One move of these environments; those that are new begin an episode."""
        size = 4 if self.kind == "discrete" else 3
        for env_id in environments:
            self.seen.setdefault(env_id, []).append(torch.randn(size, generator=self.generator))
            self.done.setdefault(env_id, [])
        data = torch.stack([self.seen[env_id][-1] for env_id in environments])
        actions = 2 if self.kind == "discrete" else 1
        masks = [np.ones(actions, dtype=np.int8) for _ in environments]
        asked: dict[str, Any] = {
            "action_mask": masks,
            "to_play": [-1] * len(environments),
            "ready_env_id": environments,
            "timestep": [np.array(len(self.done[env_id])) for env_id in environments],
        }
        with quietly():
            output: dict[int, Any] = getattr(self.policy, f"_forward_{self.phase}")(data, **asked)
        for env_id in environments:
            self.done[env_id].append(output[env_id]["action"])
        return output

    def end(self, env_id: int) -> None:
        """An episode has ended: the policy hears of it as LightZero's workers say it."""
        getattr(self.policy, f"_reset_{self.phase}")([env_id])
        del self.seen[env_id], self.done[env_id]

    def lengths(self, environments: Sequence[int], *, are_true: bool = True) -> list[int]:
        """Tokens of each environment's newest root; also checks that they are what its own steps compute."""
        attachment = attachment_of(self.model)
        assert attachment is not None
        self.model.eval()
        states = self.model.tokenizer.encode_to_obs_embeddings(
            torch.stack([self.seen[env_id][-1] for env_id in environments])
        )
        times = [len(self.done[env_id]) - 1 for env_id in environments]
        with attachment.environments(environments):
            newest = [attachment.session.newest_roots[env_id] for env_id in environments]
            assert [root.key[0] for root in newest] == list(environments)
            roots = torch.stack([root.state for root in newest])
            assert torch.allclose(roots, states, atol=ROUNDING)
            found = contexts_of(self.model, roots.numpy(), times)
        for context, env_id in zip(found, environments, strict=True):
            if not are_true:
                continue
            assert torch.allclose(context, self._truth(env_id, context.shape[2]), atol=ROUNDING)
        return [context.shape[2] for context in found]

    def _truth(self, env_id: int, length: int) -> torch.Tensor:
        states = self.model.tokenizer.encode_to_obs_embeddings(torch.stack(self.seen[env_id]))
        first = len(states) - (length + 1) // 2
        tokens: list[Any] = [("obs_embeddings", states[first], first)]
        for step in range(first + 1, len(states)):
            tokens += [("act_tokens", self.done[env_id][step - 1], step), ("obs_embeddings", states[step], step)]
        return recomputed(self.model, tokens)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("kind", ["discrete", "continuous"])
def test_an_environment_keeps_its_context_when_another_finishes_and_begins_again(
    made: list[Any], phase: str, kind: str
) -> None:
    made.append(make_policy("on", kind))
    play = Play(made[0], phase, kind)
    for _ in range(2):
        play.move([0, 1, 2])
    assert play.lengths([0, 1, 2]) == [3, 3, 3]
    play.end(0)
    play.move([1, 2])
    assert play.lengths([1, 2]) == [5, 5]
    play.end(1)
    play.move([0, 1, 2])  # two begin, and one goes on
    assert play.lengths([0, 1]) == [1, 1]
    assert play.lengths([2], are_true=False) == [5]  # it was full once
    for _ in range(2):
        play.move([0, 1, 2])  # of lengths 1 and 5
    assert play.lengths([0, 1]) == [5, 5]


def test_a_policy_that_is_reset_whole_forgets_every_environment(made: list[Any]) -> None:
    made.append(make_policy("on", "discrete"))
    play = Play(made[0], "collect", "discrete")
    for _ in range(2):
        play.move([0, 1, 2])
    play.policy._reset_collect()
    for env_id in range(3):
        play.seen[env_id], play.done[env_id] = [], []
    play.move([0, 1, 2])
    assert play.lengths([0, 1, 2]) == [1, 1, 1]


def test_a_policys_clearing_of_caches_forgets_no_episode(made: list[Any]) -> None:
    made.append(make_policy("on", "discrete"))
    play = Play(made[0], "collect", "discrete")
    play.move([0, 1, 2])
    with quietly():
        play.policy._reset_collect(1, current_steps=200, reset_init_data=False)
    play.move([0, 1, 2])
    # The last step, computed anew (at its successor's position, as LightZero does), and the new one.
    assert play.lengths([0, 1, 2], are_true=False) == [3, 3, 3]


def test_collecting_and_evaluating_do_not_meet_in_what_was_seen_last(made: list[Any]) -> None:
    made.append(make_policy("on", "discrete"))
    collecting, evaluating = Play(made[0], "collect", "discrete"), Play(made[0], "eval", "discrete", seed=1)
    for _ in range(2):
        collecting.move([0, 1, 2])
        evaluating.move([0, 1, 2])
    assert evaluating.lengths([0, 1, 2]) == [3, 3, 3]
    collecting.move([0, 1, 2])
    assert collecting.lengths([0, 1, 2]) == [5, 5, 5]


@pytest.mark.parametrize("mode", ["off", "validate"])
@pytest.mark.parametrize("phase", PHASES)
def test_other_modes_ask_for_what_the_policy_itself_asks_for(made: list[Any], mode: str, phase: str) -> None:
    made += [make_policy("off", "discrete"), make_policy(mode, "discrete")]
    asked: dict[int, list[Any]] = {}
    for number, policy in enumerate(made):
        np.random.seed(0)
        play, heard = Play(policy, phase, "discrete"), asked.setdefault(number, [])
        for ended in (None, None, 0, None, None):
            if ended is not None:
                play.end(ended)
            left = [1, 2] if len(heard) >= 2 else [0, 1, 2]
            heard.append({env_id: said["predicted_value"] for env_id, said in play.move(left).items()})
    assert asked[0] == asked[1]
    report = attachment_of(made[1]._collect_model.world_model)
    if report is not None:
        assert report.report is not None
        assert report.report.unexplained == 0


def test_uninstall_gives_the_policies_their_own_methods_back() -> None:
    from lzero.policy.sampled_unizero import SampledUniZeroPolicy
    from lzero.policy.unizero import UniZeroPolicy

    names = [f"_{what}_{phase}" for what in ("forward", "reset") for phase in PHASES]
    before = [getattr(policy, name) for policy in (UniZeroPolicy, SampledUniZeroPolicy) for name in names]
    for _ in range(2):
        install()
    uninstall()
    assert before == [getattr(policy, name) for policy in (UniZeroPolicy, SampledUniZeroPolicy) for name in names]
