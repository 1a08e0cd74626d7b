"""Losses, metrics and generation: used by training, and later by shipping and serving."""
