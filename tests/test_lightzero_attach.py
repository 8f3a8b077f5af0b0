"""What `attach` refuses, and that a refusal leaves the model as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("lzero", reason="needs LightZero 0.2.0: make lightzero")

from concurrent_kv import ClosedError, InvalidArgumentError, InvalidTypeError, KVCacheManager
from concurrent_kv.compat.lightzero import Attachment, attach, attachment_of, detach
from tests.lightzero_support import SHAPES, Walk, make_world_model

ENV_NUM = 2
SHAPE = replace(SHAPES["cartpole"], env_num=ENV_NUM)
SIZES = {"num_layers": 2, "num_heads": 2, "embed_dim": 64, "context_length": 8, "num_simulations": 25, "device": "cpu"}


def manager(env_num: int = ENV_NUM, **changes: Any) -> KVCacheManager:
    """A manager for the model's shapes, but for `changes`."""
    return KVCacheManager({**SIZES, "max_cache_size": 26 * env_num, **changes}, env_num)


def closed() -> KVCacheManager:
    made = manager()
    made.close()
    return made


@pytest.fixture
def model() -> Iterator[Any]:
    made = make_world_model(SHAPE)
    yield made
    detach(made)


REFUSED: dict[str, tuple[Callable[[], dict[str, Any]], type[Exception], str]] = {
    "no mode": (lambda: {"mode": "ON"}, InvalidArgumentError, "mode must be"),
    "one environment twice": (lambda: {"env_ids": [0, 0]}, InvalidArgumentError, "env_ids must be different ints"),
    "another environment": (lambda: {"env_ids": [1, 2]}, InvalidArgumentError, r"0 to 1.*got \(1, 2\)"),
    "no environment": (lambda: {"env_ids": []}, InvalidArgumentError, r"env_ids .* got \(\)"),
    "a number for a list": (lambda: {"env_ids": 0}, InvalidTypeError, "env_ids must be a sequence"),
    "a float": (lambda: {"env_ids": [0.0, 1.0]}, InvalidTypeError, "env_ids must be different ints"),
    "no manager": (lambda: {"manager": "pools"}, InvalidTypeError, "manager must be a KVCacheManager"),
    "too few environments": (lambda: {"manager": manager(1)}, InvalidArgumentError, r"0 to 0.*env_num"),
    "other shapes": (lambda: {"manager": manager(context_length=10)}, InvalidArgumentError, "max_tokens=10"),
    "smaller searches": (lambda: {"manager": manager(num_simulations=9)}, InvalidArgumentError, "num_simulations, 25"),
    "a closed manager": (lambda: {"manager": closed()}, ClosedError, "closed"),
    "searches of a manager": (
        lambda: {"manager": manager(), "searches": 2},
        InvalidArgumentError,
        "searches cannot be",
    ),
    "no answer": (lambda: {"answer": "both"}, InvalidArgumentError, "answer must be"),
    "no callback": (lambda: {"on_divergence": 3}, InvalidTypeError, "on_divergence must be callable"),
    "too few slots": (lambda: {"recur_slots": 5}, InvalidArgumentError, "recur_slots must be at least 8"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_by_name_and_leaves_the_model_attached_as_it_was(model: Any, case: str) -> None:
    arguments, error, message = REFUSED[case]
    before = attach(model, "on")
    walk = Walk(SHAPE, ENV_NUM)
    walk.root([model])
    with pytest.raises(error, match=message):
        attach(model, **{"mode": "on", **arguments()})
    assert attachment_of(model) is before
    walk.simulate([model])
    assert model.hit_count == ENV_NUM


def test_an_attachments_own_manager_is_refused_for_the_next_one_as_it_is_closed(model: Any) -> None:
    before = attach(model, "on")
    assert isinstance(before, Attachment)
    with pytest.raises(InvalidArgumentError, match="closed with it"):
        attach(model, "validate", manager=before.manager)
    assert attachment_of(model) is before


def test_a_manager_that_was_given_outlives_the_attachment(model: Any) -> None:
    pools = manager(4)
    for ids in ([0, 1], [3, 2]):
        attach(model, "on", manager=pools, env_ids=ids)
        Walk(SHAPE, ENV_NUM).root([model])
    detach(model)
    assert [len(pool) for pool in pools.init_pools] == [1, 1, 1, 1]
    pools.check_integrity()
