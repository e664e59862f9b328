"""A report is one HTML file that begins with what holds for a new patient, without external resources or scripts."""

import errno
import re
from html.parser import HTMLParser
from importlib import import_module
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import spatialdata as sd
from typer.testing import CliRunner

import he2gene_sc as hg
from he2gene_sc._core.keys import Keys
from he2gene_sc._report.page import Section
from he2gene_sc._report.report import _names_of_slide
from he2gene_sc._report.slide import (
    Slide,
    _biomarkers,
    _domains,
    _evaluation,
    _genes,
    _hex,
    _programmes,
    _quality,
    _trust,
)
from he2gene_sc.cli.app import app
from he2gene_sc.io._files import check_new_file

pytestmark = pytest.mark.slow

_OPTIONS = {"prediction_key": "he2gene", "table_key": None, "shapes_key": None}
ORDER = ["new-patient", "slide", "tissue", "annotation", "genes", "chosen-genes", "not-reliable", "run"]


def filled(fill, slide):
    """Return a section of the page."""
    section = Section("", "")
    fill(slide, section)
    return section


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


def test_a_slide_that_was_saved_without_its_image_is_reported(predicted, tmp_path):
    del predicted.images["he"]
    page = Page(hg.report(predicted, tmp_path / "report.html"))
    assert page.sections == ORDER[:5] + ORDER[6:]
    assert sum(tag == "img" for tag, _ in page.tags) >= 3


@pytest.fixture
def plain(predicted):
    """Return the same without figures."""
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


def test_sections_are_in_reading_order(reported):
    assert reported.sections == ORDER
    assert "What holds for a new patient 10 of 39 predicted genes are reliable on a new patient." in reported.text
    assert "None of it is real." in reported.text  # a limitation on the card
    assert re.search(r"ERBB2 \S+ 0\.9 yes 0\.5", reported.text)
    assert "± (interval of 80%)" in reported.text
    assert re.search(r"29 predicted genes are not reliable.* Chosen genes among them: TPT1\.", reported.text)
    assert re.search(r"a<b> 20 66\.7% .* without a class 10 33\.3%", reported.text)
    assert "hg.tl.predict, he2gene model: tiny" in reported.text


def test_names_are_text_and_nothing_is_loaded_or_run(reported):
    assert "Patient <script>alert(1)</script>" in reported.text
    assert not {tag for tag, _ in reported.tags} & {"script", "link", "iframe", "object", "b"}
    addresses = [value for _, found in reported.tags for name, value in found.items() if name in ("src", "href")]
    assert all(address.startswith(("data:image/png;base64,", "#")) for address in addresses)
    assert sum(address.startswith("data:") for address in addresses) == 4
    assert not any(name.startswith("on") for _, found in reported.tags for name in found)
    assert all(found.get("alt") for tag, found in reported.tags if tag == "img")


def test_shortened_lists_and_the_slide_are_named(reported, plain, tmp_path, monkeypatch):
    assert "10 of 10 reliable genes are listed" in reported.text
    assert "The best 1 of 10 reliable genes." in reported.text
    assert reported.text.startswith("Predicted expression: toy-0")
    monkeypatch.setattr("he2gene_sc._report.slide._N_ROWS", 3)
    table = plain["table"]
    table.var["he2gene_reliable"] = table.var["he2gene_predicted"]
    slide = Slide(table, table, Keys(), table.uns["he2gene"], None, [], 1, {})
    monkeypatch.setattr(Slide, "draw", lambda *_, **__: None)
    section = filled(_genes, slide)
    assert section.text == [
        "3 of 39 reliable genes are listed, by held-out correlation. All: hg.get.genes(sdata, reliable=True)."
    ]
    assert len(section.tables[0].rows) == 3
    assert slide.genes_call(True) == "hg.get.genes(sdata, reliable=True)"
    other = Slide(table, table, Keys("other"), table.uns["he2gene"], None, [], 1, {})
    assert other.genes_call(False) == "hg.get.genes(sdata, reliable=False, prediction_key='other')"


