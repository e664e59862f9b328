from types import SimpleNamespace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import spatialdata as sd
from matplotlib.colors import to_hex
from sklearn import metrics
from spatialdata.models import Image2DModel

import he2gene_sc as hg
from he2gene_sc.stats import log_normalise, pitch_of

pytestmark = pytest.mark.slow


def run(data, **kwargs):
    given = {"n_seeds": 2, "clustering": "kmeans", "layer": None, "n_perms": 99} | kwargs
    hg.tl.domain_preservation(data, given.pop("domain_key", "pathologist"), **given)
    return hg.get.domains(data, key=given.get("key_added", "he2gene_domains"))


def value(table, labels, score, against="domains"):
    chosen = (table["labels"] == labels) & (table["score"] == score) & (table["against"] == against)
    return table.loc[chosen, "mean"].item()


@pytest.fixture(scope="module")
def slide():
    """Slide with scores of simulated predictions (blurred measurements); tests must not change it."""
    made = hg.datasets.toy((9, 9), mpp=4.0)
    table = made["table"]
    measured = _log(table)
    table.layers["he2gene"] = (0.7 * measured + 0.3 * measured.mean(0)).astype(np.float32)
    noise = np.random.default_rng(0).uniform(0, 0.5, table.shape)
    table.layers["he2gene"] = (table.layers["he2gene"] + noise).astype(np.float32)
    table.obs["he2gene_annotation"] = table.obs["pathologist"].copy()
    # A spot without a label, for example on glass.
    table.obs.loc[table.obs_names[0], "he2gene_annotation"] = np.nan
    run(made, layer="he2gene", n_seeds=1)
    return made


def _log(table):
    from he2gene_sc.stats import log_normalise

    return log_normalise(table.X)


def test_scores_of_the_written_labels_equal_scikit_learn(slide):
    table, obs = hg.get.domains(slide), slide["table"].obs
    for name in ("predicted", "measured"):
        clusters = obs[f"he2gene_domains_{name}"].astype(str)
        for score, function in {
            "ari": metrics.adjusted_rand_score,
            "nmi": metrics.normalized_mutual_info_score,
            "ami": metrics.adjusted_mutual_info_score,
            "homogeneity": metrics.homogeneity_score,
            "completeness": metrics.completeness_score,
        }.items():
            expected = function(obs["pathologist"].astype(str), clusters)
            assert value(table, name, score) == pytest.approx(expected, abs=1e-12)
    both = metrics.adjusted_rand_score(
        obs["he2gene_domains_measured"].astype(str), obs["he2gene_domains_predicted"].astype(str)
    )
    assert value(table, "predicted", "ari", "measured") == pytest.approx(both, abs=1e-12)


def test_silhouette_is_computed_on_the_principal_components(slide):
    import scanpy as sc

    pcs = sc.pp.pca(slide["table"].layers["he2gene"], n_comps=20, random_state=0)
    expected = metrics.silhouette_score(pcs, slide["table"].obs["pathologist"])
    assert value(hg.get.domains(slide), "predicted", "silhouette") == pytest.approx(expected, abs=1e-4)


def test_moran_and_neighbourhood_enrichment_equal_squidpy(slide):
    import squidpy as sq
    from anndata import AnnData
    from scipy.stats import spearmanr

    table = slide["table"]
    graph = AnnData(
        _log(table),
        obs=table.obs[["pathologist", "he2gene_domains_predicted"]],
        obsm={"spatial": table.obsm["spatial"]},
    )
    graph.layers["predicted"] = table.layers["he2gene"]
    sq.gr.spatial_neighbors_radius(graph, radius=1.5 * pitch_of(table.obsm["spatial"]))
    quiet = {"copy": True, "show_progress_bar": False}
    measured = sq.gr.spatial_autocorr(graph, n_perms=None, **quiet)["I"]
    predicted = sq.gr.spatial_autocorr(graph, n_perms=None, layer="predicted", **quiet)["I"]
    found = hg.get.domains(slide)
    expected = spearmanr(measured, predicted[measured.index]).statistic
    assert value(found, "predicted", "moran", "measured") == pytest.approx(expected, abs=1e-6)

    names = list(graph.obs["pathologist"].cat.categories)
    graph.obs["clusters"] = pd.Categorical(graph.obs["he2gene_domains_predicted"].astype(str), [f"~{n}" for n in names])
    z = [sq.gr.nhood_enrichment(graph, key, n_perms=1000, seed=0, **quiet)[0] for key in ("pathologist", "clusters")]
    upper = np.triu_indices(len(names))
    expected = np.corrcoef(z[0][upper], z[1][upper])[0, 1]
    # Permutations depend on the order of the codes.
    assert value(found, "predicted", "nhood_enrichment") == pytest.approx(expected, abs=0.02)


