import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import he2gene_sc as hg

HEAVY = ["torch", "timm", "scanpy", "squidpy", "spatialdata", "anndata", "pandas", "matplotlib"]


def test_import_loads_nothing_heavy():
    code = f"import sys, he2gene_sc; print([m for m in {HEAVY} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert found == "[]"


@pytest.mark.slow
def test_squidpy_is_imported_without_its_warnings():
    code = "from he2gene_sc._core.logs import import_squidpy; import_squidpy()"
    command = [sys.executable, "-W", "default::SyntaxWarning", "-c", code]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert "SyntaxWarning" not in found
    package = Path(hg.__file__).parent
    assert [path.name for path in package.rglob("*.py") if "import squidpy" in path.read_text()] == ["logs.py"]


def test_namespaces_support_tab_completion_and_resolve():
    assert {"cohort", "datasets", "io", "pp", "tl", "pl", "get", "models", "settings"} <= set(dir(hg))
    for namespace in ("cohort", "datasets", "io", "pp", "tl", "pl", "get", "models"):
        module = getattr(hg, namespace)
        assert module.__all__
        for name in module.__all__:
            assert name in dir(module)
            assert getattr(module, name) is not None


def test_unknown_names_raise_attribute_errors():
    for module in (hg, hg.tl):
        assert not hasattr(module, "no_such_name")


def test_version_is_the_version_of_the_distribution():
    from importlib.metadata import version

    assert hg.__version__ == version("he2gene_sc")


def _imports():
    """Return the full names of all modules that each module of the package imports."""
    root = Path(hg.__file__).parent
    paths = {".".join(path.relative_to(root.parent).with_suffix("").parts): path for path in root.rglob("*.py")}
    modules = {name.removesuffix(".__init__"): path for name, path in paths.items()}
    found = {}
    for name, path in modules.items():
        package = name if path.stem == "__init__" else name.rpartition(".")[0]
        found[name] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found[name] |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                parts = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
                source = ".".join([*parts, *([node.module] if node.module else [])])
                named = {f"{source}.{alias.name}" for alias in node.names}
                found[name] |= (named & modules.keys()) or {source}
    return found


def test_there_are_no_circular_imports():
    ordered = TopologicalSorter({name: found & _MODULES for name, found in _IMPORTS.items()})
    ordered.prepare()  # raises for circular imports


def test_modules_below_the_verbs_do_not_import_tables_and_slides():
    low = tuple(f"he2gene_sc.{room}." for room in ("image", "models", "inference", "training", "stats"))
    wrong = {
        name: found
        for name, imported in _IMPORTS.items()
        if name.startswith(low) and (found := {i for i in imported if i.split(".")[0] in ("anndata", "spatialdata")})
    }
    assert not wrong


_IMPORTS = _imports()
_MODULES = _IMPORTS.keys() - {"he2gene_sc"}
