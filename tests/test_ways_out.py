"""What an error says would do, does: the sizes of pools, what a policy allows, and why something has ended."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch

from concurrent_kv import (
    AsyncKVCacheManager,
    AsyncKVPool,
    CapacityError,
    ClosedError,
    DropAndCorrect,
    DropLazily,
    DropOldest,
    InvalidArgumentError,
    InvalidTypeError,
    KeyNotFoundError,
    KVCacheManager,
    KVPool,
    KVStorage,
    PositionSteps,
    PositionTable,
    RaiseOnOverflow,
    SearchEndedError,
    SnapshotDamagedError,
    SnapshotMismatchError,
    WaitTimeoutError,
    WindowOverflowError,
)
from concurrent_kv.model.overflow import Overflow
from tests.conftest import MakeManager, MakePool
from tests.support import LAYOUT, WINDOW, append, config, stacked, tokens

# Sizes ---------------------------------------------------------------------------------------------------------------


def said(error: pytest.ExceptionInfo[BaseException]) -> dict[str, int]:
    """The arguments that an error says would do."""
    return {name: int(number) for name, number in re.findall(r"([a-z_.]+)=(\d+)", str(error.value))}


def manager_of(make_manager: MakeManager, said: dict[str, int], **arguments: Any) -> KVCacheManager:
    """A manager of other sizes as an error said them."""
    sizes = {name.removeprefix("config."): number for name, number in said.items() if name.startswith("config.")}
    others = {name: number for name, number in said.items() if name in ("recur_slots", "init_entries", "wm_entries")}
    return make_manager(settings=config(**sizes), **{**arguments, **others})


def grown(search: Any, number: int) -> None:
    """Store so many children of the root, two tokens each."""
    for node in range(number):
        with search.gather(["root"], [0]) as batch:
            append(batch, [node])
            search.commit([node], batch)


def test_a_lone_search_that_needs_more_hears_which_size_of_the_manager_would_do(make_manager: MakeManager) -> None:
    small = make_manager(recur_slots=16)
    small.set_init_cache(0, "root", tokens(1, 3))
    with small.search([0], entries=4, tokens=8) as search, pytest.raises(CapacityError) as caught:
        grown(search, 12)
    message = str(caught.value)
    assert "other" not in message
    assert "the pool holds at most 64 entries and 16 slots" in message
    arguments = said(caught)
    assert set(arguments) == {"entries", "tokens", "recur_slots"}
    larger = manager_of(make_manager, arguments)
    larger.set_init_cache(0, "root", tokens(1, 3))
    with larger.search([0], entries=arguments["entries"], tokens=arguments["tokens"]) as search:
        grown(search, 9)


def test_a_search_that_others_leave_no_room_hears_what_they_have(make_manager: MakeManager) -> None:
    manager = make_manager(recur_slots=16)
    manager.set_init_cache(0, "root", tokens(1, 3))
    with manager.search([1], entries=3, tokens=8), manager.search([0], entries=4, tokens=8) as search:
        with pytest.raises(CapacityError, match="of which other searches reserved 3 and 8; ") as caught:
            grown(search, 5)
        assert said(caught)["recur_slots"] > 16


def test_a_write_that_searches_leave_no_room_says_which_size_would(make_manager: MakeManager) -> None:
    manager = make_manager()
    with manager.search([0, 1]), pytest.raises(WaitTimeoutError, match="beside the open searches") as caught:
        manager.recur_pool.put("a", tokens(1, 5), timeout=0.0)
    larger = manager_of(make_manager, said(caught))
    with larger.search([0, 1]):
        larger.recur_pool.put("a", tokens(1, 5), timeout=0.0)


def test_a_write_that_pins_leave_no_room_hears_which_size_would_do(make_pool: MakePool) -> None:
    def third(**sizes: Any) -> None:
        """An entry, while two others are pinned."""
        pool = make_pool(**sizes)
        pool.put("a", tokens(1, 3))
        pool.put("b", tokens(2, 5))
        with pool.pin("a"), pool.pin("b"):
            pool.put("c", tokens(3, 4), timeout=0.0)

    for sizes, expected in (({"max_entries": 2}, {"max_entries": 3}), ({"max_slots": 8}, {"max_slots": 12})):
        with pytest.raises(WaitTimeoutError, match="; closing some of these, or") as caught:
            third(**sizes)
        assert said(caught) == expected
        third(**{**sizes, **said(caught)})


def test_a_pool_of_less_than_a_window_hears_what_is_the_least() -> None:
    too_small: list[dict[str, Any]] = [{"max_slots": WINDOW - 1}, {"max_bytes": LAYOUT.bytes_per_entry - 1}]
    for sizes in too_small:
        with pytest.raises(InvalidArgumentError, match="less than one window") as caught:
            KVPool(LAYOUT, 1, **sizes)
        least: dict[str, Any] = {name: said(caught)[name] for name in sizes}
        KVPool(LAYOUT, 1, **least).close()


def test_a_search_that_a_pin_leaves_no_room_hears_that_something_is_pinned(manager: KVCacheManager) -> None:
    manager.set_recur_cache("a", tokens(1, 3))
    with manager.recur_pool.pin("a"), pytest.raises(CapacityError, match="of which 1 and 3 are pinned") as caught:
        manager.search([0, 1], timeout=0.0)
    assert "other searches" not in str(caught.value)
    assert said(caught) == {"recur_slots": 83}


def test_a_replacement_that_roots_in_use_leave_no_headroom_says_which_would_do(make_manager: MakeManager) -> None:
    sizes: dict[str, Any] = {"init_entries": 2, "init_tokens": 12, "headroom_tokens": WINDOW}

    def replaced(manager: KVCacheManager) -> None:
        """Both environments' roots, while a search has those before them, and all else is full."""
        for env_id in (0, 1):
            for key in ("root", "other"):
                manager.set_init_cache(env_id, key, tokens(env_id, 6))
            manager.set_wm_cache(env_id, tokens(9, WINDOW))
        with manager.search([0, 1]) as search:
            search.gather(["root", "root"], [0, 1]).close()
            for env_id in (0, 1):
                manager.init_pools[env_id].put("root", tokens(5, 6), timeout=0.0)

    with pytest.raises(WaitTimeoutError, match="the headroom of 8 slots is held by searches") as caught:
        replaced(make_manager(**sizes))
    assert said(caught) == {"headroom_tokens": 12}
    replaced(make_manager(**{**sizes, **said(caught)}))


