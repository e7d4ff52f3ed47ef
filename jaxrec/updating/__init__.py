"""A run that goes on from the feedback of its server: the grown data, the next model, the test, the promotion."""
