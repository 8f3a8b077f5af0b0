"""A whole search: opened, grown from its roots, every row of every gather compared with what it has to be, closed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from concurrent_kv import Batch, CapacityError, ClosedError, SearchEndedError
from stress.content import BrokenPromiseError, Token
from stress.faults.errors import injected
from stress.possible import Before
from stress.world import ROOT_KEYS, Space
from stress.writing import check_side, write_key

if TYPE_CHECKING:
    from stress.actors import Actor

__all__ = ["searches"]

ABANDONED = 0.2  # share of the searches that are dropped unclosed, where that is one of the faults
RELEASED, KEPT, PROMOTED, READ_AGAIN = 0.05, 0.03, 0.1, 0.2  # shares of the steps


@dataclass
class Tree:
    """What a search has stored for one environment."""

    env: int
    space: Space
    root: int  # key number of the root in the environment's init pool
    nodes: dict[int, list[Token]] = field(default_factory=dict)  # tokens of each node, by number
    root_tokens: list[Token] | None = None  # once it was gathered: adopted, it stays what it is
    leaves: set[int] = field(default_factory=set)


class Growing:
    """One search under way."""

    def __init__(self, actor: Actor, search: Any, trees: list[Tree], number: int) -> None:
        self.actor = actor
        self.world = actor.world
        self.search = search
        self.trees = trees
        self.number = number
        self.nodes = 0

    async def step(self) -> None:
        """Gather a parent of every tree, check the rows, commit a child of each."""
        rng = self.actor.rng
        parents = [self._parent(tree) for tree in self.trees]
        keys = [self._key(tree, parent) for tree, parent in zip(self.trees, parents, strict=True)]
        before = [tree.space.plain[min(tree.root, ROOT_KEYS - 1)].before_read() for tree in self.trees]
        gathered = self.search.gather(keys, [tree.env for tree in self.trees])
        batch: Batch = await self.actor.call("gather", gathered)
        with batch:
            rows = [self._row(batch, row, tree, parents[row], before[row]) for row, tree in enumerate(self.trees)]
            self.world.content.check(batch, rows)
            self.actor.passed("search", count=len(rows))
            children = list(range(self.nodes, self.nodes + len(rows)))
            self.nodes += len(rows)
            new = [
                [Token(child % 65536, 0, self.number, self.actor.number, len(row) + place) for place in range(2)]
                for child, row in zip(children, rows, strict=True)
            ]
            self.world.content.append(batch, new)
            expected = [self.world.grown(row, added) for row, added in zip(rows, new, strict=True)]
            committed = self.search.commit(
                [("node", child) for child in children], batch, sides=[tuple(row) for row in expected]
            )
            await self.actor.call("commit", committed)
        for tree, child, parent, tokens in zip(self.trees, children, parents, expected, strict=True):
            tree.nodes[child] = tokens
            tree.leaves.add(child)
            tree.leaves.discard(-1 if parent is None else parent)
        chance = rng.random()
        if chance < RELEASED:
            await self._release()
        elif chance < RELEASED + KEPT:
            await self._keep()
        elif chance < RELEASED + KEPT + PROMOTED:
            await self._promote()
        elif chance < RELEASED + KEPT + PROMOTED + READ_AGAIN:
            await self._read_again()

    def _parent(self, tree: Tree) -> int | None:
        """A node, the newest more often; None for the root."""
        if not tree.nodes:
            return None
        nodes = [*tree.nodes]
        return nodes[-1 - min(int(self.actor.rng.expovariate(0.5)), len(nodes) - 1)]

    def _key(self, tree: Tree, parent: int | None) -> object:
        return self.world.key("root", tree.root) if parent is None else ("node", parent)

    def _row(self, batch: Batch, row: int, tree: Tree, parent: int | None, before: Before) -> list[Token]:
        """What a gathered row has to be; a root that missed is filled."""
        if parent is not None or tree.root_tokens is not None:
            known = tree.root_tokens if parent is None else tree.nodes[parent]
            assert known is not None
            if not batch.hits[row]:
                raise BrokenPromiseError(f"a search's own entry {parent} of environment {tree.env} was a miss")
            return known
        if not batch.hits[row]:
            filled = self.world.plain(tree.root, tree.space.number, 0, self.actor.number)
            batch.fill(row, self.world.content.row(filled))
            return filled
        tokens = self.world.content.read_row(batch, row)
        check_side(tokens, batch.side[row])
        if tree.root < ROOT_KEYS:
            self.world.check_plain(tree.space, tree.root, tokens, before)
        tree.root_tokens = tokens
        return tokens

    async def _release(self) -> None:
        going = [(tree, leaf) for tree in self.trees for leaf in sorted(tree.leaves)[:1]]
        if going:
            await self.actor.call("remove", self.search.release([("node", node) for _, node in going]))
        for tree, node in going:
            del tree.nodes[node]
            tree.leaves.discard(node)

    async def _keep(self) -> None:
        """The roots move on: of each tree a random half stays."""
        rng = self.actor.rng
        staying = {node for tree in self.trees for node in tree.nodes if rng.random() < 0.5}
        await self.actor.call("remove", self.search.keep([("node", node) for node in staying]))
        for tree in self.trees:
            tree.nodes = {node: tokens for node, tokens in tree.nodes.items() if node in staying}
            tree.leaves &= staying
            tree.root_tokens = None

    async def _promote(self) -> None:
        tree = self.actor.rng.choice(self.trees)
        if tree.nodes:
            node = self.actor.rng.choice([*tree.nodes])
            key = self.world.key("root", ROOT_KEYS)
            await self.actor.call("write", self.search.promote(("node", node), tree.env, as_key=key))

    async def _read_again(self) -> None:
        """Several nodes of one tree, without a commit."""
        tree = self.actor.rng.choice(self.trees)
        nodes = self.actor.rng.choices([*tree.nodes] or [-1], k=4)
        if nodes[0] >= 0:
            gathered = self.search.gather([("node", node) for node in nodes], [tree.env] * len(nodes))
            with await self.actor.call("gather", gathered) as batch:
                self.world.content.check(batch, [tree.nodes[node] for node in nodes])
                self.actor.passed("search", count=len(nodes))


async def searches(actor: Actor) -> None:
    """Open, grow, close. A version bump may end it; too little room, for a time, is an answer too."""
    rng, world = actor.rng, actor.world
    envs = rng.sample(range(len(world.root_spaces)), rng.randint(1, world.envs))
    trees = [Tree(env, world.root_spaces[env], rng.randrange(ROOT_KEYS + 1)) for env in envs]
    if rng.random() < 0.5:
        for tree in trees:
            if tree.root < ROOT_KEYS:
                await write_key(actor, tree.space, tree.root)
    share = len(envs) / world.envs
    try:
        opened = actor.access.open_search(
            envs,
            entries=int(world.search_entries * share),
            tokens=int(world.search_tokens * share),
            overflow=world.overflow,
        )
        search = await actor.call("open", opened)
    except CapacityError:
        actor.noted("no room for a search")
        return
    abandoned = False
    try:
        growing = Growing(actor, search, trees, world.next_search())
        for _ in range(rng.randint(1, world.simulations)):
            try:
                await growing.step()
            except Exception as error:
                if not injected(error):
                    raise
                actor.noted("search went on after an error")
        abandoned = "abandon" in world.settings.faults and rng.random() < ABANDONED
        actor.passed("search whole")
    except ClosedError as error:
        # A batch that ends with its search is just closed.
        if not isinstance(error, SearchEndedError) and not search.sync.closed:
            raise
        actor.noted("search ended" if isinstance(error, SearchEndedError) else "batch ended with its search")
    finally:
        if abandoned:
            actor.noted("search abandoned")
        else:
            await actor.call("close", search.close())