def test_a_replacement_in_a_storage_that_was_given_names_the_headroom_of_that() -> None:
    for headroom in (0, 6):
        storage = KVStorage(LAYOUT, WINDOW, headroom_slots=headroom)
        pool = KVPool(LAYOUT, 2, max_slots=WINDOW, storage=storage)
        pool.put("a", tokens(1, 6))
        pool.put("b", tokens(1, 2))
        if headroom:
            assert pool.put("a", tokens(2, 6), timeout=0.0)
        else:
            with pool.pin("a"), pool.pin("b"), pytest.raises(WaitTimeoutError, match="headroom_slots=6 would do"):
                pool.put("a", tokens(2, 6), timeout=0.0)
        pool.check_integrity()
        pool.close()
        storage.close()


def test_a_pool_for_which_its_storage_is_too_small_says_how_large_it_has_to_be() -> None:
    def second(num_slots: int) -> None:
        storage = KVStorage(LAYOUT, num_slots, headroom_slots=WINDOW)
        for number in (1, 2):
            KVPool(LAYOUT, number, storage=storage).put("a", tokens(1, 2))

    with pytest.raises(InvalidArgumentError, match="storage must have 16 slots for this pool") as caught:
        second(2 * WINDOW)
    assert said(caught) == {"num_slots": 3 * WINDOW}
    second(said(caught)["num_slots"])


def test_a_search_that_replaced_roots_leave_no_slots_hears_which_headroom_would_do(make_manager: MakeManager) -> None:
    sizes: dict[str, Any] = {"init_entries": 1, "init_tokens": WINDOW, "headroom_tokens": WINDOW}

    def opened(manager: KVCacheManager) -> None:
        """A search of all that the recurrent pool has, while pins have what was replaced since."""
        manager.set_wm_cache(0, tokens(9, WINDOW))
        manager.set_wm_cache(1, tokens(9, WINDOW))
        held = []
        for env_id in (0, 1):
            for value in (1, 2, 3):
                manager.set_init_cache(env_id, "root", tokens(value, WINDOW))
                held.append(manager.init_pools[env_id].pin("root"))
        try:
            manager.search([0, 1], timeout=0.0).close()
        finally:
            for pin in held:
                pin.close()

    with pytest.raises(CapacityError, match="or a search with fewer") as caught:
        opened(make_manager(**sizes))
    assert said(caught) == {"headroom_tokens": 4 * WINDOW}
    opened(make_manager(**{**sizes, **said(caught)}))


def test_a_search_that_others_leave_no_room_may_wait_longer_for_them(manager: KVCacheManager) -> None:
    with manager.search([0]), pytest.raises(CapacityError, match="or a longer timeout= for those to close"):
        manager.search([0, 1], timeout=0.0)


