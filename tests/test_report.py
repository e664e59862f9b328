"""A report is one HTML file that says first what holds for a new patient, loads nothing and runs nothing."""

import re
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

import he2gene_sc as hg
from he2gene_sc.cli.app import app

pytestmark = pytest.mark.slow

ORDER = ["new-patient", "slide", "tissue", "annotation", "genes", "chosen-genes", "not-reliable", "run"]


class Page(HTMLParser):
    """Ids of the sections, tags with their attributes, and the text of a page."""

    def __init__(self, path):
        super().__init__()
        self.sections, self.tags, self.texts = [], [], []
        self.feed(path.read_text(encoding="utf-8"))
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "section":
            self.sections.append(dict(attributes)["id"])

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture
def predicted(toy, tiny_model):
    hg.tl.predict(toy, model=tiny_model)
    return toy


@pytest.fixture
def plain(predicted):
    """The same without what is drawn."""
    table = predicted["table"]
    table.var["he2gene_reliable"] = False
    table.obs = table.obs.drop(columns=[name for name in table.obs if name.startswith("he2gene_")])
    return predicted


@pytest.fixture(scope="module")
def reported(tiny_model, tmp_path_factory):
    toy = hg.datasets.toy((5, 6), mpp=2.0)
    hg.tl.predict(toy, model=tiny_model)
    table = toy["table"]
    table.obs["patient"] = "<script>alert(1)</script>"
    table.obs["he2gene_annotation"] = pd.Categorical(["a<b>"] * 20 + [None] * 10, categories=["a<b>"])
    table.uns["he2gene_annotation_colors"] = ["#d62728"]
    table.var["he2gene_halfwidth"] = 0.5
    table.uns["he2gene_intervals"] = {"verb": "intervals", "params": {"coverage": 0.8}, "written": {}}
    path = tmp_path_factory.mktemp("report") / "report.html"
    return Page(hg.report(toy, path, genes=["TPT1", "ERBB2"], n_genes=1, model=tiny_model))


def test_sections_stand_in_the_order_of_reading(reported):
    assert reported.sections == ORDER
    assert "What holds for a new patient 10 of 39 predicted genes are reliable on a new patient." in reported.text
    assert "None of it is real." in reported.text  # a limitation on the card
    assert re.search(r"ERBB2 \S+ 0\.9 yes 0\.5", reported.text)
    assert "± (interval of 80%)" in reported.text
    assert re.search(r"29 predicted genes are not reliable.* Of the chosen genes: TPT1\.", reported.text)
    assert re.search(r"a<b> 20 66\.7% .* without a class 10 33\.3%", reported.text)
    assert "hg.tl.predict(sdata, model='tiny')" in reported.text


def test_names_are_text_and_nothing_is_loaded_or_run(reported):
    assert "Patient <script>alert(1)</script>" in reported.text
    assert not {tag for tag, _ in reported.tags} & {"script", "link", "iframe", "object", "b"}
    addresses = [value for _, found in reported.tags for name, value in found.items() if name in ("src", "href")]
    assert all(address.startswith(("data:image/png;base64,", "#")) for address in addresses)
    assert sum(address.startswith("data:") for address in addresses) == 4
    assert not any(name.startswith("on") for _, found in reported.tags for name in found)
    assert all(found.get("alt") for tag, found in reported.tags if tag == "img")


def test_without_a_reliable_gene_the_page_says_what_can_be_done(plain, tmp_path):
    page = Page(hg.report(plain, tmp_path / "report.html"))
    assert "0 of 39 predicted genes are reliable" in page.text
    assert "None of the predicted genes is reliable here." in page.text
    assert "hg.tl.adapt" in page.text
    assert "chosen-genes" not in page.sections


def test_what_was_run_is_shown(plain, tmp_path):
    hg.tl.evaluate(plain, baselines=[])
    page = Page(hg.report(plain, tmp_path / "report.html"))
    assert "evaluation" in page.sections
    assert "mean correlation" in page.text
    assert "hg.tl.evaluate(sdata, " in page.text


def test_a_page_of_ours_is_replaced_and_no_other_file(plain, tmp_path):
    path = tmp_path / "report.html"
    path.write_text("<html>mine</html>")
    with pytest.raises(FileExistsError, match=r"`path` .*report\.html' is there; .*overwrite=True"):
        hg.report(plain, path)
    assert path.read_text() == "<html>mine</html>"
    hg.report(plain, path, overwrite=True)
    assert hg.report(plain, path) == path
    assert list(tmp_path.iterdir()) == [path]


def test_bad_arguments_are_refused_before_any_work(plain, toy, tmp_path):
    with pytest.raises(ValueError, match=r"`genes` \['NOGENE'\] were not predicted"):
        hg.report(plain, tmp_path / "a.html", genes=["NOGENE"])
    with pytest.raises(ValueError, match=r"`path` .* ends in '\.pdf'; \.html or \.htm is needed"):
        hg.report(plain, tmp_path / "a.pdf")
    with pytest.raises(ValueError, match="holds no prediction 'other'"):
        hg.report(plain, tmp_path / "a.html", prediction_key="other")
    with pytest.raises(TypeError, match="`data` is a int"):
        hg.report(3, tmp_path / "a.html")
    with pytest.raises(FileNotFoundError, match="`data` .* is not there"):
        hg.report(tmp_path / "none.zarr", tmp_path / "a.html")
    assert not list(tmp_path.iterdir())


def test_slides_get_a_page_each_and_an_index_that_leads_to_them(plain, tmp_path):
    stores = [tmp_path / "in" / "slide 1.zarr", tmp_path / "other" / "slide 1.zarr", tmp_path / "in" / "bad.zarr"]
    for store in stores[:2]:
        hg.io.save(plain, store)
    summary = pd.DataFrame(
        {
            "path": "x.svs",
            "output": map(str, stores),
            "status": "predicted",
            "spots": 30,
            "verdict": ["", "<i>odd", np.nan],
        }
    )
    summary.to_csv(tmp_path / "summary.csv", index=False)
    with pytest.warns(UserWarning, match=r"no report of '.*bad\.zarr'"):
        index = hg.report(tmp_path / "summary.csv", tmp_path / "reports")
    assert sorted(path.name for path in (tmp_path / "reports").iterdir()) == [
        "index.html",
        "slide_1-2.html",
        "slide_1.html",
    ]
    page = Page(index)
    links = [found["href"] for tag, found in page.tags if tag == "a" and not found["href"].startswith("#")]
    assert links == ["slide_1.html", "slide_1-2.html"]
    assert "<i>odd" in page.text
    assert "is not a SpatialData zarr store" in page.text
    assert Page(index.parent / links[1]).sections[0] == "new-patient"


def test_the_command_writes_a_report(plain, tmp_path):
    store = hg.io.save(plain, tmp_path / "slide.zarr")
    out = tmp_path / "page.html"
    done = CliRunner().invoke(app, ["report", str(store), "--out", str(out), "--genes", "TPT1"])
    assert done.exit_code == 0, done.output
    assert done.output.strip() == f"Written: {out}"
    assert "chosen-genes" in Page(out).sections
