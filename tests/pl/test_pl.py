import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import spatialdata as sd
from matplotlib.collections import EllipseCollection, PatchCollection, PathCollection, PolyCollection

import he2gene_sc as hg


@pytest.fixture
def predicted(toy, tiny_model):
    """Return a toy slide on which predicted ERBB2 rises from the first to the last spot, and classes alternate."""
    hg.tl.predict(toy, model=tiny_model)
    table = toy["table"]
    classes, colours = tiny_model.card.classes[:2], tiny_model.card.class_colors[:2]
    table.obs["he2gene_annotation"] = pd.Categorical.from_codes(np.arange(table.n_obs) % 2, categories=classes)
    table.uns["he2gene_annotation_colors"] = list(colours)
    table.layers["he2gene"][:, table.var_names.get_loc("ERBB2")] = np.linspace(1, 3, table.n_obs)
    return toy


@pytest.fixture
def without_measured(toy, tiny_model):
    del toy.tables["table"]
    hg.tl.predict(toy, model=tiny_model, mpp=2.0)
    return toy


def _spots(ax):
    (spots,) = [c for c in ax.collections if isinstance(c, EllipseCollection | PolyCollection)]
    return spots


def _scale_bars(ax):
    return [artist for artist in ax.get_children() if type(artist).__name__ == "ScaleBar"]


def _colour_limits(ax):
    """Return the limits of the colour bar of ``ax``."""
    norm = _norms(ax.figure)[ax]
    return norm.vmin, norm.vmax


def _norms(figure):
    return {panel: bar._colorbar.norm for panel in figure.axes for bar in panel.child_axes}


def _legend(ax):
    """Return the legend entries of classes with spots in the panel."""
    return [text for text in _whole_legend(ax) if not text.endswith(" (absent)")]


