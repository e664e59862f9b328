"""Only slides that a model was trained on are recognised by their pixels."""

import contextlib
import logging
import re
from dataclasses import replace
from unittest import mock

import dask.array as da
import numpy as np
import pytest
import spatialdata as sd
import zarr
from spatialdata.models import Image2DModel

import he2gene_sc as hg
from he2gene_sc._core import provenance
from he2gene_sc._core.predictions import summary_of
from he2gene_sc._core.provenance import image_facts
from he2gene_sc._core.slide import resolve
from he2gene_sc.cohort._job import _same_patient
from he2gene_sc.image import Level, Pyramid, pixels_sha256
from he2gene_sc.models import ModelCard
from tests.helpers.objects import two_regions

RELIABLE, OF_KNOWN = "he2gene_reliable", "he2gene_reliable_known_patient"


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(0).integers(1, 256, (3, 700, 900), dtype=np.uint8)


@pytest.fixture
def model(tiny_model):
    """Return the tiny model with a card as if it was trained on the toy slide."""
    return trained_on(tiny_model, "S1", *resolve(hg.datasets.toy((5, 6), mpp=2.0)))


def trained_on(model, name, slide, centres=None):
    facts = {
        "patient": "P",
        "n_spots": 30,
        "mpp": 2.0,
        "image": image_facts(slide, slide.centres if centres is None else centres),
    }
    made = replace(
        model,
        card=replace(model.card, training={"sections": {name: facts}}),
        genes=model.genes.assign(reliable_known_patient=~model.genes["reliable"]),
    )
    made.__dict__["network"] = model.network
    return made


def predicted(sdata, model, **options):
    table = hg.tl.predict(sdata, model=model, copy=True, **options)["table"]
    return table.var, table.uns["he2gene"]


def assert_known(sdata, model, known):
    var, record = predicted(sdata, model)
    assert var[OF_KNOWN].any()
    assert var[RELIABLE].equals(var[OF_KNOWN]) == known
    assert record.get("known_sections", []) == (["S1"] if known else [])
    assert record.get("known_patient", False) == known


def as_dask(pixels):
    return Pyramid.single(da.from_array(pixels, chunks=(3, 128, 333)))


def as_zarr(pixels, order):
    # Written by hand: each version has its own codecs.
    array = zarr.create_array(
        zarr.storage.MemoryStore(), shape=pixels.shape, chunks=(1, 256, 64), dtype=pixels.dtype, zarr_format=order
    )
    array[:] = pixels
    return Pyramid.single(array)


@pytest.mark.parametrize(
    ("stored", "factor"),
    [
        (as_dask, 1.0),
        (lambda x: as_zarr(x, 2), 1.0),
        (lambda x: as_zarr(x, 3), 1.0),
        (lambda x: Pyramid((Level(x), Level(x[:, ::2, ::2], 2.0))), 1.0),
        (lambda x: Pyramid.single(np.concatenate([x, np.full_like(x[:1], 255)])), 1.0),
        (lambda x: Pyramid.single(x / np.float32(255)), 255.0),
        (lambda x: Pyramid.single(x.astype(np.float64)), 1.0),
        (lambda x: Pyramid.single(np.asfortranarray(x)), 1.0),
    ],
    ids=["dask", "zarr 2", "zarr 3", "multiscale", "alpha", "0 to 1", "float", "order"],
)
def test_the_hash_is_of_the_pixels_however_they_are_stored(pixels, stored, factor):
    assert pixels_sha256(stored(pixels), factor) == pixels_sha256(Pyramid.single(pixels))


@pytest.mark.parametrize(
    "other", [lambda x: x[:, :, :-1], lambda x: x[:, ::-1], lambda x: x[::-1], lambda x: np.maximum(x, 3)]
)
def test_a_different_image_has_a_different_hash(pixels, other):
    assert pixels_sha256(Pyramid.single(other(pixels))) != pixels_sha256(Pyramid.single(pixels))


def test_slides_of_glass_alone_are_not_recognised(pixels):
    glass = np.full_like(pixels, 240)
    glass[:, ::2] += 2
    assert pixels_sha256(Pyramid.single(glass)) is None
    assert pixels_sha256(Pyramid.single(np.where(np.arange(900) < 450, pixels, glass))) is not None


