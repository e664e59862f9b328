"""`hg.pp.qc` and `hg.pp.normalize_stains`: functions of squidpy with our masks and our checks of names."""

import numpy as np
import pytest
import spatialdata as sd
import squidpy as sq
from scipy.ndimage import gaussian_filter
from spatialdata.models import Image2DModel, Labels2DModel
from spatialdata.transformations import Scale, Sequence, Translation, get_transformation

import he2gene_sc as hg

pytestmark = pytest.mark.slow


def slide(change=lambda pixels: pixels, seed=0):
    """Return a toy image of 500 × 500 px at 2 µm/px, all tissue, with a mask at an eighth of its resolution."""
    pixels = change(hg.datasets.toy((4, 4), mpp=2.0, seed=seed)["he"].to_numpy())
    here = Scale([3.0, 3.0], axes=("y", "x"))
    image = Image2DModel.parse(pixels, dims=("c", "y", "x"), transformations={"here": here})
    on_image = Sequence([Scale([500 / 62, 500 / 62], axes=("y", "x")), here])
    mask = Labels2DModel.parse(np.ones((62, 62), np.uint16), dims=("y", "x"), transformations={"here": on_image})
    sdata = sd.SpatialData(images={"he": image}, labels={"he_tissue": mask})
    sdata.attrs["he2gene"] = {"mpp": {"he": 2.0}}
    return sdata


def half_blurred(pixels):
    out = pixels.copy()
    out[:, :, :250] = gaussian_filter(pixels[:, :, :250].astype(float), (0, 4, 4)).astype(np.uint8)
    return out


def paler(pixels):
    return (255 - 0.5 * (255.0 - pixels)).astype(np.uint8)


def test_tiles_of_the_blurred_half_are_the_least_sharp_and_match_the_image():
    sdata = slide(half_blurred)
    hg.pp.qc(sdata, tile_um=100.0)
    tiles = sdata["he_qc"]
    left = (tiles.geometry.centroid.x < 250).to_numpy()
    assert len(tiles) == 100
    assert tiles["qc_tenengrad"][left].max() < tiles["qc_tenengrad"][~left].min()
    assert left[tiles["qc_outlier"]].all()
    assert tiles["is_tissue"].all()
    np.testing.assert_allclose(tiles.total_bounds, [0, 0, 500, 500])
    assert get_transformation(tiles, get_all=True).keys() == {"here"}
    alone = sd.SpatialData(images={"he": sdata["he"]})
    sq.experimental.im.qc_image(alone, "he", tile_size=(50, 50), detect_tissue=False, progress=False, preview=False)
    np.testing.assert_allclose(tiles["qc_tenengrad"], alone["qc_img_he"][:, "qc_tenengrad"].X.ravel(), rtol=1e-4)


def test_metrics_are_given_by_name():
    sdata = slide(half_blurred)
    hg.pp.qc(sdata, tile_um=100.0, metrics="tenengrad")
    assert [name for name in sdata["he_qc"] if name.startswith("qc_")] == ["qc_tenengrad", "qc_outlier"]
    with pytest.raises(ValueError, match=r"`metrics` is 'sharpness', valid: \['tenengrad', "):
        hg.pp.qc(sdata, metrics=["tenengrad", "sharpness"])


def test_tiles_are_not_used_as_spots_and_elements_of_the_user_are_kept():
    sdata = slide()
    hg.pp.qc(sdata)
    with pytest.raises(ValueError, match="has no spots"):
        hg.tl.predict(sdata)
    hg.pp.qc(sdata, tile_um=100.0)
    assert len(sdata["he_qc"]) == 100
    assert set(sdata.shapes) == {"he_qc"}
    assert not sdata.tables
    sdata["he_qc"] = sdata["he_qc"].iloc[:50]
    with pytest.raises(ValueError, match=r"`key_added`: shapes\['he_qc'\] exists and was changed"):
        hg.pp.qc(sdata)
    with pytest.raises(ValueError, match="`key_added`: labels.*was not written by hg.pp.qc"):
        hg.pp.qc(sdata, key_added="he_tissue")


def test_tiles_inside_the_mask_are_tissue():
    """The mask covers the right half, with its own pixel size."""
    sdata = slide()
    at = Sequence([Translation([250.0, 0.0], axes=("x", "y")), Scale([3.0, 3.0], axes=("y", "x"))])
    sdata["half"] = Labels2DModel.parse(np.ones((500, 250), np.uint16), dims=("y", "x"), transformations={"here": at})
    hg.pp.qc(sdata, tissue_key="half", tile_um=100.0)
    right = sdata["he_qc"].geometry.centroid.x > 250
    np.testing.assert_array_equal(sdata["he_qc"]["is_tissue"], right)


def test_stains_match_the_reference_and_the_image_is_unchanged():
    sdata, reference = slide(paler), slide(seed=1)
    before = sdata["he"].to_numpy().copy()
    hg.pp.normalize_stains(sdata, reference, method="reinhard")
    pale, made, wanted = (x.to_numpy().mean((1, 2)) for x in (sdata["he"], sdata["he_normalized"], reference["he"]))
    assert abs(made - wanted).max() < 0.25 * abs(pale - wanted).max()
    assert (sdata["he"].to_numpy() == before).all()
    assert get_transformation(sdata["he_normalized"], get_all=True).keys() == {"here"}
    assert sdata.attrs["he2gene"]["mpp"] == {"he": 2.0, "he_normalized": 2.0}
    assert set(reference.images) == {"he"}
    with pytest.raises(ValueError, match=r"images\['he_normalized'\] exists"):
        hg.pp.normalize_stains(sdata, reference, image_key="he")


def test_macenko_equals_squidpy():
    sdata, reference = slide(), slide(seed=1)
    hg.pp.normalize_stains(sdata, reference)
    im = sq.experimental.im
    theirs = sd.SpatialData(images={"he": sdata["he"]}, labels={"he_tissue": sdata["he_tissue"]})
    expected = im.normalize_stains(
        theirs, "he", im.fit_stain_reference(reference, "he"), inplace=False, preserve_background=False
    )
    np.testing.assert_array_equal(sdata["he_normalized"].to_numpy(), np.asarray(expected))


@pytest.mark.parametrize("verb", [hg.pp.qc, lambda sdata, **key: hg.pp.normalize_stains(sdata, slide(), **key)])
def test_without_a_mask_and_with_unknown_arguments_nothing_is_written(verb):
    sdata = slide()
    with pytest.raises(ValueError, match="`inplace` is not an argument of hg.pp"):
        verb(sdata, inplace=False)
    del sdata.labels["he_tissue"]
    with pytest.raises(ValueError, match="`tissue_key` 'he_tissue' not found.*run hg.pp.tissue first"):
        verb(sdata)
    assert set(sdata.images) == {"he"}
    assert not sdata.shapes


def test_grey_images_raise_because_they_have_no_two_stains():
    sdata = slide(lambda pixels: np.repeat(pixels[:1], 3, axis=0))
    with pytest.raises(ValueError, match="method 'macenko' cannot separate the stains"):
        hg.pp.normalize_stains(sdata, slide())
    with pytest.raises(ValueError, match="method 'macenko' cannot separate the stains"):
        hg.pp.normalize_stains(slide(), sdata)
