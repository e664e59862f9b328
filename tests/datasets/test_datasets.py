"""`hg.datasets`: the toy slide has its planted signal; her2st is read from disk, cache or web, with errors for missing files."""

import functools
import hashlib
import http.server
import shutil
import socket
import threading
import warnings

import numpy as np
import pandas as pd
import pytest
import spatialdata as sd
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from spatialdata.transformations import get_transformation

import he2gene_sc as hg
from he2gene_sc._core.slide import resolve
from he2gene_sc.datasets import _her2st, _toy
from he2gene_sc.datasets._toy import PLANTED

pytestmark = pytest.mark.slow

OBS = ["array_row", "array_col", "patient", "section", "pathologist", "annotation", "annotation_source", "label_warp"]


def log_counts(table):
    counts = table.X.toarray()
    return pd.DataFrame(np.log1p(counts / counts.sum(1, keepdims=True) * 1e4), table.obs_names, table.var_names)


def finest(sdata):
    image = sdata["he"]
    return sd.get_pyramid_levels(image, n=0) if hasattr(image, "children") else image


# Toy


def test_toy_is_seeded():
    # Do not use `hg.datasets.toy`, whose results the tests cache.
    a, b, c = (_toy.toy((3, 3), mpp=4.0, seed=seed) for seed in (5, 5, 6))
    np.testing.assert_array_equal(a["he"], b["he"])
    assert (a["table"].X != b["table"].X).nnz == 0
    assert (a["he"].to_numpy() != c["he"].to_numpy()).any()


@settings(max_examples=10, deadline=None, derandomize=True)
@given(rows=st.integers(1, 7), columns=st.integers(1, 7), mpp=st.floats(2, 10))
def test_toy_of_any_size_is_a_slide_that_resolves(rows, columns, mpp):
    toy = hg.datasets.toy((rows, columns), mpp=mpp)
    assert toy["table"].n_obs == rows * columns
    (slide,) = resolve(toy)
    assert slide.mpp == mpp
    assert slide.diameter_um == pytest.approx(100)
    assert slide.inside.all()


@pytest.mark.parametrize("arguments", [{"shape": (0, 3)}, {"mpp": 0}, {"mpp": np.nan}, {"mpp": 20}])
def test_toy_refuses_values_that_are_not_positive(arguments):
    with pytest.raises(ValueError, match=f"`{next(iter(arguments))}`"):
        hg.datasets.toy(**arguments)


def test_toy_has_the_slots_of_her2st(toy):
    table = toy["table"]
    assert [c for c in OBS if c not in table.obs] in ([], ["label_warp"])
    assert "spatial" in table.obsm
    assert toy["he"].dtype == np.uint8
    assert (table.X.toarray() % 1 == 0).all()


@pytest.fixture(scope="module")
def large():
    return hg.datasets.toy((14, 14), mpp=4.0)


@pytest.mark.parametrize("kind", ["tumour", "stroma", "adipose"])
def test_genes_planted_in_a_class_are_highly_expressed_in_it(large, kind):
    logs, labels = log_counts(large["table"]), large["table"].obs["pathologist"]
    assert (labels == kind).sum() > 10
    for gene in PLANTED[kind]:
        assert logs.loc[labels == kind, gene].mean() > logs.loc[labels != kind, gene].mean() + 1


def test_genes_planted_in_the_texture_follow_it_within_a_class(large):
    logs, obs = log_counts(large["table"]), large["table"].obs
    for kind in ("tumour", "stroma"):
        rows = (obs["pathologist"] == kind).to_numpy()
        mean = logs.loc[rows, list(PLANTED["texture"])].mean(axis=1)
        assert np.corrcoef(mean, obs.loc[rows, "texture"])[0, 1] > 0.5


def test_the_image_shows_classes_and_texture(large):
    """Check that spots are darker in tumour than in stroma, and in tumour darker at higher density."""
    pixels = large["he"].to_numpy().mean(axis=0)
    obs = large["table"].obs
    dark = np.array(
        [
            -pixels[int(y) - 12 : int(y) + 12, int(x) - 12 : int(x) + 12].mean()
            for x, y in large["table"].obsm["spatial"]
        ]
    )
    kinds = [dark[(obs["pathologist"] == kind).to_numpy()].mean() for kind in ("tumour", "stroma", "adipose")]
    assert kinds[0] > kinds[1] > kinds[2]
    rows = (obs["pathologist"] == "tumour").to_numpy()
    assert np.corrcoef(dark[rows], obs.loc[rows, "texture"])[0, 1] > 0.5


