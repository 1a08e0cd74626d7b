"""Reports on a run directory, without torch."""

from peftkit.report.summary import Summary, read_summary

__all__ = ["Summary", "read_summary"]
