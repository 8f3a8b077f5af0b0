"""Operator calls of a gather and of a commit: the same for any batch and any number of layers, and few.

Compiled loops make none for a copy; a correction on reading, and one of unequal rows, is torch's.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from concurrent_kv import DropAndCorrect, DropLazily, DropOldest, KeysValues, KVLayout, KVPool, PositionTable
from concurrent_kv.model.overflow import Overflow
from tests.support import WINDOW, OperatorCalls

LIMIT, COUNT = WINDOW - 1, 2
ROWS, LAYERS = (1, 2, 64), (1, 8)
AT_MOST, MORE_WITH_A_CORRECTION = {"torch": 6, "compiled": 0}, 3
MORE_TO_JOIN = 1  # keys and values that are given apart

pytestmark = pytest.mark.usefixtures("loops")


def launching(names: list[str]) -> list[str]:
    """The calls that do work on the device: no views of tensors, and no memory taken without being written."""
    free = ("view", "slice", "split", "unsqueeze", "detach", "lift_fresh", "alias", "permute", "empty")
    return [name for name in names if not name.removeprefix("aten.").startswith(free)]


def overflow_of(kind: str, layout: KVLayout) -> Overflow | None:
    def difference(distance: int) -> torch.Tensor:
        return torch.ones(layout.num_layers, 2, layout.num_heads, WINDOW - distance, layout.head_dim)

    kinds: dict[str, Callable[[], Overflow | None]] = {
        "plain": lambda: None,
        "rotary": lambda: DropOldest(LIMIT, COUNT),
        "eager": lambda: DropAndCorrect(LIMIT, COUNT, difference(COUNT), layout),
        "lazy": lambda: DropLazily(LIMIT, COUNT, PositionTable(layout, difference)),
    }
    return kinds[kind]()


def calls(
    rows: int, layers: int, kind: str, lengths: tuple[int, ...] = (5,), new_lengths: list[int] | None = None
) -> dict[str, list[str]]:
    """Names of the operator calls of a gather, of the commit of its children, and of a gather of those."""
    layout = KVLayout(layers, 2, 3, WINDOW)
    with KVPool(layout, 4 * rows) as pool:
        for row in range(rows):
            pool.put(row, KeysValues.from_packed(torch.ones(2 * layers, 1, 2, lengths[row % len(lengths)], 3)))
        overflow = overflow_of(kind, layout)
        pool.gather(list(range(rows))).close()
        with OperatorCalls() as gather:
            batch = pool.gather(list(range(rows)))
        new = torch.ones(rows, 2, 2, 3)
        for layer in range(layers):
            batch.append(layer, new, new)
        children = [("child", row) for row in range(rows)]
        with OperatorCalls() as commit:
            pool.commit(children, batch, lengths=None if new_lengths is None else new_lengths[:rows], overflow=overflow)
        with OperatorCalls() as again:
            pool.gather(children).close()
        pool.check_integrity()
    return {"gather": gather.names, "commit": commit.names, "gather of children": again.names}


@pytest.mark.parametrize("kind", ["plain", "rotary", "eager", "lazy"])
def test_calls_are_the_same_for_any_number_of_rows_and_layers(kind: str) -> None:
    lengths = (3,) if kind == "plain" else (5,)
    counted = {(rows, layers): calls(rows, layers, kind, lengths) for rows in ROWS for layers in LAYERS}
    assert len({str(names) for names in counted.values()}) == 1, counted


@pytest.mark.parametrize("kind", ["plain", "rotary", "eager", "lazy"])
def test_calls_are_the_same_for_rows_of_unequal_lengths_some_of_which_overflow(kind: str) -> None:
    lengths = (1, 3, 4) if kind == "plain" else (1, 5, 3, 6)
    counted = {(rows, layers): calls(rows, layers, kind, lengths) for rows in (4, 64) for layers in LAYERS}
    assert len({str(names) for names in counted.values()}) == 1, counted


@pytest.mark.parametrize("kind", ["plain", "rotary", "eager", "lazy"])
def test_calls_are_the_same_for_rows_that_got_different_numbers_of_tokens(kind: str) -> None:
    lengths = (1, 3, 4) if kind == "plain" else (1, 5, 3, 6)
    counted = {
        (rows, layers): calls(rows, layers, kind, lengths, [2, 0, 1, 2] * 16) for rows in (4, 64) for layers in LAYERS
    }
    assert len({str(names) for names in counted.values()}) == 1, counted
    assert len(launching(next(iter(counted.values()))["commit"])) <= AT_MOST["torch"]


@pytest.mark.parametrize("layers", LAYERS)
def test_tokens_of_all_layers_are_appended_by_two_copies_at_most(loops: str, layers: int) -> None:
    layout = KVLayout(layers, 2, 3, WINDOW)
    with KVPool(layout, 2) as pool, pool.gather(["missing"]) as batch:
        new = torch.ones(layers, 1, 2, 2, 3)
        with OperatorCalls() as appended:
            batch.append_layers(new, new)
        pool.check_integrity()
    assert len(launching(appended.names)) == {"torch": 2, "compiled": 0}[loops]


@pytest.mark.parametrize("lengths", [(5,), (1, 5, 3, 6)], ids=["equal", "unequal"])
@pytest.mark.parametrize("kind", ["rotary", "eager", "lazy"])
def test_a_gather_and_a_commit_are_at_most_six_calls_each(loops: str, kind: str, lengths: tuple[int, ...]) -> None:
    counted = {name: launching(names) for name, names in calls(64, 8, kind, lengths).items()}
    assert len(counted["gather"]) <= AT_MOST[loops], counted["gather"]
    due = MORE_WITH_A_CORRECTION if kind == "eager" else 0
    assert len(counted["commit"]) <= AT_MOST[loops] + due, counted["commit"]
    due = MORE_WITH_A_CORRECTION if kind == "lazy" else 0
    assert len(counted["gather of children"]) <= AT_MOST[loops] + due, counted["gather of children"]


def test_a_plain_commit_is_at_most_six_calls(loops: str) -> None:
    counted = launching(calls(64, 8, "plain", (3,))["commit"])
    assert len(counted) <= AT_MOST[loops], counted


@pytest.mark.parametrize("kind", ["plain", "rotary", "eager", "lazy"])
def test_views_of_tensors_do_not_add_up_either(loops: str, kind: str) -> None:
    counted = calls(64, 8, kind, (3,) if kind == "plain" else (1, 5, 3, 6))
    assert max(len(names) for names in counted.values()) <= 2 * (AT_MOST[loops] + MORE_WITH_A_CORRECTION), counted


@pytest.mark.parametrize("rows", ROWS)
def test_a_put_of_many_rows_is_at_most_six_calls(loops: str, rows: int) -> None:
    with KVPool(KVLayout(8, 2, 3, WINDOW), 64) as pool:
        kv = KeysValues(torch.ones(8, rows, 2, 4, 3), torch.ones(8, rows, 2, 4, 3))
        with OperatorCalls() as put:
            pool.put_many(list(range(rows)), kv)
    assert len(launching(put.names)) <= max(AT_MOST[loops], MORE_TO_JOIN), put.names


@pytest.mark.parametrize("layers", LAYERS)
def test_a_get_is_at_most_six_calls(loops: str, layers: int) -> None:
    with KVPool(KVLayout(layers, 2, 3, WINDOW), 4) as pool:
        pool.put("a", KeysValues.from_packed(torch.ones(2 * layers, 1, 2, 4, 3)))
        with OperatorCalls() as get:
            pool.get("a")
    assert len(launching(get.names)) <= AT_MOST[loops], get.names
