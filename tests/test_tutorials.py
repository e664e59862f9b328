from pathlib import Path

import nbformat
import pytest
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from nbclient import NotebookClient

import he2gene_sc as hg

pytestmark = pytest.mark.slow

TUTORIALS = sorted((Path(__file__).parents[1] / "tutorials").glob("*.ipynb"))
#: Tutorials that are run on a real section too, and what they call it; what the others do there, the demo and the tests of
#: domains and biomarkers on measured sections do.
PREDICTED = {"02_train": ("test", "C5"), "03_trust": ("sdata", "C5")}
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
def features(tmp_path_factory):
    """Features of a section are the same for every tutorial with its windows."""
    return str(tmp_path_factory.mktemp("features"))


@pytest.fixture
def execute():
    """Run the cells of a notebook in a shell of this process; returns what they printed, and the shell's names."""

    def call(path):
        shell = InteractiveShell()
        with capture_output() as said:
            for cell in nbformat.read(path, as_version=4).cells:
                if cell.cell_type == "code":
                    shell.run_cell(cell.source).raise_error()
        return said.stdout, shell.user_ns

    return call


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


@pytest.mark.parametrize("path", TUTORIALS[1:], ids=lambda path: path.stem)
def test_tutorial_runs_on_the_toy_slide(execute, path, monkeypatch):
    def absent(section):
        raise FileNotFoundError(section)

    toy = hg.datasets.toy
    monkeypatch.setattr(hg.datasets, "her2st", absent)
    monkeypatch.setattr(hg.datasets, "toy", lambda **options: toy((6, 6), mpp=2.0, **options))
    assert "genes are reliable" in execute(path)[0]


@pytest.mark.data
@pytest.mark.parametrize("name", PREDICTED)
def test_tutorial_runs_on_a_real_section(execute, name, features, monkeypatch):
    (path,) = [path for path in TUTORIALS if path.stem == name]
    train = hg.tl.train
    monkeypatch.setattr(hg.tl, "train", lambda *sections, **options: train(*sections, **options | {"cache": features}))
    variable, section = PREDICTED[name]
    names = execute(path)[1]
    assert names[variable]["table"].obs["section"].unique().tolist() == [section]
