"""Entries of the user in an object are never overwritten: functions raise before any work and name the key."""

import warnings
from dataclasses import replace
from functools import partial

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import spatialdata as sd
from spatialdata.models import Image2DModel, Labels2DModel, PointsModel, ShapesModel

import he2gene_sc as hg
from tests.helpers.objects import snapshot

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tiny_model):
    """Tiny model with an OOD detector, so that predict writes every key."""
    made = hg.models.HE2Gene(replace(tiny_model.card, guard={}), tiny_model.genes, tiny_model.tensors)
    made.__dict__["network"] = tiny_model.network
    return made


@pytest.fixture
def idle(monkeypatch):
    """Fail if a spot is encoded."""

    def encode(*_, **__):
        raise AssertionError("spots were encoded")

    monkeypatch.setattr("he2gene_sc.tl._predict._predict_slide", encode)


@pytest.fixture
def predicted(toy, tiny_model):
    hg.tl.predict(toy, model=tiny_model)
    return toy


def put(table, slot, key):
    """Write an entry of the user under a key."""
    n_obs, n_vars = table.shape
    values = {"obs": 7, "var": 7, "obsm": np.full((n_obs, 2), 7.0), "layers": np.full((n_obs, n_vars), 7.0)}
    getattr(table, slot)[key] = values.get(slot, {"mine": 7})


def refused(sdata, match, call, *args, **kwargs):
    before = snapshot(sdata)
    with pytest.raises(ValueError, match=match):
        call(*args, **kwargs)
    assert snapshot(sdata) == before


WRITTEN = [
    ("layers", "new"),
    *(("var", f"new_{name}") for name in ("predicted", "pcc", "reliable", "reliable_known_patient", "mean")),
    *(("obs", f"new_{name}") for name in ("annotation", "annotation_confidence", "ood", "tissue")),
    ("obsm", "X_new"),
    ("obsm", "new_annotation_proba"),
    ("uns", "new"),
    ("uns", "new_annotation_colors"),
]


@pytest.mark.parametrize(("slot", "key"), WRITTEN)
def test_predict_refuses_a_key_of_the_user_before_encoding(toy, model, idle, slot, key):
    put(toy["table"], slot, key)
    refused(toy, rf"`key_added`: {slot}\['{key}'\] exists", hg.tl.predict, toy, model=model, key_added="new")


@pytest.mark.parametrize(("slot", "key"), WRITTEN)
def test_predict_refuses_a_key_that_differs_only_in_case(toy, model, idle, slot, key):
    put(toy["table"], slot, key.upper())
    refused(toy, rf"{slot} has '{key.upper()}', which differs", hg.tl.predict, toy, model=model, key_added="new")


def test_all_conflicting_keys_are_named(toy, model, idle):
    for slot, key in WRITTEN[1:4]:
        put(toy["table"], slot, key)
    refused(toy, r"so does var\['new_pcc'\], var\['new_reliable'\]", hg.tl.predict, toy, model=model, key_added="new")


def test_the_name_of_an_index_and_reserved_names_are_refused(toy, model, idle):
    toy["table"].obs.index.name = "new_ood"
    refused(toy, "index of obs is named 'new_ood'", hg.tl.predict, toy, model=model, key_added="new")
    for key in ("spatialdata_attrs", "spatial", "he2gene_made", "he2gene_spatial"):
        refused(toy, f"'{key}'.*is reserved", hg.tl.predict, toy, model=model, key_added=key)


@pytest.mark.parametrize("key", ["tab\n", "a\nb", "\n", "a\tb", "a b", ""])
def test_keys_with_a_line_break_are_refused(toy, model, idle, key):
    refused(toy, "`key_added` .* cannot be stored", hg.tl.predict, toy, model=model, key_added=key)
    refused(toy, "`layer` .* cannot be stored", hg.tl.predict, toy, model=model, layer=key)
    with pytest.raises(ValueError, match="`key_added`"):
        hg.pp.tissue(toy, key_added=key)


