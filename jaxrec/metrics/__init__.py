"""Metrics: pure functions over ranks, probabilities and recommended items (NumPy)."""
