"""The protocol of a pool: read, room, write, remove."""
