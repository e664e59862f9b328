"""Predict real tissue: a held-out section, and the same tissue in other formats."""

import numpy as np
import pandas as pd
import pytest

import he2gene_sc as hg
from he2gene_sc.cli.demo import compare
from he2gene_sc.stats import log_normalise, pearson

pytestmark = [pytest.mark.data, pytest.mark.slow]


@pytest.fixture(scope="module")
def c5(her2st):
    sdata = her2st("C5")
    hg.tl.predict(sdata)
    return sdata


@pytest.fixture(scope="module")
def crop(her2st):
    """Pixels, centres and ids of the spots in a quarter of C5, with a margin for every window."""
    sdata = her2st("C5")
    table = sdata["table"]
    centres = table.obsm["spatial"]
    left, top = centres.min(0).astype(int) + np.array([2200, 1200])
    size = 2800
    inside = ((centres > [left + 700, top + 700]) & (centres < [left + size - 700, top + size - 700])).all(1)
    pixels = np.asarray(sdata["he"]["scale0"]["image"][:, top : top + size, left : left + size])
    return pixels, centres[inside] - [left, top], table.obs_names[inside], sdata.attrs["he2gene"]["mpp"]["he"]


def slide(pixels, centres, ids, mpp, *, scale_factors=None, transformation=None):
    import spatialdata as sd
    from spatialdata.models import Image2DModel, ShapesModel
    from spatialdata.transformations import Identity

    where = {"global": transformation or Identity()}
    return sd.SpatialData(
        images={
            "he": Image2DModel.parse(
                pixels, dims=("c", "y", "x"), scale_factors=scale_factors, transformations=where, chunks=(3, 512, 512)
            )
        },
        shapes={"spots": ShapesModel.parse(centres, geometry=0, radius=50 / mpp, index=ids, transformations=where)},
    )


def predict(sdata, mpp):
    hg.tl.predict(sdata, mpp=mpp)
    return sdata["table"].layers["he2gene"]


def test_held_out_section_is_predicted_above_colour_alone(c5):
    model = hg.models.load()
    assert "C5" not in model.card.training["sections"]
    panels = compare(c5, model)[1].set_index("panel")
    assert panels.loc["highest mean", "model"] >= 0.24
    assert panels.loc["most variable", "model"] >= 0.37
    assert (panels["model"] - panels["colour"] >= 0.015).all()
    assert (panels["model"] < panels["ceiling"]).all()


def test_annotation_of_held_out_section_agrees_with_the_warped_labels(c5):
    obs = c5["table"].obs
    known = obs["label_warp"].isin(["invasive cancer", "connective tissue"])
    tumour = obs["he2gene_annotation"] == "invasive cancer"
    truth = obs["label_warp"] == "invasive cancer"
    sensitivity = tumour[known & truth].mean()
    specificity = 1 - tumour[known & ~truth].mean()
    assert (sensitivity + specificity) / 2 > 0.7


def test_the_same_tissue_in_other_formats_gives_the_same_predictions(crop):
    from spatialdata.transformations import Affine, Scale, Sequence

    pixels, centres, ids, mpp = crop
    assert len(ids) >= 15
    plain = predict(slide(pixels, centres, ids, mpp), mpp)
    pyramid = predict(slide(pixels, centres, ids, mpp, scale_factors=[2, 2]), mpp)
    assert np.abs(pyramid - plain).max() <= 1e-3
    turned = Sequence(
        [
            Scale([0.7, 0.7], axes=("x", "y")),
            Affine([[0.8, -0.6, 50], [0.6, 0.8, -20], [0, 0, 1]], input_axes=("x", "y"), output_axes=("x", "y")),
        ]
    )
    elsewhere = predict(slide(pixels, centres, ids, mpp, transformation=turned), mpp)
    assert np.abs(elsewhere - plain).max() <= 1e-3