# her2st from disk


@pytest.mark.data
def test_c5_has_all_documented_elements(her2st):
    sdata = her2st("C5")
    table = sdata["table"]
    assert table.n_obs == 181
    assert list(table.obs.columns[:4]) == OBS[:4]
    assert set(OBS) <= set(table.obs.columns)
    assert set(table.obs["patient"]) == {"C"}
    assert table.obs["pathologist"].isna().all()
    assert set(table.obs["annotation_source"].dropna()) == {"transferred"}
    assert table.obs["annotation"].notna().mean() > 0.5
    assert finest(sdata).dtype == np.uint8
    assert len(sdata["he"].children) > 2
    assert finest(sdata).dims == ("c", "y", "x")
    for element in ("he", "spots"):
        assert list(get_transformation(sdata[element], get_all=True)) == ["global"]
    assert table.X.nnz < 0.5 * np.prod(table.shape)
    assert (table.X.data % 1 == 0).all()
    (slide,) = resolve(sdata)
    assert slide.mpp == pytest.approx(0.69, abs=0.02)
    assert slide.diameter_um == pytest.approx(100)
    assert slide.inside.all()
    np.testing.assert_array_equal(slide.centres, table.obsm["spatial"])


@pytest.mark.data
def test_the_lattice_agrees_with_the_mpp_of_every_section_with_image(her2st, recwarn):
    for section in ("A1", "A2", "C5"):
        (slide,) = resolve(her2st(section))
        assert slide.inside.all(), section
    assert not [w for w in recwarn if "looks like" in str(w.message) or "look like" in str(w.message)]


@pytest.mark.data
@pytest.mark.parametrize(
    "section",
    ["A1", "A2", "C2", pytest.param("C3", marks=pytest.mark.slow), pytest.param("C4", marks=pytest.mark.slow), "C5"],
)
def test_spots_lie_on_the_tissue(her2st, section):
    sdata = her2st(section)
    hg.pp.tissue(sdata, key_added="mask")
    mask = sdata.labels.pop("mask")
    height, width = finest(sdata).shape[1:]
    x, y = sdata["table"].obsm["spatial"].T
    hit = mask.to_numpy()[(y / height * mask.shape[0]).astype(int), (x / width * mask.shape[1]).astype(int)]
    assert (hit > 0).mean() >= 0.85


@pytest.mark.data
def test_a1_has_the_pathologists_labels(her2st):
    obs = her2st("A1")["table"].obs
    assert obs["pathologist"].notna().mean() > 0.9
    assert set(obs["annotation_source"].dropna()) == {"pathologist"}
    assert "invasive cancer" in set(obs["annotation"])
    assert (obs["annotation"].astype(object) == obs["pathologist"].astype(object))[obs["pathologist"].notna()].all()


@pytest.mark.data
def test_b1_comes_without_image(monkeypatch, caplog):
    monkeypatch.setattr(_her2st, "_registry", dict)
    with caplog.at_level("INFO", logger="he2gene_sc"):
        sdata = hg.datasets.her2st("B1")
    assert not sdata.images
    assert sdata["table"].n_obs == len(sdata["spots"]) > 250
    assert sdata["table"].obs["pathologist"].notna().any()
    assert "B1: no image" in caplog.text
    assert {record.levelname for record in caplog.records} == {"INFO"}


@pytest.mark.data
def test_spots_in_only_one_file_are_logged_without_a_warning(caplog):
    with warnings.catch_warnings(), caplog.at_level("INFO", logger="he2gene_sc"):
        warnings.simplefilter("error", UserWarning)
        sections = {s: hg.datasets.her2st(s) for s in ("A1", "C1")}
    messages = [record.getMessage() for record in caplog.records if "dropped" in record.getMessage()]
    root = hg.settings.resolved_data_dir() / "her2st"
    expected = []
    for section, sdata in sections.items():
        counts = set(pd.read_csv(root / f"ST-cnts/{section}.tsv.gz", sep="\t", index_col=0, usecols=[0]).index)
        spots = pd.read_csv(root / f"ST-spotfiles/{section}_selection.tsv", sep="\t")
        ids = {f"{x:.0f}x{y:.0f}" for x, y in zip(spots["x"], spots["y"], strict=True)}
        assert set(sdata["table"].obs_names) <= counts & ids
        if counts != ids:
            expected.append(section)
    assert expected == ["A1", "C1"]
    assert [m.split("'")[1] for m in messages] == expected


