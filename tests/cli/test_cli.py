import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import spatialdata as sd
import torch
from PIL import Image
from typer.testing import CliRunner

import he2gene_sc as hg
from he2gene_sc.cli import app as cli

pytestmark = pytest.mark.slow


@pytest.fixture
def run():
    return lambda *arguments: CliRunner().invoke(cli.app, [str(a) for a in arguments], catch_exceptions=False)


@pytest.fixture
def main(monkeypatch, capsys):
    """Run the console script: exit code, stdout, stderr."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["he2gene", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        captured = capsys.readouterr()
        return stopped.value.code or 0, captured.out, captured.err

    return call


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Output and folder of the demo on few spots, without her2st: not local, not in the cache, not online."""
    import pooch

    def offline(self, name, **_):
        raise OSError("no network")

    toy, out = hg.datasets.toy, tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hg.datasets, "toy", lambda *_, **__: toy((3, 4), mpp=2.0))
        patch.delenv("HE2GENE_DATA_DIR", raising=False)
        patch.setattr(hg.settings, "data_dir", tmp_path_factory.mktemp("empty"))
        patch.setattr(pooch.Pooch, "fetch", offline)
        result = CliRunner().invoke(cli.app, ["demo", "--out", str(out / "demo")], catch_exceptions=False)
    return result.output, out / "demo"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("cli") / "toy.zarr"
    hg.datasets.toy((3, 4), mpp=2.0).write(path)
    return path


@pytest.fixture
def store(written, tmp_path):
    return Path(shutil.copytree(written, tmp_path / "toy.zarr"))


@pytest.fixture
def image(tmp_path):
    from PIL import Image

    pixels = hg.datasets.toy((3, 4), mpp=2.0)["he"].transpose("y", "x", "c").to_numpy()
    Image.fromarray(pixels).save(tmp_path / "slide.png")
    return tmp_path / "slide.png"


# -------------------------------------------------------------------------------------------------- info


def test_info_prints_the_card(run):
    assert run("info").output.strip() == hg.models.load().card.to_markdown().strip()


# ----------------------------------------------------------------------------------------------- predict


def test_predict_updates_a_store_in_place(run, store):
    result = run("predict", store)
    assert result.output.strip().endswith(f"Written: {store}")
    assert "he2gene" in sd.read_zarr(store)["table"].layers


def test_predict_with_out_does_not_change_the_store(run, store, tmp_path):
    run("predict", store, "--out", tmp_path / "new.zarr")
    assert "he2gene" not in sd.read_zarr(store)["table"].layers
    assert "he2gene" in sd.read_zarr(tmp_path / "new.zarr")["table"].layers


def test_predict_all_genes_writes_a_new_table(run, store):
    run("predict", store, "--all-genes")
    assert sd.read_zarr(store)["he2gene"].n_vars == hg.models.load().card.n_genes


def test_predict_on_an_image_makes_spots_and_writes_a_store_beside_it(run, image):
    run("predict", image, "--mpp", 2.0, "--pitch-um", 200)
    sdata = sd.read_zarr(image.with_suffix(".zarr"))
    assert sdata["table"].n_obs == len(sdata["spots"]) > 0
    assert sdata["table"].uns["he2gene"]["mpp"] == 2.0


# ---------------------------------------------------------------------------------------------- evaluate


def test_a_store_without_a_copy_of_the_pixels(run, image):
    run("predict", image, "--mpp", "2", "--no-image")
    sdata = sd.read_zarr(image.with_suffix(".zarr"))
    assert not sdata.images
    assert "he2gene_ood" in sdata["table"].obs
    assert len(sdata["spots"]) == sdata["table"].n_obs > 0


def test_a_store_that_is_updated_keeps_its_image(main, store):
    code, _, err = main("predict", store, "--no-image")
    assert code == 1
    assert f"`keep_images` is False (--no-image), but store '{store}' is updated in place and keeps its image" in err
    assert "he2gene" not in sd.read_zarr(store)["table"].layers


