"""Leaves of many tasks' trees evaluated together: one task gathers, calls the model and commits for all of them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field

import anyio

from concurrent_kv.aio import AsyncKVCacheManager, AsyncSearch
from examples.cartpole.episode import Episode
from examples.cartpole.evaluation import Evaluation
from examples.cartpole.nodes import NodeKey, Nodes, child_keys, parent_keys, root_key
from examples.cartpole.running import Runner
from examples.cartpole.tree import Leaf


@asynccontextmanager
async def open_leaf_batches(
    nodes: Nodes, manager: AsyncKVCacheManager, run: Runner, *, envs: int, size: int, wait_seconds: float
) -> AsyncGenerator[LeafBatches, None]:
    """Evaluate leaves while it is entered.

    Args:
        nodes: the model.
        manager: where the K and V are.
        run: calls the model.
        envs: environments; each may search one tree.
        size: leaves evaluated together, at most.
        wait_seconds: how long a leaf waits for others, at most.
    """
    # One search for all trees: with one for each, a batch would be as many gathers and commits as it has rows.
    async with manager.search(range(envs), overflow=nodes.overflow) as search:
        batches = LeafBatches(nodes, search, run, envs)
        with batches.requested:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(batches.serve, size, wait_seconds)
                with batches:
                    yield batches


@dataclass(eq=False)
class _Request:
    """A leaf waiting for its evaluation."""

    episode: Episode
    leaf: Leaf
    done: anyio.Event = field(default_factory=anyio.Event)
    evaluation: Evaluation | None = None


class LeafBatches:
    """Collects leaves. Belongs to one event loop. Leaving its `with` ends `serve`."""

    def __init__(self, nodes: Nodes, search: AsyncSearch, run: Runner, envs: int) -> None:
        self._nodes = nodes
        self._search = search
        self._run = run
        self._requests, self.requested = anyio.create_memory_object_stream[_Request](envs)
        self._trees: dict[Episode, list[NodeKey]] = {}  # what each tree that is being searched still needs
        self._ended = False  # a tree, since the search last let go of what is not needed

    @contextmanager
    def tree(self, episode: Episode) -> Generator[None, None, None]:
        """A tree from the episode's newest observation; its entries are kept until this is left."""
        self._trees[episode] = [root_key(episode, episode.time)]
        try:
            yield
        finally:
            del self._trees[episode]
            self._ended = True

    async def evaluate(self, episode: Episode, leaf: Leaf) -> Evaluation:
        """Evaluate a leaf of the episode's tree, together with those of other tasks."""
        request = _Request(episode, leaf)
        self._requests.send_nowait(request)  # there is room for one of each tree
        await request.done.wait()
        assert request.evaluation is not None
        return request.evaluation

    async def serve(self, size: int, wait_seconds: float) -> None:
        """Evaluate what comes until there is no more."""
        async for first in self.requested:
            requests = [first]
            with suppress(anyio.EndOfStream):
                self._take_waiting(requests, size)
                if wait_seconds:
                    with anyio.move_on_after(wait_seconds):
                        while len(requests) < size:
                            requests.append(await self.requested.receive())
            await self._evaluate(requests)
            for request in requests:
                request.done.set()

    def _take_waiting(self, requests: list[_Request], size: int) -> None:
        with suppress(anyio.WouldBlock):
            while len(requests) < size:
                requests.append(self.requested.receive_nowait())

    async def _evaluate(self, requests: list[_Request]) -> None:
        if self._ended:
            self._ended = False
            # Room for the trees to come; and init pools can evict the roots of those that ended.
            await self._search.keep([key for keys in self._trees.values() for key in keys])
        leaves = [(request.episode, request.leaf) for request in requests]
        children = child_keys(leaves)
        with await self._search.gather(parent_keys(leaves), [episode.env_id for episode, _ in leaves]) as batch:
            new = await self._run(self._nodes.leaves, batch, leaves)
            await self._search.commit(children, batch, sides=new.sides)
        for request, key, evaluation in zip(requests, children, new.evaluations, strict=True):
            self._trees[request.episode].append(key)
            request.evaluation = evaluation

    def __enter__(self) -> LeafBatches:
        return self

    def __exit__(self, *_: object) -> None:
        self._requests.close()
