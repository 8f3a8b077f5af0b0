"""Which places a run takes: some of each folder and kind, the same ones for the same seed."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable

from tests.mutants.places import Place


def chosen(places: Iterable[Place], number: int, seed: str) -> list[Place]:
    """So many places, spread over folders and kinds; the choice of fewer is the beginning of the choice of more."""

    def drawn(place: Place) -> bytes:
        return hashlib.sha256(f"{seed}:{place.name}".encode()).digest()

    strata: defaultdict[tuple[str, str], list[Place]] = defaultdict(list)
    for place in sorted(places, key=drawn, reverse=True):
        strata[place.file.split("/")[0], place.kind].append(place)
    # The root of its size: the smallest stratum is heard, and one of a hundred does not fill the choice.
    weights = {stratum: max(2, len(members)) ** 0.5 for stratum, members in strata.items()}
    taken = dict.fromkeys(strata, 0)
    choice: list[Place] = []
    while len(choice) < number and (left := [stratum for stratum in sorted(strata) if strata[stratum]]):
        stratum = min(left, key=lambda each: (taken[each] + 1) / weights[each])
        taken[stratum] += 1
        choice.append(strata[stratum].pop())
    return choice
