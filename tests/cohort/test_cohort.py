"""`hg.cohort.predict`: results of many slides, repeated runs, and errors before work."""

import contextlib
import json
import os
import re
import shutil
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import dask
import numpy as np
import pandas as pd
import pytest
import spatialdata as sd
from PIL import Image

import he2gene_sc as hg
from he2gene_sc.cli import app as cli
from he2gene_sc.cohort import _predict as cohort
from he2gene_sc.cohort import _slide
from he2gene_sc.cohort._cluster import workers_here
from he2gene_sc.cohort._job import Job, find_finished, output_of, slide_summary
from he2gene_sc.cohort._manifest import read_jobs
from he2gene_sc.cohort._slide import predict_slide
from he2gene_sc.io._store import locked

pytestmark = pytest.mark.slow

COLUMNS = [
    *("path", "output", "patient", "status", "spots", "mpp", "share_on_tissue", "share_like_training"),
    *("share_annotated", "verdict", "known_sections", "seconds", "warnings", "error"),
]


@pytest.fixture(scope="module")
def client():
    """Client of a worker in this process."""
    from distributed import Client

    # Disable the profiler of dask, which would take most of the time.
    quiet = dask.config.set({"distributed.worker.profile.enabled": False})
    with quiet, Client(processes=False, n_workers=1, threads_per_worker=1, dashboard_address=None) as found:
        yield found


@pytest.fixture(scope="module")
def folder(tiny_model, tmp_path_factory):
    place = tmp_path_factory.mktemp("model") / "tiny"
    tiny_model.save(place)
    return place


@pytest.fixture(scope="module")
def model(tiny_model, folder):
    spec = hg.models.EncoderSpec("tiny", "tiny", "BSD-3-Clause", False, 32, None, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    return hg.models.load(folder, encoder=(tiny_model.network.extractor.encoder, spec))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    place = tmp_path_factory.mktemp("slides") / "slides"
    place.mkdir()
    for name, seed in (("A", 0), ("B", 1)):
        hg.datasets.toy((2, 3), mpp=4.0, seed=seed).write(place / f"{name}.zarr")
    pixels = hg.datasets.toy((2, 3), mpp=4.0)["he"].transpose("y", "x", "c").to_numpy()
    Image.fromarray(pixels).save(place / "C.png")
    (place / "D.tif").write_bytes(b"II*\0cut")
    (place / "slides.csv").write_text("path,mpp,patient\nA.zarr,,\nD.tif,1,\nC.png,4,P1\nB.zarr,,toy\n")
    return place


@pytest.fixture
def slides(made, tmp_path):
    """Two stores, an image, and a damaged image."""
    return Path(shutil.copytree(made, tmp_path / "slides"))


@pytest.fixture
def counted(monkeypatch):
    """Collect the names of the slides that are predicted."""
    names = []

    def predict(job, model, before=cohort.predict_slide):
        names.append(job.path.name)
        return before(job, model)

    monkeypatch.setattr(cohort, "predict_slide", predict)
    return names


def is_finished(job, model):
    return find_finished(job, model) is not None


def files(*stores):
    return {path: path.stat().st_mtime_ns for store in stores for path in store.rglob("*") if path.is_file()}


def test_a_manifest_with_a_damaged_slide_and_repeated_runs(made, slides, model, client, counted):
    manifest, summary = slides / "slides.csv", slides / "summary.csv"
    frame = hg.cohort.predict(manifest, client, model=model, pitch_um=200, summary=summary)
    assert list(frame.columns) == COLUMNS
    assert frame["status"].tolist() == ["predicted", "failed", "predicted", "predicted"]
    assert frame["spots"].tolist()[::3] == [6, 6]
    assert frame.loc[2, "output"] == str(slides / "C.zarr")
    assert "`path` 'D.tif' is not a TIFF file" in frame.loc[1, "error"]
    assert (frame.loc[[0, 2, 3], "seconds"] > 0).all()
    assert (frame.loc[[0, 2, 3], "mpp"] == 4).all()
    assert pd.read_csv(summary, keep_default_na=False)["status"].tolist() == frame["status"].tolist()
    alone = hg.datasets.toy((2, 3), mpp=4.0, seed=1)
    hg.tl.predict(alone, model=model)
    np.testing.assert_array_equal(
        sd.read_zarr(slides / "B.zarr")["table"].layers["he2gene"], alone["table"].layers["he2gene"]
    )
    assert (sd.read_zarr(slides / "C.zarr")["table"].obs["patient"] == "P1").all()
    # In a second run, files of finished slides do not change, and missing slides are predicted.
    before = files(slides / "A.zarr", slides / "C.zarr")
    shutil.rmtree(slides / "B.zarr")
    shutil.copytree(made / "B.zarr", slides / "B.zarr")
    counted.clear()
    again = hg.cohort.predict(manifest, client, model=model, pitch_um=200)
    assert again["status"].tolist() == ["skipped", "failed", "skipped", "predicted"]
    assert sorted(counted) == ["B.zarr", "D.tif"]
    assert files(slides / "A.zarr", slides / "C.zarr") == before
    assert again.loc[2, "spots"] == frame.loc[2, "spots"]


@pytest.mark.parametrize(
    ("asked", "repeated"),
    [
        ({}, False),
        ({"batch_size": 2}, False),
        ({"mpp": 4.0}, False),
        ({"image_key": "he", "shapes_key": "spots", "table_key": "table", "dtype": "auto"}, False),
        ({"genes": ["ERBB2", "CD24"]}, True),
        ({"genes": "all"}, True),
        ({"known_patient": True}, True),
        ({"exact": False}, False),
        ({"exact": True}, True),
        ({"lattice": 0.5}, True),
        ({"mpp": 3.9}, True),
        ({"tta": True}, True),
        ({"key_added": "second"}, True),
        ({"layer": "other"}, True),
        ({"overwrite": True}, True),
        ({"patient": "somebody else"}, True),
    ],
)
def test_a_slide_is_finished_only_with_the_same_parameters(finished, model, asked, repeated):
    labels = {name: asked[name] for name in asked if name == "patient"}
    options = {name: asked[name] for name in asked if name not in ("patient", "overwrite")}
    job = Job(finished, finished, options, labels, overwrite=asked.get("overwrite", False))
    assert is_finished(job, model) is not repeated


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory):
    """Predicted store of an image beside it."""
    place = tmp_path_factory.mktemp("finished")
    (place / "slide.tif").write_bytes(b"x")
    sdata = hg.datasets.toy((2, 2), mpp=4.0)
    hg.tl.predict(sdata, model=model)
    source = Job(place / "slide.tif", place / "A.zarr").source
    sdata.attrs["he2gene"] = {**sdata.attrs["he2gene"], "source": source}
    sdata.write(place / "A.zarr")
    return place / "A.zarr"


