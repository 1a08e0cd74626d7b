"""What leaves the project: merged weights, export formats, model cards; each proven against what was trained."""
