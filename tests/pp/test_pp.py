"""`hg.pp.tissue` and `hg.pp.grid`: from an image without spots to pseudo-spots for the prediction."""

import warnings

import numpy as np
import pytest
import spatialdata as sd
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from spatialdata.models import Image2DModel, Labels2DModel
from spatialdata.transformations import Identity, Scale, Sequence, Translation, get_transformation, set_transformation

import he2gene_sc as hg


def disc(height=600, width=800, background=(243, 243, 243)):
    """Return an image with a round piece of pink tissue of 200 px radius in the middle, and its mask."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width]
    tissue = (y - height / 2) ** 2 + (x - width / 2) ** 2 < 200**2
    pixels = np.empty((3, height, width), np.uint8)
    pixels[:] = np.array(background, np.uint8)[:, None, None]
    pink = np.clip(np.array([190, 110, 170])[:, None] + rng.normal(0, 15, (3, tissue.sum())), 1, 255)
    pixels[:, tissue] = pink.astype(np.uint8)
    return pixels, tissue


def bare(pixels, systems=None, mpp=2.0):
    image = Image2DModel.parse(pixels, dims=("c", "y", "x"), transformations=systems or {"global": Identity()})
    sdata = sd.SpatialData(images={"he": image})
    if mpp is not None:
        sdata.attrs["he2gene"] = {"mpp": {"he": mpp}}
    return sdata


def with_mask(mask, **kwargs):
    """Return a white image with a given tissue mask at a quarter of its resolution."""
    sdata = bare(np.full((3, mask.shape[0] * 4, mask.shape[1] * 4), 255, np.uint8), **kwargs)
    sdata.labels["he_tissue"] = Labels2DModel.parse(
        mask.astype(np.uint16),
        dims=("y", "x"),
        transformations={"global": Scale([4.0, 4.0], axes=("y", "x"))},
    )
    return sdata


def agreement(sdata, tissue, key="he_tissue"):
    """Return the intersection over union of the mask with the truth."""
    mask = sdata[key].to_numpy() > 0
    rows = (np.arange(tissue.shape[0]) * mask.shape[0] // tissue.shape[0])[:, None]
    columns = np.arange(tissue.shape[1]) * mask.shape[1] // tissue.shape[1]
    whole = mask[rows, columns]
    return (whole & tissue).sum() / (whole | tissue).sum()


def centres(sdata, key="spots"):
    return np.column_stack([sdata[key].geometry.x, sdata[key].geometry.y])


# Tissue


@pytest.mark.parametrize("method", ["auto", "otsu", "glass"])
@pytest.mark.parametrize("value", [0, 243, 255])
def test_a_blank_image_has_no_tissue(value, method):
    noise = np.random.default_rng(0).integers(0, 3, (3, 120, 160), dtype=np.uint8)
    sdata = bare(np.full((3, 120, 160), value, np.uint8) - noise * (value == 243))
    with pytest.raises(ValueError, match=r"`image_key` 'he' is blank \(white, black or transparent\)"):
        hg.pp.tissue(sdata, method=method)
    assert not sdata.labels


@pytest.mark.parametrize("background", [(243, 243, 243), (255, 255, 255), (0, 0, 0)])
def test_tissue_is_found_on_white_and_on_black(background):
    pixels, tissue = disc(background=background)
    sdata = bare(pixels)
    assert hg.pp.tissue(sdata) is None
    assert agreement(sdata, tissue) > 0.9


def test_tissue_is_found_on_a_transparent_background():
    pixels, tissue = disc(background=(0, 0, 0))
    sdata = bare(np.concatenate([pixels, 255 * tissue[None].astype(np.uint8)]))
    hg.pp.tissue(sdata)
    assert agreement(sdata, tissue) > 0.9


def test_transparent_pixels_are_background_whatever_their_colour():
    pixels, tissue = disc(background=(190, 110, 170))
    sdata = bare(np.concatenate([pixels, 255 * tissue[None].astype(np.uint8)]))
    hg.pp.tissue(sdata)
    assert agreement(sdata, tissue) > 0.9


@pytest.mark.parametrize(
    ("ink", "warning"),
    [
        ((40, 140, 90), "1[345] % of the tissue mask of image 'he' is green or blue, like ink"),
        ((200, 30, 50), "1[4567] % of the tissue mask of image 'he' is red without violet, like ink or blood"),
    ],
)
def test_ink_in_the_tissue_mask_gives_a_warning(ink, warning):
    pixels, tissue = disc()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        # Of squidpy too, which nobody here can mend.
        warnings.simplefilter("error", FutureWarning)
        hg.pp.tissue(bare(pixels))
    pixels[:, 270:330, 250:550] = np.array(ink, np.uint8)[:, None, None]
    with pytest.warns(UserWarning, match=warning):
        hg.pp.tissue(bare(pixels))


def test_tissue_of_a_large_image_is_found_at_reduced_resolution():
    pixels, tissue = disc()
    sdata = bare(pixels.repeat(3, axis=1).repeat(3, axis=2))
    hg.pp.tissue(sdata)
    assert np.prod(sdata["he_tissue"].shape) <= 1_500_000
    assert agreement(sdata, tissue) > 0.9


def test_the_mask_matches_the_image_in_every_coordinate_system():
    pixels, _ = disc(601, 803)
    sdata = bare(pixels, {"global": Scale([2.0, 2.0], axes=("x", "y")), "other": Identity()})
    hg.pp.tissue(sdata)
    for system in ("global", "other"):
        extents = [sd.get_extent(sdata[key], coordinate_system=system) for key in ("he", "he_tissue")]
        assert extents[0]["x"] == pytest.approx(extents[1]["x"], abs=1e-6)
        assert extents[0]["y"] == pytest.approx(extents[1]["y"], abs=1e-6)


def test_tissue_does_not_change_the_image_and_accepts_a_name(tmp_path):
    pixels, _ = disc()
    sdata = bare(pixels)
    for _ in range(2):
        hg.pp.tissue(sdata, key_added="mine")
    assert list(sdata.labels) == ["mine"]
    np.testing.assert_array_equal(sdata["he"], pixels)
    sdata.write(tmp_path / "a.zarr")
    assert list(sd.read_zarr(tmp_path / "a.zarr").labels) == ["mine"]


def test_tissue_raises_for_two_equal_images_and_for_grey_images():
    pixels, _ = disc()
    sdata = bare(pixels)
    sdata["grey"] = Image2DModel.parse(pixels[:1], dims=("c", "y", "x"))
    with pytest.raises(ValueError, match="`image_key` 'grey' is a one-channel"):
        hg.pp.tissue(sdata, image_key="grey")
    sdata["twin"] = Image2DModel.parse(pixels, dims=("c", "y", "x"))
    with pytest.raises(ValueError, match="`image_key` is ambiguous, candidates: .*'he', 'twin'"):
        hg.pp.tissue(sdata)
    assert not sdata.labels
    del sdata.images["twin"]
    hg.pp.tissue(sdata)
    assert list(sdata.labels) == ["he_tissue"]


def two_tissues(pale, dark=300, colour=(205, 165, 195)):
    """Return an image of 600 × 800 px: in each row ``dark`` px of dark tissue, then ``pale`` px of pale tissue, then glass."""
    rng = np.random.default_rng(0)
    pixels = np.full((3, 600, 800), 243, np.uint8)
    for stain, part in (((120, 60, 130), slice(0, dark)), (colour, slice(dark, dark + pale))):
        n = pixels[:, :, part].shape
        pixels[:, :, part] = np.clip(np.array(stain)[:, None, None] + rng.normal(0, 15, n), 1, 255)
    tissue = np.zeros((600, 800), bool)
    tissue[:, : dark + pale] = True
    return pixels, tissue


def test_tissue_that_fills_the_image_is_found_completely():
    pixels, tissue = two_tissues(pale=500)
    sdata = bare(pixels)
    hg.pp.tissue(sdata)
    assert agreement(sdata, tissue) > 0.98


def test_otsu_warns_of_lost_tissue_and_names_the_call_that_finds_it():
    pixels, tissue = two_tissues(pale=500)
    sdata = bare(pixels)
    for options in ({"method": "otsu"}, {"n_samples": 5}):
        with pytest.warns(UserWarning, match=r"'otsu' leaves out 6\d % of the stained structure.*method='glass'"):
            hg.pp.tissue(sdata, **options)
        assert agreement(sdata, tissue) < 0.5
    hg.pp.tissue(sdata, method="glass")
    assert agreement(sdata, tissue) > 0.98


def test_pale_tissue_on_a_slide_of_mostly_glass_is_left_out_with_a_warning():
    pixels, tissue = two_tissues(pale=120, dark=60, colour=(228, 190, 222))
    sdata = bare(pixels)
    with pytest.warns(UserWarning, match="leaves out 6"):
        hg.pp.tissue(sdata)
    assert agreement(sdata, tissue) < 0.5
    hg.pp.tissue(sdata, method="glass")
    assert agreement(sdata, tissue) > 0.9


def test_method_glass_gives_neither_dust_nor_holes():
    pixels, tissue = disc()
    pixels[:, 20:24, 20:24] = 100
    pixels[:, 298:304, 398:404] = 243
    sdata = bare(pixels)
    hg.pp.tissue(sdata, method="glass")
    mask = sdata["he_tissue"].to_numpy()
    assert set(np.unique(mask)) == {0, 1}
    assert mask[300, 400] == 1
    assert agreement(sdata, tissue) > 0.9


def test_a_slide_of_glass_and_tissue_is_masked_by_otsu_without_a_warning():
    pixels, _ = disc()
    sdata = bare(pixels)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        hg.pp.tissue(sdata)
        hg.pp.tissue(sdata, method="otsu", key_added="otsu")
    np.testing.assert_array_equal(sdata["he_tissue"], sdata["otsu"])


def test_tissue_by_glass_takes_no_arguments_of_squidpy():
    with pytest.raises(ValueError, match=r"`method` 'glass' takes no further arguments, given: \['n_samples'\]"):
        hg.pp.tissue(bare(disc()[0]), method="glass", n_samples=5)


@pytest.mark.data
def test_the_inset_of_a1_is_not_tissue(her2st):
    sdata = her2st("A1")
    hg.pp.tissue(sdata, key_added="mask")
    mask = sdata.labels.pop("mask")
    image = sdata["he"]
    height, width = (sd.get_pyramid_levels(image, n=0) if hasattr(image, "children") else image).shape[1:]
    rows = int(530 / height * mask.shape[0])
    columns = int(np.ceil(1500 / width * mask.shape[1]))
    assert (mask.to_numpy()[:rows, columns:] > 0).mean() < 0.05
    assert (mask.to_numpy() > 0).mean() > 0.1


# Grid


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    mpp=st.floats(0.5, 4), diameter=st.floats(50, 200), pitch=st.floats(60, 300), share=st.sampled_from([0.1, 0.5, 1.0])
)
def test_spots_of_a_grid_have_the_given_size_and_distance_and_are_on_tissue(mpp, diameter, pitch, share):
    mask = np.zeros((200, 250), bool)
    mask[20:180, 30:220] = True
    sdata = with_mask(mask, mpp=mpp)
    hg.pp.grid(sdata, diameter_um=diameter, pitch_um=pitch, min_tissue=share)
    xy = centres(sdata)
    np.testing.assert_allclose(2 * sdata["spots"]["radius"] * mpp, diameter)
    for axis in (0, 1):
        steps = np.diff(np.unique(xy[:, axis].round(6))) * mpp
        np.testing.assert_allclose(steps, pitch, rtol=1e-4)
    row, column = (xy / 4).astype(int)[:, ::-1].T
    if share >= 0.5:
        near = diameter / mpp / 4 / 2 * (1 - share) * 2 + 2
        assert ((row > 20 - near) & (row < 180 + near) & (column > 30 - near) & (column < 220 + near)).all()
    if share == 1.0:
        assert mask[row, column].all()


def test_a_grid_fills_the_tissue():
    sdata = with_mask(np.ones((100, 125), bool), mpp=2.0)
    hg.pp.grid(sdata, diameter_um=100, pitch_um=100)
    assert len(sdata["spots"]) == 8 * 10
    assert sdata["spots"].index.is_unique


def test_all_numbered_pieces_of_tissue_are_treated_alike():
    labels = np.zeros((100, 125), np.uint16)
    labels[:, :50], labels[:, 70:] = 1, 2
    sdata = with_mask(labels)
    hg.pp.grid(sdata, min_tissue=1.0)
    x = centres(sdata)[:, 0]
    assert (x < 200).any()
    assert (x > 280).any()
    assert not ((x > 205) & (x < 275)).any()


def test_a_grid_keeps_the_systems_of_the_image_and_the_mpp_for_predict():
    sdata = with_mask(np.ones((100, 100), bool), mpp=None)
    set_transformation(sdata["he"], Scale([3.0, 3.0], axes=("x", "y")), "other")
    hg.pp.grid(sdata, mpp=2.5)
    assert sdata.attrs["he2gene"]["mpp"] == {"he": 2.5}
    assert set(get_transformation(sdata["spots"], get_all=True)) == {"global", "other"}


def test_a_grid_follows_the_mask_of_another_tool():
    """The mask covers the right half, with its own pixel size and two levels."""
    sdata = hg.datasets.toy((4, 4), mpp=2.0)
    height, width = hg._core.images.pyramid_of(sdata, "he").height, hg._core.images.pyramid_of(sdata, "he").width
    half = np.ones((height // 2, width // 4), np.uint16)
    placed = Sequence([Scale([2.0, 2.0], axes=("x", "y")), Translation([width / 2, 0.0], axes=("x", "y"))])
    where = {"dims": ("y", "x"), "transformations": {"global": placed}}
    for name, levels in (("one", {}), ("several", {"scale_factors": [2]})):
        sdata[name] = sd.models.Labels2DModel.parse(half, **where, **levels)
        hg.pp.grid(sdata, tissue_key=name, key_added=f"spots_{name}")
        x = sdata[f"spots_{name}"].geometry.x
        assert width / 2 - 1 <= x.min()
        assert x.max() > 0.8 * width
    apart = sd.models.Labels2DModel.parse(half, dims=("y", "x"), transformations={"elsewhere": Identity()})
    sdata["apart"] = apart
    with pytest.raises(ValueError, match="labels 'apart' and image 'he' share no coordinate system"):
        hg.pp.grid(sdata, tissue_key="apart", key_added="none")


def test_a_coarse_mask_without_a_scale_covers_the_image_with_a_warning():
    sdata = hg.datasets.toy((4, 4), mpp=2.0)
    pyramid = hg._core.images.pyramid_of(sdata, "he")
    sdata["coarse"] = Labels2DModel.parse(
        np.ones((pyramid.height // 8, pyramid.width // 8), np.uint16), dims=("y", "x")
    )
    with pytest.warns(UserWarning, match=r"they are taken to cover it.*Scale\(\[8"):
        hg.pp.grid(sdata, tissue_key="coarse", key_added="bins")
    assert sdata["bins"].geometry.x.max() > 0.8 * pyramid.width


def test_a_grid_can_be_replaced():
    sdata = with_mask(np.ones((100, 100), bool))
    hg.pp.grid(sdata)
    many = len(sdata["spots"])
    hg.pp.grid(sdata, pitch_um=200)
    assert 0 < len(sdata["spots"]) < many


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"diameter_um": 0}, "`diameter_um`"),
        ({"diameter_um": np.nan}, "`diameter_um`"),
        ({"diameter_um": 10.0}, r"`diameter_um` 10 is 5 px"),
        ({"pitch_um": -1}, "`pitch_um`"),
        ({"mpp": 0}, "`mpp`"),
        ({"min_tissue": 0}, "`min_tissue`"),
        ({"min_tissue": 1.5}, "`min_tissue`"),
        ({"tissue_key": "nope"}, r"`tissue_key` 'nope' not found, valid keys: \['he_tissue'\]"),
        ({"image_key": "nope"}, r"`image_key` 'nope' not found, valid keys: \['he'\]"),
        ({"key_added": "a/b"}, "`key_added`"),
    ],
)
def test_invalid_arguments_of_grid_raise(arguments, match):
    sdata = with_mask(np.ones((100, 100), bool))
    with pytest.raises(ValueError, match=match):
        hg.pp.grid(sdata, **arguments)
    assert not sdata.shapes


def test_grid_needs_mpp_mask_and_tissue():
    with pytest.raises(ValueError, match="`mpp` of image 'he' is unknown"):
        hg.pp.grid(with_mask(np.ones((100, 100), bool), mpp=None))
    with pytest.raises(ValueError, match=r"`tissue_key` 'he_tissue' not found.*run hg\.pp\.tissue"):
        hg.pp.grid(bare(disc()[0]))
    with pytest.raises(ValueError, match="no spot of 100 µm is on tissue"):
        hg.pp.grid(with_mask(np.zeros((100, 100), bool)))


def test_grid_does_not_replace_spots_that_a_table_annotates(toy):
    hg.pp.tissue(toy)
    before = toy["spots"]
    with pytest.raises(ValueError, match=r"`key_added`: shapes\['spots'\] exists and was not written by hg\.pp\.grid"):
        hg.pp.grid(toy)
    assert toy["spots"] is before
    hg.pp.grid(toy, key_added="pseudo")
    assert "pseudo" in toy.shapes


def test_the_same_grid_can_be_made_again_after_a_prediction(toy, tiny_model):
    del toy.tables["table"], toy.shapes["spots"]
    hg.pp.tissue(toy)
    hg.pp.grid(toy)
    hg.tl.predict(toy, model=tiny_model)
    hg.pp.grid(toy)
    with pytest.raises(ValueError, match="is a shapes element with other spots"):
        hg.pp.grid(toy, pitch_um=150)
    hg.tl.predict(toy, model=tiny_model)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_a_bare_image_is_predicted_from_file_to_table(tmp_path, tiny_model, suffix):
    pixels, tissue = disc()
    Image.fromarray(np.moveaxis(pixels, 0, -1)).save(tmp_path / f"slide.{suffix}")
    sdata = hg.io.read_he(tmp_path / f"slide.{suffix}", mpp=2.0)
    hg.pp.tissue(sdata)
    hg.pp.grid(sdata)
    hg.tl.predict(sdata, model=tiny_model)
    table = sdata["table"]
    assert 30 < table.n_obs < 70
    assert np.isfinite(table.X).all()
    x, y = table.obsm["spatial"].astype(int).T
    assert tissue[y, x].mean() > 0.9
    hg.io.save(sdata, tmp_path / "slide.zarr")
    assert sd.read_zarr(tmp_path / "slide.zarr")["table"].shape == table.shape


def test_predicting_an_image_without_spots_raises_and_names_grid(tmp_path, tiny_model):
    sdata = bare(disc()[0], mpp=None)
    with pytest.raises(ValueError, match=r"no spots .*hg\.pp\.tissue.*hg\.pp\.grid"):
        hg.tl.predict(sdata, model=tiny_model, mpp=0.5)
