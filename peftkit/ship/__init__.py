"""What leaves the project: merged weights, export formats, model cards; proven against what was trained."""
