"""Export spots to QuPath and read its annotations as labels, in pixels of level 0."""

import json
import re
import zipfile

import numpy as np
import pandas as pd
import pytest
from shapely import Point, Polygon, box
from shapely.geometry import mapping
from spatialdata.models import Labels2DModel
from spatialdata.transformations import Affine, set_transformation

import he2gene_sc as hg
from he2gene_sc.io._files import put_file


@pytest.fixture
def predicted(toy, tiny_model):
    hg.tl.predict(toy, model=tiny_model)
    table = toy["table"]
    # The random model predicts one class everywhere.
    codes = np.r_[-1, np.arange(29) % 2]
    table.obs["he2gene_annotation"] = pd.Categorical.from_codes(codes, categories=["invasive cancer", "fat <b>"])
    table.uns["he2gene_annotation_colors"] = ["#d62728", "#ffdd57"]
    return toy


def write(path, *features, **kwargs):
    kind = {"objectType": "annotation", **kwargs}
    content = [
        {
            "type": "Feature",
            "geometry": mapping(shape),
            "properties": {**kind, **({} if name is None else {"classification": {"name": name}})},
        }
        for shape, name in features
    ]
    path.write_text(json.dumps({"type": "FeatureCollection", "features": content}))
    return path


def labels(data, key="label"):
    return data["table"].obs[key].astype(object).where(data["table"].obs[key].notna(), None).tolist()


def square(toy, spot, side=200.0, shift=0.0):
    """Square of some pixels around a spot, whose pitch is 100 px and whose radius is 25 px."""
    x, y = toy["table"].obsm["spatial"][spot]
    return box(x + shift - side / 2, y - side / 2, x + shift + side / 2, y + side / 2)


def test_labels_written_for_qupath_come_back(predicted, tmp_path):
    path = hg.io.to_geojson(predicted, tmp_path / "spots.geojson", genes=["ERBB2", "COL1A1"])
    assert hg.io.read_geojson(predicted, path, key_added="back") is None
    obs = predicted["table"].obs
    pd.testing.assert_series_equal(obs["back"].astype(str), obs["he2gene_annotation"].astype(str), check_names=False)
    assert list(obs["back"].cat.categories) == ["fat <b>", "invasive cancer"]
    assert predicted["table"].uns["back_colors"] == ["#ffdd57", "#d62728"]


def test_objects_are_as_qupath_writes_them(predicted, tmp_path):
    path = hg.io.to_geojson(predicted, tmp_path / "spots.geojson", genes="ERBB2")
    content = json.loads(path.read_text())
    assert content["type"] == "FeatureCollection"
    assert len(content["features"]) == 30
    first, second = content["features"][:2]
    assert "classification" not in first["properties"]
    found = second["properties"]
    assert found["objectType"] == "detection"
    assert found["name"] == "2x1"
    assert found["classification"] == {"name": "invasive cancer", "color": [214, 39, 40]}
    table = predicted["table"]
    assert found["measurements"]["ERBB2"] == pytest.approx(table["2x1", "ERBB2"].layers["he2gene"].item(), abs=1e-4)
    assert found["measurements"]["Confidence"] == pytest.approx(
        table.obs.loc["2x1", "he2gene_annotation_confidence"], abs=1e-4
    )
    assert {"ERBB2", "Confidence", "Tissue"} <= set(found["measurements"])
    outline = Polygon(second["geometry"]["coordinates"][0])
    assert outline.centroid.coords[0] == pytest.approx(tuple(table.obsm["spatial"][1]), abs=0.02)
    assert outline.area == pytest.approx(np.pi * 25**2, rel=0.01)


def test_colours_that_do_not_match_the_classes_are_left_out(predicted, tmp_path):
    predicted["table"].uns["he2gene_annotation_colors"] = ["#d62728"]
    features = json.loads(hg.io.to_geojson(predicted, tmp_path / "a.geojson").read_text())["features"]
    assert [feature["properties"].get("classification") for feature in features[:2]] == [
        None,
        {"name": "invasive cancer"},
    ]


