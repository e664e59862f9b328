"""``hg.tl.programmes`` scores sets like decoupler, and a set is reliable only if held-out patients confirm it."""

import gzip
from dataclasses import replace

import anndata
import decoupler
import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import spatialdata
from anndata import AnnData
from scipy.stats import pearsonr

import he2gene_sc as hg
from he2gene_sc.models import ModelCard
from he2gene_sc.stats import log_normalise
from he2gene_sc.tl._biomarkers.reference_fields import COLOUR, DEPTH
from he2gene_sc.tl._gene_sets import read_net, weights_by_set
from he2gene_sc.tl._programmes import _COLUMNS
from he2gene_sc.training import Programmes, build_model, log_targets
from tests.helpers.tiny_sections import N_COLOUR, facts, planted, recipe

PLANTED, NOISE = [f"g{i}" for i in range(6)], [f"g{i}" for i in range(10, 16)]
SETS = {"planted": PLANTED, "noise": NOISE}


def cohort(n_patients=4, seed=0):
    """Return spots: six genes with a pattern that the model predicts, ten without, noise genes with a pattern that it does not."""
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


def test_scores_equal_those_of_decoupler_on_the_predicted_table(toy, tiny_model):
    hg.tl.predict(toy, model=tiny_model)
    net = hg.datasets.toy_diseases()
    with pytest.warns(UserWarning, match="the accuracy of the score of any set is unknown"):
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


def test_a_set_confirmed_by_held_out_patients_is_reliable_and_noise_is_not(table):
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


def test_a_spot_without_any_of_the_genes_scores_0_and_the_others_are_compared(table):
    counts = table.X.toarray()
    counts[7] = np.where(table.var_names == "g29", 9, 0)
    table.X = counts
    table.layers["other"][:, 29] = np.nan
    found = hg.tl.programmes(table, SETS, held_out=table, layer="other")
    assert found["pearson"].notna().all()


def test_no_set_is_reliable_with_shuffled_counts(table):
    rng = np.random.default_rng(3)
    order = np.concatenate([60 * i + rng.permutation(60) for i in range(4)])
    table.X = table.X[order]
    assert not hg.tl.programmes(table, SETS, held_out=table, layer="other")["reliable"].any()


def test_accuracy_is_unknown_with_two_patients_or_with_training_sections(table, tiny_model, monkeypatch):
    with pytest.warns(UserWarning, match="any set is unknown, and none is reliable: 2 patients held out, 3"):
        found = hg.tl.programmes(table, SETS, held_out=table[:120].copy(), layer="other")
    assert (found["evidence"] == "unknown: 2 patients held out, 3 are needed").all()
    assert found["pearson"].notna().all()
    assert found["pearson_low"].isna().all()
    assert not found["reliable"].any()
    monkeypatch.setattr("he2gene_sc.tl._programmes.sections_trained_on", lambda spots: {"P1": "it"})
    with pytest.warns(UserWarning, match="is unknown, and none is reliable: the model was trained on P1"):
        found = hg.tl.programmes(table, SETS, held_out=table, layer="other")
    assert (found["evidence"] == "unknown: the model was trained on P1").all()
    assert not found["reliable"].any()
    monkeypatch.setattr("he2gene_sc.tl._programmes.record_of_layer", lambda *_: {"verdict": "out of distribution"})
    with pytest.warns(UserWarning, match="none is reliable: a slide of `data` is out of distribution"):
        hg.tl.programmes(table, SETS, held_out=table, layer="other")


def test_small_sets_are_left_out_and_measured_counts_are_scored(table):
    sets = {**SETS, "small": ["g0", "g1", "absent"]}
    with pytest.warns(UserWarning, match=r"left out: small \(2 of 3\)"):
        found = hg.tl.programmes(table, sets, layer=None)
    assert found["source"].tolist() == ["planted", "noise"]
    assert (found["evidence"] == "measured").all()
    record = table.uns["he2gene_programmes"]
    assert record["left_out"]["source"].tolist() == ["small"]


