"""Data: read with line numbers, brought to one shape, rendered, tokenized, masked, checked."""
