"""Misplaced spots raise or are warned of, with a call that corrects them; correct spots are not."""

import re
import warnings

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import spatialdata as sd
from spatialdata.models import Image2DModel, ShapesModel, TableModel
from spatialdata.transformations import Affine, Identity, Scale, Translation, set_transformation

import he2gene_sc as hg
from he2gene_sc._core.placement import check_on_tissue, check_placement
from he2gene_sc._core.slide import resolve
from he2gene_sc.stats import pitch_of

PITCH, SIDE = 40.0, 800


def tissue(side=SIDE):
    """Draw glass with a dark L of tissue, darker to the right, which no symmetry of the square maps onto itself."""
    y, x = np.mgrid[:side, :side] / side
    inside = ((x > 0.08) & (x < 0.35) & (y > 0.08) & (y < 0.92)) | ((x < 0.8) & (x > 0.08) & (y > 0.7) & (y < 0.92))
    shade = np.where(inside, 150 - 60 * x - 40 * y, 235)
    return (shade + np.random.default_rng(0).normal(0, 3, size=shade.shape)).clip(1, 254).astype(np.uint8), inside


def section(*, everywhere=False, array=True):
    """Make Visium spots on the tissue of an image at 2.5 µm/px."""
    shade, inside = tissue()
    row, column = (grid.ravel() for grid in np.mgrid[0:20, 0:18])
    centres = np.column_stack([30 + PITCH * (column + 0.5 * (row % 2)), 30 + PITCH * np.sqrt(0.75) * row])
    kept = everywhere | inside[tuple(centres.astype(int).T[::-1])]
    centres, row, column = centres[kept], row[kept], column[kept]
    index = pd.Index([f"s{i}" for i in range(len(centres))])
    obs = pd.DataFrame({"region": pd.Categorical(["spots"] * len(index)), "instance_id": index.to_numpy()}, index=index)
    if array:
        obs["array_row"], obs["array_col"] = row, 2 * column + row % 2
    counts = ad.AnnData(np.ones((len(index), 3), np.float32), obs=obs)
    shapes = ShapesModel.parse(
        centres, geometry=0, radius=PITCH * 0.275, index=index, transformations={"global": Identity()}
    )
    return sd.SpatialData(
        images={"he": Image2DModel.parse(np.stack([shade] * 3), dims=("c", "y", "x"))},
        shapes={"spots": shapes},
        tables={"table": TableModel.parse(counts, region="spots", region_key="region", instance_key="instance_id")},
    )


def place(sdata, matrix):
    """Transform the spots by a 2 × 3 matrix."""
    whole = Affine([*np.asarray(matrix, float), [0, 0, 1]], input_axes=("x", "y"), output_axes=("x", "y"))
    set_transformation(sdata["spots"], whole, "global")


