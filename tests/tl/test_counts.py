"""Tests of summed counts, depth and designs, with planted effects."""

import dataclasses
import re
import sys
import warnings

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from scipy.stats import false_discovery_control

import he2gene_sc as hg
from he2gene_sc.stats import (
    CountSums,
    count_differences,
    depth_followed,
    hypervariable_prior,
    library_evidence,
    library_factors,
    paired_moderated_t,
    squeeze_variance,
    variance_components,
    weighted_fit,
)
from he2gene_sc.tl._biomarkers.compare import _describe_doubts
from he2gene_sc.tl._biomarkers.methods import Outcome
from tests.helpers.patients import biomarkers

GENES = 400


def counted(i, *, n=(40, 25), deeper=4.0, planted=0, shift=1.0, genes=GENES, between=0.0):
    """One patient: group "a" is `deeper` times as deep; the first genes are `shift` (natural log) higher in it."""
    rng = np.random.default_rng((7, i))
    label = np.array(["a"] * n[0] + ["b"] * n[1])
    profile = np.random.default_rng(0).lognormal(0, 1, genes) * rng.lognormal(0, 0.3, genes)
    rates = np.tile(profile, (2, 1)) * rng.lognormal(0, between, (2, genes))
    rates[0, :planted] *= np.exp(shift)
    rates /= rates.sum(1, keepdims=True)
    depth = rng.lognormal(np.log(3000), 0.3, len(label)) * np.where(label == "a", deeper, 1)
    counts = rng.poisson(depth[:, None] * rates[(label == "b").astype(int)])
    obs = pd.DataFrame({"patient": f"P{i}", "label": label}, index=[f"P{i}-{j}" for j in range(len(label))])
    table = AnnData(counts.astype(np.float32), obs=obs, var=pd.DataFrame(index=[f"g{j}" for j in range(genes)]))
    table.obsm["spatial"] = np.column_stack([np.arange(len(label)), np.zeros(len(label))])
    return table


def markers(tables, **options):
    options = {"groups": "a", "reference": "b", "layer": None} | options
    return biomarkers(tables, "label", **options).set_index("names")


def test_a_deeper_group_does_not_appear_as_a_difference():
    result = markers([counted(i, genes=2000) for i in range(8)], min_mean=-1)
    assert (result["method"] == "pseudobulk").all()
    assert 0.03 < (result["pvals"] < 0.05).mean() < 0.07
    assert 0.45 < (result["effect_size"] > 0).mean() < 0.55


def test_planted_genes_are_significant_with_the_true_effect():
    result = markers([counted(i, planted=20, between=0.05) for i in range(6)])
    significant = result.index[result["pvals_adj"] < 0.05]
    planted = [f"g{i}" for i in range(20)]
    assert set(planted) <= set(significant)
    assert len(significant) < 30
    # Library sizes are estimated from the unchanged genes.
    assert result.loc[planted, "effect_size"].median() == pytest.approx(1, abs=0.1)
    np.testing.assert_allclose(result["logfoldchanges"], result["effect_size"] / np.log(2))


def test_a_minimum_effect_leaves_out_smaller_ones():
    tables = [counted(i, planted=20, shift=0.4, between=0.02) for i in range(6)]
    assert (markers(tables)["pvals_adj"] < 0.05).sum() >= 15
    assert (markers(tables, lfc=1)["pvals_adj"] < 0.05).sum() == 0
    for value in (-1, "a", np.nan, True):
        with pytest.raises(ValueError, match="`lfc` is"):
            markers(tables, lfc=value)


def test_patients_with_few_spots_do_not_hide_a_difference():
    # Without weights, two patients with three spots each would reduce the power of the four others.
    good = [counted(i, planted=20, shift=0.5, between=0.05, n=(150, 150)) for i in range(4)]
    poor = [counted(i, planted=20, shift=0.5, between=0.05, n=(3, 3), deeper=0.05) for i in (4, 5)]
    planted = [f"g{i}" for i in range(20)]
    alone, all_six = markers(good), markers(good + poor)
    assert (all_six.loc[planted, "pvals_adj"] < 0.05).mean() >= (alone.loc[planted, "pvals_adj"] < 0.05).mean() - 0.1


def test_patients_with_different_numbers_of_spots_do_not_create_differences():
    # One patient with many spots and three with few: the variance between patients cannot be estimated from one.
    sizes = [(150, 150), (3, 80), (60, 4), (5, 5)]
    result = markers([counted(i, n=n, genes=1000, between=0.12) for i, n in enumerate(sizes)], min_mean=-1)
    assert (result["pvals"] < 0.05).mean() < 0.06
    assert (result["pvals"] < 0.001).mean() < 0.003


