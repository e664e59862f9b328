"""Lazy values that read the store they are saved to: right in memory and on disk after every save."""

import json
import math
import shutil

import anndata as ad
import dask
import dask.array as da
import numpy as np
import pandas as pd
import pytest
import spatialdata as sd
import tifffile
import zarr
from anndata import AnnData
from scipy.sparse import csr_matrix
from spatialdata.models import Image2DModel, Labels2DModel, PointsModel, TableModel

import he2gene_sc as hg
from he2gene_sc._core import concurrent_changes
from he2gene_sc._core.elements import check_files
from he2gene_sc._core.matrix import in_memory
from he2gene_sc._core.sources import sources

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

VALUES = np.arange(12.0).reshape(4, 3)
PIXELS = np.random.default_rng(0).integers(1, 255, (3, 40, 60), dtype=np.uint8)
OPENERS = {
    "text": lambda path: da.from_zarr(str(path)),
    "component": lambda path: da.from_zarr(str(path.parent), component=path.name),
    "path": da.from_zarr,
    "array": lambda path: da.from_zarr(zarr.open_array(path, mode="r")),
    "from_array": lambda path: da.from_array(zarr.open_array(path, mode="r")),
    "inline": lambda path: da.from_array(zarr.open_array(path, mode="r"), inline_array=True),
    "optimized": lambda path: dask.optimize(da.from_zarr(str(path)) + 0)[0],
    "delayed": lambda path: da.from_delayed(dask.delayed(zarr.load)(str(path)), *_shape_and_type(path)),
    "anndata": lambda path: ad.experimental.read_elem_lazy(zarr.open_array(path, mode="r")),
}


def _shape_and_type(path):
    array = zarr.open_array(path, mode="r")
    return array.shape, array.dtype


@pytest.fixture(autouse=True)
def _stores_are_older_than_the_process(monkeypatch):
    """Make stores older than the process, so that changes of an object are its own."""
    monkeypatch.setattr(concurrent_changes, "_START", math.inf)


@pytest.fixture
def store(tmp_path):
    table = ad.AnnData(VALUES.copy(), pd.DataFrame(index=list("abcd")), pd.DataFrame(index=list("xyz")))
    table.layers["mine"] = VALUES.copy()
    table.layers["sparse"] = csr_matrix(VALUES)
    table.obsm["pcs"] = VALUES[:, :2].copy()
    sdata = sd.SpatialData(
        images={"he": Image2DModel.parse(PIXELS, dims=("c", "y", "x"))},
        labels={"mask": Labels2DModel.parse(PIXELS[0].astype(np.int32), dims=("y", "x"))},
        points={"cells": PointsModel.parse(pd.DataFrame({"x": [1.0, 2.0], "y": [3.0, 4.0]}))},
        tables={"table": TableModel.parse(table)},
    )
    sdata.write(tmp_path / "slide.zarr")
    return tmp_path / "slide.zarr"


def _check_after_saves(sdata, store, expected):
    """Save three times, with another change each time; ``expected`` are values by the function that reads them."""
    for i in range(3):
        hg.io.save(sdata, overwrite=True)
        for read, values in expected.items():
            for place, slide in (("memory", sdata), ("disk", sd.read_zarr(store))):
                np.testing.assert_array_equal(np.asarray(read(slide)), values, err_msg=f"{place}, save {i + 1}")
        sdata["table"].obs[f"n{i}"] = i