def test_image_twice_as_large_gives_the_same_patterns(crop):
    from PIL import Image

    pixels, centres, ids, mpp = crop
    height, width = pixels.shape[1:]
    image = Image.fromarray(pixels.transpose(1, 2, 0)).resize((2 * width, 2 * height), Image.Resampling.BICUBIC)
    large = np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))
    plain = predict(slide(pixels, centres, ids, mpp), mpp)
    rescaled = predict(slide(large, 2 * centres, ids, mpp / 2), mpp / 2)
    assert np.corrcoef(plain.ravel(), rescaled.ravel())[0, 1] >= 0.99
    target = (hg.models.load().genes["group"] == "target").to_numpy()
    assert np.nanmedian(pearson(plain[:, target], rescaled[:, target])) >= 0.95


# Trained here: C2 and C3, tested on C5


@pytest.fixture(scope="module")
def trained(her2st, tmp_path_factory):
    return hg.tl.train(
        [her2st("C2"), her2st("C3")],
        annotation_key="annotation",
        genes=hg.GeneSelection(missing_genes_are_zero=True, min_spot_share=0.3),
        # The preset of tutorial 02, whose patches are encoded once.
        preset=hg.DefaultRecipe(windows_um=(100, 400), n_recoloured=0),
        cache=tmp_path_factory.mktemp("features"),
        device="cpu",
    )


def scores(model, predicted, table):
    """Return the mean correlation over the model's panels: 250 genes of highest mean and 50 most variable genes."""
    measured = pd.DataFrame(log_normalise(table.X), columns=table.var_names)
    found = []
    for members in (model.genes["group"] == "target", model.genes["variable"].astype(bool)):
        genes = model.genes.index[members]
        truth = measured.reindex(columns=genes, fill_value=0).to_numpy()
        r = pearson(predicted.loc[table.obs_names].reindex(columns=genes, fill_value=0).to_numpy(), truth)
        found.append(np.nan_to_num(r).mean())
    return np.array(found)


def of_image(model, pixels, centres, ids, mpp):
    sdata = slide(pixels, centres, ids, mpp)
    hg.tl.predict(sdata, model=model, mpp=mpp, device="cpu")
    return sdata["table"].to_df("he2gene")


@pytest.fixture(scope="module")
def on_c5(her2st, trained):
    """Unchanged C5: its spots, and the accuracy of their prediction."""
    sdata = hg.tl.predict(her2st("C5"), model=trained, copy=True, device="cpu")
    table = sdata["table"]
    return sdata, scores(trained, table.to_df("he2gene").fillna(0), table)


def test_a_model_of_two_sections_predicts_the_third_above_colour_alone(trained, on_c5):
    sdata, found = on_c5
    panels = compare(sdata, trained)[1].set_index("panel")
    np.testing.assert_allclose(panels["model"], found, atol=0.01)
    assert panels.loc["highest mean", "model"] > 0.27
    assert panels.loc["most variable", "model"] > 0.42
    assert (panels["model"] - panels["colour"] >= 0.02).all()
    assert (panels["model"] < panels["ceiling"]).all()
    figures = trained.card.metrics["leave one section out"]
    assert min(figures["mean Pearson, 250 target genes"].values()) > 0.2


def test_another_stain_and_resolution_cost_at_most_a_tenth(her2st, trained, on_c5):
    """Change both at once; the loss is that of both changes together."""
    from PIL import Image

    _, reference = on_c5
    table = her2st("C5")["table"]
    pixels = np.asarray(her2st("C5")["he"]["scale0"]["image"])
    height, width = pixels.shape[1:]
    size = (round(0.8 * width), round(0.8 * height))
    image = Image.fromarray(pixels.transpose(1, 2, 0)).resize(size, Image.Resampling.BOX)
    centres, mpp = 0.8 * table.obsm["spatial"], her2st("C5").attrs["he2gene"]["mpp"]["he"] / 0.8
    values = [np.clip(gain * np.arange(256) + shift, 1, 255) for gain, shift in ((0.9, 5), (1.1, -20), (0.8, 40))]
    channels = np.asarray(image).transpose(2, 0, 1)
    pixels = np.stack([of.astype(np.uint8)[channel] for of, channel in zip(values, channels, strict=True)])
    found = scores(trained, of_image(trained, pixels, centres, table.obs_names, mpp), table)
    assert (found >= 0.9 * reference).all(), f"{found} of {reference}"