def test_concurrent_changes_are_kept_and_the_prediction_is_written_to_another_store(main, store, monkeypatch):
    predict = hg.tl.predict

    def while_another_saves(sdata, **options):
        predict(sdata, **options)
        theirs = sd.read_zarr(store)
        theirs["table"].obs["theirs"] = 1
        hg.io.save(theirs)

    monkeypatch.setattr(hg.tl, "predict", while_another_saves)
    code, _, err = main("predict", store)
    assert code == 1
    assert "another process saved it after you read it" in err
    assert "The prediction is in" in err
    kept = sd.read_zarr(store)["table"]
    assert "theirs" in kept.obs
    assert "he2gene" not in kept.layers
    beside = sd.read_zarr(store.with_name("toy-he2gene-1.zarr"))
    assert "he2gene" in beside["table"].layers
    assert not beside.images


@pytest.mark.parametrize(
    ("slide", "error"),
    [("store", ValueError("it cannot be written")), ("image", OSError(28, "No space left on device"))],
)
def test_a_prediction_that_cannot_be_saved_is_written_elsewhere(main, request, monkeypatch, slide, error):
    path, save, tried = request.getfixturevalue(slide), hg.io.save, []

    def failing(*arguments, **options):
        tried.append(arguments)
        if len(tried) == 1:
            raise error
        return save(*arguments, **options)

    monkeypatch.setattr(hg.io, "save", failing)
    code, _, err = main("predict", path, *(["--mpp", "2"] if slide == "image" else []))
    assert code == 1
    assert f"{error}. The prediction is in" in err
    beside = sd.read_zarr(path.with_name(f"{path.stem}-he2gene-1.zarr"))
    assert any("he2gene" in table.layers for table in beside.tables.values())
    assert not beside.images


def test_tables_are_rescued_if_shapes_cannot_be_saved(main, store, monkeypatch):
    save = hg.io.save

    def failing(sdata, *arguments, **options):
        if len(sdata.shapes):
            raise KeyError("spots")
        return save(sdata, *arguments, **options)

    monkeypatch.setattr(hg.io, "save", failing)
    code, _, err = main("predict", store)
    assert code == 1
    assert "without images and shapes" in err
    (table,) = sd.read_zarr(store.with_name(f"{store.stem}-he2gene-1.zarr")).tables.values()
    assert "he2gene" in table.layers


def test_evaluate_prints_the_summary_and_writes_the_genes(run, tmp_path):
    toy = hg.datasets.toy((3, 4), mpp=2.0)
    words = {"tumour": "invasive cancer", "stroma": "connective tissue", "adipose": "adipose tissue"}
    toy["table"].obs["label"] = toy["table"].obs["pathologist"].astype(str).map(words)
    toy.write(tmp_path / "toy.zarr")
    run("predict", tmp_path / "toy.zarr")
    output = run("evaluate", tmp_path / "toy.zarr", "--annotation-key", "label", "--out", tmp_path / "genes.csv").output
    assert "toy-0, 12 spots" in output
    rows = [" ".join(line.split()) for line in output.splitlines()]
    assert all(
        any(row.startswith(f"all genes {name}") for row in rows) for name in ("he2gene", "class mean", "mean colour")
    )
    assert any(row.startswith("toy-0 12 ") for row in rows[rows.index("annotation") :])
    assert "mean over sections" not in output
    assert "Left out: 2 genes not predicted" in output
    genes = pd.read_csv(tmp_path / "genes.csv")
    assert {"gene", "scope", "section", "predictor", "pearson", "skill", "ceiling_share"} <= set(genes)
    assert "he2gene_eval" not in sd.read_zarr(tmp_path / "toy.zarr")["table"].uns


