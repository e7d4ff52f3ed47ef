"""Training: the optimizer, the state, the step, the loop, checkpoints and the log."""
