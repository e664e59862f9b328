"""Intervals around a layer of any model, calibrated on slides of other patients."""

import json
import warnings
from dataclasses import fields, replace

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData

import he2gene_sc as hg
from he2gene_sc.stats import fit_spread, grouped_quantiles, half_scores, log_normalise, spread_of
from he2gene_sc.training._calibrate import Calibration as Residuals


def cohort(n_patients, seed, *, n_spots=12, n_genes=300):
    """Return predicted and measured logarithms; predictions have errors of level and scale by patient, and errors by spot."""
    rng = np.random.default_rng(seed)
    patient = np.repeat(np.arange(n_patients), n_spots)
    n = len(patient)
    truth = 2.8 + rng.normal(0, 0.7, (n, n_genes))
    level = rng.normal(0, 0.6, (n_patients, n_genes))[patient]
    scale = 0.25 * np.exp(0.8 * rng.normal(size=(n_patients, n_genes)))[patient]
    names = [f"{seed}-{i}" for i in range(n)]
    obs = pd.DataFrame({"patient": [f"{seed}P{p}" for p in patient], "spot": names}, index=names)
    table = AnnData(obs=obs, var=pd.DataFrame(index=[f"g{j}" for j in range(n_genes)]))
    table.layers["truth"] = np.clip(truth, 0, None).astype(np.float32)
    table.layers["other"] = np.clip(truth + level + scale * rng.normal(size=truth.shape), 0, None).astype(np.float32)
    return table


def counted(n_patients=9, seed=0, *, n_spots=20, n_genes=12):
    """Return a table with raw counts in X, and logarithms predicted by another model."""
    rng = np.random.default_rng(seed)
    table = cohort(n_patients, seed, n_spots=n_spots, n_genes=n_genes)
    counts = rng.poisson(np.exp(rng.normal(1, 0.8, (table.n_obs, n_genes))))
    table.X = counts.astype(np.float32)
    table.layers["other"] = (0.6 * log_normalise(counts) + rng.normal(2, 0.5, counts.shape)).astype(np.float32)
    return table


def calibrated(table, **options):
    return hg.tl.calibrate(table, layer="other", measured="truth", measured_scale="log", **options)


def covered(table, coverage, calibration):
    hg.tl.intervals(table, layer="other", coverage=coverage, calibration=calibration)
    low, high, truth = (table.layers[name] for name in ("other_lower", "other_upper", "truth"))
    return ((truth >= low) & (truth <= high)).mean()


@pytest.mark.parametrize(("n_patients", "coverage", "most"), [(9, 0.9, 0.985), (30, 0.9, 0.945), (60, 0.8, 0.845)])
def test_intervals_cover_spots_of_new_patients_at_the_nominal_rate(n_patients, coverage, most):
    calibration = calibrated(cohort(n_patients, 1))
    new = cohort(25, 2)
    found = covered(new, coverage, calibration)
    assert coverage - 0.003 <= found <= most
    facts = new.uns["other_intervals"]
    assert (facts["guarantee"], facts["unit"], facts["n_groups"]) == ("hierarchical", "patient", n_patients)


def test_treating_spots_as_exchangeable_gives_too_low_coverage():
    """This is why the unit is the patient: nine patients with 12 spots are not 108 patients."""
    calibration = calibrated(cohort(9, 1), sample_key="spot")
    assert len(calibration.groups) == 108
    assert covered(cohort(25, 2), 0.9, calibration) < 0.885


def test_too_few_patients_give_no_guarantee_and_one_patient_raises():
    with pytest.warns(UserWarning, match=r"`data` has 8 values of 'patient'. With fewer than 9, .* not guaranteed"):
        calibration = calibrated(cohort(8, 1))
    new = cohort(3, 2)
    covered(new, 0.9, calibration)
    assert new.uns["other_intervals"]["guarantee"] == "none"
    with pytest.warns(UserWarning, match="95% is not guaranteed: the residuals are of 10 patients, 19 are needed"):
        covered(new, 0.95, calibrated(cohort(10, 1)))
    facts = new.uns["other_intervals"]
    assert (facts["guarantee"], facts["n_groups_needed"]) == ("none", 19)
    with pytest.raises(
        ValueError, match=r"`sample_key` 'patient': the measured spots are of one patient, '1P0'; at least 2"
    ):
        calibrated(cohort(1, 1))


