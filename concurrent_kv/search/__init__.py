"""A search: a scope of its own, and what it reserved."""