def _whole_legend(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


# ----------------------------------------------------------------------------------------------- spatial


def test_spatial_draws_the_measured_beside_the_predicted(predicted):
    axes = hg.pl.spatial(predicted, ["ERBB2", "COL1A1"])
    assert [ax.get_title().split(" (")[0] for ax in axes] == [
        "ERBB2 predicted",
        "ERBB2 measured",
        "COL1A1 predicted",
        "COL1A1 measured",
    ]


@pytest.mark.parametrize("column", ["he2gene_predicted", "he2gene_reliable"])
def test_spatial_refuses_genes_with_unknown_flags_as_get_does(predicted, column):
    # An outer concatenation of tables with different genes leaves missing values.
    var = predicted["table"].var
    var[column] = var[column].astype(object).where(var.index != "ERBB2", np.nan)
    for draw in (lambda: hg.pl.spatial(predicted, "ERBB2"), lambda: hg.get.genes(predicted, reliable=True)):
        with pytest.raises(ValueError, match=rf"var\['{column}'\] is neither True nor False for 1 genes"):
            draw()
    assert hg.pl.spatial(predicted, color="confidence").get_title() == "confidence"


def test_spatial_returns_a_single_axes_for_a_single_panel(predicted):
    assert isinstance(hg.pl.spatial(predicted, "ERBB2", measured=False), plt.Axes)


def test_spatial_draws_every_spot_over_the_tissue(predicted):
    ax = hg.pl.spatial(predicted, "ERBB2", measured=False)
    assert len(_spots(ax).get_offsets()) == predicted["table"].n_obs
    assert len(ax.images) == 1


def test_spatial_without_image_draws_no_tissue(predicted):
    assert not hg.pl.spatial(predicted, "ERBB2", measured=False, image=False).images


def test_spatial_draws_the_predicted_values_in_the_colours_of_the_bar(predicted):
    # On a shared scale, which differs from the scale of the predictions alone.
    ax, _ = hg.pl.spatial(predicted, "ERBB2", shared_scale=True)
    values = np.asarray(predicted["table"][:, "ERBB2"].layers["he2gene"]).ravel()
    low, high = _colour_limits(ax)
    wanted = plt.get_cmap("viridis")((values - low) / (high - low))
    np.testing.assert_allclose(_spots(ax).get_facecolor()[:, :3], wanted[:, :3], atol=2 / 255)


def test_spatial_panels_have_separate_colour_limits(predicted):
    left, right = hg.pl.spatial(predicted, "ERBB2")
    values = np.asarray(predicted["table"][:, "ERBB2"].layers["he2gene"])
    assert _colour_limits(left) == pytest.approx((values.min(), values.max()))
    assert _colour_limits(left) != _colour_limits(right)


def test_spatial_shares_colour_limits_on_request(predicted):
    left, right = hg.pl.spatial(predicted, "ERBB2", shared_scale=True)
    assert _colour_limits(left) == _colour_limits(right)


def test_spatial_shows_counts_in_the_unit_of_the_prediction(predicted):
    _, right = hg.pl.spatial(predicted, "ERBB2")
    counts = predicted["table"].X.toarray()
    logged = np.log1p(1e4 * counts / counts.sum(1, keepdims=True))[:, predicted["table"].var_names.get_loc("ERBB2")]
    assert _colour_limits(right) == pytest.approx((logged.min(), logged.max()))


def test_spatial_colour_bar_names_the_unit(predicted):
    ax = hg.pl.spatial(predicted, "ERBB2", measured=False)
    (bar,) = ax.child_axes
    assert bar.get_ylabel() == "ln(1 + counts per 10,000)"


def test_spatial_has_a_scale_bar_in_micrometres(predicted):
    (bar,) = _scale_bars(hg.pl.spatial(predicted, "ERBB2", measured=False))
    assert (bar.dx, bar.units) == (pytest.approx(2.0), "um")


def test_spatial_scale_bar_follows_the_coordinate_system(predicted):
    from spatialdata.transformations import Scale, set_transformation

    for element in (predicted["he"], predicted["spots"]):
        set_transformation(element, Scale([2.0, 2.0], axes=("x", "y")), "micrometers")
    ax = hg.pl.spatial(predicted, "ERBB2", measured=False, coordinate_system="micrometers")
    assert _scale_bars(ax)[0].dx == pytest.approx(1.0)


def test_spatial_title_states_that_a_gene_is_not_reliable(predicted):
    unreliable = hg.get.genes(predicted, reliable=False)[0]
    left, right = hg.pl.spatial(predicted, unreliable)
    assert left.get_title() == f"{unreliable} predicted (not reliable)"
    assert "reliable" not in right.get_title()


def test_spatial_title_of_a_reliable_gene_has_no_mark(predicted):
    reliable = hg.get.genes(predicted, reliable=True)[0]
    assert hg.pl.spatial(predicted, reliable, measured=False).get_title() == f"{reliable} predicted"


@pytest.mark.parametrize(("record", "title"), [({"verb": "adapt"}, "adapted"), ({}, "he2gene_adapted")])
def test_spatial_titles_name_another_layer(predicted, record, title):
    table = predicted["table"]
    table.layers["he2gene_adapted"] = table.layers["he2gene"] + 1
    table.uns["he2gene_adapted"] = record
    reliable = hg.get.genes(predicted, reliable=True)[0]
    ax = hg.pl.spatial(predicted, reliable, measured=False, layer="he2gene_adapted")
    assert ax.get_title() == f"{reliable} {title}"
    assert hg.pl.spatial(predicted, reliable, measured=False, layer="he2gene").get_title() == f"{reliable} predicted"


def test_spatial_draws_into_given_axes(predicted):
    figure, axes = plt.subplots(1, 2)
    drawn = hg.pl.spatial(predicted, "ERBB2", ax=axes)
    assert list(drawn) == list(axes)
    assert plt.get_fignums() == [figure.number]


def test_spatial_raises_for_a_wrong_number_of_axes(predicted):
    _, ax = plt.subplots()
    with pytest.raises(ValueError, match=r"`ax` holds 1 axes, 2 are needed"):
        hg.pl.spatial(predicted, "ERBB2", ax=ax)


def test_spatial_saves_a_file(predicted, tmp_path):
    hg.pl.spatial(predicted, "ERBB2", measured=False, save=tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("gene", ["NO_SUCH_GENE", "FTL"])
def test_spatial_raises_for_a_gene_that_was_not_predicted(predicted, gene):
    with pytest.raises(ValueError, match=f"`genes` .*{gene}.* not predicted"):
        hg.pl.spatial(predicted, gene)


def test_spatial_raises_for_an_empty_list(predicted):
    with pytest.raises(ValueError, match="`genes` is empty"):
        hg.pl.spatial(predicted, [])


def test_spatial_raises_without_a_prediction(toy):
    with pytest.raises(ValueError, match="run hg.tl.predict first"):
        hg.pl.spatial(toy, "ERBB2")


def test_spatial_raises_for_the_layer_of_another_prediction(toy, tiny_model):
    for key in ("he2gene", "second"):
        hg.tl.predict(toy, model=tiny_model, key_added=key)
    with pytest.raises(ValueError, match="`layer` 'second' belongs to prediction 'second', not to 'he2gene'"):
        hg.pl.spatial(toy, "ERBB2", layer="second")


def test_dates_are_labels(predicted):
    predicted["table"].obs["day"] = pd.to_datetime(["2020-01-01", "2020-01-02"] * (predicted["table"].n_obs // 2))
    hg.pl.spatial(predicted, color="day", show=False)


def test_spatial_raises_for_a_missing_measured_layer(predicted):
    with pytest.raises(ValueError, match=r"`measured` 'raw' is not a layer, valid: \['he2gene'\]"):
        hg.pl.spatial(predicted, "ERBB2", measured="raw")


def test_spatial_draws_nothing_measured_for_a_table_of_predictions(without_measured):
    assert hg.pl.spatial(without_measured, "ERBB2").get_title().startswith("ERBB2 predicted")


def test_spatial_raises_for_measured_values_of_a_table_of_predictions(without_measured):
    with pytest.raises(ValueError, match="has only predictions"):
        hg.pl.spatial(without_measured, "ERBB2", measured=True)


def test_spatial_finds_a_gene_in_the_table_of_all_genes(toy, tiny_model):
    hg.tl.predict(toy, model=tiny_model)
    hg.tl.predict(toy, model=tiny_model, genes="all")
    assert hg.pl.spatial(toy, "NOT1").get_title().startswith("NOT1 predicted")


def test_spatial_does_not_change_the_object(predicted):
    before = (sorted(predicted.tables), list(predicted["table"].obs), sorted(predicted.images))
    hg.pl.spatial(predicted, "ERBB2")
    assert (sorted(predicted.tables), list(predicted["table"].obs), sorted(predicted.images)) == before


def test_spatial_draws_an_object_that_was_saved_and_read(predicted, tmp_path):
    hg.io.save(predicted, tmp_path / "toy.zarr")
    axes = hg.pl.spatial(sd.read_zarr(tmp_path / "toy.zarr"), "ERBB2")
    assert len(axes) == 2


def test_spatial_draws_when_a_spot_lies_outside_the_image(toy, tiny_model):
    _move_first_spot_outside(toy)
    with pytest.warns(UserWarning, match="1 of 30 spots"):
        hg.tl.predict(toy, model=tiny_model)
    ax = hg.pl.spatial(toy, "ERBB2", measured=False)
    assert np.isfinite(_colour_limits(ax)).all()


# -------------------------------------------------------------------------------------------- annotation


def test_annotation_draws_one_panel(predicted):
    ax = hg.pl.annotation(predicted)
    assert ax.get_title() == "predicted annotation"
    assert len(_scale_bars(ax)) == 1


def test_annotation_legend_names_the_classes_that_occur(predicted):
    present = predicted["table"].obs["he2gene_annotation"].unique()
    assert sorted(_legend(hg.pl.annotation(predicted))) == sorted(present)


def test_annotation_spots_have_the_colours_of_the_model(predicted):
    obs, colours = predicted["table"].obs, predicted["table"].uns["he2gene_annotation_colors"]
    wanted = plt.matplotlib.colors.to_rgba_array([colours[code] for code in obs["he2gene_annotation"].cat.codes])
    drawn = _spots(hg.pl.annotation(predicted)).get_facecolor()
    np.testing.assert_allclose(drawn[:, :3], wanted[:, :3], atol=1 / 255)


def test_annotation_draws_a_reference_beside(predicted):
    left, right = hg.pl.annotation(predicted, reference="pathologist")
    assert right.get_title() == "pathologist"
    assert set(_legend(right)) == set(predicted["table"].obs["pathologist"].unique())
    assert left.figure is right.figure


def test_annotation_gives_a_shared_class_the_same_colour_in_both_panels(predicted):
    obs = predicted["table"].obs
    obs["again"] = obs["he2gene_annotation"]
    left, right = hg.pl.annotation(predicted, reference="again")
    np.testing.assert_array_equal(_spots(left).get_facecolor(), _spots(right).get_facecolor())


@pytest.mark.parametrize("reference", ["no_such_column", "empty"])
def test_annotation_raises_for_a_reference_without_labels(predicted, reference):
    predicted["table"].obs["empty"] = pd.Categorical([np.nan] * predicted["table"].n_obs)
    with pytest.raises(ValueError, match=f"`reference` '{reference}' is not a column of obs with labels.*pathologist"):
        hg.pl.annotation(predicted, reference=reference)


def test_annotation_raises_for_one_axes_for_two_panels(predicted):
    _, ax = plt.subplots()
    with pytest.raises(ValueError, match=r"`ax` holds 1 axes, 2 are needed"):
        hg.pl.annotation(predicted, reference="pathologist", ax=ax)


def test_annotation_saves_a_file(predicted, tmp_path):
    hg.pl.annotation(predicted, save=tmp_path / "figure.pdf")
    assert (tmp_path / "figure.pdf").read_bytes().startswith(b"%PDF")


def test_annotation_does_not_colour_a_spot_without_annotation(toy, tiny_model):
    _move_first_spot_outside(toy)
    with pytest.warns(UserWarning, match="1 of 30 spots"):
        hg.tl.predict(toy, model=tiny_model)
    ax = hg.pl.annotation(toy)
    classes = set(toy["table"].obs["he2gene_annotation"].dropna())
    assert _legend(ax) == [*sorted(classes), "unknown"]
    assert _legend(hg.pl.spatial(toy, "ERBB2", measured=False)) == ["unknown"]


@pytest.fixture
def with_glass(predicted):
    """Return a slide with three spots on glass, without a class as predict leaves them, and one unknown spot."""
    obs = predicted["table"].obs
    obs.iloc[:3, obs.columns.get_loc("he2gene_tissue")] = 0.2
    obs.iloc[:4, obs.columns.get_loc("he2gene_annotation")] = np.nan
    obs.iloc[:4, obs.columns.get_loc("he2gene_annotation_confidence")] = np.nan
    return predicted


def test_a_prediction_on_glass_is_grey_and_does_not_stretch_the_colours(with_glass):
    table = with_glass["table"]
    predicted, measured = hg.pl.spatial(with_glass, "ERBB2")
    grey = plt.matplotlib.colors.to_rgb("#c4c4c4")
    drawn = _spots(predicted).get_facecolor()[:, :3]
    np.testing.assert_array_equal(np.isclose(drawn, grey, atol=1 / 255).all(1), np.arange(table.n_obs) < 3)
    assert _colour_limits(predicted)[0] == pytest.approx(np.linspace(1, 3, table.n_obs)[3], rel=1e-5)
    assert _legend(predicted) == ["no tissue"]
    assert not np.isclose(_spots(measured).get_facecolor()[:, :3], grey, atol=1 / 255).all(1).any()
    assert np.isfinite(table.layers["he2gene"][:3, table.var_names.get_loc("ERBB2")]).all()


def test_annotation_tells_glass_from_what_is_unknown(with_glass):
    ax = hg.pl.annotation(with_glass)
    classes = with_glass["table"].obs["he2gene_annotation"].cat.categories
    assert _legend(ax) == [*sorted(classes), "no tissue", "unknown"]
    wanted = plt.matplotlib.colors.to_rgba_array(["#c4c4c4"] * 3 + ["#8c8c8c"])[:, :3]
    np.testing.assert_allclose(_spots(ax).get_facecolor()[:4, :3], wanted, atol=1 / 255)


def test_the_confidence_of_a_missing_annotation_is_grey(with_glass):
    ax = hg.pl.spatial(with_glass, "confidence")
    grey = plt.matplotlib.colors.to_rgb("#c4c4c4")
    drawn = np.isclose(_spots(ax).get_facecolor()[:, :3], grey, atol=1 / 255).all(1)
    np.testing.assert_array_equal(drawn, np.arange(len(drawn)) < 4)
    assert _legend(ax) == ["no tissue or unknown"]


def test_a_slide_that_is_all_glass_is_drawn(predicted):
    predicted["table"].obs["he2gene_tissue"] = 0.0
    assert _legend(hg.pl.spatial(predicted, "ERBB2", measured=False)) == ["no tissue"]


def test_a_prediction_without_tissue_share_is_drawn_in_colour(predicted):
    del predicted["table"].obs["he2gene_tissue"]
    assert hg.pl.spatial(predicted, "ERBB2", measured=False).get_legend() is None


def _move_first_spot_outside(sdata):
    from shapely import Point

    sdata["spots"].loc[sdata["spots"].index[0], "geometry"] = Point(-500.0, -500.0)


# ------------------------------------------------------------------------------------------- neighbours


def test_spatialdata_plot_draws_results_of_predict(predicted):
    import spatialdata_plot  # noqa: F401 - registers sdata.pl

    _, axes = plt.subplots(1, 2)
    for ax, options in zip(
        axes, ({"color": "ERBB2", "table_layer": "he2gene"}, {"color": "he2gene_annotation"}), strict=True
    ):
        predicted.pl.render_shapes("spots", table_name="table", **options).pl.show(
            coordinate_systems="global", ax=ax, show=False
        )
        # Patches up to spatialdata-plot 0.4.2, paths in later versions; an empty scatter is a legend entry.
        found = [c for c in ax.collections if isinstance(c, PatchCollection | PathCollection)]
        (spots,) = [c for c in found if len(c.get_offsets()) != 0]
        assert len(spots.get_paths()) == predicted["table"].n_obs


def test_spatial_draws_dense_counts_as_sparse_ones(predicted):
    sparse = hg.pl.spatial(predicted, "ERBB2")
    expected = _spots(sparse[1]).get_facecolor()
    predicted["table"].X = predicted["table"].X.toarray()
    dense = hg.pl.spatial(predicted, "ERBB2")
    np.testing.assert_allclose(_spots(dense[1]).get_facecolor(), expected)


def test_annotation_raises_for_a_numeric_reference(predicted):
    with pytest.raises(ValueError, match="`reference` 'texture' is not a column of obs with labels"):
        hg.pl.annotation(predicted, reference="texture")


def test_a_slide_on_which_every_spot_is_unknown_is_drawn(toy, tiny_model):
    hg.tl.predict(toy, model=tiny_model)
    toy["table"].obs["he2gene_annotation"] = pd.Categorical([None] * 30, categories=["invasive cancer"])
    ax = hg.pl.annotation(toy)
    assert _whole_legend(ax) == [*(f"{name} (absent)" for name in tiny_model.card.classes), "unknown"]


# ------------------------------------------------------------------------------------------------ tissue


@pytest.fixture
def masked(toy):
    """Return a toy slide with tissue in the left half, and two spots of 100 µm on it."""
    from spatialdata.models import Labels2DModel, ShapesModel
    from spatialdata.transformations import Scale

    width, height = (int(toy.images["he"].sizes[axis]) for axis in "xy")
    mask = np.zeros((height // 4, width // 4), np.uint16)
    mask[:, : mask.shape[1] // 2] = 2
    scale = Scale([width / mask.shape[1], height / mask.shape[0]], axes=("x", "y"))
    toy.labels["he_tissue"] = Labels2DModel.parse(mask, dims=("y", "x"), transformations={"global": scale})
    xy = np.array([[0.1 * width, 0.4 * height], [0.3 * width, 0.4 * height]])
    toy.shapes["grid"] = ShapesModel.parse(xy, geometry=0, radius=25.0)
    return toy


def test_tissue_draws_mask_and_spots_over_the_image(masked):
    ax = hg.pl.tissue(masked, shapes_key="grid")
    assert ax.get_title() == "tissue: 50 % of the image, 2 spots"
    assert len(ax.images) >= 2
    assert {len(c.get_offsets()) for c in ax.collections if isinstance(c, EllipseCollection)} == {2}
    assert len(_scale_bars(ax)) == 1
    mask = ax.images[1].get_array()
    drawn = np.asarray(mask[..., 3]) > 0
    middle, end = drawn.shape[1] // 2, drawn.shape[1]
    assert drawn[:, : middle - 4].all()
    assert not drawn[:, middle + 4 : end].any()


def test_tissue_without_spots_draws_the_mask(masked, tmp_path):
    for key in list(masked.shapes):
        del masked.shapes[key]
    _, ax = plt.subplots()
    assert hg.pl.tissue(masked, ax=ax, save=tmp_path / "mask.png") is ax
    assert ax.get_title() == "tissue: 50 % of the image"
    assert (tmp_path / "mask.png").stat().st_size


def test_tissue_names_what_is_missing_or_ambiguous(masked):
    with pytest.raises(ValueError, match=r"`shapes_key` is ambiguous, candidates: \['grid', 'spots'\]"):
        hg.pl.tissue(masked)
    with pytest.raises(ValueError, match=r"`coordinate_system` is 'other'; valid.*'global'"):
        hg.pl.tissue(masked, shapes_key="grid", coordinate_system="other")
    with pytest.raises(ValueError, match=r"`shapes_key` 'he_tissue' is a labels element"):
        hg.pl.tissue(masked, shapes_key="he_tissue")
    del masked.labels["he_tissue"]
    with pytest.raises(ValueError, match=r"`tissue_key` 'he_tissue' not found.*run hg\.pp\.tissue first"):
        hg.pl.tissue(masked, shapes_key="grid")