CALLS = {
    "embed": (hg.tl.embed, [("uns", "he2gene_features"), ("obsm", "X_he2gene_features")]),
    "programmes": (
        lambda t: hg.tl.programmes(t, {"a": t["table"].var_names[:6]}),
        [("uns", "he2gene_programmes"), ("obsm", "he2gene_programmes")],
    ),
    "evaluate": (
        lambda t: hg.tl.evaluate(t, baselines=[]),
        [("uns", "he2gene_eval"), *(("var", f"he2gene_eval_{m}") for m in ("pearson", "skill", "ceiling", "ssim"))],
    ),
    "intervals": (
        lambda t: hg.tl.intervals(t, model="breast-her2st"),
        [
            ("uns", "he2gene_intervals"),
            ("layers", "he2gene_lower"),
            ("layers", "he2gene_upper"),
            ("var", "he2gene_halfwidth"),
        ],
    ),
    "adapt": (
        lambda t: hg.tl.adapt(t, np.arange(30) % 2 == 0),
        [
            ("uns", "he2gene_adapted"),
            ("layers", "he2gene_adapted"),
            ("obs", "he2gene_adapted_measured"),
            ("var", "he2gene_adapted_gain"),
        ],
    ),
    "domain_preservation": (
        lambda t: hg.tl.domain_preservation(t, "pathologist"),
        [
            ("uns", "he2gene_domains"),
            *(("obs", f"he2gene_domains_{name}") for name in ("predicted", "measured")),
            *(("uns", f"he2gene_domains_{name}_colors") for name in ("predicted", "measured")),
        ],
    ),
    "biomarkers": (lambda t: hg.tl.biomarkers(t, "pathologist"), [("uns", "he2gene_biomarkers")]),
    "concordance": (lambda t: hg.tl.concordance(t, "pathologist"), [("uns", "he2gene_concordance")]),
    "enrichment": (lambda t: hg.tl.enrichment(t, pd.DataFrame()), [("uns", "he2gene_enrichment")]),
}


@pytest.mark.parametrize("change", [str, str.upper], ids=["taken", "case"])
@pytest.mark.parametrize(("verb", "slot", "key"), [(v, *entry) for v, (_, keys) in CALLS.items() for entry in keys])
def test_verbs_refuse_a_key_of_the_user(predicted, verb, slot, key, change):
    table = predicted["table"]
    if verb == "enrichment":
        table.uns["he2gene_biomarkers"] = {"verb": "biomarkers", "params": {}, "written": {}}
    put(table, slot, change(key))
    refused(predicted, rf"{slot}.*'{change(key)}'", CALLS[verb][0], predicted)


def test_an_earlier_prediction_is_replaced(predicted, tiny_model):
    before = predicted["table"].layers["he2gene"].copy()
    hg.tl.predict(predicted, model=tiny_model, mpp=2.4)
    assert not np.array_equal(predicted["table"].layers["he2gene"], before, equal_nan=True)


def as_written_by_060(table):
    """Change the record to the format of version 0.6.0: no list of keys, no digests."""
    for name in ("verb", "written", "signatures"):
        table.uns["he2gene"].pop(name, None)
    table.uns["he2gene_spatial"] = "he"
    return table


def test_a_prediction_of_version_060_is_recognised(predicted, tiny_model):
    as_written_by_060(predicted["table"])
    hg.tl.predict(predicted, model=tiny_model, mpp=2.4)
    assert predicted["table"].uns["he2gene"]["mpp"] == 2.4


def test_a_user_column_beside_a_prediction_of_version_060_is_kept(predicted, model, idle):
    as_written_by_060(predicted["table"])
    predicted["table"].obs["he2gene_adapted_measured"] = 7
    refused(predicted, "he2gene_adapted_measured", hg.tl.adapt, predicted, np.arange(30) % 2 == 0)


