"""Merging: decided, planned, streamed shard by shard, and compared with the adapter before it counts."""
