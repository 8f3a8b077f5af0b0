"""`SearchTree`: what a search holds at a moment, as the tree that it is, to be read, printed or drawn."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from html import escape

from ..books.records import Entry
from .recording import Record

__all__ = ["SearchTree", "TreeNode", "tree_of"]

WIDTH, HEIGHT, GAP_X, GAP_Y, MARGIN = 200, 34, 40, 8, 16  # of the picture, in pixels
ROOT_COLOR, COLOR, PARTED_COLOR = "#fff3cd", "#e8f0fe", "#f8d7da"
LONGEST_TITLE = 28  # characters of a key that are shown


@dataclass(frozen=True)
class TreeNode:
    """An entry of a search, or a root that it adopted.

    Attributes:
        key: its key.
        env_id: of a root, the environment whose init pool it is from; None of all others, and of roots that the search
            has let go of and whose slots others still share.
        parent: the place of its parent in `nodes`; None of a root, of what was stored whole, and where it was released.
        parent_released: whether it has a parent that the search has released, or replaced.
        is_root: whether it is one.
        own: tokens that have slots of their own.
        shared: tokens whose slots are its parent's; of a root, all, whose slots are the init pool's.
        age: seconds since it was stored, or adopted.
    """

    key: Hashable
    env_id: object
    parent: int | None
    parent_released: bool
    is_root: bool
    own: int
    shared: int
    age: float

    @property
    def tokens(self) -> int:
        """Its length."""
        return self.own + self.shared

    @property
    def is_let_go(self) -> bool:
        """Whether it is a root that the search does not hold any more: what stays shares its slots."""
        return self.is_root and self.env_id is None

    @property
    def about(self) -> str:
        """Its tokens and its age, in words."""
        tokens = f"{self.tokens} tokens" if self.is_root else f"{self.own} own, {self.shared} shared"
        if self.is_let_go:
            tokens += ", let go of"
        return f"{tokens}, {self.age:.1f} s"

    @property
    def title(self) -> str:
        """Its key, and a root's environment, in words."""
        title = repr(self.key) if self.env_id is None else f"{self.key!r} of {self.env_id!r}"
        return title if len(title) <= LONGEST_TITLE else title[: LONGEST_TITLE - 1] + "…"


@dataclass(frozen=True)
class SearchTree:
    """One moment of a search; made by `Search.tree()`. It keeps the keys alive, and nothing else of the search.

    Attributes:
        nodes: parents before their children.
    """

    nodes: tuple[TreeNode, ...]

    def children(self, place: int | None) -> list[int]:
        """The places of a node's children, in the order of their making; of None, of all that have no parent there."""
        return self._children().get(place, [])

    def _children(self) -> dict[int | None, list[int]]:
        found: dict[int | None, list[int]] = {}
        for place, node in enumerate(self.nodes):
            found.setdefault(node.parent, []).append(place)
        return found

    def text(self) -> str:
        """The tree as lines: each node's key, its own and its shared tokens, and its age."""
        children, lines = self._children(), list[str]()
        waiting = [(place, "", "") for place in reversed(children.get(None, []))]
        while waiting:  # no recursion: a path may be longer than the stack
            place, before, below = waiting.pop()
            node = self.nodes[place]
            lines.append(f"{before}{node.title}  {node.about}{', parent released' if node.parent_released else ''}")
            inner = children.get(place, [])
            for number, child in reversed(list(enumerate(inner, 1))):
                last = number == len(inner)
                waiting.append((child, below + ("└─ " if last else "├─ "), below + ("   " if last else "│  ")))
        return "\n".join(lines)

    def dot(self) -> str:
        """The tree in Graphviz' language: `dot -Tsvg` draws it."""
        lines = ["digraph search {", '  node [shape=box, style="rounded,filled", fontname=monospace, fontsize=10];']
        for place, node in enumerate(self.nodes):
            label = f"{node.title}\n{node.about}".replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
            lines.append(f'  n{place} [label="{label}", fillcolor="{_color(node)}"];')
        lines += [f"  n{node.parent} -> n{place};" for place, node in enumerate(self.nodes) if node.parent is not None]
        return "\n".join([*lines, "}\n"])

    def svg(self) -> str:
        """The tree as a picture, roots at the left; what has lost its parent is red, as in `dot`."""
        places = self._places()
        width = 2 * MARGIN + max((x for x, _ in places), default=0) + WIDTH
        height = 2 * MARGIN + max((y for _, y in places), default=0) + HEIGHT
        lines, boxes = list[str](), list[str]()
        for node, (x, y) in zip(self.nodes, places, strict=True):
            if node.parent is not None:
                from_x, from_y = places[node.parent]
                start, end, middle = from_x + WIDTH, y + HEIGHT / 2, (from_x + WIDTH + x) / 2
                curve = f"M{start},{from_y + HEIGHT / 2} C{middle},{from_y + HEIGHT / 2} {middle},{end} {x},{end}"
                lines.append(f'<path d="{curve}" fill="none" stroke="#9aa0a6"/>')
            boxes.append(
                f'<g><rect x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="5" fill="{_color(node)}" '
                f'stroke="#9aa0a6"/><text x="{x + 7}" y="{y + 14}" font-weight="bold">{escape(node.title)}</text>'
                f'<text x="{x + 7}" y="{y + 28}" fill="#5f6368">{escape(node.about)}</text></g>'
            )
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="monospace" '
            'font-size="10"><rect width="100%" height="100%" fill="white"/>'
        )
        return "\n".join([head, *lines, *boxes, "</svg>\n"])

    def _places(self) -> Sequence[tuple[float, float]]:
        """Where each node's box is: a row for each leaf, and parents in the middle of their children."""
        children = self._children()
        xs, ys, rows = [0.0] * len(self.nodes), [0.0] * len(self.nodes), 0
        waiting = list(reversed(children.get(None, [])))
        while waiting:
            place = waiting.pop()
            parent = self.nodes[place].parent
            xs[place] = MARGIN if parent is None else xs[parent] + WIDTH + GAP_X
            inner = children.get(place, [])
            waiting += reversed(inner)
            if not inner:
                ys[place] = MARGIN + rows * (HEIGHT + GAP_Y)
                rows += 1
        for place in reversed(range(len(self.nodes))):  # children come after their parents
            inner = children.get(place, [])
            if inner:
                ys[place] = (ys[inner[0]] + ys[inner[-1]]) / 2
        return list(zip(xs, ys, strict=True))

    def __str__(self) -> str:
        return self.text()


def tree_of(recorded: Sequence[tuple[Entry, Record, object]], now: float) -> SearchTree:
    """The tree of entries with their records, in the order of making."""
    places = {record.number: place for place, (_, record, _) in enumerate(recorded)}
    return SearchTree(
        tuple(
            TreeNode(
                key=entry.key,
                env_id=env_id,
                parent=places.get(record.parent),
                parent_released=bool(record.parent) and record.parent not in places,
                is_root=not record.parent and not record.own,
                own=record.own,
                shared=record.shared,
                age=now - record.made,
            )
            for entry, record, env_id in recorded
        )
    )


def _color(node: TreeNode) -> str:
    if node.is_let_go or node.parent_released:
        return PARTED_COLOR
    return ROOT_COLOR if node.is_root else COLOR
