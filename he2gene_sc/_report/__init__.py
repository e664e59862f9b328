"""``hg.report``: HTML report of a slide, and index of a cohort."""