def test_a_slide_of_another_model_or_another_file_is_not_finished(finished, model, tiny_model):
    of_image = Job(finished.parent / "slide.tif", finished)
    assert is_finished(of_image, model)
    other = replace(model, card=replace(model.card, files={**model.card.files, "weights.safetensors": "0" * 64}))
    assert not is_finished(of_image, other)
    assert not is_finished(of_image, tiny_model)  # a model that was never saved cannot be identified
    assert not is_finished(replace(of_image, pitch_um=50), model)
    scan = of_image.path.stat()
    os.utime(of_image.path, ns=(scan.st_atime_ns, scan.st_mtime_ns + 1))
    assert not is_finished(of_image, model)


def _other_pixels(store):
    import zarr

    group = zarr.open_group(store / "images" / "he", mode="r+", use_consolidated=False)
    array = next(array for _, array in group.arrays())
    array[...] = 255 - np.asarray(array[...])


def _older_image(store):
    shutil.copytree(store / "images" / "he", store / "copy")
    shutil.rmtree(store / "images" / "he")
    shutil.move(store / "copy", store / "images" / "he")
    for path in (store / "images" / "he").rglob("*"):
        os.utime(path, (1e9, 1e9))


def _moved_spots(store):
    (store / "shapes" / "spots" / "shapes.parquet").write_bytes(b"other spots")


@pytest.fixture(scope="module")
def updated(made, model, tmp_path_factory):
    """Store that was predicted in place, as in a cohort."""
    store = Path(shutil.copytree(made / "A.zarr", tmp_path_factory.mktemp("updated") / "A.zarr")).resolve()
    predict_slide(Job(store, store), model)
    return store


@pytest.mark.parametrize("change", [_other_pixels, _older_image, _moved_spots])
def test_a_store_with_replaced_image_or_spots_is_predicted_again(updated, model, tmp_path, change):
    store = Path(shutil.copytree(updated, tmp_path / "A.zarr"))
    slide = Job(store, store)
    assert is_finished(slide, model)
    change(store)
    assert not is_finished(slide, model)


def test_a_newer_image_is_detected_without_a_record_of_the_files(finished, model, tmp_path):
    store = Path(shutil.copytree(finished, tmp_path / "A.zarr"))
    assert is_finished(Job(store, store), model)
    _other_pixels(store)
    assert not is_finished(Job(store, store), model)


@pytest.mark.parametrize("part", ["layers/he2gene", "obs/he2gene_tissue", "obsm/X_he2gene", "var/_index"])
@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_a_prediction_with_a_missing_part_is_not_finished(updated, model, tmp_path, part, damage):
    store = Path(shutil.copytree(updated, tmp_path / "A.zarr"))
    place = store / "tables" / "table" / part
    if damage == "gone":
        shutil.rmtree(place)
    else:
        for path in (path for path in place.rglob("*") if path.is_file() and path.name != "zarr.json"):
            path.write_bytes(path.read_bytes()[:-2])
    assert not is_finished(Job(store, store), model)