def test_a_slide_without_section_is_named_by_its_store_or_patient(plain, tmp_path):
    table = plain["table"]
    assert _names_of_slide(plain, table) == ["toy-0"]
    for names in ("section", None):
        table.obs["section"] = pd.Categorical([names] * table.n_obs, categories=["section"])
        assert _names_of_slide(plain, table) == ["toy"]  # the patient
    plain.path = tmp_path / "slide 7.zarr"
    assert _names_of_slide(plain, table) == ["slide 7"]


def test_the_page_says_where_the_table_of_genes_of_the_card_is(plain):
    card = SimpleNamespace(intended_use="Tests.", limitations=["Use the column `reliable` of genes.csv."])
    slide = Slide(plain, plain["table"], Keys(), plain["table"].uns["he2gene"], card, [], 1, _OPTIONS)
    section = filled(_trust, slide)
    assert section.tables[0].rows[0][0].text == (
        "Use the column `reliable` of genes.csv (in the folder of the model; on this page: Reliable genes)."
    )


def test_without_a_reliable_gene_the_page_gives_advice(plain, tmp_path):
    page = Page(hg.report(plain, tmp_path / "report.html"))
    assert "0 of 39 predicted genes are reliable" in page.text
    assert "None of the predicted genes is reliable here." in page.text
    assert "hg.tl.adapt" in page.text
    assert "chosen-genes" not in page.sections


def test_a_training_section_is_named(plain, tmp_path):
    plain["table"].uns["he2gene"] |= {"known_patient": True, "known_sections": ["S1"]}
    page = Page(hg.report(plain, tmp_path / "report.html"))
    assert "reliable on another section of a patient that the model was trained on." in page.text
    assert "The model was trained on the image of S1, so metrics on it are optimistic." in page.text
    assert "known_patient: True" not in page.text


def test_recorded_runs_are_shown(plain, tmp_path):
    hg.tl.evaluate(plain, baselines=[], key_added="mine")
    page = Page(hg.report(plain, tmp_path / "report.html"))
    assert "evaluation" in page.sections
    assert "mean correlation" in page.text
    assert "mine: mean over genes" in page.text
    assert re.search(r"hg\.tl\.evaluate, mine .*prediction_key: he2gene", page.text)


def test_scores_of_gene_sets_are_listed_and_reliable_ones_are_drawn(plain):
    hg.tl.programmes(plain, hg.datasets.toy_diseases())
    slide = Slide(plain, plain["table"], Keys(), plain["table"].uns["he2gene"], None, [], 1, {})
    section = filled(_programmes, slide)
    assert section.tables[0].rows[0][-1].text == "unknown: no held-out slides"
    assert not section.figures
    plain["table"].uns["he2gene_programmes"]["results"]["reliable"] = [True, False, False]
    assert len(filled(_programmes, slide).figures) == 1


def test_quality_of_the_image_is_shown_if_it_was_measured(plain):
    tiles = plain["spots"].assign(qc_tenengrad=np.arange(30.0), qc_outlier=False, is_tissue=np.arange(30) > 9)
    plain["he_qc"] = tiles
    slide = Slide(plain, plain["table"], Keys(), plain["table"].uns["he2gene"], None, [], 1, {})
    section = filled(_quality, slide)
    assert "he_qc (hg.pp.qc): 20 tiles of the image on tissue" in section.text[0]
    row = next(row for row in section.tables[0].rows if row[0].text == "qc_tenengrad")
    assert row[2].text == "19.5"


def test_results_of_another_prediction_are_not_shown(plain):
    uns = plain["table"].uns
    uns["a"] = {"verb": "evaluate", "params": {"prediction_key": "other"}}
    uns["b"] = {"verb": "biomarkers", "params": {"layer": "X"}}
    uns["he2gene_domains"] = {"verb": "domain_preservation", "params": {"layer": "other"}}
    slide = Slide(plain, plain["table"], Keys(), uns["he2gene"], None, [], 1, {"prediction_key": "he2gene"})
    assert not any(filled(fill, slide).text for fill in (_evaluation, _biomarkers, _domains))