def test_coordinates_are_pixels_of_the_image_for_any_unit_of_the_spots(predicted, tmp_path):
    before = json.loads(hg.io.to_geojson(predicted, tmp_path / "a.geojson").read_text())
    # Image and spots move in the coordinate system; the pixels of the spots stay the same.
    matrix = np.array([[0.0, -3.0, 40.0], [3.0, 0.0, 7.0], [0.0, 0.0, 1.0]])
    for name in ("he", "spots"):
        set_transformation(predicted[name], Affine(matrix, ("x", "y"), ("x", "y")), "global")
    after = json.loads(hg.io.to_geojson(predicted, tmp_path / "b.geojson").read_text())
    for a, b in zip(before["features"], after["features"], strict=True):
        assert Polygon(a["geometry"]["coordinates"][0]).symmetric_difference(
            Polygon(b["geometry"]["coordinates"][0])
        ).area == pytest.approx(0, abs=5)


def test_a_spot_gets_the_class_that_covers_most_of_it(toy, tmp_path):
    x, y = toy["table"].obsm["spatial"][0]
    left, right = box(x - 60, y - 40, x - 5, y + 40), box(x - 5, y - 40, x + 60, y + 40)
    path = write(tmp_path / "a.geojson", (left, "tumour"), (right, "stroma"))
    hg.io.read_geojson(toy, path)
    assert labels(toy)[0] == "stroma"
    assert labels(toy)[2:] == [None] * 28
    # Two pieces of one class together cover more; their overlap counts once.
    pieces = box(x - 5, y - 40, x + 9, y - 1), box(x - 5, y - 3, x + 9, y + 40), left
    path = write(tmp_path / "b.geojson", *((piece, "tumour") for piece in pieces), (right, "stroma"))
    hg.io.read_geojson(toy, path)
    assert labels(toy)[0] == "tumour"
    stacked = [(box(x + 5, y - 10, x + 12, y + 10), "stroma")] * 9
    hg.io.read_geojson(toy, write(tmp_path / "c.geojson", (left, "tumour"), *stacked))
    assert labels(toy)[0] == "tumour"


def test_an_annotation_inside_another_labels_its_spots(toy, tmp_path):
    outer, inner = square(toy, 7, 600), square(toy, 7, 80)
    hg.io.read_geojson(toy, write(tmp_path / "a.geojson", (outer, "tissue"), (inner, "tumour")))
    assert labels(toy)[7] == "tumour"
    assert labels(toy)[8] == "tissue"


def test_holes_and_pieces_are_kept(toy, tmp_path):
    outer, hole = square(toy, 7, 250), square(toy, 7, 80)
    ring = outer.difference(hole).union(square(toy, 29, 60))
    assert ring.geom_type == "MultiPolygon"
    hg.io.read_geojson(toy, write(tmp_path / "a.geojson", (ring, "stroma")))
    found = [i for i, name in enumerate(labels(toy)) if name == "stroma"]
    assert found == [0, 1, 2, 6, 8, 12, 13, 14, 29]


def test_a_polygon_that_crosses_itself_is_read(toy, tmp_path):
    x, y = toy["table"].obsm["spatial"][0]
    bow = Polygon([(x - 60, y - 60), (x + 60, y + 60), (x + 60, y - 60), (x - 60, y + 60)])
    hg.io.read_geojson(toy, write(tmp_path / "a.geojson", (bow, "fold")))
    assert labels(toy)[0] == "fold"


def test_annotations_have_priority_and_objects_without_a_class_are_skipped(toy, tmp_path):
    content = json.loads(write(tmp_path / "a.geojson", (square(toy, 0), "nucleus"), objectType="cell").read_text())
    hg.io.read_geojson(toy, tmp_path / "a.geojson")
    assert labels(toy)[0] == "nucleus"
    more = write(tmp_path / "b.geojson", (square(toy, 0), "tumour "), (square(toy, 8), None), (Point(3, 3), "point"))
    content["features"] += json.loads(more.read_text())["features"]
    more.write_text(json.dumps(content["features"]))
    hg.io.read_geojson(toy, more)
    assert labels(toy)[0] == "tumour"
    assert set(labels(toy)) == {"tumour", None}