def test_nan_pixels_far_from_the_spots_do_not_prevent_the_hash(pixels):
    holes = pixels.astype(np.float32)
    holes[:, :300] = np.nan
    assert pixels_sha256(Pyramid.single(holes)) is not None


def test_a_section_of_training_is_a_known_patient_and_the_log_says_so(toy, model, caplog):
    with caplog.at_level(logging.INFO, "he2gene_sc"):
        assert_known(toy, model, known=True)
    assert "the model was trained on the image of section 'S1'" in caplog.text
    for given in (True, False):
        var, record = predicted(toy, model, known_patient=given)
        assert var[RELIABLE].equals(var[OF_KNOWN]) == given
        assert (record["known_patient"], record["known_sections"], record["given"]) == (
            given,
            ["S1"],
            ["known_patient"],
        )


def test_predict_prints_its_summary_below_the_bar(toy, tiny_model, capsys):
    hg.tl.predict(toy, model=tiny_model, show_progress_bar=True)
    printed = capsys.readouterr().err
    assert "predict: 30 spots, 100% on tissue" in printed
    assert re.search(r"; \d+ of 39 predicted genes are reliable on a new patient", printed)
    hg.tl.predict(toy, model=tiny_model, show_progress_bar=False)
    assert not capsys.readouterr().err


def test_without_reliable_genes_the_summary_and_errors_say_what_can_be_done(toy, tiny_model, capsys):
    unreliable = replace(tiny_model, genes=tiny_model.genes.assign(reliable=False, reliable_known_patient=False))
    unreliable.__dict__["network"] = tiny_model.network
    can = r"hg\.tl\.adapt.*hg\.tl\.train.*hg\.tl\.programmes.*known_patient=True"
    for known, patient in (
        (False, "a new patient"),
        (True, "another section of a patient that the model was trained on"),
    ):
        hg.tl.predict(toy, model=unreliable, known_patient=known, show_progress_bar=True)
        assert re.search(
            rf"; 0 of 39 predicted genes are reliable on {patient}\. You can .*{can}", capsys.readouterr().err
        )
    for call in (
        lambda: hg.get.predicted(toy, reliable=True),
        lambda: hg.tl.biomarkers(toy, "pathologist", method="spatial"),
    ):
        with pytest.raises(ValueError, match=f"`reliable.*{can}"):
            call()


def test_the_summary_has_the_verdict_and_training_sections():
    record = {
        "n_spots": {"a": 3, "b": 1000},
        "share_on_tissue": 0.9,
        "verdict": "new",
        "share_out_of_distribution": 0.2,
    }
    assert summary_of(record) == (
        "1,003 spots, 90% on tissue; compared with the training data: new (20% of the spots out of distribution)"
    )
    assert summary_of(record | {"known_sections": ["S1"]}).endswith(
        "; the model was trained on this image (section 'S1'), so metrics are optimistic"
    )
    # As read from a store.
    assert "(section 'S1', 'S2')" in summary_of(record | {"known_sections": np.array(["S1", "S2"], object)})


@pytest.mark.parametrize("known_patient", [None, False])
def test_training_sections_are_recognised_in_comparisons_whatever_their_name(toy, model, known_patient):
    toy["table"].obs["section"], toy["table"].obs["patient"] = "another name", "P9"
    hg.tl.predict(toy, model=model, known_patient=known_patient)
    with pytest.warns(UserWarning, match=r"sections \['S1'\] are in the training set of tiny"):
        hg.tl.evaluate(toy, key_added="judged")
    with pytest.warns(UserWarning, match=r"`data`: sections \['S1'\] are in the training set of tiny"):
        hg.tl.compare(toy, "he2gene")
    # One patient is too few for a test; the warning comes first.
    with pytest.warns(UserWarning, match="the agreement is too high"), contextlib.suppress(ValueError):
        hg.tl.concordance(toy, "pathologist", groups="tumour")
    sets = {"some": toy["table"].var_names[:5].tolist()}
    with pytest.warns(UserWarning, match=r"none is reliable: the model was trained on S1"):
        found = hg.tl.programmes(toy, sets, held_out=toy)
    assert not found["reliable"].any()


