"""Evaluation: full ranking, baselines beside the model, significance, slices and the report."""
