"""Shared features of tissue plots: names, scales, colours, regions, slides, figures."""

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import EllipseCollection
from matplotlib.colors import to_rgba_array

import he2gene_sc as hg
from he2gene_sc.image import Level, Pyramid
from he2gene_sc.pl._canvas import read_region


@pytest.fixture(scope="module")
def slide(tiny_model):
    """Return a slide with predicted ERBB2 from 1 to 3, and alternating first two of three classes."""
    sdata = hg.datasets.toy((5, 6), mpp=2.0)
    hg.tl.predict(sdata, model=tiny_model)
    table = sdata["table"]
    classes, colours = tiny_model.card.classes[:2], tiny_model.card.class_colors[:2]
    table.obs["he2gene_annotation"] = pd.Categorical.from_codes(np.arange(table.n_obs) % 2, categories=classes)
    table.uns["he2gene_annotation_colors"] = list(colours)
    table.layers["he2gene"][:, table.var_names.get_loc("ERBB2")] = np.linspace(1, 3, table.n_obs)
    table.obs["score"] = np.arange(table.n_obs, dtype=float)
    return sdata


def limits(ax):
    (bar,) = ax.child_axes
    return bar._colorbar.norm.vmin, bar._colorbar.norm.vmax


def spots(ax):
    (found,) = [c for c in ax.collections if isinstance(c, EllipseCollection)]
    return found


def legend(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        ({"vmin": 0, "vmax": 5}, (0, 5)),
        ({"vmax": "p90"}, (1, 2.8)),
        ({"vmin": "p25", "vmax": "p75"}, (1.5, 2.5)),
        ({"vmin": [0.5]}, (0.5, 3)),
    ],
)
def test_ends_of_the_scale_are_numbers_or_percentiles(slide, ends, expected):
    assert limits(hg.pl.spatial(slide, "ERBB2", measured=False, **ends)) == pytest.approx(expected)


def test_a_list_of_ends_has_one_for_each_name(slide):
    axes = hg.pl.spatial(slide, ["ERBB2", "score"], vmax=[7, 8])
    assert [limits(ax)[1] for ax in axes] == [7, 7, 8]


