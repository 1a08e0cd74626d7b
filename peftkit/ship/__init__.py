"""Merged weights, export formats and model cards, verified against the trained model."""