@pytest.mark.parametrize("section", ["Z9", "c5", ""])
def test_an_unknown_section_is_refused_and_valid_ones_are_listed(section):
    with pytest.raises(ValueError, match="`section` .* is unknown, valid: A1, A2"):
        hg.datasets.her2st(section)


def test_a_section_that_is_not_a_text_is_refused():
    with pytest.raises(ValueError, match="`section` is of type NoneType; a text is needed"):
        hg.datasets.her2st(None)


# her2st from other places: a small synthetic section replaces the files of the repository


@pytest.fixture
def small(tmp_path):
    """Write files of a section "A1" in the layout of the shared folder."""
    root = tmp_path / "files"
    x, y = (grid.ravel() for grid in np.meshgrid(np.arange(2, 7), np.arange(3, 7)))
    spots = pd.DataFrame(
        {"x": x, "y": y, "new_x": x, "new_y": y, "pixel_x": x * 60.0, "pixel_y": y * 60.0, "selected": 1}
    )
    counts = pd.DataFrame(
        np.random.default_rng(0).poisson(2, (20, 6)),
        columns=list("ABCDEF"),
        index=[f"{a}x{b}" for a, b in zip(x, y, strict=True)],
    )
    for folder in ("ST-cnts", "ST-spotfiles", "ST-pat/lbl", "ST-imgs/A/A1"):
        (root / folder).mkdir(parents=True)
    counts.to_csv(root / "ST-cnts/A1.tsv.gz", sep="\t")
    spots.to_csv(root / "ST-spotfiles/A1_selection.tsv", sep="\t", index=False)
    labels = pd.DataFrame({"x": x, "y": y, "label": ["cancer", "stroma"] * 10})
    labels.to_csv(root / "ST-pat/lbl/A1_labeled_coordinates.tsv", sep="\t", index=False)
    Image.fromarray(np.full((480, 512, 3), 200, np.uint8)).save(root / "ST-imgs/A/A1/he.jpg")
    return root


def names_in(root):
    return sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file())


@pytest.fixture
def away(tmp_path, monkeypatch):
    """Use no local data and an empty cache; return the cache folder."""
    (tmp_path / "nothing").mkdir()
    monkeypatch.delenv("HE2GENE_DATA_DIR", raising=False)
    monkeypatch.setattr(hg.settings, "data_dir", tmp_path / "nothing")
    monkeypatch.setattr("pooch.os_cache", lambda name: tmp_path / "cache" / name)
    return tmp_path / "cache" / "he2gene_sc" / "her2st"


@pytest.fixture
def server(small):
    """Serve the small section over http; yield its address and the requested paths."""
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            super().do_GET()

        def log_message(self, *args):
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(small)))
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}", asked
    httpd.shutdown()
    httpd.server_close()


def serve(monkeypatch, small, address, wrong=()):
    digests = {
        name: hashlib.sha256(b"other" if name in wrong else (small / name).read_bytes()).hexdigest()
        for name in names_in(small)
    }
    monkeypatch.setattr(_her2st, "_registry", lambda: digests)
    monkeypatch.setattr(_her2st, "_url", lambda name: f"{address}/{name}")