def test_domains_of_each_section_of_the_reported_table_are_shown(toy, monkeypatch):
    toy["second"] = toy["table"].copy()
    scores = pd.DataFrame({"section": ["all", "a", "b"], "labels": "predicted", "score": "ari", "mean": 0.5})
    toy["table"].uns["mine"] = {"verb": "domain_preservation", "params": {"layer": "he2gene"}, "table": scores}
    drawn = []
    monkeypatch.setattr(hg.pl, "domains", lambda _, **kwargs: drawn.append(kwargs) or plt.subplots()[1])
    options = {"prediction_key": "he2gene", "table_key": "table"}
    section = filled(_domains, Slide(toy, toy["table"], Keys(), {}, None, [], 1, options))
    assert drawn == [{"section": name, "key": "mine", "table_key": "table"} for name in ("a", "b")]
    assert len(section.figures) == 2


def test_a_map_of_one_region_states_that_numbers_are_of_all_regions(tiny_model, tmp_path):
    slides = {name: hg.datasets.toy((3, 3), mpp=4.0, seed=i) for i, name in enumerate(("a", "b"))}
    for name, slide in slides.items():
        slide["table"].obs_names = name + "_" + slide["table"].obs_names
    joined = sd.concatenate(slides, concatenate_tables=True)
    hg.tl.predict(joined, model=tiny_model, image_key={"spots-a": "he-a", "spots-b": "he-b"}, mpp=4.0)
    page = Page(hg.report(joined, tmp_path / "report.html", shapes_key="spots-a", n_genes=1))
    assert "Maps show only 'spots-a'; numbers are for all regions of the table." in page.text


def test_an_invalid_colour_is_not_written_to_the_page():
    assert [_hex(text) for text in ("red", "red; background: url(//x)", "")] == ["#ff0000", "", ""]


