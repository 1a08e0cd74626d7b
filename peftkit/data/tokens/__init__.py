"""Tokens: encoding, the loss mask, truncation, packing; on disk under a hash of what they follow from."""
