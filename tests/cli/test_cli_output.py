"""Output of the commands: help, a summary, or only JSON."""

import io
import json
import sys

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

import he2gene_sc as hg
from he2gene_sc.cli import app as cli

pytestmark = pytest.mark.slow


def run(*arguments):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments], catch_exceptions=False)


@pytest.fixture
def bundled(monkeypatch, tiny_model):
    """Load the small model under the name of the bundled one, with printed output."""

    def load(*_, **__):
        print("printed by a library")
        return tiny_model

    monkeypatch.setattr("he2gene_sc.models.load", load)
    return tiny_model


def test_help_shows_the_names_of_toml_tables():
    output = " ".join(run("train", "--help").stdout.split())
    assert all(
        f"[{name}]" in output for name in ("data", "train", "train.preset", "train.keys", "train.genes", "train.card")
    )


def test_shell_completion_is_available():
    assert "--install-completion" in run("--help").stdout


def test_output_of_libraries_is_not_on_stdout(bundled):
    result = run("info", "--json")
    assert json.loads(result.stdout)["name"] == bundled.card.name
    assert result.stderr == "printed by a library\n"
    assert run("info").stdout.strip() == bundled.card.to_markdown().strip()


def test_predict_and_evaluate_end_with_a_summary_or_json(bundled, tmp_path):
    hg.datasets.toy((3, 4), mpp=2.0).write(tmp_path / "toy.zarr")
    output = run("predict", tmp_path / "toy.zarr").stdout
    assert ["spots", "12"] in [line.split() for line in output.splitlines()]
    assert output.rstrip().endswith(f"Written: {tmp_path / 'toy.zarr'}")
    output = [line.split() for line in run("evaluate", tmp_path / "toy.zarr").stdout.splitlines()]
    assert any(row[:3] == ["all", "genes", "he2gene"] for row in output)
    assert any(row[:3] == ["he2gene", "has", "seen"] for row in output)
    assert output[-1][:2] == ["Left", "out:"]
    found = json.loads(run("evaluate", tmp_path / "toy.zarr", "--json").stdout)
    assert found.keys() == {"summary", "predictors", "left_out"}
    (row,) = [
        r
        for r in found["summary"]
        if (r["scope"], r["predictor"]) == ("section", "he2gene") and r["panel"] == "all genes"
    ]
    assert np.isfinite(row["pearson_mean"])


def test_a_training_section_is_named_in_the_table_of_slides(capsys):
    from he2gene_sc.cli import output, prediction

    row = {"path": "A.zarr", "output": "A.zarr", "status": "predicted", "spots": 3, "mpp": 1.0, "verdict": "new"}
    row |= dict.fromkeys(("share_on_tissue", "share_like_training", "share_annotated"), 1.0) | {"known_sections": ""}
    output._STDOUT.set(sys.stdout)
    prediction._print(pd.DataFrame([row, row]), None, as_json=False)
    assert "trained on" not in " ".join(capsys.readouterr().out.split())
    prediction._print(pd.DataFrame([row, row | {"known_sections": "C4"}]), None, as_json=False)
    assert any(line.split()[-2:] == ["new", "C4"] for line in capsys.readouterr().out.splitlines())


def test_files_of_others_are_not_replaced(tmp_path, bundled, monkeypatch):
    from he2gene_sc.io._files import check_own_files

    monkeypatch.setattr("he2gene_sc.io._open.open_store", pytest.fail)
    monkeypatch.setattr(hg.tl, "predict", pytest.fail)
    monkeypatch.setattr("he2gene_sc.cli.demo._load", lambda *_: ("toy", None))
    mine = tmp_path / "genes.csv"
    mine.write_text("gene,mine\n")
    for command in (("evaluate", tmp_path, "--out", mine), ("demo", "--out", tmp_path)):
        with pytest.raises(FileExistsError, match=r"--out: .*genes\.csv' exists and was not written by this command"):
            run(*command)
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    (pictures / "genes.png").write_bytes(b"mine")
    with pytest.raises(FileExistsError, match=r"genes\.png' exists and was not written by this command"):
        run("demo", "--out", pictures)
    # A demo that was interrupted leaves an empty table.
    (pictures / "genes.csv").touch()
    check_own_files(pictures / "genes.csv", "gene,", "--out", [pictures / "genes.png"])
    (pictures / "genes.csv").write_text("gene,mean,pearson,ceiling\n")
    (pictures / "toy.zarr").mkdir()
    with pytest.raises(FileExistsError, match=r"toy\.zarr' exists and holds no prediction"):
        run("demo", "--out", pictures)
    (tmp_path / "new" / "benchmark.md").mkdir(parents=True)
    with pytest.raises(FileExistsError, match=r"--out: .*benchmark\.md' exists"):
        run("benchmark", "--out", tmp_path / "new")
    check_own_files(mine, "gene,mine", "--out", [tmp_path])


def test_train_prints_a_summary_of_the_model(monkeypatch, tiny_model, tmp_path):
    monkeypatch.setattr("he2gene_sc.cli.training_file.read_training_file", lambda *_: ([], {}))
    monkeypatch.setattr(hg.tl, "train", lambda *_, **__: tiny_model)
    output = run("train", tmp_path / "x.toml", "--out", tmp_path / "model").stdout
    assert f"{tiny_model.card.n_genes:,} genes" in output
    assert output.rstrip().endswith(f"Written: {tmp_path / 'model'}")
    found = json.loads(run("train", tmp_path / "x.toml", "--out", tmp_path / "other", "--json").stdout)
    assert (found["output"], found["card"]["name"]) == (str(tmp_path / "other"), tiny_model.card.name)


def test_a_table_of_many_columns_fits_a_terminal(monkeypatch):
    from he2gene_sc.cli import output

    monkeypatch.setattr(output, "_WIDTH", 80)
    captured = io.StringIO()
    output._STDOUT.set(captured)
    scores = {"Pearson": "0.129", "minus it": "-0.218", "of ceiling": "-", "calibration error": "0.049"}
    row = {"panel": "most variable", "predictor": "nearest spots", "genes": "13,475"} | scores
    output.say_table("C5, 181 spots", [row, row])
    title, *head, rule, first, second = captured.getvalue().splitlines()
    assert title.strip() == "C5, 181 spots"
    assert first == second
    assert first.split() == ["most", "variable", "nearest", "spots", *list(row.values())[2:]]
    assert " ".join(head).split().count("calibration") == 1
    # Numbers end below each other and below their names.
    assert {len(line.rstrip()) for line in (head[-1], first)} == {len(first.rstrip())}


def test_gene_names_are_repeated_options_or_separated_by_commas():
    from he2gene_sc.cli.output import split_names

    assert split_names(["A, B", "C"]) == ["A", "B", "C"]
    with pytest.raises(ValueError, match="names no gene; pass one or more"):
        split_names([","])
