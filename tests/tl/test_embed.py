"""Features are computed once, stored in the table or in a folder, reused only if they match, and resumed after an interruption."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import spatialdata as sd
import torch
from distributed import Reschedule, get_worker

import he2gene_sc as hg
from he2gene_sc._core.slide import resolve
from he2gene_sc.image import PatchReader
from he2gene_sc.inference import _cache, _workers
from he2gene_sc.models._embedding import NO_CONTEXT
from he2gene_sc.models._network import FeatureExtractor, Network
from he2gene_sc.tl._encoding import Encoding, parts_of

pytestmark = pytest.mark.slow
KEY = "X_he2gene_features"


class Count:
    """Count the spots that the extractor of a model encodes, and stop it after a given number."""

    def __init__(self, monkeypatch):
        self.n, self.stop = 0, None
        forward = FeatureExtractor.forward

        def counted(extractor, patches, *args):
            if self.stop is not None and self.n >= self.stop:
                raise KeyboardInterrupt
            self.n += len(patches[0])
            return forward(extractor, patches, *args)

        monkeypatch.setattr(FeatureExtractor, "forward", counted)

    def run(self, call, *args, **kwargs):
        self.n = 0
        return call(*args, **kwargs), self.n


@pytest.fixture
def count(monkeypatch):
    return Count(monkeypatch)


@pytest.fixture(scope="module")
def by_view(tiny_model):
    """Return a model that averages its windows, like the networks of the paper; each view has its own annotation."""
    rng = np.random.default_rng(5)
    g = len(tiny_model.genes)
    tensors = {
        "genes.weight": rng.normal(size=(8, g)).astype(np.float32),
        "genes.bias": np.full(g, 3, np.float32),
        "annotation.weight": rng.normal(size=(8, 3)).astype(np.float32),
        "annotation.bias": np.zeros(3, np.float32),
    }
    card = replace(tiny_model.card, fusion="mean", tta=True, n_latent=8)
    model = hg.models.HE2Gene(card, tiny_model.genes, tensors)
    one = tiny_model.network.extractor
    extractor = FeatureExtractor(one.encoder, replace(SPEC, input_px=one.input_px), fusion="mean")
    model.__dict__["network"] = Network(extractor, {k: torch.from_numpy(v) for k, v in tensors.items()}, NO_CONTEXT)
    return model


SPEC = hg.models.EncoderSpec("tiny", "tiny", "BSD-3-Clause", False, 32, None, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def predicted(sdata, model, **kwargs):
    return hg.tl.predict(sdata, model=model, copy=True, **kwargs)["table"]


def same(a, b, **tolerance):
    for x, y in (
        (a.layers["he2gene"], b.layers["he2gene"]),
        (a.obsm["X_he2gene"], b.obsm["X_he2gene"]),
        (a.obsm["he2gene_annotation_proba"], b.obsm["he2gene_annotation_proba"]),
        (a.obs["he2gene_tissue"], b.obs["he2gene_tissue"]),
    ):
        if tolerance:
            np.testing.assert_allclose(x, y, **tolerance)
        else:
            np.testing.assert_array_equal(x, y)


def test_features_in_the_table_give_the_same_prediction_and_nothing_is_encoded(toy, tiny_model, count):
    expected = predicted(toy, tiny_model)
    _, n = count.run(hg.tl.embed, toy, model=tiny_model)
    features = toy["table"].obsm[KEY]
    assert features.shape == (30, 2 * (8 + 9))
    assert features.dtype == np.float32
    assert n == 30 + 1  # one blank spot gives the size
    table, n = count.run(predicted, toy, tiny_model, features=KEY)
    assert n == 0
    same(table, expected)
    one_gene, n = count.run(predicted, toy, tiny_model, features=KEY, genes=["ERBB2"])
    assert n == 0
    assert one_gene.var["he2gene_predicted"].sum() == 1


def test_another_head_on_the_same_encoder_uses_the_same_features(toy, tiny_model, count):
    hg.tl.embed(toy, model=tiny_model)
    bias = {"genes.bias": tiny_model.tensors["genes.bias"] + 1}
    other = hg.models.HE2Gene(tiny_model.card, tiny_model.genes, tiny_model.tensors | bias)
    tensors = {key: torch.from_numpy(value) for key, value in other.tensors.items()}
    other.__dict__["network"] = Network(tiny_model.network.extractor, tensors, NO_CONTEXT)
    table, n = count.run(predicted, toy, other, features=KEY)
    assert n == 0
    same(table, predicted(toy, other))


def test_a_folder_is_filled_once_and_read_afterwards(toy, tiny_model, count, tmp_path):
    expected, n = count.run(predicted, toy, tiny_model)
    first, filled = count.run(predicted, toy, tiny_model, features=tmp_path / "new")
    assert filled == n + 1
    second, n = count.run(predicted, toy, tiny_model, features=str(tmp_path / "new"), genes="all")
    assert n == 0
    same(first, expected)
    assert KEY not in second.obsm
    hg.tl.embed(toy, model=tiny_model, folder=tmp_path / "new")
    assert len(list((tmp_path / "new").iterdir())) == 1
    assert "he2gene_features" not in toy["table"].uns


@pytest.mark.parametrize("where", ["obsm", "folder"])
def test_models_that_average_views_store_each_view(toy, by_view, count, tmp_path, where):
    expected = predicted(toy, by_view)
    kept = KEY if where == "obsm" else tmp_path
    hg.tl.embed(toy, model=by_view, **({} if where == "obsm" else {"folder": tmp_path}))
    if where == "obsm":
        assert toy["table"].obsm[KEY].shape == (30, 2 * 8 * 8)
    table, n = count.run(predicted, toy, by_view, features=kept)
    assert n == 0
    same(table, expected, rtol=1e-5, atol=1e-6)


def test_an_interrupted_run_is_resumed_and_gives_the_same_numbers(toy, tiny_model, count, tmp_path, monkeypatch):
    monkeypatch.setattr(_cache, "_BLOCK_SPOTS", 10)
    options = {"features": tmp_path, "batch_size": 5}
    expected = predicted(toy, tiny_model, batch_size=5)
    count.n, count.stop = 0, 1 + 15  # in the second of three blocks of two batches
    with pytest.raises(KeyboardInterrupt):
        predicted(toy, tiny_model, **options)
    assert [path.suffix for path in tmp_path.iterdir()] == [".block"]
    count.stop = None
    table, n = count.run(predicted, toy, tiny_model, **options)
    assert n == 1 + 20
    same(table, expected)
    assert [path.suffix for path in tmp_path.iterdir()] == [".npy"]
    assert count.run(predicted, toy, tiny_model, **options)[1] == 0


def test_readers_of_the_settings_read_for_every_verb(toy, tiny_model, tmp_path, monkeypatch):
    seen, read = [], PatchReader._batches
    monkeypatch.setattr(PatchReader, "_batches", lambda self, some: seen.append(self.n_readers) or read(self, some))
    for n, expected in ((None, 1), (3, 3)):
        monkeypatch.setattr(hg.settings, "n_readers", n)
        seen.clear()
        hg.tl.embed(toy, model=tiny_model, folder=tmp_path / f"{n}")
        hg.tl.predict(toy, model=tiny_model)
        # Spots are looked at by one reader before, to see whether they lie where they should.
        assert seen.count(expected) >= 2
        assert set(seen) <= {1, expected}
    assert files_in(tmp_path / "None") == files_in(tmp_path / "3")


def test_blocks_of_spots_in_another_order_are_not_reused(tmp_path, monkeypatch):
    """With other chunks, the same pixels are read in another order."""
    monkeypatch.setattr(_cache, "_BLOCK_SPOTS", 4)
    orders = np.arange(8).reshape(4, 2), np.arange(8).reshape(2, 2, 2).transpose(0, 2, 1).reshape(4, 2)
    names = [
        [block.path for block in _cache._blocks(SimpleNamespace(batches=list(order), batch_size=2), tmp_path / "key")]
        for order in orders
    ]
    assert len(names[0]) == len(names[1]) == 2
    assert not set(names[0]) & set(names[1])


def test_a_damaged_block_is_encoded_again(toy, tiny_model, count, tmp_path, monkeypatch):
    monkeypatch.setattr(_cache, "_BLOCK_SPOTS", 10)
    count.n, count.stop = 0, 1 + 15
    with pytest.raises(KeyboardInterrupt):
        predicted(toy, tiny_model, features=tmp_path, batch_size=5)
    (block,) = tmp_path.iterdir()
    block.write_bytes(block.read_bytes()[:-1] + b"x")
    count.stop = None
    table, n = count.run(predicted, toy, tiny_model, features=tmp_path, batch_size=5)
    assert n == 1 + 30
    same(table, predicted(toy, tiny_model, batch_size=5))


def darker(sdata):
    x, y = sdata["table"].obsm["spatial"][7].astype(int)
    sdata["he"].data = sdata["he"].data.compute()
    sdata["he"].data[:, y, x] ^= 1
    return sdata


@pytest.mark.parametrize(
    ("change", "options", "match"),
    [
        (darker, {}, "differ in the image, its µm/px or the spots. Compute them again"),
        (None, {"mpp": 2.2}, "differ in the image, its µm/px or the spots, the windows"),
        (None, {"tta": True}, r"differ in the symmetries \(`tta`\)\."),
        (None, {"dtype": "bfloat16"}, r"differ in the precision \(`dtype`\)\."),
    ],
    ids=["pixel", "mpp", "tta", "dtype"],
)
@pytest.mark.filterwarnings("ignore:.*legacy ST")
def test_features_of_another_slide_or_model_raise_with_the_differences(toy, tiny_model, count, change, options, match):
    hg.tl.embed(toy, model=tiny_model)
    toy = toy if change is None else change(toy)
    with pytest.raises(ValueError, match=rf"`features` '{KEY}'.*{match}"):
        hg.tl.predict(toy, model=tiny_model, features=KEY, **options)
    assert "he2gene" not in toy["table"].uns


def test_features_of_another_encoder_or_with_changed_values_raise(toy, tiny_model):
    hg.tl.embed(toy, model=tiny_model)
    card = replace(tiny_model.card, encoder={**tiny_model.card.encoder, "sha256": "0" * 64})
    other = hg.models.HE2Gene(card, tiny_model.genes, tiny_model.tensors)
    other.__dict__["network"] = tiny_model.network
    with pytest.raises(ValueError, match="differ in the weights of the encoder"):
        hg.tl.predict(toy, model=other, features=KEY)
    toy["table"].obsm[KEY][3, 2] += 1
    with pytest.raises(ValueError, match=rf"obsm\['{KEY}'\] was changed since hg.tl.embed wrote it"):
        hg.tl.predict(toy, model=tiny_model, features=KEY)
    del toy["table"].uns["he2gene_features"]
    with pytest.raises(ValueError, match="not written by hg.tl.embed, or its record in uns is missing"):
        hg.tl.predict(toy, model=tiny_model, features=KEY)


def test_features_are_kept_in_a_store(toy, tiny_model, count, tmp_path):
    expected = predicted(toy, tiny_model)
    hg.tl.embed(toy, model=tiny_model)
    toy.write(tmp_path / "toy.zarr")
    import spatialdata

    table, n = count.run(predicted, spatialdata.read_zarr(tmp_path / "toy.zarr"), tiny_model, features=KEY)
    assert n == 0
    same(table, expected)


def test_a_name_that_is_neither_key_nor_folder_raises_before_encoding(toy, tiny_model, count, tmp_path):
    count.stop = 0
    for value, match in (
        ("X_he2gene_feature", r"neither a key of obsm nor an existing folder; for a new folder pass features='\./"),
        (3, "`features` is 3; a path is needed"),
        (tmp_path / "file", "is a file"),
    ):
        (tmp_path / "file").write_text("")
        with pytest.raises(ValueError, match=match):
            hg.tl.predict(toy, model=tiny_model, features=value)
    with pytest.raises(
        TypeError, match=r"`batchsize` is not a parameter of hg.tl.predict.*near 'batchsize'.*batch_size"
    ):
        hg.tl.predict(toy, model=tiny_model, batchsize=3)


def test_embed_raises_before_encoding_if_it_cannot_write(toy, tiny_model, count, monkeypatch):
    count.stop = 1
    toy["table"].obsm[KEY] = np.zeros((30, 2))
    with pytest.raises(ValueError, match=rf"obsm\['{KEY}'\] exists and was not written by hg.tl.embed"):
        hg.tl.embed(toy, model=tiny_model)
    del toy["table"].obsm[KEY]
    monkeypatch.setattr(hg.settings, "memory_limit", 1000)
    with pytest.raises(ValueError, match=r"`folder` is None: the features need .* write them to a folder"):
        hg.tl.embed(toy, model=tiny_model)
    del toy.tables["table"]
    with pytest.raises(ValueError, match="no table annotates the spots.*write them to a folder"):
        hg.tl.embed(toy, model=tiny_model)


def test_a_copy_gets_the_features_and_the_object_is_unchanged(toy, tiny_model):
    copied = hg.tl.embed(toy, model=tiny_model, key_added="other", copy=True)
    assert "X_other" in copied["table"].obsm
    assert copied["table"].uns["other"]["verb"] == "embed"
    assert "X_other" not in toy["table"].obsm


@pytest.fixture(scope="module")
def client():
    """Return a client with two workers in this process."""
    import dask
    from distributed import Client

    quiet = dask.config.set({"distributed.worker.profile.enabled": False})
    with quiet, Client(processes=False, n_workers=2, threads_per_worker=2, dashboard_address=None) as found:
        yield found


@pytest.fixture
def store(toy, tmp_path, monkeypatch):
    """Return the toy slide, opened from a store, with blocks of ten spots."""
    monkeypatch.setattr(_cache, "_BLOCK_SPOTS", 10)
    toy.write(tmp_path / "slide.zarr")
    return sd.read_zarr(tmp_path / "slide.zarr")


def files_in(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("shapes_key", ["spots", "bins"])
def test_two_workers_give_the_same_features_as_one_bit_for_bit(store, tiny_model, client, tmp_path, shapes_key):
    options = {"model": tiny_model, "batch_size": 5, "shapes_key": shapes_key}
    if shapes_key == "bins":  # interpolated from lattices
        hg.pp.tissue(store)
        hg.pp.grid(store, pitch_um=20.0, diameter_um=20.0, key_added="bins")
        options["lattice"] = 1.0
    hg.tl.embed(store, folder=tmp_path / "one", **options)
    hg.tl.embed(store, folder=tmp_path / "two", client=client, **options)
    assert len(files_in(tmp_path / "two")) == (1 if shapes_key == "spots" else 2)
    assert files_in(tmp_path / "one") == files_in(tmp_path / "two")


def test_blocks_of_a_lost_worker_are_encoded_by_the_others(store, tiny_model, client, tmp_path, monkeypatch):
    hg.tl.embed(store, model=tiny_model, folder=tmp_path / "one", batch_size=5)
    encode_blocks, encoding = _workers.encode_blocks, []

    def leaving(*args):
        encoding.append(get_worker().address)
        if len(encoding) == 1:
            client.retire_workers([encoding[0]], close_workers=True)
            raise Reschedule
        return encode_blocks(*args)

    monkeypatch.setattr(_workers, "encode_blocks", leaving)
    hg.tl.embed(store, model=tiny_model, folder=tmp_path / "two", batch_size=5, client=client)
    assert len(encoding) > 3
    assert encoding[0] not in encoding[-2:]
    assert files_in(tmp_path / "one") == files_in(tmp_path / "two")


def test_workers_need_a_folder_a_running_client_and_an_image_that_they_can_read(
    toy, store, tiny_model, client, tmp_path, monkeypatch
):
    place = {"model": tiny_model, "folder": tmp_path / "new"}
    with pytest.raises(TypeError, match="`client` is of type str; a distributed.Client is needed"):
        hg.tl.embed(store, client="tcp://127.0.0.1:8786", **place)
    with pytest.raises(ValueError, match="`folder` is None, but workers of `client` write features to a folder"):
        hg.tl.embed(store, model=tiny_model, client=client)
    monkeypatch.setattr(_workers, "SENT_BYTES", 2**16)
    with pytest.raises(ValueError, match="the image is in memory, where workers cannot read it"):
        hg.tl.embed(toy, client=client, **place)
    assert not (tmp_path / "new").exists()
    # Files that only this process can read.
    digest, read_here = _workers._digest, []
    monkeypatch.setattr(
        _workers, "_digest", lambda *args: "other" if read_here else read_here.append(1) or digest(*args)
    )
    with pytest.raises(ValueError, match="a worker reads other pixels of the image than this process"):
        hg.tl.embed(store, client=client, batch_size=5, **place)
    assert not any((tmp_path / "new").iterdir())


def test_a_resumed_run_only_reads_the_pixels_that_it_needs(toy, tiny_model, monkeypatch):
    how = Encoding.checked(tiny_model, "cpu", False, True, {"batch_size": 5})
    reader = parts_of(resolve(toy)[0], tiny_model, how)[0].reader
    expected = list(reader)
    found = list(reader.read_batches([1, 4]))
    assert len(found) == 2
    for batch, i in zip(found, (1, 4), strict=True):
        np.testing.assert_array_equal(batch.index, expected[i].index)
        for ours, theirs in zip(batch.patches, expected[i].patches, strict=True):
            np.testing.assert_array_equal(ours, theirs)
    assert list(reader.read_batches([])) == []