def test_leiden_clusters_more_spots_than_scanpy_searches_exactly():
    from he2gene_sc.tl._domains.clusters import cluster

    truth = np.arange(8200) % 4
    x = np.random.default_rng(0).standard_normal((8200, 10)) + 10 * np.eye(4, 10)[truth]
    (found,) = cluster(x, 4, [0], "leiden")
    assert metrics.adjusted_rand_score(truth, found) == 1


def test_leiden_reads_the_neighbours_that_pynndescent_finds(monkeypatch):
    """The search compiles for a minute. So scikit-learn finds the neighbours, and pynndescent makes its matrix of them."""
    from pynndescent import PyNNDescentTransformer
    from sklearn.neighbors import NearestNeighbors

    from he2gene_sc.tl._domains import clusters

    def fit(self, X, compress_index=True):
        assert (self.metric, self.random_state) == ("euclidean", 0)
        distances, indices = NearestNeighbors(n_neighbors=self.n_neighbors + 1).fit(X).kneighbors(X)
        graph = indices.astype(np.int32), distances.astype(np.float32)
        self.n_samples_fit, self.index_ = len(X), SimpleNamespace(neighbor_graph=graph)
        fitted.append(len(X))
        return self

    fitted = []
    monkeypatch.setattr(PyNNDescentTransformer, "fit", fit)
    truth = np.arange(200) % 4
    x = np.random.default_rng(0).standard_normal((200, 10)) + 10 * np.eye(4, 10)[truth]
    exact = clusters.cluster(x, 4, [0], "leiden")
    monkeypatch.setattr(clusters, "_EXACT_SPOTS", 200)
    found = clusters.cluster(x, 4, [0], "leiden")
    assert fitted == [200]
    np.testing.assert_array_equal(found, exact)
    assert metrics.adjusted_rand_score(truth, found[0]) == 1


def test_neighbourhood_enrichment_of_many_clusters_counts_those_with_a_domain(monkeypatch):
    import squidpy as sq

    from he2gene_sc.stats import enrichment_agreement, match
    from he2gene_sc.tl._domains.scores import Enrichment, Labels, _compare

    xy = np.argwhere(np.ones((20, 20))).astype(float)
    rng, row = np.random.default_rng(0), xy[:, 0].astype(int)
    domains = 3 * row // 20
    clusters = np.where(rng.random(400) < 0.5, np.array([7, 2, 5])[domains], rng.integers(0, 12, 400))
    full = Enrichment(xy, 0)
    matched = match(domains, clusters)
    expected = enrichment_agreement(full.scores(domains), full.scores(clusters), matched)
    assert abs(expected) < 0.999
    compute, n_labels = sq.gr.nhood_enrichment, []

    def counted(table, key, **options):
        n_labels.append(table.obs[key].nunique())
        return compute(table, key, **options)

    monkeypatch.setattr(sq.gr, "nhood_enrichment", counted)
    shifts = np.zeros((0, 400), int)
    rows = _compare(Labels("x", [clusters]), "domains", [domains], [clusters], shifts, Enrichment(xy, 0))
    (found,) = [row["mean"] for row in rows if row["score"] == "nhood_enrichment"]
    assert found == expected
    assert max(n_labels) == 4


def test_references_are_scored_and_marked_if_trained_on_labels(slide):
    table = hg.get.domains(slide, score="ari")
    kinds = {"predicted", "measured", "depth", "mean colour", "coordinates", "random features", "annotation head"}
    assert set(table["labels"]) == kinds
    head = table[table["labels"] == "annotation head"]
    assert head["trained_on_labels"].item()
    # Missing labels count as one more label.
    obs = slide["table"].obs
    expected = metrics.adjusted_rand_score(
        obs["pathologist"], obs["he2gene_annotation"].astype(object).fillna("unknown")
    )
    assert head["mean"].item() == pytest.approx(expected)
    assert 0.9 < expected < 1
    assert not table.loc[table["labels"] != "annotation head", "trained_on_labels"].any()
    assert abs(value(table, "random features", "ari")) < 0.15
    assert value(table, "measured", "ari") > 0.8
    tested = table.dropna(subset="pval")
    assert (tested["pval"] >= 1 / (tested["n_shifts"] + 1)).all()
    assert tested["n_shifts"].between(20, 99).all()