def test_one_spot_in_a_hundred_does_not_stretch_the_scale(slide):
    table = ad.AnnData(obs=pd.DataFrame({"score": [*np.linspace(0, 1, 300), 1e6]}, index=[f"s{i}" for i in range(301)]))
    table.obsm["spatial"] = np.stack([np.arange(301) % 20, np.arange(301) // 20], 1) * 10.0
    assert limits(hg.pl.spatial(table, "score"))[1] <= 1


def test_columns_of_obs_and_of_the_prediction_are_drawn(slide):
    axes = hg.pl.spatial(slide, color=["score", "he2gene_annotation", "pathologist", "confidence"])
    assert [ax.get_title() for ax in axes] == ["score", "predicted annotation", "pathologist", "confidence"]
    assert (limits(axes[0]), limits(axes[3])) == ((0, 29), (0, 1))
    assert set(legend(axes[2])) == set(slide["table"].obs["pathologist"].unique())


def test_probabilities_of_all_classes_go_from_0_to_1(slide):
    axes = hg.pl.spatial(slide, "probabilities")
    assert [ax.get_title() for ax in axes] == list(slide["table"].obsm["he2gene_annotation_proba"].columns)
    assert {limits(ax) for ax in axes} == {(0, 1)}


def test_without_a_name_the_tissue_is_drawn_alone(slide):
    ax = hg.pl.spatial(slide)
    assert (ax.get_title(), len(ax.images), len(ax.collections)) == ("tissue", 1, 0)


def test_a_class_that_no_spot_has_is_listed_as_absent(slide):
    found = legend(hg.pl.annotation(slide))
    assert found == ["adipose tissue", "connective tissue", "invasive cancer (absent)"]
    assert hg.pl.annotation(slide, legend_loc=None).get_legend() is None


def test_a_class_has_its_colour_in_every_column_and_the_palette_comes_first(slide):
    other = slide["table"].copy()
    other.obs["mine"] = other.obs["he2gene_annotation"].astype(str)
    other.uns["mine_colors"] = ["#000000", "#ffffff"]
    own, mine = hg.pl.spatial(other, ["he2gene_annotation", "mine"])
    np.testing.assert_array_equal(spots(own).get_facecolor(), spots(mine).get_facecolor())
    given = hg.pl.spatial(other, "mine", palette={"adipose tissue": "blue"})
    np.testing.assert_array_equal(spots(given).get_facecolor()[0], to_rgba_array("blue")[0])


def test_titles_state_correlation_and_captions_held_out_correlation(slide):
    predicted, measured = hg.pl.spatial(slide, "ERBB2")
    table = slide["table"]
    counts = table.X.toarray()
    truth = np.log1p(1e4 * counts / counts.sum(1, keepdims=True))[:, table.var_names.get_loc("ERBB2")]
    r = np.corrcoef(truth, np.linspace(1, 3, table.n_obs))[0, 1]
    assert measured.get_title() == f"ERBB2 measured (r = {r:.2f})"
    assert predicted.get_xlabel().startswith(f"held-out r = {table.var.loc['ERBB2', 'he2gene_pcc']:.2f}")


def test_slides_of_one_figure_share_their_scales_and_are_named(slide):
    from copy import deepcopy

    other = deepcopy(slide)
    other["table"].layers["he2gene"] *= 2
    axes = hg.pl.spatial({"left": slide, "right": other}, "ERBB2", measured=False)
    assert [ax.get_title() for ax in axes] == ["left\nERBB2 predicted", "right\nERBB2 predicted"]
    assert limits(axes[0]) == limits(axes[1]) == (1, 6)
    assert len(hg.pl.annotation([slide, other])) == 2


def test_a_region_is_shown_in_pixels_of_the_image(slide):
    x, y = slide["table"].obsm["spatial"][7]
    ax = hg.pl.spatial(slide, "score", bbox=(x - 60, y - 50, x + 60, y + 50))
    assert (*ax.get_xlim(), *ax.get_ylim()) == pytest.approx((x - 60, x + 60, y + 50, y - 50))
    with pytest.raises(ValueError, match=r"`bbox` \(-90, -90, -80, -80\) contains no spot; the spots are at x"):
        hg.pl.spatial(slide, "score", bbox=(-90, -90, -80, -80))


def test_an_inset_is_enlarged_in_a_corner_and_marked(slide):
    x, y = slide["table"].obsm["spatial"][7]
    part = (x - 60, y - 50, x + 60, y + 50)
    ax = hg.pl.spatial(slide, "score", inset=part)
    place, _ = ax.child_axes
    assert (*place.get_xlim(), *place.get_ylim()) == pytest.approx((x - 60, x + 60, y + 50, y - 50))
    assert (len(place.images), len(spots(place).get_facecolor())) == (1, slide["table"].n_obs)
    ax.figure.canvas.draw()
    inside, whole = place.get_window_extent(), ax.get_window_extent()
    assert max(inside.width / whole.width, inside.height / whole.height) == pytest.approx(0.4, abs=0.01)
    assert inside.width / inside.height == pytest.approx(1.2, rel=0.01)
    assert whole.padded(1).containsx(inside.x0)
    assert whole.padded(1).containsy(inside.y1)


@pytest.mark.parametrize("bbox", [None, (0, 0, 300, 300)])
def test_an_inset_that_is_not_smaller_or_is_outside_raises(slide, bbox):
    last = slide["table"].obsm["spatial"].max(0)
    part = (0, 0, *last) if bbox is None else (*(last - 30), *(last + 30))
    with pytest.raises(ValueError, match=r"`inset` .* must be inside the drawn region, with less than 40%"):
        hg.pl.spatial(slide, "score", inset=part, bbox=bbox)


def test_a_table_is_drawn_with_its_spot_centres_without_tissue(slide):
    ax = hg.pl.spatial(slide["table"].copy(), "ERBB2", measured=False)
    assert not ax.images
    np.testing.assert_allclose(spots(ax).get_offsets(), slide["table"].obsm["spatial"])
    bare = slide["table"].copy()
    del bare.obsm["spatial"]
    with pytest.raises(ValueError, match=r"obsm\['spatial'\]"):
        hg.pl.spatial(bare, "ERBB2")


def test_the_figure_has_its_size_and_title_and_is_returned(slide):
    figure = hg.pl.spatial(slide, "ERBB2", figsize=(5, 3), title="Mine", return_fig=True)
    assert (tuple(figure.get_size_inches()), figure.get_suptitle()) == ((5, 3), "Mine")
    assert hg.pl.annotation(slide, title="one", frameon=False).get_title() == "one"
    figure = hg.pl.predictability(figsize=(4, 3), title="Mine", return_fig=True)
    assert (tuple(figure.get_size_inches()), figure.axes[0].get_title()) == ((4, 3), "Mine")


def test_show_shows_and_returns_nothing(slide, monkeypatch):
    shown = []
    monkeypatch.setattr(plt, "show", lambda: shown.append(1))
    assert hg.pl.spatial(slide, "score", show=True) is None
    assert shown == [1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"vmax": "high"}, "`vmax` is 'high'; a number, or a percentile such as 'p99'"),
        ({"vmin": [1, 2, 3]}, "`vmin` holds 3 values; 1 are needed"),
        ({"vmin": 3, "vmax": 1}, "`vmin` 3 is not below `vmax` 1"),
        ({"figsize": 8}, r"`figsize` is 8; \(width, height\) in inches"),
        ({"title": ["a", "b", "c"]}, "`title` holds 3 titles, 1 are needed"),
        ({"bbox": (1, 2, 3)}, r"`bbox` is \(1, 2, 3\); \(xmin, ymin, xmax, ymax\)"),
        ({"inset": (5, 0, 1, 9)}, r"`inset` is \(5, 0, 1, 9\); \(xmin, ymin, xmax, ymax\)"),
        ({"inset": (-90, -90, -80, -80)}, r"`inset` \(-90, -90, -80, -80\) contains no spot; the spots are at x"),
        ({"alpha": 2}, "`alpha` is 2"),
        ({"cmap": "nope"}, "`cmap` 'nope' is not a colour map"),
        ({"legend_loc": "nope"}, "`legend_loc` is 'nope', valid"),
        ({"palette": "nope", "color": "pathologist", "genes": None}, "`palette` 'nope' is not a colour map"),
        ({"genes": "scor"}, r"`genes` \['scor'\] were not predicted.*near 'scor': \['score'\]"),
    ],
)
def test_invalid_style_arguments_raise(slide, arguments, message):
    with pytest.raises(ValueError, match=message):
        hg.pl.spatial(slide, **{"genes": "score", **arguments})