def test_evaluate_uses_the_named_layer_prediction_and_genes(run, main, tmp_path):
    toy = hg.datasets.toy((3, 4), mpp=2.0)
    hg.tl.predict(toy, key_added="v2", show_progress_bar=False)
    table = toy["table"]
    table.layers["mine"] = table.layers["v2"]
    table.uns["mine"] = {"verb": "adapt", "params": {"layer": "v2"}}
    table.obs["mine_measured"] = [True] * 2 + [False] * 10
    toy.write(tmp_path / "toy.zarr")
    named = ("--genes", "ERBB2, CD24", "--genes", "COL1A1", "--prediction-key", "v2", "--layer", "mine")
    output = run("evaluate", tmp_path / "toy.zarr", *named, "--out", tmp_path / "genes.csv").output
    assert "2 spots that hg.tl.adapt was fitted on" in output
    assert set(pd.read_csv(tmp_path / "genes.csv")["gene"]) == {"ERBB2", "CD24", "COL1A1"}
    assert (
        "valid: ['v2', 'mine']" in main("evaluate", tmp_path / "toy.zarr", "--prediction-key", "v2", "--layer", "no")[2]
    )


def test_evaluate_raises_for_paths_without_a_store_or_prediction(main, store, tmp_path):
    assert "is not a SpatialData zarr store" in main("evaluate", tmp_path)[2]
    assert "is a folder; name a CSV file" in main("evaluate", store, "--out", tmp_path)[2]
    assert "does not exist" in main("evaluate", store, "--out", tmp_path / "no" / "genes.csv")[2]
    assert "holds no prediction 'he2gene'; run hg.tl.predict first" in main("evaluate", store)[2]


# -------------------------------------------------------------------------------------------------- demo


def test_demo_without_data_continues_with_the_toy_slide(demo):
    output, _ = demo
    assert "No real data: her2st files not found" in output
    assert "Continuing with the synthetic toy slide: it shows the workflow, not the accuracy." in output


def test_demo_writes_store_figures_and_genes(demo):
    _, out = demo
    assert {p.name for p in out.iterdir()} == {"toy.zarr", "genes.png", "annotation.png", "genes.csv"}
    genes = pd.read_csv(out / "genes.csv")
    assert genes.columns.tolist() == ["gene", "mean", "pearson", "ceiling", "pcc", "reliable"]
    assert set(genes["gene"]) == set(hg.get.genes(sd.read_zarr(out / "toy.zarr")))


def test_demo_reports_model_colour_and_ceiling_and_speed(demo):
    output, _ = demo
    lines = [line.split() for line in output.splitlines()]
    head = lines.index(["genes", "panel", "model", "alone", "ceiling"])
    assert lines[head - 1] == ["colour", "noise"]
    assert all(np.isfinite(float(number)) for row in lines[head + 2 : head + 4] for number in row[-3:])
    assert "12 spots" in output
    assert "spots/s" in output


@pytest.mark.parametrize("labelled", [True, False])
def test_demo_of_a_model_without_classes_skips_the_annotation(tiny_model, monkeypatch, tmp_path, labelled):
    from he2gene_sc.cli import demo as _demo
    from he2gene_sc.models._embedding import NO_CONTEXT
    from he2gene_sc.models._network import Network

    tensors = {name: value for name, value in tiny_model.tensors.items() if not name.startswith("annotation")}
    genes = tiny_model.genes.rename({"ERBB2": "X1", "CD24": "X2", "COL1A1": "X3", "FASN": "X4"})
    model = replace(
        tiny_model, card=replace(tiny_model.card, classes=(), class_colors=()), genes=genes, tensors=tensors
    )
    heads = {name: torch.from_numpy(value) for name, value in tensors.items()}
    model.__dict__["network"] = Network(tiny_model.network.extractor, heads, NO_CONTEXT)
    toy = hg.datasets.toy((3, 4), mpp=2.0)
    if not labelled:
        toy["table"].obs["annotation"] = np.nan
    monkeypatch.setattr(_demo, "_load", lambda *_: ("toy", toy))
    lines = []
    _demo.run("C5", tmp_path, model, lines.append, lambda *_: None)
    assert {path.name for path in tmp_path.iterdir()} == {"toy.zarr", "genes.png", "genes.csv"}
    assert "annotation" not in " ".join(lines).replace(str(tmp_path), "").lower()


