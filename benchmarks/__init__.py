"""Benchmarks: the core beside its floor (`core`), and old against new in LightZero (`benchmark_kv_cache`)."""
