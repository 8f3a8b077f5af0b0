"""A gather that fails leaves its search as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from concurrent_kv import InvalidArgumentError, KVCacheManager, Search, WaitTimeoutError
from concurrent_kv.search import reading as search_reading
from concurrent_kv.search import search as search_module
from tests.conftest import MakeManager
from tests.support import WINDOW, assert_same, row_of, tokens

OLD, NEW = tokens(1, 2), tokens(2, 3)


class FailedGatherError(Exception):
    pass


def gathered_after_a_failure(manager: KVCacheManager, search: Search, error: type[Exception], **unfit: Any) -> None:
    """A failed gather of a root, then one after the root was replaced: it finds the new one."""
    with pytest.raises(error):
        search.gather(["root"], [0], **unfit)
    assert search.held == 0
    manager.init_pools[0].put("root", NEW)
    with search.gather(["root"], [0]) as batch:
        assert_same(row_of(batch, 0), NEW)
    assert search.held == 1


@pytest.mark.parametrize("order", ["own_first", "init_first"])
@pytest.mark.parametrize("unfit", [{"room": 99}, {"room": -1}, {"out": torch.zeros(1)}, {"out": "no tensor"}])
def test_a_gather_that_is_refused_adopts_no_root(make_manager: MakeManager, order: Any, unfit: dict[str, Any]) -> None:
    manager = make_manager()
    manager.init_pools[0].put("root", OLD)
    with manager.search([0, 1], order=order) as search:
        gathered_after_a_failure(manager, search, (InvalidArgumentError, TypeError), **unfit)  # type: ignore[arg-type]


def test_a_gather_whose_copy_fails_adopts_no_root(make_manager: MakeManager) -> None:
    manager = make_manager()
    manager.init_pools[0].put("root", OLD)
    with manager.search([0]) as search:
        with pytest.MonkeyPatch.context() as patch:

            def failing(*arguments: Any, **options: Any) -> Any:
                raise FailedGatherError

            patch.setattr("concurrent_kv.pool.committing.gather_entries", failing)
            with pytest.raises(FailedGatherError):
                search.gather(["root"], [0])
        assert search.held == 0
        gathered_after_a_failure(manager, search, InvalidArgumentError, room=99)


def test_a_gather_whose_shard_is_not_free_in_time_adopts_no_root(make_manager: MakeManager) -> None:
    manager = make_manager()
    manager.init_pools[0].put("root", OLD)
    with manager.search([0]) as search:
        with pytest.MonkeyPatch.context() as patch:

            def late(*arguments: Any) -> bool:
                raise WaitTimeoutError("the search's shard was not free")

            patch.setattr(search_module, "adopt", late)
            with pytest.raises(WaitTimeoutError):
                search.gather(["root"], [0])
        gathered_after_a_failure(manager, search, InvalidArgumentError, room=WINDOW)


def test_of_two_gathers_of_one_root_the_later_finds_what_the_first_adopted(make_manager: MakeManager) -> None:
    manager = make_manager()
    manager.init_pools[0].put("root", OLD)
    with manager.search([0]) as search:
        with pytest.MonkeyPatch.context() as patch:
            adopt = search_reading.adopt

            def adopted_by_another_meanwhile(*arguments: Any) -> Any:
                patch.setattr(search_module, "adopt", adopt)
                manager.init_pools[0].put("root", NEW)
                search.gather(["root"], [0]).close()
                return adopt(*arguments)

            patch.setattr(search_module, "adopt", adopted_by_another_meanwhile)
            with search.gather(["root"], [0]) as batch:
                assert_same(row_of(batch, 0), NEW)
        with search.gather(["root"], [0]) as batch:
            assert_same(row_of(batch, 0), NEW)
        assert search.held == 1
