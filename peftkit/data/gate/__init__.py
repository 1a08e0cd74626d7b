"""Checks of the training data that pass, warn or fail, and samples of it, token by token."""