def test_names_of_several_parts_and_colours_are_read(toy, tmp_path):
    path = write(tmp_path / "a.geojson", (square(toy, 0), None))
    content = json.loads(path.read_text())
    content["features"][0]["properties"]["classification"] = {"names": ["Tumor", "Positive"], "color": [200, 0, 0]}
    path.write_text(json.dumps(content))
    hg.io.read_geojson(toy, path)
    assert labels(toy)[0] == "Tumor: Positive"
    assert toy["table"].uns["label_colors"] == ["#c80000"]


def test_files_of_older_versions_and_compressed_ones_are_read(toy, tmp_path):
    path = write(tmp_path / "a.geojson", (square(toy, 0), None))
    content = json.loads(path.read_text())
    content["features"][0]["properties"]["classification"] = {"name": "Tumor", "colorRGB": -3670016}
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.geojson", json.dumps(content))
    hg.io.read_geojson(toy, tmp_path / "a.zip")
    assert labels(toy)[0] == "Tumor"
    assert toy["table"].uns["label_colors"] == ["#c80000"]
    for name, content in (("b.zip", b"PK"), ("c.zip", (tmp_path / "a.zip").read_bytes()[:-30])):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=r"`path` '.*\.zip' is not GeoJSON; in QuPath run File > Export"):
            hg.io.read_geojson(toy, tmp_path / name)


def test_a_zip_file_of_macos_is_read(toy, tmp_path):
    path = write(tmp_path / "a.geojson", (square(toy, 0), "Tumor"))
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("export/", "")
        archive.write(path, "export/a.geojson")
        archive.writestr("__MACOSX/export/._a.geojson", b"\0\5\x16")
    hg.io.read_geojson(toy, tmp_path / "a.zip")
    assert labels(toy)[0] == "Tumor"


