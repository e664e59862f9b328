"""Run the code of the how-to pages on folders in the layout of the vendors."""

import json
import re
from pathlib import Path

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import pytest
import tifffile

import he2gene_sc as hg
from tests.helpers.vendor_folders import MPP, REDUCED, reduce, st, toy_slide, visium, visium_hd, xenium

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

PAGES = Path(__file__).parents[2] / "docs" / "howto"


@pytest.fixture
def run_page(tmp_path, monkeypatch, tiny_model):
    """Run the Python blocks of a page in a folder, with a fast model; return the variables that they define."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("he2gene_sc.models.load", lambda model, **options: tiny_model)

    def run(page):
        names = {}
        for code in re.findall(r"^```python\n(.*?)^```", (PAGES / f"{page}.md").read_text(), re.S | re.M):
            exec(compile(code, f"{page}.md", "exec"), names)
        return names

    return run


def check_prediction(table, n_spots):
    assert table.n_obs == n_spots
    predicted = hg.get.predicted(table)
    assert predicted.n_obs == n_spots
    assert predicted.n_vars > 20
    assert np.isfinite(predicted.X).all()
    assert plt.get_fignums(), "nothing was drawn"


@pytest.mark.parametrize("version", [1, 2, 3])
def test_output_of_space_ranger_is_read_predicted_and_drawn(version, run_page, tmp_path):
    visium(tmp_path, version)
    sdata = run_page("visium")["sdata"]
    record = sdata["table"].uns["he2gene"]
    assert record["image"] == "slide_full_image"
    assert record["mpp"] == pytest.approx(MPP, rel=0.03)
    check_prediction(sdata["table"], 20)
    assert (tmp_path / "slide.zarr").is_dir()


def test_bins_of_visium_hd_are_read_predicted_and_drawn(run_page, tmp_path):
    visium_hd(tmp_path)
    names = run_page("visium_hd")
    sdata = names["sdata"]
    # The page deletes the layer.
    assert names["values"].shape == (400, 2)
    assert np.isfinite(names["values"].to_numpy()).all()
    assert plt.get_fignums(), "nothing was drawn"
    assert sdata["square_008um"].uns["he2gene"]["lattice_um"]


def test_cells_of_xenium_are_read_predicted_on_the_aligned_image_and_drawn(run_page, tmp_path):
    xenium(tmp_path)
    sdata = run_page("xenium")["sdata"]
    record = sdata["table"].uns["he2gene"]
    assert record["image"] == "he"
    assert record["mpp"] == pytest.approx(MPP)
    check_prediction(sdata["table"], 25)


def test_files_of_legacy_st_are_read_predicted_and_evaluated(run_page, tmp_path):
    st(tmp_path)
    table = run_page("st")["sdata"]["table"]
    assert table.uns["he2gene"]["mpp"] == pytest.approx(MPP)
    assert set(table.obs["section"]) == {"C5"}
    assert set(table.obs["patient"]) == {"C"}
    assert "he2gene_eval" in table.uns
    check_prediction(table, 20)
    assert (tmp_path / "C5.zarr").is_dir()


def test_a_whole_slide_of_aperio_is_predicted_on_a_grid(run_page, tmp_path):
    pixels = toy_slide(12)[0][:320, :320]
    description = f"Aperio Image Library v1.0\n{pixels.shape[1]}x{pixels.shape[0]}|AppMag = 5|MPP = {MPP}"
    tifffile.imwrite(tmp_path / "slide.svs", pixels, photometric="rgb", tile=(128, 128), description=description)
    sdata = run_page("image")["sdata"]
    assert sdata["table"].uns["he2gene"]["mpp"] == MPP
    check_prediction(sdata["table"], sdata["table"].n_obs)


def test_an_old_anndata_is_converted_and_predicted(run_page, tmp_path):
    pixels, counts, genes = toy_slide(20)
    x, y = np.meshgrid(np.arange(5), np.arange(4))
    old = ad.AnnData(counts.astype(np.float32))
    old.var_names = genes
    old.obsm["spatial"] = np.column_stack([x.ravel(), y.ravel()]) * 200.0 / MPP + 200.0 / MPP
    old.uns["spatial"] = {
        "slide": {
            "images": {name: reduce(pixels, step) for name, step in REDUCED.items()},
            "scalefactors": {f"tissue_{name}_scalef": 1 / step for name, step in REDUCED.items()}
            | {"spot_diameter_fullres": 50.0},
        }
    }
    old.write_h5ad(tmp_path / "slide.h5ad")
    tifffile.imwrite(tmp_path / "slide.tif", pixels, photometric="rgb")
    sdata = run_page("anndata")["sdata"]
    assert sdata["table"].uns["he2gene"]["image"] == "he"
    check_prediction(sdata["table"], 20)


def test_annotations_of_qupath_become_labels_and_spots_go_back(run_page, tmp_path, tiny_model):
    slide = hg.datasets.toy((4, 5), mpp=MPP)
    hg.tl.predict(slide, model=tiny_model, show_progress_bar=False)
    slide.write("slide.zarr")
    left = [[[0, 0], [250, 0], [250, 500], [0, 500], [0, 0]]]
    feature = {
        "type": "Feature",
        "geometry": {"type": "Polygon", "coordinates": left},
        "properties": {"objectType": "annotation", "classification": {"name": "Tumor"}},
    }
    (tmp_path / "annotations.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": [feature]}))
    sdata = run_page("qupath")["sdata"]
    inside = sdata["table"].obsm["spatial"][:, 0] < 250
    assert (sdata["table"].obs["pathologist_qupath"].eq("Tumor") == inside).all()
    assert len(json.loads((tmp_path / "spots.geojson").read_text())["features"]) == 20
    assert plt.get_fignums()