def test_a_record_with_a_missing_entry_does_not_stop_the_cohort(updated, model, client, tmp_path, counted):
    store = Path(shutil.copytree(updated, tmp_path / "A.zarr"))
    shutil.rmtree(store / "tables" / "table" / "uns" / "he2gene" / "n_spots")
    frame = hg.cohort.predict([store], client, model=model)
    assert counted == ["A.zarr"]
    assert frame["status"].tolist() == ["predicted"], frame["error"][0]


@pytest.mark.parametrize(("name", "same"), [("A.zarr", True), ("C.png", True), ("C.png", False)])
def test_of_two_cohorts_on_one_slide_at_the_same_time_the_slower_loses_nothing(
    slides, model, client, name, same, monkeypatch
):
    job = Job(slides / name, output_of(slides / name), {"mpp": 4.0}, pitch_um=200)
    other = job if same else replace(job, pitch_um=150)
    saved, save = {}, hg.io.save

    def after_another(sdata, path, **options):
        monkeypatch.setattr(hg.io, "save", save)
        saved.update(files(predict_slide(other, model)))  # the other cohort, which is faster
        return save(sdata, path, **options)

    monkeypatch.setattr(hg.io, "save", after_another)
    given = {"model": model, "mpp": 4.0, "pitch_um": 200}
    row = hg.cohort.predict([slides / name], client, **given).loc[0]
    assert files(job.output) == saved
    place = slides / f"{name[0]}-he2gene-1.zarr"
    if same:
        assert row["status"] == "predicted"
        assert not place.exists()
        assert hg.cohort.predict([slides / name], client, **given).loc[0, "status"] == "skipped"
    else:
        assert row["status"] == "failed"
        assert "is another store; choose another path" in row["error"]
        assert f"The prediction is in {str(place)!r}, without the image" in row["error"]
        assert "he2gene" in sd.read_zarr(place)["table"].layers


def test_a_slide_whose_store_another_process_writes_is_saved_after_that(slides, model, monkeypatch):
    store, waited = slides / "A.zarr", []

    with contextlib.ExitStack() as other:
        other.enter_context(locked(store))
        monkeypatch.setattr(_slide.time, "sleep", lambda seconds: (waited.append(seconds), other.close()))
        predict_slide(Job(store, store), model)
        monkeypatch.setattr(_slide, "_LONGEST_WAIT_S", -1)
        other.enter_context(locked(store))
        with pytest.raises(BlockingIOError, match="another process is saving to the store"):
            predict_slide(Job(store, store), model)
    assert waited == [1]
    assert is_finished(Job(store, store), model)


def test_a_slide_that_another_process_finished_meanwhile_is_skipped(slides, model, client, monkeypatch):
    def after_another(job, model, before=cohort.predict_slide):
        before(job, model)
        return before(job, model)  # the store of the image exists by now

    monkeypatch.setattr(cohort, "predict_slide", after_another)
    row = hg.cohort.predict([slides / "C.png"], client, model=model, mpp=4.0, pitch_um=200).loc[0]
    assert (row["status"], row["spots"], row["error"]) == ("skipped", 4, "")


def test_a_store_of_a_slide_detects_changed_pixels(made, tmp_path):
    store = Path(shutil.copytree(made / "A.zarr", tmp_path / "A.zarr"))
    before = Job(store, tmp_path / "B.zarr").source
    assert Job(store, tmp_path / "B.zarr").source == before
    _other_pixels(store)
    assert Job(store, tmp_path / "B.zarr").source != before


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("A.svs", "pixels", "ends in '.svs'; a table to write is needed"),
        ("summary", None, "ends in ''; a table to write is needed"),
        ("slides.csv", "path,output,patient\nA.svs,,P1\n", "is the manifest, or a slide"),
        ("clinic.csv", "path,output,patient,age\nA.svs,,P1,50\n", "exists and is not a summary of slides"),
        ("clinic.tsv", ",".join(COLUMNS), "exists and is not a summary of slides"),
    ],
)
def test_a_summary_does_not_replace_other_files(tmp_path, monkeypatch, name, content, message):
    monkeypatch.setattr(cohort, "_load", lambda _: pytest.fail("work was begun"))
    (tmp_path / "slides.csv").write_text("path\nA.svs\n")
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        hg.cohort.predict(tmp_path / "slides.csv", summary=tmp_path / name)
    assert content is None or (tmp_path / name).read_text() == content


def test_a_summary_of_an_earlier_version_may_be_replaced(tmp_path):
    path = tmp_path / "summary.csv"
    for columns in (COLUMNS, [name for name in COLUMNS if name not in ("patient", "known_sections")]):
        path.write_text(",".join(columns) + "\n")
        assert cohort._is_summary(path)
    path.write_text(",".join(name for name in COLUMNS if name != "verdict") + "\n")
    assert not cohort._is_summary(path)