def test_order_of_patients_does_not_matter():
    tables = [counted(i, planted=5) for i in range(4)]
    one, other = markers(tables), markers(tables[::-1])
    np.testing.assert_allclose(one["pvals"], other["pvals"].reindex(one.index), rtol=1e-5)


def test_an_interaction_is_tested_by_its_term():
    tables = []
    for i in range(8):
        tables.append(counted(i, planted=20, shift=[0.0, 1.0][i % 2], between=0.05))
        tables[-1].obs["age"] = float(i % 2)
        tables[-1].obs["stage"] = "ab"[i % 2]
    planted = [f"g{i}" for i in range(20)]
    for formula, term in (("group:age", "group:age"), ("group:stage", "group:stage[T.b]")):
        result = markers(tables, formula=formula, term=term)
        assert set(planted) <= set(result.index[result["pvals_adj"] < 0.05])
        assert result.loc[planted, "effect_size"].median() == pytest.approx(1, abs=0.15)
        # The group effect is that of the average patient.
        average = markers(tables, formula=formula)
        assert average.loc[planted, "effect_size"].median() == pytest.approx(0.5, abs=0.15)
    with pytest.raises(ValueError, match="`covariates`: .* is constant within samples"):
        markers(tables, covariates="age")
    with pytest.raises(ValueError, match="`term` 'no' is not a term of the design"):
        markers(tables, formula="group:age", term="no")
    with pytest.raises(ValueError, match="`formula` .* is not valid"):
        markers(tables, formula="group:nowhere")
    with pytest.raises(ValueError, match="`formula` is only for method='pseudobulk' and 'means'"):
        markers(tables, formula="group:age", method="wilcoxon")


def test_a_design_can_be_a_formula_or_a_list_of_covariates():
    tables = [counted(i, planted=20) for i in range(8)]
    for i, table in enumerate(tables):
        table.obs["age"] = np.random.default_rng(i).normal(size=table.n_obs)
    call = {"groups": "a", "reference": "b", "layer": None}
    for short, long in (("~ group + age", hg.Design(formula="age")), (["age"], hg.Design(covariates="age"))):
        one, other = (hg.tl.biomarkers(tables, "label", **call, design=design) for design in (short, long))
        pd.testing.assert_frame_equal(one, other)
    for wrong in ("age", 3, {"formula": "age"}):
        with pytest.raises(ValueError, match=r"`design` is .* pass a formula that begins with '~'"):
            hg.tl.biomarkers(tables, "label", **call, design=wrong)


def test_p_values_can_be_adjusted_over_all_groups():
    tables = [counted(i, planted=5) for i in range(4)]
    result = biomarkers(tables, "label", layer=None, adjust_over="all")
    from scipy.stats import false_discovery_control

    np.testing.assert_allclose(result["pvals_adj"], false_discovery_control(result["pvals"]))


def test_sums_are_for_counts_and_means_for_logarithms():
    tables = [_predicted(i) for i in range(3)]
    with pytest.raises(ValueError, match="`method` 'means' needs logarithms, but the layer holds raw counts"):
        markers(tables, method="means")
    with pytest.raises(ValueError, match="`method` 'deseq2' needs raw counts, but the layer holds logarithms"):
        markers(tables, layer="log", method="deseq2")
    assert (markers(tables, layer="log", method="pseudobulk")["method"] == "means").all()


def test_deseq2_equals_pydeseq2_or_names_the_missing_package(monkeypatch):
    tables = [counted(i, planted=20, genes=60, between=0.1) for i in range(3)]
    monkeypatch.setitem(sys.modules, "pydeseq2.dds", None)
    with pytest.raises(ImportError, match="`method` 'deseq2' needs PyDESeq2"):
        markers(tables, method="deseq2")
    monkeypatch.undo()
    pytest.importorskip("pydeseq2")
    with pytest.raises(ValueError, match=r"`depth` is 'total', which method='deseq2' does not use"):
        markers(tables, method="deseq2", depth="total")
    # Before any value is read.
    with pytest.raises(ValueError, match=r"`depth` is 'total', which method='wilcoxon' does not use"):
        markers([table[:, [0, 0]].copy() for table in tables], method="wilcoxon", depth="total")
    result = markers(tables, method="deseq2")
    assert (result["method"] == "deseq2").all()
    assert np.corrcoef(result["effect_size"], markers(tables)["effect_size"].reindex(result.index))[0, 1] > 0.9