@pytest.mark.parametrize(("step", "limit", "count"), [(2, 7, 2), (1, 5, 2)])
def test_a_row_that_nothing_drops_for_hears_of_a_policy_that_would(
    manager: KVCacheManager, step: int, limit: int, count: int
) -> None:
    manager.set_init_cache(0, "root", tokens(1, 5))
    with manager.search([0], overflow=RaiseOnOverflow(limit)) as search:
        batch = search.gather(["root"], [0])
        append(batch, [1], step)
        with pytest.raises(WindowOverflowError, match=f"the limit is {limit - 1}; commit with an overf") as caught:
            search.commit(["child"], batch)
        assert said(caught) == {"limit": limit, "count": count}
        search.commit(["child"], batch, overflow=DropOldest(**said(caught)))


@pytest.mark.parametrize(("step", "has_sizes"), [(3, True), (4, False)])
def test_a_policy_is_named_with_sizes_that_can_be(manager: KVCacheManager, step: int, has_sizes: bool) -> None:
    manager.set_init_cache(0, "root", tokens(1, 3))
    with manager.search([0], overflow=RaiseOnOverflow(4)) as search:
        batch = search.gather(["root"], [0])
        append(batch, [1], step)
        with pytest.raises(WindowOverflowError) as caught:
            search.commit(["child"], batch)
        assert bool(said(caught)) == has_sizes


def test_a_fill_longer_than_its_batch_hears_the_room_that_would_do(manager: KVCacheManager) -> None:
    manager.set_init_cache(0, "root", tokens(1, 3))
    with manager.search([0]) as search:
        with (
            search.gather(["root", "new"], [0, 0], room=1) as batch,
            pytest.raises(WindowOverflowError, match="kv has 6 tokens, and the batch 4 columns") as caught,
        ):
            batch.fill(1, tokens(2, 6))
        with search.gather(["root", "new"], [0, 0], room=said(caught)["room"]) as batch:
            batch.fill(1, tokens(2, 6))


def test_a_claim_that_is_over_and_one_of_anothers_say_so(pool: KVPool) -> None:
    with pool.try_claim("key") as mine, pool.try_claim("key") as other:
        with pytest.raises(ClosedError, match=r"computed by another caller; get_or_compute\(\) waits for its result"):
            other.fulfil(tokens(1, 2))
        mine.fulfil(tokens(1, 2))
        with pytest.raises(ClosedError, match="this claim is over: fulfilled, failed or abandoned before"):
            mine.fulfil(tokens(1, 2))


def test_what_cannot_be_promoted_is_said_with_where_it_was_looked_for(manager: KVCacheManager) -> None:
    manager.set_init_cache(0, "root", tokens(1, 3))
    with manager.search([0, 1]) as search:
        search.gather(["root"], [0]).close()
        with pytest.raises(KeyNotFoundError, match="'root' to promote, and gathered no root of that key in environ"):
            search.promote("root", 1)


def test_a_search_after_its_end_says_how_to_get_another(manager: KVCacheManager) -> None:
    closed, bumped = manager.search([0]), manager.search([1])
    closed.close()
    with pytest.raises(SearchEndedError, match=r"open another with manager.search\(\)"):
        closed.keys()
    manager.bump_version()
    with pytest.raises(SearchEndedError, match="the weights version was bumped; open a new search"):
        bumped.keys()


@pytest.mark.parametrize(
    ("settings", "argument"),
    [({}, "max_entries=5 and max_slots=35"), ({"max_slots": 32}, "max_entries=5 and max_slots=35")],
)
def test_too_many_rows_at_once_for_a_pool_name_its_arguments(
    make_pool: MakePool, settings: dict[str, Any], argument: str
) -> None:
    rows = stacked(*[tokens(number, 7) for number in range(5)])
    with pytest.raises(CapacityError, match=f"; {argument} would do"):
        make_pool(**settings).put_many(range(5), rows)
    make_pool(5, max_slots=35).put_many(range(5), rows)


def test_a_pool_that_was_given_bytes_names_bytes(make_pool: MakePool) -> None:
    token = LAYOUT.bytes_per_token
    rows = stacked(*[tokens(number, 7) for number in range(2)])
    with pytest.raises(CapacityError, match=f"; max_bytes={14 * token} would do"):
        make_pool(max_bytes=8 * token).put_many(range(2), rows)
    make_pool(max_bytes=14 * token).put_many(range(2), rows)


