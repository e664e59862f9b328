from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

pytestmark = pytest.mark.slow

TUTORIALS = sorted((Path(__file__).parents[1] / "tutorials").glob("*.ipynb"))
#: Tutorials that are run on a real section too, and what they call it; what the others do there, the demo and the tests of
#: domains and biomarkers on measured sections do.
PREDICTED = {"02_train": ("test", "C5"), "03_trust": ("sdata", "C5")}
OFFLINE = """
import he2gene_sc as hg

def _absent(section):
    raise FileNotFoundError(section)

hg.datasets.her2st = _absent
"""
SMALL = """
from he2gene_sc.datasets._toy import toy as _toy

hg.datasets.toy = lambda **options: _toy((6, 6), mpp=2.0, **options)
"""
#: Features of a section are the same for every tutorial with its windows.
CACHED = """
import he2gene_sc as hg

_train = hg.tl.train
hg.tl.train = lambda *sections, **options: _train(*sections, **options | {{"cache": {folder!r}}})
"""

each = pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    return str(tmp_path_factory.mktemp("features"))


def _execute(notebook):
    NotebookClient(notebook, timeout=400, kernel_name="python3").execute()
    return "".join(
        output.get("text", "") for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs
    )


@each
def test_tutorial_is_committed_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        assert cell.id
        if cell.cell_type == "code":
            assert not cell.outputs, cell.id
            assert cell.execution_count is None, cell.id


def test_tutorials_run_on_the_toy_slide():
    """One after another in one kernel, whose imports take longer than most cells; names are forgotten in between."""
    together = nbformat.v4.new_notebook()
    for path in TUTORIALS:
        cells = nbformat.read(path, as_version=4).cells
        start = "" if not together.cells else "%reset -f\n"
        together.cells += [nbformat.v4.new_code_cell(start + OFFLINE + SMALL), *cells]
    for number, cell in enumerate(together.cells):
        cell.id = f"cell-{number}"
    assert _execute(together).count("genes are reliable") == len(TUTORIALS)


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.parametrize("name", PREDICTED)
def test_tutorial_runs_on_a_real_section(name, features):
    (path,) = [path for path in TUTORIALS if path.stem == name]
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(CACHED.format(folder=features)))
    variable, section = PREDICTED[name]
    check = f'assert {variable}["table"].obs["section"].unique().tolist() == [{section!r}]'
    notebook.cells.append(nbformat.v4.new_code_cell(check))
    _execute(notebook)
