"""Runs that are killed, starved and damaged on purpose."""
