"""Rows: read once, checked while they pass, split and mixed; on disk, never all in memory."""
