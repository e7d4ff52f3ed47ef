"""Models: what turns histories and items into the vectors that are scored."""
