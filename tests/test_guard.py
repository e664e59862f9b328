"""A slide unlike the training data is noticed, one like it is not."""

import warnings

import numpy as np
import pytest
from spatialdata.models import Image2DModel
from toy_sections import toy, train

import he2gene_sc as hg
from he2gene_sc.models._guard import Guard, components, nearest, seeming_size, variation_of
from he2gene_sc.training._guard import fit_guard

ODD = "unlike what the model was trained on"


@pytest.fixture(scope="module")
def model():
    """Trained on toys at 2 µm/px."""
    return train([toy(i, p, shape=(7, 7)) for i, p in enumerate("AAB")], n_target_genes=12)


def painted(change):
    sdata = toy(9, shape=(6, 6))
    pixels = np.asarray(sdata["he"]["scale0"]["image"] if hasattr(sdata["he"], "children") else sdata["he"])
    del sdata.images["he"]
    sdata.images["he"] = Image2DModel.parse(change(pixels), dims=("c", "y", "x"))
    return sdata


def predict(sdata, model, **options):
    hg.tl.predict(sdata, model=model, device="cpu", **options)
    return sdata["table"].obs["he2gene_ood"]


def test_a_slide_like_those_of_training_passes_without_a_word(model):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        score = predict(toy(9, shape=(6, 6)), model, mpp=2.0)
    assert score.dtype == np.float32
    assert (score <= 1).mean() > 0.7


@pytest.mark.parametrize(
    "change",
    [
        lambda x: np.full_like(x, 245),
        lambda x: np.zeros_like(x),
        lambda x: np.random.default_rng(0).integers(0, 256, x.shape).astype(np.uint8),
        lambda x: 255 - x,
    ],
    ids=["blank glass", "black", "noise", "inverted, as fluorescence is"],
)
def test_what_is_no_tissue_is_noticed(model, change):
    with pytest.warns(UserWarning, match=f"{ODD}.*'spots'.*Check the tissue, the stain.*µm/px.*blank glass") as caught:
        score = predict(painted(change), model, mpp=2.0)
    assert sum(ODD in str(w.message) for w in caught) == 1
    assert (score > 1).mean() > 0.9


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.parametrize(("factor", "odd"), [(1, False), (0.5, True), (2, True)])
def test_a_resolution_wrong_by_two_is_noticed_on_c5_and_the_right_one_passes(her2st, factor, odd):
    from he2gene_sc._core.slide import resolve

    sdata = her2st("C5")
    mpp = resolve(sdata)[0].mpp * factor
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = hg.tl.predict(sdata, mpp=mpp, genes=["ERBB2"], device="cpu", copy=True)
    (said,) = [str(w.message) for w in caught if ODD in str(w.message)] or [""]
    assert ("the µm/px may be wrong" in said) == odd
    score = found["table"].obs["he2gene_ood"]
    assert (score > 1).all() if odd else (score <= 1).mean() > 0.9


