"""Detection of slides out of distribution."""

import html
import warnings
from dataclasses import replace

import numpy as np
import pytest
import spatialdata as sd
from spatialdata.models import Image2DModel

import he2gene_sc as hg
from he2gene_sc.models import _ood
from he2gene_sc.models._ood import (
    CAUSES,
    OODDetector,
    SlideFacts,
    apparent_sides,
    components,
    distance_to_bank,
    size_error,
)
from he2gene_sc.models._stain import stain_of
from he2gene_sc.training._closed_form.ood import _MIN_STAIN, fit_detector
from tests.helpers.toy_sections import toy, train

ODD = "unlike what the model was trained on"


@pytest.fixture(scope="module")
def model():
    """Model trained on toy sections at 2 µm/px."""
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


def test_a_slide_like_training_gives_no_warning(model):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        score = predict(toy(9, shape=(6, 6)), model, mpp=2.0)
    assert score.dtype == np.float32
    assert (score <= 1).mean() > 0.7


@pytest.mark.parametrize(
    "change",
    [
        lambda x: np.random.default_rng(0).integers(0, 256, x.shape).astype(np.uint8),
        lambda x: 255 - x,
    ],
    ids=["noise", "inverted, as fluorescence is"],
)
def test_images_without_tissue_structure_are_detected(model, change):
    with pytest.warns(UserWarning, match=f"{ODD}.*'spots'.*Check the tissue, the stain.*µm/px.*blank glass") as caught:
        score = predict(painted(change), model, mpp=2.0)
    assert sum(ODD in str(w.message) for w in caught) == 1
    assert (score > 1).mean() > 0.9


def test_a_saved_prediction_and_its_report_state_why_not_to_trust_it(model, tmp_path):
    sdata = painted(lambda x: 255 - x)
    with pytest.warns(UserWarning, match=ODD) as caught:
        predict(sdata, model, mpp=2.0)
    hg.io.save(sdata, tmp_path / "slide.zarr")
    saved = sd.read_zarr(tmp_path / "slide.zarr")
    reasons = list(saved["table"].uns["he2gene"]["reasons"])
    page = hg.report(saved, tmp_path / "report.html").read_text()
    assert reasons
    for reason in reasons:
        assert any(reason in str(w.message) for w in caught)
        assert reason in html.unescape(page)


def test_a_slide_like_training_needs_no_reason(model):
    sdata = painted(lambda x: 255 - x)
    with pytest.warns(UserWarning, match=ODD):
        predict(sdata, model, mpp=2.0)
    sdata["he"].data = 255 - sdata["he"].data
    predict(sdata, model, mpp=2.0)
    assert "reasons" not in sdata["table"].uns["he2gene"]


def test_a_region_predicted_later_keeps_the_verdict_on_the_others(model):
    slides = {"A": painted(lambda x: 255 - x), "B": toy(9, shape=(6, 6))}
    both = sd.concatenate(slides, concatenate_tables=True)
    options = {"model": model, "device": "cpu", "mpp": 2.0}
    with pytest.warns(UserWarning, match=ODD):
        hg.tl.predict(both, image_key={"spots-A": "he-A", "spots-B": "he-B"}, **options)
    together, record = both["table"].copy(), both["table"].uns["he2gene"]
    assert record["reasons"][0].startswith("'spots-A': ")
    # One after the other, also if a version without the entry wrote the first.
    for older in (False, True):
        if older:
            hg.tl.predict(both, shapes_key="spots-A", image_key="he-A", **options)
            del both["table"].uns["he2gene"]["regions"]
        hg.tl.predict(both, shapes_key="spots-B", image_key="he-B", **options)
        assert older or both["table"].uns["he2gene"]["regions"] == record["regions"]
        assert set(both["table"].uns["he2gene"]["regions"]) == {"spots-A", "spots-B"}
        for name in ("verdict",) if older else ("reasons", "verdict", "share_on_tissue", "share_out_of_distribution"):
            assert both["table"].uns["he2gene"][name] == record[name]
        assert "reasons" in both["table"].uns["he2gene"]
    for name in ("he2gene_reliable", "he2gene_reliable_known_patient"):
        assert not both["table"].var[name].any()
        assert both["table"].var[name].equals(together.var[name])
    # Mended.
    both["he-A"].data = 255 - both["he-A"].data
    hg.tl.predict(both, shapes_key="spots-A", image_key="he-A", **options)
    assert "reasons" not in both["table"].uns["he2gene"]
    assert both["table"].var["he2gene_reliable_known_patient"].any()


