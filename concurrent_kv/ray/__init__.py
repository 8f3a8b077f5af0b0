"""Searches on a cluster of processes and machines, under Ray: docs/ray.md. Needs the extra `ray`."""

from .cluster import RayCluster

__all__ = ["RayCluster"]
