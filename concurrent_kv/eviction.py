"""Eviction policies: those that a pool knows by name, and the interface for one of your own."""

from .books.eviction import (
    FIFO,
    LRU,
    S3FIFO,
    Clock,
    Evictable,
    EvictionPolicy,
    PolicyFactory,
    Priority,
    make_policy,
)

__all__ = [
    "FIFO",
    "LRU",
    "S3FIFO",
    "Clock",
    "Evictable",
    "EvictionPolicy",
    "PolicyFactory",
    "Priority",
    "make_policy",
]
