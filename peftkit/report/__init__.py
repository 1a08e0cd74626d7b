"""What a run directory tells, without torch."""

from peftkit.report.summary import Summary, read_summary

__all__ = ["Summary", "read_summary"]