def round_trip(sdata, how, folder):
    """Return the object with its table copied, subset, concatenated, or written and read."""
    table = sdata["table"]
    if how == "zarr":
        sdata.write(folder / "slide.zarr")
        return sd.read_zarr(folder / "slide.zarr")
    if how == "h5ad":
        table.write_h5ad(folder / "table.h5ad")
        table = ad.read_h5ad(folder / "table.h5ad")
    elif how == "subset":
        table = table[5:25].copy()
        sdata.shapes["spots"] = sdata["spots"].iloc[5:25]
    elif how == "reordered":
        table = table[::-1].copy()
    elif how.startswith("concat"):
        attrs = table.uns["spatialdata_attrs"]
        merge = {"uns_merge": how.partition("-")[2] or None}
        table = ad.concat([table[:10], table[10:]], **merge)
        table.uns["spatialdata_attrs"] = attrs
    else:
        table = table.copy()
    del sdata.tables["table"]
    sdata["table"] = table
    return sdata


@pytest.mark.parametrize(
    "how", ["copy", "h5ad", "zarr", "subset", "reordered", "concat", "concat-same", "concat-first", "concat-unique"]
)
def test_ownership_survives(predicted, tiny_model, tmp_path, how):
    sdata = round_trip(predicted, how, tmp_path)
    hg.tl.predict(sdata, model=tiny_model, mpp=2.4)
    assert sdata["table"].uns["he2gene"]["mpp"] == 2.4
    put(sdata["table"], "obs", "he2gene_adapted_measured")
    refused(sdata, "he2gene_adapted_measured", hg.tl.adapt, sdata, np.arange(sdata["table"].n_obs) % 2 == 0)


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize(
    ("slot", "key"),
    [
        ("obs", "he2gene_annotation"),
        ("obs", "he2gene_annotation_confidence"),
        ("var", "he2gene_reliable"),
        ("layers", "he2gene"),
        ("obsm", "X_he2gene"),
        ("obsm", "he2gene_annotation_proba"),
    ],
)
def test_entries_that_the_user_has_changed_are_not_overwritten(
    predicted, tiny_model, idle, tmp_path, slot, key, stored
):
    if stored:
        predicted = round_trip(predicted, "zarr", tmp_path)
    table = predicted["table"]
    values = getattr(table, slot)[key]
    if key == "he2gene_annotation":
        table.obs[key] = pd.Categorical(["mine", *values.astype(str)[1:]])
    elif key == "he2gene_reliable":
        table.var[key] = ~values
    else:
        changed = values.copy()
        changed[:] = np.nan_to_num(np.asarray(values)) + 1
        getattr(table, slot)[key] = changed
    refused(predicted, rf"{slot}\['{key}'\] exists and was changed after", hg.tl.predict, predicted, model=tiny_model)


def test_changed_colours_do_not_count_as_a_change(predicted, tiny_model):
    predicted["table"].uns["he2gene_annotation_colors"] = ["#000000"] * 3
    hg.tl.predict(predicted, model=tiny_model)


def test_spot_centres_that_the_user_has_replaced_are_kept(toy, tiny_model):
    del toy["table"].obsm["spatial"]
    hg.tl.predict(toy, model=tiny_model)
    toy["table"].obsm["spatial"] = toy["table"].obsm["spatial"] * 2
    mine = toy["table"].obsm["spatial"].copy()
    hg.tl.predict(toy, model=tiny_model, mpp=2.4)
    np.testing.assert_array_equal(toy["table"].obsm["spatial"], mine)


def test_results_that_the_user_changed_are_not_removed_with_their_input(predicted, tiny_model):
    table = predicted["table"]
    hg.tl.adapt(predicted, np.arange(30) % 2 == 0)
    table.layers["he2gene_adapted"] = table.layers["he2gene_adapted"] + 1
    with pytest.warns(UserWarning, match="removed.*he2gene_adapted"):
        hg.tl.predict(predicted, model=tiny_model, mpp=2.4)
    assert "he2gene_adapted" in table.layers
    assert "he2gene_adapted_gain" not in table.var


