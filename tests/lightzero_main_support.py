"""World models of LightZero's main branch: from a checkout where `LIGHTZERO` names one, and the stub everywhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.lightzero_checkout import CHECKOUT
from tests.lightzero_main_stub import StubWorldModel, stub_config

__all__ = ["NEEDS_CHECKOUT", "SOURCES", "make_main_model"]

NEEDS_CHECKOUT = "needs a checkout of LightZero's main branch: make lightzero-main LIGHTZERO=..."

SOURCES = [
    "stub",
    pytest.param("checkout", marks=pytest.mark.skipif(CHECKOUT is None, reason=NEEDS_CHECKOUT)),
]

torch.set_num_threads(1)


def make_main_model(source: str, *, seed: int = 0, manager: type[Any] | None = None, **changes: Any) -> Any:
    """A world model of four environments and a window of 8 tokens, in evaluation mode.

    Args:
        source: one of `SOURCES`.
        manager: what the main branch imports as its `KVCacheManager`, with `use_new_cache_manager=True`.
        changes: settings of its configuration.
    """
    if source == "stub":
        torch.manual_seed(seed)
        made = StubWorldModel if manager is None else type("WithManager", (StubWorldModel,), {"manager_class": manager})
        return made(stub_config(**changes)).eval()
    from dataclasses import replace
    from unittest import mock

    from lzero.model.unizero_world_models import kv_cache_manager

    from tests.lightzero_support import SHAPES, make_world_model

    env_num, rotary = changes.pop("env_num", 4), changes.pop("rotary_emb", False)
    shape = replace(SHAPES["cartpole"], env_num=env_num, rotary_emb=rotary)
    with mock.patch.object(kv_cache_manager, "KVCacheManager", manager or kv_cache_manager.KVCacheManager):
        return make_world_model(shape, seed=seed, device="cpu", **changes)
