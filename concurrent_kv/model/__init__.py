"""What goes in and comes out: keys and values, their hashes, overflow policies, a model's configuration."""
