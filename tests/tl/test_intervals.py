"""``hg.tl.intervals``, and the plots of coverage and of predictability."""

from dataclasses import replace

import numpy as np
import pytest

import he2gene_sc as hg
from he2gene_sc.stats import LEVELS, half_scores, log_normalise, spread_of
from he2gene_sc.training._calibrate import calibrate
from tests.helpers.toy_sections import toy, train


@pytest.fixture(scope="module")
def model():
    """Return a model of three sections of one patient, which gives no guarantee."""
    return train([toy(i, shape=(7, 7)) for i in range(3)], n_target_genes=12)


@pytest.fixture(scope="module")
def slide(model):
    """Read only."""
    return _predicted(model)


def _predicted(model):
    sdata = toy(7, shape=(8, 8))
    hg.tl.predict(sdata, model=model, device="cpu")
    return sdata


@pytest.fixture
def table(slide):
    return slide["table"].copy()


def run(table, model, **options):
    hg.tl.intervals(table, model=model, **options)
    return table.layers["he2gene_lower"], table.layers["he2gene_upper"]


def test_the_prediction_is_inside_and_the_lower_end_is_not_negative(table, model):
    low, high = run(table, model)
    predicted = table.layers["he2gene"]
    assert (low <= predicted).all()
    assert (predicted <= high).all()
    assert low.min() == 0
    assert low.dtype == high.dtype == np.float32


def test_more_coverage_is_wider(table, model):
    narrow = run(table, model, coverage=0.5)[1].copy()
    wide = run(table, model, coverage=0.95)[1]
    assert (wide >= narrow).all()
    assert wide.mean() > narrow.mean()


