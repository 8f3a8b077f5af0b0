"""Whole numbers and references: entries, index, tables, slots, quotas, candidates for eviction, recount and repair."""