@pytest.mark.parametrize("value", [245, 0], ids=["blank glass", "black"])
def test_a_blank_image_raises(model, value):
    with pytest.raises(ValueError, match="`image_key` 'he' is blank at all spots"):
        predict(painted(lambda x: np.full_like(x, value)), model, mpp=2.0)


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.parametrize(("factor", "odd"), [(1, False), (0.5, True), (2, True)])
def test_a_resolution_wrong_by_a_factor_of_two_is_detected_on_c5(her2st, factor, odd):
    from he2gene_sc._core.element_results import copy_tables
    from he2gene_sc._core.slide import resolve

    sdata = copy_tables(her2st("C5"))
    mpp = resolve(sdata)[0].mpp * factor
    whole = sdata["table"]
    half = whole[whole.obs["array_col"] < whole.obs["array_col"].median()].copy()
    sdata["spots"] = sdata["spots"].loc[half.obs[half.uns["spatialdata_attrs"]["instance_key"]]]
    sdata["table"] = half
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = hg.tl.predict(sdata, mpp=mpp, genes=["ERBB2"], device="cpu", copy=True)
    (message,) = [str(w.message) for w in caught if ODD in str(w.message)] or [""]
    assert ("the µm/px may be wrong" in message) == odd
    score = found["table"].obs["he2gene_ood"]
    assert (score > 1).all() if odd else (score <= 1).mean() > 0.9


@pytest.mark.parametrize(("known", "claimed", "warned"), [(0.0, True, True), (0.0, False, False), (1e6, True, False)])
def test_a_known_patient_that_looks_new_gives_a_warning(model, monkeypatch, known, claimed, warned):
    detector = model.network.detector
    monkeypatch.setattr(model.network, "detector", replace(detector, limits={**detector.limits, "known": known}))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        predict(toy(9, shape=(6, 6)), model, mpp=2.0, known_patient=claimed)
    assert (
        any("`known_patient` is True, but 'spots' looks like a new patient" in str(w.message) for w in caught) == warned
    )


