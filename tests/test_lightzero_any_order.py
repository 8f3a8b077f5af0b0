"""Whatever is called in whatever order: the released model, one on our cache and one on both give the same answers."""

from __future__ import annotations

import copy
import random
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("lzero", reason="needs LightZero 0.2.0: make lightzero")

from concurrent_kv.compat.lightzero import Attachment, attach, detach
from tests.lightzero_support import SHAPES, Shape, Walk, assert_same_outputs, make_world_model

CALLS = 100
OFTEN = {"root": 3, "simulate": 12, "fail": 2}
SELDOM = dict.fromkeys(["finish", "new episode", "lose a root", "clear", "train"], 1)
BASE = replace(SHAPES["cartpole"], env_num=3)


class FailedError(Exception):
    """What a model's forward raises here."""


class Order:
    """Calls in an order that a seed decides. A search that the released model could not go on with is begun anew."""

    def __init__(self, shape: Shape, seed: int) -> None:
        self.random = random.Random(seed)
        self.shape = shape
        released = make_world_model(shape, seed=seed)
        self.attached = [copy.deepcopy(released) for _ in range(2)]
        self.attachments: list[Attachment] = []
        for model, mode in zip(self.attached, ("on", "validate"), strict=True):
            attachment = attach(model, mode, answer=("off", "on")[seed % 2])  # type: ignore[arg-type]
            assert isinstance(attachment, Attachment)
            self.attachments.append(attachment)
        self.models = [released, *self.attached]
        self.walk = Walk(shape, shape.env_num, seed)
        self.is_searching = False

    def call(self, what: str) -> None:
        walk = self.walk
        if what == "root" or not self.is_searching:
            if self.is_searching:
                walk.act()
            assert_same_outputs(walk.root(self.models))
            self.is_searching = True
        elif what == "simulate":
            if walk.simulation < self.shape.num_simulations - 1:
                assert_same_outputs(walk.simulate(self.models))
        elif what == "finish":
            if walk.rows > 1:
                walk.finish(self.random.randrange(walk.rows))
                self.is_searching = False
        elif what == "new episode":
            walk.new_episode()
            self.is_searching = False
        elif what == "lose a root":
            walk.lose_root(self.random.randrange(walk.rows))
            walk.act()
            assert_same_outputs(walk.root(self.models))
        elif what in ("clear", "train"):
            for model in self.models:
                if what == "train":
                    train(model)
                model.clear_caches()
            walk.act()
            self.is_searching = False
        else:
            self.fail_in_the_model()

    def fail_in_the_model(self) -> None:
        """A simulation on our cache fails before or after the action was appended; the search goes on from before."""
        model = self.attached[0]
        calls_left = self.random.randrange(2)
        forward = model.forward

        def failing(*arguments: Any, **options: Any) -> Any:
            nonlocal calls_left
            if not calls_left:
                raise FailedError
            calls_left -= 1
            return forward(*arguments, **options)

        model.forward = failing
        if self.walk.simulation < self.shape.num_simulations - 1:
            with pytest.raises(FailedError):
                copy.deepcopy(self.walk).simulate([model])
        del model.forward

    def end(self) -> None:
        for attachment in self.attachments:
            attachment.manager.check_integrity()
        report = self.attachments[1].report
        assert report is not None
        assert report.first_unexplained is None
        assert report.contexts > CALLS
        released, ours, both = self.models
        assert released.hit_count == both.hit_count > 0
        assert ours.hit_count == ours.total_query_count
        for model in self.attached:
            detach(model)


def train(model: Any) -> None:
    """Change every weight a little, as a step of training does."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.001)
    if not model.config.rotary_emb:
        model.precompute_pos_emb_diff_kv()


@pytest.mark.parametrize(
    ("rotary_emb", "continuous", "window"),
    [(True, False, 8), (True, True, 4), (False, False, 8), (False, True, 8), (False, False, 4), (False, False, 20)],
)
def test_answers_are_equal_whatever_is_called_in_whatever_order(
    rotary_emb: bool, continuous: bool, window: int
) -> None:
    shape = replace(BASE, rotary_emb=rotary_emb, continuous=continuous, context_length=window)
    order = Order(shape, seed=window + continuous + 2 * rotary_emb)
    for what in order.random.choices(list(OFTEN | SELDOM), list((OFTEN | SELDOM).values()), k=CALLS):
        order.call(what)
    order.end()