@pytest.mark.parametrize(
    ("section", "first_line"),
    [
        ("C2", "NOTE: section C2 is in the training set of breast-her2st: the metrics below are optimistic."),
        ("C5", "breast-her2st was not trained on section C5, but on other sections of its patient: C2, C3, C4."),
        ("G2", "breast-her2st was trained neither on section G2 nor on its patient."),
    ],
)
def test_demo_first_states_whether_the_section_was_held_out(section, first_line, monkeypatch, tmp_path):
    from he2gene_sc.cli import demo as _demo

    lines = []
    monkeypatch.setattr(_demo, "_load", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        _demo.run(section, tmp_path, hg.models.load(), lines.append, lambda *_: None)
    assert lines == [first_line]


# ------------------------------------------------------------------------------------------------ errors


def test_help_lists_the_commands(main):
    code, out, _ = main("--help")
    assert code == 0
    assert all(command in out for command in ("demo", "predict", "train", "evaluate", "info"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("info", "no-such-model"), "`model` 'no-such-model' is neither a bundled model"),
        (("predict", "no-such-file.tif"), "PATH 'no-such-file.tif' does not exist"),
        (("demo", "--section", "Z9"), "`section` 'Z9' is unknown, valid: A1"),
    ],
)
def test_an_error_is_one_line_on_stderr_and_exit_code_1(main, arguments, message):
    code, _, err = main(*arguments)
    assert code == 1
    (line,) = err.splitlines()
    assert line.startswith(f"he2gene: {message}")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("benchmark", "--options", "none.toml"), "'none.toml' is a folder, or does not exist; name a TOML file"),
        (("train", "none.toml", "--out", "m"), "'none.toml' is a folder, or does not exist; name a TOML file"),
        (("train", "none.toml", "--out", " "), "`--out` is ' '; a path is needed"),
        (("benchmark", "--out", "file/out"), "`--out` 'file/out' is or lies in the file"),
        (("benchmark", "--cache", "file"), "`--cache` 'file' is or lies in the file"),
        (("benchmark", "--device", ""), "`device` '' is unknown"),
        (("demo", "--out", "file"), "`--out` 'file' is or lies in the file"),
        (("predict", "--manifest", "slides.xlsx"), "--manifest 'slides.xlsx' ends in '.xlsx'; a .csv or .tsv file"),
        (("predict", "a" * 300 + ".tif"), "is not a path that can be opened"),
        (("evaluate", "a.zarr", "--out", "a" * 300 + ".csv"), "is not a path that can be opened"),
    ],
)
def test_an_invalid_output_path_is_refused_before_work(main, tmp_path, monkeypatch, arguments, problem):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("x")
    code, _, err = main(*arguments)
    assert code == 1
    assert problem in err