def test_an_enrichment_is_removed_with_its_biomarkers(predicted):
    table = predicted["table"]
    table.uns["he2gene_enrichment"] = {"verb": "enrichment", "params": {"key": "he2gene_biomarkers"}, "written": {}}
    run = {"groupby": "pathologist", "layer": None, "method": "wilcoxon"}
    hg.tl.biomarkers(table, **run)
    hg.tl.biomarkers(table, **run)
    assert "he2gene_enrichment" in table.uns
    with pytest.warns(UserWarning, match="removed.*he2gene_enrichment"):
        hg.tl.biomarkers(table, **run, groups=["tumour"])
    assert "he2gene_enrichment" not in table.uns


# Elements


def element(kind):
    if kind == "images":
        return Image2DModel.parse(np.zeros((3, 8, 8), np.uint8), dims=("c", "y", "x"))
    if kind == "labels":
        return Labels2DModel.parse(np.full((8, 8), 7, np.uint16), dims=("y", "x"))
    if kind == "points":
        return PointsModel.parse(np.zeros((3, 2)))
    return ShapesModel.parse(np.zeros((3, 2)), geometry=0, radius=1.0)


@pytest.mark.parametrize("kind", ["images", "labels", "points", "shapes"])
@pytest.mark.parametrize("name", ["new", "New"])
@pytest.mark.parametrize("function", ["tissue", "grid", "qc", "normalize_stains"])
def test_elements_of_the_user_are_refused(toy, monkeypatch, kind, name, function):
    getattr(toy, kind)[name] = element(kind)
    for module in ("tissue", "grid", "quality"):
        monkeypatch.setattr(f"he2gene_sc.pp._{module}.pyramid_of", pytest.fail)
    monkeypatch.setattr("he2gene_sc.pp._tissue.read_thumbnail", pytest.fail)
    call = getattr(hg.pp, function)
    call = partial(call, reference=toy) if function == "normalize_stains" else call
    refused(toy, rf"`key_added`: {kind}\['{name}'\] exists", call, toy, image_key="he", key_added="new")


def test_a_mask_and_a_grid_that_the_user_has_changed_are_refused(toy, tmp_path):
    for _ in range(2):
        hg.pp.tissue(toy)
        hg.pp.grid(toy, key_added="grid")
    toy.write(tmp_path / "slide.zarr")
    toy = sd.read_zarr(tmp_path / "slide.zarr")
    hg.pp.tissue(toy)
    hg.pp.grid(toy, key_added="grid")
    drawn = np.asarray(toy["he_tissue"]).copy()
    drawn[:5] = 1 - drawn[:5]
    toy.labels["he_tissue"] = Labels2DModel.parse(drawn, dims=("y", "x"))
    refused(toy, r"labels\['he_tissue'\] exists and was changed after hg.pp.tissue", hg.pp.tissue, toy)
    toy.shapes["grid"] = toy["grid"].iloc[1:]
    refused(toy, r"shapes\['grid'\] exists and was changed after hg.pp.grid", hg.pp.grid, toy, key_added="grid")


def test_a_grid_of_version_060_is_replaced(toy):
    hg.pp.tissue(toy)
    hg.pp.grid(toy, key_added="grid")
    toy.attrs["he2gene"] = {"mpp": {"he": 2.0}, "grids": ["grid"]}
    toy.shapes["grid"] = toy["grid"].iloc[1:]
    n = len(toy["grid"])
    hg.pp.grid(toy, key_added="grid")
    assert len(toy["grid"]) == n + 1


@pytest.mark.parametrize("value", ["mine", {"mpp": 0.5}, ["he"], {"written": "x"}, {"written": {"labels": 3}}])
@pytest.mark.parametrize("measured", [True, False])
def test_attributes_of_the_user_are_refused(toy, tiny_model, value, measured):
    toy.attrs["he2gene"] = value
    if not measured:
        del toy.tables["table"]
    for call in (hg.pp.tissue, partial(hg.tl.predict, model=tiny_model)):
        with pytest.raises(ValueError, match=r"attrs\['he2gene'\] is .*del sdata.attrs"):
            call(toy)
    assert toy.attrs["he2gene"] == value


