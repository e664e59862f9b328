"""Bad input raises an error that names the parameter, and the object is not changed."""

import json

import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import shapely
from spatialdata.models import Image2DModel

import he2gene_sc as hg
from tests.helpers.objects import snapshot


def refuses(sdata, match, error=ValueError, **kwargs):
    before = snapshot(sdata)
    with pytest.raises(error, match=match):
        hg.tl.predict(sdata, **kwargs)
    assert snapshot(sdata) == before


def with_image(toy, pixels, channels=None):
    toy.images["he"] = Image2DModel.parse(pixels, dims=("c", "y", "x"), c_coords=channels)
    return toy


def pixels_of(toy):
    return toy["he"].to_numpy()


def test_an_object_that_is_not_spatialdata_raises(toy, tiny_model):
    with pytest.raises(TypeError, match="`sdata` is an AnnData.*from_legacy_anndata"):
        hg.tl.predict(toy["table"], model=tiny_model)


def test_no_image(toy, tiny_model):
    del toy.images["he"]
    refuses(toy, r"no image; .*read_he", model=tiny_model)


def test_no_spots(toy, tiny_model):
    del toy.tables["table"], toy.shapes["spots"]
    refuses(toy, r"no spots .*hg\.pp\.grid", model=tiny_model)


def test_zero_spots(toy, tiny_model):
    del toy.tables["table"]
    toy.shapes.data["spots"] = toy["spots"].iloc[:0]
    refuses(toy, "`shapes_key` 'spots' has no spots", model=tiny_model)


@pytest.mark.parametrize(("element", "parameter"), [("he", "image_key"), ("table", "table_key")])
def test_several_candidates(toy, tiny_model, element, parameter):
    toy["other"] = toy[element].copy()
    refuses(toy, rf"`{parameter}` is ambiguous, candidates: .*other", model=tiny_model)


def test_several_spots(toy, tiny_model):
    del toy.tables["table"]
    toy["other"] = toy["spots"].copy()
    refuses(toy, r"`shapes_key` is ambiguous, candidates: \['other', 'spots'\]", model=tiny_model)


def test_rows_missing_from_the_table_are_named(toy, tiny_model):
    toy.tables["table"] = toy["table"][2:].copy()
    refuses(toy, r"`table_key` 'table'.*2 spots are missing from the table: '1x1', '2x1'", model=tiny_model)


def test_rows_without_spots_are_named(toy, tiny_model):
    toy.shapes["spots"] = toy["spots"].iloc[1:]
    refuses(toy, r"`table_key` 'table'.*1 extra ids in the table.*'1x1'", model=tiny_model)


def test_duplicated_rows_are_named(toy, tiny_model):
    ids = toy["table"].obs["instance_id"].astype(str).to_numpy().copy()
    ids[1] = ids[0]
    toy["table"].obs["instance_id"] = ids
    refuses(toy, r"`table_key` 'table'.*duplicated ids in the table: '1x1'", model=tiny_model)


def test_duplicated_spots_are_named(toy, tiny_model):
    index = toy["spots"].index.to_numpy().copy()
    index[1] = index[0]
    toy["spots"].index = index
    refuses(toy, r"`shapes_key` 'spots' has duplicated ids: '1x1'", model=tiny_model)


def test_ids_of_another_type_are_explained(toy, tiny_model):
    toy["spots"].index = np.arange(30)
    refuses(toy, r"`table_key` 'table'.*extra ids.*ids are .* there, int64 here", model=tiny_model)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_infinite_coordinates_are_named(toy, tiny_model, value):
    xy = np.column_stack([toy["spots"].geometry.x, toy["spots"].geometry.y])
    xy[3, 0] = value
    broken = gpd.GeoDataFrame({"radius": 25.0}, index=toy["spots"].index, geometry=[shapely.Point(x, y) for x, y in xy])
    broken.attrs = toy["spots"].attrs
    toy.shapes.data["spots"] = broken
    refuses(toy, r"`shapes_key` 'spots' has NaN or infinite coordinates in 1 spots: '4x1'", model=tiny_model)


def test_radii_that_are_nan(toy, tiny_model):
    toy["spots"]["radius"] = np.nan
    refuses(toy, r"`shapes_key` 'spots'.*diameter of nan", model=tiny_model)


def test_grey_image(toy, tiny_model):
    refuses(with_image(toy, pixels_of(toy)[:1]), r"`image_key` 'he' is a one-channel", model=tiny_model)


def test_five_channels(toy, tiny_model):
    pixels = np.concatenate([pixels_of(toy), pixels_of(toy)[:2]])
    refuses(with_image(toy, pixels), r"`image_key` 'he' is an image of 5 channels", model=tiny_model)


@pytest.mark.parametrize("dtype", [np.uint16, np.int64])
def test_integer_pixels_other_than_uint8(toy, tiny_model, dtype):
    refuses(with_image(toy, pixels_of(toy).astype(dtype)), rf"`image_key` 'he'.*{np.dtype(dtype)}", model=tiny_model)