def test_a_table_that_cannot_be_written_is_refused_before_work(main, tmp_path, monkeypatch):
    def read_only(**_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", read_only)
    code, _, err = main("evaluate", "a.zarr", "--out", tmp_path / "a.csv")
    assert code == 1
    assert "lies in a folder that cannot be written to (Read-only file system" in err


def test_an_image_without_resolution_is_refused_by_name(main, image):
    code, _, err = main("predict", image)
    assert code == 1
    assert "`mpp` of image 'he' is unknown" in err


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("sections = [", "config.toml is not a TOML file"),
        ('sections = "C2"\n[train]\n', "config.toml is not valid: `sections` is 'C2': it must be a valid list"),
        ('sections = ["C5"]\n[other]\n', "config.toml is not valid: `other` is not a field"),
        ('sections = ["C5"]\ntrain = 3\n', "config.toml is not valid: `train` is 3: it must be a valid dictionary"),
        ('data = ["C5"]\n', "config.toml is not valid: `data` is ['C5']"),
        ("[data]\nstores = [3]\n", "config.toml is not valid: `data.stores.0` is 3: it must be a valid string"),
        ("[data]\nstores = []\n", "config.toml is not valid: `data.stores` is []"),
        ("[data]\nstores = ['a.zarr']\nhbcis = 'x'\n", "config.toml: [data] `stores` does not go with other fields"),
        ("[data]\n", "config.toml: [data] lacks `stores`"),
        ("[train]\n", "config.toml: either a list `sections` or a table [data]"),
        ('sections = ["C5", "C5"]\n', "`config.toml: sections`: names are duplicated: 'C5'"),
        ("[data]\nstores = ['a.zarr', './a.zarr']\n", "`config.toml: [data] stores`: stores are duplicated"),
        ('sections = ["C5"]\n[train]\nsdatas = ["C5"]\n', "config.toml: [train] `sdatas` is not an option"),
        ('sections = ["C5"]\n[train]\nseed = "1"\n', "config.toml: [train] `seed` is '1'; a whole number from 0"),
        ('sections = ["C5"]\n[train.keys]\nlayer = 3\n', "config.toml: [train.keys] `layer` is of type int; a text"),
        (
            'sections = ["C5"]\n[train]\nencodr = "a"\n',
            "config.toml: [train] `encodr` is not an argument of hg.tl.train; near",
        ),
        (
            'sections = ["C5"]\n[train]\nn_latent = 8\n',
            "`n_latent` is not an argument of hg.tl.train; it is a field of",
        ),
        ('sections = ["C5"]\n[train.genes]\nn_targets = 8\n', "config.toml: [train.genes] `n_targets` is not a field"),
        (
            'sections = ["C5"]\n[train.classes]\ntumour = "x"\n',
            "[train.classes] `tumour` is not a field, valid: ['merge'",
        ),
        ('sections = ["C5"]\n[train.preset]\nlr = 1.0\n', "`lr` is not a field, valid"),
        ('sections = ["C5"]\n[train.preset]\nname = "best"\n', "[train.preset] `name` is 'best', valid"),
        ('sections = ["C5"]\n[train]\ncache = "model/cache"\n', "`cache` "),
        ('sections = ["C5"]\n[train.preset]\nname = "he2gene-base"\ncheckpoint_dir = "model"\n', "lies in OUT"),
    ],
)
def test_train_refuses_an_invalid_training_file(main, tmp_path, text, problem):
    (tmp_path / "config.toml").write_text(text)
    code, _, err = main("train", tmp_path / "config.toml", "--out", tmp_path / "model")
    assert code == 1
    assert problem in err
    assert "Traceback" not in err


def test_train_replaces_another_model_only_with_overwrite(main, tmp_path, tiny_model):
    tiny_model.save(tmp_path / "model")
    (tmp_path / "config.toml").write_text('sections = ["none of that name"]\n[train]\n')
    code, _, err = main("train", tmp_path / "config.toml", "--out", tmp_path / "model")
    assert code == 1
    assert "holds a model; --overwrite replaces it" in err
    code, _, err = main("train", tmp_path / "config.toml", "--out", tmp_path / "model", "--overwrite")
    assert "none of that name" in err
    assert (tmp_path / "model" / "card.json").is_file()


def test_train_checks_the_output_folder_before_the_work(main, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "config.toml").write_text('sections = ["none of that name"]\n[train]\n')
    code, _, err = main("train", tmp_path / "config.toml", "--out", tmp_path / "file" / "model")
    assert code == 1
    assert "cannot be written" in err
    assert "none of that name" not in err


