"""Programs that use `concurrent_kv` on real input."""
