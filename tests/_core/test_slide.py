"""`resolve` finds image, spots, table, coordinate system and µm per pixel, or raises with the missing part."""

import warnings

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import spatialdata as sd
from hypothesis import given, settings
from hypothesis import strategies as st
from spatialdata.models import Image2DModel, ShapesModel, TableModel
from spatialdata.transformations import Affine, Identity, Scale, Translation, set_transformation

import he2gene_sc as hg
from he2gene_sc._core.hints import mpp_hint, use_mpp_hint
from he2gene_sc._core.mpp import stored_mpp
from he2gene_sc._core.slide import mean_colours, resolve, slides_of
from tests.helpers.objects import two_regions


def square(n=6, pitch=100.0):
    x, y = np.meshgrid(np.arange(1, n + 1), np.arange(1, n + 1))
    return np.column_stack([x.ravel(), y.ravel()]) * pitch


def hexagonal(n=8, pitch=60.0):
    row, column = np.divmod(np.arange(n * n), n)
    return np.column_stack([(column + 1 + row % 2 / 2) * pitch, (row + 1) * pitch * np.sqrt(3) / 2])


def image(size=800, systems=None):
    pixels = np.full((3, size, size), 200, np.uint8)
    return Image2DModel.parse(pixels, dims=("c", "y", "x"), transformations=systems or {"global": Identity()})


def circles(centres, radius, systems=None):
    index = pd.Index([f"s{i}" for i in range(len(centres))])
    return ShapesModel.parse(
        centres, geometry=0, radius=radius, index=index, transformations=systems or {"global": Identity()}
    )


def table_of(shapes, region="spots"):
    obs = pd.DataFrame(
        {"region": pd.Categorical([region] * len(shapes)), "instance_id": shapes.index.to_numpy()},
        index=shapes.index,
    )
    table = ad.AnnData(np.ones((len(shapes), 3), np.float32), obs=obs)
    return TableModel.parse(table, region=region, region_key="region", instance_key="instance_id")


def slide_of(centres, radius, **systems):
    shapes = circles(centres, radius, systems or None)
    return sd.SpatialData(
        images={"he": image(systems=systems or None)}, shapes={"spots": shapes}, tables={"table": table_of(shapes)}
    )


def test_mpp_argument_wins_over_metadata(toy):
    with pytest.warns(UserWarning, match="legacy ST"):
        (slide,) = resolve(toy, mpp=1.5)
    assert (slide.mpp, slide.mpp_source) == (1.5, "argument")


def test_mpp_of_metadata_wins_over_micrometre_system_and_pitch():
    sdata = slide_of(square(), 25.0, micrometer=Scale([2.1, 2.1], axes=("x", "y")))
    sdata.attrs["he2gene"] = {"mpp": {"he": 2.2}}
    (slide,) = resolve(sdata)
    assert (slide.mpp, slide.mpp_source) == (2.2, "metadata")


@pytest.mark.parametrize("name", ["micrometer", "microns", "um", "µm"])
def test_mpp_of_micrometre_system_wins_over_pitch(name):
    sdata = slide_of(square(), 25.0, **{name: Scale([2.1, 2.1], axes=("x", "y"))})
    (slide,) = resolve(sdata)
    assert slide.mpp == pytest.approx(2.1)
    assert name in slide.mpp_source


def test_st_pitch_is_200_um():
    (slide,) = resolve(slide_of(square(pitch=100.0), 25.0))
    assert slide.mpp == pytest.approx(2.0)
    assert "legacy ST" in slide.mpp_source
    assert slide.diameter_um == pytest.approx(100.0)


@pytest.mark.parametrize("diameter_um", [55.0, 65.0])
def test_visium_pitch_is_100_um_for_any_radius(diameter_um):
    (slide,) = resolve(slide_of(hexagonal(pitch=60.0), 60.0 * diameter_um / 200))
    assert slide.mpp == pytest.approx(100 / 60)
    assert "Visium" in slide.mpp_source


