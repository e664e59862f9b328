from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

import he2gene_sc as hg
from he2gene_sc.benchmark import cross_validation as _benchmark
from he2gene_sc.benchmark import report as _benchmark_report
from he2gene_sc.benchmark.cross_validation import Source, run, split
from he2gene_sc.cli import app as cli
from tests.helpers.toy_sections import own, toy

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def source():
    patients = {"S0": "A", "S1": "A", "S2": "B"}
    return Source("her2st", patients, lambda name: toy(int(name[1:]), patients[name]))


@pytest.fixture(scope="module")
def table(source):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(_benchmark, "_ENCODER", own())
        return run(
            source,
            ["default"],
            ["section", "patient"],
            options={"default": {"encoder": own()}},
            device="cpu",
            n_target=20,
            echo=lambda line: None,
        )


def test_folds_hold_out_sections_or_patients(source):
    assert split(source, "section") == [(["S1", "S2"], ["S0"]), (["S0", "S2"], ["S1"]), (["S0", "S1"], ["S2"])]
    assert split(source, "patient") == [(["S2"], ["S0", "S1"]), (["S0", "S1"], ["S2"])]
    many = Source("many", {f"S{i}": f"P{i // 2}" for i in range(40)}, source.read)
    folds = split(many, "patient")
    assert len(folds) == _benchmark.MAX_FOLDS
    assert sorted(name for _, test in folds for name in test) == sorted(many.patients)
    for train, test in folds:
        assert not {many.patients[name] for name in train} & {many.patients[name] for name in test}


def test_a_list_of_genes_keeps_the_other_settings_of_the_selection(monkeypatch, source):
    given = {}
    monkeypatch.setattr(hg.tl, "train", lambda sections, **settings: given.update(settings))
    for genes, names in (({}, None), ({"genes": ["EPCAM", "FASN"]}, ["EPCAM", "FASN"])):
        _benchmark._train(source, [], "default", None, None, genes)
        assert (given["genes"].genes, given["genes"].missing_genes_are_zero) == (names, True)


def test_one_patient_cannot_be_held_out(source):
    alone = Source("one", {"S0": "A", "S1": "A"}, source.read)
    with pytest.raises(ValueError, match="of one patient only"):
        split(alone, "patient")
    with pytest.raises(ValueError, match="`folds` is 'spot', valid"):
        split(alone, "spot")


def test_every_predictor_is_scored_on_every_held_out_section(table):
    panel = table[table["panel"] == "20 highest mean"]
    assert set(panel["predictor"]) == {
        "training mean",
        "class mean (labels of the held-out section given)",
        "total counts (of the held-out section given)",
        "mean colour, ridge",
        "frozen encoder, ridge",
        "default",
    }
    assert (panel.groupby(["folds", "predictor"])["section"].nunique() == 3).all()
    assert set(table["folds"]) == {"section", "patient"}


def test_scores_of_the_training_mean_and_of_colour_are_as_expected(table):
    mean = table[table["predictor"] == "training mean"]
    assert mean["pearson"].isna().all()
    np.testing.assert_allclose(mean["skill"], 0, atol=1e-6)
    scored = table[table["pearson"].notna() & table["ceiling"].notna()]
    # Too few blocks for intervals, which tests/training/test_figures.py tests.
    assert scored[["low", "high"]].isna().all(axis=None)
    # Genes of the toy depend on its colours, so colour predicts them, but not beyond the noise ceiling.
    colour = scored[scored["predictor"] == "mean colour, ridge"]
    assert colour["pearson"].mean() > 0.3
    assert (colour["pearson"] < colour["ceiling"] + 0.1).all()


def test_a_ready_model_is_scored_only_where_it_was_not_trained(source, tiny_model):
    from dataclasses import replace

    facts = {"S0": {"patient": "A", "n_spots": 30, "mpp": 2.0}}
    model = replace(tiny_model, card=replace(tiny_model.card, training={"sections": facts}))
    # The encoder is not in the registry.
    model.__dict__["network"] = tiny_model.network
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(_benchmark, "_ENCODER", own())
        patched.setattr("he2gene_sc.models.load", lambda name: model)
        # Makes layers lazy.
        patched.setattr(hg.settings, "memory_limit", 1000)
        found = run(source, ["theirs"], ["section", "patient"], device="cpu", n_target=5, echo=lambda line: None)
    theirs = found[(found["predictor"] == "theirs") & (found["panel"] != "called reliable")]
    assert set(theirs.loc[theirs["folds"] == "section", "section"]) == {"S1", "S2"}
    assert set(theirs.loc[theirs["folds"] == "patient", "section"]) == {"S2"}
    assert "was trained on" in _benchmark_report.markdown(found, "her2st", "command")