def test_spots_outside_the_image_have_no_score(model):
    sdata = painted(lambda x: x[:, :, : x.shape[2] * 3 // 4])
    with pytest.warns(UserWarning, match="outside the image"):
        score = predict(sdata, model, mpp=2.0)
    outside = np.isnan(sdata["table"].layers["he2gene"]).all(1)
    assert outside.any()
    np.testing.assert_array_equal(score.isna(), outside)


def test_a_saved_model_still_notices(model, tmp_path):
    from toy_sections import own

    saved = hg.models.load(model.save(tmp_path / "m"), encoder=own())
    scores = []
    for which in (model, saved):
        with pytest.warns(UserWarning, match=ODD):
            scores.append(predict(painted(lambda x: 255 - x), which, mpp=2.0))
    np.testing.assert_allclose(*scores, rtol=1e-4)


def test_a_model_without_statistics_writes_no_score_and_takes_away_that_of_another(model, tiny_model):
    sdata = toy(9, shape=(6, 6))
    assert predict(sdata, model, mpp=2.0).notna().all()
    hg.tl.predict(sdata, model=tiny_model, mpp=2.0)
    assert "he2gene_ood" not in sdata["table"].obs


# Arrays


def slides(n=3, seed=0, spots=60):
    """Two windows of five features each and four of colour; the third feature tells the size of a window."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(n):
        windows = rng.normal(size=(spots, 2, 5)) + rng.normal(size=5) / 4
        windows[:, :, 2] += 3 * np.array([0.0, 1.0])
        made.append(np.hstack([windows.reshape(spots, 10), rng.normal(size=(spots, 4))]).astype(np.float32))
    return made


def fitted(features, windows_um=(100.0, 200.0)):
    from tiny_sections import section

    sections = [section(x[:, None], np.ones((len(x), 2)), name=str(i)) for i, x in enumerate(features)]
    mean, scale = np.mean([x.mean(0) for x in features], axis=0), np.std(np.concatenate(features), axis=0)
    tensors, limits = fit_guard(sections, mean, scale, windows_um, 4)
    arrays = (np.asarray(x, np.float32) for x in (mean, scale, *tensors.values()))
    return Guard(*arrays, limits, windows_um), tensors


def test_a_window_twice_as_large_seems_one_octave_too_large():
    guard, _ = fitted(slides())
    (other,) = slides(1, seed=1)
    assert guard.look(other).octaves == pytest.approx(0, abs=0.25)
    wrong = other.copy()
    wrong[:, [2, 7]] += 3
    look = guard.look(wrong)
    assert look.octaves == pytest.approx(1, abs=0.3)
    assert look.reasons
    assert (look.score > 1).all()


def test_the_distance_is_that_to_the_fifth_nearest_training_spot():
    rng = np.random.default_rng(2)
    own, bank = rng.normal(size=(4, 3)), rng.normal(size=(30, 3))
    expected = np.sort(np.linalg.norm(own[:, None] - bank[None], axis=2), axis=1)[:, 4]
    np.testing.assert_allclose(nearest(own, bank), expected)


def test_scores_do_not_depend_on_the_order_of_the_spots():
    guard, _ = fitted(slides())
    (other,) = slides(1, seed=3)
    order = np.random.default_rng(0).permutation(len(other))
    np.testing.assert_allclose(guard.look(other[order]).score, guard.look(other).score[order], rtol=1e-5)


def test_variation_is_that_between_the_spots():
    own = np.random.default_rng(4).normal(size=(50, 6))
    assert variation_of(2 * own + 7) == pytest.approx(variation_of(own) + 1)
    np.testing.assert_allclose(
        components(np.ones((2, 3)), np.zeros(3), np.array([1, 0, 2.0]), np.eye(3), 1), [[1, 0, 0.5, 0.5]] * 2
    )


def test_a_few_spots_are_not_judged_as_a_slide():
    guard, _ = fitted(slides())
    assert guard.look(slides(1, seed=5)[0][:5] + 100).reasons == ()
    assert guard.look(np.empty((0, 14), np.float32)).score.shape == (0,)


def test_one_window_says_nothing_of_its_size():
    features = [np.delete(x, slice(5, 10), axis=1) for x in slides()]
    guard, _ = fitted(features, (100.0,))
    assert np.isnan(seeming_size(features[0], guard.size, (100.0,)))
    assert np.isfinite(guard.look(features[0]).score).all()


def test_one_section_gives_no_guard():
    from tiny_sections import section

    (x,) = slides(1)
    found = fit_guard([section(x[:, None], np.ones((60, 2)))], x.mean(0), x.std(0), (100.0, 200.0), 4)
    assert found == ({}, None)


def test_the_bank_holds_spots_of_every_section_in_half_precision():
    guard, tensors = fitted(slides(5))
    assert tensors["guard.bank"].dtype == tensors["guard.projection"].dtype == np.float16
    assert len(guard.bank) == 5 * 60
    assert min(guard.limits["distance"]) > 0
