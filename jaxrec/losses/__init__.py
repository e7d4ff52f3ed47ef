"""Losses: pure functions that return sums, so that shards and microbatches add. In nats."""