def test_absent_and_offline_lists_files_and_places(away, monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("no network in tests")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    with pytest.raises(FileNotFoundError) as caught:
        hg.datasets.her2st("C5")
    message = str(caught.value)
    for part in ("ST-cnts/C5.tsv.gz", "ST-spotfiles/C5_selection.tsv", "nothing", str(away), "HE2GENE_DATA_DIR"):
        assert part in message
    assert "https://raw.githubusercontent.com/almaan/her2st/" in message


def test_files_are_downloaded_once_and_then_read_from_the_cache(away, small, server, monkeypatch):
    address, asked = server
    serve(monkeypatch, small, address)
    first = hg.datasets.her2st("A1")
    assert first["table"].n_obs == 20
    assert first["he"].shape == (3, 480, 512)
    assert list(first["table"].obs["pathologist"][:2]) == ["cancer", "stroma"]
    assert len(asked) == len(set(asked)) == 4
    assert names_in(away) == names_in(small)
    asked.clear()
    assert hg.datasets.her2st("A1")["table"].n_obs == 20
    assert asked == []


def test_a_file_with_another_sha256_is_refused(away, small, server, monkeypatch):
    address, _ = server
    serve(monkeypatch, small, address, wrong=["ST-cnts/A1.tsv.gz"])
    with pytest.raises(FileNotFoundError, match=r"ST-cnts/A1\.tsv\.gz: .*(SHA256|hash)"):
        hg.datasets.her2st("A1")
    assert "ST-cnts/A1.tsv.gz" not in names_in(away)


def test_local_files_are_used_before_downloads(away, small, server, monkeypatch):
    address, asked = server
    serve(monkeypatch, small, address)
    shutil.copytree(small, hg.settings.data_dir / "her2st")
    assert hg.datasets.her2st("A1")["table"].n_obs == 20
    assert asked == []


def test_a_clone_of_the_public_repository_is_read(away, small, monkeypatch):
    monkeypatch.setattr(_her2st, "_registry", dict)
    clone = hg.settings.data_dir / "her2st"
    (clone / "data").mkdir(parents=True)
    for folder in small.iterdir():
        (clone / "data" / folder.name).symlink_to(folder, target_is_directory=True)
    sdata = hg.datasets.her2st("A1")
    assert sdata["table"].n_obs == 20
    assert sdata["he"].shape == (3, 480, 512)


@pytest.mark.data
def test_a_clone_with_reduced_images_and_clusters_in_res_is_read(tmp_path, monkeypatch, her2st):
    source = hg.settings.resolved_data_dir() / "her2st"
    expected = her2st("A2")["table"].obsm["spatial"]
    clone = tmp_path / "her2st"
    places = {
        "data/ST-cnts": "ST-cnts",
        "data/ST-spotfiles": "ST-spotfiles",
        "data/ST-pat": "ST-pat",
        "res/ST-cluster": "ST-cluster",
        "backup/app/www/imgs": "app",
    }
    for place, name in places.items():
        (clone / place).parent.mkdir(parents=True, exist_ok=True)
        (clone / place).symlink_to(source / name, target_is_directory=True)
    monkeypatch.setattr(hg.settings, "data_dir", tmp_path)
    monkeypatch.setattr(_her2st, "_cache", lambda: pytest.fail("nothing may be fetched"))
    sdata = hg.datasets.her2st("A2")
    np.testing.assert_array_equal(sdata["table"].obsm["spatial"], expected)
    assert "he" in sdata.images


def test_the_registry_holds_sha256_digests_of_whole_sections():
    registry = _her2st._registry()
    assert all(len(digest) == 64 for digest in registry.values())
    counts = {name[8:10] for name in registry if name.startswith("ST-cnts/")}
    spots = {name[13:15] for name in registry if name.startswith("ST-spotfiles/")}
    assert {"A1", "A2", "C5"} <= counts == spots <= set(hg.datasets.HER2ST_SECTIONS)
    assert all(_her2st._url(name).startswith("https://raw.githubusercontent.com/almaan/her2st/") for name in registry)


def test_a_section_that_cannot_be_downloaded_raises(away):
    with pytest.raises(FileNotFoundError, match=r"ST-cnts/A3\.tsv\.gz: not registered for download"):
        hg.datasets.her2st("A3")


@pytest.mark.data
def test_the_registry_agrees_with_local_files():
    root = hg.settings.resolved_data_dir() / "her2st"
    registry = _her2st._registry()
    at_hand = [name for name in registry if (root / name).is_file()]
    assert at_hand
    for name in at_hand:
        assert hashlib.sha256((root / name).read_bytes()).hexdigest() == registry[name], name


def test_images_are_found_in_the_layout_of_the_zenodo_archive(small, tmp_path, monkeypatch):
    (small / "images" / "HE").mkdir(parents=True)
    (small / "ST-imgs/A/A1/he.jpg").rename(small / "images" / "HE" / "A1.jpg")
    (tmp_path / "set" / "her2st").mkdir(parents=True)
    (tmp_path / "set" / "her2st" / "data").symlink_to(small, target_is_directory=True)
    monkeypatch.setattr(hg.settings, "data_dir", tmp_path / "set")
    assert hg.datasets.her2st("A1")["he"].shape == (3, 480, 512)
