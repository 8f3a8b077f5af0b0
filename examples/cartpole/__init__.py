"""A parallel tree search plays CartPole-v1 through a small transformer world model and one shared K/V cache."""