def test_a_region_is_read_from_the_right_level_and_drawn_at_its_position():
    fine = np.full((3, 400, 800), 250, np.uint8)
    fine[:, 120:160, 320:400] = 10
    pyramid = Pyramid(tuple(Level(fine[:, ::step, ::step], step) for step in (1, 2, 4)))
    rgb, matrix = read_region(pyramid, 1.0, np.diag([2.0, 2.0, 1.0]), (400, 160, 1200, 560), pixels=180)
    assert max(rgb.shape[:2]) == 200
    rows, columns = np.nonzero(rgb[..., 0] < 100)
    corners = np.array([[columns.min(), rows.min(), 1], [columns.max() + 1, rows.max() + 1, 1]]) @ matrix.T
    np.testing.assert_allclose(corners[:, :2], [[640, 240], [800, 320]])
    whole, _ = read_region(Pyramid((Level(fine),)), 1.0, np.eye(3), (0, 0, 800, 400), pixels=100)
    assert whole.shape == (100, 200, 3)


def test_spots_of_a_labels_element_are_drawn_with_their_shape(tiny_model):
    from spatialdata.models import Labels2DModel

    sdata = hg.datasets.toy((3, 3), mpp=2.0)
    height, width = sdata["he"].sizes["y"], sdata["he"].sizes["x"]
    mask = np.zeros((height, width), np.uint16)
    for i, (x, y) in enumerate(sdata["table"].obsm["spatial"].astype(int)):
        mask[max(0, y - 12) : y + 12, max(0, x - 12) : x + 12] = i + 1
    sdata["cells"] = Labels2DModel.parse(mask, dims=("y", "x"))
    table = sdata["table"]
    table.obs["region"] = pd.Categorical(["cells"] * table.n_obs)
    table.obs["instance_id"] = np.arange(table.n_obs) + 1
    table.uns["spatialdata_attrs"]["region"] = "cells"
    hg.tl.predict(sdata, model=tiny_model, mpp=2.0)
    table.obs["score"] = np.arange(table.n_obs, dtype=float)
    drawn = np.asarray(hg.pl.spatial(sdata, "score").images[1].get_array())
    assert (drawn[..., 3] > 0).sum() == (mask > 0).sum()
    assert len(np.unique(drawn[mask > 0], axis=0)) == table.n_obs