@pytest.mark.parametrize(("scale", "shift"), [(100.0, 0.0), (1.0, -200.0), (np.nan, 0.0)])
def test_float_pixels_with_unknown_range(toy, tiny_model, scale, shift):
    pixels = pixels_of(toy).astype(np.float32) * scale + shift
    refuses(with_image(toy, pixels), "`image_key` 'he' has float pixels", model=tiny_model)


def test_float_pixels_outside_the_range_beyond_the_sample(toy, tiny_model):
    pixels = pixels_of(toy).astype(np.float32) / 255
    pixels[:, 100, 300] = np.nan  # a spot outside the sample
    refuses(with_image(toy, pixels), "`image_key`: a block", model=tiny_model)


@pytest.mark.parametrize(("divisor", "alpha"), [(255, False), (1, False), (None, True)])
def test_float_and_alpha_images_are_converted_if_unambiguous(toy, tiny_model, divisor, alpha):
    expected = hg.tl.predict(toy, model=tiny_model, copy=True)["table"].layers["he2gene"]
    pixels = pixels_of(toy)
    pixels = pixels if divisor is None else (pixels / np.float32(divisor)).astype(np.float32)
    if alpha:
        pixels = np.concatenate([pixels, np.full_like(pixels[:1], 255)])
    hg.tl.predict(with_image(toy, pixels), model=tiny_model)
    np.testing.assert_allclose(toy["table"].layers["he2gene"], expected, atol=1e-4)


def test_mpp_missing(toy, tiny_model):
    toy.attrs.clear()
    toy["spots"]["radius"] = 45.0  # then the lattice is not that of a known assay
    refuses(toy, "`mpp` of image 'he' is unknown", model=tiny_model)


@pytest.mark.parametrize("mpp", [0, -0.5, np.nan, np.inf, "0.5"])
def test_mpp_must_be_a_positive_number(toy, tiny_model, mpp):
    refuses(toy, "`mpp` is", model=tiny_model, mpp=mpp)


@pytest.mark.filterwarnings("ignore:µm/px of image")
@pytest.mark.parametrize("mpp", [20.0, 0.1])
def test_mpp_that_makes_windows_too_small_or_too_large(toy, tiny_model, mpp):
    refuses(toy, rf"`mpp` is {mpp:g} .*valid are 8 to 300 px", model=tiny_model, mpp=mpp)


@pytest.mark.parametrize("radius", [3.0, 200.0])
def test_spots_too_small_or_too_large_on_the_image(toy, tiny_model, radius):
    toy["spots"]["radius"] = radius
    refuses(toy, rf"`shapes_key` 'spots': a spot is {2 * radius:g} px wide", model=tiny_model)


def test_gene_unknown_to_the_model(toy, tiny_model):
    refuses(toy, r"`genes` \['ERBB3X'\] are unknown.*near 'ERBB3X': \['ERBB2'", model=tiny_model, genes=["ERBB3X"])


def test_gene_missing_in_the_table(toy, tiny_model):
    refuses(toy, r"`genes` \['NOT1'\] are known to the model but not in the table", model=tiny_model, genes=["NOT1"])


@pytest.mark.parametrize("genes", [[], "ERBB2"])
def test_genes_must_be_a_list(toy, tiny_model, genes):
    refuses(toy, "`genes` is", model=tiny_model, genes=genes)


def test_table_whose_genes_the_model_does_not_know(toy, tiny_model):
    toy["table"].var_names = [f"MGI:{i}" for i in range(toy["table"].n_vars)]
    refuses(toy, r"`gene_symbols`: only 0 of 40.*'MGI:0'.*'ERBB2'.*ENSG", model=tiny_model)


def test_gene_symbols_must_be_a_column(toy, tiny_model):
    refuses(
        toy,
        r"`gene_symbols` 'symbol' is not a column of var, valid: \['planted'\]",
        model=tiny_model,
        gene_symbols="symbol",
    )


@pytest.mark.parametrize(
    ("parameter", "value"),
    [
        ("model", "lung-none"),
        ("model", 3),
        ("device", "tpu9"),
        ("device", "cuda:99"),
        ("dtype", "float8"),
        ("dtype", "float16"),
        ("batch_size", 0),
        ("batch_size", 2.5),
        ("key_added", "a/b"),
        ("key_added", ""),
        ("key_added", "__a"),
        ("layer", "a b"),
        ("image_key", "nope"),
        ("shapes_key", "nope"),
        ("table_key", "nope"),
        ("coordinate_system", "nope"),
    ],
)
def test_invalid_arguments_raise(toy, tiny_model, parameter, value):
    device = {} if parameter == "device" else {"device": "cpu"}
    refuses(toy, f"`{parameter}`", **{"model": tiny_model, **device, parameter: value})


