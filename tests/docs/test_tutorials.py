import atexit
import base64
import copy
import functools
import io
import logging
import re
import sys
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import pytest
from IPython.core.displayhook import CapturingDisplayHook
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from jupyter_cache import get_cache
from jupyter_cache.base import CacheBundleIn
from nbclient import NotebookClient
from nbformat.v4 import new_output

import he2gene_sc as hg
from he2gene_sc._core.element_results import copy_tables
from tests.helpers.data import HAS_DATA

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
TUTORIALS = sorted((ROOT / "tutorials").glob("*.ipynb"))
#: Folder of executed notebooks for the documentation build; git ignores it.
EXECUTED = ROOT / "docs" / "generated" / "jupyter_cache"
#: Numbers that a tutorial prints on real sections: text around the number, and its range.
PRINTED = {
    "01_predict": [(r"(\d+) genes are reliable", 30, 150)],
    "02_train": [
        (r"here +([\d.]+)", 0.2, 0.45),
        (r"held out in training +([\d.]+)", 0.2, 0.45),
        (r"(?m)^ceiling +([\d.]+)", 0.5, 0.85),
        (r"tumour +\d+ +(\d+)", 90, 122),
    ],
    "03_trust": [
        (r"(\d+) genes are reliable", 30, 150),
        (r"(\d+)% of \d+ reliable genes", 80, 100),
        (r"above 0\.1, ([\d.]+) in the median", 0.25, 0.6),
        (r"he2gene_adapted: mean Pearson ([\d.]+)", 0.2, 0.5),
        (r"he2gene_adapted: .* mean squared error ([\d.]+)", 0.1, 1),
        (r"(\d+)% of the measured values lie inside", 75, 97),
        (r"as it is: median of he2gene_ood ([\d.]+)", 0.2, 1),
        (r"twice as large: median of he2gene_ood ([\d.]+)", 1, 5),
    ],
    "04_domains_biomarkers": [
        (r"(\d+) of \d+ genes at FDR 5 %", 50, 5000),
        (r"wilcoxon \(naive\) +(\d+) of", 1500, 2000),
        (r"spatial +(\d+) of \d+ genes in one section", 0, 10),
        (r"(\d+) of 2000 genes, circular: True", 0, 2000),
    ],
    "gallery": [(r"(\d+) genes are reliable", 30, 150)],
}
OFFLINE = """
import he2gene_sc as hg
from he2gene_sc.datasets._toy import toy

def absent(section):
    raise FileNotFoundError(section)

hg.datasets.her2st = absent
hg.datasets.toy = lambda **options: toy((6, 6), mpp=2.0, **options)
"""

each = pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)


@pytest.fixture(scope="module")
def sections():
    """Read a section once for all tutorials; each gets a copy of the table and attributes."""
    load = functools.cache(hg.datasets.her2st)

    def call(name):
        sdata = copy_tables(load(name))
        sdata.attrs = copy.deepcopy(sdata.attrs)
        return sdata

    yield call
    load.cache_clear()


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    """Share features of a section between tutorials with the same windows."""
    return str(tmp_path_factory.mktemp("features"))


def figures():
    """Return the open figures as outputs of a cell, as Jupyter does."""
    for number in plt.get_fignums():
        picture = io.BytesIO()
        plt.figure(number).savefig(picture, format="png", dpi=90, bbox_inches="tight")
        plt.close(number)
        yield new_output("display_data", {"image/png": base64.b64encode(picture.getvalue()).decode()})