def test_results_are_stored_and_removed_with_the_layer(toy, tiny_model, tmp_path):
    from he2gene_sc._core.results import remove_derived

    table = cohort()
    found = hg.tl.programmes(table, SETS, held_out=table, layer="other")
    table.write_zarr(tmp_path / "t.zarr")
    back = anndata.read_zarr(tmp_path / "t.zarr")
    pd.testing.assert_frame_equal(back.uns["he2gene_programmes"]["results"], found, check_dtype=False)
    hg.tl.programmes(back, SETS, held_out=back, layer="other")
    assert remove_derived(back, ["other"]) == ["he2gene_programmes"]
    assert "he2gene_programmes" not in back.obsm


def test_gmt_files_are_split_at_tabs_only(table, tmp_path):
    path = tmp_path / "diseases.gmt"
    path.write_text("Breast cancer\t\t" + "\t".join(f"{gene},1.0" for gene in PLANTED) + "\n")
    found = hg.tl.programmes(table, path, layer=None)
    assert found[["source", "n_genes", "n_predicted"]].to_numpy().tolist() == [["Breast cancer", 6, 6]]
    path.write_text("Breast cancer g0 g1 g2\n")
    with pytest.raises(ValueError, match="is not a GMT file; each line must have a name"):
        hg.tl.programmes(table, path, layer=None)


