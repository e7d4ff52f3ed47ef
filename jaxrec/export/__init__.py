"""A trained run as files that need no training code: programs, weights, vocabularies, and a card that tells of it."""