@pytest.mark.parametrize("patient", [1.0, "1", " 1 ", np.float64(1)])
def test_patients_of_a_manifest_are_cleaned(tmp_path, patient):
    given = {"output_dir": None, "keep_images": True, "overwrite": False}
    frame = pd.DataFrame({"path": ["a.svs", "b.svs"], "patient": [patient, np.nan]})
    jobs, _ = read_jobs(frame, {"mpp": 1.0}, **given)
    assert [job.labels for job in jobs] == [{"patient": "1"}, {}]
    with pytest.raises(ValueError, match="row 0: `patient` holds 'None', which is a missing value"):
        read_jobs(frame.assign(patient="None"), {"mpp": 1.0}, **given)


@pytest.mark.parametrize("labels", [{}, {"patient": "P1"}, {"section": "S", "patient": "P1"}])
@pytest.mark.parametrize("name", ["s.csv", "s.TSV"])
def test_an_empty_file_and_a_summary_of_an_earlier_run_are_replaced(tmp_path, name, labels):
    jobs = [Job(tmp_path / "A.svs", tmp_path / "A.zarr", labels=labels)]
    (tmp_path / name).touch()
    for _ in range(2):
        table = cohort._Summary(jobs, tmp_path / name)
        table.check_place([])
        table.write()
    assert len(pd.read_csv(tmp_path / name, sep=None, engine="python").columns) == len(table.frame().columns)


def test_slides_of_the_same_name_in_two_folders_are_different(finished, model, tmp_path):
    slides = [tmp_path / patient / "slide.zarr" for patient in ("P1", "P2")]
    for slide in slides:
        shutil.copytree(finished, slide)
    first, second = (Job(slide, tmp_path / "out.zarr") for slide in slides)
    sdata = sd.read_zarr(finished)
    sdata.attrs["he2gene"] = {**sdata.attrs["he2gene"], "source": first.source}
    sdata.write(first.output)
    assert is_finished(first, model)
    assert not is_finished(second, model)
    (first.path / "shapes" / "spots" / "shapes.parquet").write_bytes(b"other spots")
    assert not is_finished(first, model)


@pytest.mark.parametrize(
    "given",
    [{"mpp": 4.0}, {"image_key": "he"}, {"shapes_key": "spots"}, {"coordinate_system": "global"}, {"dtype": "float32"}],
)
def test_a_removed_argument_repeats_the_slide(model, tmp_path, given):
    sdata = hg.datasets.toy((2, 2), mpp=4.0)
    hg.tl.predict(sdata, model=model, device="cpu", **given)
    sdata.write(tmp_path / "A.zarr")
    slide = Job(tmp_path / "A.zarr", (tmp_path / "A.zarr").resolve())
    assert is_finished(replace(slide, options=given), model)
    assert not is_finished(slide, model)


def test_features_in_obsm_are_used_with_their_own_options(model, tmp_path):
    sdata = hg.datasets.toy((2, 2), mpp=4.0)
    hg.tl.embed(sdata, model=model, tta=True, key_added="kept")
    hg.tl.predict(sdata, model=model, features="X_kept")
    sdata.write(tmp_path / "A.zarr")
    slide = Job(tmp_path / "A.zarr", (tmp_path / "A.zarr").resolve())
    assert is_finished(replace(slide, options={"features": "X_kept"}), model)
    assert not is_finished(replace(slide, options={"tta": True}), model)
    hg.tl.embed(sdata, model=model, tta=False, key_added="kept")
    sdata.write(tmp_path / "B.zarr")
    again = Job(tmp_path / "B.zarr", (tmp_path / "B.zarr").resolve(), {"features": "X_kept"})
    assert not is_finished(again, model)


def test_an_interrupted_run_keeps_finished_slides_and_can_be_resumed(slides, model, client, counted, monkeypatch):
    predict, stopped, summary = cohort.predict_slide, threading.Event(), slides / "summary.csv"

    def finished():
        # The file is being written.
        with contextlib.suppress(OSError, ValueError):
            return "predicted" in pd.read_csv(summary)["status"].tolist()

    def until_interrupted(job, model):
        if not finished() and not first:
            first.append(job.path)
            return predict(job, model)
        while not finished():
            time.sleep(0.05)
        # Python ignores a Ctrl-C during a finaliser, so send it again.
        for _ in range(3):
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            if stopped.wait(20):
                break
        raise ValueError("interrupted")

    first = []
    monkeypatch.setattr(cohort, "predict_slide", until_interrupted)
    given = [slides / "A.zarr", slides / "B.zarr"]
    with pytest.raises(KeyboardInterrupt):
        hg.cohort.predict(given, client, model=model, summary=summary)
    stopped.set()
    monkeypatch.setattr(cohort, "predict_slide", predict)
    found = pd.read_csv(summary)
    assert sorted(found["status"]) == ["not run", "predicted"]
    assert "he2gene" in sd.read_zarr(first[0])["table"].layers
    counted.clear()
    frame = hg.cohort.predict(given, client, model=model)
    assert sorted(frame["status"]) == ["predicted", "skipped"]
    assert counted == [path.name for path in given if path != first[0]]


