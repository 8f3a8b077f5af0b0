"""A tree as SVG: each node's step and score, and how many tokens of its text are its own, and how many its parents'."""

from __future__ import annotations

from html import escape

from concurrent_kv.compat.transformers import TextNode, TextTree
from examples.text_tree.search import Attempt, is_open

WIDTH, HEIGHT, GAP_X, GAP_Y, MARGIN = 150, 34, 44, 8, 16
SOLVED, OPEN, WRONG, GIVEN = "#b7e4c7", "#e8f0fe", "#f8d7da", "#fff3cd"


def draw(attempt: Attempt, title: str) -> str:
    """The tree of an attempt, the prompt at the left, the steps to a solution joined by a thick line."""
    tree = attempt.tree
    places = _places(tree)
    solution = [] if attempt.solved is None else attempt.solved.path
    width = MARGIN + max(x for x, _ in places.values()) + WIDTH + MARGIN
    height = 2 * MARGIN + max(y for _, y in places.values()) + HEIGHT + MARGIN
    lines, boxes = list[str](), list[str]()
    for node, (x, y) in places.items():
        if node.parent is not None:
            from_x, from_y = places[node.parent]
            start, end = (from_x + WIDTH, from_y + HEIGHT / 2), (x, y + HEIGHT / 2)
            middle = (start[0] + end[0]) / 2
            curve = f"M{start[0]},{start[1]} C{middle},{start[1]} {middle},{end[1]} {end[0]},{end[1]}"
            stroke = ("#2d6a4f", 3) if node in solution else ("#9aa0a6", 1)
            lines.append(f'<path d="{curve}" fill="none" stroke="{stroke[0]}" stroke-width="{stroke[1]}"/>')
        boxes.append(_box(node, x, y, _color(attempt, node)))
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
            'font-family="monospace" font-size="11">',
            '<rect width="100%" height="100%" fill="white"/>',
            f'<text x="{MARGIN}" y="{MARGIN + 2}" font-size="13">{escape(title)}</text>',
            *lines,
            *boxes,
            "</svg>\n",
        ]
    )


def _box(node: TextNode, x: float, y: float, color: str) -> str:
    own, shared = len(node.ids), len(node.all_ids) - len(node.ids)
    score = "prompt" if node.parent is None else f"{node.score:.1f}" if is_open(node) else f"({node.total_logprob:.1f})"
    return (
        f'<g><rect x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="5" fill="{color}" stroke="#9aa0a6"/>'
        f'<text x="{x + 7}" y="{y + 14}" font-weight="bold">{escape(node.text.strip())}</text>'
        f'<text x="{x + 7}" y="{y + 28}" fill="#5f6368">{score}  {own} own, {shared} shared</text></g>'
    )


def _color(attempt: Attempt, node: TextNode) -> str:
    if node.parent is None:
        return GIVEN
    return SOLVED if node is attempt.solved else WRONG if node.data.left is None else OPEN


def _places(tree: TextTree) -> dict[TextNode, tuple[float, float]]:
    """Where each node's box is: a row for each leaf, and parents in the middle of their children."""
    places, row = dict[TextNode, tuple[float, float]](), 0

    def place(node: TextNode, depth: int) -> float:
        nonlocal row
        if node.children:
            rows = [place(child, depth + 1) for child in node.children]
            y = (rows[0] + rows[-1]) / 2
        else:
            y = 2 * MARGIN + row * (HEIGHT + GAP_Y)
            row += 1
        places[node] = (MARGIN + depth * (WIDTH + GAP_X), y)
        return y

    place(tree.root, 0)
    return places