@pytest.fixture
def execute(monkeypatch):
    """Run a notebook in a shell of this process; return it with its outputs, and the variables of the shell."""
    # pytest captures warnings and the log; Jupyter shows them.
    monkeypatch.setattr(warnings, "showwarning", lambda message, *_, **__: print(message, file=sys.stderr))
    logging.getLogger("he2gene_sc").addHandler(logging.lastResort)
    shells = []

    def call(path):
        shell, notebook = InteractiveShell(), nbformat.read(path, as_version=4)
        shells.append(shell)
        for count, cell in enumerate((cell for cell in notebook.cells if cell.cell_type == "code"), start=1):
            # Without it the shell prints values as text, where wide tables lose columns.
            values = CapturingDisplayHook(shell)
            shell.display_trap.hook = values
            with capture_output() as captured:
                shell.run_cell(cell.source).raise_error()
            streams = {"stdout": captured.stdout, "stderr": captured.stderr}
            cell.outputs = [new_output("stream", name=name, text=text) for name, text in streams.items() if text]
            cell.outputs += [new_output("display_data", output.data) for output in captured.outputs]
            cell.outputs += [new_output("display_data", value["data"]) for value in values.outputs]
            cell.outputs += figures()
            cell.execution_count = count
        nbformat.validate(notebook)
        return notebook, shell.user_ns

    yield call
    logging.getLogger("he2gene_sc").removeHandler(logging.lastResort)
    for shell in shells:
        # Otherwise its sections and its `__main__` would stay in memory.
        shell.restore_sys_module_state()
        shell.atexit_operations()
        atexit.unregister(shell.atexit_operations)


def text_of(cell):
    """Return the text that a cell printed and showed, without warnings and the log."""
    shown = [output for output in cell.outputs if output.get("name") != "stderr"]
    return "\n".join(output.get("text") or output.data.get("text/plain", "") for output in shown)


def check_outputs(notebook):
    """Check that every plot was drawn and no shown value is missing; return all text."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for cell in code:
        shown = {kind for output in cell.outputs for kind in output.get("data", ())}
        assert ("hg.pl." in cell.source) == ("image/png" in shown), cell.source
        assert not re.search(r"\bnan\b", text_of(cell), re.IGNORECASE), text_of(cell)
        assert "Out[" not in text_of(cell), "a value was printed as text"
    return "\n".join(text_of(cell) for cell in code)


@each
def test_tutorial_is_committed_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        assert cell.id
        if cell.cell_type == "code":
            assert not cell.outputs, cell.id
            assert cell.execution_count is None, cell.id


def test_the_first_tutorial_runs_in_a_kernel_of_jupyter():
    notebook = nbformat.read(TUTORIALS[0], as_version=4)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(OFFLINE))
    NotebookClient(notebook, timeout=400, kernel_name="python3").execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert "genes are reliable" in "".join(output.get("text", "") for output in outputs)


@pytest.mark.skipif(HAS_DATA, reason="with real sections every tutorial runs on those")
@pytest.mark.parametrize("path", TUTORIALS[1:], ids=lambda path: path.stem)
def test_tutorial_runs_on_the_toy_slide(execute, path, monkeypatch):
    def absent(section):
        raise FileNotFoundError(section)

    toy = hg.datasets.toy
    monkeypatch.setattr(hg.datasets, "her2st", absent)
    monkeypatch.setattr(hg.datasets, "toy", lambda **options: toy((6, 6), mpp=2.0, **options))
    assert "genes are reliable" in check_outputs(execute(path)[0])


@pytest.mark.data
@each
def test_tutorial_on_real_sections_shows_figures_and_numbers_for_the_documentation(
    execute, path, sections, features, monkeypatch
):
    train = hg.tl.train
    monkeypatch.setattr(hg.datasets, "her2st", sections)
    monkeypatch.setattr(hg.tl, "train", lambda *sections, **options: train(*sections, **options | {"cache": features}))
    notebook, names = execute(path)
    text = check_outputs(notebook)
    for words, low, high in PRINTED[path.stem]:
        (number,) = {float(found) for found in re.findall(words, text)}
        assert low <= number <= high, words
    shown = names.get("test", names.get("sdata"))["table"].obs["section"].unique().tolist()
    assert shown == ["B4" if path.stem == "04_domains_biomarkers" else "C5"]
    if path.stem == "02_train":
        card = names["random"].card
        for protocol, metrics in card.metrics.items():
            (values,) = (
                values for name, values in metrics.items() if re.fullmatch(r"mean Pearson, \d+ target genes", name)
            )
            row = names["metrics_of"](card).loc[protocol, "mean Pearson"]
            assert row[list(values)].tolist() == list(values.values())
    EXECUTED.mkdir(parents=True, exist_ok=True)
    bundle = CacheBundleIn(notebook, str(path), data={"execution_seconds": 0})
    get_cache(EXECUTED).cache_notebook_bundle(bundle, check_validity=False, overwrite=True)