def test_interval_ends_follow_from_the_residuals_of_the_measured_slides():
    table, new = counted(), counted(2, 1)
    before = {key: table.layers[key].copy() for key in table.layers if key is not None}
    calibration = hg.tl.calibrate(table, layer="other")
    hg.tl.intervals(new, layer="other", coverage=0.9, calibration=calibration)
    predicted, codes = table.layers["other"], pd.factorize(table.obs["patient"])[0]
    residual = log_normalise(table.X) - predicted
    spread = fit_spread(predicted, residual, codes)
    score, _ = half_scores(*grouped_quantiles(np.abs(residual) / spread_of(predicted, spread), codes), 0.9)
    half = score * spread_of(new.layers["other"], spread)
    np.testing.assert_allclose(new.layers["other_upper"], new.layers["other"] + half, rtol=2e-3)
    np.testing.assert_allclose(new.layers["other_lower"], np.maximum(new.layers["other"] - half, 0), atol=1e-2)
    np.testing.assert_allclose(calibration.detected, (table.X > 0).mean(0))
    assert "other_intervals" not in table.uns
    assert all((table.layers[key] == value).all() for key, value in before.items())


def test_several_objects_give_the_same_as_one_table():
    table = counted()
    parts = [table[table.obs["patient"] == name].copy() for name in table.obs["patient"].unique()]
    whole, several = hg.tl.calibrate(table, layer="other"), hg.tl.calibrate(iter(parts), layer="other")
    assert whole.groups == several.groups
    for name, array in whole.residuals.tensors().items():
        np.testing.assert_array_equal(array, several.residuals.tensors()[name])


def test_predicted_counts_are_compared_as_logarithms():
    table = counted()
    table.layers["counts"] = np.random.default_rng(3).poisson(np.asarray(table.X) + 1).astype(np.float32)
    with pytest.raises(ValueError, match="`layer`: layer 'counts' looks like raw counts.*layer_scale='counts'"):
        hg.tl.calibrate(table, layer="counts")
    calibration = hg.tl.calibrate(table, layer="counts", layer_scale="counts")
    new = counted(2, 1)
    new.layers["counts"] = np.asarray(new.X) * 2
    hg.tl.intervals(new, layer="counts", calibration=calibration)
    middle = log_normalise(new.layers["counts"])
    assert (new.layers["counts_lower"] <= middle).all()
    assert (middle <= new.layers["counts_upper"]).all()
    new.layers["counts"] = middle
    with pytest.raises(
        ValueError, match="`layer` 'counts' holds fractions, `calibration` is of a layer of scale 'counts'"
    ):
        hg.tl.intervals(new.copy(), layer="counts", calibration=calibration)


def test_a_layer_of_zeros_is_not_calibrated():
    table = counted()
    table.layers["other"] = np.zeros(table.shape, np.float32)
    with pytest.raises(ValueError, match="`layer` 'other' is 0 for every gene and measured spot; name the predicted"):
        hg.tl.calibrate(table, layer="other", layer_scale="log")


def test_by_detected_also_covers_spots_that_detect_the_gene():
    table, new = counted(seed=4), counted(3, 5)
    calibration = hg.tl.calibrate(table, layer="other")
    hg.tl.intervals(new, layer="other", by=None, calibration=calibration)
    narrow = new.layers["other_upper"].copy()
    hg.tl.intervals(new, layer="other", by="detected", calibration=calibration)
    assert (new.layers["other_upper"] >= narrow).all()
    assert new.uns["other_intervals"]["by"] == "detected"