@pytest.mark.parametrize("damage", ["content", "encrypted", "two files", "no file"])
def test_a_zip_file_that_cannot_be_read_is_named(toy, tmp_path, damage):
    text = write(tmp_path / "a.geojson", (square(toy, 0), "Tumor")).read_text()
    names = {"two files": ["a.geojson", "b.geojson"], "no file": ["a/"]}.get(damage, ["a.geojson"])
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            archive.writestr(name, text)
    content = bytearray((tmp_path / "a.zip").read_bytes())
    if damage == "content":
        content[50:70] = b"\xff" * 20
    elif damage == "encrypted":
        content[6] |= 1
        content[content.rfind(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "a.zip").write_bytes(content)
    reason = {
        "content": "Error -3",
        "encrypted": "is encrypted",
        "two files": "holds 2 files",
        "no file": "holds 0 files",
    }
    with pytest.raises(ValueError, match=rf"`path` '.*\.zip' is not GeoJSON; .*{reason[damage]}"):
        hg.io.read_geojson(toy, tmp_path / "a.zip")


def test_a_file_in_a_store_is_refused(predicted, tmp_path):
    store = hg.io.save(predicted, tmp_path / "slide.zarr")
    with pytest.raises(
        ValueError, match=r"`path` '.*a\.geojson' lies in the store '.*slide\.zarr'; name a file beside it"
    ):
        hg.io.to_geojson(predicted, store / "a.geojson")
    assert not (store / "a.geojson").exists()


def test_a_table_and_genes_without_values_are_not_written(predicted, tmp_path):
    with pytest.raises(TypeError, match=r"`sdata` is an AnnData; a SpatialData object with the image is needed"):
        hg.io.to_geojson(predicted["table"], tmp_path / "a.geojson")
    with pytest.raises(ValueError, match=r"`genes` \['FTL'\] were not predicted; hg\.get\.genes\(sdata\) lists"):
        hg.io.to_geojson(predicted, tmp_path / "a.geojson", genes=["ERBB2", "FTL"])
    assert not list(tmp_path.iterdir())
    path = hg.io.to_geojson(predicted, tmp_path / "a.geojson", genes="FTL", layer=None)
    assert "FTL" in json.loads(path.read_text())["features"][0]["properties"]["measurements"]


def test_spots_of_a_table_are_circles_around_their_centres(toy, tmp_path):
    table = toy["table"].copy()
    x, y = table.obsm["spatial"][0]
    path = write(tmp_path / "a.geojson", (box(x + 30, y - 9, x + 90, y + 9), "edge"))
    table.uns["spatial"] = {"slide": {"scalefactors": {"spot_diameter_fullres": 70.0}}}
    hg.io.read_geojson(table, path)
    assert table.obs["label"].notna().sum() == 2
    del table.uns["spatial"]
    hg.io.read_geojson(table, write(tmp_path / "b.geojson", (square(toy, 0, 60), "here")))
    assert table.obs["label"].notna().sum() == 1


def test_labelled_cells_go_out_and_come_back(toy, tiny_model, tmp_path):
    size = toy["he"].shape[1:]
    cells = np.zeros(size, int)
    for i, (x, y) in enumerate(toy["table"].obsm["spatial"].astype(int)):
        cells[y - 20 : y + 20, x - 20 : x + 20] = i + 1
    toy["cells"] = Labels2DModel.parse(cells, dims=("y", "x"))
    table = toy["table"]
    table.obs["region"] = pd.Categorical(["cells"] * 30)
    table.obs["instance_id"] = np.arange(1, 31)
    toy.set_table_annotates_spatialelement("table", "cells", "region", "instance_id")
    hg.tl.predict(toy, model=tiny_model)
    path = hg.io.to_geojson(toy, tmp_path / "cells.geojson", annotation_key="pathologist")
    first = json.loads(path.read_text())["features"][0]
    x, y = table.obsm["spatial"][0]
    assert Polygon(first["geometry"]["coordinates"][0]).bounds == pytest.approx((x - 20, y - 20, x + 20, y + 20))
    hg.io.read_geojson(toy, path)
    assert labels(toy) == table.obs["pathologist"].astype(str).tolist()


def test_a_column_of_the_user_is_not_replaced(toy, tmp_path):
    path = write(tmp_path / "a.geojson", (square(toy, 0), "tumour"))
    before = toy["table"].obs.copy()
    with pytest.raises(ValueError, match=r"obs\['pathologist'\] exists and was not written by hg\.io\.read_geojson"):
        hg.io.read_geojson(toy, path, key_added="pathologist")
    pd.testing.assert_frame_equal(toy["table"].obs, before)
    hg.io.read_geojson(toy, path)
    hg.io.read_geojson(toy, write(path, (square(toy, 3), "stroma")))
    assert set(labels(toy)) == {"stroma", None}
    toy["table"].obs["label"] = toy["table"].obs["label"].cat.rename_categories({"stroma": "mine"})
    with pytest.raises(ValueError, match=r"was changed after hg\.io\.read_geojson wrote it"):
        hg.io.read_geojson(toy, path)


def test_results_of_labels_that_change_are_removed(toy, tmp_path):
    path = write(tmp_path / "a.geojson", (box(0, 0, 2000, 250), "a"), (box(0, 250, 2000, 2000), "b"))
    hg.io.read_geojson(toy, path)
    toy["table"].uns["found"] = {"verb": "biomarkers", "params": {"groupby": "label"}, "written": {}}
    hg.io.read_geojson(toy, path)
    assert "found" in toy["table"].uns
    with pytest.warns(UserWarning, match="results that were computed from changed values were removed"):
        hg.io.read_geojson(toy, write(path, (box(0, 0, 2000, 2000), "a")))
    assert "found" not in toy["table"].uns


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"features": 3}', '[{"geometry": {"type": "Polygon"}}]'])
def test_a_file_that_is_not_geojson_is_named(toy, tmp_path, text):
    path = tmp_path / "a.geojson"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"`path` '.*a\.geojson' is not GeoJSON; in QuPath run File > Export"):
        hg.io.read_geojson(toy, path)


@pytest.mark.parametrize("properties", ["text", ["a"]])
def test_invalid_properties_and_a_folder_are_not_geojson(toy, tmp_path, properties):
    path = write(tmp_path / "a.geojson", (square(toy, 0), "a"))
    content = json.loads(path.read_text())
    content["features"][0]["properties"] = properties
    path.write_text(json.dumps(content))
    for place in (path, tmp_path):
        with pytest.raises(ValueError, match=r"`path` '.*' is not GeoJSON"):
            hg.io.read_geojson(toy, place)


