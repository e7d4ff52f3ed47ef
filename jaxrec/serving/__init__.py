"""From a version on disk to answers: candidates, rules, re-ranking, state, and the server around them."""