def warnings_of(sdata, **kwargs):
    """Return all warnings of finding and checking the slide."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for slide in resolve(sdata, **kwargs):
            check_placement(sdata, slide)
    return [str(w.message) for w in caught]


def mend(sdata, message):
    """Run the call that a message names."""
    call = re.search(
        r"spatialdata\.transformations\.set_transformation\(.*?'global'\)|spatialdata.*?axes=.*?\)\)\)", message
    )
    exec(call.group(0), {"spatialdata": sd, "sdata": sdata})


def test_spots_where_they_belong_are_not_warned_of():
    assert warnings_of(section()) == []
    assert warnings_of(section(array=False)) == []
    assert warnings_of(section(everywhere=True)) == []


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_a_rotated_slide_is_not_warned_of(turns):
    sdata = section()
    pixels = np.rot90(np.asarray(sdata["he"]), turns, axes=(1, 2)).copy()
    sdata["he"] = Image2DModel.parse(pixels, dims=("c", "y", "x"))
    c, s = {1: (0, 1), 2: (-1, 0), 3: (0, -1)}[turns]
    half = SIDE / 2
    place(sdata, [[c, s, half - half * (c + s)], [-s, c, half - half * (c - s)]])
    assert warnings_of(sdata) == []


def test_a_slide_imaged_mirrored_is_not_warned_of():
    sdata = section()
    sdata["he"] = Image2DModel.parse(np.asarray(sdata["he"])[:, :, ::-1].copy(), dims=("c", "y", "x"))
    place(sdata, [[-1, 0, SIDE], [0, 1, 0]])
    assert warnings_of(sdata) == []


def test_array_positions_with_exchanged_names_are_not_warned_of_where_spots_lie_on_tissue():
    sdata = section()
    sdata["table"].obs = sdata["table"].obs.rename(columns={"array_row": "array_col", "array_col": "array_row"})
    assert warnings_of(sdata) == []


@pytest.mark.parametrize(
    ("matrix", "words"),
    [
        ([[0, 1, 0], [1, 0, 0]], "x and y of the spots look swapped"),
        ([[-1, 0, SIDE], [0, 1, 0]], "x of the spots looks mirrored"),
        ([[1, 0, 0], [0, -1, SIDE]], "y of the spots looks mirrored"),
    ],
)
def test_swapped_and_mirrored_spots_are_warned_of_with_a_call_that_corrects_them(matrix, words):
    sdata = section()
    right = resolve(sdata)[0].centres
    place(sdata, matrix)
    (message,) = warnings_of(sdata)
    assert "`array_row` and `array_col`" in message
    assert words in message
    mend(sdata, message)
    np.testing.assert_allclose(resolve(sdata)[0].centres, right, atol=1e-6)
    assert warnings_of(sdata) == []


@pytest.mark.parametrize("missing", [np.nan, np.inf, pd.NA, "NA"])
def test_a_spot_without_array_position_does_not_hide_swapped_spots(missing):
    sdata = section()
    place(sdata, [[0, 1, 0], [1, 0, 0]])
    column = sdata["table"].obs["array_row"].astype(object)
    column.iloc[3] = missing
    sdata["table"].obs["array_row"] = column.astype("Int64") if missing is pd.NA else column
    (message,) = warnings_of(sdata)
    assert "x and y of the spots look swapped" in message


def test_swapped_spots_off_the_tissue_are_warned_of_without_array_positions():
    sdata = section(array=False)
    place(sdata, [[0, 1, 0], [1, 0, 0]])
    (message,) = warnings_of(sdata)
    assert "x and y of the spots look swapped" in message


def said_of_tissue(sdata):
    """Warnings of spots on glass; tissue is darker than 200 here."""
    (slide,) = resolve(sdata)
    shade, places = np.asarray(sdata["he"])[0], slide.centres.astype(int)
    within = ((places >= 0) & (places < SIDE)).all(1)
    share = np.zeros(len(places))
    share[within] = shade[places[within, 1], places[within, 0]] < 200
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_on_tissue(sdata, slide, share)
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize(
    ("matrix", "words"),
    [
        ([[-1, 0, SIDE], [0, 1, 0]], "if x of the spots were mirrored"),
        ([[1, 0, 0], [0, -1, SIDE]], "if y of the spots were mirrored"),
        ([[-1, 0, SIDE], [0, -1, SIDE]], "turned by half a turn"),
        ([[0, 1, 0], [1, 0, 0]], "x and y of the spots were exchanged"),
        ([[1, 0, 140], [0, 1, 0]], r"if they were shifted by \(-1\d\d, 0\) px"),
    ],
)
def test_misplaced_spots_without_array_positions_are_warned_of_by_the_tissue(matrix, words):
    sdata = section(array=False)
    right = resolve(sdata)[0].centres
    assert said_of_tissue(sdata) == []
    place(sdata, matrix)
    (message,) = said_of_tissue(sdata)
    assert re.search(words, message)
    mend(sdata, message)
    assert said_of_tissue(sdata) == []
    if "shifted" not in words:
        np.testing.assert_allclose(resolve(sdata)[0].centres, right, atol=1e-6)


def test_spots_that_cover_glass_and_tissue_are_not_warned_of():
    assert said_of_tissue(section(everywhere=True, array=False)) == []


def test_swapped_bins_off_the_tissue_are_warned_of_though_bins_may_run_mirrored():
    sdata = section()
    pitch = pitch_of(resolve(sdata)[0].centres)
    sdata["spots"]["radius"] = pitch / 2
    assert warnings_of(sdata, mpp=2.5) == []
    place(sdata, [[0, 1, 0], [1, 0, 0]])
    (message,) = warnings_of(sdata, mpp=2.5)
    assert "x and y of the spots look swapped" in message


def test_spots_that_overlap_are_warned_of():
    sdata = section()
    pitch = pitch_of(resolve(sdata)[0].centres)
    for width, n in ((1.4, 0), (1.6, 1)):
        sdata["spots"]["radius"] = width * pitch / 2
        messages = warnings_of(sdata, mpp=2.5)
        assert len(messages) == n
        assert all("the spots overlap" in message for message in messages)


def test_swapped_spots_of_which_some_lie_on_the_border_are_warned_of(toy):
    set_transformation(toy["spots"], Affine([[0, 1, 0], [1, 0, 0], [0, 0, 1]], ("x", "y"), ("x", "y")), "global")
    assert resolve(toy)[0].centres[:, 1].max() == 600
    (message,) = warnings_of(toy)
    assert "x and y of the spots look swapped" in message


@pytest.mark.parametrize("order", ["shuffled", "as text"])
def test_mixed_up_spots_are_detected_by_array_positions(order):
    sdata = section()
    ids = sdata["spots"].index
    mixed = np.random.default_rng(0).permutation(ids) if order == "shuffled" else sorted(ids)
    assert list(mixed) != list(ids)
    sdata["spots"] = sdata["spots"].set_axis(pd.Index(mixed))
    (message,) = warnings_of(sdata)
    assert "the ids of table and spots look mixed up" in message


def test_array_positions_of_four_arrays_are_not_warned_of():
    sdata = section()
    obs = sdata["table"].obs
    obs["array_row"], obs["array_col"] = obs["array_row"] % 5, obs["array_col"] % 9
    assert obs.duplicated(["array_row", "array_col"]).any()
    assert warnings_of(sdata) == []


def test_spots_on_top_of_each_other_are_refused(toy):
    spots = toy["spots"].copy()
    spots.geometry = [spots.geometry.iloc[0]] * len(spots)
    toy.shapes["spots"] = spots
    with pytest.raises(ValueError, match="`shapes_key` 'spots': most spots lie on top of each other"):
        warnings_of(toy)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("element", ["spots", "he"])
def test_a_transformation_that_is_not_finite_is_refused(toy, element, value):
    set_transformation(toy[element], Scale([value, 1], axes=("x", "y")), "global")
    with pytest.raises(ValueError, match="`coordinate_system` 'global': a transformation .* NaN or infinite"):
        resolve(toy)


def test_all_spots_outside_are_refused_and_the_earlier_prediction_stays(toy, tiny_model):
    hg.tl.predict(toy, model=tiny_model)
    before = toy["table"].layers["he2gene"].copy()
    set_transformation(toy["spots"], Translation([50000, 50000], axes=("x", "y")), "global")
    with pytest.raises(ValueError, match=r"30 of 30 spots lie outside image 'he' \(700 × 600 px.*transformations"):
        hg.tl.predict(toy, model=tiny_model)
    np.testing.assert_array_equal(toy["table"].layers["he2gene"], before)


def test_full_resolution_coordinates_on_a_downscaled_image_are_corrected_by_the_scale_factor():
    sdata = section()
    right = resolve(sdata)[0].centres
    place(sdata, [[16, 0, 0], [0, 16, 0]])
    sdata["table"].uns["spatial"] = {"demo": {"scalefactors": {"tissue_hires_scalef": 0.0625}}}
    slides = resolve(sdata, mpp=2.5)
    with pytest.raises(ValueError, match=r"full-resolution coordinates.*tissue_hires_scalef") as error:
        check_placement(sdata, slides[0])
    mend(sdata, str(error.value))
    np.testing.assert_allclose(resolve(sdata, mpp=2.5)[0].centres, right, atol=1e-3)


def test_full_resolution_coordinates_without_a_scale_factor_are_corrected_by_the_pitch():
    sdata = section()
    right = resolve(sdata)[0].centres
    place(sdata, [[16, 0, 0], [0, 16, 0]])
    slides = resolve(sdata, mpp=2.5)
    with pytest.raises(ValueError, match="coordinates of a larger image, by the pitch of Visium") as error:
        check_placement(sdata, slides[0])
    mend(sdata, str(error.value))
    np.testing.assert_allclose(resolve(sdata, mpp=2.5)[0].centres, right, atol=1e-2)


@pytest.mark.parametrize(("factor", "word"), [(1.5, "larger"), (0.5, "smaller")])
def test_a_lattice_that_contradicts_the_stated_resolution_gets_both_corrections(factor, word):
    sdata = section(array=False)
    right = resolve(sdata)[0].centres
    place(sdata, [[factor, 0, 0], [0, factor, 0]])
    message = warnings_of(sdata, mpp=2.5)[0]
    assert f"pass mpp={2.5 / factor:.4g}" in message
    assert f"those of a {word} image" in message
    mend(sdata, message)
    np.testing.assert_allclose(resolve(sdata, mpp=2.5)[0].centres, right, rtol=1e-3)


def test_coordinates_of_a_larger_image_are_named_without_a_scale_factor():
    sdata = section()
    right = resolve(sdata)[0].centres
    place(sdata, [[3, 0, 0], [0, 3, 0]])
    (message,) = warnings_of(sdata)
    assert "look like those of a larger image" in message
    # All spots lie outside.
    larger = 1.1 * SIDE / right.min()
    place(sdata, [[larger, 0, 0], [0, larger, 0]])
    with pytest.raises(ValueError, match="look like those of a larger image") as error:
        warnings_of(sdata)
    mend(sdata, str(error.value))
    assert warnings_of(sdata) == []
    # They were shifted.
    place(sdata, [[1, 0, 2 * SIDE], [0, 1, 2 * SIDE]])
    with pytest.raises(ValueError, match="Check the transformations"):
        warnings_of(sdata)


def test_mirrored_spots_of_which_the_pixels_tell_nothing_get_both_corrections():
    sdata = section()
    right = resolve(sdata)[0].centres
    place(sdata, [[1, 0, 0], [0, -1, SIDE]])
    shade = np.asarray(sdata["he"])[0].astype(float)
    shade = (shade + shade[::-1] + shade[:, ::-1] + shade[::-1, ::-1]) / 4
    sdata["he"] = Image2DModel.parse(np.stack([shade.astype(np.uint8)] * 3), dims=("c", "y", "x"))
    (message,) = warnings_of(sdata)
    assert "x or y of the spots looks mirrored. If so" in message
    mend(sdata, message.split(" for x, or ")[1])
    np.testing.assert_allclose(resolve(sdata)[0].centres, right, atol=1e-6)


def test_micrometres_that_leave_a_coarse_image_are_named():
    sdata = section(array=False)
    place(sdata, [[2.5, 0, 0], [0, 2.5, 0]])
    messages = warnings_of(sdata, mpp=2.5)
    assert any("look like micrometres" in message and "lie outside" in message for message in messages)
    mend(sdata, messages[-1])
    assert warnings_of(sdata) == []


def test_micrometres_are_detected_if_the_pitch_is_off_by_a_percent():
    sdata = section(array=False)
    place(sdata, [[2.52, 0, 0], [0, 2.52, 0]])
    assert any("its coordinates look like micrometres" in message for message in warnings_of(sdata, mpp=2.0))


def test_micrometres_are_detected_by_a_lattice_of_exactly_1_um_per_px():
    sdata = section(array=False)
    set_transformation(sdata["he"], Scale([2.5, 2.5], axes=("x", "y")), "other")
    sdata["he"] = Image2DModel.parse(np.repeat(np.repeat(np.asarray(sdata["he"]), 5, 1), 5, 2), dims=("c", "y", "x"))
    place(sdata, [[2.5, 0, 0], [0, 2.5, 0]])
    assert any("at exactly 1 µm/px" in message and "micrometres" in message for message in warnings_of(sdata))
    assert not any("micrometres" in message for message in warnings_of(sdata, mpp=1.0))
    assert any("micrometres" in message for message in warnings_of(sdata, mpp=0.5))


@pytest.mark.parametrize("value", [0, 255])
def test_an_image_that_is_blank_at_all_spots_is_refused(value):
    sdata = section()
    sdata["he"] = Image2DModel.parse(np.full((3, SIDE, SIDE), value, np.uint8), dims=("c", "y", "x"))
    (slide,) = resolve(sdata)
    with pytest.raises(ValueError, match="`image_key` 'he' is blank at all spots"):
        check_placement(sdata, slide)


def test_training_checks_the_placement_too(toy):
    set_transformation(toy["spots"], Translation([50000, 50000], axes=("x", "y")), "global")
    with pytest.raises(ValueError, match="30 of 30 spots lie outside"):
        hg.tl.train([toy], validation="random")


def test_probes_are_refused_as_genes(toy, tiny_model):
    toy["table"].var_names = [f"{name}|{i:07x}" for i, name in enumerate(toy["table"].var_names)]
    with pytest.raises(ValueError, match=r"probes, not genes.*scanpy\.get\.aggregate"):
        hg.tl.predict(toy, model=tiny_model)


@pytest.mark.parametrize("verb", [hg.tl.predict, hg.pp.tissue, hg.pp.grid])
def test_the_error_for_an_anndata_names_the_conversion(toy, verb):
    with pytest.raises(TypeError, match=r"`sdata` is an AnnData.*from_legacy_anndata\(adata\).*then call again"):
        verb(toy["table"])
