"""Data: rows are read with line numbers, converted to examples, rendered, tokenized, masked and checked."""
