"""Whole searches on hosts that own a device each: `LocalCluster` in this process, `concurrent_kv.ray.RayCluster` over
several.
"""

from ..device.graphs import keep_out_of_graphs
from .cluster import Cluster
from .errors import HostLostError, NoAnswerError, NoHostError, NotHereError, PlannerError, QueueFullError
from .host import Host
from .local import LocalCluster
from .requests import ClusterStats, HostParts, HostStats, SearchContext

__all__ = [
    "Cluster",
    "ClusterStats",
    "Host",
    "HostLostError",
    "HostParts",
    "HostStats",
    "LocalCluster",
    "NoAnswerError",
    "NoHostError",
    "NotHereError",
    "PlannerError",
    "QueueFullError",
    "SearchContext",
]

keep_out_of_graphs(__name__)
