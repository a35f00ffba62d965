"""Architectures: traced once, simplified, and applied to any number of state dicts."""