def summed(rng, spots, between, *, genes=1500, depth=4000, mean=1.2, level=0.0):
    """Sums of Poisson counts; differences of patients (natural log) are normal about 0."""
    profile = rng.lognormal(level, mean, genes)
    gap = between * rng.standard_normal((len(spots), genes))
    rates = profile * np.exp(np.array([1, -1])[:, None, None] * gap / 2)
    n = np.transpose(spots).astype(float)
    total = n * depth * rng.lognormal(0, 0.1, n.shape)
    y = rng.poisson(total[..., None] * rates / rates.sum(-1, keepdims=True)).astype(float)
    total = y.sum(-1)
    by_depth = y * (total / n)[..., None]
    return CountSums(y, y + (y**2 - y) / n[..., None], by_depth, n, total, total**2 / n)


def run(sums):
    from he2gene_sc.tl._biomarkers.methods import _cap_weights

    found = count_differences(sums)
    known = np.isfinite(found.variances)
    weights = _cap_weights(np.where(known, 1 / np.where(known, found.variances, 1), 0))
    alike = known.sum(0) / np.maximum(weights.sum(0), 1e-300)
    more = {"reliable": found.reliable, "least": found.least}
    return paired_moderated_t(found.differences, alike=alike, weights=weights, robust=True, **more)


@pytest.mark.parametrize("spots", [(10, 100), (100, 10)])
def test_patients_that_differ_do_not_favour_the_smaller_group(spots):
    # A response that is linear in the counts puts 63 % of the effects on the side of the smaller group.
    tests = [run(summed(np.random.default_rng(seed), [spots] * 8, 0.6)) for seed in range(3)]
    effect, p = (np.concatenate([getattr(test, name) for test in tests]) for name in ("effect", "pvalues"))
    assert 0.45 < (effect > 0).mean() < 0.55
    assert 0.035 < (p < 0.05).mean() < 0.065
    assert (p < 0.001).mean() < 0.002


@pytest.mark.parametrize("n", [3, 6])
def test_counts_in_only_one_group_are_not_significant_by_chance(n):
    # With few counts and no difference, some genes have all counts in the larger group of every patient.
    small = []
    for seed in range(n, n + 4):
        sums = summed(np.random.default_rng(seed), [(10, 100)] * n, 0.2, genes=3000, depth=1500 / n, mean=0.1)
        test = run(sums)
        assert (sums.counts[0].sum(0) == 0).sum() > 2
        assert test.pvalues.min() > 1e-6
        assert (test.ci_high - test.ci_low).min() > 0.1
        small.append((test.pvalues < 0.001).mean())
    assert np.mean(small) < 0.002


def test_a_gene_expressed_in_one_group_is_significant():
    sums = summed(np.random.default_rng(0), [(50, 50)] * 4, 0.1)
    sums.counts[0, :, :3], sums.counts[1, :, :3] = 60, 0
    assert (run(sums).pvalues[:3] < 1e-5).all()
    assert (run(sums).effect[:3] > 2).all()


@pytest.mark.parametrize("method", ["pseudobulk", "deseq2"])
def test_the_only_gene_of_a_table_is_not_tested_against_itself(method):
    if method == "deseq2":
        pytest.importorskip("pydeseq2")
    tables = [counted(i, genes=60) for i in range(4)]
    for table in tables:
        table.obs["total"] = table.X.sum(1)
    tables = [table[:, ["g0"]].copy() for table in tables]
    with pytest.raises(ValueError, match=r"counts of one gene only, 'g0': .*hg.Design\(depth=...\)"):
        markers(tables, method=method)
    if method == "pseudobulk":
        assert markers(tables, depth="total")["pvals"].notna().all()


def test_doubts_about_several_groups_are_one_warning():
    tables = [counted(i, genes=30) for i in range(5)]
    with pytest.warns(
        UserWarning, match=r"'a': library sizes .* may appear different; similarly in 'b'\. Pass"
    ) as caught:
        biomarkers(tables, "label", layer=None, min_mean=-1)
    assert sum("library sizes" in str(warning.message) for warning in caught) == 1
    assert caught[0].filename.endswith("patients.py")  # which calls hg.tl.biomarkers
    assert len(tables[0].uns["he2gene_biomarkers"]["params"]["doubts"]) == 2


