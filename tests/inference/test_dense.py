"""Bins and cells that are denser than windows: features interpolated from lattices; sums over many neighbours."""

import logging

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import spatialdata as sd
import torch
from spatialdata.models import Image2DModel, ShapesModel, TableModel

import he2gene_sc as hg
from he2gene_sc.image import PatchReader, Pyramid
from he2gene_sc.inference import Interpolated, drop_idle_nodes, is_dense, lattice_of
from he2gene_sc.models import _embedding
from he2gene_sc.models._embedding import Basis, Context, rings_of, row_blocks
from he2gene_sc.models._network import FeatureExtractor
from tests.helpers.pictures import read_all

pytestmark = pytest.mark.slow
RINGS = ((50.0, 353.0), (353.0, 616.0))


def square(n, pitch, origin=0.0):
    x, y = np.meshgrid(np.arange(n), np.arange(n))
    return origin + pitch * np.column_stack([x.ravel(), y.ravel()]).astype(float)


def smooth_image(side=400):
    y, x = np.mgrid[:side, :side] / side
    waves = (np.sin(7 * x + 2 * y), np.cos(5 * y - x), np.sin(4 * x * y + 1))
    return np.stack([130 + 60 * wave for wave in waves]).astype(np.uint8)


def binned(pitch=8.0, n=12, origin=150.0, radius=3.0):
    """Bins of 16 µm on a smooth image of 2 µm/px, with a table of two genes."""
    centres = square(n, pitch, origin)
    shapes = ShapesModel.parse(centres, geometry=0, radius=radius, index=[f"b{i}" for i in range(len(centres))])
    import anndata as ad

    obs = pd.DataFrame(
        {"region": pd.Categorical(["bins"] * len(centres)), "instance_id": shapes.index}, index=shapes.index
    )
    counts = scipy.sparse.csr_matrix(np.random.default_rng(0).poisson(1.0, (len(centres), 2)).astype(np.float32))
    table = ad.AnnData(counts, obs=obs, var=pd.DataFrame(index=["ERBB2", "EPCAM"]))
    return sd.SpatialData(
        images={"he": Image2DModel.parse(smooth_image(), dims=("c", "y", "x"), c_coords=["r", "g", "b"])},
        shapes={"bins": shapes},
        tables={"table": TableModel.parse(table, region="bins", region_key="region", instance_key="instance_id")},
    )


@pytest.fixture
def patches(monkeypatch):
    """Record the number of encoded patches: one per window and spot."""
    found = []
    forward = FeatureExtractor.forward

    def counted(extractor, windows, *args):
        found.append(len(windows) * len(windows[0]))
        return forward(extractor, windows, *args)

    monkeypatch.setattr(FeatureExtractor, "forward", counted)
    return found


def predicted(sdata, model, **options):
    return hg.tl.predict(sdata, model=model, mpp=2.0, copy=True, **options)["table"]


@pytest.mark.parametrize("step", [3.0, 10.0, 1000.0])
def test_a_lattice_interpolates_planes_exactly_and_stays_among_the_spots(step):
    centres = np.random.default_rng(0).uniform([0, 50], [400, 90], (300, 2))
    nodes, weights = lattice_of(centres, step)
    assert (nodes >= centres.min(0)).all()
    assert (nodes <= centres.max(0)).all()
    np.testing.assert_allclose(weights.sum(1), 1, atol=1e-6)
    np.testing.assert_allclose(weights @ nodes, centres, rtol=1e-5)
    # Every node is a corner of a cell with a spot, so within a step of that spot.
    assert np.abs(nodes[:, None] - centres[None]).max(2).min(1).max() <= step + 1e-9


def test_nodes_that_hardly_any_spot_uses_are_dropped_and_every_spot_keeps_some():
    centres = np.concatenate([square(30, 8.0), [[243.0, 120.0], [500.0, 500.0]]])
    whole, before = lattice_of(centres, 25.0)
    nodes, weights = drop_idle_nodes(whole, before, centres)
    assert 0 < len(whole) - len(nodes) < 0.2 * len(whole)
    np.testing.assert_allclose(weights.sum(1), 1, atol=1e-6)
    assert np.abs(weights @ nodes - centres).max() < 25
    inside = ((centres > 30) & (centres < 200)).all(1)
    np.testing.assert_allclose(weights[inside] @ nodes, centres[inside], rtol=1e-5)


def test_nodes_inside_tissue_are_kept_where_cells_are_sparse():
    rng = np.random.default_rng(0)
    nest, sparse = rng.uniform(0, 200, (800, 2)), rng.uniform(0, 800, (1600, 2))
    centres = np.concatenate([nest, sparse])
    nodes, weights = drop_idle_nodes(*lattice_of(centres, 25.0), centres)
    inside = ((centres > 60) & (centres < 740)).all(1)
    np.testing.assert_allclose((weights @ nodes)[inside], centres[inside], atol=1e-3)