def test_a_store_with_other_chunks_and_levels_is_the_same_slide(toy, model, tmp_path):
    image = np.asarray(toy["he"])
    del toy.images["he"]
    toy.images["he"] = Image2DModel.parse(image, dims=("c", "y", "x"), scale_factors=[2], chunks=(3, 100, 90))
    toy.write(tmp_path / "toy.zarr")
    assert_known(sd.read_zarr(tmp_path / "toy.zarr"), model, known=True)


def test_the_slide_of_another_patient_is_not_recognised_as_known(tiny_model, model):
    assert_known(hg.datasets.toy((5, 6), mpp=2.0, seed=1), model, known=False)
    # The same image, but training used another part: an array with tissues of several patients.
    sdata = hg.datasets.toy((5, 6), mpp=2.0)
    (slide,) = resolve(sdata)
    left = slide.centres[slide.centres[:, 0] < np.median(slide.centres[:, 0])]
    assert_known(sdata, trained_on(tiny_model, "S1", slide, left), known=False)


def test_a_table_of_two_slides_is_known_only_if_both_are(model):
    (slide,) = resolve(hg.datasets.toy((5, 6), mpp=2.0))
    (other,) = resolve(hg.datasets.toy((5, 6), mpp=2.0, seed=1))
    assert provenance.training_sections((slide, slide), model.card) == [["S1"], ["S1"]]
    assert provenance.training_sections((slide, other), model.card) == [[], []]


def test_a_region_predicted_later_counts_as_known_only_if_the_others_are(toy, model):
    both, _ = two_regions(toy)
    for region in ("more", "spots"):
        hg.tl.predict(both, model=model, shapes_key=region)
        var, record = both["table"].var, both["table"].uns["he2gene"]
        assert not var[RELIABLE].equals(var[OF_KNOWN])
        assert not record.get("known_patient", False)
        assert "known_sections" not in record
    assert list(record["regions"]["spots"]["known_sections"]) == ["S1"]
    hg.tl.predict(both, model=model, shapes_key="more", known_patient=True)
    assert both["table"].uns["he2gene"]["known_patient"]
    assert both["table"].var[RELIABLE].equals(both["table"].var[OF_KNOWN])


def test_a_model_without_hashes_reads_no_pixels(toy, tiny_model, model):
    (slide,) = resolve(toy)
    wide = replace(slide, pyramid=Pyramid.single(np.zeros((3, 40, 50), np.uint8)))
    with mock.patch.object(provenance, "pixels_sha256", side_effect=AssertionError):
        assert provenance.training_sections((slide,), tiny_model.card) == [[]]
        assert provenance.training_sections((wide,), model.card) == [[]]


def test_the_card_has_the_hash_and_its_display_does_not(model):
    text = model.card.to_json().replace(
        '"files": {}', f'"files": {{"genes.csv": "{"0" * 64}", "weights.safetensors": "{"0" * 64}"}}'
    )
    assert ModelCard.from_json(text, "card.json").training == model.card.training
    sha256 = model.card.training["sections"]["S1"]["image"]["sha256"]
    assert sha256 not in model.card.to_markdown()
    with pytest.raises(ValueError, match=r"`training.sections.S1.image` is not valid: `sha256`"):
        ModelCard.from_json(text.replace(sha256, "none"), "card.json")


@pytest.mark.parametrize(
    ("record", "same"),
    [
        ({}, {None, False}),
        ({"known_patient": False}, {False}),
        ({"known_patient": np.True_}, {True}),
        ({"known_patient": True, "known_sections": ["S1"]}, {None}),
        ({"known_patient": False, "known_sections": ["S1"], "given": ["known_patient"]}, {False}),
    ],
)
def test_a_finished_slide_must_have_the_same_known_patient(record, same):
    assert {asked for asked in (None, False, True) if _same_patient(record, asked)} == same


@pytest.mark.data
def test_the_bundled_model_knows_its_sections_and_no_other_of_their_patients(her2st):
    card = hg.models.load().card
    assert all(set(facts["image"]) == {"shape", "sha256", "spots"} for facts in card.training["sections"].values())
    assert provenance.training_sections(resolve(her2st("A1")), card) == [["A1"]]
    assert provenance.training_sections(resolve(her2st("C5")), card) == [[]]
