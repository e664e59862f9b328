import subprocess
import sys

import he2gene_sc as hg

HEAVY = ["torch", "timm", "scanpy", "squidpy", "spatialdata", "anndata", "pandas", "matplotlib"]


def test_import_loads_nothing_heavy():
    code = f"import sys, he2gene_sc; print([m for m in {HEAVY} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert found == "[]"


def test_namespaces_complete_by_tab_and_resolve():
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


def test_version_is_that_of_the_distribution():
    from importlib.metadata import version

    assert hg.__version__ == version("he2gene_sc")