def test_files_that_label_no_spot_are_refused(toy, tmp_path):
    path = tmp_path / "a.geojson"
    with pytest.raises(ValueError, match=r"1 object\(s\), none is a polygon with a class"):
        hg.io.read_geojson(toy, write(path, (square(toy, 0), None)))
    with pytest.raises(ValueError, match=r"no polygon overlaps a spot\. The polygons span 9000 to 9100.*another image"):
        hg.io.read_geojson(toy, write(path, (box(9000, 9000, 9100, 9100), "x")))
    with pytest.raises(ValueError, match="the classes 'Tumour' and 'tumour' differ only in case or blanks; rename"):
        hg.io.read_geojson(toy, write(path, (square(toy, 0), "Tumour"), (square(toy, 9), "tumour")))
    assert "label" not in toy["table"].obs
    with pytest.raises(FileNotFoundError):
        hg.io.read_geojson(toy, tmp_path / "none.geojson")


def test_a_table_of_several_slides_is_labelled_one_by_one(toy, tmp_path):
    table, path = toy["table"].copy(), write(tmp_path / "a.geojson", (box(0, 0, 2000, 2000), "a"))
    table.obs["region"] = pd.Categorical(["one"] * 12 + ["two"] * 18)
    with pytest.raises(ValueError, match=r"`shapes_key` is None; the file is of one slide, the table has one, two"):
        hg.io.read_geojson(table, path)
    with pytest.raises(ValueError, match=r"`shapes_key` 'three' is not a region of the table, valid: \['one', 'two'\]"):
        hg.io.read_geojson(table, path, shapes_key="three")
    hg.io.read_geojson(table, path, shapes_key="two")
    assert table.obs["label"].notna().tolist() == [False] * 12 + [True] * 18
    with pytest.raises(ValueError, match=r"one spot of unknown size; uns\['spatial'\].*'spot_diameter_fullres'"):
        hg.io.read_geojson(table[:1].copy(), path, key_added="alone")


def test_duplicated_names_are_written_once_or_separately(predicted, tmp_path):
    table = predicted["table"]
    table.obs_names = ["spot"] * table.n_obs
    table.var_names = ["Confidence" if name == "ERBB2" else name for name in table.var_names]
    path = hg.io.to_geojson(predicted, tmp_path / "a.geojson", genes=["Confidence", "CD24", "CD24"])
    features = json.loads(path.read_text())["features"]
    assert [f["properties"].get("classification", {}).get("name") for f in features[:3]] == [
        None,
        "invasive cancer",
        "fat <b>",
    ]
    values = [f["properties"]["measurements"]["Confidence"] for f in features]
    np.testing.assert_allclose(values, table.to_df("he2gene")["Confidence"], atol=1e-4)


def test_an_existing_file_is_replaced_only_with_overwrite(predicted, tmp_path):
    path = tmp_path / "spots.geojson"
    path.write_text("mine")
    with pytest.raises(FileExistsError, match=r"`path` .* exists; .* overwrite=True"):
        hg.io.to_geojson(predicted, path)
    assert path.read_text() == "mine"
    hg.io.to_geojson(predicted, path, overwrite=True)
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(ValueError, match=r"`path` .* ends in '\.csv'; \.geojson or \.json is needed"):
        hg.io.to_geojson(predicted, tmp_path / "a.csv")
    with pytest.raises(ValueError, match=re.escape("`genes` ['NOGENE'] are not in the table")):
        hg.io.to_geojson(predicted, tmp_path / "a.json", genes=["NOGENE"])


