"""The checker of histories: what must pass passes, what must fail fails, and it agrees with trying every order."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stress.content import BrokenPromiseError
from stress.histories.campaign import check_history
from stress.histories.checker import Call, Verdict, check
from stress.histories.models import Pool, per_key, split_clears, unexplained_refusals
from stress.histories.programs import Shape

ROOMY, TIGHT = Shape(keys=2), Shape(keys=2, capacity=1)


def call(span: tuple[int, int | None], action: str, keys: int | tuple[int, ...], result: object = None) -> Call:
    """`put` and `put_many` take the value as `result` and were stored, `put refused` were not; reads say what was seen.

    A span that ends with None never returned.
    """
    keys = (keys,) if isinstance(keys, int) else keys
    name = action.split()[0]
    argument: object = None
    answer: object = None
    if name in ("put", "put_many"):
        argument, answer = result, (None if span[1] is None else action == name)
    elif name != "clear" and span[1] is not None:
        answer = result if name == "release" else _of_each(keys, result)
    return Call("p", name, keys, argument, answer, *span)


def _of_each(keys: tuple[int, ...], result: object) -> tuple[object, ...]:
    return result if isinstance(result, tuple) else (result,) * len(keys)


FINE: dict[str, tuple[Shape, list[Call]]] = {
    "nothing happened": (ROOMY, []),
    "a read of what was written": (ROOMY, [call((0, 1), "put", 0, 7), call((2, 3), "get", 0, 7)]),
    "a read beside a write sees the old": (ROOMY, [call((0, 5), "put", 0, 7), call((1, 2), "get", 0, None)]),
    "a read beside a write sees the new": (ROOMY, [call((0, 5), "put", 0, 7), call((1, 2), "get", 0, 7)]),
    "two writes at once, in either order": (
        ROOMY,
        [call((0, 5), "put", 0, 7), call((1, 4), "put", 0, 8), call((6, 7), "get", 0, 7), call((8, 9), "get", 0, 7)],
    ),
    "a write refused beside a clear": (
        ROOMY,
        [call((0, 5), "put refused", 0, 7), call((1, 2), "clear", (0, 1)), call((6, 7), "get", 0, None)],
    ),
    "a write that never returned was made": (ROOMY, [call((0, None), "put", 0, 7), call((5, 6), "get", 0, 7)]),
    "a write that never returned was not made": (ROOMY, [call((0, None), "put", 0, 7), call((5, 6), "get", 0, None)]),
    "a read that never returned": (ROOMY, [call((0, None), "get", 0), call((1, 2), "get", 0, None)]),
    "a pop that never returned took it": (
        ROOMY,
        [call((0, 1), "put", 0, 7), call((2, None), "pop", 0), call((3, 4), "get", 0, None)],
    ),
    "a clear is seen of one key before the other": (
        ROOMY,
        [
            call((0, 1), "put_many", (0, 1), 7),
            call((2, 9), "clear", (0, 1)),
            call((3, 4), "gather", (0, 1), (None, 7)),
        ],
    ),
    "released once by two": (
        ROOMY,
        [call((0, 1), "put", 0, 7), call((2, 5), "release", 0, True), call((3, 6), "release", 0, False)],
    ),
    "a miss of what was evicted": (TIGHT, [call((0, 1), "put", 0, 7), call((2, 3), "get", 0, None)]),
    "written again after an eviction": (
        TIGHT,
        [
            call((0, 1), "put", 0, 7),
            call((2, 3), "get", 0, None),
            call((4, 5), "put", 0, 8),
            call((6, 7), "get", 0, 8),
        ],
    ),
}

WRONG: dict[str, tuple[Shape, list[Call]]] = {
    "a value that nobody wrote": (ROOMY, [call((0, 1), "put", 0, 7), call((2, 3), "get", 0, 9)]),
    "a torn value": (ROOMY, [call((0, 1), "put", 0, 7), call((0, 3), "get", 0, -1)]),
    "a value read before it was written": (ROOMY, [call((0, 1), "get", 0, 7), call((2, 3), "put", 0, 7)]),
    "another key's value": (ROOMY, [call((0, 1), "put", 1, 7), call((2, 3), "get", 0, 7)]),
    "a stale read": (
        ROOMY,
        [call((0, 1), "put", 0, 7), call((2, 3), "put", 0, 8), call((4, 5), "get", 0, 7)],
    ),
    "a lost write": (ROOMY, [call((0, 1), "put", 0, 7), call((2, 3), "get", 0, None)]),
    "the new, then the old": (
        ROOMY,
        [
            call((0, 1), "put", 0, 7),
            call((2, 9), "put", 0, 8),
            call((3, 4), "get", 0, 8),
            call((5, 6), "get", 0, 7),
        ],
    ),
    "two readers that see two writes in opposite orders": (
        ROOMY,
        [
            call((0, 9), "put", 0, 7),
            call((0, 9), "put", 1, 8),
            call((1, 4), "gather", (0, 1), (7, None)),
            call((1, 4), "gather", (0, 1), (None, 8)),
        ],
    ),
    "half of a batch": (
        ROOMY,
        [call((0, 9), "put_many", (0, 1), 7), call((1, 2), "gather", (0, 1), (7, None))],
    ),
    "half of a batch, of the old and the new": (
        ROOMY,
        [
            call((0, 1), "put_many", (0, 1), 6),
            call((2, 9), "put_many", (0, 1), 7),
            call((3, 4), "gather", (0, 1), (7, 6)),
        ],
    ),
    "older than a clear": (
        ROOMY,
        [call((0, 1), "put", 0, 7), call((2, 3), "clear", (0, 1)), call((4, 5), "get", 0, 7)],
    ),
    "popped twice": (
        ROOMY,
        [call((0, 1), "put", 0, 7), call((2, 5), "pop", 0, 7), call((3, 6), "pop", 0, 7)],
    ),
    "released by both": (
        ROOMY,
        [call((0, 1), "put", 0, 7), call((2, 5), "release", 0, True), call((3, 6), "release", 0, True)],
    ),
    "popped and still there": (
        ROOMY,
        [call((0, 1), "put", 0, 7), call((2, 3), "pop", 0, 7), call((4, 5), "get", 0, 7)],
    ),
    "a refused write that is there": (
        ROOMY,
        [call((0, 3), "put refused", 0, 7), call((1, 2), "clear", (0, 1)), call((4, 5), "get", 0, 7)],
    ),
    "a write refused, and nothing was cleared": (ROOMY, [call((0, 1), "put refused", 0, 7)]),
    "a write refused before the clear began": (
        ROOMY,
        [call((0, 1), "put refused", 0, 7), call((2, 3), "clear", (0, 1))],
    ),
    "back after an eviction": (
        TIGHT,
        [call((0, 1), "put", 0, 7), call((2, 3), "get", 0, None), call((4, 5), "get", 0, 7)],
    ),
    "an old value after an eviction": (
        TIGHT,
        [call((0, 1), "put", 0, 7), call((2, 3), "put", 0, 8), call((4, 5), "get", 0, 7)],
    ),
    "older than a clear, though entries may be evicted": (
        TIGHT,
        [call((0, 1), "put", 0, 7), call((2, 3), "clear", (0, 1)), call((4, 5), "get", 0, 7)],
    ),
}


@pytest.mark.parametrize("name", FINE)
def test_what_a_pool_may_do_is_linearizable(name: str) -> None:
    shape, calls = FINE[name]
    check_history(calls, shape)


@pytest.mark.parametrize("name", WRONG)
def test_what_a_pool_must_not_do_is_found(name: str) -> None:
    shape, calls = WRONG[name]
    with pytest.raises(BrokenPromiseError):
        check_history(calls, shape)


def test_half_of_a_batch_is_found_only_where_the_keys_are_looked_at_together() -> None:
    _, calls = WRONG["half of a batch"]
    assert all(check(of_key, Pool(1, evicting=False)).linearizable for of_key in per_key(calls).values())
    assert not check(calls, Pool(2, evicting=False)).linearizable


def test_a_failure_says_how_far_the_order_goes_and_what_cannot_follow() -> None:
    verdict = check(WRONG["a stale read"][1], Pool(2, evicting=False))
    assert [each.argument for each in verdict.order] == [7, 8]
    assert [each.action for each in verdict.stuck] == ["get"]
    assert "none of these can follow: p [4..5] get (0,) -> (7,)" in str(verdict)


def test_an_order_that_is_found_explains_every_call() -> None:
    _, calls = FINE["two writes at once, in either order"]
    verdict = check(calls, Pool(2, evicting=False))
    assert [each.argument for each in verdict.order] == [8, 7, None, None]
    assert explains(verdict.order, Pool(2, evicting=False))


# Against trying every order -------------------------------------------------------------------------------------------


def explains(order: Sequence[Call], model: Pool) -> bool:
    """Whether the model may answer every call of that order as it was answered."""
    states = {model.initial}
    for each in order:
        states = {after for state in states for after in model.after(state, each)}
    return bool(states)


def by_trying_every_order(calls: Sequence[Call], model: Pool) -> bool:
    """The definition, without any cleverness; calls that never returned may be left out."""
    open_calls = [each for each in calls if each.ended is None]
    for chosen in range(1 << len(open_calls)):
        left_out = {id(each) for place, each in enumerate(open_calls) if not chosen >> place & 1}
        for order in permutations([each for each in calls if id(each) not in left_out]):
            in_time = all(
                not (later.ended is not None and later.ended < earlier.began)
                for place, earlier in enumerate(order)
                for later in order[place + 1 :]
            )
            if in_time and explains(order, model):
                return True
    return False


@st.composite
def histories(draw: st.DrawFn) -> list[Call]:
    """Up to five calls on two keys with arbitrary spans and answers, some of which never returned."""
    found = []
    for value in range(1, draw(st.integers(1, 5)) + 1):
        action = draw(st.sampled_from(["put", "put refused", "put_many", "get", "gather", "pop", "clear"]))
        keys = (0, 1) if action in ("put_many", "gather", "clear") else (draw(st.integers(0, 1)),)
        began = draw(st.integers(0, 8))
        ended = draw(st.one_of(st.none(), st.integers(began, 9)))
        if action in ("get", "gather", "pop"):
            seen = tuple(draw(st.one_of(st.none(), st.integers(1, 5))) for _ in keys)
            found.append(call((began, ended), action, keys, seen))
        else:
            found.append(call((began, ended), action, keys, value))
    return found


@settings(max_examples=600, deadline=None)
@given(histories(), st.booleans())
def test_the_checker_agrees_with_trying_every_order(calls: list[Call], evicting: bool) -> None:
    model = Pool(2, evicting=evicting)
    verdict = check(calls, model)
    assert isinstance(verdict, Verdict)
    assert verdict.linearizable == by_trying_every_order(calls, model)
    if verdict.linearizable:
        assert explains(verdict.order, model)


@settings(max_examples=200, deadline=None)
@given(histories())
def test_what_is_linearizable_together_is_so_key_by_key(calls: list[Call]) -> None:
    if check(split_clears(calls), Pool(2, evicting=False)).linearizable:
        assert all(check(of_key, Pool(1, evicting=False)).linearizable for of_key in per_key(calls).values())


def test_a_refusal_beside_a_clear_is_explained() -> None:
    refused, clear = call((3, 5), "put refused", 0, 7), call((5, 6), "clear", (0, 1))
    assert not unexplained_refusals([refused, clear])
    assert unexplained_refusals([refused]) == [refused]