@pytest.mark.parametrize(("role", "name"), [("init", "init_entries"), ("wm", "wm_entries")])
def test_too_many_rows_at_once_for_a_managers_pool_name_the_managers_argument(
    make_manager: MakeManager, role: str, name: str
) -> None:
    def pool_of(manager: KVCacheManager) -> KVPool:
        return manager.init_pools[0] if role == "init" else manager.wm_pool

    rows = stacked(*[tokens(number, WINDOW) for number in range(5)])
    with pytest.raises(CapacityError, match=f"; {name}=5 would do") as caught:
        pool_of(make_manager(init_entries=2, wm_entries=2)).put_many(range(5), rows)
    pool_of(manager_of(make_manager, said(caught))).put_many(range(5), rows)


# What a policy allows ------------------------------------------------------------------------------------------------

DIFFERENCE = torch.zeros(2, 2, 2, WINDOW, 3)
POLICIES: dict[str, Callable[..., Overflow]] = {
    "oldest": DropOldest,
    "correct": lambda limit, count, **step: DropAndCorrect(limit, count, DIFFERENCE, LAYOUT, **step),
    "table": lambda limit, count, **step: DropLazily(
        limit, count, PositionTable(LAYOUT, lambda distance: DIFFERENCE), **step
    ),
    "steps": lambda limit, count, **step: DropLazily(limit, count, PositionSteps(LAYOUT, count, DIFFERENCE), **step),
}
each_policy = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)


@each_policy
def test_a_limit_that_leaves_no_room_for_a_step_is_refused_when_the_search_opens(
    policy: Callable[..., Overflow], manager: KVCacheManager
) -> None:
    with pytest.raises(InvalidArgumentError, match=r"^overflow\.limit must be at most 7 .*overflow\.step=2.*got 8"):
        manager.search([0], overflow=policy(WINDOW, 2, step=2))
    assert manager.recur_pool.stats().reserved_slots == 0
    manager.search([0], overflow=policy(WINDOW, 2, step=1)).close()


@each_policy
def test_a_step_that_a_drop_does_not_make_up_for_is_refused_when_the_policy_is_made(
    policy: Callable[..., Overflow],
) -> None:
    with pytest.raises(InvalidArgumentError, match=r"^count must be at least step=3"):
        policy(5, 2, step=3)
    with pytest.raises(InvalidArgumentError, match=r"^step must be at least 1"):
        policy(5, 2, step=0)
    with pytest.raises(InvalidTypeError, match=r"^step must be an int"):
        policy(5, 2, step=1.5)


@each_policy
@pytest.mark.parametrize("root", range(1, WINDOW - 1))
def test_a_policy_that_passed_holds_at_any_depth(
    policy: Callable[..., Overflow], root: int, make_manager: MakeManager
) -> None:
    manager = make_manager(settings=config(num_simulations=12))
    manager.set_init_cache(0, -1, tokens(1, root))
    with manager.search([0], overflow=policy(WINDOW - 1, 2, step=2)) as search:
        for depth in range(12):
            with search.gather([depth - 1], [0]) as batch:
                append(batch, [depth])
                search.commit([depth], batch)


def test_a_difference_that_is_too_short_for_the_steps_is_refused_when_the_policy_is_made() -> None:
    short = DIFFERENCE[:, :, :, :5]
    DropAndCorrect(7, 2, short, LAYOUT)
    with pytest.raises(InvalidArgumentError, match=r"^difference must cover the 6 tokens that stay, got 5"):
        DropAndCorrect(7, 2, short, LAYOUT, step=2)
    with pytest.raises(InvalidArgumentError, match=r"^table must cover the 6 tokens that stay, got 5"):
        DropLazily(7, 2, PositionSteps(LAYOUT, 2, short), step=2)


def test_an_append_that_a_limit_left_no_room_for_says_which_limit_would(manager: KVCacheManager) -> None:
    def play(limit: int) -> None:
        manager.set_init_cache(0, -1, tokens(1, 1))
        with manager.search([0], overflow=DropOldest(limit, 2)) as search:
            for depth in range(5):
                with search.gather([depth - 1], [0]) as batch:
                    append(batch, [depth])
                    search.commit([depth], batch)

    with pytest.raises(WindowOverflowError, match=r"7 of the window's 8 tokens; .*of limit=7 or less") as caught:
        play(WINDOW)
    play(said(caught)["limit"])


def test_an_append_into_too_small_a_buffer_says_which_room_would_do(pool: KVPool) -> None:
    pool.put("a", tokens(1, 3))
    with pool.gather(["a"], room=1) as batch, pytest.raises(WindowOverflowError, match="gather with room=2,") as caught:
        append(batch, [2])
    with pool.gather(["a"], room=said(caught)["room"]) as batch:
        append(batch, [2])


