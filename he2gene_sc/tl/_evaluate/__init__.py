"""``hg.tl.evaluate``."""