@settings(max_examples=15, deadline=None, derandomize=True)
@given(angle=st.floats(0, 2 * np.pi), pitch=st.floats(40, 90), keep=st.integers(135, 144), seed=st.integers(0, 99))
def test_visium_pitch_survives_rotation_and_missing_spots(angle, pitch, keep, seed):
    centres = hexagonal(n=12, pitch=pitch)
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    centres = (centres - centres.mean(0)) @ rotation.T + 400
    kept = np.random.default_rng(seed).permutation(144)[:keep]
    (slide,) = resolve(slide_of(centres[kept], pitch * 0.275))
    assert slide.mpp == pytest.approx(100 / pitch, rel=1e-6)


def test_mpp_that_disagrees_with_the_spots_warns_with_the_other_value(toy):
    toy.attrs["he2gene"]["mpp"]["he"] = 0.5
    with pytest.warns(UserWarning, match=r"pass mpp=2"):
        (slide,) = resolve(toy)
    assert slide.mpp == 0.5


def test_mpp_that_agrees_does_not_warn(toy):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        resolve(toy)


def test_mpp_unknown_is_an_error():
    centres = np.random.default_rng(0).uniform(100, 700, (40, 2))
    with pytest.raises(ValueError, match=r"`mpp` of image 'he' is unknown"):
        resolve(slide_of(centres, 25.0))


@pytest.mark.parametrize("mpp", [0, -1, np.nan, np.inf, "0.5", "abc"])
def test_mpp_that_is_not_a_positive_number_is_refused(toy, mpp):
    with pytest.raises(ValueError, match="`mpp`"):
        resolve(toy, mpp=mpp)


def test_metadata_mpp_that_is_not_a_positive_number_is_refused(toy):
    toy.attrs["he2gene"]["mpp"]["he"] = 0
    with pytest.raises(ValueError, match=r"\['mpp'\].*positive"):
        resolve(toy)


def test_several_images_are_ambiguous_and_listed(toy):
    toy["other"] = toy["he"].copy()
    with pytest.raises(ValueError, match=r"`image_key` is ambiguous, candidates: \['he', 'other'\]"):
        resolve(toy)
    assert resolve(toy, image_key="he")[0].image_key == "he"


def test_an_image_in_another_system_is_not_a_candidate(toy):
    toy["other"] = image(systems={"elsewhere": Identity()})
    assert resolve(toy)[0].image_key == "he"


def test_coordinate_system_chooses_the_image(toy):
    set_transformation(toy["spots"], Identity(), "b")
    toy["other"] = image(systems={"b": Identity()})
    assert resolve(toy, coordinate_system="b", mpp=2.0)[0].image_key == "other"


def test_images_that_share_no_system_with_the_spots_are_an_error(toy):
    set_transformation(toy["he"], {"elsewhere": Identity()}, set_all=True)
    with pytest.raises(ValueError, match=r"`coordinate_system`.*share no coordinate system"):
        resolve(toy)


def test_several_circles_without_table_are_ambiguous_and_listed(toy):
    del toy.tables["table"]
    toy["more"] = toy["spots"].copy()
    with pytest.raises(ValueError, match=r"`shapes_key` is ambiguous, candidates: \['more', 'spots'\]"):
        resolve(toy)
    assert resolve(toy, shapes_key="more")[0].shapes_key == "more"


def test_the_table_chooses_among_several_circles(toy):
    toy["more"] = toy["spots"].copy()
    assert resolve(toy)[0].shapes_key == "spots"


def test_several_tables_are_ambiguous_and_listed(toy):
    toy["again"] = toy["table"].copy()
    with pytest.raises(ValueError, match=r"`table_key` is ambiguous, candidates: \['again', 'table'\]"):
        resolve(toy)
    assert resolve(toy, table_key="again")[0].table_key == "again"


