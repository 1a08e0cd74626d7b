"""What leaves the project: merged weights, export formats, model cards; proven to be what was trained."""
