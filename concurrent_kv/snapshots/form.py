"""The form of a file: a safetensors file with these tensors and metadata, and a checksum of each part."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch
import xxhash

from ..device.layout import KVLayout

__all__ = [
    "DTYPES",
    "FORMAT",
    "TENSORS",
    "VERSION",
    "header_checksum",
    "layout_form",
    "layout_of",
    "nbytes_of",
    "new_checksum",
    "require_safetensors",
]

FORMAT = "concurrent_kv snapshot"
VERSION = 1
TENSORS = {"slots": None, "positions": "I32", "lengths": "I32", "tables": "I32", "index": "U8", "sides": "U8"}
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # of the slots
BYTES = {"F32": 4, "F16": 2, "BF16": 2, "I32": 4, "U8": 1}
Shapes = Mapping[str, tuple[str, list[int]]]  # dtype and shape of each tensor

new_checksum = xxhash.xxh3_64


def require_safetensors() -> Any:
    """The package `safetensors`, or an error that says how to have it."""
    try:
        return import_module("safetensors")
    except ModuleNotFoundError as error:
        if error.name != "safetensors":
            raise
        raise ImportError(
            "snapshots need safetensors, which is not installed: pip install concurrent-kv[snapshots]"
        ) from error


def header_checksum(metadata: Mapping[str, str], shapes: Shapes) -> str:
    """Of all that a header says, but for this checksum itself."""
    said = {name: text for name, text in metadata.items() if name != "checksum"}
    return new_checksum(json.dumps([said, {**shapes}], sort_keys=True).encode()).hexdigest()


def nbytes_of(dtype: str, shape: list[int]) -> int:
    """Bytes of a tensor."""
    return BYTES[dtype] * math.prod(shape)


def layout_form(layout: KVLayout) -> str:
    """A layout as text, without its device."""
    names = ("num_layers", "num_heads", "head_dim", "max_tokens")
    return json.dumps({**{name: getattr(layout, name) for name in names}, "dtype": str(layout.dtype)})


def layout_of(text: str, dtype: str) -> KVLayout:
    """The layout of such a text, on a CPU.

    Raises:
        ValueError, TypeError, KeyError: it is none, or not of this dtype.
    """
    sizes = json.loads(text)
    stated = sizes.pop("dtype")
    layout = KVLayout(**sizes, dtype=DTYPES[dtype])
    if str(layout.dtype) != stated:
        raise ValueError(f"the layout says {stated!r:.40}, the slots are {layout.dtype}")
    return layout
