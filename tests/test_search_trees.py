"""A search that records its tree: whose child each entry is, what it shares, and what that costs."""

from __future__ import annotations

import gc
import shutil
import subprocess
import threading
from collections.abc import Hashable
from weakref import ref
from xml.etree import ElementTree

import pytest
import torch

from concurrent_kv import (
    AsyncKVCacheManager,
    DropAndCorrect,
    DropOldest,
    InvalidArgumentError,
    KVCacheManager,
    Search,
    SearchEndedError,
)
from concurrent_kv.books.ledger import Ledger
from concurrent_kv.search import recording
from concurrent_kv.search.state import SearchState
from concurrent_kv.search.tree import SearchTree
from tests import evaluating
from tests.conftest import MakeManager
from tests.metrics_support import evaluate_leaves, new_evaluator
from tests.support import HANG_SECONDS, LAYOUT, WINDOW, append, tokens
from tests.test_calls_made import counting


def grow(search: Search, parents: list[Hashable], children: list[Hashable], count: int = 1, env: int = 0) -> None:
    """Commit a child of each parent, with so many new tokens."""
    with search.gather(parents, [env] * len(parents), room=count) as batch:
        append(batch, list(range(len(parents))), count)
        search.commit(children, batch)


def edges(tree: SearchTree) -> dict[Hashable, Hashable]:
    """The key of each node's parent, by its own."""
    return {node.key: None if node.parent is None else tree.nodes[node.parent].key for node in tree.nodes}


def test_a_root_that_was_let_go_of_and_whose_tokens_are_shared_says_so(make_manager: MakeManager) -> None:
    manager = make_manager()
    manager.set_init_cache(0, "root", tokens(1, 2))
    with manager.search([0], record_tree=True) as search:
        grow(search, ["root"], ["a"])
        assert "let go of" not in search.tree().text()
        search.keep(["a"])
        tree = search.tree()
        assert [(node.key, node.is_let_go) for node in tree.nodes] == [("root", True), ("a", False)]
        assert tree.text().splitlines()[0].startswith("'root'  2 tokens, let go of")
        assert edges(tree) == {"root": None, "a": "root"}


def test_a_tree_has_every_entry_with_its_parent_and_what_it_shares(make_manager: MakeManager) -> None:
    manager = make_manager()
    manager.set_init_cache(0, "root", tokens(1, 2))
    manager.set_init_cache(1, "root", tokens(2, 3))
    with manager.search([0, 1], record_tree=True) as search:
        assert search.tree().nodes == ()
        grow(search, ["root"], ["a"])
        grow(search, ["root"], ["b"], count=2, env=1)
        grow(search, ["a", "a"], ["c", "d"])
        grow(search, ["d"], ["e"])
        tree = search.tree()
        assert {node.key for node in tree.nodes if node.is_root} == {"root"}
        assert [(node.env_id, node.own, node.shared) for node in tree.nodes if node.is_root] == [(0, 0, 2), (1, 0, 3)]
        assert edges(tree) == {"root": None, "a": "root", "b": "root", "c": "a", "d": "a", "e": "d"}
        by_key = {node.key: node for node in tree.nodes}
        assert [(by_key[key].own, by_key[key].shared) for key in "abcde"] == [(1, 2), (2, 3), (1, 3), (1, 3), (1, 4)]
        b = by_key["b"].parent
        assert b is not None
        assert tree.nodes[b].env_id == 1
        assert sum(node.own for node in tree.nodes) == search.tokens_in_use
        ages = [node.age for node in tree.nodes]
        assert ages == sorted(ages, reverse=True)
        assert min(ages) >= 0
        assert [tree.nodes[place].key for place in tree.children(by_key["a"].parent)] == ["a"]


def test_rows_that_share_nothing_still_have_their_parent(make_manager: MakeManager) -> None:
    manager = make_manager()
    manager.set_init_cache(0, "root", tokens(1, 6))
    copied = DropAndCorrect(WINDOW - 1, 2, torch.zeros(2, 2, 2, WINDOW - 3, 3), LAYOUT)
    with manager.search([0], record_tree=True) as search:
        for key, overflow in (("shifted", DropOldest(WINDOW - 1, 2)), ("copied", copied)):
            with search.gather(["root"], [0]) as batch:
                append(batch, [2], 1)
                search.commit([key], batch, overflow=overflow)
        with search.gather(["root", "none"], [0, 0]) as batch:
            batch.fill(1, tokens(3, 2))
            append(batch, [1, 2], 1)
            search.commit(["whole"], batch, rows=[1])
        with search.gather(["whole"], [0]) as batch:
            search.commit(["twin"], batch, lengths=[0])
        tree = search.tree()
        found = {node.key: (node.own, node.shared, node.is_root) for node in tree.nodes}
        assert found["shifted"] == (1, 4, False)  # the two oldest of the root's were dropped
        assert found["copied"] == (5, 0, False)
        assert found["whole"] == (3, 0, False)
        assert found["twin"] == (0, 3, False)
        assert edges(tree) == {"root": None, "shifted": "root", "copied": "root", "whole": None, "twin": "whole"}
        assert not any(node.parent_released for node in tree.nodes)


