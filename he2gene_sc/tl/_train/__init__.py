"""``hg.tl.train``."""