def test_clusters_have_the_name_and_colour_of_the_matched_domain(slide):
    table = slide["table"]
    column = table.obs["he2gene_domains_measured"]
    assert list(column.cat.categories) == [f"~{name}" for name in table.obs["pathologist"].cat.categories]
    agrees = column.astype(str).str[1:] == table.obs["pathologist"].astype(str)
    assert agrees.mean() > 0.8
    assert len(table.uns["he2gene_domains_measured_colors"]) == len(column.cat.categories)


def test_results_survive_zarr(slide, tmp_path):
    slide.write(tmp_path / "slide.zarr")
    again = sd.read_zarr(tmp_path / "slide.zarr")
    pd.testing.assert_frame_equal(hg.get.domains(again), hg.get.domains(slide))
    assert again["table"].uns["he2gene_domains"]["params"]["domain_key"] == "pathologist"
    run(again, layer="he2gene")


def test_a_table_gives_the_same_result_as_the_object_except_for_colour(slide):
    table = slide["table"].copy()
    run(table, layer="he2gene", n_seeds=1)
    whole = hg.get.domains(slide)
    found, whole = (
        t.drop(columns="pval_better") for t in (hg.get.domains(table), whole[whole["labels"] != "mean colour"])
    )
    pd.testing.assert_frame_equal(found, whole.reset_index(drop=True))


def test_a_prediction_from_depth_alone_is_not_better_than_depth():
    """Four round domains of three kinds; depth separates one kind from the others, expression separates all."""
    rng = np.random.default_rng(0)
    xy = np.stack(np.mgrid[:16, :16], -1).reshape(-1, 2).astype(float)
    round_ = [np.square(xy - centre).sum(1) < 16 for centre in ([2, 2], [8, 3], [4, 8], [10, 10])]
    domain = np.select([round_[0] | round_[3], round_[1] | round_[2]], [1, 2], 0)
    level = np.array([2.0, 2.0, 3.0])[domain] + rng.normal(0, 0.1, len(xy))
    means = rng.normal(0, 1, (3, 40))
    counts = rng.poisson(np.exp(level[:, None] + means[domain]))
    log = log_normalise(counts)
    blind = (log.mean(0) + 0.5 * np.log(counts.sum(1))[:, None] + rng.normal(0, 0.01, log.shape)).astype(np.float32)
    pvalues = {}
    for name, values in (("good", log), ("blind", blind)):
        table = ad.AnnData(counts.astype(np.float32), obs=pd.DataFrame({"domain": [f"d{i}" for i in domain]}))
        table.obs_names = [f"s{i}" for i in range(len(xy))]
        table.obsm["spatial"], table.layers["he2gene"] = xy, np.maximum(values, 0)
        found = run(table, domain_key="domain", layer="he2gene", genes=list(table.var_names))
        ari = found[found["score"] == "ari"]
        rows = ari[ari["against"] == "domains"].set_index("labels")
        pvalues[name] = rows.loc["predicted", "pval_better"]
        of = rows.loc[["depth", "coordinates"]]
        assert pvalues[name] == of["pval_better"].max()
        np.testing.assert_allclose(of["difference"], rows.loc["predicted", "mean"] - of["mean"])
    assert pvalues["good"] < 0.05
    assert pvalues["blind"] > 0.1