def test_an_append_beyond_any_window_says_so(pool: KVPool) -> None:
    pool.put("a", tokens(1, 3))
    new = torch.zeros(1, 2, WINDOW + 1, 3)
    with pool.gather(["a"]) as batch, pytest.raises(WindowOverflowError, match=r"the window is 8 tokens$"):
        batch.append(0, new, new)


# Ends ----------------------------------------------------------------------------------------------------------------

USES: dict[str, Callable[[Any], object]] = {
    "append": lambda batch: append(batch, [1]),
    "advance": lambda batch: batch.advance(1),
    "fill": lambda batch: batch.fill(0, tokens(1, 2)),
    "wait": lambda batch: batch.wait(),
}
ENDS: dict[str, tuple[Callable[[KVCacheManager, Any], object], str]] = {
    "bump": (lambda manager, search: manager.bump_version(), "the weights version was bumped"),
    "close of the pool": (lambda manager, search: manager.recur_pool.close(), "was closed"),
    "close": (lambda manager, search: search.close(), "the search was closed"),
}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("use", USES)
def test_a_batch_of_a_search_that_has_ended_says_so_as_the_search_does(
    manager: KVCacheManager, use: str, end: str
) -> None:
    act, says = ENDS[end]
    manager.set_init_cache(0, "root", tokens(1, 3))
    search = manager.search([0])
    batch = search.gather(["root"], [0])
    act(manager, search)
    assert batch.closed
    with pytest.raises(SearchEndedError, match=says):
        USES[use](batch)


@pytest.mark.parametrize("use", USES)
def test_a_batch_that_was_closed_says_so(pool: KVPool, use: str) -> None:
    pool.put("a", tokens(1, 3))
    batch = pool.gather(["a"])
    batch.close()
    with pytest.raises(ClosedError, match="this batch is closed") as caught:
        USES[use](batch)
    assert type(caught.value) is ClosedError


def test_the_weights_version_can_be_read_and_not_set(manager: KVCacheManager, pool: KVPool) -> None:
    for owner in (manager, pool, AsyncKVPool(pool), AsyncKVCacheManager(manager)):
        before = owner.version
        bumped = owner.bump_version()
        if bumped is not None:

            async def awaited(bump: Any = bumped) -> None:
                await bump

            anyio.run(awaited)
        assert owner.version == before + 1
        with pytest.raises(AttributeError):
            owner.version = 7  # type: ignore[misc]
    assert manager.version == manager.init_pools[0].version == manager.wm_pool.version
    assert pool.version == pool.default_scope.version == pool.scope("new").version


# Files, and what others compute ---------------------------------------------------------------------------------------


def test_a_file_that_is_damaged_and_one_that_does_not_fit_say_what_to_do(make_pool: MakePool, tmp_path: Path) -> None:
    path = tmp_path / "pool.safetensors"
    path.write_bytes(b"no snapshot")
    pool = make_pool()
    with pytest.raises(SnapshotDamagedError, match="no snapshot: take an older one"):
        pool.load(path)
    pool.put_many(["a", "b"], stacked(tokens(1, 3), tokens(2, 5)))
    pool.save(path)
    with pytest.raises(SnapshotMismatchError, match=r"its pool has 2 entries with 8 slots, and small holds") as caught:
        make_pool(1, name="small").load(path)
    assert make_pool(said(caught)["max_entries"], name="large").load(path).entries == 2


def test_a_caller_that_waits_in_vain_for_a_computation_hears_which_argument_helps(make_pool: MakePool) -> None:
    pool = make_pool()
    with pool.try_claim("a"), pytest.raises(WaitTimeoutError, match="timeout= that is longer than it takes"):
        pool.get_or_compute("a", lambda: tokens(1, 2), timeout=0.0)


def test_layers_that_lack_tokens_are_named_before_a_commit(make_pool: MakePool) -> None:
    pool = make_pool()
    pool.put("a", tokens(1, 3))
    with pool.gather(["a"]) as batch:
        batch.append(0, torch.zeros(1, 2, 1, 3), torch.zeros(1, 2, 1, 3))
        with pytest.raises(InvalidArgumentError, match=r"end at \[4, 3\]: append\(\) to those that have fewer"):
            pool.commit(["b"], batch)
        batch.append(1, torch.zeros(1, 2, 1, 3), torch.zeros(1, 2, 1, 3))
        pool.commit(["b"], batch)