def test_a_slide_whose_worker_is_killed_is_predicted_by_another(tmp_path, model):
    import torch

    class Deadly(torch.nn.Sequential):
        def forward(self, images):
            if not marker.exists():
                marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return super().forward(images)

    marker = tmp_path / "killed"
    encoder, spec = model.encoder
    hg.datasets.toy((2, 3), mpp=4.0).write(tmp_path / "A.zarr")
    frame = hg.cohort.predict(
        [tmp_path / "A.zarr"], n_workers=1, model=replace(model, encoder=(Deadly(*encoder), spec))
    )
    assert marker.exists()
    assert frame["status"].tolist() == ["predicted"], frame["error"][0]
    assert "he2gene" in sd.read_zarr(tmp_path / "A.zarr")["table"].layers


def test_a_slide_that_kills_workers_is_tried_alone_without_limits(monkeypatch):
    from contextlib import contextmanager

    started = []

    @contextmanager
    def local_client(environments, *, alone=False):
        started.append((len(environments), alone))
        yield

    def results(_, todo, killed=None):
        for number in todo:
            if killed is not None and number == 1:
                killed.append(number)
            else:
                yield number, {}

    monkeypatch.setattr(cohort, "local_client", local_client)
    monkeypatch.setattr(cohort, "_results", results)
    assert [number for number, _ in cohort._predicted(None, dict.fromkeys(range(3)), 2, "cpu")] == [0, 2, 1]
    assert started == [(2, False), (1, True)]


def test_local_workers_are_not_planned_beside_a_client(monkeypatch):
    monkeypatch.setattr(cohort, "workers_here", lambda *_: pytest.fail("local GPUs were counted"))
    monkeypatch.setattr(cohort, "_results", lambda client, todo, killed=None: iter([(client, todo)]))
    assert list(cohort._predicted("client", {0: None}, None, "auto")) == [("client", {0: None})]


