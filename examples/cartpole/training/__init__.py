"""Trains the world model: `python -m examples.cartpole.training`."""
