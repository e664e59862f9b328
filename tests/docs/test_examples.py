"""Run the example of every public name and compare its output."""

import dataclasses
import doctest
import shutil

import pytest

import he2gene_sc as hg
from tests.helpers.hbcis_mini import ALL_PATIENTS, write_hbcis, write_her2st
from tests.helpers.hest_mini import write_hest

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("small_lite0")]

NAMESPACES = ("", "cohort", "datasets", "get", "io", "models", "pl", "pp", "tl")
PUBLIC = [
    pytest.param(namespace, name, id=f"{namespace}.{name}".strip("."))
    for namespace in NAMESPACES
    for name in (getattr(hg, namespace) if namespace else hg).__all__
    if callable(getattr(getattr(hg, namespace) if namespace else hg, name)) or name == "settings"
]
#: Examples that need files of others or an extra; the named tests run the same calls.
ELSEWHERE = {"from_checkpoint": "tests/models/test_paper.py", "from_wsidata": "tests/io/test_lazyslide.py"}


@pytest.fixture(autouse=True, scope="module")
def _small_patches():
    """Encode patches of 96 px with the bundled model, which takes a fifth of the time."""
    extractor = hg.models.load().network.extractor
    whole = extractor.input_px
    extractor.input_px = extractor.preprocess.input_px = 96
    yield
    extractor.input_px = extractor.preprocess.input_px = whole


def write_files(name, folder):
    """Write the files that an example reads."""
    if name == "her2st":
        write_her2st(folder, ["C5"])
        hg.settings.data_dir = folder
    elif name == "read_st":
        write_her2st(folder, ["C5"])
        for path in [path for path in (folder / "her2st").rglob("*C5*") if path.is_file()]:
            shutil.copy(path, folder / path.name.removeprefix("HE_"))
    elif name == "hbcis":
        write_hbcis(folder / "HBCIS", ALL_PATIENTS, side=3)
    elif name == "hest":
        write_hest(folder / "HEST")
    elif name == "read_he":
        from PIL import Image

        pixels = hg.datasets.toy((4, 4), mpp=2.0)["he"].transpose("y", "x", "c").to_numpy()
        Image.fromarray(pixels).save(folder / "slide.tif")
    elif name == "predict":
        hg.io.save(hg.datasets.toy((2, 2), mpp=2.0), folder / "a.zarr")
        (folder / "slides.csv").write_text("path\na.zarr\n")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("namespace", "name"), PUBLIC)
def test_the_example_of_a_public_name_runs(namespace, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = dataclasses.asdict(hg.settings)
    thing = getattr(getattr(hg, namespace) if namespace else hg, name)
    documented = type(thing) if name == "settings" else thing
    found = [test for test in doctest.DocTestFinder(exclude_empty=True).find(documented, name) if test.examples]
    try:
        if f"{namespace}.{name}" != "tl.predict":
            write_files(name, tmp_path)
        for test in found:
            printed = []
            outcome = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=printed.append)
            assert outcome.failed == 0, "".join(printed)
    finally:
        for setting, value in before.items():
            setattr(hg.settings, setting, value)
    lines = [line.source for test in found for line in test.examples if doctest.SKIP not in line.options]
    calls = [line for line in lines if not line.startswith(("import ", "from "))]
    assert calls or name in ELSEWHERE, f"{name} has no example that runs"


def test_every_plot_is_in_the_gallery():
    import json
    from pathlib import Path

    gallery = json.loads((Path(__file__).parents[2] / "tutorials" / "gallery.ipynb").read_text())
    code = "".join("".join(cell["source"]) for cell in gallery["cells"] if cell["cell_type"] == "code")
    assert [name for name in hg.pl.__all__ if f"hg.pl.{name}(" not in code] == []
