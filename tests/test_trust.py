"""Check the stated reliability of the bundled model on a held-out section."""

import numpy as np
import pytest

import he2gene_sc as hg
from he2gene_sc.stats import log_normalise, pearson
from he2gene_sc.training._predictability import RELIABLE_PCC

pytestmark = [pytest.mark.data, pytest.mark.slow]


@pytest.fixture
def table(predicted_c5):
    hg.tl.intervals(predicted_c5)
    return predicted_c5["table"]


def test_at_least_fifty_genes_are_reliable_and_four_fifths_of_them_hold(table):
    genes = hg.get.genes(table, reliable=True)
    at = table.var_names.get_indexer(genes)
    r = np.nan_to_num(pearson(table.layers["he2gene"][:, at], log_normalise(table.X)[:, at]))
    assert len(genes) >= 50
    assert (r > RELIABLE_PCC).mean() >= 0.8


def test_intervals_have_the_stated_coverage_though_it_is_not_guaranteed(table):
    known = table.var["he2gene_predicted"].to_numpy(bool)
    truth = log_normalise(table.X)[:, known]
    low, high = (table.layers[f"he2gene_{end}"][:, known] for end in ("lower", "upper"))
    assert 0.85 <= ((truth >= low) & (truth <= high)).mean() <= 0.95
    facts = table.uns["he2gene_intervals"]
    assert (facts["guarantee"], facts["n_groups"], facts["n_groups_needed"]) == ("none", 6, 9)