def detecting(n_patients, seed, *, n_spots=100, n_genes=60):
    """Return counts of genes detected in a tenth to all of the spots, depending on a predicted level and on the patient."""
    rng = np.random.default_rng(seed)
    n = n_patients * n_spots
    patient = np.repeat(np.arange(n_patients), n_spots)
    level = np.linspace(-2.5, 2.5, n_genes) + 0.6 * rng.normal(size=(n, 1))
    by_patient = rng.normal(0, 0.3, (n_patients, n_genes))[patient]
    depth = np.exp(rng.normal(0, 0.5, (n, 1)))
    counts = rng.poisson(depth * np.exp(level + by_patient + 0.3 * rng.normal(size=level.shape)))
    names = [f"{seed}-{i}" for i in range(n)]
    obs = pd.DataFrame({"patient": [f"{seed}P{p}" for p in patient], "spot": names}, index=names)
    table = AnnData(obs=obs, var=pd.DataFrame(index=[f"g{j}" for j in range(n_genes)]))
    table.layers["truth"] = np.log1p(2 * counts / depth).astype(np.float32)
    table.layers["other"] = (np.log1p(2 * np.exp(level)) * (counts > 0).mean(0)).astype(np.float32)
    table.obsm["spatial"] = np.stack([np.arange(n) % 10, np.arange(n) // 10], 1) * 100.0
    return table


def test_by_level_covers_expressing_spots_at_the_nominal_rate():
    with pytest.warns(UserWarning, match="8 values of 'patient'"):
        calibration = calibrated(detecting(8, 1))
    new = detecting(10, 2)
    found = {}
    for by in (None, "level"):
        hg.tl.intervals(new, layer="other", by=by, calibration=calibration)
        frame = hg.get.coverage(new, layer="other", measured="truth", measured_scale="log")
        assert set(frame["depth"]) == {"all"}
        found[by] = frame.set_index("detected")["coverage_expressing"]
    facts = new.uns["other_intervals"]
    assert (facts["by"], facts["guarantee"], facts["n_groups_needed"]) == ("level", "none", 19)
    often = ["50% to 70%", "70% to 90%", "90% to 100%", "half or more"]
    assert found["level"][often].between(0.85, 0.95).all()
    assert found[None]["50% to 70%"] < 0.85
    low, high = new.layers["other_lower"], new.layers["other_upper"]
    assert ((low <= new.layers["other"]) & (new.layers["other"] <= high)).all()
    inside = (new.layers["truth"] >= low) & (new.layers["truth"] <= high)
    assert frame.set_index("detected").loc["all", "coverage"] == pytest.approx(inside.mean())


@pytest.mark.parametrize(("n_patients", "guarantee"), [(18, "none"), (19, "hierarchical")])
def test_by_level_guarantees_ninety_percent_from_19_patients_on(n_patients, guarantee):
    calibration = calibrated(detecting(n_patients, 1, n_genes=10))
    new = detecting(25, 2, n_genes=10)
    hg.tl.intervals(new, layer="other", by="level", calibration=calibration)
    low, high, truth = (new.layers[name] for name in ("other_lower", "other_upper", "truth"))
    assert new.uns["other_intervals"]["guarantee"] == guarantee
    assert guarantee == "none" or ((truth >= low) & (truth <= high)).mean() >= 0.9


def test_a_calibration_of_an_older_version_tells_how_to_get_levels(tmp_path):
    calibration = calibrated(cohort(9, 1, n_genes=3))
    none = dict.fromkeys(("level_quantiles", "level_groups", "level_edges"))
    older = replace(calibration, residuals=replace(calibration.residuals, **none)).save(tmp_path / "older.npz")
    new = cohort(2, 2, n_genes=3)
    hg.tl.intervals(new, layer="other", calibration=hg.Calibration.load(older))
    with pytest.raises(ValueError, match=r"`by` is 'level', but `calibration` has no .* again with hg\.tl\.calibrate"):
        hg.tl.intervals(new, layer="other", by="level", calibration=hg.Calibration.load(older))


def test_genes_are_found_by_name_and_those_without_residuals_stay_nan():
    calibration = hg.tl.calibrate(counted()[:, :10].copy(), layer="other")
    new = counted(2, 1)[:, ::-1].copy()
    new.var["symbol"] = new.var_names
    new.var_names = [f"ENSG{i}" for i in range(new.n_vars)]
    with pytest.raises(ValueError, match="`calibration` has none of the genes of the table.*`gene_symbols`"):
        hg.tl.intervals(new, layer="other", calibration=calibration)
    hg.tl.intervals(new, layer="other", calibration=calibration, gene_symbols="symbol")
    assert np.isfinite(new.layers["other_upper"]).all(0).tolist() == [False] * 2 + [True] * 10


def test_a_saved_calibration_is_unchanged_and_has_no_pickle(tmp_path):
    calibration = hg.tl.calibrate(counted(), layer="other")
    path = calibration.save(tmp_path / "other")
    loaded = hg.Calibration.load(path)
    for part in fields(hg.Calibration):
        if part.name == "residuals":
            for inner in fields(Residuals):
                one, two = (getattr(c.residuals, inner.name) for c in (calibration, loaded))
                np.testing.assert_array_equal(one, two)
                assert one.dtype == two.dtype
        else:
            assert np.array_equal(getattr(calibration, part.name), getattr(loaded, part.name))
    with np.load(path, allow_pickle=False) as file:
        assert json.loads(str(file["facts"]))["layer"] == "other"
    assert replace(calibration, layer="x").save(path) == path
    assert [file.name for file in tmp_path.iterdir()] == ["other"]


def test_other_files_are_neither_read_nor_replaced(tmp_path):
    calibration = hg.tl.calibrate(counted(), layer="other")
    with pytest.raises(FileNotFoundError):
        hg.Calibration.load(tmp_path / "nowhere.npz")
    (tmp_path / "text.npz").write_text("nothing")
    np.savez(tmp_path / "others.npz", a=np.arange(3))
    np.savez(tmp_path / "pickle.npz", facts=np.array([{}], object))
    whole = calibration.save(tmp_path / "whole.npz").read_bytes()
    (tmp_path / "half.npz").write_bytes(whole[: len(whole) // 2])
    for name in ("text.npz", "others.npz", "pickle.npz", "half.npz"):
        with pytest.raises(ValueError, match=r"`path` .* is not a calibration, or is damaged"):
            hg.Calibration.load(tmp_path / name)
        with pytest.raises(FileExistsError, match="choose another name, or delete the file first"):
            calibration.save(tmp_path / name)
    assert (tmp_path / "text.npz").read_text() == "nothing"


def test_invalid_arguments_raise_and_nothing_is_written():
    table, new = counted(), counted(2, 1)
    calibration = hg.tl.calibrate(table, layer="other")
    new.layers["third"] = new.layers["other"]
    new.layers["he2gene"] = new.layers["other"]
    wrong = {
        r"`layer` is 'third', `calibration` is of layer 'other'; pass layer='other'": {"layer": "third"},
        r"`layer` is 'he2gene', `calibration` is of layer 'other'": {},
        r"`model` and `calibration` are both given": {"layer": "other", "model": "breast-her2st"},
        r"`coverage` is 0\.99; .* `calibration` are for 0\.1 to 0\.98": {"layer": "other", "coverage": 0.99},
    }
    for match, options in wrong.items():
        with pytest.raises(ValueError, match=match):
            hg.tl.intervals(new, calibration=calibration, **options)
    with pytest.raises(TypeError, match=r"`calibration` is of type str; .*hg\.Calibration\.load\(path\)"):
        hg.tl.intervals(new, layer="other", calibration="other.npz")
    assert not new.uns
    new.layers["other"] = np.full(new.shape, np.nan)
    with pytest.raises(ValueError, match="is NaN for every gene and spot"):
        hg.tl.intervals(new, layer="other", calibration=calibration)
    empty = counted()
    empty.X[:] = 0
    with pytest.raises(ValueError, match="`measured`: X holds no counts at any spot that has a prediction"):
        hg.tl.calibrate(empty, layer="other")
    with pytest.raises(ValueError, match="`layer` and `measured` are both 'other'"):
        hg.tl.calibrate(table, layer="other", measured="other")
    with pytest.raises(ValueError, match="`layer` 'nothing' is not a layer, valid: "):
        hg.tl.calibrate(table, layer="nothing")


def test_layers_fitted_on_these_spots_give_a_warning_or_an_error():
    table = counted(2)
    table.obs["section"] = np.where(table.obs["patient"] == "0P0", "C2", "new")
    table.layers["adapted"] = table.layers["other"]
    table.uns["adapted"] = {"verb": "adapt", "params": {"layer": "other"}}
    with pytest.raises(
        ValueError, match=r"`layer` 'adapted' was fitted by hg\.tl\.adapt to spots that are measured here"
    ):
        hg.tl.calibrate(table, layer="adapted")
    model = hg.models.load("breast-her2st")
    table.uns["other"] = {"model": model.name, "weights_sha256": model.weights_sha256, "layer": "other"}
    with pytest.warns(
        UserWarning, match=r"sections \['C2'\] are in the training set of breast-her2st, so its errors are too small"
    ):
        hg.tl.calibrate(table, layer="other")


def test_counts_with_unknown_totals_get_no_interval():
    table, new = counted(), counted(2, 1)
    for part in (table, new):
        part.layers["counts"] = np.asarray(part.X) + 1
    calibration = hg.tl.calibrate(table, layer="counts", layer_scale="counts")
    with pytest.warns(UserWarning, match="`data` lacks 2 of 12 genes of the `calibration`: their counts are missing"):
        hg.tl.intervals(new[:, 2:].copy(), layer="counts", calibration=calibration)
    # A spot without a prediction has no interval; the others have intervals.
    part = new.copy()
    part.layers["counts"][0] = np.nan
    hg.tl.intervals(part, layer="counts", calibration=calibration)
    assert np.isfinite(part.layers["counts_upper"]).all(1).tolist() == [False] + [True] * 39
    new.layers["counts"][:, 3] = np.nan
    with pytest.raises(ValueError, match="`layer` 'counts' holds 40 NaN, in 40 spots: their totals are unknown"):
        hg.tl.intervals(new, layer="counts", calibration=calibration)
    assert not new.uns


def test_values_on_another_scale_than_the_calibrated_ones_are_refused(tmp_path):
    calibration = hg.Calibration.load(hg.tl.calibrate(counted(), layer="other").save(tmp_path / "other.npz"))
    assert calibration.kinds == ["log"]
    log = counted(2, 1).layers["other"]
    scaled = (log - log.mean(0)) / log.std(0)
    for values in (scaled, 50 * np.expm1(log)):
        new = counted(2, 1)
        new.layers["other"] = values
        with pytest.raises(ValueError, match=r"`calibration` is of a layer with values from 0 to 30 \(logarithms\)"):
            hg.tl.intervals(new, layer="other", calibration=calibration)
        assert not new.uns
    table, new = counted(), counted(2, 1)
    table.layers["other"] = table.layers["other"] - 3
    other = hg.tl.calibrate(table, layer="other", layer_scale="log")
    assert other.kinds == ["other"]
    with pytest.raises(ValueError, match="`calibration` is of a layer with values below 0 or above 30"):
        hg.tl.intervals(new, layer="other", calibration=other)


def test_the_spread_below_zero_equals_that_at_zero():
    predicted = np.array([[-5.0], [0.0], [2.0]])
    np.testing.assert_allclose(spread_of(predicted, np.array([[1.0], [4.0]])), [[1], [1], [3]])


def test_sections_of_several_patients_may_share_a_name_if_the_unit_is_the_section():
    table = counted(12, n_spots=10)
    table.obs["section"] = np.where(np.arange(table.n_obs) % 2, "one", "two")
    assert len(hg.tl.calibrate(table, layer="other", sample_key="section").groups) == 24
    named = table.copy()
    named.obs["section"] = (named.obs["patient"].astype(str) + named.obs["section"]).to_numpy()
    assert hg.tl.calibrate(named, layer="other", sample_key="section").groups[:2] == ["0P0two", "0P0one"]
    parts = [table[table.obs["patient"] == name].copy() for name in table.obs["patient"].unique()]
    for part in parts:
        del part.obs["section"], part.obs["patient"]
    assert len(hg.tl.calibrate(parts, layer="other", sample_key="section").groups) == 12


def test_shares_of_detected_spots_are_those_of_measured_spots():
    table = cohort(9, 1, n_genes=3)
    table.layers["truth"][::2, 0] = np.nan
    table.layers["truth"][:, 1] = 0
    np.testing.assert_array_equal(calibrated(table).detected[:2], [1, 0])


def test_paths_that_are_not_files_raise(tmp_path):
    calibration = hg.tl.calibrate(counted(), layer="other")
    for path in (tmp_path, tmp_path / "nowhere" / "other.npz"):
        with pytest.raises(ValueError, match="`path` .* is a folder, or lies in a folder that does not exist"):
            calibration.save(path)
    with pytest.raises(IsADirectoryError, match="`path` .* is a folder; pass the file"):
        hg.Calibration.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="`path` .* does not exist; pass the file"):
        hg.Calibration.load(tmp_path / "nowhere.npz")
    assert not list(tmp_path.iterdir())


def test_the_plot_shows_the_coverage_on_new_patients():
    calibration, new = calibrated(cohort(30, 1)), cohort(5, 2)
    new.obsm["spatial"] = np.stack([np.arange(new.n_obs) % 10, np.arange(new.n_obs) // 10], 1) * 100.0
    options = {"layer": "other", "measured": "truth", "measured_scale": "log", "calibration": calibration}
    ax = hg.pl.calibration(new, coverages=[0.5, 0.9], **options)
    (line,) = [each for each in ax.lines if "mean over" in each.get_label()]
    np.testing.assert_allclose(line.get_ydata(), [covered(new, c, calibration) for c in (0.5, 0.9)], atol=1e-4)
    with pytest.raises(ValueError, match="`annotation_key` needs an annotation .* layer 'other' is of another model"):
        hg.pl.calibration(new, annotation_key="patient", **options)
    with pytest.raises(TypeError, match="`calibration` is of type str"):
        hg.pl.calibration(new, **options | {"calibration": "other.npz"})


def level_warnings(table, calibration):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        hg.tl.intervals(table, layer="other", calibration=calibration)
    return [str(warning.message) for warning in caught if "fewer than 20 %" not in str(warning.message)]


@pytest.mark.parametrize("factor", [1 / np.log(2), 1 / np.log(10)])
def test_logarithms_to_another_base_give_a_warning(tmp_path, factor):
    calibration = hg.Calibration.load(hg.tl.calibrate(counted(), layer="other").save(tmp_path / "other.npz"))
    new = counted(2, 1)
    assert not level_warnings(new[:, :7].copy(), calibration)
    # A single gene of a new patient may be on another level.
    one_gene = new[:, :1].copy()
    one_gene.layers["other"] = one_gene.layers["other"] * np.float32(factor)
    assert not level_warnings(one_gene, calibration)
    new.layers["other"] = new.layers["other"] * np.float32(factor)
    (message,) = level_warnings(new, calibration)
    assert f"on average {factor:.2f} times those of the slides" in message.replace("1.45", "1.44")


def test_patients_of_the_calibration_give_a_warning():
    calibration = hg.tl.calibrate(counted(), layer="other")
    (message,) = level_warnings(counted(2), calibration)
    assert message.startswith("`data`: patients 0P0, 0P1 were used for the `calibration`")


def test_a_calibration_of_another_model_gives_a_warning():
    def with_weights(table, weights):
        table.uns["other"] = {"verb": "predict", "layer": "other", "model": "m", "weights_sha256": weights}
        return table

    calibration = hg.tl.calibrate(with_weights(counted(), "a"), layer="other")
    assert calibration.models == ("a",)
    assert not level_warnings(with_weights(counted(2, 1), "a"), calibration)
    (message,) = level_warnings(with_weights(counted(2, 1), "b"), calibration)
    assert "was predicted by another model than that of the `calibration`" in message
    # Patients that are held out in turn have different models.
    assert not level_warnings(with_weights(counted(2, 1), "b"), replace(calibration, models=("a", "c")))


@pytest.mark.parametrize("make", [np.asarray, lambda x: x / np.log(2), lambda x: (x - x.mean(0)) / x.std(0)])
def test_a_layer_equal_to_the_measured_values_gives_a_warning(make):
    table = counted()
    table.layers["copy"] = make(log_normalise(table.X)).astype(np.float32)
    with pytest.warns(UserWarning, match="`layer` 'copy' is a copy of the measured values, not a prediction"):
        hg.tl.calibrate(table, layer="copy", layer_scale="log")
    table.layers["copy"] += np.random.default_rng(0).normal(0, 0.2, table.shape).astype(np.float32)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        hg.tl.calibrate(table, layer="copy", layer_scale="log")
    assert not [w for w in caught if "is a copy of the measured values" in str(w.message)]
