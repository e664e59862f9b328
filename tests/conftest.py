import copy
import functools
import gc
import os

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest

from tests.helpers.data import HAS_DATA, REQUIRE_DATA

mpl.use("Agg")


def pytest_configure(config):
    if getattr(config.option, "numprocesses", None):
        # One thread per process, since there is a process per core. Workers and started programs inherit this. numba sets the
        # threads of OpenMP anew, and with it those of torch.
        for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
            os.environ.setdefault(variable, "1")


#: Files that take longest, which run first so that no process waits for them at the end. Tutorials encode what `test_real` reads.
FIRST = (
    *("test_tutorials", "test_examples", "test_reproduce", "test_real", "test_cohort", "test_cli", "test_save_losses"),
    *("test_odd_inputs", "test_save", "test_train", "test_fit", "test_paper", "test_spatial_test", "test_predict"),
    *("test_biomarkers", "test_train_input", "test_adapt", "test_lazy", "test_domains", "test_ownership"),
)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: FIRST.index(item.path.stem) if item.path.stem in FIRST else len(FIRST))
    if HAS_DATA or REQUIRE_DATA:
        return
    skip = pytest.mark.skip(reason="needs her2st under HE2GENE_DATA_DIR")
    for item in items:
        if "data" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True, scope="session")
def _toys_are_made_once():
    """Make each toy slide once and give every test its own copy."""
    import he2gene_sc as hg

    make, made = hg.datasets.toy, {}

    @functools.wraps(make)
    def once(*args, **kwargs):
        if not all(type(value) in (int, float, tuple) for value in (*args, *kwargs.values())):
            return make(*args, **kwargs)
        key = repr((args, sorted(kwargs.items())))
        if key not in made:
            if len(made) > 50:
                made.clear()
            made[key] = make(*args, **kwargs)
        return copy_of(made[key])

    hg.datasets.toy = once
    yield
    hg.datasets.toy = make


def copy_of(sdata):
    """Copy an object, with its images in memory."""
    import spatialdata as sd

    elements = {name: element.copy() for kind, name, element in sdata.gen_elements() if kind != "images"}
    elements |= {name: _image_of_its_own(image) for name, image in sdata.images.items()}
    return sd.SpatialData.init_from_elements(elements, attrs=copy.deepcopy(sdata.attrs))


def _image_of_its_own(image):
    import dask.array as da
    from xarray import Dataset, DataTree

    if hasattr(image, "children"):
        levels = {name: _image_of_its_own(level["image"]) for name, level in image.children.items()}
        return DataTree.from_dict({name: Dataset({"image": level}) for name, level in levels.items()})
    pixels = image.data.compute(scheduler="synchronous").copy()
    return image.copy(data=da.from_array(pixels, chunks=image.data.chunks, name=False))


@pytest.fixture(autouse=True, scope="session")
def _patches_are_encoded_once(tmp_path_factory):
    """Cache the output of the encoder, since many tests encode the same patches with the same weights."""
    import hashlib
    import weakref

    import torch

    from he2gene_sc.models._encoders.stages import Stages

    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "encoded"
    folder.mkdir(exist_ok=True)
    forward, of_network = Stages.forward, weakref.WeakKeyDictionary()

    def digest(tensors):
        found = hashlib.sha256()
        for tensor in tensors:
            found.update(np.ascontiguousarray(tensor.detach().numpy()))
        return found.hexdigest()

    def once(self, x):
        if x.device.type != "cpu" or torch.is_autocast_enabled("cpu") or torch.is_grad_enabled() or self.training:
            return forward(self, x)
        state = [*self.parameters(), *self.buffers()]
        version = [(tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version) for tensor in state]
        if of_network.get(self, (None, None))[0] != version:
            of_network[self] = version, digest(state)
        facts = of_network[self][1], repr(self), x.shape, x.stride(), x.dtype, digest([x])
        path = folder / f"{hashlib.sha256(repr(facts).encode()).hexdigest()}.npy"
        if path.exists():
            return torch.from_numpy(np.load(path))
        found = forward(self, x)
        beside = path.with_suffix(f".{os.getpid()}")
        with beside.open("wb") as file:
            np.save(file, found.numpy())
        beside.rename(path)
        return found

    Stages.forward = once
    yield
    Stages.forward = forward


@pytest.fixture
def small_lite0(monkeypatch):
    """Train on patches of 96 px with EfficientNet-Lite0, which takes a fifth of the time."""
    from dataclasses import replace

    from he2gene_sc.models._encoders.registry import ENCODERS

    monkeypatch.setitem(ENCODERS, "efficientnet-lite0", replace(ENCODERS["efficientnet-lite0"], input_px=96))


@pytest.fixture(autouse=True, scope="session")
def _files_are_not_forced_to_the_disk():
    """Skip fsync, which takes milliseconds a file. `saving_faults` tests power cuts, in its own process."""
    fsync, os.fsync = os.fsync, lambda descriptor: None
    yield
    os.fsync = fsync


@pytest.fixture(autouse=True, scope="session")
def _store_files_need_no_thread():
    """Run `asyncio.to_thread` at once: zarr uses a thread for each file, which takes longer than the small files of tests."""
    import asyncio

    async def at_once(function, /, *args, **kwargs):
        return function(*args, **kwargs)

    in_thread, asyncio.to_thread = asyncio.to_thread, at_once
    yield
    asyncio.to_thread = in_thread