def test_spots_outside_the_image_have_no_score(model):
    sdata = painted(lambda x: x[:, :, : x.shape[2] * 3 // 4])
    with pytest.warns(UserWarning, match="outside the image"):
        score = predict(sdata, model, mpp=2.0)
    outside = np.isnan(sdata["table"].layers["he2gene"]).all(1)
    assert outside.any()
    np.testing.assert_array_equal(score.isna(), outside)


def test_a_saved_model_gives_the_same_scores(model, tmp_path):
    from tests.helpers.toy_sections import own

    saved = hg.models.load(model.save(tmp_path / "m"), encoder=own())
    scores = []
    for which in (model, saved):
        with pytest.warns(UserWarning, match=ODD):
            scores.append(predict(painted(lambda x: 255 - x), which, mpp=2.0))
    np.testing.assert_allclose(*scores, rtol=1e-4)


def test_a_model_without_a_detector_removes_the_scores_of_another_model(model, tiny_model):
    sdata = toy(9, shape=(6, 6))
    assert predict(sdata, model, mpp=2.0).notna().all()
    hg.tl.predict(sdata, model=tiny_model, mpp=2.0)
    assert "he2gene_ood" not in sdata["table"].obs


# Arrays


def slides(n=3, seed=0, spots=60):
    """Two windows of five features each and nine of colour each; the third feature depends on the size of a window."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(n):
        windows = rng.normal(size=(spots, 2, 5)) + rng.normal(size=5) / 4
        windows[:, :, 2] += 3 * np.array([0.0, 1.0])
        colours = [colour(rng, spots) for _ in range(2)]
        made.append(np.hstack([windows.reshape(spots, 10), *colours]).astype(np.float32))
    return made


def colour(rng, spots):
    """Mean, SD and covariances of the density of H&E, with random amounts of both stains."""
    stains = np.array([[0.65, 0.70, 0.29], [0.15, 0.95, 0.25], [0.58, -0.36, 0.73]])
    found = []
    for _ in range(spots):
        amounts = np.array([0.5, 0.4, 0.02]) * np.exp(0.15 * rng.normal(size=3))
        density = rng.normal(amounts, 0.5 * amounts, (200, 3)) @ stains
        cov = np.cov(density.T)
        found.append([*density.mean(0), *np.sqrt(np.diag(cov)), cov[0, 1], cov[0, 2], cov[1, 2]])
    return np.array(found)


def fitted(features, windows_um=(100.0, 200.0), patients="ABC"):
    from tests.helpers.tiny_sections import section

    n = len(features)
    names = [patients[i % len(patients)] for i in range(n)]
    sections = [
        section(x[:, None], np.ones((len(x), 2)), name=str(i), patient=names[i]) for i, x in enumerate(features)
    ]
    weights = np.full(features[0].shape[1], 0.3, np.float32)
    tensors, limits = fit_detector(sections, weights, windows_um, 200, 9 * len(windows_um))
    keys = ("mean", "scale", "weights", "projection", "bank", "size")
    arrays = (np.asarray(tensors[f"guard.{key}"], np.float32) for key in keys)
    return OODDetector(*arrays, limits, windows_um), tensors


def facts(n, mpp=0.5, tissue=1.0, faults=0.0):
    return SlideFacts(mpp, np.full(n, tissue, np.float32), np.full((n, 3), faults, np.float32))


def assess(detector, features):
    """Compare sharp spots on tissue, at an unknown µm/px, with training."""
    return detector.assess(features, facts(len(features), mpp=np.nan))


def test_a_slide_like_training_has_verdict_new_or_like_training():
    detector, _ = fitted(slides(6))
    (other,) = slides(1, seed=1)
    found = detector.assess(other, facts(60))
    assert found.reasons == ()
    assert found.verdict in ("like training", "new")
    assert (found.score > 1).mean() < 0.2
    assert set(found.causes) == set(CAUSES)


def test_a_window_of_twice_the_size_is_one_octave_too_large():
    detector, _ = fitted(slides())
    (other,) = slides(1, seed=1)
    assert assess(detector, other).octaves == pytest.approx(0, abs=0.25)
    wrong = other.copy()
    wrong[:, [2, 7]] += 3
    found = assess(detector, wrong)
    assert found.octaves == pytest.approx(1, abs=0.3)
    assert found.causes["resolution"] == 1
    assert (found.score > 1).all()


def test_windows_beyond_the_sizes_of_training_do_not_hide_a_wrong_size():
    """As measured with half and twice the µm/px: the largest window looks too small, the smallest too large."""
    assert size_error(np.array([0.67, 0.73, 0.23])) == pytest.approx(0.70)
    assert size_error(np.array([-0.27, -0.81, -0.81])) == pytest.approx(-0.81)


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 2, 0), (2, 0, 1)])
def test_apparent_sides_do_not_depend_on_the_order_of_windows(order):
    """Sides of 100 to 400 µm that look twice as large, and at most 450 µm: only the two smaller ones show it."""
    sides = np.array([100.0, 200.0, 400.0])[list(order)]
    features = np.log2(np.minimum(2 * sides, 450))[None, :, None].repeat(5, 0).reshape(5, 3)
    found = apparent_sides(features, np.array([1.0, 0.0]), tuple(sides))
    np.testing.assert_allclose(found, [1, 1, np.log2(450 / 400)])
    assert size_error(found) == pytest.approx(1)


def test_blocks_of_spots_give_the_same_result(monkeypatch):
    detector, _ = fitted(slides())
    (other,) = slides(1, seed=1)
    other[:, [2, 7]] += 2
    tissue = SlideFacts(0.5, np.where(np.arange(60) < 25, 0, 1).astype(np.float32), np.zeros((60, 3), np.float32))
    whole = detector.assess(other, tissue)
    monkeypatch.setattr(_ood, "row_blocks", lambda n: [slice(i, min(n, i + 7)) for i in range(0, n, 7)])
    blocks = detector.assess(other, tissue)
    assert blocks.octaves == pytest.approx(whole.octaves)
    np.testing.assert_allclose(blocks.score, whole.score, rtol=1e-6)


def test_one_section_at_another_resolution_does_not_allow_every_size():
    """Its fourth feature depends on the size of a window instead of the third, which the other sections cannot show."""
    features = slides(5)
    for x, column in zip(features, (8, 7, 7, 7, 7), strict=True):
        x[:, 7] -= 3
        x[:, column] += 12
    assert fitted(features)[0].limits["octaves"] == 0.75


def test_no_training_section_is_out_of_distribution_by_resolution():
    features = slides(6)
    for i, x in enumerate(features):
        x[:, [2, 7]] += 3 * (-1) ** i
    detector, _ = fitted(features)
    assert detector.limits["octaves"] > 0.8
    assert all(detector.assess(x, facts(60)).causes["resolution"] == 0 for x in features)


@pytest.mark.parametrize("n", [1, 3, 60])
def test_every_cause_is_named_even_for_one_spot(n):
    detector, _ = fitted(slides())
    (other,) = slides(1, seed=1)
    other = other[:n]
    stained, strange = other.copy(), other.copy()
    # Only haematoxylin: a single stain, so the densities of all channels are proportional.
    haematoxylin = np.array([0.65, 0.70, 0.29])
    pairs = haematoxylin[[0, 0, 1]] * haematoxylin[[1, 2, 2]]
    stained[:, 10:] = np.tile([*0.5 * haematoxylin, *0.2 * haematoxylin, *0.04 * pairs], 2)
    strange[:, :10] += 8
    for cause, features, seen in (
        ("stain", stained, facts(n)),
        ("focus", other, facts(n, faults=3.0)),
        ("resolution", other, facts(n, mpp=2.0)),
        ("tissue", strange, facts(n)),
    ):
        found = detector.assess(features, seen)
        assert found.verdict == "out of distribution"
        assert any(reason.startswith(cause) for reason in found.reasons), (cause, found)
        assert (found.score > 1).all()


def test_a_coarser_slide_is_not_called_another_tissue():
    detector, _ = fitted(slides())
    (strange,) = slides(1, seed=1)
    strange[:, :10] += 8
    limit = detector.limits["mpp"]
    fine, coarse = (detector.assess(strange, facts(60, mpp=mpp)) for mpp in (0.99 * limit, 1.01 * limit))
    assert fine.causes["tissue"] == 1
    assert coarse.causes["tissue"] == 0
    assert (coarse.score > 1).all()
    assert [reason.split(":")[0] for reason in coarse.reasons] == ["resolution"]


def test_the_range_of_stains_is_wider_for_fewer_patients():
    features = slides(1) * 4
    half = {n: np.array(fitted(features, patients="ABCD"[:n])[0].limits["stain"]["half"]) for n in (1, 2, 3)}
    wide = half[3] > 1.01 * _MIN_STAIN
    assert wide.any()
    np.testing.assert_allclose((half[1] / half[2])[wide], 3 / 2, rtol=1e-5)
    np.testing.assert_allclose((half[2] / half[3])[wide], 2 / 1.5, rtol=1e-5)


def test_exchanged_red_and_green_are_detected_even_if_stains_vary():
    detector, _ = fitted(slides())
    stain = detector.limits["stain"] | {"half": [100.0] * 8}
    detector = replace(detector, limits=detector.limits | {"stain": stain})
    (other,) = slides(1, seed=1)
    assert detector.assess(other, facts(60)).causes["stain"] == 0
    exchanged = other.copy()
    order = [1, 0, 2, 4, 3, 5, 6, 8, 7]
    for start in (10, 19):
        exchanged[:, start : start + 9] = other[:, start : start + 9][:, order]
    found = detector.assess(exchanged, facts(60))
    assert found.causes["stain"] == 1
    assert found.verdict == "out of distribution"
    assert any("channels are not in the order red, green, blue" in reason for reason in found.reasons)
    # A model whose training images absorb more red than green was not trained on H&E.
    middle = np.array(stain["middle"])
    middle[[1, 5]] = 1, 0
    other = replace(detector, limits=detector.limits | {"stain": stain | {"middle": middle.tolist()}})
    assert other.assess(exchanged, facts(60)).causes["stain"] == 0


def test_he_with_strong_eosin_is_not_called_another_stain():
    """As in sections of ovary and lung: the first principal density is less red than the mean."""
    detector, _ = fitted(slides())
    stain = detector.limits["stain"] | {"half": [100.0] * 8}
    detector = replace(detector, limits=detector.limits | {"stain": stain})
    (eosin,) = slides(1, seed=1)
    for start in (10, 19):
        eosin[:, start + np.array([3, 6, 7])] *= 0.3
    found = stain_of(eosin, 2)
    assert (found[:, 5] < found[:, 1]).all()
    assert detector.assess(eosin, facts(60)).causes["stain"] == 0


def test_spots_on_glass_do_not_affect_the_verdict():
    detector, _ = fitted(slides())
    (other,) = slides(1, seed=1)
    seen = facts(60)
    seen.tissue[:40] = 0
    mixed = other.copy()
    mixed[:40] += 50
    assert detector.assess(mixed, seen).reasons == ()
    assert detector.assess(other, facts(60, tissue=0.0)).reasons == ("no spot lies on tissue",)


def test_the_distance_is_to_the_fifth_nearest_training_spot():
    rng = np.random.default_rng(2)
    own, bank = rng.normal(size=(4, 3)), rng.normal(size=(30, 3))
    expected = np.sort(np.linalg.norm(own[:, None] - bank[None], axis=2), axis=1)[:, 4]
    np.testing.assert_allclose(distance_to_bank(own, bank), expected)


def test_scores_do_not_depend_on_the_order_of_the_spots():
    detector, _ = fitted(slides())
    (other,) = slides(1, seed=3)
    order = np.random.default_rng(0).permutation(len(other))
    np.testing.assert_allclose(assess(detector, other[order]).score, assess(detector, other).score[order], rtol=1e-5)


def test_components_and_residual_add_up_to_the_length():
    rng = np.random.default_rng(4)
    x, projection = rng.normal(size=(50, 6)), np.linalg.qr(rng.normal(size=(6, 2)))[0]
    own, residual = components(x, np.zeros(6), np.ones(6), np.full(6, 0.5), projection)
    np.testing.assert_allclose(np.square(own).sum(1) + residual**2, np.square(0.5 * x).sum(1))
    own, residual = components(np.ones((2, 3)), np.zeros(3), np.array([1, 0, 2.0]), np.empty(0), np.eye(3))
    np.testing.assert_allclose(own, [[1, 0, 0.5]] * 2)
    assert (residual == 0).all()


def test_limits_of_models_of_version_0_6_are_supported():
    detector, _ = fitted(slides())
    old = {"distance": [2.0, 1.0], "far": 0.5, "octaves": 0.5, "spread": 0.0, "variation": [-1.0, 1.0]}
    bank = np.hstack([detector.bank, np.zeros((len(detector.bank), 18), np.float32)])
    before = OODDetector(
        detector.mean,
        detector.scale,
        np.empty(0, np.float32),
        detector.projection,
        bank,
        detector.size,
        old,
        (100.0, 200.0),
    )
    (other,) = slides(1, seed=1)
    assert assess(before, other).score.shape == (60,)
    assert assess(before, other + 50).verdict == "out of distribution"


def test_no_spots_give_an_empty_array_of_scores():
    detector, _ = fitted(slides())
    assert assess(detector, np.empty((0, 28), np.float32)).score.shape == (0,)


def test_one_window_gives_no_apparent_size():
    features = [np.delete(x, [*range(5, 10), *range(19, 28)], axis=1) for x in slides()]
    detector, _ = fitted(features, (100.0,))
    assert np.isnan(size_error(apparent_sides(features[0], detector.size, (100.0,))))
    assert np.isfinite(assess(detector, features[0]).score).all()


def test_one_section_gives_no_detector():
    from tests.helpers.tiny_sections import section

    (x,) = slides(1)
    assert fit_detector([section(x[:, None], np.ones((60, 2)))], np.ones(28), (100.0, 200.0), 224, 18) == ({}, None)


def test_the_bank_holds_spots_of_all_sections_in_half_precision():
    detector, tensors = fitted(slides(5))
    assert tensors["guard.bank"].dtype == tensors["guard.projection"].dtype == np.float16
    assert len(detector.bank) == 5 * 60
    assert detector.limits["distance"] > 0