def test_a_table_that_annotates_nothing_is_not_a_candidate(toy):
    toy["free"] = ad.AnnData(np.ones((2, 2)))
    assert resolve(toy)[0].table_key == "table"
    with pytest.raises(ValueError, match=r"`table_key` 'free' does not annotate shapes"):
        resolve(toy, table_key="free")


@pytest.mark.parametrize("parameter", ["image_key", "shapes_key", "table_key", "coordinate_system"])
def test_an_unknown_name_is_an_error_that_lists_valid_names(toy, parameter):
    valid = {"image_key": "he", "shapes_key": "spots", "table_key": "table", "coordinate_system": "global"}[parameter]
    with pytest.raises(ValueError, match=rf"`{parameter}` 'nope'.*{valid}"):
        resolve(toy, **{parameter: "nope"})


def test_table_and_shapes_that_do_not_belong_together_are_an_error(toy):
    toy["more"] = toy["spots"].copy()
    with pytest.raises(ValueError, match=r"`table_key` 'table' annotates \['spots'\], not `shapes_key` 'more'"):
        resolve(toy, table_key="table", shapes_key="more")


def test_systems_that_agree_are_not_ambiguous(toy):
    before = resolve(toy)[0].centres
    for element in ("he", "spots"):
        set_transformation(toy[element], Scale([3.0, 3.0], axes=("x", "y")), "scaled")
        set_transformation(toy[element], Translation([7.0, 9.0], axes=("x", "y")), "aaa")
    (slide,) = resolve(toy)
    assert slide.coordinate_system == "global"
    np.testing.assert_allclose(slide.centres, before, atol=1e-9)


def test_systems_that_disagree_are_ambiguous_and_listed(toy):
    set_transformation(toy["he"], Identity(), "other")
    set_transformation(toy["spots"], Translation([40.0, 0.0], axes=("x", "y")), "other")
    with pytest.raises(ValueError, match=r"`coordinate_system` is ambiguous.*\['global', 'other'\]"):
        resolve(toy)
    moved = resolve(toy, coordinate_system="other")[0].centres - resolve(toy, coordinate_system="global")[0].centres
    np.testing.assert_allclose(moved, [[40.0, 0.0]] * 30, atol=1e-9)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(a=st.floats(0.3, 3), b=st.floats(-0.2, 0.2), c=st.floats(-0.2, 0.2), d=st.floats(0.3, 3), t=st.floats(-500, 500))
def test_a_transformation_that_both_elements_share_moves_no_spot(a, b, c, d, t):
    centres = square()
    both = Affine([[a, b, t], [c, d, -t], [0, 0, 1]], input_axes=("x", "y"), output_axes=("x", "y"))
    (slide,) = resolve(slide_of(centres, 25.0, here=both))
    np.testing.assert_allclose(slide.centres, centres, atol=1e-6)
    assert slide.diameter_um == pytest.approx(100.0)


def test_spots_in_other_units_than_pixels_land_on_their_pixels():
    centres = square()
    shapes = circles(centres / 4, 25.0 / 4, {"global": Scale([4.0, 4.0], axes=("x", "y"))})
    (slide,) = resolve(sd.SpatialData(images={"he": image()}, shapes={"spots": shapes}))
    np.testing.assert_allclose(slide.centres, centres)
    assert slide.mpp == pytest.approx(2.0)


@pytest.mark.parametrize("matrix", [[[1, 0, 0], [0, 2, 0]], [[1, 0.5, 0], [0, 1, 0]]], ids=["two scales", "shear"])
def test_anisotropic_transformations_are_warned_of(toy, matrix):
    set_transformation(toy["he"], Affine([*matrix, [0, 0, 1]], input_axes=("x", "y"), output_axes=("x", "y")), "global")
    with pytest.warns(
        UserWarning, match="anisotropic or sheared: they scale lengths by .* in one direction and by .* in the other"
    ):
        resolve(toy)


def test_singular_transformation_is_refused(toy):
    flat = Affine([[1, 0, 0], [0, 0, 0], [0, 0, 1]], input_axes=("x", "y"), output_axes=("x", "y"))
    set_transformation(toy["he"], flat, "global")
    with pytest.raises(ValueError, match="singular"):
        resolve(toy)


