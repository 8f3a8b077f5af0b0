"""Searches on a cluster of processes and machines, under Ray: docs/ray.md. Needs the extra `ray`."""

from ..device.graphs import keep_out_of_graphs
from .cluster import RayCluster

__all__ = ["RayCluster"]


keep_out_of_graphs(__name__)
