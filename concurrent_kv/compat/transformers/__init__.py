"""Trees of text: the cache under the models of Hugging Face's `transformers` (5.24 or later; extra `transformers`)."""

try:
    from transformers import __version__ as _version
except ModuleNotFoundError as error:
    if error.name != "transformers":
        raise
    raise ModuleNotFoundError(
        "concurrent_kv.compat.transformers needs transformers, which is not installed: "
        "pip install 'concurrent-kv[transformers]'",
        name="transformers",
    ) from error

if tuple([int(part) for part in _version.split(".")[:2]]) < (5, 24):
    raise ImportError(f"concurrent_kv.compat.transformers needs transformers 5.24 or later, found {_version}")

from ...device.graphs import keep_out_of_graphs
from .cache import BatchCache
from .layouts import CacheLayout, UnsupportedModelError, WindowLayout, layout_of
from .stores import TextRows, TextStore
from .trees import TextNode, TextTree, TextTrees

__all__ = [
    "BatchCache",
    "CacheLayout",
    "TextNode",
    "TextRows",
    "TextStore",
    "TextTree",
    "TextTrees",
    "UnsupportedModelError",
    "WindowLayout",
    "layout_of",
]

keep_out_of_graphs(__name__)