# New tables of predict


def without_table(toy, model, **kwargs):
    del toy.tables["table"]
    hg.tl.predict(toy, model=model, **kwargs)
    return toy


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.obs.__setitem__("cluster", "mine"), r"obs\['cluster'\]"),
        (lambda t: t.obsm.__setitem__("X_pca", np.ones((30, 2))), r"obsm\['X_pca'\]"),
        (lambda t: t.uns.__setitem__("notes", "mine"), r"uns\['notes'\]"),
        (lambda t: t.layers.__setitem__("smooth", t.X.copy()), r"layers\['smooth'\]"),
        (lambda t: setattr(t, "raw", t.copy()), "raw"),
    ],
)
def test_a_new_table_does_not_replace_one_with_user_data_and_other_spots(toy, tiny_model, monkeypatch, change, named):
    without_table(toy, tiny_model)
    change(toy["table"])
    toy.shapes["spots"] = toy["spots"].iloc[2:]
    monkeypatch.setattr("he2gene_sc.tl._predict._predict_slide", pytest.fail)
    refused(
        toy, rf"table 'table' would be replaced.* of other spots, and {named}", hg.tl.predict, toy, model=tiny_model
    )


def test_a_new_table_keeps_the_user_data_of_the_previous_one(toy, tiny_model):
    table = without_table(toy, tiny_model)["table"]
    table.obs["cluster"] = "mine"
    table.varm["loadings"] = np.ones((table.n_vars, 2))
    table.obsm["spatial"] = table.obsm["spatial"] + 1
    hg.tl.predict(toy, model=tiny_model, mpp=2.4)
    after = toy["table"]
    assert (after.obs["cluster"] == "mine").all()
    assert "loadings" in after.varm
    np.testing.assert_array_equal(after.obsm["spatial"], table.obsm["spatial"])


def test_a_changed_x_of_our_table_is_not_replaced(toy, tiny_model, monkeypatch):
    table = without_table(toy, tiny_model)["table"]
    table.X = table.X - table.X.mean(0)
    monkeypatch.setattr("he2gene_sc.tl._predict._predict_slide", pytest.fail)
    refused(toy, "X, changed since hg.tl.predict wrote it", hg.tl.predict, toy, model=tiny_model)


def test_other_genes_replace_our_table_and_remove_other_predictions(toy, tiny_model):
    without_table(toy, tiny_model)
    hg.tl.predict(toy, model=tiny_model, key_added="second")
    with pytest.warns(UserWarning, match="removed.*second"):
        hg.tl.predict(toy, model=tiny_model, genes=["ERBB2", "CD24"])
    table = toy["table"]
    assert table.n_vars == 2
    assert not [name for slot in (table.uns, table.obs, table.obsm) for name in slot if "second" in name]


# Warnings as errors


def as_errors(sdata, match, call, *args, **kwargs):
    before = snapshot(sdata)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=UserWarning)
        with pytest.raises(UserWarning, match=match):
            call(*args, **kwargs)
    assert snapshot(sdata) == before


def test_a_warning_as_error_leaves_a_measured_table_unchanged(predicted, tiny_model):
    hg.tl.evaluate(predicted, baselines=[])
    as_errors(predicted, "removed", hg.tl.predict, predicted, model=tiny_model, mpp=2.4)


def test_a_warning_as_error_leaves_our_table_unchanged(toy, tiny_model):
    hg.tl.predict(toy, model=tiny_model, genes="all")
    toy["he2gene"].uns["derived"] = {"verb": "evaluate", "params": {"layer": "he2gene"}, "written": {}}
    as_errors(toy, "removed", hg.tl.predict, toy, model=tiny_model, genes="all", mpp=2.4)


