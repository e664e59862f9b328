"""``hg.tl.compare`` agrees with numpy and scipy, and shows the effect of a protocol on the correlation."""

import numpy as np
import pytest
from scipy.stats import pearsonr, t

import he2gene_sc as hg
from he2gene_sc.stats import log_normalise
from tests.helpers.patients import slides


def cohort():
    """Return two patients with two sections each, on different levels."""
    table = slides(4, n_genes=8)
    table.obs["section"] = table.obs["patient"].to_numpy()
    table.obs["patient"] = table.obs["section"].map({"P0": "A", "P1": "A", "P2": "B", "P3": "B"}).to_numpy()
    level = table.obs["section"].isin(["P1", "P3"]).to_numpy()
    table.layers["other_model"] = table.layers["other_model"] + level[:, None].astype(np.float32)
    table.layers["noise"] = np.random.default_rng(5).gamma(2, 1, table.shape).astype(np.float32)
    return table


def smoothed(values, table):
    """Return the mean over 3 × 3 spots around each spot, computed directly."""
    xy, section = np.rint(table.obsm["spatial"] / 100), table.obs["section"].to_numpy()
    near = (abs(xy[:, None] - xy[None]).max(-1) <= 1) & (section[:, None] == section[None])
    return near @ values / near.sum(1, keepdims=True)


def by_hand(predicted, target, groups, patients):
    """Return the mean over genes of the mean over patients of the mean over groups of a patient."""
    r = {
        g: [pearsonr(predicted[groups == g, j], target[groups == g, j])[0] for j in range(8)] for g in np.unique(groups)
    }
    means = [np.mean([r[g] for g in np.unique(groups[patients == p])], axis=0) for p in np.unique(patients)]
    return np.mean(means)


def test_each_protocol_matches_its_formula():
    table = cohort()
    found = hg.tl.compare(table, ["other_model", "noise"])
    patients, sections = (table.obs[key].to_numpy(str) for key in ("patient", "section"))
    log = log_normalise(table.X).astype(float)
    truth = {"hest": (log, patients), "section": (log, sections), "triplex": (smoothed(log, table), sections)}
    at = found.set_index(["predictor", "protocol"])
    for layer in ("other_model", "noise"):
        for protocol, (target, groups) in truth.items():
            expected = by_hand(table.layers[layer], target, groups, patients)
            assert at.loc[(layer, protocol), "pearson_mean"] == pytest.approx(expected, abs=1e-6)
    assert at.loc[("other_model", "hest"), "minus_section"] < -0.1
    assert at.loc[("other_model", "section"), "minus_section"] == 0
    assert (found[["n_spots", "n_sections", "n_patients"]] == [192, 4, 2]).all().all()
    assert not table.uns


def test_references_use_no_gene_and_are_fitted_on_the_other_patients():
    table = cohort()
    found = hg.tl.compare(table, "noise", protocols=["section", "hest"]).set_index(["predictor", "protocol"])
    assert found["is_reference"].groupby("predictor").first().to_dict() == {
        "noise": False,
        "depth": True,
        "coordinates": True,
    }
    patients, sections = (table.obs[key].to_numpy(str) for key in ("patient", "section"))
    log = log_normalise(table.X).astype(float)

    def standardised(values):
        out = values.astype(float)
        for section in np.unique(sections):
            out[sections == section] -= out[sections == section].mean(0)
            out[sections == section] /= out[sections == section].std(0)
        return out

    depth, xy = standardised(np.log(np.asarray(table.X.sum(1)))), standardised(table.obsm["spatial"])
    place = np.column_stack([xy, standardised(np.square(xy).sum(1))])
    centred = log - np.stack([log[sections == section].mean(0) for section in sections])
    for name, x in (("depth", depth), ("coordinates", place)):
        guess = np.zeros_like(log)
        for patient in "AB":
            rest = patients != patient
            guess[~rest] = x[~rest] @ np.linalg.lstsq(x[rest], centred[rest], rcond=None)[0]
        expected = by_hand(guess, log, sections, patients)
        assert found.loc[(name, "section"), "pearson_mean"] == pytest.approx(expected, abs=1e-6)
    # In every patient, five of eight genes are high in the left half.
    assert found.loc[("coordinates", "section"), "pearson_mean"] > 0.2
    assert abs(found.loc[("noise", "section"), "pearson_mean"]) < 0.1


def test_spots_and_genes_that_a_layer_lacks_are_left_out_for_all_layers():
    table = cohort()
    table.layers["other_model"][:5] = np.nan
    table.layers["noise"][:, 2] = np.nan
    with pytest.warns(UserWarning, match="compared on those that all predict: 187 of 192 spots and 7 of 8 genes"):
        found = hg.tl.compare(table, ["other_model", "noise"], protocols="section")
    assert (found["n_spots"] == 187).all()
    assert (found["n_genes"] == 7).all()
    with pytest.raises(
        ValueError, match=r"`genes` \['g2'\]: genes that every layer predicts are needed, such as \['g0'"
    ):
        hg.tl.compare(table, ["other_model", "noise"], genes=["g1", "g2"])


