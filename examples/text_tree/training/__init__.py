"""Trains the language model: `python -m examples.text_tree.training`."""