def test_markdown_states_the_limits_of_the_tables(table):
    text = _benchmark_report.markdown(table, "her2st", "he2gene benchmark")
    assert "Made by `he2gene benchmark`." in text
    assert "from 2 patients (A, B)" in text
    assert "TRIPLEX 0.314" in text
    assert "labels smoothed 3 × 3" in text
    assert "five times coarser" not in text
    assert text.index("## Patients held out") < text.index("## Sections held out"), "new patients come first"
    assert "One section only: patient B" in text
    few = table[(table["panel"] != "called reliable") | (table["section"] != "S2")]
    text = _benchmark_report.markdown(few, "her2st", "command")
    assert "No gene is called reliable on a new patient in" in text
    row = next(line for line in text.splitlines() if line.startswith("| default |"))
    assert row.count("|") == 6


def test_table_markdown_and_figure_are_written(table, tmp_path):
    files = _benchmark_report.write(table, "her2st", tmp_path / "out", "command")
    assert [path.name for path in files] == ["benchmark.csv", "benchmark.md", "benchmark.png"]
    back = pd.read_csv(files[0])
    assert len(back) == len(table)
    np.testing.assert_allclose(back["pearson"], table["pearson"], atol=1e-4)
    assert files[2].stat().st_size > 5_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "visium"], "--data is 'visium', valid"),
        (["--data", "hbcis"], "needs --root"),
        (["--section", "Z9", "--section", "C5"], r"`sections` \['Z9'\] are unknown"),
        (["--section", "C5"], "only C5 is named; two are needed"),
    ],
)
def test_errors_name_invalid_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        CliRunner().invoke(cli.app, ["benchmark", *arguments], catch_exceptions=False)


def test_the_command_runs_and_is_quoted_in_the_markdown(monkeypatch, table, source, tmp_path):
    monkeypatch.setattr(_benchmark, "her2st", lambda sections: source)
    calls = []
    monkeypatch.setattr(_benchmark, "run", lambda *args, **kwargs: calls.append((args, kwargs)) or table)
    (tmp_path / "o.toml").write_text("[default.preset]\nn_latent = 16\n[default.genes]\nn_target_genes = 5\n")
    arguments = ["benchmark", "--folds", "patient", "--options", tmp_path / "o.toml", "--out", tmp_path / "out"]
    result = CliRunner().invoke(cli.app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0
    (_, models, units), options = calls[0]
    assert (models, units) == (["default"], ["patient"])
    genes = hg.GeneSelection(n_target_genes=5, missing_genes_are_zero=True)
    assert options["options"] == {"default": {"preset": hg.DefaultRecipe(n_latent=16), "genes": genes}}
    assert "--folds patient --options o.toml" in (tmp_path / "out" / "benchmark.md").read_text()
    (tmp_path / "o.toml").write_text("[he2gene-base.preset]\nlr = 1e-4\n")
    with pytest.raises(ValueError, match="are not among --model"):
        CliRunner().invoke(cli.app, [str(a) for a in arguments], catch_exceptions=False)


@pytest.mark.data
def test_default_sections_of_her2st_are_those_with_an_image():
    assert set(_benchmark.her2st().patients) >= {"A1", "A2", "C2", "C3", "C4", "C5"}
    assert "B1" not in _benchmark.her2st().patients


def test_the_mean_is_inside_its_interval_and_panels_are_separate():
    rng = np.random.default_rng(0)
    expected = rng.normal(3, 1, (400, 8)).clip(0)
    measured = expected + np.repeat([0.3, 3.0], 4) * rng.normal(size=(400, 8))
    section = SimpleNamespace(
        name="S", patient="A", dense=lambda genes: measured[:, genes], centres_um=200.0 * np.argwhere(np.ones((20, 20)))
    )
    fold = SimpleNamespace(
        unit="section", columns=np.arange(8), target=np.arange(4), variable=np.arange(4, 8), mean=measured.mean(0)
    )
    rows = list(_benchmark._score(fold, section, "default", _benchmark.Prediction(expected, None), np.ones(8)))
    assert [row["panel"] for row in rows] == ["4 highest mean", "4 most variable"]
    for row, expected_r in zip(rows, (0.96, 0.32), strict=True):
        assert row["low"] < row["pearson"] < row["high"]
        assert row["pearson"] == pytest.approx(expected_r, abs=0.06)
        assert row["high"] - row["low"] < 0.3