def test_ends_are_the_prediction_plus_or_minus_score_times_spread(table, model):
    low, high = run(table, model, by=None)
    score, _ = half_scores(model.tensors["intervals.quantiles"][0], model.tensors["intervals.groups"][0], 0.9)
    positions = model.genes.index.get_indexer(table.var_names)
    predicted = table.layers["he2gene"]
    half = score[positions] * spread_of(predicted, model.tensors["intervals.spread"][:, positions])
    np.testing.assert_allclose(high, predicted + half, rtol=1e-5)
    np.testing.assert_allclose(low, np.maximum(predicted - half, 0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(table.var["he2gene_halfwidth"], np.median(half, axis=0), rtol=1e-4)


def test_rarely_detected_genes_are_marked_with_a_warning(table, model):
    assert (model.genes["detected"] > 0.2).all()
    run(table, model)
    assert not table.var["he2gene_rarely_detected"].any()
    genes = model.genes.assign(detected=np.where(np.arange(len(model.genes)) % 3 == 0, 0.19, 0.21))
    seldom = replace(model, genes=genes)
    with pytest.warns(UserWarning, match=r"detected in fewer than 20% of the training spots: .* 'not detected'"):
        run(table, seldom)
    marked = set(table.var_names[table.var["he2gene_rarely_detected"]])
    assert marked == set(genes.index[genes["detected"] < 0.2]) & set(table.var_names)
    run(table, replace(model, genes=genes.drop(columns="detected")))
    assert "he2gene_rarely_detected" not in table.var


def test_a_class_with_enough_spots_has_its_own_quantiles(table, model):
    told = table.copy()
    run(table, model, by=None)
    run(told, model)
    classes = told.uns["he2gene_intervals"]["classes"]
    assert 0 < len(classes) < len(model.card.classes)
    own = told.obs["he2gene_annotation"].isin(classes).to_numpy()
    same = (told.layers["he2gene_upper"] == table.layers["he2gene_upper"]).all(1)
    assert same[~own].all()
    assert not same[own].any()


def test_intervals_have_about_the_nominal_coverage_on_another_section(table, model):
    low, high = run(table, model)
    truth = log_normalise(table.X)
    assert 0.82 <= ((truth >= low) & (truth <= high)).mean() <= 0.97


def test_three_sections_give_no_guarantee(table, model):
    with pytest.warns(UserWarning, match="coverage of 90% is not guaranteed: the residuals are of 3 sections, 9"):
        run(table, model)
    facts = table.uns["he2gene_intervals"]
    assert (facts["guarantee"], facts["unit"], facts["n_groups"], facts["n_groups_needed"]) == ("none", "section", 3, 9)
    run(table, model, coverage=0.5)
    assert table.uns["he2gene_intervals"]["guarantee"] == "none"


def test_ten_groups_give_the_guarantee_up_to_their_maximum_coverage(table, model):
    """The groups of the quantiles are counted for each gene and class."""
    groups = np.where(model.tensors["intervals.groups"] > 0, 10, 0).astype(np.int16)
    more = replace(
        model,
        tensors=model.tensors | {"intervals.groups": groups},
        card=replace(model.card, intervals=model.card.intervals | {"n_groups": 10}),
    )
    run(table, more)
    assert table.uns["he2gene_intervals"]["guarantee"] == "hierarchical"
    run(table, more, coverage=0.95)
    facts = table.uns["he2gene_intervals"]
    assert (facts["guarantee"], facts["n_groups_needed"]) == ("none", 19)


def test_the_order_of_the_spots_does_not_matter(table, model):
    shuffled = table[np.random.default_rng(0).permutation(table.n_obs)].copy()
    run(table, model)
    run(shuffled, model)
    np.testing.assert_array_equal(shuffled.to_df("he2gene_upper").loc[table.obs_names], table.to_df("he2gene_upper"))


def test_spots_outside_the_image_and_unknown_genes_stay_nan(table, model):
    table.layers["he2gene"][3] = np.nan
    table.layers["he2gene"][:, 5] = np.nan
    table.var.iloc[5, table.var.columns.get_loc("he2gene_predicted")] = False
    low, high = run(table, model)
    for end in (low, high):
        assert np.isnan(end[3]).all()
        assert np.isnan(end[:, 5]).all()
        assert np.isfinite(np.delete(np.delete(end, 3, 0), 5, 1)).all()


def test_results_are_kept_in_a_store_and_replaced_by_a_second_run(slide, model, tmp_path):
    import anndata as ad

    table = slide["table"].copy()
    run(table, model)
    table.write_zarr(tmp_path / "t.zarr")
    read = ad.read_zarr(tmp_path / "t.zarr")
    np.testing.assert_array_equal(read.layers["he2gene_upper"], table.layers["he2gene_upper"])
    hg.tl.intervals(read, coverage=0.8, model=model)
    assert read.uns["he2gene_intervals"]["params"]["coverage"] == 0.8


def test_above_the_memory_limit_only_half_widths_are_written(table, model, monkeypatch):
    monkeypatch.setattr(hg.settings, "memory_limit", 100)
    with pytest.warns(UserWarning, match=r"two layers need 0\.0195 MiB, more than hg\.settings\.memory_limit"):
        hg.tl.intervals(table, model=model)
    assert "he2gene_lower" not in table.layers
    assert (table.var["he2gene_halfwidth"] > 0).all()


def test_a_lazy_layer_has_the_same_intervals_as_a_dense_layer(table, model, monkeypatch):
    import dask.array as da

    from he2gene_sc._core import lazy, signatures

    expected, read, compute = run(table, model), [], da.Array.compute
    table.layers["he2gene"] = da.from_array(table.layers["he2gene"], chunks=(16, 4))
    monkeypatch.setattr(lazy, "_GENES", (4, 4))
    monkeypatch.setattr(signatures, "_BLOCK", 16 * table.n_vars)
    monkeypatch.setattr(da.Array, "compute", lambda self, **kwargs: read.append(self.size) or compute(self, **kwargs))
    for one, other in zip(run(table, model), expected, strict=True):
        np.testing.assert_array_equal(one, other)
    assert max(read) <= table.n_obs * table.n_vars // 4


def test_an_adapted_layer_has_intervals_from_its_own_residuals(table, model):
    table.layers["he2gene_adapted"] = table.layers["he2gene"] + 0.1
    quantiles = np.tile(np.array([-0.3, -0.1, 0.0, 0.2, 0.6])[:, None], (1, table.n_vars)).astype(np.float32)
    quantiles[:, 0] = np.nan
    table.uns["he2gene_adapted"] = {
        "verb": "adapt",
        "residual_levels": np.array([0.01, 0.05, 0.5, 0.95, 0.99]),
        "residual_quantiles": quantiles,
        "guarantee": "none: cross-validated on the measured spots",
    }
    hg.tl.intervals(table, layer="he2gene_adapted", coverage=0.9)
    low, high = (table.layers[f"he2gene_adapted_{end}"] for end in ("lower", "upper"))
    adapted = table.layers["he2gene_adapted"][:, 1:]
    np.testing.assert_allclose(low[:, 1:], np.maximum(adapted - 0.1, 0), atol=1e-6)
    np.testing.assert_allclose(high[:, 1:], adapted + 0.2, atol=1e-6)
    assert np.isnan(high[:, 0]).all()
    with pytest.raises(ValueError, match=r"`by` is 'level', but an adapted layer .* use by=None"):
        hg.tl.intervals(table, layer="he2gene_adapted", by="level")
    with pytest.warns(UserWarning, match="`by` is 'detected', but an adapted layer has no residuals of the spots"):
        hg.tl.intervals(table, layer="he2gene_adapted", by="detected")
    assert table.uns["he2gene_adapted_intervals"]["by"] == "none"
    with pytest.raises(ValueError, match=r"`coverage` is 0\.99.*allow up to 0\.98"):
        hg.tl.intervals(table, layer="he2gene_adapted", coverage=0.99)


def test_an_adapted_layer_with_few_measured_spots_has_intervals_that_cover_the_others(model):
    """Quantiles that need more spots than were measured are infinite, which does not affect narrower intervals."""
    sdata = toy(7, shape=(12, 12))
    hg.tl.predict(sdata, model=model, device="cpu")
    table = sdata["table"]
    mask = np.random.default_rng(0).random(table.n_obs) < 0.3
    hg.tl.adapt(table, mask)
    assert np.isinf(table.uns["he2gene_adapted"]["residual_quantiles"][0]).all()
    hg.tl.intervals(table, layer="he2gene_adapted", coverage=0.9)
    low, high = (table.layers[f"he2gene_adapted_{end}"] for end in ("lower", "upper"))
    assert np.isfinite(low).all()
    assert np.isfinite(high).all()
    truth = log_normalise(table.X)[~mask]
    assert 0.84 <= ((truth >= low[~mask]) & (truth <= high[~mask])).mean() <= 0.97
    seldom = (log_normalise(table.X)[mask] > 0).mean(0) < 0.2
    assert table.var["he2gene_adapted_rarely_detected"].to_numpy().tolist() == seldom.tolist()
    with pytest.raises(ValueError, match=r"0\.98 needs 99 measured spots; 40 of 40 adapted genes .*0\.95 or less"):
        hg.tl.intervals(table, layer="he2gene_adapted", coverage=0.98)


def test_a_gene_with_too_few_spots_has_no_interval_with_a_warning(table):
    table.layers["he2gene_adapted"] = table.layers["he2gene"] + 0.1
    quantiles = np.tile(np.array([-0.3, -0.1, 0.0, 0.2, 0.6])[:, None], (1, table.n_vars)).astype(np.float32)
    quantiles[:2, 1], quantiles[3:, 1] = -np.inf, np.inf
    table.uns["he2gene_adapted"] = {
        "verb": "adapt",
        "residual_levels": np.array([0.01, 0.05, 0.5, 0.95, 0.99]),
        "residual_quantiles": quantiles,
    }
    with pytest.warns(UserWarning, match="0.9 needs 19 measured spots; 1 of 40"):
        hg.tl.intervals(table, layer="he2gene_adapted", coverage=0.9)
    assert np.isnan(table.layers["he2gene_adapted_upper"]).all(0).tolist() == [i == 1 for i in range(table.n_vars)]


@pytest.mark.data
@pytest.mark.slow
def test_intervals_of_adapted_tissue_have_about_the_nominal_coverage(predicted_c5):
    table = predicted_c5["table"]
    truth = log_normalise(table.X)
    mask = np.random.default_rng(0).random(table.n_obs) < 0.3
    hg.tl.adapt(table, mask)
    hg.tl.intervals(table, layer="he2gene_adapted", coverage=0.9)
    low, high = (table.layers[f"he2gene_adapted_{end}"][~mask] for end in ("lower", "upper"))
    known = np.isfinite(high).all(0)
    assert known.sum() > 10_000
    assert 0.85 <= ((truth[~mask] >= low) & (truth[~mask] <= high))[:, known].mean() <= 0.97


def test_by_detected_covers_spots_that_express_a_gene(table, model):
    columns = np.flatnonzero(table.var["he2gene_predicted"])
    truth = log_normalise(table.X)[:, columns]
    # A gene detected in one of five spots, far above the prediction.
    rare = columns[0]
    tensors = {name: values.copy() for name, values in model.tensors.items()}
    position = model.genes.index.get_loc(table.var_names[rare])
    tensors["intervals.detected"][:, position] *= 3
    rarely = replace(model, tensors=tensors)
    own, plain, wide = (run(table, m, by=by) for m, by in ((model, "detected"), (rarely, None), (rarely, "detected")))
    assert table.uns["he2gene_intervals"]["by"] == "detected"
    assert (wide[1] >= plain[1])[:, columns].all()
    assert (wide[1] > own[1])[:, rare].all()
    np.testing.assert_array_equal(np.delete(wide[1], rare, axis=1), np.delete(own[1], rare, axis=1))
    inside = (truth >= wide[0][:, columns]) & (truth <= wide[1][:, columns])
    assert inside[truth > 0].mean() > 0.85


def test_residuals_of_expressing_spots_are_stored_beside_those_of_all_spots():
    rng = np.random.default_rng(0)
    shown = rng.random((4000, 3)) < [0.1, 0.5, 1]
    measured = np.where(shown, 2 + rng.gamma(4, 0.25, shown.shape), 0)
    predicted = np.broadcast_to(shown.mean(0) * 3, shown.shape)
    groups = np.repeat([0, 1], 2000)
    kept = calibrate(predicted, measured, groups, np.full(4000, -1), 0)
    at = list(LEVELS).index(0.9)
    scores = np.abs(measured - predicted) / spread_of(predicted, kept.spread)
    inside = scores <= kept.detected[at]
    np.testing.assert_allclose([inside[shown[:, g], g].mean() for g in range(3)], 0.9, atol=0.01)
    of_all = scores <= kept.quantiles[0, at]
    assert of_all[shown[:, 0], 0].mean() < 0.2
    np.testing.assert_array_equal(kept.detected[:, 2], kept.quantiles[0, :, 2])
    assert kept.detected_groups.tolist() == [2, 2, 2]


@pytest.mark.parametrize("by", ["detected", "level"])
def test_a_model_without_residuals_by_detection_or_level_tells_how_to_get_them(table, model, by):
    older = replace(model, tensors={name: values for name, values in model.tensors.items() if by not in name})
    with pytest.raises(ValueError, match=rf"`by` is '{by}', but model 'my-model' has no residuals.*hg\.tl\.train"):
        hg.tl.intervals(table, model=older, by=by)


def test_a_trained_model_has_intervals_by_level(table, model, monkeypatch):
    narrow = run(table, model, by="level", coverage=0.5)[1].copy()
    low, high = run(table, model, by="level")
    assert table.uns["he2gene_intervals"]["by"] == "level"
    known = np.isfinite(high)
    assert known.any(0).sum() == table.var["he2gene_predicted"].sum()
    assert (high >= narrow)[known].all()
    truth = log_normalise(table.X)
    assert 0.82 <= ((truth >= low) & (truth <= high))[known].mean() <= 0.99
    found = hg.get.coverage(table)
    thirds = found[found["detected"].eq("all") & ~found["depth"].eq("all")]
    assert thirds["n_spots"].sum() == table.n_obs
    whole = found[found["detected"].eq("all") & found["depth"].eq("all")].iloc[0]
    assert whole["coverage"] == pytest.approx(((truth >= low) & (truth <= high))[known].mean())
    monkeypatch.setattr(hg.settings, "memory_limit", 100)
    with pytest.warns(UserWarning, match="memory_limit"):
        hg.tl.intervals(table, model=model)
    with pytest.raises(ValueError, match=r"`data` has no layers \['he2gene_lower', 'he2gene_upper'\]"):
        hg.get.coverage(table)


@pytest.mark.parametrize("coverage", [0, 1, -0.1, 1.5, 90, float("nan"), "0.9", True, None])
def test_a_coverage_that_is_not_between_0_and_1_raises(table, coverage):
    with pytest.raises(ValueError, match="`coverage` is .*(above 0 and below 1|a number is needed)"):
        hg.tl.intervals(table, coverage=coverage)


def test_a_coverage_beyond_the_stored_quantiles_raises(table, model):
    with pytest.raises(ValueError, match=r"`coverage` is 0\.995.*0\.1 to 0\.98"):
        hg.tl.intervals(table, coverage=0.995, model=model)
    assert "he2gene_intervals" not in table.uns


def test_a_model_without_residuals_tells_how_to_get_them(toy, tiny_model):
    hg.tl.predict(toy, model=tiny_model)
    with pytest.raises(
        ValueError, match=r"no calibration residuals; train it with hg\.tl\.train.*two or more sections"
    ):
        hg.tl.intervals(toy, model=tiny_model)


def test_a_model_that_is_not_bundled_has_to_be_given(table):
    with pytest.raises(ValueError, match="`model`: the prediction was made by 'my-model'.*pass its folder"):
        hg.tl.intervals(table)


def test_another_model_than_that_of_the_prediction_raises(table):
    with pytest.raises(ValueError, match="the prediction was made by"):
        hg.tl.intervals(table, model="breast-her2st")


def test_by_must_be_a_valid_grouping(table, model):
    with pytest.raises(ValueError, match="`by` is 'pathologist', valid"):
        hg.tl.intervals(table, model=model, by="pathologist")


def test_a_layer_without_known_residuals_raises(table, model):
    table.layers["mine"] = table.layers["he2gene"].copy()
    with pytest.raises(ValueError, match="`layer` 'mine' was written neither"):
        hg.tl.intervals(table, layer="mine", model=model)
    table.layers["he2gene_lower"] = table.layers["he2gene"].copy()
    with pytest.raises(ValueError, match="not written by hg.tl.intervals"):
        hg.tl.intervals(table, model=model)


# Plots


def test_calibration_draws_the_coverage_of_the_intervals(table, model):
    ax = hg.pl.calibration(table, coverages=(0.5, 0.9), model=model)
    (line,) = [line for line in ax.lines if "mean over" in line.get_label()]
    truth = log_normalise(table.X)
    for coverage, found in zip(*line.get_data(), strict=True):
        low, high = run(table, model, coverage=coverage)
        assert found == pytest.approx(((truth >= low) & (truth <= high)).mean(), abs=1e-6)


def test_calibration_draws_the_reliability_of_the_annotation(table, model):
    from he2gene_sc.training._figures import calibration_error

    axes = hg.pl.calibration(table, model=model, annotation_key="annotation")
    proba = table.obsm["he2gene_annotation_proba"]
    codes = proba.columns.get_indexer(table.obs["annotation"].astype(str))
    expected = calibration_error(proba.to_numpy(), codes)
    assert axes[1].get_title().endswith(f"calibration error {expected:.3f}")
    counts = [int(text.get_text()) for text in axes[1].texts]
    assert sum(counts) == (codes >= 0).sum()
    x, y = axes[1].collections[0].get_offsets().T
    assert len(counts) == len(x)
    assert ((x > 0) & (x <= 1) & (y >= 0) & (y <= 1)).all()


def test_calibration_needs_counts_and_labels_of_the_model(table, model):
    with pytest.raises(ValueError, match="has no label that is a class of the model"):
        hg.pl.calibration(table, model=model, annotation_key="section")
    table.X = np.log1p(table.X.toarray())
    with pytest.raises(ValueError, match="`measured`: X looks like log-transformed values"):
        hg.pl.calibration(table, model=model)


def test_predictability_ranks_every_gene_by_its_held_out_correlation(model):
    ax = hg.pl.predictability(model, genes=2)
    points = np.concatenate([c.get_offsets() for c in ax.collections if "reliable (" in str(c.get_label())])
    points = points[np.argsort(points[:, 0])]
    np.testing.assert_allclose(points[:, 1], model.genes["pcc"].sort_values(ascending=False), atol=1e-6)
    best = model.genes["pcc"].sort_values(ascending=False, kind="stable").index[:2]
    assert [text.get_text() for text in ax.texts] == list(best)
    legend = {text.get_text() for text in ax.get_legend().get_texts()}
    assert "noise ceiling" in legend
    assert any(text.startswith("95 % interval over ") and text.endswith(" of known patients") for text in legend)


def test_predictability_labels_chosen_genes_and_raises_for_unknown_genes(model):
    gene = model.genes.index[3]
    (text,) = hg.pl.predictability(model, genes=[gene]).texts
    assert (text.get_text(), text.xy[1]) == (gene, model.genes["pcc"].iloc[3])
    with pytest.raises(ValueError, match=r"`genes` \['NOTHING'\]"):
        hg.pl.predictability(model, genes=["NOTHING"])


def test_predictability_raises_for_a_model_without_held_out_metrics(model):
    unknown = replace(model, genes=model.genes.assign(pcc=np.nan))
    with pytest.raises(ValueError, match="no held-out metrics"):
        hg.pl.predictability(unknown)


def test_predictability_of_an_object_shows_the_genes_that_were_predicted():
    sdata = hg.datasets.toy((4, 4))
    hg.tl.predict(sdata, genes=["ERBB2", "CD24", "COL1A1"])
    ax = hg.pl.predictability(sdata, genes=["CD24"])
    assert sum(len(c.get_offsets()) for c in ax.collections if "reliable (" in str(c.get_label())) == 3


def test_levels_rise_to_the_largest_score():
    assert (np.diff(LEVELS) > 0).all()
    assert LEVELS[-1] == 1


def test_a_layer_that_was_changed_raises(table, model):
    layer = table.layers["he2gene"]
    layer += 1
    with pytest.warns(UserWarning, match="`layer` 'he2gene' was changed since hg.tl.predict wrote it"):
        run(table, model)
    layer[:] = np.nan
    with pytest.raises(ValueError, match="`layer` 'he2gene' is NaN for every gene and spot"):
        run(table, model)