def test_a_figure_that_cannot_be_drawn_is_closed(monkeypatch):
    before = plt.get_fignums()
    figure, ax = plt.subplots()
    monkeypatch.setattr(figure, "savefig", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Section("a", "A").draw(ax, "")
    assert plt.get_fignums() == before


def test_no_page_of_a_folder_replaces_another(monkeypatch, tmp_path):
    def page(store, *_, **__):
        if store.stem == "odd":
            raise RuntimeError("no such thing")
        return store.parent.name, [], {}

    monkeypatch.setattr(import_module("he2gene_sc._report.report"), "_page", page)
    monkeypatch.setattr("he2gene_sc.io._open.open_store", lambda store, _: store)
    names = ["a/s.zarr", "b/S.zarr", "c/s-2.zarr", "d/Index.zarr", "e/odd.zarr"]
    with pytest.warns(UserWarning, match="RuntimeError: no such thing"):
        index = hg.report([tmp_path / name for name in names], tmp_path / "out")
    links = [found["href"] for tag, found in Page(index).tags if tag == "a" and not found["href"].startswith("#")]
    assert links == ["s.html", "S-2.html", "s-2-2.html", "Index-2.html"]
    assert [re.search("<title>(.)", (tmp_path / "out" / link).read_text())[1] for link in links] == list("abcd")
    assert "none: RuntimeError: no such thing" in Page(index).text


@pytest.mark.parametrize("content", [b"", b"path,output\na,b\nc,d,e\n", b"path,output\n\xff,b\n"])
def test_a_damaged_summary_is_named(tmp_path, content):
    (tmp_path / "summary.csv").write_bytes(content)
    with pytest.raises(OSError, match=r"`data` '.*summary\.csv' is (empty|damaged)"):
        hg.report(tmp_path / "summary.csv", tmp_path / "out")


def test_a_damaged_store_does_not_stop_the_others(tmp_path):
    (tmp_path / "in" / "bad.zarr").mkdir(parents=True)
    (tmp_path / "in" / "bad.zarr" / "zarr.json").write_text("{")
    with pytest.warns(UserWarning, match=r"no report of '.*bad\.zarr'"):
        index = hg.report(tmp_path / "in", tmp_path / "out")
    assert "is damaged: its metadata cannot be read" in Page(index).text


def test_invalid_paths_and_rows_without_a_store_raise(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"'output' has missing values in rows 1; add the stores"):
        hg.report(pd.DataFrame({"output": ["a.zarr", np.nan]}), tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"`path` '.*file' is or lies in the file"):
        hg.report([tmp_path / "a.zarr"], tmp_path / "file")

    def read_only(**_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", read_only)
    with pytest.raises(PermissionError, match=r"`path` .*a\.html' lies in a folder that cannot be written to"):
        check_new_file(tmp_path / "a.html", "path", (".html",), overwrite=False)

    def full(**_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    with pytest.raises(OSError, match=r"`path` .*a\.html' .*\(No space left on device") as raised:
        check_new_file(tmp_path / "a.html", "path", (".html",), overwrite=False)
    assert (type(raised.value), raised.value.errno) == (OSError, errno.ENOSPC)


def test_only_our_pages_are_replaced(plain, tmp_path):
    path = tmp_path / "report.html"
    path.write_text("<html>mine</html>")
    with pytest.raises(FileExistsError, match=r"`path` .*report\.html' exists; .*overwrite=True"):
        hg.report(plain, path)
    assert path.read_text() == "<html>mine</html>"
    hg.report(plain, path, overwrite=True)
    assert hg.report(plain, path) == path
    assert list(tmp_path.iterdir()) == [path]


def test_an_index_of_others_is_not_replaced(tmp_path):
    index = tmp_path / "out" / "index.html"
    index.parent.mkdir()
    index.write_text("mine")
    stores = [tmp_path / "a.zarr", tmp_path / "b.zarr"]
    with pytest.raises(FileExistsError, match=r"`path` .*index\.html' exists; .*--overwrite"):
        hg.report(stores, index.parent)
    done = CliRunner().invoke(app, ["report", *map(str, stores), "--out", str(index.parent)])
    assert isinstance(done.exception, FileExistsError)
    assert index.read_text() == "mine"


def test_bad_arguments_raise_before_any_work(plain, toy, tmp_path):
    with pytest.raises(ValueError, match=r"`genes` \['NOGENE'\] were not predicted"):
        hg.report(plain, tmp_path / "a.html", genes=["NOGENE"])
    with pytest.raises(ValueError, match=r"`path` .* ends in '\.pdf'; \.html or \.htm is needed"):
        hg.report(plain, tmp_path / "a.pdf")
    with pytest.raises(ValueError, match="holds no prediction 'other'"):
        hg.report(plain, tmp_path / "a.html", prediction_key="other")
    with pytest.raises(TypeError, match="`data` is a int"):
        hg.report(3, tmp_path / "a.html")
    with pytest.raises(FileNotFoundError, match="`data` .* does not exist"):
        hg.report(tmp_path / "none.zarr", tmp_path / "a.html")
    assert not list(tmp_path.iterdir())


def test_each_slide_gets_a_page_and_an_index_links_to_them(plain, tmp_path):
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


def test_an_index_of_stores_lists_spots_and_verdict(plain, tmp_path):
    plain["table"].uns["he2gene"] |= {"verdict": "like the training data", "known_sections": ["S1"]}
    store = hg.io.save(plain, tmp_path / "a.zarr")
    text = Page(hg.report([store], tmp_path / "reports")).text
    names = r"spots\s+share_on_tissue\s+share_like_training\s+verdict\s+known_sections"
    assert re.search(names + r"\s+a\s+30\s+[\d.]+\s+–\s+like the training data\s+S1", text)


def test_the_command_writes_a_report(plain, tmp_path):
    store = hg.io.save(plain, tmp_path / "slide.zarr")
    out = tmp_path / "page.html"
    done = CliRunner().invoke(app, ["report", str(store), "--out", str(out), "--genes", "TPT1"])
    assert done.exit_code == 0, done.output
    assert done.output.strip() == f"Written: {out}"
    assert "chosen-genes" in Page(out).sections
