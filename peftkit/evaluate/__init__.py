"""Losses, metrics and generation, used in training and on finished runs."""
