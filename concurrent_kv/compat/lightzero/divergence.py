"""What validation reports: where the two caches differed, and which of the released code's defects explains it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...internal import ShowsPublic

__all__ = ["DEFECTS", "Divergence", "ValidationReport", "first_difference"]

# The released code's own defects that validation can recognise.
DEFECTS = {
    "stale root": "a root's key outlives its slot in the ring of two, and returns another state's K/V",
    "stale node": "a node's key outlives its slot in the ring of a search's size, and returns another node's K/V",
    "miss raises": "a state that was never stored raises TypeError instead of being computed",
    "cleared by another": "another search's start cleared this search's nodes; a state then raises TypeError",
    "environments collide": "equal latent states of two environments share one entry: the last one's",
    "roles collide": "another role stored or cleared a root for an equal observation, and the lookup finds that",
    "root shadows node": "a node's latent state equals a root's, and the root's K/V is returned for it",
    "roots by row": "a root is stored and looked up by its row in the batch: where an environment has finished, the "
    "others' rows move up, and find its roots or none",
    "roots by rounding": "a root is looked up by the hash of a state that the encoder rounds otherwise in a batch of "
    "another size, and is not found",
    "mixed batch": "a batch in which some environments begin an episode and others go on raises IndexError; with "
    "continuous actions its first row decides for all",
}

WRONG = {
    "released": "the released cache is wrong",
    "ours": "this one is wrong, or has it no longer",
    "both": "both caches are wrong",
}


@dataclass(frozen=True)
class Divergence:
    """One row on which the two caches differed.

    Attributes:
        call: number of the world model's call since it was attached, from 0.
        where: "root" or "node".
        what: "context" (what was retrieved), "length" (of it), "entry" (what was stored), "output" (of the model),
            "miss" (a root that is stored, and that neither cache found) or "replay" (both retrieved the same, and it is
            not what its tokens compute).
        key: LightZero's hash of the row's state.
        env_id: the row's environment.
        layer, token, difference: the first layer and token that differ, and the largest absolute difference over all;
            None where lengths or outputs differ. Keys and values of a layer count as that layer.
        defect: which of `DEFECTS` explains it; None if none does.
        wrong: where the context was computed anew from its tokens, which of the caches is wrong: "released", "ours" or
            "both"; None elsewhere.
    """

    call: int
    where: str
    what: str
    key: str
    env_id: int
    layer: int | None = None
    token: int | None = None
    difference: float | None = None
    defect: str | None = None
    wrong: str | None = None

    def __str__(self) -> str:
        place = (
            "" if self.layer is None else f", layer {self.layer}, token {self.token}, by up to {self.difference:.3g}"
        )
        return (
            f"call {self.call} ({self.where}): {self.what} of {self.key} in environment {self.env_id} differs{place}"
            + (f": {self.defect}" if self.defect else "")
            + (f"; by its tokens, {WRONG[self.wrong]}" if self.wrong else "")
        )


@dataclass
class ValidationReport(metaclass=ShowsPublic):
    """What was compared so far, and what differed.

    Attributes:
        calls: calls of the world model that ran on both caches.
        contexts: rows retrieved from both and compared, with their lengths.
        entries: stored entries compared.
        outputs: calls whose outputs were compared.
        replayed: rows whose context was computed anew from its tokens, of those that differ and of a sample of all.
        wrong: how often those showed a cache to be wrong: "released", "ours", "both".
        defects: how often each of `DEFECTS` showed.
        unexplained: differences that none of them explains.
        first: the first difference of all; first_unexplained: the first of those.
    """

    _internal = frozenset(("add",))

    calls: int = 0
    contexts: int = 0
    entries: int = 0
    outputs: int = 0
    replayed: int = 0
    wrong: Counter[str] = field(default_factory=Counter)
    defects: Counter[str] = field(default_factory=Counter)
    unexplained: int = 0
    first: Divergence | None = None
    first_unexplained: Divergence | None = None

    def add(self, divergence: Divergence) -> None:
        """Count one difference."""
        self.first = self.first or divergence
        if divergence.wrong is not None:
            self.wrong[divergence.wrong] += 1
        if divergence.defect is not None:
            self.defects[divergence.defect] += 1
        else:
            self.unexplained += 1
            self.first_unexplained = self.first_unexplained or divergence


def first_difference(released: Tensor, new: Tensor) -> tuple[int, int, float] | None:
    """Where two rows `[2 * layers, heads, tokens, head_dim]` differ first, layer and token, and the largest difference.

    None if they are equal (NaN equals itself).
    """
    differs = (released != new) & ~(released.isnan() & new.isnan())
    if not differs.any():
        return None
    layers = released.shape[0] // 2
    by_token = differs.any(dim=3).any(dim=1)  # [2 * layers, tokens]
    by_layer = by_token[:layers] | by_token[layers:]
    layer, token = torch.nonzero(by_layer)[0].tolist()
    return int(layer), int(token), float((released - new).abs().nan_to_num(float("inf")).max())