@pytest.mark.parametrize("genes", ["all", None])
def test_name_of_the_new_table_is_taken(toy, tiny_model, genes):
    if genes is None:
        del toy.tables["table"]
        toy["Table"] = toy["spots"].copy()
        refuses(toy, "`key_added`.*'table', which is taken", model=tiny_model, shapes_key="spots")
    else:
        refuses(toy, "`key_added`.*'spots', which is taken", model=tiny_model, genes=genes, key_added="spots")


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        ("no card", r"incomplete: \['card.json'\]"),
        ("no weights", r"incomplete: \['weights.safetensors'\]"),
        ("truncated", "weights.safetensors was altered or truncated"),
        ("altered", "genes.csv was altered or truncated"),
        ("newer", "schema"),
        ("no json", r"card\.json"),
    ],
)
def test_damaged_model_folder_raises(toy, tiny_model, tmp_path, damage, match):
    folder = tiny_model.save(tmp_path / "model")
    card, weights, genes = (folder / name for name in ("card.json", "weights.safetensors", "genes.csv"))
    if damage.startswith("no "):
        {"no card": card, "no weights": weights, "no json": tmp_path / "x"}[damage].unlink(missing_ok=True)
    if damage == "no json":
        card.write_text("{")
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-10])
    if damage == "altered":
        genes.write_text(genes.read_text().replace("ERBB2", "ERBB3"))
    if damage == "newer":
        card.write_text(json.dumps({**json.loads(card.read_text()), "schema_version": 99}))
    refuses(toy, f"`model`.*{match}", model=folder)


def raises(error):
    def fail(*args, **kwargs):
        raise error

    return fail


@pytest.mark.parametrize("before", [False, True])
def test_ctrl_c_while_encoding_changes_nothing(toy, tiny_model, monkeypatch, before):
    if before:
        hg.tl.predict(toy, model=tiny_model, genes=["ERBB2"])
    calls = []

    def forward(self, *args):
        calls.append(1)
        if len(calls) > 2:
            raise KeyboardInterrupt
        return original(self, *args)

    kind = type(tiny_model.network.extractor)
    original = kind.forward
    monkeypatch.setattr(kind, "forward", forward)
    refuses(toy, None, error=KeyboardInterrupt, model=tiny_model, batch_size=8)
    assert len(calls) == 3


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("slot", ["layers", "obsm"])
def test_ctrl_c_while_writing_changes_nothing(toy, tiny_model, monkeypatch, slot, before):
    if before:
        hg.tl.predict(toy, model=tiny_model, genes=["ERBB2"])
    kind = type(getattr(toy["table"], slot))
    original = kind.__setitem__
    interrupted = []

    def set_item(self, key, value):
        original(self, key, value)
        if not interrupted:
            interrupted.append(key)
            raise KeyboardInterrupt

    monkeypatch.setattr(kind, "__setitem__", set_item)
    refuses(toy, None, error=KeyboardInterrupt, model=tiny_model)
    assert interrupted


def test_ctrl_c_while_writing_uns_changes_nothing(toy, tiny_model, monkeypatch):
    hg.tl.predict(toy, model=tiny_model, genes=["ERBB2"])
    refused = []

    class Interrupting(dict):
        def __setitem__(self, key, value):
            if key == "he2gene_annotation_colors" and not refused:
                refused.append(key)
                raise KeyboardInterrupt
            super().__setitem__(key, value)

    toy["table"]._uns = Interrupting(toy["table"].uns)
    refuses(toy, None, error=KeyboardInterrupt, model=tiny_model)
    assert refused


def test_ctrl_c_while_the_second_table_is_set_changes_nothing(toy, tiny_model, monkeypatch):
    hg.tl.predict(toy, model=tiny_model, genes="all")
    monkeypatch.setattr("he2gene_sc.tl._predict.put_table", raises(KeyboardInterrupt()))
    refuses(toy, None, error=KeyboardInterrupt, model=tiny_model, genes="all", key_added="he2gene")


def test_ctrl_c_after_removal_of_the_old_second_table_restores_it(toy, tiny_model, monkeypatch):
    hg.tl.predict(toy, model=tiny_model, genes="all")
    kind = type(toy.tables)
    original = kind.__setitem__
    interrupted = []

    def set_item(self, key, value):
        if not interrupted:
            interrupted.append(key)
            raise KeyboardInterrupt
        original(self, key, value)

    monkeypatch.setattr(kind, "__setitem__", set_item)
    refuses(toy, None, error=KeyboardInterrupt, model=tiny_model, genes="all")
    assert interrupted == ["he2gene"]


def test_frames_survive_an_interruption_as_the_same_values(toy, tiny_model, monkeypatch):
    toy["table"].obs["label"] = pd.Categorical(["mine"] * 30)
    monkeypatch.setattr("he2gene_sc._core.fill.StackedPredictions.annotation", raises(KeyboardInterrupt()))
    refuses(toy, None, error=KeyboardInterrupt, model=tiny_model)
    assert list(toy["table"].obs["label"].cat.categories) == ["mine"]


def test_damaged_spatialdata_attrs_are_named(toy):
    toy["table"].uns["spatialdata_attrs"] = "spots"
    with pytest.raises(ValueError, match=r"uns\['spatialdata_attrs'\] is 'spots'; region, region_key and instance_key"):
        hg.tl.predict(toy)


@pytest.mark.parametrize("value", [[], np.ones(2), 5])
def test_an_image_key_that_is_not_a_name_raises(toy, value):
    with pytest.raises(ValueError, match=r"`image_key` is of type .*; a text, or a mapping to texts, is needed"):
        hg.tl.predict(toy, image_key=value)
