"""Files of weights: read by shard, written past the page cache."""
