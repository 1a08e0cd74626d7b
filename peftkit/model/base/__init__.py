"""The base model: where it is, whether its files are safe to read, and what it is."""
