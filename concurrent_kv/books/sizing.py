"""`SizePlan`: what searches need, and the arguments of a manager that has it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .allocation import Allocation
from .columns import in_columns, shown_bytes

if TYPE_CHECKING:  # without torch, the books can be imported alone
    from ..model.config import ManagerConfig

__all__ = ["SizePlan", "slots_of_tree"]


def slots_of_tree(nodes: int, step: int, root_lengths: Iterable[int], limit: int, count: int) -> int:
    """The most slots that the nodes of a tree take where a row that overflows is stored whole (`DropAndCorrect`).

    Args:
        nodes: of the tree, its root apart.
        step: tokens that each gets.
        root_lengths: the lengths that the root may have.
        limit, count: of the policy.

    A node's length, and so what it takes, depends on the root's length and on its depth alone. The dearest tree is a
    chain down to some depth, with all other nodes at the dearest depth of the chain.
    """
    most = nodes * step
    for root in root_lengths:
        length, chain, dearest = root, 0, 0
        for depth in range(1, nodes + 1):
            over = length + step >= limit
            length += step - count * over
            taken = length if over else step
            chain, dearest = chain + taken, max(dearest, taken)
            most = max(most, chain + (nodes - depth) * dearest)
    return most


@dataclass(frozen=True)
class SizePlan:
    """What the searches that were described to `KVCacheManager.plan` need. `str()` shows it as a table.

    Attributes:
        config: the configuration, with `num_simulations` and `max_cache_size` as planned.
        searches: searches that are open at once.
        trees: environments of one search.
        simulations: nodes of one tree, its root apart.
        step: new tokens of a node.
        threads: threads or tasks that store roots at once.
        entries, tokens: what one search reserves: `manager.search(env_ids, entries=..., tokens=...)`.
        init_entries, init_tokens, recur_slots, wm_entries, wm_tokens, headroom_tokens: arguments of the constructor.
        allocation: what a manager with these arguments allocates.
    """

    config: ManagerConfig
    searches: int
    trees: int
    simulations: int
    step: int
    threads: int
    entries: int
    tokens: int
    init_entries: int
    init_tokens: int
    recur_slots: int
    wm_entries: int
    wm_tokens: int
    headroom_tokens: int
    allocation: Allocation

    @property
    def max_cache_size(self) -> int:
        """Entries of the recurrent pool, for `config.max_cache_size`."""
        return self.config.max_cache_size

    @property
    def arguments(self) -> dict[str, Any]:
        """Every argument that it settles: `KVCacheManager(**plan.arguments)`."""
        return {"config": self.config, "env_num": self.config.env_num, **self.sizes}

    @property
    def sizes(self) -> dict[str, int]:
        """`arguments` without the configuration and the number of environments."""
        return {
            "init_entries": self.init_entries,
            "init_tokens": self.init_tokens,
            "recur_slots": self.recur_slots,
            "wm_entries": self.wm_entries,
            "wm_tokens": self.wm_tokens,
            "headroom_tokens": self.headroom_tokens,
        }

    @property
    def reservation(self) -> dict[str, Any]:
        """What a search is opened with: `manager.search(env_ids, **plan.reservation)`."""
        return {"entries": self.entries, "tokens": self.tokens}

    @property
    def parts(self) -> dict[str, tuple[int, int, int]]:
        """Entries, slots and bytes by part: "init" (all pools of roots), "recur", "wm" and "headroom"."""
        found: dict[str, tuple[int, int, int]] = {}
        for role, slots in self.allocation.slots.items():
            part = role.partition("[")[0]
            entries_before, slots_before, _ = found.get(part, (0, 0, 0))
            found[part] = (entries_before + self.allocation.entries[role], slots_before + slots, 0)
        found["headroom"] = (0, self.allocation.headroom_slots, 0)
        each = self.allocation.bytes_per_slot
        return {part: (entries, slots, slots * each) for part, (entries, slots, _) in found.items()}

    def __str__(self) -> str:
        env_num, layout = self.config.env_num, self.config.layout
        about = (
            f"{_counted(env_num, 'environment')}, window {layout.max_tokens:,}, "
            f"{shown_bytes(layout.bytes_per_token)} a token\n"
            f"{_counted(self.searches, 'search', 'searches')} at once, each over {_counted(self.trees, 'tree')} of "
            f"{_counted(self.simulations, 'node')}, {_counted(self.step, 'token')} a node"
        )
        settled = {"config.max_cache_size": self.max_cache_size, **self.sizes}
        settled |= {"search(entries=)": self.entries, "search(tokens=)": self.tokens}
        arguments = [("argument", "value"), *[(name, f"{value:,}") for name, value in settled.items()]]
        parts = [("part", "entries", "slots", "size")]
        for part, (entries, slots, nbytes) in self.parts.items():
            name = f"init ({_counted(env_num, 'pool')})" if part == "init" else part
            parts.append((name, f"{entries:,}" if entries else "", f"{slots:,}", shown_bytes(nbytes)))
        parts.append(("total", "", f"{self.allocation.total_slots:,}", shown_bytes(self.allocation.nbytes)))
        return f"{about}\n\n{in_columns(arguments)}\n\n{in_columns(parts)}"


def _counted(number: int, one: str, many: str | None = None) -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"