def test_one_slide_of_several_keeps_the_labels_of_the_others(tmp_path):
    import spatialdata as sd

    slides = {name: hg.datasets.toy((3, 3), mpp=4.0, seed=i) for i, name in enumerate(("a", "b"))}
    for name, slide in slides.items():
        slide["table"].obs_names = name + "_" + slide["table"].obs_names
    joined = sd.concatenate(slides, concatenate_tables=True)
    everywhere = box(0, 0, 900, 900)
    with pytest.raises(ValueError, match=r"`shapes_key` is None; the file is of one slide, name its spots: one of \["):
        hg.io.read_geojson(joined, write(tmp_path / "a.geojson", (everywhere, "one")))
    hg.io.read_geojson(joined, tmp_path / "a.geojson", shapes_key="spots-a", image_key="he-a")
    assert joined["table"].obs["label"].notna().sum() == 9
    hg.io.read_geojson(
        joined, write(tmp_path / "b.geojson", (everywhere, "two")), shapes_key="spots-b", image_key="he-b"
    )
    assert joined["table"].obs["label"].tolist() == ["one"] * 9 + ["two"] * 9


@pytest.mark.parametrize("content", [None, "[" * 100_000 + "]" * 100_000])
def test_a_missing_or_endlessly_nested_file_is_named(toy, tmp_path, content):
    path = tmp_path / "a.geojson"
    if content:
        path.write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match="`path` .*a.geojson' (does not exist|is not GeoJSON)"):
        hg.io.read_geojson(toy, path)


def test_writing_to_a_link_replaces_its_target(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.txt").write_text("old")
    (tmp_path / "a.txt").symlink_to(tmp_path / "real" / "a.txt")
    put_file(tmp_path / "a.txt", b"new")
    assert (tmp_path / "a.txt").is_symlink()
    assert (tmp_path / "real" / "a.txt").read_text() == "new"


@pytest.mark.parametrize(
    ("crs", "scale", "refused"),
    [
        (None, 1, False),
        ("urn:ogc:def:crs:OGC:1.3:CRS84", 1, False),  # written by geopandas for files without a coordinate system
        ("urn:ogc:def:crs:OGC:1.3:CRS84", 1e-3, True),
        ("EPSG:3857", 1, True),
    ],
)
def test_map_coordinates_are_not_read_as_pixels(toy, tmp_path, crs, scale, refused):
    x, y = toy["table"].obsm["spatial"][7]
    shape = box(scale * (x - 100), scale * (y - 100), scale * (x + 100), scale * (y + 100))
    path = write(tmp_path / "a.geojson", (shape, "tumour"))
    content = json.loads(path.read_text())
    content["crs"] = None if crs is None else {"type": "name", "properties": {"name": crs}}
    path.write_text(json.dumps(content))
    if refused:
        with pytest.raises(ValueError, match=r"member 'crs' .*pixels of level 0.*set_crs\(None"):
            hg.io.read_geojson(toy, path)
        assert "label" not in toy["table"].obs
    else:
        hg.io.read_geojson(toy, path)
        assert labels(toy)[7] == "tumour"


def test_polygons_in_um_or_degrees_are_warned_of(toy, tmp_path):
    toy.attrs["he2gene"] = {"mpp": {"he": 0.5}}
    xy = toy["table"].obsm["spatial"]
    (left, top), (right, bottom) = xy.min(0) - 25, xy.max(0) + 25
    whole = write(tmp_path / "um.geojson", (box(left / 2, top / 2, right / 2, bottom / 2), "tumour"))
    with pytest.warns(UserWarning, match=r"taken as µm, they match the spots\. Convert µm to pixels: .*scale\(2, 2"):
        hg.io.read_geojson(toy, whole, key_added="a")
    toy["table"].obsm["spatial"] = xy * 10
    table = toy["table"]
    small = write(tmp_path / "shares.geojson", (box(0, 0, 1, 1), "tumour"))
    with pytest.raises(ValueError, match="no polygon overlaps a spot.*they may be degrees, or fractions of the image"):
        hg.io.read_geojson(table, small, key_added="b")


def test_classes_that_geopandas_wrote_as_text_are_read(toy, tmp_path):
    path = write(tmp_path / "a.geojson", (square(toy, 7), "tumour"))
    content = json.loads(path.read_text())
    properties = content["features"][0]["properties"]
    properties["classification"] = json.dumps({**properties["classification"], "color": [255, 0, 0]})
    path.write_text(json.dumps(content))
    hg.io.read_geojson(toy, path)
    assert labels(toy)[7] == "tumour"
    assert toy["table"].uns["label_colors"] == ["#ff0000"]