def test_lattices_of_a_line_and_of_a_single_spot():
    line = np.column_stack([np.arange(10.0), np.full(10, 3.0)])
    nodes, weights = lattice_of(line, 2.5)
    assert (nodes[:, 1] == 3).all()
    np.testing.assert_allclose(weights @ nodes, line, rtol=1e-6)
    nodes, weights = lattice_of(line[:1], 2.5)
    np.testing.assert_allclose(nodes, line[:1])


def test_a_pitch_of_half_a_window_is_not_dense():
    assert not is_dense(square(5, 50.0), (100.0, 200.0))
    assert is_dense(square(5, 45.0), (100.0, 200.0))
    assert not is_dense(square(1, 1.0), (100.0,))


def test_prediction_from_lattices_is_nearly_exact_and_encodes_far_fewer_patches(tiny_model, patches, caplog):
    sdata = binned()
    exact = predicted(sdata, tiny_model, exact=True)
    n_exact = sum(patches)
    patches.clear()
    with caplog.at_level(logging.INFO, "he2gene_sc"):
        table = predicted(sdata, tiny_model)
    assert n_exact == 2 * 144
    assert sum(patches) < n_exact / 2
    assert table.uns["he2gene"]["interpolated"] == ["bins"]
    assert table.uns["he2gene"]["lattice_um"] == [25.0, 50.0]
    assert f"interpolated from {sum(patches)} patches on lattices of 25, 50 µm; exact=True encodes 288" in caplog.text
    assert "interpolated" not in exact.uns["he2gene"]
    for key, bound in (("he2gene", 0.99), ("X_he2gene", 0.99)):
        a, b = (np.asarray(t.layers[key] if key in t.layers else t.obsm[key]) for t in (table, exact))
        found = [np.corrcoef(x, y)[0, 1] for x, y in zip(a.T, b.T, strict=True) if x.std() and y.std()]
        assert np.median(found) > bound
    np.testing.assert_allclose(table.obs["he2gene_tissue"], exact.obs["he2gene_tissue"], atol=0.2)


def test_a_lattice_as_fine_as_the_bins_is_exact(tiny_model):
    sdata = binned(pitch=8.0, n=9)
    exact = predicted(sdata, tiny_model, exact=True)
    # 16 µm are .16 of the smaller window and .08 of the larger one.
    fine = predicted(sdata, tiny_model, lattice=0.16)
    assert fine.uns["he2gene"]["lattice_um"] == [16.0, 32.0]
    a = hg.tl.embed(sdata, model=tiny_model, mpp=2.0, lattice=0.16, copy=True)["table"]
    b = hg.tl.embed(sdata, model=tiny_model, mpp=2.0, exact=True, copy=True)["table"]
    small = np.r_[0:8, 16:25]
    np.testing.assert_allclose(
        a.obsm["X_he2gene_features"][:, small], b.obsm["X_he2gene_features"][:, small], atol=1e-4
    )
    assert np.abs(a.obsm["X_he2gene_features"] - b.obsm["X_he2gene_features"]).max() > 1e-4
    assert fine.shape == exact.shape


def test_lattice_features_are_cached_and_reused(tiny_model, patches, tmp_path):
    sdata = binned()
    expected = predicted(sdata, tiny_model)
    first = predicted(sdata, tiny_model, features=tmp_path)
    patches.clear()
    second = predicted(sdata, tiny_model, features=tmp_path)
    hg.tl.embed(sdata, model=tiny_model, mpp=2.0, folder=tmp_path)
    assert not patches
    for table in (first, second):
        np.testing.assert_array_equal(table.layers["he2gene"], expected.layers["he2gene"])
    hg.tl.embed(sdata, model=tiny_model, mpp=2.0)
    patches.clear()
    third = predicted(sdata, tiny_model, features="X_he2gene_features")
    assert not patches
    np.testing.assert_allclose(third.layers["he2gene"], expected.layers["he2gene"], atol=1e-4)
    with pytest.raises(ValueError, match="differ in the image, its µm/px or the spots, the places of the spots"):
        predicted(sdata, tiny_model, features="X_he2gene_features", exact=True)


@pytest.mark.parametrize("radius", [0.4, 1.0])
def test_bins_smaller_than_eight_pixels_are_predicted(tiny_model, radius):
    table = predicted(binned(pitch=2 * radius, radius=radius), tiny_model)
    assert np.isfinite(table.layers["he2gene"]).all()


def test_a_few_touching_spots_are_encoded_one_by_one(tiny_model, patches):
    # Their lattice would have more nodes than spots.
    table = predicted(binned(pitch=20.0, n=2, radius=10.0), tiny_model)
    assert sum(patches) == 2 * 4
    assert "interpolated" not in table.uns["he2gene"]