def test_results_of_several_tables_are_written_to_all_or_none():
    slides = [hg.datasets.toy((5, 6), mpp=8.0, seed=seed) for seed in range(2)]
    for i, slide in enumerate(slides):
        slide["table"].obs["patient"] = f"P{i}"
    run = {"groupby": "pathologist", "layer": None, "method": "wilcoxon"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hg.tl.biomarkers(slides, **run)
    second = slides[1]["table"]
    second.uns["derived"] = {"verb": "enrichment", "params": {"key": "he2gene_biomarkers"}, "written": {}}
    before = [snapshot(slide) for slide in slides]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore")
        warnings.filterwarnings("error", message=".*removed", category=UserWarning)
        with pytest.raises(UserWarning, match="removed"):
            hg.tl.biomarkers(slides, **run, groups=["tumour"])
    assert [snapshot(slide) for slide in slides] == before


@pytest.mark.parametrize(
    "verb", ["evaluate", "adapt", "domain_preservation", "biomarkers", "concordance", "programmes"]
)
def test_verbs_leave_everything_unchanged_if_their_warnings_are_errors(predicted, verb):
    before = snapshot(predicted)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            CALLS[verb][0](predicted)
        except (Warning, ValueError):
            assert snapshot(predicted) == before
        else:
            assert snapshot(predicted) != before


# Ids of spots


@pytest.mark.parametrize(
    ("ids", "kind"),
    [
        (np.arange(30) + 0.5, "floating"),
        (np.arange(30.0), "floating"),
        ([None, *map(str, range(29))], "mixed"),
        ([np.nan, *range(29)], "floating"),
        ([1, *map(str, range(29))], "mixed"),
        (pd.date_range("2020", periods=30), "datetime"),
        (pd.Index(np.arange(30, dtype=np.uint64) + 2**63), "too large"),
        (pd.MultiIndex.from_product([range(5), range(6)]), "mixed"),
        ([(i, 0) for i in range(30)], "mixed"),
    ],
)
@pytest.mark.parametrize("genes", [None, ["ERBB2"]])
def test_ids_that_a_table_cannot_hold_are_refused_before_encoding(toy, tiny_model, idle, ids, kind, genes):
    del toy.tables["table"]
    toy.shapes.data["spots"].index = ids if isinstance(ids, pd.Index) else pd.Index(ids, tupleize_cols=False)
    with pytest.raises(ValueError, match=rf"`shapes_key` 'spots': the ids of the spots are {kind}.*map\(str\)"):
        hg.tl.predict(toy, model=tiny_model, genes=genes)
    assert not toy.tables


@pytest.mark.parametrize(
    ("ids", "listed", "match"),
    [
        (None, [None, *map(str, range(29))], r"1 rows have no id in obs\['instance_id'\]"),
        (None, [1, *map(str, range(29))], "extra ids in the table"),
        (pd.MultiIndex.from_product([range(5), range(6)]), None, "several levels"),
    ],
)
def test_ids_of_a_table_that_do_not_match_a_spot_are_named(toy, tiny_model, idle, ids, listed, match):
    if ids is not None:
        toy.shapes.data["spots"].index = ids
    if listed is not None:
        toy["table"].obs["instance_id"] = pd.Series(listed, index=toy["table"].obs_names, dtype=object)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        with pytest.raises(ValueError, match=match):
            hg.tl.predict(toy, model=tiny_model)


@pytest.mark.parametrize("ids", [np.arange(30, dtype=np.int8), list("abcdefghijklmnopqrstuvwxyz1234"), range(30)])
def test_whole_numbers_and_texts_are_valid_ids(toy, tiny_model, ids):
    del toy.tables["table"]
    toy.shapes.data["spots"].index = pd.Index(ids, dtype=object if isinstance(ids, range) else None)
    hg.tl.predict(toy, model=tiny_model)
    assert toy["table"].obs["instance_id"].tolist() == list(ids)
