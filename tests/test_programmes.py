"""``hg.tl.programmes`` scores sets as decoupler does, and calls only those reliable that held-out patients bear out."""

import anndata
import decoupler
import numpy as np
import pandas as pd
import pytest
import scipy.sparse
from anndata import AnnData
from scipy.stats import pearsonr

import he2gene_sc as hg
from he2gene_sc.stats import log_normalise

PLANTED, NOISE = [f"g{i}" for i in range(6)], [f"g{i}" for i in range(10, 16)]
SETS = {"planted": PLANTED, "noise": NOISE}


def cohort(n_patients=4, seed=0):
    """Spots whose first six genes follow a pattern that the model sees, the next ten none, noise genes one that it misses."""
    rng = np.random.default_rng(seed)
    n = 60 * n_patients
    seen, missed = rng.normal(size=(2, n))
    log_rate = rng.normal(1.5, 0.3, 30) + np.zeros((n, 30))
    log_rate[:, :6] += 0.8 * seen[:, None]
    predicted = log_rate.copy()
    log_rate[:, 10:16] += 0.8 * missed[:, None]
    counts = rng.poisson(np.exp(log_rate) * rng.lognormal(0, 0.3, n)[:, None])
    names = [f"P{i}" for i in range(n_patients) for _ in range(60)]
    obs = pd.DataFrame({"patient": names, "section": names}, index=[f"s{i}" for i in range(n)])
    table = AnnData(scipy.sparse.csr_matrix(counts.astype(np.float32)), obs=obs)
    table.var_names = [f"g{i}" for i in range(30)]
    noisy = predicted + rng.normal(0, 0.2, predicted.shape)
    table.layers["other"] = log_normalise(np.exp(noisy))
    return table


@pytest.fixture
def table():
    return cohort()


def test_the_scores_are_those_of_decoupler_on_the_predicted_table(toy, tiny_model):
    hg.tl.predict(toy, model=tiny_model)
    net = hg.datasets.toy_diseases()
    with pytest.warns(UserWarning, match="how well the score of any set is predicted is unknown"):
        found = hg.tl.programmes(toy, net)
    assert (found["evidence"] == "unknown: no held-out slides").all()
    assert not found["reliable"].any()
    assert found[["n_genes", "n_predicted"]].to_numpy().tolist() == [[8, 8]] * 3
    adata = hg.get.predicted(toy)
    decoupler.mt.ulm(adata, net, empty=False)
    expected, scores = adata.obsm["score_ulm"], toy["table"].obsm["he2gene_programmes"]
    pd.testing.assert_frame_equal(
        scores, expected[scores.columns], check_dtype=False, rtol=1e-4, check_names=False, check_index_type=False
    )


def test_a_set_that_held_out_patients_bear_out_is_reliable_and_noise_is_not(table):
    new = cohort(1, seed=1)
    found = hg.tl.programmes(new, SETS, held_out=table, layer="other").set_index("source")
    assert found["reliable"].to_dict() == {"planted": True, "noise": False}
    assert (found["evidence"] == "4 patients held out").all()
    assert (found["pearson_low"] < found["pearson"]).all()
    sections = new.uns["he2gene_programmes"]["sections"].set_index(["source", "section"])
    own = (table.obs["patient"] == "P2").to_numpy()
    measured = pd.DataFrame(log_normalise(table.X)[own], columns=table.var_names)
    guess = pd.DataFrame(table.layers["other"][own], columns=table.var_names)
    net = pd.DataFrame({"source": "planted", "target": PLANTED})
    a, b = (decoupler.mt.ulm(values, net, empty=False)[0]["planted"] for values in (guess, measured))
    assert sections.loc[("planted", "P2"), "pearson"] == pytest.approx(pearsonr(a, b)[0], abs=1e-5)
    assert found.loc["planted", "pearson"] == pytest.approx(sections.loc["planted", "pearson"].mean())
    assert found.loc["planted", "pearson"] < found.loc["planted", "ceiling"] < 1
    assert found.loc["planted", "depth"] < 0.5


def test_a_spot_without_any_of_the_genes_scores_0_and_leaves_the_others_judged(table):
    counts = table.X.toarray()
    counts[7] = np.where(table.var_names == "g29", 9, 0)
    table.X = counts
    table.layers["other"][:, 29] = np.nan
    found = hg.tl.programmes(table, SETS, held_out=table, layer="other")
    assert found["pearson"].notna().all()