@pytest.mark.parametrize("kind", ["rim", "hue", "expression"])
def test_a_prediction_from_position_or_colour_alone_is_not_better_than_these(kind):
    """Clusters of positions are halves, not a rim; clusters of colours follow darkness, but the prediction follows hue."""
    from scipy.ndimage import gaussian_filter

    from he2gene_sc.tl._domains.domain_preservation import _score_section, _Settings

    rng = np.random.default_rng(1)
    xy = np.stack(np.mgrid[:16, :16], -1).reshape(-1, 2).astype(float)
    smooth = [gaussian_filter(rng.normal(size=(16, 16)), 2).ravel() for _ in range(4)]
    dark, hue, seen, wobble = ((field - field.mean()) / field.std() for field in smooth)
    radius = np.hypot(*(xy - 7.5).T)
    domain = {"rim": radius + 0.5 * wobble > 6, "hue": hue > 0, "expression": seen > 0}[kind].astype(int)
    field = {"rim": radius, "hue": hue, "expression": seen}[kind]
    predicted = np.outer(field, rng.normal(size=12)) + rng.normal(0, 0.01, (256, 12))
    colour = 4 * dark[:, None] + np.outer(hue, [1, -1, 0])
    how = _Settings("match", [0], 199, "kmeans")
    spaces = {"predicted": predicted, "mean colour": colour}
    lines, _, _ = _score_section(xy, domain, spaces, None, how, members=np.arange(256), section="S")
    ari = pd.DataFrame([line for line in lines if line["score"] == "ari"]).set_index("labels")
    assert ari.loc["predicted", "mean"] > 0.7
    assert ari.loc[["mean colour", "coordinates"], "mean"].max() < 0.4
    assert (ari.loc["predicted", "pval_better"] < 0.05) == (kind == "expression")


def test_leiden_is_tuned_to_the_number_of_domains():
    table = hg.datasets.toy((9, 9), mpp=8.0)["table"]
    found = run(table, clustering="leiden", n_domains=4)
    assert value(found, "measured", "n_labels", "") == 4
    assert table.obs["he2gene_domains_measured"].nunique() == 4
    with pytest.warns(UserWarning, match="leiden could not produce exactly 2 clusters"):
        run(table, clustering="leiden", n_domains=2, n_seeds=1)


def test_measured_expression_alone_is_scored_and_leaves_no_predicted_column(slide):
    table = slide["table"].copy()
    found = run(table, layer=None)
    assert "predicted" not in set(found["labels"])
    assert "he2gene_domains_predicted" not in table.obs
    assert "he2gene_domains_predicted_colors" not in table.uns


def test_a_prediction_without_measurement_is_scored(toy, tiny_model):
    del toy.tables["table"]
    hg.tl.predict(toy, model=tiny_model)
    table = toy["table"]
    table.obs["half"] = pd.Categorical(np.where(np.arange(table.n_obs) < 15, "a", "b"))
    with pytest.warns(UserWarning, match="no p-value can be below"):
        found = run(toy, domain_key="half", layer="he2gene")
    assert {"predicted", "mean colour"} <= set(found["labels"])
    assert "measured" not in set(found["labels"])
    with pytest.raises(ValueError, match="has no measured values"):
        run(toy, domain_key="half", layer=None)


def test_only_reliable_genes_are_used_on_both_sides(toy, tiny_model):
    hg.tl.predict(toy, model=tiny_model)
    with pytest.warns(UserWarning, match="no p-value can be below"):
        run(toy, layer="he2gene")
    used = set(toy["table"].uns["he2gene_domains"]["genes"])
    assert used == set(hg.get.genes(toy, reliable=True)) & set(toy["table"].var_names)


def _adapted(table):
    table.uns["he2gene"] = {"weights_sha256": "0", "layer": "he2gene", "model": "none"}
    table.uns["changed"] = {"verb": "adapt", "params": {"layer": "he2gene"}, "written": {}}
    return "changed"


def _with_another_name(table):
    table.uns["he2gene"] = {"weights_sha256": "0", "layer": "changed", "model": "none"}
    return "changed"


@pytest.mark.parametrize("change", [_adapted, _with_another_name])
def test_a_layer_with_another_name_uses_genes_head_and_image_of_its_prediction(slide, change):
    table = slide["table"].copy()
    layer = change(table)
    table.layers[layer] = table.layers["he2gene"].copy()
    table.var["he2gene_reliable"] = np.arange(table.n_vars) < 8
    table.uns["he2gene"]["image"] = "he"
    turned = Image2DModel.parse(np.asarray(slide["he"].data)[:, ::-1, ::-1], dims=("c", "y", "x"))
    images = {"he": slide["he"], "turned": turned}
    other = sd.SpatialData(images=images, shapes={"spots": slide["spots"]}, tables={"table": table})
    other.attrs["he2gene"] = {"mpp": dict.fromkeys(images, 4.0)}
    lines = run(other, layer=layer, n_seeds=1, n_perms=19)
    assert list(table.uns["he2gene_domains"]["genes"]) == list(table.var_names[:8])
    assert {"annotation head", "mean colour"} <= set(lines["labels"])
    assert hg.pl.domains(other)[0].get_title() == "tissue"


