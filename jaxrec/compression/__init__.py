"""Search of hyper-parameters: the space, the trials, and what they showed."""
