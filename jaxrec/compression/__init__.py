"""A trained run made smaller: codes, pruning, and what each gives and costs."""