def test_gmt_files_of_windows_are_read_and_ambiguous_ones_raise(table, tmp_path):
    path, line = tmp_path / "sets.gmt", "\t".join(["fat", "", *PLANTED])
    path.write_bytes(f"\ufeff{line}\r\n\r\n{line}\t\r\n".encode())
    assert hg.tl.programmes(table, path, layer=None)["n_genes"].tolist() == [6]
    for content, match in (
        (f"{line}\nfat\t\tg1\tg2\n".encode(), "has two sets called 'fat', with different genes; rename one"),
        (gzip.compress(line.encode()), "is compressed, or its text is not UTF-8"),
        (line.replace("g", "G").encode(), r"the sets name genes such as \['G.*the data \['g0', 'g1', 'g2'\]"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=match):
            hg.tl.programmes(table, path, layer=None)


def test_messages_do_not_name_other_verbs(table, caplog):
    table.layers["other"][0, 0] = np.nan
    hg.tl.programmes(table, SETS, layer="other")
    assert "1 genes contain NaN" in caplog.text
    assert "biomarkers" not in caplog.text


def test_invalid_arguments_raise_and_nothing_is_overwritten(table):
    options = {"layer": "other"}
    for net, match in (
        (pd.DataFrame({"source": ["a"]}), "`net` has no column 'target'"),
        ({"a/b": PLANTED}, "`net`: set name 'a/b' cannot be stored"),
        ({"a": ["x1", "x2"]}, "`net`: no set has at least 5 of the 30 genes"),
        (pd.DataFrame({"source": "a", "target": PLANTED, "weight": np.nan}), "`net`: 'weight' is not a finite number"),
        (pd.DataFrame({"source": "a", "target": PLANTED, "weight": 0}), "`net`: 'weight' is 0 in all rows"),
        ({"a": None}, "`net` is None; a list of texts is needed"),
        ("no.gmt", "`net`: file .* does not exist"),
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


# Metrics of training


@pytest.mark.slow
def test_a_card_has_the_held_out_accuracy_of_sets_named_in_training():
    rng = np.random.default_rng(0)
    sections = []
    for section in planted(4, n=100, n_genes=40, patients=4):
        counts = section.counts().toarray()
        # These genes are correlated, but not with any feature.
        counts[:, 20:26] = rng.poisson(40 * np.exp(0.5 * rng.normal(size=(100, 1)) + np.zeros(6)))
        targets = log_targets(scipy.sparse.csr_array(counts), counts.sum(1).astype(float))
        sections.append(replace(section, targets=targets, totals=counts.sum(1).astype(float)))
    sets = {"seen": [f"G{i}" for i in range(6)], "missed": [f"G{i}" for i in range(20, 26)]}
    weights = np.array([[float(f"G{i}" in genes) for genes in sets.values()] for i in range(40)])
    programmes = Programmes({name: dict.fromkeys(genes, 1.0) for name, genes in sets.items()}, weights)
    model = build_model(sections, replace(facts(40), programmes=programmes), recipe(), n_colour=N_COLOUR, n_target=10)
    found = model.programmes
    assert found["reliable"].to_dict() == {"seen": True, "missed": False}
    assert found.loc["seen", "pearson"] > 0.5 > abs(found.loc["missed", "pearson"])
    assert (found["ceiling"] > 0.8).all()
    assert found[["n_patients", "n_learned"]].to_numpy().tolist() == [[4, 40]] * 2
    assert found.loc["seen", "genes"] == "G0 G1 G2 G3 G4 G5"
    shipped = replace(
        model.card,
        encoder={**model.card.encoder, "sha256": "0" * 64},
        files=dict.fromkeys(["genes.csv", "weights.safetensors"], "0" * 64),
    )
    card = ModelCard.from_json(shipped.to_json(), "card.json")
    assert card.programmes == model.card.programmes
    assert "| missed | 6 |" in card.to_markdown()
    # With two patients there is no interval; the value is missing, not a text.
    two = replace(
        model.card,
        programmes={
            "n_patients": 2,
            "sets": {n: {**f, "pearson_low": None} for n, f in model.card.programmes["sets"].items()},
        },
    )
    assert replace(model, card=two).programmes["pearson_low"].dtype == float
    assert build_model(sections, facts(40), recipe(), n_colour=N_COLOUR, n_target=10).programmes.empty


@pytest.mark.slow
def test_sets_named_in_training_need_no_held_out_slides_and_others_stay_unknown(tmp_path, small_lite0):
    slides = [hg.datasets.toy((4, 4), mpp=2.0, seed=i) for i in range(4)]
    for i, slide in enumerate(slides):
        slide["table"].obs[["patient", "section"]] = f"P{i}"
    fat = {"fat": ["ADIPOQ", "FABP4", "PLIN1", "PLIN4", "LPL"], "small": ["ERBB2"]}
    preset = hg.DefaultRecipe(windows_um=(200.0,))
    model = hg.tl.train(slides[:3], preset=preset, genes=hg.GeneSelection(programmes=fat), show_progress_bar=False)
    hg.tl.predict(slides[3], model=model, show_progress_bar=False)
    slides[3].write(tmp_path / "s.zarr")
    back = spatialdata.read_zarr(tmp_path / "s.zarr")
    net = {"fat": fat["fat"], "other": ["ERBB2", "GRB7", "ADIPOQ", "FABP4", "PLIN1"]}
    with pytest.warns(UserWarning, match="the score of the sets other is unknown"):
        found = hg.tl.programmes(back, net).set_index("source")
    assert found["evidence"].to_dict() == {
        "fat": "3 patients held out in training",
        "other": "unknown: no held-out slides",
    }
    assert found.loc["fat", "pearson"] == pytest.approx(model.card.programmes["sets"]["fat"]["pearson"])
    assert np.isnan(found.loc["other", "pearson"])
    assert len(hg.get.programmes(back, reliable=False)) == 2 - found["reliable"].sum()
    drawn = hg.pl.spatial(back, ["fat", "other"])
    assert drawn[1].get_title() == "other (not reliable)"
    hg.tl.programmes(back, {"fat": fat["fat"], "mine": net["other"]}, layer=None, key_added="measured")
    assert hg.pl.spatial(back, "mine").get_title() == "mine (measured)"
    # The score of the prediction is drawn, not that of the last run.
    doubt = "" if found.loc["fat", "reliable"] else " (not reliable)"
    assert hg.pl.spatial(back, "fat").get_title() == f"fat{doubt}"
    back["table"].obsm["measured"] = back["table"].obsm["measured"].to_numpy()
    hg.pl.spatial(back, "ERBB2")
    # A set with the same name and other genes is another set.
    with pytest.warns(UserWarning, match="the score of any set is unknown"):
        hg.tl.programmes(back, {"fat": fat["fat"][:4] + ["ERBB2"]})
    with pytest.raises(ValueError, match="`programmes` of `genes` are only for preset 'default'"):
        hg.tl.train(slides[:3], preset="he2gene-base", genes=hg.GeneSelection(programmes=fat))
    with pytest.raises(ValueError, match="`programmes`: file 'no.gmt' does not exist"):
        hg.GeneSelection(programmes="no.gmt")


def test_names_of_sets_and_genes_are_cleaned():
    clean = read_net(SETS)
    blanks = {f"{name} ": [f" {gene}" for gene in genes] for name, genes in SETS.items()}
    pd.testing.assert_frame_equal(read_net(blanks), clean)
    categories = clean.astype("category")
    categories["source"] = categories["source"].cat.add_categories("unused")
    pd.testing.assert_frame_equal(read_net(categories), clean)


def test_weights_are_optional_for_each_set_and_genes_of_weight_0_are_left_out():
    net = read_net({"coag": ["F2", "F5"], "one": "F8", "B": {"G3": 0.5, "G4": 0.0}})
    assert weights_by_set(net) == {"coag": {"F2": 1.0, "F5": 1.0}, "one": {"F8": 1.0}, "B": {"G3": 0.5}}
    with pytest.raises(ValueError, match="`net` is None; a list of texts is needed"):
        read_net({"coag": None, "B": {"G3": 0.5}})


def test_nets_with_duplicated_row_names_are_joined():
    parts = [pd.DataFrame({"source": name, "target": genes, "weight": 2.0}) for name, genes in SETS.items()]
    assert weights_by_set(read_net(pd.concat(parts))) == {name: dict.fromkeys(SETS[name], 2.0) for name in SETS}


def trained_with_sets(genes, head="h", pearson=0.5):
    """Return a table of eleven genes, and the record of a model that was never saved."""
    figures = dict.fromkeys(_COLUMNS, pearson) | {"genes": "CDCA1 G1 G2:0.5", "reliable": True}
    told = pd.DataFrame({name: [value] for name, value in figures.items() if name not in (DEPTH, COLOUR)}, index=["s"])
    told = told.assign(**{DEPTH: 0.1, "colour": 0.1, "n_patients": 4, "n_learned": len(genes)})
    table = AnnData(np.ones((4, len(genes)), np.float32), var=pd.DataFrame(index=genes))
    table.layers["he2gene"] = np.random.default_rng(len(head)).normal(2, 0.3, table.shape)
    table.uns["he2gene"] = {"weights_sha256": "", "head": head, "layer": "he2gene", "model": "m", "programmes": told}
    return table


def test_metrics_of_training_are_matched_by_current_symbols_for_one_model_only():
    net = {"s": {"CDCA1": 1, "G1": 1, "G2": 0.5}}
    for name in ("CDCA1", "NUF2"):
        found = hg.tl.programmes(
            trained_with_sets([name, *(f"G{i}" for i in range(10))], pearson="0.5"), net, min_genes=3
        )
        assert found[["pearson", "evidence"]].to_numpy().tolist() == [[0.5, "4 patients held out in training"]]
    tables = [trained_with_sets(["NUF2", *(f"G{i}" for i in range(10))], head) for head in ("h", "other")]
    with pytest.warns(UserWarning, match="`held_out` is not given"):
        found = hg.tl.programmes(tables, net, min_genes=3)
    assert found["pearson"].isna().all()
