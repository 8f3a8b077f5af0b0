"""Stress runs: everything that the package promises under contention, attacked and checked. See `docs/stress.md`."""
