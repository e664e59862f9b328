"""``he2gene``: the main jobs from a shell."""
