"""``hg.tl.domain_preservation``."""
