"""Trouble on purpose."""
