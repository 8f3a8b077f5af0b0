"""Bounded waits: the gate before critical sections, deadlines, signals, sharded reader-writer locks."""

from .sharded import ShardedRWLock

__all__ = ["ShardedRWLock"]
