"""Searches on a cluster of processes and machines, under Ray: docs/ray.md. Needs the extra `ray`."""

try:
    import ray  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "ray":
        raise
    raise ModuleNotFoundError(
        "concurrent_kv.ray needs ray, which is not installed: pip install 'concurrent-kv[ray]'", name="ray"
    ) from error

from ..device.graphs import keep_out_of_graphs
from .cluster import RayCluster

__all__ = ["RayCluster"]

keep_out_of_graphs(__name__)