def test_patients_whose_counts_are_shuffled_call_no_set_reliable(table):
    rng = np.random.default_rng(3)
    order = np.concatenate([60 * i + rng.permutation(60) for i in range(4)])
    table.X = table.X[order]
    assert not hg.tl.programmes(table, SETS, held_out=table, layer="other")["reliable"].any()


def test_two_patients_leave_it_unknown_and_so_do_sections_that_were_trained_on(table, tiny_model, monkeypatch):
    found = hg.tl.programmes(table, SETS, held_out=table[:120].copy(), layer="other")
    assert (found["evidence"] == "unknown: 2 patients held out, 3 are needed").all()
    assert found["pearson"].notna().all()
    assert found["pearson_low"].isna().all()
    assert not found["reliable"].any()
    monkeypatch.setattr("he2gene_sc.tl._programmes.sections_trained_on", lambda spots: {"P1": "it"})
    found = hg.tl.programmes(table, SETS, held_out=table, layer="other")
    assert (found["evidence"] == "unknown: the model was trained on P1").all()
    assert not found["reliable"].any()


def test_small_sets_are_left_out_by_name_and_measured_counts_are_scored(table):
    sets = {**SETS, "small": ["g0", "g1", "absent"]}
    with pytest.warns(UserWarning, match=r"left out: small \(2 of 3\)"):
        found = hg.tl.programmes(table, sets, layer=None)
    assert found["source"].tolist() == ["planted", "noise"]
    assert (found["evidence"] == "measured").all()
    record = table.uns["he2gene_programmes"]
    assert record["left_out"]["source"].tolist() == ["small"]


def test_results_are_stored_and_go_with_the_layer_that_they_were_computed_from(toy, tiny_model, tmp_path):
    from he2gene_sc._core.invalidate import remove_derived

    table = cohort()
    found = hg.tl.programmes(table, SETS, held_out=table, layer="other")
    table.write_zarr(tmp_path / "t.zarr")
    back = anndata.read_zarr(tmp_path / "t.zarr")
    pd.testing.assert_frame_equal(back.uns["he2gene_programmes"]["results"], found, check_dtype=False)
    hg.tl.programmes(back, SETS, held_out=back, layer="other")
    assert remove_derived(back, ["other"]) == ["he2gene_programmes"]
    assert "he2gene_programmes" not in back.obsm


def test_a_gmt_is_read_by_tabs_so_that_names_of_diseases_keep_their_blanks_and_first_gene(table, tmp_path):
    path = tmp_path / "diseases.gmt"
    path.write_text("Breast cancer\t\t" + "\t".join(f"{gene},1.0" for gene in PLANTED) + "\n")
    found = hg.tl.programmes(table, path, layer=None)
    assert found[["source", "n_genes", "n_predicted"]].to_numpy().tolist() == [["Breast cancer", 6, 6]]
    path.write_text("Breast cancer g0 g1 g2\n")
    with pytest.raises(ValueError, match="is not a GMT file; each line is a name"):
        hg.tl.programmes(table, path, layer=None)


def test_what_does_not_fit_is_refused_and_nothing_of_the_user_is_overwritten(table):
    options = {"layer": "other"}
    for net, match in (
        (pd.DataFrame({"source": ["a"]}), "`net` has no column 'target'"),
        ({"a/b": PLANTED}, "`net`: set name 'a/b' cannot be stored"),
        ({"a": ["x1", "x2"]}, "`net`: no set has 5 of the 30 genes"),
        (pd.DataFrame({"source": "a", "target": PLANTED, "weight": np.nan}), "`net`: 'weight' is not a finite number"),
        ("no.gmt", "`net`: there is no file"),
    ):
        with pytest.raises(ValueError, match=match):
            hg.tl.programmes(table, net, **options)
    with pytest.raises(ValueError, match="`layer` is None, so measured counts are scored"):
        hg.tl.programmes(table, SETS, held_out=table, layer=None)
    with pytest.raises(ValueError, match="`held_out`: no set has 5 of the 4 genes"):
        hg.tl.programmes(table, SETS, held_out=table[:, :4].copy(), **options)
    table.obsm["he2gene_programmes"] = np.zeros((table.n_obs, 2))
    with pytest.raises(ValueError, match="obsm.*'he2gene_programmes'"):
        hg.tl.programmes(table, SETS, **options)
    assert not table.uns