def test_a_parent_that_was_released_or_replaced_is_said_to_be_gone(make_manager: MakeManager) -> None:
    manager = make_manager()
    manager.set_init_cache(0, "root", tokens(1, 2))
    with manager.search([0], record_tree=True) as search:
        grow(search, ["root"], ["a"])
        grow(search, ["a"], ["b"])
        grow(search, ["b"], ["c"])
        grow(search, ["a"], ["a"])  # its own child replaces it
        tree = search.tree()
        gone = {node.key: node.parent_released for node in tree.nodes}
        assert gone == {"root": False, "b": True, "c": False, "a": True}
        search.release(["b"])
        assert {node.key for node in search.tree().nodes if node.parent_released} == {"c", "a"}
        grow(search, ["root"], ["b"])  # in rows that were others'
        assert edges(search.tree()) == {"root": None, "c": None, "a": None, "b": "root"}
        search.keep(["c"])
        assert {node.key for node in search.tree().nodes} >= {"c"}
        assert all(node.env_id is None for node in search.tree().nodes)


def test_of_two_commits_of_one_key_the_parent_is_that_of_the_one_that_is_stored(make_manager: MakeManager) -> None:
    manager = make_manager()
    manager.set_init_cache(0, "root", tokens(1, 1))
    with manager.search([0], record_tree=True) as search:
        grow(search, ["root", "root"], ["a", "b"])
        grow(search, ["b"], ["longer"])
        barrier, errors = threading.Barrier(2), list[BaseException]()

        def commit(parent: str) -> None:
            try:
                for _ in range(40):
                    barrier.wait(HANG_SECONDS)
                    grow(search, [parent], ["same"])
            except BaseException as error:
                errors.append(error)
                raise

        threads = [threading.Thread(target=commit, args=(parent,)) for parent in ("a", "longer")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(HANG_SECONDS)
        assert not errors
        tree = search.tree()
        same = next(node for node in tree.nodes if node.key == "same")
        assert edges(tree)["same"] == {2: "a", 3: "longer"}[same.shared]


def test_leaves_of_an_evaluator_are_recorded_too() -> None:
    manager = evaluating.new_manager()
    with new_evaluator(manager) as evaluator, manager.search([0], record_tree=True) as search:
        assert evaluator.run(evaluating.tree_walk(search, 0, 7, steps=12)) == 7
        tree = search.tree()
        assert len(tree.nodes) == 13
        assert not [node for node in tree.nodes if node.parent is None and not node.is_root]
        assert sum(node.own for node in tree.nodes) == search.tokens_in_use
        evaluate_leaves(manager, evaluator, 2)
    manager.check_integrity()
    manager.close()


def test_a_record_keeps_nothing_alive_that_was_released(make_manager: MakeManager) -> None:
    class Side:
        pass

    manager, side = make_manager(), Side()
    manager.set_init_cache(0, "root", tokens(1, 2))
    with manager.search([0], record_tree=True) as search:
        with search.gather(["root"], [0]) as batch:
            append(batch, [1], 1)
            search.commit(["a"], batch, sides=[side])
        grow(search, ["a"], ["b"])
        gone = ref(side)
        del side, batch
        search.release(["a"])
        gc.collect()
        assert gone() is None


def test_a_search_that_ends_or_does_not_record_says_so(make_manager: MakeManager) -> None:
    manager = make_manager()
    with manager.search([0]) as search, pytest.raises(InvalidArgumentError, match="record_tree must be True"):
        search.tree()
    search = manager.search([0], record_tree=True)
    search.close()
    with pytest.raises(SearchEndedError):
        search.tree()


@pytest.mark.anyio
async def test_a_task_hears_the_same(make_manager: MakeManager) -> None:
    facade = AsyncKVCacheManager(make_manager())
    await facade.set_init_cache(0, "root", tokens(1, 2))
    async with facade.search([0], record_tree=True) as search:
        batch = await search.gather(["root"], [0])
        append(batch, [1], 1)
        await search.commit(["a"], batch)
        assert edges(await search.tree()) == {"root": None, "a": "root"}


def test_a_record_that_cannot_be_made_leaves_the_search_as_it_was(
    make_manager: MakeManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = make_manager()
    manager.set_init_cache(0, "root", tokens(1, 2))

    def no_memory(*_: object) -> object:
        raise MemoryError

    record = recording.Record
    with manager.search([0], record_tree=True) as search:
        monkeypatch.setattr(recording, "Record", no_memory)
        with pytest.raises(MemoryError):
            search.gather(["root"], [0])
        assert search.held == 0
        manager.check_integrity()
        monkeypatch.setattr(recording, "Record", record)
        grow(search, ["root"], ["a"])
        before, in_use = edges(search.tree()), search.tokens_in_use
        with search.gather(["a"], [0]) as batch:
            append(batch, [1], 1)
            monkeypatch.setattr(recording, "Record", no_memory)
            with pytest.raises(MemoryError):
                search.commit(["b"], batch)
            monkeypatch.setattr(recording, "Record", record)
        assert (edges(search.tree()), search.tokens_in_use) == (before, in_use)
        manager.check_integrity()


def test_a_search_that_does_not_record_has_no_step_more(make_manager: MakeManager) -> None:
    manager = make_manager()
    manager.set_init_cache(0, "root", tokens(1, 2))

    def called(search: Search) -> set[str]:
        with search, counting() as found:
            grow(search, ["root"], ["a"])
            grow(search, ["a"], ["b"])
        return set(found)

    search = manager.search([0])
    assert (type(search._state), type(search._state.ledger)) == (SearchState, Ledger)
    assert not [name for name in called(search) if name.startswith("search/recording.py")]
    assert [name for name in called(manager.search([0], record_tree=True)) if name.startswith("search/recording.py")]


def test_repair_keeps_the_records(make_manager: MakeManager) -> None:
    manager = make_manager()
    manager.set_init_cache(0, "root", tokens(1, 2))
    with manager.search([0], record_tree=True) as search:
        grow(search, ["root"], ["a"])
        grow(search, ["a"], ["b"])
        before = edges(search.tree())
        manager.repair()
        assert edges(search.tree()) == before
        grow(search, ["b"], ["c"])
        assert edges(search.tree()) == {**before, "c": "b"}


def small_tree(manager: KVCacheManager) -> SearchTree:
    manager.set_init_cache(0, '"root" & <co>', tokens(1, 2))
    with manager.search([0], record_tree=True) as search:
        grow(search, ['"root" & <co>'], ["a"])
        grow(search, ["a", "a"], ["b", "c"])
        grow(search, ["b"], ["d"])
        search.release(["b"])
        return search.tree()


def test_its_text_has_a_line_for_each_entry_below_its_parent(make_manager: MakeManager) -> None:
    tree = small_tree(make_manager())
    lines = [line.split("  ")[0] + " | " + line.split("  ")[1].rsplit(",", 1)[0] for line in str(tree).splitlines()]
    assert len(lines) == len(tree.nodes) == 4
    assert lines[0].startswith("'\"root\" & <co>' of 0 | 2 tokens")
    assert lines[1].startswith("└─ 'a' | 1 own, 2 shared")
    assert tree.text().splitlines()[2].startswith("   └─ 'c'  1 own, 3 shared")
    assert tree.text().splitlines()[3].startswith("'d'  1 own, 4 shared")
    assert tree.text().splitlines()[3].endswith("parent released")


def test_its_pictures_are_well_formed_and_have_every_entry(make_manager: MakeManager) -> None:
    tree = small_tree(make_manager())
    picture = ElementTree.fromstring(tree.svg())
    texts = [text.text for text in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert texts[::2] == [node.title for node in tree.nodes]
    assert texts[1::2] == [node.about for node in tree.nodes]
    assert len(list(picture.iter("{http://www.w3.org/2000/svg}path"))) == 2
    dot = tree.dot()
    assert dot.count("->") == 2
    if shutil.which("dot"):
        done = subprocess.run(["dot", "-Tsvg"], input=dot, text=True, capture_output=True, check=True)
        assert done.stdout.count('<g id="node') == 4


def test_a_path_longer_than_the_stack_is_drawn() -> None:
    from concurrent_kv.search.tree import TreeNode

    nodes = tuple(
        TreeNode(place, None, place - 1 if place else None, False, not place, 1, 1, 0.0) for place in range(5000)
    )
    tree = SearchTree(nodes)
    assert len(tree.text().splitlines()) == 5000
    assert tree.svg().count("<rect") == 5001