@pytest.fixture
def table():
    """Return a table of twelve spots on a lattice, with numbers and labels."""
    found = ad.AnnData(obs=pd.DataFrame({"score": np.arange(12.0)}, index=[f"s{i}" for i in range(12)]))
    found.obs["kind"] = pd.Categorical(["unknown", "no tissue", "tumour"] * 4)
    found.obsm["spatial"] = np.stack([np.arange(12) % 4, np.arange(12) // 4], 1) * 10.0
    return found


def test_classes_with_the_names_of_greys_are_drawn_as_the_legend_says(table):
    ax = hg.pl.spatial(table, "kind", palette={"unknown": "red"})
    handles = {
        text.get_text(): handle
        for text, handle in zip(ax.get_legend().texts, ax.get_legend().legend_handles, strict=True)
    }
    for i, name in enumerate(["unknown", "no tissue", "tumour"]):
        np.testing.assert_array_equal(spots(ax).get_facecolor()[i], to_rgba_array(handles[name].get_color())[0])
    assert handles["unknown"].get_color() == "#ff0000"
    table.obs["kind"] = table.obs["kind"].where(table.obs["kind"] != "unknown")
    ax = hg.pl.spatial(table, "kind", palette={"unknown": "red"})
    assert legend(ax) == ["no tissue", "tumour", "unknown (absent)", "unknown"]


def test_coinciding_spots_give_a_warning(table):
    both = ad.concat([table, table], index_unique="-")
    with pytest.warns(UserWarning, match=r"12 of 24 spots have the position of another spot.*obs\['section'\]"):
        ax = hg.pl.spatial(both, "score")
    assert spots(ax)._widths[0] == pytest.approx(9.5 / 2)
    both.obs["section"] = ["a"] * 12 + ["b"] * 12
    assert len(hg.pl.spatial(both, "score")) == 2


def test_a_figure_is_saved_whole_or_not_at_all(table, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    def broken(self, path, **options):
        path.write_bytes(b"half")
        raise OSError("disk full")

    hg.pl.spatial(table, "score", save=tmp_path / "a.png")
    before = (tmp_path / "a.png").read_bytes()
    monkeypatch.setattr(Figure, "savefig", broken)
    with pytest.raises(OSError, match="disk full"):
        hg.pl.spatial(table, "score", save=tmp_path / "a.png")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a.png", before)]


@pytest.mark.parametrize("name", ["", "none/a.png", "a.nope"])
def test_an_invalid_save_path_raises_before_drawing(table, tmp_path, name):
    plt.close("all")
    with pytest.raises(ValueError, match="`save`"):
        hg.pl.spatial(table, "score", save=tmp_path / name)
    assert (plt.get_fignums(), list(tmp_path.iterdir())) == ([], [])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"color": "probabilities"}, "the model has no annotation head"),
        ({"color": ["score", "probabilities"]}, "the model has no annotation head"),
        ({}, "there is no tissue to draw"),
        ({"color": "score", "vmin": 50}, "`vmin` 50 is not below `vmax` 11"),
        ({"color": "score", "vmax": -1}, "`vmin` 0 is not below `vmax` -1"),
        ({"color": "kind", "palette": {"tumor": "red"}}, r"`palette` has \['tumor'\].*near 'tumor': \['tumour'\]"),
        ({"color": "nope"}, r"`color` \['nope'\] were not predicted"),
    ],
)
def test_arguments_that_would_be_drawn_wrong_raise(table, arguments, message):
    with pytest.raises(ValueError, match=message):
        hg.pl.spatial(table, **arguments)


def test_errors_name_the_slide_that_differs(slide, table):
    other = table.copy()
    other.obs["score"] = pd.Categorical(["x"] * 12)
    with pytest.raises(ValueError, match="'score' holds numbers in one slide and labels in another"):
        hg.pl.spatial([table, other], "score")
    del other.obs["kind"]
    with pytest.raises(ValueError, match="were not predicted for slide 'b'"):
        hg.pl.spatial({"a": table, "b": other}, "kind")
    with pytest.raises(ValueError, match="annotation head, so obs of slide 'b'"):
        hg.pl.annotation({"a": slide, "b": other})
    with pytest.raises(ValueError, match="the table has no spots"):
        hg.pl.spatial(table[:0].copy(), "score")


def test_a_gene_that_is_also_a_column_is_drawn_as_a_gene(slide):
    table = slide["table"]
    other = table.copy()
    table.obs["ERBB2"], other.obs["ERBB2"] = 1.0, pd.Categorical(["x"] * other.n_obs)
    for ax in hg.pl.spatial([table, other], "ERBB2", measured=False):
        assert limits(ax)[1] > 1


def test_labels_of_each_slide_may_come_from_another_column(slide):
    table = slide["table"]
    other = table.copy()
    table.obs = table.obs.drop(columns="annotation", errors="ignore")
    other.obs["annotation"] = pd.Categorical(["a", "b"] * (other.n_obs // 2))
    first, second = hg.pl.spatial([table, other], color="annotation")
    assert {"a", "b"} <= set(legend(second))
    assert not {"a", "b"} & set(legend(first))


def test_tissue_alone_is_drawn_after_a_prediction_by_symbols(toy, tiny_model):
    toy["table"].var["symbol"] = toy["table"].var_names
    hg.tl.predict(toy, model=tiny_model, gene_symbols="symbol")
    assert hg.pl.spatial(toy).images


def test_a_scale_of_one_value_and_lists_of_any_kind_are_drawn(table):
    table.obs["flat"] = 0.0
    assert limits(hg.pl.spatial(table, "flat", vmin=0)) == limits(hg.pl.spatial(table, "flat", vmax="p99")) == (0, 1)
    assert limits(hg.pl.spatial(table, "score", vmax=pd.Series([3.0]))) == (0, 3)
    hg.pl.spatial(table, "kind", palette=np.array(["red", "blue", "green"]))