def test_polygons_serve_as_spots_when_named(toy):
    toy["bins"] = sd.models.ShapesModel.parse(toy["spots"].drop(columns="radius").set_geometry(toy["spots"].buffer(25)))
    del toy.tables["table"]
    (slide,) = resolve(toy, shapes_key="bins")
    np.testing.assert_allclose(slide.centres, resolve(toy, shapes_key="spots")[0].centres, atol=1e-6)


def test_spots_come_in_the_order_of_the_table(toy):
    order = np.random.default_rng(0).permutation(30)
    toy.tables["table"] = toy["table"][order].copy()
    (slide,) = resolve(toy)
    np.testing.assert_array_equal(slide.centres, toy["table"].obsm["spatial"])
    assert list(slide.spot_ids) == list(toy["table"].obs["instance_id"])
    np.testing.assert_array_equal(slide.rows, np.arange(30))


def test_multiscale_levels_keep_their_exact_scale_at_odd_sizes():
    pixels = np.zeros((3, 1001, 999), np.uint8)
    element = Image2DModel.parse(pixels, dims=("c", "y", "x"), scale_factors=[2, 2])
    shapes = circles(square(), 25.0)
    (slide,) = resolve(sd.SpatialData(images={"he": element}, shapes={"spots": shapes}))
    assert [level.scale for level in slide.pyramid.levels] == [1.0, 2, 4]


def test_image_key_may_map_regions_to_images(toy):
    toy["other"] = toy["he"].copy()
    assert resolve(toy, image_key={"spots": "other"}, mpp=2.0)[0].image_key == "other"
    with pytest.raises(ValueError, match=r"`image_key` names no image for shapes 'spots'"):
        resolve(toy, image_key={"elsewhere": "other"})


# Several images of one slide


