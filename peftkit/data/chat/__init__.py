"""Chat templates: rendered safely, and the spans of an answer in what they render."""