@pytest.fixture(autouse=True, scope="module")
def _imported_modules_are_no_garbage():
    """Exclude imported modules, such as torch and pandas, from garbage collection."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _quiet_bars():
    import he2gene_sc as hg

    before = hg.settings.show_progress_bar
    hg.settings.show_progress_bar = False
    yield
    hg.settings.show_progress_bar = before


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    import matplotlib.pyplot as plt

    plt.close("all")


@pytest.fixture
def toy():
    """Make a small toy slide for a test: 5 × 6 spots at 2 µm/px."""
    import he2gene_sc as hg

    return hg.datasets.toy((5, 6), mpp=2.0)


@pytest.fixture(scope="session")
def toy_store(tmp_path_factory):
    """Store of the toy slide of 5 × 6 spots; tests that change it use a copy."""
    import he2gene_sc as hg

    path = tmp_path_factory.mktemp("toy") / "toy.zarr"
    hg.datasets.toy((5, 6), mpp=2.0).write(path)
    return path


@pytest.fixture(scope="session")
def tiny_model():
    """Fast, deterministic model with a random encoder of two layers; it knows all genes of the toy slide except FTL."""
    import torch

    import he2gene_sc as hg
    from he2gene_sc.models import EncoderSpec, HE2Gene, ModelCard
    from he2gene_sc.models._embedding import N_COLOUR, NO_CONTEXT
    from he2gene_sc.models._encoders.load import encoder_sha256
    from he2gene_sc.models._network import FeatureExtractor, Network

    generator = torch.Generator().manual_seed(0)
    encoder = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 5, stride=4), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
    )
    for parameter in encoder.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    spec = EncoderSpec("tiny", "tiny", "BSD-3-Clause", False, 32, None, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    names = [g for g in hg.datasets.toy((2, 2), mpp=4.0)["table"].var_names if g != "FTL"] + ["NOT1", "NOT2"]
    classes = ("adipose tissue", "connective tissue", "invasive cancer")
    rng = np.random.default_rng(0)
    f, k, g = 2 * (8 + N_COLOUR), 5, len(names)
    tensors = {
        "latent.mean": np.zeros(f, np.float32),
        "latent.scale": np.ones(f, np.float32),
        "latent.projection": rng.normal(size=(f, k)).astype(np.float16),
        "latent.mixing": np.eye(k, dtype=np.float16),
        "genes.weight": rng.normal(size=(k, g)).astype(np.float16),
        "genes.bias": np.full(g, 3, np.float32),
        "annotation.weight": rng.normal(size=(k, 3)).astype(np.float32),
        "annotation.bias": np.zeros(3, np.float32),
        "colour.weight": np.zeros((2 * N_COLOUR, 2), np.float32),
        "colour.bias": np.zeros(2, np.float32),
        "colour.genes": np.array([0, 1]),
    }
    genes = pd.DataFrame(
        {
            "ensembl_id": [f"ENSG{i:011d}" for i in range(g)],
            "group": ["target"] * 4 + ["auxiliary"] * (g - 4),
            "variable": [True] * 3 + [False] * (g - 3),
            "mean": 1.0,
            "pcc": np.linspace(0.9, -0.1, g),
            "pcc_low": np.linspace(0.8, -0.2, g),
            "skill": np.linspace(0.5, -0.5, g),
            "reliable": np.arange(g) < 10,
        },
        index=pd.Index(names, name="gene"),
    )
    card = ModelCard(
        name="tiny",
        version="1",
        description="For tests.",
        encoder={"name": "tiny", "license": "BSD-3-Clause", "sha256": encoder_sha256(encoder), "input_px": 32},
        windows_um=(100.0, 200.0),
        classes=classes,
        class_colors=("#ffdd57", "#2ca02c", "#d62728"),
        n_genes=g,
        n_latent=k,
        training={"sections": {}, "n_patients": 0, "n_spots": 0},
        metrics={},
        reliable_rule="it stands first",
        intended_use="Tests.",
        limitations=("None of it is real.",),
    )
    model = HE2Gene(card, genes, tensors)
    # The encoder is not registered, so set the network where `model.network` caches it.
    model.__dict__["network"] = Network(
        FeatureExtractor(encoder, spec), {key: torch.from_numpy(value) for key, value in tensors.items()}, NO_CONTEXT
    )
    return model


@pytest.fixture(scope="session")
def her2st():
    """Load a section once per session; tests copy what they change."""
    import he2gene_sc as hg

    cache = {}

    def load(section):
        if section not in cache:
            cache[section] = hg.datasets.her2st(section)
        return cache[section]

    return load


@pytest.fixture(scope="session")
def _predicted(her2st):
    import he2gene_sc as hg

    return hg.tl.predict(her2st("C5"), known_patient=True, device="cpu", dtype="float32", copy=True)


@pytest.fixture
def predicted_c5(_predicted):
    """C5, predicted by the bundled model once per session, with a copy of the table for each test."""
    from he2gene_sc._core.element_results import copy_tables

    return copy_tables(_predicted)


@pytest.fixture(scope="session")
def hbcis_root(tmp_path_factory):
    """Small HBCIS folder: 6 sections of 4 patients; tests that change files use a copy."""
    from tests.helpers.hbcis_mini import write_hbcis

    return write_hbcis(tmp_path_factory.mktemp("hbcis") / "HBCIS")


@pytest.fixture
def train_by_file(monkeypatch, tmp_path):
    """Run `he2gene train` on a file with this text in ``tmp_path``; return the arguments of `hg.tl.train`."""
    from typer.testing import CliRunner

    import he2gene_sc as hg
    from he2gene_sc.cli import app as cli

    calls = []

    class Model:
        card = hg.models.load().card

        def save(self, path):
            return path

    monkeypatch.setattr(hg.tl, "train", lambda sdatas, **options: calls.append((sdatas, options)) or Model())

    def call(text):
        (tmp_path / "config.toml").write_text(text)
        arguments = ["train", str(tmp_path / "config.toml"), "--out", str(tmp_path / "model")]
        CliRunner().invoke(cli.app, arguments, catch_exceptions=False)
        return calls[-1]

    return call