def test_rows_read_by_blocks_equal_those_read_at_once(monkeypatch):
    monkeypatch.setattr("he2gene_sc.models._embedding._ROWS_AT_ONCE", 7)
    rng = np.random.default_rng(0)
    centres = square(8, 8.0)
    nodes, weights = zip(*(lattice_of(centres, step) for step in (20.0, 30.0)), strict=True)
    values = tuple(rng.normal(3, 2, (len(n), 2, 4 + 9)).astype(np.float32) for n in nodes)
    lazy = Interpolated(values, weights, "concat")
    whole = lazy[:]
    by_hand = [w @ v.mean(1) for w, v in zip(weights, values, strict=True)]
    np.testing.assert_allclose(
        whole, np.hstack([*(x[:, :4] for x in by_hand), *(x[:, 4:] for x in by_hand)]), rtol=1e-4, atol=1e-5
    )
    assert lazy.shape == whole.shape == (64, 26)
    basis = Basis(
        rng.normal(3, 1, 26).astype(np.float32),
        rng.uniform(1, 2, 26).astype(np.float32),
        rng.normal(size=(26, 5)).astype(np.float32),
        rng.normal(size=(15, 4)).astype(np.float32),
        Context(RINGS, (1.0, 1.0)),
    )
    rings = rings_of(centres * 10, RINGS)
    np.testing.assert_allclose(basis.embed(lazy, rings), basis.embed(whole, rings), rtol=1e-3, atol=1e-4)
    assert len(row_blocks(64)) == 1


def test_interpolated_views_have_the_layout_of_the_extractor():
    rng = np.random.default_rng(0)
    spec = hg.models.EncoderSpec("tiny", input_px=16, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    torch.manual_seed(0)
    encoder = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 4, stride=4), torch.nn.Flatten(), torch.nn.Linear(64, 6))
    image = rng.integers(1, 255, (3, 120, 120), dtype=np.uint8)
    centres, symmetries = np.array([[50.0, 60], [70, 40]]), ((0, False), (1, True))
    for fusion in ("mean", "concat"):
        extractor = FeatureExtractor(encoder, spec, fusion=fusion)

        def encoded(windows, one, centres=centres):
            reader = PatchReader(Pyramid.single(image), centres, 1.0, windows_um=windows, input_px=16)
            with torch.inference_mode():
                return one(tuple(torch.from_numpy(p) for p in read_all(reader)), symmetries).numpy()

        whole = encoded((20.0, 40.0), extractor)
        eye = scipy.sparse.csr_array(np.eye(2, dtype=np.float32))
        parts = tuple(encoded((um,), extractor.single_window(i)) for i, um in enumerate((20.0, 40.0)))
        np.testing.assert_allclose(Interpolated(parts, (eye, eye), fusion).views(slice(None)), whole, atol=1e-5)


def test_sums_over_a_lattice_approximate_sums_over_pairs(monkeypatch):
    rng = np.random.default_rng(0)
    centres = square(60, 20.0) + rng.uniform(-5, 5, (3600, 2))
    values = np.column_stack([np.sin(centres[:, 0] / 200), centres[:, 1] / 1000, rng.normal(size=3600)]).astype(
        np.float32
    )
    expected = [ring @ values for ring in rings_of(centres, RINGS)]
    monkeypatch.setattr(_embedding, "_MAX_PAIRS", 10)
    for pairs, ring in zip(expected, rings_of(centres, RINGS), strict=True):
        found = ring @ values
        np.testing.assert_allclose(found[:, :2], pairs[:, :2], atol=0.02)
        assert np.corrcoef(found[:, 2], pairs[:, 2])[0, 1] > 0.97
    np.testing.assert_allclose(rings_of(centres, RINGS)[0] @ np.ones((3600, 1), np.float32), 1, rtol=1e-4)


def test_a_spot_without_neighbours_is_its_own_neighbour_on_a_lattice(monkeypatch):
    monkeypatch.setattr(_embedding, "_MAX_PAIRS", 10)
    centres = np.concatenate([square(10, 30.0), [[5000.0, 5000.0]]])
    values = np.arange(101, dtype=np.float32)[:, None]
    near, far = (ring @ values for ring in rings_of(centres, RINGS))
    assert near[-1] == far[-1] == 100
    assert 30 < near[44, 0] < 60


def test_embedding_by_a_lattice_of_neighbours_is_close_to_that_by_pairs(monkeypatch):
    rng = np.random.default_rng(0)
    centres = square(40, 25.0)
    features = np.column_stack([np.sin(centres / 300), np.cos(centres / 200)]).astype(np.float32)
    basis = Basis(
        np.zeros(4, np.float32),
        np.ones(4, np.float32),
        rng.normal(size=(4, 20)).astype(np.float32),
        rng.normal(size=(60, 3)).astype(np.float32),
        Context(RINGS, (1.0, 1.0)),
    )
    expected = basis.embed(features, rings_of(centres, RINGS))
    monkeypatch.setattr(_embedding, "_MAX_PAIRS", 10)
    found = basis.embed(features, rings_of(centres, RINGS))
    assert np.abs(found - expected).max() < 0.03 * expected.std()