@pytest.mark.parametrize(
    ("n_slides", "n_workers", "threads"), [(8, 2, "4"), (1, None, "8"), (8, 8, "1"), (20, 16, "1")]
)
def test_workers_share_the_cores(monkeypatch, n_slides, n_workers, threads):
    monkeypatch.setattr("dask.system.CPU_COUNT", 8)
    found = workers_here(n_slides, n_workers, "cpu")
    assert len(found) == min(n_slides, n_workers or 1)
    assert {worker[name] for worker in found for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS")} == {threads}


def test_the_summary_is_of_the_requested_table(finished, model, tmp_path):
    sdata = sd.read_zarr(finished)
    sdata["another"] = sdata["table"][:3].copy()
    record = {**sdata["another"].uns["he2gene"], "n_spots": 3, "known_sections": ["S1", "S2"]}
    sdata["another"].uns["he2gene"] = record
    sdata.write(tmp_path / "A.zarr")
    slide = Job(tmp_path / "A.zarr", (tmp_path / "A.zarr").resolve())
    found = {name: slide_summary(replace(slide, options={"table_key": name}), model) for name in ("another", "table")}
    assert {name: (row["spots"], row["known_sections"]) for name, row in found.items()} == {
        "another": (3, "S1, S2"),
        "table": (4, ""),
    }


@pytest.mark.parametrize(
    ("paths", "options", "error", "message"),
    [
        (["A.svs", "A.tif"], {}, ValueError, "would both be written to"),
        (["A.zarr", "A.zarr"], {}, ValueError, "would both be written to"),
        (["x/A.svs", "y/A.svs"], {"output_dir": "out"}, ValueError, "would both be written to"),
        ([], {}, ValueError, "`paths` names no slide"),
        (3, {}, TypeError, "`paths` is of type int"),
        (["A.zarr"], {"client": "tcp://host:1"}, TypeError, "`client` is of type str; a distributed.Client is needed"),
        (["A.zarr"], {"n_workers": 0}, ValueError, "`n_workers` is 0; a whole number from 1"),
        (["A.zarr"], {"imagekey": "he"}, ValueError, "near 'imagekey': ['image_key'"),
        (["A.zarr"], {"tta": "yes"}, ValueError, "`tta` is 'yes'; True or False"),
        (["A.zarr"], {"summary": "no/such/folder.csv"}, ValueError, "`summary`"),
        (pd.DataFrame({"slide": ["A.svs"]}), {}, ValueError, "lacks the column `path`"),
        (pd.DataFrame({"path": ["A.svs"], "mmp": [0.5]}), {}, ValueError, "'mmp' is not among the columns"),
        (pd.DataFrame({"path": ["A.svs", None]}), {}, ValueError, "row 1: `path` is empty"),
        (pd.DataFrame({"path": ["A.svs"], "tta": ["maybe"]}), {}, ValueError, "row 0: `tta` is 'maybe'"),
        (pd.DataFrame({"path": ["A.svs"], "batch_size": [2.5]}), {}, ValueError, "row 0: `batch_size` is 2.5"),
        (["A.zarr"], {"output": "x.zarr"}, ValueError, "`output` is 'x.zarr' for all slides, but belongs to one slide"),
        (["A.zarr"], {"pitch_um": -5}, ValueError, "`pitch_um` is -5; a number above 0"),
        (["A.zarr"], {"device": "gpu9"}, ValueError, "`device` 'gpu9' is unknown"),
        (["A.zarr"], {"mpp": float("nan")}, ValueError, "`mpp` is nan"),
        (
            pd.DataFrame({"path": ["A.svs"], "tissue_method": ["foo"]}),
            {},
            ValueError,
            "row 0: `tissue_method` is 'foo'",
        ),
        (pd.DataFrame({"path": ["A.svs"], "lattice": [7.0]}), {}, ValueError, "row 0: `lattice` is 7.0"),
        (pd.DataFrame({"path": ["A.svs"], "dtype": ["foo"]}), {}, ValueError, "row 0: `dtype` 'foo' is unknown"),
        (pd.DataFrame({"path": ["A.svs"], "mpp": [-1.0]}), {}, ValueError, "row 0: `mpp` is -1.0"),
        (pd.DataFrame({"path": ["A.svs"], "mpp": ["nan"]}), {}, ValueError, "row 0: `mpp` is nan"),
        (pd.DataFrame({"path": ["A.svs"], "batch_size": [0]}), {}, ValueError, "row 0: `batch_size` is 0"),
        (
            pd.DataFrame({"path": ["A.svs", "A.zarr"], "output": ["A.zarr", "B.zarr"]}),
            {},
            ValueError,
            "is also a slide",
        ),
    ],
)
def test_invalid_arguments_are_refused_before_any_work(monkeypatch, tmp_path, paths, options, error, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cohort, "local_client", lambda _: pytest.fail("a cluster was started"))
    with pytest.raises(error) as refused:
        hg.cohort.predict(paths, **options)
    assert message in str(refused.value)


def test_cells_of_a_manifest_are_converted_to_the_types_of_their_arguments(tmp_path):
    (tmp_path / "m.csv").write_text(
        "﻿path,output,mpp,tta,genes,batch_size,patient,pitch_um,model\n"
        "a.svs,out/a.zarr,0.5,TRUE,ERBB2; CD24,8,07,50,\nb.zarr,,,,all,,,,other\n",
        encoding="utf-8",
    )
    jobs, models = read_jobs(tmp_path / "m.csv", {"mpp": 1.0}, output_dir=None, keep_images=True, overwrite=False)
    a, b = jobs
    assert a.options == {"mpp": 0.5, "tta": True, "genes": ["ERBB2", "CD24"], "batch_size": 8}
    assert (a.path, a.output, a.labels, a.pitch_um) == (
        tmp_path / "a.svs",
        (tmp_path / "out" / "a.zarr").resolve(),
        {"patient": "07"},
        50.0,
    )
    assert b.options == {"mpp": 1.0, "genes": "all"}
    assert models == ["breast-her2st", "other"]


GIVEN = {"output_dir": None, "keep_images": True, "overwrite": False}


@pytest.mark.parametrize(
    "content",
    [
        "\ufeffpath,mpp\nA.svs,4\n",
        "path,mpp\r\nA.svs,4\r\n",
        "path,mpp\rA.svs,4\r",
        " path , mpp \n A.svs ,\t4\u00a0\n",
        "\npath,mpp,,\n,,,\n  \nA.svs,4,,\n,,,\n",
        '"path","mpp","image_key"\n"A.svs",4\n',
        "path,mpp,batch_size\nA.svs,4.0,\n".encode("utf-16"),
    ],
)
def test_a_manifest_is_read_as_spreadsheets_write_it(tmp_path, content):
    (tmp_path / "m.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    (job,), _ = read_jobs(tmp_path / "m.csv", {}, **GIVEN)
    assert (job.path, job.options) == (tmp_path / "A.svs", {"mpp": 4.0})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "m.csv is empty"),
        ("path\n", "names no slide"),
        (
            "path,mpp\nA.svs,0,5\n",
            "line 2: 3 cells, but the header has 2; quote texts that contain ',', and write decimal",
        ),
        ("path,mpp\n\nx,A.svs,0.5\n", "line 3: 3 cells"),
        ("path,mpp,\nA.svs,1,note\n", "a column without a name"),
        ("path;mpp\nA.svs;1\n", "seem to be separated by ';', ',' is needed"),
        ("Path,mpp\nA.svs,1\n", "near 'path': ['Path']"),
        ('path,mpp\n\nA.svs,"0,5"\n', "line 3: `mpp` is '0,5'; a number, with a decimal point is needed"),
        ("path,mpp\nA.svs,0_5\n", "line 2: `mpp` is '0_5'"),
        ("path,batch_size\nA.svs,1_0\n", "line 2: `batch_size` is '1_0'"),
        ("path,batch_size\nA.svs,1.5\n", "`batch_size` is '1.5'; a whole number is needed"),
        ("path,patient\nA.svs,P1\nB.svs,p1\n", "differ only in case or blanks; spell them alike"),
        ("path,output\nA.svs,o.zarr\nB.svs,o.zarr/images/b.zarr\n", "which is also a slide or an output"),
        ("path,output\no.zarr/A.svs,o.zarr\n", "which is also a slide or an output"),
        ("path\nA\0.svs\n", "is not a text"),
        (f"path\n{'a' * 300}.svs\n", "is not a path that can be opened"),
        (b"PK\x03\x04\x80", "save it as 'CSV UTF-8"),
        (b"path,patient\nA.svs,M\xfcller\n", "save it as 'CSV UTF-8"),
        ('path\n"A.svs\n', "unexpected end of data"),
    ],
)
def test_an_ambiguous_manifest_is_refused(tmp_path, content, message):
    (tmp_path / "m.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=re.escape(message)):
        read_jobs(tmp_path / "m.csv", {}, **GIVEN)


@pytest.mark.parametrize("name", ["m.xlsx", "m.txt", "m"])
def test_a_table_in_another_format_is_not_read_as_a_slide(tmp_path, name):
    (tmp_path / name).write_text("path\nA.svs\n")
    with pytest.raises(ValueError, match=r"or a manifest \(\.csv, \.tsv\) is needed"):
        read_jobs(tmp_path / name, {}, **GIVEN)


def test_integers_in_a_column_with_gaps_stay_integers(tmp_path):
    frame = pd.DataFrame({"path": ["a.svs", "b.svs"], "batch_size": [8.0, np.nan]})
    jobs, _ = read_jobs(frame, {}, **GIVEN)
    assert [job.options for job in jobs] == [{"batch_size": 8}, {}]
    assert isinstance(jobs[0].options["batch_size"], int)


@pytest.mark.parametrize("make", [np.array, pd.Index])
def test_genes_of_any_type_become_a_list(make):
    jobs, _ = read_jobs(["a.svs"], {"genes": make(["CD24", "FASN"])}, **GIVEN)
    assert jobs[0].options == {"genes": ["CD24", "FASN"]}
    assert isinstance(jobs[0].options["genes"], list)


def test_blanks_in_a_listed_path_are_part_of_the_file_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (" q.svs", "q.svs"):
        (tmp_path / name).write_bytes(b"x")
    jobs, _ = read_jobs([" q.svs", "q.svs"], {}, **GIVEN)
    assert [job.path.name for job in jobs] == [" q.svs", "q.svs"]


def test_a_slide_that_is_listed_twice_is_warned_of(tmp_path):
    (tmp_path / "A.svs").write_bytes(b"x")
    (tmp_path / "link.svs").symlink_to("A.svs")
    slides = [tmp_path / "A.svs", tmp_path / "link.svs"]
    with pytest.warns(UserWarning, match="are the same slide: it is predicted twice"):
        read_jobs(slides, {}, **GIVEN)
    # Two models for one slide are allowed.
    frame = pd.DataFrame({"path": slides, "model": ["breast-her2st", "other"]})
    read_jobs(frame, {}, **GIVEN)
    (tmp_path / "a.csv").write_text("path,output,model\nA.svs,1.zarr,breast-her2st\nA.svs,2.zarr,breast-her2st\n")
    with pytest.warns(UserWarning, match="are the same slide: it is predicted twice"):
        read_jobs(tmp_path / "a.csv", {}, **GIVEN)


@pytest.mark.parametrize("folder", ["file", "file/out", "A.zarr/tables"])
def test_the_folder_for_stores_has_to_be_a_folder(tmp_path, folder):
    (tmp_path / "file").write_text("x")
    (tmp_path / "A.zarr").mkdir()
    (tmp_path / "A.zarr" / "zarr.json").write_text("{}")
    with pytest.raises(ValueError, match="`output_dir` .* name another folder"):
        read_jobs(["a.svs"], {}, **{**GIVEN, "output_dir": tmp_path / folder})


def test_a_summary_that_cannot_be_written_does_not_stop_the_slides(tmp_path):
    (tmp_path / "place").mkdir()
    table = cohort._Summary([Job(tmp_path / "A.svs", tmp_path / "A.zarr")], tmp_path / "place" / "s.csv")
    table.begin()
    shutil.rmtree(tmp_path / "place")
    with pytest.warns(UserWarning, match=r"`summary` .* cannot be written any more"):
        table.add(0, {"status": "predicted"})
    assert table.frame()["status"].tolist() == ["predicted"]
    with pytest.raises(OSError, match=r"`summary` .* cannot be written"):
        table.begin()


def test_a_summary_in_a_store_is_refused(made, tmp_path):
    table = cohort._Summary([Job(tmp_path / "A.svs", tmp_path / "A.zarr")], made / "A.zarr" / "s.csv")
    with pytest.raises(ValueError, match="lies in the store"):
        table.check_place([])


def test_folders_in_a_manifest_lie_relative_to_it(tmp_path):
    place = tmp_path / "study"
    (place / "mine").mkdir(parents=True)
    (place / "m.csv").write_text(
        "path,model,features\na.svs,models/own,./kept\nb.svs,mine,X_he2gene_features\nc.svs,breast-her2st,/abs/kept\n"
    )
    jobs, models = read_jobs(place / "m.csv", {}, output_dir=None, keep_images=True, overwrite=False)
    assert models == [place / "models" / "own", place / "mine", "breast-her2st"]
    assert [job.options["features"] for job in jobs] == [place / "kept", "X_he2gene_features", Path("/abs/kept")]


def test_devices_of_a_client_are_not_checked_on_this_machine(tmp_path):
    given = {"output_dir": None, "keep_images": True, "overwrite": False, "is_local": False}
    read_jobs([tmp_path / "a.svs"], {"device": "cuda:7", "dtype": "float16"}, **given)
    with pytest.raises(ValueError, match="`device` 'gpu9' is unknown"):
        read_jobs([tmp_path / "a.svs"], {"device": "gpu9"}, **given)


def test_a_patient_that_the_table_contradicts_fails_the_slide(slides, model, client):
    frame = hg.cohort.predict(pd.DataFrame({"path": [slides / "A.zarr"], "patient": ["other"]}), client, model=model)
    assert "`patient` is 'other', but obs['patient'] of table 'table' has 'toy'" in frame.loc[0, "error"]


# ----------------------------------------------------------------------------------------- command line


@pytest.fixture
def shell(monkeypatch, capsys, client):
    """Run the console script on the worker of this process; return exit code, stdout and stderr."""
    from contextlib import nullcontext

    monkeypatch.setattr(cohort, "local_client", lambda _: nullcontext(client))

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["he2gene", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        captured = capsys.readouterr()
        return stopped.value.code or 0, captured.out, captured.err

    return call


@pytest.fixture
def bundled(monkeypatch, model):
    """Use the small model under the name of the bundled one."""
    monkeypatch.setattr("he2gene_sc.models.load", lambda *_, **__: model)


def test_the_shell_predicts_many_slides_and_names_failed_ones(shell, slides, bundled):
    code, out, err = shell("predict", slides / "A.zarr", slides / "D.tif", "--summary", slides / "s.csv")
    assert code == 1
    assert f"Written: {slides / 'A.zarr'}" in out
    assert "2 slides: 1 predicted, 1 failed" in out
    assert f"he2gene: {slides / 'D.tif'}: ValueError: `path` 'D.tif' is not a TIFF file" in err
    assert pd.read_csv(slides / "s.csv")["status"].tolist() == ["predicted", "failed"]
    code, out, _ = shell("predict", slides / "A.zarr", slides / "B.zarr", "--json")
    assert code == 0
    assert [row["status"] for row in json.loads(out)] == ["skipped", "predicted"]


def test_the_shell_passes_options_on_to_predict(shell, slides, bundled):
    given = ("--genes", "ERBB2,CD24", "--key-added", "two", "--coordinate-system", "global", "--batch-size", 3)
    code, out, _ = shell("predict", slides / "A.zarr", *given, "--json")
    assert code == 0
    (row,) = json.loads(out)
    assert (row["status"], row["spots"], row["output"]) == ("predicted", 6, str(slides / "A.zarr"))
    table = sd.read_zarr(slides / "A.zarr")["table"]
    assert table.var["two_predicted"].sum() == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "either PATHS or --manifest is needed"),
        (("A.zarr", "--manifest", "m.csv"), "either PATHS or --manifest is needed"),
        (("A.zarr", "B.zarr", "--out", "C.zarr"), "--out is for one slide"),
        (("A.zarr", "--genes", ","), "names no gene"),
        (("A.zarr", "--genes", "CD24", "--all-genes"), "pass only one of them"),
        (("A.zarr", "--scheduler", "tcp://h:1", "--workers", "2"), "pass only one of them"),
        (("A.zarr", "--workers", "0"), "`n_workers` is 0; a whole number from 1 is needed"),
        (("A.zarr", "--scheduler", ""), "`--scheduler` is ''; a name is needed"),
        (("--manifest", "m.csv"), "the file does not exist; name a csv or tsv file"),
        (("C.png", "--tissue-method", "x", "--mpp", "4"), "`tissue_method` is 'x'"),
        (("A.zarr", "--tissue-method", "x"), "`tissue_method` is 'x'"),
        (("A.zarr", "--pitch-um", "0"), "`pitch_um` is 0"),
    ],
)
def test_the_shell_refuses_contradictions(shell, slides, bundled, monkeypatch, arguments, message):
    monkeypatch.chdir(slides)
    code, _, err = shell("predict", *arguments)
    assert code == 1
    assert message in err


def test_the_shell_prints_its_version(shell):
    code, out, _ = shell("--version")
    assert (code, out.strip()) == (0, f"he2gene_sc {hg.__version__}")