def test_a_constant_prediction_of_a_varying_gene_has_correlation_zero():
    table = cohort()
    table.layers["half"] = table.layers["other_model"].copy()
    table.layers["half"][:, :4] = 1
    found = hg.tl.compare(table, ["other_model", "half"], protocols="section").set_index("predictor")
    whole = hg.tl.compare(table, "other_model", protocols="section", genes=[f"g{i}" for i in range(4, 8)])
    assert found.loc["half", "pearson_mean"] == pytest.approx(whole["pearson_mean"][0] / 2)
    assert found.loc["half", ["n_genes", "n_constant"]].tolist() == [8, 0]
    counts = table.X.toarray()
    counts[:, 0] = 0
    table.X = counts
    found = hg.tl.compare(table, ["other_model", "half"], protocols="section").set_index("predictor")
    assert (found["n_constant"] == 1).all()


def test_sections_with_few_spots_are_left_out_with_a_warning():
    table = cohort()
    table.obs["section"] = np.where(np.arange(table.n_obs) < 5, "tiny", table.obs["section"])
    with pytest.warns(UserWarning, match=r"`data`: \[section 'tiny' of sample 'A' .*\] have fewer than 10 spots"):
        found = hg.tl.compare(table, "noise", protocols=["hest", "hest"])
    assert len(found) == found["predictor"].nunique()
    assert (found["n_spots"] == 187).all()


def test_layers_on_different_scales_are_compared():
    table = cohort()
    table.layers["counts"] = np.random.default_rng(6).poisson(50 * np.expm1(table.layers["other_model"] / 4))
    table.layers["log"] = log_normalise(table.layers["counts"])
    scales = {"counts": "counts", "other_model": "log"}
    options = {"protocols": "section"}
    found = hg.tl.compare(table, ["counts", "log", "other_model"], layer_scale=scales, **options)
    r = found.set_index("predictor")["pearson_mean"]
    assert r["counts"] == pytest.approx(r["log"], abs=1e-6)
    assert r["counts"] != pytest.approx(r["other_model"], abs=1e-3)
    with pytest.raises(ValueError, match=r"`layer_scale` names \['b'\], valid: \['log'\], as in `layers`"):
        hg.tl.compare(table, "log", layer_scale={"b": "log"})
    with pytest.raises(ValueError, match="`layer_scale` is 'ln', valid"):
        hg.tl.compare(table, "log", layer_scale={"log": "ln"})


def test_invalid_comparisons_raise():
    table = cohort()
    with pytest.raises(ValueError, match="`protocols` is 'hist', valid: "):
        hg.tl.compare(table, "noise", protocols=["hist"])
    with pytest.raises(ValueError, match="`layers` is empty"):
        hg.tl.compare(table, [])
    with pytest.raises(ValueError, match="none of the 4 sections has 10 measured spots"):
        hg.tl.compare(table[::8].copy(), "noise")
    table.layers["depth"] = table.layers["noise"]
    with pytest.raises(ValueError, match=r"`layers` \['depth'\]: a reference has that name"):
        hg.tl.compare(table, ["noise", "depth"])
    table.obsm["spatial"] = table.obsm["spatial"].astype(float)
    table.obsm["spatial"][3] = np.nan
    with pytest.raises(ValueError, match=r"obsm\['spatial'\] is NaN or infinite for 1 spots"):
        hg.tl.compare(table, "noise")
    del table.obsm["spatial"]
    with pytest.raises(
        ValueError, match=r"`protocols` 'triplex' averages neighbours, but `data` has no obsm\['spatial'\]"
    ):
        hg.tl.compare(table, "noise")


def test_differences_are_paired_by_gene_and_their_interval_is_over_patients():
    table = slides(5, n_genes=8)
    table.layers["noise"] = np.random.default_rng(5).gamma(2, 1, table.shape).astype(np.float32)
    found = hg.tl.compare(table, ["noise", "other_model"], protocols=["section", "triplex"])
    found = found.set_index(["predictor", "protocol"])
    log, patients = log_normalise(table.X).astype(float), table.obs["patient"].to_numpy(str)
    gaps = []
    for patient in np.unique(patients):
        own = patients == patient
        r = [
            [pearsonr(table.layers[layer][own, j], log[own, j])[0] for j in range(8)]
            for layer in ("other_model", "noise")
        ]
        gaps.append(np.mean(np.subtract(*r)))
    half = t.ppf(0.975, 4) * np.std(gaps, ddof=1) / np.sqrt(5)
    row = found.loc[("other_model", "section")]
    assert row["minus_first"] == pytest.approx(np.mean(gaps), abs=1e-6)
    assert row[["minus_first_low", "minus_first_high"]].tolist() == pytest.approx(
        [np.mean(gaps) - half, np.mean(gaps) + half], abs=1e-6
    )
    assert (found.loc["noise", ["minus_first", "minus_first_low", "minus_first_high"]] == 0).all().all()
    # With one patient, the unit is the section; with two patients, there is no interval.
    table.obs["section"] = table.obs["patient"].to_numpy()
    table.obs["patient"] = "A"
    one = hg.tl.compare(table, ["noise", "other_model"], protocols=["section", "hest"]).set_index(
        ["predictor", "protocol"]
    )
    assert one.loc[("other_model", "section"), "minus_first_low"] == pytest.approx(row["minus_first_low"], abs=1e-6)
    assert np.isnan(one.loc[("other_model", "hest"), "minus_first_low"])
    two = hg.tl.compare(cohort(), ["noise", "other_model"], protocols="section")
    assert two["minus_first"].iloc[1] > 0
    assert two["minus_first_low"].isna().all()