def pictures(**scales):
    """Make images of one texture at several scales over the same spots, in the systems of the spots."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(60, 240, (3, 40, 40)).astype(np.uint8)
    centres = square(pitch=100.0)
    images, systems = {}, {}
    for name, factor in scales.items():
        side = round(20 * factor)
        pixels = np.repeat(np.repeat(coarse, side, 1), side, 2)
        images[name] = Image2DModel.parse(pixels, dims=("c", "y", "x"), transformations={name: Identity()})
        systems[name] = Scale([factor, factor], axes=("x", "y"))
    return sd.SpatialData(images=images, shapes={"spots": circles(centres, 25.0, systems)})


def test_the_finest_of_several_images_of_a_slide_is_used_and_logged(caplog):
    sdata = pictures(lowres=0.25, full=1.0, hires=0.5)
    with caplog.at_level("INFO", logger="he2gene_sc"):
        (slide,) = resolve(sdata, mpp=2.0)
    assert slide.image_key == "full"
    assert "image 'full' is used, the finest of" in caplog.text
    assert resolve(sdata, image_key="hires", mpp=4.0)[0].image_key == "hires"


@pytest.mark.parametrize("value", [0, 255])
def test_a_blank_image_is_skipped_with_a_warning(value):
    sdata = pictures(lowres=0.25, full=1.0, hires=0.5)
    sdata["full"].data[:] = value
    with pytest.warns(UserWarning, match=r"images \['full'\] are blank and not used; image 'hires' is used"):
        (slide,) = resolve(sdata, mpp=4.0)
    assert slide.image_key == "hires"


def test_images_of_different_tissue_are_ambiguous():
    sdata = pictures(full=1.0, hires=0.5)
    other = np.random.default_rng(1).integers(60, 240, (3, 40, 40)).astype(np.uint8)
    sdata["hires"].data[:] = np.repeat(np.repeat(other, 10, 1), 10, 2)
    with pytest.raises(
        ValueError, match=r"`image_key` is ambiguous, candidates: \['full', 'hires'\]: they show different"
    ):
        resolve(sdata, mpp=2.0)


def test_a_coarser_image_is_used_if_the_finest_covers_few_spots():
    sdata = pictures(full=1.0, hires=0.5)
    sdata["full"] = Image2DModel.parse(
        np.asarray(sdata["full"])[:, :300, :300].copy(), dims=("c", "y", "x"), transformations={"full": Identity()}
    )
    assert resolve(sdata, mpp=4.0)[0].image_key == "hires"


def test_the_only_rgb_image_is_used():
    sdata = pictures(full=1.0)
    stain = np.random.default_rng(0).integers(0, 999, (1, 800, 800)).astype(np.uint16)
    sdata["focus"] = Image2DModel.parse(stain, dims=("c", "y", "x"), transformations={"full": Identity()})
    assert resolve(sdata, mpp=2.0)[0].image_key == "full"
    del sdata.images["full"]
    sdata["focus2"] = sdata["focus"].copy()
    with pytest.raises(ValueError, match=r"none of the images \['focus', 'focus2'\] is an RGB H&E image"):
        resolve(sdata, mpp=2.0)


def test_without_spots_the_finest_image_of_one_slide_is_found_too():
    from he2gene_sc._core.images import find_image

    sdata = pictures(full=1.0, hires=0.5)
    for name, factor in (("full", 1.0), ("hires", 2.0)):
        set_transformation(sdata[name], {"slide": Scale([factor, factor], axes=("x", "y"))}, set_all=True)
    assert find_image(sdata) == "full"


# Cells: polygons and labels


def test_polygons_without_a_table_are_spots_and_circles_come_first(toy):
    toy["cells"] = sd.models.ShapesModel.parse(
        toy["spots"].drop(columns="radius").set_geometry(toy["spots"].buffer(25))
    )
    del toy.tables["table"]
    assert resolve(toy, mpp=2.0)[0].shapes_key == "spots"
    del toy.shapes["spots"]
    assert resolve(toy, mpp=2.0)[0].shapes_key == "cells"
    toy["nuclei"] = toy["cells"].copy()
    with pytest.raises(ValueError, match=r"`shapes_key` is ambiguous, candidates: \['cells', 'nuclei'\]"):
        resolve(toy, mpp=2.0)


def cells(toy, **systems):
    """Make labels of 20 px at the spots of the toy slide, numbered from 1; return also their centres."""
    labels = np.zeros((600, 700), np.int32)
    centres = np.asarray(toy["table"].obsm["spatial"]).astype(int)
    for i, (x, y) in enumerate(centres):
        labels[y - 10 : y + 10, x - 10 : x + 10] = i + 1
    toy["cells"] = sd.models.Labels2DModel.parse(
        labels, dims=("y", "x"), transformations=systems or {"global": Identity()}
    )
    return centres


def test_labels_without_a_table_are_spots_at_their_centroids(toy):
    centres = cells(toy)
    del toy.tables["table"], toy.shapes["spots"]
    toy["he_tissue"] = toy["cells"].copy()
    (slide,) = resolve(toy, mpp=2.0)
    assert slide.shapes_key == "cells"
    np.testing.assert_allclose(slide.centres, centres)
    np.testing.assert_array_equal(slide.spot_ids, np.arange(30) + 1)
    assert slide.diameter_um == pytest.approx(40.0)


def of_cells(toy, kept=slice(None)):
    """Return the table of the toy slide annotating labels, with some rows in another order."""
    table = toy["table"]
    table.obs["instance_id"] = np.arange(30) + 1
    table.obs["region"] = pd.Categorical(["cells"] * 30)
    table = table[np.arange(30)[::-1][kept]].copy()
    toy.tables["table"] = TableModel.parse(
        table, region="cells", region_key="region", instance_key="instance_id", overwrite_metadata=True
    )
    del toy.shapes["spots"]


def test_a_table_may_annotate_labels_and_list_some_of_them(toy):
    centres = cells(toy)
    of_cells(toy, slice(3, None))
    (slide,) = resolve(toy)
    np.testing.assert_allclose(slide.centres, centres[::-1][3:])


def test_mpp_of_cells_is_computed_from_their_system_in_micrometres(toy):
    cells(toy, **{"global": Identity(), "microns": Scale([2.0, 2.0], axes=("x", "y"))})
    of_cells(toy)
    del toy.attrs["he2gene"]
    (slide,) = resolve(toy)
    assert slide.mpp == pytest.approx(2.0)
    assert "'microns' of the spots" in slide.mpp_source


def test_mpp_of_xenium_is_computed_from_its_shapes_in_micrometres(toy):
    centres = cells(toy)
    of_cells(toy)
    del toy.attrs["he2gene"]
    to_pixels = {"global": Scale([0.5, 0.5], axes=("x", "y"))}
    toy["cell_circles"] = ShapesModel.parse(centres * 2.0, geometry=0, radius=20.0, transformations=to_pixels)
    with pytest.raises(ValueError, match="`mpp` of image 'he' is unknown"):
        resolve(toy)
    toy.attrs["spatialdata_io_reader"] = "xenium"
    assert resolve(toy)[0].mpp == pytest.approx(2.0)
    set_transformation(toy["he"], Scale([2.0, 2.0], axes=("x", "y")), "global")
    assert resolve(toy)[0].mpp == pytest.approx(4.0)


def test_an_unknown_mpp_names_the_scale_of_the_alignment():
    sdata = slide_of(np.random.default_rng(0).uniform(20, 150, (40, 2)), 5.0, aligned=Identity())
    set_transformation(sdata["he"], Scale([0.2125, 0.2125], axes=("x", "y")), "aligned")
    with pytest.raises(ValueError, match=r"if coordinate system 'aligned' is in µm, pass mpp=0\.2125"):
        resolve(sdata)


def test_too_small_bins_and_too_coarse_images_are_refused_with_a_solution():
    with pytest.raises(ValueError, match=r"a spot is 4 px wide.*2 µm, smaller than a cell.*hg\.pp\.grid"):
        resolve(slide_of(square(), 2.0), mpp=0.5)
    with pytest.raises(ValueError, match=r"4 px wide.*too coarse at 15 µm/px.*7\.5 µm/px or finer"):
        resolve(slide_of(square(), 2.0), mpp=15.0)


def test_a_resolution_tag_off_by_ten_is_named():
    sdata = slide_of(square(), 25.0)
    sdata.attrs["he2gene"] = {"mpp": {"he": 0.2}}
    with pytest.warns(UserWarning, match=r"which gives 2, ten times off; if that is right, pass mpp=2; if the"):
        resolve(sdata)


def test_hints_on_mpp_name_the_argument_of_the_call():
    sdata = slide_of(np.random.default_rng(0).uniform(20, 150, (40, 2)), 5.0)
    unknown = "`mpp` of image 'he' is unknown: .*; "
    with pytest.raises(ValueError, match=unknown + r"pass mpp=\.\.\.$"):
        resolve(sdata)
    with pytest.raises(ValueError, match=unknown + r"pass keys=hg\.SectionKeys\(mpp=\.\.\.\) "):
        hg.tl.train([sdata])
    with pytest.raises(
        ValueError, match=unknown + r"state it: sdata\.attrs\.setdefault\('he2gene', \{\}\).*\['he'\] = \.\.\.$"
    ):
        slides_of(sdata, sdata["table"])
    # The outer caller is the one that the user called.
    with use_mpp_hint("give --mpp {mpp}"), use_mpp_hint("pass keys=hg.SectionKeys(mpp={mpp})"):
        assert mpp_hint("he", 0.5) == "give --mpp 0.5"
    assert mpp_hint("he", 0.5) == "pass mpp=0.5"


def test_mpp_of_few_visium_spots_is_computed_from_their_array_positions():
    row, column = np.divmod(np.arange(400), 20)
    centres = np.column_stack([20 + 36.0 * (column + 0.5 * (row % 2)), 20 + 36 * np.sqrt(0.75) * row])
    sdata = slide_of(centres[::29], 10.0)
    with pytest.raises(ValueError, match="`mpp` of image 'he' is unknown"):
        resolve(sdata)
    sdata["table"].obs["array_row"], sdata["table"].obs["array_col"] = row[::29], (2 * column + row % 2)[::29]
    (slide,) = resolve(sdata)
    assert slide.mpp == pytest.approx(100 / 36)
    assert "Visium" in slide.mpp_source


def test_slides_of_a_prediction_are_the_regions_that_were_predicted(toy):
    both, _ = two_regions(toy)
    record = {"image": "he", "coordinate_system": "global", "mpp": 2.0}
    for shapes in ("spots", ["spots"], np.array(["spots"], object)):
        both["table"].uns["he2gene"] = {"shapes": shapes, **record}
        assert [slide.shapes_key for slide in slides_of(both, both["table"])] == ["spots"]


def test_adjacent_bins_may_be_few_pixels_wide():
    assert resolve(slide_of(square(pitch=8.0), 4.0), mpp=2.0)[0].diameter_um == pytest.approx(16.0)
    assert resolve(slide_of(square(pitch=7.0), 3.5), mpp=1.1)[0].diameter_um == pytest.approx(7.7)


@pytest.mark.parametrize(
    ("pixels", "transformation", "message"),
    [
        (np.s_[:, 100:300, 50:300], Translation([50, 100], axes=("x", "y")), None),
        (np.s_[:, :300, :200], Identity(), None),
        (np.s_[:, ::2, ::2], Identity(), r"If it was resampled, 4 is right, .*\['mpp'\]\['he'\] = 4, or pass mpp=4"),
        (np.s_[:, ::2, ::2], Scale([2, 2], axes=("x", "y")), "replaced or resampled.*= 4, or pass mpp=4"),
        (
            np.s_[:, np.arange(800) // 2, :],
            Identity(),
            "stated as 2 for 700 × 600 pixels, but the image now has 700 × 800",
        ),
    ],
)
def test_stated_mpp_holds_for_the_image_or_a_crop_of_it(toy, pixels, transformation, message):
    image = toy["he"].to_numpy()[pixels]
    toy.images["he"] = Image2DModel.parse(image, dims=("c", "y", "x"), transformations={"global": transformation})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if message is None:
            assert stored_mpp(toy, "he") == (2.0, "metadata")
        else:
            with pytest.raises((ValueError, UserWarning), match=message):
                stored_mpp(toy, "he")
            toy.attrs["he2gene"]["mpp"]["he"] = 4.0
            assert stored_mpp(toy, "he") == (4.0, "metadata")


def test_a_verb_without_mpp_says_once_how_to_correct_that_of_a_replaced_image(toy):
    half = {"global": Scale([2, 2], axes=("x", "y"))}
    toy.images["he"] = Image2DModel.parse(toy["he"].to_numpy()[:, ::2, ::2], dims=("c", "y", "x"), transformations=half)
    with pytest.raises(ValueError, match=r"tissue, state it: sdata\.attrs\['he2gene'\]\['mpp'\]\['he'\] = 4$"):
        slides_of(toy, toy["table"])


def test_colours_are_of_the_image_that_a_layer_was_predicted_from(toy, tiny_model):
    toy["other"] = Image2DModel.parse(255 - np.asarray(toy["he"]), dims=("c", "y", "x"))
    hg.tl.predict(toy, model=tiny_model, image_key="he", mpp=2.0, key_added="first", layer="values")
    hg.tl.predict(toy, model=tiny_model, image_key="other", mpp=2.0, key_added="second")
    first, second = (mean_colours(toy, toy["table"], layer) for layer in ("values", "second"))
    assert first is not None
    assert second is not None
    np.testing.assert_allclose(first + second, 255, atol=1)
