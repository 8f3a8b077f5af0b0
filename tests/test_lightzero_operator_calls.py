"""What the cache path of a simulated step costs, whatever batch and layers: operator calls and synchronisations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("lzero", reason="needs LightZero 0.2.0: make lightzero")

from concurrent_kv.compat.lightzero import attach, detach
from concurrent_kv.native import native
from tests.lightzero_support import SHAPES, Walk, make_world_model
from tests.support import OperatorCalls
from tests.test_operator_calls import launching

AT_MOST = {"torch": 12, "compiled": 0}
CACHE_PATH = ("retrieve_or_generate_kvcache", "trim_and_pad_kv_cache", "update_cache_context")
MORE_VIEWS = ("aten.select.", "aten.squeeze.")
# How the host reads a tensor: on an accelerator each of these waits for the work that was queued before. What `cpu`
# makes, one of them then reads.
SYNCHRONISING = ("numpy", "item", "tolist", "nonzero", "__bool__", "__int__", "__float__")


def observed(model: Any, around: Callable[[Callable[[], Any]], Any]) -> None:
    """Let every call of the model's cache path run inside `around`."""

    def wrapped(method: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: around(lambda: method(*args, **kwargs))

    for name in CACHE_PATH:
        object.__setattr__(model, name, wrapped(getattr(model, name)))


def full_window_step(model: Any, walk: Walk) -> None:
    """A simulated step in which every row's window overflows."""
    while not model.keys_values_wm_size_list or min(model.keys_values_wm_size_list) < model.context_length - 3:
        walk.root([model])
        walk.simulate([model])
        walk.act()


def calls_of(name: str, env_num: int, num_layers: int, mode: str) -> list[str]:
    """The operator calls of the cache path of one simulated step."""
    shape = replace(SHAPES[name], env_num=env_num, num_layers=num_layers, embed_dim=64, num_heads=2)
    model, walk = make_world_model(shape), Walk(shape, env_num)
    attach(model, mode)  # type: ignore[arg-type]
    full_window_step(model, walk)
    names: list[str] = []

    def count(call: Callable[[], Any]) -> Any:
        with OperatorCalls() as calls:
            result = call()
        names.extend(calls.names)
        return result

    observed(model, count)
    walk.simulate([model])
    for method in CACHE_PATH:
        delattr(model, method)
    detach(model)
    return [name for name in launching(names) if not name.startswith(MORE_VIEWS)]


@pytest.mark.parametrize("name", ["cartpole", "lunarlander"])
def test_a_simulated_step_takes_few_calls_the_same_for_any_batch_and_layers(loops: str, name: str) -> None:
    counted = {(env, layers): calls_of(name, env, layers, "on") for env in (8, 32) for layers in (2, 4)}
    assert len({str(names) for names in counted.values()}) == 1, counted
    assert len(counted[8, 2]) <= AT_MOST[loops], counted[8, 2]


@pytest.mark.parametrize(("name", "absolute"), [("cartpole", 0), ("lunarlander", 1)])
def test_the_released_cache_takes_more_with_every_environment_and_layer(name: str, absolute: int) -> None:
    for env, layers in ((8, 2), (8, 4), (32, 2)):
        # K and V of each row and layer: copied out, padded, copied in, and corrected; and one stack of the rows.
        assert len(calls_of(name, env, layers, "off")) == 2 * layers * ((3 + absolute) * env + 1)


@pytest.mark.parametrize("name", ["cartpole", "lunarlander"])
@pytest.mark.parametrize("env_num", [8, 32])
def test_a_simulated_step_synchronises_with_the_device_once(
    loops: str, name: str, env_num: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = replace(SHAPES[name], env_num=env_num, embed_dim=64, num_heads=2)
    model, walk = make_world_model(shape), Walk(shape, env_num)
    attach(model, "on")
    full_window_step(model, walk)
    counted: Counter[str] = Counter()
    depth = 0

    def spy(method: str) -> None:
        original = getattr(torch.Tensor, method)

        def counting(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            counted[method] += depth
            return original(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, method, counting)

    def inside(call: Callable[[], Any]) -> Any:
        nonlocal depth
        depth += 1
        try:
            return call()
        finally:
            depth -= 1

    for method in (*SYNCHRONISING, "cpu"):
        spy(method)
    observed(model, inside)
    walk.simulate([model])
    assert counted["cpu"] <= 1, counted
    # The states, for their hashes; compiled loops read them where they are, which they do on a CPU only. So does the
    # correction of moved tokens with the batch, where positions are absolute and nodes share their parents' tokens.
    in_place = name == "lunarlander" and native is not None
    assert counted.total() - counted["cpu"] == {"torch": 1 + in_place, "compiled": 0}[loops], counted
    monkeypatch.undo()
    for method in CACHE_PATH:
        delattr(model, method)
    detach(model)