def test_spots_without_a_domain_are_clustered_but_not_scored(slide):
    table = slide["table"].copy()
    table.obs["some"] = table.obs["pathologist"].astype(object)
    unlabelled = np.arange(0, 81, 9)
    table.obs.iloc[unlabelled, table.obs.columns.get_loc("some")] = np.nan
    found = run(table, domain_key="some", n_seeds=1)
    assert table.obs["he2gene_domains_measured"].notna().all()
    kept = table.obs["some"].notna().to_numpy()
    expected = metrics.adjusted_rand_score(
        table.obs["some"][kept].astype(str), table.obs["he2gene_domains_measured"][kept].astype(str)
    )
    assert value(found, "measured", "ari") == pytest.approx(expected)


def test_spots_and_genes_without_values_are_left_out(slide):
    table = slide["table"].copy()
    lacking = table.var_names.get_loc("FTL")
    table.layers["he2gene"][:40, lacking] = np.nan
    table.layers["he2gene"][5] = np.nan
    run(table, layer="he2gene", n_seeds=1)
    assert "FTL" not in table.uns["he2gene_domains"]["genes"]
    clusters = table.obs["he2gene_domains_predicted"]
    assert np.flatnonzero(clusters.isna()).tolist() == [5]


def test_a_spot_outside_the_image_keeps_its_measured_values(toy):
    toy = toy.subset(["he", "spots", "table"])
    inside = toy["he"].isel(y=slice(0, toy["he"].sizes["y"] * 3 // 4))
    toy["he"] = inside
    with pytest.warns(UserWarning, match="no p-value"):
        found = run(toy)
    assert toy["table"].obs["he2gene_domains_measured"].notna().all()
    assert "mean colour" not in set(found["labels"])


def test_rare_domains_are_left_out_with_a_warning(slide):
    table = slide["table"].copy()
    table.obs["rare"] = table.obs["pathologist"].astype(str)
    table.obs.iloc[:2, table.obs.columns.get_loc("rare")] = "a scar"
    with pytest.warns(UserWarning, match=r"fewer than 3 spots.*'a scar' \(2 in toy-0\)"):
        found = run(table, domain_key="rare")
    assert value(found, "domains", "n_labels", "") == 3


def test_sections_are_scored_separately_and_averaged_over_samples():

    parts = {name: hg.datasets.toy((7, 7), mpp=8.0, seed=i)["table"] for i, name in enumerate("abc")}
    table = ad.concat(parts, label="block", index_unique="-")
    table.obs["patient"] = table.obs["block"].map({"a": "p", "b": "p", "c": "q"})
    found = run(table, sample_key="patient")
    scores = found[(found["labels"] == "measured") & (found["score"] == "ari")].set_index("section")
    assert set(scores.index) == {"toy-0", "toy-1", "toy-2", "all"}
    alone = run(parts["b"].copy())
    assert scores["mean"]["toy-1"] == pytest.approx(value(alone, "measured", "ari"))
    by_patient = [scores["mean"][["toy-0", "toy-1"]].mean(), scores["mean"]["toy-2"]]
    assert scores["mean"]["all"] == pytest.approx(np.mean(by_patient))
    assert scores["sd"]["all"] == pytest.approx(np.std(by_patient, ddof=1))
    assert np.isnan(scores["pval"]["all"])
    assert scores["n_samples"]["all"] == 2
    with pytest.raises(ValueError, match=r"`section` is ambiguous, candidates: \['toy-0'"):
        hg.pl.domains(table)
    assert len(hg.pl.domains(table, section="toy-2")) == 2


def _table(n=9, seed=0):
    rng = np.random.default_rng(seed)
    xy = np.argwhere(np.ones((n, n))).astype(float)
    domain = np.where(xy[:, 0] < n / 2, "a", "b")
    rates = np.where((domain == "a")[:, None], 5, 2) * np.ones(20)
    table = ad.AnnData(rng.poisson(rates).astype(np.float32), obs=pd.DataFrame({"pathologist": domain}))
    table.obs_names = [f"{seed}_{i}" for i in range(len(xy))]
    table.obsm["spatial"] = xy
    return table


def test_patients_of_one_table_are_not_clustered_together():
    tables = [_table(seed=seed) for seed in (0, 1)]
    for name, table in zip("PQ", tables, strict=True):
        table.obs["patient"] = name
    tables[1].obsm["spatial"] = tables[1].obsm["spatial"] + 100
    both = ad.concat(tables)
    found = run(both)
    assert set(found["section"]) == {"P", "Q", "all"}
    assert both.uns["he2gene_domains"]["params"]["sample_key"] == "patient"


def test_positions_without_a_lattice_have_no_pvalue_and_a_warning():
    table = _table()
    table.obsm["spatial"] = np.random.default_rng(0).uniform(0, 9, table.obsm["spatial"].shape)
    with pytest.warns(
        UserWarning, match="No p-value for section .*: no shift keeps 70% of the labelled spots on other spots"
    ):
        found = run(table)
    assert found["pval"].isna().all()


@pytest.mark.parametrize("blank", [np.nan, "", "nan"])
def test_whole_numbers_are_labels_and_blanks_are_missing(blank):
    table = _table()
    codes = np.where(table.obs["pathologist"] == "a", 1.0, 0.0)
    codes[3] = np.nan
    table.obs["code"] = codes
    if isinstance(blank, str):
        table.obs["code"] = [blank if np.isnan(code) else str(int(code)) for code in codes]
    run(table, domain_key="code")
    assert set(table.obs["he2gene_domains_measured"].astype(str)) == {"~0", "~1"}
    assert len(hg.pl.domains(table)) == 2


def test_a_section_with_one_domain_is_skipped():

    parts = [hg.datasets.toy((7, 7), mpp=8.0, seed=i)["table"] for i in range(2)]
    parts[1].obs["pathologist"] = "tumour"
    table = ad.concat(parts, index_unique="-")
    with pytest.warns(UserWarning, match="'toy-1' has fewer than two domains"):
        found = run(table)
    assert set(found["section"]) == {"toy-0"}
    assert table.obs["he2gene_domains_measured"].isna().sum() == 49


def _column(table, labels):
    table.obs["odd"] = labels
    return table


@pytest.mark.parametrize(
    ("change", "given", "message"),
    [
        (None, {"domain_key": "nope"}, "`domain_key` 'nope' is not a column of obs"),
        (None, {"domain_key": "texture"}, "`domain_key` 'texture' holds fractions"),
        (lambda t: _column(t, "same"), {"domain_key": "odd"}, "no section has two domains of at least 3"),
        (lambda t: _column(t, ["a"] * 28 + ["b"] * 2), {"domain_key": "odd"}, "no section has two domains of at least 3"),
        (None, {"layer": "he2gene"}, "`layer` 'he2gene' is not a layer"),
        (lambda t: t.layers.update(he2gene=t.X.copy()), {"layer": "he2gene"}, "looks like raw counts.*layer_scale='counts'"),
        (lambda t: setattr(t, "X", _log(t)), {}, "`measured`: X looks like log-transformed.*measured_scale='log'"),
        (None, {"genes": ["ERBB2", "NOPE"]}, r"`genes`: \['NOPE'\] are not genes"),
        (None, {"genes": ["ERBB2", "ERBB2"]}, "`genes`: 'ERBB2' is given twice"),
        (None, {"genes": ["ERBB2"]}, "`genes`: 1 genes have values"),
        (lambda t: t.layers.update(he2gene=_all_nan(t)), {"layer": "he2gene", "genes": ["ERBB2", "FTL"]}, r"`genes`: \['ERBB2'\] are NaN"),
        (None, {"n_domains": 1}, "`n_domains` is 1"),
        (None, {"n_domains": 30}, "`n_domains` is 30, but section 'toy-0' has 30 spots"),
        (None, {"n_seeds": 0}, "`n_seeds` is 0"),
        (None, {"n_perms": 0.5}, "`n_perms` is 0.5"),
        (None, {"clustering": "dbscan"}, "`clustering` is 'dbscan', valid"),
        (None, {"sample_key": "nope"}, "`sample_key` 'nope' is not a column"),
        (None, {"key_added": "a/b"}, "`key_added` 'a/b' cannot be stored"),
        (lambda t: t.uns.update(he2gene_domains=3), {}, "was not written by hg.tl.domain_preservation"),
        (lambda t: t.obsm["spatial"].__setitem__(1, t.obsm["spatial"][0]), {}, "1 spots are duplicated at the same place"),
        (lambda t: setattr(t, "obs_names", ["x", "x", *t.obs_names[2:]]), {}, "`data`: obs_names are duplicated: 'x'"),
        (lambda t: t.obsm.pop("spatial"), {}, "no obsm\\['spatial'\\]"),
    ],
)  # fmt: skip
def test_invalid_input_raises_before_anything_is_written(change, given, message):
    table = hg.datasets.toy((5, 6), mpp=8.0)["table"]
    if change is not None:
        change(table)
    before = set(table.uns) | set(table.obs)
    with pytest.raises(ValueError, match=message):
        run(table, **given)
    assert set(table.uns) | set(table.obs) == before


def _all_nan(table):
    values = _log(table)
    values[:, table.var_names.get_loc("ERBB2")] = np.nan
    return values


def test_one_patient_under_two_names_raises():

    one = hg.datasets.toy((5, 6), mpp=8.0)["table"]
    table = ad.concat({"p": one, "P1": one}, label="patient", index_unique="-")
    with pytest.raises(
        ValueError,
        match="`sample_key`: 30 spots are the same, value by value, in samples 'P1' and 'p': a patient with two names",
    ):
        run(table, sample_key="patient")


def test_other_types_raise():
    with pytest.raises(TypeError, match="DataFrame"):
        run(pd.DataFrame())


def test_get_filters_the_table_and_raises_if_it_is_missing(slide):
    found = hg.get.domains(slide, score="pas", labels="measured")
    assert len(found) == 1
    with pytest.raises(ValueError, match="`score` 'nope' is not in the table, valid"):
        hg.get.domains(slide, score="nope")
    with pytest.raises(ValueError, match="run hg.tl.domain_preservation first"):
        hg.get.domains(slide, key="other")


def test_the_plot_shows_tissue_annotation_measured_and_predicted(slide, tmp_path):
    axes = hg.pl.domains(slide, save=tmp_path / "domains.png")
    titles = [ax.get_title() for ax in axes]
    assert titles[0] == "tissue"
    assert titles[1] == "annotation\npathologist"
    score = value(hg.get.domains(slide), "predicted", "ari")
    assert titles[3].startswith(f"predicted\nARI {score:.2f}, p = 0.0")
    assert (tmp_path / "domains.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="`section` 'nope' was not scored"):
        hg.pl.domains(slide, section="nope")


def test_without_an_image_only_spots_are_drawn_in_the_colours_of_their_domains(slide):
    table = slide["table"]
    annotation, measured, _ = hg.pl.domains(table)

    def colour_of(ax, i):
        for circles in ax.collections:
            places = np.flatnonzero((circles.get_offsets() == table.obsm["spatial"][i]).all(1))
            if len(places):
                return to_hex(circles.get_facecolor()[places[0]])
        return None

    for i in range(0, table.n_obs, 7):
        if table.obs["he2gene_domains_measured"].iloc[i] == f"~{table.obs['pathologist'].iloc[i]}":
            assert colour_of(annotation, i) == colour_of(measured, i) is not None


def test_a_table_that_annotates_nothing_is_drawn_without_its_image(toy):
    del toy["table"].uns["spatialdata_attrs"]
    run(toy, layer=None)
    assert [ax.get_title().split("\n")[0] for ax in hg.pl.domains(toy)] == ["annotation", "measured"]


@pytest.mark.data
@pytest.mark.slow
def test_measured_clusters_of_a1_preserve_the_pathologists_domains(her2st):
    table = her2st("A1")["table"].copy()
    with pytest.warns(UserWarning, match="immune infiltrate"):
        found = run(table, clustering="leiden", n_seeds=3, n_perms=999)
    scores = found[found["score"] == "ari"].set_index("labels")
    assert scores["mean"]["measured"] > scores["mean"]["random features"] + 0.1
    assert scores["n_shifts"]["measured"] > 100


def test_a_domain_without_scores_is_not_in_the_legend():
    table = _table()
    table.obs.iloc[:2, table.obs.columns.get_loc("pathologist")] = "rare"
    with pytest.warns(UserWarning, match="'rare'"):
        run(table)
    annotation = hg.pl.domains(table)[0]
    assert [text.get_text() for text in annotation.get_legend().get_texts()] == ["a", "b"]


def test_a_duplicate_gene_raises():
    table = hg.datasets.toy((6, 6), mpp=4.0)["table"]
    table.var_names = [table.var_names[1], *table.var_names[1:]]
    with pytest.raises(ValueError, match=f"`data`: genes of var_names are duplicated: '{table.var_names[0]}'"):
        run(table)
