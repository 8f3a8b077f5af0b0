"""A tiny language model that solves countdown puzzles, and searches that make it better: `make text-tree`."""
