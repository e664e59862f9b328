"""Models in LazySlide, and slides that LazySlide has opened."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import tifffile
import torch
from anndata import AnnData
from geopandas import GeoDataFrame
from shapely import box

import he2gene_sc as hg


@pytest.fixture
def slide(toy, tmp_path):
    """Toy slide as opened by LazySlide: a file with 12 tiles of 200 µm."""
    image = np.moveaxis(np.asarray(toy["he"]), 0, -1)
    path = tmp_path / "slide.tif"
    tifffile.imwrite(
        path, image, tile=(256, 256), photometric="rgb", resolution=(5000, 5000), resolutionunit="CENTIMETER"
    )
    corners = [(x, y) for y in range(50, 250, 70) for x in range(50, 330, 70)]
    tiles = GeoDataFrame({"tile_id": range(len(corners))}, geometry=[box(x, y, x + 100, y + 100) for x, y in corners])
    return SimpleNamespace(
        reader=SimpleNamespace(file=str(path)),
        properties=SimpleNamespace(mpp=2.0),
        images={},
        shapes={"tiles": tiles},
        tables={},
        pixels=image,
    )


def predicted(slide, model):
    """Predict with a model in the same steps as LazySlide."""
    ready = model.encoder.get_transform()
    corners = slide.shapes["tiles"].bounds[["minx", "miny"]].to_numpy()
    px = model.tile_px
    tiles = [ready(slide.pixels[y : y + px, x : x + px]) for x, y in corners.astype(int)]
    with torch.inference_mode():
        return model.predict(model.encoder.encode_image(torch.stack(tiles)).numpy(), corners)


def agree(table):
    """Whether both predictions agree, except for the downscaling of a wide window."""
    own, other = table.to_df(layer="he2gene"), table.to_df(layer="lazyslide")
    varying = own.columns[own.std() > 0.1]
    assert set(varying) <= set(other.columns)
    assert len(varying)
    for gene in varying:
        assert np.corrcoef(own[gene], other[gene])[0, 1] > 0.99, gene


def test_a_slide_in_tiles_is_predicted_as_by_predict(slide, tiny_model):
    model = hg.LazySlideModel(tiny_model, mpp=2.0, tile_mpp=2.0, genes=["ERBB2", "CD24"])
    assert model.tile_px == 100
    found = predicted(slide, model)
    assert list(found) == ["ERBB2", "CD24"]
    slide.tables["he2gene_tiles"] = AnnData(np.column_stack(list(found.values())), var=pd.DataFrame(index=list(found)))
    sdata = hg.io.from_wsidata(slide, layers={"lazyslide": "he2gene_tiles"})
    hg.tl.predict(sdata, model=tiny_model)
    agree(sdata["table"])


@pytest.mark.parametrize(("mpp", "tile_mpp"), [(0.5, 2.0), (2.0, 2.0), (2.0, 1.0)])
def test_a_slide_is_as_coarse_as_its_tiles(slide, tiny_model, monkeypatch, mpp, tile_mpp):
    found = []

    def embed(features, centres_um, mpp):
        found.append(mpp)
        return np.zeros((len(features), tiny_model.network.n_latent), np.float32)

    model = hg.LazySlideModel(tiny_model, mpp=mpp, tile_mpp=tile_mpp, genes="CD24")
    monkeypatch.setattr(tiny_model.network, "embed", embed)
    predicted(slide, model)
    assert found == [2.0]


def test_a_slide_that_is_out_of_distribution_warns(slide):
    slide.pixels = np.random.default_rng(0).integers(0, 255, slide.pixels.shape, dtype=np.uint8)
    model = hg.LazySlideModel(mpp=2.0, tile_mpp=2.0, genes="CD24")
    slide.shapes["tiles"] = slide.shapes["tiles"].iloc[:3]
    slide.shapes["tiles"].geometry = [box(x, 50, x + 200, 250) for x in (20, 70, 120)]
    with pytest.warns(UserWarning, match="out of distribution .*do not trust"):
        predicted(slide, model)


def test_tiles_of_another_size_are_refused_with_the_call_that_makes_them(tiny_model):
    model = hg.LazySlideModel(tiny_model, mpp=0.25, tile_mpp=1.0)
    with pytest.raises(ValueError, match=r"zs.pp.tile_tissues\(wsi, 200, mpp=1\)"):
        model.encoder.encode_image(torch.zeros((2, 3, 224, 224), dtype=torch.uint8))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"mpp": None}, "`mpp` is None"),
        ({"mpp": float("nan")}, "`mpp` is nan"),
        ({"mpp": 0.5, "tile_mpp": 0}, "`tile_mpp` is 0"),
        ({"mpp": 0.5, "genes": ["NOGENE"]}, "does not know .*NOGENE"),
        ({"mpp": 0.5, "genes": []}, "`genes` is empty"),
        ({"mpp": 0.5, "genes": ["ERBB2", "ERBB2"]}, "`genes`: names are duplicated: 'ERBB2'"),
    ],
)
def test_invalid_arguments_are_refused(tiny_model, options, match):
    with pytest.raises(ValueError, match=match):
        hg.LazySlideModel(tiny_model, **options)


def test_missing_tables_and_tiles_are_named(slide):
    with pytest.raises(ValueError, match="open_wsi"):
        hg.io.from_wsidata(AnnData())
    with pytest.raises(ValueError, match=r"'cells'.*; make tiles by `zs\.pp\.tile_tissues"):
        hg.io.from_wsidata(slide, tile_key="cells")
    with pytest.raises(ValueError, match="'path2space_tiles'"):
        hg.io.from_wsidata(slide, layers={"path2space": "path2space_tiles"})
    slide.tables["short"] = AnnData(np.zeros((3, 2), np.float32))
    with pytest.raises(ValueError, match="3 rows"):
        hg.io.from_wsidata(slide, layers={"short": "short"})


def test_a_table_of_other_tiles_or_with_a_gene_twice_is_refused_before_the_image_is_read(slide):
    n = len(slide.shapes["tiles"])
    slide.reader.file = "not there"
    slide.tables["twice"] = AnnData(np.zeros((n, 2), np.float32), var=pd.DataFrame(index=["A", "A"]))
    with pytest.raises(ValueError, match="`layers`: genes of table 'twice' are duplicated: 'A'"):
        hg.io.from_wsidata(slide, layers={"x": "twice"})
    obs = pd.DataFrame({"tile_id": range(n)[::-1]}, index=[str(i) for i in range(n)])
    slide.tables["turned"] = AnnData(np.zeros((n, 1), np.float32), obs=obs)
    with pytest.raises(ValueError, match="'tile_id' of table 'turned' differs from that of shapes 'tiles'"):
        hg.io.from_wsidata(slide, layers={"x": "turned"})


def test_lazyslide_itself_runs_a_model(slide, tiny_model):
    zs = pytest.importorskip("lazyslide")
    from wsidata import open_wsi

    wsi = open_wsi(slide.reader.file, store=None)
    model = hg.LazySlideModel(tiny_model, mpp=wsi.properties.mpp, tile_mpp=2.0)
    zs.pp.tile_tissues(wsi, model.tile_px, mpp=2.0, overlap=0.5)
    zs.tl.feature_extraction(wsi, model.encoder, pbar=False)
    zs.tl.feature_prediction(wsi, model, key_added="he2gene_tiles", pbar=False)
    sdata = hg.io.from_wsidata(wsi, layers={"lazyslide": "he2gene_tiles"})
    hg.tl.predict(sdata, model=tiny_model)
    agree(sdata["table"])
