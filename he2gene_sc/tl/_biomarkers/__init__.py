"""``hg.tl.biomarkers``, ``hg.tl.concordance`` and ``hg.tl.enrichment``."""