@pytest.mark.parametrize("how", [how for how in OPENERS if how != "anndata"])
def test_an_image_computed_from_the_own_store_stays_right(store, how):
    sdata = sd.read_zarr(store)
    sdata.images["he"] = Image2DModel.parse(OPENERS[how](store / "images/he/s0") // 2, dims=("c", "y", "x"))
    _check_after_saves(sdata, store, {lambda s: s["he"]: PIXELS // 2})


@pytest.mark.parametrize("how", OPENERS)
def test_a_layer_computed_from_the_own_store_stays_right(store, how):
    sdata = sd.read_zarr(store)
    sdata["table"].layers["mine"] = OPENERS[how](store / "tables/table/layers/mine") + 1
    _check_after_saves(sdata, store, {lambda s: s["table"].layers["mine"]: VALUES + 1})


@pytest.mark.parametrize("how", ["text", "from_array"])
def test_every_part_of_a_table_may_read_the_own_store(store, how):
    sdata, table = sd.read_zarr(store), store / "tables" / "table"
    x, pcs = OPENERS[how](table / "X"), OPENERS[how](table / "obsm/pcs")
    sdata["table"].raw = ad.AnnData(x, sdata["table"].obs[[]], sdata["table"].var[[]])
    sdata["table"].X = x * 2
    sdata["table"].layers["sparse"] = ad.experimental.read_elem_lazy(zarr.open_group(table / "layers/sparse")) * 2
    sdata["table"].obsm["pcs"] = pcs - 1
    sdata["table"].uns["sums"] = {"x": x.sum(axis=0)}
    expected = {
        lambda s: s["table"].X: VALUES * 2,
        lambda s: s["table"].raw.X: VALUES,
        lambda s: in_memory(s["table"].layers["sparse"]).toarray(): VALUES * 2,
        lambda s: s["table"].obsm["pcs"]: VALUES[:, :2] - 1,
        lambda s: s["table"].uns["sums"]["x"]: VALUES.sum(axis=0),
    }
    _check_after_saves(sdata, store, expected)


def test_a_pyramid_labels_and_points_computed_from_the_own_store_stay_right(store):
    sdata = sd.read_zarr(store)
    pixels, mask = OPENERS["from_array"](store / "images/he/s0"), OPENERS["from_array"](store / "labels/mask/s0")
    sdata.images["he"] = Image2DModel.parse(255 - pixels, dims=("c", "y", "x"), scale_factors=[2])
    sdata.labels["mask"] = Labels2DModel.parse(mask + 1, dims=("y", "x"))
    cells = sdata["cells"].assign(x=sdata["cells"]["x"] + 1)
    cells.attrs = sdata["cells"].attrs
    sdata.points["cells"] = cells
    expected = {
        lambda s: s["he"]["scale0"]["image"]: 255 - PIXELS,
        lambda s: s["mask"]: PIXELS[0].astype(np.int32) + 1,
        lambda s: s["cells"].compute()["x"]: [2.0, 3.0],
    }
    _check_after_saves(sdata, store, expected)


def test_values_derived_from_two_stores_are_computed_before_their_sources_are_replaced(store, tmp_path):
    other = shutil.copytree(store, tmp_path / "other.zarr")
    sdata = sd.read_zarr(store)
    here, there = (OPENERS["text"](path / "tables/table/layers/mine") for path in (store, other))
    sdata["table"].layers["sum"] = here + there
    sdata["table"].layers["mine"] = here + 100
    sdata.images["negative"] = Image2DModel.parse(255 - sdata["he"].data, dims=("c", "y", "x"))
    sdata.images["he"] = Image2DModel.parse(sdata["he"].data // 2, dims=("c", "y", "x"))
    expected = {
        lambda s: s["table"].layers["sum"]: 2 * VALUES,
        lambda s: s["table"].layers["mine"]: VALUES + 100,
        lambda s: s["negative"]: 255 - PIXELS,
        lambda s: s["he"]: PIXELS // 2,
    }
    _check_after_saves(sdata, store, expected)
    shutil.rmtree(other)
    np.testing.assert_array_equal(np.asarray(sdata["table"].layers["sum"]), 2 * VALUES)


def test_an_unchanged_element_that_reads_a_replaced_one_stays_right(store):
    sdata = sd.read_zarr(store)
    mine = OPENERS["text"](store / "tables/table/layers/mine")
    sdata.images["same"] = Image2DModel.parse(sdata["he"].data + 0, dims=("c", "y", "x"))
    sdata.tables["second"] = TableModel.parse(ad.AnnData(VALUES.copy(), layers={"double": 2 * VALUES}))
    hg.io.save(sdata)
    sdata.images["same"] = Image2DModel.parse(sdata["he"].data + 0, dims=("c", "y", "x"))
    sdata["second"].layers["double"] = 2 * mine
    sdata.images["he"] = Image2DModel.parse(sdata["he"].data // 2, dims=("c", "y", "x"))
    sdata["table"].layers["mine"] = VALUES + 100
    _check_after_saves(sdata, store, {lambda s: s["same"]: PIXELS, lambda s: s["second"].layers["double"]: 2 * VALUES})


def test_arrays_in_memory_need_no_store_after_a_save(store, tmp_path):
    sdata = sd.SpatialData(
        images={"he": Image2DModel.parse(PIXELS, dims=("c", "y", "x"))},
        points={"cells": PointsModel.parse(pd.DataFrame({"x": [1.0, 2.0], "y": [3.0, 4.0]}))},
    )
    shutil.rmtree(hg.io.save(sdata, tmp_path / "new.zarr"))
    hg.io.save(sdata, tmp_path / "new.zarr")
    np.testing.assert_array_equal(sd.read_zarr(tmp_path / "new.zarr")["he"], PIXELS)


def test_an_image_of_a_tiff_file_is_read_from_it_after_a_save(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", PIXELS.transpose(1, 2, 0), photometric="rgb", tile=(32, 32))
    sdata = hg.io.read_he(tmp_path / "a.tif", mpp=0.5)
    shutil.rmtree(hg.io.save(sdata, tmp_path / "new.zarr"))
    np.testing.assert_array_equal(sdata["he"], PIXELS)


@pytest.mark.parametrize("how", ["text", "component", "path", "from_array", "inline", "optimized"])
def test_a_lazy_array_whose_store_is_gone_is_refused(store, how):
    array = OPENERS[how](store / "tables/table/layers/mine") + 1
    check_files("layers['mine']", array)
    shutil.rmtree(store)
    with pytest.raises(FileNotFoundError, match=r"layers\['mine'\] reads '.*/layers/mine', which does not exist"):
        check_files("layers['mine']", array)


@pytest.mark.parametrize("values", [csr_matrix(VALUES), VALUES], ids=["sparse", "dense"])
def test_a_lazy_matrix_of_anndata_whose_files_are_gone_is_refused(tmp_path, values):
    AnnData(values).write_zarr(tmp_path / "table.zarr")
    lazy = ad.experimental.read_elem_lazy(zarr.open_group(tmp_path / "table.zarr", mode="r")["X"])
    check_files("X", lazy)
    shutil.rmtree(tmp_path / "table.zarr")
    with pytest.raises(FileNotFoundError, match=r"X reads '.*table.zarr/X', which does not exist"):
        check_files("X", lazy)


def test_a_sparse_array_in_memory_reads_no_files():
    assert sources(da.from_array(csr_matrix(VALUES))) == []
    assert sources(da.from_delayed(dask.delayed(np.ones)(3), (3,), float)) != []


def test_points_whose_store_is_gone_are_refused_by_name(store, tmp_path):
    other = shutil.copytree(store, tmp_path / "other.zarr")
    sdata = sd.read_zarr(store)
    sdata.points["theirs"] = sd.read_zarr(other)["cells"]
    before = json.loads((store / "zarr.json").read_text())
    shutil.rmtree(other)
    for path in (None, tmp_path / "new.zarr"):
        with pytest.raises(FileNotFoundError, match=r"points\['theirs'\] reads '.*other.zarr.*which does not exist"):
            hg.io.save(sdata, path)
    assert json.loads((store / "zarr.json").read_text()) == before
