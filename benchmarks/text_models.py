"""How the causal models of transformers fit into pools by their default configurations: `docs/transformers.md`.

    python -m benchmarks.text_models [--json FILE]

Takes minutes; small models that look at their numbers are built in memory, up to 3 GB.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import logging as transformers_logging

from concurrent_kv.compat.transformers import CacheLayout
from reporting.arguments import file_to_write
from reporting.progress import track
from reporting.tables import console_of, origin


class Warnings(logging.Handler):
    """Counts warnings: of configurations that were read, as their model could not be run."""

    number = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.number += 1


def kind_of(config_class: Any, warnings: Warnings) -> dict[str, Any]:
    """How a model fits."""
    before = warnings.number
    try:
        fits = CacheLayout.of(config_class(), max_tokens=128, dtype=torch.bfloat16)
    except Exception as error:
        return {"kind": "refused", "reason": f"{type(error).__name__}: {error}"}
    kind = "states" if fits.has_states else "record" if fits.places else "plain"
    return {
        "kind": kind,
        "read": warnings.number > before,
        "bytes_per_token": fits.layout.bytes_per_token,
        "bytes_kept": fits.bytes_kept,
        "layers": sum(bool(kind.parts) for kind in fits.kinds),
        "sliding_layers": 0 if fits.has_states else sum(kind.can_drop for kind in fits.kinds),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=file_to_write, help="write what was found to this file")
    asked = parser.parse_args(argv)
    transformers_logging.set_verbosity_error()
    warnings = Warnings(logging.WARNING)
    logger = logging.getLogger("concurrent_kv")
    logger.addHandler(warnings)
    logger.propagate = False
    classes = list(MODEL_FOR_CAUSAL_LM_MAPPING.keys())
    found = {each.model_type: kind_of(each, warnings) for each in track(classes, "models")}
    out = console_of()
    out.print(f"transformers {transformers.__version__}, {len(found)} causal models")
    for kind in ("plain", "record", "states", "refused"):
        of_kind = [name for name, about in found.items() if about["kind"] == kind]
        read = sum(found[name].get("read", False) for name in of_kind)
        out.print(f"{kind}: {len(of_kind)}" + (f" ({read} read from the configuration, not seen)" if read else ""))
    slides = {name: about for name, about in found.items() if about.get("sliding_layers")}
    all_do = [name for name, about in slides.items() if about["sliding_layers"] == about["layers"]]
    out.print(f"layers slide in {len(slides)}, all that keep tokens in {len(all_do)} of them: {', '.join(all_do)}")
    out.print(f"  some in {', '.join(sorted({*slides} - {*all_do}))}")
    for name, about in found.items():
        if about["kind"] == "refused":
            out.print(f"  {name}: {about['reason'][:150]}")
    out.print(origin())
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
