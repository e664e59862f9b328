"""``hg.pl.predictability``: labels, legend and errors."""

from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from matplotlib.text import Text

import he2gene_sc as hg
from he2gene_sc.models import load


@pytest.fixture(autouse=True)
def _closed():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def bundled():
    return load("breast-her2st")


def boxes(ax):
    ax.figure.canvas.draw()
    return [Text.get_window_extent(text) for text in sorted(ax.texts, key=lambda text: -text.xy[1])]


@pytest.mark.parametrize("genes", [10, 40, ["ERBB2", "CD24", "CD3E", "PTPRC", "ESR1"]])
def test_labels_do_not_overlap_and_are_inside(bundled, genes):
    ax = hg.pl.predictability(bundled, genes=genes)
    found = boxes(ax)
    assert len(found) == (genes if isinstance(genes, int) else len(genes))
    # Neighbouring lines of text may overlap by one point.
    assert all(upper.y0 > lower.y0 + 0.7 * lower.height for upper, lower in zip(found, found[1:], strict=False))
    inside = ax.get_window_extent()
    assert all(inside.x0 <= box.x0 and box.x1 <= inside.x1 for box in found)
    assert all(inside.y0 <= box.y0 + 1 and box.y1 <= inside.y1 + 1 for box in found)


def test_labels_are_inside_narrow_axes(bundled):
    ax = hg.pl.predictability(bundled, genes=["COL1A1", "HLA-DRB1"], figsize=(3.2, 4.5))
    found = boxes(ax)
    assert all(box.x1 < ax.get_window_extent().x1 for box in found)


def test_a_line_connects_each_label_with_its_point(bundled):
    ax = hg.pl.predictability(bundled, genes="ERBB2")
    (text,) = ax.texts
    ranked = bundled.genes["pcc"].sort_values(ascending=False, kind="stable")
    expected = (ranked.index.get_loc("ERBB2") + 1, ranked["ERBB2"])
    assert text.xy == pytest.approx(expected)
    assert text.arrow_patch is not None
    rings = [c for c in ax.collections if len(c.get_offsets()) == 1 and len(c.get_facecolors()) == 0]
    np.testing.assert_allclose(rings[0].get_offsets(), [expected])
    assert ax.get_xscale() == "log"


def test_the_legend_names_the_units_of_the_band_and_new_patients_are_drawn(bundled):
    ax = hg.pl.predictability(bundled, genes=0)
    legend = {text.get_text() for text in ax.get_legend().get_texts()}
    assert {
        "95 % interval over 6 held-out sections of known patients",
        "mean over 3 held-out patients",
    } <= legend
    points = [c for c in ax.collections if len(c.get_offsets()) == len(bundled.genes)]
    ranked = bundled.genes.sort_values("pcc", ascending=False, kind="stable")
    np.testing.assert_allclose(points[0].get_offsets()[:, 1], ranked["pcc_new_patient"])
    rule = "the lower 95 % bound of its held-out Pearson correlation (t over the 9 patients, held out; at least 3"
    ax = hg.pl.predictability(replace(bundled, card=replace(bundled.card, reliable_rule=rule)), genes=0)
    assert "95 % interval over 9 held-out patients" in {text.get_text() for text in ax.get_legend().get_texts()}


@pytest.mark.parametrize(
    ("genes", "message"),
    [
        (-1, "`genes` is -1"),
        (True, "`genes` is True"),
        (None, "`genes` is None"),
        (100_000, "labels do not fit; pass at most 40"),
        (["NO"], r"\['NO'\]"),
    ],
)
def test_genes_that_cannot_be_labelled_raise(bundled, genes, message):
    with pytest.raises(ValueError, match=message):
        hg.pl.predictability(bundled, genes=genes)


def test_the_column_of_symbols_is_the_one_that_predict_recorded(bundled):
    var = pd.DataFrame(
        {"symbol": bundled.genes.index[:50], "he2gene_predicted": True}, index=[f"g{i}" for i in range(50)]
    )
    table = AnnData(np.zeros((2, 50), np.float32), var=var)
    table.uns["he2gene"] = {"model": bundled.name, "weights_sha256": bundled.weights_sha256}
    stated = hg.pl.predictability(table, gene_symbols="symbol", genes=2)
    table.uns["he2gene"]["gene_symbols"] = "symbol"
    recorded = hg.pl.predictability(table, genes=2)
    best = bundled.genes["pcc"].iloc[:50].to_numpy().argsort()[::-1][:2]
    assert [text.get_text() for text in recorded.texts] == [f"g{i}" for i in best]
    assert [text.get_text() for text in stated.texts] == [f"g{i}" for i in best]
    table.var["he2gene_predicted"] = (
        table.var["he2gene_predicted"].astype(object).where(table.var_names != "g0", np.nan)
    )
    with pytest.raises(ValueError, match=r"var\['he2gene_predicted'\] is neither True nor False for 1 genes"):
        hg.pl.predictability(table)


def test_without_a_reliable_gene_the_legend_says_what_can_be_done(bundled):
    none = replace(bundled, genes=bundled.genes.assign(reliable=False))
    titles = [hg.pl.predictability(model).get_legend().get_title().get_text() for model in (bundled, none)]
    assert not titles[0]
    assert " ".join(titles[1].split()).startswith(
        "No gene is reliable. You can measure some spots and adapt the prediction"
    )