@pytest.mark.slow
def test_of_two_processes_the_first_writes_the_model(tmp_path):
    """Run two processes, as Lightning does for several GPUs by starting the command for each."""
    for i, patient in enumerate("AB"):
        toy = hg.datasets.toy((3, 4), mpp=2.0, seed=i)
        toy["table"].obs["section"], toy["table"].obs["patient"] = f"S{i}", patient
        toy.write(tmp_path / f"S{i}.zarr")
    (tmp_path / "config.toml").write_text(
        '[data]\nstores = ["S0.zarr", "S1.zarr"]\n[train]\nencoder = "efficientnet-lite0"\ndevice = "cpu"\n'
        'show_progress_bar = false\n[train.preset]\nname = "he2gene-base"\ndevices = 2\nstrategy = "ddp"\nmax_epochs = 1\n'
        "batch_size = 8\nwindows_um = [100.0]\n"
    )
    command = "import sys; from he2gene_sc.cli.app import main; main()"
    (tmp_path / "he2gene.py").write_text(command)
    done = subprocess.run(
        [sys.executable, tmp_path / "he2gene.py", "train", tmp_path / "config.toml", "--out", tmp_path / "model"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Written:") == 1
    assert hg.models.load(tmp_path / "model").card.training["n_patients"] == 2


# -------------------------------------------------------------------------------------------- real data


@pytest.mark.data
@pytest.mark.slow
def test_demo_on_the_held_out_section_beats_colour(run, tmp_path):
    from he2gene_sc.cli.demo import compare

    run("demo", "--section", "C5", "--out", tmp_path)
    panels = compare(sd.read_zarr(tmp_path / "C5.zarr"), hg.models.load())[1].set_index("panel")
    assert panels.loc["highest mean", "model"] >= 0.24
    assert panels.loc["most variable", "model"] >= 0.37
    assert (panels["model"] >= panels["colour"] + 0.015).all()
    assert (panels["model"] <= panels["ceiling"]).all()


def test_predict_on_an_image_does_not_replace_a_store_beside_it(toy, tmp_path, capsys, monkeypatch):
    toy.write(tmp_path / "slide.zarr")
    Image.fromarray(np.asarray(toy["he"]).transpose(1, 2, 0)).save(tmp_path / "slide.png")
    monkeypatch.setattr("sys.argv", ["he2gene", "predict", str(tmp_path / "slide.png"), "--mpp", "2"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 1
    assert "is another store" in capsys.readouterr().err
    assert sd.read_zarr(tmp_path / "slide.zarr")["table"].n_obs == toy["table"].n_obs


@pytest.mark.parametrize(
    ("name", "problem"),
    [("slide.png", "give --mpp ..., in µm per pixel"), ("folder", "is not a SpatialData zarr store")],
)
def test_invalid_inputs_of_predict_are_refused_before_work(toy, tmp_path, capsys, monkeypatch, name, problem):
    (tmp_path / "folder").mkdir()
    Image.fromarray(np.asarray(toy["he"]).transpose(1, 2, 0)).save(tmp_path / "slide.png")
    monkeypatch.setattr("sys.argv", ["he2gene", "predict", str(tmp_path / name)])
    with pytest.raises(SystemExit):
        cli.main()
    assert problem in capsys.readouterr().err


def _overwrite(store, pattern, content=b"\x00damaged"):
    found = sorted(path for path in store.glob(pattern) if path.is_file())
    assert found
    for path in found:
        path.write_bytes(content)


@pytest.mark.parametrize(
    ("pattern", "named"),
    [
        ("zarr.json", "metadata cannot be read"),
        ("images/he/**/zarr.json", "images"),
        ("images/he/**/c/**/*", "images"),
        ("shapes/spots/*.parquet", "shapes"),
        ("tables/table/X/**/zarr.json", "tables"),
        ("tables/table/obs/**/c/*", "tables"),
    ],
)
@pytest.mark.parametrize("command", ["predict", "evaluate"])
def test_a_damaged_store_is_named_before_any_work(store, main, monkeypatch, command, pattern, named):
    monkeypatch.setattr("he2gene_sc.tl._predict._predict_slide", pytest.fail)
    _overwrite(store, pattern)
    code, _, error = main(command, store)
    assert code == 1
    assert "Traceback" not in error
    assert f"PATH '{store}' is damaged" in error
    assert named in error


def test_a_toml_path_may_start_with_the_home_folder(tmp_path, monkeypatch):
    from he2gene_sc.cli.training_file import read_toml

    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "options.toml").write_text("seed = 1\n")
    assert read_toml(Path("~/options.toml")) == {"seed": 1}
