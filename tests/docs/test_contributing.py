"""Follow the steps of `CONTRIBUTING.md`."""

import ast
import importlib
import inspect
import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import he2gene_sc as hg
from he2gene_sc._core import validate
from he2gene_sc._core.ownership import check_free
from he2gene_sc._core.results import _INPUT_PARAMETERS, write_result

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
#: Files that a newcomer makes.
NEW = {"he2gene_sc/stats/_mine.py", "tests/stats/test_mine.py", "he2gene_sc/tl/_depth.py", "tests/tl/test_depth.py"}
NAMESPACES = ("cohort", "datasets", "get", "io", "models", "pl", "pp", "tl")


def code_blocks():
    return re.findall(r"^```python\n(.*?)^```", PAGE, re.S | re.M)


@pytest.fixture
def depth(monkeypatch):
    """The example verb of the page, as a module of the package."""
    (code,) = [block for block in code_blocks() if "def depth(" in block]
    module = ModuleType("he2gene_sc.tl._depth")
    module.__package__ = "he2gene_sc.tl"
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(code, "CONTRIBUTING.md", "exec"), module.__dict__)
    return module.depth


def test_the_example_verb_of_the_page_writes_its_sums_and_may_run_twice(depth):
    table = hg.datasets.toy((4, 4))["table"]
    before = np.asarray(table.X.sum(1)).ravel()
    for _ in range(2):
        depth(table)
    np.testing.assert_allclose(table.obs["depth"], before)
    assert table.uns["depth"]["params"] == {"layer": "X"}


def test_the_example_verb_of_the_page_leaves_a_column_of_the_user(depth):
    table = hg.datasets.toy((4, 4))["table"]
    table.obs["depth"] = 1.0
    with pytest.raises(ValueError, match="key_added"):
        depth(table)
    assert (table.obs["depth"] == 1).all()
    assert "depth" not in table.uns


def test_the_example_of_the_example_verb_runs(depth, monkeypatch):
    import doctest

    monkeypatch.setattr(hg.tl, "depth", depth, raising=False)
    (test,) = doctest.DocTestFinder().find(depth, "depth", module=False)
    assert test.examples
    assert doctest.DocTestRunner().run(test).failed == 0


def test_files_that_the_page_names_exist():
    named = set(re.findall(r"`((?:he2gene_sc|tests|docs|tutorials)/[\w./-]*)`", PAGE)) - NEW
    named |= set(re.findall(r"-n0 (tests/[\w/.]+)", PAGE))
    assert len(named) > 10
    assert not [name for name in named if not (ROOT / name).exists()]


def test_tests_that_the_page_names_exist():
    text = (ROOT / "tests" / "models" / "test_encoders.py").read_text(encoding="utf-8")
    named = re.findall(r"`(test_[a-z_]*entries[a-z_]*)`", PAGE)
    assert named
    for name in named:
        assert f"def {name}(" in text


def test_checks_that_the_page_shows_exist_and_take_these_arguments():
    (code,) = [block for block in code_blocks() if "validate.one_of(" in block]
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    shown = [call for call in calls if isinstance(call.func, ast.Attribute) and call.func.value.id == "validate"]
    assert len(shown) == 5
    for call in shown:
        given = {keyword.arg: None for keyword in call.keywords}
        inspect.signature(getattr(validate, call.func.attr)).bind(*call.args, **given)


def test_functions_of_results_take_the_arguments_of_the_page():
    inspect.signature(check_free).bind("table", "verb", "key", obs=[], layers=[])
    inspect.signature(write_result).bind("table", "verb", "key", params={}, facts={}, obs={}, layers={})
    assert {"layer", "groupby", "key"} <= set(_INPUT_PARAMETERS)


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_every_public_name_is_on_the_page_of_its_namespace(namespace):
    page = (ROOT / "docs" / "api" / f"{namespace}.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"\w+", page))
    assert not set(getattr(hg, namespace).__all__) - listed


@pytest.mark.parametrize("namespace", [*NAMESPACES, "stats"])
def test_names_of_a_type_stub_are_imported_and_in_all(namespace):
    module = importlib.import_module(f"he2gene_sc.{namespace}")
    stub = ast.parse(Path(module.__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
    imported = {
        alias.asname or alias.name for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    (listed,) = [ast.literal_eval(node.value) for node in stub.body if isinstance(node, ast.Assign)]
    assert imported == set(listed)
    assert len(listed) == len(set(listed))


def test_every_plot_has_a_section_in_the_gallery():
    import nbformat

    notebook = nbformat.read(ROOT / "tutorials" / "gallery.ipynb", 4)
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert set(hg.pl.__all__) <= set(re.findall(r"^## (\w+)$", text, re.M))
