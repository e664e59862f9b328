"""``hg.report``: one page of a slide to hand on, and the index of a cohort."""
