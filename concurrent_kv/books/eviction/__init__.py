"""Eviction policies: which entry a full pool gives up next.

A policy keeps an order over entries and nothing else. It takes no lock: its owner, a pool, calls every method,
iteration included, under one mutex of its own.
"""

from .base import Evictable, EvictionPolicy
from .clock import Clock
from .fifo import FIFO
from .lru import LRU
from .priority import Priority
from .registry import PolicyFactory, make_policy
from .s3fifo import S3FIFO

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