@pytest.mark.parametrize("genes", [30, 45])
def test_unchanged_genes_of_a_small_panel_have_no_effect(genes):
    tables = [counted(i, genes=genes, planted=genes // 8, shift=1.5, deeper=1.0) for i in range(5)]
    with pytest.warns(
        UserWarning, match=rf"library sizes are estimated from {genes} genes with enough counts, but 50 are needed"
    ):
        result = markers(tables, min_mean=-1)
    null = result.drop([f"g{i}" for i in range(genes // 8)])
    assert abs(null["effect_size"].median()) < 0.1
    assert (null["pvals_adj"] < 0.05).mean() < 0.1
    # Planted genes increase the total counts; the column has the true depth of the spots.
    for table in tables:
        table.obs["total"] = 3000.0
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="library sizes")
        named = markers(tables, min_mean=-1, depth="total")
    ratio = (named["effect_size"] - result["effect_size"].reindex(named.index)).to_numpy()
    assert np.ptp(ratio) < 0.25
    assert tables[0].uns["he2gene_biomarkers"]["params"]["depth"] == "total"


def test_a_warning_if_about_half_of_the_genes_change_in_one_direction():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="library sizes")
        result = markers([counted(i, genes=100, planted=25, shift=1.5, deeper=1.0) for i in range(4)])
    null = result.drop([f"g{i}" for i in range(25)], errors="ignore")
    assert abs(null["effect_size"].median()) < 0.03
    assert (null["pvals"] < 0.05).mean() < 0.12
    # With 60 % changed genes, the unchanged ones cannot be identified.
    with pytest.warns(
        UserWarning, match=r"library sizes ignore \d+% of the genes, which are lower in the group\. .* spike-ins"
    ):
        result = markers([counted(i, genes=100, planted=60, shift=1.5, deeper=1.0) for i in range(4)])
    assert result.drop([f"g{i}" for i in range(60)], errors="ignore")["effect_size"].median() < -1
    tables = [counted(i, genes=100, planted=50, shift=1.5, deeper=1.0) for i in range(4)]
    with pytest.warns(UserWarning, match=r"library sizes ignore \d+% of the genes"):
        markers(tables)
    (doubt,) = tables[0].uns["he2gene_biomarkers"]["params"]["doubts"]
    assert "library sizes ignore" in doubt


def _with_depth(i, between, genes=150):
    """A layer that depends on depth within the groups, and `between` times as much between the groups."""
    table = counted(i, genes=genes, deeper=2.0)
    depth, rng = np.log(table.X.sum(1)), np.random.default_rng((3, i))
    group = (table.obs["label"] == "a").to_numpy()
    gap = depth[group].mean() - depth[~group].mean()
    slopes = np.random.default_rng(1).normal(0.4, 0.2, genes)
    noise = rng.normal(0, 0.3, table.shape) + rng.normal(0, 0.05, genes) * group[:, None]
    seen = depth - np.log(3000) - (1 - between) * gap * group
    table.layers["guess"] = np.maximum(4 + seen[:, None] * slopes + noise, 0).astype(np.float32)
    return table


@pytest.mark.parametrize("method", ["means", "mixed"])
def test_a_warning_if_groups_do_not_follow_the_adjustment_for_depth(method):
    options = {"layer": "guess", "method": method}
    tables = [_with_depth(i, 0.0, 150 if method == "means" else 8) for i in range(4)]
    with pytest.warns(
        UserWarning, match=r"depth predicts a larger difference .* \d+%\)\. .* design=hg.Design\(depth=None\)"
    ):
        assert (markers(tables, **options)["pvals"] < 0.05).mean() > 0.3
    (doubt,) = tables[0].uns["he2gene_biomarkers"]["params"]["doubts"]
    assert doubt.startswith("'a': within groups, depth predicts")
    assert (markers(tables, **options, depth=None)["pvals"] < 0.05).mean() < 0.15
    if method == "means":
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*depth predicts")
            result = markers([_with_depth(i, 1.0) for i in range(4)], **options)
            assert (result["pvals"] < 0.05).mean() < 0.1
            # Slopes due to noise have no effect and give no warning.
            tables = [_with_depth(i, 1.0) for i in range(4)]
            for i, table in enumerate(tables):
                table.layers["guess"] = np.random.default_rng(i).normal(4, 0.5, table.shape).astype(np.float32)
            markers(tables, **options)


def test_a_warning_if_groups_follow_depth_more_than_the_spots():
    with pytest.warns(
        UserWarning, match=r"depth predicts a smaller difference .* \d{3}%\)\. .* mean over neighbouring spots"
    ):
        result = markers([_with_depth(i, 2.0) for i in range(4)], layer="guess", method="means")
    assert (result["pvals"] < 0.05).mean() > 0.3


def test_concordance_warns_once_of_a_prediction_whose_groups_do_not_follow_the_adjustment_for_depth():
    tables = [_with_depth(i, 0.0) for i in range(4)]
    with pytest.warns(UserWarning, match="`layer` 'guess', 'a': within groups, depth predicts a larger") as caught:
        hg.tl.concordance(tables, "label", groups="a", layer="guess", k=())
    assert sum("depth predicts" in str(warning.message) for warning in caught) == 1


def test_groups_of_equal_depth_give_no_warning_about_depth():
    rng = np.random.default_rng(3)
    # The adjustment is noise; by chance, its products over samples are nearly 0, so that any share of it would be found.
    adjustment = 1e-3 * rng.standard_normal((8, 100))
    followed, size = depth_followed(0.1 * rng.standard_normal((8, 100)), adjustment, np.ones(100))
    assert np.isnan([followed, size]).all()
    adjustment = np.tile(rng.standard_normal(100), (8, 1))
    followed, size = depth_followed(0.1 * rng.standard_normal((8, 100)) + 2 * adjustment, adjustment, np.ones(100))
    assert followed == pytest.approx(2, abs=0.1)
    assert size > 10


def test_a_warning_about_several_groups_has_the_remedy_of_each():
    few, more = {"doubt": "only 5%", "remedy": "Compare"}, {"doubt": "200%", "remedy": "Average"}
    doubtful = {group: Outcome(*[None] * 3, **doubt) for group, doubt in zip("abc", (few, more, few), strict=True)}
    assert _describe_doubts(doubtful) == "'a': only 5%; similarly in 'c'. Compare. 'b': 200%. Average"


@pytest.mark.parametrize(("between", "low", "high"), [(0.0, 0, 15), (1.0, None, None), (2.0, 180, 220)])
def test_one_section_is_checked_for_depth_that_the_groups_do_not_follow(between, low, high):
    table = _with_depth(0, between)
    table.obsm["spatial"] = np.random.default_rng(4).permutation(np.argwhere(np.ones((5, 13)))).astype(float)
    with warnings.catch_warnings(record=True, action="always") as caught:
        result = biomarkers([table], "label", groups="a", layer="guess", method="spatial")
    said = [str(warning.message) for warning in caught if "depth predicts a" in str(warning.message)]
    doubts = table.uns["he2gene_biomarkers"]["params"].get("doubts")
    wrong = (result["pvals"] < 0.05).mean()
    if low is None:
        assert not said
        assert doubts is None
        assert wrong < 0.07
    else:
        assert len(said) == len(doubts) == 1
        assert low <= int(re.search(r"predicted: (\d+)%", said[0])[1]) <= high
        assert wrong > 0.3


def test_sums_of_a_lazy_table_read_each_chunk_once():
    import dask.array as da

    from he2gene_sc._core.spots import read_spots

    read = []
    table = counted(0, n=(900, 300), genes=20)
    dense, code = table.X, (table.obs["label"] == "b").to_numpy(int)
    expected = np.array([dense[code == i].sum(0) for i in (0, 1)])
    table.X = da.from_array(dense, chunks=(600, 20)).map_blocks(
        lambda block: (read.append(len(block)), block)[1], dtype=dense.dtype, meta=dense[:0]
    )
    spots = read_spots(table, "label", "groupby", layer=None)
    spots = dataclasses.replace(spots, genes=table.var_names)
    read.clear()
    (counts, _, _), _ = spots.count_sums(code, 2)
    np.testing.assert_allclose(counts, expected)
    assert read == [600, 600]


def test_the_unit_of_a_covariate_does_not_matter():
    tables = [counted(i, genes=60) for i in range(6)]
    results = []
    for unit in (1.0, 1e7, 1e-7):
        for i, table in enumerate(tables):
            noise = np.random.default_rng(i).normal(size=table.n_obs)
            table.obs["area"] = unit * (0.5 + 0.1 * noise + 0.1 * i * (table.obs["label"] == "a"))
        results.append(markers(tables, covariates="area"))
        slope = markers(tables, covariates="area", term="Q('area')")["effect_size"]
        results[-1]["slope"] = slope.reindex(results[-1].index) * unit
    for other in results[1:]:
        pd.testing.assert_frame_equal(results[0], other.reindex(results[0].index), rtol=1e-6)
    for value in (20345.7, 1.7e9, 0.37):
        for i, table in enumerate(tables):
            table.obs["area"] = value * (1 + 0.01 * i)
        with pytest.raises(ValueError, match="`covariates`: 'area' is constant within samples"):
            markers(tables, covariates="area")
    tables[0].obs.loc[tables[0].obs_names[3], "area"] = np.inf
    with pytest.raises(ValueError, match="`covariates` 'area' is infinite in 1 spots"):
        markers(tables, covariates="area")
    tables[0].obs["area"] = np.arange(tables[0].n_obs) % 2 == 0
    with pytest.raises(ValueError, match="`covariates` 'area' has several values within sample 'P0'"):
        markers(tables, covariates="area")


def test_n_samples_counts_the_samples_in_which_a_gene_is_tested():
    tables = [counted(i, genes=80) for i in range(6)]
    for table in tables[2:]:
        table.X[:, 0] = 0
    result = markers([*tables[:5], tables[5][:, :79].copy()], min_mean=-1, join="outer")
    assert result.loc["g0", ["n_samples", "n_spots", "n_spots_reference"]].tolist() == [2, 80, 50]
    assert result.loc["g79", "n_samples"] == 5
    assert (result["n_samples"].drop(["g0", "g79"]) == 6).all()


# ----------------------------------------------------------------------------------------------- means, depth


def _predicted(i, genes=300, deeper=2.0):
    """Logarithms that depend only on the depth of the spot; group "a" is deeper."""
    table = counted(i, deeper=deeper, genes=genes)
    rng = np.random.default_rng(i)
    depth = np.log(table.X.sum(1))
    slope = np.random.default_rng(1).uniform(0.2, 1, genes)
    noise = 0.5 * rng.standard_normal(table.shape)
    table.layers["log"] = (5 + (depth - 8)[:, None] * slope + noise).astype(np.float32)
    return table


def test_predicted_layers_are_adjusted_for_depth_or_give_a_warning():
    tables = [_predicted(i) for i in range(8)]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*depth of the spots")
        result = markers(tables, layer="log")
    assert 0.02 < (result["pvals"] < 0.05).mean() < 0.09
    assert 0.4 < (result["effect_size"] > 0).mean() < 0.6
    with pytest.warns(UserWarning, match="not adjusted for the depth of the spots"):
        raw = markers(tables, layer="log", depth=None)
    assert (raw["pvals"] < 0.05).mean() > 0.9
    for table in tables:
        table.obs["total"] = table.X.sum(1)
        table.X = np.zeros_like(table.X)
    named = markers(tables, layer="log", depth="total")
    np.testing.assert_allclose(named["pvals"], result["pvals"].reindex(named.index), rtol=1e-4)
    tables[0].obs["total"] = 0.0
    with pytest.raises(ValueError, match="`depth` 'total' is not a number above 0"):
        markers(tables, layer="log", depth="total")


def test_depth_is_known_with_few_spots_without_counts():
    tables = [_predicted(i) for i in range(8)]
    for table in tables:
        table.X[:2] = 0
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*depth of the spots")
        result = markers(tables, layer="log")
    assert 0.02 < (result["pvals"] < 0.05).mean() < 0.09
    for table in tables:
        table.X[: len(table) // 10] = 0
    with pytest.warns(UserWarning, match="not adjusted for the depth of the spots"):
        markers(tables, layer="log")


@pytest.mark.slow
def test_the_mixed_model_is_adjusted_for_depth():
    tables = [_predicted(i, genes=40) for i in range(5)]
    # One patient has only one group, and few spots.
    tables.append(_predicted(5, genes=40)[:5].copy())
    result, raw = (markers(tables, layer="log", method="mixed", depth=depth) for depth in ("auto", None))
    assert (raw["pvals"] < 0.05).mean() > 0.8
    assert (result["pvals"] < 0.05).mean() < 0.15
    assert 0.25 < (result["effect_size"] > 0).mean() < 0.75


def test_one_section_is_adjusted_for_depth_and_covariates():
    table = counted(0, n=(40, 30), genes=100)
    table.obsm["spatial"] = np.random.default_rng(0).permutation(table.obsm["spatial"])
    table.obs["log_total"] = np.log(table.X.sum(1))
    results = []
    for options in ({}, {"depth": None, "covariates": "log_total"}, {"depth": None}):
        with warnings.catch_warnings(record=True, action="always") as caught:
            biomarkers(table, "label", groups="a", layer=None, method="spatial", **options)
        without = "depth" in options
        assert any("not adjusted for the depth of the spots" in str(w.message) for w in caught) == without
        results.append(hg.get.biomarkers(table).set_index("names"))
    auto, named, raw = results
    assert (auto["pvals"] < 0.05).mean() < 0.06
    assert (raw["effect_size"] > 0).mean() > 0.7
    assert 0.35 < (auto["effect_size"] > 0).mean() < 0.65
    np.testing.assert_allclose(named["pvals"], auto["pvals"].reindex(named.index), rtol=1e-5)
    table.obs["batch"] = table.obs["label"]
    with pytest.raises(ValueError, match="separate the group from the reference"):
        markers(table, method="spatial", covariates="batch")
    table.obs.loc[table.obs_names[:2], "batch"] = None
    with pytest.raises(ValueError, match="`covariates` 'batch' has missing values in 2 spots"):
        markers(table, method="spatial", covariates="batch")


def test_cross_fitted_labels_do_not_depend_on_depth():
    # The groups differ only in depth.
    tables = [_predicted(i, genes=60, deeper=6.0) for i in range(4)]
    options = {"layer": "log", "cross_fit": True, "measured": "log"}
    with pytest.raises(ValueError, match="`cross_fit`: its labels agree"):
        markers(tables, **options)
    markers(tables, depth=None, **options)
    assert tables[0].uns["he2gene_biomarkers"]["params"]["cross_fit_agreement"] > 0.9


def test_effect_and_fold_change_have_the_same_sign_for_any_group_sizes():
    rng = np.random.default_rng(0)
    tables = []
    for i, (level, n) in enumerate(((3, (5, 80)), (3, (6, 80)), (1, (80, 6)), (1, (80, 5)))):
        table = counted(i, n=n, genes=20)
        inside = (table.obs["label"] == "a").to_numpy()[:, None]
        table.layers["log"] = (level + 0.3 * inside + 0.1 * rng.standard_normal(table.shape)).astype(np.float32)
        tables.append(table)
    with pytest.warns(UserWarning, match="depth"):
        result = markers(tables, layer="log", depth=None)
    assert (result["effect_size"] > 0).all()
    assert (result["logfoldchanges"] > 0).all()
    assert (result["logfoldchanges_pooled"] < 0).all()


# ----------------------------------------------------------------------------------------------- arrays


def test_library_factors_are_estimated_from_unchanged_genes():
    rng = np.random.default_rng(0)
    share = rng.lognormal(0, 1, 1000)
    changed = share.copy()
    changed[:50] *= 20
    rates = np.array([changed / changed.sum(), share / share.sum()])
    depth = np.array([[4e6, 1e6], [1e6, 4e6]])
    counts = rng.poisson(depth[..., None] * rates[:, None])
    factors = library_factors(counts, depth)
    np.testing.assert_allclose(factors.prod(0), 1)
    np.testing.assert_allclose(factors[0] / factors[1], share.sum() / changed.sum(), rtol=0.05)


@pytest.mark.parametrize("genes", [40, 100, 1000])
def test_library_factors_ignore_genes_that_change_in_one_direction(genes):
    rng = np.random.default_rng(0)
    share = np.tile(rng.lognormal(0, 1, genes), (2, 4, 1)) * np.exp(0.1 * rng.standard_normal((2, 4, genes)))
    share[0, :, : 2 * genes // 5] *= 2
    share /= share.sum(-1, keepdims=True)
    counts = rng.poisson(2e5 * share) + 1
    factors = library_factors(counts, np.full((2, 4), 2e5))
    effects = np.log(counts[0] / counts[1]) - np.log(factors[0] / factors[1])[:, None]
    assert abs(np.median(effects[:, 2 * genes // 5 :].mean(0))) < 0.05


@pytest.mark.parametrize(("changed", "shift"), [(0.4, 0.3), (0.35, 0.2)])
def test_library_factors_ignore_genes_with_small_changes(changed, shift):
    # With small shifts, the densest half contains most of the other genes. With its SD, changed genes counted as near (-0.08, -0.06).
    rng = np.random.default_rng(0)
    share = np.tile(rng.lognormal(0, 1.2, 1000), (2, 8, 1)) * np.exp(0.1 * rng.standard_normal((2, 8, 1000)))
    higher = np.arange(1000) < changed * 1000
    share[0, :, higher] *= np.exp(shift)
    share /= share.sum(-1, keepdims=True)
    counts = rng.poisson(3e5 * share)
    factors = library_factors(counts, np.full((2, 8), 3e5))
    effects = np.log((counts[0] + 0.5) / (counts[1] + 0.5)) - np.log(factors[0] / factors[1])[:, None]
    assert abs(np.median(effects[:, ~higher].mean(0))) < 0.03


@pytest.mark.parametrize("shift", [0.5, 1.0])
def test_library_sizes_are_doubtful_if_half_of_the_genes_change(shift):
    rng = np.random.default_rng(0)
    share = np.tile(rng.lognormal(0, 1.2, 400), (2, 6, 1)) * np.exp(0.1 * rng.standard_normal((2, 6, 400)))
    share[0, :, :200] *= np.exp(shift)
    share /= share.sum(-1, keepdims=True)
    depth = np.full((2, 6), 3e5)
    assert abs(library_evidence(rng.poisson(3e5 * share), depth)[1]) > 0.4


def test_variance_components_are_recovered():
    rng = np.random.default_rng(1)
    sampling = rng.lognormal(-2, 1, (8, 3000))
    d = rng.standard_normal(sampling.shape) * np.sqrt(0.1 + 1.5 * sampling)
    between, factor = variance_components(d, sampling)
    assert between == pytest.approx(0.1, rel=0.2)
    assert factor == pytest.approx(1.5, rel=0.2)


def test_differences_of_counts_have_the_reported_variance():
    rng = np.random.default_rng(2)
    depth = np.array([[4e4] * 6, [1e4] * 6])
    share = np.full(2000, 1 / 2000)
    counts = rng.poisson(np.tile(depth[..., None] * share, 1)).astype(float)
    spots = np.full((2, 6), 10)
    per_spot = depth / 10
    sums = CountSums(counts, counts + counts**2 / 10, counts * per_spot[..., None], spots, depth, per_spot**2 * 10)
    found = count_differences(sums)
    assert np.square(found.differences).mean() == pytest.approx(found.variances.mean(), rel=0.1)
    assert abs(found.differences.mean()) < 0.02


def test_samples_with_few_counts_have_the_reported_variance():
    """Four samples with 400 counts per gene and group, two with 2 counts, whose variance determines the error."""
    rng = np.random.default_rng(3)
    depth = np.tile(np.array([8e5] * 4 + [4e3] * 2), (2, 1))
    counts = rng.poisson(np.repeat(depth[..., None] / 2000, 2000, axis=-1)).astype(float)
    spots, per_spot = np.full((2, 6), 10), depth / 10
    sums = CountSums(counts, counts + counts**2 / 10, counts * per_spot[..., None], spots, depth, per_spot**2 * 10)
    found = count_differences(sums, normalise=False)
    known = np.isfinite(found.variances)
    ratio = np.where(known, np.square(found.differences) / found.variances, np.nan)
    np.testing.assert_allclose(np.nanmean(ratio, axis=1), 1, atol=0.15)


def test_weighted_fits_equal_statsmodels():
    import statsmodels.api as sm

    rng = np.random.default_rng(3)
    y, design = rng.normal(size=(7, 4)), np.column_stack([np.ones(7), rng.normal(size=7)])
    weights = rng.gamma(2, 1, (7, 4))
    effect, unscaled, variances, df = weighted_fit(y, design, 1, weights)
    for j in range(4):
        fit = sm.WLS(y[:, j], design, weights=weights[:, j]).fit()
        assert effect[j] == pytest.approx(fit.params[1])
        assert unscaled[j] * np.sqrt(variances[j]) == pytest.approx(fit.bse[1])
    assert (df == 5).all()


def test_hypervariable_genes_have_a_separate_prior():
    rng = np.random.default_rng(4)
    wild = np.arange(6000) < 300
    d = rng.standard_normal((4, 6000)) * np.where(wild, 5, 1)
    plain, robust = (paired_moderated_t(d, robust=choice).pvalues for choice in (False, True))
    assert 0.04 < (robust < 0.05).mean() < 0.06
    assert (robust[wild] < 0.001).mean() < 0.5 * (plain[wild] < 0.001).mean()
    variances = d.var(0, ddof=1)
    _, scale, d0 = squeeze_variance(variances, 3.0)
    prior = hypervariable_prior(variances, np.full(6000, 3.0), np.full(6000, scale), d0)
    assert prior.factor == pytest.approx(25, rel=0.4)
    assert prior.outlier[wild].mean() > 0.5 > 0.05 > prior.outlier[~wild].mean()


@pytest.mark.parametrize("genes", [40, 200])
def test_hypervariable_genes_of_a_small_panel_are_false_discoveries_less_often(genes):
    false = []
    for seed in range(60):
        rng = np.random.default_rng((genes, seed))
        d = rng.standard_normal((3, genes)) * np.where(rng.random(genes) < 0.05, 5, 1)
        tests = [paired_moderated_t(d, robust=robust) for robust in (False, True)]
        false.append([(false_discovery_control(test.pvalues) < 0.05).any() for test in tests])
    plain, robust = np.mean(false, axis=0)
    assert robust <= 0.1 < plain


def test_genes_of_one_kind_have_a_common_prior():
    d = np.random.default_rng(5).normal(size=(6, 2000)) / np.sqrt(np.random.default_rng(6).gamma(4, 0.25, 2000))
    one, other = paired_moderated_t(d), paired_moderated_t(d, robust=True)
    np.testing.assert_array_equal(one.pvalues, other.pvalues)


def test_intervals_of_two_kinds_agree_with_their_p_values():
    rng = np.random.default_rng(7)
    d = rng.standard_normal((4, 3000)) * np.where(np.arange(3000) < 150, 6, 1) + 1
    test = paired_moderated_t(d, robust=True, level=0.95)
    np.testing.assert_array_equal((test.ci_low > 0) | (test.ci_high < 0), test.pvalues < 0.05)
