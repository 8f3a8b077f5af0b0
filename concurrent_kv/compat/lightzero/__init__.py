"""LightZero's UniZero world model on `concurrent_kv`: attach to the released model, or import its manager from here."""

from ...device.graphs import keep_out_of_graphs
from .attach import attach, detach
from .attachment import Attachment
from .containers import LightZeroKeysValues, from_lightzero, to_lightzero
from .divergence import DEFECTS, Divergence, ValidationReport
from .install import install, uninstall
from .manager import LightZeroKVCacheManager
from .model import attachment_of

__all__ = [
    "DEFECTS",
    "Attachment",
    "Divergence",
    "LightZeroKVCacheManager",
    "LightZeroKeysValues",
    "ValidationReport",
    "attach",
    "attachment_of",
    "detach",
    "from_lightzero",
    "install",
    "to_lightzero",
    "uninstall",
]

keep_out_of_graphs(__name__)
