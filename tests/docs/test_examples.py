"""Run the example of every public function and compare its output."""

import doctest
import inspect

import pytest

import he2gene_sc as hg

pytestmark = pytest.mark.slow

PUBLIC = [
    pytest.param(namespace, name, id=f"{namespace}.{name}")
    for namespace in ("cohort", "datasets", "get", "io", "models", "pl", "pp", "tl")
    for name in getattr(hg, namespace).__all__
    if callable(getattr(getattr(hg, namespace), name))
]
PUBLIC += [
    pytest.param("", name, id=name)
    for name in hg.__all__
    if inspect.isroutine(getattr(hg, name)) or isinstance(getattr(hg, name), type)
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("namespace", "name"), PUBLIC)
def test_the_example_of_a_public_function_runs(namespace, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    thing = getattr(getattr(hg, namespace) if namespace else hg, name)
    found = [test for test in doctest.DocTestFinder(exclude_empty=True).find(thing, name) if test.examples]
    for test in found:
        printed = []
        outcome = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=printed.append)
        assert outcome.failed == 0, "".join(printed)
    assert found or (namespace and isinstance(thing, type)), f"hg.{namespace}.{name} has no example"
